"""Where a model's files are, and whether they are what they say they are.

Nothing here loads a tensor: a safetensors file tells its names, types and shapes in its header, and that is enough
to refuse a damaged or mislabelled checkpoint before any time is spent on it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline import cache, synthesis
from pipeline.errors import CheckpointError
from pipeline.headers import LFS_MAGIC, Table, decode_object, read_header, reading, refuse_pointer
from pipeline.layout import (
    CONFIG_FILE,
    DEFAULT_QUALITY,
    FULL_MIMI,
    MIMI_FILE,
    MIMI_HEAD_DIM,
    MIMI_STRIDE,
    OFFICIAL,
    QUALITIES,
    TOKENIZER_FILE,
    VOICES,
    MimiShape,
    ModelConfig,
    mimi_table,
    model_table,
    official_repo,
    parse_config,
)
from pipeline.synthesis import SIZES, Progress, Size
from pipeline.synthesis import tokenizer as _tokenizer

__all__ = [
    "DEFAULT_QUALITY",
    "FULL_MIMI",
    "MIMI_HEAD_DIM",
    "MIMI_STRIDE",
    "PROBE",
    "QUALITIES",
    "SIZES",
    "Checkpoint",
    "MimiShape",
    "Size",
    "_tokenizer",
    "find",
    "synthesize",
]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose headers agree with its config."""

    folder: Path
    quality: str
    config: dict[str, Any]
    """config.json as it stands."""
    model_file: Path
    mimi_file: Path
    tokenizer_file: Path
    bits: int | None
    """Bits a weight as the header tells, or None for bfloat16."""
    group: int | None
    mimi_shape: MimiShape


class Files(NamedTuple):
    """The names of a checkpoint's files besides config.json."""

    model: str
    mimi: str
    tokenizer: str


def find(model: str | None = None, quality: str = DEFAULT_QUALITY) -> Checkpoint:
    """The checkpoint in a folder, or of a repository that was pulled before. Uses no network.

    `model` is a folder, a repository's id, an official voice's name, or None for the default voice.

    Raises CheckpointError: nothing there, not downloaded, damaged, or of another quality.
    """
    folder = locate(model, quality)
    raw = read_config(folder)
    config = parse_config(folder / CONFIG_FILE, raw)
    names = files(config, quality, lambda name: (folder / name).is_file())
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        _refuse_other_quality(folder, names.model, quality)
        raise CheckpointError(f"{_incomplete(model, quality)}: no {', no '.join(missing)} in {folder}")
    model_file, mimi_file, tokenizer_file = (folder / name for name in names)
    bits, group = check_model(model_file, config, quality)
    shape = check_mimi(mimi_file, config)
    check_tokenizer(tokenizer_file)
    return Checkpoint(folder, quality, raw, model_file, mimi_file, tokenizer_file, bits, group, shape)


def locate(model: str | None, quality: str) -> Path:
    """The folder of what `find` looks at, not looked into. Raises CheckpointError: not downloaded, or no such name."""
    if quality not in QUALITIES:
        raise CheckpointError(f"quality {quality!r} is unknown: expected {', '.join(QUALITIES)}")
    if is_folder(model):
        return Path(str(model)).expanduser()
    repo = repository(model, quality)
    commit = cache.commit(repo)
    if commit is None:
        state = "is only partly downloaded" if cache.root(repo).is_dir() else "is not downloaded"
        raise CheckpointError(_pull(repo, quality, state))
    return cache.snapshot(repo, commit)


def is_folder(model: str | None) -> bool:
    """Whether `model` names a folder, which goes before a repository of that name."""
    return bool(model) and Path(str(model)).expanduser().is_dir()


def repository(model: str | None, quality: str) -> str:
    """The repository that `model` stands for: an id, an official voice's name, or None for the default voice.

    Raises CheckpointError: neither, or its name says that it is of another quality.
    """
    if model is None or model in VOICES:
        return official_repo(model or VOICES[0], quality)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) or "--" in model or ".." in model:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a repository (OWNER/NAME) nor a voice ({', '.join(VOICES)})"
        )
    label = label_of(model)
    if label not in (None, quality):
        other = model.removesuffix(str(label)) + quality
        raise CheckpointError(f"{model} holds {label}: use --quality {label}, or --model {other}")
    return model


def label_of(repo: str) -> str | None:
    """The quality that a repository's name tells."""
    return next((label for label in QUALITIES if repo.endswith(f"-mlx-{label}")), None)


def quality_of(model: str | None) -> str:
    """The quality of what is there: by the repository's name, else by the model file's header; else the default."""
    if model is None or model in VOICES:
        return DEFAULT_QUALITY
    label = None if is_folder(model) else label_of(model)
    try:
        return label or _stored_quality(locate(model, DEFAULT_QUALITY))
    except CheckpointError:
        return DEFAULT_QUALITY


