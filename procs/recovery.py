"""The device that a stage holds: one that is lost is opened again in place, and the stage goes on meanwhile."""

import gc
import threading
from collections.abc import Callable
from typing import Final

from pipeline.errors import DeviceError, DeviceLostError
from pipeline.timing import NS_PER_S, now_ns
from pipeline.worker import Context
from procs import devices
from procs.devices import Absent, DefaultChangedError, Device, Unopened

TRY_S: Final = 0.3
"""How long after a vain attempt to open a device the next one is made."""

LATER_S: Final = 0.9
"""The same after a minute without one: each look for devices costs PortAudio 12 kB that it never gives back."""

_SOON_S: Final = 60.0

HANGS_S: Final = 30.0
"""How long the sound system may take over one call; then the stage has to be started again."""

_CANCEL_S: Final = 2.5
"""How long a command waits for an attempt that is under way."""

_CLOSE_S: Final = 0.5
"""The same at the stage's end."""

Open = Callable[[], Device]


class _Recovery:
    """Lets go of a lost device, and then tries until one opens and runs; on a thread, as a dead sound system may block.

    `begin` is called between opening and starting, while no device calls back.
    """

    def __init__(self, lost: Device, open_: Open, begin: Callable[[], None]) -> None:
        self.what = lost.detail
        self._open = open_
        self._begin = begin
        self._leave = threading.Event()
        self._device: Device | None = None
        self._error: Exception | None = None
        self._began_ns = self._turned_ns = now_ns()
        self._thread = threading.Thread(target=self._run, args=(lost,), name="recovery", daemon=True)
        self._thread.start()

    def _run(self, lost: Device) -> None:
        device = None
        try:
            lost.stop()
            while not self._leave.is_set() and (device := self._try()) is None:
                self._leave.wait(TRY_S if now_ns() - self._began_ns < _SOON_S * NS_PER_S else LATER_S)
            self._device = device
        except Exception as error:  # whatever it is, the stage has to hear of it
            self._error = error

    def _try(self) -> Device | None:
        self._turned_ns = now_ns()
        try:
            devices.renew()
            device = self._open()
        except DeviceError:
            # A stream that did not open is part of a cycle, and the collector is off. Now it disturbs nobody.
            gc.collect()
            return None
        return self._started(device)

    def _started(self, device: Device) -> Device | None:
        try:
            if not self._leave.is_set():
                self._begin()
                device.start()
                return device
        except DeviceError:
            pass
        device.stop()
        return None

    @property
    def detail(self) -> str:
        return f"{self.what} lost: waiting for it"

    def look(self) -> Device | None:
        """The device, once it runs. Raises DeviceLostError where the sound system hangs."""
        if self._error is not None:
            raise self._error
        if self._device is None and now_ns() - self._turned_ns > HANGS_S * NS_PER_S:
            raise self._hangs()
        return self._device

    def cancel(self) -> Device | None:
        """Try no more; returns the device if it runs. Raises DeviceLostError where the sound system hangs."""
        self._leave.set()
        self._thread.join(_CANCEL_S)
        if self._thread.is_alive():
            raise self._hangs()
        return self._device

    def close(self) -> None:
        """Try no more, and let go of the device if it runs."""
        self._leave.set()
        self._thread.join(_CLOSE_S)
        if self._device is not None:
            devices.let_go(self._device)

    def _hangs(self) -> DeviceLostError:
        return DeviceLostError(f"{self.what}: the sound system does not answer")


