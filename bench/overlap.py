"""What it brings that hearing, thinking and speaking overlap: `python -m bench.overlap [DIR_OR_REPO] [--quality bf16]`.

The same frames through one engine, each part after the other, and with the next frame given while one is answered, as
the stage does when it has fallen behind; in turn, three times. By default the model is tiny and made up and Mimi has
its official dimensions, in rustymimi. Printed are ms a frame, of each part and of both ways.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.checkpoints import FULL_MIMI, QUALITIES, SIZES, Checkpoint, Size, find, synthesize
from procs.engines import Answer, Samples
from procs.model import Moshi
from tests.helpers import speech_like

FRAMES: Final = 60
ROUNDS: Final = 3


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a checkpoint's folder or repository; by default one is made up")
    parser.add_argument("--quality", choices=list(QUALITIES), default="bf16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = Moshi(_checkpoint(arguments.model, arguments.quality, Path(folder)), seed=1)
        engine.load()
    frames = np.split(speech_like(FRAMES), FRAMES)
    for _ in range(ROUNDS):
        one_by_one, both = serial(engine, frames), overlapped(engine, frames)
        print(f"codec {engine.codec.name}, ms a frame: {one_by_one}; overlapped {both:.1f}")


def _checkpoint(model: str | None, quality: str, folder: Path) -> Checkpoint:
    if model is not None:
        return find(model, quality)
    SIZES["tiny, official codec"] = Size(SIZES["tiny"].config, FULL_MIMI)
    return synthesize(folder / "model", quality, "tiny, official codec")


def serial(engine: Moshi, frames: list[Samples]) -> str:
    """Each part after the other."""
    engine.reset()
    start = time.perf_counter()
    steps = [engine.step(frame.copy()) for frame in frames]
    total = 1e3 * (time.perf_counter() - start) / len(frames)
    parts = [float(np.median([getattr(step, f"{part}_ms") for step in steps])) for part in ("encode", "step", "decode")]
    return f"encode {parts[0]:.1f}, step {parts[1]:.1f}, decode {parts[2]:.1f}; one after the other {total:.1f}"


def overlapped(engine: Moshi, frames: list[Samples]) -> float:
    """With the next frame given while one is answered, and two answers in the making."""
    engine.reset()
    unsaid: list[Answer] = []
    start = time.perf_counter()
    engine.listen(frames[0].copy())
    for frame in [*frames[1:], None]:
        if frame is not None:
            engine.listen(frame.copy())
        unsaid.append(engine.respond())
        if len(unsaid) > 2:
            unsaid.pop(0).result()
    for answer in unsaid:
        answer.result()
    return 1e3 * (time.perf_counter() - start) / len(frames)


if __name__ == "__main__":
    main()
