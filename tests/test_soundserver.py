"""The sound server that other tests stand on: exact in both directions, dated to the sample, and gone afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import soundfile

from pipeline.topology import SAMPLE_RATE
from tests import conftest, soundserver
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer, delay_samples, wait_until

Samples = npt.NDArray[np.float32]

NOISE_LEVEL = 0.2
NOISE_S = 3
TIMEOUT_S = 60
AGREE_MS = 5.0

PLAYER = f"""
import sys
import numpy, sounddevice, soundfile
samples = soundfile.read(sys.argv[1], dtype="float32", always_2d=True)[0]
silence = numpy.zeros_like(samples[:{SAMPLE_RATE // 2}])
with sounddevice.OutputStream({SAMPLE_RATE}, device="{SPEAKER}", channels=1, dtype="float32", latency=0.1) as stream:
    stream.write(numpy.concatenate((samples, silence)))
"""
"""Plays a file, and silence after it, because a stream that is stopped loses its last buffer."""

CAPTURER = f"""
import sys
import numpy, sounddevice
blocks = []
def callback(data, count, at, status):
    blocks.append(data[:, 0].copy())
with sounddevice.InputStream({SAMPLE_RATE}, device="{MICROPHONE}", channels=1, dtype="float32", latency=0.1,
                             callback=callback):
    print("ready", flush=True)
    sys.stdin.readline()
numpy.save(sys.argv[1], numpy.concatenate(blocks))
"""
"""Captures until it is told to end."""

LOOP = f"""
import collections, sys, time
import numpy, sounddevice
queue, delays_ms = collections.deque(), []
def capture(data, count, at, status):
    adc = time.monotonic() - (at.currentTime - at.inputBufferAdcTime)
    queue.append((adc, data.copy()))
def play(data, count, at, status):
    data.fill(0)
    if len(queue) > 1:
        adc, data[:] = queue.popleft()
        delays_ms.append(1000 * (time.monotonic() + (at.outputBufferDacTime - at.currentTime) - adc))
options = dict(samplerate={SAMPLE_RATE}, blocksize=240, channels=1, dtype="float32", latency=0.1)
with (sounddevice.OutputStream(device="{SPEAKER}", callback=play, **options),
      sounddevice.InputStream(device="{MICROPHONE}", callback=capture, **options)):
    print("ready", flush=True)
    sys.stdin.readline()
numpy.save(sys.argv[1], delays_ms)
"""
"""Sends the microphone to the speaker, with what PortAudio says about the delay."""


def noise() -> Samples:
    return (np.random.default_rng(7).standard_normal(NOISE_S * SAMPLE_RATE) * NOISE_LEVEL).astype(np.float32)


def write(path: Path, samples: Samples) -> Path:
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    return path


def without_silence(samples: Samples) -> Samples:
    sounding = np.flatnonzero(samples)
    return samples[sounding[0] : sounding[-1] + 1]


def run_while(program: str, server: SoundServer, path: Path, act: Callable[[], Any]) -> Any:
    """Run `program` in a child, `act` as soon as it is ready, and return what it saved at `path`."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env=os.environ | server.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            act()
            child.communicate("\n", TIMEOUT_S)
        finally:
            child.kill()
    assert child.returncode == 0
    return np.load(path)


def feed(server: SoundServer, path: Path) -> None:
    """Feed the file, and wait until it has been heard as well."""
    assert server.feed(path).wait(TIMEOUT_S) == 0
    time.sleep(0.5)


def play(server: SoundServer, path: Path) -> None:
    command = [sys.executable, "-c", PLAYER, str(path)]
    subprocess.run(command, env=os.environ | server.env, check=True, timeout=TIMEOUT_S)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_is_fed_is_what_the_microphone_hears(sound_server: SoundServer, tmp_path: Path) -> None:
    fed = write(tmp_path / "fed.wav", noise())
    captured = run_while(CAPTURER, sound_server, tmp_path / "captured.npy", lambda: feed(sound_server, fed))
    np.testing.assert_array_equal(without_silence(captured), noise())


def test_what_is_played_is_what_is_recorded(sound_server: SoundServer, tmp_path: Path) -> None:
    with sound_server.record(tmp_path / "heard.wav") as recording:
        play(sound_server, write(tmp_path / "played.wav", noise()))
    heard, rate = soundfile.read(recording.path, dtype="float32")
    assert rate == SAMPLE_RATE
    np.testing.assert_array_equal(without_silence(heard), noise())


def test_a_cable_keeps_its_channels_apart(sound_cable: SoundServer, tmp_path: Path) -> None:
    fed = write(tmp_path / "fed.wav", noise())
    played = write(tmp_path / "played.wav", noise()[::-1])
    with sound_cable.record_both(tmp_path / "both.wav") as recording:
        feeder = sound_cable.feed(fed)
        play(sound_cable, played)
        feeder.wait(TIMEOUT_S)
    both = soundfile.read(recording.path, dtype="float32")[0]
    np.testing.assert_array_equal(without_silence(both[:, 0]), noise())
    np.testing.assert_array_equal(without_silence(both[:, 1]), noise()[::-1])


def test_portaudio_tells_the_delay_that_the_recording_shows(sound_cable: SoundServer, tmp_path: Path) -> None:
    fed = write(tmp_path / "fed.wav", noise())
    with sound_cable.record_both(tmp_path / "both.wav") as recording:
        told_ms = run_while(LOOP, sound_cable, tmp_path / "told.npy", lambda: feed(sound_cable, fed))
    both = soundfile.read(recording.path, dtype="float32")[0]
    delay_ms = delay_samples(both[:, 0], both[:, 1]) * 1_000 / SAMPLE_RATE
    assert np.median(told_ms) == pytest.approx(delay_ms, abs=AGREE_MS)


@pytest.mark.parametrize("delay", [0, 1, 4_321])
def test_a_delay_is_found_to_the_sample(delay: int) -> None:
    early, late = noise(), np.concatenate((np.zeros(delay, np.float32), noise() / 2))
    assert delay_samples(early, late) == delay
    assert delay_samples(late, early) == -delay


@pytest.mark.parametrize("other", [noise()[::-1], np.zeros_like(noise())])
def test_a_delay_between_different_signals_is_refused(other: Samples) -> None:
    with pytest.raises(ValueError, match="same signal"):
        delay_samples(noise(), other)


def test_two_cards_are_not_recorded_as_one(sound_server: SoundServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cable=True"):
        sound_server.record_both(tmp_path / "both.wav")


def test_the_server_works_again_after_a_restart(sound_server: SoundServer, tmp_path: Path) -> None:
    sound_server.stop()
    with pytest.raises(soundserver.SoundServerError, match="not running"):
        _ = sound_server.pid
    sound_server.restart()
    with sound_server.record(tmp_path / "heard.wav") as recording:
        play(sound_server, write(tmp_path / "played.wav", noise()))
    np.testing.assert_array_equal(without_silence(soundfile.read(recording.path, dtype="float32")[0]), noise())


@pytest.mark.usefixtures("sound_server")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with SoundServer() as server:
        server.feed(write(tmp_path / "fed.wav", noise()))
        server.record(tmp_path / "heard.wav")
        assert len(psutil.Process().children(recursive=True)) == len(before) + 3
    assert psutil.Process().children(recursive=True) == before
    assert not server.folder.exists()


@pytest.mark.usefixtures("sound_server")
def test_the_server_dies_with_a_test_that_is_killed(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.soundserver import SoundServer
with SoundServer() as server:
    recording = server.record(Path(sys.argv[1]))
    print(server.folder, server.pid, flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "heard.wav")],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder, pid = owner.stdout.readline().split()
        started = [child.pid for child in psutil.Process(owner.pid).children(recursive=True)]
        assert Path(folder).is_dir()
        assert int(pid) in started
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in started), "the end of the server and its clients")


@pytest.mark.usefixtures("sound_server")
def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundserver, "TWO_CARDS", "load-module no-such-module\n")
    with pytest.raises(soundserver.SoundServerError, match="no-such-module"), SoundServer():
        pass


def test_a_missing_program_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "parec" else name)
    assert soundserver.missing() == "pulseaudio-utils"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these tests are always skipped")
@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_package_is_a_failure_in_ci_only(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(conftest, "missing", lambda: "libportaudio2")
    with pytest.raises(outcome, match="libportaudio2"):
        conftest.require_sound()
