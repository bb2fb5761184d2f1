"""procs.playback.Playback on real rings, with speakers that are made up: one that is lost, and what follows."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

from pipeline.audio import FADE, Samples
from pipeline.config import Config
from pipeline.control import Hub
from pipeline.errors import DeviceError, DeviceLostError
from pipeline.messages import LogRecord, Output, Set, TimingRecord
from pipeline.ring import RingWriter
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import FRAME
from pipeline.worker import Context
from procs import devices, playback
from procs.devices import Device, OnBlock, Unopened
from procs.playback import Playback
from tests import helpers
from tests.helpers import largest_step, received, tone, wait_until

folder = helpers.folder
runtime_dir = helpers.runtime_dir

BLOCK: Final = 480


class Speaker(Unopened):
    """Asks for blocks when it is told to, and keeps them."""

    def __init__(self, spec: str, on_block: OnBlock, latency_ms: float) -> None:
        self.detail = spec
        self.latency_ms = latency_ms
        self.on_block = on_block
        self.heard: list[Samples] = []
        self.why: DeviceError | None = None

    def play(self, samples: int, *, dry: bool = False) -> None:
        for _ in range(samples // BLOCK):
            block = np.full(BLOCK, np.nan, np.float32)
            self.on_block(block, now_ns(), dry)
            self.heard.append(block)

    def failure(self) -> DeviceError | None:
        return self.why

    @property
    def sound(self) -> Samples:
        return np.concatenate(self.heard)


class Rig:
    """A playback stage whose ring of frames is written here, and whose speakers are at hand."""

    def __init__(self, context: Context, hub: Hub) -> None:
        self.hub = hub
        self.rings = context.rings
        self.writer = RingWriter(context.rings["playback"])
        self.frames = 0
        self.speakers: list[Speaker] = []
        self.there = True
        self.stage = Playback(context)
        self.signal = tone(200)

    def open(self, spec: str, *, on_block: OnBlock, latency_ms: float, **_: object) -> Device:
        if not self.there:
            raise DeviceError(f"output {spec}: not found")
        self.speakers.append(Speaker(spec, on_block, latency_ms))
        return self.speakers[-1]

    @property
    def speaker(self) -> Speaker:
        return self.speakers[-1]

    def answer(self, frames: int) -> None:
        for _ in range(frames):
            position, now = self.writer.position, now_ns()
            self.writer.mark(position, self.frames, now - NS_PER_S, now, now)
            self.writer.write(self.signal[position : position + FRAME])
            self.frames += 1

    def lose(self) -> None:
        self.there = False
        self.speaker.why = DeviceLostError("output device:desk: the device has stopped")
        self.stage.work()

    def give_back(self) -> None:
        before = len(self.speakers)
        self.there = True

        def back() -> bool:
            self.stage.work()
            return len(self.speakers) > before and self.stage.detail == "device:desk"

        wait_until(back, "the speaker to be back")

    def balance(self) -> tuple[int, int]:
        """(played, skipped), after a look that all is accounted for."""
        out, sent = self.rings["playback"].ledger(), self.rings["heard"].ledger()
        assert out.written == out.consumed + out.dropped + out.waiting
        assert sent.written == out.consumed + sent.concealed
        return out.consumed, out.dropped


@pytest.fixture
def rig(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    config = Config(engine="echo")
    config.playback.output = "device:desk"
    config.playback.prebuffer_ms = 0
    config.playback.latency_ms = 20
    with helpers.stage_context(folder, "playback", config) as (context, hub):
        rig = Rig(context, hub)
        monkeypatch.setattr(devices, "open_output", rig.open)
        rig.stage.open()
        rig.stage.start()
        rig.answer(2)
        rig.speaker.play(2 * FRAME)
        yield rig
        rig.stage.stop()


def test_a_speaker_that_is_lost_and_back_gets_the_newest_frames_from_a_fade_in(rig: Rig) -> None:
    rig.answer(1)
    rig.speaker.play(BLOCK)  # it breaks off in the middle of a frame
    played, skipped = rig.balance()
    rig.lose()
    assert rig.stage.detail == "device:desk lost: waiting for it"
    rig.answer(20)
    rig.stage.work()
    assert rig.balance() == (played, skipped)
    rig.give_back()
    rig.speaker.play(2 * FRAME)
    sound = rig.speaker.sound
    newest = rig.signal[21 * FRAME : 23 * FRAME]
    np.testing.assert_array_equal(sound[FADE:], newest[FADE:])
    assert largest_step(np.concatenate((np.zeros(1, np.float32), sound))) <= largest_step(rig.signal)
    assert rig.balance() == (played + 2 * FRAME, skipped + 18 * FRAME + FRAME - BLOCK)


def test_a_speaker_that_is_back_soon_goes_on_where_it_broke_off(rig: Rig) -> None:
    rig.answer(2)
    rig.speaker.play(BLOCK)
    before = rig.balance()
    rig.lose()
    rig.give_back()
    rig.speaker.play(2 * FRAME - BLOCK)
    np.testing.assert_array_equal(rig.speaker.sound[FADE:], rig.signal[2 * FRAME + BLOCK : 4 * FRAME][FADE:])
    assert rig.balance() == (before[0] + 2 * FRAME - BLOCK, before[1])


def test_it_may_be_away_for_longer_than_the_ring_holds(rig: Rig) -> None:
    rig.lose()
    rig.signal = np.tile(rig.signal, 2)
    rig.answer(rig.rings["playback"].capacity // FRAME + 7)
    rig.give_back()
    rig.speaker.play(2 * FRAME)
    end = rig.writer.position
    np.testing.assert_array_equal(rig.speaker.sound[FADE:], rig.signal[end - 2 * FRAME : end][FADE:])
    rig.balance()


def test_what_is_set_while_it_is_away_holds_when_it_is_back(rig: Rig) -> None:
    rig.lose()
    rig.stage.apply(Set(volume=0.5, queue_frames=9))
    rig.answer(8)
    rig.give_back()
    rig.speaker.play(FRAME)
    assert rig.balance()[1] == 0  # no more waited than the queue may hold now
    heard, meant = rig.speaker.sound, rig.signal[2 * FRAME : 3 * FRAME]
    np.testing.assert_array_equal(heard[BLOCK:], np.float32(0.5) * meant[BLOCK:])


def test_every_frame_that_is_played_is_reported_though_another_player_took_over(rig: Rig) -> None:
    rig.lose()
    rig.give_back()
    rig.answer(3)
    rig.speaker.play(3 * FRAME)
    rig.stage.work()
    reports = received(rig.hub, 7)
    assert [r.frame for r in reports if isinstance(r, TimingRecord)] == [0, 1, 2, 3, 4]
    assert [r.level for r in reports if isinstance(r, LogRecord)] == ["warning", "info"]


def test_another_output_is_taken_while_it_is_away_and_keeps_what_was_set(rig: Rig) -> None:
    rig.lose()
    rig.answer(1)
    rig.there = True
    rig.stage.apply(Output(spec="null"))
    assert rig.stage.detail == "null"
    rig.speaker.play(FRAME)
    np.testing.assert_array_equal(rig.speaker.sound[FADE:], rig.signal[2 * FRAME : 3 * FRAME][FADE:])
    rig.stage.work()
    assert rig.stage.detail == "null"


def test_where_another_cannot_be_opened_it_is_waited_for(rig: Rig) -> None:
    rig.lose()
    with pytest.raises(DeviceError, match="output file:x: not found"):
        rig.stage.apply(Output(spec="file:x"))
    rig.stage.work()
    assert rig.stage.detail.endswith("lost: waiting for it")
    rig.give_back()
    rig.answer(1)
    rig.speaker.play(FRAME)
    assert rig.speaker.sound[FADE:].any()


RunDry = Callable[[int, float], None]


@pytest.fixture
def run_dry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> RunDry:
    """Lets the speaker run dry so many times, each so many seconds of the stage's after what was before."""
    passed_ns = [NS_PER_S]
    monkeypatch.setattr(playback, "now_ns", lambda: now_ns() + passed_ns[0])

    def run(times: int, after_s: float) -> None:
        for _ in range(times):
            passed_ns[0] += round(after_s * NS_PER_S)
            rig.answer(1)
            rig.speaker.play(BLOCK, dry=True)
            rig.speaker.play(FRAME - BLOCK)
            rig.stage.work()

    return run


