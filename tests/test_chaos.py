"""pipeline.chaos: what is asked for, what is drawn, whom it touches, and when a run is normal again."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import psutil
import pytest

from pipeline import chaos
from pipeline.chaos import CALM, Fault, Incident, Recovery, Wanted, draw, parse
from pipeline.config import Config, FaultsConfig
from pipeline.errors import ConfigError, ControlError
from pipeline.faults import HANG
from pipeline.messages import (
    Accounting,
    StageRecord,
    StageState,
    StageStatus,
    StatusRecord,
    StatusReport,
    TimingRecord,
    XrunRecord,
)
from pipeline.protocol import EVENTS
from pipeline.supervisor import RESTARTS_MAX
from pipeline.timing import NS_PER_S
from pipeline.topology import FRAME, FRAME_NS, PROCESSES, StageName
from procs.engines import Echo, Paced
from tests.helpers import wait_until

SINCE_NS: Final = 1_000 * NS_PER_S
BEFORE_MS: Final = 150.0
STAGES: Final[list[StageName]] = [process.name for process in PROCESSES]


# What is asked for


def test_a_list_of_faults() -> None:
    assert parse("stall, kill=capture,stall=2,slow=playback:0.5,stall=:3,hang=inference") == [
        Wanted("stall"),
        Wanted("kill", "capture"),
        Wanted("stall", seconds=2.0),
        Wanted("slow", "playback", 0.5),
        Wanted("stall", seconds=3.0),
        Wanted("hang", "inference"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "stal",
        "stall,",
        "stall=0",
        "stall=-1",
        "stall=nan",
        "stall=601",
        "stall=1:2",
        "kill=2",
        "hang=capture:1",
        "kill=model",
        "stall=capture:playback",
        "fill",
        "fill=",
        "device",
        "kill=capture=1",
    ],
)
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    part = text.split(",")[-1]
    assert str(caught.value).startswith(f"--faults {part!r}: expected stall[=STAGE][:SECONDS], slow")
    assert "\n" not in str(caught.value)


def test_only_a_small_disk_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected a folder that is there: No such file or directory"):
        parse(f"fill={tmp_path / 'nowhere'}")
    monkeypatch.setattr(chaos, "SMALL_BYTES", 0)
    with pytest.raises(ConfigError, match="expected a folder on a disk with at most 0 GiB free"):
        parse(f"fill={tmp_path}")
    monkeypatch.setattr(chaos, "SMALL_BYTES", 1 << 60)
    assert parse(f"fill={tmp_path}") == [Wanted("fill", folder=tmp_path)]


# What is drawn


def drawn(text: str, seed: int, count: int = 200) -> list[tuple[float, Fault]]:
    dice = random.Random(seed)  # noqa: S311
    wanted = parse(text)
    return [draw(wanted, dice) for _ in range(count)]


def test_a_seed_draws_the_same_faults_and_another_seed_others() -> None:
    assert drawn("stall,slow,kill", seed=1) == drawn("stall,slow,kill", seed=1)
    assert drawn("stall,slow,kill", seed=1) != drawn("stall,slow,kill", seed=2)


def test_every_kind_and_every_stage_is_drawn() -> None:
    faults = [fault for _, fault in drawn("stall,slow,kill,hang", seed=0)]
    kinds = ("stall", "slow", "kill", "hang")
    assert {(fault.kind, fault.stage) for fault in faults} == {
        (kind, stage) for kind in kinds for stage in ("capture", "inference", "playback")
    }
    for fault in faults:
        lasts = {"stall": 0.1 <= fault.seconds <= 5, "slow": 2 <= fault.seconds <= 5}
        assert lasts.get(fault.kind, fault.seconds == 0)


def test_what_is_given_is_not_drawn() -> None:
    assert all(
        fault == Fault(kind="stall", stage="inference", seconds=2.0) and 0 <= pause_s <= 2
        for pause_s, fault in drawn("stall=inference:2", seed=0)
    )


# When a run is normal again


def frame(number: int, latency_ms: float = BEFORE_MS) -> TimingRecord:
    end_ns = SINCE_NS + number * FRAME_NS
    return TimingRecord(
        stage="playback", frame=number, start_ns=end_ns, end_ns=end_ns, queued=1, mic_to_speaker_ms=latency_ms
    )


def said(stage: StageName, state: StageState, number: int) -> StageRecord:
    return StageRecord(stage=stage, state=state, time_ns=SINCE_NS + number * FRAME_NS)


def gap(number: int) -> XrunRecord:
    return XrunRecord(stage="playback", kind="gap", count=1, time_ns=SINCE_NS + number * FRAME_NS)


def after(*events: Any, **expected: Any) -> Recovery:
    recovery = Recovery(SINCE_NS, BEFORE_MS, **expected)
    for event in events:
        recovery.add(event)
    return recovery


def test_a_run_that_was_never_disturbed_is_normal_from_the_first_frame_on() -> None:
    recovery = after(*(frame(number) for number in range(3, 3 + CALM)))
    assert recovery.flows_ns == recovery.normal_ns == SINCE_NS + 3 * FRAME_NS
    assert recovery.latency_ms == BEFORE_MS


def test_frames_from_before_the_moment_do_not_count() -> None:
    recovery = after(*(frame(number) for number in range(-CALM, CALM - 1)))
    assert recovery.flows_ns is None


@pytest.mark.parametrize("event", [gap(4), said("inference", "backoff", 4)], ids=["gap", "death"])
def test_a_disturbance_begins_the_count_anew(event: Any) -> None:
    frames = [frame(number) for number in range(5)]
    back = [said("inference", "running", 4)]
    recovery = after(*frames, event, *back, *(frame(number) for number in range(5, 4 + CALM)))
    assert recovery.flows_ns is None
    recovery.add(frame(4 + CALM))
    assert recovery.flows_ns == SINCE_NS + 5 * FRAME_NS


def test_while_a_stage_is_down_nothing_counts() -> None:
    down = said("capture", "starting", 0)
    recovery = after(down, *(frame(number) for number in range(2 * CALM)))
    assert recovery.flows_ns is None


def test_what_was_killed_has_to_be_back() -> None:
    recovery = after(*(frame(number) for number in range(2 * CALM)), restarted="capture")
    assert recovery.flows_ns is None
    recovery.add(said("capture", "running", 2 * CALM))
    for number in range(2 * CALM, 3 * CALM):
        recovery.add(frame(number))
    assert recovery.flows_ns == SINCE_NS + 2 * CALM * FRAME_NS


def test_latency_is_back_later_than_frames_flow() -> None:
    high = [frame(number, BEFORE_MS + 11) for number in range(CALM)]
    recovery = after(*high)
    assert (recovery.flows_ns, recovery.normal_ns) == (SINCE_NS, None)
    for number in range(CALM, 2 * CALM):
        recovery.add(frame(number, BEFORE_MS + 9))
    assert recovery.normal_ns == SINCE_NS + CALM * FRAME_NS


def test_a_latency_below_what_it_was_is_normal() -> None:
    assert after(*(frame(number, BEFORE_MS - 50) for number in range(CALM))).normal_ns == SINCE_NS


# Whom it touches


@contextmanager
def program(*words: str) -> Iterator[psutil.Process]:
    """A process of ours that does nothing, with these words on its command line."""
    popen = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)", *words],
                             stdout=subprocess.PIPE)  # fmt: skip
    assert popen.stdout is not None
    popen.stdout.readline()
    try:
        yield psutil.Process(popen.pid)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def status(pid: int | None, *, supervisor: int | None = None, settings: Config | None = None) -> StatusReport:
    """Of a run called `t`, each of whose stages is the process `pid`."""
    example = next(event.status for event in EVENTS if isinstance(event, StatusRecord))
    stages = {name: StageStatus(state="running", pid=pid, restarts=0) for name in STAGES}
    return msgspec.structs.replace(
        example,
        name="t",
        pid=os.getpid() if supervisor is None else supervisor,
        settings=settings or Config(engine="echo"),
        stages=stages,
    )


def test_a_stage_of_the_run_is_found() -> None:
    with program("-m", "procs.inference", "--name", "t") as process:
        assert chaos.stage_process(status(process.pid), "inference") == process


@pytest.mark.parametrize(
    ("words", "supervisor"),
    [
        (("procs.inference", "other"), None),
        (("procs.capture", "t"), None),
        ((), None),
        (("procs.inference", "t"), 1),
    ],
    ids=["another run's", "another stage", "any program", "no child of the run's"],
)
def test_what_is_no_stage_of_the_run_is_not_touched(words: tuple[str, ...], supervisor: int | None) -> None:
    with program(*words) as process, pytest.raises(ControlError, match="expected a stage of the run 't', your own"):
        chaos.stage_process(status(process.pid, supervisor=supervisor), "inference")


def test_a_stage_that_is_not_there() -> None:
    with pytest.raises(ControlError, match="inference is running, and has no process"):
        chaos.stage_process(status(None), "inference")


def test_a_stalled_process_goes_on_however_the_stall_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with program() as process:
        seen = []

        def interrupted(_seconds: float) -> None:
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it stops")
            seen.append(process.status())
            raise KeyboardInterrupt

        monkeypatch.setattr(chaos, "time", type("Time", (), {"sleep": staticmethod(interrupted)}))
        with pytest.raises(KeyboardInterrupt):
            chaos.stall(process, 60)
        assert seen == [psutil.STATUS_STOPPED]
        wait_until(lambda: process.status() != psutil.STATUS_STOPPED, "it goes on")


def test_a_slowed_process_is_stopped_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stalls: list[psutil.Process] = []
    monkeypatch.setattr(chaos, "stall", lambda process, _seconds: stalls.append(process))
    with program() as process:
        chaos.slow(process, 0.2)
        assert stalls == [process] * len(stalls)
    assert len(stalls) > 2


# Who may be killed, and how often


class OneClient:
    """A run that always says the same."""

    def __init__(self, report: StatusReport) -> None:
        self._report = report

    def status(self) -> StatusReport:
        return self._report


def a_chaos(report: StatusReport, text: str) -> chaos.Chaos:
    client: Any = OneClient(report)
    return chaos.Chaos(client, parse(text), 0, lambda incident: None)


def test_no_stage_is_killed_until_the_run_is_given_up() -> None:
    one = a_chaos(status(1), "kill=capture")
    fault = Fault(kind="kill", stage="capture")
    kinds = [one._survivable(fault).kind for _ in range(10)]
    assert kinds == ["kill"] * RESTARTS_MAX + ["stall"] * 2
    assert one._survivable(Fault(kind="kill", stage="playback")).kind == "kill"


def test_hanging_has_to_be_permitted() -> None:
    with pytest.raises(ConfigError, match=r"--faults hang: expected a run with the setting faults\.hang, lock or loop"):
        a_chaos(status(1), "kill,hang")
    a_chaos(status(1, settings=Config(engine="echo", faults=FaultsConfig(hang="loop"))), "kill,hang")


def test_a_run_from_file_to_file_is_left_alone() -> None:
    with pytest.raises(ControlError, match="the run 't' goes from file to file: expected one in real time"):
        a_chaos(status(1, settings=Config(engine="echo", offline=True)), "kill")


# What it tells


def incident(**fields: Any) -> Incident:
    made = {
        "at_s": 3.2, "fault": Fault(kind="stall", stage="inference", seconds=2.0), "gaps": 1, "concealed_ms": 1_970.0,
        "dropped_ms": 1_760.0, "skipped_ms": 175.0, "restarts": 0, "latency_ms": 176.0, "latency_after_ms": 180.0,
        "flows_s": 0.1, "normal_s": 2.5,
    }  # fmt: skip
    return Incident(**{**made, **fields})


def test_rows_stand_below_their_heads() -> None:
    line = chaos.row(incident())
    assert " ".join(line.split()) == "3.2 stall inference 2.0 s 1 1970 ms 1760 ms 175 ms 0 0.1 s 2.5 s 176>180"
    assert chaos.row(incident(normal_s=None)).split()[-2:] == ["never", "176>180"]
    assert len(line) == len(chaos.HEAD)


def test_what_did_not_come_back_is_wrong() -> None:
    counts = Accounting(captured=1, stepped=1)
    assert chaos._complaints(incident(), counts, 60) == []
    unequal = chaos._complaints(incident(), Accounting(captured=1), 60)
    assert unequal == ["after stall inference 2.0 s: captured = stepped + dropped + waiting_in is off by 1"]
    [late] = chaos._complaints(incident(normal_s=None, latency_after_ms=206.0), counts, 60)
    assert late == "after stall inference 2.0 s: latency was 30 ms over what it was for 60 s"
    [gone] = chaos._complaints(incident(flows_s=None, normal_s=None), counts, 60)
    assert gone == "after stall inference 2.0 s: no 12 frames in a row were played within 200 s"


def test_the_summary() -> None:
    incidents = [incident(), incident(flows_s=4.1, normal_s=None)]
    assert chaos.summary(incidents) == (
        "2 faults, 2 gaps, 3940 ms concealed, 3520 ms dropped, 350 ms skipped; "
        "until frames flow 2.1 s, 4.1 s at most; until latency is back 2.5 s, 2.5 s at most"
    )


# A disk that is full


def test_a_disk_is_full_for_a_while_and_then_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says ENOSPC where a real disk would be full; a real one is not this test's to fill."""
    held: list[int] = []
    sizes: list[int] = []
    room = 3 * len(chaos._BLOCK)

    def write(descriptor: int, block: bytes) -> int:
        if os.fstat(descriptor).st_size >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        held.append(descriptor)
        return real_write(descriptor, block)

    real_write = os.write
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(time, "sleep", lambda _seconds: sizes.append(os.fstat(held[-1]).st_size))
    chaos.fill(tmp_path, 2.0)
    assert sizes == [room]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="No such file or directory: expected a folder that can be written to"):
        chaos.fill(tmp_path / "gone", 0.0)


