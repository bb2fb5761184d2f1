"""How long the model's steps take on this machine, one after another, with nothing else of a run around them.

`pipeline bench` starts it, and makes a report of the JSON that it prints. What it is doing it says on standard error.
"""

import argparse
import gc
import itertools
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
import soundfile

import pipeline
from pipeline import checkpoints
from pipeline.budget import DEFAULT_FRAMES, Measured
from pipeline.checkpoints import Checkpoint
from pipeline.errors import PipelineError
from pipeline.layout import DEFAULT_QUALITY
from pipeline.timing import Durations
from pipeline.topology import FRAME
from procs.engines import Samples, Step

_SEED: Final = 0
_SAYINGS: Final = 20
"""Times that a measurement says how far it is."""

_PARTS: Final = ("encode", "step", "decode", "sum")


class Steps(Protocol):
    """What is measured."""

    def step(self, frame: Samples) -> Step:
        """Answer one frame, its parts one after the other."""


def speech() -> Iterator[Samples]:
    """Frames of the bundled recording, again and again."""
    path = Path(pipeline.__file__).parent / "assets" / "speech.flac"
    samples, _ = soundfile.read(path, dtype="float32")
    whole = len(samples) // FRAME * FRAME
    return itertools.cycle(np.split(samples[:whole], whole // FRAME))


def measure(checkpoint: Checkpoint, frames: int) -> Measured:
    """Measure so many frames, then the memory's bandwidth. Raises CheckpointError."""
    _say("loading the model")
    from procs.model import Moshi, bandwidth

    engine = Moshi(checkpoint, seed=_SEED)
    engine.load()
    spreads = _steps(engine, frames)
    peak_mb, mlx_peak_mb = _peak_mb(), bandwidth.peak_bytes() / 1e6
    loaded, codec = engine.loaded, engine.codec.name
    del engine
    gc.collect()  # on a small machine there is no room for both
    _say("measuring the memory")
    return Measured(
        device=bandwidth.device(),
        codec=codec,
        load_ms=loaded.load_ms,
        warm_up_ms=loaded.warm_up_ms,
        first_frame_ms=loaded.first_frame_ms,
        peak_mb=peak_mb,
        mlx_peak_mb=mlx_peak_mb,
        bandwidth_gb_s=bandwidth.gb_s(),
        **{part: durations.spread() for part, durations in spreads.items()},
    )


def _steps(engine: Steps, frames: int) -> dict[str, Durations]:
    """How long each part of so many frames took."""
    spreads = {part: Durations() for part in _PARTS}
    # As a stage does: a collection is no part of a step.
    gc.collect()
    gc.disable()
    for number, frame in enumerate(itertools.islice(speech(), frames)):
        if number % max(1, frames // _SAYINGS) == 0:
            _say(f"frame {number} of {frames}")
        found = engine.step(frame)
        parts = (found.encode_ms, found.step_ms, found.decode_ms)
        for part, duration_ms in zip(_PARTS, (*parts, sum(parts)), strict=True):
            spreads[part].add_ms(duration_ms)
    gc.enable()
    return spreads


def _peak_mb() -> float:
    """The most that this process had in memory so far, in MB of 1e6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m procs.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="by default the quality's official one")
    parser.add_argument("--quality", default=DEFAULT_QUALITY)
    parser.add_argument("--frames", type=int, default=DEFAULT_FRAMES)
    arguments = parser.parse_args()
    try:
        measured = measure(checkpoints.find(arguments.model, arguments.quality), arguments.frames)
    except PipelineError as error:
        sys.exit(str(error))
    except Exception as error:  # mlx raises what its device says, in many lines: the first one names it
        sys.exit(" ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]]))
    print(msgspec.json.encode(measured).decode())


if __name__ == "__main__":
    main()
