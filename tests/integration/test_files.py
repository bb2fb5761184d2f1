"""Whole runs from file to file: no sound card and no network model is needed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline import checkpoints
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.runs import Runs, assert_balanced, noise, passage, read_wav, write_wav

STEADY = "[playback]\nprebuffer_ms = 80\n"
"""A whole frame of prebuffer: what another process does to this machine's cores is not what is tested."""


def accounting(printed: str) -> dict[str, int]:
    """The accounting line that a run ends with."""
    line = printed.strip().splitlines()[-1]
    found = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", line)}
    waiting = [int(value) for value in re.findall(r"waiting (\d+)", line)]
    return found | {"waiting_in": waiting[0], "waiting_out": waiting[1]}


def echo(runs: Runs, source: Path, target: Path, *options: str) -> dict[str, int]:
    """An echo run from file to file; returns its accounting."""
    config = runs.config(STEADY)
    with runs.up(
        "--engine", "echo", "--config", str(config), "--input", f"file:{source}", "--output", f"file:{target}", *options
    ) as run:
        assert run.wait() == 0, run.err
        counts = accounting(run.out)
    assert_balanced(counts)
    assert runs.leftovers() == []
    return counts


def test_echo_gives_back_every_sample_after_a_constant_delay(runs: Runs) -> None:
    fed = noise(6.01)  # not a whole number of frames, nor of blocks
    counts = echo(runs, write_wav(runs.folder / "in.wav", fed), runs.folder / "out.wav")
    out = read_wav(runs.folder / "out.wav")
    found = passage(fed, out)
    assert found.exact
    assert not out[: found.delay].any()
    frames = -(-len(fed) // FRAME)
    assert counts["captured"] == counts["stepped"] == counts["played"] == frames * FRAME
    assert counts["sent"] == len(out)
    assert counts["dropped"] == counts["skipped"] == counts["waiting_in"] == counts["waiting_out"] == 0


@pytest.mark.parametrize(("rate", "kind"), [(48_000, "wav"), (44_100, "flac"), (16_000, "ogg")])
def test_other_rates_and_formats_are_resampled_at_the_edge(runs: Runs, rate: int, kind: str) -> None:
    seconds, hz = 2.0, 440.0
    tone = 0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    source = runs.folder / f"in.{kind}"
    soundfile.write(source, np.stack((tone, tone), axis=1), rate)  # stereo is mixed to mono
    counts = echo(runs, source, runs.folder / "out.flac")
    assert abs(counts["captured"] - seconds * SAMPLE_RATE) < FRAME
    out = read_wav(runs.folder / "out.flac")
    middle = out[len(out) // 2 - SAMPLE_RATE // 2 :][:SAMPLE_RATE]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(int(spectrum.argmax()) - hz) <= 1
    assert 0.35 < np.abs(middle).max() < 0.45


def test_what_is_not_fit_for_the_codec_is_cleaned_and_counted(runs: Runs) -> None:
    fed = noise(1.0)
    fed[[1_000, 5_000, 9_000]] = np.nan, np.inf, 1e30
    echo(runs, write_wav(runs.folder / "in.wav", fed), runs.folder / "out.wav")
    out = read_wav(runs.folder / "out.wav")
    expected = fed.copy()
    expected[[1_000, 5_000, 9_000]] = 0, 1, 1
    assert passage(expected, out).exact


def test_seconds_end_a_run_that_would_go_on(runs: Runs) -> None:
    config = runs.config(STEADY)
    with runs.up(
        "--engine", "echo", "--config", str(config), "--input", "tone:440", "--output", "null", "--seconds", "1"
    ) as run:
        assert run.wait() == 0, run.err
        counts = accounting(run.out)
    assert_balanced(counts)
    assert abs(counts["captured"] - SAMPLE_RATE) < 5 * FRAME
    assert counts["played"] == counts["captured"]


@pytest.mark.parametrize("quality", list(checkpoints.QUALITIES))
def test_moshi_answers_every_frame(runs: Runs, quality: str) -> None:
    model = runs.folder / "model"
    made = runs.call("models", "synth", str(model), "--quality", quality, "--size", "tiny")
    assert made.returncode == 0, made.stderr
    speech = Path(__file__).parents[2] / "pipeline" / "assets" / "speech.flac"
    source = write_wav(runs.folder / "in.wav", read_wav(speech)[: 4 * SAMPLE_RATE])
    limits = runs.config("[inference]\nbacklog_limit = 100\n[playback]\nqueue_frames = 100\n")
    target = runs.folder / "out.wav"
    with runs.up(
        "--model", str(model), "--quality", quality, "--config", str(limits),
        "--input", f"file:{source}", "--output", f"file:{target}",
    ) as run:  # fmt: skip
        assert run.wait() == 0, run.err
        counts = accounting(run.out)
        transcript = run.out.split("\n")[0]
    assert_balanced(counts)
    assert counts["captured"] == counts["stepped"] == counts["generated"] == 4 * SAMPLE_RATE
    # What a late frame delayed the others by is taken back: on a busy machine some samples are skipped for that.
    assert counts["dropped"] == counts["waiting_in"] == counts["waiting_out"] == 0
    assert counts["skipped"] < counts["concealed"]
    assert len(transcript.split()) > 3
    out = read_wav(target)
    assert np.isfinite(out).all()
    assert np.abs(out).max() > 1e-4  # noise, but not silence


def test_status_while_running_holds_what_monitors_rely_on(runs: Runs) -> None:
    with runs.up("--engine", "echo", "--input", "silence", "--output", "null", name="watched") as run:
        run.running()
        while run.status()["timing"]["mic_to_speaker_ms"]["frames"] < 3:
            pass
        status = run.status()
        head = {"schema": 1, "name": "watched", "state": "running", "engine": "echo"}
        assert head.items() <= status.items()
        assert {"uptime_s", "stages", "accounting", "timing", "xruns"} <= set(status)
        assert status["drift_ppm"] is None  # too early to be measured
        for stage in status["stages"].values():
            assert stage["state"] == "running"
            assert stage["restarts"] == 0
            assert stage["memory_mb"] > 1
        assert status["timing"]["inference"]["budget_ms"] == 80.0
        assert_balanced(status["accounting"])
        shown = runs.call("status", "--name", "watched")
        assert "watched: running, engine echo" in shown.stdout
        assert run.interrupt() == 0
    assert json.loads(json.dumps(status)) == status
