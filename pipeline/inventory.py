"""Which checkpoints are on this machine, and whether their files are still what was downloaded. Uses no network."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pipeline import cache, checkpoints
from pipeline.errors import CheckpointError
from pipeline.layout import CONFIG_FILE, QUALITIES, VOICES, ModelConfig, official_repo, parse_config


class Entry(msgspec.Struct, frozen=True):
    """A repository that a run can use, or could once it is pulled."""

    quality: str
    repo: str
    bytes: int
    """What of it is downloaded, or would be."""
    folder: str
    """Where it is, or an empty string."""
    revision: str
    """Branch, tag or commit, as it was asked for when it was pulled."""
    commit: str
    """What that stood for then, which runs use until it is pulled again."""
    problem: str
    """Why no run can use it, where some of it is here."""


def entries() -> list[Entry]:
    """The official repositories, then others that were pulled."""
    official = {official_repo(voice, quality): quality for voice in VOICES for quality in QUALITIES}
    pulled = {record.repo: checkpoints.quality_of(record.repo) for record in cache.records()}
    return [_entry(repo, quality) for repo, quality in {**official, **pulled}.items()]


def _entry(repo: str, quality: str) -> Entry:
    folder = problem = ""
    commit, record = None, None
    try:
        commit, record = cache.commit(repo), cache.record(repo)
        folder = str(checkpoints.find(repo, quality).folder)
    except CheckpointError as error:
        problem = str(error) if cache.root(repo).is_dir() else ""
    size = QUALITIES[quality].download_bytes if record is None else sum(file.size for file in record.files)
    revision = record.revision if record is not None else cache.MAIN if commit else ""
    return Entry(quality, repo, size, folder, revision, commit or "", problem)


Look = Callable[[], object]


class Verdict(msgspec.Struct, frozen=True):
    """What was found of one file."""

    file: str
    state: Literal["ok", "damaged", "missing"]
    checked: Literal["hash", "header", "presence"]
    """How: by the hash that the hub told and its header, by its header alone, or only whether it can be read."""
    fault: str = ""


def verify(model: str | None, quality: str) -> list[Verdict]:
    """Look at each file of what `find` would find: its hash, if it was downloaded, and what `find` looks at.

    A file that is not in git-lfs is compared with git's own hash. Of a folder there are no hashes to compare with.

    Raises CheckpointError: nothing there that could be looked at.
    """
    folder = checkpoints.locate(model, quality)
    told = {} if checkpoints.is_folder(model) else _told(checkpoints.repository(model, quality))
    looks = _looks(folder, quality)
    for name in told:
        looks.setdefault(name, lambda: None)
    return [_verdict(folder / name, name, told.get(name), look) for name, look in looks.items()]


def _told(repo: str) -> dict[str, cache.RemoteFile]:
    record = cache.record(repo)
    return {} if record is None else {file.name: file for file in record.files}


def _looks(folder: Path, quality: str) -> dict[str, Look]:
    """For each file that a run needs, what raises CheckpointError if `find` would."""

    def look_at_config() -> ModelConfig:
        return parse_config(folder / CONFIG_FILE, checkpoints.read_config(folder))

    looks: dict[str, Look] = {CONFIG_FILE: look_at_config} if (folder / CONFIG_FILE).exists() else {}
    try:
        config = look_at_config()
    except CheckpointError:
        return looks
    names = checkpoints.files(config, quality, lambda name: (folder / name).is_file())
    looks[names.model] = lambda: checkpoints.check_model(folder / names.model, config, quality)
    looks[names.mimi] = lambda: checkpoints.check_mimi(folder / names.mimi, config)
    looks[names.tokenizer] = lambda: checkpoints.check_tokenizer(folder / names.tokenizer)
    return looks


def _verdict(path: Path, name: str, told: cache.RemoteFile | None, look: Look) -> Verdict:
    digest = told.digest if told is not None else cache.blob_digest(path)
    checked: Literal["hash", "header", "presence"] = (
        "header" if name.endswith((".safetensors", ".json")) else "presence"
    )
    if digest is not None:
        checked = "hash"
    if not path.is_file():
        return Verdict(name, "missing", checked, f"not in {path.parent}")
    try:
        fault = cache.fault(path, told.size if told else None, digest) if digest is not None else ""
        if not fault:
            look()
    except CheckpointError as error:
        fault = str(error)
    return Verdict(name, "damaged" if fault else "ok", checked, fault)
