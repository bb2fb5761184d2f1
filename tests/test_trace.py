"""pipeline.trace and pipeline.perfetto: what a history comes out as, read by Perfetto's schema, and its file."""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import messages, perfetto, trace
from pipeline.client import Client
from pipeline.config import Config
from pipeline.errors import ConfigError, ControlError, PipelineError
from pipeline.flight import FlightRecorder
from pipeline.messages import (
    Accounting,
    CommandRecord,
    Effect,
    Event,
    LogRecord,
    RecordingRecord,
    Reply,
    RunRecord,
    Spread,
    StageRecord,
    StageSpread,
    StageStatus,
    StatusReport,
    TextRecord,
    Timing,
    TimingRecord,
    XrunRecord,
    Xruns,
)
from pipeline.perfetto import Instant, Sample, Slice, Trace
from pipeline.runtime import RunFolder
from pipeline.topology import FRAME_NS, StageName
from pipeline.trace import STALL_NS, History
from tests import helpers
from tests.test_client import up
from tests.trace_reader import TraceFile

folder = helpers.folder
runtime_dir = helpers.runtime_dir

MS = 1_000_000
BEGIN_NS = 1_000_000 * MS
STEP_NS = 30 * MS
RING_NS = MS
PIDS: dict[StageName, int] = {"capture": 11, "inference": 12, "playback": 13}


def status(paused: bool = False, pids: dict[StageName, int] | None = None) -> StatusReport:
    stages: list[StageName] = ["capture", "inference", "playback"]
    return StatusReport(
        name="t",
        pid=10,
        muted=False,
        state="running",
        engine="echo",
        uptime_s=1,
        time_ns=BEGIN_NS,
        paused=paused,
        recording=None,
        settings=Config(),
        stages={
            stage: StageStatus(state="running", pid=(PIDS if pids is None else pids).get(stage), restarts=0)
            for stage in stages
        },
        accounting=Accounting(),
        timing=Timing(capture=Spread(), inference=StageSpread(), playback=Spread(), mic_to_speaker_ms=Spread()),
        xruns=Xruns(),
        drift_ppm=None,
    )


def captured(frame: int) -> TimingRecord:
    """A frame was in the ring a millisecond after its last sample."""
    start_ns = BEGIN_NS + frame * FRAME_NS
    return TimingRecord(
        stage="capture",
        frame=frame,
        start_ns=start_ns,
        end_ns=start_ns + FRAME_NS + RING_NS,
        queued=0,
        level_dbfs=-20.0,
        peak_dbfs=-17.0,
    )


def in_ring_ns(frame: int) -> int:
    return captured(frame).end_ns


def answered(frame: int, start_ns: int | None = None, took_ns: int = STEP_NS, queued: int = 1) -> TimingRecord:
    start_ns = in_ring_ns(frame) if start_ns is None else start_ns
    return TimingRecord(
        stage="inference",
        frame=frame,
        start_ns=start_ns,
        end_ns=start_ns + took_ns,
        queued=queued,
        step_ms=took_ns / MS,
    )


def sent(answer: TimingRecord) -> TimingRecord:
    return TimingRecord(
        stage="playback",
        frame=answer.frame,
        start_ns=answer.end_ns,
        end_ns=answer.end_ns + 20 * MS,
        queued=1,
        mic_to_speaker_ms=130.0,
    )


def of(events: list[Any], paused: bool = False) -> tuple[History, TraceFile]:
    history = History(events, status(paused))
    return history, TraceFile(history.trace().serialize())


def healthy(frames: int) -> list[Event]:
    answers = [answered(frame) for frame in range(frames)]
    return [*(captured(frame) for frame in range(frames)), *answers, *(sent(answer) for answer in answers)]


def stopped(at_ns: int, for_ns: int, frames: int, kept: int = 2) -> list[Event]:
    """A model that stood still, and then dropped all but the last frames that had waited."""
    until_ns = at_ns + for_ns
    events: list[Event] = [captured(frame) for frame in range(frames)]
    before = [frame for frame in range(frames) if in_ring_ns(frame) + STEP_NS <= at_ns]
    waiting = [frame for frame in range(len(before), frames) if in_ring_ns(frame) <= until_ns]
    after = range(len(before) + len(waiting), frames)
    events += [answered(frame) for frame in before]
    free_ns = until_ns
    for frame in [*waiting[-kept:], *after]:
        answer = answered(frame, max(free_ns, in_ring_ns(frame)))
        free_ns = answer.end_ns
        events.append(answer)
    return events


# Stalls


def test_a_healthy_run_has_no_stall() -> None:
    history, file = of(healthy(50))
    assert history.stalls == []
    assert file.on("stalls") == []
    assert file.at("late") == []


