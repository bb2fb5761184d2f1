"""procs.measure with an engine that is made up, and procs.model.bandwidth with a clock that is."""

import gc
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from pipeline import checkpoints
from pipeline.errors import CheckpointError
from pipeline.topology import FRAME
from procs import measure
from procs.engines import Samples, Step
from procs.model import bandwidth


class Slow:
    """Takes, by its own account, 1, 10 and 2 ms for each frame, and 40 instead of 10 for each fifth."""

    def __init__(self) -> None:
        self.heard: list[Samples] = []

    def step(self, frame: Samples) -> Step:
        assert not gc.isenabled()
        self.heard.append(frame)
        return Step(frame, encode_ms=1.0, step_ms=10.0 if len(self.heard) % 5 else 40.0, decode_ms=2.0)


def test_each_part_is_counted_for_each_frame() -> None:
    engine = Slow()
    found = {part: durations.spread() for part, durations in measure._steps(engine, 20).items()}
    assert {spread.frames for spread in found.values()} == {len(engine.heard)} == {20}
    for part, p50_ms, max_ms in (("encode", 1, 1), ("step", 10, 40), ("decode", 2, 2), ("sum", 13, 43)):
        assert found[part].p50_ms == pytest.approx(p50_ms, rel=0.002)
        assert found[part].p95_ms == found[part].max_ms == pytest.approx(max_ms, rel=0.002)
    assert gc.isenabled()


def test_it_says_how_far_it_is_and_not_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    measure._steps(Slow(), 400)
    said = capsys.readouterr()
    assert said.out == ""  # that is for the JSON alone
    lines = said.err.splitlines()
    assert lines[:2] == ["frame 0 of 400", "frame 20 of 400"]
    assert len(lines) == 20


def test_the_input_is_speech_again_and_again() -> None:
    frames = list(itertools.islice(measure.speech(), 400))
    assert {(frame.shape, frame.dtype) for frame in frames} == {((FRAME,), np.dtype(np.float32))}
    assert 0.05 < max(float(np.abs(frame).max()) for frame in frames) <= 1.0
    first = frames[100]
    assert any(np.array_equal(first, frame) for frame in frames[101:])


def test_memory_is_told_in_mb() -> None:
    assert 10 < measure._peak_mb() < 100_000


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("x is no checkpoint"), "x is no checkpoint"),
        (RuntimeError("no kernel\n\nmany lines\n."), "RuntimeError: no kernel"),
        (MemoryError(), "MemoryError:"),
    ],
)
def test_what_goes_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["measure"])
    monkeypatch.setattr(checkpoints, "find", fail)
    with pytest.raises(SystemExit) as leaving:
        measure.main()
    assert leaving.value.code == line


# The memory's bandwidth


def test_the_best_try_of_the_better_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five reads, then five copies, of 4 MB each: the copies' bytes count twice."""
    tries_s = iter([0.004, 0.002, 0.003, 0.009, 0.009, 0.009, 0.001, 0.009, 0.009, 0.009])
    monkeypatch.setattr(bandwidth, "device", lambda: "cpu")
    monkeypatch.setattr(bandwidth, "_timed_s", lambda work: next(tries_s))
    assert bandwidth.gb_s(4_000_000) == pytest.approx(8.0)


def test_a_gpu_is_given_several_copies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "device", lambda: "gpu")
    monkeypatch.setattr(bandwidth, "_timed_s", lambda work: 0.001)
    assert bandwidth.gb_s(4_000_000) == pytest.approx(8 * 8.0)


def test_it_is_measured_in_truth() -> None:
    assert bandwidth.gb_s(1 << 20) > 0
    assert bandwidth.device() in {"cpu", "gpu"}
    assert bandwidth.peak_bytes() >= 1 << 20


@pytest.mark.parametrize(("memory_gib", "mib"), [(4, 256), (16, 512), (24, 768), (512, 1_024)])
def test_the_array_is_more_than_a_cache_holds_and_little_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, memory_gib: int, mib: int
) -> None:
    memory = SimpleNamespace(total=memory_gib << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(bandwidth, "device", lambda: "gpu")
    assert bandwidth._array_bytes() == mib << 20
    monkeypatch.setattr(bandwidth, "device", lambda: "cpu")
    assert bandwidth._array_bytes() == 256 << 20
