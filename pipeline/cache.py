"""Repositories in the model hub's cache: which commit was pulled, and what the hub told of its files.

The hub's own library keeps files there by their hash, and a name for the last commit that any program on the machine
asked for. `pull` adds a record of its own, so that a run uses what was pulled, whatever becomes of the branch or of
that name. Uses no network.
"""

import hashlib
import re
from pathlib import Path
from typing import Final

import msgspec

from pipeline.errors import CheckpointError
from pipeline.headers import reading

RECORD_FILE: Final = "pipeline.json"
MAIN: Final = "main"
"""The branch that is taken where no revision is named."""
DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
CHUNK_BYTES: Final = 1 << 20


class RemoteFile(msgspec.Struct, frozen=True):
    """A file as the hub tells of it."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """Its SHA-256 if it is in git-lfs, else git's SHA-1; also the file's name in the cache."""


class Record(msgspec.Struct, frozen=True):
    """What was pulled of a repository."""

    repo: str
    revision: str
    """Branch, tag or commit, as it was asked for."""
    commit: str
    files: list[RemoteFile]


def hub() -> Path:
    """The hub's cache; it need not be there."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def root(repo: str) -> Path:
    """A repository's folder in the cache; it need not be there."""
    return hub() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """The folder that holds a commit's files under their names; it need not be there."""
    return root(repo) / "snapshots" / commit


def record(repo: str) -> Record | None:
    """What was pulled of a repository, if anything was. Raises CheckpointError: the record is damaged."""
    path = root(repo) / RECORD_FILE
    if not path.exists():
        return None
    with reading(path):
        encoded = path.read_bytes()
    try:
        found = msgspec.json.decode(encoded, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}), run: pipeline models pull {repo}") from None
    if not COMMIT.fullmatch(found.commit):
        raise CheckpointError(
            f"{path}: commit is {found.commit!r}, expected 40 digits, run: pipeline models pull {repo}"
        )
    return found


def records() -> list[Record]:
    """What was pulled of any repository, by name; damaged records are left out."""
    found = []
    for path in sorted(hub().glob(f"models--*/{RECORD_FILE}")):
        try:
            one = record(path.parent.name.removeprefix("models--").replace("--", "/"))
        except CheckpointError:
            continue
        if one is not None:
            found.append(one)
    return found


def commit(repo: str) -> str | None:
    """The commit that a run uses: the one that was pulled, else what another program downloaded as main.

    Raises CheckpointError: the record is damaged.
    """
    pulled = record(repo)
    if pulled is not None:
        return pulled.commit
    ref = root(repo) / "refs" / MAIN
    if not ref.is_file():
        return None
    with reading(ref):
        return ref.read_text(encoding="ascii", errors="replace").strip()


def keep(pulled: Record) -> None:
    """Write a record: runs use this commit from now on. Raises OSError."""
    path = root(pulled.repo) / RECORD_FILE
    written = path.with_suffix(".new")
    written.write_bytes(msgspec.json.format(msgspec.json.encode(pulled)))
    written.replace(path)
    # For other programs, and so that tools that tidy the cache take the commit for one in use.
    if not COMMIT.fullmatch(pulled.revision):
        ref = root(pulled.repo) / "refs" / pulled.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(pulled.commit)


def blob_digest(path: Path) -> str | None:
    """What the cache's own name for a file tells of its content; None outside the cache."""
    name = path.resolve().name
    return name if DIGEST.fullmatch(name) else None


def fault(path: Path, size: int | None, digest: str) -> str:
    """What is wrong with a file's content, or an empty string. Raises CheckpointError: it cannot be read."""
    with reading(path):
        found = path.stat().st_size
        if size is not None and found != size:
            return f"is {found} bytes long, expected {size}"
        hashed = _digest(path, found, digest)
    kind = "SHA-256" if len(digest) == 64 else "git's SHA-1"
    return "" if hashed == digest else f"has the {kind} {hashed}, expected {digest}"


def _digest(path: Path, size: int, like: str) -> str:
    hasher = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
