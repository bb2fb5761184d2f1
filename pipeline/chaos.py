"""Faults, put into a run that is up, and what became of it: what was lost, what was heard, how long until normal.

Which faults, in which stages, how long and after which pauses follows from a seed; one begins when the run is normal
again after the one before. Only processes that are stages of that run, of the same user, are touched.
"""

import contextlib
import errno
import os
import random
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import msgspec
import psutil
from msgspec import Struct

from pipeline.client import Client, Events
from pipeline.errors import ConfigError, ControlError
from pipeline.faults import HANG
from pipeline.messages import SCHEMA, Accounting, Event, StageRecord, StatusReport, TimingRecord, XrunRecord
from pipeline.supervisor import HEALTHY_S, RESTARTS_MAX
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import PROCESSES, SAMPLE_RATE, StageName

Kind = Literal["stall", "slow", "kill", "hang", "fill"]

EXPECTED: Final = (
    "expected stall[=STAGE][:SECONDS], slow[=STAGE][:SECONDS], kill[=STAGE], hang[=STAGE] or fill=FOLDER, "
    "separated by commas"
)

CALM: Final = 12
"""Frames in a row, about a second, without a gap or a drop: then the run flows."""

NEAR_MS: Final = 10.0
"""Latency by so much over what it was before is back to normal."""

READY_S: Final = 20.0
"""How long frames may take to flow before a fault is begun."""

FLOWS_S: Final = 200.0
"""How long a run may take until it flows: a stage that hangs, is killed, waits and loads its model."""

NORMAL_S: Final = 60.0
"""How long after that until its latency is back."""

SMALL_BYTES: Final = 4 << 30
"""No disk with more room than this is filled: others would miss it."""

_STALL_S: Final = (0.1, 5.0)
_SLOW_S: Final = (2.0, 5.0)
_FILL_S: Final = 2.0
_LONGEST_S: Final = 600.0
_PAUSE_S: Final = 2.0
_STOPPED_S, _GOING_S = 0.06, 0.04
"""Slow: what a stage is stopped, and goes, in turn."""

_LOOK_S: Final = 1.0
_BLOCK: Final = bytes(1 << 20)
_STAGES: Final[list[StageName]] = [process.name for process in PROCESSES]
_MODULES: Final = {process.name: process.module for process in PROCESSES}


class Wanted(NamedTuple):
    """A kind of fault that was asked for, and what of it is not to be drawn."""

    kind: Kind
    stage: StageName | None = None
    seconds: float | None = None
    folder: Path | None = None


class Fault(Struct, kw_only=True):
    """What is done."""

    kind: Kind
    stage: StageName | None = None
    """To which stage; null where it is a disk that is filled."""
    seconds: float = 0.0
    """For how long; 0 for what is done once."""
    folder: str | None = None

    def __str__(self) -> str:
        duration = f" {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.stage or self.folder}{duration}"


class Incident(Struct, kw_only=True):
    """A fault, and what came of it until the run was normal again. `ms` are of audio."""

    at_s: float
    """Since the first look at the run."""
    fault: Fault
    gaps: int
    """Times that the speaker was without a frame."""
    concealed_ms: float
    """What it was sent in place of the model's words."""
    dropped_ms: float
    """What the model never heard."""
    skipped_ms: float
    """What the model said that was left out, to bring the latency back."""
    restarts: int
    """Of all stages."""
    latency_ms: float
    """Microphone to speaker before the fault."""
    latency_after_ms: float
    """The same afterwards."""
    flows_s: float | None
    """From the fault's end (kill and hang: its beginning) until the first of CALM frames without a gap; null: never."""
    normal_s: float | None
    """The same until the first of CALM frames whose latency is back besides; null: never."""


class Report(Struct, kw_only=True):
    """What `chaos --json` prints."""

    schema: int = SCHEMA
    name: str
    seed: int
    incidents: list[Incident]
    wrong: list[str]
    """What did not come back, and equations of the account that do not hold."""


