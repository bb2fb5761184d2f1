"""What a stage does to itself where the settings' section `faults` permits it."""

import ctypes
import signal
from typing import Final, Literal

HANG: Final = signal.SIGUSR2
"""The signal on which a stage hangs that may be made to."""

_LONG_S: Final = 3_600


def hang_on_signal(how: Literal["lock", "loop"]) -> None:
    """From now on HANG makes the main thread of this process hang for ever, with the interpreter's lock or without."""
    signal.signal(HANG, lambda *_: _HANGS[how]())


def _keep_the_lock() -> None:
    sleep = ctypes.PyDLL(None).sleep  # PyDLL calls without letting go of the lock
    while True:
        sleep(_LONG_S)


def _turn() -> None:
    while True:
        pass


_HANGS: Final = {"lock": _keep_the_lock, "loop": _turn}
