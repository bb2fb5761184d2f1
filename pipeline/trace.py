"""The command `trace`: the flight recorder's records as a trace. docs/trace.md tells what its tracks mean."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar, cast

import click
import msgspec

from pipeline import perfetto
from pipeline.client import Client
from pipeline.errors import ConfigError
from pipeline.flight import KEPT_S
from pipeline.messages import (
    CommandRecord,
    Event,
    LogRecord,
    RecordingRecord,
    RunRecord,
    StageRecord,
    StatusReport,
    TextRecord,
    TimingRecord,
    XrunRecord,
)
from pipeline.perfetto import Instant, Sample, Slice, Trace, Value
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import FRAME_MS, FRAME_NS, StageName

STALL_NS: Final = 2 * FRAME_NS
"""No answer for longer than that, while a frame waits, is a stall: one frame's time passes between any two answers."""

_decode: Final = msgspec.json.Decoder(tuple[str, Event]).decode
_Record = TypeVar("_Record", bound=Event)


def command(client: Client, path: Path, *, seconds: float | None, following: bool) -> int:
    """Save the last `seconds` of a run to `path`, or, `following`, the next; returns the exit code.

    Raises ConfigError for what cannot be written or waited for, ControlError if the run is not up. A file that was
    there stays as it is until the trace is complete.
    """
    target = _writable(path)
    _check(seconds, following)
    if following and seconds is not None:
        client.status()
        seconds = _wait(seconds)
    records = client.send("trace", {} if seconds is None else {"seconds": seconds}).records
    history = History([_decode(record)[1] for record in records], client.status())
    _save(target, history.trace().serialize())
    click.echo(f"{path}: {history.summary()}; open it at https://ui.perfetto.dev")
    return 0


