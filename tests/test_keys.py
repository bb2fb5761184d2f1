"""pipeline.keys: pairs that are made once, kept from others, and read back."""

import shutil
import stat
from pathlib import Path

import pytest

from pipeline import keys
from pipeline.errors import ConfigError, ControlError, PipelineError

LISTEN = "tcp://127.0.0.1:5570"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's folder of keys, not made yet."""
    path = tmp_path / "pipeline" / "keys"
    monkeypatch.setenv("PIPELINE_KEYS_DIR", str(path))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(kind: type[PipelineError] = ControlError) -> "pytest.RaisesExc[PipelineError]":
    return pytest.raises(kind)


def test_what_is_made_is_for_this_user_alone(folder: Path) -> None:
    keys.make_client("laptop")
    assert set(files(folder)) == {
        "server.key",
        "server.key_secret",
        "clients/laptop.key",
        "laptop/client.key_secret",
        "laptop/remote.key",
    }
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_only_secret_files_hold_a_secret(folder: Path) -> None:
    keys.make_client("laptop")
    holding = {name for name, content in files(folder).items() if b"secret-key =" in content}
    assert holding == {"server.key_secret", "laptop/client.key_secret"}


def test_a_key_is_never_overwritten(folder: Path) -> None:
    keys.make_client("laptop")
    before = files(folder)
    keys.make_server()
    with refused() as caught:
        keys.make_client("laptop")
    assert str(caught.value) == (
        f"client 'laptop': is let in already, by {folder / 'clients' / 'laptop.key'}; remove it for a new key"
    )
    (folder / "clients" / "laptop.key").unlink()
    with refused() as caught:
        keys.make_client("laptop")
    assert str(caught.value) == f"key {folder / 'laptop' / 'client.key_secret'} cannot be made: file exists"
    before.pop("clients/laptop.key")
    assert {name: content for name, content in files(folder).items() if name in before} == before
    (folder / "server.key_secret").unlink()
    with refused() as caught:
        keys.make_server()
    assert str(caught.value) == f"key {folder / 'server.key'} cannot be made: file exists"


def test_every_pair_is_another(folder: Path) -> None:
    for name in ("one", "two"):
        keys.make_client(name)
    found = keys.found()
    assert len({found.server, *found.clients.values()}) == 3
    assert list(found.clients) == ["one", "two"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "clients", "server", "-x", "a" * 33])
def test_a_name_that_is_none_is_refused(folder: Path, name: str) -> None:
    with refused(ConfigError) as caught:
        keys.make_client(name)
    assert str(caught.value).startswith(f"client {name!r}: expected 1 to 32 letters")
    assert not folder.exists()


def test_a_run_without_keys_is_refused(folder: Path) -> None:
    with refused() as caught:
        keys.listening(LISTEN)
    assert str(caught.value) == (
        f"remote.listen = '{LISTEN}': expected keys in {folder}: make them with `pipeline keys`"
    )


def test_who_is_let_in_is_looked_up_anew_each_time(folder: Path) -> None:
    keys.make_server()
    listening = keys.listening(LISTEN)
    assert (listening.control, listening.events) == ("tcp://127.0.0.1:5570", "tcp://127.0.0.1:5571")
    keys.make_client("laptop")
    public = keys.found().clients["laptop"].encode()
    assert listening.is_authorized(public)
    assert not listening.is_authorized(b"x" * 40)
    (folder / "clients" / "bad.key").write_text("nothing")
    assert listening.is_authorized(public)
    (folder / "clients" / "laptop.key").unlink()
    assert not listening.is_authorized(public)


def test_a_client_has_what_was_made_for_it_and_the_run_s_public_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = keys.make_client("laptop")
    made = keys.found()
    shutil.copytree(carried, tmp_path / "second")
    monkeypatch.setenv("PIPELINE_KEYS_DIR", str(tmp_path / "second"))
    commands, events = keys.remote("127.0.0.1:5570")
    assert (commands.address, events.address) == ("tcp://127.0.0.1:5570", "tcp://127.0.0.1:5571")
    assert commands.server.decode() == made.server == keys.found().remote
    assert commands.keys.public.decode() == made.clients["laptop"]


def test_a_machine_without_a_key_for_another_is_told_how_to_get_one(folder: Path) -> None:
    with refused() as caught:
        keys.remote(LISTEN)
    assert str(caught.value) == (
        f"remote {LISTEN}: expected {folder / 'remote.key'}: make it with `pipeline keys --client NAME` "
        "on the other machine"
    )


@pytest.mark.parametrize(
    "spec", ["", "host", "tcp://host", "host:0", "host:65535", "udp://host:1", "ho st:1", "host:x"]
)
def test_an_address_that_is_none_is_refused(folder: Path, spec: str) -> None:
    with refused(ConfigError) as caught:
        keys.remote(spec)
    assert str(caught.value) == f"remote = {spec!r}: expected tcp://ADDRESS:PORT, with a PORT from 1 to 65534"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("nothing", "expected a file made by `pipeline keys`"),
        ('curve\n    public-key = "short"\n', "expected a key of 40 characters, as made by `pipeline keys`"),
        ('curve\n    public-key = "' + "a" * 40 + '"\n', "expected a secret key in it"),
    ],
)
def test_a_damaged_key_is_refused(folder: Path, content: str, line: str) -> None:
    keys.make_server()
    path = folder / "server.key_secret"
    path.write_text(content)
    with refused() as caught:
        keys.listening(LISTEN)
    assert str(caught.value) == f"key {path}: {line}"


def test_a_secret_that_others_may_read_is_refused(folder: Path) -> None:
    keys.make_server()
    path = folder / "server.key_secret"
    path.chmod(0o644)
    with refused() as caught:
        keys.listening(LISTEN)
    assert str(caught.value) == f"key {path}: others may read it (mode 644): expected 600, by `chmod 600`"
