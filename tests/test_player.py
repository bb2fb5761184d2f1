"""procs.playback.Player, driven by hand, block by block, over real rings."""

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import accounting, ring, stretch
from pipeline.audio import FADE, Samples, falling, rising
from pipeline.messages import Accounting
from pipeline.ring import Mark, Ring, RingReader, RingWriter
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import FRAME, FRAME_NS, SAMPLE_RATE
from procs import playback
from procs.playback import Jitter, Player
from tests.helpers import largest_step, speech_like, temporary_ring, tone

BEGAN_NS: Final = 1_000 * NS_PER_S
"""When the device converts the first sample, on a clock that the tests turn by hand."""

CAPTURED_NS: Final = BEGAN_NS - 30_000_000
"""When the microphone converted the first sample of frame 0. Frame n is n frames younger."""


def captured_ns(frame: int) -> int:
    return CAPTURED_NS + frame * FRAME_NS


class Rig:
    """A player between its two rings. Frames arrive and blocks are asked for as a test says."""

    def __init__(self, capture: Ring, source: Ring, heard: Ring, generated: Samples, queue_frames: int) -> None:
        self.capture, self.source, self.heard = capture, source, heard
        self.generated = generated
        self.queue_frames = queue_frames
        self.writer = RingWriter(source)
        self.asked = 0
        self.ahead = 0
        """Samples that were asked for before their time."""
        self.stopped_ns = 0
        self.sent: list[Samples] = []
        self.numbers: list[int] = []
        """Of the frames in the ring, in their order: the microphone's, as the marks say."""
        self.passed_over = 0
        """Frames of the microphone's that were not answered."""
        self.joints: dict[int, stretch.Joint] = {}
        """Where frames, by their place in the ring, were shortened."""
        self.player = self.successor()
        self._everything = RingReader(heard)

    def successor(self, prebuffer_ns: int = 0) -> Player:
        """What a new playback process makes on these rings. The old one, if there was one, is gone."""
        self.player = Player(self.source, self.heard, prebuffer_ns, self.queue_frames)
        return self.player

    def arrive(self, frames: int = 1, waited_ns: int = FRAME_NS) -> None:
        """The next `frames` frames of `generated` come into the ring, whole, as the inference stage writes them.

        They came one after another, the last `waited_ns` ago, so that no prebuffer keeps them where a test does not
        want it.
        """
        for younger in reversed(range(frames)):
            position = self.writer.position
            number = position // FRAME + self.passed_over
            self.numbers.append(number)
            self.writer.mark(
                position, number, captured_ns(number), start_ns=0, end_ns=self.now_ns() - waited_ns - younger * FRAME_NS
            )
            self.writer.write(self.generated[position : position + FRAME])

    def find_joint(self, frame: Samples, most: int, alike: float) -> stretch.Joint | None:
        """As the player calls it, while the rig looks on."""
        found = stretch.find_joint(frame, most, alike)
        if found is not None:
            self.joints[self.player._source.position // FRAME] = found
        return found

    def to_be_sent(self, index: int) -> Samples:
        """The frame at that place in the ring, shortened if it was."""
        frame = self.generated[index * FRAME : (index + 1) * FRAME]
        if (joint := self.joints.get(index)) is None:
            return frame
        at, after, length = joint.at, joint.at + joint.lag, stretch.OVERLAP
        crossfade = frame[at : at + length] * falling(length) + frame[after : after + length] * rising(length)
        return np.concatenate((frame[:at], crossfade, frame[after + length :]))

    def now_ns(self) -> int:
        return BEGAN_NS + self.stopped_ns + (self.asked - self.ahead) * NS_PER_S // SAMPLE_RATE

    def block(self, count: int, *, xrun: bool = False) -> Samples:
        """One callback of the device."""
        out = np.full(count, np.nan, np.float32)  # what is not filled shows
        self.player.fill(out, self.now_ns() + self.ahead * NS_PER_S // SAMPLE_RATE, xrun)
        self.asked += count
        self.sent.append(out)
        return out

    def burst(self, count: int, blocks: int) -> None:
        """So many callbacks at one moment."""
        for _ in range(blocks):
            self.block(count)
            self.ahead += count
        self.ahead = 0

    def blocks(self, samples: int, count: int = 120) -> None:
        """As many callbacks of `count` as make `samples`."""
        assert samples % count == 0
        for _ in range(samples // count):
            self.block(count)

    @property
    def output(self) -> Samples:
        return np.concatenate(self.sent)

    def marks(self) -> list[Mark]:
        found = [self.heard.mark(index) for index in range(self.heard.mark_count)]
        assert None not in found
        return [mark for mark in found if mark is not None]

    def account(self) -> Accounting:
        counts, _ = accounting.read(self.capture, self.source, self.heard)
        return counts

    def assert_exact(self) -> Accounting:
        """Every sample is accounted for, in numbers that can be: none is negative."""
        counts = self.account()
        assert counts.discrepancies() == []
        assert counts.waiting_out >= 0
        assert min(counts.played, counts.skipped, counts.concealed) >= 0
        assert counts.generated == self.writer.position
        assert counts.sent == self.asked
        return counts

    def heard_samples(self) -> Samples:
        """What a recorder that taps `heard` has got since the last time."""
        out = np.empty(self._everything.available, np.float32)
        assert self._everything.read(out) == len(out)
        assert self._everything.lost == 0
        return out


@contextlib.contextmanager
def a_rig(generated: Samples, queue_frames: int = 3, frames: int = 150) -> Iterator[Rig]:
    """A rig, and its clock in place of the monotonic one: it shows when the device asks for the next block."""
    with (
        temporary_ring(2) as capture,
        temporary_ring(frames) as source,
        temporary_ring(300) as heard,
        pytest.MonkeyPatch.context() as patch,
    ):
        rig = Rig(capture, source, heard, generated, queue_frames)
        patch.setattr(playback, "now_ns", rig.now_ns)
        patch.setattr(playback, "find_joint", rig.find_joint)
        yield rig


def step_allowed(signal: Samples) -> float:
    """The signal's own largest step, and what a raised cosine of FADE samples adds to it by its slope."""
    return largest_step(signal) + float(np.abs(signal).max()) * np.pi / (FADE + 1)


def assert_played_as_generated(rig: Rig) -> None:
    """Each frame that the marks say was sent is in the output as it was generated, or shortened, but for the fades.

    All of it counts as played, and nothing else.
    """
    output = rig.output
    is_signal = np.zeros(len(output), bool)
    next_in, next_out = 0, 0
    for mark in rig.marks():
        index = rig.numbers.index(mark.frame)
        assert mark.captured_ns == captured_ns(mark.frame)
        assert index >= next_in
        assert mark.position >= next_out
        contiguous = index == next_in and (mark.position == next_out or next_in == 0)
        intact = 0 if contiguous else FADE
        expected = rig.to_be_sent(index)
        sent = output[mark.position : mark.position + len(expected)]
        np.testing.assert_array_equal(sent[intact:], expected[intact : len(sent)])
        is_signal[mark.position : mark.position + len(sent)] = True
        next_in, next_out = index + 1, mark.position + len(sent)
    assert np.count_nonzero(is_signal) == rig.account().played
    # What is left over is concealment: a fade of FADE samples where sound stopped, and then nothing at all.
    for start, stop in concealed_spans(is_signal):
        assert not output[start + (FADE if start else 0) : stop].any()


def concealed_spans(is_signal: "np.ndarray[Any, np.dtype[np.bool_]]") -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([True], is_signal, [True])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# Frames in time


@pytest.mark.parametrize("size", [1, 7, 120, 240, 479, 1_920, 2_000, 5_000])
def test_without_a_gap_the_output_is_the_input_after_a_constant_delay(size: int) -> None:
    frames = 3 if size == 1 else 12
    generated = speech_like(frames + 1)
    with a_rig(generated, queue_frames=100) as rig:
        silence = rig.block(size)
        assert not silence.any()
        rig.arrive(frames + 1)
        while rig.asked + size <= frames * FRAME:
            rig.block(size)
        np.testing.assert_array_equal(rig.output[size:], generated[: rig.asked - size])
        counts = rig.assert_exact()
        assert (counts.concealed, counts.gaps, counts.skipped) == (size, 0, 0)


def test_a_frame_at_a_time_in_step_with_the_device_is_bit_exact() -> None:
    generated = speech_like(20)
    with a_rig(generated) as rig:
        rig.block(480)
        for _ in range(20):
            rig.arrive()
            rig.blocks(FRAME, 480)
        np.testing.assert_array_equal(rig.output[480:], generated)
        assert rig.assert_exact().gaps == 0


def test_half_a_frame_is_not_begun() -> None:
    with a_rig(tone(2)) as rig:
        rig.writer.write(rig.generated[: FRAME - 1])
        assert not rig.block(480).any()
        assert rig.assert_exact().waiting_out == FRAME - 1


def test_the_first_frame_waits_for_the_prebuffer() -> None:
    with a_rig(tone(3, phase=1)) as rig:
        rig.successor(prebuffer_ns=10_000_000)
        rig.arrive(waited_ns=0)
        rig.blocks(240, 120)  # 10 ms
        assert not rig.output.any()
        assert rig.block(120).all()
        assert rig.assert_exact().gaps == 0


def test_the_first_frame_does_not_wait_where_a_second_is_there() -> None:
    with a_rig(tone(3, phase=1)) as rig:
        rig.successor(prebuffer_ns=10_000_000)
        rig.arrive(2, waited_ns=0)
        assert rig.block(120).all()


# Gaps


@pytest.mark.parametrize(
    "signal", [tone(12), tone(12, hz=97.0, level=1.0), speech_like(12)], ids=["tone", "low", "speech"]
)
@pytest.mark.parametrize("size", [1, 37, 120, 600, 1_920, 5_000])
def test_a_gap_fades_out_to_exact_zeros_and_fades_in_again(signal: Samples, size: int) -> None:
    with a_rig(signal) as rig:
        rig.arrive(2)
        blocks = -(-2 * FRAME // size)
        for _ in range(blocks):
            rig.block(size)
        rest = blocks * size - 2 * FRAME  # of the last block, already concealed
        while rest < 3 * FADE:
            rig.block(size)
            rest += size
        output = rig.output
        np.testing.assert_array_equal(output[: 2 * FRAME], signal[: 2 * FRAME])
        assert output[2 * FRAME : 2 * FRAME + FADE].any()
        assert not output[2 * FRAME + FADE :].any()
        rig.arrive(2)
        resumed = len(output)
        while rig.asked < resumed + 2 * FRAME:
            rig.block(size)
        again = rig.output[resumed : resumed + 2 * FRAME]
        np.testing.assert_array_equal(again[FADE:], signal[2 * FRAME + FADE : 4 * FRAME])
        assert abs(again[0]) <= abs(signal[2 * FRAME]) * 1e-4
        assert (np.abs(again[:FADE]) <= np.abs(signal[2 * FRAME : 2 * FRAME + FADE])).all()
        assert largest_step(rig.output) <= step_allowed(signal)
        counts = rig.assert_exact()
        assert counts.gaps == (2 if rig.asked > resumed + 2 * FRAME else 1)
        assert counts.concealed == rig.asked - 4 * FRAME


def test_frames_that_come_back_during_the_fade_blend_into_it() -> None:
    signal = tone(6)
    with a_rig(signal) as rig:
        rig.arrive(2)
        rig.blocks(2 * FRAME)
        rig.block(60)  # a quarter of the fade
        rig.arrive(2)
        rig.blocks(2 * FRAME)
        assert largest_step(rig.output) <= step_allowed(signal)
        assert_played_as_generated(rig)
        rig.assert_exact()


def test_the_end_of_the_stream_is_not_a_gap() -> None:
    signal = tone(3)
    with a_rig(signal) as rig:
        rig.arrive(3)
        rig.writer.end()
        rig.blocks(3 * FRAME, 480)
        assert rig.player.ended
        rig.blocks(FRAME, 480)
        counts = rig.assert_exact()
        assert (counts.gaps, counts.played, counts.waiting_out) == (0, 3 * FRAME, 0)
        assert largest_step(rig.output) <= step_allowed(signal)
        assert not rig.output[3 * FRAME + FADE :].any()


def test_leave_fades_out_and_takes_no_more() -> None:
    signal = tone(6)
    with a_rig(signal, queue_frames=4) as rig:
        rig.arrive(4)
        rig.blocks(FRAME, 120)
        assert not rig.player.silent
        rig.player.leave()
        rig.block(120)
        assert not rig.player.silent
        rig.block(120)
        assert rig.player.silent
        rig.blocks(FRAME, 120)
        assert largest_step(rig.output) <= step_allowed(signal)
        assert not rig.output[FRAME + FADE :].any()
        counts = rig.assert_exact()
        assert (counts.gaps, counts.played, counts.waiting_out) == (0, FRAME, 3 * FRAME)


def test_leaving_before_the_first_frame_is_silent_at_once() -> None:
    with a_rig(tone(2)) as rig:
        rig.player.leave()
        rig.arrive()
        assert not rig.block(480).any()
        assert rig.player.silent
        rig.assert_exact()


def test_no_buffer_is_ever_repeated() -> None:
    generated = speech_like(30, seed=5)
    with a_rig(generated) as rig:
        for arrivals in (1, 0, 2, 0, 0, 1, 1, 5, 0, 1, 0, 3, 1, 1, 1):
            rig.arrive(arrivals)
            rig.blocks(FRAME, 120)
        numbers = [mark.frame for mark in rig.marks()]
        assert numbers == sorted(set(numbers))
        pieces = [piece.tobytes() for piece in np.lib.stride_tricks.sliding_window_view(rig.output, 32) if piece.any()]
        assert len(pieces) == len(set(pieces))


# Too many frames


def test_a_queue_that_is_too_long_is_left_for_the_newest_two_frames_and_counted() -> None:
    signal = tone(12)
    with a_rig(signal, queue_frames=3) as rig:
        rig.arrive()
        rig.blocks(FRAME // 2, 120)
        rig.arrive(6)
        rig.blocks(FRAME // 2 + 2 * FRAME, 120)
        assert [mark.frame for mark in rig.marks()] == [0, 5, 6]
        counts = rig.assert_exact()
        assert (counts.played, counts.skipped, counts.waiting_out) == (3 * FRAME, 4 * FRAME, 0)
        assert (counts.gaps, counts.concealed) == (0, 0)
        np.testing.assert_array_equal(rig.output[FRAME + FADE :], signal[5 * FRAME + FADE : 7 * FRAME])
        assert largest_step(rig.output) <= step_allowed(signal)


def test_a_queue_that_is_just_long_enough_is_played() -> None:
    with a_rig(tone(8), queue_frames=3) as rig:
        rig.arrive(3)
        rig.blocks(3 * FRAME)
        assert rig.assert_exact().skipped == 0
        assert [mark.frame for mark in rig.marks()] == [0, 1, 2]


@pytest.mark.parametrize("size", [60, 120, 1_920])
def test_a_burst_after_a_gap_fades_in_from_silence(size: int) -> None:
    """As when the model was stalled for half a second and then answered everything at once."""
    signal = tone(14, phase=1.3)  # frames do not begin near zero
    with a_rig(signal, queue_frames=3) as rig:
        rig.arrive(2)
        rig.blocks(4 * FRAME, size)
        rig.arrive(8)
        rig.blocks(FRAME, size)
        assert [mark.frame for mark in rig.marks()] == [0, 1, 8]
        assert largest_step(rig.output) <= step_allowed(signal)
        rig.assert_exact()


def test_a_burst_during_the_fade_out_leaves_no_step() -> None:
    signal = tone(14, phase=1.3)
    with a_rig(signal, queue_frames=3) as rig:
        rig.arrive(2)
        rig.blocks(2 * FRAME, 120)
        rig.block(60)
        rig.arrive(8)
        rig.blocks(FRAME, 120)
        assert largest_step(rig.output[1:]) <= step_allowed(signal)
        rig.assert_exact()


@pytest.mark.parametrize("burst", [10, 11, 14, 25])
def test_a_player_that_was_lapped_goes_on_with_the_newest_two_frames(burst: int) -> None:
    """The model talks on while the speaker's process is down for longer than the ring holds."""
    signal = tone(30)
    with a_rig(signal, queue_frames=3, frames=10) as rig:
        rig.arrive(burst)
        rig.blocks(FRAME, 480)
        counts = rig.assert_exact()
        assert [mark.frame for mark in rig.marks()] == [burst - 2]
        assert (counts.played, counts.skipped, counts.waiting_out) == (FRAME, (burst - 2) * FRAME, FRAME)
        rig.arrive()
        rig.blocks(2 * FRAME, 480)
        assert [mark.frame for mark in rig.marks()] == [burst - 2, burst - 1, burst]
        rig.assert_exact()


@pytest.mark.parametrize("prebuffer_ms", [0, 4, 40])
@pytest.mark.parametrize("gaps", [1, 5])
def test_latency_after_a_stall_returns_to_what_it_was(prebuffer_ms: int, gaps: int) -> None:
    """After each gap come at once the frames that were late, and then one frame a frame for three seconds."""
    with a_rig(speech_like(250)) as rig:
        rig.successor(prebuffer_ns=prebuffer_ms * NS_PER_MS)

        def in_time(frames: int) -> int:
            for _ in range(frames):
                late = rig.asked // FRAME + 1 - rig.writer.position // FRAME
                rig.arrive(late, waited_ns=0)
                rig.blocks(FRAME, 120)
            mark = rig.marks()[-1]
            return mark.start_ns - mark.captured_ns

        before_ns = in_time(5)
        for gap in range(gaps):
            while rig.account().gaps == gap:
                rig.blocks(FRAME, 120)
            in_time(5)
        after_ns = in_time(37)
        grown_ns = rig.player.prebuffer_ns - prebuffer_ms * NS_PER_MS
        assert grown_ns == 0 if gaps == 1 else grown_ns <= FRAME_NS
        assert after_ns <= before_ns + grown_ns + 10 * NS_PER_MS
        assert rig.assert_exact().gaps == gaps


STEP_NS: Final = 25 * NS_PER_MS
"""What the engine takes for a frame."""

BLOCK: Final = 120
BLOCK_NS: Final = BLOCK * NS_PER_S // SAMPLE_RATE


class Model:
    """An engine in front of a rig, which is held up as a test says and catches up as fast as it can."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.busy_until_ns = BEGAN_NS
        self.waits_ns: list[int] = []
        """Of each frame so far, from when it was in the ring until its first sample was sent."""
        self._taken = 0
        self._pending: list[int] = []
        self._marks = 0
        self._underrun = False

    def run(self, frames: int, late_ns: Callable[[int], int] = lambda _: 0) -> None:
        """So many frames of the microphone, of which the nth is held up by `late_ns(n)` beyond its step."""
        rig = self.rig
        for number in range(frames):
            complete_ns = BEGAN_NS + self._taken * FRAME_NS
            self._taken += 1
            self.busy_until_ns = max(complete_ns, self.busy_until_ns) + STEP_NS + late_ns(number)
            self._pending.append(self.busy_until_ns)
            while rig.now_ns() < complete_ns + FRAME_NS:
                while self._pending and self._pending[0] <= rig.now_ns():
                    rig.arrive(waited_ns=rig.now_ns() - self._pending.pop(0))
                rig.block(BLOCK, xrun=self._underrun)
                self._underrun = False
                self._look()

    def underrun(self, stopped_ns: int) -> None:
        """The device takes nothing for so long, and says so with the next block."""
        self.rig.stopped_ns += stopped_ns
        self._underrun = True

    def stall(self, stall_ns: int) -> None:
        """One frame is held up by so much; then come the ones after it."""
        self.run(10, lambda number: stall_ns if number == 0 else 0)

    def _look(self) -> None:
        heard = self.rig.heard
        while (mark := heard.mark(self._marks)) is not None:
            self._marks += 1
            self.waits_ns.append(mark.start_ns - mark.end_ns)

    def wait_ns(self) -> int:
        """The least of the last twelve frames."""
        return min(self.waits_ns[-12:])


@pytest.mark.parametrize("stalls_ms", [[60], [100, 150], [60, 100, 150, 200], [200, 200, 200, 200, 200]])
def test_latency_after_several_gaps_is_back_in_three_seconds(stalls_ms: list[int]) -> None:
    """As for the model: a prebuffer of 40 ms, and frames that are caught up with at 25 ms a step."""
    with a_rig(speech_like(620)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        model = Model(rig)
        model.run(30)
        before_ns = model.wait_ns()
        assert rig.account().gaps == 0
        for stall_ms in stalls_ms:
            model.stall(stall_ms * NS_PER_MS)
        gaps = rig.account().gaps
        assert gaps >= 1
        model.run(37)
        assert model.wait_ns() <= before_ns + 10 * NS_PER_MS + BLOCK_NS
        assert rig.player.prebuffer_ns == 40 * NS_PER_MS
        assert rig.assert_exact().gaps == gaps  # it was not cut too short


def test_a_player_that_has_recovered_is_as_good_as_new() -> None:
    """Nothing more is cut, however long frames wait, and the next gap is as the first was."""
    with a_rig(speech_like(1_400)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        model = Model(rig)
        model.run(30)
        for recovery in range(2):
            model.stall(200 * NS_PER_MS)
            assert rig.player._disturbed
            model.run(60)
            assert rig.player.prebuffer_ns == 40 * NS_PER_MS
            assert not rig.player._disturbed
            assert rig.account().gaps == recovery + 1
        skipped, waited_ns = rig.account().skipped, model.wait_ns()
        # Frames come earlier, and wait for longer than after any gap: that is no surplus of a gap's.
        model.run(160, lambda _: -20 * NS_PER_MS)
        assert model.wait_ns() > waited_ns + 15 * NS_PER_MS
        assert rig.assert_exact().skipped == skipped


def test_an_underrun_of_the_device_is_recovered_from_too() -> None:
    """The device took no samples for a while, and said so: every frame after it waits for longer."""
    with a_rig(speech_like(620)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        model = Model(rig)
        model.run(30)
        before_ns = model.wait_ns()
        model.underrun(60 * NS_PER_MS)
        model.run(5)
        assert model.waits_ns[-1] >= before_ns + 55 * NS_PER_MS
        model.run(495)
        assert rig.assert_exact().gaps == 0
        assert model.wait_ns() <= before_ns + 10 * NS_PER_MS + BLOCK_NS
        assert not rig.player._disturbed


@pytest.mark.parametrize("prebuffer_ms", [4, 20, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_jittery_stream_is_not_cut_into_new_gaps(prebuffer_ms: int, seed: int) -> None:
    """What frames of late had to spare is not cut off where others, now and then, need it."""
    jitter = np.random.default_rng(seed)
    with a_rig(speech_like(770)) as rig:
        rig.successor(prebuffer_ns=prebuffer_ms * NS_PER_MS)
        model = Model(rig)
        model.run(750, lambda _: int(jitter.integers(0, 30 * NS_PER_MS)))
        # As many as the prebuffer takes, doubled each time, to grow to what the jitter asks for, and a few.
        assert rig.assert_exact().gaps <= 6
        first_half = 375
        assert max(model.waits_ns[first_half:]) <= (prebuffer_ms + 80) * NS_PER_MS


def test_a_stall_in_a_jittery_stream_is_recovered_from() -> None:
    jitter = np.random.default_rng(5)

    def late_ns(_: int) -> int:
        return int(jitter.integers(0, 30 * NS_PER_MS))

    with a_rig(speech_like(1_400)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        model = Model(rig)
        model.run(30, late_ns)
        for _ in range(3):
            model.stall(200 * NS_PER_MS)
        gaps = rig.account().gaps
        model.run(750, late_ns)
        assert rig.assert_exact().gaps <= gaps + 2
        assert min(model.waits_ns[-150:]) <= (40 + 10) * NS_PER_MS + BLOCK_NS


@pytest.mark.parametrize(
    ("block", "burst"),
    [(120, 1), (480, 1), (640, 1), (1_920, 1), (120, 2), (120, 3), (120, 4), (120, 5), (120, 7), (240, 2), (441, 1)],
)
@pytest.mark.parametrize("phase", [0, 7, 40, 110, 400, 1_900])
def test_making_up_for_a_gap_is_no_cause_of_the_next(block: int, burst: int, phase: int) -> None:
    """Wherever in a block frames come: one must be there when the block is asked for in which it begins.

    Some devices ask for several blocks at once.
    """
    due = [(10 + index) * FRAME + phase for index in range(190)]
    with a_rig(SPOKEN, queue_frames=8) as rig:
        while rig.asked < 190 * FRAME:
            there = [at for at in due if at <= rig.asked and not 40 * FRAME <= rig.asked < 43 * FRAME]
            for at in there[len(rig.numbers) :]:
                rig.arrive(waited_ns=(rig.asked - at) * NS_PER_S // SAMPLE_RATE)
            rig.burst(block, burst)
        waited = [(mark.start_ns - BEGAN_NS) * SAMPLE_RATE // NS_PER_S - due[mark.frame] for mark in rig.marks()]
        assert max(waited[-12:]) <= burst * block + stretch.LEAST
        assert rig.assert_exact().gaps == 1
        assert_played_as_generated(rig)


def test_a_healthy_stream_is_never_cut() -> None:
    """Whatever its frames wait for: there was no gap that it could have come from."""
    generated = speech_like(60)
    with a_rig(generated) as rig:
        rig.arrive(2)
        for _ in range(58):
            rig.arrive(waited_ns=0)
            rig.blocks(FRAME, 480)
        np.testing.assert_array_equal(rig.output, generated[: rig.asked])
        assert rig.assert_exact().skipped == 0


@pytest.mark.parametrize("late_ms", [20, 60, 70])
def test_a_first_frame_that_was_late_is_made_up_for(late_ms: int) -> None:
    """All others would wait for as long, for the whole of the run."""
    late = late_ms * SAMPLE_RATE // 1_000
    with a_rig(SPOKEN) as rig:
        rig.blocks(late, BLOCK)
        rig.arrive(waited_ns=0)
        rig.blocks(FRAME - late, BLOCK)
        for _ in range(60):
            rig.arrive(waited_ns=0)
            rig.blocks(FRAME, BLOCK)
        waited_ns = [mark.start_ns - mark.end_ns for mark in rig.marks()]
        assert waited_ns[1] == late_ms * NS_PER_MS
        assert max(waited_ns[-12:]) <= 10 * NS_PER_MS
        counts = rig.assert_exact()
        assert counts.gaps == 0
        assert counts.skipped == sum(joint.lag for joint in rig.joints.values())
        assert_played_as_generated(rig)


@pytest.mark.parametrize("signal", [tone(80, phase=1.3), speech_like(80)], ids=["tone", "speech"])
def test_a_cut_leaves_no_step(signal: Samples) -> None:
    """What a gap added to the latency is cut out of the stream."""
    with a_rig(signal, queue_frames=3) as rig:
        rig.arrive(waited_ns=0)
        rig.blocks(FRAME + 960, 120)
        rig.arrive(2, waited_ns=0)
        for _ in range(70):
            rig.blocks(FRAME, 120)
            rig.arrive(waited_ns=0)
        counts = rig.assert_exact()
        assert counts.skipped >= FADE
        assert counts.gaps == 1
        assert_played_as_generated(rig)
        assert largest_step(rig.output) <= step_allowed(signal)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 5), st.sampled_from([60, 120, 480]))
def test_no_joint_leaves_a_step(healthy: int, burst: int, size: int) -> None:
    """A gap, a run of frames in time and a burst, so that a cut and a skip come together or one after the other."""
    with a_rig(LONG_TONE, queue_frames=3) as rig:
        rig.arrive(waited_ns=0)
        rig.blocks(FRAME + 960, size)
        rig.arrive(2, waited_ns=0)
        for _ in range(healthy):
            rig.blocks(FRAME, size)
            rig.arrive(waited_ns=0)
        rig.arrive(burst, waited_ns=0)
        rig.blocks(8 * FRAME, size)
        rig.arrive(burst, waited_ns=0)
        rig.blocks(6 * FRAME, size)
        assert largest_step(rig.output) <= step_allowed(LONG_TONE)
        assert_played_as_generated(rig)
        rig.assert_exact()


LONG_TONE: Final = tone(50, phase=1.3)


# The prebuffer


def delayed(*delays_ms: float) -> Jitter:
    """After frames that took so long."""
    jitter = Jitter()
    for number, delay_ms in enumerate(delays_ms):
        began_ns = captured_ns(number)
        jitter.add(Mark(number * FRAME, number, began_ns, began_ns, began_ns + round(delay_ms * NS_PER_MS)))
    return jitter


@pytest.mark.parametrize(
    ("delays_ms", "spread_ms"),
    [
        ([130], 0),
        ([130] * 50, 0),
        ([130, 190, 130], 0),  # an accident
        ([130, 190, 130, 160, 130], 30),
        ([130, 190, 160, 130, 130], 0),  # held up behind one that was late
        ([130, 2_130, 330, 230, 130, 130, 530, 130], 0),  # stalls
        ([130, 210, 130, 210.1, 130, 200, 130], 70),
        ([190, 130, 140, 150], 10),
    ],
)
def test_the_jitter_is_how_much_later_than_the_earliest_frames_come(delays_ms: list[float], spread_ms: int) -> None:
    assert delayed(*delays_ms).spread_ns == spread_ms * NS_PER_MS


def test_jitter_is_forgotten_after_24_seconds() -> None:
    wild = [130, 190] * 4
    assert delayed(*wild, *[130] * 297).spread_ns == 60 * NS_PER_MS
    assert delayed(*wild, *[130] * 299).spread_ns == 0


def test_the_prebuffer_follows_the_jitter() -> None:
    jitter = np.random.default_rng(2)
    with a_rig(speech_like(1_200)) as rig:
        rig.successor(prebuffer_ns=4 * NS_PER_MS)
        model = Model(rig)
        model.run(30)
        assert rig.player.prebuffer_ns == 4 * NS_PER_MS
        model.run(300, lambda _: int(jitter.integers(0, 40 * NS_PER_MS)))
        assert 35 * NS_PER_MS <= rig.player.prebuffer_ns <= 45 * NS_PER_MS
        gaps = rig.account().gaps
        model.run(200, lambda _: int(jitter.integers(0, 40 * NS_PER_MS)))
        assert rig.account().gaps <= gaps + 1
        model.run(340)
        assert rig.player.prebuffer_ns == 4 * NS_PER_MS
        assert model.wait_ns() <= (4 + 10) * NS_PER_MS


def test_a_frame_that_is_late_as_it_is_waits_for_no_prebuffer() -> None:
    """After a stall: what comes next is no later than that, and the silence is long enough."""
    with a_rig(tone(12, phase=1)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        model = Model(rig)
        model.run(5)
        model.run(1, lambda _: 500 * NS_PER_MS)
        silent = rig.asked
        model.run(7)
        returned = int(np.flatnonzero(rig.output[silent:])[0])
        assert rig.marks()[5].position == silent + returned
        assert model.waits_ns[5] < BLOCK_NS


# Stalls


class Stalled:
    """An engine of 50 ms a frame that stands still for a while, and then sheds its backlog and catches up."""

    LIMIT: Final = 8

    def __init__(self, rig: Rig, stall_ns: int, at_ns: int, kept: int, step_ns: int = 50 * NS_PER_MS) -> None:
        self.step_ns = step_ns
        self.rig, self.kept = rig, kept
        self.began_ns, self.over_ns = BEGAN_NS + at_ns, BEGAN_NS + at_ns + stall_ns
        self.marks: list[Mark] = []
        self._taken = 0
        self._backlog: deque[int] = deque()
        self._ready_ns: int | None = None

    def run(self, until_ns: int) -> None:
        rig = self.rig
        while rig.now_ns() < until_ns:
            while captured_ns(self._taken + 1) <= rig.now_ns():
                self._backlog.append(self._taken)
                self._taken += 1
            if not self.began_ns <= rig.now_ns() < self.over_ns:
                self._work(rig.now_ns())
            elif self._ready_ns is not None:
                self._ready_ns += BLOCK_NS
            rig.block(BLOCK)
            while (mark := rig.heard.mark(len(self.marks))) is not None:
                self.marks.append(mark)

    def _work(self, now_ns: int) -> None:
        if self._ready_ns is not None and now_ns >= self._ready_ns:
            self.rig.arrive(waited_ns=0)
            self._ready_ns = None
        if self._ready_ns is None:
            if len(self._backlog) > self.LIMIT:
                self.rig.passed_over += len(self._backlog) - self.kept
                self._backlog = deque(list(self._backlog)[-self.kept :])
            if self._backlog:
                self._backlog.popleft()
                self._ready_ns = now_ns + self.step_ns

    def latency_ns(self, from_ns: int, until_ns: int) -> list[int]:
        """Of the frames that were sent between these two."""
        return [mark.start_ns - mark.captured_ns for mark in self.marks if from_ns <= mark.start_ns < until_ns]


SPEECH_FILE: Final = Path(__file__).parents[1] / "pipeline" / "assets" / "speech.flac"

SPOKEN: Final[Samples] = soundfile.read(SPEECH_FILE, dtype="float32")[0][: 190 * FRAME]

STALLED: Final = {"tone": tone(190), "noise": speech_like(190), "speech": SPOKEN}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(STALLED)),
    st.sampled_from([100, 500, 2_000, 8_000]),
    st.integers(1_000, 3_000),
    st.integers(1, 3),
)
@example("tone", 2_000, 1_503, 3)
@example("noise", 2_000, 1_530, 3)
@example("speech", 2_000, 1_560, 3)
@example("speech", 500, 1_000, 3)
def test_latency_is_back_three_seconds_after_a_stall(signal: str, stall_ms: int, at_ms: int, kept: int) -> None:
    """Within 10 ms of what it was, without a click, and with every sample accounted for."""
    with a_rig(STALLED[signal]) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        engine = Stalled(rig, stall_ms * NS_PER_MS, at_ms * NS_PER_MS, kept)
        engine.run(engine.over_ns + 6 * NS_PER_S)
        before_ns = max(engine.latency_ns(0, engine.began_ns))
        after_ns = engine.latency_ns(engine.over_ns + 3 * NS_PER_S, engine.over_ns + 6 * NS_PER_S)
        assert len(after_ns) > 30
        assert abs(max(after_ns) - before_ns) <= 10 * NS_PER_MS
        assert abs(min(after_ns) - before_ns) <= 10 * NS_PER_MS
        counts = rig.assert_exact()
        assert counts.gaps == 1
        # Silence until the first frame was filled, stepped and had waited for the prebuffer; and then the stall.
        assert counts.concealed <= (80 + 50 + 40 + stall_ms) * SAMPLE_RATE // 1_000 + BLOCK
        assert_played_as_generated(rig)
        assert largest_step(rig.output) <= step_allowed(STALLED[signal])
        assert not rig.player._disturbed


def test_up_to_three_frames_too_many_are_played_faster_and_none_is_dropped() -> None:
    with a_rig(SPOKEN) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        engine = Stalled(rig, 2_000 * NS_PER_MS, 1_000 * NS_PER_MS, kept=3)
        engine.run(engine.over_ns + 4 * NS_PER_S)
        assert [mark.frame for mark in engine.marks] == rig.numbers[: len(engine.marks)]
        assert len(rig.joints) >= 10
        assert rig.assert_exact().skipped == sum(joint.lag for joint in rig.joints.values()) > 2 * FRAME


def test_overload_that_lasts_does_not_add_to_the_latency() -> None:
    with a_rig(speech_like(300)) as rig:
        rig.successor(prebuffer_ns=40 * NS_PER_MS)
        engine = Stalled(rig, 0, 0, kept=3, step_ns=100 * NS_PER_MS)
        engine.run(BEGAN_NS + 24 * NS_PER_S)
        first, second = (engine.latency_ns(BEGAN_NS + at * NS_PER_S, BEGAN_NS + (at + 8) * NS_PER_S) for at in (8, 16))
        assert abs(max(second) - max(first)) <= FRAME_NS
        rig.assert_exact()
        assert largest_step(rig.output) <= step_allowed(rig.generated)


# Marks, anchor, counters


def test_heard_holds_what_was_sent() -> None:
    with a_rig(speech_like(12)) as rig:
        for size, arrivals in ((480, 2), (1_000, 0), (3_000, 1), (77, 6), (2_000, 0), (1, 1), (5_000, 0)):
            rig.arrive(arrivals)
            rig.block(size)
        np.testing.assert_array_equal(rig.heard_samples(), rig.output)
        assert not np.isnan(rig.output).any()


def test_marks_in_heard_say_which_frame_was_sent_and_when() -> None:
    with a_rig(tone(6)) as rig:
        rig.block(700)
        for number in range(2):
            position = rig.writer.position
            rig.writer.mark(position, 40 + number, 1_000 + number, start_ns=2_000 + number, end_ns=3_000 + number)
            rig.writer.write(rig.generated[position : position + FRAME])
        rig.block(1_000)
        rig.block(5_000)
        first, second = rig.marks()
        assert first == Mark(700, 40, 1_000, BEGAN_NS + 700 * NS_PER_S // SAMPLE_RATE, 3_000)
        began_ns = BEGAN_NS + 1_700 * NS_PER_S // SAMPLE_RATE  # of the block in which the second frame begins
        assert second == Mark(700 + FRAME, 41, 1_001, began_ns + (FRAME - 1_000) * NS_PER_S // SAMPLE_RATE, 3_001)


def test_each_block_dates_heard() -> None:
    with a_rig(tone(2)) as rig:
        rig.block(480)
        assert rig.heard.anchor == ring.Anchor(0, BEGAN_NS)
        rig.block(100)
        assert rig.heard.anchor == ring.Anchor(480, BEGAN_NS + 480 * NS_PER_S // SAMPLE_RATE)


def test_xruns_of_the_device_are_counted() -> None:
    with a_rig(tone(2)) as rig:
        for xrun in (True, False, True):
            rig.block(120, xrun=xrun)
        assert rig.heard.ledger().xruns == 2
        assert rig.assert_exact().gaps == 0


def test_the_last_sound_is_dated() -> None:
    with a_rig(tone(2)) as rig:
        rig.arrive()
        rig.block(2_000)
        assert rig.player.last_sound_ns == BEGAN_NS + FRAME * NS_PER_S // SAMPLE_RATE
        rig.block(2_000)
        assert rig.player.last_sound_ns == BEGAN_NS + FRAME * NS_PER_S // SAMPLE_RATE


# Any schedule

Schedule = list[tuple[int, int]]
"""Frames that arrive, and the size of the block that is asked for then."""

schedules = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5_000)), max_size=20)


@settings(max_examples=80, deadline=None)
@given(schedules, st.integers(2, 6))
@example([(1, 240), (0, 2_000), (6, 100), (0, 100)], 2)
@example([(6, 5_000), (6, 1), (6, 1), (6, 5_000)], 3)
def test_any_schedule_is_accounted_for_exactly(schedule: Schedule, queue_frames: int) -> None:
    generated = SPEECH[: (1 + sum(frames for frames, _ in schedule)) * FRAME]
    with a_rig(generated, queue_frames) as rig:
        for frames, size in schedule:
            rig.arrive(frames)
            rig.block(size)
            rig.assert_exact()
        if schedule:
            np.testing.assert_array_equal(rig.heard_samples(), rig.output)
            assert_played_as_generated(rig)


SPEECH: Final = speech_like(130, seed=9)


# A successor


class _Killed(BaseException):
    """Stands for kill -9: nothing after it is carried out."""


@contextlib.contextmanager
def killed_at(line: int) -> Iterator[None]:
    """Kill what runs within, before the `line`th line of the player's or of the ring's code that it comes to."""
    files = {playback.__file__, ring.__file__, stretch.__file__}
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise _Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


SCENES: Final = ["copy", "gap", "boundary", "skip", "return", "search", "joint"]


def prepare(rig: Rig, scene: str) -> None:
    """Bring a player to the block in which it is to be killed."""
    rig.arrive(2)
    rig.blocks(FRAME, 960)
    match scene:
        case "gap":
            rig.blocks(FRAME, 480)
        case "boundary":
            rig.arrive()
            rig.blocks(FRAME - 480, 480)
        case "skip":
            rig.blocks(FRAME - 480, 480)
            rig.arrive(6)
        case "return":
            rig.blocks(FRAME + 480, 480)
            rig.arrive()
        case "search" | "joint":
            rig.player._misses = 9  # whatever there is, is alike enough
            rig.blocks(2 * FRAME, 480)
            rig.arrive(3)
            rig.blocks(2 * FRAME - 480, 480)
            rig.arrive()
            if scene == "joint":
                rig.block(540)
                assert rig.player._source.position < rig.player._joint
                while rig.player._source.position < rig.player._joint - 480:
                    rig.block(60)


def kills(scene: str) -> Iterator[tuple[Rig, int]]:
    """A rig whose player has just been killed in the middle of a block: for each line at which it can be."""
    for line in itertools.count():
        with a_rig(SPEECH, frames=20) as rig, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "_RETRIES", 5)  # no one is there who would end a change that was begun
            prepare(rig, scene)
            killed = False
            out = np.zeros(960, np.float32)
            try:
                with killed_at(line):
                    rig.player.fill(out, rig.now_ns(), xrun=False)
            except _Killed:
                killed = True
            rig.asked = rig.heard.position
            yield rig, line
            if not killed:
                assert line > 30
                return


@pytest.mark.parametrize("scene", SCENES)
def test_accounting_is_exact_with_a_successor_wherever_the_player_was_killed(scene: str) -> None:
    for rig, line in kills(scene):
        rig.successor()
        assert rig.account().discrepancies() == [], f"killed at {line}"
        rig.assert_exact()
        for arrivals in (0, 1, 2):
            rig.arrive(arrivals)
            rig.blocks(FRAME, 960)
            rig.assert_exact()


@pytest.mark.parametrize("scene", SCENES)
def test_accounting_is_exact_without_a_successor_wherever_the_player_was_killed(scene: str) -> None:
    """A run may end while its playback stage is down; its last line must be right all the same."""
    for rig, line in kills(scene):
        counts = rig.account()
        assert counts.discrepancies() == [], f"killed at {line}"
        assert min(counts.waiting_out, counts.concealed) >= 0


def test_a_successor_fades_in() -> None:
    """The predecessor was killed within a frame; the device is silent until the successor has opened it."""
    signal = tone(8, phase=1.3)
    with a_rig(signal) as rig:
        rig.arrive(3)
        rig.blocks(FRAME // 2, 120)
        rig.sent.clear()
        rig.successor()
        rig.blocks(FRAME, 120)
        assert largest_step(np.concatenate(([np.float32(0)], rig.output))) <= step_allowed(signal)
        rig.assert_exact()


def test_a_successor_plays_the_rest_of_the_last_frame_and_ends() -> None:
    with a_rig(tone(3)) as rig:
        rig.arrive(3)
        rig.writer.end()
        rig.blocks(2 * FRAME + 960, 480)
        rig.successor()
        rig.blocks(2 * FRAME, 480)
        assert rig.player.ended
        assert rig.assert_exact().waiting_out == 0


def test_a_successor_goes_on_where_the_predecessor_was() -> None:
    generated = speech_like(8)
    with a_rig(generated) as rig:
        rig.arrive(3)
        rig.blocks(2 * FRAME, 480)
        rig.successor()
        rig.blocks(FRAME, 480)
        np.testing.assert_array_equal(rig.output[2 * FRAME + FADE :], generated[2 * FRAME + FADE : 3 * FRAME])
        assert [mark.frame for mark in rig.marks()][-1] == 2
        assert rig.heard.generation == 2
        assert rig.assert_exact().gaps == 0


# What commands ask for


def test_the_volume_multiplies_what_is_sent_and_changes_within_a_block() -> None:
    generated = tone(20)
    with a_rig(generated, frames=30) as rig:
        rig.arrive(2)
        rig.block(FRAME)
        rig.player.volume = 0.25
        rig.arrive()
        changing = rig.block(FRAME)
        rig.arrive()
        quiet = rig.block(FRAME)
        rig.player.volume = 1.0
        rig.arrive()
        rig.block(FRAME)
        rig.arrive()
        rig.block(FRAME)
        output = rig.output
        np.testing.assert_array_equal(output[:FRAME], generated[:FRAME])
        ramp = np.linspace(1, 0.25, FRAME, dtype=np.float32)
        np.testing.assert_array_equal(changing, generated[FRAME : 2 * FRAME] * ramp)
        np.testing.assert_array_equal(quiet, generated[2 * FRAME : 3 * FRAME] * np.float32(0.25))
        # At full volume again it is bit for bit what was generated.
        np.testing.assert_array_equal(output[4 * FRAME :], generated[4 * FRAME : 5 * FRAME])
        assert largest_step(output) <= step_allowed(generated)
        np.testing.assert_array_equal(rig.heard_samples(), output)
        assert rig.assert_exact().gaps == 0


def test_a_fade_at_low_volume_begins_where_the_sound_ended() -> None:
    generated = tone(3)
    with a_rig(generated) as rig:
        rig.player.volume = 0.1
        rig.arrive()
        rig.blocks(FRAME)
        rig.blocks(FRAME)
        rig.player.volume = 0.0
        rig.arrive()
        rig.blocks(2 * FRAME)
        assert largest_step(rig.output) <= step_allowed(generated)
        assert not rig.output[-FRAME:].any()
        rig.assert_exact()


def test_silence_that_is_meant_is_no_gap() -> None:
    generated = speech_like(12)
    with a_rig(generated) as rig:
        rig.player.begin_with(NS_PER_MS)
        rig.arrive(2)
        rig.blocks(FRAME)
        rig.writer.pause(True)
        rig.blocks(20 * FRAME)
        rig.writer.pause(False)
        rig.arrive(4, waited_ns=NS_PER_MS)
        rig.blocks(6 * FRAME)
        counts = rig.assert_exact()
        assert counts.gaps == 1  # the end of these four
        assert largest_step(rig.output) <= step_allowed(generated)
        assert_played_as_generated(rig)


def test_a_player_that_stays_after_all_fades_in_and_goes_on() -> None:
    generated = tone(12)
    with a_rig(generated) as rig:
        rig.arrive(2)
        rig.blocks(FRAME)
        rig.player.leave()
        rig.blocks(FRAME)
        assert rig.player.silent
        rig.arrive()
        rig.player.stay()
        rig.blocks(3 * FRAME)
        counts = rig.assert_exact()
        assert counts.gaps == 1  # only the one at the end, where no more frames were made
        assert counts.played + counts.skipped == 3 * FRAME
        assert largest_step(rig.output) <= step_allowed(generated)


def test_a_prebuffer_that_is_asked_for_holds_from_then_on() -> None:
    with a_rig(tone(12)) as rig:
        rig.player.begin_with(10 * NS_PER_MS)
        rig.arrive(1, waited_ns=9 * NS_PER_MS)
        assert not rig.block(24).any()
        rig.blocks(48, count=24)
        assert rig.account().played > 0
        rig.blocks(3 * FRAME)
        assert rig.player.prebuffer_ns == 10 * NS_PER_MS