def _writable(path: Path) -> Path:
    """Where a file would come to be that is written to `path`; told before anything is waited for."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ConfigError(f"-o {path}: expected a file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"-o {path}: expected a file in a folder that is there and may be written")
    return target


def _check(seconds: float | None, following: bool) -> None:
    if seconds is not None and not math.isfinite(seconds):
        raise ConfigError(f"--seconds {seconds}: expected a number of seconds")
    if following and (seconds is None or seconds > KEPT_S):
        given = "no --seconds" if seconds is None else f"--seconds {seconds:g}"
        raise ConfigError(f"--next with {given}: expected --seconds of at most {KEPT_S}, for which records are kept")


def _wait(seconds: float) -> float:
    """Sleep so long, or until Ctrl-C; returns how long it was."""
    start = time.monotonic()
    click.echo(f"recording {seconds:g} s; Ctrl-C saves what there is", err=True)
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(seconds)
    return time.monotonic() - start


def _save(target: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = target.with_name(f".pipeline-{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        raise ConfigError(f"-o {target}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


class Stall(NamedTuple):
    """A time in which inference answered nothing, though frames waited."""

    start_ns: int
    """The oldest frame that waited was in the ring, and the one before it answered."""
    end_ns: int
    frame: int | None
    """The frame that was then answered; None if it lasts."""
    waiting: int
    """Frames that were waiting by then."""

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / NS_PER_MS


class History:
    """What happened in a run, as its records tell, and what it is now."""

    def __init__(self, events: Sequence[Event], status: StatusReport) -> None:
        self._status = status
        self._events: dict[type[object], list[Event]] = {}
        for event in events:
            self._events.setdefault(type(event), []).append(event)
        self.captured = self._timing("capture")
        self.answered = self._timing("inference")
        self.sent = self._timing("playback")
        self._pauses_ns = self._pauses()
        self.stalls = self._stalls()

    def _of(self, kind: type[_Record], stage: str | None = None) -> list[_Record]:
        """Records of one kind, and of one stage where they have one."""
        found = cast(list[_Record], self._events.get(kind, []))
        return [event for event in found if stage is None or getattr(event, "stage", None) == stage]

    def _timing(self, stage: StageName) -> list[TimingRecord]:
        return sorted(self._of(TimingRecord, stage), key=lambda record: record.end_ns)

    def summary(self) -> str:
        """One line: how much there is, and the longest stall."""
        times = [record.end_ns for record in (*self.captured, *self.answered, *self.sent)]
        seconds = (max(times) - min(times)) / NS_PER_S if times else 0.0
        line = f"{seconds:.1f} s, frames: {len(self.captured)}, stalls: {len(self.stalls)}"
        longest_ms = max((stall.duration_ms for stall in self.stalls), default=0.0)
        return f"{line}, the longest {longest_ms:.0f} ms" if self.stalls else line

    def _stalls(self) -> list[Stall]:
        in_ring = {record.frame: record.end_ns for record in self.captured}
        found, before = [], None
        for answer in self.answered:
            start_ns = self._waited_since(before, answer, in_ring)
            if answer.end_ns - start_ns > STALL_NS:
                found.append(Stall(start_ns, answer.end_ns, answer.frame, answer.queued))
            before = answer
        return found + self._lasting_stall(before, in_ring)

    def _waited_since(self, before: TimingRecord | None, answer: TimingRecord, in_ring: dict[int, int]) -> int:
        """When the oldest frame that was waiting for `answer` or dropped instead could first have been worked on."""
        own_ns = in_ring.get(answer.frame, answer.start_ns)
        if before is None:
            return own_ns
        if not any(before.end_ns <= pause_ns <= answer.end_ns for pause_ns in self._pauses_ns):
            own_ns = in_ring.get(before.frame + 1, own_ns)
        return max(own_ns, before.end_ns)

    def _pauses(self) -> list[int]:
        """When a pause began or ended. In one, frames are dropped and do not wait."""
        said = [record for record in self._of(CommandRecord) if record.verb in {"pause", "resume"}]
        return [record.end_ns for record in said if record.ok]

    def _lasting_stall(self, last: TimingRecord | None, in_ring: dict[int, int]) -> list[Stall]:
        """The one that is going on when the records end."""
        waiting_ns = [end_ns for frame, end_ns in in_ring.items() if last is None or frame > last.frame]
        if not waiting_ns or self._status.paused:
            return []
        start_ns, end_ns = max(min(waiting_ns), last.end_ns if last else 0), max(waiting_ns)
        return [Stall(start_ns, end_ns, None, len(waiting_ns))] if end_ns - start_ns > STALL_NS else []

    def trace(self) -> Trace:
        """The same as tracks."""
        trace = Trace(self._status.time_ns)
        self._draw_run(trace)
        self._draw_capture(trace)
        self._draw_inference(trace)
        self._draw_playback(trace)
        return trace

    def _draw_run(self, trace: Trace) -> None:
        run = trace.process(f"run {self._status.name}", self._status.pid)
        trace.instants(run, "state", [_run_state(record) for record in self._of(RunRecord)])
        trace.slices(run, "commands", [_command(record) for record in self._of(CommandRecord)])
        trace.instants(run, "recording", [_recording(record) for record in self._of(RecordingRecord)])
        trace.instants(run, "log", self._log("supervisor"))

    def _draw_capture(self, trace: Trace) -> None:
        stage = self._begin_stage(trace, "capture")
        trace.slices(stage, "microphone", perfetto.clipped([_heard(record) for record in self.captured]))
        trace.slices(stage, "to the ring", [_handed_on(record) for record in self.captured])
        self._draw_levels(trace, stage, self.captured, lambda record: record.start_ns)
        self._end_stage(trace, stage, "capture")

    def _draw_inference(self, trace: Trace) -> None:
        stage = self._begin_stage(trace, "inference")
        trace.slices(stage, "frames", [_answer(record) for record in self.answered])
        trace.slices(stage, "stalls", [_stall(stall) for stall in self.stalls])
        trace.instants(stage, "late", [_late(record) for record in self.answered if _is_late(record)])
        trace.instants(stage, "words", [_words(record) for record in self._of(TextRecord)])
        trace.counter(stage, "waiting for inference", "ms", self._waiting_for_inference())
        for part in ("encode", "step", "decode"):
            samples = [Sample(record.start_ns, getattr(record, f"{part}_ms")) for record in self.answered]
            trace.counter(stage, part, "ms", samples)
        self._end_stage(trace, stage, "inference")

    def _waiting_for_inference(self) -> list[Sample]:
        """By inference's own records and, while it stands still, by capture's."""
        by_capture = [_waiting(record, record.end_ns) for record in self.captured]
        return by_capture + [_waiting(record, record.start_ns) for record in self.answered]

    def _draw_playback(self, trace: Trace) -> None:
        stage = self._begin_stage(trace, "playback")
        trace.slices(stage, "to the speaker", [_played(record) for record in self.sent])
        trace.slices(stage, "speaker", perfetto.clipped([_said(record) for record in self.sent]))
        trace.counter(stage, "waiting for playback", "ms", [_waiting(record, record.start_ns) for record in self.sent])
        for key, name in (("mic_to_speaker_ms", "microphone to speaker"), ("prebuffer_ms", "prebuffer")):
            trace.counter(stage, name, "ms", [Sample(record.end_ns, getattr(record, key)) for record in self.sent])
        self._draw_levels(trace, stage, self.sent, lambda record: record.end_ns)
        self._end_stage(trace, stage, "playback")

    def _begin_stage(self, trace: Trace, stage: StageName) -> int:
        process = trace.process(stage, self._status.stages[stage].pid)
        states = [
            Instant(record.state, record.time_ns, {"detail": record.detail}) for record in self._of(StageRecord, stage)
        ]
        trace.instants(process, "state", states)
        return process

    def _end_stage(self, trace: Trace, process: int, stage: StageName) -> None:
        losses = [
            Instant(record.kind, record.time_ns, {"count": record.count}) for record in self._of(XrunRecord, stage)
        ]
        trace.instants(process, "losses", losses)
        trace.instants(process, "log", self._log(stage))

    def _log(self, stage: str) -> list[Instant]:
        return [Instant(record.message, record.time_ns, category=record.level) for record in self._of(LogRecord, stage)]

    def _draw_levels(
        self, trace: Trace, process: int, records: list[TimingRecord], time_of: Callable[[TimingRecord], int]
    ) -> None:
        for key, name in (("level_dbfs", "level"), ("peak_dbfs", "peak")):
            trace.counter(process, name, "dBFS", [Sample(time_of(one), getattr(one, key)) for one in records])


def _waiting(record: TimingRecord, time_ns: int) -> Sample:
    return Sample(time_ns, record.queued * FRAME_MS)


def _frame(record: TimingRecord, start_ns: int, end_ns: int, **values: Value) -> Slice:
    """A frame's slice of a track, on its way from the microphone to the speaker."""
    return Slice(
        f"frame {record.frame}",
        start_ns,
        max(start_ns, end_ns),
        {"frame": record.frame, **values},
        flow=record.frame,
    )


