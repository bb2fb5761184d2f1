"""Checkpoints of random weights in the official layout."""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import CheckpointError
from pipeline.headers import ITEM_BYTES, Table, Tensor, encode_header
from pipeline.layout import (
    CONFIG_FILE,
    FULL_MIMI,
    MIMI_FILE,
    MIMI_RATIOS,
    OFFICIAL,
    QUALITIES,
    TOKENIZER_FILE,
    MimiShape,
    Quality,
    mimi_table,
    model_table,
    parse_config,
)

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes to write."""


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


def write(folder: Path, quality: str, size: str, seed: int, progress: Progress | None) -> None:
    """Write what `checkpoints.synthesize` promises. Raises CheckpointError."""
    if quality not in QUALITIES or size not in SIZES:
        raise CheckpointError(
            f"cannot make {size} in {quality}: expected a size of {', '.join(SIZES)} "
            f"and a quality of {', '.join(QUALITIES)}"
        )
    names = {"moshi_name": QUALITIES[quality].file, "mimi_name": MIMI_FILE, "tokenizer_name": TOKENIZER_FILE}
    raw = dict(OFFICIAL) | dict(SIZES[size].config) | names
    config = parse_config(folder / CONFIG_FILE, raw)
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
            (folder / TOKENIZER_FILE).write_bytes(tokenizer(config.text_card, writer.random))
            (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None


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


def tokenizer(pieces: int, random: np.random.Generator) -> bytes:
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
