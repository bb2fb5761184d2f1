"""`pipeline monitor` on real runs: views and JSON for scripts, and that it outlives the run. Nothing of time."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pipeline import messages
from pipeline.monitor.model import STAGES, Figures
from tests.runs import PIPELINE, Runs, wait_for

ECHO = ("--engine", "echo", "--input", "tone:440", "--output", "null")


@contextmanager
def watching(runs: Runs, *options: str) -> Iterator[Path]:
    """An endless monitor beside the run; the file that it prints to."""
    printed = runs.folder / "monitor.out"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [*PIPELINE, "monitor", "--interval", "0.1", *options],
            env=runs.environment,
            stdout=out,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        try:
            yield printed
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=10)
            assert complaint.strip() == b""
            assert process.returncode == 130
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def last(printed: Path) -> dict[str, Any]:
    """The last whole line of JSON."""
    lines = printed.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    found: dict[str, Any] = json.loads(whole[-1]) if whole else {"link": None, "status": None}
    return found


def states(figures: dict[str, Any]) -> set[str]:
    return {stage["state"] for stage in figures.get("stages", {}).values()}


def test_views_of_a_run(runs: Runs) -> None:
    runs.environment["COLUMNS"] = "160"
    with runs.up(*ECHO) as run:
        run.running()
        once = runs.call("monitor", "--once")
        assert (once.returncode, once.stderr) == (0, "")
        for shown in (*STAGES, "running", "tone 440 Hz", "capture ring", "mic to speaker", "percentiles"):
            assert shown in once.stdout, shown
        assert all(letter == "\n" or letter.isprintable() for letter in once.stdout)
        twice = runs.call("monitor", "-n", "2", "--interval", "0.2")
        assert twice.stdout.count("3 playback") == 2
        done = runs.call("monitor", "--json", "-n", "3", "--interval", "0.2")
        views = [msgspec.json.decode(line, type=Figures) for line in done.stdout.splitlines()]
        assert len(views) == 3
        for figures in views:
            assert figures.status is not None
            assert all(figures.stages[stage].state == "running" for stage in STAGES)
            assert figures.stages["capture"].level_dbfs is not None
        assert views[-1].stages["inference"].wait_ms is not None
        assert messages.encode(views[0]).decode() == done.stdout.splitlines()[0]  # compact, and all of it documented
        assert run.interrupt() == 0, run.err
    assert runs.leftovers() == []


def test_without_a_run(runs: Runs) -> None:
    for options in (["--once"], ["-n", "2"], ["--once", "--json"]):
        done = runs.call("monitor", *options, "--name", "nobody")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "pipeline: no run is up under 'nobody': start one with `pipeline up`\n"
    bad = runs.call("monitor", "--once", "--name", "no/name")
    assert bad.returncode == 2
    assert bad.stderr.startswith("pipeline: name 'no/name': expected")


def test_it_comes_before_the_run_and_stays_for_the_next(runs: Runs) -> None:
    with watching(runs, "--json") as printed:
        wait_for(lambda: last(printed)["link"] == "waiting", "a line without a run")
        with runs.up(*ECHO) as run:
            first = wait_for(lambda: states(found := last(printed)) == {"running"} and found, "the first run")
            assert first["status"]["pid"] == run.process.pid
            assert run.interrupt() == 0, run.err
        wait_for(lambda: last(printed)["link"] == "ended", "the first run's end")
        with runs.up(*ECHO) as run:
            wait_for(
                lambda: (
                    (last(printed)["status"] or {}).get("pid") == run.process.pid
                    and states(last(printed)) == {"running"}
                ),
                "the second run",
            )
            run.process.kill()  # it cannot say that it ends
            wait_for(lambda: last(printed)["link"] == "ended", "the second run's end")
    runs.call("down")


def test_a_plain_view_says_once_that_the_run_has_ended(runs: Runs) -> None:
    with watching(runs) as printed:
        wait_for(lambda: "default: waiting for the run\n" in printed.read_text(), "the first line")
        with runs.up(*ECHO) as run:
            wait_for(lambda: "3 playback  running" in printed.read_text(), "a view")
            assert run.interrupt() == 0, run.err
        wait_for(lambda: printed.read_text().endswith("default: run ended, waiting for it\n"), "the end")
    assert printed.read_text().count("waiting for the run\n") == 1


def test_a_stalled_model_is_named_and_the_run_is_not_disturbed(runs: Runs) -> None:
    with runs.up(*ECHO) as run, watching(runs, "--json") as printed:
        pid = run.running()["stages"]["inference"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: (last(printed)["stages"]["inference"]["silent_s"] or 0) > 1, "the stall")
            once = runs.call("monitor", "--once")
            assert once.returncode == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: last(printed)["dropped_ms"] > 0, "what was dropped")
        kinds = {entry["kind"] for entry in last(printed)["journal"]}
        assert "xrun" in kinds
        assert run.interrupt() == 0, run.err
