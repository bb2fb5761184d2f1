"""What is said between processes: commands and replies, the stages' reports, the records of every event topic.

JSON on the wire, tagged unions; a command with an unknown field is refused. Times are monotonic ns
stamped at the source; counts are in samples at 24 kHz where no unit is named.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from pipeline.topology import StageName

SCHEMA: Final = 1
"""Version of everything in this module."""

RunState = Literal["starting", "running", "stopping", "stopped"]
StageState = Literal["starting", "ready", "running", "backoff", "fatal", "stopped"]
LogLevel = Literal["info", "warning", "error"]


class Command(Struct, tag_field="verb", tag=str.lower, forbid_unknown_fields=True):
    """What a client may ask of a run: JSON such as {"verb": "mute"}."""


class Status(Command):
    """State, accounting and timing now."""


class Mute(Command):
    """Silence in place of the microphone."""


class Unmute(Command):
    """The microphone again."""


class Reset(Command):
    """A new conversation."""


class Shutdown(Command):
    """End the run. Answered when every stage has stopped, with the final status."""


AnyCommand = Status | Mute | Unmute | Reset | Shutdown

VERBS: Final = {kind.__name__.lower(): kind for kind in (Status, Mute, Unmute, Reset, Shutdown)}

CARRIED_OUT_BY: Final[dict[type[Command], StageName]] = {Mute: "capture", Unmute: "capture", Reset: "inference"}
"""The stage that acknowledges a command. What is not listed is answered by the supervisor."""


class StageStatus(Struct, kw_only=True):
    """One stage, as `status` shows it."""

    state: StageState
    pid: int | None
    restarts: int
    detail: str = ""
    """The device, file or model it works with."""
    device_latency_ms: float = 0.0
    """What the audio device reports as its own latency, from or to its converter."""
    lost_reports: int = 0
    """Reports of it that never reached the supervisor."""
    memory_mb: float = 0.0
    cpu_s: float = 0.0
    """Processor time used since the stage's start."""


class Accounting(Struct, kw_only=True):
    """Where every sample is. captured = stepped + dropped + waiting_in; generated = played + skipped + waiting_out;
    sent = played + concealed."""

    captured: int = 0
    stepped: int = 0
    dropped: int = 0
    waiting_in: int = 0
    generated: int = 0
    played: int = 0
    skipped: int = 0
    waiting_out: int = 0
    sent: int = 0
    concealed: int = 0
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
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0


class StageSpread(Spread, kw_only=True):
    """The same for a stage, with its budget: a frame that took longer is late."""

    budget_ms: float = 80.0
    late: int = 0


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
    """Over- and underruns that the devices reported."""

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
    stages: dict[StageName, StageStatus]
    accounting: Accounting
    timing: Timing
    xruns: Xruns
    drift_ppm: float | None
    """The microphone's clock against the speaker's: positive where the microphone is faster. Null in the first 30 s."""


class Reply(Struct, kw_only=True, omit_defaults=True):
    """The answer to a command."""

    ok: bool
    verb: str = ""
    stage: str = ""
    """The stage that carried the command out."""
    frame: int = -1
    """The frame from which on it has effect, as that stage counts."""
    error: str = ""
    """What is wrong, if not ok."""
    status: StatusReport | None = None


class _Record(Struct, kw_only=True, tag_field="type"):
    schema: int = SCHEMA


class StageRecord(_Record, tag="state", kw_only=True):
    """Topic state.<stage>: the stage's state changed."""

    stage: StageName
    state: StageState
    detail: str = ""
    device_latency_ms: float = 0.0
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
    end_ns: int
    queued: int
    """Frames waiting for this stage when it began."""
    encode_ms: float = 0.0
    step_ms: float = 0.0
    decode_ms: float = 0.0
    mic_to_speaker_ms: float = 0.0
    """Playback: from the frame's first sample at the microphone's converter to the answer's at the speaker's."""


class TextRecord(_Record, tag="text", kw_only=True):
    """Topic text: the model's words as they come."""

    frame: int
    text: str
    time_ns: int


class XrunRecord(_Record, tag="xrun", kw_only=True):
    """Topic xrun: a device lost samples, or the audio had a gap that was concealed."""

    stage: StageName
    kind: Literal["xrun", "gap", "dropped"]
    count: int
    """How many since the last record of this kind."""
    time_ns: int


class LogRecord(_Record, tag="log", kw_only=True):
    """Topic log.<stage>: a line for people."""

    stage: str
    level: LogLevel
    message: str
    time_ns: int


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
    device_latency_ms: float = 0.0
    """As the device reports it now."""
    lost_reports: int = 0
    """Reports that could not be sent, because the supervisor did not read them."""


Report = StageRecord | TimingRecord | TextRecord | XrunRecord | LogRecord | Acknowledged | Finished | Heartbeat
"""What a stage tells the supervisor."""


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


Order = Start | Finish | Stop | Apply
"""What the supervisor tells a stage."""


def topic(record: Report) -> str | None:
    """The event topic of a stage's report, or None if it is for the supervisor alone."""
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
    return None


encode: Final = msgspec.json.Encoder().encode
decode_command: Final = msgspec.json.Decoder(AnyCommand).decode
decode_reply: Final = msgspec.json.Decoder(Reply).decode
decode_report: Final = msgspec.json.Decoder(Report).decode
decode_order: Final = msgspec.json.Decoder(Order).decode
