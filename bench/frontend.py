"""Our front end against upstream's: the same sound, devices and model speed, heard from outside.

    python -m bench.frontend [--seconds 12] [--repeats 2] [--minutes N] [--json FILE] [CASE ...]

Needs Debian's packages of the tests (tests/system-packages). Ours and upstream's take turns, each trial with a sound
server of its own. --minutes adds a case of that length, which is measured once.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import psutil
import soundfile

from bench import peers, results
from bench.endtoend import SPEECH, stereo
from bench.results import Plot, Section, Table, Target
from bench.telemetry import used_s
from pipeline.chaos import stall
from pipeline.topology import SAMPLE_RATE
from tests.runs import Run, Runs, Samples, busy, children, wait_for, with_sound, write_wav
from tests.soundserver import WAV_HEADER_BYTES, SoundServer, missing

Figures = dict[str, Any]

UPSTREAM: Final = Path(__file__).with_name("upstream.py")

LESS_MS: Final = 80.0
"""By how much our latency is to be lower than upstream's."""

BACK_MS: Final = 10.0
"""How near to what it was before a latency counts as back there."""

WINDOW_S: Final = 0.2
HOP_S: Final = 0.1
"""How much sound is looked for in the microphone's, and how often."""

LONGEST_S: Final = 8.0
NEAR_S: Final = 0.2
"""How far back, and how far from the last latency before that."""

_SURE: Final = 0.95
"""How alike two stretches are, of 1, where there is no need to look further, and where what is far is believed."""

_ALIKE: Final = 0.5
"""Less, and it is not known what was heard."""

_EMPHASIS: Final = 0.95
_NOTHING: Final = 1e-12

_EDGE: Final = 0.25
"""Of a trial, at its beginning and at its end: what is compared for lag that stays."""

_STALL: Final = 0.3
"""How far into a trial the model is stopped."""

SHORTEST_S: Final = 4.0
_SETTLE_S: Final = 2.0
_TAIL_S: Final = 1.0
"""How long the speaker is silent when all was played."""

_LOOK_S: Final = 0.1
_STEREO_BYTES: Final = 8
"""Of a sample of both sides."""

_PREBUFFER_MS: Final = 40
"""Ours as it is with Moshi; with echo, which stands in for it here, it would be 3."""

_FLOOR: Final = 0.002
"""Of the noise under the speech, full scale 1: no two stretches are alike, and no sample is zero."""

_LEAST_GAP: Final = SAMPLE_RATE // 1_000
"""Samples of zero in a row that are a gap: 1 ms."""

_NEAR: Final = SAMPLE_RATE // 100
"""Samples on each side of a gap that say what steps the sound itself has: 10 ms."""

_CUT: Final = 0.2
"""How loud the last millisecond is at least, against the sound 10 ms further, where nothing is faded."""

_MS: Final = 1_000 / SAMPLE_RATE


class Case(NamedTuple):
    """What the two have to bear."""

    name: str
    step_ms: float = 50
    jitter_ms: float = 0
    """As much is added to a step at most, evenly spread."""
    loops: int = 0
    """Programs beside it that keep a core busy each."""
    stall_s: float = 0
    """For how long the process with the model is stopped."""


CASES: Final = (
    Case("quiet"),
    Case("all cores busy", loops=os.cpu_count() or 1),
    Case("step 50 to 90 ms", jitter_ms=40),
    Case("stall of 0.5 s", stall_s=0.5),
    Case("stall of 2 s", stall_s=2.0),
)
NAMES: Final = [case.name for case in CASES]
STEADY: Final = {"quiet", "all cores busy", "step 50 to 90 ms"}
"""The cases by which latency is compared; after a stall upstream's is higher anyway."""


# The two front ends


class Front(NamedTuple):
    """A front end that speaks with the default microphone and speaker."""

    processes: list[psutil.Process]
    model: psutil.Process
    """The one of them that runs the model."""
    told: Callable[[], Figures]
    """What it says of itself."""
    end: Callable[[], int | None]
    """End it; returns the exit code, if that says something."""


