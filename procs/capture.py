"""The capture stage: microphone samples, made fit for the codec, into the capture ring. Nothing else."""

from pipeline import apple, worker
from pipeline.audio import FADE, falling, level, make_fit, rising
from pipeline.control import HasFileno
from pipeline.errors import DeviceError
from pipeline.messages import AnyCommand, Finished, Input, Mute, TimingRecord, Unmute, XrunRecord, dbfs
from pipeline.ring import Anchor, RingReader, RingWriter, Samples
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import FRAME, SAMPLE_RATE
from pipeline.worker import Context
from procs import devices
from procs.recovery import Held


class Capture:
    """Owns the input device. `on_block` runs in the device's thread, everything else in the main one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ring = context.rings["capture"]
        self._writer = RingWriter(self._ring)
        self._bell = context.bell
        self._held = Held(context, "input", self._open_present, self._begin_anew)
        self._rise = rising()
        self._fading = devices.silence(FADE)
        self._joined = FADE
        make_fit(devices.silence(FRAME))  # the first time takes milliseconds
        self._muted = False
        self._microphone = apple.MicrophoneWatch(context.config.capture.input)
        self._captured_ns = 0
        self._block = 0
        self._input_ended = False
        self._finished = False
        self._next_mark = self._ring.mark_count
        self._xruns = self._ring.ledger().xruns
        self._spec = context.config.capture.input
        self._origin = context.config.capture.origin
        self._frame = devices.silence(FRAME)

    @property
    def detail(self) -> str:
        return self._held.detail

    def open(self) -> None:
        if self._context.config.offline:
            self._held.device = devices.open_source(
                self._spec, on_block=self.on_block, on_end=self._on_end, has_room=self._has_room
            )
        else:
            self._held.open(self._spec, wait=self._writer.position > 0)

    def _open_present(self) -> devices.Device:
        device = self._open(self._spec, self._origin)
        self._spec = devices.by_name(self._spec, device)
        return device

    def _open(self, spec: str, origin: int) -> devices.Device:
        """Open an input that was first taken at position `origin`."""
        config = self._context.config.capture
        return devices.open_input(
            spec,
            block=worker.samples_of(config.block_ms),
            latency_ms=config.latency_ms,
            resume_at=max(0, self._writer.position - origin),
            skew_ppm=self._context.config.faults.input_ppm,
            on_block=self.on_block,
            on_end=self._on_end,
        )

    def _has_room(self) -> bool:
        """Offline: whether inference will neither drop one more frame nor lose it."""
        frames = self._context.config.inference.backlog_limit
        return self._writer.waiting < frames * FRAME and self._writer.room > FRAME

    def _begin_anew(self) -> None:
        """Go on, as a successor would, where a device was lost: from its last sample into the first, with no step."""
        recent = devices.silence(FADE + 1)
        there = min(self._ring.position, len(recent))
        RingReader(self._ring, self._ring.position - there).read(recent[len(recent) - there :])
        self._fading = recent[-2::-1] * falling()
        self._joined = 0
        self._captured_ns = 0
        self._writer = RingWriter(self._ring)

    def start(self) -> None:
        self._held.start()

    def device_latency_ms(self) -> float:
        return self._held.device.latency_ms

    def wakes(self) -> HasFileno | None:
        return None

    def on_block(self, samples: Samples, adc_ns: int, xrun: bool) -> None:
        """Take one block, shape (n,), from the device; its first sample was converted at `adc_ns`."""
        writer = self._writer
        cleaned = make_fit(samples)
        if cleaned:
            writer.count("cleaned", cleaned)
        if xrun:
            writer.count("xruns")
        self._microphone.take(samples)
        if self._joined < FADE:
            self._join(samples)
        if self._muted:
            samples.fill(0)
        writer.anchor(writer.position, adc_ns)
        start, count = 0, len(samples)
        self._block = count
        while start < count:
            position = writer.position
            into = position % FRAME
            if into == 0 or not self._captured_ns:
                self._captured_ns = adc_ns + (start - into) * NS_PER_S // SAMPLE_RATE
            stop = min(count, start + FRAME - into)
            completes = into + stop - start == FRAME
            if completes:
                frame = position // FRAME
                writer.mark(position - into, frame, self._captured_ns, self._captured_ns, now_ns())
            writer.write(samples[start:stop])
            if completes:
                self._bell.ring()
            start = stop

    def _join(self, samples: Samples) -> None:
        """Fade in, over the last samples of the device that was lost, backwards: the codec hears no click."""
        at = slice(self._joined, self._joined + len(samples))
        rise = self._rise[at]
        samples[: len(rise)] *= rise
        samples[: len(rise)] += self._fading[at]
        self._joined += len(rise)

    def _on_end(self) -> None:
        """The device has no more, and says so in its own thread, at once: the last frame is not to be late."""
        self._seal()
        self._input_ended = True

    def work(self) -> bool:
        """Report what was captured since the last look, and the end."""
        if not self._finished and (failure := self._held.failure()):
            # A damaged file will not get better: what was read of it is answered.
            self._context.log("error", str(failure))
            self.finish()
        if self._microphone.warns():
            self._context.log("warning", apple.MICROPHONE_ADVICE)
        ledger = self._ring.ledger()
        if not self._context.config.offline:  # a file that nothing paces is neither late nor in time
            self._report_frames(ledger.waiting // FRAME)
        if ledger.xruns != self._xruns:
            count, self._xruns = ledger.xruns - self._xruns, ledger.xruns
            self._context.report(XrunRecord(stage="capture", kind="xrun", count=count, time_ns=now_ns()))
        if self._input_ended and not self._finished:
            self.finish()
        return False

    def _report_frames(self, queued: int) -> None:
        while (mark := self._ring.mark(self._next_mark)) is not None:
            if mark.position + FRAME > self._ring.position:
                return  # announced, and its last samples are just being written
            self._next_mark += 1
            RingReader(self._ring, mark.position).read(self._frame)
            mean, peak = level(self._frame)
            self._context.report(
                TimingRecord(
                    stage="capture",
                    frame=mark.frame,
                    start_ns=mark.start_ns,
                    end_ns=mark.end_ns,
                    queued=queued,
                    level_dbfs=dbfs(mean),
                    peak_dbfs=dbfs(peak),
                )
            )
        self._next_mark = max(self._next_mark, self._ring.mark_count - self._ring.mark_capacity + 1)

    def finish(self) -> None:
        """End the stream, its last frame filled up with silence."""
        if self._finished:
            return
        self._finished = True
        self._held.close()
        if not self._input_ended:
            self._seal()
        self._context.report(Finished(stage="capture"))

    def _seal(self) -> None:
        missing = -self._writer.position % FRAME
        if missing:
            last = self._ring.anchor or Anchor(self._writer.position, now_ns())
            since = self._writer.position - last.position
            self.on_block(devices.silence(missing), last.time_ns + since * NS_PER_S // SAMPLE_RATE, xrun=False)
        self._writer.end()
        self._bell.ring()

    def apply(self, command: AnyCommand) -> int:
        match command:
            case Mute() | Unmute():
                self._muted = isinstance(command, Mute)
            case Input(spec=spec):
                self._switch(spec)
        # The block that is being taken at this moment may have been let through.
        return -(-(self._writer.position + self._block) // FRAME)

    def _switch(self, spec: str) -> None:
        """Take another input; where it cannot be opened or started, the present one stays or is opened again."""
        held, origin = self._held, self._writer.position
        device = held.open_other(spec, lambda: self._open(spec, origin))
        held.let_go()
        try:
            if self._finished or self._input_ended:
                raise DeviceError(f"input {spec!r}: the input has ended, and the run with it")
            device.start()
        except DeviceError as error:
            device.stop()
            if not (self._finished or self._input_ended):
                held.take_back(error)
            raise DeviceError(str(error)) from None
        held.take(device)
        self._spec, self._origin = devices.by_name(spec, device), origin
        self._microphone = apple.MicrophoneWatch(spec)

    def stop(self) -> None:
        self._held.close()


if __name__ == "__main__":
    worker.main("capture", Capture)
