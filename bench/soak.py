"""Whether a run stays as it was: for hours, and under faults.

    python -m bench.soak [--hours 8] [--minutes 30] [--times 100] [--seed 0] [CASE ...]

accelerated   so many hours of audio from file to file (`pipeline run`), as fast as it goes
real          so many minutes in real time, tone in and nothing out
overload      so many minutes in real time of a model that takes 100 ms a frame
stalls        the model is stopped for 0.1 to 15 s, each as often as a tenth of --times, on a tone and on speech
kills         kill -9 of each stage so many times, of the supervisor for every second one, with one core busy
hangs         each stage hangs so many times, holding the interpreter's lock, with one core busy

All of them by default, one after another. Tables are Markdown. The exit code is 1 where memory, descriptors or threads
grow over the second half, latency does, an account does not balance, something does not come back, or anything is left.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import psutil
import soundfile

from pipeline.audio import FADE
from pipeline.chaos import NEAR_MS, Chaos, Incident, parse, row
from pipeline.client import Client, Events
from pipeline.errors import ControlError
from pipeline.messages import Accounting, TimingRecord
from pipeline.topology import FRAME, FRAME_MS, PROCESSES, SAMPLE_RATE
from tests.helpers import largest_step, tone
from tests.integration.test_faults import WHOLE_HZ, silent_stretches
from tests.integration.test_life import segments
from tests.runs import Run, Runs, Samples, busy, children, read_wav, wait_for, write_wav

SPEECH: Final = Path(__file__).parents[1] / "pipeline" / "assets" / "speech.flac"

TONE_LEVEL: Final = 0.25
"""Of a run's tone."""

SAMPLES: Final = 200
"""Looks at a run, evenly spread."""

MEMORY_MB, DESCRIPTORS, THREADS = 2.0, 0.5, 0.5
"""What a process may have more at the end of the second half than at its beginning, by regression."""

STALLS_S: Final = (0.1, 0.5, 2.0, 8.0, 15.0)
BACK_S: Final = 3.0
"""How long after a stall of 2 s latency may take to be back."""

SLOW_MS: Final = 100
_WRONG_MAX: Final = 10
"""Faults that ended otherwise than they should, after which no more are made."""

_GONE_S: Final = 2.0
"""How long stages may outlive a supervisor."""

_MEBI: Final = 1 << 20

STEADY: Final = "engine = 'echo'\n[playback]\nprebuffer_ms = 80\n[faults]\nstep_ms = 50\nhang = 'lock'\n"
MODEL: Final = "engine = 'echo'\n[faults]\nstep_ms = 50\n"
WIDE: Final = (
    "engine = 'echo'\n[inference]\nbacklog_limit = 100\n[playback]\nqueue_frames = 100\n[faults]\nstep_ms = 50\n"
)


class Options(NamedTuple):
    """What the command line asks for."""

    hours: float
    minutes: float
    times: int
    seed: int


# What is sampled


class Look(NamedTuple):
    """One process at one moment."""

    at_s: float
    memory_mb: float
    descriptors: int
    threads: int


def _look_at(process: psutil.Process, at_s: float) -> Look:
    return Look(at_s, process.memory_info().rss / _MEBI, process.num_fds(), process.num_threads())


