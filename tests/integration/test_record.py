"""`record`: both sides of a real run in a file, in time, and the words beside it."""

import os
import signal
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import pytest
import soundfile

from pipeline.topology import RECORDER, SAMPLE_RATE
from tests.runs import Run, Runs, Samples, assert_balanced, children, noise, wait_for, write_wav

STEADY = "[playback]\nprebuffer_ms = 80\n"
"""A whole frame of prebuffer: what another process does to this machine's cores is not what is tested."""

FED_S = 60.0


@pytest.fixture
def echoing(runs: Runs) -> tuple[Runs, tuple[str, ...]]:
    """How a run begins that gives back noise, every sample of which is another."""
    source = write_wav(runs.folder / "in.wav", noise(FED_S))
    config = runs.config(STEADY)
    return runs, ("--engine", "echo", "--config", str(config), "--input", f"file:{source}", "--output", "null")


def record(runs: Runs, *values: str) -> str:
    """Send `record`, which must be carried out."""
    done = runs.call("send", "record", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recorders(run: Run) -> list[psutil.Process]:
    found = []
    for process in children(run.process):
        try:
            found += [process] if RECORDER.module in process.cmdline() else []
        except psutil.NoSuchProcess:
            continue
    return found


def read(path: Path) -> tuple[Samples, Samples]:
    """Left and right."""
    rows, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == SAMPLE_RATE
    return rows[:, 0], rows[:, 1]


ENDLESS_S: Final = 1e6


def wait_for_seconds(path: Path, seconds: float) -> None:
    """Until the file says that it is so long. A FLAC that does not say yet is taken by libsndfile for endless."""
    wait_for(
        lambda: path.exists() and path.stat().st_size > 100 and seconds <= soundfile.info(path).duration < ENDLESS_S,
        f"{seconds:g} s of {path.name}",
    )


def delay(left: Samples, right: Samples) -> int:
    """Samples by which the right side follows the left, where they are most alike."""
    size = 2 * len(left)
    alike = np.fft.irfft(np.fft.rfft(right, size) * np.conj(np.fft.rfft(left, size)), size)
    return int(alike[:SAMPLE_RATE].argmax())


def test_both_sides_are_recorded_as_they_were_and_in_time(echoing: tuple[Runs, tuple[str, ...]]) -> None:
    runs, arguments = echoing
    path = runs.folder / "both.wav"
    with runs.up(*arguments) as run:
        run.running()
        wait_for(lambda: run.status()["accounting"]["played"] > 0, "something to be played")
        record(runs, "on=true", "path=both.wav")  # looked up where the run was started
        assert run.status()["recording"] == str(path)
        wait_for_seconds(path, 4.0)
        status = run.status()
        refused = runs.call("send", "record", "on=true", "path=second.wav")
        assert refused.returncode == 2
        assert f"{path} is being recorded" in refused.stderr
        assert not (runs.folder / "second.wav").exists()
        before_end = runs.call("send", "record", "on=false")
        assert before_end.returncode == 0, before_end.stderr
        size = path.stat().st_size
        left, right = read(path)  # it is closed when the command is answered
        wait_for(lambda: not recorders(run), "the recorder's end")
        after = wait_for(lambda: (now := run.status())["recording"] is None and now, "the end of it")
        assert path.stat().st_size == size
        # Again, to another file.
        record(runs, "on=true", "path=again.flac")
        wait_for_seconds(runs.folder / "again.flac", 1.0)
        assert run.interrupt() == 0, run.err
    assert len(read(runs.folder / "again.flac")[0]) >= SAMPLE_RATE  # the run's end is the recording's
    assert runs.leftovers() == []
    # Left is what was fed, without a gap. Right is the same later, by what `status` tells.
    fed = noise(FED_S)
    at = int(np.flatnonzero(fed == left[0])[0])
    np.testing.assert_array_equal(left, fed[at : at + len(left)])
    later = delay(left, right)
    assert later / SAMPLE_RATE * 1_000 == pytest.approx(status["timing"]["mic_to_speaker_ms"]["p50_ms"], abs=1)
    if not after["accounting"]["gaps"]:
        np.testing.assert_array_equal(right[later:], left[: len(right) - later])
    # Nobody felt it.
    assert_balanced(after["accounting"])
    assert after["accounting"]["dropped"] == 0
    assert (runs.folder / "both.txt").read_text() == ""


def test_what_will_not_do_is_refused_and_the_run_goes_on(echoing: tuple[Runs, tuple[str, ...]]) -> None:
    runs, arguments = echoing
    (runs.folder / "there.wav").write_text("mine")
    with runs.up(*arguments) as run:
        run.running()
        for path, why in (
            ("there.wav", "exists already"),
            ("both.xyz", "unknown kind of sound file '.xyz'; expected one of aiff"),
            ("nowhere/both.wav", "cannot be written: No such file or directory"),
        ):
            refused = runs.call("send", "record", "on=true", f"path={path}")
            assert refused.returncode == 2
            assert why in refused.stderr
            assert "Traceback" not in refused.stderr
        assert run.status()["recording"] is None
        wait_for(lambda: not recorders(run), "no recorder to be left")
        assert run.interrupt() == 0, run.err
    assert (runs.folder / "there.wav").read_text() == "mine"
    assert not (runs.folder / "there.txt").exists()


def test_a_recorder_that_is_killed_leaves_its_file_and_the_run(echoing: tuple[Runs, tuple[str, ...]]) -> None:
    runs, arguments = echoing
    path = runs.folder / "both.wav"
    with runs.up(*arguments) as run:
        run.running()
        record(runs, "on=true", f"path={path}")
        wait_for_seconds(path, 1.0)
        os.kill(recorders(run)[0].pid, signal.SIGKILL)
        status = wait_for(lambda: (now := run.status())["recording"] is None and now, "it to be noticed")
        assert {stage["state"] for stage in status["stages"].values()} == {"running"}
        assert {stage["restarts"] for stage in status["stages"].values()} == {0}
        record(runs, "on=true", f"path={runs.folder / 'next.wav'}")
        assert run.interrupt() in (0, 1)
    left, _ = read(path)
    assert len(left) >= SAMPLE_RATE
    fed = noise(FED_S)
    at = int(np.flatnonzero(fed == left[0])[0])
    np.testing.assert_array_equal(left, fed[at : at + len(left)])


def test_a_killed_supervisor_ends_the_recording_with_a_whole_file(echoing: tuple[Runs, tuple[str, ...]]) -> None:
    runs, arguments = echoing
    path = runs.folder / "both.flac"
    with runs.up(*arguments) as run:
        run.running()
        record(runs, "on=true", f"path={path}")
        wait_for_seconds(path, 1.0)
        recorder = recorders(run)[0]
        run.process.kill()
        run.wait()
        wait_for(lambda: not recorder.is_running(), "the recorder to leave")
        runs.call("down")
    left, right = read(path)
    assert len(left) == len(right) >= SAMPLE_RATE


def test_the_words_are_beside_it(runs: Runs) -> None:
    model = runs.folder / "model"
    made = runs.call("models", "synth", str(model), "--quality", "q4")
    assert made.returncode == 0, made.stderr
    path = runs.folder / "both.wav"
    with runs.up("--model", str(model), "--input", "tone:440", "--output", "null") as run:
        run.running()
        wait_for(lambda: run.status()["accounting"]["played"] > 0, "something to be played")
        record(runs, "on=true", f"path={path}")
        wait_for_seconds(path, 4.0)
        record(runs, "on=false")
        assert run.interrupt() == 0, run.err
    lines = [line.split("  ", 1) for line in (runs.folder / "both.txt").read_text().splitlines()]
    times = [float(time) for time, _ in lines]
    left, right = read(path)
    assert lines
    assert all(text and text == text.strip() for _, text in lines)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= len(left) / SAMPLE_RATE + 0.005  # as it is rounded
    assert left.any()
    assert right.any()
    assert " ".join(run.out.split()).find(lines[-1][1]) >= 0


def test_stages_that_are_started_again_leave_silence_and_no_shift(echoing: tuple[Runs, tuple[str, ...]]) -> None:
    runs, arguments = echoing
    path = runs.folder / "both.wav"
    with runs.up(*arguments) as run:
        run.running()
        record(runs, "on=true", f"path={path}")
        for stage in ("playback", "capture"):
            wait_for_seconds(path, soundfile.info(path).duration + 1.0 if path.stat().st_size > 100 else 1.0)
            assert runs.call("send", "restart", f"stage={stage}").returncode == 0
        wait_for_seconds(path, soundfile.info(path).duration + 2.0)
        record(runs, "on=false")
        assert run.interrupt() == 0, run.err
    left, right = read(path)
    fed = noise(FED_S)
    at = int(np.flatnonzero(fed == left[0])[0])
    away = np.flatnonzero(left == 0)
    assert SAMPLE_RATE / 10 < len(away) < SAMPLE_RATE * 10
    np.testing.assert_array_equal(left[left != 0], fed[at : at + len(left) - len(away)][: np.count_nonzero(left)])
    # In the end the right side is the left one again, as much later as the way through the run takes.
    later = delay(left[-SAMPLE_RATE:], right[-SAMPLE_RATE:])
    assert SAMPLE_RATE // 20 < later < SAMPLE_RATE // 2
