"""pipeline.drift: what the dates of two clocks say, what is done about it, and how that sounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import Samples
from pipeline.drift import MOST_PPM, Drift, Vernier
from pipeline.ring import Anchor, RingWriter
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import FRAME, SAMPLE_RATE
from procs.devices import _Converter
from tests.clocks import BEGINNING, CLICK, LOOK_S, Loop, loop, roughness
from tests.helpers import speech_like, temporary_ring, tone

WITHIN_MS = 12.0
"""How much the latency may differ from what it was."""


class Clocks:
    """Two streams' dates, each late by a share of `jitter_ms`, and the drift that is read off them."""

    def __init__(self, ppm: float, jitter_ms: float = 0.0, seed: int = 0) -> None:
        self.drift = Drift()
        self.ppm = ppm
        self.mic = self.speaker = 0.0
        self.now_s = 1.0
        self.apart_ms: list[float] = []
        # What a median of 25 lets through of callbacks that are late by so much at most.
        late_ms = np.median(np.random.default_rng(seed).uniform(0, 2 * jitter_ms, (20_011, 25)), axis=1)
        self._late_ms = itertools.cycle(late_ms.tolist())

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        for _ in range(round(seconds / LOOK_S)):
            self.now_s += LOOK_S
            self.mic += LOOK_S * SAMPLE_RATE * (1 + self.ppm * 1e-6)
            self.speaker += LOOK_S * SAMPLE_RATE * (1 + self.drift.correction_ppm * 1e-6)
            self.drift.see(self._date(self.mic), self._date(self.speaker))
            self.apart_ms.append((self.mic - self.speaker) / SAMPLE_RATE * 1_000)

    def jump(self, mic_s: float = 0.0, speaker_s: float = 0.0) -> None:
        """A device was away for so long."""
        self.mic -= mic_s * SAMPLE_RATE
        self.speaker -= speaker_s * SAMPLE_RATE

    def _date(self, at: float) -> Anchor:
        position = int(at)
        since_ns = (at - position) * NS_PER_S / SAMPLE_RATE
        return Anchor(position, round(self.now_s * NS_PER_S - since_ns + next(self._late_ms) * NS_PER_MS))


@pytest.mark.parametrize("ppm", [0, 20, -20, 200, -200, 1_000, -1_000])
def test_an_hour_in_which_the_clocks_stay_together(ppm: float) -> None:
    clocks = Clocks(ppm, jitter_ms=4.0)
    clocks.run(3_600)
    assert max(np.abs(clocks.apart_ms)) < WITHIN_MS
    assert max(np.abs(clocks.apart_ms[-1_000:])) < 2.0  # and what they came apart at first is taken back
    assert clocks.drift.ppm == pytest.approx(ppm, abs=4 * clocks.drift.error_ppm)
    assert clocks.drift.error_ppm < 1.0


