"""procs.capture.Capture, driven by hand, block by block, over a real ring, bell and line to the supervisor."""

import select
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.audio import FADE, Samples
from pipeline.config import Config
from pipeline.control import Hub
from pipeline.errors import DeviceError, DeviceLostError
from pipeline.messages import Finished, Input, LogRecord, Mute, TimingRecord, Unmute, XrunRecord
from pipeline.ring import Anchor, Consumer, Mark, Ring, RingReader
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import FRAME, FRAME_NS, SAMPLE_RATE
from pipeline.worker import Context
from procs import devices
from procs.capture import Capture
from procs.devices import OnBlock, Unopened
from tests import helpers
from tests.helpers import largest_step, received, speech_like, tone, wait_until
from tests.runs import noise, write_wav

folder = helpers.folder
runtime_dir = helpers.runtime_dir

BEGAN_NS: Final = 7_000 * NS_PER_S + 1


@pytest.fixture
def stage(folder: RunFolder) -> Iterator[tuple[Context, Hub]]:
    with helpers.stage_context(folder, "capture") as context_and_hub:
        yield context_and_hub


class Microphone:
    """Hands the stage its blocks, as a device would, each dated by the sample it begins with."""

    def __init__(self, capture: Capture, began_ns: int = BEGAN_NS) -> None:
        self.capture = capture
        self.began_ns = began_ns
        self.given = 0

    def time_ns(self, sample: int) -> int:
        return self.began_ns + sample * NS_PER_S // SAMPLE_RATE

    def give(self, samples: Samples, *, xrun: bool = False) -> None:
        self.capture.on_block(samples.copy(), self.time_ns(self.given), xrun)
        self.given += len(samples)

    def give_in_blocks(self, samples: Samples, sizes: list[int]) -> None:
        start = 0
        for index in range(len(samples)):
            if start >= len(samples):
                return
            size = sizes[index % len(sizes)]
            self.give(samples[start : start + size])
            start += size


def content(ring: Ring) -> Samples:
    """Everything that was written, which must fit."""
    out = np.empty(ring.position, np.float32)
    assert RingReader(ring, position=0).read(out) == len(out)
    return out


def marks(ring: Ring) -> list[Mark]:
    return [mark for index in range(ring.mark_count) if (mark := ring.mark(index)) is not None]


@pytest.mark.parametrize("sizes", [[1], [7, 1_919], [120], [480], [1_920], [1_921, 3], [5_000, 1, 4_999]])
def test_blocks_of_any_size_make_the_same_ring(stage: tuple[Context, Hub], sizes: list[int]) -> None:
    context, _ = stage
    capture = Capture(context)
    samples = speech_like(4)[: 3 * FRAME + 100]
    before_ns = now_ns()
    microphone = Microphone(capture)
    microphone.give_in_blocks(samples, sizes)
    ring = context.rings["capture"]
    np.testing.assert_array_equal(content(ring), samples)
    assert [(mark.position, mark.frame) for mark in marks(ring)] == [(n * FRAME, n) for n in range(3)]
    for number, mark in enumerate(marks(ring)):
        # Within a block the time of a sample is counted on from the block's, which is in whole ns.
        assert abs(mark.captured_ns - microphone.time_ns(number * FRAME)) <= 1
        assert mark.start_ns == mark.captured_ns
        assert before_ns <= mark.end_ns <= now_ns()
    ledger = ring.ledger()
    assert (ledger.written, ledger.waiting, ledger.cleaned, ledger.xruns) == (len(samples), len(samples), 0, 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=12))
