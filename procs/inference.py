"""The inference stage: each frame of the capture ring through the engine, and its answer into the playback ring."""

import queue
import threading
from collections import deque
from typing import Final, NamedTuple

import numpy as np

from pipeline import apple, messages, worker
from pipeline.audio import FADE, falling, level, make_fit, rising
from pipeline.bell import Bell
from pipeline.config import Config
from pipeline.control import HasFileno
from pipeline.messages import (
    AnyCommand,
    Finished,
    Pause,
    Reset,
    Resume,
    Set,
    TextRecord,
    TimingRecord,
    XrunRecord,
)
from pipeline.ring import Consumer, Ring, RingReader, RingWriter
from pipeline.timing import now_ns, promote_thread
from pipeline.topology import FRAME
from pipeline.worker import Context
from procs.engines import Answer, Echo, Engine, Paced, Step

AHEAD: Final = 2
"""Frames that an engine which overlaps is given at a time: the one whose turn it is, and the next, if it is there."""

UNSAID: Final = 2
"""Answers whose sound may be in the making, besides the one that is waited for, while the next frame is begun."""

_STOP_S: Final = 0.2
"""How long an answer that is being written may hold up the end."""


class Question(NamedTuple):
    """A frame that was given to the engine."""

    number: int
    captured_ns: int
    start_ns: int
    queued: int
    """Frames that were waiting when it was taken, itself included."""


class Written(NamedTuple):
    """An answer that is in the playback ring."""

    question: Question
    step: Step
    end_ns: int


