"""One hop from one process to another: our ring against multiprocessing.Queue, ZeroMQ and iceoryx2.

    python -m bench.ring [--seconds 5] [--messages 300] [--repeats 3] [--json FILE]

Every way of passing messages has a writer's and a reader's process of its own (bench/hop.py). They live through the
whole run and take turns, so that whatever else the machine does meets all of them.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, Self

import numpy as np

from bench import peers, results
from bench.hop import LARGEST, Task
from bench.results import Plot, Section, Table, Target
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.runs import busy

Turns = dict[str, list[dict[str, float]]]
"""Of each transport, the figures of each repeat."""

BLOCK: Final = SAMPLE_RATE // 100
_PERCENTILES: Final = (1, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9)
_BURST: Final = {FRAME: 2_000, BLOCK: 5_000}
_PATIENCE_S: Final = 60.0
_FIFTH: Final = 0.2
_TWICE: Final = 2.0


class Transport(NamedTuple):
    """A way of passing messages."""

    title: str
    package: str | None = None
    """Without which it is not there; None for ours."""
    only_busy: bool = False
    """Measured only where the cores are loaded."""


TRANSPORTS: Final = {
    "ring": Transport("our ring and bell"),
    "promoted": Transport("our ring and bell, at an audio thread's priority", only_busy=True),
    "queue": Transport("multiprocessing.Queue, get()", "numpy"),
    "polled": Transport("multiprocessing.Queue, looked at each ms", "numpy"),
    "zmq": Transport("ZeroMQ, PUSH and PULL over ipc", "pyzmq"),
    "iceoryx2": Transport("iceoryx2, with its listener", "iceoryx2"),
}


class Case(NamedTuple):
    """Messages of so many samples at a pace, with so many cores loaded by others."""

    title: str
    samples: int
    hz: float
    busy: int = 0


REAL: Final = Case("frames, 12.5 a second", FRAME, 12.5)
FRAMES: Final = Case("frames, 125 a second", FRAME, 125)
BLOCKS: Final = Case("blocks, 100 a second", BLOCK, 100)


def cases() -> list[Case]:
    """Each of the paces, and the fast ones again with all cores loaded."""
    cores = os.cpu_count() or 1
    loaded = [case._replace(title=f"{case.title}, all cores busy", busy=cores) for case in (FRAMES, BLOCKS)]
    return [REAL, FRAMES, BLOCKS, *loaded]


class Host:
    """The program that holds the two processes of a transport."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        interpreter = sys.executable if TRANSPORTS[transport].package is None else str(peers.python())
        self._program = subprocess.Popen(
            [interpreter, "-m", "bench.hop", transport],
            cwd=results.ROOT,
            env={**os.environ, "PYTHONPATH": str(results.ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # with the processes that it starts
        )
        self.carry_out({"samples": LARGEST, "count": 20, "interval_s": 0.005, "before_s": 0.0})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._program.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._program.pid, signal.SIGKILL)
            self._program.communicate()

    def begin(self, task: Task) -> None:
        """Give it a task."""
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps(task) + "\n")
        self._program.stdin.flush()

    def result(self) -> Task:
        """What came of it."""
        assert self._program.stdout is not None
        ready, _, _ = select.select([self._program.stdout], [], [], _PATIENCE_S)
        line = self._program.stdout.readline() if ready else ""
        if not line:
            raise ChildProcessError(f"bench.hop {self._transport} gave no result within {_PATIENCE_S:g} s, or ended")
        result: Task = json.loads(line)
        return result

    def carry_out(self, task: Task) -> Task:
        """One task, to its end."""
        self.begin(task)
        return self.result()


Hosts = dict[str, Host]


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[Hosts]:
    """The programs of these transports."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Host(name)) for name in names}


def installed() -> dict[str, str | None]:
    """The version of what each transport needs; None where it is not there."""
    return {name: peers.version(spec.package) if spec.package else "" for name, spec in TRANSPORTS.items()}


# The measurement


def turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Who is next: everyone in each repeat, and another one first each time."""
    for repeat in range(repeats):
        at = repeat % len(names)
        yield from ((repeat, name) for name in (*names[at:], *names[:at]))


def ordinary(running: Hosts) -> Hosts:
    """Those that are measured in every case."""
    return {name: host for name, host in running.items() if not TRANSPORTS[name].only_busy}


def pace(running: Hosts, case: Case, count: int, repeats: int) -> tuple[Turns, dict[str, list[float]]]:
    """Figures of each turn, and the latencies of all repeats together, in us."""
    task = {"samples": case.samples, "count": count, "interval_s": 1 / case.hz, "before_s": 0.0}
    found: Turns = {name: [] for name in running}
    all_us: dict[str, list[float]] = {name: [] for name in running}
    with busy(case.busy) if case.busy else nullcontext():
        for _, name in turns(list(running), repeats):
            result = running[name].carry_out(task)
            found[name].append(figures(result))
            all_us[name] += result["latency_us"]
    return found, all_us


