"""bench.start, bench.loading, bench.telemetry and bench.step_peers: that they measure, and what they make of it.

Nothing is asserted of how long anything took.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from bench import loading, results, start, step_peers, telemetry

ECHO: Final = start.Kind("echo", ["--engine", "echo", "--input", "tone:440", "--output", "null"], {})


@pytest.fixture(scope="module")
def started() -> dict[str, list[start.Figures]]:
    return {ECHO.title: [start.start(ECHO, seconds=0.2)]}


def test_the_phases_of_a_start_add_up(started: dict[str, list[start.Figures]]) -> None:
    phases = started["echo"][0]["phases_ms"]
    assert set(phases["stages"]) == {"capture", "inference", "playback"}
    assert phases["interpreter"] > 0
    assert phases["make"] > 0
    for stage in phases["stages"].values():
        assert min(stage.values()) > 0
        own = stage["spawn"] + stage["load"] + stage["open"]
        assert stage["ready"] == pytest.approx(phases["interpreter"] + phases["make"] + own)


def test_what_a_run_takes_at_rest_is_of_every_process(started: dict[str, list[start.Figures]]) -> None:
    found = started["echo"][0]
    for figures in (found["memory_mib"], found["memory_later_mib"]):
        assert set(figures) == {"supervisor", *start.STAGES}
        assert all(0 < memory["uss"] <= memory["rss"] for memory in figures.values())
    assert set(found["cpu_percent"]) == set(found["cpu_paused_percent"]) == {"supervisor", *start.STAGES}


def test_capture_and_playback_stay_below_the_memory_that_is_promised(started: dict[str, list[start.Figures]]) -> None:
    targets = start.targets(started, [100.0])
    assert len(targets) == 4
    assert all(target.met == (not target.why) for target in targets)
    assert [target.met for target in targets if "memory" in target.what] == [True, True]


def test_a_start_becomes_tables(started: dict[str, list[start.Figures]], tmp_path: Path) -> None:
    tables = [
        start.start_table("Warm", started, ""),
        start.memory_table(started, 0.2),
        start.cpu_table(started, 0.2),
        start.import_table({"json": start.imports_us("json")}),
    ]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    made = results.Section(
        "start", "Start", "command", "text", 1.0, tables, [], [start.plot(started)], {"warm": started}
    )
    results.write(made, tmp_path / "start.json")
    assert results.read(tmp_path / "start.json").tables == tables


def test_what_is_imported_is_summed_by_package() -> None:
    found = start.imports_us("pipeline.topology")
    assert {"pipeline", "pipeline.topology", "typing"} <= set(found)
    sums = start.packages_us({"json": 1, "_json": 2, "numpy.lib": 5, "numpy": 4, "pipeline.ring": 8})
    assert sums == {"numpy": 9, "pipeline": 8, "standard library": 3}
    assert list(sums) == ["numpy", "pipeline", "standard library"]


def test_what_is_forgotten_is_there() -> None:
    found = set(start.files())
    assert Path(os.__file__) in found
    assert Path(start.__file__).parent.parent / "pipeline" / "topology.py" in found


def test_every_way_to_load_ends_in_the_same_model() -> None:
    found = loading.compare("tiny", 1)
    assert set(found) == set(loading.WAYS)
    for turns in found.values():
        assert all(value > 0 for value in turns[0].values())
    assert found["packed"][0]["file_mb"] == found["upstream"][0]["file_mb"] < found["run-time"][0]["file_mb"]
    assert found["packed"][0]["mlx_peak_mb"] < found["run-time"][0]["mlx_peak_mb"]


def kinds_of(alone_ms: float, one_ms: float, many_ms: float) -> telemetry.Figures:
    costs = {telemetry.NONE: alone_ms, telemetry.ONE_READS: one_ms, telemetry.MANY_READ: many_ms}
    names = ("capture", "inference", "playback", "supervisor")
    return {kind: {"turns_ms_a_frame": [dict.fromkeys(names, ms)] * 3} for kind, ms in costs.items()}


def test_monitors_are_held_against_the_turn_without_one() -> None:
    kinds = kinds_of(1.0, 1.05, 1.5)
    assert telemetry.more_ms(kinds, telemetry.MANY_READ)["capture"] == [0.5] * 3
    assert telemetry._target("echo", kinds, telemetry.ONE_READS).met
    missed = telemetry._target("echo", kinds, telemetry.MANY_READ)
    assert (missed.met, missed.measured) == (False, "0.5 (0.5 to 0.5) ms more")


def test_stock_and_ours_are_paired_in_both_orders() -> None:
    def row(peer: str, p50_ms: float) -> dict[str, Any]:
        return {"quality": "q4", "peer": peer, "p50_ms": p50_ms, "p99_ms": 2 * p50_ms}

    pairs = step_peers._pairs([row("stock", 20), row("ours", 10), row("ours", 12), row("stock", 16)], "q4")
    assert step_peers._ratios(pairs, "p50_ms") == [0.5, 0.75]
    table = step_peers._section_table({"q4": pairs})
    assert table.rows[0][:4] == ["q4", "18 (16 to 20)", "11 (10 to 12)", "0.625 (0.5 to 0.75)"]
    assert len(table.rows[0]) == len(table.columns)
    assert step_peers._section_target("q4", pairs).met


@pytest.mark.parametrize("peer", ["stock", "ours"])
def test_a_peer_takes_its_steps(peer: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.step_peers", "--peer", peer, "--size", "tiny", "--quality", "bf16"]
    done = subprocess.run(
        [*command, "--frames", "3", "--greedy", "--json", str(tmp_path / "steps.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        cwd=results.ROOT,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "steps.jsonl").read_text())
    assert (figures["peer"], figures["frames"]) == (peer, 3)
    assert 0 < figures["min_ms"] <= figures["p50_ms"] <= figures["max_ms"]