def test_any_sizes_make_the_same_ring(stage: tuple[Context, Hub], sizes: list[int]) -> None:
    context, _ = stage
    ring = context.rings["capture"]
    before, first = ring.position, ring.mark_count
    capture = Capture(context)
    # Each example goes on where the one before it was, as a restarted stage does.
    capture.on_block(np.zeros(-before % FRAME, np.float32), BEGAN_NS - 1, xrun=False)
    began = ring.position
    first = ring.mark_count
    samples = speech_like(-(-sum(sizes) // FRAME))[: sum(sizes)]
    microphone = Microphone(capture)
    microphone.give_in_blocks(samples, sizes)
    out = np.empty(len(samples), np.float32)
    assert RingReader(ring, position=began).read(out) == len(samples)
    np.testing.assert_array_equal(out, samples)
    assert ring.mark_count - first == len(samples) // FRAME
    for index in range(first, ring.mark_count):
        mark = ring.mark(index)
        assert mark is not None
        assert (mark.position, mark.frame) == (index * FRAME, index)
        assert abs(mark.captured_ns - microphone.time_ns((index - first) * FRAME)) <= 1


def test_captured_is_the_first_sample_of_the_frame_to_the_nanosecond(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)
    block = np.zeros(1_000, np.float32)
    capture.on_block(block, 5_000_000_000, xrun=False)
    capture.on_block(block, 6_000_000_000, xrun=False)  # the second frame begins at its sample 920
    capture.on_block(block, 7_000_000_000, xrun=False)
    capture.on_block(block, 8_000_000_000, xrun=False)
    first, second = marks(context.rings["capture"])
    assert first.captured_ns == 5_000_000_000
    assert second.captured_ns == 6_000_000_000 + 920 * NS_PER_S // SAMPLE_RATE


def test_each_block_dates_the_ring(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)
    ring = context.rings["capture"]
    assert ring.anchor is None
    capture.on_block(np.zeros(100, np.float32), 123, xrun=False)
    assert ring.anchor == Anchor(0, 123)
    capture.on_block(np.zeros(5_000, np.float32), 456, xrun=False)
    assert ring.anchor == Anchor(100, 456)


def test_the_bell_rings_for_each_frame_and_not_before(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)

    def rung() -> bool:
        return bool(select.select([context.bell], [], [], 0)[0])

    capture.on_block(np.zeros(FRAME - 1, np.float32), BEGAN_NS, xrun=False)
    assert not rung()
    capture.on_block(np.zeros(1, np.float32), BEGAN_NS, xrun=False)
    assert rung()
    context.bell.clear()
    capture.on_block(np.zeros(FRAME - 1, np.float32), BEGAN_NS, xrun=False)
    assert not rung()


def test_muted_it_writes_silence_and_goes_on_counting(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)
    samples = speech_like(3)
    microphone = Microphone(capture)
    microphone.give(samples[:FRAME])
    # Another block as long as the last may be on its way, from before: the frame that follows it is the first.
    assert capture.apply(Mute()) == 2
    microphone.give(samples[FRAME : 2 * FRAME])
    assert capture.apply(Mute()) == 3  # twice is as once
    assert capture.apply(Unmute()) == 3
    microphone.give(samples[2 * FRAME :])
    written = content(context.rings["capture"])
    np.testing.assert_array_equal(written[:FRAME], samples[:FRAME])
    assert not written[FRAME : 2 * FRAME].any()
    np.testing.assert_array_equal(written[2 * FRAME :], samples[2 * FRAME :])
    assert [mark.frame for mark in marks(context.rings["capture"])] == [0, 1, 2]


def test_muted_before_the_first_block_nothing_is_heard(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)
    assert capture.apply(Mute()) == 0
    Microphone(capture).give(speech_like(2))
    assert not content(context.rings["capture"]).any()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2 * FRAME), st.integers(1, 12), st.booleans())
