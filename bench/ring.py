"""One hop from one process to another: our ring against multiprocessing.Queue, ZeroMQ and iceoryx2.

    python -m bench.ring [--seconds 5] [--messages 350] [--repeats 3] [--json FILE]

Every way of passing messages has a writer's and a reader's process of its own (bench/hop.py). They live through the
whole run and take turns, so that whatever else the machine does meets all of them. It takes 5 to 6 minutes.
"""

import argparse
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, Self

import numpy as np

from bench import peers, results
from bench.hop import LARGEST, Task
from bench.results import Plot, Section, Table, Target
from pipeline.ring import segment_name, unlink
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.runs import busy

Turns = dict[str, list[dict[str, float]]]
"""Of each transport, the figures of each repeat."""

Latencies = dict[str, list[float]]
"""Of each transport, the times of all messages of all repeats, in us."""

BLOCK: Final = SAMPLE_RATE // 100
_PERCENTILES: Final = (1, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9)
_BURST: Final = {FRAME: 2_000, BLOCK: 5_000}
_PATIENCE_S: Final = 60.0
"""Longer than its messages are apart a task takes no program that is well."""
_LAST_S: Final = 2.0
"""What is killed has so long to end."""
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
        self._patience_s = _PATIENCE_S
        interpreter = sys.executable if TRANSPORTS[transport].package is None else str(peers.python())
        self._folder = Path(tempfile.mkdtemp(prefix="plhop"))
        self._program = subprocess.Popen(
            [interpreter, "-m", "bench.hop", transport, str(self._folder)],
            cwd=results.ROOT,
            env={**os.environ, "PYTHONPATH": str(results.ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # with the processes that it starts
        )

    def __enter__(self) -> Self:
        try:
            self.carry_out({"samples": LARGEST, "count": 20, "interval_s": 0.005, "before_s": 0.0})
        except BaseException:
            self._end(_LAST_S)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(_LAST_S if kind else self._patience_s)

    def _end(self, patience_s: float) -> None:
        """End its processes, by force where they do not end within that, and remove what is theirs."""
        try:
            self._program.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self._kill()
        finally:
            unlink(segment_name(self._folder, "bench"))
            for path in Path("/dev/shm").glob(f"{self._folder.name}_*"):  # noqa: S108  (iceoryx2's)
                path.unlink(missing_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        # At SIGTERM Python's own process beside them, which ignores it, still removes their semaphores.
        for signals in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
            with suppress(ProcessLookupError):
                for number in signals:
                    os.killpg(self._program.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._program.communicate(timeout=_LAST_S)
                return

    def begin(self, task: Task) -> None:
        """Give it a task."""
        assert self._program.stdin is not None
        self._patience_s = _PATIENCE_S + task["before_s"] + task["count"] * task["interval_s"]
        self._program.stdin.write(json.dumps(task) + "\n")
        self._program.stdin.flush()

    def result(self) -> Task:
        """What came of it."""
        assert self._program.stdout is not None
        ready, _, _ = select.select([self._program.stdout], [], [], self._patience_s)
        line = self._program.stdout.readline() if ready else ""
        if not line:
            within = f"within {self._patience_s:g} s"
            raise ChildProcessError(f"bench.hop {self._transport} gave no result {within}, or ended")
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


def pace(running: Hosts, case: Case, count: int, repeats: int) -> tuple[Turns, Latencies]:
    """Figures of each turn, and the latencies of all repeats together."""
    task = {"samples": case.samples, "count": count, "interval_s": 1 / case.hz, "before_s": 0.0}
    found: Turns = {name: [] for name in running}
    all_us: Latencies = {name: [] for name in running}
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


def pooled(us: Sequence[float]) -> dict[str, float]:
    """Of the messages of all repeats together."""
    shown = {f"p{percentile:g}_us": float(np.percentile(us, percentile)) for percentile in (50, 99, 99.9)}
    return {"messages": len(us), **shown, "max_us": max(us)}


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


def latency_table(case: Case, found: Turns, all_us: Latencies) -> Table:
    """Percentiles of a case."""
    rows = []
    for name, repeats in found.items():
        p50, p99, p999, worst = np.percentile(all_us[name], (50, 99, 99.9, 100)).tolist()
        spreads = [
            _pooled(p50, [turn["p50_us"] for turn in repeats]),
            _pooled(p99, [turn["p99_us"] for turn in repeats]),
        ]
        rows.append([TRANSPORTS[name].title, *spreads, results.figure(p999), results.figure(worst)])
    count = len(next(iter(all_us.values())))
    note = (
        f"Of each: percentiles of the {count:,} messages of all repeats together, of which {_above(count, 99)} lie "
        f"above p99 and {_above(count, 99.9)} above p99.9; in brackets the smallest and the largest of a repeat."
    )
    return Table(f"Hop: {case.title}", ["", "p50, µs", "p99, µs", "p99.9, µs", "worst, µs"], rows, note)


def _above(count: int, percentile: float) -> int:
    """How many of so many messages are above a percentile: what it stands on."""
    return count - math.ceil((count - 1) * percentile / 100)


def _pooled(value: float, of_repeats: Sequence[float]) -> str:
    """A figure of all repeats together, and the smallest and the largest of a repeat by itself."""
    ends = [results.figure(end(of_repeats)) for end in (min, max)]
    return f"{results.figure(value)} ({' to '.join(ends)})" if len(of_repeats) > 1 else results.figure(value)


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


def targets_of(case: Case, found: Turns, all_us: Latencies) -> list[Target]:
    """Of a case: ours, at the others' priority, against the two peers that a target names."""
    return [target(case, found, all_us, *limit) for limit in (("queue", _FIFTH), ("iceoryx2", _TWICE))]


def target(case: Case, found: Turns, all_us: Latencies, peer: str, limit: float) -> Target:
    """Whether our p99 is at most `limit` times the peer's, each of the messages of all repeats."""
    what = f"{case.title}: p99 of {TRANSPORTS['ring'].title} against {TRANSPORTS[peer].title}"
    asked = f"at most {limit:g} times"
    if peer not in found:
        return Target(what, asked, "not installed", False, "The peer is not installed on this machine.")
    ratio, text = _ratio(found, all_us, peer, 99)
    met = ratio <= limit
    # At p50 it shows what the transport itself takes.
    why = "" if met else f"At p50 it is {_ratio(found, all_us, peer, 50)[1]}. {_TAIL}"
    return Target(what, asked, f"{text}, of all repeats' {len(all_us['ring']):,} messages together", met, why)


def _ratio(found: Turns, all_us: Latencies, peer: str, percentile: int) -> tuple[float, str]:
    """Ours over the peer's, of all messages; as text with the smallest and the largest of a repeat."""
    mine, theirs = (float(np.percentile(all_us[name], percentile)) for name in ("ring", peer))
    key, pairs = f"p{percentile}_us", zip(found["ring"], found[peer], strict=True)
    return mine / theirs, f"{_pooled(mine / theirs, [one[key] / other[key] for one, other in pairs])} times"


def plots(all_us: dict[str, Latencies]) -> list[Plot]:
    """p99 in every case, and the whole distribution in the hardest."""
    bars: dict[str, list[tuple[float | str, float]]] = {}
    for case, by in all_us.items():
        for name, us in by.items():
            bars.setdefault(TRANSPORTS[name].title, []).append((case, float(np.percentile(us, 99))))
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
  it); an engine that computes runs at ordinary priority. The second row makes no target: the others have no such
  priority, so that against them it would compare scheduling and not transport.
- *multiprocessing.Queue*: `put_nowait` of the array. Read by `get()`, as upstream's model process does, and each
  millisecond from asyncio, as upstream's audio process does. Upstream sends tokens of a frame, which are smaller than
  the samples sent here.
- *ZeroMQ*: one PUSH and one PULL socket over ipc, `copy=False` on both sides.
- *iceoryx2*: publish and subscribe with an event as the wake-up, as in its own examples; a byte slice, copied by the
  reader, no sample lost (`RetryUntilDelivered`).

Percentiles, and the ratios of targets, are of the messages of all repeats together; what a repeat gave by itself is in
brackets, smallest to largest. At 12.5 messages a second there are so few that p99 is nearly the worst; the same frames
ten times as fast give more of them, and keep the processors more awake than a real run does. p99.9 is among the worst
one or two where there are not several thousand: below each table is how many messages a percentile stands on. CPU is
the processor time of all of a process's threads, from the kernel's clock of the process, which counts ns where psutil
counts ticks of 10 ms."""

_TAIL: Final = """\
The tail is the time until the system runs a process that was woken, which is the same for all of ordinary priority."""

_BURST_NOTE: Final = """\
The writer sends as fast as it can. Ours waits for room when the ring (10 s) is full, as in an offline run; the queue
has no bound, ZeroMQ holds 1,000 messages a side, iceoryx2 64. In a real run no writer of ours ever waits."""


def measure(seconds: float, messages: int, repeats: int) -> Section:
    """Everything, as a section."""
    began_s = time.monotonic()
    versions = installed()
    found: dict[str, Turns] = {}
    all_us: dict[str, Latencies] = {}
    tables, targets = [], []
    with hosts([name for name, version in versions.items() if version is not None]) as running:
        for case in cases():
            count = max(2, round(seconds * case.hz)) if case is REAL else messages
            print(f"{case.title}: {count} messages, {repeats} times", file=sys.stderr, flush=True)
            turned, us = pace(running if case.busy else ordinary(running), case, count, repeats)
            found[case.title], all_us[case.title] = turned, us
            tables.append(latency_table(case, turned, us))
            targets += targets_of(case, turned, us)
        print("back to back, and idle", file=sys.stderr, flush=True)
        bursts = {samples: burst(ordinary(running), samples, repeats) for samples in (FRAME, BLOCK)}
        resting = rest(ordinary(running), seconds, repeats)
    tables += [cpu_table(found[REAL.title], resting), burst_table(bursts[FRAME], bursts[BLOCK])]
    raw: dict[str, Any] = {
        "versions": versions,
        "paced": found,
        "of_all_repeats": {case: {name: pooled(us) for name, us in by.items()} for case, by in all_us.items()},
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
        plots=plots(all_us),
        figures=raw,
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the turns at 12.5 Hz, and idle")
    parser.add_argument("--messages", type=int, default=350, help="of the faster turns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results.finish(measure(arguments.seconds, arguments.messages, arguments.repeats), arguments.json)


if __name__ == "__main__":
    main()
