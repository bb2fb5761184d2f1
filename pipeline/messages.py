"""What is said between processes: commands and replies, the stages' reports, the records of every event topic.

JSON on the wire, tagged unions; a command with an unknown field is refused. Times are monotonic ns
stamped at the source; counts are in samples at 24 kHz where no unit is named. docs/protocol.md is made from this
module.
"""

import math
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from pipeline import config as settings
from pipeline.config import Config, Count, Frames, PrebufferMs, Probability, QueueFrames, Temperature, Volume
from pipeline.topology import StageName

SCHEMA: Final = 1
"""Version of everything in this module."""

RunState = Literal["starting", "running", "stopping", "stopped"]
StageState = Literal["starting", "ready", "running", "backoff", "fatal", "stopped"]
LogLevel = Literal["info", "warning", "error"]

Name = Annotated[str, Meta(max_length=4_096)]
"""Of a file or a device: no longer than Linux lets a path be, so that who repeats it stays within a message."""

SILENCE_DBFS: Final = -120.0
"""The level of what is nothing but zeros, or below that."""


class Command(Struct, tag_field="verb", tag=str.lower, forbid_unknown_fields=True):
    """What a client may ask of a run: JSON such as {"verb": "mute"}."""


class Status(Command):
    """State, accounting and timing now."""


class Mute(Command):
    """Silence in place of the microphone."""


class Unmute(Command):
    """The microphone again."""


class Pause(Command):
    """The model takes no more frames: what the microphone hears meanwhile is counted as dropped."""


class Resume(Command):
    """The model goes on, in the same conversation, with what the microphone hears from now on."""


class Reset(Command):
    """A new conversation."""


class Set(Command, kw_only=True):
    """Change settings while running; they have the meaning that they have in run.toml. At least one is given.

    Of top_k, top_p and min_p the one that is given replaces the one of the same kind that was in force.
    """

    text_temperature: Temperature | UnsetType = UNSET
    text_top_k: Count | UnsetType | None = UNSET
    text_top_p: Probability | UnsetType | None = UNSET
    text_min_p: Probability | UnsetType | None = UNSET
    audio_temperature: Temperature | UnsetType = UNSET
    audio_top_k: Count | UnsetType | None = UNSET
    audio_top_p: Probability | UnsetType | None = UNSET
    audio_min_p: Probability | UnsetType | None = UNSET
    backlog_target: Frames | UnsetType = UNSET
    backlog_limit: Frames | UnsetType = UNSET
    volume: Volume | UnsetType = UNSET
    prebuffer_ms: PrebufferMs | UnsetType | None = UNSET
    queue_frames: QueueFrames | UnsetType = UNSET


class Input(Command):
    """Take another microphone, or what stands in for one. If it cannot be opened the present one stays."""

    spec: Name
    """`device`, `device:NAME`, `file:PATH`, `tone:HZ` or `silence`. On the wire a relative PATH is looked up where
    the run was started."""


class Output(Command):
    """Take another speaker, or what stands in for one. If it cannot be opened the present one stays."""

    spec: Name
    """`device`, `device:NAME`, `file:PATH` or `null`. PATH is a new file. On the wire a relative one is looked up where
    the run was started."""


class Restart(Command):
    """End a stage in good order and start it again. Answered when it runs."""

    stage: StageName


class Record(Command):
    """Begin or end a recording of both sides. Ending is answered when the file is closed."""

    on: bool
    path: Name | None = None
    """The sound file to write, two channels: the microphone and what was sent to the speaker. It must not exist. The
    transcript is written beside it, as .txt. On the wire a relative path is looked up where the run was
    started."""


class Trace(Command):
    """The event records of the last minutes, as they were published, but for `status`, which repeats them.

    Five minutes are kept, less where there were more than 16 MiB of them.
    """

    seconds: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """Only those of the last so many seconds."""


class Shutdown(Command):
    """End the run. Answered when every stage has stopped, with the final status."""