class Held:
    """A stage's one device.

    name: `input` or `output`. open_: opens what the stage is to have, and raises DeviceError where it cannot.
    begin: lets the stream begin anew; called before a device starts that takes the place of a lost one, while none
    calls back, and perhaps in another thread. leave: called before a device is given up that still works.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        open_: Open,
        begin: Callable[[], None],
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.device: Device = Unopened()
        self._context = context
        self._name = name
        self._open = open_
        self._begin = begin
        self._leave = leave
        self._recovery: _Recovery | None = None
        self._lost_ns: int | None = None

    @property
    def detail(self) -> str:
        """A name for the device, also while it is away."""
        return self.device.detail if self._recovery is None else self._recovery.detail

    @property
    def works(self) -> bool:
        """Whether the device is there, and runs."""
        return self._recovery is None and self.device.failure() is None

    def open(self, spec: str, *, wait: bool) -> None:
        """Open it. With `wait`, one of the sound system's may be away. Raises DeviceError."""
        try:
            self.device = self._open()
        except DeviceError as error:
            if not wait or spec.partition(":")[0] != "device":
                raise
            self.device = Absent(f"{self._name} {spec}", error)

    def start(self) -> None:
        """Begin to move samples. Raises DeviceError, but not where the device is lost."""
        try:
            self.device.start()
        except DeviceLostError as error:
            self.device.stop()
            self.device = Absent(self.device.detail, error)

    def failure(self) -> DeviceError | None:
        """Look after the device; returns why it has stopped, if to wait for it is of no use.

        Raises DeviceLostError where the sound system hangs.
        """
        if self._recovery is not None:
            if (device := self._recovery.look()) is not None:
                self._recovery = None
                self.take(device)
        elif (failure := self.device.failure()) is not None:
            if not isinstance(failure, DeviceLostError):
                return failure
            self._lose(failure)
        return None

    def _lose(self, why: DeviceLostError) -> None:
        if self._lost_ns is None:
            self._lost_ns = now_ns()
            self._context.log("warning", f"{why}; waiting for it")
        if isinstance(why, DefaultChangedError):
            self._leave()
        lost, self.device = self.device, Unopened()
        self._recovery = _Recovery(lost, self._open, self._begin)

    def take(self, device: Device) -> None:
        """Have this device, which runs, from now on."""
        self.device = device
        if self._lost_ns is not None:
            away_s, self._lost_ns = (now_ns() - self._lost_ns) / NS_PER_S, None
            self._context.log("info", f"{self._name} {device.detail}: runs, after {away_s:.1f} s without one")

    def settle(self) -> None:
        """One that is away is waited for no more, until `failure` is asked again: another device is to be opened.

        Raises DeviceLostError where the sound system hangs.
        """
        recovery, self._recovery = self._recovery, None
        if recovery is not None:
            self._end(recovery)
        if not devices.is_portaudio(self.device):
            devices.renew()

    def _end(self, recovery: _Recovery) -> None:
        if (device := recovery.cancel()) is None:
            self.device = Absent(recovery.what, DeviceLostError(f"{self._name} {recovery.what} is lost"))
        else:
            self.take(device)

    def open_other(self, spec: str, open_: Open, *, present: bool = False) -> Device:
        """Open another device, which may have been put in since the last look for devices. Raises DeviceError.

        To look anew takes the present one away for a moment, so it is done only for one that is there, or where it is
        the `present` one itself that is wanted otherwise and cannot be had twice.
        """
        self.settle()
        try:
            return open_()
        except DeviceError:
            gc.collect()  # as in recovery
            if not (devices.is_portaudio(self.device) and (present or devices.is_found_anew(self._name, spec))):
                raise
        self._leave()
        self.device.stop()
        self.device = Absent(self.device.detail, DeviceLostError(f"{self._name} {self.device.detail}: given up"))
        devices.renew()
        return open_()

    def let_go(self) -> None:
        """Stop the device, so that another can take its place."""
        self.device.stop()
        if isinstance(self.device, Absent):
            self._begin()

    def take_back(self, why: DeviceError) -> None:
        """Open again what was let go of, because another device did not start. Raises DeviceError, which says so."""
        try:
            device = self._open()
            device.start()
        except DeviceError as error:
            self.device = Absent(self.device.detail, error)
            raise DeviceError(f"{why}; and then {error}") from None
        self.take(device)
        raise DeviceError(str(why)) from None

    def close(self) -> None:
        """Let go of everything, and wait for a sound system that hangs no longer than a moment."""
        recovery, self._recovery = self._recovery, None
        if recovery is not None:
            recovery.close()
        devices.let_go(self.device)
