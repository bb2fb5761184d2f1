"""`pipeline bench`, as a user calls it. Nothing is asserted of how long anything took."""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from pipeline.checkpoints import synthesize
from tests.runs import Runs

FRAMES: Final = 6
ENDS_ON_ITS_OWN_S: Final = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("models") / "tiny", "bf16", "tiny").folder


def bench(runs: Runs, model: Path, *options: str) -> str:
    arguments = ("bench", "--model", str(model), "--quality", "bf16", "--frames", str(FRAMES), *options)
    done = runs.call(*arguments, timeout_s=ENDS_ON_ITS_OWN_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # progress is for a terminal
    assert runs.leftovers() == []
    return done.stdout


def test_the_report_is_consistent(runs: Runs, model: Path) -> None:
    text = bench(runs, model, "--json")
    assert str(model) not in text
    report: dict[str, Any] = json.loads(text)
    measured = report["measured"]
    for part in ("encode", "step", "decode", "sum"):
        spread = measured[part]
        assert spread["frames"] == FRAMES
        assert 0 < spread["p50_ms"] <= spread["p95_ms"] <= spread["p99_ms"] <= spread["max_ms"]
    assert measured["sum"]["max_ms"] >= measured["step"]["max_ms"]
    assert measured["device"] in {"cpu", "gpu"}
    assert measured["codec"] in {"mlx", "rust"}
    for figure in ("load_ms", "warm_up_ms", "first_frame_ms", "peak_mb", "mlx_peak_mb", "bandwidth_gb_s"):
        assert measured[figure] > 0, figure
    weights = report["model"]["step_bytes"]
    assert 0 < weights < (model / "model.safetensors").stat().st_size
    assert report["floor_ms"] == pytest.approx(weights / measured["bandwidth_gb_s"] / 1e6)
    assert 0 < report["share"] < 1.5
    assert report["share"] == pytest.approx(report["floor_ms"] / measured["step"]["p50_ms"])
    assert report["fits"] == (measured["sum"]["p95_ms"] <= report["budget_ms"] == 80)
    assert (report["schema"], report["model"]["name"], report["model"]["quality"]) == (1, "tiny", "bf16")
    machine = report["machine"]
    assert machine["chip"]
    assert set(machine["packages"]) == {"mlx", "moshi_mlx", "rustymimi", "numpy"}


def test_people_get_a_table(runs: Runs, model: Path) -> None:
    lines = bench(runs, model).splitlines()
    assert lines[0].startswith("tiny, bf16, on ")
    assert [line.split()[0] for line in lines if f" {FRAMES} " in line] == ["encode", "step", "decode", "sum"]
    assert lines[-1].startswith(("fits 80 ms: yes (p95 ", "fits 80 ms: no (p95 "))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--frames", "0"), "'--frames'"),
        (("--frames", "many"), "'--frames'"),
        (("--quality", "q3"), "'--quality'"),
        (("--quality", "q8", "--model", "MODEL"), "--quality bf16"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "someone/nothing-mlx-q4"), "pipeline models pull someone/nothing-mlx-q4"),
    ],
)
def test_what_is_wrong_is_one_line(runs: Runs, model: Path, options: tuple[str, ...], named: str) -> None:
    runs.environment["HF_HOME"] = str(runs.folder / "hub")
    done = runs.call("bench", *(str(model) if option == "MODEL" else option for option in options))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("pipeline: ")
    assert named in done.stderr
