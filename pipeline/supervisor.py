"""The supervisor: makes the rings, starts the stages, routes commands, and sees to it that nothing is left behind.

One loop is the program: it sleeps until a signal, a command, a stage's report or a deadline. It moves no audio.
"""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline import accounting, keys, messages, overload
from pipeline import config as settings
from pipeline.bell import Bell
from pipeline.commands import Asked, Requests
from pipeline.config import Config
from pipeline.control import Hub
from pipeline.errors import EXIT_REFUSED, ConfigError, PipelineError
from pipeline.flight import FlightRecorder
from pipeline.messages import (
    Accounting,
    Acknowledged,
    AnyCommand,
    Apply,
    Event,
    Finish,
    Finished,
    Heartbeat,
    Input,
    LogLevel,
    LogRecord,
    Mute,
    Output,
    OverloadRecord,
    Pause,
    Record,
    RecordingRecord,
    Restart,
    Resume,
    RunRecord,
    RunState,
    Set,
    Shutdown,
    StageRecord,
    StageState,
    StageStatus,
    Start,
    Status,
    StatusRecord,
    StatusReport,
    Stop,
    TextRecord,
    Timing,
    TimingRecord,
    Trace,
    Unmute,
)
from pipeline.recording import Recording
from pipeline.ring import Ring
from pipeline.runtime import RunFolder, private
from pipeline.timing import NS_PER_MS, NS_PER_S, Durations, now_ns
from pipeline.topology import FRAME_MS, PROCESSES, RECORDER, RINGS, SAMPLE_RATE, Process, StageName, Tap
from pipeline.worker import HEARTBEAT_S, SHOW_STACKS

if TYPE_CHECKING:
    import psutil

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a run in good order."""

STOP_S: Final = 1.2
"""How long stages may take to end in good order before they are killed."""

DRAIN_S: Final = 5.0
"""How long after the end of the input it may be until the next frame is answered or played."""

ANSWER_S: Final = 2.0
"""How long a stage may take to acknowledge a command."""

SWITCH_S: Final = 4.5
"""The same where a device has to be opened for it."""

RESTART_S: Final = 120.0
"""The same where a model may have to be loaded."""

BEATS_MISSED: Final = 3
"""Heartbeats, one a second, that a stage may miss before it is taken for hung, killed and started again."""

STUCK_S: Final[dict[StageName, float]] = {"capture": 10.0, "inference": 60.0, "playback": 10.0}
"""How long a stage that runs may be at one turn of its loop, though its heart beats: another device, a model's step."""

OPEN_S: Final[dict[StageName, float]] = {"capture": 30.0, "inference": 900.0, "playback": 30.0}
"""The same while it starts: a device that hangs, or a model that is loaded from a slow disk."""

WORDS_S: Final = 2.0
"""How long the last words of a stage that has ended may take to come: why it cannot work."""

STACKS_S: Final = 0.5
"""How long a stage that hangs has to write down where, before it is killed."""

FILES: Final = 8_192
"""Files and connections that a run may have open, where the system allows so many."""

STATUS_S: Final = 1.0
"""How often the status is published."""

RESTARTS_MAX: Final = 8
"""Restarts of one stage, with no healthy time between them, after which the run is given up."""

HEALTHY_S: Final = 120.0
"""A stage that was ready for so long before it died begins its restarts anew."""

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_LAST_S: Final = 32.0

CLOSE_S: Final = 0.5
"""How long a recorder may take to close its file at the end of the run."""

_ORPHANS_S: Final = 2.0
_IDLE_S: Final = 1.0
_MEBI: Final = 1 << 20

Launch = Callable[..., "subprocess.Popen[bytes]"]