def asked_ms(rig: Rig) -> list[float]:
    """What latency each speaker so far was asked for."""
    return [speaker.latency_ms for speaker in rig.speakers]


def warnings(rig: Rig, count: int) -> list[str]:
    """The first `count` lines that were logged."""
    lines: list[str] = []

    def enough() -> bool:
        lines.extend(report.message for report in received(rig.hub, 1) if isinstance(report, LogRecord))
        return len(lines) >= count

    wait_until(enough, f"{count} lines")
    return lines


def test_a_speaker_that_runs_dry_twice_is_asked_for_twice_the_latency(rig: Rig, run_dry: RunDry) -> None:
    asked = []
    for _ in range(8):
        run_dry(1, 20)
        asked.append(rig.speaker.latency_ms)
    assert asked == [20, 40, 40, 80, 80, 80, 80, 80]
    assert rig.rings["heard"].ledger().xruns == 8
    rig.answer(2)
    rig.speaker.play(2 * FRAME)
    assert rig.speaker.sound[FADE:].any()
    assert sum(rig.balance()) == 12 * FRAME
    assert [line.split(": ")[1] for line in warnings(rig, 2)] == [
        "opened anew with playback.latency_ms = 40 in place of 20, so heard later",
        "opened anew with playback.latency_ms = 80 in place of 40, so heard later",
    ]


