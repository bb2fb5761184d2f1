"""procs.inference, driven by hand over real rings, a bell and a line to the supervisor, with an engine that waits."""

import select
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from pipeline.audio import FADE
from pipeline.bell import Bell
from pipeline.config import Config, InferenceConfig, SamplerConfig
from pipeline.control import Hub
from pipeline.messages import (
    Finished,
    LogRecord,
    Mute,
    Pause,
    Report,
    Reset,
    Resume,
    Set,
    TextRecord,
    TimingRecord,
    XrunRecord,
)
from pipeline.ring import Consumer, RingReader, RingWriter, Samples
from pipeline.runtime import RunFolder
from pipeline.timing import now_ns
from pipeline.topology import FRAME
from pipeline.worker import Context
from procs.engines import Answer, Step
from procs.inference import AHEAD, UNSAID, Answers, Inference, Question
from tests import helpers
from tests.helpers import PATIENCE_S, received, temporary_ring, wait_until

folder = helpers.folder
runtime_dir = helpers.runtime_dir

LIMIT: Final = 8
TARGET: Final = 3


class Held:
    """An answer whose sound is there when the test says so: the frame, with its sign turned."""

    def __init__(self, frame: Samples, failure: Exception | None = None) -> None:
        self.frame = frame
        self.failure = failure
        self.fetched = False
        self._there = threading.Event()

    def release(self) -> None:
        self._there.set()

    def result(self) -> Step:
        assert self._there.wait(PATIENCE_S)
        self.fetched = True
        if self.failure is not None:
            raise self.failure
        return Step(audio=-self.frame, text=f" {number_of(self.frame)}", encode_ms=1.0, step_ms=2.0, decode_ms=3.0)


class Engine:
    """Answers when it is asked, and lets the test hold the sound back."""

    name = "held"
    overlaps = True

    def __init__(self) -> None:
        self.heard: deque[Samples] = deque()
        self.listened: list[int] = []
        """The numbers of the frames, in the order in which they were given."""
        self.answered: list[Held] = []
        self.most = 0
        self.resets = 0
        self.samplers: list[SamplerConfig] = []
        self.hold = False
        self.failures: dict[int, Exception] = {}

    def load(self) -> None:
        """Nothing to load."""

    def listen(self, frame: Samples) -> None:
        self.heard.append(frame.copy())
        self.listened.append(number_of(frame))
        self.most = max(self.most, len(self.heard))

    def respond(self) -> Answer:
        frame = self.heard.popleft()
        answer = Held(frame, self.failures.get(number_of(frame)))
        self.answered.append(answer)
        if not self.hold:
            answer.release()
        return answer

    def reset(self) -> None:
        self.heard.clear()
        self.resets += 1

    def draw_by(self, sampler: SamplerConfig) -> None:
        self.samplers.append(sampler)

    def keep_warm(self) -> None:
        """There is no device."""

    def let_go(self) -> None:
        """Whatever was held back, and all that follows."""
        self.hold = False
        for answer in self.answered:
            answer.release()


def frame_of(number: int) -> Samples:
    """Every sample of it tells its number."""
    return np.full(FRAME, (number + 1) / 1_000, np.float32)


def number_of(frame: Samples) -> int:
    return round(float(abs(frame[-1])) * 1_000) - 1  # its beginning may be faded over from what came before


