"""Checkpoints from the model hub, through huggingface_hub (0.24 to 2.4 tried).

Its own download starts anew, in its newer versions, where an earlier one was interrupted. So the bytes are fetched by
its `http_get`, which goes on from where a file ends, into the file of the cache that its older versions use for that.
A whole file then gets its place there by `hf_hub_download`, which finds that nothing is left to fetch.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # where all its versions have them
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    build_hf_headers,
    logging,
)

from pipeline import cache, checkpoints
from pipeline.cache import Record, RemoteFile
from pipeline.errors import CheckpointError
from pipeline.layout import CONFIG_FILE, parse_config

RETRY_S: Final = 1.0
"""Before a broken connection is made again."""
DISK_SLACK_BYTES: Final = 1 << 20
DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
DENIED: Final = (401, 403)
TRANSPORT: Final[tuple[type[BaseException], ...]] = (OSError, *HfHubHTTPError.__bases__)
"""What the HTTP library below raises: requests in older versions of huggingface_hub, httpx in newer ones."""


class Planned(NamedTuple):
    """A file that a run needs."""

    file: RemoteFile
    here_bytes: int
    """What of it is on this machine."""
    whole: bool
    """Whether that is all of it, and has its hash."""

    @property
    def missing_bytes(self) -> int:
        return self.file.size - self.here_bytes


class Plan(NamedTuple):
    """What `fetch` will do."""

    record: Record
    quality: str
    files: tuple[Planned, ...]

    @property
    def missing_bytes(self) -> int:
        return sum(planned.missing_bytes for planned in self.files)

    @property
    def total_bytes(self) -> int:
        return sum(planned.file.size for planned in self.files)


def plan(repo: str, quality: str, revision: str = cache.MAIN) -> Plan:
    """What a run needs of a repository, by the hub's word and the repository's own config.json, which is fetched.

    What is here already is compared with the hub's hashes, and removed where it is damaged.

    Raises CheckpointError: no network, no such repository or revision, no access, or no checkpoint for a conversation.
    """
    with _answering(repo, revision):
        commit, remote = _ask(repo, revision)
        if CONFIG_FILE in remote:
            _fetch_file(repo, commit, _look(repo, commit, remote[CONFIG_FILE]))
    folder = cache.snapshot(repo, commit)
    config = parse_config(folder / CONFIG_FILE, checkpoints.read_config(folder))
    names = checkpoints.files(config, quality, remote.__contains__)
    lacking = [name for name in names if name not in remote]
    if lacking:
        raise CheckpointError(f"model {repo}: has no {', '.join(lacking)}; is it a {quality} checkpoint for MLX?")
    files = [remote[name] for name in (CONFIG_FILE, *names) if name in remote]
    record = Record(repo=repo, revision=revision, commit=commit, files=files)
    return Plan(record, quality, tuple(_look(repo, commit, file) for file in files))


def fetch(planned: Plan) -> Path:
    """Download what is missing, with a progress bar on a terminal, and make it what runs use. Returns its folder.

    Goes on where an earlier download ended. Raises CheckpointError: too little disk, no network, no access, or not what
    its config or its quality says; runs then go on with what was pulled before.
    """
    repo, commit = planned.record.repo, planned.record.commit
    folder = cache.root(repo)
    with _answering(repo, planned.record.revision):
        _check_disk(repo, folder, planned.missing_bytes)
        for needed in planned.files:
            _fetch_file(repo, commit, needed)
        found = checkpoints.find(str(cache.snapshot(repo, commit)), planned.quality)
        cache.keep(planned.record)
    return found.folder


def _ask(repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that a revision stands for now, and its files."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what goes wrong is said once, by us
    try:
        told = HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = str(told.sha)
        siblings = told.siblings or []
    except HFValidationError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"model {repo}: what answers is no model hub: check the network, and HF_ENDPOINT"
        ) from None
    files = {}
    for sibling in siblings:
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is not None and cache.DIGEST.fullmatch(digest or ""):
            files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size, str(digest))
    if not cache.COMMIT.fullmatch(commit):
        raise CheckpointError(f"model {repo}: the hub tells no commit for {revision!r}, but {commit!r}")
    return commit, files


def _paths(repo: str, commit: str, file: RemoteFile) -> tuple[Path, Path, Path]:
    """A file's name in the cache, its content, and what is there of the content while it is fetched."""
    blob = cache.root(repo) / "blobs" / file.digest
    return cache.snapshot(repo, commit) / file.name, blob, blob.with_name(f"{file.digest}.incomplete")