def parse(text: str) -> list[Wanted]:
    """The kinds of faults in a list such as `stall=inference:2,kill`. Raises ConfigError."""
    return [_wanted(part.strip()) for part in text.split(",")]


def _wanted(part: str) -> Wanted:
    kind, _, value = part.partition("=")
    if kind == "fill" and value:
        return Wanted("fill", folder=_small_disk(Path(value)))
    for known in get_args(Kind):
        if kind == known and kind != "fill":
            return _of_stage(known, value, part)
    raise _wrong(part)


def _of_stage(kind: Kind, value: str, part: str) -> Wanted:
    stage, seconds = None, None
    for word in filter(None, value.split(":")):
        found = next((name for name in _STAGES if name == word), None)
        if found is not None and stage is None:
            stage = found
        elif kind in ("stall", "slow") and seconds is None:
            seconds = _seconds(word, part)
        else:
            raise _wrong(part)
    return Wanted(kind, stage, seconds)


def _seconds(word: str, part: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(word)) <= _LONGEST_S:
            return seconds
    raise _wrong(part)


def _wrong(part: str) -> ConfigError:
    return ConfigError(f"--faults {part!r}: {EXPECTED}; SECONDS are above 0 and up to {_LONGEST_S:g}")


def _small_disk(folder: Path) -> Path:
    try:
        found = os.statvfs(folder)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--faults 'fill={folder}': expected a folder that is there: {why}") from None
    if found.f_bavail * found.f_frsize > SMALL_BYTES or not folder.is_dir():
        raise ConfigError(
            f"--faults 'fill={folder}': expected a folder on a disk with at most {SMALL_BYTES >> 30} GiB free, "
            "such as one made for it: others would miss the room"
        )
    return folder


def draw(wanted: Sequence[Wanted], dice: random.Random) -> tuple[float, Fault]:
    """The next pause, in seconds, and the next fault."""
    pause_s = dice.uniform(0, _PAUSE_S)
    chosen, stage, share = dice.choice(wanted), dice.choice(_STAGES), dice.random()
    if chosen.folder is not None:
        return pause_s, Fault(kind="fill", seconds=_FILL_S, folder=str(chosen.folder))
    first_s, last_s = {"stall": _STALL_S, "slow": _SLOW_S}.get(chosen.kind, (0.0, 0.0))
    # Short ones as often as long ones.
    drawn_s = first_s * (last_s / first_s) ** share if first_s else 0.0
    return pause_s, Fault(kind=chosen.kind, stage=chosen.stage or stage, seconds=chosen.seconds or drawn_s)


class Recovery:
    """When a run was well again after a moment, from its events."""

    def __init__(self, since_ns: int, before_ms: float | None = None, restarted: StageName | None = None) -> None:
        self._since_ns = since_ns
        self._before_ms = before_ms
        self._awaited = restarted
        self._down: set[StageName] = set()
        self._latencies_ms: deque[float] = deque(maxlen=CALM)
        self._calm_ns: list[int] = []
        self._near_ns: list[int] = []
        self.flows_ns: int | None = None
        """When the first of CALM frames without a gap reached the speaker."""
        self.normal_ns: int | None = None
        """When the first of CALM frames did whose latency is NEAR_MS over what it was at most."""

    @property
    def latency_ms(self) -> float:
        """Microphone to speaker, of the last frames."""
        return statistics.median(self._latencies_ms) if self._latencies_ms else 0.0

    def add(self, event: Event) -> None:
        """Take in one event of the topics state.*, timing.playback or xrun."""
        match event:
            case StageRecord():
                self._stage_said(event)
            case XrunRecord(kind="gap" | "dropped", time_ns=at_ns) if at_ns >= self._since_ns:
                self._disturb()
            case TimingRecord(stage="playback", end_ns=at_ns) if at_ns >= self._since_ns:
                self._frame(event)

    def _stage_said(self, event: StageRecord) -> None:
        if event.time_ns < self._since_ns:
            return
        if event.state == "running":
            self._down.discard(event.stage)
            self._awaited = None if event.stage == self._awaited else self._awaited
        else:
            self._down.add(event.stage)
        self._disturb()

    def _disturb(self) -> None:
        self._calm_ns.clear()
        self._near_ns.clear()

    def _frame(self, event: TimingRecord) -> None:
        self._latencies_ms.append(event.mic_to_speaker_ms)
        if self._down or self._awaited is not None:
            return
        self._calm_ns.append(event.end_ns)
        if self._before_ms is not None and event.mic_to_speaker_ms > self._before_ms + NEAR_MS:
            self._near_ns.clear()
        else:
            self._near_ns.append(event.end_ns)
        if len(self._calm_ns) >= CALM:
            self.flows_ns = self.flows_ns or self._calm_ns[0]
        if len(self._near_ns) >= CALM:
            self.normal_ns = self.normal_ns or self._near_ns[0]


