"""Whole runs through real PortAudio, on the virtual microphone and speaker."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from pipeline.topology import FRAME_MS, SAMPLE_RATE
from tests.runs import Run, Runs, Samples, assert_balanced, noise, passage, wait_for, with_sound, write_wav
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer, delay_samples

STEADY = "[playback]\nprebuffer_ms = 80\nlatency_ms = 100\n[capture]\nlatency_ms = 100\n"
"""What another process does to this machine's cores is not what is tested."""

SETTLE_S = 2.0
AGREEMENT_MS = 5.0


def echo(runs: Runs, source: str, target: str) -> Run:
    config = runs.config(STEADY)
    return runs.up("--engine", "echo", "--config", str(config), "--input", source, "--output", target)


def spoken(server: SoundServer, runs: Runs, run: Run, seconds: float) -> tuple[Path, Samples, dict[str, Any]]:
    """Feed noise to a run's microphone; returns the recording of both sides, the noise, and the status after it."""
    fed = noise(seconds)
    both = runs.folder / "both.wav"
    run.running()
    time.sleep(SETTLE_S)
    with server.record_both(both):
        server.feed(write_wav(runs.folder / "fed.wav", fed)).wait()
        time.sleep(0.5)
    return both, fed, run.status()


def test_every_sample_comes_back_and_the_latency_is_the_one_that_status_tells(sound_cable: SoundServer) -> None:
    with with_sound(sound_cable) as runs, echo(runs, f"device:{MICROPHONE}", f"device:{SPEAKER}") as run:
        before = run.running()
        both, fed, status = spoken(sound_cable, runs, run, 6.0)
        assert run.interrupt() == 0, run.err
        left, right = np.ascontiguousarray(soundfile.read(both, dtype="float32")[0].T)
        assert passage(fed, left).exact
        assert passage(fed, right).exact
        assert status["xruns"] == before["xruns"] == {"capture": 0, "playback": 0}
        assert_balanced(status["accounting"])
        true_ms = delay_samples(left, right) * 1_000 / SAMPLE_RATE
        told_ms = status["timing"]["mic_to_speaker_ms"]["p50_ms"]
        assert abs(told_ms - true_ms) < AGREEMENT_MS
        assert told_ms > FRAME_MS


def test_devices_by_index_and_by_default(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs:
        listed = json.loads(runs.call("devices", "--json").stdout)["devices"]
        index = {device["name"]: device["index"] for device in listed}
        assert {MICROPHONE, SPEAKER} <= set(index)
        table = runs.call("devices").stdout
        assert MICROPHONE in table
        with echo(runs, f"device:{index[MICROPHONE]}", f"device:{index[SPEAKER]}") as run:
            stages = run.running()["stages"]
            assert stages["capture"]["detail"].startswith(MICROPHONE)
            assert stages["playback"]["detail"].startswith(SPEAKER)
            assert run.interrupt() == 0, run.err
        with echo(runs, "device", "device") as run:
            run.running()
            wait_for(lambda: run.status()["accounting"]["played"] > SAMPLE_RATE, "sound through the default devices")
            assert run.interrupt() == 0, run.err


def test_an_unknown_device_is_refused_with_the_names_of_those_that_are_there(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs:
        refused = runs.call("up", "--engine", "echo", "--input", "device:loudspeaker", "--output", "null")
        assert refused.returncode == 2
        line = f"pipeline: capture: input device:loudspeaker: not found; input devices here: .*'{MICROPHONE}'"
        assert len(refused.stderr.splitlines()) == 1
        assert re.match(line, refused.stderr)


def test_devices_that_cannot_do_24_khz_run_at_their_own_rate(sound_cable: SoundServer) -> None:
    """Both are opened at 44.1 kHz, where neither a frame nor a block is a whole number of samples at 24 kHz."""
    with with_sound(sound_cable) as runs:
        tone = 0.4 * np.sin(2 * np.pi * 500 * np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE)
        source = write_wav(runs.folder / "tone.wav", tone.astype(np.float32))
        both = runs.folder / "both.wav"
        program = [sys.executable, "-m", "tests.own_rate", "44100"]
        with subprocess.Popen(
            program, env=os.environ | runs.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as loop:
            assert loop.stdout is not None
            assert loop.stdout.readline() == "running\n"
            with sound_cable.record_both(both):
                sound_cable.feed(source).wait()
                time.sleep(0.5)
            told, _ = loop.communicate("\n", timeout=20)
            assert loop.returncode == 0
        left, right = np.ascontiguousarray(soundfile.read(both, dtype="float32")[0].T)
        middle = right[len(right) // 2 - SAMPLE_RATE // 2 :][:SAMPLE_RATE]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(SAMPLE_RATE)))
        assert abs(int(spectrum.argmax()) - 500) <= 1
        step = np.abs(np.diff(middle)).max()
        assert step < 1.2 * 0.4 * 2 * np.pi * 500 / SAMPLE_RATE  # no click: no step larger than the tone's own
        # At the tone's end, as what was told is of the last second: a device's hiccup before it may have moved both.
        ends = [int(np.flatnonzero(np.abs(side) > 0.1)[-1]) for side in (left, right)]
        true_ms = (ends[1] - ends[0]) * 1_000 / SAMPLE_RATE
        assert abs(float(told) - true_ms) < AGREEMENT_MS