def _heard(record: TimingRecord) -> Slice:
    return _frame(record, record.start_ns, record.start_ns + FRAME_NS)


def _handed_on(record: TimingRecord) -> Slice:
    return _frame(record, record.start_ns + FRAME_NS, record.end_ns, queued=record.queued)


def _answer(record: TimingRecord) -> Slice:
    keys = ("queued", "encode_ms", "step_ms", "decode_ms", "context", "context_size")
    return _frame(record, record.start_ns, record.end_ns, **{key: getattr(record, key) for key in keys})


def _played(record: TimingRecord) -> Slice:
    return _frame(record, record.start_ns, record.end_ns, queued=record.queued)


def _said(record: TimingRecord) -> Slice:
    return _frame(record, record.end_ns, record.end_ns + FRAME_NS, mic_to_speaker_ms=record.mic_to_speaker_ms)


def _is_late(record: TimingRecord) -> bool:
    return record.end_ns - record.start_ns > FRAME_NS


def _late(record: TimingRecord) -> Instant:
    took_ms = (record.end_ns - record.start_ns) / NS_PER_MS
    return Instant(f"frame {record.frame}", record.end_ns, {"frame": record.frame, "took_ms": took_ms})


def _words(record: TextRecord) -> Instant:
    return Instant(record.text, record.time_ns, {"frame": record.frame})


def _stall(stall: Stall) -> Slice:
    answered = {} if stall.frame is None else {"answered_frame": stall.frame}
    return Slice("stall", stall.start_ns, stall.end_ns, {"waiting": stall.waiting, **answered})


def _run_state(record: RunRecord) -> Instant:
    words = [record.state, "muted" if record.muted else "", "paused" if record.paused else ""]
    return Instant(", ".join(filter(None, words)), record.time_ns)


def _command(record: CommandRecord) -> Slice:
    values: dict[str, Value] = {key: str(value) for key, value in record.values.items()}
    if record.error:
        values["error"] = record.error
    values |= {f"{effect.stage}_from_frame": effect.frame for effect in record.effects}
    return Slice(record.verb, record.start_ns, record.end_ns, {"ok": record.ok, **values})


def _recording(record: RecordingRecord) -> Instant:
    keys = ("path", "transcript", "frame", "seconds", "lost", "error")
    name = "recording begins" if record.on else "recording ends"
    return Instant(name, record.time_ns, {key: getattr(record, key) for key in keys})