AnyCommand = (
    Status | Mute | Unmute | Pause | Resume | Reset | Set | Input | Output | Restart | Record | Trace | Shutdown
)

VERBS: Final[dict[str, type[AnyCommand]]] = {
    kind.__name__.lower(): kind
    for kind in (
        Status, Mute, Unmute, Pause, Resume, Reset, Set, Input, Output, Restart, Record, Trace, Shutdown
    )
}  # fmt: skip

ALTERS: Final[dict[str, str]] = {
    name: f"{section}.{name}"
    for section, names in {
        "sampler": [
            f"{kind}_{key}" for kind in ("text", "audio") for key in ("temperature", "top_k", "top_p", "min_p")
        ],
        "inference": ["backlog_target", "backlog_limit"],
        "playback": ["volume", "prebuffer_ms", "queue_frames"],
    }.items()
    for name in names
}
"""The key in run.toml of each of Set's fields."""


def carried_out_by(command: Command) -> list[StageName]:
    """The stages that acknowledge a command; none where the supervisor or the recorder carries it out."""
    match command:
        case Mute() | Unmute() | Input():
            return ["capture"]
        case Pause() | Resume() | Reset():
            return ["inference"]
        case Output():
            return ["playback"]
        case Set():
            sections = {ALTERS[name].partition(".")[0] for name in given(command)}
            stages: list[StageName] = ["inference"] if sections & {"sampler", "inference"} else []
            return [*stages, "playback"] if "playback" in sections else stages
    return []


def given(command: Command) -> dict[str, Any]:
    """A command's fields and their values, without those that are not given."""
    values = {name: getattr(command, name) for name in command.__struct_fields__}
    return {name: value for name, value in values.items() if value is not UNSET}


def changed(config: Config, command: Set) -> Config:
    """The settings that are in force once `command` is carried out. Raises ConfigError."""
    return settings.changed(config, {ALTERS[name]: value for name, value in given(command).items()})


def former(config: Config, command: Set) -> Set:
    """The command that puts back what `command` would change, where `config` is in force."""
    keys = {ALTERS[name] for name in given(command)}
    for cuts in settings.CUTS:
        keys |= set(cuts) if keys & set(cuts) else set()
    parts = [key.split(".") for key in keys]
    return Set(**{name: getattr(getattr(config, section), name) for section, name in parts})


class StageStatus(Struct, kw_only=True):
    """One stage, as `status` shows it."""

    state: StageState
    pid: int | None
    """Of its process, while there is one."""
    restarts: int
    """How often it was started again, after it had died or by the command `restart`."""
    detail: str = ""
    """The device, file or model it works with; where its state is `fatal`, why."""
    device_latency_ms: float = 0.0
    """What the audio device reports as its own latency, from or to its converter."""
    lost_reports: int = 0
    """Reports of it that never reached the supervisor."""
    memory_mb: float = 0.0
    """Resident."""
    cpu_s: float = 0.0
    """Processor time used since the stage's start."""


