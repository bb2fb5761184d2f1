"""What monitors cost a run: its stages, the supervisor, and the audio.

    python -m bench.telemetry [--seconds 20] [--rounds 3] [--engine echo|moshi ...] [--json FILE] [--page FILE]
    python -m bench.telemetry --section FILE    as a part of `make bench`: none, one and 50 monitors, in two minutes

One `pipeline up` an engine, in real time, tone in and nothing out; for moshi a made-up tiny checkpoint, q4. Kinds of
monitors take turns in it, each for as long, again and again, so that whatever else the machine does meets all of them.
They are processes of their own, and what they use is not counted. The steps' times are read from the flight
recorder after each turn: to read them as they come would be a monitor.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np
import psutil

from bench import results as suite
from bench.results import Plot, Section, Table, Target
from pipeline import control, messages
from pipeline.control import Hub, StageLink, Subscription
from pipeline.errors import ControlError
from pipeline.messages import Reply, StatusReport, TimingRecord
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns
from tests.runs import Runs

Figures = dict[str, Any]

MANY: Final = 50
_SETTINGS: Final = "[playback]\nprebuffer_ms = 80\nblock_ms = 80\n"
"""A block a frame: 200 wake-ups a second, as of a device's blocks, vary by more than what is looked for."""
_SETTLE_S: Final = 1.0
_ANSWER_S: Final = 10.0
_VISIT_S: Final = 0.02
_REPORTS: Final = 500
"""Reports that are made in a row: fewer than a link keeps."""

NONE: Final = "none"
AUDIO: Final = ("capture", "playback")

MOST_MS: Final = 0.1
"""That telemetry may cost a stage a frame."""


# The monitors, each in a process of its own


def read(events: Path, count: int = 1) -> None:
    """So many subscribers of everything, all of which read."""
    subscriptions = [Subscription(events) for _ in range(count)]
    while True:
        for subscription in subscriptions:
            while subscription.receive(0) is not None:
                pass
        time.sleep(0.02)


def neglect(events: Path) -> None:
    """One that subscribes to everything and never reads."""
    subscription = Subscription(events)
    while True:
        time.sleep(1)
        assert subscription  # it lives


def visit(events: Path) -> None:
    """One that comes, and is gone 20 ms later, for ever."""
    while True:
        subscription = Subscription(events)
        time.sleep(_VISIT_S)
        subscription.close()


ONE_READS: Final = "one that reads"
MANY_READ: Final = f"{MANY} that read"

MONITORS: Final[dict[str, Callable[[Path], None]]] = {
    ONE_READS: read,
    MANY_READ: lambda events: read(events, MANY),
    "one that never reads": neglect,
    "one that comes and goes every 20 ms": visit,
}


@contextmanager
def monitored(kind: str, events: Path) -> Iterator[None]:
    """Monitors of a kind, at work."""
    if kind == NONE:
        time.sleep(_SETTLE_S)
        yield
        return
    program = subprocess.Popen([sys.executable, "-m", "bench.telemetry", "--monitor", kind, str(events)])
    time.sleep(_SETTLE_S)
    try:
        yield
    finally:
        program.kill()
        program.wait()


# The measurement


def used_s(process: psutil.Process) -> float:
    """Processor time of all its threads, from Linux's scheduler to the ns, elsewhere from the clock that ticks."""
    counts = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    if counts:
        return sum(int(count.read_text().split()[0]) for count in counts) / NS_PER_S
    return sum(process.cpu_times()[:2])


def ask(run: Path, verb: str, **values: object) -> Reply:
    """Send a command to the run whose control socket that is. Raises ControlError."""
    reply = control.request(run, msgspec.json.encode({"verb": verb, **values}), _ANSWER_S)
    if not reply.ok:
        raise ControlError(reply.error)
    return reply


def status_of(run: Path) -> StatusReport:
    """Its status now. Raises ControlError."""
    status = ask(run, "status").status
    assert status is not None
    return status


