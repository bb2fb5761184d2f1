"""Beginning and end, in every order, and what is left behind: nothing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import results
from pipeline import ring
from pipeline.topology import PROCESSES, RINGS
from tests.runs import Run, Runs, children, wait_for

ECHO = ("--engine", "echo", "--input", "silence", "--output", "null")


def segments(runs: Runs, name: str = "default") -> list[str]:
    """The run's segments of shared memory that exist."""
    found = []
    for spec in RINGS:
        segment = ring.segment_name(runs.folder / "run" / name, spec.name)
        with contextlib.suppress(Exception):
            ring.Ring.attach(segment).close()
            found.append(segment)
    return found


def assert_nothing_left(runs: Runs, stages: list[psutil.Process], name: str = "default") -> None:
    assert runs.leftovers() == []
    assert segments(runs, name) == []
    assert not [stage for stage in stages if stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_cleanly(runs: Runs, how: signal.Signals) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        stages = children(run.process)
        assert len(stages) == len(PROCESSES)
        run.process.send_signal(how)
        assert run.wait() == 0, run.err
        assert "captured" in run.out.splitlines()[-1]
    assert_nothing_left(runs, stages)


def test_ctrl_c_in_a_terminal_reaches_only_the_supervisor(runs: Runs) -> None:
    """The whole foreground group gets SIGINT; the stages are not in it."""
    with runs.up(*ECHO) as run:
        run.running()
        assert all(os.getpgid(stage.pid) != os.getpgid(run.process.pid) for stage in children(run.process))
        assert run.interrupt() == 0


def test_down_ends_a_run_and_prints_its_account(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        stages = children(run.process)
        done = runs.call("down")
        assert done.returncode == 0, done.stderr
        assert "captured" in done.stdout
        assert run.wait() == 0
    assert_nothing_left(runs, stages)
    again = runs.call("down")
    assert again.returncode == 2
    assert again.stderr == "pipeline: no run is up under 'default', and none has left anything\n"


def test_detached(runs: Runs) -> None:
    begun = runs.call("up", *ECHO, "--detach")
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout == "default is up; `pipeline down --name default` ends it\n"
    status = runs.call("status")
    assert "default: running, engine echo" in status.stdout
    assert runs.call("down").returncode == 0
    assert runs.leftovers() == []


def test_a_detached_run_that_cannot_begin_says_why(runs: Runs) -> None:
    begun = runs.call("up", "--engine", "echo", "--input", "file:nowhere.wav", "--output", "null", "--detach")
    assert begun.returncode != 0
    assert "file:nowhere.wav: no such file" in begun.stderr


def test_interrupted_at_any_moment_of_its_start(runs: Runs) -> None:
    for delay_s in (0.0, 0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6):
        with runs.up(*ECHO) as run:
            wait_for((runs.folder / "run" / "default").exists, "the run's folder")
            time.sleep(delay_s)
            assert run.interrupt() in (0, 130), run.err
            assert "Traceback" not in run.err
        assert segments(runs) == []
        assert runs.leftovers() == []


def test_a_name_is_taken_once(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        second = runs.call("up", *ECHO)
        assert second.returncode == 2
        assert second.stderr.startswith("pipeline: a run named 'default' is up already: stop it with `pipeline down")
        assert len(second.stderr.splitlines()) == 1
        assert run.status()["state"] == "running"  # unharmed


def test_two_runs_of_different_names(runs: Runs) -> None:
    with runs.up(*ECHO, name="a") as first, runs.up(*ECHO, name="b") as second:
        first.running()
        second.running()
        assert runs.call("down", "--name", "a").returncode == 0
        assert first.wait() == 0
        before = second.status()["accounting"]["captured"]
        wait_for(lambda: second.status()["accounting"]["captured"] > before, "b to go on")
        assert second.interrupt() == 0
    assert runs.leftovers() == []


def test_many_starts_and_stops_leave_nothing(runs: Runs) -> None:
    stages = []
    for _ in range(5):
        with runs.up(*ECHO) as run:
            run.running()
            stages += children(run.process)
            assert run.interrupt() == 0, run.err
    assert_nothing_left(runs, stages)


def test_the_supervisor_killed(runs: Runs) -> None:
    """All stages leave by themselves, and the next run of the name clears the rest."""
    with runs.up(*ECHO) as run:
        run.running()
        stages = children(run.process)
        run.process.kill()
        _, alive = psutil.wait_procs(stages, timeout=10)
        assert alive == []
    assert segments(runs)
    with runs.up(*ECHO) as run:
        assert run.running()["accounting"]["captured"] < 24_000 * 60
        assert run.interrupt() == 0
    assert_nothing_left(runs, stages)


def test_down_clears_what_a_killed_run_left(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        stages = children(run.process)
        run.process.kill()
        psutil.wait_procs(stages, timeout=10)
    cleared = runs.call("down")
    assert cleared.returncode == 0
    assert cleared.stdout == "no run was up under 'default'; what a dead one had left is cleared\n"
    assert_nothing_left(runs, stages)


def stage_pid(run: Run, stage: str) -> int | None:
    pid: int | None = run.status()["stages"][stage]["pid"]
    return pid


@pytest.mark.parametrize("stage", ["capture", "inference", "playback"])
def test_a_stage_killed_is_started_again(runs: Runs, stage: str) -> None:
    """The other two go on, the counts still balance, and the exit code tells of it."""
    with runs.up(*ECHO) as run:
        before = run.running()
        os.kill(before["stages"][stage]["pid"], signal.SIGKILL)

        def back() -> bool:
            status = run.status()["stages"]
            return bool(status[stage]["restarts"] == 1 and status[stage]["state"] == "running")

        wait_for(back, f"{stage} to be back")
        after = run.status()
        for other, found in before["stages"].items():
            assert (found["pid"] == after["stages"][other]["pid"]) == (other != stage)
        played = after["accounting"]["played"]
        wait_for(lambda: run.status()["accounting"]["played"] > played, "sound after the restart")
        assert run.interrupt() == 1
        assert f"{stage} was ended by SIGKILL; it is started again in 1 s" in run.err
        assert "accounting:" not in run.err


def test_send(runs: Runs) -> None:
    with runs.up("--engine", "echo", "--input", "tone:1000", "--output", "file:out.wav") as run:
        run.running()
        for verb, stage in (("mute", "capture"), ("unmute", "capture"), ("reset", "inference")):
            done = runs.call("send", verb)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"{verb}: done by {stage}, from frame ")
        wrong = runs.call("send", "mute", "loudly=yes")
        assert wrong.returncode == 2
        assert "mute: loudly: unknown key; expected none" in wrong.stderr
        assert len(wrong.stderr.splitlines()) == 1
        assert runs.call("send", "shutdown").returncode == 0
        assert run.wait() == 0
    nobody = runs.call("send", "mute")
    assert nobody.returncode == 2
    assert nobody.stderr == "pipeline: no run is up under 'default': start one with `pipeline up`\n"


def test_muted_means_zeros_from_the_acknowledged_frame_on(runs: Runs) -> None:
    from tests.runs import read_wav

    with runs.up("--engine", "echo", "--input", "tone:1000", "--output", "file:out.wav") as run:
        run.running()
        wait_for(lambda: run.status()["accounting"]["played"] > 24_000, "a second of sound")
        assert runs.call("send", "mute").returncode == 0
        played = run.status()["accounting"]["played"]
        wait_for(lambda: run.status()["accounting"]["played"] > played + 24_000, "a second of silence")
        assert run.interrupt() == 0
    out = read_wav(runs.folder / "out.wav")
    assert abs(out[: 24_000 * 2]).max() > 0.2
    assert not out[-12_000:].any()


def test_stages_by_hand(runs: Runs) -> None:
    """Three stages, no supervisor: they find each other by the name, and the last one clears up."""
    by_hand = [sys.executable, "-m"]
    with contextlib.ExitStack() as stack:
        stages = []
        for stage, setting in (
            ("playback", "playback.output=file:hand.wav"),
            ("inference", "engine=echo"),
            ("capture", "capture.input=tone:440"),
        ):
            stages.append(
                subprocess.Popen(
                    [*by_hand, f"procs.{stage}", "--name", "hand", "--set", "engine=echo", "--set", setting],
                    cwd=runs.folder,
                    env=runs.environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(stages[-1].kill)
        target = runs.folder / "hand.wav"
        wait_for(lambda: target.exists() and target.stat().st_size > 24_000 * 4, "a second of sound")
        refused = runs.call("up", *ECHO, "--name", "hand")
        assert refused.returncode == 2
        for process in reversed(stages):
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said
            assert "running" in said
            assert "Traceback" not in said
    assert runs.leftovers() == []
    assert segments(runs, "hand") == []


def test_a_full_event_subscriber_costs_the_run_nothing(runs: Runs) -> None:
    """A connection to the events socket that never reads."""
    with runs.up(*ECHO) as run:
        run.running()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(runs.folder / "run" / "default" / "events.ipc"))
            before = run.status()["accounting"]["played"]
            wait_for(lambda: run.status()["accounting"]["played"] > before + 24_000, "another second")
        assert run.interrupt() == 0


def test_the_folder_and_its_sockets_are_the_users_own(runs: Runs) -> None:
    with runs.up(*ECHO) as run:
        run.running()
        folder = runs.folder / "run" / "default"
        assert folder.stat().st_mode & 0o777 == 0o700
        for entry in Path(folder).iterdir():
            assert entry.stat().st_mode & 0o077 == 0, entry
        assert run.interrupt() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no SCHED_FIFO that a program may ask for")
def test_who_shares_the_interpreters_lock_with_a_callback_is_nearly_as_urgent(runs: Runs) -> None:
    """Another program that took the processor from it, with the lock, would hold up the callback."""
    with runs.up("--engine", "echo", "--input", "silence", "--output", "null") as run:
        pids = {name: stage["pid"] for name, stage in run.running()["stages"].items()}
        policies = {name: os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK for name, pid in pids.items()}
        assert (
            policies["capture"]
            == policies["playback"]
            == (os.SCHED_FIFO if results.real_time() == "permitted" else os.SCHED_OTHER)
        )
        assert run.interrupt() == 0, run.err