def _look(repo: str, commit: str, file: RemoteFile) -> Planned:
    """What of a file is here. Removes what is damaged."""
    name, blob, part = _paths(repo, commit, file)
    for path in (name, blob):
        if not path.exists():
            continue
        if not cache.fault(path, file.size, file.digest):
            return Planned(file, file.size, whole=True)
        path.resolve().unlink()
    name.unlink(missing_ok=True)
    here_bytes = min(part.stat().st_size, file.size) if part.exists() else 0
    return Planned(file, here_bytes, whole=False)


def _check_disk(repo: str, folder: Path, needed: int) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed and free < needed + DISK_SLACK_BYTES:
        raise CheckpointError(f"model {repo}: needs {size(needed)} more in {folder}, which has {size(free)} free")


def size(count: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _fetch_file(repo: str, commit: str, needed: Planned) -> None:
    if not needed.whole:
        _fetch_content(repo, commit, needed.file)
    hf_hub_download(repo, needed.file.name, revision=commit, cache_dir=cache.hub())


def _fetch_content(repo: str, commit: str, file: RemoteFile) -> None:
    _, blob, part = _paths(repo, commit, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as stream:
        _lock(repo, stream)
        _fill(repo, commit, file, stream)
        stream.flush()
        # Still locked: another program that pulls the same is not to find the file whole and take it away.
        if fault := cache.fault(part, file.size, file.digest):
            part.unlink()
            raise CheckpointError(f"model {repo}: {file.name} was damaged on its way: it {fault}; pull again")
        part.replace(blob)


def _lock(repo: str, stream: BinaryIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"model {repo}: is being downloaded by another program") from None


def _fill(repo: str, commit: str, file: RemoteFile, stream: BinaryIO) -> None:
    """Fetch what a file lacks; a connection that breaks is made again as long as that brings anything."""
    url = hf_hub_url(repo, file.name, revision=commit)
    # Uncompressed: the size is then the file's.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    while (done := stream.seek(0, os.SEEK_END)) != file.size:
        if done > file.size:
            stream.truncate(0)
            continue
        try:
            http_get(
                url, stream, resume_size=done, headers=headers, expected_size=file.size, displayed_filename=file.name
            )
        except TRANSPORT as error:
            if stream.seek(0, os.SEEK_END) == done or _is_local(error) or _status(error) is not None:
                raise
            time.sleep(RETRY_S)


def _is_local(error: BaseException) -> bool:
    """Whether this machine's disk is at fault. The errors of a network library have no number, or are the network's."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


@contextmanager
def _answering(repo: str, revision: str) -> Iterator[None]:
    """Turns what the hub, the network and the disk say into a line."""
    try:
        yield
    except HFValidationError:
        raise CheckpointError(f"model {repo!r}: expected a repository such as kyutai/moshiko-mlx-q4") from None
    except GatedRepoError:
        line = "is gated: ask for access on its page, set HF_TOKEN to your token, and pull again"
        raise CheckpointError(f"model {repo}: {line}") from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"model {repo}: has no revision {revision!r}: expected a branch, a tag or a commit"
        ) from None
    except RepositoryNotFoundError:
        line = "is not on the hub, or not for everyone: check the name, or set HF_TOKEN to your token"
        raise CheckpointError(f"model {repo}: {line}") from None
    except TRANSPORT as error:
        raise CheckpointError(f"model {repo}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to download"
    if status in DENIED:
        return f"the hub refuses access ({status}): set HF_TOKEN to your token"
    if status is not None:
        return f"the hub answers with an error ({status}): try again later"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "the disk is full: make room, and pull again, which goes on where this ended"
    if isinstance(error, OSError) and _is_local(error):
        return f"cannot be written: {error.filename or ''} {error.strerror}".replace("  ", " ")
    return "the hub cannot be reached: check the network, and try again"
