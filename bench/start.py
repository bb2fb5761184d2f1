"""How long `pipeline up` takes until every stage is ready, where the time goes, and what the programs take at rest.

    python -m bench.start [--repeats 5] [--colds 2] [--seconds 10] [--json FILE]

Every kind of run is started in turn, again and again, and beside them an interpreter that imports the packages which a
stage cannot do without and does nothing: the floor. Times are read from the run's own records, out of its flight
recorder, and from when this program had it executed.
"""

import argparse
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import psutil
import soundfile

from bench import results
from bench.results import ROOT, Plot, Section, Table, Target
from bench.telemetry import ask, status_of, used_s
from pipeline import messages
from pipeline.messages import Reply, RunRecord, StageRecord, StatusReport
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns
from pipeline.topology import PROCESSES
from tests.runs import PIPELINE, Runs
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer, missing

Figures = dict[str, Any]
Environment = dict[str, str]

STAGES: Final = tuple(sorted(process.name for process in PROCESSES))
READY_MS: Final = 1_000.0
MEMORY_MIB: Final = 60.0

_UP_S: Final = 120.0
_ANSWER_S: Final = 5.0
_LOOK_S: Final = 0.02
_MIB: Final = 1 << 20
_TIMES: Final = 8
"""The recording, one after another: a run ends by itself when its input has ended."""

_IMPORTS: Final = 3
"""Times that a program's imports are measured, to take the fastest of each."""

FLOOR: Final = "import numpy, zmq, msgspec, posix_ipc, membar"
PROGRAMS: Final = ("pipeline.cli.talk", *(process.module for process in PROCESSES))


_CAN_FORGET: Final = sys.platform == "linux"
"""macOS has no posix_fadvise."""


class Kind(NamedTuple):
    """A kind of run."""

    title: str
    options: list[str]
    environment: Environment


PHASES: Final = {
    "interpreter": "interpreter, imports, settings",
    "make": "rings and sockets",
    "spawn": "processes started",
    "load": "its interpreter, imports, rings",
    "open": "device or model",
}


def environment(more: Environment | None = None) -> Environment:
    """Of what is measured: byte code is kept, as where a user runs it."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), **(more or {})}
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    found.pop("PYTHONUNBUFFERED", None)
    return found


class Started:
    """A run, from its execution on."""

    def __init__(self, runs: Runs, kind: Kind) -> None:
        folder = runs.folder / "run" / "default"
        self._control = folder / "control.ipc"
        self._log = (runs.folder / "up.log").open("w+")
        more = {"PIPELINE_RUNTIME_DIR": str(runs.folder / "run"), **kind.environment}
        self.began_ns = now_ns()
        self._process = subprocess.Popen(
            [*PIPELINE, "up", *kind.options],
            cwd=runs.folder,
            env=environment(more),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def ask(self, verb: str) -> Reply:
        """Send a command. Raises ControlError."""
        return ask(self._control, verb)

    def status(self) -> StatusReport:
        """Its status now. Raises ControlError."""
        return status_of(self._control)

    def running(self) -> StatusReport:
        """Wait until all stages run; it is asked seldom, to leave it the processor."""
        until = time.monotonic() + _UP_S
        while time.monotonic() < until:
            time.sleep(_LOOK_S)
            if self._process.poll() is not None:
                break
            if self._control.exists() and all(stage.state == "running" for stage in self.status().stages.values()):
                return self.status()
        raise RuntimeError(f"the run did not start: {self._said()}")

    def phases_ms(self) -> Figures:
        """When what was done, in ms since the execution, and how long each phase took."""
        status = self.status()
        supervisor_ns = status.time_ns - round(status.uptime_s * NS_PER_S)
        records = [messages.decode_event(msgspec.json.encode(pair[1])) for pair in self._recorded()]
        made_ns = min(record.time_ns for record in records if isinstance(record, RunRecord))
        found: Figures = {
            "interpreter": (supervisor_ns - self.began_ns) / NS_PER_MS,
            "make": (made_ns - supervisor_ns) / NS_PER_MS,
            "stages": {},
        }
        for name in STAGES:
            said = [record for record in records if isinstance(record, StageRecord) and record.stage == name]
            spawned_ns = next(record.time_ns for record in said if not record.pid)
            loaded_ns = next(record.time_ns for record in said if record.pid and record.state == "starting")
            ready_ns = next(record.time_ns for record in said if record.state == "ready")
            found["stages"][name] = {
                "spawn": (spawned_ns - made_ns) / NS_PER_MS,
                "load": (loaded_ns - spawned_ns) / NS_PER_MS,
                "open": (ready_ns - loaded_ns) / NS_PER_MS,
                "ready": (ready_ns - self.began_ns) / NS_PER_MS,
            }
        return found

    def _recorded(self) -> list[Any]:
        return [msgspec.json.decode(record) for record in self.ask("trace").records]

    def processes(self) -> dict[str, psutil.Process]:
        """Its processes."""
        stages = self.status().stages.items()
        return {"supervisor": psutil.Process(self._process.pid)} | {
            str(name): psutil.Process(stage.pid) for name, stage in stages if stage.pid
        }

    def memory_mib(self) -> dict[str, dict[str, float]]:
        """Resident, and what is this process's alone."""
        found = {}
        for name, process in self.processes().items():
            memory = process.memory_full_info()
            found[name] = {"rss": memory.rss / _MIB, "uss": memory.uss / _MIB}
        return found

    def cpu_percent(self, seconds: float) -> dict[str, float]:
        """Of a core, over so long."""
        processes = self.processes()
        before, began = {name: used_s(process) for name, process in processes.items()}, time.monotonic()
        time.sleep(seconds)
        took_s = time.monotonic() - began
        return {name: 100 * (used_s(process) - before[name]) / took_s for name, process in processes.items()}

    def _said(self) -> str:
        return Path(self._log.name).read_text().strip()

    def end(self) -> None:
        """End it, and see that it was clean."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(_UP_S)
        self._log.close()
        if code:
            raise RuntimeError(f"the run ended with exit code {code}: {self._said()}")

    def kill(self) -> None:
        """End it, however it is."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_UP_S)


