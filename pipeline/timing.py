"""Clocks and durations: the monotonic clock, a fixed-rate schedule, and how durations are spread."""

import contextlib
import os
import sys
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline import apple
from pipeline.messages import Spread, StageSpread
from pipeline.topology import FRAME_MS

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000

_LONGEST_US: Final = 600_000_000
_DIGITS: Final = 3
_REALTIME_PRIORITY: Final = 4
"""Above every ordinary thread, below the sound server's own, without which ours would have nothing to do: PulseAudio's
run at 5, PipeWire's and JACK's far above."""


def now_ns() -> int:
    """The monotonic clock, which all processes of a machine share."""
    return time.monotonic_ns()


def promote_thread(thread: int = 0, *, below: bool = False) -> bool:
    """Ask for real-time scheduling (SCHED_FIFO) of a thread of this process, by default of the calling one.

    With `below` it gives way to those promoted without, and what it starts is not promoted with it.
    On macOS, where the audio system's threads are real-time already, the calling one comes into the highest class of
    service, and others are left as they are. False where the system does not permit it.
    """
    if sys.platform == "darwin" and not thread:
        return apple.raise_thread()
    if sys.platform != "linux":
        return False
    with contextlib.suppress(PermissionError, ProcessLookupError):
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK if below else os.SCHED_FIFO
        os.sched_setscheduler(thread, policy, os.sched_param(_REALTIME_PRIORITY - below))
        return True
    return False


def threads() -> set[int]:
    """The system's numbers of this process's threads; empty where it does not show them."""
    with contextlib.suppress(FileNotFoundError):
        return {int(entry) for entry in os.listdir("/proc/self/task")}
    return set()


class Durations:
    """Durations of a run, however long, in bounded memory: an HDR histogram in µs, exact to three digits."""

    def __init__(self) -> None:
        from hdrh.histogram import HdrHistogram

        self._histogram = HdrHistogram(1, _LONGEST_US, _DIGITS)
        self._late = 0

    def add_ms(self, duration_ms: float) -> None:
        """Count one duration."""
        self._histogram.record_value(min(_LONGEST_US, max(1, round(duration_ms * 1_000))))
        self._late += duration_ms > FRAME_MS

    def spread(self) -> Spread:
        """What was counted so far."""
        if not self._histogram.get_total_count():
            return Spread()
        sums = np.asarray(self._histogram.counts).view(np.int64).cumsum()
        return Spread(
            frames=self._histogram.get_total_count(),
            p50_ms=self._at_us(sums, 50) / 1_000,
            p95_ms=self._at_us(sums, 95) / 1_000,
            p99_ms=self._at_us(sums, 99) / 1_000,
            max_ms=self._histogram.get_max_value() / 1_000,
        )

    def _at_us(self, sums: npt.NDArray[np.int64], percent: int) -> int:
        """A percentile, as the histogram's own method finds it count by count, which takes the supervisor 1 ms."""
        histogram = self._histogram
        index = int(np.searchsorted(sums, histogram.get_target_count_at_percentile(percent)))
        return int(histogram.get_highest_equivalent_value(histogram.get_value_from_index(index)))

    def stage_spread(self) -> StageSpread:
        """The same, with the number of durations over a frame's."""
        spread = self.spread()
        return StageSpread(
            frames=spread.frames,
            p50_ms=spread.p50_ms,
            p95_ms=spread.p95_ms,
            p99_ms=spread.p99_ms,
            max_ms=spread.max_ms,
            budget_ms=FRAME_MS,
            late=self._late,
        )
