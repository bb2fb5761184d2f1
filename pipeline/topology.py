"""The processes and the rings of a run, as tables: reading them is reading the architecture."""

from typing import Final, Literal, NamedTuple

SAMPLE_RATE: Final = 24_000
"""Samples a second inside the pipeline. Devices at another rate are resampled at the edge."""

FRAME: Final = 1_920
"""Samples in a frame, one model step: 80 ms at SAMPLE_RATE."""

FRAME_NS: Final = FRAME * 1_000_000_000 // SAMPLE_RATE
FRAME_MS: Final = FRAME * 1_000 / SAMPLE_RATE


StageName = Literal["capture", "inference", "playback"]


class Process(NamedTuple):
    """A stage: its name and the module that is its program."""

    name: StageName
    module: str


class RingSpec(NamedTuple):
    """A ring: its name, the stage that writes it and the stage that consumes it (none: taps only)."""

    name: str
    writer: StageName
    consumer: StageName | None


# In the order in which they are told to run: the speaker is open before the microphone is.
PROCESSES: Final = (
    Process("playback", "procs.playback"),
    Process("inference", "procs.inference"),
    Process("capture", "procs.capture"),
)


class Tap(NamedTuple):
    """A program that reads rings and that no stage knows of, started when it is asked for."""

    name: str
    module: str


RECORDER: Final = Tap("recorder", "procs.recorder")

RINGS: Final = (
    RingSpec("capture", writer="capture", consumer="inference"),
    RingSpec("playback", writer="inference", consumer="playback"),
    RingSpec("heard", writer="playback", consumer=None),
)