class Answers:
    """Writes answers into the playback ring, in order, each when its sound is there.

    With a thread of its own the next frame need not wait for that; without, it is done at once. Counts and reports
    are left to the stage's own thread, which finds what was written in `written`.
    """

    def __init__(self, ring: Ring, bell: Bell) -> None:
        """`bell` is rung for each answer that the thread has written."""
        self.written: deque[Written] = deque()
        self._writer = RingWriter(ring)
        self._bell = bell
        self._unsaid: queue.Queue[tuple[Question, Answer] | None] = queue.Queue(UNSAID)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def start_thread(self) -> None:
        """From now on write in a thread."""
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def pause(self, paused: bool) -> None:
        """Tell playback that the silence that follows is meant, or that it is over."""
        self._writer.pause(paused)

    @property
    def room(self) -> int:
        """Samples that may be written now and overwrite none that playback has not taken."""
        return self._writer.room

    def put(self, question: Question, answer: Answer) -> None:
        """Hand over an answer; waits while UNSAID earlier ones are not written."""
        if self._thread is None:
            self._write(question, answer)
        else:
            self._unsaid.put((question, answer))
            self.check()

    def end(self) -> None:
        """Wait until all is written, and end the stream."""
        if self._thread is not None:
            self._unsaid.put(None)
            self._thread.join()
        self.check()
        self._writer.end()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if isinstance(self._failure, Exception):
            raise self._failure
        if self._failure is not None:  # a panic of rustymimi's, say, which is no Exception
            raise RuntimeError(f"{type(self._failure).__name__}: {self._failure}")

    def stop(self) -> None:
        """Write nothing more: the rings are about to go."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        apple.raise_thread()
        while (item := self._unsaid.get()) is not None:
            if self._failure is not None:
                continue  # whoever waits for room is to come by and see
            try:
                self._write(*item)
            except BaseException as error:
                self._failure = error
            if self._stopped:
                return
            self._bell.ring()

    def _write(self, question: Question, answer: Answer) -> None:
        step = answer.result()
        if self._stopped:
            return
        if cleaned := make_fit(step.audio):
            self._writer.count("cleaned", cleaned)
        end_ns = now_ns()
        self._writer.mark(self._writer.position, question.number, question.captured_ns, question.start_ns, end_ns)
        self._writer.write(step.audio)
        self.written.append(Written(question, step, end_ns))


class Inference:
    """Owns the model. Opens no audio device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config = context.config
        self.detail = ""
        self._bell = context.bell
        self._capture, self._playback = context.rings["capture"], context.rings["playback"]
        self._counts = Consumer(self._capture)
        self._frame = np.zeros(FRAME, np.float32)
        make_fit(self._frame)  # the first time takes milliseconds; the first frame need not wait for it
        self._engine: Engine = Echo()
        self._asked: deque[Question] = deque()
        self._ended = False
        self._paused = False
        self._cut = False
        self._before = np.zeros(FADE + 1, np.float32)
        self._rise, self._fall = rising(), falling()
        self._pass_over_answered()
        # Frames are counted when they are answered, in order; the reader is that much ahead.
        self._reader = RingReader(self._capture, self._counts.position)
        self._answers = Answers(self._playback, self._bell)
        self._warm = apple.KeepWarm(now_ns())

    def _pass_over_answered(self) -> None:
        """A predecessor that was killed between its answers and its count: no frame is answered twice.

        Where it had dropped some behind what it had not yet answered, as many as it had answered are answered anew.
        """
        # Not the last mark: that may announce an answer which was never written.
        last = self._playback.mark(self._playback.position // FRAME - 1)
        if last is None:
            return
        answered = (last.frame + 1) * FRAME - self._counts.position
        if 0 < answered <= self._counts.available:
            self._count_answered(answered)

    def _count_answered(self, count: int) -> None:
        self._counts.position += count
        self._counts.consume(count)

    def open(self) -> None:
        apple.raise_thread()
        config = self._context.config
        self.detail = "echo" if config.engine == "echo" else self._open_moshi(config)
        if config.faults.step_ms or config.faults.jitter_ms:
            self._engine = Paced(self._engine, config.faults)
        if self._engine.overlaps:
            self._answers.start_thread()

    def _open_moshi(self, config: Config) -> str:
        # Only here: echo runs where mlx is not installed, and capture and playback never see it.
        from pipeline import checkpoints
        from procs.model import Moshi, sampling_of

        checkpoint = checkpoints.find(config.model, config.quality)
        sampler, sampling = config.sampler, sampling_of(config.sampler)
        codec = None if config.inference.codec == "auto" else config.inference.codec
        engine = Moshi(checkpoint, seed=sampler.seed, sampling=sampling, codec=codec)
        engine.load()
        self._engine = engine
        loaded = engine.loaded
        self._context.log(
            "info",
            f"loaded in {loaded.load_ms / 1e3:.1f} s, warm after {loaded.warm_up_ms / 1e3:.1f} s more, "
            f"the first frame took {loaded.first_frame_ms:.0f} ms; codec {engine.codec.name}",
        )
        return f"{checkpoint.model_file.parent} {checkpoint.quality}"

    def start(self) -> None:
        """Frames arrive by themselves."""
        if isinstance(self._engine, Echo):
            promote_thread()  # it only copies; an engine that computes would keep all others from the processor

    def device_latency_ms(self) -> float:
        return 0.0  # no device is opened here

    def wakes(self) -> HasFileno | None:
        return self._bell

    def work(self) -> bool:
        self._bell.clear()
        self._settle()
        self._answers.check()
        turn_ns = now_ns()
        self._shed()
        self._listen()
        if self._asked:
            question = self._asked.popleft()
            # One that was given ahead of its turn waited until now.
            question = question._replace(start_ns=max(question.start_ns, turn_ns))
            self._answers.put(question, self._engine.respond())
            self._settle()
            return bool(self._asked) or self._reader.available >= FRAME or self._reader.ended
        if self._reader.ended and not self._ended:
            self._ended = True
            self._answers.end()
            self._settle()
            self._context.report(Finished(stage="inference"))
        if self._warm.is_due(now_ns()):
            self._engine.keep_warm()
        return False

    def _shed(self) -> None:
        """Drop the oldest of a backlog over the limit, in whole frames; offline the input waits instead."""
        reader, bounds = self._reader, self._config.inference
        # After an overwrite the reader may stand within a frame: go on at the start of one.
        self._drop(-reader.position % FRAME)
        backlog = reader.available // FRAME
        if self._config.offline:
            return
        if self._paused:
            self._drop(backlog * FRAME)
            return
        if backlog <= bounds.backlog_limit:
            return
        # Where those begin that are kept: at the quietest place, on a par the earliest.
        dropped = min(
            range(backlog - bounds.backlog_target, backlog),
            key=lambda count: self._level_around(reader.position + count * FRAME),
        )
        self._drop(dropped * FRAME)
        self._context.report(XrunRecord(stage="inference", kind="dropped", count=dropped, time_ns=now_ns()))

    def _level_around(self, position: int) -> float:
        """Of the 10 ms before a position, and of those after it."""
        around = np.zeros(2 * FADE, np.float32)
        RingReader(self._capture, position - FADE).read(around)
        mean, _ = level(around)
        return mean

    def _drop(self, count: int) -> None:
        """Pass over samples that are not read."""
        if count:
            self._reader.position += count
            self._count_dropped(count)

    def _count_dropped(self, count: int) -> None:
        self._counts.position += count
        self._counts.drop(count)
        self._cut = True

    def _listen(self) -> None:
        """Give the engine what it may be given at a time."""
        most = 0 if self._paused else AHEAD if self._engine.overlaps else 1
        while len(self._asked) < most and self._reader.available >= FRAME and self._has_room():
            self._take()

    def _has_room(self) -> bool:
        """Offline: whether all that is asked can be answered without overwriting what playback has not taken."""
        if not self._config.offline:
            return True
        asked = len(self._asked) + UNSAID + AHEAD
        return self._answers.room > asked * FRAME

    def _take(self) -> None:
        reader, start_ns = self._reader, now_ns()
        queued = reader.available // FRAME
        count = reader.read(self._frame)
        if reader.lost:
            self._count_dropped(reader.lost)
            reader.lost = 0
        if count < FRAME or reader.position % FRAME:
            # The writer overtook the copy. What came of it is no whole frame.
            self._count_dropped(count)
            return
        self._join()
        number = reader.position // FRAME - 1
        mark = self._capture.mark(number)
        self._asked.append(Question(number, mark.captured_ns if mark is not None else start_ns, start_ns, queued))
        self._engine.listen(self._frame)

    def _join(self) -> None:
        """Leave no step where frames were dropped: on from what came before, backwards, and over into the frame."""
        frame = self._frame
        if self._cut:
            frame[:FADE] *= self._rise
            frame[:FADE] += self._before[-2::-1] * self._fall
            self._cut = False
        self._before[:] = frame[-FADE - 1 :]

    def _settle(self) -> None:
        """Count and report the answers that are written."""
        report, written = self._context.report, self._answers.written
        while written:
            question, step, end_ns = written.popleft()
            self._count_answered(FRAME)
            self._warm.on_frame(end_ns)
            report(
                TimingRecord(
                    stage="inference",
                    frame=question.number,
                    start_ns=question.start_ns,
                    end_ns=end_ns,
                    queued=question.queued,
                    encode_ms=step.encode_ms,
                    step_ms=step.step_ms,
                    decode_ms=step.decode_ms,
                    context=step.context,
                    context_size=step.context_size,
                )
            )
            if step.new_conversation:
                self._context.log("info", f"a new conversation begins with frame {question.number}")
            if step.text:
                report(TextRecord(frame=question.number, text=step.text, time_ns=end_ns))

    def finish(self) -> None:
        """Only capture ends a stream; the end reaches this stage through the ring."""

    def apply(self, command: AnyCommand) -> int:
        match command:
            case Pause() | Resume():
                self._paused = isinstance(command, Pause)
                self._answers.pause(self._paused)
            case Reset():
                self._reset()
            case Set():
                self._set(command)
                if self._asked:  # given to the engine, and not drawn yet
                    return self._asked[0].number
        return self._reader.position // FRAME

    def _reset(self) -> None:
        self._engine.reset()
        if self._asked:
            # What the engine was given and has not answered belongs to the new conversation.
            self._reader.position = self._asked[0].number * FRAME
            self._asked.clear()

    def _set(self, command: Set) -> None:
        before = self._config.sampler
        self._config = messages.changed(self._config, command)
        if self._config.sampler != before:
            self._engine.draw_by(self._config.sampler)

    def stop(self) -> None:
        """The model goes with the process."""
        self._answers.stop()


if __name__ == "__main__":
    worker.main("inference", Inference)