class Chaos:
    """Puts faults into one run, one after another. `on_incident` is told of each when it is over.

    Once frames flow again it waits for so long, `normal_s`, for the latency to be back.
    """

    def __init__(
        self,
        client: Client,
        wanted: Sequence[Wanted],
        seed: int,
        on_incident: Callable[[Incident], None],
        normal_s: float = NORMAL_S,
    ) -> None:
        self._normal_s = normal_s
        self._client = client
        self._wanted = wanted
        self._dice = random.Random(seed)  # noqa: S311  (nothing is secret)
        self._on_incident = on_incident
        self._began_ns = now_ns()
        status = self._permitted(client.status())
        self._deaths = {name: stage.restarts for name, stage in status.stages.items()}
        self._back_ns = dict.fromkeys(_STAGES, now_ns())
        self.incidents: list[Incident] = []
        self.wrong: list[str] = []
        """What did not come back, and what the account does not balance."""

    def _permitted(self, status: StatusReport) -> StatusReport:
        if status.settings.offline:
            raise ControlError(f"the run {status.name!r} goes from file to file: expected one in real time")
        if status.settings.faults.hang is None and any(one.kind == "hang" for one in self._wanted):
            raise ConfigError("--faults hang: expected a run with the setting faults.hang, lock or loop")
        return status

    def run(self, seconds: float) -> None:
        """Begin faults for so long, one at least, and wait for the end of the last.

        Raises ControlError where the run has gone, or does not flow before a fault.
        """
        topics = ("state.capture", "state.inference", "state.playback", "timing.playback", "xrun")
        until_ns = now_ns() + round(seconds * NS_PER_S)
        with self._client.events(*topics, timeout_s=_LOOK_S) as events:
            while self._turn(events) and now_ns() < until_ns:
                pass

    def _turn(self, events: Events) -> bool:
        """One fault; returns whether the run came back."""
        pause_s, fault = draw(self._wanted, self._dice)
        before = self._await(events, Recovery(now_ns()), READY_S)
        if before.flows_ns is None:
            raise ControlError(f"no {CALM} frames in a row were played within {READY_S:g} s: expected a run that flows")
        time.sleep(pause_s)
        self._commit(events, self._survivable(fault), before.latency_ms)
        return self.incidents[-1].flows_s is not None

    def _commit(self, events: Events, fault: Fault, before_ms: float) -> None:
        status = self._client.status()
        began_ns = now_ns()
        self._do(fault, status)
        once = fault.kind in ("kill", "hang")
        since_ns = began_ns if once else now_ns()
        after = Recovery(since_ns, before_ms, fault.stage if once else None)
        self._await(events, after, FLOWS_S)
        if after.flows_ns is not None:
            self._await(events, after, self._normal_s, normal=True)
        if once and fault.stage is not None:
            self._back_ns[fault.stage] = now_ns()
        self._conclude(fault, status, after, began_ns, since_ns, before_ms)

    def _conclude(
        self, fault: Fault, before: StatusReport, after: Recovery, began_ns: int, since_ns: int, before_ms: float
    ) -> None:
        status = self._client.status()
        then, now = before.accounting, status.accounting
        incident = Incident(
            at_s=round((began_ns - self._began_ns) / NS_PER_S, 3),
            fault=fault,
            gaps=now.gaps - then.gaps,
            concealed_ms=_ms(now.concealed - then.concealed),
            dropped_ms=_ms(now.dropped - then.dropped),
            skipped_ms=_ms(now.skipped - then.skipped),
            restarts=_restarts(status) - _restarts(before),
            latency_ms=before_ms,
            latency_after_ms=after.latency_ms,
            flows_s=_since_s(after.flows_ns, since_ns),
            normal_s=_since_s(after.normal_ns, since_ns),
        )
        self.incidents.append(incident)
        self.wrong += _complaints(incident, now, self._normal_s)
        self._on_incident(incident)

    def _await(self, events: Events, recovery: Recovery, limit_s: float, *, normal: bool = False) -> Recovery:
        """Until the run flows, or is normal, or for so long."""
        until_ns = now_ns() + round(limit_s * NS_PER_S)
        while now_ns() < until_ns and (recovery.normal_ns if normal else recovery.flows_ns) is None:
            event = next(events, None)
            if event is None:
                self._client.status()  # is it there at all?
            else:
                recovery.add(event)
        return recovery

    def _survivable(self, fault: Fault) -> Fault:
        """A stage that dies too often is given up, and the run with it: then it is only stalled."""
        if fault.kind not in ("kill", "hang") or fault.stage is None:
            return fault
        if now_ns() - self._back_ns[fault.stage] > HEALTHY_S * NS_PER_S:
            self._deaths[fault.stage] = 0
        if self._deaths[fault.stage] >= RESTARTS_MAX:
            return Fault(kind="stall", stage=fault.stage, seconds=_STALL_S[0])
        self._deaths[fault.stage] += 1
        return fault

    def _do(self, fault: Fault, status: StatusReport) -> None:
        if fault.stage is None:
            fill(Path(str(fault.folder)), fault.seconds)
            return
        process = stage_process(status, fault.stage)
        with contextlib.suppress(psutil.NoSuchProcess):  # it died meanwhile: what comes of that is seen
            match fault.kind:
                case "stall":
                    stall(process, fault.seconds)
                case "slow":
                    slow(process, fault.seconds)
                case "kill":
                    process.kill()
                case "hang":
                    process.send_signal(HANG)


