"""A private sound server with a virtual microphone and speaker, so that real PortAudio runs with no sound card.

A program started with `SoundServer.env` sees two PortAudio devices, MICROPHONE and SPEAKER. What is fed to the
microphone, and what comes out of the speaker, is bit-exact as long as the stream has the server's rate and one
channel of float32.

With `cable=True` both devices are the two channels of one sound card: they share a clock, and `record_both` takes
them down side by side, so that the delay between the two is known to the sample (see `delay_samples`).
"""

import ctypes.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from pipeline.topology import SAMPLE_RATE

MICROPHONE: Final = "vmic"
SPEAKER: Final = "vspk"
"""The devices' names, as PortAudio lists them."""

FEED_LATENCY_MS: Final = 1_000
"""How far ahead the microphone's feeder writes: it must not stutter on a busy machine."""

RECORD_LATENCY_MS: Final = 50
"""How often the recorder is woken. What it takes down is whole whatever the value; at the end it lacks this much."""

SINK_LATENCY_MS: Final = 50
"""The largest block of a PulseAudio null sink that does not rewind."""

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.005

WAV_HEADER_BYTES: Final = 128
"""More than the header of any WAV file that the recorder writes."""

MIN_CORRELATION: Final = 0.5
"""Below this two recordings are not of the same signal."""

PROGRAMS: Final = {
    "pulseaudio": "pulseaudio",
    "pactl": "pulseaudio-utils",
    "paplay": "pulseaudio-utils",
    "parec": "pulseaudio-utils",
    "setpriv": "util-linux",
}
"""The programs that are run here, each with the Debian package that holds it."""

ALSA_CONFIG: Final = Path("/usr/share/alsa/alsa.conf")
ALSA_PLUGINS: Final = ("lib/*/alsa-lib", "lib/alsa-lib", "lib64/alsa-lib")
"""Where below /usr distributions keep them."""

# norewinds=1: otherwise a stream's first callback can be up to 1.7 s late.
CARD: Final = "module-null-sink sink_name={name} format=float32le rate={rate} channels=1 norewinds=1"
TWO_CARDS: Final = f"""\
load-module {CARD.replace("{name}", "mic")}
load-module {CARD.replace("{name}", "spk")}
set-default-sink spk
set-default-source mic.monitor
"""
# The microphone is mic's monitor and no remap-source, which would hide the monitor's latency: PortAudio's ADC times
# would wander by up to 20 ms. remix=no: each channel is taken as it is, and not mixed into the other.
ONE_CARD: Final = """\
load-module module-null-sink sink_name=cable format=float32le rate={rate} channels=2 \
channel_map=front-left,front-right norewinds=1
load-module module-remap-sink sink_name=mic master=cable channels=1 channel_map=mono \
master_channel_map=front-left remix=no
load-module module-remap-sink sink_name=spk master=cable channels=1 channel_map=mono \
master_channel_map=front-right remix=no
set-default-sink spk
set-default-source mic.monitor
"""
# handle_underrun: a gap in playback is reported to PortAudio as an output underflow.
ALSA_MICROPHONE: Final = """\
pcm.{microphone} {{ type asym capture.pcm {{ type pulse server "{server}" device mic.monitor }} }}
"""
ALSA_SPEAKER: Final = """\
pcm.{speaker} {{ type asym playback.pcm {{ type pulse server "{server}" device {card} handle_underrun 1 }} }}
"""


class SoundServerError(Exception):
    """The sound server, or a program that talks to it, did not do what it was started for."""


