"""Real runs of `pipeline up`, each in a process and a runtime folder of its own, and what is asked of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import psutil
import soundfile

from pipeline.topology import SAMPLE_RATE
from tests.soundserver import SoundServer

Samples = npt.NDArray[np.float32]

PIPELINE: Final = [sys.executable, "-m", "pipeline"]
TIMEOUT_S: Final = 60.0
_HEAD: Final = 64
"""Samples of noise by which the beginning of what was fed is found in a recording."""


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """Return what `condition` returns once that is true. Raises AssertionError when it is not in time."""
    until = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.01)
    return result


def noise(seconds: float, seed: int = 1) -> Samples:
    """White noise, every sample of which is another: it shows where each came out."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE)).astype(np.float32)


def write_wav(path: Path, samples: Samples, rate: int = SAMPLE_RATE) -> Path:
    """Write float samples, so that reading gives back the same."""
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def read_wav(path: Path) -> Samples:
    """All samples of a mono sound file."""
    samples: Samples = soundfile.read(path, dtype="float32")[0]
    return samples


class Passage(NamedTuple):
    """How what was fed came out."""

    delay: int
    """Samples before the first of what was fed."""
    equal: int
    """Samples from there on that are the ones that were fed."""
    fed: int

    @property
    def exact(self) -> bool:
        return self.equal == self.fed


def passage(fed: Samples, recorded: Samples) -> Passage:
    """Find noise that was fed in a recording, and how long it is sample for sample the same."""
    for start in np.flatnonzero(recorded == fed[0]):
        if np.array_equal(recorded[start : start + _HEAD], fed[:_HEAD]):
            part = recorded[start : start + len(fed)]
            differs = np.flatnonzero(part != fed[: len(part)])
            return Passage(int(start), int(differs[0]) if len(differs) else len(part), len(fed))
    return Passage(-1, 0, len(fed))


class Runs:
    """A runtime folder for runs of any names, with the environment that programs in it get."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        # Not pytest's tmp_path: a socket's path may have 104 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="pl"))
        self.environment = {**os.environ, "PIPELINE_RUNTIME_DIR": str(self.folder / "run"), **(environment or {})}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> "subprocess.CompletedProcess[str]":
        """Run `pipeline ARGUMENTS` to its end."""
        return subprocess.run(
            [*PIPELINE, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def up(self, *arguments: str, name: str = "default") -> "Run":
        """Start `pipeline up ARGUMENTS` and go on."""
        return Run(self, name, ("up", "--name", name, *arguments))

    def offline(self, *arguments: str, name: str = "default") -> "Run":
        """Start `pipeline run ARGUMENTS` and go on."""
        return Run(self, name, ("run", "--name", name, *arguments))

    def config(self, text: str) -> Path:
        """Write a run.toml."""
        path = self.folder / "settings.toml"
        path.write_text(text)
        return path

    def leftovers(self) -> list[str]:
        """Files, sockets and folders that runs left behind."""
        folder = self.folder / "run"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


class Run:
    """One `pipeline up` or `run`. Leaving it as a context ends it, if it has not ended."""

    def __init__(self, runs: Runs, name: str, arguments: tuple[str, ...]) -> None:
        self.name = name
        self._runs = runs
        self._out = (runs.folder / f"{name}.out").open("w+")
        self._err = (runs.folder / f"{name}.err").open("w+")
        self.process = subprocess.Popen(
            [*PIPELINE, *arguments],
            cwd=runs.folder,
            env=runs.environment,
            stdout=self._out,
            stderr=self._err,
            stdin=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def out(self) -> str:
        """What it printed on standard output so far."""
        return Path(self._out.name).read_text()

    @property
    def err(self) -> str:
        """What it printed on standard error so far."""
        return Path(self._err.name).read_text()

    def status(self) -> dict[str, Any]:
        """The run's `status --json`."""
        done = self._runs.call("status", "--json", "--name", self.name)
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def running(self) -> dict[str, Any]:
        """Wait until the run is up; returns its status."""

        def look() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.err
            done = self._runs.call("status", "--json", "--name", self.name)
            if done.returncode:
                return None
            status: dict[str, Any] = json.loads(done.stdout)
            states = {stage["state"] for stage in status["stages"].values()}
            return status if states == {"running"} else None

        found: dict[str, Any] = wait_for(look, f"{self.name} to run")
        return found

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the run's own end; returns its exit code."""
        return self.process.wait(timeout_s)

    def interrupt(self) -> int:
        """What Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()


def children(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> list[psutil.Process]:
    """The living processes that `process` started, and those that they did."""
    return psutil.Process(process.pid).children(recursive=True)


def assert_balanced(accounting: Mapping[str, int]) -> None:
    """Every sample is somewhere."""
    a = accounting
    assert a["captured"] == a["stepped"] + a["dropped"] + a["waiting_in"]
    assert a["generated"] == a["played"] + a["skipped"] + a["waiting_out"]
    assert a["sent"] == a["played"] + a["concealed"]


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Load so many cores with loops that do nothing else."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def with_sound(server: SoundServer) -> Runs:
    """Runs whose PortAudio sees the virtual microphone and speaker."""
    return Runs(server.env)