class Accounting(Struct, kw_only=True):
    """Where every sample is. captured = stepped + dropped + waiting_in; generated = played + skipped + waiting_out;
    sent = played + concealed."""

    captured: int = 0
    """Samples that came from the microphone."""
    stepped: int = 0
    """Samples of it that the engine took."""
    dropped: int = 0
    """Samples of it that the engine never saw: it was paused or had fallen behind, or they were overwritten."""
    waiting_in: int = 0
    """Samples of it that the engine may still take."""
    generated: int = 0
    """Samples that the engine answered."""
    played: int = 0
    """Samples of the answer that were sent to the speaker."""
    skipped: int = 0
    """Samples of the answer that never will be: too many were waiting, or they were overwritten."""
    waiting_out: int = 0
    """Samples of the answer that may still be played."""
    sent: int = 0
    """Samples that the speaker was sent, of the answer or not."""
    concealed: int = 0
    """Samples that it was sent in place of an answer: fades and silence, before the first answer too."""
    gaps: int = 0
    """Times that concealment began after the first frame was played."""
    cleaned: int = 0
    """Samples of the microphone that were not finite or beyond full scale."""
    cleaned_answers: int = 0
    """The same of the engine's answers."""

    def discrepancies(self) -> list[str]:
        """The equations that do not hold."""
        sums = {
            "captured = stepped + dropped + waiting_in": self.captured - self.stepped - self.dropped - self.waiting_in,
            "generated = played + skipped + waiting_out": (
                self.generated - self.played - self.skipped - self.waiting_out
            ),
            "sent = played + concealed": self.sent - self.played - self.concealed,
        }
        wrong = [f"{equation} is off by {by}" for equation, by in sums.items() if by]
        counts = {name: getattr(self, name) for name in self.__struct_fields__}
        return wrong + [f"{name} is {count}" for name, count in counts.items() if count < 0]


class Spread(Struct, kw_only=True):
    """How a duration is spread over a run's frames, in ms."""

    frames: int = 0
    """That were measured; the percentiles and the maximum are of these."""
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0


class StageSpread(Spread, kw_only=True):
    """The same for a stage, with its budget: a frame that took longer is late."""

    budget_ms: float = 80.0
    late: int = 0
    """Frames that took longer."""


class Timing(Struct, kw_only=True):
    """Of every stage, and of the way from the microphone's converter to the speaker's."""

    capture: Spread
    """From a frame's last sample at the converter until the frame was in the ring."""
    inference: StageSpread
    """The work on a frame."""
    playback: Spread
    """From a frame being in the ring until its first sample reaches the speaker."""
    mic_to_speaker_ms: Spread
    """From a frame's first sample at the microphone's converter to the answer's at the speaker's."""


class Xruns(Struct, kw_only=True):
    """Over- and underruns of the devices: those that they reported, and a speaker's that its dates show."""

    capture: int = 0
    playback: int = 0


class StatusReport(Struct, kw_only=True):
    """The reply to `status`."""

    schema: int = SCHEMA
    name: str
    pid: int
    """Of the supervisor."""
    muted: bool
    """Whether silence stands in for the microphone."""
    state: RunState
    engine: str
    uptime_s: float
    """Since the run was asked for, its stages' loading included."""
    time_ns: int
    """When this was read."""
    paused: bool
    """Whether the model takes no frames."""
    recording: str | None
    """The sound file that both sides are recorded to."""
    overloaded: bool = False
    """Whether the model is too slow for real time."""
    settings: Config
    """As they are in force now."""
    stages: dict[StageName, StageStatus]
    accounting: Accounting
    timing: Timing
    xruns: Xruns
    drift_ppm: float | None
    """The microphone's clock against the speaker's: positive where the microphone is faster. Null in the first 30 s."""


class Effect(Struct, kw_only=True):
    """What a command did in one stage."""

    stage: str
    """The stage that carried it out."""
    frame: int
    """The microphone frame from which on it has effect, numbered as in the timing records."""


class Reply(Struct, kw_only=True, omit_defaults=True):
    """The answer to a command."""

    ok: bool
    verb: str = ""
    stage: str = ""
    """The stage that carried the command out; of several, the first."""
    frame: int = -1
    """The frame from which on it has effect there."""
    effects: list[Effect] = []
    """Each stage that carried it out."""
    error: str = ""
    """What is wrong, if not ok."""
    status: StatusReport | None = None
    """The answer to status, and shutdown's."""
    recording: "RecordingRecord | None" = None
    """The answer to record."""
    records: list[msgspec.Raw] = []
    """The answer to trace: [topic, record], oldest first."""


class _Record(Struct, kw_only=True, tag_field="type"):
    schema: int = SCHEMA