@pytest.mark.parametrize("jitter_ms", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_clocks_that_agree_are_left_alone(jitter_ms: float, seed: int) -> None:
    clocks = Clocks(0.0, jitter_ms, seed)
    for _ in range(120):
        clocks.run(5)
        assert clocks.drift.correction_ppm == 0.0


def test_the_drift_is_told_after_half_a_minute() -> None:
    clocks = Clocks(-123.0, jitter_ms=0.5)
    clocks.run(29)
    assert clocks.drift.ppm is None
    clocks.run(3)
    assert clocks.drift.ppm == pytest.approx(-123.0, abs=30)


def test_a_clock_that_gets_warm() -> None:
    clocks = Clocks(50.0, jitter_ms=1.0)
    clocks.run(600)
    cold = len(clocks.apart_ms)
    clocks.ppm += 10
    clocks.run(600)
    assert clocks.drift.ppm == pytest.approx(60.0, abs=2)
    assert max(np.abs(clocks.apart_ms[cold:])) < 3
    assert abs(clocks.apart_ms[-1]) < 0.5


def test_a_drift_that_ends_is_no_more_corrected() -> None:
    clocks = Clocks(100.0)
    clocks.run(120)
    assert clocks.drift.correction_ppm == pytest.approx(100, abs=5)
    clocks.ppm = 0.0
    clocks.run(900)
    assert clocks.drift.correction_ppm == 0.0


@pytest.mark.parametrize("away", [{"mic_s": 1.5}, {"speaker_s": 0.02}, {"speaker_s": -0.05}])
def test_a_device_that_was_away_is_not_made_up_for(away: dict[str, float]) -> None:
    """Latency that came at once is the devices' and the player's to mind; the drift is what it was."""
    clocks = Clocks(200.0, jitter_ms=0.5)
    clocks.run(120)
    clocks.jump(**away)
    after_ms = clocks.apart_ms[-1] - 1_000 * away.get("mic_s", 0.0) + 1_000 * away.get("speaker_s", 0.0)
    clocks.run(0.5)
    rest = len(clocks.apart_ms)
    clocks.run(120)
    assert max(np.abs(np.array(clocks.apart_ms[rest:]) - after_ms)) < 2.0
    assert clocks.drift.ppm == pytest.approx(200, abs=5)
    assert clocks.drift.correction_ppm == pytest.approx(200, abs=30)


@pytest.mark.parametrize("told", [True, False])
def test_a_device_that_runs_dry_again_and_again_is_not_taken_for_a_drift(told: bool) -> None:
    """Every 3 s a sound server puts in 10 to 80 ms of silence, from the run's beginning."""
    clocks = Clocks(50.0, jitter_ms=0.5)
    clocks.run(2)
    for away_s in itertools.islice(itertools.cycle([0.01, 0.04, 0.08]), 40):
        clocks.jump(speaker_s=away_s)
        if told:
            clocks.drift.expect_shift()
        clocks.run(3)
        assert abs(clocks.drift.correction_ppm) < MOST_PPM / 3
    assert clocks.drift.ppm == pytest.approx(50.0, abs=10 if told else 150)
    clocks.run(120)
    assert clocks.drift.ppm == pytest.approx(50.0, abs=10)


@pytest.mark.parametrize("every_s", [0.5, 3.0])
def test_a_device_that_says_that_it_ran_dry_and_moves_no_date_is_corrected_all_the_same(every_s: float) -> None:
    clocks = Clocks(200.0, jitter_ms=0.5)
    for _ in range(round(300 / every_s)):
        clocks.drift.expect_shift()
        clocks.run(every_s)
    assert clocks.drift.ppm == pytest.approx(200.0, abs=5)
    assert abs(clocks.apart_ms[-1]) < 1


def test_a_stage_that_was_held_up_looks_at_dates_that_have_not_moved_yet() -> None:
    clocks = Clocks(50.0, jitter_ms=0.5)
    clocks.run(60)
    error_ppm, apart_ms = clocks.drift.error_ppm, clocks.apart_ms[-1]
    for stream in ("mic", "speaker"):  # two seconds in which nobody looks
        setattr(clocks, stream, getattr(clocks, stream) + 2 * SAMPLE_RATE)
    clocks.now_s += 2
    clocks.drift.expect_shift()
    clocks.run(0.5)
    clocks.jump(speaker_s=0.08)
    clocks.run(30)
    assert clocks.drift.error_ppm < error_ppm
    assert clocks.apart_ms[-1] - 80 == pytest.approx(apart_ms, abs=2)


def test_a_clock_that_is_far_from_its_rate_is_corrected_as_far_as_it_is_not_heard() -> None:
    clocks = Clocks(20_000.0)
    clocks.run(120)
    assert abs(clocks.drift.correction_ppm) <= MOST_PPM


def test_without_new_dates_nothing_is_concluded() -> None:
    clocks = Clocks(100.0)
    clocks.run(60)
    told, corrected = clocks.drift.ppm, clocks.drift.correction_ppm
    stale = Anchor(7, 8)
    for _ in range(100):
        clocks.drift.see(None, stale)
        clocks.drift.see(stale, None)
        clocks.drift.see(clocks._date(clocks.mic), clocks._date(clocks.speaker))  # those that were seen last
    assert (clocks.drift.ppm, clocks.drift.correction_ppm) == (told, corrected)


def test_a_ring_tells_the_drift_and_a_new_writer_does_not_know_it() -> None:
    with temporary_ring() as ring:
        assert ring.drift_ppm is None
        for ppm in (0.0, -12.345, 1_000.0):
            ring.drift_ppm = ppm
            assert ring.drift_ppm == ppm
        RingWriter(ring)
        assert ring.drift_ppm is None
        ring.drift_ppm = 3.0
        ring.drift_ppm = None
        assert ring.drift_ppm is None


# The whole way


def assert_unheard(made: Loop, first_ms: float) -> None:
    """No gap, no click, nothing skipped, and the latency as it was."""
    assert made.heard.ledger().gaps == 0
    assert made.source.ring.ledger().dropped == 0
    assert max(made.roughness[BEGINNING:]) < CLICK
    assert max(np.abs(np.array(made.latency_ms[25:]) - first_ms)) < WITHIN_MS


@pytest.mark.parametrize("ppm", [200, -200, 1_000, -1_000])
def test_a_conversation_of_which_nothing_is_heard(ppm: float) -> None:
    with loop(ppm, block=480) as made:
        made.run(4)
        first_ms = float(np.median(made.latency_ms[12:]))
        made.run(120)
        assert_unheard(made, first_ms)
        made.mic.ppm += 10
        made.run(60)
        assert_unheard(made, first_ms)
        assert np.mean(made.latency_ms[-200:]) == pytest.approx(first_ms, abs=3)


@pytest.mark.parametrize("block", [120, 1_920])
def test_where_the_clocks_agree_what_is_sent_is_what_was_generated(block: int) -> None:
    with loop(0, block) as made:
        made.generated = speech_like(125)
        made.sent = []
        made.run(70)
        sent = np.concatenate(made.sent)
        last = made.heard.mark(made.heard.mark_count - 1)
        assert last is not None
        began = last.position - last.frame * FRAME
        assert not sent[:began].any()
        assert np.array_equal(sent[began:], np.resize(made.generated, len(sent) - began))


# The resampler


class Source:
    """What a vernier asks: samples in turn, and the dates that it gives to them."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.asked = 0
        self.dates: list[tuple[int, int]] = []
        self.xruns = 0

    def __call__(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        self.dates.append((self.asked, dac_ns))
        out[:] = self.samples[self.asked : self.asked + len(out)]
        self.asked += len(out)
        self.xruns += xrun


def through(edge: Vernier | _Converter, samples: int, block: int, rate: int = SAMPLE_RATE) -> Samples:
    """So many samples of what comes out of it, by a device's clock that is right."""
    out = np.full(samples, np.nan, np.float32)
    for at in range(0, samples, block):
        edge.fill(out[at : at + block], at * NS_PER_S // rate, False)
    return out


@given(st.lists(st.integers(1, 2_000), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_without_a_correction_blocks_of_any_size_are_copied(sizes: list[int]) -> None:
    source = Source(speech_like(64)[: sum(sizes)])
    vernier = Vernier(source, lambda: 0.0)
    sent = [np.full(size, np.nan, np.float32) for size in sizes]
    for out in sent:
        vernier.fill(out, 0, False)
    assert np.array_equal(np.concatenate(sent), source.samples)


@given(st.lists(st.tuples(st.integers(1, 500), st.sampled_from([0.0, 0.0, 1_000.0, -1_000.0, 37.0])), max_size=200))
@settings(max_examples=30, deadline=None)
def test_a_correction_that_comes_and_goes_is_not_heard(blocks: list[tuple[int, float]]) -> None:
    wave = np.sin(2 * np.pi * 437.5 / SAMPLE_RATE * np.arange(110_000)).astype(np.float32) / 2
    correction = [0.0]
    vernier = Vernier(Source(wave), lambda: correction[0])
    sent = []
    for size, correction[0] in blocks:
        out = np.full(size, np.nan, np.float32)
        vernier.fill(out, 0, False)
        sent.append(out)
    if (together := np.concatenate([*sent, np.zeros(0, np.float32)])).size > 100:
        assert roughness(together[50:]) < CLICK  # after the beginning, before which was silence


def test_after_a_correction_samples_are_copied_again() -> None:
    source, correction = Source(speech_like(40)), [500.0]
    vernier = Vernier(source, lambda: correction[0])
    through(vernier, 24_000, 120)
    correction[0] = 0.0
    through(vernier, 12_000, 120)
    begin = source.asked
    assert np.array_equal(through(vernier, 6_000, 120), source.samples[begin : begin + 6_000])
    assert vernier.ahead_ms == 0


@pytest.mark.parametrize("ppm", [-1_000.0, 200.0])
@pytest.mark.parametrize("hz", [437.5, 5_000.0, 10_000.0])
def test_a_vernier_is_exact_to_80_db(ppm: float, hz: float) -> None:
    count = 24_000
    moments = np.arange(count + 100)
    source = Source((0.5 * np.sin(2 * np.pi * hz / SAMPLE_RATE * moments)).astype(np.float32))
    sent = through(Vernier(source, lambda: ppm), count, 120)
    wanted = 0.5 * np.sin(2 * np.pi * hz / SAMPLE_RATE * np.arange(count) * (1 + ppm * 1e-6))
    assert np.abs(sent - wanted)[50:].max() < 0.5e-4


@pytest.mark.parametrize("make", ["vernier", "converter"])
@pytest.mark.parametrize("ppm", [-1_000.0, 0.0, 200.0])
def test_what_is_asked_ahead_has_the_date_at_which_it_is_heard(make: str, ppm: float) -> None:
    """Position 24,000 of the source is at that moment at which it comes out."""
    source = Source(np.zeros(100_000, np.float32))
    source.samples[60_000] = 1.0
    rate = SAMPLE_RATE if make == "vernier" else 48_000
    edge = Vernier(source, lambda: ppm) if make == "vernier" else _Converter(rate, 120, source, lambda: ppm)
    sent = through(edge, 3 * rate, rate // 100, rate)
    heard_ns = int(np.argmax(sent)) * NS_PER_S / rate
    first, dac_ns = next((first, ns) for first, ns in reversed(source.dates) if first <= 60_000)
    told_ns = dac_ns + (60_000 - first) * NS_PER_S / SAMPLE_RATE / (1 + ppm * 1e-6)
    assert told_ns == pytest.approx(heard_ns, abs=2 * NS_PER_S / rate)
    assert edge.ahead_ms <= 16


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_a_device_with_a_rate_of_its_own_has_the_correction_in_the_one_resampler(rate: int) -> None:
    count, correction = 10 * rate, [0.0]
    source = Source(tone(140, 437.5))
    converter = _Converter(rate, 120, source, lambda: correction[0])
    through(converter, count // 2, rate // 100, rate)
    asked, correction[0] = source.asked, 1_000.0
    sent = through(converter, count // 2, rate // 100, rate)
    assert source.asked - asked == pytest.approx(5 * SAMPLE_RATE * 1.001, abs=240)
    wave = sent.astype(np.float64)
    told = (wave[2:] + wave[:-2]) / (2 * np.cos(2 * np.pi * 437.5 / rate))
    assert np.abs(wave[1:-1] - told).max() < CLICK


def test_an_underrun_is_handed_on_once() -> None:
    for edge in (
        (source := Source(tone(2)), Vernier(source, lambda: 0.0)),
        (
            source := Source(tone(2)),
            _Converter(48_000, 120, source, lambda: 0.0),
        ),
    ):
        _, resampler = edge
        resampler.fill(np.zeros(480, np.float32), 0, True)
        assert edge[0].xruns == 1


def test_an_underrun_is_handed_on_though_there_are_samples_left() -> None:
    source = Source(tone(40))
    converter = _Converter(44_100, 120, source, lambda: 0.0)
    for _ in range(200):
        asked = source.asked
        converter.fill(np.zeros(100, np.float32), 0, True)
        if source.asked == asked:
            break
    else:
        pytest.fail("it asked each time")
    told = source.xruns
    converter.fill(np.zeros(300, np.float32), 0, False)
    assert source.xruns == told + 1
