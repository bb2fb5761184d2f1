"""The programs in examples/, each against a real run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.messages import dbfs
from pipeline.topology import SAMPLE_RATE
from tests.runs import TIMEOUT_S, Run, Runs, noise, wait_for, write_wav

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES_MAX = 45


def example(runs: Runs, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        cwd=runs.folder,
        env=runs.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def played(run: Run) -> None:
    """Wait until there is something to hear."""
    run.running()
    wait_for(lambda: run.status()["accounting"]["played"] > 0, "something to be played")


def test_they_are_short() -> None:
    programs = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(programs) == {"level_meter.py", "live_transcript.py", "save_stereo.py"}
    assert max(programs.values()) <= LINES_MAX


@pytest.mark.parametrize("program", ["level_meter.py", "save_stereo.py"])
def test_without_a_run_they_say_so(runs: Runs, program: str) -> None:
    done = example(runs, program, *(["both.wav"] if program == "save_stereo.py" else []))
    assert done.returncode == 1
    assert done.stderr == "no run is up under 'default': start one with `pipeline up`\n"
    assert not (runs.folder / "both.wav").exists()


def test_the_meter_shows_the_level_of_both_sides(runs: Runs) -> None:
    with runs.up("--engine", "echo", "--input", "tone:440", "--output", "null", name="m") as run:
        played(run)
        done = example(runs, "level_meter.py", "--name", "m", "--seconds", "1")
        assert run.interrupt() == 0, run.err
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    levels = [[float(level) for level in re.findall(r"(-?[\d.]+) dBFS", line)] for line in lines]
    tone = dbfs(0.25 / 2**0.5)
    assert [microphone for microphone, _ in levels] == pytest.approx([tone] * 10, abs=0.2)
    assert np.median([speaker for _, speaker in levels]) == pytest.approx(tone, abs=0.2)
    assert "#" in lines[0]


def test_both_sides_are_saved(runs: Runs) -> None:
    fed = noise(30.0)
    source = write_wav(runs.folder / "in.wav", fed)
    with runs.up("--engine", "echo", "--input", f"file:{source}", "--output", "null", name="s") as run:
        played(run)
        done = example(runs, "save_stereo.py", "--name", "s", "--seconds", "1.5", "both.wav")
        assert run.interrupt() == 0, run.err
    assert done.returncode == 0, done.stderr
    rows = soundfile.read(runs.folder / "both.wav", dtype="float32")[0]
    assert rows.shape == (1.5 * SAMPLE_RATE, 2)
    at = int(np.flatnonzero(fed == rows[0, 0])[0])
    np.testing.assert_array_equal(rows[:, 0], fed[at : at + len(rows)])
    assert np.isin(rows[-SAMPLE_RATE // 10 :, 1], fed).mean() > 0.5


def test_the_transcript_comes_as_it_is_said(runs: Runs) -> None:
    model = runs.folder / "model"
    made = runs.call("models", "synth", str(model), "--quality", "q4")
    assert made.returncode == 0, made.stderr
    with runs.up("--model", str(model), "--input", "silence", "--output", "null", name="w") as run:
        out = runs.folder / "words.txt"
        with out.open("w") as file:
            program = subprocess.Popen(
                [sys.executable, str(EXAMPLES / "live_transcript.py"), "--name", "w"],
                env=runs.environment,
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
            )
        try:
            run.running()
            wait_for(lambda: len(out.read_text()) > 20, "words")
        finally:
            program.send_signal(2)
            errors = program.communicate(timeout=TIMEOUT_S)[1]
        assert (program.returncode, errors) == (0, "")
        assert run.interrupt() == 0, run.err
    assert out.read_text()[:20] in run.out