class Watched:
    """A run that is measured."""

    def __init__(self, folder: Path, supervisor: int) -> None:
        self.events = folder / "events.ipc"
        self._control = folder / "control.ipc"
        stages = self.status().stages
        self._processes = {str(name): psutil.Process(stage.pid) for name, stage in stages.items()}
        self._processes["supervisor"] = psutil.Process(supervisor)

    def status(self) -> StatusReport:
        """The run's status now."""
        return status_of(self._control)

    def cpu_s(self) -> dict[str, float]:
        """Processor time that each process has used."""
        return {name: used_s(process) for name, process in self._processes.items()}

    def steps_ms(self, begin_ns: int, end_ns: int) -> list[float]:
        """How long each frame's work in inference took, of those that began between two moments."""
        seconds = 1 + (now_ns() - begin_ns) / NS_PER_S
        events = [msgspec.json.decode(record) for record in ask(self._control, "trace", seconds=seconds).records]
        records = [msgspec.convert(record, TimingRecord) for topic, record in events if topic == "timing.inference"]
        took = [
            (record.end_ns - record.start_ns) / NS_PER_MS for record in records if begin_ns <= record.start_ns < end_ns
        ]
        assert took, "no step in the flight recorder"
        return took

    def turn(self, kind: str, seconds: float) -> Figures:
        """Measure one turn of one kind of monitors."""
        with monitored(kind, self.events):
            was, used, begin_ns = self.status(), self.cpu_s(), now_ns()
            time.sleep(seconds)
            end_ns = now_ns()
            cpu = {name: now - used[name] for name, now in self.cpu_s().items()}
            now = self.status()
        counts = {name: getattr(now.accounting, name) - getattr(was.accounting, name) for name in ("gaps", "dropped")}
        frames = now.timing.inference.frames - was.timing.inference.frames
        late = now.timing.inference.late - was.timing.inference.late
        steps = self.steps_ms(begin_ns, end_ns)
        return {"cpu_s": cpu, "seconds": (end_ns - begin_ns) / NS_PER_S, "frames": frames, "late": late, **counts,
                "steps_ms": steps}  # fmt: skip


def measure(engine: str, seconds: float, rounds: int, monitors: Iterable[str] = tuple(MONITORS)) -> Figures:
    """One run, with kinds of monitors in turn."""
    with Runs() as runs:
        options = ["--engine", engine, "--input", "tone:440", "--output", "null"]
        if engine == "moshi":
            runs.call("models", "synth", str(runs.folder / "model"), "--quality", "q4", "--size", "tiny")
            options += ["--model", str(runs.folder / "model"), "--quality", "q4"]
        with runs.up(*options, "--config", str(runs.config(_SETTINGS))) as run:
            run.running()
            watched = Watched(runs.folder / "run" / "default", run.process.pid)
            turns: dict[str, list[Figures]] = {kind: [] for kind in (NONE, *monitors)}
            for _ in range(rounds):
                for kind, done in turns.items():
                    done.append(watched.turn(kind, seconds))
            run.process.terminate()  # SIGINT is ignored by what was started behind a shell
            code = run.wait()
    assert code == 0, run.err
    sums = {kind: summed(done) for kind, done in turns.items()}
    for figures in sums.values():
        alone = sums[NONE]["ms_a_frame"]
        figures["more_ms_a_frame"] = {name: used - alone[name] for name, used in figures["ms_a_frame"].items()}
    return sums


def summed(turns: list[Figures]) -> Figures:
    """All turns of one kind together."""
    frames = sum(turn["frames"] for turn in turns)
    seconds = sum(turn["seconds"] for turn in turns)
    cpu_s = {name: sum(turn["cpu_s"][name] for turn in turns) for name in turns[0]["cpu_s"]}
    steps = [step for turn in turns for step in turn["steps_ms"]]
    return {
        "frames": frames,
        "cpu_percent": {name: 100 * used / seconds for name, used in cpu_s.items()},
        "ms_a_frame": {name: 1e3 * used / frames for name, used in cpu_s.items()},
        "turns_ms_a_frame": [
            {name: 1e3 * used / turn["frames"] for name, used in turn["cpu_s"].items()} for turn in turns
        ],
        "step_p50_ms": float(np.percentile(steps, 50)),
        "step_p95_ms": float(np.percentile(steps, 95)),
        **{name: sum(turn[name] for turn in turns) for name in ("late", "gaps", "dropped")},
    }