def use_by_default(server: SoundServer) -> None:
    """Make the virtual microphone and speaker the ones that a program gets that names none."""
    pulse = f'type pulse server "{server.env["PULSE_SERVER"]}" device'
    with (server.folder / "asound.conf").open("a") as config:
        config.write(f"pcm.!default {{ type asym capture.pcm {{ {pulse} mic.monitor }} ")
        config.write(f"playback.pcm {{ {pulse} spk handle_underrun 1 }} }}\n")


@contextmanager
def ours(server: SoundServer, case: Case, seed: int) -> Iterator[Front]:
    """`pipeline up` as it is with Moshi, but that echo takes a model's time and stands in for it."""
    settings = f"[playback]\nprebuffer_ms = {_PREBUFFER_MS}\n"
    settings += f"[faults]\nstep_ms = {case.step_ms}\njitter_ms = {case.jitter_ms}\nseed = {seed}\n"
    with with_sound(server) as runs, runs.up("--engine", "echo", "--config", str(runs.config(settings))) as run:
        model = psutil.Process(run.running()["stages"]["inference"]["pid"])
        processes = [psutil.Process(run.process.pid), *children(run.process)]
        yield Front(processes, model, lambda: _told(run.status()), lambda: _end(run))


def _end(run: Run) -> int:
    run.process.terminate()
    code = run.wait()
    if code:
        print(f"pipeline up ended with {code}: {run.err}", file=sys.stderr)
    return code


def _told(status: Figures) -> Figures:
    devices = {name: stage["device_latency_ms"] for name, stage in status["stages"].items()}
    accounting = {name: status["accounting"][name] for name in ("gaps", "dropped", "skipped", "concealed")}
    accounting |= {"xruns": status["xruns"], "drift_ppm": status["drift_ppm"]}
    return {**accounting, "device_latency_ms": devices, "mic_to_speaker_ms": status["timing"]["mic_to_speaker_ms"]}


def upstream(python: Path) -> Callable[[SoundServer, Case, int], AbstractContextManager[Front]]:
    """moshi_mlx's local.py, as `python` has it installed, with stand-ins for what computes."""

    @contextmanager
    def begin(server: SoundServer, case: Case, seed: int) -> Iterator[Front]:
        with with_sound(server) as runs:
            ready, log = runs.folder / "ready", runs.folder / "log"
            command = [str(python), "-P", str(UPSTREAM), "--ready", str(ready), "--seed", str(seed)]
            command += ["--step-ms", str(case.step_ms), "--jitter-ms", str(case.jitter_ms)]
            with log.open("w") as output, _ended(command, runs, output) as process:
                wait_for(lambda: _is_ready(process, ready, log), "upstream's front end")
                processes = [psutil.Process(process.pid), *children(process)]
                yield Front(processes, psutil.Process(int(ready.read_text())), lambda: _lag(log), lambda: None)

    return begin


def _is_ready(process: "subprocess.Popen[bytes]", ready: Path, log: Path) -> bool:
    failed = process.poll() is not None or "Traceback" in log.read_text()
    assert not failed, log.read_text()
    return ready.exists() and ready.read_text() != ""


def _lag(log: Path) -> Figures:
    return {"[LAG]": log.read_text().count("[LAG]")}


