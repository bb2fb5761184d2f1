"""Where a model's files are, whether they are what they say they are, and how to make some up.

Nothing here loads a tensor: a safetensors file tells its names, types and shapes in its header, and that is enough
to refuse a damaged or mislabelled checkpoint before any time is spent on it.
"""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write."""


class Quality(NamedTuple):
    """How a checkpoint's weights are stored."""

    bits: int | None
    """Bits a weight, or None where weights are plain bfloat16."""
    group: int | None
    """Weights that share a scale."""
    file: str
    repo: str
    model_bytes: int
    """Bytes of tensors in the official file, its header not counted."""

    @property
    def download_bytes(self) -> int:
        return self.model_bytes + MIMI_BYTES

    def __str__(self) -> str:
        return "bfloat16" if self.bits is None else f"{self.bits} bit, groups of {self.group}"


QUALITIES: Final = {
    "q4": Quality(4, 32, "model.q4.safetensors", "kyutai/moshiko-mlx-q4", 4_805_385_728),
    "q8": Quality(8, 64, "model.q8.safetensors", "kyutai/moshiko-mlx-q8", 8_168_645_376),
    "bf16": Quality(None, None, "model.safetensors", "kyutai/moshiko-mlx-bf16", 15_375_630_336),
}
DEFAULT_QUALITY: Final = "q4"

CONFIG_FILE: Final = "config.json"
MIMI_FILE: Final = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_FILE: Final = "tokenizer_spm_32k_3.model"
MIMI_BYTES: Final = 384_644_900
"""Size of the official Mimi file."""

OFFICIAL: Final[Mapping[str, Any]] = {
    "dim": 4096,
    "text_card": 32000,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}
"""Moshi 7B's config.json without the names of its files; also what a repository without a config.json is taken for."""

Count = Annotated[int, msgspec.Meta(ge=1)]


class ModelConfig(msgspec.Struct, frozen=True):
    """The keys of config.json that decide the model's shape, by their official names."""

    dim: Count
    num_heads: Count
    num_layers: Count
    causal: bool
    layer_scale: float | None
    context: Count
    max_period: float
    positional_embedding: str
    text_card: Count
    card: Count
    n_q: Count
    dep_q: Count
    delays: list[Annotated[int, msgspec.Meta(ge=0)]]
    depformer_dim: Count
    depformer_num_heads: Count
    depformer_num_layers: Count
    depformer_dim_feedforward: Count
    depformer_pos_emb: str
    depformer_layer_scale: float | None = None
    depformer_low_rank_embeddings: int | None = None
    demux_second_stream: bool = False
    cross_attention: bool = False
    conditioners: dict[str, Any] | None = None
    extra_heads_num_heads: int = 0
    moshi_name: str | None = None
    mimi_name: str = MIMI_FILE
    tokenizer_name: str = TOKENIZER_FILE


# Features of the other models of the family (speech to text, text to speech, translation): each adds tensors and
# input that a dialogue has not.
FOREIGN: Final = (
    "layer_scale",
    "depformer_layer_scale",
    "depformer_low_rank_embeddings",
    "demux_second_stream",
    "cross_attention",
    "conditioners",
    "extra_heads_num_heads",
)


class MimiShape(NamedTuple):
    """Mimi's dimensions. What is not here is the same in every Mimi."""

    filters: int
    """Channels of the first convolution; each of the four strides doubles them."""
    dim: int
    layers: int
    """Layers of each of the two transformers."""
    hidden: int
    codebook_dim: int
    codebooks: int
    bins: int


FULL_MIMI: Final = MimiShape(filters=64, dim=512, layers=8, hidden=2048, codebook_dim=256, codebooks=32, bins=2048)
MIMI_RATIOS: Final = (8, 6, 5, 4)
MIMI_HEAD_DIM: Final = 64
"""Channels of an attention head: the one dimension that no tensor's shape tells."""


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


