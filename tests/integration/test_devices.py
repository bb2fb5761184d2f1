"""Devices that go and come back, on the virtual sound server: the run goes on, and sound is back by itself."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import psutil

from pipeline import control, messages
from pipeline.audio import FADE
from pipeline.chaos import stall
from pipeline.ring import Ring, segment_name
from pipeline.topology import SAMPLE_RATE
from tests.runs import Run, Runs, Samples, assert_balanced, read_wav, wait_for, with_sound, write_wav
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer

STEADY: Final = "[playback]\nprebuffer_ms = 80\nlatency_ms = 100\n[capture]\nlatency_ms = 100\n"
"""What another process does to this machine's cores is not what is tested."""

LEVEL: Final = 0.25
"""Of `tone:HZ`."""

OWN_STEP: Final = LEVEL * 2 * np.pi * 440 / SAMPLE_RATE
"""The largest between two samples of `tone:440`."""

LAST: Final = SAMPLE_RATE // 4
"""Samples at the end of a recording."""

SOON_S: Final = 5.0
"""Well above what it takes, on a busy machine too."""

LOST: Final = "lost: waiting for it"


def up(runs: Runs, source: str, target: str) -> Run:
    config = runs.config(STEADY)
    return runs.up("--engine", "echo", "--config", str(config), "--input", source, "--output", target)


def status(runs: Runs) -> dict[str, Any]:
    """As `pipeline status --json`, which takes a second to start."""
    control_path = runs.folder / "run" / "default" / "control.ipc"
    reply = control.request(control_path, messages.encode(messages.Status()), timeout_s=10.0)
    found: dict[str, Any] = msgspec.to_builtins(reply.status)
    return found


def pids(of: Mapping[str, Any]) -> dict[str, int]:
    return {name: stage["pid"] for name, stage in of["stages"].items()}


