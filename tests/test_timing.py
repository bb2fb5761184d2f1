"""pipeline.timing: the spread of durations against numpy's, and the clock."""

import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import Spread, StageSpread
from pipeline.timing import Durations, now_ns, promote_thread
from pipeline.topology import FRAME_MS

HDR = 0.001
"""Three digits."""

UNIT_MS = 0.001


def spread_of(values: Sequence[float]) -> Spread:
    durations = Durations()
    for value in values:
        durations.add_ms(value)
    return durations.spread()


def assert_as_numpy_says(values: Sequence[float]) -> None:
    spread = spread_of(values)
    assert spread.frames == len(values)
    assert spread.max_ms == pytest.approx(max(values), rel=HDR, abs=UNIT_MS)
    for percent, found in ((50, spread.p50_ms), (95, spread.p95_ms), (99, spread.p99_ms)):
        # Where so many percent are no whole number of values, it may be the one before or the one after.
        low, high = (float(np.percentile(values, percent, method=method)) for method in ("lower", "higher"))
        low = min(low, float(np.percentile(values, percent, method="inverted_cdf")))
        assert low * (1 - HDR) - UNIT_MS <= found <= high * (1 + HDR) + UNIT_MS, percent


@pytest.mark.parametrize("count", [1, 2, 10, 1_000, 5_000])
def test_the_spread_is_numpys_to_three_digits(count: int) -> None:
    values = np.random.default_rng(count).lognormal(3, 0.8, count).tolist()
    assert_as_numpy_says(values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.001, 2_000), min_size=1, max_size=100))
def test_the_spread_of_anything_is_numpys_to_three_digits(values: list[float]) -> None:
    assert_as_numpy_says(values)


def test_nothing_counted_is_all_zeros() -> None:
    assert Durations().spread() == Spread()
    assert Durations().stage_spread() == StageSpread(budget_ms=FRAME_MS)


def test_late_is_what_took_longer_than_a_frame() -> None:
    durations = Durations()
    for value in (0.0, 79.9, FRAME_MS, 80.0001, 500.0):
        durations.add_ms(value)
    found = durations.stage_spread()
    assert (found.frames, found.late, found.budget_ms) == (5, 2, FRAME_MS)
    spread = durations.spread()
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.max_ms) == (
        spread.p50_ms,
        spread.p95_ms,
        spread.p99_ms,
        spread.max_ms,
    )


@pytest.mark.parametrize(("given", "counted"), [(0.0, 0.001), (-5.0, 0.001), (0.0004, 0.001), (1e9, 600_000.0)])
def test_what_is_out_of_bounds_counts_as_the_bound(given: float, counted: float) -> None:
    spread = spread_of([given])
    assert spread.frames == 1
    assert spread.max_ms == pytest.approx(counted, rel=HDR)


def test_memory_is_bounded_for_a_run_of_any_length() -> None:
    durations = Durations()
    values = np.random.default_rng(0).lognormal(3, 2, 1_000).tolist()
    for value in values:
        durations.add_ms(value)
    tracemalloc.start()
    try:
        for _ in range(50):
            for value in values:
                durations.add_ms(value)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert durations.spread().frames == 51_000
    assert grown < 10_000


def test_the_clock_is_the_one_that_all_processes_share() -> None:
    before = time.monotonic_ns()
    now = now_ns()
    assert before <= now <= time.monotonic_ns()


def test_a_thread_is_promoted_alone_or_not_at_all() -> None:
    found: dict[str, int | bool] = {}

    def promoted() -> None:
        found["said"] = promote_thread()
        if sys.platform == "linux":
            found["policy"] = os.sched_getscheduler(0)

    thread = threading.Thread(target=promoted)
    thread.start()
    thread.join()
    assert isinstance(found["said"], bool)
    if sys.platform == "linux":
        assert (found["policy"] == os.SCHED_FIFO) == found["said"]
        assert os.sched_getscheduler(0) != os.SCHED_FIFO  # this thread is as it was


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked")
def test_a_thread_that_may_not_be_promoted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert promote_thread() is False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no SCHED_FIFO that a program may ask for")
def test_a_thread_promoted_below_gives_way_and_hands_nothing_on() -> None:
    found: list[tuple[int, int]] = []
    promoted: list[bool] = []

    def look() -> None:
        found.append((os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK, os.sched_getparam(0).sched_priority))

    def thread(below: bool) -> None:
        promoted.append(promote_thread(below=below))
        look()
        started = threading.Thread(target=look)
        started.start()
        started.join()

    for below in (False, True):
        one = threading.Thread(target=thread, args=(below,))
        one.start()
        one.join()
    if not all(promoted):
        pytest.skip("real-time scheduling is not permitted here")
    (above, _, lower, started) = found
    assert above[0] == lower[0] == os.SCHED_FIFO
    assert above[1] > lower[1] > 0
    assert started == (os.SCHED_OTHER, 0)
