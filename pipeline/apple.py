"""What matters on Apple silicon alone. On any other system nothing here does anything.

Untried: everything was written and tested on Linux, with `sysctl` and the C library faked, and has not run on a Mac.
Each item rests on what others measured there; the source is named beside it.
"""

import ctypes
import sys
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.topology import SAMPLE_RATE

_SYSCTL_S: Final = 5
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_NS_PER_S: Final = 1_000_000_000


def is_macos() -> bool:
    """Whether this is macOS."""
    return sys.platform == "darwin"


def sysctl(name: str) -> str | None:
    """What the system says of itself under `name`; None where it is not macOS, or there is no such name."""
    if not is_macos():
        return None
    import subprocess

    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=_SYSCTL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# Wired memory. macOS may take the weights out of the GPU's reach, and a step then waits until they are back. MLX keeps
# in reach what mx.set_wired_limit allows (macOS 15 and later), and refuses a limit above the system's own.

_DEFAULT_SHARE: Final = 2 / 3
"""Of all memory, what a GPU may hold where iogpu.wired_limit_mb is 0: as Metal tells on machines of up to 32 GB
(10,923 MiB of 16,384); larger ones allow three quarters."""

_SLACK_BYTES: Final = _GIB // 4
"""For what a step computes in between, and the codec."""

_SYSTEM_BYTES: Final = _GIB
"""Left to the system whatever limit it was given: MLX asks for less than all."""


def wired_limit_bytes(need_bytes: int) -> int | None:
    """How many bytes to wire for a model and its cache of `need_bytes`; None where nothing is to be wired.

    What is needed and a little more, at most what the system allows.
    """
    memory, limit_mib = _number("hw.memsize"), _number("iogpu.wired_limit_mb")
    if memory is None:
        return None
    allowed = limit_mib * _MIB if limit_mib else int(memory * _DEFAULT_SHARE)
    bytes_ = min(need_bytes + _SLACK_BYTES, allowed, memory - _SYSTEM_BYTES)
    return bytes_ if bytes_ > 0 else None


def _number(name: str) -> int | None:
    found = sysctl(name)
    return int(found) if found is not None and found.isdecimal() else None


# Keeping warm. Metal unwires a process's memory after about 1 s without work, residency sets or not, and the next step
# pays for it: llama.cpp, issue 10119 and pull request 17766, whose remedy asks again every half second, for 3 minutes.

_WARM_NS: Final = _NS_PER_S // 2
_GIVE_UP_NS: Final = 180 * _NS_PER_S


class KeepWarm:
    """Tells when a tiny piece of GPU work is due, so that the next frame finds the weights where they were.

    While frames come nothing is due: they are work enough. After 3 minutes without one it gives up, to spare batteries.
    """

    def __init__(self, now_ns: int) -> None:
        self.on_frame(now_ns)

    def on_frame(self, now_ns: int) -> None:
        """A frame was answered at `now_ns`, on the monotonic clock."""
        self._frame_ns = self._work_ns = now_ns

    def is_due(self, now_ns: int) -> bool:
        """Whether to do such a piece of work now; it is taken to be done then. Always False but on macOS."""
        if not is_macos() or now_ns - self._work_ns < _WARM_NS or now_ns - self._frame_ns > _GIVE_UP_NS:
            return False
        self._work_ns = now_ns
        return True


# Threads. macOS has no priorities for ordinary threads but classes of service; the lowest run on the slow cores alone.

_USER_INTERACTIVE: Final = 0x21
"""QOS_CLASS_USER_INTERACTIVE of <sys/qos.h>, the highest."""


def raise_thread() -> bool:
    """Put the calling thread into the highest class of service; False where that is not macOS, or refused.

    A thread can do this only for itself. CoreAudio's own, which call back, are real-time already.
    """
    if not is_macos():
        return False
    try:
        return int(ctypes.CDLL(None).pthread_set_qos_class_self_np(_USER_INTERACTIVE, 0)) == 0
    except (AttributeError, OSError):
        return False


# Microphones. A program without permission is not refused: it is given zeros.

_ZEROS: Final = round(2.5 * SAMPLE_RATE)
"""Samples. A real microphone has noise in its lowest bits, but a wireless one may need a second or two to begin."""

MICROPHONE_ADVICE: Final = (
    "the microphone gives nothing but zeros: permit it in System Settings > Privacy & Security > Microphone to the "
    "program that runs this terminal, end that program and begin again"
)


class MicrophoneWatch:
    """Notices a device that gives nothing but zeros from its start on. A file, a tone or silence may."""

    def __init__(self, spec: str) -> None:
        self._watching = is_macos() and spec.partition(":")[0] == "device"
        self._zeros = 0

    def take(self, samples: npt.NDArray[np.float32]) -> None:
        """Look at what the device gave; in its thread."""
        if self._watching and self._zeros < _ZEROS:
            self._watching = not samples.any()
            self._zeros += len(samples)

    def warns(self) -> bool:
        """Whether to warn now: once, after 2.5 s of zeros."""
        due = self._watching and self._zeros >= _ZEROS
        if due:
            self._watching = False
        return due


# Default devices. PortAudio stays with the device that was the default when it was opened.

_SYSTEM_OBJECT: Final = 1
"""kAudioObjectSystemObject of <CoreAudio/AudioHardware.h>."""

_DEFAULT_SELECTORS: Final = {"input": b"dIn ", "output": b"dOut"}
"""kAudioHardwarePropertyDefaultInputDevice and kAudioHardwarePropertyDefaultOutputDevice."""

_SCOPE_GLOBAL: Final = b"glob"
_COREAUDIO: Final = "/System/Library/Frameworks/CoreAudio.framework/CoreAudio"
_LOOK_NS: Final = _NS_PER_S


class _Address(ctypes.Structure):
    """AudioObjectPropertyAddress."""

    _fields_ = (("selector", ctypes.c_uint32), ("scope", ctypes.c_uint32), ("element", ctypes.c_uint32))


def default_device(kind: str) -> int | None:
    """CoreAudio's number of the default `input` or `output`; None where there is none, or it is not macOS."""
    if not is_macos():
        return None
    address = _Address(int.from_bytes(_DEFAULT_SELECTORS[kind]), int.from_bytes(_SCOPE_GLOBAL), 0)
    device = ctypes.c_uint32()
    size = ctypes.c_uint32(ctypes.sizeof(device))
    try:
        ask = ctypes.CDLL(_COREAUDIO).AudioObjectGetPropertyData
    except (AttributeError, OSError):
        return None
    failed = ask(_SYSTEM_OBJECT, ctypes.byref(address), 0, None, ctypes.byref(size), ctypes.byref(device))
    return None if failed else device.value or None


class DefaultWatch:
    """Notices, within a second, that another device has become the default `input` or `output`. Never but on macOS.

    Untried, as all of this module is. Other systems move a stream to the new default by themselves.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._device = default_device(kind)
        self._look_ns = 0

    def has_changed(self, now_ns: int) -> bool:
        """Whether there is a default, and it is not the one that was found when this was made."""
        if now_ns < self._look_ns:
            return False
        self._look_ns = now_ns + _LOOK_NS
        found = default_device(self._kind)
        return found is not None and found != self._device