def start(kind: Kind, seconds: float = 0.0) -> Figures:
    """Start a run, and end it; with `seconds`, what it takes at rest for so long, and paused for half as long."""
    with Runs() as runs:
        run = Started(runs, kind)
        try:
            run.running()
            found = {"phases_ms": run.phases_ms(), "memory_mib": run.memory_mib()}
            if seconds:
                found["cpu_percent"] = run.cpu_percent(seconds)
                found["memory_later_mib"] = run.memory_mib()
                run.ask("pause")
                found["cpu_paused_percent"] = run.cpu_percent(seconds / 2)
            run.end()
        finally:
            run.kill()
    return found


def floor_ms() -> float:
    """An interpreter that imports what a stage cannot do without, from its execution to its end."""
    began_ns = now_ns()
    subprocess.run([sys.executable, "-P", "-c", FLOOR], check=True, env=environment())
    return (now_ns() - began_ns) / NS_PER_MS


# Cold


def files() -> Iterator[Path]:
    """What an interpreter reads: the standard library, the installed packages, and this repository's."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib")}
    for folder in (*map(Path, folders), ROOT / "pipeline", ROOT / "procs"):
        yield from (path for path in folder.rglob("*") if path.is_file())


def forget() -> None:
    """Have the system forget those files' pages, as far as no process has them mapped."""
    assert sys.platform == "linux"
    for path in files():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def libraries_read_s() -> float:
    """How long it takes to read the shared libraries of the installed packages."""
    began = time.monotonic()
    for path in Path(sysconfig.get_path("platlib")).rglob("*.so*"):
        path.read_bytes()
    return time.monotonic() - began


# Imports