def report_us() -> Figures:
    """What one report takes a stage's thread, in microseconds: encoding it and handing it to ZeroMQ."""
    record = TimingRecord(
        stage="inference", frame=1_000_000, start_ns=now_ns(), end_ns=now_ns(), queued=1, step_ms=45.2
    )
    with Runs() as runs:
        control_path, events, stages = (runs.folder / f"{name}.ipc" for name in ("control", "events", "stages"))
        hub = Hub(control_path, events, stages)
        link = StageLink(stages, "inference")
        took: list[float] = []
        for _ in range(40):
            for _ in range(_REPORTS):
                began = time.perf_counter_ns()
                link.report(record)
                took.append((time.perf_counter_ns() - began) / 1e3)
            received = 0
            while received < _REPORTS:
                hub.wait(0.1)
                received += sum(1 for _ in hub.reports())
        assert link.lost == 0
        link.close()
        hub.close()
    return {"bytes": len(messages.encode(record)), "p50": median(took), "p99": float(np.percentile(took, 99))}


# The page


def page(results: Figures) -> str:
    """docs/telemetry.md."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Figures) -> Iterator[str]:
    yield "# What monitors cost\n"
    yield f"    {results['command']}\n"
    yield f"{results['machine']}, {results['versions']}, {results['date']}."
    yield _METHOD.format(**results)
    yield _REPORT.format(**results["report_us"])
    for engine, kinds in results["engines"].items():
        yield f"## {engine}\n"
        yield "| monitors | capture | inference | playback | supervisor | step p50 / p95, ms | late | dropped | gaps |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for kind, row in kinds.items():
            yield _row(kind, row)
        most = max(value for row in kinds.values() for value in _stages(row["more_ms_a_frame"]))
        yield f"\nThe most that monitors cost a stage: {most:.3f} ms a frame.\n"
    yield "% of a core, and how many ms a frame that is more than without a monitor. What is of either sign is noise."


_METHOD: Final = """\
One `pipeline up` an engine, tone in, nothing out, in blocks of a frame; in it the kinds of monitors take turns of
{seconds:g} s, {rounds} times. Monitors are processes of their own and subscribe to everything; what they use
themselves is not counted. A step is a frame's whole work in inference, from the flight recorder.
"""

_REPORT: Final = """\
A report of {bytes} bytes takes a stage's thread {p50:.1f} µs (p50; p99 {p99:.1f}): it is encoded and handed over. A
stage never speaks to a monitor: it tells the supervisor, once, whoever listens.
"""


def _stages(figures: dict[str, float]) -> list[float]:
    return [value for name, value in figures.items() if name != "supervisor"]


def _row(kind: str, row: Figures) -> str:
    names = ("capture", "inference", "playback", "supervisor")
    cells = [f"{row['cpu_percent'][name]:.2f} ({row['more_ms_a_frame'][name]:+.3f})" for name in names]
    steps = f"{row['step_p50_ms']:.2f} / {row['step_p95_ms']:.2f}"
    return f"| {kind} | {' | '.join(cells)} | {steps} | {row['late']} | {row['dropped']} | {row['gaps']} |"


# A part of the suite


_SECTION_TEXT: Final = """\
One `pipeline up` an engine, tone in, nothing out, in blocks of a frame; no monitor, one and {many} take turns of
{seconds:g} s in it, {rounds} times. Monitors are in a process of their own and subscribe to everything; what they use
themselves is not counted, but on few cores they keep the run waiting like any other program. moshi is a tiny model of
random weights. A report of {bytes} bytes takes a stage's thread {p50:.1f} µs (p50; p99 {p99:.1f}), once a frame,
whoever listens: a stage tells the supervisor, and never speaks to a monitor. What is of either sign is noise.
[telemetry.md](telemetry.md) has longer runs, and monitors that misbehave."""


def more_ms(kinds: Figures, kind: str) -> dict[str, list[float]]:
    """What a kind of monitors cost each process a frame, more than none did in the turn before it, turn by turn."""
    pairs = list(zip(kinds[kind]["turns_ms_a_frame"], kinds[NONE]["turns_ms_a_frame"], strict=True))
    return {name: [turn[name] - alone[name] for turn, alone in pairs] for name in pairs[0][0]}


def section(seconds: float, rounds: int, engines: list[str]) -> Section:
    """No monitor, one, and 50."""
    began = time.monotonic()
    report = report_us()
    found = {engine: measure(engine, seconds, rounds, (ONE_READS, MANY_READ)) for engine in engines}
    took_ms = report["p50"] / 1e3
    targets = [Target("a report, no monitor", f"under {MOST_MS} ms a frame", f"{took_ms:.4f} ms", took_ms < MOST_MS)]
    for engine, kinds in found.items():
        targets += [_target(engine, kinds, kind) for kind in (ONE_READS, MANY_READ)]
    series: dict[str, list[tuple[float | str, float]]] = {
        f"{engine}, {kind}": [(name, row["ms_a_frame"][name]) for name in (*AUDIO, "supervisor")]
        for engine, kinds in found.items()
        for kind, row in kinds.items()
    }
    return Section(
        name="telemetry",
        title="What monitors cost",
        command=f"python -m bench.telemetry --section FILE --seconds {seconds:g} --rounds {rounds}",
        text=_SECTION_TEXT.format(many=MANY, seconds=seconds, rounds=rounds, **report),
        seconds=time.monotonic() - began,
        tables=[_table(engine, kinds) for engine, kinds in found.items()],
        targets=targets,
        plots=[Plot("telemetry", "Processor time a frame", "", "ms", "bars", False, series)],
        figures={"report_us": report, "engines": found},
    )


def _table(engine: str, kinds: Figures) -> Table:
    names = (*AUDIO, "inference", "supervisor")
    rows = []
    for kind, row in kinds.items():
        used = [suite.spread([turn[name] for turn in row["turns_ms_a_frame"]]) for name in names]
        steps = f"{row['step_p50_ms']:.2f} / {row['step_p95_ms']:.2f}"
        rows.append([kind, *used, steps, str(row["late"]), str(row["dropped"]), str(row["gaps"])])
    columns = ["monitors", *(f"{name}, ms a frame" for name in names), "step p50 / p95, ms", "late", "dropped", "gaps"]
    return Table(f"Processor time with {engine}", columns, rows)


def _target(engine: str, kinds: Figures, kind: str) -> Target:
    """Of the stage that these monitors cost most."""
    costs = more_ms(kinds, kind)
    worst = max((*AUDIO, "inference"), key=lambda name: median(costs[name]))
    met = median(costs[worst]) < MOST_MS
    why = _WHY if (engine, worst, met) == ("moshi", "inference", False) else ""
    measured = f"{suite.spread(costs[worst])} ms more"
    what = f"{engine}, {kind}: {worst}, which it costs most"
    return Target(what, f"under {MOST_MS} ms a frame more", measured, met, why)


_WHY: Final = """\
A report costs inference the same with monitors and without. But on a processor the model's step computes on all
cores, and a monitor's own process makes it longer, as any other program does; from turn to turn it varies by far more
than what is looked for. Not measured on a machine whose model runs on a GPU."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of a turn; 20, or of a section's 3")
    parser.add_argument("--rounds", type=int, help="3, or a section's 5")
    parser.add_argument("--engine", nargs="+", choices=["echo", "moshi"], default=["echo", "moshi"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--section", type=Path)
    parser.add_argument("--monitor", nargs=2, metavar=("KIND", "EVENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.monitor:
        kind, events = arguments.monitor
        MONITORS[kind](Path(events))
    if arguments.section:
        suite.finish(section(arguments.seconds or 3.0, arguments.rounds or 5, arguments.engine), arguments.section)
        return
    arguments.seconds = arguments.seconds or 20.0
    arguments.rounds = arguments.rounds or 3
    results = {
        "command": f"python -m bench.telemetry --seconds {arguments.seconds:g} --rounds {arguments.rounds}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, pyzmq {version('pyzmq')}, msgspec {version('msgspec')}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "report_us": report_us(),
        "engines": {engine: measure(engine, arguments.seconds, arguments.rounds) for engine in arguments.engine},
    }
    print(page(results))
    if arguments.page:
        arguments.page.write_text(page(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
