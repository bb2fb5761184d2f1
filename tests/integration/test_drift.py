"""Whole runs whose microphone and speaker have different clocks.

A virtual sound card keeps the system's clock, and cannot be skewed; so each run has a real PortAudio device at one end
and a stand-in with a clock that is off at the other.

    python -m tests.integration.test_drift [SECONDS [PPM]]
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import soundfile

from pipeline.audio import Samples
from pipeline.client import Client
from pipeline.messages import TimingRecord
from pipeline.topology import SAMPLE_RATE
from tests.clocks import CLICK, HZ, roughness
from tests.runs import Run, Runs, assert_balanced, with_sound, write_wav
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer

SECONDS: Final = 45.0
PPM: Final = 1_000.0
WITHIN_MS: Final = 20.0

STEADY: Final = """
[playback]
prebuffer_ms = 80
latency_ms = 100
[capture]
latency_ms = 100
[faults]
{end}_ppm = {ppm}
"""
"""What another process does to this machine's cores is not what is tested."""


class Held(NamedTuple):
    """What a run with two clocks came to."""

    status: dict[str, Any]
    latency_ms: list[float]
    """The median of each second, from the sixth on: by then the devices' dates are steady."""
    roughness: float
    """Of a tone on its way through, away from its ends."""


def start(runs: Runs, name: str, end: str, ppm: float, source: str, target: str) -> Run:
    """Start a run whose `end`, input or output, is a stand-in that is off by `ppm`."""
    config = runs.folder / f"{name}.toml"
    config.write_text(STEADY.format(end=end, ppm=ppm))
    return runs.up("--engine", "echo", "--config", str(config), "--input", source, "--output", target, name=name)


def watch(name: str, seconds: float) -> list[float]:
    """The latency of a run that is up, as the median of each second."""
    found: list[float] = []
    until = time.monotonic() + seconds
    with Client(name).events("timing.playback", timeout_s=10.0) as events:
        for event in events:
            if isinstance(event, TimingRecord) and event.mic_to_speaker_ms is not None:
                found.append(event.mic_to_speaker_ms)
            if time.monotonic() > until:
                break
    return [float(np.median(found[at : at + 12])) for at in range(60, len(found) - 12, 12)]


def tone_in(path: Path) -> Samples:
    """What is sounding in a recording, without its first second and its last."""
    samples: Samples = soundfile.read(path, dtype="float32")[0]
    sounding = np.flatnonzero(np.abs(samples) > 0.1)
    return samples[sounding[0] + SAMPLE_RATE : sounding[-1] - SAMPLE_RATE]


def hold(server: SoundServer, seconds: float, ppm: float) -> dict[str, Held]:
    """Two runs at once: a skewed tone to the speaker, and the microphone to a skewed file."""
    with with_sound(server) as runs, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("PIPELINE_RUNTIME_DIR", runs.environment["PIPELINE_RUNTIME_DIR"])
        spoken, answer = runs.folder / "spoken.wav", runs.folder / "answer.wav"
        moments = np.arange(round((seconds + 5) * SAMPLE_RATE)) / SAMPLE_RATE
        tone = write_wav(runs.folder / "tone.wav", (0.25 * np.sin(2 * np.pi * HZ * moments)).astype(np.float32))
        with (
            start(runs, "out", "input", ppm, f"tone:{HZ}", f"device:{SPEAKER}") as out,
            start(runs, "in", "output", ppm, f"device:{MICROPHONE}", f"file:{answer}") as into,
        ):
            out.running()
            into.running()
            server.feed(tone)
            with server.record(spoken):
                latencies = list(pool.map(lambda name: watch(name, seconds), ("out", "in")))
            states = [out.status(), into.status()]
            assert out.interrupt() == 0, out.err
            assert into.interrupt() == 0, into.err
        rough = [roughness(tone_in(path)) for path in (spoken, answer)]
        return {"out": Held(states[0], latencies[0], rough[0]), "in": Held(states[1], latencies[1], rough[1])}


def test_neither_a_fast_nor_a_slow_microphone_is_heard(sound_server: SoundServer) -> None:
    for name, held in hold(sound_server, SECONDS, PPM).items():
        sign = 1 if name == "out" else -1
        assert held.status["drift_ppm"] == pytest.approx(sign * PPM, rel=0.3), name
        assert held.status["accounting"]["gaps"] <= 2, name  # a busy machine has had one; docs/drift.md
        assert held.status["accounting"]["skipped"] == 0, name
        assert held.status["xruns"] == {"capture": 0, "playback": 0}, name
        assert_balanced(held.status["accounting"])
        assert max(np.abs(np.array(held.latency_ms) - held.latency_ms[0])) < WITHIN_MS, name
        assert held.roughness < CLICK, name


def main() -> None:
    """Print what the two runs came to."""
    seconds, ppm = (*(float(argument) for argument in sys.argv[1:]), *(SECONDS, PPM)[len(sys.argv) - 1 :])
    with SoundServer() as server:
        for name, (status, latency_ms, rough) in hold(server, seconds, ppm).items():
            print(
                f"{name:>3}: drift {status['drift_ppm']:+.1f} ppm, latency {latency_ms[0]:.1f} ms at first,"
                f" {min(latency_ms):.1f} to {max(latency_ms):.1f}, {latency_ms[-1]:.1f} at last;"
                f" gaps {status['accounting']['gaps']}, xruns {status['xruns']},"
                f" {'clicks' if rough > CLICK else 'no click'} ({20 * np.log10(rough):.0f} dB)"
            )


if __name__ == "__main__":
    main()
