"""Whole runs, measured from outside: what goes in against what comes out.

    python -m bench.endtoend [--seconds 60] [--json FILE] [CASE ...]

Needs Debian's packages of the tests (tests/system-packages). Each case is one real `pipeline up`.
"""

import argparse
import json
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import soundfile
from rich.console import Console
from rich.table import Table

from pipeline import checkpoints
from pipeline.ring import Ring, RingReader, Samples, segment_name, unlink
from pipeline.topology import FRAME, FRAME_MS, RINGS, SAMPLE_RATE
from tests.runs import (
    Run,
    Runs,
    assert_balanced,
    busy,
    children,
    noise,
    passage,
    read_wav,
    wait_for,
    with_sound,
    write_wav,
)
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer, delay_samples

Figures = dict[str, Any]

STEADY: Final = "[playback]\nprebuffer_ms = 40\n"
"""For whoever would rather wait 36 ms longer than hear a gap in an hour."""

SPEECH: Final = Path(__file__).parents[1] / "pipeline" / "assets" / "speech.flac"
_SETTLE_S: Final = 3.0
"""The first callbacks of a device come in a burst."""

_MS: Final = 1_000 / SAMPLE_RATE


def files(seconds: float, config: str = "") -> Figures:
    """echo, WAV to WAV."""
    with Runs() as runs:
        fed = noise(seconds)
        source, target = write_wav(runs.folder / "in.wav", fed), runs.folder / "out.wav"
        options = ["--config", str(runs.config(config)), "--input", f"file:{source}", "--output", f"file:{target}"]
        with runs.up("--engine", "echo", *options) as run:
            wait_for(lambda: "ready" in run.err or run.process.poll() is not None, "the run")
            last = watch(run, seconds)
            code = run.wait(seconds + 30)
        found = passage(fed, read_wav(target))
        return {
            "exact": found.exact, "equal samples": found.equal, "fed": found.fed, "exit code": code,
            "gaps": last["accounting"]["gaps"], **latency(last), "left behind": runs.leftovers(),
        }  # fmt: skip


def watch(run: Run, seconds: float) -> Figures:
    """The run's last status before its end."""
    status = run.running()
    until = time.monotonic() + seconds - 3  # before its end, after which there is nobody to ask
    while run.process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
    if run.process.poll() is None:
        status = run.status()
    assert_balanced(status["accounting"])
    return status


def latency(status: Figures) -> Figures:
    """Microphone to speaker, and what of it is neither the frame nor the devices' own."""
    whole = status["timing"]["mic_to_speaker_ms"]
    own = sum(stage["device_latency_ms"] for stage in status["stages"].values())
    return {
        "mic to speaker p50 ms": whole["p50_ms"],
        "p95 ms": whole["p95_ms"],
        "devices' own ms": round(own, 1),
        "beyond frame and devices, p95 ms": round(whole["p95_ms"] - FRAME_MS - own, 1),
    }


def devices(seconds: float, loops: int = 0, config: str = "") -> Figures:
    """echo through PortAudio on the virtual microphone and speaker, which are two channels of one card."""
    with SoundServer(cable=True) as server, with_sound(server) as runs:
        fed = noise(seconds)
        source, both = write_wav(runs.folder / "in.wav", fed), runs.folder / "both.wav"
        options = ["--input", f"device:{MICROPHONE}", "--output", f"device:{SPEAKER}"]
        options += ["--config", str(runs.config(config))]
        with runs.up("--engine", "echo", *options) as run:
            run.running()
            time.sleep(_SETTLE_S)
            tap = Tap(runs.folder / "run" / "default", "capture")
            with busy(loops):
                before = run.status()
                with server.record_both(both):
                    server.feed(source).wait()
                    time.sleep(0.5)
                after = run.status()
            captured = passage(fed, tap.stop())
            code = run.interrupt()
        left, right = stereo(both)
        heard, played = passage(fed, left), passage(fed, right)
        counts = {k: after["accounting"][k] - before["accounting"][k] for k in ("dropped", "skipped", "gaps")}
        concealed_ms = (after["accounting"]["concealed"] - before["accounting"]["concealed"]) * _MS
        return {
            "fed exact": heard.exact, "captured exact": captured.exact, "played exact": played.exact,
            "equal samples": played.equal, "fed": played.fed,
            "recorded delay ms": steady_delays(left, right), **latency(after),
            "xruns": {side: after["xruns"][side] - before["xruns"][side] for side in after["xruns"]}, **counts,
            "concealed ms": round(concealed_ms, 1), "exit code": code,
        }  # fmt: skip


class Tap(threading.Thread):
    """Takes down what a ring holds, as any reader may, while the run goes on."""

    def __init__(self, folder: Path, ring: str) -> None:
        super().__init__(daemon=True)
        self._ring = Ring.attach(segment_name(folder, ring))
        self._reader = RingReader(self._ring)
        self._leave = threading.Event()
        self._parts: list[Samples] = []
        self.start()

    def run(self) -> None:
        while not self._leave.wait(0.1):
            part = np.zeros(self._reader.available, np.float32)
            self._parts.append(part[: self._reader.read(part)])

    def stop(self) -> Samples:
        """Everything since the start. Raises AssertionError if the tap itself was too slow."""
        self._leave.set()
        self.join()
        assert self._reader.lost == 0
        return np.concatenate(self._parts)


