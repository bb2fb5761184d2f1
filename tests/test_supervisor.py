"""pipeline.supervisor, over real processes that do what a test's script says, on real sockets and shared memory."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest

from pipeline import messages, supervisor, worker
from pipeline.config import CaptureConfig, Config, PlaybackConfig
from pipeline.control import Hub, StageLink, Subscription, request
from pipeline.errors import EXIT_REFUSED, ConfigError, ControlError
from pipeline.messages import Effect, LogLevel, Reply, StageRecord, StatusReport
from pipeline.ring import Consumer, Ring, RingWriter
from pipeline.runtime import RunFolder
from pipeline.supervisor import Supervisor, end_orphans
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns
from pipeline.topology import FRAME, PROCESSES, RINGS, Process, Tap
from tests import helpers
from tests.helpers import PATIENCE_S, segments_left, wait_until

pytestmark = pytest.mark.timeout(90)

folder = helpers.folder
runtime_dir = helpers.runtime_dir

STAGE: Final = """
import json, os, signal, sys, time
from pathlib import Path
import msgspec
from pipeline.control import StageLink
from pipeline.messages import *

stage, stages, alive, heard, script = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
link = StageLink(Path(stages), stage)


class Alive:
    def fileno(self):
        return alive


def say(state, detail=""):
    link.report(StageRecord(stage=stage, state=state, detail=detail, device_latency_ms=1.5))


watched = []


def serve(acknowledge=True, error="", deaf=False, pairs=False, finished_on="", exit_on="", until="", busy_ms=None):
    if not watched:
        watched.append(Alive())
        link.watch(watched[0])
    pending = []
    while True:
        if busy_ms is not None:
            link.report(Heartbeat(stage=stage, busy_ms=busy_ms))
        if alive in link.wait(10 if busy_ms is None else 0.05):
            link.abandon()
            sys.exit(0)
        for order in link.orders():
            kind = type(order).__name__.lower()
            with heard.open("a") as log:
                log.write(msgspec.json.encode(order).decode() + "\\n")
            if kind == exit_on:
                sys.exit(9)
            if kind == "start":
                say("running")
            if kind == finished_on:
                link.report(Finished(stage=stage))
            if kind == until:
                return
            if kind == "apply" and acknowledge:
                pending.append(order.request)
                if pairs and len(pending) < 2:
                    continue
                for number in reversed(pending):
                    link.report(Acknowledged(request=number, frame=100 + number, error=error))
                pending.clear()
            if kind == "stop" and not deaf:
                say("stopped")
                link.close()
                sys.exit(0)


def frames(count, took_ms):
    took_ns = round(took_ms * 1e6)
    for n in range(count):
        link.report(TimingRecord(stage=stage, frame=n, start_ns=n * took_ns, end_ns=(n + 1) * took_ns, queued=1))


def leave(code):
    link.close()
    sys.exit(code)


def record(on, frame=7, error=""):
    link.report(RecordingRecord(path="/r.wav", transcript="/r.txt", on=on, frame=frame, error=error, time_ns=1))


def die(number):
    link.close()
    os.kill(os.getpid(), number)


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.005)


def print_error(line):
    print(line, file=sys.stderr, flush=True)


def ignore_stacks():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def send(text):
    link._socket.send(text.encode())


known = (say, serve, record, frames, leave, die, wait_for, print_error, send, ignore_sigterm, ignore_stacks)
acts = {f.__name__: f for f in known}
for name, *arguments in json.loads(script):
    if arguments and isinstance(arguments[0], dict):
        acts[name](**arguments[0])
    else:
        acts[name](*arguments)
