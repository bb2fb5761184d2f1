"""`pipeline run`: from file to file through the same stages, as fast as it goes. Nothing is asserted of how fast."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from pipeline.messages import Accounting
from pipeline.topology import FRAME, FRAME_MS, SAMPLE_RATE
from tests.runs import Run, Runs, assert_balanced, noise, read_wav, wait_for, write_wav

SPEECH = Path(__file__).parents[2] / "pipeline" / "assets" / "speech.flac"
SPEECH_S = 2
LONG_S = 3_600
"""Longer than the run that is disturbed in its middle is left alone."""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour, each of its frames another level: a few hundred kilobytes."""
    path = tmp_path_factory.mktemp("long") / "long.flac"
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        levels = np.arange(LONG_S * SAMPLE_RATE // FRAME, dtype=np.int16) % 30_000
        for part in np.array_split(levels, 60):
            file.write(np.repeat(part, FRAME))
    return path


def whole(samples: int) -> int:
    """So many samples in whole frames."""
    return -(-samples // FRAME) * FRAME


def result(runs: Runs, *arguments: str) -> dict[str, Any]:
    """What `pipeline run --json ARGUMENTS` prints, which must be a clean run's."""
    done = runs.call("run", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    assert runs.leftovers() == []
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["complete"]
    assert_balanced(found["accounting"])
    return found


def assert_nothing_lost(counts: dict[str, int], samples: int) -> None:
    names = ("captured", "stepped", "generated", "played", "sent")
    assert {name: counts[name] for name in names} == dict.fromkeys(names, samples)
    assert {name for name in Accounting.__struct_fields__ if counts[name]} == set(names)


def test_echo_gives_back_every_sample_at_its_place(runs: Runs) -> None:
    fed = noise(20.01)  # more than a ring holds, and not a whole number of frames
    target = runs.folder / "out.wav"
    found = result(runs, str(write_wav(runs.folder / "in.wav", fed)), str(target), "--engine", "echo")
    out = read_wav(target)
    assert len(out) == whole(len(fed))
    np.testing.assert_array_equal(out[: len(fed)], fed)
    assert not out[len(fed) :].any()
    assert_nothing_lost(found["accounting"], len(out))
    assert found["audio_s"] == len(out) / SAMPLE_RATE
    assert found["words"] == []


@pytest.mark.parametrize("samples", [1, FRAME - 1, FRAME, FRAME + 1])
def test_the_answer_to_a_very_short_file_is_as_long(runs: Runs, samples: int) -> None:
    source, target = write_wav(runs.folder / "in.wav", noise(1)[:samples]), runs.folder / "out.wav"
    found = result(runs, str(source), str(target), "--engine", "echo")
    assert_nothing_lost(found["accounting"], whole(samples))
    assert len(read_wav(target)) == whole(samples)


def test_other_rates_channels_and_formats(runs: Runs) -> None:
    source, target = runs.folder / "in.flac", runs.folder / "out.flac"
    soundfile.write(source, np.stack([noise(2.0)[:44_100]] * 2, axis=1), 44_100)
    found = result(runs, str(source), str(target), "--engine", "echo")
    assert_nothing_lost(found["accounting"], whole(SAMPLE_RATE))
    assert soundfile.info(target).samplerate == SAMPLE_RATE
    assert len(read_wav(target)) == whole(SAMPLE_RATE)


def test_a_backlog_of_one_frame_is_kept_too(runs: Runs) -> None:
    """The least that a run may be told: one frame at a time goes through."""
    config = runs.config("[inference]\nbacklog_target = 1\nbacklog_limit = 1\n")
    source = write_wav(runs.folder / "in.wav", noise(3.0))
    found = result(runs, str(source), str(runs.folder / "out.wav"), "--engine", "echo", "--config", str(config))
    assert_nothing_lost(found["accounting"], whole(3 * SAMPLE_RATE))


def test_what_is_printed(runs: Runs) -> None:
    source, target = write_wav(runs.folder / "in.wav", noise(1.0)), runs.folder / "out.wav"
    done = runs.call("run", str(source), str(target), "--engine", "echo")
    assert done.returncode == 0
    assert done.stdout == ""
    accounting, speed = done.stderr.splitlines()
    assert accounting.startswith("captured 24960 = stepped 24960 + dropped 0 + waiting 0; generated 24960 = ")
    assert re.fullmatch(r"1\.04 s of audio in \d+\.\d\d s: \d+\.\d times real time", speed)


@pytest.mark.parametrize("quality", ["q4", "bf16"])
def test_the_same_seed_gives_the_same_answer_and_another_one_another(runs: Runs, quality: str) -> None:
    model = runs.folder / "model"
    made = runs.call("models", "synth", str(model), "--quality", quality, "--size", "tiny")
    assert made.returncode == 0, made.stderr
    source = write_wav(runs.folder / "in.wav", read_wav(SPEECH)[: SPEECH_S * SAMPLE_RATE])
    options = (str(source), "--model", str(model), "--quality", quality)

    def answer(name: str, *more: str) -> tuple[bytes, str, str]:
        target = runs.folder / f"{name}.wav"
        done = runs.call("run", *options[:1], str(target), *options[1:], *more)
        assert done.returncode == 0, done.stderr
        return target.read_bytes(), done.stdout, done.stderr

    first, words, printed = answer("first")
    again, nothing, _ = answer("again", "--seed", "0", "--transcript", str(runs.folder / "words.txt"))
    other, other_words, _ = answer("other", "--seed", "1")
    assert first == again
    assert (runs.folder / "words.txt").read_text() == words
    assert nothing == ""
    assert first != other
    assert words != other_words
    samples = whole(SPEECH_S * SAMPLE_RATE)
    assert len(read_wav(runs.folder / "first.wav")) == samples
    assert f"captured {samples} = stepped {samples} + dropped 0 + waiting 0; " in printed
    assert f"generated {samples} = played {samples} + skipped 0 + waiting 0; " in printed
    assert f"sent {samples} = played {samples} + concealed 0\n" in printed
    lines = [re.fullmatch(r"(\d+\.\d\d)  (\S+)", line) for line in words.splitlines()]
    assert len(lines) > 3
    times = [float(line[1]) for line in lines if line is not None]
    assert len(times) == len(lines)
    assert times == sorted(times)
    assert times[-1] < samples / SAMPLE_RATE
    for time in times:
        assert round(time * 1_000) % FRAME_MS == 0


# Ends that are not the file's


def in_the_middle(run: Run) -> dict[str, int]:
    """Wait until some of the answer is written; returns the stages' process ids."""
    status = run.running()
    wait_for(lambda: run.status()["accounting"]["played"], "the first of the answer")
    return {name: stage["pid"] for name, stage in status["stages"].items()}


def assert_failed(runs: Runs, run: Run, line: str) -> None:
    assert run.wait() == 1
    assert run.out == ""
    (said,) = run.err.splitlines()
    assert re.fullmatch(line, said), said
    left = [path for path in runs.leftovers() if not path.endswith(".log")]
    assert left in ([], ["default", "default/lock"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_there_is_when_it_is_interrupted_is_the_first_of_the_answer(
    runs: Runs, long_file: Path, number: signal.Signals
) -> None:
    target = runs.folder / "out.wav"
    with runs.offline(str(long_file), str(target), "--engine", "echo") as run:
        in_the_middle(run)
        run.process.send_signal(number)
        holds = r"holds only the first \d+\.\d\d s of the answer"
        assert_failed(runs, run, rf"pipeline: ended before all of the input was answered; \S+out\.wav {holds}")
    assert runs.leftovers() == []
    out = read_wav(target)
    assert len(out) % FRAME == 0
    assert f"first {len(out) / SAMPLE_RATE:.2f} s" in run.err
    np.testing.assert_array_equal(out, soundfile.read(long_file, len(out), dtype="float32")[0])


@pytest.mark.parametrize("stage", ["capture", "inference", "playback"])
def test_a_stage_that_dies_ends_the_run_with_an_error(runs: Runs, long_file: Path, stage: str) -> None:
    """It is not started again: what it had in its hands is lost, and an answer with a hole is none."""
    target = runs.folder / "out.wav"
    with runs.offline(str(long_file), str(target), "--engine", "echo") as run:
        os.kill(in_the_middle(run)[stage], signal.SIGKILL)
        holds = "is not whole" if stage == "playback" else r"holds only the first \d+\.\d\d s of the answer"
        assert_failed(runs, run, rf"pipeline: {stage} was ended by SIGKILL; \S+out\.wav {holds}")
    if stage != "playback":
        out = read_wav(target)
        np.testing.assert_array_equal(out, soundfile.read(long_file, len(out), dtype="float32")[0])


def test_who_is_slow_holds_the_others_back(runs: Runs) -> None:
    """The file that is read is five times what a ring holds, and playback stands still until nothing moves."""
    fed = noise(60.0)
    source, target = write_wav(runs.folder / "in.wav", fed), runs.folder / "out.wav"
    with runs.offline(str(source), str(target), "--engine", "echo") as run:
        wait_for(target.exists, "playback to start")
        (playback,) = [
            child for child in psutil.Process(run.process.pid).children() if "procs.playback" in child.cmdline()
        ]
        playback.suspend()
        try:
            standing: list[int] = []

            def stands() -> bool:
                counts = run.status()["accounting"]
                standing.append(counts["captured"])
                return len(standing) > 1 and standing[-1] == standing[-2]

            wait_for(stands, "everything to wait for playback")
        finally:
            playback.resume()
        assert run.wait() == 0, run.err
        assert standing[-1] < len(fed)
    np.testing.assert_array_equal(read_wav(target), fed)


# What a user may get wrong


def refusal(runs: Runs, *arguments: str) -> str:
    """The one line with which `pipeline run ARGUMENTS` refuses."""
    done = runs.call("run", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert runs.leftovers() in ([], ["default"])
    return line.removeprefix("pipeline: ")


def test_inputs_that_are_none(runs: Runs) -> None:
    text = runs.folder / "text.wav"
    text.write_text("It was the best of times.\n")
    empty = write_wav(runs.folder / "empty.wav", np.zeros(0, np.float32))
    kept = write_wav(runs.folder / "kept.wav", noise(0.5))
    before = kept.read_bytes()
    words = runs.folder / "words.txt"
    words.write_text("of an earlier run")
    to = (str(kept), "--engine", "echo", "--transcript", str(words))
    assert refusal(runs, "nowhere.wav", *to) == "capture: input file:nowhere.wav: no such file"
    assert refusal(runs, str(text), *to).startswith(f"capture: input file:{text}: not a sound file: ")
    assert refusal(runs, str(empty), *to) == f"capture: input file:{empty}: holds 0 samples; expected at least 1"
    assert refusal(runs, str(runs.folder), *to).startswith(f"capture: input file:{runs.folder}: not a sound file")
    # What an earlier run made survives one that cannot begin.
    assert kept.read_bytes() == before
    assert words.read_text() == "of an earlier run"


def test_outputs_that_are_none(runs: Runs) -> None:
    source = str(write_wav(runs.folder / "in.wav", noise(0.5)))
    echo = ("--engine", "echo")
    assert refusal(runs, source, "/nowhere/out.wav", *echo).startswith("playback: output file:/nowhere/out.wav: cannot")
    assert "unknown kind of sound file '.xyz'" in refusal(runs, source, "out.xyz", *echo)
    assert refusal(runs, source, source, *echo).endswith("expected another file than the input")
    assert refusal(runs, source, "in.wav", *echo).endswith("expected another file than the input")
    (runs.folder / "link.wav").hardlink_to(source)
    assert refusal(runs, source, "link.wav", *echo).endswith("expected another file than the input")
    for words in (source, "link.wav", "out.wav"):
        line = refusal(runs, source, "out.wav", *echo, "--transcript", words)
        assert line == f"transcript {words}: expected another file than IN and OUT"
    line = refusal(runs, source, "out.wav", *echo, "--transcript", "/nowhere/words.txt")
    assert line.startswith("transcript /nowhere/words.txt: cannot be written: ")
    assert not (runs.folder / "out.wav").exists()


def test_arguments_that_are_none(runs: Runs) -> None:
    assert refusal(runs, "in.wav").startswith("Missing argument 'OUT'")
    assert "'many' is not a valid integer" in refusal(runs, "in.wav", "out.wav", "--seed", "many")
    assert "nowhere" in refusal(runs, "in.wav", "out.wav", "--model", "nowhere")


def test_an_output_that_is_there_is_overwritten(runs: Runs) -> None:
    source = write_wav(runs.folder / "in.wav", noise(0.5))
    target = write_wav(runs.folder / "out.wav", noise(5.0, seed=2))
    result(runs, str(source), str(target), "--engine", "echo")
    assert len(read_wav(target)) == whole(SAMPLE_RATE // 2)
