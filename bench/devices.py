"""How long it takes until sound is back, where the sound server dies or its devices are pulled out, again and again.

    python -m bench.devices [--times 20] [--seed 0] [--json FILE]

Needs Debian's packages of the tests (tests/system-packages). One `pipeline up`, echo, real PortAudio on the virtual
microphone and speaker. Each time the server is killed, or both devices are unloaded, for 0 to 3 s; a tone is fed to the
microphone as soon as they are back. The time is until the speaker gives it: both devices, a frame and the feeder are
in it.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from pipeline.topology import SAMPLE_RATE
from tests.runs import Run, Runs, Samples, assert_balanced, children, read_wav, wait_for, with_sound, write_wav
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer

LEVEL: Final = 0.25
TONE_HZ: Final = 440
STEADY: Final = "[playback]\nprebuffer_ms = 80\nlatency_ms = 100\n[capture]\nlatency_ms = 100\n"
_LONGEST_S: Final = 3.0
_HEARD_S: Final = 1.5

Figures = dict[str, Any]


def kill(server: SoundServer) -> Callable[[], None]:
    server.kill()
    return server.start


def unplug(server: SoundServer) -> Callable[[], None]:
    server.unplug("mic", "spk")
    return lambda: server.plug("mic", "spk")


def tone(path: Path) -> Path:
    phase = 2 * np.pi * TONE_HZ / SAMPLE_RATE * np.arange(6 * SAMPLE_RATE)
    return write_wav(path, (LEVEL * np.sin(phase)).astype(np.float32))


def resources(run: Run) -> Figures:
    stages = [process for process in children(run.process) if "--supervised" in process.cmdline()]
    return {
        "memory MB": round(sum(stage.memory_info().rss for stage in stages) / (1 << 20)),
        "descriptors": sum(stage.num_fds() for stage in stages),
        "threads": sum(stage.num_threads() for stage in stages),
    }


def once(
    server: SoundServer, runs: Runs, run: Run, fault: Callable[[SoundServer], Callable[[], None]], away_s: float
) -> tuple[float, float]:
    """Returns the seconds until the tone was heard, and the largest step in what the speaker got."""
    lost = run.err.count("waiting for it") + 2
    mend = fault(server)
    wait_for(lambda: run.err.count("waiting for it") == lost, "both devices to be lost")
    time.sleep(away_s)
    mend()
    back_s = time.monotonic()
    feeder = server.feed(runs.folder / "tone.wav")
    with server.record(runs.folder / "heard.wav"):
        recorded_s = time.monotonic()
        wait_for(lambda: run.err.count("without one") == lost, "both devices to run")
        time.sleep(_HEARD_S)
    heard = read_wav(runs.folder / "heard.wav")
    feeder.terminate()
    feeder.wait()
    return recorded_s - back_s + begins(heard) / SAMPLE_RATE, float(np.abs(np.diff(heard)).max())


def begins(heard: Samples) -> int:
    """Where the tone does; a SystemExit where there is none."""
    loud = np.flatnonzero(np.abs(heard) > 0.1 * LEVEL)
    if not len(loud):
        raise SystemExit("the tone was not heard")
    return int(loud[0])


def measure(times: int, seed: int, tell: Callable[[str], None]) -> Figures:
    draw = np.random.default_rng(seed)
    with SoundServer() as server, with_sound(server) as runs:
        tone(runs.folder / "tone.wav")
        options = [
            "--config",
            str(runs.config(STEADY)),
            "--input",
            f"device:{MICROPHONE}",
            "--output",
            f"device:{SPEAKER}",
        ]
        with runs.up("--engine", "echo", *options) as run:
            first = run.running()
            before = resources(run)
            took_s, steps = [], []
            for number in range(times):
                fault, away_s = (kill, unplug)[draw.integers(2)], float(draw.uniform(0, _LONGEST_S))
                seconds, step = once(server, runs, run, fault, away_s)
                took_s.append(seconds)
                steps.append(step)
                assert_balanced(run.status()["accounting"])
                tell(f"{number + 1}: {fault.__name__}, away {away_s:.1f} s: heard after {seconds:.2f} s")
            last = run.status()
            same = all(last["stages"][name]["pid"] == stage["pid"] for name, stage in first["stages"].items())
            own_step = LEVEL * 2 * np.pi * TONE_HZ / SAMPLE_RATE
            figures = {
                "heard after, s, p50": round(float(np.median(took_s)), 2),
                "heard after, s, max": round(max(took_s), 2),
                "largest step, of the tone's own": round(max(steps) / own_step, 2),
                "the same processes": same,
                "before": before,
                "after": resources(run),
                "accounting": last["accounting"],
            }
            return {**figures, "exit code": run.interrupt()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    figures = measure(arguments.times, arguments.seed, console.print)
    table = Table(show_header=False, box=None)
    for key, value in figures.items():
        table.add_row(key, str(value))
    console.print(table)
    if arguments.json:
        machine = f"{platform.platform()}, {psutil.cpu_count()} cores"
        arguments.json.write_text(
            json.dumps({"machine": machine, "times": arguments.times, **figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