class StageRecord(_Record, tag="state", kw_only=True):
    """Topic state.<stage>: the stage's state changed."""

    stage: StageName
    state: StageState
    detail: str = ""
    """The device, file or model it works with; where its state is `fatal`, why."""
    device_latency_ms: float = 0.0
    """What the audio device reports as its own latency, from or to its converter."""
    pid: int = 0
    """The process that says so; 0 where the supervisor says it."""
    time_ns: int = 0


class TimingRecord(_Record, tag="timing", kw_only=True):
    """Topic timing.<stage>, one a frame.

    capture: from the frame's first sample at the converter until it was in the ring. inference: the work on it.
    playback: from being in the ring until its first sample reaches the speaker.
    """

    stage: StageName
    frame: int
    """The microphone frame that this one is, or answers."""
    start_ns: int
    """When what was said above began."""
    end_ns: int
    queued: int
    """Frames waiting for this stage when it began. Capture and playback: in their ring when this was reported, up to
    two frames later."""
    encode_ms: float = 0.0
    """Inference: the codec's work on what was heard."""
    step_ms: float = 0.0
    """Inference: the language model's step."""
    decode_ms: float = 0.0
    """Inference: the codec's work on what is said."""
    context: int = 0
    """Inference: the positions that the model's attention sees."""
    context_size: int = 0
    """Inference: the most that it can see; then the oldest is forgotten."""
    mic_to_speaker_ms: float = 0.0
    """Playback: from the frame's first sample at the microphone's converter to the answer's at the speaker's."""
    prebuffer_ms: float = 0.0
    """Playback: how long a frame waits after silence, so that the next may be as late."""
    level_dbfs: float = SILENCE_DBFS
    """Root mean square; 0 is a square wave at full scale. Capture: of the frame's samples. Playback: of what was sent
    in the 80 ms before the frame."""
    peak_dbfs: float = SILENCE_DBFS
    """The largest of the same samples."""


class TextRecord(_Record, tag="text", kw_only=True):
    """Topic text: the model's words as they come."""

    frame: int
    """The microphone frame that they answer."""
    text: str
    """As it is to be joined to what came before: a space begins a new word."""
    time_ns: int


class XrunRecord(_Record, tag="xrun", kw_only=True):
    """Topic xrun: a device lost samples, or the audio had a gap that was concealed."""

    stage: StageName
    kind: Literal["xrun", "gap", "dropped"]
    """`xrun`: the device lost samples or ran dry, as it said or as its dates show. `gap`: concealment began.
    `dropped`: frames of the microphone that the engine never sees."""
    count: int
    """How many since the last record of this kind: times, or frames where they were dropped."""
    time_ns: int


class LogRecord(_Record, tag="log", kw_only=True):
    """Topic log.<stage>: a line for people."""

    stage: str
    """Who says it: a stage, `recorder` or `supervisor`."""
    level: LogLevel
    message: str
    time_ns: int


class RunRecord(_Record, tag="run", kw_only=True):
    """Topic state.run: the run's state changed, or it was muted or paused."""

    name: str
    pid: int
    """Of the supervisor."""
    state: RunState
    muted: bool
    paused: bool
    engine: str
    time_ns: int


class RecordingRecord(_Record, tag="recording", kw_only=True):
    """Topic state.recording: a recording began or ended."""

    path: str
    """The sound file."""
    transcript: str
    """The file of the words beside it."""
    on: bool
    frame: int
    """The microphone frame in which it began."""
    seconds: float = 0.0
    """How much was recorded."""
    lost: int = 0
    """Samples of either side that were overwritten before they were recorded; silence stands in their place."""
    error: str = ""
    """Why it ended by itself, if it did."""
    time_ns: int


class OverloadRecord(_Record, tag="overload", kw_only=True):
    """Topic state.overload: the model has become too slow for real time, or is fast enough again."""

    on: bool
    p95_ms: float
    """What 95 % of the frames of the last 10 s took at most."""
    advice: str = ""
    """What helps on this machine."""
    time_ns: int


