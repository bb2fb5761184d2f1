"""What a monitor knows of a run: fed with events, asked for figures. No terminal, no socket, no clock of its own."""

from collections import deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from msgspec import Struct

from pipeline.messages import (
    SILENCE_DBFS,
    Accounting,
    CommandRecord,
    Event,
    LogRecord,
    OverloadRecord,
    RecordingRecord,
    RunRecord,
    Spread,
    StageRecord,
    StageSpread,
    StageState,
    StatusRecord,
    StatusReport,
    TextRecord,
    TimingRecord,
    XrunRecord,
    Xruns,
)
from pipeline.topology import FRAME_MS, SAMPLE_RATE, StageName

if TYPE_CHECKING:
    from pipeline.timing import Durations

STAGES: Final[tuple[StageName, ...]] = ("capture", "inference", "playback")
COLUMN_S: Final = 2
"""What a column of the timeline stands for."""

SILENT_S: Final = 0.5
"""A running stage that has told of no frame for so long is worth a word."""

_NOW_S: Final = 2.0
"""What figures of now are the mean of."""

_COLUMNS: Final = 300
_RECORDS: Final = 64
_FRAMES: Final = 512
_TRANSCRIPT: Final = 4_000
_JOURNAL: Final = 100
_NS_PER_MS: Final = 1_000_000
_NS_PER_S: Final = 1_000_000_000
_COLUMN_NS: Final = COLUMN_S * _NS_PER_S

Link = Literal["waiting", "up", "ended"]
Since = Literal["run", "clear"]
EntryKind = Literal["state", "command", "refused", "xrun", "info", "warning", "error"]


class StageFigures(Struct, kw_only=True):
    """One stage, as its row shows it. None where the stage has no such figure, or none of the last two seconds."""

    state: StageState | None
    pid: int | None
    restarts: int
    wait_ms: float | None
    """Inference: from being in the ring until the work began. Playback: until its first sample reaches the speaker."""
    busy_ms: float | None
    """Capture: from a frame's last sample at the converter until it was in the ring. Inference: the work on it."""
    load: float | None
    """busy_ms as a share of the budget: 1 is all of it."""
    spread: Spread
    """Of what the stage's `timing` in the status tells."""
    late: int | None
    """Frames that inference took longer for than the budget."""
    xruns: int | None
    silent_s: float | None
    """Since the last frame that the stage told of."""
    cpu_percent: float | None
    """Of one core, over the last second or so."""
    memory_mb: float
    level_dbfs: float | None
    peak_dbfs: float | None


class Entry(Struct, kw_only=True):
    """Something that happened, once or several times in a row."""

    time_ns: int
    """When it did last."""
    kind: EntryKind
    text: str
    count: int = 1


class Figures(Struct, kw_only=True):
    """What `pipeline monitor --json` prints, a line an interval."""

    schema: int = 1
    time_ns: int
    """Now, on the monotonic clock."""
    name: str
    link: Link
    """`waiting`: the run was not up yet. `ended`: it was, and what follows is its last."""
    age_s: float | None
    """Since the last word of the run."""
    since: Since
    """What spreads and counts are of: the whole `run`, or since the last `clear` in this view."""
    since_s: float
    """How long that is."""
    stages: dict[StageName, StageFigures]
    mic_to_speaker_ms: float | None
    mic_to_speaker: Spread
    encode_ms: float | None
    step_ms: float | None
    decode_ms: float | None
    """The parts of inference's work."""
    context: int
    context_size: int
    """Positions that the model's attention sees, and the most that it can see."""
    ring_in_ms: float
    """Waiting for inference in the capture ring."""
    ring_in_limit_ms: float
    """More than this is dropped."""
    ring_out_ms: float
    """Waiting for the speaker in the playback ring."""
    ring_out_limit_ms: float
    """More than this is skipped."""
    concealed_ms: float
    dropped_ms: float
    skipped_ms: float
    gaps: int
    cleaned: int
    drift_ppm: float | None
    overload: str
    """That the model is too slow for real time, and what helps; empty where it is not."""
    muted: bool
    paused: bool
    recording: str | None
    misunderstood: int
    """Events that are of another version of the program."""
    transcript: str
    """The end of it."""
    journal: list[Entry]
    """The last xruns, commands, log lines and changes of state, oldest first."""
    status: StatusReport | None
    """The last that the run published."""


class _Marks(NamedTuple):
    """Where the counts stood when they were cleared."""

    time_ns: int
    accounting: Accounting
    xruns: Xruns
    durations: "dict[str, Durations]"


