"""What every stage's program shares: its arguments, its line to the supervisor, its main loop and its end.

A stage is started by the supervisor, or by hand for debugging:

    python -m procs.capture --name dev --set capture.input=tone:440

By hand, the first stage of a name makes the rings, the others join, each runs until Ctrl-C, the last one clears up.
"""

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline import config as settings
from pipeline.bell import Bell
from pipeline.config import Config
from pipeline.control import HasFileno, StageLink
from pipeline.errors import EXIT_REFUSED, DeviceLostError, PipelineError
from pipeline.faults import hang_on_signal
from pipeline.messages import (
    Acknowledged,
    AnyCommand,
    Apply,
    Finish,
    Heartbeat,
    LogLevel,
    LogRecord,
    Report,
    StageRecord,
    StageState,
    Start,
    Stop,
)
from pipeline.ring import Ring
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_MS, now_ns, promote_thread
from pipeline.topology import FRAME_MS, RINGS, SAMPLE_RATE, StageName

EXIT_FATAL: Final = EXIT_REFUSED
"""Exit code of a stage that cannot work with the settings, device or model it was given: not to be restarted."""

EXIT_LOST: Final = 3
"""Exit code of a stage that its sound system has hung up: to be started again."""

_WITH_CALLBACK: Final = frozenset({"capture", "playback"})
"""Stages whose main thread shares the interpreter's lock with a device's callback: where another program took the
processor from the one that has the lock, the other would wait for it."""

_TICK_S: Final = 2 * FRAME_MS / 1_000
"""How often a stage looks around that nothing wakes: what it reports of two frames goes out together."""

HEARTBEAT_S: Final = 1.0
"""How often a stage says that it lives."""

SHOW_STACKS: Final = signal.SIGUSR1
"""The signal on which a stage writes where each of its threads is to its log, whatever it is stuck in."""

_SWITCH_S: Final = 0.0005
"""How long the main thread may keep the interpreter from the audio thread: a tenth of a block, not all of it."""


class Context:
    """What a stage is given: settings, rings, the bell of the capture ring, and a way to report."""

    def __init__(self, config: Config, folder: RunFolder, link: StageLink, stage: StageName) -> None:
        self.config = config
        self.stage = stage
        self._link = link
        self.rings = {spec.name: Ring.open(folder.segment(spec.name), config.ring_seconds) for spec in RINGS}
        self.bell = Bell(folder.bell("capture"))

    def report(self, report: Report) -> None:
        """Tell the supervisor; never waits, but offline, where no word may be lost."""
        self._link.report(report)

    def log(self, level: LogLevel, message: str) -> None:
        """Say one line to people."""
        self.report(LogRecord(stage=self.stage, level=level, message=message, time_ns=now_ns()))

    def close(self) -> None:
        """Let go of the rings and the bell."""
        self.bell.close()
        for ring in self.rings.values():
            # A view of the ring that still lives somewhere keeps it mapped until the process ends, moments later.
            with contextlib.suppress(BufferError):
                ring.close()


class Stage(Protocol):
    """One duty: opened once, then started, worked and stopped by the loop below."""

    @property
    def detail(self) -> str:
        """A name for the device that it has, or the model."""

    def open(self) -> None:
        """Take the device, or load the model. Raises PipelineError."""

    def start(self) -> None:
        """Begin to move samples."""

    def work(self) -> bool:
        """Do what there is to do, a frame's worth at most; True if there may be more at once."""

    def finish(self) -> None:
        """End the stream here: what was taken so far is to be answered."""

    def apply(self, command: AnyCommand) -> int:
        """Carry out a command; returns the microphone frame from which on it has effect.

        Raises PipelineError where it cannot be carried out and all is as it was, DeviceLostError where it is not.
        """

    def stop(self) -> None:
        """Let go of everything. Called once, also when `open` failed."""

    def device_latency_ms(self) -> float:
        """What the device reports as its own latency."""

    def wakes(self) -> HasFileno | None:
        """What is readable when there is work that cannot wait for the next look around."""


class _Leave(BaseException):
    """A signal to leave, while a stage is being opened."""


class _Pulse(threading.Thread):
    """Says that the interpreter lives, and for how long the main loop has been at one turn, on a line of its own."""

    def __init__(self, worker: "_Worker", folder: RunFolder) -> None:
        super().__init__(name="pulse", daemon=True)
        self._worker = worker
        self._folder = folder
        self._over = threading.Event()

    def run(self) -> None:
        if self._worker.has_callback:
            promote_thread(below=True)
        link = StageLink(self._folder.stages, f"{self._worker.name}.pulse")
        while not self._over.wait(HEARTBEAT_S):
            link.report(self._worker.heartbeat())
        link.abandon()
        link.close()

    def stop(self) -> None:
        """End it, and its line."""
        self._over.set()
        self.join()


