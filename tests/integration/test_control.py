"""Each verb in a real run: the reply, and what is heard and told of it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import messages
from pipeline.checkpoints import synthesize
from pipeline.control import Subscription
from pipeline.messages import CommandRecord, Event, StatusRecord, TextRecord, TimingRecord
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.runs import Run, Runs, Samples, assert_balanced, read_wav, wait_for

TO_FILE = ("--engine", "echo", "--input", "tone:1000", "--output", "file:out.wav")
TO_NOWHERE = ("--engine", "echo", "--input", "tone:1000", "--output", "null")


def send(runs: Runs, *arguments: str) -> dict[str, Any]:
    """A command's reply."""
    done = runs.call("send", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    assert reply["ok"]
    return reply


def refused(runs: Runs, *arguments: str) -> str:
    """The one line with which a command is refused."""
    done = runs.call("send", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.strip().removeprefix("pipeline: ")


def play_on(run: Run, seconds: float = 1.0) -> None:
    """Wait until so much more was sent to the speaker."""
    sent = run.status()["accounting"]["sent"]
    wait_for(lambda: run.status()["accounting"]["sent"] > sent + seconds * SAMPLE_RATE, "more sound")


@contextmanager
def listening(runs: Runs, *topics: str) -> Iterator["Heard"]:
    heard = Heard(Subscription(runs.folder / "run" / "default" / "events.ipc", topics))
    try:
        yield heard
    finally:
        heard.subscription.close()


class Heard:
    """Events as they come."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription

    def next(self, kind: type[Any], **fields: Any) -> Any:
        def look() -> Event | None:
            event = self.subscription.receive(0.1)
            if event is None:
                return None
            record = messages.decode_event(event[1])
            fits = isinstance(record, kind) and all(getattr(record, name) == value for name, value in fields.items())
            return record if fits else None

        return wait_for(look, f"{kind.__name__} {fields}")


def hertz(samples: Samples) -> float:
    """The strongest frequency."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(samples))


def test_paused_means_silence_that_is_no_gap_and_what_is_said_meanwhile_is_dropped(runs: Runs) -> None:
    with runs.up(*TO_FILE) as run:
        run.running()
        play_on(run)
        assert send(runs, "pause")["stage"] == "inference"
        before = run.status()
        assert before["paused"]
        play_on(run)
        during = run.status()
        assert during["accounting"]["generated"] - before["accounting"]["generated"] <= 2 * FRAME
        assert during["accounting"]["dropped"] - before["accounting"]["dropped"] > SAMPLE_RATE // 2
        assert during["accounting"]["gaps"] == before["accounting"]["gaps"]
        frame = send(runs, "resume")["frame"]
        with listening(runs, "timing.inference") as heard:
            assert heard.next(TimingRecord).frame >= frame
        play_on(run)
        assert not run.status()["paused"]
        assert run.interrupt() == 0
    out = read_wav(runs.folder / "out.wav")
    silent = np.flatnonzero(np.abs(out) > 0.01)
    assert np.diff(silent).max() > SAMPLE_RATE // 2


def test_the_volume(runs: Runs) -> None:
    with runs.up(*TO_FILE) as run:
        run.running()
        play_on(run)
        assert send(runs, "set", "volume=0.5")["stage"] == "playback"
        play_on(run)
        assert run.status()["settings"]["playback"]["volume"] == 0.5
        with listening(runs, "timing.playback", "timing.capture") as heard:
            assert heard.next(TimingRecord, stage="capture").level_dbfs == pytest.approx(-15.05, abs=0.1)
            assert heard.next(TimingRecord, stage="playback").peak_dbfs == pytest.approx(-18.06, abs=0.2)
        assert run.interrupt() == 0
    out = read_wav(runs.folder / "out.wav")
    assert abs(out[: SAMPLE_RATE // 2]).max() == pytest.approx(0.25, abs=0.01)
    assert abs(out[-SAMPLE_RATE // 2 : -SAMPLE_RATE // 4]).max() == pytest.approx(0.125, abs=0.01)


def test_another_input(runs: Runs) -> None:
    with runs.up(*TO_FILE) as run:
        run.running()
        play_on(run)
        assert "expected a frequency" in refused(runs, "input", "spec=tone:99999")
        assert "no such file" in refused(runs, "input", "spec=file:nowhere.wav")
        assert run.status()["stages"]["capture"]["detail"] == "tone 1000 Hz"
        assert send(runs, "input", "spec=tone:3000")["stage"] == "capture"
        assert run.status()["stages"]["capture"]["detail"] == "tone 3000 Hz"
        play_on(run)
        # A stage that is killed comes back with it.
        os.kill(run.status()["stages"]["capture"]["pid"], signal.SIGKILL)
        wait_for(lambda: run.status()["stages"]["capture"]["restarts"] == 1, "the restart")
        wait_for(lambda: run.status()["stages"]["capture"]["state"] == "running", "capture to be back")
        assert run.status()["stages"]["capture"]["detail"] == "tone 3000 Hz"
        play_on(run)
        assert_balanced(run.status()["accounting"])
        run.interrupt()
    out = read_wav(runs.folder / "out.wav")
    assert hertz(out[SAMPLE_RATE // 4 : SAMPLE_RATE]) == pytest.approx(1_000, abs=5)
    assert hertz(out[-SAMPLE_RATE // 2 :]) == pytest.approx(3_000, abs=5)


def test_a_file_as_another_input_begins_at_its_beginning_and_ends_the_run(runs: Runs) -> None:
    from tests.runs import noise, write_wav

    write_wav(runs.folder / "in.wav", noise(1.0))
    with runs.up("--engine", "echo", "--input", "silence", "--output", "file:out.wav") as run:
        run.running()
        play_on(run)
        send(runs, "input", "spec=file:in.wav")
        assert run.wait() == 0
    out = read_wav(runs.folder / "out.wav")
    assert abs(out[-SAMPLE_RATE:]).max() > 0.4


def test_another_output(runs: Runs) -> None:
    with runs.up(*TO_FILE) as run:
        run.running()
        play_on(run)
        for wrong in ("spec=nowhere", "spec=file:out.xyz", "spec=file:no/such/folder.wav"):
            refused(runs, "output", wrong)
        assert run.status()["stages"]["playback"]["detail"] == "file out.wav"
        assert send(runs, "output", "spec=file:second.wav")["stage"] == "playback"
        play_on(run)
        assert run.status()["settings"]["playback"]["output"].endswith("second.wav")
        send(runs, "output", "spec=null")
        assert run.status()["stages"]["playback"]["detail"] == "null"
        play_on(run)
        assert_balanced(run.status()["accounting"])
        assert run.interrupt() == 0
    for name in ("out.wav", "second.wav"):
        out = read_wav(runs.folder / name)
        assert hertz(out[SAMPLE_RATE // 4 : SAMPLE_RATE]) == pytest.approx(1_000, abs=5)
        assert abs(out[-10:]).max() < 0.01  # it was faded out


@pytest.mark.parametrize("stage", ["capture", "inference", "playback"])
def test_restart(runs: Runs, stage: str) -> None:
    """The stage is another process, the others go on, nothing is lost count of, and the run stays clean."""
    with runs.up(*TO_NOWHERE) as run:
        before = run.running()
        reply = send(runs, "restart", f"stage={stage}")
        assert reply["stage"] == stage
        assert reply["frame"] > 0
        after = run.status()
        assert after["stages"][stage]["state"] == "running"
        for other in before["stages"]:
            same = before["stages"][other]["pid"] == after["stages"][other]["pid"]
            assert same == (other != stage)
        play_on(run)
        assert_balanced(run.status()["accounting"])
        assert run.interrupt() == 0
    assert "accounting:" not in run.err


def test_settings_of_the_sampler_change_the_conversation_that_is_going_on(runs: Runs, tmp_path: Path) -> None:
    synthesize(tmp_path / "tiny", "bf16", "tiny", seed=0)
    with runs.up(
        "--model", str(tmp_path / "tiny"), "--quality", "bf16", "--input", "silence", "--output", "null"
    ) as run:
        run.running()
        with listening(runs, "timing.inference", "text", "command") as heard:
            first = heard.next(TimingRecord)
            assert (first.context_size > 0, first.context > 0) == (True, True)
            heard.next(TextRecord)
            frame = send(runs, "set", "text_temperature=0", "audio_temperature=0", "text_top_k=1")["frame"]
            assert heard.next(CommandRecord).verb == "set"
            assert run.status()["settings"]["sampler"]["text_temperature"] == 0
            later = heard.next(TimingRecord)
            while later.frame < frame + 5:
                later = heard.next(TimingRecord)
            assert later.context >= first.context
        assert run.interrupt() == 0


def test_a_monitor_that_comes_late_knows_every_stage_before_the_next_frame(runs: Runs) -> None:
    with runs.up(*TO_NOWHERE) as run:
        run.running()
        play_on(run, 2.0)
        with listening(runs, "") as heard:
            states: dict[str, str] = {}
            frames = 0
            while len(states) < 4:
                event = heard.subscription.receive(5.0)
                assert event is not None
                # One frame's records may be under way at the moment; the next are 80 ms later.
                frames += event[0] == "timing.capture"
                assert frames <= 2
                if event[0].startswith("state."):
                    states[event[0]] = json.loads(event[1])["state"]
            assert states == dict.fromkeys(
                ("state.run", "state.capture", "state.inference", "state.playback"), "running"
            )
            assert heard.next(StatusRecord).status.state == "running"
        assert run.interrupt() == 0


def test_trace_gives_the_frames_of_the_last_seconds(runs: Runs) -> None:
    with runs.up(*TO_NOWHERE) as run:
        run.running()
        play_on(run, 2.0)
        now_ns = time.monotonic_ns()
        records = send(runs, "trace", "seconds=1")["records"]
        frames = [record for topic, record in records if topic == "timing.inference"]
        assert 5 <= len(frames) <= 25
        assert all(now_ns - 5e9 < record["end_ns"] for record in frames)
        assert run.interrupt() == 0