class Rig:
    """An inference stage between its rings."""

    def __init__(self, context: Context, hub: Hub, engine: Engine | None = None) -> None:
        self.context, self.hub = context, hub
        self.capture, self.playback = context.rings["capture"], context.rings["playback"]
        self.microphone = RingWriter(self.capture)
        self.speaker = Consumer(self.playback)
        self.engine = engine or Engine()
        self._gone: list[tuple[Engine, Inference]] = []
        self.stage = self.successor()

    def successor(self) -> Inference:
        """What a new process makes on these rings. The old one, if there was one, is gone."""
        self.stage = Inference(self.context)
        self.stage._engine = self.engine
        self.stage.open()
        self.stage.start()
        self._gone.append((self.engine, self.stage))
        return self.stage

    def close(self) -> None:
        """No thread goes on after the test."""
        for engine, stage in self._gone:
            engine.let_go()
            if (thread := stage._answers._thread) is not None and thread.is_alive():
                stage._answers._unsaid.put(None)
                thread.join(PATIENCE_S)

    def capture_frames(self, count: int, quiet: int | None = None) -> None:
        """Frames of which every sample tells their number, but for a silence where the frame `quiet` begins."""
        for _ in range(count):
            number = self.microphone.position // FRAME
            self.microphone.mark(number * FRAME, number, captured_ns=number, start_ns=number, end_ns=now_ns())
            frame = frame_of(number)
            if number + 1 == quiet:
                frame[-FADE:] = 0
            if number == quiet:
                frame[1:FADE] = 0
            self.microphone.write(frame)

    def work(self, times: int = 1) -> None:
        for _ in range(times):
            self.stage.work()
            self.assert_exact()

    def work_until(self, generated: int) -> None:
        """Until so many frames are in the playback ring, and counted."""

        def done() -> bool:
            self.work()
            return self.playback.position >= generated * FRAME and not self.stage._answers.written

        wait_until(done, f"{generated} answers, {self.playback.position // FRAME} are there")

    def assert_exact(self) -> None:
        """Every sample of the microphone is stepped, dropped or waiting, in numbers that can be."""
        ledger = self.capture.ledger()
        assert ledger.written == ledger.consumed + ledger.dropped + ledger.waiting
        assert min(ledger.consumed, ledger.dropped, ledger.waiting) >= 0

    def counts(self) -> tuple[int, int, int]:
        """Frames stepped, dropped and waiting."""
        ledger = self.capture.ledger()
        assert not any(count % FRAME for count in (ledger.consumed, ledger.dropped, ledger.waiting))
        return ledger.consumed // FRAME, ledger.dropped // FRAME, ledger.waiting // FRAME

    def answers(self) -> list[int]:
        """The numbers of the frames that were answered, by the sound in the playback ring; the marks say the same."""
        count = self.playback.position // FRAME
        out = np.empty(count * FRAME, np.float32)
        assert RingReader(self.playback, 0).read(out) == len(out)
        frames = np.split(out, count) if count else []
        assert all((frame[FADE:] == frame[-1]).all() and frame[-1] < 0 for frame in frames)
        numbers = [number_of(frame) for frame in frames]
        marks = [self.playback.mark(index) for index in range(self.playback.mark_count)]
        assert [(mark.position, mark.frame, mark.captured_ns) for mark in marks if mark is not None] == [
            (index * FRAME, number, number) for index, number in enumerate(numbers)
        ]
        return numbers


def make_rig(folder: RunFolder, config: Config) -> Iterator[Rig]:
    with helpers.stage_context(folder, "inference", config) as (context, hub):
        made = Rig(context, hub)
        yield made
        made.close()


@pytest.fixture
def rig(folder: RunFolder) -> Iterator[Rig]:
    bounds = InferenceConfig(backlog_target=TARGET, backlog_limit=LIMIT)
    yield from make_rig(folder, Config(engine="echo", inference=bounds))


@pytest.fixture
def offline(folder: RunFolder) -> Iterator[Rig]:
    """10 s of ring: 125 frames."""
    yield from make_rig(folder, Config(engine="echo", offline=True, ring_seconds=10.0))


def reports_until(hub: Hub, last: type[Report]) -> list[Report]:
    found: list[Report] = []
    while not found or not isinstance(found[-1], last):
        found += received(hub, 1)
    return found


