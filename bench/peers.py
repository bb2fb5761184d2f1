"""The environment of the programs that we are measured against: .bench/ in the repository's root.

It is made on first use, from requirements/peers.txt, and kept. Each line of that file is installed by itself, so that a
package that this machine cannot have leaves the others in place; what is missing is tried again next time, but once
only in a run of bench.suite.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from bench.results import ROOT

HOME: Final = ROOT / ".bench"
_LIST: Final = ROOT / "requirements" / "peers.txt"
_PYTHON: Final = HOME / "bin" / "python"
_PIP: Final = [str(_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
_STAMP: Final = HOME / "installed"

TRIED: Final = "BENCH_PEERS_TRIED"
"""The environment variable that names a file of bench.suite's: it is there once not all could be installed."""

SHOWN: Final = ("iceoryx2", "pyzmq", "numpy", "mlx", "moshi_mlx")
"""The packages whose versions are told."""


@cache
def python() -> Path:
    """The interpreter of the peers' environment, which is made where it is not there or its list has changed.

    Who needs a package in it asks for its `version` first: what could not be installed is only reported, in a line.
    """
    HOME.mkdir(exist_ok=True)
    with _locked():
        if not (_STAMP.exists() and _STAMP.read_text() == _wanted()) and not _was_tried():
            _make()
    return _PYTHON


def version(package: str) -> str | None:
    """Of a peer; None where it is not installed."""
    return _version(python(), package)


def versions() -> dict[str, str]:
    """Of the peers that are installed by now: nothing is made for it."""
    return {name: found for name in SHOWN if (found := _version(_PYTHON, name))}


def _version(interpreter: Path, package: str) -> str | None:
    if not interpreter.exists():
        return None
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def requirements() -> list[str]:
    """The lines of the list that name a package."""
    return [line for line in _LIST.read_text().splitlines() if line and not line.startswith("#")]


def _wanted() -> str:
    return "\n".join([sys.version, *requirements()])


def _was_tried() -> bool:
    return TRIED in os.environ and Path(os.environ[TRIED]).exists()


def _make() -> None:
    print(f"Installing the peers into {HOME.name}/ (a minute or two, 400 MB, once)", file=sys.stderr, flush=True)
    failures = int(_failed([sys.executable, "-m", "venv", str(HOME)], "the environment cannot be made"))
    if not failures:
        failures = sum(_failed([*_PIP, line], f"{line} cannot be installed") for line in requirements())
    if not failures:
        _STAMP.write_text(_wanted())
    elif TRIED in os.environ:
        Path(os.environ[TRIED]).touch()


def _failed(command: list[str], what: str) -> bool:
    """Run it; where it fails, say so in one line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
        print(f"{what}: {errors[-1]}", file=sys.stderr, flush=True)
    return done.returncode != 0


@contextmanager
def _locked() -> Iterator[None]:
    """One at a time: benchmarks may be started side by side."""
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