def launch(process: Process | Tap, folder: RunFolder, alive: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a stage, or the recorder.

    `alive` is a pipe's read end: it closes when this process ends, however it ends.
    """
    # -P: what lies in the folder that the user happens to be in is not to be imported.
    command = [sys.executable, "-P", "-m", process.module, "--name", folder.name, "--supervised", str(alive)]
    command += arguments
    # numpy's BLAS would start a thread for each core, and have no work for them. MLX's on a processor has.
    threads = {} if process.name == "inference" else {"OPENBLAS_NUM_THREADS": "1"}
    with open(folder.log(process.name), "ab", opener=private) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(alive,),
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            env=threads | os.environ | {"PIPELINE_RUNTIME_DIR": str(folder.path.parent)},
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
    renewing: bool = False
    """It was told to end, to be started again at once."""
    restart: Asked | None = None
    """The command that asked for that."""
    words_by_ns: int | None = None
    """Until when its last words are waited for, once it was seen to have ended."""
    kill_at_ns: int | None = None
    """When it is to be killed if it has not ended by itself."""
    missed: int = 0
    """Looks at it since its last heartbeat."""
    stopped: bool = False
    """By a signal, as a debugger or Ctrl-Z does."""
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
            import psutil  # while the stages load, and not before them

            with contextlib.suppress(psutil.Error, OSError):  # OSError: this process may open no more files
                process = psutil.Process(status.pid)
                status.memory_mb = process.memory_info().rss / _MEBI
                times = process.cpu_times()
                status.cpu_s = times.user + times.system
        return status


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
        self._farewells: list[Asked] = []
        self._flight = FlightRecorder()
        self._overload = overload.Overload()
        self._status_at_ns = 0
        self._look_at_ns = 0
        self._began_ns = clock()
        self._stop_at_ns: int | None = None
        self._drained_by_ns: int | None = None
        self.running_ns: int | None = None
        """When the stages were told to run, once they were."""
        self._rings: dict[str, Ring] = {}
        self._hub: Hub | None = None
        self._requests: Requests | None = None
        self._recording: Recording | None = None
        self.final: StatusReport | None = None
        """The status when the run had ended."""

    @property
    def hub(self) -> Hub:
        if self._hub is None:
            raise RuntimeError("the run has not begun")
        return self._hub

    @property
    def requests(self) -> Requests:
        if self._requests is None:
            raise RuntimeError("the run has not begun")
        return self._requests

    @property
    def recording(self) -> Recording:
        if self._recording is None:
            raise RuntimeError("the run has not begun")
        return self._recording

    def run(self) -> int:
        """Carry out the run; returns its exit code: 0 if it was clean.

        Raises PipelineError if the name is taken or the run cannot begin.
        """
        _allow_files()
        with contextlib.ExitStack() as uncaught:
            uncaught.enter_context(_held_back())
            self._folder.lock()
            self._signal_read, self._signal_write = socket.socketpair()
            self._alive_read, self._alive_write = os.pipe()
            try:
                self._make()
                self._catch_signals()
                uncaught.close()
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
        self._save_settings()
        # Offline, nobody is waited for, and a conversation may be using the address.
        listen = None if self._config.offline else self._config.remote.listen
        remote = keys.listening(listen) if listen is not None else None
        self._hub = Hub(self._folder.control, self._folder.events, self._folder.stages, remote)
        self._hub.watch(self._signal_read)
        self._requests = Requests(self._hub, self._clock, self._publish, self._take_effect, self._former)
        self._recording = Recording(
            self._requests,
            launch=self._launch_recorder,
            stop=lambda: self.hub.order(RECORDER.name, Stop()),
            publish=self._publish,
        )
        self._tell_run()

    def _save_settings(self) -> None:
        """For the stages: each reads them when it starts, and when it is started again."""
        new = self._folder.settings.with_suffix(".new")
        with open(new, "wb", opener=private) as file:
            file.write(settings.encode(self._config))
        new.replace(self._folder.settings)

    def _launch_recorder(self, path: Path, position: int) -> "subprocess.Popen[bytes]":
        return self._start_process(RECORDER, "--path", str(path), "--position", str(position))

    def _start_process(self, program: Process | Tap, *arguments: str) -> "subprocess.Popen[bytes]":
        try:
            return self._launch(program, self._folder, self._alive_read, *arguments)
        except OSError as error:
            raise ConfigError(f"{program.name} cannot be started: {error.strerror}") from None

    def _catch_signals(self) -> None:
        self._signal_write.setblocking(False)
        self._signal_read.setblocking(False)
        signal.set_wakeup_fd(self._signal_write.fileno(), warn_on_full_buffer=False)
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's, and a shell's for what runs behind it
                signal.signal(number, lambda *_: self._end())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # its arrival alone wakes the loop

    def _spawn(self, stage: _StageProcess) -> None:
        stage.kill_at_ns, stage.words_by_ns, stage.missed, stage.renewing = None, None, 0, False
        stage.popen = self._start_process(stage.process)
        self._set_state(stage, "starting")

    def _end(self, error: str = "") -> None:
        """Let the loop end; the first error is the run's."""
        self._error = self._error or error
        self._set_run_state("stopping")

    def _set_run_state(self, state: RunState) -> None:
        self._state = state
        self._tell_run()

    def _tell_run(self) -> None:
        """What everybody may know of the run."""
        self._status_at_ns = 0  # told anew at once, as after every change that is seen in it
        self._publish(
            RunRecord(
                name=self._folder.name,
                pid=os.getpid(),
                state=self._state,
                muted=self._muted,
                paused=self._paused,
                engine=self._config.engine,
                time_ns=self._clock(),
            )
        )

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
        self.recording.close(CLOSE_S)
        self._read_reports()
        self.recording.see_death(self._clock(), _how_it_ended)
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
        self._wait(0)
        self._read_commands()
        if self.final is not None:
            self._publish(StatusRecord(status=self.final))  # the last word on every count
        self._tell_run()
        self.requests.close()
        for asked in self._farewells:
            self.requests.answer(asked, status=self.final)

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
        self._tell_status()
        self._guarded(self._on_turn)

    def _wait(self, timeout_s: float) -> None:
        self.hub.wait(timeout_s)
        with contextlib.suppress(BlockingIOError):
            self._signal_read.recv(4_096)

    def _next_deadline_s(self) -> float:
        deadlines = [stage.restart_at_ns for stage in self._stages.values() if stage.state == "backoff"]
        deadlines += [stage.kill_at_ns for stage in self._stages.values() if stage.kill_at_ns is not None]
        deadlines += [
            stage.words_by_ns
            for stage in self._stages.values()
            if stage.words_by_ns is not None and stage.state != "backoff"
        ]
        others = (self._stop_at_ns, self._drained_by_ns, self.requests.deadline_ns())
        deadlines += [at for at in others if at is not None]
        if not deadlines:
            return _IDLE_S
        return min(_IDLE_S, max(0.0, (min(deadlines) - self._clock()) / NS_PER_S))

    def _keep_deadlines(self) -> None:
        now = self._clock()
        if now >= self._look_at_ns:
            self._look_at_ns = now + round(HEARTBEAT_S * NS_PER_S)
            self._see_hangs()
        for stage in self._stages.values():
            if stage.state == "backoff" and now >= stage.restart_at_ns:
                self._spawn(stage)
            if stage.kill_at_ns is not None and now >= stage.kill_at_ns and stage.popen is not None:
                stage.kill_at_ns = None
                if stage.renewing:
                    self._log("warning", f"{stage.process.name} did not stop within {STOP_S:g} s and was killed")
                stage.popen.kill()
        self.requests.give_up()
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

    def _see_hangs(self) -> None:
        """Once a second: who has not said for long that it lives is asked where it is, and killed."""
        for stage in self._stages.values():
            if not stage.alive or stage.state not in ("ready", "running") or stage.kill_at_ns is not None:
                continue
            stage.missed += 1
            if stage.missed > BEATS_MISSED and not self._is_stopped(stage):
                self._put_down(stage, f"hangs: no sign of life for {BEATS_MISSED * HEARTBEAT_S:g} s")

    def _is_stopped(self, stage: _StageProcess) -> bool:
        """Whether it was stopped by a signal: then whoever did that will let it go on."""
        stopped = False
        import psutil

        with contextlib.suppress(psutil.Error, OSError):
            stopped = stage.popen is not None and psutil.Process(stage.popen.pid).status() == psutil.STATUS_STOPPED
        if stopped and not stage.stopped:
            self._log("warning", f"{stage.process.name} was stopped by a signal, and waits to be continued")
        if stopped or stage.stopped:
            stage.missed = 0  # and after it goes on it has its time again
        stage.stopped = stopped
        return stopped or stage.missed == 0

    def _put_down(self, stage: _StageProcess, why: str) -> None:
        """Have its stacks written to its log, and kill it a moment later; it is started again like one that died."""
        self._log("warning", f"{stage.process.name} {why}; where its threads are goes to its log, and it is killed")
        stage.kill_at_ns = self._clock() + round(STACKS_S * NS_PER_S)
        if stage.popen is not None:
            stage.popen.send_signal(SHOW_STACKS)

    def _tell_status(self) -> None:
        now = self._clock()
        if now >= self._status_at_ns:
            self._status_at_ns = now + round(STATUS_S * NS_PER_S)
            self._publish(StatusRecord(status=self.status()))

    def _has_more_to_say(self, stage: _StageProcess, code: int) -> bool:
        """Whether it says why it has ended, and that is under way: a process may be gone before its words come."""
        if code != EXIT_REFUSED or stage.state == "fatal" or stage.renewing:
            return False
        now = self._clock()
        stage.words_by_ns = stage.words_by_ns or now + round(WORDS_S * NS_PER_S)
        return now < stage.words_by_ns

    def _see_deaths(self) -> None:
        self.recording.see_death(self._clock(), _how_it_ended)
        for stage in self._stages.values():
            if stage.popen is None or stage.alive or stage.state == "backoff" or self._state == "stopping":
                continue
            if self._has_more_to_say(stage, stage.popen.returncode):
                continue
            self.requests.stage_died(stage.process.name)
            if stage.renewing:
                stage.restarts += 1
                self._spawn(stage)
                continue
            self._clean = False
            name, code = stage.process.name, stage.popen.returncode
            log = self._folder.log(name)
            said = stage.state != "fatal" and log.exists() and log.stat().st_size > 0
            self._keep_logs = self._keep_logs or said
            where = f"; its messages are in {log}" if said else ""
            how = f"{name}: {stage.detail}" if stage.state == "fatal" else f"{name} {_how_it_ended(code)}{where}"
            stage.renewing = False
            if stage.restart is not None:
                self.requests.refuse(stage.restart, how, name)
                stage.restart = None
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
            except messages.MALFORMED as error:
                self._log("warning", f"a stage's report was not understood: {error}")
                continue
            if (topic := messages.topic(report)) is not None:
                self._publish_data(topic, data)
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
                case Acknowledged():
                    self.requests.acknowledged(report)
                case RecordingRecord():
                    began = self.recording.path is not None
                    self.recording.said(report)
                    if report.error and began:
                        self._tell("supervisor", "warning", f"the recording has ended: {report.error}")
                case Heartbeat(stage=name):
                    self._stage_lives(self._stages[name], report)
                case Finished(stage=name):
                    self._stage_finished(name)

    def _stage_lives(self, stage: _StageProcess, report: Heartbeat) -> None:
        stage.missed = 0
        stage.device_latency_ms = report.device_latency_ms
        stage.lost_reports = report.lost_reports
        stuck_s = (OPEN_S if stage.state == "starting" else STUCK_S)[stage.process.name]
        if report.busy_ms > stuck_s * 1_000 and stage.kill_at_ns is None:
            self._put_down(stage, f"hangs: at one turn for {stuck_s:g} s")

    def _time(self, record: TimingRecord) -> None:
        duration_ms = (record.end_ns - record.start_ns) / NS_PER_MS
        if record.stage == "capture":
            duration_ms -= FRAME_MS
        self._stages[record.stage].durations.add_ms(duration_ms)
        self._keep_draining()
        if record.stage == "inference" and not self._config.offline and (change := self._overload.take(record)):
            self._tell_overload(change)
        if record.stage == "playback":
            self._mic_to_speaker.add_ms(record.mic_to_speaker_ms)

    def _tell_overload(self, change: overload.Change) -> None:
        advice = overload.advice(self._config) if change.on else ""
        self._publish(OverloadRecord(on=change.on, p95_ms=change.p95_ms, advice=advice, time_ns=self._clock()))
        if not change.on:
            self._log("info", f"the model is fast enough again: 95 % of the frames took {change.p95_ms:.0f} ms or less")
            return
        slow = f"the model is too slow: 95 % of the frames took up to {change.p95_ms:.0f} ms of {FRAME_MS:.0f}"
        lighter = overload.lighter(self._config) if self._config.inference.step_down else None
        self._log("warning", f"{slow}; {f'it goes on with {lighter[1]}' if lighter else advice}")
        if lighter:
            self._step_down(*lighter)

    def _step_down(self, model: str | None, quality: str) -> None:
        self._config = settings.changed(self._config, {"model": model, "quality": quality})
        self._keep_settings()
        self._overload.clear()
        self._renew(self._stages["inference"])

    def _stage_said(self, record: StageRecord) -> None:
        stage = self._stages[record.stage]
        if stage.state == "backoff" or (record.pid and stage.popen is not None and record.pid != stage.popen.pid):
            return  # said before it died
        if record.state in ("starting", "running"):
            stage.was_running = record.state == "running"
        self._status_at_ns = 0
        stage.state = record.state
        stage.detail = record.detail
        stage.device_latency_ms = record.device_latency_ms
        if record.state == "running" and stage.restart is not None and not stage.renewing:
            asked, stage.restart = stage.restart, None
            self.requests.carried_out(asked, record.stage, accounting.next_frame(record.stage, **self._rings))
        if record.state != "ready":
            return
        stage.was_ready = True
        stage.ready_ns = self._clock()
        if self._state == "running":
            self._tell(record.stage, "info", f"ready again: {record.detail}")
            # Before Start: not one block of it is to be heard.
            if record.stage == "capture" and self._muted:
                self.hub.order("capture", Apply(request=0, command=Mute()))
            if record.stage == "inference" and self._paused:
                self.hub.order("inference", Apply(request=0, command=Pause()))
            ending = record.stage == "capture" and (self._finishing or stage.finished)
            self.hub.order(record.stage, Finish() if ending else Start())
        elif self._state == "starting" and all(other.state == "ready" for other in self._stages.values()):
            self._set_run_state("running")
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
        self._status_at_ns = 0
        stage.state = state
        self._publish(StageRecord(stage=stage.process.name, state=state, detail=stage.detail, time_ns=self._clock()))

    def _log(self, level: LogLevel, message: str) -> None:
        self._publish(LogRecord(stage="supervisor", level=level, message=message, time_ns=self._clock()))
        self._tell("supervisor", level, message)

    def _publish(self, record: Event) -> None:
        topic = messages.topic(record)
        if topic is not None:
            self._publish_data(topic, messages.encode(record))

    def _publish_data(self, topic: str, data: bytes) -> None:
        self.hub.publish(topic, data)
        if topic != "status":  # which repeats what the others say
            self._flight.add(topic, data, self._clock())

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
        for asked in self.requests.read():
            try:
                self._carry_out(asked)
            except ConfigError as error:
                self.requests.refuse(asked, str(error))

    def _carry_out(self, asked: Asked) -> None:
        command = asked.command
        if self._config.offline and isinstance(command, Input | Output | Record | Restart):
            raise ConfigError(f"{asked.verb}: expected a run in real time, and this one goes from file to file")
        match command:
            case Status():
                self.requests.answer(asked, status=self.status())
            case Trace(seconds=seconds):
                since_ns = 0 if seconds is None else self._clock() - round(seconds * NS_PER_S)
                self.requests.answer(asked, records=self._flight.since(since_ns))
            case Shutdown():
                self._farewells.append(asked)
                self._end()
            case Restart(stage=name):
                self._restart(asked, self._stages[name])
            case Record():
                if self._state != "running":
                    raise ConfigError(f"the run is {self._state}, not running")
                self.recording.carry_out(asked, command, self._rings["capture"].position)
            case _:
                self._pass_on(asked)

    def _pass_on(self, asked: Asked) -> None:
        """Have the stages carry it out that it is for: all of them, or none if one could not."""
        command = asked.command
        # What is wrong is refused before any stage sees it.
        if isinstance(command, Set):
            self._changed(command)
        elif isinstance(command, Input):
            settings.check_switch(command.spec, self._config.playback.output, may_exist=True)
        elif isinstance(command, Output):
            settings.check_switch(command.spec, self._config.capture.input, may_exist=False)
        stages = messages.carried_out_by(command)
        for name in stages:
            state = self._stages[name].state
            if state != "running":
                self.requests.refuse(asked, f"{name} is {state}, not running", name)
                return
        self.requests.order(asked, stages, SWITCH_S if isinstance(command, Input | Output) else ANSWER_S)

    def _changed(self, command: Set) -> Config:
        if not messages.given(command):
            raise ConfigError(f"set: expected at least one of {', '.join(messages.ALTERS)}")
        return messages.changed(self._config, command)

    def _former(self, command: Set) -> Set:
        """What puts back what `command` would change."""
        return messages.former(self._config, command)

    def _keep_settings(self) -> None:
        try:
            self._save_settings()
        except OSError as error:
            why = f"{self._folder.settings} cannot be written: {error.strerror}"
            self._log("warning", f"{why}; a stage that is started again takes the settings of before")

    def _take_effect(self, command: AnyCommand) -> None:
        """What the stages have carried out holds for those that will be started again."""
        self._status_at_ns = 0
        match command:
            case Mute() | Unmute():
                self._muted = isinstance(command, Mute)
                self._tell_run()
            case Pause() | Resume():
                self._paused = isinstance(command, Pause)
                self._tell_run()
            case Set():
                self._config = self._changed(command)
                self._keep_settings()
            case Input(spec=spec):
                origin = self._rings["capture"].position
                self._config = settings.changed(self._config, {"capture.input": spec, "capture.origin": origin})
                self._keep_settings()
            case Output(spec=spec):
                self._config = settings.changed(self._config, {"playback.output": spec})
                self._keep_settings()

    def _restart(self, asked: Asked, stage: _StageProcess) -> None:
        name = stage.process.name
        if stage.renewing or (stage.restart is not None and not stage.restart.answered):
            raise ConfigError(f"{name} is being restarted already")
        if self._state != "running" or stage.state not in ("running", "backoff", "starting"):
            raise ConfigError(f"{name} is {stage.state}, not running")
        stage.restart = asked
        self.requests.wait(asked, name, RESTART_S)
        self._renew(stage)

    def _renew(self, stage: _StageProcess) -> None:
        """End a stage in good order, if it runs, and start it again."""
        stage.strikes = 0
        if stage.state == "backoff":
            self._spawn(stage)
            return
        stage.renewing = True
        self.hub.order(stage.process.name, Stop())
        if stage.state == "starting" and stage.popen is not None:  # and reads no orders
            stage.popen.terminate()
        stage.kill_at_ns = self._clock() + round(STOP_S * NS_PER_S)

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
            recording=self.recording.path,
            overloaded=self._overload.on,
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
            drift_ppm=self._rings["heard"].drift_ppm,
        )


def _allow_files() -> None:
    """Raise what this process may open, by default 256 on a Mac: each client that connects takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = FILES if most == resource.RLIM_INFINITY else min(most, FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """What would end this process waits: before it is caught it would leave behind what was made so far."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_orphans(folder: RunFolder) -> None:
    """Stages of a supervisor that was killed leave by themselves; one that is stuck is killed."""
    import psutil

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
    modules = {program.module for program in (*PROCESSES, RECORDER)}
    return "--supervised" in command and name in command and not modules.isdisjoint(command)


def _runtime_dir(process: "psutil.Process") -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.environ().get("PIPELINE_RUNTIME_DIR", "")
    return ""