def test_a_stall_is_found_with_its_length_though_its_frames_were_dropped() -> None:
    at_ns = in_ring_ns(9) + 40 * MS
    history, file = of(stopped(at_ns, 1_500 * MS, 60))
    (stall,) = file.on("stalls", "inference")
    assert stall.start_ns == in_ring_ns(10)  # the first that waited
    assert stall.end_ns == at_ns + 1_500 * MS + STEP_NS  # the first that was answered
    assert stall.name == "stall"
    assert [stall.duration_ms] == [found.duration_ms for found in history.stalls]


@settings(max_examples=50, deadline=None)
@given(at_ms=st.integers(0, 160), for_ms=st.integers(400, 3_000), kept=st.integers(1, 40))
def test_a_stall_of_any_length_at_any_moment_is_found_within_a_frame(at_ms: int, for_ms: int, kept: int) -> None:
    history = History(stopped(in_ring_ns(9) + at_ms * MS, for_ms * MS, 60, kept), status())
    (stall,) = history.stalls
    # It may begin while no frame waits, and ends with an answer.
    assert -FRAME_NS <= stall.end_ns - stall.start_ns - for_ms * MS <= 2 * STEP_NS


def test_what_is_not_longer_than_two_frames_is_late_and_no_stall() -> None:
    events = [captured(0), captured(1), answered(0), answered(1, took_ns=STALL_NS)]
    history, file = of(events)
    assert history.stalls == []
    (late,) = file.at("late", "inference")
    assert (late.values["frame"], late.values["took_ms"]) == (1, 160.0)
    assert len(of([*events[:3], answered(1, took_ns=STALL_NS + 1)])[0].stalls) == 1


def test_a_model_that_overlaps_and_answers_each_frame_after_95_ms_stalls_nowhere() -> None:
    events = [captured(frame) for frame in range(20)] + [answered(frame, took_ns=95 * MS) for frame in range(20)]
    history, file = of(events)
    assert history.stalls == []
    assert len(file.on("frames", "inference")) == 20  # in two lanes, or the reader would have refused them


def test_a_pause_is_no_stall() -> None:
    said = [
        CommandRecord(verb=verb, ok=True, start_ns=at_ns, end_ns=at_ns)
        for verb, at_ns in (("pause", in_ring_ns(9) + 50 * MS), ("resume", in_ring_ns(30)))
    ]
    frames = [*range(10), *range(31, 40)]
    assert of([*(captured(frame) for frame in range(40)), *map(answered, frames), *said])[0].stalls == []
    still = [*(captured(frame) for frame in range(40)), *map(answered, range(10)), said[0]]
    assert of(still, paused=True)[0].stalls == []


def test_nobody_speaks_into_the_microphone_is_no_stall() -> None:
    """Frames that come late, after capture's restart, do not wait for the model."""
    frames = [*range(10), *range(40, 50)]
    assert of([*map(captured, frames), *map(answered, frames)])[0].stalls == []


def test_a_stall_that_lasts_is_shown_to_the_end() -> None:
    _, file = of([*(captured(frame) for frame in range(30)), *map(answered, range(10))])
    (stall,) = file.on("stalls")
    assert (stall.start_ns, stall.end_ns) == (in_ring_ns(10), in_ring_ns(29))
    assert stall.values == {"waiting": 20}
    _, file = of([captured(frame) for frame in range(10, 30)])
    assert file.on("stalls")[0].duration_ms == 19 * 80


def test_a_trace_that_begins_within_a_stall_has_the_rest_of_it() -> None:
    at_ns = in_ring_ns(29) + 5 * MS
    history = of([*(captured(frame) for frame in range(15, 30)), answered(15, at_ns), answered(16, at_ns + STEP_NS)])[0]
    assert [(stall.start_ns, stall.frame) for stall in history.stalls] == [(in_ring_ns(15), 15)]


# What is drawn


def test_a_frame_is_followed_from_the_microphone_to_the_speaker() -> None:
    _, file = of(healthy(20))
    assert list(file.processes) == ["run t", "capture", "inference", "playback"]
    assert list(file.processes.values()) == [10, 11, 12, 13]
    assert len(file.flows) == 20
    for way in file.flows.values():
        assert [(one.process, one.track) for one in way] == [
            ("capture", "microphone"),
            ("capture", "to the ring"),
            ("inference", "frames"),
            ("playback", "to the speaker"),
            ("playback", "speaker"),
        ]
        assert len({one.values["frame"] for one in way}) == 1
    microphone = file.on("microphone")
    assert {one.duration_ms for one in microphone} == {80.0}
    assert file.on("to the ring")[3].duration_ms == 1.0
    assert file.on("frames")[3].values["step_ms"] == 30.0