def imports_us(module: str) -> dict[str, int]:
    """Own time of each module that a program imports, the fastest of several times, in µs."""
    found: dict[str, int] = {}
    for _ in range(_IMPORTS):
        command = [sys.executable, "-P", "-X", "importtime", "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
        for line in done.stderr.splitlines():
            own, _, rest = line.removeprefix("import time:").partition("|")
            if own.strip().isdigit():
                name = rest.rpartition("|")[2].strip()
                found[name] = min(int(own), found.get(name, int(own)))
    return found


def packages_us(modules: dict[str, int]) -> dict[str, int]:
    """The same by package, the standard library as one, what costs most first."""
    sums: defaultdict[str, int] = defaultdict(int)
    for name, own in modules.items():
        package = name.partition(".")[0]
        sums["standard library" if package.removeprefix("_") in _STANDARD or package in _STANDARD else package] += own
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


_STANDARD: Final = sys.stdlib_module_names


# The section


def kinds(folder: Path, sound: Environment | None) -> list[Kind]:
    """What is started. `sound` is the environment in which PortAudio sees the virtual devices."""
    model, speech = folder / "model", folder / "speech.wav"
    samples, rate = soundfile.read(ROOT / "pipeline" / "assets" / "speech.flac")
    soundfile.write(speech, np.tile(samples, _TIMES), rate)
    subprocess.run(
        [*PIPELINE, "models", "synth", str(model), "--quality", "q4", "--size", "tiny"],
        check=True,
        capture_output=True,
        env=environment(),
    )
    echo = ["--engine", "echo"]
    found = [
        Kind("echo, tone to null", [*echo, "--input", "tone:440", "--output", "null"], {}),
        Kind("echo, file to null", [*echo, "--input", f"file:{speech}", "--output", "null"], {}),
        Kind("tiny Moshi, tone to null",
             ["--model", str(model), "--quality", "q4", "--input", "tone:440", "--output", "null"], {}),
    ]  # fmt: skip
    if sound is not None:
        devices = ["--input", f"device:{MICROPHONE}", "--output", f"device:{SPEAKER}"]
        found.append(Kind("echo, sound devices", [*echo, *devices], sound))
    return found


def start_table(title: str, found: dict[str, list[Figures]], note: str) -> Table:
    """Where the time goes: one row a stage of a kind of run."""
    columns = ["run", "stage", *(f"{text}, ms" for text in PHASES.values()), "ready after, ms"]
    rows = []
    for kind, turns in found.items():
        phases = [turn["phases_ms"] for turn in turns]
        common = [results.spread([phase[name] for phase in phases]) for name in ("interpreter", "make")]
        for stage in STAGES:
            own = [results.spread([p["stages"][stage][name] for p in phases]) for name in ("spawn", "load", "open")]
            ready = results.spread([phase["stages"][stage]["ready"] for phase in phases])
            rows.append([kind, stage, *common, *own, ready])
    return Table(title, columns, rows, note)


def memory_table(found: dict[str, list[Figures]], seconds: float) -> Table:
    """Memory of every process of every kind of run."""
    columns = ["run", "process", "resident when ready, MiB", "its own, MiB"]
    columns += [f"resident {seconds:g} s later, MiB", "its own, MiB"]
    rows = []
    for kind, turns in found.items():
        for name in ("supervisor", *STAGES):
            cells = [results.spread([turn["memory_mib"][name][what] for turn in turns]) for what in ("rss", "uss")]
            later = turns[-1]["memory_later_mib"][name]
            rows.append([kind, name, *cells, results.figure(later["rss"]), results.figure(later["uss"])])
    return Table("Memory", columns, rows, "Resident includes pages that are shared, such as code; its own does not.")


def cpu_table(found: dict[str, list[Figures]], seconds: float) -> Table:
    """Processor time at rest."""
    names = ("supervisor", *STAGES)
    rows = []
    for kind, turns in found.items():
        for title, key in (("", "cpu_percent"), (", paused", "cpu_paused_percent")):
            used = turns[-1][key]
            cells = [results.figure(used[name]) for name in names]
            rows.append([kind + title, *cells, results.figure(sum(used.values()))])
    note = f"Over {seconds:g} s of a run that is left alone, and {seconds / 2:g} s of one that is paused."
    return Table("Processor time at rest, % of a core", ["run", *names, "together"], rows, note)


def import_table(found: dict[str, dict[str, int]]) -> Table:
    """What the imports of each program cost."""
    rows = []
    for program, modules in found.items():
        costs = packages_us(modules)
        most = ", ".join(f"{name} {us / 1e3:.0f}" for name, us in list(costs.items())[:6])
        single = sorted(modules.items(), key=lambda item: -item[1])[:4]
        rows.append(
            [program, str(len(modules)), f"{sum(costs.values()) / 1e3:.0f}", most,
             ", ".join(f"{name} {us / 1e3:.1f}" for name, us in single)]
        )  # fmt: skip
    columns = ["program", "modules", "ms in all", "packages, own ms", "single modules, own ms"]
    return Table(
        "Imports", columns, rows, f"By `-X importtime`, which slows them; each module's fastest of {_IMPORTS}."
    )


def targets(warm: dict[str, list[Figures]], floors_ms: list[float]) -> list[Target]:
    """Capture and playback: ready within a second, in 60 MiB."""
    why = _WHY.format(floor_ms=results.spread(floors_ms), cores=os.cpu_count())
    found = []
    for kind, turns in warm.items():
        for stage in ("capture", "playback"):
            ready_ms = [turn["phases_ms"]["stages"][stage]["ready"] for turn in turns]
            found.append(_target(f"{kind}: {stage} ready, warm", ready_ms, READY_MS, "ms", why))
            mib = [turn["memory_mib"][stage]["rss"] for turn in turns] + [turns[-1]["memory_later_mib"][stage]["rss"]]
            found.append(_target(f"{kind}: {stage}'s memory", mib, MEMORY_MIB, "MiB"))
    return found


def _target(what: str, values: list[float], limit: float, unit: str, why: str = "") -> Target:
    met = median(values) < limit
    return Target(what, f"under {limit:g} {unit}", f"{results.spread(values)} {unit}", met, "" if met else why)


_WHY: Final = """\
An interpreter that imports what no stage can do without takes {floor_ms} ms on this machine by itself; a start is \
one after the other of the supervisor's and of three stages' at once, on {cores} cores. Other imports were taken \
out or put off."""


def plot(warm: dict[str, list[Figures]]) -> Plot:
    """When each stage was ready."""
    series: dict[str, list[tuple[float | str, float]]] = {
        stage: [(kind, median(t["phases_ms"]["stages"][stage]["ready"] for t in turns)) for kind, turns in warm.items()]
        for stage in STAGES
    }
    return Plot("start", "Ready after the execution of `pipeline up`, warm", "", "ms", "bars", False, series)


_TEXT: Final = """\
From the execution of `pipeline up` until each stage says that it is ready: its interpreter and imports are loaded,
the rings are attached, its device is open, or its model loaded and warm. The first two columns are the supervisor's,
which comes before every stage; the three stages are then started side by side, so that on few cores they wait for one
another. `tone`, `file` and `null` stand in for devices; the sound devices are PortAudio's, on a virtual sound server;
the model is a tiny one of random weights, q4. Byte code is there in every case.

{devices}An interpreter that imports what no stage can do without ({floor}) and does nothing took {floor_ms} ms, from
its execution to its end, in turn with the others.

{cold}"""

_COLD: Final = """\
*Cold*: `posix_fadvise(POSIX_FADV_DONTNEED)` on every file of the standard library, of the installed packages and of
ours. What another process has mapped stays in memory, the interpreter itself among it, so that this is less cold than
after the machine's start. Reading the packages' shared libraries took {warm_s} s before and {cold_s} s after it."""

_NO_COLD: Final = "No cold starts were measured."
_CANNOT_FORGET: Final = """\
Cold starts cannot be measured here: this system has no `posix_fadvise`, by which it is told to forget files."""


def measure(repeats: int, colds: int, seconds: float) -> Section:
    """Everything, as a section."""
    began = time.monotonic()
    colds = colds if _CAN_FORGET else 0
    read_s: dict[str, float] = {}
    warm: dict[str, list[Figures]] = defaultdict(list)
    cold: dict[str, list[Figures]] = defaultdict(list)
    floors_ms = []
    with ExitStack() as stack:
        package = missing() if sys.platform == "linux" else "a virtual sound server"
        sound = stack.enter_context(SoundServer()).env if package is None else None
        all_kinds = kinds(stack.enter_context(Runs()).folder, sound)
        for kind in all_kinds:  # makes the byte code
            start(kind)
        for turn in range(repeats):
            floors_ms.append(floor_ms())
            for kind in all_kinds:
                print(f"{kind.title}: {turn + 1} of {repeats}", file=sys.stderr)
                warm[kind.title].append(start(kind, seconds if turn == repeats - 1 else 0.0))
        if colds:
            libraries_read_s()
            read_s["warm"] = libraries_read_s()
            forget()
            read_s["cold"] = libraries_read_s()
        for turn in range(colds):
            for kind in all_kinds:
                print(f"{kind.title}, cold: {turn + 1} of {colds}", file=sys.stderr)
                forget()
                cold[kind.title].append(start(kind))
    imported = {program: imports_us(program) for program in PROGRAMS}
    no_cold = _NO_COLD if _CAN_FORGET else _CANNOT_FORGET
    read = {f"{name}_s": results.figure(value) for name, value in read_s.items()}
    text = _TEXT.format(
        devices="" if package is None else f"Not measured here: sound devices, for want of {package}. ",
        floor=FLOOR.removeprefix("import "),
        floor_ms=results.spread(floors_ms),
        cold=_COLD.format(**read) if read else no_cold,
    )
    tables = [start_table("Warm", warm, f"{repeats} starts each, in turn.")]
    if colds:
        tables.append(start_table("Cold", cold, f"{colds} starts each, in turn."))
    tables += [import_table(imported), memory_table(warm, seconds), cpu_table(warm, seconds)]
    return Section(
        name="start",
        title="Start, memory, and a run at rest",
        command=f"python -m bench.start --repeats {repeats} --colds {colds} --seconds {seconds:g}",
        text=text,
        seconds=time.monotonic() - began,
        tables=tables,
        targets=targets(warm, floors_ms),
        plots=[plot(warm)],
        figures={"warm": warm, "cold": cold, "floor_ms": floors_ms, "imports_us": imported,
                 "libraries_read_s": read_s},
    )  # fmt: skip


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="warm starts of each kind")
    parser.add_argument("--colds", type=int, default=2, help="cold ones; none on macOS")
    parser.add_argument("--seconds", type=float, default=10.0, help="at rest, of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results.finish(measure(arguments.repeats, arguments.colds, arguments.seconds), arguments.json)


if __name__ == "__main__":
    main()