@contextmanager
def _ended(command: list[str], runs: Runs, output: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A program, ended by Ctrl-C; what is left of it and its children 10 s later is killed."""
    process = subprocess.Popen(
        command, cwd=runs.folder, env=runs.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    try:
        yield process
    finally:
        family = [*children(process), psutil.Process(process.pid)] if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        for left in psutil.wait_procs(family, 10)[1]:
            left.kill()
        process.wait()


# What was heard


class Gap(NamedTuple):
    """Silence where there should be sound."""

    samples: int
    is_cut: bool
    """Whether the sound at an edge is as loud as it is 10 ms further: nothing was faded."""
    is_click: bool
    """Whether the step at an edge is larger than any within the 10 ms of sound beside it."""


class Heard(NamedTuple):
    """A recording of both sides."""

    latency_ms: list[tuple[float, float]]
    """Where it was found: the time in s of the recording, and how much earlier the microphone heard the same."""
    gaps: list[Gap]
    lost_ms: float
    """How much less the speaker played than the microphone heard."""


def listen(microphone: Samples, speaker: Samples) -> Heard:
    """Find the speaker's sound in the microphone's. Both of shape (n,), from one clock, silent before and after.

    Raises ValueError where the speaker played nothing of what the microphone heard.
    """
    latency = list(_latency(_whitened(microphone), _whitened(speaker)))
    if not latency:
        raise ValueError("the speaker played nothing of what the microphone heard")
    lost = np.count_nonzero(microphone) - np.count_nonzero(speaker)
    return Heard(latency_ms=latency, gaps=_gaps(speaker), lost_ms=float(lost) * _MS)


def _whitened(samples: Samples) -> Samples:
    """Less of the low tones, which are alike at many lags."""
    whitened: Samples = samples.copy()
    whitened[1:] -= np.float32(_EMPHASIS) * samples[:-1]
    return whitened


def _latency(microphone: Samples, speaker: Samples) -> Iterator[tuple[float, float]]:
    count, hop = round(WINDOW_S * SAMPLE_RATE), round(HOP_S * SAMPLE_RATE)
    most, near = round(LONGEST_S * SAMPLE_RATE), round(NEAR_S * SAMPLE_RATE)
    lag = 0
    for start in range(0, len(speaker) - count, hop):
        window = speaker[start : start + count]
        if not window.any():
            continue
        found, alike = _best_lag(microphone, window, start, max(0, lag - near), lag + near)
        if alike < _SURE:
            # Where a gap is in the window the same words, said earlier, may be more alike than what was said last.
            far, far_alike = _best_lag(microphone, window, start, 0, most)
            if far_alike >= _SURE:
                found, alike = far, far_alike
        if alike >= _ALIKE:
            lag = found
            yield start / SAMPLE_RATE, lag * _MS


def _best_lag(microphone: Samples, window: Samples, start: int, least: int, most: int) -> tuple[int, float]:
    """Of the lags up to `most`: the one at which the window, that starts at `start`, is most alike, and how much."""
    begin, end = max(0, start - most), start - least + len(window)
    past = microphone[begin:end].astype(np.float64)
    if len(past) < len(window):
        return 0, 0.0
    size = 1 << len(past).bit_length()
    products = np.fft.irfft(np.fft.rfft(past, size) * np.fft.rfft(window, size).conj(), size)
    energy = np.cumsum(np.concatenate(([0.0], past**2)))
    norms = np.sqrt(np.maximum(energy[len(window) :] - energy[: -len(window)], _NOTHING)) * np.linalg.norm(window)
    alike = products[: len(norms)] / norms
    best = int(np.argmax(alike))
    return start - (begin + best), float(alike[best])


def _gaps(speaker: Samples) -> list[Gap]:
    sound = np.flatnonzero(speaker)
    silences = np.diff(sound) - 1
    return [
        Gap(int(silences[index]), *_edges(speaker[: sound[index] + 1], speaker[sound[index + 1] :]))
        for index in np.flatnonzero(silences >= _LEAST_GAP)
    ]


def _edges(before: Samples, after: Samples) -> tuple[bool, bool]:
    """Whether the sound before a gap is cut or clicks, or that after it."""
    sides = [before[::-1][: 2 * _NEAR], after[: 2 * _NEAR]]
    return any(map(_is_cut, sides)), any(map(_is_click, sides))


def _is_cut(beside: Samples) -> bool:
    edge, away = beside[:_LEAST_GAP], beside[_NEAR:]
    return bool(np.std(edge) > _CUT * np.std(away)) if len(away) else False


def _is_click(beside: Samples) -> bool:
    return bool(abs(beside[0]) > np.abs(np.diff(beside[:_NEAR])).max(initial=0))


# Trials


def sound(seconds: float, seed: int) -> Samples:
    """The bundled recording of speech, over and over, with a faint noise under it that never repeats itself."""
    speech = soundfile.read(SPEECH, dtype="float32")[0]
    floor = np.random.default_rng(seed).uniform(-_FLOOR, _FLOOR, round(seconds * SAMPLE_RATE))
    mixed: Samples = np.resize(speech, len(floor)) + floor.astype(np.float32)
    return mixed


def trial(begin: Callable[..., AbstractContextManager[Front]], case: Case, seconds: float, seed: int = 0) -> Figures:
    """One front end in one case, for so long."""
    with SoundServer(cable=True) as server:
        use_by_default(server)
        source, both = write_wav(server.folder / "in.wav", sound(seconds, seed)), server.folder / "both.wav"
        with begin(server, case, seed) as front, busy(case.loops):
            time.sleep(_SETTLE_S)
            before = front.told()
            with server.record_both(both):
                began_s = time.monotonic()
                used = [used_s(process) for process in front.processes]
                feed = server.feed(source)
                stalled_s = _stop_model(front, case, seconds, began_s)
                feed.wait()
                took_s = time.monotonic() - began_s
                cpu_s = sum(used_s(process) - was for process, was in zip(front.processes, used, strict=True))
                _await_silence(both)
            after = front.told()
            code = front.end()
        heard = listen(*stereo(both))
    told = {"before": before, "after": after}
    cost = {"cpu_percent": 100 * cpu_s / took_s}
    return {**summary(heard, stalled_s), **cost, "told": told, "exit_code": code}


def _await_silence(recording: Path) -> None:
    """Until the speaker has been silent for _TAIL_S, LONGEST_S at most: what comes late is still heard."""
    until_s = time.monotonic() + LONGEST_S
    time.sleep(_TAIL_S)
    while time.monotonic() < until_s and _tail(recording).any():
        time.sleep(_LOOK_S)


def _tail(recording: Path) -> Samples:
    """The last _TAIL_S of the speaker's side of a WAV file of both, float32, that is still being written."""
    with recording.open("rb") as file:
        begin = file.read(WAV_HEADER_BYTES).index(b"data") + 8  # the samples come after the length, 4 bytes
        count = (recording.stat().st_size - begin) // _STEREO_BYTES
        last = min(count, round(_TAIL_S * SAMPLE_RATE))
        file.seek(begin + (count - last) * _STEREO_BYTES)
        return np.frombuffer(file.read(last * _STEREO_BYTES), np.float32)[1::2]


def _stop_model(front: Front, case: Case, seconds: float, began_s: float) -> float:
    """Stop the model where the case says so; returns when, in s of the recording (0 where it does not)."""
    if not case.stall_s:
        return 0.0
    time.sleep(_STALL * seconds)
    stalled_s = time.monotonic() - began_s
    stall(front.model, case.stall_s)
    return stalled_s


def summary(heard: Heard, stalled_s: float = 0.0) -> Figures:
    """What was heard, in figures. Times of `latency` are from the stall on, or from the start."""
    moments, latency = np.array(heard.latency_ms).T
    edge_s = _EDGE * (moments[-1] - moments[0])
    start_ms = float(np.median(latency[moments <= moments[0] + edge_s]))
    zero_s = stalled_s or moments[0]
    away = moments[(moments >= zero_s) & (np.abs(latency - start_ms) > BACK_MS)]
    return {
        "p50_ms": float(np.percentile(latency, 50)),
        "p95_ms": float(np.percentile(latency, 95)),
        "max_ms": float(latency.max()),
        "start_ms": start_ms,
        "end_ms": float(np.median(latency[moments >= moments[-1] - edge_s])),
        "away_s": float(away[-1] - zero_s + HOP_S) if len(away) else 0.0,
        "gaps": len(heard.gaps),
        "cuts": sum(gap.is_cut for gap in heard.gaps),
        "clicks": sum(gap.is_click for gap in heard.gaps),
        "gap_ms": sum(gap.samples for gap in heard.gaps) * _MS,
        "lost_ms": heard.lost_ms,
        "latency": [[round(float(s - zero_s), 2), round(float(ms), 2)] for s, ms in heard.latency_ms],
    }


# The section


Trials = dict[str, dict[str, list[Figures]]]
"""By case and by front end, one for each repeat; {"fault": why} for one that gave no figures."""

OURS: Final = "ours"
THEIRS: Final = "upstream"
_DURING: Final = {"after": 1, "before": -1}
_NOT_INSTALLED: Final = "upstream's package is not installed"
_NO_FIGURES: Final = "no figures"


def measure(cases: list[tuple[Case, float, int]], python: Path | None) -> Trials:
    """Each case with its seconds and repeats, the two front ends in turn; `python` has upstream's, if anything has."""
    fronts = {OURS: ours} | ({THEIRS: upstream(python)} if python else {})
    found: Trials = {}
    for case, seconds, repeats in cases:
        found[case.name] = {side: [] for side in fronts}
        for repeat in range(repeats):
            for side, begin in fronts.items():
                print(f"{case.name}, {side}, {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
                found[case.name][side].append(_tried(begin, case, seconds, repeat))
    return found


def _tried(begin: Callable[..., AbstractContextManager[Front]], case: Case, seconds: float, seed: int) -> Figures:
    """A trial; where it fails, only why: the others are of use without it."""
    try:
        return trial(begin, case, seconds, seed)
    except Exception as error:
        print(f"the trial failed: {error}", file=sys.stderr, flush=True)
        said = str(error).strip().splitlines()
        return {"fault": f"{type(error).__name__}: {said[-1] if said else 'no reason given'}"}


def _good(trials: list[Figures]) -> list[Figures]:
    """Those that gave figures."""
    return [figures for figures in trials if "fault" not in figures]


def _spread(trials: list[Figures], key: str) -> str:
    values = [figures[key] for figures in _good(trials)]
    return results.spread(values) if values else _NO_FIGURES


def _table(title: str, found: Trials, columns: dict[str, str], note: str = "") -> Table:
    rows = [
        [name, side, *(_spread(trials, key) for key in columns)]
        for name, sides in found.items()
        for side, trials in sides.items()
    ]
    return Table(title=title, columns=["case", "", *columns.values()], rows=rows, note=note)


LATENCY: Final = {"p50_ms": "p50", "p95_ms": "p95", "max_ms": "max", "start_ms": "at the start", "end_ms": "at the end"}
GAPS: Final = {
    "gaps": "gaps", "cuts": "of them cut, not faded", "clicks": "of them with a click", "gap_ms": "silence, ms",
    "lost_ms": "never played, ms",
}  # fmt: skip
COST: Final = {"cpu_percent": "all processes, % of a core"}


def tables(found: Trials) -> list[Table]:
    """All that is told of the trials."""
    shown = [
        _table("Microphone to speaker, ms", found, LATENCY, _LATENCY_NOTE),
        _table("What was missing in what was heard", found, GAPS, _GAPS_NOTE),
        _table("What it costs", found, COST, _COST_NOTE),
    ]
    faults = [
        [name, side, str(number), figures["fault"]]
        for name, sides in found.items()
        for side, trials in sides.items()
        for number, figures in enumerate(trials, 1)
        if "fault" in figures
    ]
    return [*shown, Table("Trials that failed", ["case", "", "repeat", "why"], faults)] if faults else shown


def targets(found: Trials) -> list[Target]:
    """What was to be reached in the cases that were run."""
    steady = [_less(name, sides) for name, sides in found.items() if name in STEADY]
    stalls = [_back(name, sides) for name, sides in found.items() if name not in STEADY]
    return [*steady, _no_cut(found), *stalls, _clean(found)]


def _ours(found: Trials) -> list[Figures]:
    return [figures for sides in found.values() for figures in sides[OURS]]


def _clean(found: Trials) -> Target:
    codes = [figures.get("exit_code", _NO_FIGURES) for figures in _ours(found)]
    wrong = [str(code) for code in codes if code != 0]
    return Target(
        what="our run ended cleanly, all cases",
        limit="exit code 0, every trial",
        measured=f"{len(codes) - len(wrong)} of {len(codes)}{'; others ' if wrong else ''}{', '.join(wrong)}",
        met=not wrong,
    )


def _less(name: str, sides: dict[str, list[Figures]]) -> Target:
    both = zip(sides[OURS], sides.get(THEIRS, []), strict=False)
    pairs = [(own["p50_ms"], theirs["p50_ms"]) for own, theirs in both if len(_good([own, theirs])) == 2]
    less = [theirs - own for own, theirs in pairs]
    ratio = [theirs / own for own, theirs in pairs]
    return Target(
        what=f"latency p50 below upstream's, {name}",
        limit=f"at least {LESS_MS:g} ms less",
        measured=f"{results.spread(less)} ms less; upstream's is {results.spread(ratio)} times ours"
        if pairs
        else _NO_FIGURES
        if THEIRS in sides
        else _NOT_INSTALLED,
        met=bool(pairs) and median(less) >= LESS_MS,
    )


def _no_cut(found: Trials) -> Target:
    own = _good(_ours(found))
    dry = sum(figures["told"][when]["xruns"]["playback"] * sign for figures in own for when, sign in _DURING.items())
    return Target(
        what="gaps that are not concealed, all cases",
        limit="none",
        measured=f"{_cuts(found, OURS)}; {_or_none(found, lambda: _cuts(found, THEIRS))}",
        met=bool(own) and all(figures["cuts"] == 0 for figures in own),
        why=f"the device ran dry, {dry} times by our own count: the sound server fills in zeros" if dry else "",
    )


def _cuts(found: Trials, side: str) -> str:
    trials = [figures for sides in found.values() for figures in _good(sides[side])]
    return f"{sum(figures['cuts'] for figures in trials)} (of {sum(figures['gaps'] for figures in trials)} gaps)"


def _back(name: str, sides: dict[str, list[Figures]]) -> Target:
    more = {side: [t["end_ms"] - t["start_ms"] for t in _good(trials)] for side, trials in sides.items()}
    said = {side: f"{results.spread(values)} ms" if values else _NO_FIGURES for side, values in more.items()}
    theirs = _or_none({name: sides}, lambda: said[THEIRS])
    return Target(
        what=f"latency at the end less that at the start, {name}",
        limit=f"at most {BACK_MS:g} ms more",
        measured=f"{said[OURS]}, last further off {_spread(sides[OURS], 'away_s')} s in; {theirs}",
        met=bool(more[OURS]) and max(more[OURS]) <= BACK_MS,
    )


def _or_none(found: Trials, theirs: Callable[[], str]) -> str:
    return f"upstream {theirs()}" if all(THEIRS in sides for sides in found.values()) else _NOT_INSTALLED


def plots(found: Trials) -> list[Plot]:
    """Latency over time around the longest stall, and its median in every case."""
    by_case: dict[str, list[tuple[float | str, float]]] = {
        side: [
            (name, float(median(figures["p50_ms"] for figures in good)))
            for name, sides in found.items()
            if (good := _good(sides[side]))
        ]
        for side in next(iter(found.values()))
    }
    bars = Plot("frontend-latency", "Microphone to speaker, p50", "case", "ms", "bars", log=False, series=by_case)
    stalled = found.get(CASES[-1].name)
    if stalled is None:
        return [bars]
    lines: dict[str, list[tuple[float | str, float]]] = {
        side: [(s, ms) for s, ms in good[0]["latency"]] for side, trials in stalled.items() if (good := _good(trials))
    }
    title = f"Microphone to speaker, around a {CASES[-1].name} of the model"
    return [bars, Plot("frontend-stall", title, "s from the stall", "ms", "lines", log=False, series=lines)]


_TEXT: Final = f"""\
Upstream's program is moshi_mlx's local.py, as the package is installed: its processes, queues, loops, callbacks and
devices are untouched. Ours is `pipeline up`. What computes is stood in for, the same on both sides: a model that
takes a set time a step (50 ms where nothing else is said) and answers with the frame that it was given, and a codec
that takes none. Both use the default microphone and speaker, two channels of one virtual sound card at 24 kHz, which
the sound server records in one file. They take turns, each trial with a server of its own.

- Ours has the settings that a user of Moshi gets: a prebuffer of {_PREBUFFER_MS} ms, and not the 3 ms of echo.
- Upstream's processes are spawned, as on macOS; forked, as on Linux, they cannot open this sound server.
- Upstream's bound of 4,000 steps (320 s) is lifted. It asks for blocks of a frame and PortAudio's `high` latency; what
  that comes to is the device's: CoreAudio's are others than those of this virtual card, and were not tried.
- Our audio threads and the main threads of our audio stages run under real-time scheduling (SCHED_FIFO) where the
  system permits it; here it was {{permitted}}. All of upstream's run at ordinary priority, as does what stands in for
  the model on both sides. A user without that permission does not get it, and is not in these figures.
- Not in any figure: what a model and a codec take from the same processor, and the frame (80 ms) between what Moshi
  hears and what it says.

Speech with a faint noise under it is fed, no two stretches of which are alike. Each {WINDOW_S * 1e3:.0f} ms of what is
heard are looked for in what the microphone heard, by cross-correlation, {1 / HOP_S:.0f} times a second: that is the
latency. A gap is 1 ms and more of zeros between the first and the last sound. It is *cut* where the last millisecond
of sound at an edge is over {_CUT:g} times as loud as that 10 ms further, so that nothing was faded, and *clicks* where
the step there is larger than any in the 10 ms beside it. It is recorded until the speaker has been silent for
{_TAIL_S:g} s, or {LONGEST_S:g} s after the end of what is fed. In a stall the process that runs the model is stopped
(SIGSTOP)."""

_LATENCY_NOTE: Final = f"""\
At the start and the end: the first and the last {_EDGE:.0%} of a trial; how long a latency was off is counted from the
stall on, if there is one. Median (min to max) over the repeats."""
_GAPS_NOTE: Final = """\
Never played: what was dropped or skipped to be in time again, or taken out in playing faster, fades not counted.
Upstream drops nothing, and stays late."""
_COST_NOTE: Final = "Processor time of the program's processes while the sound is fed, without the sound server's."


def section(found: Trials, version: str | None, seconds: float, command: str) -> Section:
    """The benchmark's results, against a version of moshi_mlx."""
    return Section(
        name="frontend",
        title="Front end",
        command=command,
        text=_TEXT.replace("{permitted}", results.real_time()),
        seconds=seconds,
        tables=tables(found),
        targets=targets(found),
        plots=plots(found),
        figures={"moshi_mlx": version, "trials": found},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help=f"of each trial, at least {SHORTEST_S:g}")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="of one more case, which is measured once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(NAMES))
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if package := missing():
        print(f"bench.frontend needs a virtual sound server: {package} is missing (make system)", file=sys.stderr)
        sys.exit(2)
    if unknown := set(arguments.cases) - set(NAMES):
        parser.error(f"CASE {unknown.pop()!r}: expected one of {'; '.join(NAMES)}")
    if not (arguments.seconds >= SHORTEST_S and 60 * (arguments.minutes or SHORTEST_S) >= SHORTEST_S):
        parser.error(
            f"--seconds {arguments.seconds:g}, --minutes {arguments.minutes}: expected {SHORTEST_S:g} s or more"
        )
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: expected 1 or more")
    began_s = time.monotonic()
    chosen = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    cases = [(case, arguments.seconds, arguments.repeats) for case in chosen]
    if arguments.minutes:
        cases.append((Case(f"{arguments.minutes:g} minutes"), 60 * arguments.minutes, 1))
    version = peers.version("moshi_mlx")
    found = measure(cases, peers.python() if version else None)
    seconds = time.monotonic() - began_s
    results.finish(section(found, version, seconds, command(arguments)), arguments.json)


def command(arguments: argparse.Namespace) -> str:
    """What was called, as far as it is not the default; without the file, which is this machine's."""
    parser, parts = _parser(), ["python", "-m", "bench.frontend"]
    for name in ("seconds", "repeats", "minutes"):
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            parts += [f"--{name}", f"{value:g}"]
    return shlex.join([*parts, *arguments.cases])


if __name__ == "__main__":
    main()
