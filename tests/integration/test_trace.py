"""`pipeline trace` of real runs, read by Perfetto's own schema: what was done to a run is found in it."""

import contextlib
import os
import signal
import time

from pipeline.topology import FRAME_MS
from tests.runs import Run, Runs, wait_for
from tests.trace_reader import Slice, TraceFile

ECHO = ("--engine", "echo", "--input", "tone:440", "--output", "null")
STOPPED_S = 1.5


def traced(runs: Runs, *arguments: str) -> TraceFile:
    path = runs.folder / "run.pftrace"
    done = runs.call("trace", "-o", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: ")
    return TraceFile.read(path)


def play(run: Run, seconds: float) -> None:
    wanted = run.status()["accounting"]["played"] + seconds * 24_000
    wait_for(lambda: run.status()["accounting"]["played"] >= wanted, f"{seconds:g} s more to be played")


def stop_the_model(run: Run) -> tuple[int, int]:
    """Returns when it was stopped and when it went on, monotonic ns."""
    pid = run.status()["stages"]["inference"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with contextlib.ExitStack() as on:
        on.callback(os.kill, pid, signal.SIGCONT)
        start_ns = time.monotonic_ns()
        time.sleep(STOPPED_S)
        end_ns = time.monotonic_ns()
    return start_ns, end_ns


def longest(stalls: list[Slice]) -> Slice:
    return max(stalls, key=lambda stall: stall.duration_ms)


def test_a_stall_is_found_with_its_true_length(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        play(run, 1)
        start_ns, end_ns = stop_the_model(run)
        play(run, 1)
        assert runs.call("send", "mute").returncode == 0
        file = traced(runs)
        pids = {name: stage["pid"] for name, stage in run.status()["stages"].items()}
        assert run.interrupt() == 0, run.err
    stall = longest(file.on("stalls", "inference"))
    # No frame may have waited in the first moment, for a frame's time at most. It ends with the first answer, which a
    # busy machine may delay by as much, and not before the model went on.
    assert 0 <= stall.start_ns - start_ns + FRAME_MS * 1e6 <= 2 * FRAME_MS * 1e6
    assert 0 <= stall.end_ns - end_ns <= 2 * FRAME_MS * 1e6
    assert abs(stall.duration_ms - (end_ns - start_ns) / 1e6) <= 2 * FRAME_MS
    # It was heard as a gap, frames waited while nothing was answered, and the oldest were dropped.
    assert [one for one in file.at("losses", "playback") if one.name == "gap" and one.start_ns > start_ns]
    assert [one for one in file.at("losses", "inference") if one.name == "dropped" and one.start_ns >= end_ns]
    waiting = file.counters["inference: waiting for inference"]
    assert max(ms for at_ns, ms in waiting if start_ns < at_ns < end_ns) >= 10 * FRAME_MS
    assert not [one for one in file.on("frames") if start_ns < one.start_ns and one.end_ns < end_ns]
    # Frames are followed all the way, but for those that were dropped or are under way.
    ways = [[(one.process, one.track) for one in way] for way in file.flows.values()]
    assert sum(len(way) == 5 for way in ways) >= 20
    assert {**pids} == {name: pid for name, pid in file.processes.items() if name in pids}
    assert [one.name for one in file.on("commands")] == ["mute"]
    assert [one.name for one in file.at("state", "inference")][-1] == "running"


def test_only_the_last_seconds_or_the_next(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        play(run, 2)
        everything = traced(runs)
        last = traced(runs, "--seconds", "1")
        following = traced(runs, "--next", "--seconds", "1")
        assert run.interrupt() == 0, run.err
    first = everything.on("microphone")[0].values["frame"]
    assert first == 0
    for file in (last, following):
        frames = [one.values["frame"] for one in file.on("microphone")]
        assert frames[0] > 0
        assert frames == list(range(frames[0], frames[0] + len(frames)))
    # What was published in the next second is what happened after the last one was told.
    assert following.on("microphone")[-1].start_ns > last.on("microphone")[-1].start_ns


def test_a_run_that_is_not_up(runs: Runs) -> None:
    done = runs.call("trace", "-o", str(runs.folder / "a"))
    assert done.returncode == 2
    assert done.stderr == "pipeline: no run is up under 'default': start one with `pipeline up`\n"
    done = runs.call("trace", "-o", str(runs.folder / "no" / "a"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"pipeline: -o {runs.folder / 'no' / 'a'}: expected a file in a folder")
    assert not (runs.folder / "a").exists()