class Tensor(NamedTuple):
    """A tensor as a safetensors header tells of it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Table = dict[str, Tensor]

ITEM_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


# Finding


def find(model: str | None = None, quality: str = DEFAULT_QUALITY) -> Checkpoint:
    """The checkpoint in a folder, or of a repository that was downloaded before. Uses no network.

    `model` is a folder, a repository's id, or None for the official repository of the quality.

    Raises CheckpointError: nothing there, not downloaded, damaged, or of another quality.
    """
    if quality not in QUALITIES:
        raise CheckpointError(f"quality {quality!r} is unknown: expected {', '.join(QUALITIES)}")
    if model and Path(model).expanduser().is_dir():
        return _read(Path(model).expanduser(), quality, f"{model} is no checkpoint")
    repo = QUALITIES[quality].repo if model is None else model
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise CheckpointError(f"{repo!r} is neither a folder nor a repository (OWNER/NAME)")
    _check_label(repo, quality)
    return _read(_cached(repo, quality), quality, _pull(repo, quality, "is only partly downloaded"))


def _check_label(repo: str, quality: str) -> None:
    for label in QUALITIES:
        if repo.endswith(f"-mlx-{label}") and label != quality:
            other = repo.removesuffix(label) + quality
            raise CheckpointError(f"{repo} holds {label}: use --quality {label}, or --model {other}")


def _cached(repo: str, quality: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except HFValidationError as error:
        raise CheckpointError(f"{repo} is no repository's name: {error}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(_pull(repo, quality, "is not downloaded")) from None


def _pull(repo: str, quality: str, state: str) -> str:
    official = repo in {entry.repo for entry in QUALITIES.values()}
    size = f" ({QUALITIES[quality].download_bytes / 1e9:.1f} GB)" if official else ""
    return f"{repo} {state}{size}, run: pipeline models pull {repo}"


def _read(folder: Path, quality: str, incomplete: str) -> Checkpoint:
    raw = _read_config(folder / CONFIG_FILE)
    config = _parse_config(folder / CONFIG_FILE, raw)
    model = _model_file(folder, quality, config)
    mimi, tokenizer = folder / config.mimi_name, folder / config.tokenizer_name
    missing = [path.name for path in (model, mimi, tokenizer) if not path.is_file()]
    if missing:
        raise CheckpointError(f"{incomplete}: no {', no '.join(missing)} in {folder}")
    bits, group = check_model(model, config, quality)
    shape = check_mimi(mimi, config)
    _check_tokenizer(tokenizer)
    return Checkpoint(folder, quality, raw, model, mimi, tokenizer, bits, group, shape)


def _read_config(path: Path) -> dict[str, Any]:
    # Upstream takes the official shape where a repository has no config.json.
    if not path.exists():
        return dict(OFFICIAL)
    with _reading(path):
        encoded = path.read_bytes()
    _refuse_pointer(path, encoded)
    try:
        return msgspec.json.decode(encoded, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from None


def _parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    try:
        config = msgspec.convert(raw, ModelConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name in FOREIGN:
        if getattr(config, name):
            raise CheckpointError(f"{path} is not of a dialogue model: it sets {name}")
    if config.dep_q > config.n_q or len(config.delays) != config.n_q + 1:
        raise CheckpointError(
            f"{path}: expected dep_q <= n_q and n_q + 1 delays, "
            f"found dep_q {config.dep_q}, n_q {config.n_q} and {len(config.delays)} delays"
        )
    if config.dim % config.num_heads or config.depformer_dim % config.depformer_num_heads:
        raise CheckpointError(
            f"{path}: expected each dim to be a multiple of its heads, found {config.dim} with {config.num_heads} "
            f"and {config.depformer_dim} with {config.depformer_num_heads}"
        )
    return config


def _model_file(folder: Path, quality: str, config: ModelConfig) -> Path:
    """The model's file: by the quality's official name, else by the name that config.json gives."""
    official = folder / QUALITIES[quality].file
    if official.is_file():
        return official
    if config.moshi_name is not None and (folder / config.moshi_name).is_file():
        return folder / config.moshi_name
    for label, other in QUALITIES.items():
        if (folder / other.file).is_file():
            raise CheckpointError(
                f"{folder} holds {label} ({other.file}), not {quality}: "
                f"use --quality {label}, or --model {QUALITIES[quality].repo}"
            )
    return official


def _check_tokenizer(path: Path) -> None:
    with _reading(path), path.open("rb") as file:
        _refuse_pointer(path, file.read(len(LFS_MAGIC)))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


# Headers

HEADER_LENGTH: Final = struct.Struct("<Q")
HEADER_LIMIT: Final = 100_000_000
"""Bytes of header beyond which the safetensors format itself refuses a file."""
LFS_MAGIC: Final = b"version https://git-lfs.github.com"
SHOWN: Final = 24
"""Bytes of a foreign file that an error shows."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> Table:
    """The tensors of a safetensors file, read off its header.

    Raises CheckpointError: not a safetensors file, a git-lfs pointer, or a file of another length than its
    header asks for.
    """
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(len(LFS_MAGIC))
        _refuse_pointer(path, start)
        length = _header_length(path, start, size)
        file.seek(HEADER_LENGTH.size)
        encoded = file.read(length)
    entries = _decode_header(path, encoded)
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    expected = HEADER_LENGTH.size + length + end
    if size != expected:
        state = "is truncated" if size < expected else "is too long"
        raise CheckpointError(f"{path} {state}: {size} bytes, its header asks for {expected}; download it again")
    return {name: Tensor(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(LFS_MAGIC):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file that it points to: run git lfs pull")


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size >= HEADER_LENGTH.size:
        (length,) = HEADER_LENGTH.unpack_from(start)
        if length <= min(size - HEADER_LENGTH.size, HEADER_LIMIT):
            return int(length)
        if length <= HEADER_LIMIT and start[HEADER_LENGTH.size :].startswith(b"{"):
            raise CheckpointError(
                f"{path} is truncated: {size} bytes, its header alone asks for {HEADER_LENGTH.size + length}; "
                "download it again"
            )
    raise CheckpointError(f"{path} is not a safetensors file: expected one, found {_describe(start, size)}")


def _describe(start: bytes, size: int) -> str:
    shown = start[:SHOWN].decode("ascii", "replace")
    text = all(letter.isascii() and (letter.isprintable() or letter.isspace()) for letter in shown)
    return f"{size} bytes of text that begins {shown!r}" if shown and text else f"{size} bytes of something else"


def _decode_header(path: Path, encoded: bytes) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header does not parse ({error})") from None
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {name} is of unknown type {entry.dtype}")
        if begin < 0 or end - begin != Tensor(entry.dtype, tuple(entry.shape)).nbytes:
            raise CheckpointError(
                f"{path} is damaged: {name} has {end - begin} bytes, which is not what {entry.dtype} "
                f"{entry.shape} takes; download it again"
            )
    return entries


def check_model(path: Path, config: ModelConfig, quality: str) -> tuple[int | None, int | None]:
    """Bits and group size of a language model's file, if it is of `quality` and holds what `config` asks for.

    Raises CheckpointError.
    """
    header = read_header(path)
    bits, group = _storage(path, header)
    wanted = QUALITIES[quality]
    if (bits, group) != (wanted.bits, wanted.group):
        raise CheckpointError(_mislabelled(path, bits, group, quality))
    _compare(path, header, model_table(config, quality))
    return bits, group


def _mislabelled(path: Path, bits: int | None, group: int | None, quality: str) -> str:
    wanted = QUALITIES[quality]
    for label, entry in QUALITIES.items():
        if (entry.bits, entry.group) == (bits, group):
            return (
                f"{path} is {label} ({entry}), not {quality} ({wanted}): "
                f"use --quality {label}, or --model {wanted.repo}"
            )
    return f"{path} is {bits} bit, groups of {group}; expected {quality} ({wanted}): use --model {wanted.repo}"


PROBE: Final = "transformer.layers.0.self_attn.in_proj"


def _storage(path: Path, header: Table) -> tuple[int | None, int | None]:
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
    scales = header.get(f"{PROBE}.scales")
    if scales is not None and weight.dtype == "U32" and len(scales.shape) == 2 and scales.shape[1] > 0:
        dim = norm.shape[0]
        return 32 * weight.shape[1] // dim, dim // scales.shape[1]
    if weight.dtype != "BF16":
        raise CheckpointError(
            f"{path} holds {weight.dtype} weights, expected BF16: use --model {QUALITIES['bf16'].repo}"
        )
    return None, None


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


# What a file must hold


def model_table(config: ModelConfig, quality: str) -> Table:
    """Name, type and shape of each tensor in a language model's file."""
    entry = QUALITIES[quality]
    table: Table = {}
    for name, rows, columns in _matrices(config):
        if entry.bits is None or entry.group is None:
            table[f"{name}.weight"] = Tensor("BF16", (rows, columns))
        else:
            table[f"{name}.weight"] = Tensor("U32", (rows, columns * entry.bits // 32))
            table[f"{name}.scales"] = Tensor("BF16", (rows, columns // entry.group))
            table[f"{name}.biases"] = Tensor("BF16", (rows, columns // entry.group))
    table |= {f"{name}.weight": Tensor("BF16", (dim,)) for name, dim in _norms(config)}
    return table


def _matrices(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Each matrix with its rows (outputs, or entries of an embedding) and columns."""
    dim, dep, audio = config.dim, config.depformer_dim, config.card + 1
    yield "text_emb", config.text_card + 1, dim
    yield "text_linear", config.text_card, dim
    for codebook in range(config.n_q):
        yield f"audio_embs.{codebook}", audio, dim
    for layer in range(config.num_layers):
        yield from _layer_matrices(f"transformer.layers.{layer}", dim, 4 * dim)
    for index in range(config.dep_q):
        name = f"depformer.slices.{index}"
        yield f"{name}.emb", config.text_card + 1 if index == 0 else audio, dep
        yield f"{name}.linear_in", dep, dim
        yield f"{name}.linear_out", config.card, dep
        for layer in range(config.depformer_num_layers):
            yield from _layer_matrices(f"{name}.transformer.layers.{layer}", dep, config.depformer_dim_feedforward)


def _layer_matrices(name: str, dim: int, feedforward: int) -> Iterator[tuple[str, int, int]]:
    hidden = 11 * dim // 4 if feedforward == 4 * dim else 2 * feedforward // 3
    yield f"{name}.self_attn.in_proj", 3 * dim, dim
    yield f"{name}.self_attn.out_proj", dim, dim
    yield f"{name}.gating.linear_in", 2 * hidden, dim
    yield f"{name}.gating.linear_out", dim, hidden


def _norms(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "out_norm", config.dim
    layers = [(f"transformer.layers.{layer}", config.dim) for layer in range(config.num_layers)]
    layers += [
        (f"depformer.slices.{index}.transformer.layers.{layer}", config.depformer_dim)
        for index in range(config.dep_q)
        for layer in range(config.depformer_num_layers)
    ]
    for name, dim in layers:
        yield f"{name}.norm1", dim
        yield f"{name}.norm2", dim


MIMI_KERNEL: Final = 7
MIMI_RESIDUAL_KERNEL: Final = 3
MIMI_LAST_KERNEL: Final = 3
MIMI_COMPRESS: Final = 2
MIMI_STRIDE: Final = 2
"""Positions of the transformers, 25 a second, in a frame."""


def mimi_table(shape: MimiShape) -> Table:
    """Name, type and shape of each tensor in a Mimi file (PyTorch's layout)."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= _mimi_encoder(shape) | _mimi_decoder(shape)
    for side in ("encoder_transformer", "decoder_transformer"):
        for layer in range(shape.layers):
            shapes |= _mimi_layer(f"{side}.transformer.layers.{layer}", shape.dim, shape.hidden)
    shapes["downsample.conv.conv.conv.weight"] = (shape.dim, shape.dim, 2 * MIMI_STRIDE)
    shapes["upsample.convtr.convtr.convtr.weight"] = (shape.dim, 1, 2 * MIMI_STRIDE)
    for part, codebooks in (("rvq_first", 1), ("rvq_rest", shape.codebooks - 1)):
        shapes[f"quantizer.{part}.input_proj.weight"] = (shape.codebook_dim, shape.dim, 1)
        shapes[f"quantizer.{part}.output_proj.weight"] = (shape.dim, shape.codebook_dim, 1)
        for index in range(codebooks):
            name = f"quantizer.{part}.vq.layers.{index}._codebook"
            shapes[f"{name}._initialized"] = (1,)
            shapes[f"{name}.cluster_usage"] = (shape.bins,)
            shapes[f"{name}.embedding_sum"] = (shape.bins, shape.codebook_dim)
    return {name: Tensor("F32", dims) for name, dims in shapes.items()}


def _conv(name: str, outputs: int, inputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.conv.conv.weight": (outputs, inputs, kernel), f"{name}.conv.conv.bias": (outputs,)}


def _residual(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    narrow = channels // MIMI_COMPRESS
    return _conv(f"{name}.block.1", narrow, channels, MIMI_RESIDUAL_KERNEL) | _conv(
        f"{name}.block.3", channels, narrow, 1
    )


def _mimi_encoder(shape: MimiShape) -> dict[str, tuple[int, ...]]:
    channels = shape.filters
    shapes = _conv("encoder.model.0", channels, 1, MIMI_KERNEL)
    for index, ratio in enumerate(reversed(MIMI_RATIOS)):
        shapes |= _residual(f"encoder.model.{3 * index + 1}", channels)
        shapes |= _conv(f"encoder.model.{3 * index + 3}", 2 * channels, channels, 2 * ratio)
        channels *= 2
    return shapes | _conv(f"encoder.model.{3 * len(MIMI_RATIOS) + 2}", shape.dim, channels, MIMI_LAST_KERNEL)


def _mimi_decoder(shape: MimiShape) -> dict[str, tuple[int, ...]]:
    channels = shape.filters << len(MIMI_RATIOS)
    shapes = _conv("decoder.model.0", channels, shape.dim, MIMI_KERNEL)
    for index, ratio in enumerate(MIMI_RATIOS):
        name = f"decoder.model.{3 * index + 2}.convtr.convtr"
        shapes[f"{name}.weight"] = (channels, channels // 2, 2 * ratio)
        shapes[f"{name}.bias"] = (channels // 2,)
        channels //= 2
        shapes |= _residual(f"decoder.model.{3 * index + 3}", channels)
    return shapes | _conv(f"decoder.model.{3 * len(MIMI_RATIOS) + 2}", 1, channels, MIMI_LAST_KERNEL)


def _mimi_layer(name: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm1.weight": (dim,),
        f"{name}.norm1.bias": (dim,),
        f"{name}.norm2.weight": (dim,),
        f"{name}.norm2.bias": (dim,),
        f"{name}.self_attn.in_proj_weight": (3 * dim, dim),
        f"{name}.self_attn.out_proj.weight": (dim, dim),
        f"{name}.linear1.weight": (hidden, dim),
        f"{name}.linear2.weight": (dim, hidden),
        f"{name}.layer_scale_1.scale": (dim,),
        f"{name}.layer_scale_2.scale": (dim,),
    }


# Making one up


class Size(NamedTuple):
    """A synthetic checkpoint's dimensions."""

    config: Mapping[str, Any]
    """What differs from the official config."""
    mimi: MimiShape


SIZES: Final = {
    # Real time on two slow cores: most of a small model's time goes to the text vocabulary, the depformer's layers
    # and the convolutions at 24 kHz. A dim of 256 is the least that q8's groups of 64 allow.
    "tiny": Size(
        {
            "dim": 256,
            "num_heads": 4,
            "num_layers": 2,
            "text_card": 1000,
            "depformer_dim": 64,
            "depformer_dim_feedforward": 192,
            "depformer_num_heads": 2,
            "depformer_num_layers": 1,
        },
        MimiShape(filters=2, dim=64, layers=1, hidden=64, codebook_dim=16, codebooks=32, bins=2048),
    ),
    # For a GPU: slow enough to see, small enough to make in seconds.
    "small": Size(
        {
            "dim": 1024,
            "num_heads": 16,
            "num_layers": 8,
            "text_card": 8000,
            "depformer_dim": 256,
            "depformer_dim_feedforward": 768,
            "depformer_num_heads": 4,
            "depformer_num_layers": 4,
        },
        MimiShape(filters=16, dim=128, layers=4, hidden=512, codebook_dim=64, codebooks=32, bins=2048),
    ),
    "7b": Size({}, FULL_MIMI),
}

# Uniform weights: a matrix's RMS is its gain / sqrt(inputs), so that inputs of RMS 1 come out at RMS gain.
LOGIT_GAIN: Final = 3.0
"""Enough spread that some tokens are much likelier than others."""
EMBEDDING_RMS: Final = 0.3
CODE_RMS: Final = 0.5
BIAS_RMS: Final = 0.01
SPEAKER_GAIN: Final = 0.1
"""Of Mimi's last convolution: its output is far from full scale."""
LAYER_SCALE: Final = 0.01
LOGITS: Final = re.compile(r"text_linear|depformer\.slices\.\d+\.linear_out")
CONSTANTS: Final = {
    "norm1.weight": 1.0,
    "norm2.weight": 1.0,
    "out_norm.weight": 1.0,
    "norm1.bias": 0.0,
    "norm2.bias": 0.0,
    "layer_scale_1.scale": LAYER_SCALE,
    "layer_scale_2.scale": LAYER_SCALE,
    "_codebook._initialized": 1.0,
    "_codebook.cluster_usage": 1.0,
}

PALETTE: Final = 256
"""Values that a made-up tensor takes: each random byte picks one."""
CHUNK_BYTES: Final = 1 << 24
DISK_SLACK_BYTES: Final = 1 << 20
"""Room for headers, config and tokenizer."""

Palette = npt.NDArray[np.uint8 | np.uint16 | np.uint32]


def synthesize(folder: Path, quality: str, size: str, seed: int = 0, progress: Progress | None = None) -> Checkpoint:
    """Write a checkpoint of random weights in the official layout, and return it.

    It says random words and makes noises, the same for the same seed. `size` is a key of SIZES; "7b" has Moshi's
    true shapes and needs the disk that Moshi needs. Memory stays at some tens of MB whatever the size.

    Raises CheckpointError: unknown quality or size, files in the way, or too little disk.
    """
    if quality not in QUALITIES or size not in SIZES:
        raise CheckpointError(
            f"cannot make {size} in {quality}: expected a size of {', '.join(SIZES)} "
            f"and a quality of {', '.join(QUALITIES)}"
        )
    names = {"moshi_name": QUALITIES[quality].file, "mimi_name": MIMI_FILE, "tokenizer_name": TOKENIZER_FILE}
    raw = dict(OFFICIAL) | dict(SIZES[size].config) | names
    config = _parse_config(folder / CONFIG_FILE, raw)
    for name in (CONFIG_FILE, *names.values()):
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name} is in the way: give another folder, or remove it")
    model, mimi = model_table(config, quality), mimi_table(SIZES[size].mimi)
    total = sum(tensor.nbytes for table in (model, mimi) for tensor in table.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < total + DISK_SLACK_BYTES:
            raise CheckpointError(f"{folder} has {free / 1e9:.1f} GB free, expected {total / 1e9:.1f} GB")
        with _whole_or_nothing(folder, (CONFIG_FILE, *names.values())):
            writer = _Writer(np.random.Generator(np.random.SFC64(seed)), total, progress)
            writer.write(folder / QUALITIES[quality].file, model, QUALITIES[quality])
            writer.write(folder / MIMI_FILE, mimi, QUALITIES[quality])
            (folder / TOKENIZER_FILE).write_bytes(_tokenizer(config.text_card, writer.random))
            (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None
    return find(str(folder), quality)


@contextmanager
def _whole_or_nothing(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """An interrupted synthesis, Ctrl-C included, leaves no gigabytes that are of no use."""
    try:
        yield
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


class _Writer:
    """Streams random tensors to disk."""

    def __init__(self, random: np.random.Generator, total: int, progress: Progress | None) -> None:
        self.random = random
        self._total = total
        self._done = 0
        self._progress = progress

    def write(self, path: Path, table: Table, quality: Quality) -> None:
        # Wide items first: each tensor is then aligned to its items.
        ordered = dict(sorted(table.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0])))
        with path.open("wb") as file:
            file.write(encode_header(ordered))
            for name, tensor in ordered.items():
                for chunk in self._chunks(tensor.nbytes, palette(name, tensor, quality)):
                    file.write(chunk)
                    self._done += len(chunk)
                    if self._progress is not None:
                        self._progress(self._done, self._total)

    def _chunks(self, nbytes: int, values: Palette | None) -> Iterator[bytes]:
        while nbytes > 0:
            size = min(nbytes, CHUNK_BYTES)
            nbytes -= size
            if values is None:
                yield self.random.bytes(size)
            else:
                picks = np.frombuffer(self.random.bytes(size // values.itemsize), np.uint8)
                yield values[picks].tobytes()


def encode_header(table: Table) -> bytes:
    """A safetensors header for tensors that follow it in the table's order, without gaps."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in table.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = msgspec.json.encode(header)
    # The format asks that the data begin at a multiple of 8.
    encoded += b" " * (-len(encoded) % HEADER_LENGTH.size)
    return HEADER_LENGTH.pack(len(encoded)) + encoded


def palette(name: str, tensor: Tensor, quality: Quality) -> Palette | None:
    """The values, as the file stores them, that a tensor may take; None: any bits at all.

    A quantized weight is scale * n + bias, where n is any number of the quality's bits.
    """
    if tensor.dtype == "U32":
        return None
    for ending, value in CONSTANTS.items():
        if name.endswith(ending):
            return _store(tensor.dtype, value, 0.0)
    stem, kind = name.rpartition(".")[::2]
    if quality.bits is None or quality.group is None or kind not in ("scales", "biases"):
        return _store(tensor.dtype, 0.0, _rms(name, tensor.shape))
    steps = 2**quality.bits
    rows, groups = tensor.shape
    scale = _rms(f"{stem}.weight", (rows, groups * quality.group)) / math.sqrt((steps**2 - 1) / 12)
    return _store(tensor.dtype, scale if kind == "scales" else -scale * (steps - 1) / 2, 0.0)


def _rms(name: str, shape: tuple[int, ...]) -> float:
    stem = name.rpartition(".")[0]
    if name.endswith("embedding_sum"):
        return CODE_RMS
    if name.endswith(".bias"):
        return BIAS_RMS
    if stem.endswith("emb") or stem.startswith("audio_embs"):
        return EMBEDDING_RMS
    gain = 1.0
    if LOGITS.fullmatch(stem):
        gain = LOGIT_GAIN
    elif stem == f"decoder.model.{3 * len(MIMI_RATIOS) + 2}.conv.conv":
        gain = SPEAKER_GAIN
    inputs = math.prod(shape[1:])
    if "convtr" in stem:
        # Inputs first, and each output sample sees two steps of the kernel; the upsampling one is depthwise.
        inputs = 2 * (shape[0] if shape[1] > 1 else 1)
    return gain / math.sqrt(inputs)


def _store(dtype: str, mean: float, rms: float) -> Palette:
    values = (mean + rms * math.sqrt(3.0) * np.linspace(-1.0, 1.0, PALETTE)).astype(np.float32)
    bits = values.view(np.uint32)
    # bfloat16 is the upper half of a float32.
    return (bits >> 16).astype(np.uint16) if dtype == "BF16" else bits


# The text tokenizer: a SentencePiece model is one protocol buffer, and ours needs few of its fields.

CONSONANTS: Final = "bdfgklmnprstvz"
VOWELS: Final = "aeiou"
SPECIAL: Final = (("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<pad>", 3))
"""Pieces 0 to 3 with their types: unknown, control, control, control."""
PAD_ID: Final = 3
NORMAL: Final = 1
UNIGRAM: Final = 1
WORD_START: Final = "\u2581"


def _tokenizer(pieces: int, random: np.random.Generator) -> bytes:
    """A SentencePiece model of `pieces` pieces: the four special ones, then made-up words."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    words = syllables + [first + second for first in syllables for second in syllables]
    words += [first + second for first in words[len(syllables) :] for second in syllables[:10]]
    order = random.permutation(len(words))[: pieces - len(SPECIAL)]
    model = b"".join(_piece(piece, 0.0, kind) for piece, kind in SPECIAL)
    model += b"".join(
        _piece(WORD_START + words[word], -float(rank), NORMAL) for rank, word in enumerate(order.tolist())
    )
    trainer = _varint_field(3, UNIGRAM) + _varint_field(4, pieces) + _varint_field(43, PAD_ID)
    return model + _bytes_field(2, trainer) + _bytes_field(3, _bytes_field(1, b"identity"))


def _piece(piece: str, score: float, kind: int) -> bytes:
    fields = _bytes_field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind)
    return _bytes_field(1, fields)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded) + bytes([value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
