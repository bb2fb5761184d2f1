"""What is done to samples on their way: made fit for the codec, faded, resampled. No device and no file is opened."""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

FULL_SCALE: Final = 1.0

FADE: Final = 240
"""Samples of a fade: 10 ms at 24 kHz."""


def make_fit(samples: Samples) -> int:
    """Make `samples`, shape (n,), finite and within full scale, in place; returns how many had to be changed.

    One NaN, infinity or sample far beyond full scale poisons Mimi's state until it is reset.
    """
    if not len(samples) or (samples.max() <= FULL_SCALE and samples.min() >= -FULL_SCALE):
        return 0  # false for NaN too, so that a NaN goes on to be counted
    wrong = ~(np.abs(samples) <= FULL_SCALE)
    np.nan_to_num(samples, copy=False, nan=0.0, posinf=FULL_SCALE, neginf=-FULL_SCALE)
    np.clip(samples, -FULL_SCALE, FULL_SCALE, out=samples)
    return int(np.count_nonzero(wrong))


def level(samples: Samples) -> tuple[float, float]:
    """The root mean square of `samples`, shape (n,), n at least 1, and the largest of them without its sign."""
    power = float(np.dot(samples, samples)) / len(samples)
    return math.sqrt(power), float(max(samples.max(), -samples.min()))


def rising(length: int = FADE) -> Samples:
    """A fade in: half a period of a raised cosine, shape (length,), from just above 0 to just below 1."""
    phase = (np.arange(length) + 1) / (length + 1)
    return (0.5 - 0.5 * np.cos(np.pi * phase)).astype(np.float32)


def falling(length: int = FADE) -> Samples:
    """A fade out, the mirror of `rising`: together they are 1 everywhere."""
    return rising(length)[::-1].copy()
