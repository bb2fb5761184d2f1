"""A writer in a process of its own, each of whose samples carries its own position.

python -m tests.ring_writer SEGMENT SAMPLES SEED [--block N] [--pause-every N] [--die-at-fence N]
"""

import argparse
import os
import signal
import time

import membar
import numpy as np

from pipeline import ring
from pipeline.ring import Ring, RingWriter

_PAUSE_S = 0.0005


def positions(start: int, count: int) -> ring.Samples:
    """Samples `start` to `start + count`, each the bits of its own position."""
    return np.arange(start, start + count, dtype=np.uint32).view(np.float32)


def _die_at(fence: int) -> None:
    """Have this process killed, with no chance to clean up, when it comes to its `fence`th writer's fence."""
    passed = 0
    real = membar.wmb

    def counted() -> None:
        nonlocal passed
        passed += 1
        if passed == fence:
            os.kill(os.getpid(), signal.SIGKILL)
        real()

    membar.wmb = counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("segment")
    parser.add_argument("samples", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--block", type=int, default=1_920)
    parser.add_argument("--pause-every", type=int, default=0)
    parser.add_argument("--die-at-fence", type=int, default=0)
    arguments = parser.parse_args()
    mapped = Ring.attach(arguments.segment)
    writer = RingWriter(mapped)
    sizes = np.random.default_rng(arguments.seed).integers(1, arguments.block + 1, 4_096)
    stop = writer.position + arguments.samples
    ramp = np.arange(arguments.block, dtype=np.uint32)
    if arguments.die_at_fence:
        _die_at(arguments.die_at_fence)
    blocks = 0
    while (left := stop - writer.position) > 0:
        count = min(left, int(sizes[blocks % len(sizes)]))
        writer.write((ramp[:count] + np.uint32(writer.position)).view(np.float32))
        blocks += 1
        if arguments.pause_every and blocks % arguments.pause_every == 0:
            time.sleep(_PAUSE_S)
    writer.end()


if __name__ == "__main__":
    main()