def assert_whole(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The same stages run, and every sample is accounted for."""
    assert pids(after) == pids(before)
    assert {stage["state"] for stage in after["stages"].values()} == {"running"}
    assert [stage["restarts"] for stage in after["stages"].values()] == [0, 0, 0]
    assert_balanced(after["accounting"])


def has_lost(run: Run, times: int) -> None:
    """Wait until so many devices have been lost since the run's beginning."""
    wait_for(lambda: run.err.count("; waiting for it") == times, f"{times} losses")


def has_back(run: Run, times: int) -> None:
    """Wait until so many devices run again since then."""
    wait_for(lambda: run.err.count("without one") == times, f"{times} returns")


def heard_writers(runs: Runs) -> int:
    """How often playback began anew."""
    heard = Ring.attach(segment_name(runs.folder / "run" / "default", "heard"))
    with contextlib.closing(heard):
        return heard.generation


def details(runs: Runs) -> list[str]:
    stages = status(runs)["stages"]
    return [stages[name]["detail"] for name in ("capture", "playback")]


def goes_on(runs: Runs) -> None:
    """Wait until half a second more was played."""
    played = status(runs)["accounting"]["played"]
    wait_for(lambda: status(runs)["accounting"]["played"] > played + SAMPLE_RATE // 2, "sound")


def loudness(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def hears(server: SoundServer, path: Path, seconds: float = 1.0, card: str = "spk") -> Samples:
    with server.record(path, card):
        time.sleep(seconds)
    return read_wav(path)


def feed_tone(server: SoundServer, folder: Path) -> None:
    tone = LEVEL * np.sin(2 * np.pi * 440 * np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE)
    server.feed(write_wav(folder / "tone.wav", tone.astype(np.float32)))


def test_the_sound_server_is_killed_and_started_again_and_again(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, "tone:440", f"device:{SPEAKER}") as run:
        first = run.running()
        goes_on(runs)
        took_s = []
        for away_s in (0.0, 0.5, 2.0):
            sound_server.kill()
            time.sleep(away_s)
            sound_server.start()
            back_s = time.monotonic()
            with sound_server.record(runs.folder / "heard.wav"):
                recorded_s = time.monotonic()
                goes_on(runs)
            heard = read_wav(runs.folder / "heard.wav")
            assert loudness(heard[-LAST:]) > 0.6 * LEVEL
            begins = int(np.flatnonzero(np.abs(heard) > 0.1 * LEVEL)[0])
            return_ = heard[max(0, begins - FADE) : begins + 2 * FADE]
            assert np.abs(np.diff(return_)).max() < 1.2 * OWN_STEP  # it fades in
            took_s.append(recorded_s - back_s + begins / SAMPLE_RATE)
            assert_whole(first, status(runs))
        assert max(took_s) < SOON_S
        last = status(runs)["accounting"]
        assert last["skipped"] > 0  # the speaker was away for longer than the queue may be
        assert last["dropped"] == 0
        assert run.interrupt() == 0, run.err
        print(f"sound {', '.join(f'{s:.2f}' for s in took_s)} s after the server was back")
        name = f"output {SPEAKER} at {SAMPLE_RATE} Hz"
        assert run.err.count(f"{name}: the device has stopped; waiting for it") == 3
        assert run.err.count(f"{name}: runs, after") == 3


def test_both_devices_are_pulled_out_and_put_in_again(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, f"device:{MICROPHONE}", f"device:{SPEAKER}") as run:
        first = run.running()
        for time_ in (1, 2):
            sound_server.unplug("mic", "spk")
            has_lost(run, 2 * time_)
            away = status(runs)
            assert all(away["stages"][name]["detail"].endswith(LOST) for name in ("capture", "playback"))
            assert runs.call("send", "set", "volume=0.5").returncode == 0
            later = status(runs)
            assert later["accounting"]["captured"] == away["accounting"]["captured"]  # nothing is made up
            assert later["accounting"]["sent"] == away["accounting"]["sent"]
            assert_whole(first, later)
            sound_server.plug("mic", "spk")
            has_back(run, 2 * time_)
            feed_tone(sound_server, runs.folder)
            heard = hears(sound_server, runs.folder / "heard.wav", 2.0)
            assert loudness(heard[-LAST:]) > 0.6 * 0.5 * LEVEL  # at the volume that was set meanwhile
            assert_whole(first, status(runs))
        assert run.interrupt() == 0, run.err


def test_devices_are_switched_and_a_stage_is_restarted_while_they_are_away(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, f"device:{MICROPHONE}", f"device:{SPEAKER}") as run:
        first = run.running()
        sound_server.kill()
        has_lost(run, 2)
        refused = runs.call("send", "output", "spec=device:loudspeaker")
        assert refused.returncode == 2
        assert "output device:loudspeaker: not found" in refused.stderr
        assert runs.call("send", "output", "spec=null").returncode == 0
        assert runs.call("send", "input", "spec=tone:440").returncode == 0
        assert details(runs) == ["tone 440 Hz", "null"]
        goes_on(runs)
        assert_whole(first, status(runs))
        sound_server.start()
        assert runs.call("send", "output", f"spec=device:{SPEAKER}").returncode == 0
        assert loudness(hears(sound_server, runs.folder / "heard.wav")[-LAST:]) > 0.6 * LEVEL
        sound_server.kill()
        has_lost(run, 3)
        assert runs.call("send", "restart", "stage=playback").returncode == 0
        has_lost(run, 4)  # the new one says so too, and is no failure
        restarted = status(runs)
        assert restarted["stages"]["playback"]["state"] == "running"
        assert pids(restarted)["playback"] != pids(first)["playback"]
        sound_server.start()
        has_back(run, 3)
        assert loudness(hears(sound_server, runs.folder / "heard.wav")[-LAST:]) > 0.6 * LEVEL
        assert_balanced(status(runs)["accounting"])
        assert run.interrupt() == 0, run.err


def test_a_sound_server_that_hangs_is_a_lost_device_and_does_not_hold_up_the_end(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, f"device:{MICROPHONE}", f"device:{SPEAKER}") as run:
        first = run.running()
        goes_on(runs)
        sound_server.hang()
        has_lost(run, 2)
        sound_server.go_on()
        has_back(run, 2)
        goes_on(runs)
        assert_whole(first, status(runs))
        sound_server.hang()
        try:
            has_lost(run, 4)
            assert run.interrupt() == 0, run.err  # no stage had to be killed
        finally:
            sound_server.go_on()


def latency_ms(runs: Runs) -> float:
    found: float = status(runs)["stages"]["playback"]["device_latency_ms"]
    return found


def test_a_speaker_that_runs_dry_twice_is_opened_with_more_latency(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, runs.up("--engine", "echo", "--input", "tone:440") as run:
        first = run.running()
        goes_on(runs)
        before_ms = latency_ms(runs)
        playback = psutil.Process(first["stages"]["playback"]["pid"])
        for _ in range(2):
            time.sleep(2.0)  # what follows within a second is of one cause
            stall(playback, 0.15)
        wait_for(lambda: "playback.latency_ms = 80 in place of 40" in run.err, "the speaker to be opened anew")
        with sound_server.record(runs.folder / "heard.wav"):
            goes_on(runs)
        assert loudness(read_wav(runs.folder / "heard.wav")[-LAST:]) > 0.6 * LEVEL
        wait_for(lambda: latency_ms(runs) > before_ms + 20, "status to tell the new latency")
        after = status(runs)
        assert after["xruns"]["playback"] >= 2
        assert_whole(first, after)
        assert run.interrupt() == 0, run.err


def test_the_sound_server_moves_the_stream_to_a_new_default(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, "tone:440", "device") as run:
        first = run.running()
        assert loudness(hears(sound_server, runs.folder / "heard.wav")[-LAST:]) > 0.6 * LEVEL
        sound_server.plug("headset")
        sound_server.make_default("headset")
        heard = hears(sound_server, runs.folder / "heard.wav", 2.0, "headset")
        assert loudness(heard[-LAST:]) > 0.6 * LEVEL
        sound_server.make_default("spk")
        assert loudness(hears(sound_server, runs.folder / "heard.wav", 2.0)[-LAST:]) > 0.6 * LEVEL
        assert_whole(first, status(runs))
        assert run.interrupt() == 0, run.err
        assert "lost" not in run.err


def test_a_speaker_that_was_put_in_during_the_run_can_be_switched_to(sound_server: SoundServer) -> None:
    with with_sound(sound_server) as runs, up(runs, "tone:440", f"device:{SPEAKER}") as run:
        first = run.running()
        sound_server.plug("headset")
        sound_server.list_speaker("headset")
        assert runs.call("send", "output", "spec=device:headset").returncode == 0
        assert loudness(hears(sound_server, runs.folder / "heard.wav", card="headset")[-LAST:]) > 0.6 * LEVEL
        writers = heard_writers(runs)
        assert runs.call("send", "output", "spec=device:loudspeaker").returncode == 2
        goes_on(runs)
        last = status(runs)
        assert heard_writers(runs) == writers  # for one that is not there nothing was interrupted
        assert details(runs)[1].startswith("headset")
        assert_whole(first, last)
        assert run.interrupt() == 0, run.err
        assert "lost" not in run.err