def test_counters() -> None:
    _, file = of(stopped(in_ring_ns(9) + 40 * MS, 500 * MS, 30))
    levels = file.counters["capture: level"]
    assert levels == [(captured(frame).start_ns, -20.0) for frame in range(30)]
    assert file.units["capture: level"] == "dBFS"
    assert file.counters["capture: peak"][0][1] == -17.0
    assert {file.units[f"inference: {name}"] for name in ("waiting for inference", "step", "encode")} == {"ms"}
    assert max(value for _, value in file.counters["inference: step"]) == 30.0
    for samples in file.counters.values():
        assert [at_ns for at_ns, _ in samples] == sorted(at_ns for at_ns, _ in samples)
    _, file = of([captured(0), answered(0, queued=3), sent(answered(0))])
    assert file.counters["inference: waiting for inference"][-1][1] == 240.0
    assert file.counters["playback: waiting for playback"] == [(answered(0).end_ns, 80.0)]
    assert file.counters["playback: microphone to speaker"][0][1] == 130.0


def test_what_happened_is_there_with_what_it_said() -> None:
    at_ns = BEGIN_NS
    _, file = of(
        [
            RunRecord(name="t", pid=10, state="running", muted=True, paused=False, engine="echo", time_ns=at_ns),
            StageRecord(stage="playback", state="ready", detail="null", time_ns=at_ns),
            CommandRecord(
                verb="set",
                values={"volume": 0.5},
                ok=True,
                effects=[Effect(stage="playback", frame=7)],
                start_ns=at_ns,
                end_ns=at_ns + MS,
            ),
            CommandRecord(verb="input", ok=False, error="no such file", start_ns=at_ns, end_ns=at_ns + 2 * MS),
            TextRecord(frame=5, text=" Hé", time_ns=at_ns),
            XrunRecord(stage="playback", kind="gap", count=2, time_ns=at_ns),
            XrunRecord(stage="inference", kind="dropped", count=9, time_ns=at_ns),
            LogRecord(stage="capture", level="warning", message="is this on?", time_ns=at_ns),
            LogRecord(stage="supervisor", level="error", message="inference died", time_ns=at_ns),
            RecordingRecord(path="a.wav", transcript="a.txt", on=False, frame=3, seconds=2.5, time_ns=at_ns),
        ]
    )
    assert [one.name for one in file.at("state", "run t")] == ["running, muted"]
    assert [(one.name, one.values) for one in file.at("state", "playback")] == [("ready", {"detail": "null"})]
    done, refused = file.on("commands")
    assert (done.name, done.values) == ("set", {"ok": True, "volume": "0.5", "playback_from_frame": 7})
    assert (refused.name, refused.values) == ("input", {"ok": False, "error": "no such file"})
    assert [(one.name, one.values["frame"]) for one in file.at("words")] == [(" Hé", 5)]
    assert [(one.process, one.name, one.values["count"]) for one in file.at("losses")] == [
        ("inference", "dropped", 9),
        ("playback", "gap", 2),
    ]
    assert {(one.process, one.name, one.category) for one in file.at("log")} == {
        ("capture", "is this on?", "warning"),
        ("run t", "inference died", "error"),
    }
    (ended,) = file.at("recording")
    assert (ended.name, ended.values["seconds"]) == ("recording ends", 2.5)


def test_a_run_of_which_nothing_is_known_and_a_stage_that_is_down() -> None:
    file = TraceFile(History([], status(pids={})).trace().serialize())
    assert file.slices == []
    assert list(file.processes) == ["run t"]


# The format


@given(st.lists(st.tuples(st.integers(1, 1_000), st.integers(0, 300)), max_size=60))
def test_slices_come_back_with_their_lengths_however_they_overlap(times: list[tuple[int, int]]) -> None:
    made = Trace(time.monotonic_ns())
    slices = [Slice(f"s{n}", start, start + length) for n, (start, length) in enumerate(times)]
    made.slices(made.process("p", 1), "t", slices)
    found = TraceFile(made.serialize()).slices
    assert {(one.name, one.start_ns, one.end_ns) for one in found} == {one[:3] for one in slices}
    assert len(found) == len(slices)


def test_slices_that_do_not_overlap_share_a_lane() -> None:
    assert len(perfetto.lanes([Slice("a", n * 10, n * 10 + 10) for n in range(10)])) == 1
    assert len(perfetto.lanes([Slice("a", n * 10, n * 10 + 11) for n in range(10)])) == 2


def test_clipped_slices_end_where_the_next_begins() -> None:
    slices = [Slice("b", 10, 95), Slice("a", 1, 12), Slice("c", 90, 99)]
    assert [(one.name, one.start_ns, one.end_ns) for one in perfetto.clipped(slices)] == [
        ("a", 1, 10),
        ("b", 10, 90),
        ("c", 90, 99),
    ]
    assert perfetto.clipped([]) == []


