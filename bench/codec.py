"""Whether Mimi on MLX and rustymimi are one codec, frame by frame, and how long each takes.

    python -m bench.codec [--frames 300] [--mimi FILE]

Both get the bundled recording with noise on it, in full size, and say what rustymimi heard. The weights are FILE's, the
official ones, say; by default they are made up, 385 MB for a while, to which codes are as sensitive. One frame follows
the other and its parts are waited for in turn, so that the times are those of a codec alone on the machine. Exits with
1 where a code differs, or a sample by 1e-5 or more. 300 frames take minutes on a CPU: Mimi on MLX is meant for a GPU.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.checkpoints import FULL_MIMI, SIZES, Size, synthesize
from pipeline.topology import FRAME
from procs.engines import Samples
from procs.measure import speech
from procs.model import mimi
from procs.model.codec import Codec, CodecName, MlxMimi, Pending, RustMimi

CODEBOOKS: Final = 8
"""Of each voice, Moshi's."""

CLOSE: Final = 1e-5
"""The most by which a sample may differ, full scale being 1."""

NOISE: Final = 0.003
"""-50 dB: in digital silence codes would be decided by rounding."""

SEED: Final = 0

_PERCENTILES: Final = (50, 95)

Result = TypeVar("Result")


class Times(NamedTuple):
    """Of one codec, ms a frame."""

    hear: list[float]
    say: list[float]


class Compared(NamedTuple):
    """What was found."""

    codes: int
    mismatches: int
    """Codes that differ."""
    frames: list[int]
    """The frames they are in."""
    difference: float
    """The largest between two samples."""
    loudest: float

    @property
    def alike(self) -> bool:
        """Whether the two are one codec. NaN is not."""
        return not self.mismatches and self.difference < CLOSE


def passage(frames: int) -> Iterator[Samples]:
    """The bundled recording, again and again, with noise."""
    random = np.random.default_rng(SEED)
    for frame in itertools.islice(speech(), frames):
        yield (frame + NOISE * random.standard_normal(FRAME)).astype(np.float32)


@contextlib.contextmanager
def weights(given: Path | None) -> Iterator[Path]:
    """The file to load."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        SIZES["full codec"] = Size(SIZES["tiny"].config, FULL_MIMI)
        yield synthesize(Path(folder) / "made-up", "bf16", "full codec").mimi_file


def timed(begin: Callable[[Any], Pending[Result]], given: Any, times_ms: list[float]) -> Result:
    """Begin, and wait for what comes of it."""
    start = time.perf_counter()
    made, _ = begin(given).result()
    times_ms.append((time.perf_counter() - start) * 1e3)
    return made


def compare(one: Codec, other: Codec, frames: Iterator[Samples], times: dict[CodecName, Times]) -> Compared:
    """Give both the same, frame by frame; both say what `other` heard."""
    codes = mismatches = 0
    different: list[int] = []
    difference = loudest = 0.0
    for number, frame in enumerate(frames):
        heard = [timed(codec.hear, frame, times[codec.name].hear) for codec in (one, other)]
        said = [timed(codec.say, heard[1], times[codec.name].say) for codec in (one, other)]
        wrong = int(np.count_nonzero(heard[0] != heard[1]))
        codes += len(heard[1])
        mismatches += wrong
        different += [number] if wrong else []
        difference = float(np.maximum(difference, np.abs(said[0] - said[1]).max()))
        loudest = max(loudest, float(np.abs(said[1]).max()))
    return Compared(codes, mismatches, different, difference, loudest)


def table(times: dict[CodecName, Times]) -> Table:
    """Frame times, a row a direction of a codec."""
    made = Table("codec", "direction", *(f"p{percentile} ms" for percentile in _PERCENTILES))
    for name, of_codec in times.items():
        for direction, times_ms in of_codec._asdict().items():
            made.add_row(name, direction, *(f"{ms:.1f}" for ms in np.percentile(times_ms, _PERCENTILES)))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=300, help="default 300, 24 s")
    parser.add_argument("--mimi", type=Path, metavar="FILE", help="Mimi's weights, by default made-up ones")
    arguments = parser.parse_args()
    if arguments.frames < 1:
        parser.error("--frames: expected at least 1")
    with weights(arguments.mimi) as file:
        codecs = MlxMimi(mimi.load(file, FULL_MIMI, CODEBOOKS)), RustMimi(file, CODEBOOKS)
    times = {codec.name: Times([], []) for codec in codecs}
    found = compare(*codecs, passage(arguments.frames), times)
    print(f"MLX computes on {mx.default_device()}")
    print(f"{found.mismatches} of {found.codes} codes differ, in {len(found.frames)} of {arguments.frames} frames")
    if found.frames:
        print(f"the first of them: {', '.join(map(str, found.frames[:10]))}")
    print(f"samples differ by {found.difference:.2g} at most, the loudest is {found.loudest:.2g}")
    Console().print(table(times))
    print("one codec" if found.alike else "NOT ONE CODEC")
    return 0 if found.alike else 1


if __name__ == "__main__":
    sys.exit(main())
