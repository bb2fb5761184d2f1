"""The supervisor: makes the rings, starts the stages, routes commands, and sees to it that nothing is left behind.

One loop is the program: it sleeps until a signal, a command, a stage's report or a deadline. It moves no audio.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import psutil

from pipeline import accounting, messages
from pipeline import config as settings
from pipeline.bell import Bell
from pipeline.config import Config
from pipeline.control import Hub
from pipeline.errors import PipelineError
from pipeline.messages import (
    Accounting,
    Acknowledged,
    AnyCommand,
    Apply,
    Finish,
    Finished,
    Heartbeat,
    LogLevel,
    LogRecord,
    Mute,
    Reply,
    RunState,
    Shutdown,
    StageRecord,
    StageState,
    StageStatus,
    Start,
    Status,
    StatusReport,
    Stop,
    TextRecord,
    Timing,
    TimingRecord,
    Unmute,
)
from pipeline.ring import Ring
from pipeline.runtime import RunFolder, private
from pipeline.timing import NS_PER_MS, NS_PER_S, Durations, now_ns
from pipeline.topology import FRAME_MS, PROCESSES, RINGS, SAMPLE_RATE, Process, StageName

EXIT_REFUSED: Final = 2
"""Exit code where nothing was begun: the command, a setting, a device or a model is wrong."""

STOP_S: Final = 1.2
"""How long stages may take to end in good order before they are killed."""

DRAIN_S: Final = 5.0
"""How long after the end of the input it may be until the next frame is answered or played."""

ANSWER_S: Final = 2.0
"""How long a stage may take to acknowledge a command."""

RESTARTS_MAX: Final = 8
"""Restarts of one stage, with no healthy time between them, after which the run is given up."""

HEALTHY_S: Final = 120.0
"""A stage that was ready for so long before it died begins its restarts anew."""

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_LAST_S: Final = 32.0

_ORPHANS_S: Final = 2.0
_IDLE_S: Final = 1.0
_MEBI: Final = 1 << 20

Launch = Callable[[Process, RunFolder, int], "subprocess.Popen[bytes]"]


def launch(process: Process, folder: RunFolder, alive: int) -> "subprocess.Popen[bytes]":
    """Start a stage. `alive` is a pipe's read end: it closes when this process ends, however it ends."""
    # -P: what lies in the folder that the user happens to be in is not to be imported.
    command = [sys.executable, "-P", "-m", process.module, "--name", folder.name, "--supervised", str(alive)]
    with open(folder.log(process.name), "ab", opener=private) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(alive,),
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            env=os.environ | {"PIPELINE_RUNTIME_DIR": str(folder.path.parent)},
        )


@dataclass
class _StageProcess:
    """What the supervisor knows of one stage."""

    process: Process
    state: StageState = "starting"
    popen: "subprocess.Popen[bytes] | None" = None
    restarts: int = 0
    strikes: int = 0
    ready_ns: int = 0
    restart_at_ns: int = 0
    detail: str = ""
    device_latency_ms: float = 0.0
    lost_reports: int = 0
    finished: bool = False
    was_ready: bool = False
    was_running: bool = False
    """Since its last start."""
    durations: Durations = field(default_factory=Durations)

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def status(self) -> StageStatus:
        status = StageStatus(
            state=self.state,
            pid=self.popen.pid if self.popen is not None and self.alive else None,
            restarts=self.restarts,
            detail=self.detail,
            device_latency_ms=self.device_latency_ms,
            lost_reports=self.lost_reports,
        )
        if status.pid is not None:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(status.pid)
                status.memory_mb = process.memory_info().rss / _MEBI
                times = process.cpu_times()
                status.cpu_s = times.user + times.system
        return status


@dataclass
class _Waiting:
    """A client whose command a stage is carrying out."""

    address: list[bytes]
    command: AnyCommand
    verb: str
    stage: StageName
    until_ns: int

    def reply(self, acknowledged: Acknowledged) -> Reply:
        frame, error = acknowledged.frame, acknowledged.error
        return Reply(ok=not error, verb=self.verb, stage=self.stage, frame=frame, error=error)

    def refusal(self, why: str) -> Reply:
        return Reply(ok=False, verb=self.verb, stage=self.stage, error=why)


