"""Wake-ups between processes: a named pipe that a writer rings and a reader waits on with poll().

Ringing never blocks: a pipe that is full wakes its reader anyway. The reader looks at the ring, not at how often the
bell rang, so that a lost or a surplus wake-up changes nothing but the moment.
"""

import contextlib
import os
from pathlib import Path

_DRAIN = 4_096


class Bell:
    """One end of the named pipe at `path`, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Both directions, so that neither side waits for the other to open and neither sees its end.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """For poll(): readable when the bell was rung since `clear`."""
        return self._fd

    def ring(self) -> None:
        """Wake the reader."""
        # Not contextlib.suppress: in a process that has just woken it takes longer than the call itself.
        try:
            os.write(self._fd, b"\0")
        except BlockingIOError:
            return

    def clear(self) -> None:
        """Forget the rings so far. Look at what the bell announces after this, not before."""
        try:
            os.read(self._fd, _DRAIN)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close this end; the pipe stays."""
        os.close(self._fd)