def missing() -> str | None:
    """Return the Debian package without which there is no sound server here; None if nothing is missing."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return package
    if not ALSA_CONFIG.exists():
        return "libasound2-data"
    if not any(any(Path("/usr").glob(f"{folder}/libasound_module_pcm_pulse.so")) for folder in ALSA_PLUGINS):
        return "libasound2-plugins"
    if ctypes.util.find_library("portaudio") is None:
        return "libportaudio2"
    return None


def delay_samples(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> int:
    """Return by how many samples `right` lags behind `left` (negative: it leads), by cross-correlation.

    The signal must not repeat itself; noise and speech are good ones. A scaled or partly missing `right` is
    still found. Raises ValueError if the two do not hold the same signal.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    size = 1 << (len(left) + len(right) - 1).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(right, size) * np.fft.rfft(left, size).conj(), size)
    peak = int(np.argmax(correlation))
    energy = float(np.linalg.norm(left) * np.linalg.norm(right))
    if energy == 0 or correlation[peak] < MIN_CORRELATION * energy:
        raise ValueError("the two recordings do not hold the same signal")
    return peak if peak < len(right) else peak - size


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return as soon as `condition()` holds. Raises SoundServerError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SoundServerError(f"{what}: not within {timeout_s} s")
        time.sleep(POLL_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """End `process`: SIGTERM, STOP_TIMEOUT_S of patience, then SIGKILL. Fine if it has ended already."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Recording:
    """A recording under way. From construction on every sample is taken down, to about the call of `stop`."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.path: Final = path
        self._process: Final = process
        wait_until(self._has_begun, f"recording into {path}")

    def stop(self) -> None:
        """End the recording once all that the device has played by now is in the file. Safe to call twice."""
        if self._process.poll() is None:
            time.sleep((2 * RECORD_LATENCY_MS + SINK_LATENCY_MS) / 1_000)
        end(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _has_begun(self) -> bool:
        if self._process.poll() is not None:
            raise SoundServerError(f"the recorder ended with code {self._process.returncode}")
        return self.path.exists() and self.path.stat().st_size > WAV_HEADER_BYTES


class SoundServer:
    """A PulseAudio of its own in a temporary folder. A context manager: on leaving, nothing is left behind.

    Whatever is started here dies with the thread that starts it, so that a killed test leaves at most the folder.

    rate: of both devices, in Hz. A stream of any other rate is resampled by the server.
    cable: one card with one clock for both devices, and `record_both`; otherwise two cards.

    `env` is what a child process needs on top of its own environment to see the two devices; they exist, for
    PortAudio, from the moment it is initialised while the server is up.
    """

    def __init__(self, rate: int = SAMPLE_RATE, *, cable: bool = False) -> None:
        self.rate: Final = rate
        self.cable: Final = cable
        self.folder: Final = Path(tempfile.mkdtemp(prefix="sound-"))
        server = f"unix:{self.folder}/native"
        # The paths and the cookie: otherwise PulseAudio's client library makes its own, below HOME.
        self.env: Final = {
            "ALSA_CONFIG_PATH": f"{ALSA_CONFIG}:{self.folder}/asound.conf",
            "PULSE_SERVER": server,
            "PULSE_COOKIE": f"{self.folder}/cookie",
            "PULSE_RUNTIME_PATH": str(self.folder),
            "PULSE_STATE_PATH": str(self.folder),
        }
        self._own_env: Final = os.environ | self.env | {"HOME": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder)}
        self._server: subprocess.Popen[bytes] | None = None
        self._clients: Final[list[subprocess.Popen[bytes]]] = []
        self._script: Final = self.folder / "script.pa"
        self._script.write_text(
            f"load-module module-native-protocol-unix socket={self.folder}/native auth-anonymous=1\n"
            + (ONE_CARD if cable else TWO_CARDS).format(rate=rate)
        )
        (self.folder / "asound.conf").write_text(
            ALSA_MICROPHONE.format(microphone=MICROPHONE, server=server)
            + ALSA_SPEAKER.format(speaker=SPEAKER, server=server, card="spk")
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The server's process id. Raises SoundServerError if it is not running."""
        if self._server is None:
            raise SoundServerError("the sound server is not running")
        return self._server.pid

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = ["pulseaudio", "-n", "-F", str(self._script), "--daemonize=no", "--use-pid-file=no"]
        command += ["--exit-idle-time=-1", "--disallow-exit", "--log-target=stderr"]
        with self._log.open("wb") as log:
            self._server = self._spawn(command, stderr=log)
        wait_until(self._answers, "the sound server's start")

    def stop(self) -> None:
        """End the server under its clients, as if the sound card had been pulled out. Safe to call twice."""
        if self._server is not None:
            end(self._server)
            self._server = None

    def restart(self) -> None:
        """Stop the server and start it anew, at the same address."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End the server by SIGKILL; its clients' streams break off."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def hang(self) -> None:
        """Stop the server's process, as a debugger does; `go_on` lets it run again."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let the server run again after `hang`."""
        os.kill(self.pid, signal.SIGCONT)

    def plug(self, *cards: str) -> None:
        """Add sound cards, each a sink of that name and its monitor; `mic` and `spk` as they were at the start."""
        for card in cards:
            self._control("load-module", *CARD.format(name=card, rate=self.rate).split())

    def unplug(self, *cards: str) -> None:
        """Take sound cards away; streams that find no other break off."""
        for card in cards:
            for line in self._control("list", "short", "modules").splitlines():
                if f"sink_name={card}" in line.split():
                    self._control("unload-module", line.split()[0])

    def list_speaker(self, card: str) -> None:
        """Have PortAudio list a card that was plugged in, under its own name, from when it looks for devices next."""
        with (self.folder / "asound.conf").open("a") as config:
            config.write(ALSA_SPEAKER.format(speaker=card, server=self.env["PULSE_SERVER"], card=card))

    def make_default(self, card: str) -> None:
        """Make a card's sink the default one."""
        self._control("set-default-sink", card)

    def close(self) -> None:
        """End every feeder and recorder and the server, and remove the folder. Safe to call twice."""
        for client in self._clients:
            end(client)
        self._clients.clear()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def feed(self, path: Path) -> subprocess.Popen[bytes]:
        """Begin to play a sound file into the microphone, which is silent otherwise; it ends by itself."""
        return self._client(["paplay", "--device=mic", f"--latency-msec={FEED_LATENCY_MS}", str(path)])

    def record(self, path: Path, card: str = "spk") -> Recording:
        """Record what comes out of the speaker, or another card, into a mono float32 WAV file."""
        return self._record(f"{card}.monitor", 1, path)

    def record_both(self, path: Path) -> Recording:
        """Record both devices of a cable into one stereo float32 WAV file.

        Left is what the microphone heard and right what the speaker played, at the same time to the sample.
        """
        if not self.cable:
            raise ValueError("two cards have two clocks: record_both needs SoundServer(cable=True)")
        return self._record("cable.monitor", 2, path)

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _record(self, source: str, channels: int, path: Path) -> Recording:
        path.unlink(missing_ok=True)
        command = ["parec", f"--device={source}", "--file-format=wav", "--format=float32le"]
        command += [
            f"--rate={self.rate}",
            f"--channels={channels}",
            f"--latency-msec={RECORD_LATENCY_MS}",
            str(path),
        ]
        return Recording(self._client(command), path)

    def _wait(self) -> None:
        if self._server is not None:
            self._server.wait()
            self._server = None

    def _control(self, *arguments: str) -> str:
        done = subprocess.run(
            ["pactl", *arguments],
            env=self._own_env,
            capture_output=True,
            text=True,
            timeout=STOP_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise SoundServerError(f"pactl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _client(self, command: list[str]) -> subprocess.Popen[bytes]:
        client = self._spawn(command)
        self._clients.append(client)
        return client

    def _spawn(self, command: list[str], stderr: Any = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=self._own_env,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )

    def _answers(self) -> bool:
        """Whether the server can be reached. Raises SoundServerError if it has ended or lacks a device."""
        command = ["pactl", "list", "short", "sinks"]
        reply = subprocess.run(command, env=self._own_env, capture_output=True, text=True, check=False)
        has_devices = {"mic", "spk"} <= set(reply.stdout.split())
        ended = self._server is None or self._server.poll() is not None
        if ended or (reply.returncode == 0 and not has_devices):
            raise SoundServerError(f"the sound server did not start:\n{self._log.read_text(errors='replace')}")
        return has_devices