class _Worker:
    """One stage's life."""

    def __init__(self, name: StageName, stage: Stage, context: Context, link: StageLink, alive: int | None) -> None:
        self.name = name
        self._stage = stage
        self._context = context
        self._link = link
        self._alive = alive
        self._turned_ns = now_ns()
        self._device_latency_ms = 0.0
        self._leaving = False
        self._opening = True
        self._running = False
        self._detail = ""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> int:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        # Ctrl-C is the supervisor's to handle; by hand there is none.
        signal.signal(signal.SIGINT, signal.SIG_IGN if self._alive is not None else self._on_signal)
        code = 0
        try:
            self._say("starting")
            self._stage.open()
            self._detail = self._stage.detail
            self._opening = False
            # What was made so far lives as long as the process: not to be looked at again by a collection,
            # and there is nothing in the loop that makes cycles.
            gc.collect()
            gc.freeze()
            gc.disable()
            sys.setswitchinterval(_SWITCH_S)
            self._say("ready")
            if self._alive is None:
                self._start()
            self._loop()
        except _Leave:
            pass
        except DeviceLostError as error:
            self._context.log("warning", str(error))
            code = EXIT_LOST
        except PipelineError as error:
            self._detail = str(error)
            self._say("fatal")
            code = EXIT_FATAL
        except Exception as error:
            traceback.print_exc()
            self._context.log("error", f"{type(error).__name__}: {error}")
            code = 1
        finally:
            self._opening = False
            self._stage.stop()
            if code == 0:
                self._say("stopped")
        return code

    def heartbeat(self) -> Heartbeat:
        """What the pulse tells; in its thread."""
        return Heartbeat(
            stage=self.name,
            busy_ms=(now_ns() - self._turned_ns) / NS_PER_MS,
            device_latency_ms=self._device_latency_ms,
            lost_reports=self._link.lost,
        )

    def _on_signal(self, *_: object) -> None:
        self._leaving = True
        if self._opening:
            raise _Leave

    def _say(self, state: StageState) -> None:
        self._context.report(
            StageRecord(
                stage=self.name,
                state=state,
                detail=self._detail,
                device_latency_ms=self._stage.device_latency_ms(),
                pid=os.getpid(),
                time_ns=now_ns(),
            )
        )
        if self._alive is None:
            print(f"{self.name}: {state}{': ' if self._detail else ''}{self._detail}", file=sys.stderr)

    @property
    def has_callback(self) -> bool:
        """Whether a device's thread waits for the interpreter's lock together with those of this process."""
        return self.name in _WITH_CALLBACK and not self._context.config.offline

    def _start(self) -> None:
        self._stage.start()
        if self.has_callback:
            promote_thread(below=True)
        self._running = True
        self._say("running")

    def _apply(self, order: Apply) -> None:
        """Carry out a command, or say why not. One that came too late was refused already, and is not carried out."""
        request = order.request
        if order.until_ns is not None and now_ns() > order.until_ns:
            self._context.report(Acknowledged(request=request, frame=-1, error="it came too late"))
            return
        try:
            frame = self._stage.apply(order.command)
        except PipelineError as error:
            self._context.report(Acknowledged(request=request, frame=-1, error=str(error)))
            if isinstance(error, DeviceLostError):
                raise
            return
        self._tell_detail()
        self._context.report(Acknowledged(request=request, frame=frame))

    def _tell_detail(self) -> None:
        """Say what the stage works with, if that is another than was said last."""
        if self._running and self._stage.detail != self._detail:
            self._detail = self._stage.detail
            self._say("running")

    def _loop(self) -> None:
        link = self._link
        sources = [source for source in (self._stage.wakes(), _Descriptor(self._wake_read)) if source is not None]
        if self._alive is not None:
            sources.append(_Descriptor(self._alive))
        for source in sources:
            link.watch(source)
        more = False
        while not self._leaving:
            if self._alive in link.wait(0 if more else _TICK_S):  # the supervisor is gone
                self._link.abandon()
                return
            self._turned_ns = now_ns()
            for order in link.orders():
                match order:
                    case Start():
                        self._start()
                    case Finish():
                        self._stage.finish()
                    case Apply():
                        self._apply(order)
                    case Stop():
                        return
            more = self._running and self._stage.work()
            self._tell_detail()
            self._device_latency_ms = self._stage.device_latency_ms()


class _Descriptor:
    """A bare file descriptor, for something that waits on objects."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


def _overrides(pairs: list[str]) -> Iterator[tuple[str, Any]]:
    for pair in pairs:
        key, _, value = pair.partition("=")
        number = value.removeprefix("-").replace(".", "", 1).isdigit()
        yield key, (float(value) if "." in value else int(value)) if number else value


def main(name: StageName, make: Callable[[Context], Stage]) -> None:
    """The program of stage `name`: reads the arguments, runs the stage that `make` makes, and exits."""
    parser = argparse.ArgumentParser(prog=f"python -m procs.{name}", description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="default", help="the run's name")
    parser.add_argument("--config", type=Path, help="settings, by default run.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--supervised", type=int, metavar="FD", help="started by the supervisor, which holds FD's end")
    arguments = parser.parse_args()
    alive: int | None = arguments.supervised
    try:
        folder = RunFolder(arguments.name)
        if alive is None:
            config = settings.load(arguments.config, dict(_overrides(arguments.set)))
            folder.lock(shared=True)
        else:
            config = settings.decode(folder.settings.read_bytes())
        link = StageLink(folder.stages, name, alive if config.offline else None)
        context = Context(config, folder, link, name)
    except PipelineError as error:
        sys.exit(f"{name}: {error}")
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS, chain=False)
    if config.faults.hang is not None:
        hang_on_signal(config.faults.hang)
    worker = _Worker(name, make(context), context, link, alive)
    pulse = _Pulse(worker, folder)
    if alive is not None:
        pulse.start()
    try:
        code = worker.run()
    finally:
        if alive is not None:
            pulse.stop()
        context.close()
        link.close()
        if alive is None:
            folder.leave()
    # Threads of audio libraries may outlive their streams; nothing is left to wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def samples_of(milliseconds: float) -> int:
    """How many samples a duration is."""
    return round(milliseconds * SAMPLE_RATE / 1_000)