class Supervisor:
    """One run, from `run` to its end."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        on_text: Callable[[TextRecord], None],
        on_log: Callable[[str, LogLevel, str], None],
        on_turn: Callable[[], None] = lambda: None,
        clock: Callable[[], int] = now_ns,
        launch: Launch = launch,
    ) -> None:
        self._config = config
        self._folder = folder
        self._on_text = on_text
        self._on_log = on_log
        self._on_turn = on_turn
        self._clock = clock
        self._launch = launch
        self._state: RunState = "starting"
        self._error = ""
        self._clean = True
        self._refused = False  # by a stage, before anything began
        self._finishing = False
        self._muted = False
        self._paused = False
        self._keep_logs = False
        self._stages: dict[StageName, _StageProcess] = {p.name: _StageProcess(p) for p in PROCESSES}
        self._mic_to_speaker = Durations()
        self._drift = accounting.Drift()
        self._waiting: dict[int, _Waiting] = {}
        self._requests = 0
        self._farewells: list[list[bytes]] = []
        self._began_ns = clock()
        self._stop_at_ns: int | None = None
        self._drained_by_ns: int | None = None
        self.running_ns: int | None = None
        """When the stages were told to run, once they were."""
        self._rings: dict[str, Ring] = {}
        self._hub: Hub | None = None
        self.final: StatusReport | None = None
        """The status when the run had ended."""

    @property
    def hub(self) -> Hub:
        if self._hub is None:
            raise RuntimeError("the run has not begun")
        return self._hub

    def run(self) -> int:
        """Carry out the run; returns its exit code: 0 if it was clean.

        Raises PipelineError if the name is taken or the run cannot begin.
        """
        self._folder.lock()
        self._signal_read, self._signal_write = socket.socketpair()
        self._alive_read, self._alive_write = os.pipe()
        try:
            self._make()
            self._catch_signals()
            try:
                for stage in self._stages.values():
                    self._spawn(stage)
                while self._state != "stopping":
                    self._turn()
            finally:
                self._stop_stages()
                self.final = self.status()
                self._farewell()
        finally:
            self._clear()
        if self._config.offline and not self._refused:
            self._judge(self.final.accounting)
        if self._error:
            self._tell("supervisor", "error", self._error)
        wrong = self.final.accounting.discrepancies()
        for equation in wrong:
            self._tell("supervisor", "error", f"accounting: {equation}")
        if self._refused:
            return EXIT_REFUSED
        return 0 if self._clean and not self._error and not wrong else 1

    def _judge(self, counts: Accounting) -> None:
        """Offline, an answer of which anything is missing is an error, and how much there is belongs to it."""
        lost = counts.dropped + counts.skipped + counts.concealed
        if self._complete and not lost and not self._error:
            return
        ended = "ended before all of the input was answered"
        why = self._error or (f"{lost} samples were lost on the way" if self._complete else ended)
        if self.running_ns is None:
            self._error = why
            return
        playback = self._stages["playback"]
        path = self._config.playback.output.removeprefix("file:")
        # Only a file that was closed says how long it is.
        closed = playback.popen is not None and playback.popen.returncode == 0
        holds = f"holds only the first {counts.played / SAMPLE_RATE:.2f} s of the answer" if closed else "is not whole"
        self._error = f"{why}; {path} {holds}"

    @property
    def _complete(self) -> bool:
        """Whether everything was answered, heard, and told: inference says last that it is at the end."""
        return self._stages["inference"].finished and self._stages["playback"].finished

    # Beginning and end

    def _make(self) -> None:
        if self._folder.settings.exists():
            end_orphans(self._folder)
        self._folder.clear()
        for spec in RINGS:
            self._rings[spec.name] = Ring.create(self._folder.segment(spec.name), self._config.ring_seconds)
        Bell(self._folder.bell("capture")).close()
        with open(self._folder.settings, "wb", opener=private) as file:
            file.write(settings.encode(self._config))
        self._hub = Hub(self._folder.control, self._folder.events, self._folder.stages)
        self._hub.watch(self._signal_read)

    def _catch_signals(self) -> None:
        self._signal_write.setblocking(False)
        self._signal_read.setblocking(False)
        signal.set_wakeup_fd(self._signal_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's, and a shell's for what runs behind it
                signal.signal(number, lambda *_: self._end())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # its arrival alone wakes the loop

    def _spawn(self, stage: _StageProcess) -> None:
        stage.popen = self._launch(stage.process, self._folder, self._alive_read)
        self._set_state(stage, "starting")

    def _end(self, error: str = "") -> None:
        """Let the loop end; the first error is the run's."""
        self._state = "stopping"
        self._error = self._error or error

    def _stop_stages(self) -> None:
        for stage in self._stages.values():
            if stage.alive:
                self.hub.order(stage.process.name, Stop())
                # A stage that is loading a model reads no orders.
                if stage.state == "starting" and stage.popen is not None:
                    stage.popen.terminate()
        until_ns = self._clock() + round(STOP_S * NS_PER_S)
        while any(stage.alive for stage in self._stages.values()):
            left_s = (until_ns - self._clock()) / NS_PER_S
            if left_s <= 0:
                break
            self._wait(left_s)
            self._read_reports()
            self._read_commands()
        self._read_reports()
        for stage in self._stages.values():
            if stage.popen is None:
                continue
            unready = stage.state == "starting"  # and has nothing that it could lose
            killed = stage.alive
            if killed:
                stage.popen.kill()
            code = stage.popen.wait()
            if code and not unready and not self._error and stage.state != "backoff":
                self._clean = False
                how = f"did not stop within {STOP_S:g} s and was killed" if killed else _how_it_ended(code)
                self._log("error", f"{stage.process.name} {how}")
            if stage.state != "fatal":
                self._set_state(stage, "stopped")
        self._state = "stopped"

    def _farewell(self) -> None:
        for waiting in self._waiting.values():
            error = f"the run ended before {waiting.stage} acknowledged {waiting.verb}"
            self.hub.reply(waiting.address, waiting.refusal(error))
        for address in self._farewells:
            self.hub.reply(address, Reply(ok=True, verb="shutdown", status=self.final))

    def _clear(self) -> None:
        os.close(self._alive_write)
        os.close(self._alive_read)
        for stage in self._stages.values():
            if stage.popen is not None and stage.popen.poll() is None:
                stage.popen.kill()
                stage.popen.wait()
        if self._hub is not None:
            self._hub.close()
        for ring in self._rings.values():
            ring.close()
        self._folder.release(keep_logs=self._keep_logs)
        signal.set_wakeup_fd(-1)
        self._signal_read.close()
        self._signal_write.close()

    # The loop

    def _turn(self) -> None:
        self._wait(self._next_deadline_s())
        self._read_reports()
        self._read_commands()
        self._see_deaths()
        self._keep_deadlines()
        self._guarded(self._on_turn)

    def _wait(self, timeout_s: float) -> None:
        self.hub.wait(timeout_s)
        with contextlib.suppress(BlockingIOError):
            self._signal_read.recv(4_096)

    def _next_deadline_s(self) -> float:
        deadlines = [stage.restart_at_ns for stage in self._stages.values() if stage.state == "backoff"]
        deadlines += [waiting.until_ns for waiting in self._waiting.values()]
        deadlines += [at for at in (self._stop_at_ns, self._drained_by_ns) if at is not None]
        if not deadlines:
            return _IDLE_S
        return min(_IDLE_S, max(0.0, (min(deadlines) - self._clock()) / NS_PER_S))

    def _keep_deadlines(self) -> None:
        now = self._clock()
        for stage in self._stages.values():
            if stage.state == "backoff" and now >= stage.restart_at_ns:
                self._spawn(stage)
        for request, waiting in list(self._waiting.items()):
            if now >= waiting.until_ns:
                del self._waiting[request]
                error = f"{waiting.stage} did not acknowledge {waiting.verb} within {ANSWER_S:g} s"
                self.hub.reply(waiting.address, waiting.refusal(error))
        if self._stop_at_ns is not None and now >= self._stop_at_ns:
            self._stop_at_ns = None
            self._finishing = True
            self.hub.order("capture", Finish())
        # The rings know of the end even where the report of it was lost.
        if self._drained_by_ns is None and self._rings["capture"].end is not None:
            self._stage_finished("capture")
        if self._drained_by_ns is not None and now >= self._drained_by_ns:
            played = self._rings["playback"].end is not None and not self._rings["playback"].ledger().waiting
            error = f"the input has ended, but for {DRAIN_S:g} s no frame of it was answered or played"
            self._end("" if played else error)

    def _see_deaths(self) -> None:
        for stage in self._stages.values():
            if stage.popen is None or stage.alive or stage.state == "backoff" or self._state == "stopping":
                continue
            self._clean = False
            name, code = stage.process.name, stage.popen.returncode
            log = self._folder.log(name)
            said = stage.state != "fatal" and log.exists() and log.stat().st_size > 0
            self._keep_logs = self._keep_logs or said
            where = f"; its messages are in {log}" if said else ""
            how = f"{name}: {stage.detail}" if stage.state == "fatal" else f"{name} {_how_it_ended(code)}{where}"
            if not stage.was_ready:
                self._refused = stage.state == "fatal"
                self._end(how if self._refused else f"{how}, before it was ready")
            elif self._config.offline or (stage.state == "fatal" and stage.was_running):
                self._end(how)
            elif stage.strikes >= RESTARTS_MAX:
                self._set_state(stage, "fatal")
                self._end(f"{how}, after {RESTARTS_MAX} restarts")
            else:
                if self._clock() - stage.ready_ns > HEALTHY_S * NS_PER_S:
                    stage.strikes = 0
                delay_s = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2**stage.strikes)
                stage.strikes += 1
                stage.restarts += 1
                stage.restart_at_ns = self._clock() + round(delay_s * NS_PER_S)
                self._set_state(stage, "backoff")
                self._log("warning", f"{how}; it is started again in {delay_s:g} s")

    # What stages say

    def _read_reports(self) -> None:
        for data in self.hub.reports():
            try:
                report = messages.decode_report(data)
            except (msgspec.MsgspecError, RecursionError) as error:
                self._log("warning", f"a stage's report was not understood: {error}")
                continue
            if (topic := messages.topic(report)) is not None:
                self.hub.publish(topic, data)
            match report:
                case TimingRecord():
                    self._time(report)
                case StageRecord():
                    self._stage_said(report)
                case TextRecord():
                    self._guarded(self._on_text, report)
                case LogRecord(stage=stage, level=level, message=message):
                    self._clean = self._clean and level != "error"
                    self._tell(stage, level, message)
                case Acknowledged(request=request) if request in self._waiting:
                    waiting = self._waiting.pop(request)
                    if not report.error and isinstance(waiting.command, Mute | Unmute):
                        self._muted = isinstance(waiting.command, Mute)
                    self.hub.reply(waiting.address, waiting.reply(report))
                case Heartbeat(stage=name):
                    self._stages[name].device_latency_ms = report.device_latency_ms
                    self._stages[name].lost_reports = report.lost_reports
                case Finished(stage=name):
                    self._stage_finished(name)

    def _time(self, record: TimingRecord) -> None:
        duration_ms = (record.end_ns - record.start_ns) / NS_PER_MS
        if record.stage == "capture":
            duration_ms -= FRAME_MS
        self._stages[record.stage].durations.add_ms(duration_ms)
        self._keep_draining()
        if record.stage == "playback":
            self._mic_to_speaker.add_ms(record.mic_to_speaker_ms)

    def _stage_said(self, record: StageRecord) -> None:
        stage = self._stages[record.stage]
        if stage.state == "backoff":
            return  # said before it died
        if record.state in ("starting", "running"):
            stage.was_running = record.state == "running"
        stage.state = record.state
        stage.detail = record.detail
        stage.device_latency_ms = record.device_latency_ms
        if record.state != "ready":
            return
        stage.was_ready = True
        stage.ready_ns = self._clock()
        if self._state == "running":
            self._tell(record.stage, "info", f"ready again: {record.detail}")
            if record.stage == "capture" and self._muted:
                # Before Start: not one block of it is to be heard.
                self.hub.order("capture", Apply(request=0, command=Mute()))
            ending = record.stage == "capture" and (self._finishing or stage.finished)
            self.hub.order(record.stage, Finish() if ending else Start())
        elif self._state == "starting" and all(other.state == "ready" for other in self._stages.values()):
            self._state = "running"
            self.running_ns = self._clock()
            for process in PROCESSES:
                self._tell(process.name, "info", f"ready: {self._stages[process.name].detail}")
                self.hub.order(process.name, Start())
            if self._config.seconds is not None:
                self._stop_at_ns = self._clock() + round(self._config.seconds * NS_PER_S)

    def _stage_finished(self, name: StageName) -> None:
        self._stages[name].finished = True
        if self._complete if self._config.offline else name == "playback":
            self._end()
        elif name == "capture":
            self._keep_draining()

    def _keep_draining(self) -> None:
        # Offline a frame may take as long as it takes.
        if self._stages["capture"].finished and not self._config.offline:
            self._drained_by_ns = self._clock() + round(DRAIN_S * NS_PER_S)

    def _set_state(self, stage: _StageProcess, state: StageState) -> None:
        """A change that the stage cannot report itself."""
        stage.state = state
        record = StageRecord(stage=stage.process.name, state=state, detail=stage.detail, time_ns=self._clock())
        self.hub.publish(f"state.{stage.process.name}", messages.encode(record))

    def _log(self, level: LogLevel, message: str) -> None:
        record = LogRecord(stage="supervisor", level=level, message=message, time_ns=self._clock())
        self.hub.publish("log.supervisor", messages.encode(record))
        self._tell("supervisor", level, message)

    def _tell(self, stage: str, level: LogLevel, message: str) -> None:
        self._guarded(self._on_log, stage, level, message)

    def _guarded(self, callback: Callable[..., None], *values: object) -> None:
        """A terminal that is gone, or a pipe that nobody reads, ends the run in good order."""
        try:
            callback(*values)
        except PipelineError as error:
            self._end(str(error))
        except (OSError, SystemExit):
            self._end()

    # What clients ask

    def _read_commands(self) -> None:
        for address, data in self.hub.commands():
            try:
                command = messages.decode_command(data)
            except (msgspec.MsgspecError, RecursionError) as error:
                known = ", ".join(messages.VERBS)
                text = f'not a command: {error}; expected JSON such as {{"verb": "status"}}, with one of {known}'
                self.hub.reply(address, Reply(ok=False, error=text))
                continue
            self._carry_out(address, command)

    def _carry_out(self, address: list[bytes], command: AnyCommand) -> None:
        verb = type(command).__name__.lower()
        if isinstance(command, Status):
            self.hub.reply(address, Reply(ok=True, verb=verb, status=self.status()))
        elif isinstance(command, Shutdown):
            self._farewells.append(address)
            self._end()
        else:
            name = messages.carried_out_by(command)[0]
            stage = self._stages[name]
            if stage.state != "running":
                error = f"{name} is {stage.state}, not running"
                self.hub.reply(address, Reply(ok=False, verb=verb, stage=name, error=error))
                return
            self._requests += 1
            until_ns = self._clock() + round(ANSWER_S * NS_PER_S)
            self._waiting[self._requests] = _Waiting(address, command, verb, name, until_ns)
            self.hub.order(name, Apply(request=self._requests, command=command))

    @property
    def played_s(self) -> float:
        """How much of the answer was played, in seconds of audio."""
        return self._rings["playback"].ledger().consumed / SAMPLE_RATE

    def status(self) -> StatusReport:
        """State, accounting and timing now."""
        counts, xruns = accounting.read(**self._rings)
        durations = {name: stage.durations for name, stage in self._stages.items()}
        return StatusReport(
            name=self._folder.name,
            pid=os.getpid(),
            muted=self._muted,
            paused=self._paused,
            recording=None,
            settings=self._config,
            time_ns=self._clock(),
            state=self._state,
            engine=self._config.engine,
            uptime_s=(self._clock() - self._began_ns) / NS_PER_S,
            stages={stage.process.name: stage.status() for stage in self._stages.values()},
            accounting=counts,
            timing=Timing(
                capture=durations["capture"].spread(),
                inference=durations["inference"].stage_spread(),
                playback=durations["playback"].spread(),
                mic_to_speaker_ms=self._mic_to_speaker.spread(),
            ),
            xruns=xruns,
            drift_ppm=None if self._config.offline else self._drift.ppm(self._rings["capture"], self._rings["heard"]),
        )


def end_orphans(folder: RunFolder) -> None:
    """Stages of a supervisor that was killed leave by themselves; one that is stuck is killed."""
    ours = [
        process
        for process in psutil.process_iter(["cmdline"])
        if _is_stage_of(process.info["cmdline"] or [], folder.name)
        # A run of the same name may be up in another folder, or be another user's.
        and _runtime_dir(process) == str(folder.path.parent)
    ]
    _, stuck = psutil.wait_procs(ours, timeout=_ORPHANS_S)
    for process in stuck:
        process.kill()
    psutil.wait_procs(stuck, timeout=_ORPHANS_S)


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"stopped with exit code {code}"


def _is_stage_of(command: list[str], name: str) -> bool:
    modules = {process.module for process in PROCESSES}
    return "--supervised" in command and name in command and not modules.isdisjoint(command)


def _runtime_dir(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("PIPELINE_RUNTIME_DIR", "")
    return ""