"""

Script = list[list[Any]]


def done(verb: str, **frames: int) -> Reply:
    """The reply to a command that these stages carried out, with effect from these frames on."""
    effects = [Effect(stage=stage, frame=frame) for stage, frame in frames.items()]
    return Reply(ok=True, verb=verb, stage=effects[0].stage, frame=effects[0].frame, effects=effects)


HEALTHY: Final[Script] = [["say", "ready", "made up"], ["serve"]]


class Run:
    """A run whose stages follow scripts: for each stage one for each of its starts, the last for all that follow."""

    def __init__(self, folder: RunFolder, notes: Path, scripts: dict[str, list[Script]], **config: Any) -> None:
        self.folder = folder
        self.notes = notes
        self.scripts = scripts
        self.log: list[tuple[str, LogLevel, str]] = []
        self.text: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.arguments: dict[str, tuple[str, ...]] = {}
        self.starts: Counter[str] = Counter()
        self.ahead_ns = 0
        self.over = threading.Event()
        self.config = Config(engine="echo", **config)
        self.final: StatusReport | None = None
        self.to_close: list[Callable[[], object]] = []

    def on_log(self, stage: str, level: LogLevel, message: str) -> None:
        self.log.append((stage, level, message))

    def launch(
        self, process: Process | Tap, folder: RunFolder, alive: int, *arguments: str
    ) -> "subprocess.Popen[bytes]":
        self.arguments[process.name] = arguments
        scripts = self.scripts.get(process.name, [HEALTHY])
        script = scripts[min(self.starts[process.name], len(scripts) - 1)]
        self.starts[process.name] += 1
        command = [sys.executable, "-c", STAGE, process.name, str(folder.stages), str(alive)]
        command += [str(self.notes / process.name), json.dumps(script)]
        with folder.log(process.name).open("ab") as log:
            popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(alive,))
        self.processes.append(popen)
        return popen

    def supervise(self, launch: supervisor.Launch | None = None) -> int:
        it = Supervisor(
            self.config,
            self.folder,
            on_text=lambda record: self.text.append(record.text),
            on_log=self.on_log,
            clock=lambda: now_ns() + self.ahead_ns,
            launch=launch or self.launch,
        )
        code = it.run()
        self.final = it.final
        return code

    def run(self, client: Callable[[], object] | None = None, launch: supervisor.Launch | None = None) -> int:
        """The run from its beginning to its end, with `client` in a thread; its failure is the test's.

        When `client` returns, the run is told to shut down.
        """
        failures: list[BaseException] = []

        def in_thread() -> None:
            try:
                if client is not None:
                    client()
                    if not self.over.is_set():
                        self.ask("shutdown")
            except BaseException as failure:
                failures.append(failure)
                if not self.over.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=in_thread)
        thread.start()
        try:
            code = self.supervise(launch)
        finally:
            self.over.set()
            thread.join(PATIENCE_S)
        if failures:
            raise failures[0]
        return code

    def ask(self, verb: str, timeout_s: float = PATIENCE_S, **values: Any) -> Reply:
        return request(self.folder.control, json.dumps({"verb": verb, **values}).encode(), timeout_s)

    def status(self) -> StatusReport:
        status = self.ask("status").status
        assert status is not None
        return status

    def wait_for(self, **states: str) -> StatusReport:
        """Wait until stages are in these states."""
        found: list[StatusReport] = []

        def so() -> bool:
            with contextlib.suppress(ControlError):
                found[:] = [self.status()]
                stages = found[0].stages
                return all(stages[name].state == state for name, state in states.items())  # type: ignore[index]
            return False

        wait_until(self.folder.control.exists, "the run to begin")
        wait_until(so, f"stages to be {states}", pause_s=0.01)
        return found[0]

    def wait_until_running(self) -> StatusReport:
        return self.wait_for(playback="running", inference="running", capture="running")

    def orders(self, stage: str) -> list[Any]:
        """What a stage was told, over all its starts."""
        path = self.notes / stage
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def order_types(self, stage: str) -> list[str]:
        return [order["type"] for order in self.orders(stage)]

    def commands(self, stage: str) -> list[Any]:
        """What a stage was told to carry out, over all its starts."""
        return [order["command"] for order in self.orders(stage) if order["type"] == "apply"]

    def errors(self) -> list[str]:
        return [message for _, level, message in self.log if level == "error"]

    def warnings(self) -> list[str]:
        return [message for _, level, message in self.log if level == "warning"]

    def assert_nothing_left(self, *, logs: bool = False) -> None:
        """No process, no shared memory and no file; where a stage has died, what it wrote to its log."""
        assert [popen.pid for popen in self.processes if popen.poll() is None] == []
        assert segments_left(self.folder) == []
        if logs and self.folder.path.exists():
            left = {path for path in self.folder.path.iterdir() if path.name != "lock"}
            assert {path.suffix for path in left} == {".log"}
            assert min(path.stat().st_size for path in left) > 0
        else:
            assert not self.folder.path.exists()
        assert not self.folder.is_locked()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Put the handlers back that a run in this process replaced."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart comes soon, and no stage is killed, or given up, because this machine is busy."""
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(supervisor, "STOP_S", PATIENCE_S)
    monkeypatch.setattr(supervisor, "ANSWER_S", PATIENCE_S)
    monkeypatch.setattr(supervisor, "BEATS_MISSED", 1_000)  # the stages of these tests have no heart


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(folder: RunFolder, tmp_path: Path) -> Iterator[MakeRun]:
    made: list[Run] = []

    def make(config: dict[str, Any] | None = None, **scripts: list[Script]) -> Run:
        made.append(Run(folder, tmp_path, scripts, **(config or {})))
        return made[-1]

    yield make
    for run in made:
        for close in run.to_close:
            close()
        for popen in run.processes:
            popen.kill()
            popen.wait()


# A run from its beginning to its end