class Watch:
    """A run's processes, looked at again and again, and its account."""

    def __init__(self, name: str, supervisor: int) -> None:
        self._client = Client(name)
        self._began_s = time.monotonic()
        self._processes = {"supervisor": psutil.Process(supervisor)}
        for stage, status in self._client.status().stages.items():
            if status.pid is not None:
                self._processes[stage] = psutil.Process(status.pid)
        self.looks: dict[str, list[Look]] = {stage: [] for stage in self._processes}
        self.wrong: list[str] = []

    def look(self) -> bool:
        """Whether the run was still there."""
        at_s = time.monotonic() - self._began_s
        try:
            status = self._client.status()
            found = {stage: _look_at(process, at_s) for stage, process in self._processes.items()}
        except (ControlError, psutil.Error):
            return False
        if not all(look.memory_mb for look in found.values()):
            return False  # one of them was just ending
        for stage, look in found.items():
            self.looks[stage].append(look)
        self.wrong += status.accounting.discrepancies()
        return True

    def report(self) -> list[str]:
        """Print the table; returns what grew."""
        print("\n| process | looks | memory MB: first, half, last | growth | descriptors | threads |")
        print("|---|---|---|---|---|---|")
        for stage, looks in self.looks.items():
            self.wrong += [f"{stage}: {what}" for what in _grown(looks)]
            half = looks[len(looks) // 2 :]
            memory = ", ".join(f"{one.memory_mb:.1f}" for one in (looks[0], half[0], looks[-1]))
            counts = f"{looks[0].descriptors} to {looks[-1].descriptors} | {looks[0].threads} to {looks[-1].threads}"
            print(f"| {stage} | {len(looks)} | {memory} | {growth(half, 'memory_mb'):+.2f} | {counts} |")
        return self.wrong


def growth(looks: Sequence[Look], what: str) -> float:
    """From the first to the last of them, by the straight line that fits best."""
    at_s = np.array([look.at_s for look in looks])
    values = np.array([getattr(look, what) for look in looks], dtype=float)
    return float(np.polyfit(at_s, values, 1)[0] * (at_s[-1] - at_s[0])) if len(looks) > 1 else 0.0


def _grown(looks: Sequence[Look]) -> list[str]:
    half = looks[len(looks) // 2 :]
    limits = {"memory_mb": MEMORY_MB, "descriptors": DESCRIPTORS, "threads": THREADS}
    found = {what: growth(half, what) for what in limits}
    return [f"{what} grew by {by:.1f} in the second half" for what, by in found.items() if by > limits[what]]


@contextmanager
def up(runs: Runs, config: str, *arguments: str, name: str = "soak") -> Iterator[tuple[Run, Client]]:
    """A run with these settings, running."""
    with runs.up("--config", str(runs.config(config)), *arguments, name=name) as run:
        run.running()
        yield run, Client(name)


# Hours


def accelerated(runs: Runs, options: Options) -> list[str]:
    """From file to file, as fast as it goes."""
    source, target = runs.folder / "long.flac", runs.folder / "answer.flac"
    frames = round(options.hours * 3_600_000 / FRAME_MS)
    _write_levels(source, frames)
    wrong: list[str] = []
    with runs.offline("--engine", "echo", "--json", str(source), str(target), name="soak") as run:
        wait_for(lambda: _is_running(run), "the run")
        watch, pause_s = Watch("soak", run.process.pid), 1.0
        while watch.look():
            time.sleep(pause_s)
        code = run.wait()
        result = json.loads(run.out)
        counts = msgspec.convert(result["accounting"], Accounting)
    print(f"\n{options.hours:g} h of audio in {result['wall_s']:.0f} s, {result['speed']:.0f} times real time")
    wrong += watch.report() + counts.discrepancies()
    if code or counts.played != frames * FRAME or counts.concealed:
        wrong.append(f"exit code {code}, {counts.played} of {frames * FRAME} samples, {counts.concealed} concealed")
    return wrong


def _is_running(run: Run) -> bool:
    assert run.process.poll() is None, run.err
    try:
        return Client("soak").status().state == "running"
    except ControlError:
        return False


def _write_levels(path: Path, frames: int) -> None:
    """Each frame another level: hours in a few megabytes."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        for part in np.array_split(np.arange(frames) % 30_000, max(1, frames // 750)):
            file.write(np.repeat(part.astype(np.int16), FRAME))


def listen(events: Events, seconds: float) -> list[float]:
    """Microphone to speaker of each frame that is played in so long, in ms."""
    found, until_s = [], time.monotonic() + seconds
    while time.monotonic() < until_s:
        if isinstance(event := next(events, None), TimingRecord):
            found.append(event.mic_to_speaker_ms)
    return found


def real(runs: Runs, options: Options) -> list[str]:
    """In real time."""
    with up(runs, MODEL, "--input", "tone:440", "--output", "null") as (run, client):
        watch = Watch("soak", run.process.pid)
        latencies_ms = []
        with client.events("timing.playback", timeout_s=1.0) as events:
            for _ in range(SAMPLES):
                latencies_ms.append(listen(events, options.minutes * 60 / SAMPLES))
                watch.look()
        final = client.status()
        code = run.interrupt()
    wrong = watch.report()
    spread, counts = final.timing.mic_to_speaker_ms, final.accounting
    quarter = SAMPLES // 4
    quarters = [
        statistics.median(ms for part in latencies_ms[start : start + quarter] for ms in part)
        for start in range(0, SAMPLES, quarter)
    ]
    print(
        f"\n{options.minutes:g} min: {counts.played // FRAME} frames, microphone to speaker p50 {spread.p50_ms:.1f} "
        f"ms, p95 {spread.p95_ms:.1f}, max {spread.max_ms:.1f}; gaps {counts.gaps}, dropped {counts.dropped}, "
        f"skipped {counts.skipped}"
    )
    print(f"p50 of each quarter: {', '.join(f'{ms:.1f}' for ms in quarters)} ms")
    if quarters[-1] > quarters[1] + NEAR_MS:
        wrong.append(f"latency went from {quarters[1]:.1f} ms in the second quarter to {quarters[-1]:.1f} in the last")
    return wrong + ([f"exit code {code}"] if code else [])


def overload(runs: Runs, options: Options) -> list[str]:
    """A model that takes longer for a frame than a frame is."""
    config = f"engine = 'echo'\n[faults]\nstep_ms = {SLOW_MS}\n"
    parts = max(2, round(options.minutes))
    with up(runs, config, "--input", "tone:440", "--output", "null") as (run, client):
        with client.events("timing.playback", timeout_s=1.0) as events:
            minutes = [listen(events, options.minutes * 60 / parts) for _ in range(parts)]
        counts = client.status().accounting
        run.interrupt()
    print("\n| part | frames | microphone to speaker p50 ms | max |\n|---|---|---|---|")
    for number, found in enumerate(minutes):
        print(f"| {number + 1} | {len(found)} | {statistics.median(found):.0f} | {max(found):.0f} |")
    wrong = counts.discrepancies()
    if max(minutes[-1]) > max(minutes[0]) + FRAME_MS:
        wrong.append(
            f"latency was {max(minutes[-1]):.0f} ms at most at the end, {max(minutes[0]):.0f} in the beginning"
        )
    return wrong


# Faults


def stalls(runs: Runs, options: Options) -> list[str]:
    """The model stopped, and what was heard."""
    times = max(1, options.times // 10)
    speech = np.resize(read_wav(SPEECH), 3_600 * SAMPLE_RATE)
    source = write_wav(runs.folder / "in.wav", speech)
    wrong = _stalled(runs, options, MODEL, f"tone:{WHOLE_HZ}", STALLS_S * times, tone(50, WHOLE_HZ, level=TONE_LEVEL))
    # Echo returns the joint where frames of the microphone were dropped: on speech none may be.
    return wrong + _stalled(runs, options, WIDE, f"file:{source}", STALLS_S[:3] * times, speech)


def _stalled(
    runs: Runs, options: Options, config: str, spec: str, stalls_s: Sequence[float], sound: Samples
) -> list[str]:
    target = runs.folder / "heard.wav"
    found: list[Incident] = []
    wrong: list[str] = []
    with up(runs, config, "--input", spec, "--output", f"file:{target}") as (run, client):
        for index, seconds in enumerate(stalls_s):
            one = Chaos(client, parse(f"stall=inference:{seconds}"), options.seed + index, found.append, normal_s=30.0)
            one.run(0)
            wrong += one.wrong
            print(row(found[-1]), flush=True)
        counts = client.status().accounting
        run.interrupt()
    recorded = read_wav(target)[: counts.sent]
    allowed = largest_step(sound) + float(np.abs(sound).max()) * np.pi / (FADE + 1)
    heard, silent = largest_step(recorded), sum(silent_stretches(recorded))
    print(
        f"\n{spec.partition(':')[0]}: largest step {heard:.4f}, allowed {allowed:.4f}; "
        f"{silent} silent and {counts.concealed - silent} of fades out make {counts.concealed} concealed; "
        f"gaps {counts.gaps}"
    )
    if config == MODEL:
        late = [one for one in found if one.fault.seconds == 2.0 and (one.normal_s is None or one.normal_s > BACK_S)]
        wrong += [f"after a stall of 2 s latency took {one.normal_s} s to be back" for one in late]
        # A tone is never silent, as speech may be.
        if not 0 <= counts.concealed - silent <= (counts.gaps + 2) * FADE:
            wrong.append(f"{counts.concealed} samples were counted as concealed, and {silent} are silent")
    return wrong + ([f"a step of {heard:.4f}, over {allowed:.4f}"] if heard > allowed else [])


def kills(runs: Runs, options: Options) -> list[str]:
    """kill -9 of everything."""
    return _deaths(runs, options, "kill")


def hangs(runs: Runs, options: Options) -> list[str]:
    """Each stage in a loop that holds the interpreter's lock."""
    return _deaths(runs, options, "hang")


def _deaths(runs: Runs, options: Options, kind: str) -> list[str]:
    """In each run every stage dies twice, in an order and at moments of chance, and then the supervisor."""
    dice = random.Random(options.seed)  # noqa: S311  (nothing is secret)
    back_s: dict[str, list[float]] = {process.name: [] for process in PROCESSES}
    gone_s: list[float] = []
    wrong: list[str] = []
    with busy(1):
        while min(map(len, back_s.values())) < options.times and len(wrong) < _WRONG_MAX:
            order = [process.name for process in PROCESSES] * 2
            dice.shuffle(order)
            with up(runs, STEADY, "--input", "tone:440", "--output", "null") as (run, client):
                for stage in order:
                    found: list[Incident] = []
                    one = Chaos(client, parse(f"{kind}={stage}"), dice.randrange(1 << 30), found.append, normal_s=0.001)
                    one.run(0)
                    wrong += [line for line in one.wrong if "latency" not in line]
                    print(*map(row, found), sep="\n", flush=True)
                    back_s[stage] += [incident.flows_s for incident in found if incident.flows_s is not None]
                gone_s.append(_kill_supervisor(run))
    runs.call("down", "--name", "soak")
    print("\n| killed | times | until frames flow again: p50 s | max s |\n|---|---|---|---|")
    for who, seconds in [*back_s.items(), ("supervisor (until all stages are gone)", gone_s)]:
        if seconds:
            print(f"| {who} | {len(seconds)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |")
    wrong += [f"left behind: {left}" for left in [*runs.leftovers(), *segments(runs, "soak")] if "log" not in left]
    longest_s = max(gone_s, default=0.0)
    return wrong + ([f"stages outlived the supervisor by {longest_s:.1f} s"] if longest_s > _GONE_S else [])


def _kill_supervisor(run: Run) -> float:
    """Returns how long its stages stayed, in seconds. The next run of the name clears what is left."""
    stages = children(run.process)
    os.kill(run.process.pid, signal.SIGKILL)
    began_s = time.monotonic()
    wait_for(lambda: not any(map(_lives, stages)), "the stages to leave")
    return time.monotonic() - began_s


def _lives(process: psutil.Process) -> bool:
    """What has ended stays a zombie until the system's first process looks."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


CASES: Final[dict[str, Callable[[Runs, Options], list[str]]]] = {
    "accelerated": accelerated,
    "real": real,
    "overload": overload,
    "stalls": stalls,
    "kills": kills,
    "hangs": hangs,
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"CASE {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs are ended also then
    options = Options(given.hours, given.minutes, given.times, given.seed)
    wrong: list[str] = []
    for name in given.cases or CASES:
        print(f"\n## {name}\n", flush=True)
        with Runs() as runs:
            os.environ["PIPELINE_RUNTIME_DIR"] = str(runs.folder / "run")
            wrong += [f"{name}: {line}" for line in CASES[name](runs, options)]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
