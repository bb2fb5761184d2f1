"""What a run promises under faults, in short: stalls, kills, hangs, a model that is too slow. Longer by `make soak`.

Chance has a seed; no duration is asserted of what real processes do, only that it happens, and in which order.
"""

import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from pipeline import chaos
from pipeline.audio import FADE
from pipeline.chaos import Chaos, Incident, parse, stage_process
from pipeline.client import Client
from pipeline.config import Config, FaultsConfig
from pipeline.messages import TimingRecord
from pipeline.ring import RingWriter
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import FRAME, FRAME_MS, FRAME_NS, SAMPLE_RATE
from procs import inference, playback
from procs.engines import Answer, Echo
from procs.inference import Inference
from procs.playback import Player
from tests import helpers
from tests.helpers import largest_step, stage_context, tone
from tests.integration.test_life import segments
from tests.runs import Run, Runs, Samples, busy, children, read_wav, wait_for, write_wav

folder = helpers.folder
runtime_dir = helpers.runtime_dir

SPEECH: Final = Path(__file__).parents[2] / "pipeline" / "assets" / "speech.flac"
WHOLE_HZ: Final = 450
"""Whole periods in a frame: where frames were dropped the tone goes on as if none had been, even as echo returns it."""

STEP_MS: Final = 50
SETTLED_FRAMES: Final = 12


def settings(*lines: str, step_ms: float = STEP_MS) -> str:
    """Of a stand-in for a model of a set speed; `lines` come first."""
    return "\n".join(["engine = 'echo'", *lines, "[faults]", f"step_ms = {step_ms}", "hang = 'lock'"]) + "\n"


@pytest.fixture
def here(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The same runtime folder for this process's own clients."""
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(runs.folder / "run"))
    return runs


@contextmanager
def up(runs: Runs, name: str, config: str, *arguments: str) -> Iterator[tuple[Run, Client]]:
    """A run with a settings file of its own, running."""
    path = runs.folder / f"{name}.toml"
    path.write_text(config)
    with runs.up("--config", str(path), *arguments, name=name) as run:
        run.running()
        yield run, Client(name)


def played(client: Client, frames: int) -> None:
    """Wait until so many more frames were played."""
    goal = client.status().accounting.played + frames * FRAME
    wait_for(lambda: client.status().accounting.played >= goal, f"{frames} frames more")


def stall(client: Client, seconds: float) -> None:
    chaos.stall(stage_process(client.status(), "inference"), seconds)


class Answered(threading.Thread):
    """The numbers of the frames that the model answered, from the events, which nobody counts but this."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self.numbers: list[int] = []
        self._events = client.events("timing.inference", timeout_s=1.0)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            if isinstance(event := next(self._events, None), TimingRecord):
                self.numbers.append(event.frame)

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._events.close()


def assert_no_click(recorded: Samples, signal_: Samples) -> None:
    """No step is larger than the signal's own, and what a fade of a raised cosine adds to it by its slope."""
    allowed = largest_step(signal_) + float(np.abs(signal_).max()) * np.pi / (FADE + 1)
    assert largest_step(recorded) <= allowed