def _stored_quality(folder: Path) -> str:
    config = parse_config(folder / CONFIG_FILE, read_config(folder))
    names = [config.moshi_name, *(entry.file for entry in QUALITIES.values())]
    path = next((folder / name for name in names if name and (folder / name).is_file()), None)
    if path is None:
        return DEFAULT_QUALITY
    stored = _storage(path, read_header(path))
    return next((label for label, entry in QUALITIES.items() if entry[:2] == stored), DEFAULT_QUALITY)


def _pull(repo: str, quality: str, state: str) -> str:
    official = repo in {official_repo(voice, quality) for voice in VOICES}
    size = f" ({QUALITIES[quality].download_bytes / 1e9:.1f} GB)" if official else ""
    return f"{repo} {state}{size}, run: pipeline models pull {repo}"


def _incomplete(model: str | None, quality: str) -> str:
    if is_folder(model):
        return f"{model} is no checkpoint"
    return _pull(repository(model, quality), quality, "is only partly downloaded")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands; the official one where there is none, as upstream takes it.

    Raises CheckpointError: not a JSON object, or a git-lfs pointer.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return dict(OFFICIAL)
    with reading(path):
        encoded = path.read_bytes()
    refuse_pointer(path, encoded)
    try:
        return decode_object(encoded)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from None


def files(config: ModelConfig, quality: str, has: Callable[[str], bool]) -> Files:
    """The names of a checkpoint's files: as config.json gives them, else the official ones. `has` tells what is there.

    A model's file under another quality's official name is not taken where the right one is there too.
    """
    official = QUALITIES[quality].file
    others = {entry.file for entry in QUALITIES.values()} - {official}
    named = config.moshi_name
    taken = named is not None and has(named) and not (named in others and has(official))
    return Files(
        model=named if taken and named is not None else official,
        mimi=MIMI_FILE if not has(config.mimi_name) and has(MIMI_FILE) else config.mimi_name,
        tokenizer=TOKENIZER_FILE if not has(config.tokenizer_name) and has(TOKENIZER_FILE) else config.tokenizer_name,
    )


def _refuse_other_quality(folder: Path, missing: str, quality: str) -> None:
    for label, other in QUALITIES.items():
        if missing == QUALITIES[quality].file and not (folder / missing).is_file() and (folder / other.file).is_file():
            raise CheckpointError(
                f"{folder} holds {label} ({other.file}), not {quality}: "
                f"use --quality {label}, or --model {QUALITIES[quality].repo}"
            )


def check_tokenizer(path: Path) -> None:
    """Raises CheckpointError: the file cannot be read, or is a git-lfs pointer."""
    with reading(path), path.open("rb") as file:
        refuse_pointer(path, file.read(len(LFS_MAGIC)))


def check_model(path: Path, config: ModelConfig, quality: str) -> tuple[int | None, int | None]:
    """Bits and group size of a language model's file, if it is of `quality` and holds what `config` asks for.

    Raises CheckpointError.
    """
    header = read_header(path)
    stored = _storage(path, header)
    wanted = QUALITIES[quality]
    if stored != (wanted.bits, wanted.group):
        raise CheckpointError(_mislabelled(path, stored, quality))
    _check_quantization(path, config, stored)
    _compare(path, header, model_table(config, quality))
    return stored


Storage = tuple[int | None, int | None]
"""Bits a weight and weights that share a scale; None for plain bfloat16."""


def _mislabelled(path: Path, stored: Storage, quality: str) -> str:
    wanted = QUALITIES[quality]
    for label, entry in QUALITIES.items():
        if (entry.bits, entry.group) == stored:
            return (
                f"{path} is {label} ({entry}), not {quality} ({wanted}): "
                f"use --quality {label}, or --model {wanted.repo}"
            )
    bits, group = stored
    return f"{path} is {bits} bit, groups of {group}; expected {quality} ({wanted}): use --model {wanted.repo}"


def _check_quantization(path: Path, config: ModelConfig, stored: Storage) -> None:
    """Official configs are silent about it; one that speaks must say what the header says."""
    for key in ("quantization", "quantization_config"):
        told = getattr(config, key)
        if told is not None and (told.bits, told.group_size) != stored:
            raise CheckpointError(
                f"{path} has {_words(*stored)} by its header, but {CONFIG_FILE}'s {key} says "
                f"{_words(told.bits, told.group_size)}"
            )


def _words(bits: int | None, group: int | None) -> str:
    return "no quantization" if bits is None else f"{bits} bit, groups of {group}"


PROBE: Final = "transformer.layers.0.self_attn.in_proj"