class Model:
    """The run called `name`, as events tell of it. Times are monotonic ns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: Link = "waiting"
        self.last_ns: int | None = None
        """When the run was last heard of."""
        self.misunderstood = 0
        self.overload = ""
        self._forget()

    def _forget(self) -> None:
        self.status: StatusReport | None = None
        self.muted = False
        self.paused = False
        self.recording: str | None = None
        self.transcript = ""
        self.columns: deque[tuple[int, float]] = deque(maxlen=_COLUMNS)
        """The timeline: the number of each column, time over COLUMN_S, and the longest work on a frame in it, in ms."""
        self.silences: deque[int] = deque(maxlen=_COLUMNS)
        """The columns in which inference ended no frame for SILENT_S or longer."""
        self.journal: deque[Entry] = deque(maxlen=_JOURNAL)
        self._pid: int | None = None
        self._states: dict[StageName, StageState] = {}
        self._records: dict[StageName, deque[TimingRecord]] = {stage: deque(maxlen=_RECORDS) for stage in STAGES}
        self._captured_ns: dict[int, int] = {}
        self._before: StatusReport | None = None
        self._marks: _Marks | None = None

    def take(self, event: Event, now_ns: int) -> None:
        """Learn from an event that came at `now_ns`. The first of another run of the name begins everything anew."""
        self.last_ns = now_ns
        # What comes after a run's end is what was still under way.
        if self.link != "ended" or isinstance(event, StatusRecord | RunRecord):
            self.link = "up"
        match event:
            case StatusRecord(status=status):
                self._take_status(status)
            case RunRecord():
                self._take_run(event)
            case StageRecord():
                self._take_state(event)
            case TimingRecord():
                self._take_timing(event)
            case TextRecord(text=text):
                self._say(text)
            case LogRecord(stage=stage, level=level, message=message, time_ns=time_ns):
                self._write(time_ns, level, f"{stage}: {message}")
            case XrunRecord(stage=stage, kind=kind, count=count, time_ns=time_ns):
                self._write(time_ns, "xrun", f"{stage}: {kind}", count)
            case CommandRecord():
                self._write(event.end_ns, "command" if event.ok else "refused", _answer(event))
            case OverloadRecord():
                self.overload = _overload(event) if event.on else ""
            case RecordingRecord():
                self.recording = event.path if event.on else None
                self._write(event.time_ns, "error" if event.error else "state", _recording(event))

    def end(self) -> None:
        """The run is no longer there."""
        if self.link == "up":
            self.link = "ended"

    def clear(self, now_ns: int) -> None:
        """Let this view's spreads and counts begin at `now_ns`."""
        from pipeline.timing import Durations  # takes 60 ms, which who never clears need not wait for

        counts = self.status.accounting if self.status else Accounting()
        xruns = self.status.xruns if self.status else Xruns()
        self._marks = _Marks(now_ns, counts, xruns, {what: Durations() for what in (*STAGES, "mic_to_speaker")})

    def _say(self, text: str) -> None:
        # Cut seldom and not at each word, so that lines that are broken anew stay as they were.
        self.transcript += text
        if len(self.transcript) > 2 * _TRANSCRIPT:
            self.transcript = self.transcript[-_TRANSCRIPT:]

    def _write(self, time_ns: int, kind: EntryKind, text: str, count: int = 1) -> None:
        last = self.journal[-1] if self.journal else None
        if last is not None and (last.kind, last.text) == (kind, text):
            last.time_ns, last.count = time_ns, last.count + count
        else:
            self.journal.append(Entry(time_ns=time_ns, kind=kind, text=text, count=count))

    def _meet(self, pid: int) -> None:
        """Begin anew if it is another run's."""
        if self._pid not in (None, pid):
            self._forget()
        self._pid = pid

    def _take_status(self, status: StatusReport) -> None:
        self._meet(status.pid)
        self._before, self.status = self.status, status
        self.muted, self.paused, self.recording = status.muted, status.paused, status.recording
        self._states |= {name: stage.state for name, stage in status.stages.items()}
        if status.state == "stopped":
            self.end()

    def _take_run(self, record: RunRecord) -> None:
        self._meet(record.pid)
        self.muted, self.paused = record.muted, record.paused
        if self.status is not None:
            self.status.state = record.state
        if record.state == "stopped":
            self.end()

    def _take_state(self, record: StageRecord) -> None:
        if self._states.get(record.stage) == record.state:
            return
        # What the first status tells is not news.
        if record.stage in self._states:
            detail = f", {record.detail}" if record.detail and record.state in ("ready", "fatal") else ""
            self._write(record.time_ns, "state", f"{record.stage}: {record.state}{detail}")
        self._states[record.stage] = record.state

    def _take_timing(self, record: TimingRecord) -> None:
        took_ms = _took_ms(record)
        if record.stage == "capture":
            self._captured(record)
        elif record.stage == "inference":
            self.silences.extend(self.silent_columns(record.end_ns))
            self._draw(record.end_ns, took_ms)
        self._records[record.stage].append(record)
        if self._marks is not None and record.end_ns > self._marks.time_ns:
            self._marks.durations[record.stage].add_ms(took_ms)
            if record.stage == "playback":
                self._marks.durations["mic_to_speaker"].add_ms(record.mic_to_speaker_ms)

    def _captured(self, record: TimingRecord) -> None:
        self._captured_ns[record.frame] = record.end_ns
        while len(self._captured_ns) > _FRAMES:
            del self._captured_ns[next(iter(self._captured_ns))]

    def _waits_ms(self, stage: StageName, recent: list[TimingRecord]) -> list[float]:
        """Of capture's frames and inference's, whoever's record comes first."""
        if stage == "playback":
            return [_took_ms(record) for record in recent]
        if stage == "capture":
            return []
        known = [record for record in recent if record.frame in self._captured_ns]
        return [max(0.0, (one.start_ns - self._captured_ns[one.frame]) / _NS_PER_MS) for one in known]

    def _draw(self, end_ns: int, took_ms: float) -> None:
        column = end_ns // _COLUMN_NS
        if self.columns and self.columns[-1][0] == column:
            took_ms = max(took_ms, self.columns.pop()[1])
        self.columns.append((column, took_ms))

    def silent_columns(self, until_ns: int) -> range:
        """Those from inference's last frame on, if that is long ago."""
        samples = self._records["inference"]
        from_ns = samples[-1].end_ns if samples else until_ns
        if until_ns - from_ns < SILENT_S * _NS_PER_S:
            return range(0)
        return range(from_ns // _COLUMN_NS, until_ns // _COLUMN_NS + 1)[-_COLUMNS:]

    def figures(self, now_ns: int) -> Figures:
        """Everything, as it stands at `now_ns`."""
        status, marks = self.status, self._marks
        counts, inference = self._counts(), self._recent("inference", now_ns)
        last = self._records["inference"][-1] if self._records["inference"] else None
        return Figures(
            time_ns=now_ns,
            name=self.name,
            link=self.link,
            age_s=None if self.last_ns is None else (now_ns - self.last_ns) / _NS_PER_S,
            since="clear" if marks else "run",
            since_s=(now_ns - marks.time_ns) / _NS_PER_S if marks else status.uptime_s if status else 0.0,
            stages={stage: self._stage(stage, now_ns) for stage in STAGES},
            mic_to_speaker_ms=_mean([one.mic_to_speaker_ms for one in self._recent("playback", now_ns)]),
            mic_to_speaker=self._spread("mic_to_speaker"),
            encode_ms=_mean([one.encode_ms for one in inference]),
            step_ms=_mean([one.step_ms for one in inference]),
            decode_ms=_mean([one.decode_ms for one in inference]),
            context=last.context if last else 0,
            context_size=last.context_size if last else 0,
            ring_in_ms=_ms(status.accounting.waiting_in) if status else 0.0,
            ring_in_limit_ms=status.settings.inference.backlog_limit * FRAME_MS if status else 0.0,
            ring_out_ms=_ms(status.accounting.waiting_out) if status else 0.0,
            ring_out_limit_ms=status.settings.playback.queue_frames * FRAME_MS if status else 0.0,
            concealed_ms=_ms(counts.concealed),
            dropped_ms=_ms(counts.dropped),
            skipped_ms=_ms(counts.skipped),
            gaps=counts.gaps,
            cleaned=counts.cleaned + counts.cleaned_answers,
            drift_ppm=status.drift_ppm if status else None,
            overload=self.overload,
            muted=self.muted,
            paused=self.paused,
            recording=self.recording,
            misunderstood=self.misunderstood,
            transcript=self.transcript,
            journal=list(self.journal),
            status=status,
        )

    def _stage(self, stage: StageName, now_ns: int) -> StageFigures:
        known = self.status.stages.get(stage) if self.status else None
        recent, spread = self._recent(stage, now_ns), self._spread(stage)
        busy_ms = None if stage == "playback" else _mean([_took_ms(record) for record in recent])
        last = self._records[stage][-1] if self._records[stage] else None
        sounds = stage != "inference" and bool(recent)
        return StageFigures(
            state=self._states.get(stage),
            pid=known.pid if known else None,
            restarts=known.restarts if known else 0,
            wait_ms=_mean(self._waits_ms(stage, recent)),
            busy_ms=busy_ms,
            load=None if busy_ms is None else busy_ms / FRAME_MS,
            spread=Spread(**{name: getattr(spread, name) for name in Spread.__struct_fields__}),
            late=spread.late if isinstance(spread, StageSpread) else None,
            xruns=self._xruns(stage),
            silent_s=max(0.0, (now_ns - last.end_ns) / _NS_PER_S) if last else None,
            cpu_percent=self._cpu_percent(stage),
            memory_mb=known.memory_mb if known else 0.0,
            level_dbfs=recent[-1].level_dbfs if sounds else None,
            peak_dbfs=max(one.peak_dbfs for one in recent) if sounds else None,
        )

    def _recent(self, stage: StageName, now_ns: int) -> list[TimingRecord]:
        from_ns = now_ns - round(_NOW_S * _NS_PER_S)
        return [one for one in self._records[stage] if one.end_ns >= from_ns]

    def _spread(self, what: str) -> Spread:
        """Of the whole run, as the status tells, or since the counts were cleared."""
        if self._marks is not None:
            durations = self._marks.durations[what]
            return durations.stage_spread() if what == "inference" else durations.spread()
        if self.status is None:
            return StageSpread() if what == "inference" else Spread()
        timing = self.status.timing
        return {
            "capture": timing.capture,
            "inference": timing.inference,
            "playback": timing.playback,
            "mic_to_speaker": timing.mic_to_speaker_ms,
        }[what]

    def _counts(self) -> Accounting:
        now = self.status.accounting if self.status else Accounting()
        then = self._marks.accounting if self._marks else Accounting()
        return Accounting(**{name: getattr(now, name) - getattr(then, name) for name in now.__struct_fields__})

    def _xruns(self, stage: StageName) -> int | None:
        if stage == "inference":
            return None
        now = self.status.xruns if self.status else Xruns()
        then = self._marks.xruns if self._marks else Xruns()
        return getattr(now, stage, 0) - getattr(then, stage, 0)

    def _cpu_percent(self, stage: StageName) -> float | None:
        if self.status is None or self._before is None:
            return None
        now, then = self.status.stages.get(stage), self._before.stages.get(stage)
        took_ns = self.status.time_ns - self._before.time_ns
        if now is None or then is None or now.pid != then.pid or took_ns <= 0:
            return None
        return (now.cpu_s - then.cpu_s) * _NS_PER_S / took_ns * 100

    def silent(self, now_ns: int) -> StageName | None:
        """The first stage on the sound's way that runs and has told of no frame for a while, if there is one."""
        if self.link != "up" or self.paused:
            return None
        for stage in STAGES:
            samples = self._records[stage]
            silent_ns = now_ns - samples[-1].end_ns if samples else 0
            if self._states.get(stage) == "running" and silent_ns > SILENT_S * _NS_PER_S:
                return stage
        return None

    def complete(self) -> bool:
        """Whether the status is known, and a frame of each stage where all of them run."""
        running = all(self._states.get(stage) == "running" for stage in STAGES) and not self.paused
        return self.status is not None and (not running or all(self._records.values()))


def level_share(dbfs: float | None) -> float:
    """A level on a scale from -60 dBFS, 0, to full scale, 1."""
    return min(1.0, max(0.0, 1 + (SILENCE_DBFS if dbfs is None else dbfs) / 60))


def _took_ms(record: TimingRecord) -> float:
    """What the stage's `timing` in the status tells of, of one frame."""
    took_ms = (record.end_ns - record.start_ns) / _NS_PER_MS
    return max(0.0, took_ms - FRAME_MS) if record.stage == "capture" else took_ms


def _ms(samples: int) -> float:
    return samples * 1_000 / SAMPLE_RATE


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _answer(record: CommandRecord) -> str:
    what = " ".join([record.verb, *(f"{key}={value}" for key, value in record.values.items())])
    if not record.ok:
        return f"{what}: refused, {record.error}"
    by = ", ".join(f"{effect.stage} from frame {effect.frame}" for effect in record.effects)
    return f"{what}: done{f' by {by}' if by else ''}"


def _overload(record: OverloadRecord) -> str:
    return f"too slow: 95 % of the frames took up to {record.p95_ms:.0f} ms of {FRAME_MS:.0f}; {record.advice}"


def _recording(record: RecordingRecord) -> str:
    if record.on:
        return f"recording to {record.path}"
    if record.error and not record.seconds:
        return f"not recorded: {record.error}"
    return f"recorded {record.seconds:.1f} s to {record.path}{f': {record.error}' if record.error else ''}"