# An engine of a set speed


def test_a_paced_engine_says_what_its_engine_says_and_takes_its_time() -> None:
    engine = Paced(Echo(), FaultsConfig(step_ms=20, jitter_ms=5, seed=1))
    assert (engine.name, engine.overlaps) == ("echo", False)
    sound = np.arange(FRAME, dtype=np.float32)
    engine.listen(sound)
    begin_s = time.monotonic()
    step = engine.respond().result()
    assert (time.monotonic() - begin_s) * 1_000 >= step.step_ms >= 20
    assert np.array_equal(step.audio, sound)
    engine.listen(sound)
    engine.reset()
    with pytest.raises(IndexError):
        engine.respond()


# A stage that hangs

HANGING: Final = """
import faulthandler, signal, sys, threading, time
from pipeline.faults import hang_on_signal
from pipeline.worker import SHOW_STACKS
faulthandler.register(SHOW_STACKS, chain=False)
def beat():
    while True:
        print("beat", flush=True)
        time.sleep(0.05)
threading.Thread(target=beat, daemon=True).start()
hang_on_signal(sys.argv[1])
print("ready", flush=True)
while True:
    time.sleep(0.01)
    print("turn", flush=True)
"""


@pytest.mark.parametrize(("how", "beats"), [("lock", False), ("loop", True)])
def test_a_hang_with_the_interpreters_lock_and_without(how: str, beats: bool, tmp_path: Path) -> None:
    said, stacks = tmp_path / "said", tmp_path / "stacks"
    with said.open("w") as out, stacks.open("w") as err:
        popen = subprocess.Popen([sys.executable, "-c", HANGING, how], stdout=out, stderr=err)
    try:
        wait_until(lambda: "turn" in said.read_text(), "it turns")
        popen.send_signal(HANG)
        time.sleep(0.3)
        before = said.read_text()
        time.sleep(0.3)
        grown = said.read_text().removeprefix(before)
        assert "turn" not in grown
        assert ("beat" in grown) == beats
        popen.send_signal(signal.SIGUSR1)
        wait_until(lambda: "_keep_the_lock" in stacks.read_text() or "_turn" in stacks.read_text(), "its stacks")
        assert popen.poll() is None
    finally:
        popen.kill()
        popen.wait()