def stereo(path: Path) -> tuple[Any, Any]:
    """The two channels of a recording."""
    both = soundfile.read(path, dtype="float32")[0]
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def steady_delays(left: Any, right: Any) -> dict[str, float]:
    """The delays of the recording's seconds, each found by correlation, as smallest, median and largest, in ms."""
    found = []
    for start in range(0, len(left) - SAMPLE_RATE, SAMPLE_RATE):
        try:
            found.append(delay_samples(left[start:][:SAMPLE_RATE], right[start:][:SAMPLE_RATE]) * _MS)
        except ValueError:
            continue  # a second with a gap in it
    return {"min": round(min(found), 2), "p50": round(float(np.median(found)), 2), "max": round(max(found), 2)}


def idle(seconds: float) -> Figures:
    """Silence in, nothing out, echo: what the processes use."""
    with Runs() as runs:
        with runs.up("--engine", "echo", "--input", "silence", "--output", "null") as run:
            run.running()
            time.sleep(_SETTLE_S)
            names = {s["pid"]: name for name, s in run.status()["stages"].items()}
            processes = [psutil.Process(run.process.pid), *children(run.process)]
            before = [sum(p.cpu_times()[:2]) for p in processes]
            began = time.monotonic()
            time.sleep(seconds)
            elapsed = time.monotonic() - began
            used = [sum(p.cpu_times()[:2]) - was for p, was in zip(processes, before, strict=True)]
            memory = [p.memory_full_info() for p in processes]
            run.interrupt()
        figures: Figures = {}
        for process, cpu, info in zip(processes, used, memory, strict=True):
            name = names.get(process.pid, "supervisor")
            figures[name] = {
                "cpu % of a core": round(100 * cpu / elapsed, 2),
                "resident MiB": round(info.rss / 2**20, 1),
                "unique MiB": round(info.uss / 2**20, 1),
            }
        figures["all stages, cpu % of a core"] = round(
            sum(figures[name]["cpu % of a core"] for name in names.values()), 2
        )
        return figures


def starts(seconds: float) -> Figures:
    """50 starts and stops in a row, and what they left behind."""
    with Runs() as runs:
        codes, processes = [], []
        began = time.monotonic()
        for _ in range(50):
            with runs.up("--engine", "echo", "--input", "silence", "--output", "null") as run:
                run.running()
                processes += children(run.process)
                codes.append(run.interrupt())
        took = time.monotonic() - began
        segments = [segment_name(runs.folder / "run" / "default", spec.name) for spec in RINGS]
        return {
            "exit codes": sorted(set(codes)),
            "seconds each": round(took / len(codes), 2),
            "processes left": sum(process.is_running() for process in processes),
            "files left": runs.leftovers(),
            "segments left": [name for name in segments if unlink(name)],
        }


def moshi(quality: str) -> Callable[[float], Figures]:
    """The tiny synthetic checkpoint in real time."""

    def measure(seconds: float) -> Figures:
        with Runs() as runs:
            model = runs.folder / "model"
            runs.call("models", "synth", str(model), "--quality", quality)
            speech = np.resize(read_wav(SPEECH), round(seconds * SAMPLE_RATE) // FRAME * FRAME)
            source = write_wav(runs.folder / "in.wav", speech)
            options = ["--model", str(model), "--quality", quality]
            with runs.up(*options, "--input", f"file:{source}", "--output", "null") as run:
                status = watch(run, seconds)
                code = run.wait(seconds + 30)
            counts, step = status["accounting"], status["timing"]["inference"]
            return {
                "frames": step["frames"], "p50 ms": step["p50_ms"], "p95 ms": step["p95_ms"], "p99 ms": step["p99_ms"],
                "late": step["late"], "dropped": counts["dropped"], "gaps": counts["gaps"], "exit code": code,
            }  # fmt: skip

    return measure


CASES: Final[dict[str, Callable[[float], Figures]]] = {
    "files": files,
    "files, prebuffer 40 ms": lambda seconds: files(seconds, config=STEADY),
    "starts": starts,
    "devices": devices,
    "devices, prebuffer 40 ms": lambda seconds: devices(seconds, config=STEADY),
    "devices, both cores busy": lambda seconds: devices(seconds, loops=2),
    "devices, both cores busy, prebuffer 40 ms": lambda seconds: devices(seconds, loops=2, config=STEADY),
    "idle": idle,
    **{f"moshi {quality}": moshi(quality) for quality in checkpoints.QUALITIES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    results: Figures = {"machine": f"{platform.platform()}, {psutil.cpu_count()} cores", "seconds": arguments.seconds}
    for name in arguments.cases or CASES:
        results[name] = CASES[name](arguments.seconds)
        table = Table(title=name, title_justify="left", show_header=False, box=None)
        for key, value in results[name].items():
            table.add_row(key, str(value))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
