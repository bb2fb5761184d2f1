"""pipeline.audio: samples made fit for the codec, and fades."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.audio import FADE, FULL_SCALE, Samples, falling, make_fit, rising

TINY = np.float32(1e-45)  # the smallest denormal
ABOVE = np.nextafter(np.float32(1), np.float32(2))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (np.nan, 0.0),
        (-np.nan, 0.0),
        (np.inf, 1.0),
        (-np.inf, -1.0),
        (1e30, 1.0),
        (-1e30, -1.0),
        (ABOVE, 1.0),
        (-ABOVE, -1.0),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 1_920])
def test_what_is_not_fit_is_replaced(given: float, made: float, length: int) -> None:
    samples = np.full(length, 0.25, np.float32)
    samples[length // 2] = given
    assert make_fit(samples) == 1
    assert samples[length // 2] == made
    assert np.count_nonzero(samples == 0.25) == length - 1


@pytest.mark.parametrize("fit", [0.0, -0.0, 1.0, -1.0, TINY, -TINY, 1e-40, 0.1, np.nextafter(ABOVE, np.float32(0))])
def test_what_is_fit_stays_to_the_bit(fit: float) -> None:
    samples = np.full(5, fit, np.float32)
    before = samples.tobytes()
    assert make_fit(samples) == 0
    assert samples.tobytes() == before


def test_what_is_fit_stays_to_the_bit_also_beside_what_is_not() -> None:
    samples = np.array([-0.0, TINY, np.nan, -TINY, 1.0, np.inf, -1.0, 0.3], np.float32)
    kept = [0, 1, 3, 4, 6, 7]
    before = samples[kept].tobytes()
    assert make_fit(samples) == 2
    assert samples[kept].tobytes() == before


def test_all_of_it_may_be_unfit() -> None:
    samples = np.array([np.nan, np.inf, -np.inf, 2, -2], np.float32)
    assert make_fit(samples) == 5
    np.testing.assert_array_equal(samples, [0, 1, -1, 1, -1])


def test_nothing_is_fit() -> None:
    assert make_fit(np.empty(0, np.float32)) == 0


def test_a_view_of_a_longer_array_is_changed_in_place() -> None:
    samples = np.full((10, 2), 3, np.float32)
    assert make_fit(samples[2:4, 0]) == 2
    np.testing.assert_array_equal(samples[2:4, 0], 1)
    assert np.count_nonzero(samples == 3) == 18


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, st.integers(0, 100), elements=st.floats(width=32)))
@example(np.array([np.nan], np.float32))
def test_anything_becomes_fit_and_only_what_must_is_changed(samples: Samples) -> None:
    before = samples.copy()
    fit = np.isfinite(before) & (np.abs(before) <= FULL_SCALE)
    assert make_fit(samples) == np.count_nonzero(~fit)
    assert np.isfinite(samples).all()
    assert not len(samples) or np.abs(samples).max() <= FULL_SCALE
    assert samples[fit].tobytes() == before[fit].tobytes()
    beyond = ~fit & ~np.isnan(before)
    np.testing.assert_array_equal(samples[beyond], np.sign(before[beyond]))
    np.testing.assert_array_equal(samples[np.isnan(before)], 0)
    assert make_fit(samples) == 0


@pytest.mark.parametrize("length", [1, 2, 240, 1_920])
def test_fades_are_mirrors_and_together_are_1(length: int) -> None:
    up, down = rising(length), falling(length)
    assert up.dtype == np.float32
    assert len(up) == len(down) == length
    np.testing.assert_array_equal(up[::-1], down)
    np.testing.assert_allclose(up + down, 1, rtol=0, atol=1e-6)
    assert (np.diff(up) > 0).all()
    assert (up > 0).all()
    assert (up < 1).all()


def test_fades_begin_and_end_where_nothing_is_heard() -> None:
    assert len(rising()) == len(falling()) == FADE
    assert rising()[0] < 1e-4
    assert falling()[0] > 1 - 1e-4
    assert np.abs(np.diff(rising())).max() < np.pi / 2 / FADE


def test_a_fade_may_be_changed_without_changing_the_next() -> None:
    falling()[:] = 0
    rising()[:] = 0
    assert falling()[0] > 0.9
    assert falling().flags.c_contiguous
