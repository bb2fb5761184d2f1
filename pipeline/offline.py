"""A run from file to file: the words with their times, how far it has come, and how fast it went."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from msgspec import Struct

from pipeline.config import Config
from pipeline.errors import EXIT_REFUSED, ConfigError
from pipeline.messages import SCHEMA, Accounting, LogLevel, TextRecord
from pipeline.runtime import RunFolder
from pipeline.supervisor import Supervisor
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import SAMPLE_RATE
from pipeline.words import Word, Words

if TYPE_CHECKING:
    from rich.console import Console

SEED: Final = 0
"""The seed where none is given: the same input gives the same answer."""


class Transcript:
    """Where the words go, a line each: to the file at `path`, else to standard output if that is asked for.

    The file is looked at when this is made, and loses what it held only when the run begins. Raises ConfigError.
    """

    def __init__(self, path: Path | None, *, to_stdout: bool) -> None:
        self.words: list[Word] = []
        self._pieces = Words()
        self._path = path
        self._to_stdout = to_stdout and path is None
        self._file: TextIO | None = None
        if path is not None:
            _check_writable(path)

    def begin(self) -> None:
        """The run has begun. Raises ConfigError."""
        if self._path is not None:
            with self._said():
                self._file = self._path.open("w", encoding="utf-8")

    def add(self, record: TextRecord) -> None:
        """Write the words that are complete now. Raises ConfigError, or OSError of standard output."""
        self._write(self._pieces.add(record.frame, record.text))

    def end(self) -> None:
        """Write the last word and close the file. Raises as `add` does."""
        self._write(self._pieces.end())
        if self._file is not None:
            with self._said():
                self._file.close()

    def _write(self, words: Iterator[Word]) -> None:
        for word in words:
            self.words.append(word)
            if self._file is not None:
                with self._said():
                    print(word.line(), file=self._file, flush=True)
            elif self._to_stdout:
                print(word.line(), flush=True)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"transcript {self._path}: cannot be written: {error.strerror}") from None


def _check_writable(path: Path) -> None:
    there = path if path.exists() else path.parent
    if not there.exists() or path.is_dir():
        raise ConfigError(f"transcript {path}: cannot be written: no such folder, or a folder itself")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"transcript {path}: cannot be written: not permitted")


class Result(Struct, kw_only=True):
    """What `run --json` prints."""

    schema: int = SCHEMA
    complete: bool
    """Whether the answer is whole; false where the exit code is not 0."""
    input: str
    output: str
    seed: int | None
    audio_s: float
    """How much of the answer there is, in seconds of audio."""
    wall_s: float
    """How long it took, without what came before the first frame: starting the stages and loading the model."""
    speed: float
    """Seconds of audio a second."""
    words: list[Word]
    accounting: Accounting

    def line(self) -> str:
        """The end of a run."""
        return f"{self.audio_s:.2f} s of audio in {self.wall_s:.2f} s: {self.speed:.1f} times real time"


class Run:
    """One run from file to file. Its lines and its progress, where that is a terminal, go to `console`."""

    def __init__(self, config: Config, folder: RunFolder, transcript: Transcript, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._config = config
        self._transcript = transcript
        self._console = console
        self._supervisor = Supervisor(
            config, folder, on_text=transcript.add, on_log=self._on_log, on_turn=self._on_turn
        )
        self._began = False
        self._wall_s = 0.0
        self._audio_s = 0.0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("starting", total=None, speed="")

    def run(self) -> tuple[int, Result | None]:
        """Carry out the run; returns its exit code, and what came of it unless it was refused.

        Raises PipelineError as Supervisor.run does.
        """
        with self._progress:
            code = self._supervisor.run()
            code = self._end(code)
        final = self._supervisor.final
        if code == EXIT_REFUSED or final is None:
            return code, None
        return code, Result(
            complete=code == 0,
            input=self._config.capture.input.removeprefix("file:"),
            output=self._config.playback.output.removeprefix("file:"),
            seed=self._config.sampler.seed,
            audio_s=final.accounting.played / SAMPLE_RATE,
            wall_s=round(self._wall_s, 3),
            speed=round(self._speed, 2),
            words=self._transcript.words,
            accounting=final.accounting,
        )

    def _end(self, code: int) -> int:
        """Write the last word; an error only where the run had none."""
        try:
            if self._began:
                self._transcript.end()
        except (ConfigError, OSError) as error:
            if code == 0:
                self._on_log("supervisor", "error", str(error))
            return code or 1
        return code

    def _on_log(self, stage: str, level: LogLevel, message: str) -> None:
        if level != "info":
            prefix = "pipeline" if stage == "supervisor" else stage
            self._console.print(f"{prefix}: {message}", style={"warning": "yellow", "error": "red"}[level])

    def _on_turn(self) -> None:
        running_ns = self._supervisor.running_ns
        if running_ns is None:
            return
        if not self._began:
            self._began = True
            self._transcript.begin()
            name = Path(self._config.capture.input.removeprefix("file:")).name
            self._progress.update(self._task, description=name, total=_duration_s(self._config))
        self._audio_s = self._supervisor.played_s
        self._wall_s = (now_ns() - running_ns) / NS_PER_S
        self._progress.update(self._task, completed=self._audio_s, speed=f"{self._speed:.1f} times real time")

    @property
    def _speed(self) -> float:
        return self._audio_s / self._wall_s if self._wall_s else 0.0


def _duration_s(config: Config) -> float | None:
    """How long the input is, in seconds, if its header says so. Only a progress bar asks."""
    import soundfile

    with contextlib.suppress(OSError, soundfile.LibsndfileError):
        return float(soundfile.info(config.capture.input.removeprefix("file:")).duration)
    return None