class CommandRecord(_Record, tag="command", kw_only=True):
    """Topic command: a command was answered. Status and trace are not told of."""

    verb: str
    values: dict[str, Any] = {}
    """The command's fields, those that were given."""
    ok: bool
    effects: list[Effect] = []
    """What it did, as in the reply."""
    error: str = ""
    """What was wrong, if not ok."""
    start_ns: int
    """When it came."""
    end_ns: int
    """When it was answered."""


class StatusRecord(_Record, tag="status", kw_only=True):
    """Topic status: what the command `status` tells, every second."""

    status: StatusReport


Event = (
    StageRecord
    | TimingRecord
    | TextRecord
    | XrunRecord
    | LogRecord
    | RunRecord
    | RecordingRecord
    | OverloadRecord
    | CommandRecord
    | StatusRecord
)
"""What is published."""


class Acknowledged(_Record, tag="acknowledged", kw_only=True):
    """A stage's answer to Apply."""

    request: int
    frame: int
    error: str = ""


class Finished(_Record, tag="finished", kw_only=True):
    """The stage has come to the end of its input."""

    stage: StageName


class Heartbeat(_Record, tag="heartbeat", kw_only=True):
    """The stage lives. Every second."""

    stage: StageName
    busy_ms: float = 0.0
    """How long its main loop has been at one turn. Waiting is none."""
    device_latency_ms: float = 0.0
    """As the device reports it now."""
    lost_reports: int = 0
    """Reports that could not be sent, because the supervisor did not read them."""


Report = (
    StageRecord
    | TimingRecord
    | TextRecord
    | XrunRecord
    | LogRecord
    | RecordingRecord
    | Acknowledged
    | Finished
    | Heartbeat
)
"""What a stage, or the recorder, tells the supervisor."""


class Start(Struct, tag_field="type", tag="start"):
    """To a stage: begin to move samples."""


class Finish(Struct, tag_field="type", tag="finish"):
    """To capture: end the stream here, with the samples so far to be answered."""


class Stop(Struct, tag_field="type", tag="stop"):
    """To a stage: end in good order."""


class Apply(Struct, tag_field="type", tag="apply"):
    """To a stage: carry out a command and acknowledge it."""

    request: Annotated[int, Meta(ge=0)]
    command: AnyCommand
    until_ns: int | None = None
    """When it is too late to begin: nobody waits for it any more."""


Order = Start | Finish | Stop | Apply
"""What the supervisor tells a stage."""


def topic(record: Report | Event) -> str | None:
    """The event topic of a record, or None if it is for the supervisor alone."""
    match record:
        case StageRecord(stage=stage):
            return f"state.{stage}"
        case TimingRecord(stage=stage):
            return f"timing.{stage}"
        case LogRecord(stage=stage):
            return f"log.{stage}"
        case TextRecord():
            return "text"
        case XrunRecord():
            return "xrun"
        case RunRecord():
            return "state.run"
        case RecordingRecord():
            return "state.recording"
        case OverloadRecord():
            return "state.overload"
        case CommandRecord():
            return "command"
        case StatusRecord():
            return "status"
    return None


def dbfs(value: float) -> float:
    """A sample's size, 0 to 1, in decibels of full scale: 20 log10, no less than SILENCE_DBFS."""
    return max(SILENCE_DBFS, 20 * math.log10(value)) if value > 0 else SILENCE_DBFS


MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What each of the functions below raises where it is given anything else."""

encode: Final = msgspec.json.Encoder().encode
decode_command: Final = msgspec.json.Decoder(AnyCommand).decode
decode_reply: Final = msgspec.json.Decoder(Reply).decode
decode_report: Final = msgspec.json.Decoder(Report).decode
decode_order: Final = msgspec.json.Decoder(Order).decode
decode_event: Final = msgspec.json.Decoder(Event).decode