def _ms(samples: int) -> float:
    return round(samples * 1_000 / SAMPLE_RATE, 1)


def _since_s(at_ns: int | None, since_ns: int) -> float | None:
    return None if at_ns is None else round((at_ns - since_ns) / NS_PER_S, 3)


def _restarts(status: StatusReport) -> int:
    return sum(stage.restarts for stage in status.stages.values())


def _complaints(incident: Incident, counts: Accounting, normal_s: float) -> list[str]:
    wrong = [f"after {incident.fault}: {equation}" for equation in counts.discrepancies()]
    if incident.flows_s is None:
        return [*wrong, f"after {incident.fault}: no {CALM} frames in a row were played within {FLOWS_S:g} s"]
    if incident.normal_s is None:
        over_ms = incident.latency_after_ms - incident.latency_ms
        wrong.append(f"after {incident.fault}: latency was {over_ms:.0f} ms over what it was for {normal_s:g} s")
    return wrong


def stage_process(status: StatusReport, stage: StageName) -> psutil.Process:
    """A stage's process. Raises ControlError where there is none, or it is none of this run and this user."""
    pid = status.stages[stage].pid
    if pid is None:
        raise ControlError(f"{stage} is {status.stages[stage].state}, and has no process")
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        ours = process.ppid() == status.pid and process.uids().real == os.getuid()
    except psutil.Error:
        raise ControlError(f"{stage}, process {pid}: it has just gone") from None
    if not ours or _MODULES[stage] not in command or status.name not in command:
        raise ControlError(f"{stage}, process {pid}: expected a stage of the run {status.name!r}, your own")
    return process


