"""MLX's device: which it is, how fast it reads memory, and how much MLX has held there."""

import time
from collections.abc import Callable
from typing import Final

import mlx.core as mx
import psutil

_MIB: Final = 1 << 20
_LEAST_BYTES: Final = 256 * _MIB
_MOST_BYTES: Final = 1024 * _MIB
"""Of the array: more than any cache holds."""

_SHARE: Final = 32
"""Of the machine's memory, the array takes one part in so many, within those bounds."""

_ITEM_BYTES: Final = 4
_TRIES: Final = 5
_COPIES_ON_GPU: Final = 8
"""Copies given to a GPU at once, for which it is waited once: the wait is not to be measured."""


def device() -> str:
    """`gpu` or `cpu`: what MLX computes on by default."""
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def peak_bytes() -> int:
    """The most that MLX has held at once."""
    return int(mx.get_peak_memory())


def gb_s(nbytes: int | None = None) -> float:
    """The memory's bandwidth as MLX's own kernels reach it on its device, in GB/s of 1e9 bytes.

    The best of several tries of two ways over an array of float32 of `nbytes` (by default 256 MiB on a CPU, and up to
    1 GiB on a GPU, by the machine's memory): its maximum, of which every byte read counts, and a copy with one added,
    of which every byte read and every byte written counts. On a CPU, where MLX computes in one thread, this is less
    than the memory can do.
    """
    items = (nbytes or _array_bytes()) // _ITEM_BYTES
    array = mx.zeros((items,), mx.float32)
    mx.eval(array)
    passes = _COPIES_ON_GPU if device() == "gpu" else 1
    read = 1 / _best_s(lambda: mx.max(array))
    copied = 2 * passes / _best_s(lambda: _copied(array, passes))
    return max(read, copied) * items * _ITEM_BYTES / 1e9


def _copied(array: mx.array, passes: int) -> mx.array:
    # One after another: side by side they could read what the others have brought into a cache.
    for _ in range(passes):
        array = array + 1
    return array


def _array_bytes() -> int:
    if device() == "cpu":
        return _LEAST_BYTES
    return min(_MOST_BYTES, max(_LEAST_BYTES, psutil.virtual_memory().total // _SHARE // _MIB * _MIB))


def _best_s(work: Callable[[], mx.array]) -> float:
    """The least time that `work` took."""
    return min(_timed_s(work) for _ in range(_TRIES))


def _timed_s(work: Callable[[], mx.array]) -> float:
    start_ns = time.perf_counter_ns()
    mx.eval(work())
    return (time.perf_counter_ns() - start_ns) / 1e9