def figures(result: Task) -> dict[str, float]:
    """Of one turn: percentiles, and what each process used, in % of a core."""
    p50, p99 = np.percentile(result["latency_us"], (50, 99)).tolist()
    used = {f"{end}_percent": 100 * result[f"{end}_cpu_s"] / result["took_s"] for end in ("writer", "reader")}
    wakes = result["reader_switches"] / result["took_s"]
    return {"p50_us": p50, "p99_us": p99, "max_us": max(result["latency_us"]), **used, "reader_sleeps_hz": wakes}


def burst(running: Hosts, samples: int, repeats: int) -> dict[str, list[float]]:
    """Messages a second, back to back."""
    task = {"samples": samples, "count": _BURST[samples], "interval_s": 0, "before_s": 0.0}
    found: dict[str, list[float]] = {name: [] for name in running}
    for _, name in turns(list(running), repeats):
        found[name].append(task["count"] / running[name].carry_out(task)["took_s"])
    return found


def rest(running: Hosts, seconds: float, repeats: int) -> Turns:
    """What everyone uses while nothing is sent: all at once, they have nothing to disturb each other with."""
    task = {"samples": FRAME, "count": 1, "interval_s": 0, "before_s": seconds}
    found: Turns = {name: [] for name in running}
    for _ in range(repeats):
        for host in running.values():
            host.begin(task)
        for name, host in running.items():
            result = host.result()
            found[name].append(figures({**result, "took_s": result["took_s"] + seconds}))
    return found


# The report


def latency_table(case: Case, found: Turns, all_us: dict[str, list[float]]) -> Table:
    """Percentiles of a case."""
    rows = []
    for name, repeats in found.items():
        p999, worst = np.percentile(all_us[name], (99.9, 100)).tolist()
        spreads = [results.spread([repeat[key] for repeat in repeats]) for key in ("p50_us", "p99_us")]
        rows.append([TRANSPORTS[name].title, *spreads, results.figure(p999), results.figure(worst)])
    count = len(next(iter(all_us.values())))
    columns = ["", "p50, µs", "p99, µs", f"p99.9 of all {count:,}, µs", "worst, µs"]
    return Table(f"Hop: {case.title}", columns, rows)


def cpu_table(paced: Turns, resting: Turns) -> Table:
    """What each process uses, in % of a core."""
    rows = []
    for name in paced:
        cells = [
            results.spread([repeat[key] for repeat in found[name]])
            for found in (paced, resting)
            for key in ("writer_percent", "reader_percent", "reader_sleeps_hz")
            if found is resting or key != "reader_sleeps_hz"
        ]
        rows.append([TRANSPORTS[name].title, *cells])
    columns = [
        "",
        "writer, 12.5 Hz, %",
        "reader, 12.5 Hz, %",
        "writer, idle, %",
        "reader, idle, %",
        "wakes a second, idle",
    ]
    note = "The writer's figure holds what is the same for all: it wakes, makes an array and looks at the clock."
    return Table("CPU, in % of a core", columns, rows, note)


def burst_table(frames: dict[str, list[float]], blocks: dict[str, list[float]]) -> Table:
    """Throughput."""
    rows = []
    for name in frames:
        cells = []
        for samples, found in ((FRAME, frames), (BLOCK, blocks)):
            cells += [results.spread(found[name]), results.figure(median(found[name]) * samples * 4 / 1e6)]
        rows.append([TRANSPORTS[name].title, *cells])
    return Table("Back to back", ["", "frames/s", "MB/s", "blocks/s", "MB/s"], rows, _BURST_NOTE)


def targets_of(case: Case, found: Turns) -> list[Target]:
    """Of a case: ours against the two peers that a target names."""
    ours = [name for name in ("ring", "promoted") if name in found]
    return [target(case, found, name, *limit) for name in ours for limit in (("queue", _FIFTH), ("iceoryx2", _TWICE))]


def target(case: Case, found: Turns, ours: str, peer: str, limit: float) -> Target:
    """Whether our p99 is at most `limit` times the peer's: the median of the ratios of the repeats."""
    what = f"{case.title}: p99 of {TRANSPORTS[ours].title} against {TRANSPORTS[peer].title}"
    asked = f"at most {limit:g} times"
    if peer not in found:
        return Target(what, asked, "not installed", False, "The peer is not installed on this machine.")
    ratios = [mine["p99_us"] / theirs["p99_us"] for mine, theirs in zip(found[ours], found[peer], strict=True)]
    met = median(ratios) <= limit
    return Target(what, asked, f"{results.spread(ratios)} times", met, "" if met else _why(found, ours, peer))


def _why(found: Turns, ours: str, peer: str) -> str:
    """What is known of a miss, with the ratio that shows what the transport itself takes."""
    ratios = [mine["p50_us"] / theirs["p50_us"] for mine, theirs in zip(found[ours], found[peer], strict=True)]
    return f"At p50 it is {results.spread(ratios)} times. {_TAIL}"


