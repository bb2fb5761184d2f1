"""What the tests share: run folders short enough for sockets, rings that leave nothing behind, signals, waiting."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import messages
from pipeline import ring as rings
from pipeline.audio import Samples
from pipeline.config import Config
from pipeline.control import Hub, StageLink
from pipeline.errors import CheckpointError, RingError
from pipeline.messages import Report
from pipeline.ring import Ring
from pipeline.runtime import RunFolder
from pipeline.topology import FRAME, FRAME_MS, RINGS, SAMPLE_RATE, StageName
from pipeline.worker import Context

PATIENCE_S = 20.0
"""How long a test waits for what must happen. Nothing is asserted of how long it took."""


@contextlib.contextmanager
def temporary_runtime_dir(patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of all runs, with a path that is short: a socket's may have 103 bytes."""
    path = Path(tempfile.mkdtemp(prefix="pl")).resolve()
    patch.setenv("PIPELINE_RUNTIME_DIR", str(path))
    try:
        yield path
    finally:
        for name in os.listdir(path):
            for spec in RINGS:
                rings.unlink(rings.segment_name(path / name, spec.name))
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of all runs, for one test."""
    with temporary_runtime_dir(monkeypatch) as path:
        yield path


@pytest.fixture
def folder(runtime_dir: Path) -> Iterator[RunFolder]:
    """The folder, made, of a run called `t`, under a `runtime_dir` of its own."""
    run = RunFolder("t")
    run.make()
    yield run
    for spec in RINGS:
        rings.unlink(run.segment(spec.name))


@contextlib.contextmanager
def temporary_ring(frames: int = 150) -> Iterator[Ring]:
    """A ring of so many frames, unlinked and unmapped at the end."""
    ring = Ring.create(f"/pl-{os.urandom(6).hex()}-test", frames * FRAME_MS / 1_000)
    try:
        yield ring
    finally:
        rings.unlink(ring.name)
        ring.close()


def segments_left(run: RunFolder) -> list[str]:
    """The rings of a run whose shared memory is there."""
    left = []
    for spec in RINGS:
        with contextlib.suppress(RingError):
            Ring.attach(run.segment(spec.name)).close()
            left.append(spec.name)
    return left


def wait_until(true: Callable[[], bool], what: str, pause_s: float = 0.005) -> None:
    """Wait until `true()`; fails the test where it does not come to be."""
    until = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > until:
            pytest.fail(f"waited {PATIENCE_S:g} s in vain: {what}")
        time.sleep(pause_s)


def tone(frames: int, hz: float = 440.0, level: float = 0.5, phase: float = 0.0) -> Samples:
    """A sine wave without a step between its frames, which begins at `phase`, in radians."""
    samples: Samples = np.sin(2 * np.pi * hz / SAMPLE_RATE * np.arange(frames * FRAME) + phase).astype(np.float32)
    return samples * np.float32(level)


def speech_like(frames: int, seed: int = 0, level: float = 0.5) -> Samples:
    """Noise below about 1 kHz, never the same twice, that swells four times a second as syllables do."""
    count = frames * FRAME
    noise = np.random.default_rng(seed).standard_normal(count + 32)
    smooth = np.convolve(noise, np.hanning(33), mode="valid")
    swell = 0.55 - 0.45 * np.cos(2 * np.pi * 4 / SAMPLE_RATE * np.arange(count))
    shaped = smooth[:count] * swell
    samples: Samples = (level * shaped / np.abs(shaped).max()).astype(np.float32)
    return samples


def largest_step(samples: Samples) -> float:
    """Between two neighbouring samples."""
    return float(np.abs(np.diff(samples.astype(np.float64))).max())


@contextlib.contextmanager
def stage_context(run: RunFolder, stage: StageName, config: Config | None = None) -> Iterator[tuple[Context, Hub]]:
    """What a stage's process gives to its stage, and the supervisor's end of its line."""
    hub = Hub(run.control, run.events, run.stages)
    link = StageLink(run.stages, stage)
    context = Context(config or Config(engine="echo"), run, link, stage)
    try:
        yield context, hub
    finally:
        context.close()
        link.close()
        hub.close()


def received(hub: Hub, count: int) -> list[Report]:
    """The next `count` reports of the stages."""
    found: list[Report] = []

    def enough() -> bool:
        hub.wait(0.01)
        found.extend(messages.decode_report(data) for data in hub.reports())
        return len(found) >= count

    wait_until(enough, f"{count} reports")
    return found


def refusal(call: Callable[[], object]) -> str:
    """The one line with which `call` is refused."""
    with pytest.raises(CheckpointError) as caught:
        call()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line
