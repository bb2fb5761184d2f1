"""A run that is sent a hundred thousand messages that nobody should send goes on as if there were none."""

import contextlib
from typing import Any, Final

import psutil
import pytest

from pipeline.control import Subscription
from tests.fuzz import EXTREME, MEANINGLESS, PATIENCE_S, UNOPENABLE, Attack, Maker, is_command, is_report
from tests.runs import Run, Runs, assert_balanced, wait_for

MESSAGES: Final = 100_000
SEED: Final = 20_261_122
_ROUNDS: Final = 10
GROWTH_MAX: Final = 16 << 20
"""Bytes that the supervisor may take more after the first of ten rounds: its flight recorder fills meanwhile."""

# The longest prebuffer: what is asserted is that the messages do no harm, not that the machine is never late.
CONFIG: Final = "[playback]\nprebuffer_ms = 80\n"


def unchanged(status: dict[str, Any]) -> dict[str, Any]:
    """What of a status no message may have changed."""
    # Not what was skipped: a first frame that was late is made up for by and by.
    counts = ("gaps", "dropped", "cleaned", "cleaned_answers")
    return {
        "run": [status[key] for key in ("state", "muted", "paused", "recording", "settings", "xruns", "pid")],
        "stages": {
            name: [s["state"], s["pid"], s["restarts"], s["lost_reports"]] for name, s in status["stages"].items()
        },
        "counts": [status["accounting"][name] for name in counts],
    }


def attacked(run: Run, attack: Attack, messages: int = MESSAGES) -> dict[str, int]:
    """Attack a run in ten rounds; returns bytes of memory and descriptors, before and after the last nine."""
    supervisor = psutil.Process(run.process.pid)
    descriptors = supervisor.num_fds()
    for number in range(_ROUNDS):
        attack.everything(messages // _ROUNDS)
        if number == 0:
            first = supervisor.memory_info().rss
    wait_for(lambda: supervisor.num_fds() <= descriptors, "every connection to be closed")
    return {"first round": first, "last round": supervisor.memory_info().rss}


def test_a_run_bears_what_nobody_should_send(runs: Runs) -> None:
    options = ("--input", "tone:440", "--output", "null", "--config", str(runs.config(CONFIG)))
    with contextlib.ExitStack() as open_sockets, runs.up("--engine", "echo", *options) as run:
        run.running()
        folder = runs.folder / "run" / "default"
        attack = Attack(folder, SEED)
        attack.commands(UNOPENABLE, ok=False)
        before = run.status()
        monitor = open_sockets.enter_context(contextlib.closing(Subscription(folder / "events.ipc", ("status",))))
        attack.commands(MEANINGLESS, ok=False)
        attack.commands(EXTREME, ok=True)
        memory = attacked(run, attack)
        after = run.status()
        assert unchanged(after) == unchanged(before)
        assert_balanced(after["accounting"])
        assert after["accounting"]["played"] > before["accounting"]["played"]
        assert memory["last round"] - memory["first round"] < GROWTH_MAX, memory
        assert attack.sent.total() >= MESSAGES
        while monitor.receive(0) is not None:
            pass
        assert monitor.receive(PATIENCE_S) is not None  # it is told as before
        attack.commands([b'{"verb":"mute"}', b'{"verb":"unmute"}', b'{"verb":"status"}'], ok=True)
        assert run.interrupt() == 0, run.err
    assert runs.leftovers() == []


def test_one_seed_makes_one_sequence_of_messages() -> None:
    one, same, other = Maker(1), Maker(1), Maker(2)
    made = [one.request() for _ in range(500)]
    assert made == [same.request() for _ in range(500)]
    assert made != [other.request() for _ in range(500)]


@pytest.mark.parametrize("of", ["requests", "reports"])
def test_what_is_sent_is_of_every_kind_and_nothing_that_is_valid(of: str) -> None:
    maker = Maker(SEED)
    made = [maker.request() if of == "requests" else maker.report() for _ in range(3_000)]
    assert {kind for kind, _ in made} == set(maker.kinds)
    assert not any(is_command(data) if of == "requests" else is_report(data) for _, data in made)
    assert all(is_command(data) for data in MEANINGLESS + UNOPENABLE + EXTREME)