def test_a_clean_run_ends_with_0_and_leaves_nothing(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        farewell = run.ask("shutdown")
        assert farewell.ok
        assert farewell.status is not None
        assert farewell.status.state == "stopped"
        assert {stage.state for stage in farewell.status.stages.values()} == {"stopped"}
        assert [stage.pid for stage in farewell.status.stages.values()] == [None] * 3
        run.over.wait(PATIENCE_S)

    assert run.run(client) == 0
    assert run.errors() == run.warnings() == []
    assert [run.order_types(process.name) for process in PROCESSES] == [["start", "stop"]] * 3
    assert run.final is not None
    assert run.final.accounting.discrepancies() == []
    run.assert_nothing_left()


def test_no_stage_is_started_before_all_are_ready(make_run: MakeRun, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = make_run(inference=[[["wait_for", str(go)], *HEALTHY]])

    def client() -> None:
        status = run.wait_for(playback="ready", inference="starting", capture="ready")
        assert status.state == "starting"
        assert [run.orders(process.name) for process in PROCESSES] == [[], [], []]
        go.touch()
        assert run.wait_until_running().state == "running"

    assert run.run(client) == 0
    run.assert_nothing_left()


def test_while_a_stage_is_still_starting_a_signal_ends_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    """As with Ctrl-C while the model is being loaded."""
    run = make_run(inference=[[["wait_for", str(tmp_path / "never")]]])

    def client() -> None:
        run.wait_for(playback="ready", inference="starting", capture="ready")
        os.kill(os.getpid(), signal.SIGINT)
        run.over.wait(PATIENCE_S)

    assert run.run(client) == 0
    assert run.errors() == []
    run.assert_nothing_left()


def test_a_signal_is_not_forgotten_when_the_last_stage_becomes_ready(make_run: MakeRun) -> None:
    log = messages.encode(messages.LogRecord(stage="capture", level="info", message="nearly", time_ns=0)).decode()
    ready = messages.encode(StageRecord(stage="capture", state="ready")).decode()

    class Interrupted(Run):
        def on_log(self, stage: str, level: LogLevel, message: str) -> None:
            super().on_log(stage, level, message)
            if message == "nearly":
                time.sleep(0.2)  # what comes next is there when this returns
                signal.raise_signal(signal.SIGTERM)

    made = make_run()
    run = Interrupted(made.folder, made.notes, {"capture": [[["wait_for", str(made.notes / "go")]]]})
    run.scripts["capture"][0] += [["send", log], ["send", ready], ["serve"]]

    def client() -> None:
        run.wait_for(playback="ready", inference="ready", capture="starting")
        (made.notes / "go").touch()
        assert run.over.wait(3), "the run goes on as if there had been no signal"

    assert run.run(client) == 0
    run.assert_nothing_left()


def test_the_end_of_the_input_ends_the_run_when_it_is_played(make_run: MakeRun) -> None:
    run = make_run(
        {"seconds": 0.05},
        capture=[[["say", "ready"], ["serve", {"finished_on": "finish"}]]],
        playback=[[["say", "ready"], ["serve", {"finished_on": "start"}]]],
    )
    assert run.run() == 0
    run.assert_nothing_left()


def test_after_the_given_time_the_input_is_ended(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "DRAIN_S", 0.05)
    run = make_run({"seconds": 0.05}, capture=[[["say", "ready"], ["serve", {"finished_on": "finish"}]]])
    assert run.run() == 1
    assert run.order_types("capture") == ["start", "finish", "stop"]
    (error,) = run.errors()
    assert "0.05 s" in error
    run.assert_nothing_left()


def test_a_stage_that_does_not_stop_is_killed(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 1.0)
    run = make_run(playback=[[["ignore_sigterm"], ["say", "ready"], ["serve", {"deaf": True}]]])
    assert run.run(run.wait_until_running) == 1
    assert run.errors() == ["playback did not stop within 1 s and was killed"]
    run.assert_nothing_left()


def test_a_stage_that_is_killed_while_it_was_starting_loses_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 1.0)
    run = make_run(inference=[[["ignore_sigterm"], ["say", "starting"], ["wait_for", str(tmp_path / "never")]]])

    def client() -> None:
        run.wait_for(playback="ready", inference="starting", capture="ready")

    assert run.run(client) == 0
    assert run.errors() == []
    run.assert_nothing_left()


@pytest.mark.parametrize(
    ("end", "how"), [(["leave", 7], "stopped with exit code 7"), (["die", signal.SIGABRT], "was ended by SIGABRT")]
)
def test_a_stage_that_dies_at_the_end_makes_the_run_unclean(make_run: MakeRun, end: list[Any], how: str) -> None:
    run = make_run(capture=[[["say", "ready"], ["serve", {"until": "stop"}], end]])
    assert run.run(run.wait_until_running) == 1
    assert run.errors() == [f"capture {how}"]
    run.assert_nothing_left(logs=True)


def test_an_error_that_a_stage_reports_makes_the_run_unclean(make_run: MakeRun) -> None:
    line = messages.encode(messages.LogRecord(stage="capture", level="error", message="damaged", time_ns=1)).decode()
    run = make_run(capture=[[["send", line], *HEALTHY]])
    assert run.run(run.wait_until_running) == 1
    assert run.errors() == ["damaged"]
    run.assert_nothing_left()


@pytest.mark.parametrize("failure", [OSError("a pipe that nobody reads"), SystemExit(1), ConfigError("no")])
@pytest.mark.parametrize("callback", ["on_text", "on_log"])
def test_a_callback_that_cannot_go_on_ends_the_run_in_good_order(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, callback: str, failure: BaseException
) -> None:
    word = messages.encode(messages.TextRecord(frame=1, text="hello", time_ns=1)).decode()
    run = make_run(inference=[[["say", "ready"], ["serve", {"until": "start"}], ["send", word], ["serve"]]])
    begun: list[bool] = []

    def fail(*what: str) -> None:
        if callback == "on_text" or "ready" in what[-1]:
            begun.append(True)
            raise failure

    if callback == "on_log":
        monkeypatch.setattr(run, "on_log", fail)
    else:
        monkeypatch.setattr(run, "text", type("Text", (), {"append": staticmethod(fail)}))
    assert run.run() == isinstance(failure, ConfigError)
    assert begun
    assert run.final is not None
    assert run.final.state == "stopped"
    assert {stage.state for stage in run.final.stages.values()} == {"stopped"}
    assert [run.order_types(process.name)[-1] for process in PROCESSES] == ["stop"] * 3
    run.assert_nothing_left()


def test_words_and_lines_go_to_whoever_asked_for_them(make_run: MakeRun) -> None:
    word = messages.encode(messages.TextRecord(frame=1, text="hello", time_ns=1)).decode()
    line = messages.encode(messages.LogRecord(stage="inference", level="warning", message="warm", time_ns=1)).decode()
    run = make_run(inference=[[["send", word], ["send", line], *HEALTHY]])
    assert run.run(run.wait_until_running) == 0
    assert run.text == ["hello"]
    assert ("inference", "warning", "warm") in run.log


# Stages that fail


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (["leave", 1], "stopped with exit code 1"),
        (["leave", 3], "stopped with exit code 3"),
        (["die", signal.SIGSEGV], "was ended by SIGSEGV"),
    ],
)
def test_a_stage_that_ends_before_it_is_ready_ends_the_run(make_run: MakeRun, end: list[Any], how: str) -> None:
    run = make_run(inference=[[["print_error", "what was wrong"], end]])
    assert run.run() == 1
    (error,) = run.errors()
    assert error.startswith(f"inference {how}")
    assert "before it was ready" in error
    run.assert_nothing_left(logs=True)
    # What it said, such as why a library aborted, is there and the error says where.
    log = run.folder.log("inference")
    assert str(log) in error
    assert "what was wrong" in log.read_text()


def test_a_stage_that_cannot_work_says_why(make_run: MakeRun) -> None:
    run = make_run(capture=[[["say", "fatal", "input device 'x' not found"], ["leave", 2]]])
    assert run.run() == 2  # as where the command itself is wrong: nothing was begun
    assert run.errors() == ["capture: input device 'x' not found"]
    run.assert_nothing_left()


