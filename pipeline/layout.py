"""What a checkpoint's files must hold: config.json's keys, and the tensors that follow from them.

Moshi's family shares one architecture, and these of its features make a conversation: any dimensions, any number of
codebooks for each side, any delays, and a depformer of any schedule (a file for MLX has tensors of its own for each
step). Tried by building upstream's `Lm` from shrunken configs and comparing every tensor:
Moshi 7B, the 2B and 1B translators' dimensions, low-rank embeddings, each in every quality (tests/test_layout.py). What
needs input that a conversation has not is refused (FOREIGN).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from pipeline.errors import CheckpointError
from pipeline.headers import Table, Tensor


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

VOICES: Final = ("moshiko", "moshika")
"""The official voices, male and female; also short names of their repositories. The first is the default."""


def official_repo(voice: str, quality: str) -> str:
    """The official repository of a voice in a quality."""
    return f"kyutai/{voice}-mlx-{quality}"


Count = Annotated[int, msgspec.Meta(ge=1)]


class Quantization(msgspec.Struct, frozen=True):
    """How weights are stored, where config.json says so (the official ones do not)."""

    bits: int | None = None
    group_size: int | None = None


class ModelConfig(msgspec.Struct, frozen=True):
    """The keys of config.json that decide what a model's file holds, by their official names.

    Those without a default are those that upstream's `LmConfig.from_config_dict` asks for, and the others have its
    defaults.
    """

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
    gating: str = "silu"
    norm: str = "rms_norm"
    depformer_gating: str = "silu"
    depformer_layer_scale: float | None = None
    depformer_low_rank_embeddings: Count | None = None
    demux_second_stream: bool = False
    cross_attention: bool = False
    conditioners: dict[str, Any] | None = None
    extra_heads_num_heads: int = 0
    quantization: Quantization | None = None
    quantization_config: Quantization | None = None
    moshi_name: str | None = None
    mimi_name: str = MIMI_FILE
    tokenizer_name: str = TOKENIZER_FILE


FOREIGN: Final = (
    "layer_scale",
    "depformer_layer_scale",
    "demux_second_stream",
    "cross_attention",
    "conditioners",
    "extra_heads_num_heads",
)
"""Features of other models of the family (speech to text, text to speech, translation): each adds tensors or input
that a conversation has not."""

# What upstream's MLX code computes whatever config.json says; another value would be computed wrong without a word.
COMPUTED: Final[Mapping[str, tuple[object, ...]]] = {
    "causal": (True,),
    "gating": ("silu",),
    "depformer_gating": ("silu",),
    "norm": ("rms_norm", "rms_norm_f32"),
    "positional_embedding": ("rope", "none"),
    "depformer_pos_emb": ("rope", "none"),
}
FILE_KEYS: Final = ("moshi_name", "mimi_name", "tokenizer_name")


def parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """config.json's content, if it is of a model that can hold a conversation; `path` is for what errors say.

    Raises CheckpointError: a key missing, or with a value that the program cannot do.
    """
    try:
        config = msgspec.convert(raw, ModelConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name in FOREIGN:
        if getattr(config, name):
            raise CheckpointError(f"{path} is not of a dialogue model: it sets {name}")
    for fault in _faults(config):
        raise CheckpointError(f"{path}: {fault}")
    return config


def _faults(config: ModelConfig) -> Iterator[str]:
    for key, values in COMPUTED.items():
        value = getattr(config, key)
        if value not in values:
            yield f"{key} is {value!r}, expected {' or '.join(map(repr, values))}"
    for key in FILE_KEYS:
        name = getattr(config, key)
        if name is not None and not _is_file_name(name):
            yield f"{key} is {name!r}, expected the name of a file beside it"
    if config.dep_q >= config.n_q or len(config.delays) != config.n_q + 1:
        yield (
            "expected dep_q < n_q and n_q + 1 delays, "
            f"found dep_q {config.dep_q}, n_q {config.n_q} and {len(config.delays)} delays"
        )
    elif config.delays[0]:
        yield f"delays begins with {config.delays[0]}, expected 0: the text is not delayed"
    if config.dim % config.num_heads or config.depformer_dim % config.depformer_num_heads:
        yield (
            f"expected each dim to be a multiple of its heads, found {config.dim} with {config.num_heads} "
            f"and {config.depformer_dim} with {config.depformer_num_heads}"
        )


def _is_file_name(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in name


class Matrix(NamedTuple):
    """A matrix of the language model."""

    name: str
    rows: int
    """Outputs, or entries of an embedding."""
    columns: int
    quantizable: bool = True


def model_table(config: ModelConfig, quality: str) -> Table:
    """Name, type and shape of each tensor in a language model's file.

    Raises CheckpointError: a matrix has rows that the quality's groups do not divide.
    """
    entry = QUALITIES[quality]
    table: Table = {}
    for name, rows, columns, quantizable in _matrices(config):
        if entry.bits is None or entry.group is None or not quantizable:
            table[f"{name}.weight"] = Tensor("BF16", (rows, columns))
            continue
        if columns % entry.group:
            raise CheckpointError(f"{name} has {columns} columns, expected a multiple of {entry.group} for {quality}")
        table[f"{name}.weight"] = Tensor("U32", (rows, columns * entry.bits // 32))
        table[f"{name}.scales"] = Tensor("BF16", (rows, columns // entry.group))
        table[f"{name}.biases"] = Tensor("BF16", (rows, columns // entry.group))
    table |= {f"{name}.weight": Tensor("BF16", (dim,)) for name, dim in _norms(config)}
    return table


def _matrices(config: ModelConfig) -> Iterator[Matrix]:
    dim, dep, audio = config.dim, config.depformer_dim, config.card + 1
    yield Matrix("text_emb", config.text_card + 1, dim)
    yield Matrix("text_linear", config.text_card, dim)
    for codebook in range(config.n_q):
        yield Matrix(f"audio_embs.{codebook}", audio, dim)
    for layer in range(config.num_layers):
        yield from _layer_matrices(f"transformer.layers.{layer}", dim, 4 * dim)
    for index in range(config.dep_q):
        name = f"depformer.slices.{index}"
        yield from _embedding(config, f"{name}.emb", config.text_card + 1 if index == 0 else audio)
        yield Matrix(f"{name}.linear_in", dep, dim)
        yield Matrix(f"{name}.linear_out", config.card, dep)
        for layer in range(config.depformer_num_layers):
            yield from _layer_matrices(f"{name}.transformer.layers.{layer}", dep, config.depformer_dim_feedforward)


def _embedding(config: ModelConfig, name: str, entries: int) -> Iterator[Matrix]:
    rank = config.depformer_low_rank_embeddings
    if rank is None:
        yield Matrix(name, entries, config.depformer_dim)
        return
    # nn.quantize quantizes leaves only, and an embedding with a matrix of its own is none.
    yield Matrix(name, entries, rank, quantizable=False)
    yield Matrix(f"{name}.low_rank", config.depformer_dim, rank)


def _layer_matrices(name: str, dim: int, feedforward: int) -> Iterator[Matrix]:
    hidden = 11 * dim // 4 if feedforward == 4 * dim else 2 * feedforward // 3
    yield Matrix(f"{name}.self_attn.in_proj", 3 * dim, dim)
    yield Matrix(f"{name}.self_attn.out_proj", dim, dim)
    yield Matrix(f"{name}.gating.linear_in", 2 * hidden, dim)
    yield Matrix(f"{name}.gating.linear_out", dim, hidden)


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
