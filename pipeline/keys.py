"""Keys by which machines know each other: one pair for the machine that runs, one for each that may come to it.

The folder of keys is $PIPELINE_KEYS_DIR, or `pipeline/keys` in the platform's folder of settings. In it,

    server.key_secret, server.key      this machine, as runs on it show themselves
    clients/NAME.key                   who is let in: whoever holds the secret of one of these
    NAME/client.key_secret, remote.key what the machine NAME needs in its own folder of keys

A key is never overwritten, and a secret is readable by its user alone.
"""

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Final

from msgspec import Struct

from pipeline.config import Address
from pipeline.control import KeyPair, Listening, Remote, make_keys, read_keys
from pipeline.errors import ConfigError, ControlError
from pipeline.runtime import refuse_foreign

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_Z85: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_RESERVED: Final = frozenset({"clients", "server"})


class Found(Struct, kw_only=True):
    """What is in the folder of keys."""

    folder: str
    server: str | None
    """The public key that runs on this machine show, if it has one."""
    clients: dict[str, str]
    """Who is let in, and by which public key."""
    remote: str | None
    """The public key of the machine that this one is a client of."""


def folder() -> Path:
    """Where this machine's keys are."""
    given = os.environ.get("PIPELINE_KEYS_DIR")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_config_dir("pipeline", appauthor=False)) / "keys"


def found() -> Found:
    """What is there. Raises ControlError where a file is no key."""
    server, remote = folder() / "server.key", folder() / "remote.key"
    return Found(
        folder=str(folder()),
        server=_public(server).decode() if server.exists() else None,
        clients={path.stem: _public(path).decode() for path in sorted((folder() / "clients").glob("*.key"))},
        remote=_public(remote).decode() if remote.exists() else None,
    )


def make_server() -> None:
    """Make this machine's own pair, if it has none. Raises ControlError."""
    if not (folder() / "server.key_secret").exists():
        _make_folder(folder() / "clients")
        _install("server", {"server.key": folder() / "server.key", "server.key_secret": folder() / "server.key_secret"})


def make_client(name: str) -> Path:
    """Let a new machine in; returns the folder of the two files that it needs.

    Raises ConfigError if it can be no name, and ControlError if it has a key.
    """
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise ConfigError(f"client {name!r}: expected 1 to 32 letters, digits, '.', '_' or '-', and not 'server'")
    make_server()
    public = folder() / "clients" / f"{name}.key"
    if public.exists():
        raise ControlError(f"client {name!r}: is let in already, by {public}; remove it for a new key")
    carried = folder() / name
    _make_folder(carried)
    _install(name, {f"{name}.key_secret": carried / "client.key_secret", f"{name}.key": public})
    _copy(folder() / "server.key", carried / "remote.key")
    return carried


def listening(listen: str) -> Listening:
    """What a run needs that listens at `listen`, such as tcp://192.168.1.5:5570.

    Who is let in is looked up anew for everyone who comes. Raises ControlError where this machine has no keys, and
    ConfigError where someone else could add one.
    """
    at = Address.parse(listen, "remote.listen")
    path = folder() / "server.key_secret"
    if not path.exists():
        raise ControlError(f"remote.listen = {listen!r}: expected keys in {folder()}: make them with `pipeline keys`")
    refuse_foreign(folder() / "clients", "folder of keys", "PIPELINE_KEYS_DIR")
    return Listening(at.control, at.events, _pair(path), _is_authorized)


def remote(spec: str) -> tuple[Remote, Remote]:
    """The two sockets, for commands and for events, of a run on another machine: `spec` is [tcp://]HOST:PORT.

    Raises ConfigError where it is no address, and ControlError where this machine has no key for another.
    """
    at = Address.parse(spec, "remote")
    server, client = folder() / "remote.key", folder() / "client.key_secret"
    for path in (server, client):
        if not path.exists():
            raise ControlError(
                f"remote {spec}: expected {path}: make it with `pipeline keys --client NAME` on the other machine"
            )
    public, keys = _public(server), _pair(client)
    return Remote(at.control, public, keys), Remote(at.events, public, keys)


def _is_authorized(public: bytes) -> bool:
    for path in (folder() / "clients").glob("*.key"):
        with contextlib.suppress(ControlError):  # one bad file keeps no one else out
            if _public(path) == public:
                return True
    return False


def _make_folder(path: Path) -> None:
    try:
        folder().parent.mkdir(parents=True, exist_ok=True)
        for part in (folder(), path):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ControlError(f"folder of keys {path} cannot be made: {error.strerror}") from None


def _install(name: str, places: dict[str, Path]) -> None:
    """Make a pair, and move its two files to where they belong. Raises ControlError where one is there."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=folder()) as made:  # for this user alone, as mkdtemp's are
        make_keys(Path(made), name)
        for file, place in places.items():
            _keep(Path(made) / file, place)


def _copy(source: Path, place: Path) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(dir=folder()) as copy:
        copy.write(source.read_bytes())
        copy.flush()
        _keep(Path(copy.name), place)


def _keep(made: Path, place: Path) -> None:
    made.chmod(0o600)
    try:
        os.link(made, place)  # which never replaces what is there
    except OSError as error:
        raise ControlError(f"key {place} cannot be made: {(error.strerror or '').lower()}") from None


def _public(path: Path) -> bytes:
    public, _ = _read(path)
    return public


def _pair(path: Path) -> KeyPair:
    """Raises ControlError where others may read the secret."""
    public, secret = _read(path)
    if secret is None:
        raise ControlError(f"key {path}: expected a secret key in it")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ControlError(f"key {path}: others may read it (mode {mode:o}): expected 600, by `chmod 600`")
    return KeyPair(public, secret)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = read_keys(path)
    except OSError as error:
        raise ControlError(f"key {path}: {error.strerror or error}") from None
    except ValueError:
        raise ControlError(f"key {path}: expected a file made by `pipeline keys`") from None
    for key in (public, secret):
        if key is not None and not _Z85.fullmatch(key):
            raise ControlError(f"key {path}: expected a key of 40 characters, as made by `pipeline keys`")
    return public, secret