def test_the_last_words_of_a_stage_may_come_after_its_end(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can be gone before what it said last is read."""
    run = make_run(capture=[[["say", "fatal", "input device 'x' not found"], ["leave", 2]]])
    reports = Hub.reports
    held_back: list[Hub] = []

    def late(hub: Hub) -> Iterator[bytes]:
        if len(held_back) < 3 and any(popen.poll() is not None for popen in run.processes):
            held_back.append(hub)
            return
        yield from reports(hub)

    monkeypatch.setattr(Hub, "reports", late)
    assert run.run() == 2
    assert len(held_back) == 3
    assert run.errors() == ["capture: input device 'x' not found"]


def test_a_stage_that_says_nothing_at_its_end_is_waited_for_no_longer_than_a_moment(make_run: MakeRun) -> None:
    run = make_run(capture=[[["leave", 2]]])
    assert run.run() == 1
    assert run.errors()[0].startswith("capture stopped with exit code 2")


def test_a_stage_that_turns_fatal_while_it_runs_ends_the_run_at_once(make_run: MakeRun) -> None:
    run = make_run(
        inference=[[["say", "ready"], ["serve", {"until": "start"}], ["say", "fatal", "no more"], ["leave", 2]]]
    )
    assert run.run() == 1  # and not 2: it had begun
    assert run.errors() == ["inference: no more"]
    assert run.warnings() == []
    assert run.starts == {"playback": 1, "inference": 1, "capture": 1}
    assert run.final is not None
    assert run.final.stages["inference"].state == "fatal"
    run.assert_nothing_left()


def test_a_stage_whose_device_is_lost_is_started_again(make_run: MakeRun) -> None:
    lost = messages.LogRecord(stage="capture", level="warning", message="the device has stopped", time_ns=1)
    script: Script = [["say", "ready"], ["serve", {"until": "start"}], ["send", messages.encode(lost).decode()]]
    run = make_run(capture=[[*script, ["leave", worker.EXIT_LOST]], HEALTHY])

    def client() -> None:
        wait_until(lambda: run.starts["capture"] == 2, "another start")
        assert run.wait_until_running().stages["capture"].restarts == 1

    assert run.run(client) == 1
    assert run.errors() == []
    assert run.warnings() == [
        "the device has stopped",
        "capture stopped with exit code 3; it is started again in 0.01 s",
    ]
    run.assert_nothing_left()


def test_after_the_given_time_a_capture_that_comes_back_is_told_to_finish_and_not_to_start(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_S", 30)
    run = make_run(
        {"seconds": 20},
        capture=[
            [["say", "ready"], ["serve", {"exit_on": "start"}]],
            [["say", "ready"], ["serve", {"finished_on": "finish"}]],
        ],
        playback=[[["say", "ready"], ["serve", {"finished_on": "apply"}]]],
    )

    def client() -> None:
        run.wait_for(playback="running", inference="running", capture="backoff")
        run.ahead_ns = 25 * NS_PER_S  # the time is over, and the capture is not back yet
        for _ in range(2):  # when the second is answered, all that was due at the first is done
            assert run.status().stages["capture"].state == "backoff"
        run.ahead_ns = 40 * NS_PER_S
        wait_until(lambda: run.ask("status").ok and "finish" in run.order_types("capture"), "the end of the input")

    assert run.run(client) == 1
    assert run.order_types("capture") == ["start", "finish", "stop"]


@pytest.mark.parametrize("how", ["was ended by SIGKILL", "stopped with exit code 9"])
def test_a_stage_that_dies_is_started_again_and_the_others_go_on(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(supervisor, "ANSWER_S", 0.3)
    run = make_run()
    if "code" in how:
        run.scripts["inference"] = [[["say", "ready"], ["serve", {"exit_on": "apply"}]], HEALTHY]

    def client() -> None:
        before = run.wait_until_running()
        events = Subscription(run.folder.events, ("state.inference",))
        try:
            assert states(events, until="running") == ["running"]  # what it is now, told at once
            if "code" in how:
                assert not run.ask("reset").ok
            else:
                os.kill(before.stages["inference"].pid or 0, signal.SIGKILL)
            assert states(events, until="running") == ["backoff", "starting", "ready", "running"]
        finally:
            events.close()
        after = run.wait_until_running()
        assert after.state == "running"
        assert [after.stages[p.name].restarts for p in PROCESSES] == [0, 1, 0]
        assert after.stages["inference"].pid != before.stages["inference"].pid
        assert after.stages["capture"].pid == before.stages["capture"].pid
        assert run.ask("reset").ok  # it is the new one that is told

    assert run.run(client) == 1  # it was not clean
    (warning,) = run.warnings()
    assert warning.startswith(f"inference {how}")
    assert warning.endswith("; it is started again in 0.01 s")
    assert run.order_types("capture") == ["start", "stop"]
    assert run.order_types("inference")[0] == "start"
    assert run.order_types("inference")[-3:] == ["start", "apply", "stop"]
    run.assert_nothing_left(logs=True)


def states(events: Subscription, until: str) -> list[str]:
    """The states that come, up to `until`. One that is told again, to someone who came later, counts once."""
    found: list[str] = []
    while not found or found[-1] != until:
        event = events.receive(PATIENCE_S)
        assert event is not None, f"no more states after {found}"
        state = json.loads(event[1])["state"]
        if state not in found[-1:]:
            found.append(state)
    return found


def test_a_stage_that_dies_again_and_again_ends_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 4)
    monkeypatch.setattr(supervisor, "BACKOFF_LAST_S", 0.05)
    run = make_run(inference=[[["say", "ready"], ["serve", {"exit_on": "start"}]]])
    assert run.run() == 1
    died = "inference stopped with exit code 9"
    assert all(warning.startswith(died) for warning in run.warnings())
    delays = [warning.rpartition("; ")[2] for warning in run.warnings()]
    assert delays == [f"it is started again in {delay} s" for delay in ("0.01", "0.02", "0.04", "0.05")]
    (error,) = run.errors()
    assert error.startswith(died)
    assert "after 4 restarts" in error
    # A line that points to a log points to one that is there.
    log = run.folder.log("inference")
    assert str(log) not in error or log.exists()
    assert run.starts == {"playback": 1, "inference": 5, "capture": 1}
    assert run.final is not None
    assert run.final.stages["inference"].state == "fatal"
    run.assert_nothing_left(logs=True)


def test_a_stage_that_lost_its_device_is_started_again_with_its_reason(make_run: MakeRun) -> None:
    run = make_run(capture=[[["say", "ready"], ["say", "fatal", "device has stopped"], ["leave", 2]], HEALTHY])
    assert run.run(run.wait_until_running) == 1
    (warning,) = run.warnings()
    assert warning.startswith("capture")
    assert "device has stopped" in warning
    assert warning.endswith("; it is started again in 0.01 s")


@pytest.mark.parametrize("state", ["fatal", "running"])
def test_the_last_words_of_a_dead_stage_come_too_late(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, state: messages.StageState
) -> None:
    """They may still be under way when the supervisor learns of the death."""
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_S", 0.5)
    run = make_run()

    def client() -> None:
        os.kill(run.wait_until_running().stages["inference"].pid or 0, signal.SIGKILL)
        run.wait_for(inference="backoff")
        link = StageLink(run.folder.stages, "inference")
        link.report(StageRecord(stage="inference", state=state))
        link.report(messages.TextRecord(frame=0, text="late", time_ns=0))
        wait_until(lambda: run.text == ["late"], "the last words")
        assert run.status().stages["inference"].state == "backoff"
        link.close()
        assert run.wait_until_running().stages["inference"].restarts == 1

    assert run.run(client) == 1
    assert run.starts["inference"] == 2


def test_what_a_stage_says_that_makes_no_sense_is_logged_and_passed_over(make_run: MakeRun) -> None:
    deep = '{"x":' * 10_000
    nonsense = [["send", text] for text in ("{", "", '{"type": "nothing"}', deep)]
    run = make_run(capture=[[*nonsense, *HEALTHY]])
    assert run.run(run.wait_until_running) == 0
    assert len(run.warnings()) == 4
    assert all(line.startswith("a stage's report was not understood: ") for line in run.warnings())


# Offline

OFFLINE: Final = {
    "offline": True, "capture": CaptureConfig(input="file:in.wav"), "playback": PlaybackConfig(output="file:out.wav"),
}  # fmt: skip
AT_THE_END: Final[Script] = [["say", "ready"], ["serve", {"finished_on": "start"}]]


def test_offline_a_run_ends_when_the_last_word_and_the_last_sample_are_there(make_run: MakeRun, tmp_path: Path) -> None:
    word = messages.encode(messages.TextRecord(frame=9, text="last", time_ns=1)).decode()
    ended = messages.encode(messages.Finished(stage="inference")).decode()
    go = tmp_path / "go"
    run = make_run(
        OFFLINE,
        capture=[AT_THE_END],
        inference=[
            [["say", "ready"], ["serve", {"until": "start"}], ["wait_for", str(go)], ["send", word], ["send", ended],
             ["serve"]]
        ],
        playback=[AT_THE_END],
    )  # fmt: skip

    def client() -> None:
        run.wait_until_running()
        assert not run.over.wait(0.2)
        run.ahead_ns += 3_600 * NS_PER_S  # however long inference takes
        assert not run.over.wait(0.2)
        go.touch()
        run.over.wait(PATIENCE_S)

    assert run.run(client) == 0
    assert run.errors() == []
    assert run.text == ["last"]
    run.assert_nothing_left()


@pytest.mark.parametrize("stage", ["capture", "inference", "playback"])
def test_offline_a_stage_that_dies_is_not_started_again(make_run: MakeRun, stage: str) -> None:
    dies: Script = [["say", "ready"], ["serve", {"exit_on": "start"}]]
    run = make_run(OFFLINE, **{stage: [dies]})
    assert run.run() == 1
    assert run.starts == dict.fromkeys(run.starts, 1)
    how = "is not whole" if stage == "playback" else "holds only the first 0.00 s of the answer"
    assert run.errors() == [f"{stage} stopped with exit code 9; out.wav {how}"]
    run.assert_nothing_left()


def test_offline_an_end_before_the_end_is_an_error(make_run: MakeRun) -> None:
    run = make_run(OFFLINE)
    assert run.run(run.wait_until_running) == 1
    early = "ended before all of the input was answered"
    assert run.errors() == [f"{early}; out.wav holds only the first 0.00 s of the answer"]
    run.assert_nothing_left()


def test_offline_an_end_before_the_beginning_says_nothing_of_a_file(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(OFFLINE, inference=[[["wait_for", str(tmp_path / "never")]]])

    def client() -> None:
        run.wait_for(playback="ready", inference="starting", capture="ready")
        os.kill(os.getpid(), signal.SIGINT)
        run.over.wait(PATIENCE_S)

    assert run.run(client) == 1
    assert run.errors() == ["ended before all of the input was answered"]
    run.assert_nothing_left()


def test_offline_whatever_was_lost_is_an_error(make_run: MakeRun) -> None:
    run = make_run(OFFLINE, inference=[AT_THE_END], playback=[[["say", "ready"], ["serve", {"finished_on": "stop"}]]])

    def client() -> None:
        run.wait_until_running()
        ring = Ring.attach(run.folder.segment("playback"))
        RingWriter(ring).write(np.zeros(FRAME, np.float32))
        Consumer(ring).skip(FRAME)
        ring.close()

    assert run.run(client) == 1
    (error,) = run.errors()
    assert error.startswith(f"{FRAME} samples were lost on the way; out.wav")
    run.assert_nothing_left()


def test_offline_a_refusal_is_as_of_any_other_run(make_run: MakeRun) -> None:
    run = make_run(OFFLINE, capture=[[["say", "fatal", "no such file"], ["leave", 2]]])
    assert run.run() == EXIT_REFUSED
    assert run.errors() == ["capture: no such file"]
    run.assert_nothing_left()


# Stages that hang

BEATING: Final[Script] = [["say", "ready"], ["serve", {"busy_ms": 0.0}]]


def test_a_stage_that_gives_no_sign_of_life_is_killed_and_started_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BEATS_MISSED", 2)
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.2)
    silent = [["ignore_stacks"], ["say", "ready"], ["serve"]]
    run = make_run(inference=[silent, BEATING], capture=[BEATING], playback=[BEATING])

    def client() -> None:
        run.wait_until_running()
        wait_until(lambda: run.status().stages["inference"].restarts == 1, "the restart")
        run.wait_until_running()
        assert run.starts == {"playback": 1, "inference": 2, "capture": 1}

    assert run.run(client) == 1
    hangs, ended = run.warnings()
    assert hangs.startswith("inference hangs: no sign of life for 0.4 s; ")
    assert ended.startswith("inference was ended by SIGKILL")


def test_a_stage_that_is_stuck_in_one_turn_is_killed_though_its_heart_beats(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(supervisor.STUCK_S, "capture", 2.0)
    stuck = [["ignore_stacks"], ["say", "ready"], ["serve", {"busy_ms": 2_001.0}]]
    run = make_run(capture=[stuck, BEATING])

    def client() -> None:
        wait_until(lambda: run.starts["capture"] == 2, "the restart")
        run.wait_until_running()

    assert run.run(client) == 1
    assert run.warnings()[0].startswith("capture hangs: at one turn for 2 s; ")


def test_a_stage_that_was_stopped_is_waited_for(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stopped it will let it go on; then it has its time again."""
    monkeypatch.setattr(supervisor, "BEATS_MISSED", 2)
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.2)
    run = make_run(inference=[BEATING], capture=[BEATING], playback=[BEATING])

    def client() -> None:
        pid = run.wait_until_running().stages["inference"].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: bool(run.warnings()), "it to be noticed")
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        assert run.ask("reset").ok
        assert run.status().stages["inference"].pid == pid

    assert run.run(client) == 0
    assert run.warnings() == ["inference was stopped by a signal, and waits to be continued"]


