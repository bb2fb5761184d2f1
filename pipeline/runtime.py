"""A run's folder: its sockets, bells, settings and lock, and the shared memory that belongs to it."""

import contextlib
import fcntl
import os
import re
import stat
import time
import warnings
from pathlib import Path
from typing import Final

from pipeline import ring
from pipeline.errors import ConfigError, ControlError
from pipeline.topology import PROCESSES, RECORDER, RINGS

SOCKET_PATH_MAX: Final = 103
"""Bytes that a socket's path may have on macOS, where sun_path is 104 with the NUL."""

_PATIENCE_S: Final = 0.5
"""How long a name that is taken may take to become free: a run that is just ending has it a moment longer."""

_POLL_S: Final = 0.01

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


def base() -> Path:
    """The folder of all runs: $PIPELINE_RUNTIME_DIR, or `pipeline` in the platform's runtime folder."""
    given = os.environ.get("PIPELINE_RUNTIME_DIR")
    if given:
        return Path(given)
    import platformdirs

    with warnings.catch_warnings():
        # Without XDG_RUNTIME_DIR it takes a folder in /tmp; `make` sees to it that it is nobody else's.
        warnings.simplefilter("ignore")
        return Path(platformdirs.user_runtime_dir("pipeline", appauthor=False))


def private(path: str, flags: int) -> int:
    """An opener for `open`: what is made is for this user alone."""
    return os.open(path, flags, 0o600)


def names() -> list[str]:
    """The names of the runs that have a folder, alive or not."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.parent.name for path in base().glob("*/lock") if _NAME.fullmatch(path.parent.name))
    return []


def refuse_foreign(path: Path, what: str = "runtime folder", variable: str = "PIPELINE_RUNTIME_DIR") -> None:
    """Raise ConfigError where someone else may change what is in a folder, or put another in its place.

    Whoever may rename a folder above may do that; in a sticky one only its owner may.
    """
    for folder in (path.resolve(), *path.resolve().parents):
        found = folder.stat()
        foreign = found.st_uid not in (os.getuid(), 0)
        if foreign or (found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX):
            raise ConfigError(f"{what} {path}: {folder} is not yours alone to write: set {variable}")


class RunFolder:
    """The folder of the run called `name`. Raises ConfigError if the name or the folder will not do."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name {name!r}: expected 1 to 32 letters, digits, '.', '_' or '-'")
        self.name = name
        self.path = base().absolute() / name
        self.control = self.path / "control.ipc"
        self.events = self.path / "events.ipc"
        self.stages = self.path / "stages.ipc"
        self.settings = self.path / "run.json"
        longest = max(len(os.fsencode(path)) for path in (self.control, self.events, self.stages))
        if longest > SOCKET_PATH_MAX:
            raise ConfigError(
                f"runtime folder {self.path} is too long for a socket's path by {longest - SOCKET_PATH_MAX} bytes: "
                "set PIPELINE_RUNTIME_DIR to a shorter one"
            )
        self._lock_path = self.path / "lock"
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folder, for this user alone.

        Raises ConfigError where it, or a folder above it, is someone else's, and where it holds something else.
        """
        try:
            self._make()
        except OSError as error:
            raise self._unmakeable(error) from None

    def _make(self) -> None:
        parent = self.path.parent
        parent.parent.mkdir(parents=True, exist_ok=True)
        parent.mkdir(mode=0o700, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        refuse_foreign(self.path)
        held = os.listdir(self.path)
        if held and self._lock_path.name not in held:
            raise ConfigError(f"runtime folder {self.path} holds something that no run put there: choose another name")
        if stat.S_IMODE(self.path.stat().st_mode) != 0o700:
            self.path.chmod(0o700)

    def _unmakeable(self, error: OSError) -> ConfigError:
        return ConfigError(f"runtime folder {self.path} cannot be made: {error.strerror}")

    def log(self, stage: str) -> Path:
        """Where a stage's standard error goes."""
        return self.path / f"{stage}.log"

    def bell(self, ring_name: str) -> Path:
        """The bell that is rung for each frame written to a ring."""
        return self.path / f"{ring_name}.bell"

    def segment(self, ring_name: str) -> str:
        """The shared-memory name of a ring."""
        return ring.segment_name(self.path, ring_name)

    def lock(self, *, shared: bool = False) -> None:
        """Hold the name until this process ends: alone, or together with other stages started by hand.

        Raises ControlError if someone else holds it.
        """
        until = time.monotonic() + _PATIENCE_S
        while not self._take(shared, patient=time.monotonic() < until):
            if time.monotonic() > until:
                raise ControlError(
                    f"a run named {self.name!r} is up already: stop it with `pipeline down --name {self.name}`, "
                    "or choose another --name"
                )
            time.sleep(_POLL_S)

    def _take(self, shared: bool, patient: bool) -> bool:
        try:
            self._make()
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (FileNotFoundError, FileExistsError) as error:
            # A run that is just ending takes the folder away between these steps.
            if patient:
                return False
            raise self._unmakeable(error) from None
        except OSError as error:
            raise self._unmakeable(error) from None
        if self._flock(lock, fcntl.LOCK_EX) and self._is_current(lock):
            if shared:
                self.clear()  # the first to come: what is here is a dead run's
                fcntl.flock(lock, fcntl.LOCK_SH)
        elif not (shared and self._flock(lock, fcntl.LOCK_SH) and self._is_current(lock)):
            os.close(lock)
            return False
        self._lock = lock
        return True

    @staticmethod
    def _flock(lock: int, kind: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        return False

    def _is_current(self, lock: int) -> bool:
        """Whether the file is still the folder's: a run that ended since it was opened has removed it."""
        with contextlib.suppress(FileNotFoundError):
            return os.fstat(lock).st_ino == self._lock_path.stat().st_ino
        return False

    def is_locked(self) -> bool:
        """Whether a run of this name is up."""
        try:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def clear(self, *, keep_logs: bool = False) -> None:
        """Remove the run's shared memory and files, its own or those of a dead predecessor. Hold the lock."""
        for spec in RINGS:
            ring.unlink(self.segment(spec.name))
        for path in self._files():
            if not (keep_logs and path.suffix == ".log" and path.exists() and path.stat().st_size):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """All that a run puts into its folder, the lock aside. Nothing else in it is ever removed."""
        bells = [self.bell(spec.name) for spec in RINGS]
        logs = [self.log(program.name) for program in (*PROCESSES, RECORDER)]
        unfinished = self.settings.with_suffix(".new")
        return [self.control, self.events, self.stages, self.settings, unfinished, *bells, *logs]

    def release(self, *, keep_logs: bool = False) -> None:
        """Clear everything, the folder with it unless logs are kept, and let go of the lock."""
        self.clear(keep_logs=keep_logs)
        if self._lock is not None:
            if not keep_logs:
                self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # it holds logs, or what is not the run's
            self.path.rmdir()

    def leave(self) -> None:
        """Let go of a shared lock; the last to leave clears everything."""
        if self._lock is None:
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.release()
