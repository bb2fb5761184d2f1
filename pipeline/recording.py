"""The recorder as the supervisor sees it: started when a recording is asked for, and heard of until it is closed."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from pipeline.commands import Asked, Requests
from pipeline.messages import Record, RecordingRecord

BEGIN_S = 8.0
"""How long a recorder may take to begin."""

CLOSE_S = 8.0
"""How long a recorder may take to close its file."""


class Recording:
    """At most one recording at a time, each in a process of its own.

    `launch` starts the recorder, for a file, from a position in the capture ring on; `stop` orders it to end.
    """

    def __init__(
        self,
        requests: Requests,
        launch: "Callable[[Path, int], subprocess.Popen[bytes]]",
        stop: Callable[[], None],
        publish: Callable[[RecordingRecord], None],
    ) -> None:
        self._requests = requests
        self._launch = launch
        self._stop = stop
        self._publish = publish
        self._popen: subprocess.Popen[bytes] | None = None
        self._path = Path()
        self._record: RecordingRecord | None = None
        self._begins: Asked | None = None
        self._ends: Asked | None = None
        self._leaving = False

    @property
    def path(self) -> str | None:
        """The file that is being written."""
        return self._record.path if self._record is not None else None

    @property
    def up(self) -> bool:
        """Whether there is a recorder."""
        return self._popen is not None

    def carry_out(self, asked: Asked, command: Record, position: int) -> None:
        """Begin from `position` in the capture ring on, or end."""
        if command.on:
            self._begin(asked, command.path, position)
        elif not self.up or self._leaving:
            self._requests.refuse(asked, "record on = false: nothing is being recorded")
        elif self._begins is not None or self._ends is not None:
            self._requests.refuse(asked, "record on = false: the recording is just beginning or ending")
        else:
            self._ends = asked
            self._requests.wait(asked, "recorder", CLOSE_S)
            self._stop()

    def _begin(self, asked: Asked, path: str | None, position: int) -> None:
        if not path or "\0" in path:
            self._requests.refuse(asked, "record: path is not given: expected the name of a sound file to write")
        elif self.up and not self._leaving:
            self._requests.refuse(asked, f"record on = true: {self._path} is being recorded; end that first")
        else:
            self._reap()
            self._path = Path(path).absolute()
            self._leaving = False
            self._begins = asked
            self._requests.wait(asked, "recorder", BEGIN_S)
            self._popen = self._launch(self._path, position)

    def _reap(self) -> None:
        """A recorder that has closed its file has nothing left to do."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            self._popen = None

    def said(self, record: RecordingRecord) -> None:
        """The recorder has begun, or closed its file."""
        begins, ends = self._begins, self._ends
        self._begins = self._ends = None
        self._record = record if record.on else None
        self._leaving = not record.on
        if record.on and (begins is None or begins.answered):
            self._stop()  # it was given up: nobody knows of it
        for asked in (begins, ends):
            if asked is not None:
                asked.recording = record
        if begins is not None:
            ended = "" if record.on else record.error or "the recording has ended"
            self._requests.carried_out(begins, "recorder", record.frame, ended)
        if ends is not None:
            self._requests.carried_out(ends, "recorder", record.frame, record.error)

    def see_death(self, time_ns: int, how: Callable[[int], str]) -> None:
        """If the recorder is gone and did not say so itself, say it."""
        if self._popen is None or self._popen.poll() is None:
            return
        code, self._popen = self._popen.returncode, None
        begun = self._record
        if begun is not None or self._begins is not None or self._ends is not None:
            transcript = begun.transcript if begun is not None else ""
            frame = begun.frame if begun is not None else -1
            record = RecordingRecord(
                path=str(self._path),
                transcript=transcript,
                on=False,
                frame=frame,
                error=f"recorder {how(code)}",
                time_ns=time_ns,
            )
            self.said(record)
            self._publish(record)

    def close(self, patience_s: float) -> None:
        """End the recording with the run."""
        if self._popen is not None and self._popen.poll() is None:
            self._stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(patience_s)
            if self._popen.poll() is None:
                self._popen.kill()
                self._popen.wait()