def silent_stretches(recorded: Samples) -> list[int]:
    """The lengths of the stretches of zeros, those aside that a signal has where it passes through zero."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], recorded == 0, [False]))))
    lengths = edges[1::2] - edges[::2]
    return [int(length) for length in lengths if length > 8]


def assert_concealed_as_counted(recorded: Samples, counts: Any) -> None:
    """Concealment is a fade out, a fade long, and then zeros: as much of it is heard as was counted."""
    silent = silent_stretches(recorded)
    fades = counts.concealed - sum(silent)
    assert 0 <= fades <= (counts.gaps + 2) * FADE


# Inference stopped


def test_stalls_of_a_model(here: Runs) -> None:
    """Three runs side by side, so that it takes no longer than the longest."""
    tests = (short_stalls, a_stall_within_the_ring, a_stall_beyond_the_ring)
    failures: list[BaseException] = []

    def carry_out(test: Callable[[Runs], None]) -> None:
        try:
            test(here)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=carry_out, args=(test,)) for test in tests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert here.leftovers() == []


def short_stalls(runs: Runs) -> None:
    """0.1, 0.5 and 2 s, on a tone: no click, and the silence that is heard is the one that was counted."""
    dice = random.Random(5)  # noqa: S311
    target = runs.folder / "tone.wav"
    with up(runs, "short", settings(), "--input", f"tone:{WHOLE_HZ}", "--output", f"file:{target}") as (run, client):
        for seconds in (0.1, 0.5, 2.0):
            played(client, SETTLED_FRAMES + dice.randrange(6))
            before = client.status().accounting
            stall(client, seconds)
            played(client, SETTLED_FRAMES)
            after = client.status().accounting
            assert after.discrepancies() == []
            assert after.gaps > before.gaps or seconds < 0.2
        assert run.interrupt() == 0, run.err
    recorded = read_wav(target)
    assert len(recorded) >= after.sent
    assert_no_click(recorded, tone(50, WHOLE_HZ, level=float(np.abs(recorded).max())))
    assert_concealed_as_counted(recorded[: after.sent], after)


def a_stall_within_the_ring(runs: Runs) -> None:
    """6 s, on speech, where no backlog is too long: nothing that was said is lost, and there is no click."""
    target, source = runs.folder / "speech.wav", runs.folder / "in.wav"
    speech = np.resize(read_wav(SPEECH), 60 * SAMPLE_RATE)
    write_wav(source, speech)
    lines = ("[inference]", "backlog_limit = 100", "[playback]", "queue_frames = 100")
    given = ("--input", f"file:{source}", "--output", f"file:{target}")
    with up(runs, "within", settings(*lines), *given) as (run, client):
        answered = Answered(client)
        played(client, 2)
        stall(client, 6.0)
        wait_for(lambda: client.status().accounting.waiting_in < 2 * FRAME, "the backlog's end")
        counts = client.status().accounting
        assert counts.discrepancies() == []
        assert counts.dropped == 0
        assert counts.captured == counts.stepped + counts.waiting_in
        answered.stop()
        assert np.array_equal(np.diff(answered.numbers), np.ones(len(answered.numbers) - 1))
        assert len(answered.numbers) > 6_000 / FRAME_MS
        assert run.interrupt() == 0, run.err
    assert_no_click(read_wav(target), speech)


def a_stall_beyond_the_ring(runs: Runs) -> None:
    """11 s with a ring of 10: what is lost is counted, and the frames that were answered bear it out."""
    target = runs.folder / "beyond.wav"
    given = ("--input", f"tone:{WHOLE_HZ}", "--output", f"file:{target}")
    with up(runs, "beyond", settings("ring_seconds = 10"), *given) as (run, client):
        answered = Answered(client)
        played(client, SETTLED_FRAMES)
        before = client.status().accounting
        stall(client, 11.0)
        played(client, 2 * SETTLED_FRAMES)
        answered.stop()
        counts = client.status().accounting
        assert counts.discrepancies() == []
        assert counts.dropped - before.dropped >= (10_000 / FRAME_MS - 8 - 1) * FRAME
        missing = np.diff(answered.numbers) - 1
        assert int(missing.sum()) * FRAME == counts.dropped - before.dropped
        assert run.interrupt() == 0, run.err
    recorded = read_wav(target)
    assert_no_click(recorded, tone(50, WHOLE_HZ, level=float(np.abs(recorded).max())))


# Stages killed, stages that hang


def one_fault(client: Client, fault: str, seed: int) -> Incident:
    """Put one fault into a run that is up, and wait until frames flow again."""
    found: list[Incident] = []
    one = Chaos(client, parse(fault), seed, found.append, normal_s=0.001)
    one.run(0)
    [incident] = found
    assert incident.flows_s is not None, one.wrong
    assert not [line for line in one.wrong if "latency" not in line]
    return incident


def test_stages_killed_and_hung_under_load(here: Runs) -> None:
    """Each comes back by itself, the account still balances; when the supervisor is killed nobody stays."""
    given = ("--input", "tone:440", "--output", "null")
    steady = ("[playback]", "prebuffer_ms = 80")
    with (
        busy(1),
        up(here, "killed", settings(*steady), *given) as (killed, first),
        up(here, "hung", settings(*steady), *given) as (hung, second),
    ):
        incidents: dict[str, list[Incident]] = {"killed": [], "hung": []}

        def inflict(name: str, client: Client, *faults: str) -> None:
            incidents[name] += [one_fault(client, fault, seed) for seed, fault in enumerate(faults)]

        kills = threading.Thread(
            target=inflict, args=("killed", first, "kill=capture", "kill=inference", "kill=playback")
        )
        kills.start()
        inflict("hung", second, "hang=inference")
        kills.join()
        assert [incident.restarts for incident in incidents["killed"]] == [1, 1, 1]
        assert [incident.restarts for incident in incidents["hung"]] == [1]
        assert hung.err.count("inference hangs: no sign of life for 3 s") == 1
        assert "_keep_the_lock" in (here.folder / "run" / "hung" / "inference.log").read_text()
        for run, client in ((killed, first), (hung, second)):
            assert client.status().accounting.discrepancies() == []
            assert "accounting:" not in run.err
        stages = children(killed.process)
        os.kill(killed.process.pid, signal.SIGKILL)
        wait_for(lambda: not [one for one in stages if one.is_running()], "the stages to leave")
        assert hung.interrupt() == 1
    again = here.call("down", "--name", "killed")
    assert again.returncode == 0, again.stderr
    assert segments(here, "killed") == segments(here, "hung") == []
    # What a stage wrote that hung is kept.
    assert {left for left in here.leftovers() if not left.endswith(".log")} <= {"hung", "hung/lock"}


def test_chaos_as_a_user_calls_it(here: Runs) -> None:
    """A row a fault and a summary; what is wrong is one line."""
    given = ("--input", "tone:440", "--output", "null")
    with up(here, "default", "engine = 'echo'\n[playback]\nprebuffer_ms = 80\n", *given) as (run, client):
        done = here.call("chaos", "--seed", "3", "--seconds", "0.5", "--faults", "stall=inference:0.4")
        assert done.returncode == 0, done.stderr + done.stdout
        head, line, summary = done.stdout.splitlines()
        assert head == chaos.HEAD
        assert line.split()[1:5] == ["stall", "inference", "0.4", "s"]
        assert summary.startswith("1 faults, ")
        refused = here.call("chaos", "--faults", "hang")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == (
            "pipeline: --faults hang: expected a run with the setting faults.hang, lock or loop\n"
        )
        assert client.status().accounting.discrepancies() == []
        assert run.interrupt() == 0
    nobody = here.call("chaos")
    assert nobody.returncode == 2
    assert nobody.stderr == "pipeline: no run is up under 'default': start one with `pipeline up`\n"


# A model that is too slow


class Simulation:
    """The inference stage and the player on real rings, and a clock that is turned by hand."""

    def __init__(self, stage: Inference, microphone: RingWriter, player: Player) -> None:
        self.stage, self.player = stage, player
        self._microphone = microphone
        self._sound = np.resize(tone(30), 30 * FRAME).reshape(-1, FRAME)
        self._captured = 0
        self._blocks = 0
        self._block = np.zeros(120, np.float32)
        self.time_ns = NS_PER_S

    def now_ns(self) -> int:
        return self.time_ns

    def pass_ns(self, duration_ns: int) -> None:
        """Let time go by: the microphone goes on, and so does the speaker."""
        until_ns = self.time_ns + duration_ns
        while True:
            frame_ns = NS_PER_S + (self._captured + 1) * FRAME_NS
            block_ns = NS_PER_S + self._blocks * 5 * NS_PER_MS
            due_ns = min(frame_ns, block_ns)
            if due_ns > until_ns:
                break
            self.time_ns = due_ns
            if frame_ns == due_ns:
                self._capture(due_ns)
            else:
                self.player.fill(self._block, due_ns, xrun=False)
                self._blocks += 1
        self.time_ns = until_ns

    def _capture(self, due_ns: int) -> None:
        number = self._captured
        self._microphone.mark(number * FRAME, number, due_ns - FRAME_NS, due_ns, due_ns)
        self._microphone.write(self._sound[number % len(self._sound)])
        self._captured += 1

    def run(self, seconds: float) -> None:
        """The inference stage's main loop, for so long."""
        until_ns = self.time_ns + round(seconds * NS_PER_S)
        while self.time_ns < until_ns:
            if not self.stage.work():
                self.pass_ns(NS_PER_MS)


