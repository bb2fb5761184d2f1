"""The ring between two processes, each sample carrying its own position."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pipeline import ring as rings
from pipeline.ring import Ring, RingReader
from pipeline.topology import FRAME, SAMPLE_RATE

FRAME_S = FRAME / SAMPLE_RATE
FENCES_A_WRITE = 2


@pytest.fixture
def name() -> Iterator[str]:
    segment = f"/pl-stress-{os.getpid()}"
    rings.unlink(segment)
    yield segment
    rings.unlink(segment)


def start_writer(name: str, samples: int, *options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "tests.ring_writer", name, str(samples), "7", *options])


class Checker:
    """Reads, and asserts of every sample that it is the one its position says."""

    def __init__(self, ring: Ring, block: int) -> None:
        self.reader = RingReader(ring, 0)
        self.out = np.zeros(block, np.float32)
        self.ramp = np.arange(block, dtype=np.uint32)
        self.read = 0
        self.losses = 0

    def step(self) -> int:
        lost = self.reader.lost
        count = self.reader.read(self.out)
        first = self.reader.position - count
        wrong = self.out[:count].view(np.uint32) != self.ramp[:count] + np.uint32(first)
        assert not wrong.any(), f"sample {first + int(wrong.argmax())} is not the right one"
        self.read += count
        self.losses += self.reader.lost > lost
        assert self.read + self.reader.lost == self.reader.position
        return count


CASES: dict[str, tuple[int, float, list[str], int, Callable[[int], float]]] = {
    # samples, ring in seconds, the writer's options, the reader's block, the reader's pause after its nth read
    "a faster reader": (20_000_000, 12.0, ["--pause-every", "8"], FRAME, lambda n: 0.0),
    "a slower reader": (40_000_000, 12.0, [], 4 * FRAME, lambda n: 0.02 if n % 50 == 0 else 0.0),
    "a reader lapped in mid-copy": (60_000_000, 2 * FRAME_S, ["--block", "3000"], 2 * FRAME, lambda n: 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_the_right_one_and_every_lost_one_is_counted(name: str, case: str) -> None:
    samples, seconds, options, block, pause = CASES[case]
    ring = Ring.create(name, seconds)
    checker = Checker(ring, block)
    writer = start_writer(name, samples, *options)
    reads = 0
    try:
        while not checker.reader.ended:
            if checker.step() == 0:
                assert writer.poll() in (None, 0)
            reads += 1
            if wait := pause(reads):
                time.sleep(wait)
    finally:
        writer.kill()
        writer.wait()
    assert checker.read + checker.reader.lost == samples == ring.position
    assert checker.read > 0
    if case == "a faster reader":
        assert checker.reader.lost == 0
    else:
        assert checker.losses > 10
    ring.close()


@pytest.mark.parametrize("fence", [1, 2], ids=["before the samples", "before the position"])
def test_a_writer_killed_in_mid_write(name: str, fence: int) -> None:
    """Its successor goes on; the reader is told of another generation and reads not one sample of the torn write."""
    ring = Ring.create(name, 2 * FRAME_S)
    checker = Checker(ring, FRAME)
    block = ["--block", str(FRAME)]
    for life in range(1, 6):
        died = start_writer(name, 50_000, *block, "--die-at-fence", str(FENCES_A_WRITE * 20 + fence))
        assert died.wait() == -signal.SIGKILL
        assert ring.words[rings._RESERVED_AT] > ring.position  # it was in mid-write
        torn = ring.words[rings._RESERVED_AT]
        while checker.step():
            pass
        assert checker.reader.position == ring.position
        assert start_writer(name, 700, *block).wait() == 0
        assert ring.generation == 2 * life
        assert ring.words[rings._RESERVED_AT] >= torn
        while checker.step():
            pass
    assert checker.read + checker.reader.lost == ring.position
    ring.close()


def test_a_writer_killed_at_any_moment(name: str) -> None:
    ring = Ring.create(name, 2 * FRAME_S)
    checker = Checker(ring, 2 * FRAME)
    rng = np.random.default_rng(3)
    for life in range(1, 9):
        writer = start_writer(name, 1 << 40, "--block", "3000")
        before = ring.position
        while ring.position == before:
            assert writer.poll() is None
        until = time.monotonic() + rng.uniform(0.0, 0.05)
        while time.monotonic() < until:
            checker.step()
        writer.kill()
        writer.wait()
        while checker.step():
            pass
        assert ring.generation == life
        assert checker.read + checker.reader.lost == checker.reader.position == ring.position
    ring.close()