class TestOrder:
    def test_every_frame_is_answered_in_order(self, rig: Rig) -> None:
        for number in range(0, 30, 5):
            rig.capture_frames(5)
            rig.work_until(number + 5)
        assert rig.answers() == rig.engine.listened == list(range(30))
        assert rig.counts() == (30, 0, 0)

    def test_the_next_frame_is_given_ahead_and_no_more(self, rig: Rig) -> None:
        rig.capture_frames(5)
        rig.work()
        assert rig.engine.listened == [0, 1]
        rig.work()
        assert rig.engine.listened == [0, 1, 2]
        rig.work_until(5)
        assert rig.engine.most == AHEAD == 2

    def test_a_frame_that_came_alone_is_answered_without_the_next(self, rig: Rig) -> None:
        rig.capture_frames(1)
        rig.work_until(1)
        assert rig.answers() == [0]

    def test_sound_that_is_late_keeps_the_next_frame_from_nothing(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(3)
        rig.work(3)
        assert len(rig.engine.answered) == 3
        assert rig.playback.position == 0
        assert rig.counts() == (0, 0, 3)  # counted when it is written, not when it was taken

    def test_an_answer_that_is_ready_waits_for_the_one_before_it(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(3)
        rig.work(3)
        first, second, third = rig.engine.answered
        second.release()
        third.release()
        wait_until(lambda: rig.stage._answers._unsaid.qsize() == 2, "the first one being waited for")
        assert not second.fetched
        assert not third.fetched
        assert rig.playback.position == 0
        first.release()
        rig.work_until(3)
        assert rig.answers() == [0, 1, 2]

    def test_the_bell_is_rung_for_each_answer_that_was_written(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(1)
        rig.work()
        assert not select.select([rig.context.bell], [], [], 0)[0]
        rig.engine.let_go()
        assert select.select([rig.context.bell], [], [], PATIENCE_S)[0]
        rig.work()
        assert rig.counts() == (1, 0, 0)

    def test_it_says_whether_there_is_more_to_do(self, rig: Rig) -> None:
        assert not rig.stage.work()
        rig.capture_frames(3)
        assert [rig.stage.work() for _ in range(4)] == [True, True, False, False]

    def test_what_is_reported_of_each(self, rig: Rig) -> None:
        rig.capture_frames(2)
        rig.work_until(2)
        timing, text, second, _ = received(rig.hub, 4)
        assert isinstance(timing, TimingRecord)
        assert (timing.stage, timing.frame, timing.queued) == ("inference", 0, 2)
        assert (timing.encode_ms, timing.step_ms, timing.decode_ms) == (1.0, 2.0, 3.0)
        assert 0 < timing.start_ns < timing.end_ns
        assert text == TextRecord(frame=0, text=" 0", time_ns=timing.end_ns)
        assert isinstance(second, TimingRecord)
        assert (second.frame, second.queued) == (1, 1)
        assert second.end_ns >= timing.end_ns
        mark = rig.playback.mark(0)
        assert mark is not None
        assert (mark.start_ns, mark.end_ns) == (timing.start_ns, timing.end_ns)

    def test_a_new_conversation_is_told(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Held.result

        def result(self: Held) -> Step:
            step = original(self)
            step.new_conversation = True
            return step

        monkeypatch.setattr(Held, "result", result)
        rig.capture_frames(1)
        rig.work_until(1)
        _, log, _ = received(rig.hub, 3)
        assert isinstance(log, LogRecord)
        assert log.message == "a new conversation begins with frame 0"

    def test_an_answer_beyond_full_scale_is_made_fit(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        loud = np.full(FRAME, -7.0, np.float32)
        loud[:3] = np.nan
        monkeypatch.setattr(Held, "result", lambda _: Step(audio=loud))
        rig.capture_frames(1)
        rig.work_until(1)
        out = np.empty(FRAME, np.float32)
        RingReader(rig.playback, 0).read(out)
        assert (out[3:] == -1.0).all()
        assert not out[:3].any()
        assert rig.playback.ledger().cleaned == FRAME


class TestEnd:
    def test_it_waits_until_all_is_written(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(3)
        rig.microphone.end()
        rig.work(3)
        assert rig.playback.end is None
        ended = threading.Thread(target=rig.stage.work)
        ended.start()
        for answer in rig.engine.answered:
            assert rig.playback.end is None
            answer.release()
        ended.join(PATIENCE_S)
        assert rig.playback.end == 3 * FRAME
        assert rig.answers() == [0, 1, 2]
        rig.assert_exact()
        assert rig.counts() == (3, 0, 0)
        reports = reports_until(rig.hub, Finished)
        assert [report.frame for report in reports if isinstance(report, TimingRecord)] == [0, 1, 2]

    def test_it_is_said_once(self, rig: Rig) -> None:
        rig.microphone.end()
        rig.work(3)
        assert isinstance(received(rig.hub, 1)[0], Finished)
        rig.hub.wait(0.05)
        assert list(rig.hub.reports()) == []


class TestFailure:
    def test_what_goes_wrong_with_an_answer_goes_wrong_for_the_stage(self, rig: Rig) -> None:
        rig.engine.failures[1] = RuntimeError("the device is gone")
        rig.capture_frames(6)
        with pytest.raises(RuntimeError, match="the device is gone"):
            rig.work_until(6)
        rig.stage._settle()
        rig.assert_exact()
        assert rig.answers() == [0]
        # The rest is for a successor: nothing was lost.
        rig.engine = Engine()
        rig.successor()
        rig.work_until(6)
        assert rig.answers() == list(range(6))
        assert rig.counts() == (6, 0, 0)

    def test_the_end_does_not_hide_it(self, rig: Rig) -> None:
        rig.engine.failures[0] = RuntimeError("the device is gone")
        rig.capture_frames(1)
        rig.microphone.end()
        with pytest.raises(RuntimeError, match="the device is gone"):
            rig.work(2)
        assert rig.playback.end is None

    def test_nobody_waits_for_room_behind_it(self) -> None:
        with temporary_ring() as ring:
            answers = Answers(ring, _Silent())
            answers.start_thread()
            broken = Held(frame_of(0), ValueError("no sound"))
            broken.release()
            others = [Held(frame_of(number)) for number in range(1, 2 * UNSAID + 4)]

            def put_all() -> None:
                for number, answer in enumerate([broken, *others]):
                    answers.put(Question(number, 0, 0, 1), answer)

            with pytest.raises(ValueError, match="no sound"):
                put_all()
            with pytest.raises(ValueError, match="no sound"):
                answers.end()
            assert ring.position == 0
            assert not any(answer.fetched for answer in others)


class _Silent(Bell):
    """A bell that nobody hears."""

    def __init__(self) -> None:
        """No pipe."""

    def ring(self) -> None:
        """No sound."""


class TestAnswers:
    def test_without_a_thread_it_is_done_at_once(self) -> None:
        with temporary_ring() as ring:
            answers = Answers(ring, _Silent())
            for number in range(3):
                answer = Held(frame_of(number))
                answer.release()
                answers.put(Question(number, 0, 0, 1), answer)
                assert ring.position == (number + 1) * FRAME
            assert [written.question.number for written in answers.written] == [0, 1, 2]
            answers.end()
            assert ring.end == 3 * FRAME

    def test_who_is_too_fast_waits(self) -> None:
        with temporary_ring() as ring:
            answers = Answers(ring, _Silent())
            answers.start_thread()
            held = [Held(frame_of(number)) for number in range(UNSAID + 2)]
            put: list[int] = []

            def put_all() -> None:
                for number, answer in enumerate(held):
                    answers.put(Question(number, 0, 0, 1), answer)
                    put.append(number)

            putting = threading.Thread(target=put_all)
            putting.start()
            # One is being waited for, UNSAID are behind it.
            wait_until(lambda: len(put) == UNSAID + 1, "room")
            assert putting.is_alive()
            for answer in held:
                answer.release()
            putting.join(PATIENCE_S)
            answers.end()
            assert ring.position == len(held) * FRAME


class TestReset:
    def test_frames_asked_and_not_answered_are_heard_again(self, rig: Rig) -> None:
        rig.capture_frames(4)
        rig.work()  # answers frame 0, was given frame 1
        assert rig.engine.listened == [0, 1]
        assert rig.stage.apply(Reset()) == 1
        rig.work_until(4)
        assert rig.engine.resets == 1
        assert rig.engine.listened == [0, 1, 1, 2, 3]
        assert rig.answers() == [0, 1, 2, 3]
        assert rig.counts() == (4, 0, 0)

    def test_sound_in_the_making_is_said(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(3)
        rig.work(2)  # frames 0 and 1 are being said, 2 was given
        assert rig.stage.apply(Reset()) == 2
        rig.engine.let_go()
        rig.work_until(3)
        assert rig.engine.listened == [0, 1, 2, 2]
        assert rig.answers() == [0, 1, 2]

    def test_without_anything_asked_the_next_frame_begins_it(self, rig: Rig) -> None:
        assert rig.stage.apply(Reset()) == 0
        rig.capture_frames(2)
        rig.work_until(2)
        assert rig.stage.apply(Reset()) == 2
        assert rig.engine.resets == 2

    def test_a_frame_that_was_overwritten_meanwhile_is_dropped_once(self, rig: Rig) -> None:
        rig.capture_frames(2)
        rig.work()
        frames = rig.capture.capacity // FRAME
        rig.capture_frames(frames)  # frame 1, which was given, is no longer there
        assert rig.stage.apply(Reset()) == 1
        rig.work_until(1 + TARGET)
        stepped, dropped, waiting = rig.counts()
        assert (stepped + dropped, waiting) == (frames + 2, 0)
        answered = rig.answers()
        assert answered == sorted(set(answered))
        assert answered[0] == 0
        assert stepped == len(answered)

    def test_other_commands_leave_the_engine_alone(self, rig: Rig) -> None:
        rig.capture_frames(3)
        rig.work()
        assert rig.stage.apply(Mute()) == 2
        rig.work_until(3)
        assert rig.engine.resets == 0
        assert rig.engine.listened == [0, 1, 2]


class TestBacklog:
    def test_as_many_as_the_limit_are_kept(self, rig: Rig) -> None:
        rig.capture_frames(LIMIT)
        rig.work_until(LIMIT)
        assert rig.counts() == (LIMIT, 0, 0)

    def test_the_oldest_are_dropped_down_to_the_target(self, rig: Rig) -> None:
        rig.capture_frames(LIMIT + 1)
        rig.work_until(TARGET)
        assert rig.answers() == [6, 7, 8]
        assert rig.counts() == (TARGET, LIMIT + 1 - TARGET, 0)
        dropped = received(rig.hub, 1)[0]
        assert isinstance(dropped, XrunRecord)
        assert (dropped.stage, dropped.kind, dropped.count) == ("inference", "dropped", 6)

    @pytest.mark.parametrize("kept", range(1, TARGET + 1))
    def test_what_is_kept_begins_at_the_quietest_place(self, rig: Rig, kept: int) -> None:
        """Of the beginnings of frames that leave as many as the target, or fewer."""
        rig.capture_frames(LIMIT + 1, quiet=LIMIT + 1 - kept)
        rig.work_until(kept)
        assert rig.engine.listened == list(range(LIMIT + 1 - kept, LIMIT + 1))
        assert rig.counts() == (kept, LIMIT + 1 - kept, 0)

    def test_a_quiet_place_further_back_is_no_reason_to_keep_more(self, rig: Rig) -> None:
        rig.capture_frames(LIMIT + 1, quiet=LIMIT - TARGET)
        rig.work_until(TARGET)
        assert rig.counts() == (TARGET, LIMIT + 1 - TARGET, 0)

    def test_what_is_being_answered_is_not_dropped(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(3)
        rig.work(2)  # two are being said, the third was given
        rig.capture_frames(LIMIT + 2)
        rig.work()
        assert rig.counts() == (0, LIMIT + 2 - TARGET, 3 + TARGET)
        rig.engine.let_go()
        rig.work_until(3 + TARGET)
        assert rig.answers() == [0, 1, 2, 10, 11, 12]
        assert rig.counts() == (3 + TARGET, LIMIT + 2 - TARGET, 0)

    def test_the_counts_add_up_at_every_moment(self, rig: Rig) -> None:
        """As somebody else sees them, while frames are taken, dropped, answered and counted."""
        seen: list[tuple[int, int]] = []
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                ledger = rig.capture.ledger()
                left = ledger.written - ledger.consumed - ledger.dropped - ledger.waiting
                seen.append((left, min(ledger.consumed, ledger.dropped, ledger.waiting)))

        watching = threading.Thread(target=watch)
        watching.start()
        given = 0
        for count in (1, 2, LIMIT + 5, 3, 2 * LIMIT, 1) * 5:
            rig.engine.hold = count == 3
            rig.capture_frames(count)
            given += count
            rig.work(2)
            rig.engine.let_go()
            rig.work(5)
        while rig.counts()[2]:
            rig.work()
        over.set()
        watching.join(PATIENCE_S)
        assert {left for left, _ in seen} == {0}
        assert min(least for _, least in seen) >= 0
        stepped, dropped, _ = rig.counts()
        assert stepped + dropped == given
        assert min(stepped, dropped) > 0
        answered = rig.answers()
        assert len(answered) == stepped
        assert answered == sorted(set(answered))

    def test_a_ring_that_went_round_costs_what_was_overwritten(self, rig: Rig) -> None:
        frames = rig.capture.capacity // FRAME
        rig.capture_frames(frames + 10)
        rig.work_until(TARGET)
        assert rig.answers() == [frames + 7, frames + 8, frames + 9]
        assert rig.counts() == (TARGET, frames + 7, 0)


class TestSuccessor:
    def test_it_goes_on_where_the_counts_end(self, rig: Rig) -> None:
        rig.capture_frames(4)
        rig.work_until(4)
        rig.capture_frames(3)
        rig.successor()
        rig.work_until(7)
        assert rig.answers() == list(range(7))
        assert rig.counts() == (7, 0, 0)

    def test_frames_that_were_taken_and_not_answered_are_answered(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(4)
        rig.work(3)  # three are in the making when it is killed, and one was given
        rig.engine = Engine()
        rig.successor()
        rig.work_until(4)
        assert rig.answers() == [0, 1, 2, 3]
        assert rig.counts() == (4, 0, 0)

    @pytest.mark.parametrize("uncounted", [1, 2, 3])
    def test_frames_that_were_answered_and_not_counted_are_not_answered_again(self, rig: Rig, uncounted: int) -> None:
        rig.capture_frames(2)
        rig.work_until(2)
        rig.capture_frames(3)
        # Killed between the answers' writing and their count.
        writer = RingWriter(rig.playback)
        for number in range(2, 2 + uncounted):
            writer.mark(writer.position, number, captured_ns=number, start_ns=0, end_ns=0)
            writer.write(-frame_of(number))
        rig.engine = Engine()
        rig.successor()
        assert rig.counts() == (2 + uncounted, 0, 3 - uncounted)
        rig.work_until(5)
        assert rig.engine.listened == list(range(2 + uncounted, 5))
        assert rig.answers() == [0, 1, 2, 3, 4]
        assert rig.counts() == (5, 0, 0)

    def test_a_frame_whose_answer_was_announced_and_not_written_is_answered(self, rig: Rig) -> None:
        rig.capture_frames(2)
        rig.work_until(2)
        rig.capture_frames(2)
        # Killed between the mark and the samples, which no one will ever read.
        writer = RingWriter(rig.playback)
        writer.mark(writer.position, 2, captured_ns=2, start_ns=0, end_ns=0)
        rig.engine = Engine()
        rig.successor()
        assert rig.counts() == (2, 0, 2)
        rig.work_until(4)
        assert rig.answers() == [0, 1, 2, 3]
        assert rig.counts() == (4, 0, 0)

    def test_after_a_drop_no_frame_is_answered_twice(self, rig: Rig) -> None:
        rig.engine.hold = True
        rig.capture_frames(2)
        rig.work(2)
        rig.capture_frames(LIMIT + 1)
        rig.work()  # the oldest are counted as dropped before the two in the making are counted as stepped
        rig.engine.let_go()
        wait_until(lambda: rig.playback.position == 3 * FRAME, "the answers")
        rig.engine = Engine()
        rig.successor()  # killed before these were counted

        def counted() -> bool:
            rig.work()
            return rig.counts()[2] == 0

        wait_until(counted, "all counted")
        answered = rig.answers()
        assert len(answered) == len(set(answered))


class TestOffline:
    def test_nothing_is_dropped(self, offline: Rig) -> None:
        offline.capture_frames(100)
        offline.work_until(100)
        assert offline.answers() == list(range(100))
        assert offline.counts() == (100, 0, 0)

    def standstill(self, rig: Rig) -> int:
        """Work until nothing is asked or in the making; returns how many frames were given so far."""

        def done() -> bool:
            before = len(rig.engine.listened)
            rig.work()
            return len(rig.engine.listened) == before == rig.playback.position // FRAME

        wait_until(done, "a standstill")
        return len(rig.engine.listened)

    def take(self, rig: Rig, count: int) -> list[int]:
        """What playback does: the numbers of the next frames, or of as many as there are."""
        out = np.empty(FRAME, np.float32)
        taken: list[int] = []
        while len(taken) < count and rig.speaker.available >= FRAME:
            assert rig.speaker.read(out) == FRAME
            rig.speaker.consume(FRAME)
            taken.append(number_of(out))
        return taken

    def test_no_answer_overwrites_what_playback_has_not_taken(self, offline: Rig) -> None:
        capacity = offline.playback.capacity // FRAME
        offline.capture_frames(capacity)
        offline.work(2 * capacity)
        self.standstill(offline)
        offline.capture_frames(capacity // 2)
        taken: list[int] = []
        while len(taken) < capacity + capacity // 2:
            given = self.standstill(offline)
            assert given - len(taken) <= capacity
            taken += self.take(offline, 30)
        assert taken == list(range(capacity + capacity // 2))
        ledger = offline.playback.ledger()
        assert (ledger.dropped, offline.speaker.lost) == (0, 0)

    def test_it_goes_on_when_there_is_room_again(self, offline: Rig) -> None:
        capacity = offline.playback.capacity // FRAME
        offline.capture_frames(capacity)
        full = self.standstill(offline)
        # Room is kept for what may be in the making.
        assert capacity - 2 * (UNSAID + AHEAD) <= full < capacity
        assert self.take(offline, 10) == list(range(10))
        assert self.standstill(offline) > full


def test_an_engine_that_does_not_overlap_is_given_one_frame_and_no_thread(folder: RunFolder) -> None:
    with helpers.stage_context(folder, "inference") as (context, hub):
        before = threading.active_count()
        engine = Engine()
        engine.overlaps = False
        rig = Rig(context, hub, engine)
        assert threading.active_count() == before
        rig.capture_frames(3)
        for number in range(3):
            assert rig.stage.work() == (number < 2)
            assert rig.counts() == (number + 1, 0, 2 - number)
        assert engine.most == 1
        assert rig.answers() == [0, 1, 2]


def test_where_frames_were_dropped_there_is_no_step(rig: Rig) -> None:
    """The frames of a rig are constant, each another: only the joint may change, and no faster than a fade does."""
    rig.capture_frames(2)
    rig.work_until(generated=2)
    rig.capture_frames(20)
    rig.work_until(generated=3)
    assert rig.counts()[1] > 0
    out = np.empty(3 * FRAME, np.float32)
    assert RingReader(rig.playback, 0).read(out) == len(out)
    joint = 2 * FRAME
    assert abs(out[joint] - out[joint - 1]) < 1e-4  # of 20 frames dropped it would be 0.02
    assert np.abs(np.diff(out[joint - 1 : joint + FADE])).max() < 5e-4
    # Where none were, what was heard is bit for bit what was given.
    for number in range(2):
        assert (out[number * FRAME : (number + 1) * FRAME] == -frame_of(number)[0]).all()


# What commands ask for


def test_a_paused_stage_answers_what_it_was_given_and_drops_what_comes(rig: Rig) -> None:
    rig.capture_frames(3)
    rig.work()
    given = len(rig.engine.listened)
    assert rig.stage.apply(Pause()) == given
    assert rig.playback.paused
    rig.capture_frames(20)
    rig.work_until(generated=given)
    rig.work(3)
    assert rig.answers() == list(range(given))
    assert rig.counts() == (given, 23 - given, 0)
    assert rig.stage.apply(Resume()) == 23
    assert not rig.playback.paused
    rig.capture_frames(2)
    rig.work_until(generated=given + 2)
    assert rig.answers() == [*range(given), 23, 24]
    assert rig.engine.resets == 0  # it is the same conversation


def test_a_stream_that_ends_while_paused_ends(rig: Rig) -> None:
    rig.stage.apply(Pause())
    rig.capture_frames(5)
    rig.microphone.end()
    rig.work(3)
    assert rig.counts() == (0, 5, 0)
    assert rig.playback.end == 0


def test_bounds_that_are_set_hold_from_then_on(rig: Rig) -> None:
    rig.stage.apply(Set(backlog_limit=20, backlog_target=10))
    rig.engine.hold = True
    rig.capture_frames(20)
    rig.work()
    assert rig.counts()[1] == 0
    rig.engine.let_go()
    assert rig.engine.samplers == []  # nothing of it was set


def test_the_sampler_that_is_set_is_handed_to_the_engine(rig: Rig) -> None:
    rig.stage.apply(Set(text_temperature=0.0, audio_top_p=0.5))
    rig.stage.apply(Set(text_temperature=0.0))
    rig.stage.apply(Set(audio_top_k=9))
    first, second = rig.engine.samplers
    assert (first.text_temperature, first.audio_cut) == (0.0, (None, 0.5, None))
    assert (second.text_temperature, second.audio_cut) == (0.0, (9, None, None))
