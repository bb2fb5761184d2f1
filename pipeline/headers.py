"""The safetensors format: which tensors a file holds, read off its header. Loads none of them."""

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import msgspec

from pipeline.errors import CheckpointError


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

    Raises CheckpointError: not a safetensors file, a git-lfs pointer, tensors that overlap or leave gaps, or a file of
    another length than its header asks for.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(len(LFS_MAGIC))
        refuse_pointer(path, start)
        length = _header_length(path, start, size)
        file.seek(HEADER_LENGTH.size)
        encoded = file.read(length)
    entries = _decode_header(path, encoded)
    expected = HEADER_LENGTH.size + length + _data_bytes(path, entries)
    if size != expected:
        state = "is truncated" if size < expected else "is too long"
        raise CheckpointError(f"{path} {state}: {size} bytes, its header asks for {expected}; download it again")
    return {name: Tensor(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}


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


def decode_object(encoded: bytes) -> dict[str, Any]:
    """A JSON object in which no key is there twice: a decoder would take the last, and another the first.

    Raises ValueError.
    """
    try:
        decoded = json.loads(encoded, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(decoded, dict):
        raise ValueError(f"expected an object, found {type(decoded).__name__}")
    return decoded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a number, found {name}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says against reading `path` into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raises CheckpointError if a file that begins so is what git leaves where git-lfs is not installed."""
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
        raw = decode_object(encoded)
        raw.pop("__metadata__", None)
        entries = msgspec.convert(raw, dict[str, _Entry])
    except (ValueError, msgspec.ValidationError) as error:
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


def _data_bytes(path: Path, entries: dict[str, _Entry]) -> int:
    """Bytes that the tensors take, one after the other: the format allows neither gaps nor overlaps."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, after = entry.data_offsets
        if begin != end:
            fault = "leaves a gap before it" if begin > end else "overlaps the one before it"
            raise CheckpointError(f"{path} is damaged: {name} begins at byte {begin}, expected {end}: it {fault}")
        end = after
    return end
