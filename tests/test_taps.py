"""pipeline.taps over real rings, with dates that the tests make up: hours pass in seconds."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.ring import Anchor, Ring, RingWriter, Samples
from pipeline.runtime import RunFolder
from pipeline.taps import (
    ABSENT_NS,
    CORRECT_FROM,
    GENTLY,
    LATE_NS,
    Block,
    Conversation,
    Dates,
    Tap,
    conversation,
    ns_of,
    samples_in,
    tap,
)
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import FRAME, FRAME_NS, SAMPLE_RATE
from tests import helpers
from tests.helpers import temporary_ring

runtime_dir = helpers.runtime_dir
folder = helpers.folder

CAPACITY = 100
BEGIN_NS = 5 * NS_PER_S


def noise(count: int, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def ramp(begin: int, count: int) -> Samples:
    """Samples that tell their position, exactly up to 2 ** 24 of them."""
    return np.arange(begin, begin + count, dtype=np.float32)


class Device:
    """Writes a ring as a device does, by a crystal that is `ppm` fast, from `begin_ns` on."""

    def __init__(self, ring: Ring, ppm: float = 0.0, begin_ns: int = BEGIN_NS, block: int = FRAME) -> None:
        self.writer = RingWriter(ring)
        self.ppm = ppm
        self.block = block
        self.open(begin_ns)

    def open(self, begin_ns: int) -> None:
        self.origin = Anchor(self.writer.position, begin_ns)

    def date_ns(self, position: int) -> int:
        return self.origin.time_ns + round(ns_of(position - self.origin.position) / (1 + self.ppm / 1e6))

    def write(self, samples: Samples) -> None:
        for at in range(0, len(samples), self.block):
            self.writer.anchor(self.writer.position, self.date_ns(self.writer.position))
            self.writer.write(samples[at : at + self.block])

    def until(self, time_ns: int) -> None:
        """Write ramps until the next sample would be of that time or later."""
        while self.date_ns(self.writer.position + self.block) <= time_ns:
            self.write(ramp(self.writer.position, self.block))


class Rig:
    """A conversation of two devices, and the time."""

    def __init__(self, microphone: Ring, speaker: Ring) -> None:
        self.rings = microphone, speaker
        self.now_ns = BEGIN_NS
        self.over = False
        self.blocks: list[Block] = []

    def converse(self, position: int | None = 0, block: int = FRAME) -> Conversation:
        self.conversation = Conversation(
            *self.rings, block, position, is_over=lambda: self.over, clock=lambda: self.now_ns
        )
        return self.conversation

    def take(self) -> int:
        """All that is there; returns how many blocks."""
        before = len(self.blocks)
        while (block := self.conversation.poll()) is not None:
            self.blocks.append(block)
        return len(self.blocks) - before

    def run(self, seconds: float, *devices: Device) -> None:
        """Let the time pass, a frame at a time."""
        for _ in range(round(seconds * NS_PER_S / FRAME_NS)):
            self.now_ns += FRAME_NS
            for device in devices:
                device.until(self.now_ns)
            self.take()

    @property
    def rows(self) -> Samples:
        return np.concatenate([block.samples for block in self.blocks])

    @property
    def left(self) -> Samples:
        return self.rows[:, 0]

    @property
    def right(self) -> Samples:
        return self.rows[:, 1]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_ring(CAPACITY) as microphone, temporary_ring(CAPACITY) as speaker:
        yield Rig(microphone, speaker)


@pytest.fixture
def ring() -> Iterator[Ring]:
    with temporary_ring(CAPACITY) as made:
        yield made


# One ring


def test_blocks_are_what_was_written_dated_by_the_anchors(ring: Ring) -> None:
    samples = noise(10 * FRAME)
    device = Device(ring, block=480)
    reader = Tap(ring, 1_000, 0, is_over=lambda: False)
    device.write(samples)
    blocks = []
    while (block := reader.poll()) is not None:
        blocks.append(block)
    np.testing.assert_array_equal(np.concatenate([block.samples for block in blocks]), samples[: len(blocks) * 1_000])
    assert [block.position for block in blocks] == [1_000 * index for index in range(19)]
    assert [block.time_ns for block in blocks] == [BEGIN_NS + ns_of(block.position) for block in blocks]
    assert not reader.ended


def test_a_tap_begins_now(ring: Ring) -> None:
    device = Device(ring)
    device.write(noise(3 * FRAME))
    reader = Tap(ring, FRAME, is_over=lambda: False)
    assert reader.poll() is None
    device.write(later := noise(FRAME, seed=1))
    block = reader.poll()
    assert block is not None
    assert block.position == 3 * FRAME
    np.testing.assert_array_equal(block.samples, later)


def test_what_was_overwritten_is_told_exactly(ring: Ring) -> None:
    device = Device(ring)
    reader = Tap(ring, FRAME, 0, is_over=lambda: False)
    device.write(ramp(0, (CAPACITY + 7) * FRAME))
    block = reader.poll()
    assert block is not None
    assert (block.lost, block.position, reader.lost) == (7 * FRAME, 7 * FRAME, 7 * FRAME)
    assert block.samples[0] == 7 * FRAME
    assert block.time_ns == BEGIN_NS + ns_of(7 * FRAME)
    following = reader.poll()
    assert following is not None
    assert following.lost == 0


def test_a_block_ends_where_the_device_was_opened_anew(ring: Ring) -> None:
    device = Device(ring, block=480)
    reader = Tap(ring, FRAME, 0, is_over=lambda: False)
    device.write(ramp(0, 480))
    assert reader.poll() is None
    device.open(again_ns := BEGIN_NS + 3 * NS_PER_S)
    device.write(ramp(480, 2 * FRAME))
    first, second = reader.poll(), reader.poll()
    assert first is not None
    assert second is not None
    assert (len(first.samples), first.time_ns) == (480, BEGIN_NS)
    assert (len(second.samples), second.time_ns) == (FRAME, again_ns)


def test_at_the_end_of_the_stream_there_is_the_rest(ring: Ring) -> None:
    device = Device(ring)
    device.write(ramp(0, FRAME + 7))
    device.writer.end()
    reader = Tap(ring, FRAME, 0, is_over=lambda: True, clock=iter(range(0, 100 * NS_PER_S, NS_PER_S)).__next__)
    assert [len(block.samples) for block in reader] == [FRAME, 7]
    assert reader.ended


def test_it_is_iterated_over_with_async_for_too(ring: Ring) -> None:
    device = Device(ring)
    reader = Tap(ring, FRAME, 0, is_over=lambda: False)

    async def read() -> list[int]:
        got = []
        async for block in reader:
            got.append(block.position)
            if len(got) == 3:
                reader.finish()
        return got

    async def write() -> None:
        for frame in range(3):
            await asyncio.sleep(0.01)
            device.write(ramp(frame * FRAME, FRAME))

    async def both() -> list[int]:
        return (await asyncio.gather(read(), write()))[0]

    assert asyncio.run(both()) == [0, FRAME, 2 * FRAME]


def test_it_sleeps_until_the_samples_should_be_there_and_then_longer_each_time(ring: Ring) -> None:
    device = Device(ring, block=480)
    reader = Tap(ring, FRAME, 0, is_over=lambda: False)
    device.write(ramp(0, 480))
    waits = []
    for _ in range(9):
        assert reader.poll() is None
        waits.append(reader.wait_s())
    assert waits[0] == pytest.approx(0.06)
    assert waits[1:] == sorted(waits[1:])
    assert 0.003 < waits[1] < waits[-1] <= 0.08


def test_a_ring_without_a_device_is_dated_by_its_frames(ring: Ring) -> None:
    writer = RingWriter(ring)
    reader = Tap(ring, FRAME, 0, is_over=lambda: False)
    for frame in range(2):
        writer.mark(frame * FRAME, frame, 0, 0, BEGIN_NS + frame * FRAME_NS)
        writer.write(ramp(frame * FRAME, FRAME))
    assert [block.time_ns for block in (reader.poll(), reader.poll()) if block] == [BEGIN_NS, BEGIN_NS + FRAME_NS]


def test_taps_of_a_run_end_with_it(folder: RunFolder) -> None:
    folder.lock()
    made = [Ring.create(folder.segment(name), 1.0) for name in ("capture", "heard")]
    begin_ns = now_ns()
    devices = [Device(ring, begin_ns=begin_ns) for ring in made]
    for device in devices:
        device.write(ramp(0, FRAME))
    with tap(folder, "heard", FRAME) as one, conversation(folder, FRAME, position=0) as both:
        for device in devices:
            device.write(ramp(FRAME, FRAME))
        first = one.poll()
        assert first is not None
        folder.release()
        assert list(one) == []
        np.testing.assert_array_equal(
            np.concatenate([block.samples for block in both]), np.stack([ramp(0, 2 * FRAME)] * 2, axis=1)
        )
    for ring in made:
        ring.close()


# Dates


def test_a_position_is_dated_by_the_anchor_of_its_time() -> None:
    dates = Dates()
    dates.see(0, None)
    dates.see(0, Anchor(0, BEGIN_NS))
    dates.see(960, Anchor(480, BEGIN_NS + ns_of(480) + 1_000))  # the crystal
    dates.see(2_000, Anchor(1_440, BEGIN_NS + NS_PER_S))  # opened anew
    assert [line.start for line in dates.lines] == [0, 960]
    line, until = dates.at(959)
    assert until == 960
    assert line.time_ns(480) == BEGIN_NS + ns_of(480) + 1_000
    line, until = dates.at(960)
    assert until is None
    assert line.time_ns(1_440) == BEGIN_NS + NS_PER_S
    line, after = dates.when(BEGIN_NS + NS_PER_S // 2)
    assert after is not None
    assert (line.start, after.start) == (0, 960)


# Two sides


def test_while_nothing_is_wrong_every_sample_is_as_it_was(rig: Rig) -> None:
    offset = 12_345_678  # ns: no whole number of samples
    microphone, speaker = Device(rig.rings[0]), Device(rig.rings[1], begin_ns=BEGIN_NS + offset, block=480)
    rig.converse()
    rig.run(8.0, microphone, speaker)
    assert len(rig.left) >= 97 * FRAME
    np.testing.assert_array_equal(rig.left, ramp(0, len(rig.left)))
    shift = samples_in(offset)
    assert not rig.right[:shift].any()
    np.testing.assert_array_equal(rig.right[shift:], ramp(0, len(rig.right) - shift))
    assert [block.position for block in rig.blocks] == [index * FRAME for index in range(len(rig.blocks))]
    assert [block.time_ns for block in rig.blocks] == [BEGIN_NS + index * FRAME_NS for index in range(len(rig.blocks))]
    assert rig.conversation.lost == 0


@pytest.mark.parametrize(("left_ppm", "right_ppm"), [(0, 1_000), (0, -1_000), (1_000, -1_000), (-300, 20)])
def test_two_crystals_stay_aligned_for_long(rig: Rig, left_ppm: float, right_ppm: float) -> None:
    microphone, speaker = Device(rig.rings[0], left_ppm), Device(rig.rings[1], right_ppm)
    rig.converse()
    rig.run(300.0, microphone, speaker)
    right = rig.right
    np.testing.assert_array_equal(rig.left, ramp(0, len(rig.left)))
    ratio = (1 + right_ppm / 1e6) / (1 + left_ppm / 1e6)
    expected = np.arange(len(right)) * ratio
    apart = np.abs(right - expected)[: -2 * FRAME]
    assert apart.max() < 2 * CORRECT_FROM
    # The samples count up: a step of 1 is an untouched pair, others are at least so far apart.
    changed = np.flatnonzero(np.diff(right) != 1)
    assert len(changed) > 0
    corrections = np.flatnonzero(np.diff(changed) > 3)
    assert np.diff(changed[corrections]).min(initial=GENTLY) > 0.9 * GENTLY
    steps = np.diff(right)
    assert steps.min() > 0.4
    assert steps.max() < 2.1


def test_one_side_opened_anew_is_silent_for_as_long_as_it_was_gone(rig: Rig) -> None:
    microphone, speaker = Device(rig.rings[0]), Device(rig.rings[1], block=480)
    rig.converse()
    rig.run(1.0, microphone, speaker)
    gone_at = speaker.writer.position
    rig.run(1.5, microphone)
    speaker.open(BEGIN_NS + 3 * NS_PER_S)
    rig.run(2.0, microphone, speaker)
    right = rig.right
    np.testing.assert_array_equal(rig.left, ramp(0, len(rig.left)))
    np.testing.assert_array_equal(right[:gone_at], ramp(0, gone_at))
    back = 3 * SAMPLE_RATE
    assert not right[gone_at:back].any()
    np.testing.assert_array_equal(right[back:], ramp(gone_at, len(right) - back))


def test_a_microphone_that_was_gone_leaves_silence_and_the_other_side_goes_on(rig: Rig) -> None:
    microphone, speaker = Device(rig.rings[0], block=480), Device(rig.rings[1])
    rig.converse()
    rig.run(0.5, microphone, speaker)
    gone_at = microphone.writer.position
    rig.run(4.0, speaker)
    assert len(rig.left) > SAMPLE_RATE  # nobody waits for it for ever
    microphone.open(back_ns := BEGIN_NS + 5 * NS_PER_S)
    rig.run(2.0, microphone, speaker)
    back = samples_in(back_ns - BEGIN_NS)
    np.testing.assert_array_equal(rig.left[:gone_at], ramp(0, gone_at))
    assert not rig.left[gone_at:back].any()
    np.testing.assert_array_equal(rig.left[back:], ramp(gone_at, len(rig.left) - back))
    np.testing.assert_array_equal(rig.right, ramp(0, len(rig.right)))
    assert rig.conversation.lost == 0


def test_lost_samples_become_silence_of_the_same_length(rig: Rig) -> None:
    microphone, speaker = Device(rig.rings[0]), Device(rig.rings[1])
    rig.converse()
    rig.run(1.0, microphone, speaker)
    before = len(rig.left)
    rig.now_ns += (CAPACITY + 30) * FRAME_NS  # the reader was held up
    for device in (microphone, speaker):
        device.until(rig.now_ns)
    rig.take()
    rig.run(1.0, microphone, speaker)
    lost = rig.conversation.lost // 2
    assert lost >= 30 * FRAME
    for side in (rig.left, rig.right):
        np.testing.assert_array_equal(side[:before], ramp(0, before))
        assert not side[before : before + lost].any()
        np.testing.assert_array_equal(side[before + lost :], ramp(before + lost, len(side) - before - lost))
    assert sum(block.lost for block in rig.blocks) == lost


def test_what_the_ring_still_holds_is_part_of_it(rig: Rig) -> None:
    microphone, speaker = Device(rig.rings[0]), Device(rig.rings[1])
    for device in (microphone, speaker):
        device.write(ramp(0, 50 * FRAME))
    rig.now_ns += 50 * FRAME_NS
    rig.converse(position=20 * FRAME + 100)
    rig.take()
    for side in (rig.left, rig.right):
        np.testing.assert_array_equal(side, ramp(20 * FRAME + 100, len(side)))
    assert len(rig.left) == 29 * FRAME
    rig.conversation.finish()
    rig.take()
    assert len(rig.left) == 30 * FRAME - 100
    assert rig.conversation.ended


def test_a_speaker_that_never_opened_is_silence_after_half_a_second(rig: Rig) -> None:
    microphone = Device(rig.rings[0])
    rig.converse()
    rig.run(2.0, microphone)
    assert len(rig.blocks) * FRAME_NS >= 2 * NS_PER_S - LATE_NS - 3 * FRAME_NS
    assert len(rig.blocks) * FRAME_NS <= 2 * NS_PER_S - LATE_NS + FRAME_NS
    assert not rig.right.any()


def test_after_the_microphone_has_ended_the_other_side_is_heard_out(rig: Rig) -> None:
    microphone, speaker = Device(rig.rings[0]), Device(rig.rings[1])
    rig.converse()
    rig.run(1.0, microphone, speaker)
    microphone.write(ramp(microphone.writer.position, 500))
    microphone.writer.end()
    ended = microphone.writer.position
    rig.run(1.0, speaker)
    np.testing.assert_array_equal(rig.left[:ended], ramp(0, ended))
    assert not rig.left[ended:].any()
    assert len(rig.left) >= 2 * SAMPLE_RATE - 3 * FRAME
    np.testing.assert_array_equal(rig.right, ramp(0, len(rig.right)))
    assert ABSENT_NS > NS_PER_S  # it was not waited for: it has ended
    rig.over = True
    rig.run(1.0)
    assert rig.conversation.ended