def plots(found: dict[str, Turns], all_us: dict[str, dict[str, list[float]]]) -> list[Plot]:
    """p99 in every case, and the whole distribution in the hardest."""
    bars: dict[str, list[tuple[float | str, float]]] = {}
    for case, by in found.items():
        for name, repeats in by.items():
            bars.setdefault(TRANSPORTS[name].title, []).append((case, median(turn["p99_us"] for turn in repeats)))
    shown = [Plot("ring-p99", "Hop latency, p99", "", "µs", "bars", True, bars)]
    for case, name in ((FRAMES.title, "quiet"), (f"{FRAMES.title}, all cores busy", "busy")):
        lines: dict[str, list[tuple[float | str, float]]] = {
            TRANSPORTS[peer].title: [(p, float(np.percentile(us, p))) for p in _PERCENTILES]
            for peer, us in all_us[case].items()
        }
        shown.append(Plot(f"ring-{name}", f"Hop latency: {case}", "percentile", "µs", "lines", True, lines))
    return shown


_TEXT: Final = """\
The time of one message from one process to another: from just before it is written until the reader, which slept, has
it as a numpy array. Frames are 7,680 bytes (80 ms of samples), blocks 960 (10 ms). Every message is a new array that
is stamped with the monotonic clock; the reader copies it, or holds memory of its own, so that the next message cannot
change it. All processes run at ordinary priority, but in the rows that name another, and none is tied to a core.

- *Our ring*: `pipeline/ring.py` with the accounting of its consumer; the reader waits in the loop's own wait of a
  stage, for the bell and for orders of the supervisor together. The bell is rung for each message here; in a run,
  once a frame. With the cores busy it is measured twice: as the others are, and with both processes at the priority
  that a run gives to an audio device's thread and to an engine that only copies (SCHED_FIFO, where the system permits
  it); an engine that computes runs at ordinary priority.
- *multiprocessing.Queue*: `put_nowait` of the array. Read by `get()`, as upstream's model process does, and each
  millisecond from asyncio, as upstream's audio process does. Upstream sends tokens of a frame, which are smaller than
  the samples sent here.
- *ZeroMQ*: one PUSH and one PULL socket over ipc, `copy=False` on both sides.
- *iceoryx2*: publish and subscribe with an event as the wake-up, as in its own examples; a byte slice, copied by the
  reader, no sample lost (`RetryUntilDelivered`).

At 12.5 messages a second a run of minutes gives few samples, so p99 there is nearly the worst of a repeat; the same
frames ten times as fast give enough for p99.9, and keep the processors more awake than a real run does. p50 and p99
are given as the median of the repeats (smallest to largest). CPU is the processor time of all of a process's threads,
from the kernel's clock of the process, which counts ns where psutil counts ticks of 10 ms."""

_TAIL: Final = """\
The tail is the time until the system runs a process that was woken, which is the same for all of ordinary priority; \
it is shorter at an audio thread's priority, where the cores are busy."""

_BURST_NOTE: Final = """\
The writer sends as fast as it can. Ours waits for room when the ring (10 s) is full, as in an offline run; the queue
has no bound, ZeroMQ holds 1,000 messages a side, iceoryx2 64. In a real run no writer of ours ever waits."""


def measure(seconds: float, messages: int, repeats: int) -> Section:
    """Everything, as a section."""
    began_s = time.monotonic()
    versions = installed()
    found: dict[str, Turns] = {}
    all_us: dict[str, dict[str, list[float]]] = {}
    tables, targets = [], []
    with hosts([name for name, version in versions.items() if version is not None]) as running:
        for case in cases():
            count = max(2, round(seconds * case.hz)) if case is REAL else messages
            print(f"{case.title}: {count} messages, {repeats} times", file=sys.stderr)
            turned, us = pace(running if case.busy else ordinary(running), case, count, repeats)
            found[case.title], all_us[case.title] = turned, us
            tables.append(latency_table(case, turned, us))
            targets += targets_of(case, turned)
        bursts = {samples: burst(ordinary(running), samples, repeats) for samples in (FRAME, BLOCK)}
        resting = rest(ordinary(running), seconds, repeats)
    tables += [cpu_table(found[REAL.title], resting), burst_table(bursts[FRAME], bursts[BLOCK])]
    raw: dict[str, Any] = {
        "versions": versions,
        "paced": found,
        "p99.9_us": {
            case: {name: float(np.percentile(us, 99.9)) for name, us in by.items()} for case, by in all_us.items()
        },
        "idle": resting,
        "frames_per_s": bursts[FRAME],
        "blocks_per_s": bursts[BLOCK],
    }
    return Section(
        name="ring",
        title="A hop between processes",
        command=f"python -m bench.ring --seconds {seconds:g} --messages {messages} --repeats {repeats}",
        text=_TEXT,
        seconds=time.monotonic() - began_s,
        tables=tables,
        targets=targets,
        plots=plots(found, all_us),
        figures=raw,
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the turns at 12.5 Hz, and idle")
    parser.add_argument("--messages", type=int, default=300, help="of the faster turns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results.finish(measure(arguments.seconds, arguments.messages, arguments.repeats), arguments.json)


if __name__ == "__main__":
    main()