class SlowEcho(Echo):
    """An engine whose step takes the simulation's time."""

    def __init__(self, simulation: Simulation, step_ns: int) -> None:
        super().__init__()
        self._simulation, self._step_ns = simulation, step_ns

    def respond(self) -> Any:
        answer: Answer = super().respond()
        self._simulation.pass_ns(self._step_ns)
        return answer


def test_ten_minutes_of_a_model_that_is_too_slow(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 ms a frame for 10 simulated minutes: latency is the same in the last minute as in the first."""
    config = Config(engine="echo", faults=FaultsConfig(step_ms=0))
    with stage_context(folder, "inference", config) as (context, hub):
        rings = context.rings
        stage = Inference(context)
        player = Player(rings["playback"], rings["heard"], 40 * NS_PER_MS, config.playback.queue_frames)
        simulation = Simulation(stage, RingWriter(rings["capture"]), player)
        monkeypatch.setattr(inference, "now_ns", simulation.now_ns)
        monkeypatch.setattr(playback, "now_ns", simulation.now_ns)
        stage._engine = SlowEcho(simulation, 100 * NS_PER_MS)
        minutes: list[list[float]] = [[] for _ in range(10)]
        seen = 0
        for part in range(60):
            simulation.run(10)
            hub.wait(0)
            deque(hub.reports(), maxlen=0)  # nobody reads them
            marks = [rings["heard"].mark(index) for index in range(seen, rings["heard"].mark_count)]
            seen = rings["heard"].mark_count
            minutes[part // 6] += [(one.start_ns - one.captured_ns) / NS_PER_MS for one in marks if one is not None]
        stage.stop()
        first, last = minutes[1], minutes[-1]
        assert len(first) > 500
        assert abs(float(np.median(first)) - float(np.median(last))) <= FRAME_MS
        assert max(map(max, minutes[1:])) <= max(first) + FRAME_MS
        # What may wait before the model and after it, the step, and the frame itself.
        waiting = config.inference.backlog_limit + 1 + config.playback.queue_frames + 1
        assert max(map(max, minutes)) <= (waiting + 1) * FRAME_MS + 100
        counts = rings["capture"].ledger()
        assert counts.written == counts.consumed + counts.dropped + counts.waiting
        assert counts.dropped > 0