def stall(process: psutil.Process, seconds: float) -> None:
    """Stop a process for so long."""
    process.suspend()
    try:
        time.sleep(seconds)
    finally:
        process.resume()


def slow(process: psutil.Process, seconds: float) -> None:
    """For so long, let a process have two fifths of its time, in slices."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        stall(process, _STOPPED_S)
        time.sleep(_GOING_S)


def fill(folder: Path, seconds: float) -> None:
    """Leave no room on the disk of `folder` for so long."""
    path = folder / f"chaos-{os.getpid()}"
    try:
        with path.open("xb", buffering=0) as file:
            path.unlink()  # however this ends, the room comes back
            _write_until_full(file.fileno())
            time.sleep(seconds)
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror}: expected a folder that can be written to") from None


def _write_until_full(descriptor: int) -> None:
    try:
        while True:
            os.write(descriptor, _BLOCK)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


HEAD: Final = (
    "   at s  fault                      gaps  concealed    dropped    skipped  restarts   flows  normal  latency"
)


def row(incident: Incident) -> str:
    """A line of the table below HEAD."""
    after = f"{incident.latency_ms:.0f}>{incident.latency_after_ms:.0f}"
    return (
        f"{incident.at_s:7.1f}  {incident.fault!s:26} {incident.gaps:4} {incident.concealed_ms:7.0f} ms "
        f"{incident.dropped_ms:7.0f} ms {incident.skipped_ms:7.0f} ms {incident.restarts:9} "
        f"{_shown(incident.flows_s)} {_shown(incident.normal_s)} {after:>8}"
    )


def _shown(seconds: float | None) -> str:
    return "  never" if seconds is None else f"{seconds:5.1f} s"


def summary(incidents: Sequence[Incident]) -> str:
    """What the faults came to together."""
    flows, normal = (sorted(s for s in found if s is not None) for found in _times(incidents))
    return (
        f"{len(incidents)} faults, {sum(one.gaps for one in incidents)} gaps, "
        f"{sum(one.concealed_ms for one in incidents):.0f} ms concealed, "
        f"{sum(one.dropped_ms for one in incidents):.0f} ms dropped, "
        f"{sum(one.skipped_ms for one in incidents):.0f} ms skipped; "
        f"until frames flow {_median_and_most(flows)}; until latency is back {_median_and_most(normal)}"
    )


def _times(incidents: Sequence[Incident]) -> tuple[list[float | None], list[float | None]]:
    return [one.flows_s for one in incidents], [one.normal_s for one in incidents]


def _median_and_most(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, {seconds[-1]:.1f} s at most" if seconds else "never"


def command(name: str, *, seed: int, seconds: float, faults: str, as_json: bool) -> int:
    """Put faults into the run `name` for so long, or until Ctrl-C, SIGTERM or a fault from which it does not come back.

    Prints a row for each, or a Report as JSON; returns the exit code. Raises ConfigError, and ControlError if the run
    is not up or no frames flow in it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chaos = Chaos(Client(name), parse(faults), seed, _ignore if as_json else _print_row)
    if not as_json:
        print(HEAD, flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            chaos.run(seconds)
    except ControlError as error:
        if not chaos.incidents:
            raise
        chaos.wrong.append(str(error))
    if as_json:
        report = Report(name=name, seed=seed, incidents=chaos.incidents, wrong=chaos.wrong)
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(summary(chaos.incidents))
    for line in chaos.wrong:
        print(f"pipeline: {line}", file=sys.stderr)
    return 1 if chaos.wrong else 0


def _ignore(_: Incident) -> None:
    """It is told at the end."""


def _print_row(incident: Incident) -> None:
    print(row(incident), flush=True)
