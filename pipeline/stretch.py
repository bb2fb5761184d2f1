"""Playing a little faster at the same pitch: where a frame can lose samples that nobody misses.

Time-scale modification by waveform similarity: W. Verhelst and M. Roelands, "An overlap-add technique based on waveform
similarity (WSOLA) for high quality time-scale modification of speech", ICASSP 1993. As in the "accelerate" operation of
WebRTC's NetEq, samples are taken out only where the signal is like itself one lag later, and in silence.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.audio import Samples
from pipeline.topology import FRAME

LEAST: Final = 60
"""The fewest samples that are taken out of a frame, 2.5 ms: a period of the highest voice, 400 Hz."""

MOST: Final = 360
"""The most, where there is sound, 15 ms: a period of the lowest voice, 67 Hz."""

OVERLAP: Final = MOST
"""Samples of the crossfade: no period that is looked for is longer."""

ALIKE: Final = 0.9
"""The correlation from which two stretches count as alike: NetEq's threshold."""

QUIET: Final = 0.003
"""A sample of silence, at most: -50 dBFS."""

_COARSE: Final = 6
"""Samples that the first search takes together: it looks at what is below 2 kHz, as NetEq's does."""

_CELL: Final = 120
"""Samples of which it is looked whether all are silent, 5 ms."""

_AS_GOOD: Final = 0.02
"""Of lags whose correlations differ by less the longest is taken."""

_FAINT: Final = 1e-9
"""Keeps silence from being like anything."""

Floats = npt.NDArray[np.floating]


class Joint(NamedTuple):
    """Where to take samples out of a frame.

    The OVERLAP samples from `at` on fade into those from `at + lag` on, behind which the frame goes on: it becomes
    `lag` samples shorter.
    """

    at: int
    lag: int


def find_joint(frame: Samples, most: int, alike: float = ALIKE) -> Joint | None:
    """The best place to take samples out of `frame`, shape (FRAME,): at least LEAST, at most `most`.

    In silence it is as many as there are; else at most MOST, where the correlation of what fades into each other is at
    least `alike`. None where there is no such place.
    """
    if most < LEAST:
        return None
    return _in_silence(frame, most) or _in_sound(frame, min(most, MOST), alike)


def warm_up() -> None:
    """Search once, where it does no harm that the first time takes twice as long."""
    find_joint(np.ones(FRAME, np.float32), MOST)


def _in_silence(frame: Samples, most: int) -> Joint | None:
    quiet = np.abs(frame).reshape(-1, _CELL).max(axis=1) <= QUIET
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)) * _CELL
    if not len(edges):
        return None
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    lag = min(most, int(stops[longest] - starts[longest]) - OVERLAP)
    return Joint(int(starts[longest]), lag) if lag >= LEAST else None


def _in_sound(frame: Samples, most: int, alike: float) -> Joint | None:
    coarse = frame.reshape(-1, _COARSE).mean(axis=1)
    found = _correlations(coarse, LEAST // _COARSE, most // _COARSE, OVERLAP // _COARSE)
    best = float(found.max())
    if best < alike:
        return None
    # The last row with one that is as good: the longest lag.
    row = int(np.flatnonzero(found.max(axis=1) >= max(alike, best - _AS_GOOD))[-1])
    return _refine(frame, int(found[row].argmax()) * _COARSE, LEAST + row * _COARSE, most)


def _correlations(signal: Floats, least: int, most: int, width: int) -> Floats:
    """How alike `width` samples and those a lag later are, by lag, from `least` to `most`, and place of the first."""
    count = len(signal) - most
    later = np.lib.stride_tricks.sliding_window_view(signal, count)[least : most + 1]
    places = count - width + 1
    scale = 1 / np.sqrt(_moving_sums(np.square(signal), width) + _FAINT)
    found = _moving_sums(later * signal[:count], width)
    found *= np.lib.stride_tricks.sliding_window_view(scale, places)[least : most + 1]
    found *= scale[:places]
    return found


def _moving_sums(values: Floats, width: int) -> Floats:
    """The sums of each `width` neighbours in the last axis."""
    sums = np.cumsum(values, axis=-1, dtype=np.float64)
    moving: Floats = sums[..., width - 1 :].copy()
    moving[..., 1:] -= sums[..., :-width]
    return moving


def _refine(frame: Samples, at: int, lag: int, most: int) -> Joint:
    """The lag near `lag` at which what fades into each other is most alike, sample for sample."""
    before = frame[at : at + OVERLAP]
    last = min(most, lag + _COARSE - 1, FRAME - OVERLAP - at)
    lags = range(max(LEAST, lag - _COARSE + 1), last + 1)
    return Joint(at, max(lags, key=lambda lag: _alikeness(before, frame[at + lag : at + lag + OVERLAP])))


def _alikeness(before: Samples, after: Samples) -> float:
    return float(np.dot(before, after)) / math.sqrt(float(np.dot(after, after)) + _FAINT)
