"""pipeline.overload: when a model is too slow for real time, what helps, and what a run does about it."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoints, chips, overload
from pipeline.chips import Bandwidth
from pipeline.config import Config
from pipeline.messages import OverloadRecord, TimingRecord
from pipeline.overload import WINDOW, Change, Overload
from pipeline.timing import NS_PER_MS
from pipeline.topology import FRAME_NS
from tests import helpers, test_commands, test_supervisor
from tests.helpers import wait_until
from tests.test_commands import Listener
from tests.test_supervisor import HEALTHY, MakeRun, Script

pytestmark = pytest.mark.timeout(90)

folder = helpers.folder
runtime_dir = helpers.runtime_dir
make_run = test_supervisor.make_run
signals = test_supervisor.signals
quick = test_supervisor.quick


class Frames:
    """An inference stage whose frames take what a test says."""

    def __init__(self) -> None:
        self.watch = Overload()
        self._count = 0
        self._free_ns = 0

    def take(self, *took_ms: float, ahead: int = 0) -> list[Change]:
        """Frames that come every 80 ms; work on each begins `ahead` frames before the one before it is done."""
        changes = []
        for ms in took_ms:
            due_ns = self._count * FRAME_NS
            start_ns = max(due_ns, self._free_ns)
            end_ns = start_ns + round(ms * NS_PER_MS)
            begun_ns = max(due_ns, start_ns - ahead * FRAME_NS)
            self._free_ns = end_ns
            record = TimingRecord(stage="inference", frame=self._count, start_ns=begun_ns, end_ns=end_ns, queued=1)
            self._count += 1
            if change := self.watch.take(record):
                changes.append(change)
        return changes


def test_frames_in_time_are_no_overload() -> None:
    assert Frames().take(*[79.0] * 1_000) == []


def test_frames_that_take_too_long_are_one_and_its_end_is_told() -> None:
    frames = Frames()
    (begun,) = frames.take(*[100.0] * 300)
    assert begun.on
    assert begun.p95_ms == pytest.approx(100)
    assert frames.watch.on
    (over,) = frames.take(*[50.0] * 500)
    assert not over.on
    assert not frames.watch.on


def test_it_takes_a_while() -> None:
    assert Frames().take(*[100.0] * (WINDOW - 1)) == []


def test_one_late_frame_in_thirty_is_none() -> None:
    assert Frames().take(*([60.0] * 29 + [300.0]) * 40) == []


def test_just_fast_enough_is_not_the_end() -> None:
    frames = Frames()
    assert len(frames.take(*[100.0] * 300)) == 1
    assert frames.take(*[78.0] * 500) == []
    assert frames.watch.on


def test_frames_that_are_worked_on_at_a_time_are_not_counted_twice() -> None:
    assert Frames().take(*[75.0] * 500, ahead=1) == []
    assert len(Frames().take(*[90.0] * 500, ahead=1)) == 1


def test_another_model_begins_anew() -> None:
    frames = Frames()
    frames.take(*[100.0] * 300)
    frames.watch.clear()
    assert not frames.watch.on
    assert frames.take(*[50.0] * (2 * WINDOW)) == []


# What helps


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("pipeline.overload.sys.platform", "linux")
    monkeypatch.setattr(chips, "nvidia", lambda: None)
    return monkeypatch


def test_a_lighter_quality_helps(tmp_path: Path) -> None:
    heavy = Config(quality="q8", model=str(tmp_path))
    assert overload.lighter(heavy) is None
    pulled = "q4 is faster than q8: `pipeline models pull --quality q4`, and then `pipeline up --quality q4`"
    assert overload.advice(heavy) == pulled
    checkpoints.synthesize(tmp_path / "both", "q4", "tiny", seed=0)
    both = Config(quality="q8", model=str(tmp_path / "both"))
    assert overload.lighter(both) == (str(tmp_path / "both"), "q4")
    assert overload.advice(both) == "q4 is faster than q8: `pipeline up --quality q4`"


def test_the_lightest_has_no_lighter_one() -> None:
    assert overload.lighter(Config(quality="q4")) is None
    assert overload.lighter(Config(engine="echo", quality="q8")) is None


def test_a_processor_is_no_gpu(on_linux: pytest.MonkeyPatch) -> None:
    assert overload.advice(Config()).endswith("use a GPU")


def test_a_chip_whose_memory_is_too_slow_is_named(on_linux: pytest.MonkeyPatch) -> None:
    on_linux.setattr("pipeline.overload.sys.platform", "darwin")
    on_linux.setattr(chips, "processor", lambda: "Apple M1")
    on_linux.setattr(chips, "bandwidth", lambda _: Bandwidth(68.25, 68.25))
    assert overload.advice(Config()) == "q4 takes 68 ms at best on Apple M1: it needs faster memory"
    on_linux.setattr(chips, "bandwidth", lambda _: Bandwidth(400, 400))
    assert overload.advice(Config()) == "end other programs that compute, and see `pipeline bench`"
    assert overload.advice(Config(engine="echo")) == "end other programs that compute, and see `pipeline bench`"


# A run


def slow_then(took_ms: float) -> Script:
    return [["say", "ready"], ["serve", {"until": "start"}], ["frames", 200, took_ms], ["serve"]]


def test_a_run_says_that_it_is_overloaded_and_what_helps(make_run: MakeRun) -> None:
    run = make_run(inference=[slow_then(100.0)])

    def client() -> None:
        wait_until(run.folder.control.exists, "the run to begin")
        listener = Listener(run, "state.overload")
        told = listener.wait_for(OverloadRecord)
        assert (told.on, told.p95_ms) == (True, pytest.approx(100))
        assert told.advice
        assert run.status().overloaded

    assert run.run(client) == 0
    (warning,) = run.warnings()
    assert warning.startswith("the model is too slow: 95 % of the frames took up to 100 ms of 80; ")


@pytest.mark.parametrize("asked", [True, False])
def test_the_lighter_quality_takes_over_where_that_is_wanted(make_run: MakeRun, tmp_path: Path, asked: bool) -> None:
    checkpoints.synthesize(tmp_path / "both", "q4", "tiny", seed=0)
    config: dict[str, Any] = {"model": str(tmp_path / "both"), "quality": "q8"}
    run = make_run(config, inference=[slow_then(100.0), HEALTHY])
    run.config.engine = "moshi"
    run.config.inference.step_down = asked

    def client() -> None:
        wait_until(lambda: bool(run.warnings()), "the overload")
        if asked:
            wait_until(lambda: run.starts["inference"] == 2, "the restart")
        run.wait_until_running()
        status = run.status()
        assert status.overloaded is not asked
        assert (status.settings.quality, test_commands.in_force(run).quality) == (("q4",) if asked else ("q8",)) * 2

    assert run.run(client) == 0
    assert run.starts["inference"] == (2 if asked else 1)
    assert ("; it goes on with q4" in run.warnings()[0]) == asked