def test_underruns_within_a_second_are_of_one_cause(rig: Rig, run_dry: RunDry) -> None:
    run_dry(6, 0.7)
    assert asked_ms(rig) == [20]
    run_dry(3, 0.7)
    assert asked_ms(rig) == [20, 40]  # but none lasts for long


def test_an_underrun_a_minute_is_put_up_with(rig: Rig, run_dry: RunDry) -> None:
    run_dry(5, 61)
    assert asked_ms(rig) == [20]


def test_a_speaker_that_was_asked_for_nothing_is_asked_for_20_ms(rig: Rig, run_dry: RunDry) -> None:
    rig.stage._latency_ms = 0.0
    run_dry(2, 2)
    assert asked_ms(rig) == [20, 20]


def test_a_speaker_that_cannot_be_had_with_more_latency_is_asked_once(
    rig: Rig, run_dry: RunDry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another program's, so to say, once it is let go of, and a moment later it is free again."""
    monkeypatch.setattr(devices, "is_portaudio", lambda _: True)
    monkeypatch.setattr(devices, "renew", lambda: None)
    tried = []

    def refuse(spec: str, *, latency_ms: float, **options: Any) -> Device:
        tried.append(latency_ms)
        if latency_ms > 20:
            raise DeviceError("output device:desk: cannot be opened")
        return rig.open(spec, latency_ms=latency_ms, **options)

    monkeypatch.setattr(devices, "open_output", refuse)
    run_dry(2, 2)
    assert tried == [40, 40]  # beside the one that plays, and in its place
    assert "cannot be had with more latency: output device:desk" in warnings(rig, 1)[0]
    rig.give_back()
    run_dry(4, 2)
    assert tried == [40, 40, 20]
    assert asked_ms(rig) == [20, 20]


def test_another_speaker_begins_with_the_latency_that_is_set_and_its_own_underruns(rig: Rig, run_dry: RunDry) -> None:
    run_dry(3, 2)
    rig.stage.apply(Output(spec="device:shelf"))
    run_dry(1, 0)  # of its beginning
    run_dry(1, 2)
    assert asked_ms(rig) == [20, 40, 20]
    run_dry(1, 2)
    assert asked_ms(rig) == [20, 40, 20, 40]


def test_a_speaker_that_is_lost_is_opened_again_with_the_latency_that_it_had(rig: Rig, run_dry: RunDry) -> None:
    run_dry(2, 2)
    rig.lose()
    rig.give_back()
    assert rig.speaker.latency_ms == 40


def test_the_stage_ends_at_once_while_it_is_away(rig: Rig) -> None:
    rig.lose()
    rig.stage.stop()
    rig.there = True
    assert len(rig.speakers) == 1
    assert rig.stage.device_latency_ms() == 0