def test_from_the_acknowledged_frame_on_all_is_as_it_was_set(
    stage: tuple[Context, Hub], size: int, before: int, under_way: bool
) -> None:
    """Also where the block that was under way had been let through before the setting changed."""
    context, _ = stage
    ring = context.rings["capture"]
    capture = Capture(context)
    block = np.full(size, 0.25, np.float32)
    capture.on_block(np.zeros(-ring.position % FRAME, np.float32), BEGAN_NS, xrun=False)
    for _ in range(before):
        capture.on_block(block.copy(), BEGAN_NS, xrun=False)
    position = ring.position
    first = capture.apply(Mute())
    assert first == -(-(position + size) // FRAME)
    if under_way:
        capture._muted = False
        capture.on_block(block.copy(), BEGAN_NS, xrun=False)
        capture._muted = True
    reader = RingReader(ring, first * FRAME)
    while ring.position < (first + 2) * FRAME:
        capture.on_block(block.copy(), BEGAN_NS, xrun=False)
    heard = np.empty(2 * FRAME, np.float32)
    assert reader.read(heard) == 2 * FRAME
    assert not heard.any()


@pytest.mark.parametrize("muted", [False, True])
def test_what_is_not_fit_for_the_codec_is_replaced_and_counted(stage: tuple[Context, Hub], muted: bool) -> None:
    context, _ = stage
    capture = Capture(context)
    if muted:
        capture.apply(Mute())
    samples = np.full(100, 0.5, np.float32)
    samples[:6] = [np.nan, np.inf, -np.inf, 1e30, -2.0, 1.0]
    capture.on_block(samples.copy(), BEGAN_NS, xrun=False)
    capture.on_block(samples.copy(), BEGAN_NS, xrun=False)
    ring = context.rings["capture"]
    written = content(ring)
    assert np.isfinite(written).all()
    assert np.abs(written).max() <= 1
    np.testing.assert_array_equal(written[6:100], 0.0 if muted else samples[6:])
    assert ring.ledger().cleaned == 10


def test_overruns_of_the_device_are_counted_and_reported_once(stage: tuple[Context, Hub]) -> None:
    context, hub = stage
    capture = Capture(context)
    block = np.zeros(10, np.float32)
    for xrun in (True, True, False):
        capture.on_block(block, BEGAN_NS, xrun)
    capture.work()
    capture.work()
    capture.on_block(block, BEGAN_NS, xrun=True)
    capture.work()
    assert context.rings["capture"].ledger().xruns == 3
    reports = received(hub, 2)
    assert [(r.stage, r.kind, r.count) for r in reports if isinstance(r, XrunRecord)] == [
        ("capture", "xrun", 2),
        ("capture", "xrun", 1),
    ]


def test_each_frame_is_reported_once(stage: tuple[Context, Hub]) -> None:
    context, hub = stage
    capture = Capture(context)
    microphone = Microphone(capture)
    microphone.give(np.zeros(2 * FRAME + 5, np.float32))
    capture.work()
    capture.work()
    microphone.give(np.zeros(FRAME, np.float32))
    capture.work()
    reports = received(hub, 3)
    assert [r.frame for r in reports if isinstance(r, TimingRecord)] == [0, 1, 2]
    for number, report in enumerate(reports):
        assert isinstance(report, TimingRecord)
        assert report.stage == "capture"
        assert abs(report.start_ns - microphone.time_ns(number * FRAME)) <= 1


# The end


@pytest.mark.parametrize("written", [0, 1, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME])
def test_finish_fills_the_last_frame_with_silence_and_ends_the_stream(stage: tuple[Context, Hub], written: int) -> None:
    context, hub = stage
    capture = Capture(context)
    ring = context.rings["capture"]
    samples = speech_like(2)[:written]
    if written:
        Microphone(capture).give(samples)
    capture.finish()
    whole = -(-written // FRAME) * FRAME
    assert [ring.position, ring.end, ring.mark_count] == [whole, whole, whole // FRAME]
    np.testing.assert_array_equal(content(ring)[:written], samples)
    assert not content(ring)[written:].any()
    assert select.select([context.bell], [], [], 0)[0]
    capture.finish()
    assert received(hub, 1) == [Finished(stage="capture")]
    assert ring.position == whole


def test_finish_keeps_the_time_of_the_frame_that_it_fills(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    capture = Capture(context)
    capture.on_block(np.zeros(100, np.float32), 9_000_000_000, xrun=False)
    capture.finish()
    (mark,) = marks(context.rings["capture"])
    assert mark.captured_ns == 9_000_000_000


def test_finish_does_not_date_the_ring_by_silence_that_no_device_converted(stage: tuple[Context, Hub]) -> None:
    """The drift is measured by the anchors, and the end of a run shows it."""
    context, _ = stage
    capture = Capture(context)
    began_ns = now_ns() - 400_000_000  # a block that is 400 ms old when the stage comes to its end
    capture.on_block(np.zeros(100, np.float32), began_ns, xrun=False)
    capture.finish()
    anchor = context.rings["capture"].anchor
    assert anchor is not None
    assert abs(anchor.time_ns - anchor.position * NS_PER_S // SAMPLE_RATE - began_ns) <= 1


def test_a_file_that_has_ended_ends_the_stream_at_the_next_look(folder: RunFolder) -> None:
    with helpers.stage_context(folder, "capture") as (context, hub):
        context.config.capture.input = "tone:440"
        capture = Capture(context)
        capture.open()
        assert capture.detail == "tone 440 Hz"
        capture._on_end()
        capture.work()
        capture.work()
        capture.stop()
        assert received(hub, 1) == [Finished(stage="capture")]
        assert context.rings["capture"].end == 0


class Failing(Unopened):
    """An input that stops by itself."""

    def __init__(self, why: DeviceError) -> None:
        self.why = why
        self.stopped = False

    def failure(self) -> DeviceError | None:
        return self.why

    def stop(self) -> None:
        self.stopped = True


def test_a_file_that_turns_out_to_be_damaged_is_an_error_and_ends_the_stream(stage: tuple[Context, Hub]) -> None:
    context, hub = stage
    capture = Capture(context)
    Microphone(capture).give(speech_like(1)[:100])
    device = capture._held.device = Failing(DeviceError("input file x.flac: it is damaged"))
    capture.work()
    capture.work()
    log, timing, finished = received(hub, 3)
    assert isinstance(log, LogRecord)
    assert (log.stage, log.level, log.message) == ("capture", "error", "input file x.flac: it is damaged")
    assert [report for report in (timing, finished) if isinstance(report, Finished)] == [Finished(stage="capture")]
    assert context.rings["capture"].end == FRAME  # what was read of it is answered
    assert device.stopped
    hub.wait(0.05)
    assert list(hub.reports()) == []  # said once


class Desk(Unopened):
    """A microphone that is at hand."""

    def __init__(self, on_block: OnBlock) -> None:
        self.detail = "desk"
        self.on_block = on_block
        self.why: DeviceError | None = None

    def failure(self) -> DeviceError | None:
        return self.why


class Desks:
    """Where microphones are opened."""

    def __init__(self) -> None:
        self.opened: list[Desk] = []
        self.there = True

    def open(self, spec: str, *, on_block: OnBlock, **_: object) -> Desk:
        if not self.there:
            raise DeviceError(f"input {spec}: not found")
        self.opened.append(Desk(on_block))
        return self.opened[-1]

    def lose(self, capture: Capture) -> None:
        self.there = False
        self.opened[-1].why = DeviceLostError("input desk: the device has stopped")
        capture.work()

    def give_back(self, capture: Capture) -> None:
        before = len(self.opened)
        self.there = True

        def back() -> bool:
            capture.work()
            return len(self.opened) > before and capture.detail == "desk"

        wait_until(back, "the microphone to be back")


@pytest.fixture
def desks(stage: tuple[Context, Hub], monkeypatch: pytest.MonkeyPatch) -> Desks:
    desks = Desks()
    monkeypatch.setattr(devices, "open_input", desks.open)
    return desks


def test_a_microphone_that_is_lost_goes_on_in_its_frame_with_no_click(stage: tuple[Context, Hub], desks: Desks) -> None:
    """What it did not hear is not made up; what it hears then fades in over the last of what it had heard."""
    context, hub = stage
    ring = context.rings["capture"]
    capture = Capture(context)
    capture.open()
    capture.start()
    before, after = tone(1)[:1_000], tone(2, hz=700.0, phase=1.0)
    desks.opened[0].on_block(before.copy(), BEGAN_NS, False)
    desks.lose(capture)
    assert capture.detail == "desk lost: waiting for it"
    assert capture.apply(Mute()) == 2  # as if a block were under way
    assert capture.apply(Unmute()) == 2
    capture.work()
    assert ring.position == 1_000
    desks.give_back(capture)
    for start in range(0, len(after), 120):
        desks.opened[1].on_block(after[start : start + 120].copy(), BEGAN_NS + NS_PER_S, False)
    heard = content(ring)
    np.testing.assert_array_equal(heard[:1_000], before)
    np.testing.assert_array_equal(heard[1_000 + FADE :], after[FADE:])
    assert largest_step(heard) <= max(largest_step(before), largest_step(after)) * 1.2
    # The frame is dated by what came last, as a successor's is.
    assert abs(marks(ring)[0].captured_ns - (BEGAN_NS + NS_PER_S - 1_000 * NS_PER_S // SAMPLE_RATE)) <= 1
    assert ring.end is None
    assert [r.level for r in received(hub, 2) if isinstance(r, LogRecord)] == ["warning", "info"]
    capture.stop()


def test_muted_nothing_of_what_was_heard_before_is_heard_again(stage: tuple[Context, Hub], desks: Desks) -> None:
    capture = Capture(stage[0])
    capture.open()
    capture.start()
    desks.opened[0].on_block(tone(1), BEGAN_NS, False)
    desks.lose(capture)
    capture.apply(Mute())
    desks.give_back(capture)
    desks.opened[1].on_block(tone(1), BEGAN_NS, False)
    assert not content(stage[0].rings["capture"])[FRAME:].any()
    capture.stop()


def test_another_input_is_taken_while_the_microphone_is_away(stage: tuple[Context, Hub], desks: Desks) -> None:
    context, _ = stage
    capture = Capture(context)
    capture.open()
    capture.start()
    desks.lose(capture)
    with pytest.raises(DeviceError, match="input tone:1: not found"):
        capture.apply(Input(spec="tone:1"))
    capture.work()
    assert capture.detail.endswith("lost: waiting for it")
    desks.there = True
    capture.apply(Input(spec="tone:440"))
    capture.work()
    assert capture.detail == "desk"
    desks.opened[-1].on_block(np.zeros(FRAME, np.float32), BEGAN_NS, False)
    assert context.rings["capture"].mark_count == 1
    capture.stop()


def test_the_stream_can_be_ended_while_the_microphone_is_away(stage: tuple[Context, Hub], desks: Desks) -> None:
    context, _ = stage
    capture = Capture(context)
    capture.open()
    capture.start()
    desks.opened[0].on_block(np.zeros(100, np.float32), BEGAN_NS, False)
    desks.lose(capture)
    capture.finish()
    desks.there = True
    capture.work()
    capture.stop()
    assert context.rings["capture"].end == FRAME
    assert len(desks.opened) == 1


@pytest.mark.parametrize("spec", ["", "nothing", "file:", "silence:1", "tone:", "tone:x", "tone:-1", "tone:12000"])
def test_an_input_that_is_none_is_refused_by_name(folder: RunFolder, spec: str) -> None:
    with helpers.stage_context(folder, "capture") as (context, _):
        context.config.capture.input = spec
        with pytest.raises(DeviceError) as refused:
            Capture(context).open()
        line = str(refused.value)
        assert line.startswith(("input " + repr(spec), f"input {spec}"))
        assert "expected" in line
        assert "\n" not in line


# Offline


def test_offline_a_file_is_read_no_faster_than_it_is_answered(folder: RunFolder, tmp_path: Path) -> None:
    """Never more than the backlog that inference keeps, whatever the ring holds; and every sample in the end."""
    fed = noise(40 * FRAME / SAMPLE_RATE)[:-100]
    config = Config(engine="echo", offline=True)
    config.capture.input = f"file:{write_wav(tmp_path / 'in.wav', fed)}"
    limit = config.inference.backlog_limit
    with helpers.stage_context(folder, "capture", config) as (context, hub):
        capture = Capture(context)
        consumer = Consumer(context.rings["capture"])
        capture.open()
        capture.start()
        got: list[Samples] = []
        while not consumer.ended:
            wait_until(lambda: consumer.available >= min(limit, 40 - len(got)) * FRAME, "what there is room for")
            assert consumer.available <= limit * FRAME
            frame = np.empty(FRAME, np.float32)
            assert consumer.read(frame) == FRAME
            consumer.consume(FRAME)
            got.append(frame)
            capture.work()
        wait_until(lambda: capture.work() or capture._finished, "the end of the file")
        capture.stop()
        assert received(hub, 1) == [Finished(stage="capture")]  # and no timing, which nothing paced
    out = np.concatenate(got)
    np.testing.assert_array_equal(out[: len(fed)], fed)
    assert not out[len(fed) :].any()


def test_offline_a_file_that_waits_for_room_can_be_stopped(folder: RunFolder, tmp_path: Path) -> None:
    config = Config(engine="echo", offline=True)
    config.capture.input = f"file:{write_wav(tmp_path / 'in.wav', noise(5.0))}"
    with helpers.stage_context(folder, "capture", config) as (context, _):
        capture = Capture(context)
        capture.open()
        capture.start()
        written = config.inference.backlog_limit * FRAME
        wait_until(lambda: context.rings["capture"].position == written, "the ring to be as full as it may be")
        capture.stop()
        assert context.rings["capture"].position == written
        assert context.rings["capture"].end is None


# A successor


def test_a_successor_goes_on_in_the_frame_that_its_predecessor_left(stage: tuple[Context, Hub]) -> None:
    context, _ = stage
    samples = speech_like(3)
    Microphone(Capture(context)).give(samples[:1_000])
    successor = Microphone(Capture(context), began_ns=BEGAN_NS + FRAME_NS)
    successor.give(samples[1_000 : 2 * FRAME])
    ring = context.rings["capture"]
    np.testing.assert_array_equal(content(ring), samples[: 2 * FRAME])
    assert [(mark.position, mark.frame) for mark in marks(ring)] == [(0, 0), (FRAME, 1)]
    assert ring.generation == 2


def test_the_frame_that_a_successor_completes_is_dated(stage: tuple[Context, Hub]) -> None:
    """Its first sample was the predecessor's; when that was is not known, but it was no hour ago."""
    context, hub = stage
    Microphone(Capture(context)).give(np.zeros(1_000, np.float32))
    capture = Capture(context)
    successor = Microphone(capture, began_ns=BEGAN_NS + FRAME_NS)
    successor.give(np.zeros(FRAME, np.float32))
    (mark,) = marks(context.rings["capture"])
    assert BEGAN_NS - FRAME_NS <= mark.captured_ns <= BEGAN_NS + FRAME_NS
    capture.work()
    (report,) = received(hub, 1)
    assert isinstance(report, TimingRecord)
    assert report.start_ns == mark.captured_ns
