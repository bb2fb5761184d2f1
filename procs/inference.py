"""The inference stage: each frame of the capture ring through the engine, and its answer into the playback ring."""

import numpy as np

from pipeline import checkpoints, worker
from pipeline.audio import make_fit
from pipeline.control import HasFileno
from pipeline.messages import AnyCommand, Finished, Reset, TextRecord, TimingRecord, XrunRecord
from pipeline.ring import Consumer, RingWriter
from pipeline.timing import now_ns, promote_thread
from pipeline.topology import FRAME
from pipeline.worker import Context
from procs.engines import Echo, Engine


class Inference:
    """Owns the model. Opens no audio device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bell = context.bell
        self._capture = context.rings["capture"]
        self._source = Consumer(self._capture)
        self._writer = RingWriter(context.rings["playback"])
        self._frame = np.zeros(FRAME, np.float32)
        make_fit(self._frame)  # the first time takes milliseconds; the first frame need not wait for it
        self._engine: Engine = Echo()
        self._ended = False
        self._pass_over_answered()

    def _pass_over_answered(self) -> None:
        """A predecessor that was killed between its answer and its count: the frame is not answered twice."""
        playback = self._writer.ring
        last = playback.mark(playback.mark_count - 1)
        if last is not None and last.frame * FRAME == self._source.position and self._source.available >= FRAME:
            self._source.position += FRAME
            self._source.consume(FRAME)

    def open(self) -> str:
        config = self._context.config
        if config.engine == "echo":
            detail = "echo"
        else:
            checkpoint = checkpoints.find(config.model, config.quality)
            # Only here: echo runs where mlx is not installed, and capture and playback never see it.
            from procs.model import Moshi

            sampler = config.sampler
            self._engine = Moshi(
                checkpoint,
                seed=sampler.seed,
                text_temperature=sampler.text_temperature,
                text_top_k=sampler.text_top_k,
                audio_temperature=sampler.audio_temperature,
                audio_top_k=sampler.audio_top_k,
            )
            detail = f"{checkpoint.model_file.parent} {checkpoint.quality}"
        self._engine.load()
        return detail

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
        source = self._source
        self._shed()
        if source.available >= FRAME:
            self._step()
            return source.available >= FRAME or source.ended
        if source.ended and not self._ended:
            self._ended = True
            self._writer.end()
            self._context.report(Finished(stage="inference"))
        return False

    def _shed(self) -> None:
        """Drop the oldest of a backlog over the limit, in whole frames."""
        source, bounds = self._source, self._context.config.inference
        # After an overwrite the reader may stand within a frame: go on at the start of one.
        source.skip(-source.position % FRAME)
        backlog = source.available // FRAME
        if backlog <= bounds.backlog_limit:
            return
        dropped = backlog - bounds.backlog_target
        source.skip(dropped * FRAME)
        self._context.report(XrunRecord(stage="inference", kind="dropped", count=dropped, time_ns=now_ns()))

    def _step(self) -> None:
        source, frame = self._source, self._frame
        queued = source.available // FRAME
        start_ns = now_ns()
        count = source.read(frame)
        if count < FRAME or source.position % FRAME:
            # The writer overtook the copy. What came of it is no whole frame.
            source.drop(count)
            return
        number = source.position // FRAME - 1
        mark = self._capture.mark(number)
        step = self._engine.step(frame)
        cleaned = make_fit(step.audio)
        if cleaned:
            self._writer.count("cleaned", cleaned)
        end_ns = now_ns()
        captured_ns = mark.captured_ns if mark is not None else start_ns
        self._writer.mark(self._writer.position, number, captured_ns, start_ns, end_ns)
        self._writer.write(step.audio)
        source.consume(FRAME)
        report = self._context.report
        report(
            TimingRecord(
                stage="inference",
                frame=number,
                start_ns=start_ns,
                end_ns=end_ns,
                queued=queued,
                encode_ms=step.encode_ms,
                step_ms=step.step_ms,
                decode_ms=step.decode_ms,
            )
        )
        if step.new_conversation:
            self._context.log("info", f"a new conversation begins with frame {number}")
        if step.text:
            report(TextRecord(frame=number, text=step.text, time_ns=end_ns))

    def finish(self) -> None:
        """Only capture ends a stream; the end reaches this stage through the ring."""

    def apply(self, command: AnyCommand) -> int:
        if isinstance(command, Reset):
            self._engine.reset()
        return self._source.position // FRAME

    def stop(self) -> None:
        """The model goes with the process."""


if __name__ == "__main__":
    worker.main("inference", Inference)