def _storage(path: Path, header: Table) -> Storage:
    """Bits and group size: a packed row holds 32 / bits weights in a column, and has one scale for each group."""
    if "out_norm.alpha" in header:
        raise CheckpointError(
            f"{path} is in PyTorch's layout, expected MLX's: use --model {QUALITIES[DEFAULT_QUALITY].repo}"
        )
    norm, weight = header.get("out_norm.weight"), header.get(f"{PROBE}.weight")
    if norm is None or weight is None or len(norm.shape) != 1 or len(weight.shape) != 2 or norm.shape[0] == 0:
        raise CheckpointError(
            f"{path} is not a Moshi model: expected out_norm.weight and {PROBE}.weight among its {len(header)} tensors"
        )
    if weight.dtype == "U32":
        return _packing(path, header, norm.shape[0], weight.shape[1])
    if weight.dtype != "BF16":
        raise CheckpointError(
            f"{path} holds {weight.dtype} weights, expected BF16: use --model {QUALITIES['bf16'].repo}"
        )
    return None, None


def _packing(path: Path, header: Table, dim: int, packed: int) -> tuple[int, int]:
    scales = header.get(f"{PROBE}.scales")
    if scales is None or len(scales.shape) != 2 or scales.shape[1] == 0:
        raise CheckpointError(f"{path} is damaged: {PROBE} is quantized, and has no {PROBE}.scales; download it again")
    groups = scales.shape[1]
    if 32 * packed % dim or dim % groups:
        raise CheckpointError(
            f"{path} is damaged: {PROBE} has {packed} packed columns and {groups} groups, "
            f"of which no whole number makes {dim} weights"
        )
    return 32 * packed // dim, dim // groups


def check_mimi(path: Path, config: ModelConfig) -> MimiShape:
    """The dimensions of a Mimi file in PyTorch's layout, if it is complete and fits `config`.

    Raises CheckpointError.
    """
    header = read_header(path)
    try:
        shape = _mimi_shape(header)
    except (KeyError, IndexError, ValueError):
        raise CheckpointError(
            f"{path} is not a Mimi codec: expected its {len(mimi_table(FULL_MIMI))} tensors in PyTorch's layout, "
            f"found {len(header)} others"
        ) from None
    _compare(path, header, mimi_table(shape))
    if shape.dim % MIMI_HEAD_DIM:
        raise CheckpointError(f"{path} has a width of {shape.dim}, expected a multiple of {MIMI_HEAD_DIM}")
    needed = max(config.dep_q, config.n_q - config.dep_q)
    if shape.bins != config.card or shape.codebooks < needed:
        raise CheckpointError(
            f"{path} has {shape.codebooks} codebooks of {shape.bins} entries, "
            f"the model asks for {needed} of {config.card}"
        )
    return shape


def _mimi_shape(header: Table) -> MimiShape:
    layer = "encoder_transformer.transformer.layers"
    codebook_dim, dim = header["quantizer.rvq_first.input_proj.weight"].shape[:2]
    return MimiShape(
        filters=header["encoder.model.0.conv.conv.weight"].shape[0],
        dim=dim,
        layers=sum(name.startswith(layer) and name.endswith(".linear1.weight") for name in header),
        hidden=header[f"{layer}.0.linear1.weight"].shape[0],
        codebook_dim=codebook_dim,
        codebooks=sum(name.endswith("._codebook.embedding_sum") for name in header),
        bins=header["quantizer.rvq_first.vq.layers.0._codebook.cluster_usage"].shape[0],
    )


def _compare(path: Path, header: Table, expected: Table) -> None:
    kinds = {
        "missing": sorted(expected.keys() - header.keys()),
        "unknown": sorted(header.keys() - expected.keys()),
        "of another shape": [name for name in expected if header.get(name, expected[name]) != expected[name]],
    }
    faults = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]
    if not faults:
        return
    for name in kinds["of another shape"][:1]:
        faults[-1] = faults[-1][:-1] + f": {header[name]}, expected {expected[name]})"
    raise CheckpointError(f"{path} does not hold the tensors that its config asks for: {', '.join(faults)}")


def synthesize(folder: Path, quality: str, size: str, seed: int = 0, progress: Progress | None = None) -> Checkpoint:
    """Write a checkpoint of random weights in the official layout, and return it.

    It says random words and makes noises, the same for the same seed. `size` is a key of SIZES; "7b" has Moshi's
    true shapes and needs the disk that Moshi needs. Memory stays at some tens of MB whatever the size.

    Raises CheckpointError: unknown quality or size, files in the way, or too little disk.
    """
    synthesis.write(folder, quality, size, seed, progress)
    return find(str(folder), quality)
