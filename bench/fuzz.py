"""Malformed messages to a real run, of other seeds and for longer than the suite's.

    python -m bench.fuzz [--messages 100000] [--seeds 5]

Each seed attacks a run of its own, `pipeline up --engine echo`. Printed are what was sent, and the supervisor's memory.
"""

import argparse
import random
import time

from tests.fuzz import EXTREME, MEANINGLESS, Attack
from tests.integration.test_fuzz import CONFIG, attacked, unchanged
from tests.runs import Runs


def attack_once(messages: int, seed: int) -> None:
    """One run. Raises AssertionError where a request is not answered, or carried out."""
    with Runs() as runs:
        options = ("--input", "tone:440", "--output", "null", "--config", str(runs.config(CONFIG)))
        with runs.up("--engine", "echo", *options) as run:
            before = run.running()
            attack = Attack(runs.folder / "run" / "default", seed)
            attack.commands(MEANINGLESS, ok=False)
            attack.commands(EXTREME, ok=True)
            began = time.monotonic()
            memory = attacked(run, attack, messages)
            took_s = time.monotonic() - began
            was, became = unchanged(before), unchanged(run.status())
            code = run.interrupt()
    mib = {when: round(size / 2**20, 1) for when, size in memory.items()}
    changed = {key: (was[key], became[key]) for key in was if was[key] != became[key]} or "nothing"
    sent = attack.sent.total()
    print(f"seed {seed}: {sent:,} messages in {took_s:.0f} s; exit code {code}; resident MiB {mib}; changed: {changed}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    for _ in range(arguments.seeds):
        attack_once(arguments.messages, random.randrange(1 << 32))  # noqa: S311


if __name__ == "__main__":
    main()