# Commands


def test_a_command_is_acknowledged_by_the_stage_that_carried_it_out(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        assert run.ask("mute") == done("mute", capture=101)
        assert run.ask("unmute") == done("unmute", capture=102)
        assert run.ask("reset") == done("reset", inference=103)
        assert run.ask("pause") == done("pause", inference=104)
        assert run.ask("resume") == done("resume", inference=105)
        assert run.ask("output", spec="null") == done("output", playback=106)

    assert run.run(client) == 0
    told = [order["command"]["verb"] for order in run.orders("capture") if order["type"] == "apply"]
    assert told == ["mute", "unmute"]
    assert run.commands("inference") == [{"verb": verb} for verb in ("reset", "pause", "resume")]
    assert run.commands("playback") == [{"verb": "output", "spec": "null"}]


def test_each_client_gets_its_own_reply(make_run: MakeRun) -> None:
    """The stage acknowledges the second command first."""
    run = make_run(capture=[[["say", "ready"], ["serve", {"pairs": True}]]])
    replies: dict[str, Reply] = {}

    def client() -> None:
        run.wait_until_running()
        threads = [
            threading.Thread(target=lambda verb=verb: replies.update({verb: run.ask(verb)}))
            for verb in ("mute", "unmute")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert run.run(client) == 0
    told = {order["command"]["verb"]: 100 + order["request"] for order in run.orders("capture") if "command" in order}
    assert {verb: (reply.verb, reply.frame) for verb, reply in replies.items()} == {
        verb: (verb, frame) for verb, frame in told.items()
    }


def test_a_stage_that_is_not_running_is_not_told(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(capture=[[["wait_for", str(tmp_path / "go")], *HEALTHY]])

    def client() -> None:
        run.wait_for(playback="ready", inference="ready", capture="starting")
        assert run.ask("mute") == Reply(
            ok=False, verb="mute", stage="capture", error="capture is starting, not running"
        )
        assert run.ask("reset").error == "inference is ready, not running"
        (tmp_path / "go").touch()
        run.wait_until_running()

    assert run.run(client) == 0
    assert "apply" not in run.order_types("capture")


def test_a_stage_that_does_not_acknowledge_gives_an_error(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "ANSWER_S", 0.1)
    run = make_run(capture=[[["say", "ready"], ["serve", {"acknowledge": False}]]])

    def client() -> None:
        run.wait_until_running()
        error = "capture did not acknowledge mute within 0.1 s"
        assert run.ask("mute") == Reply(ok=False, verb="mute", stage="capture", error=error)
        assert run.ask("status").ok

    assert run.run(client) == 0


def test_status_says_whether_the_microphone_is_muted(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        assert not run.wait_until_running().muted
        assert run.ask("mute").ok
        assert run.status().muted
        assert run.ask("unmute").ok
        assert not run.status().muted

    assert run.run(client) == 0


def test_muted_is_said_only_where_the_microphone_is_or_will_be(make_run: MakeRun, tmp_path: Path) -> None:
    """Whoever reads it takes it that nothing is heard."""
    run = make_run(capture=[[["wait_for", str(tmp_path / "go")], *HEALTHY]])

    def client() -> None:
        run.wait_for(playback="ready", inference="ready", capture="starting")
        run.ask("mute")  # whether it is refused or kept for later
        (tmp_path / "go").touch()
        status = run.wait_until_running()
        run.ask("reset")
        told = run.order_types("capture").index("start") > 0  # of anything before it was started: to mute
        assert status.muted == told

    assert run.run(client) == 0


def test_an_acknowledgement_with_an_error_is_an_error(make_run: MakeRun) -> None:
    run = make_run(capture=[[["say", "ready"], ["serve", {"error": "it cannot"}]]])

    def client() -> None:
        run.wait_until_running()
        reply = run.ask("mute")
        assert (reply.ok, reply.error) == (False, "it cannot")

    assert run.run(client) == 0


def test_a_command_that_is_under_way_when_the_run_ends_is_answered(make_run: MakeRun) -> None:
    """One request, one reply: a client does not wait for nothing."""
    run = make_run(capture=[[["say", "ready"], ["serve", {"acknowledge": False}]]])
    replies: list[Reply] = []

    def ask() -> None:
        with contextlib.suppress(ControlError):
            replies.append(run.ask("mute"))

    asking = threading.Thread(target=ask)

    def client() -> None:
        run.wait_until_running()
        asking.start()
        wait_until(lambda: "apply" in run.order_types("capture"), "the stage to be told")

    assert run.run(client) == 0
    asking.join()
    error = "the run ended before capture acknowledged mute"
    assert replies == [Reply(ok=False, verb="mute", stage="capture", error=error)]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b'{"verb": "dance"}', "Invalid value 'dance' - at `$.verb`"),
        (b"[]", "Expected `object`, got `array`"),
        (b'"status"', "Expected `object`, got `str`"),
        (b"{}", "Object missing required field `verb`"),
        (b"\xff\xfe", "malformed"),
        (b'{"x":' + b"[" * 60_000, "maximum recursion depth exceeded"),
        (b'{"x":' * 10_000, "maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_command_is_refused(sent: bytes, said: str, shared_run: Callable[[bytes], Reply]) -> None:
    reply = shared_run(sent)
    assert not reply.ok
    assert reply.error.startswith("not a command: ")
    assert said in reply.error
    assert all(verb in reply.error for verb in messages.VERBS)
    assert shared_run(b'{"verb": "status"}').ok


def test_of_a_verb_that_there_is_it_is_said_what_is_wrong_with_its_values(shared_run: Callable[[bytes], Reply]) -> None:
    assert shared_run(b'{"verb": "mute", "loud": 1}').error == "mute: object contains unknown field `loud`"


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bytes], Reply]]:
    """A run in a process of its own that several tests ask."""
    with a_process(tmp_path_factory.mktemp("notes")) as (run_folder, _):
        yield lambda sent: request(run_folder.control, sent, PATIENCE_S)


# Status


def test_status_holds_what_the_stages_and_the_rings_hold(make_run: MakeRun) -> None:
    records = [
        messages.TimingRecord(stage="capture", frame=0, start_ns=0, end_ns=82 * NS_PER_MS, queued=0),
        messages.TimingRecord(stage="inference", frame=0, start_ns=0, end_ns=30 * NS_PER_MS, queued=0),
        messages.TimingRecord(stage="inference", frame=1, start_ns=0, end_ns=90 * NS_PER_MS, queued=0),
        messages.TimingRecord(
            stage="playback", frame=0, start_ns=0, end_ns=5 * NS_PER_MS, queued=0, mic_to_speaker_ms=150
        ),
        messages.Heartbeat(stage="inference", device_latency_ms=2.5, lost_reports=4),
    ]
    sent = [["send", messages.encode(record).decode()] for record in records]
    run = make_run(inference=[[["say", "ready", "a model"], *sent, ["serve"]]])

    def client() -> None:
        run.wait_until_running()
        run.ahead_ns = 3_600 * NS_PER_S
        rings = {spec.name: Ring.attach(run.folder.segment(spec.name)) for spec in RINGS}
        writer, heard = RingWriter(rings["capture"]), RingWriter(rings["heard"])
        writer.write(np.zeros(3 * FRAME, np.float32))
        writer.count("cleaned", 3)
        writer.count("xruns", 2)
        RingWriter(rings["playback"]).count("cleaned", 6)
        heard.write(np.zeros(100, np.float32))
        heard.count("concealed", 100)
        heard.count("xruns")
        status = run.status()
        for ring in rings.values():
            ring.close()
        assert (status.schema, status.name, status.state, status.engine) == (1, "t", "running", "echo")
        assert 3_600 <= status.uptime_s < 3_700
        assert list(status.stages) == [process.name for process in PROCESSES]
        for stage, popen in zip(status.stages.values(), run.processes, strict=True):
            assert (stage.state, stage.pid, stage.restarts) == ("running", popen.pid, 0)
            assert stage.memory_mb > 1
            assert stage.cpu_s > 0
        assert (status.pid, status.muted) == (os.getpid(), False)
        assert status.stages["playback"].device_latency_ms == 1.5
        assert [stage.lost_reports for stage in status.stages.values()] == [0, 4, 0]
        assert status.accounting == messages.Accounting(
            captured=3 * FRAME, waiting_in=3 * FRAME, sent=100, concealed=100, cleaned=3, cleaned_answers=6
        )
        assert status.xruns == messages.Xruns(capture=2, playback=1)
        assert status.drift_ppm is None
        timing = status.timing
        assert timing.capture.max_ms == pytest.approx(2, rel=0.001)  # beyond the 80 ms that a frame takes to fill
        assert (timing.inference.frames, timing.inference.late, timing.inference.budget_ms) == (2, 1, 80)
        assert timing.inference.max_ms == pytest.approx(90, rel=0.001)
        assert timing.inference.p50_ms == pytest.approx(30, rel=0.001)
        assert timing.playback.max_ms == pytest.approx(5, rel=0.001)
        assert timing.mic_to_speaker_ms.p95_ms == pytest.approx(150, rel=0.001)

    assert run.run(client) == 0


def test_the_reply_to_status_holds_what_was_promised(shared_run: Callable[[bytes], Reply]) -> None:
    found = json.loads(messages.encode(shared_run(b'{"verb": "status"}').status))
    assert set(found) >= {"pid", "muted"}
    assert set(found) >= {"schema", "name", "state", "engine", "uptime_s", "stages", "accounting", "timing", "xruns"}
    assert "drift_ppm" in found
    assert all(set(stage) >= {"state", "pid", "restarts"} for stage in found["stages"].values())
    assert set(found["accounting"]) >= {
        "captured", "stepped", "dropped", "waiting_in", "generated", "played", "skipped", "waiting_out", "concealed",
    }  # fmt: skip
    assert set(found["timing"]) == {"capture", "inference", "playback", "mic_to_speaker_ms"}
    assert set(found["timing"]["inference"]) >= {"p50_ms", "p95_ms", "p99_ms", "max_ms", "budget_ms", "late"}
    assert set(found["timing"]["mic_to_speaker_ms"]) >= {"p50_ms", "p95_ms", "max_ms"}
    assert set(found["xruns"]) == {"capture", "playback"}


# The name


def test_a_name_that_is_taken_is_refused_and_nothing_is_touched(make_run: MakeRun, folder: RunFolder) -> None:
    run = make_run()
    holder = RunFolder("t")  # in this process, but as if it were another
    holder.lock()
    (folder.path / "kept").touch()
    open_before = len(os.listdir("/dev/fd"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ControlError, match="a run named 't' is up already"):
            run.run()
        gc.collect()
    assert (folder.path / "kept").exists()
    holder.release()
    assert run.processes == []
    assert [str(warning.message) for warning in warned] == []  # such as of a socket that was left open
    assert len(os.listdir("/dev/fd")) == open_before - 1  # the holder's lock


def test_what_a_dead_run_left_is_cleared(make_run: MakeRun, folder: RunFolder) -> None:
    for spec in RINGS:
        Ring.create(folder.segment(spec.name), seconds=1).close()
    for path in (folder.path / "lock", folder.settings, folder.control, folder.events, folder.log("capture")):
        path.write_bytes(b"left")
    run = make_run()

    def client() -> None:
        assert run.wait_until_running().accounting.captured == 0
        assert folder.settings.read_bytes() != b"left"
        assert folder.log("capture").read_bytes() == b""

    assert run.run(client) == 0
    run.assert_nothing_left()


def test_what_no_run_put_into_the_folder_is_left_there(make_run: MakeRun, folder: RunFolder) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        (folder.path / "thesis.txt").write_text("mine")

    assert run.run(client) == 0
    assert [path.name for path in folder.path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="holds something that no run put there"):
        run.run()


ORPHAN: Final = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def test_stages_that_outlive_their_supervisor_are_ended_and_no_others(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_ORPHANS_S", 0.3)
    here = os.environ | {"PIPELINE_RUNTIME_DIR": str(folder.path.parent)}
    elsewhere = os.environ | {"PIPELINE_RUNTIME_DIR": str(folder.path.parent / "elsewhere")}
    begun = [
        subprocess.Popen([sys.executable, "-c", ORPHAN, *arguments], env=env, stdout=subprocess.PIPE)
        for arguments, env in (
            (["procs.capture", "--name", "t", "--supervised", "3"], here),
            (["procs.capture", "--name", "u", "--supervised", "3"], here),  # another run's
            (["procs.capture", "--name", "t", "--supervised", "3"], elsewhere),
            (["procs.capture", "--name", "t"], here),  # by hand
            (["procs.kitchen", "--name", "t", "--supervised", "3"], here),
        )
    ]
    try:
        for popen in begun:
            assert popen.stdout is not None
            popen.stdout.readline()
        end_orphans(folder)
        assert begun[0].poll() is not None
        assert [popen.poll() for popen in begun[1:]] == [None] * 4
    finally:
        for popen in begun:
            popen.kill()
            popen.communicate()


# A supervisor in a process of its own


@contextlib.contextmanager
def a_process(
    notes: Path, ignored: signal.Signals | None = None
) -> Iterator[tuple[RunFolder, "subprocess.Popen[bytes]"]]:
    """This module's `main`: a supervisor and healthy stages."""
    with pytest.MonkeyPatch.context() as patch, helpers.temporary_runtime_dir(patch):
        run_folder = RunFolder("t")
        before = signal.signal(ignored, signal.SIG_IGN) if ignored is not None else None
        popen = subprocess.Popen([sys.executable, "-m", "tests.test_supervisor", str(notes)])
        if ignored is not None:
            signal.signal(ignored, before)
        try:
            is_up(run_folder)
            yield run_folder, popen
        finally:
            children = psutil.Process(popen.pid).children() if popen.poll() is None else []
            popen.kill()
            popen.wait()
            psutil.wait_procs(children, timeout=PATIENCE_S)


def is_up(run_folder: RunFolder) -> None:
    def running() -> bool:
        with contextlib.suppress(ControlError):
            status = request(run_folder.control, b'{"verb": "status"}', PATIENCE_S).status
            return status is not None and {stage.state for stage in status.stages.values()} == {"running"}
        return False

    wait_until(running, "the run to be up")


def main(notes: Path) -> int:
    supervisor.STOP_S = PATIENCE_S  # type: ignore[misc]
    return Run(RunFolder("t"), notes, {}).supervise()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    with a_process(tmp_path) as (run_folder, popen):
        children = psutil.Process(popen.pid).children()
        assert len(children) == 3
        popen.send_signal(number)
        assert popen.wait(PATIENCE_S) == 0
        assert [child.pid for child in children if child.is_running()] == []
        assert segments_left(run_folder) == []
        assert not run_folder.path.exists()
    assert (tmp_path / "capture").read_text().splitlines()[-1] == '{"type":"stop"}'


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path, number: signal.Signals) -> None:
    """As under nohup."""
    with a_process(tmp_path, ignored=number) as (run_folder, popen):
        popen.send_signal(number)
        reply = request(run_folder.control, b'{"verb": "reset"}', PATIENCE_S)
        assert reply.ok
        assert popen.poll() is None
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(PATIENCE_S) == 0


def test_stages_leave_when_the_supervisor_is_killed_and_the_next_one_clears(tmp_path: Path) -> None:
    with a_process(tmp_path) as (run_folder, popen):
        children = psutil.Process(popen.pid).children()
        popen.kill()
        popen.wait(PATIENCE_S)
        gone, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert (len(gone), alive) == (3, [])
        assert not run_folder.is_locked()
        assert segments_left(run_folder) == [spec.name for spec in RINGS]
        again = subprocess.Popen([sys.executable, "-m", "tests.test_supervisor", str(tmp_path)])
        try:
            is_up(run_folder)
        finally:
            again.terminate()
            again.wait(PATIENCE_S)
        assert again.returncode == 0
        assert segments_left(run_folder) == []
        assert not run_folder.path.exists()


# The real stages


def test_a_muted_microphone_stays_muted_when_its_stage_is_started_again(make_run: MakeRun) -> None:
    config = {"capture": CaptureConfig(input="tone:440"), "playback": PlaybackConfig(output="null")}
    run = make_run(config)

    def client() -> None:
        before = run.wait_until_running()
        ring = Ring.attach(run.folder.segment("capture"))
        try:
            wait_until(lambda: bool(ring.data.any()), "a tone")
            assert run.ask("mute").ok
            time.sleep(0.1)  # the block under way
            muted_at = ring.position
            os.kill(before.stages["capture"].pid or 0, signal.SIGKILL)
            wait_until(lambda: ring.generation == 2, "another writer")
            run.wait_until_running()
            wait_until(lambda: ring.position > muted_at + 3 * FRAME, "samples of the successor")
            assert ring.position < ring.capacity
            audible = bool(ring.data[muted_at : ring.position].any())
            assert not audible
        finally:
            ring.close()

    assert run.run(client, supervisor.launch) == 1  # there was a restart
    assert run.final is not None
    assert run.final.accounting.discrepancies() == []


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