def test_values_keep_their_kinds() -> None:
    made = Trace(time.monotonic_ns())
    values: dict[str, perfetto.Value] = {"yes": True, "count": -3, "ratio": 0.25, "word": "ü"}
    made.instants(made.process("p", None), "t", [Instant("i", 5, values, "c")])
    (found,) = TraceFile(made.serialize()).instants
    assert found.values == values
    assert type(found.values["yes"]) is bool
    assert (found.name, found.start_ns, found.category) == ("i", 5, "c")


def test_the_reader_refuses_what_the_trace_processor_would_bend() -> None:
    made = Trace(time.monotonic_ns())
    made.counter(made.process("p", 1), "c", "ms", [Sample(5, 1.0)])
    good = made.serialize()
    assert TraceFile(good).counters["p: c"] == [(5, 1.0)]
    with pytest.raises(AssertionError, match="sequence"):
        TraceFile(Trace(time.monotonic_ns()).serialize().replace(b"\x50\x01", b"\x50\x02"))


# The command


@contextmanager
def answering(folder: RunFolder, events: list[Event]) -> Iterator[list[messages.Trace]]:
    """A run that has had these events."""
    flight, asked = FlightRecorder(), list[messages.Trace]()
    for event in events:
        flight.add(str(messages.topic(event)), messages.encode(event), 1)

    def answer(data: bytes) -> Reply:
        command = messages.decode_command(data)
        if not isinstance(command, messages.Trace):
            return Reply(ok=True, verb="status", status=status())
        asked.append(command)
        return Reply(ok=True, verb="trace", records=flight.since(0))

    with up(folder, answer):
        yield asked


def test_the_file_holds_what_the_run_tells(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pftrace"
    with answering(folder, healthy(10)) as asked:
        assert trace.command(Client("t"), path, seconds=4.5, following=False) == 0
    assert [command.seconds for command in asked] == [4.5]
    assert len(TraceFile.read(path).flows) == 10
    assert capsys.readouterr().out.startswith(f"{path}: 0.8 s, frames: 10, stalls: 0; open it at ")
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_seconds_are_waited_for(folder: RunFolder, tmp_path: Path) -> None:
    with answering(folder, healthy(3)) as asked:
        trace.command(Client("t"), tmp_path / "a", seconds=0.05, following=True)
    assert asked[0].seconds is not None
    assert asked[0].seconds >= 0.05


def test_ctrl_c_saves_what_there_is(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pipeline.trace.time.sleep", interrupted)
    assert threading.current_thread() is threading.main_thread()
    with answering(folder, healthy(3)) as asked:
        assert trace.command(Client("t"), tmp_path / "a", seconds=100, following=True) == 0
    assert asked[0].seconds is not None
    assert asked[0].seconds < 100
    assert len(TraceFile.read(tmp_path / "a").flows) == 3


def refused(call: Callable[[], object], kind: type[PipelineError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("seconds", "following", "line"),
    [
        (None, True, "--next with no --seconds: expected --seconds of at most 300, for which records are kept"),
        (301.0, True, "--next with --seconds 301: expected --seconds of at most 300, for which records are kept"),
        (float("nan"), False, "--seconds nan: expected a number of seconds"),
        (float("inf"), True, "--seconds inf: expected a number of seconds"),
    ],
)
def test_seconds_that_cannot_be(tmp_path: Path, seconds: float | None, following: bool, line: str) -> None:
    assert refused(lambda: trace.command(Client("t"), tmp_path / "a", seconds=seconds, following=following)) == line


def test_a_file_that_cannot_be_is_told_before_anything_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, expected in (
        (tmp_path, "expected a file"),
        (Path("/dev/null"), "expected a file"),
        (tmp_path / "no" / "a", "expected a file in a folder that is there and may be written"),
        (tmp_path / "file" / "a", "expected a file in a folder that is there and may be written"),
    ):
        line = refused(lambda path=path: trace.command(Client("t"), path, seconds=100, following=True))  # type: ignore[misc]
        assert line == f"-o {path}: {expected}"


def test_a_run_that_is_not_up_costs_no_file(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("good")
    for following in (False, True):
        call = lambda following=following: trace.command(Client("t"), path, seconds=9, following=following)  # noqa: E731
        assert "no run is up under 't'" in refused(call, ControlError)
    assert path.read_text() == "good"


def test_a_disk_that_is_full_leaves_the_file_that_was_there(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("good")

    def full(part: Path, data: bytes) -> int:
        with part.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with answering(folder, healthy(3)):
        line = refused(lambda: trace.command(Client("t"), path, seconds=None, following=False))
    assert line == f"-o {path}: cannot be written: No space left on device"
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(folder: RunFolder, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with answering(folder, healthy(3)):
        trace.command(Client("t"), link, seconds=None, following=False)
    assert link.is_symlink()
    assert len(TraceFile.read(tmp_path / "real").flows) == 3
