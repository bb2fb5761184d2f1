"""pipeline.messages: what is said between processes, on the wire and back."""

import json
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import messages
from pipeline.messages import (
    CARRIED_OUT_BY,
    VERBS,
    Accounting,
    Acknowledged,
    AnyCommand,
    Apply,
    Command,
    Finish,
    Finished,
    Heartbeat,
    LogRecord,
    Mute,
    Order,
    Reply,
    Report,
    Reset,
    Shutdown,
    Spread,
    StageRecord,
    StageSpread,
    StageStatus,
    Start,
    Status,
    StatusReport,
    Stop,
    TextRecord,
    Timing,
    TimingRecord,
    Unmute,
    XrunRecord,
    Xruns,
)
from pipeline.topology import PROCESSES

STAGES = [process.name for process in PROCESSES]

COMMANDS: list[AnyCommand] = [Status(), Mute(), Unmute(), Reset(), Shutdown()]

REPORTS: list[Report] = [
    StageRecord(stage="capture", state="running", detail="a device", device_latency_ms=1.5, time_ns=1 << 62),
    TimingRecord(stage="capture", frame=0, start_ns=1, end_ns=2, queued=3),
    TimingRecord(
        stage="inference", frame=1, start_ns=1, end_ns=2, queued=0, encode_ms=0.5, step_ms=50.25, decode_ms=1.0
    ),
    TimingRecord(stage="playback", frame=1, start_ns=1, end_ns=2, queued=0, mic_to_speaker_ms=240.5),
    TextRecord(frame=7, text=' "héllo"\n', time_ns=5),
    XrunRecord(stage="playback", kind="gap", count=2, time_ns=5),
    LogRecord(stage="supervisor", level="warning", message="x", time_ns=5),
    Acknowledged(request=3, frame=9),
    Acknowledged(request=3, frame=9, error="it cannot"),
    Finished(stage="playback"),
    Heartbeat(stage="inference", device_latency_ms=3.0, lost_reports=2),
]

ORDERS: list[Order] = [Start(), Finish(), Stop(), *(Apply(request=4, command=command) for command in COMMANDS)]


def a_status() -> StatusReport:
    return StatusReport(
        pid=1,
        muted=False,
        name="t",
        state="running",
        engine="echo",
        uptime_s=1.5,
        stages={name: StageStatus(state="running", pid=number, restarts=0) for number, name in enumerate(STAGES)},
        accounting=Accounting(captured=1_920, stepped=1_920, generated=1_920, played=1_920, sent=1_920),
        timing=Timing(
            capture=Spread(), inference=StageSpread(frames=1, late=1), playback=Spread(), mic_to_speaker_ms=Spread()
        ),
        xruns=Xruns(capture=1),
        drift_ppm=None,
    )


def name_of(message: Any) -> str:
    return type(message).__name__


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_commands_go_round(command: AnyCommand) -> None:
    assert messages.decode_command(messages.encode(command)) == command


@pytest.mark.parametrize("report", REPORTS, ids=name_of)
def test_reports_go_round(report: Report) -> None:
    assert messages.decode_report(messages.encode(report)) == report


@pytest.mark.parametrize("order", ORDERS, ids=name_of)
def test_orders_go_round(order: Order) -> None:
    assert messages.decode_order(messages.encode(order)) == order


@pytest.mark.parametrize(
    "reply",
    [
        Reply(ok=True),
        Reply(ok=False, error="no"),
        Reply(ok=True, verb="mute", stage="capture", frame=0),
        Reply(ok=True, verb="status", status=a_status()),
    ],
)
def test_replies_go_round(reply: Reply) -> None:
    assert messages.decode_reply(messages.encode(reply)) == reply


def test_nothing_that_can_be_said_is_left_out_above() -> None:
    assert {type(report) for report in REPORTS} == set(typing.get_args(Report))
    assert {type(order) for order in ORDERS} == set(typing.get_args(Order))
    assert {type(command) for command in COMMANDS} <= set(typing.get_args(AnyCommand))


def test_the_wire_is_plain_json() -> None:
    assert messages.encode(Mute()) == b'{"verb":"mute"}'
    assert messages.encode(Apply(request=1, command=Reset())) == (
        b'{"type":"apply","request":1,"command":{"verb":"reset"}}'
    )


def test_a_timing_record_holds_what_was_promised() -> None:
    """Also where it is 0, or what a reader takes for granted."""
    record = TimingRecord(stage="inference", frame=4, start_ns=1, end_ns=2, queued=0)
    found = json.loads(messages.encode(record))
    assert set(found) >= {
        "schema",
        "stage",
        "frame",
        "start_ns",
        "end_ns",
        "queued",
        "encode_ms",
        "step_ms",
        "decode_ms",
    }


@pytest.mark.parametrize("report", REPORTS, ids=name_of)
def test_every_record_carries_the_version_of_its_schema(report: Report) -> None:
    assert json.loads(messages.encode(report))["schema"] == messages.SCHEMA


def test_every_command_has_a_verb_and_someone_to_carry_it_out() -> None:
    assert set(VERBS.values()) == set(typing.get_args(AnyCommand)) == set(Command.__subclasses__())
    for verb, kind in VERBS.items():
        assert verb == kind.__name__.lower()
    assert set(CARRIED_OUT_BY.values()) <= set(STAGES)
    by_the_supervisor = set(VERBS.values()) - set(CARRIED_OUT_BY)
    assert {Status, Shutdown} <= by_the_supervisor
    assert not by_the_supervisor & {Mute, Unmute, Reset}


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ('{"verb": "dance"}', "Invalid value 'dance' - at `$.verb`"),
        ('{"verb": "Mute"}', "Invalid value 'Mute' - at `$.verb`"),
        ('{"verb": 1}', "Expected `str` - at `$.verb`"),
        ('{"verb": "mute", "loud": true}', "Object contains unknown field `loud`"),
        ('{"loud": true}', "Object missing required field `verb`"),
        ("[]", "Expected `object`, got `array`"),
        ("null", "Expected `object`, got `null`"),
        ('{"verb": "mute"', "Input data was truncated"),
        ('{"verb": "mute"}{', "JSON is malformed: trailing characters (byte 17)"),
    ],
)
def test_what_is_no_command_is_refused_by_name(sent: str, error: str) -> None:
    with pytest.raises(msgspec.MsgspecError) as refused:
        messages.decode_command(sent)
    assert str(refused.value) == error


@pytest.mark.parametrize(
    "sent",
    [
        {"type": "timing", "stage": "kitchen", "frame": 0, "start_ns": 0, "end_ns": 0, "queued": 0},
        {"type": "timing", "stage": "capture", "frame": "0", "start_ns": 0, "end_ns": 0, "queued": 0},
        {"type": "timing", "stage": "capture", "frame": 0, "start_ns": 0, "end_ns": 0},
        {"type": "state", "stage": "capture", "state": "asleep"},
        {"type": "xrun", "stage": "capture", "kind": "crackle", "count": 1, "time_ns": 0},
        {"type": "log", "stage": "capture", "level": "loud", "message": "", "time_ns": 0},
        {"type": "nothing"},
        {},
    ],
)
def test_what_is_no_report_is_refused(sent: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_report(json.dumps(sent))


@pytest.mark.parametrize(
    "sent",
    [
        {"type": "apply", "request": -1, "command": {"verb": "mute"}},
        {"type": "apply", "request": 1, "command": {"verb": "dance"}},
        {"type": "apply", "request": 1},
        {"type": "dance"},
    ],
)
def test_what_is_no_order_is_refused(sent: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_order(json.dumps(sent))


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
def test_garbage_is_never_more_than_a_message_that_is_refused(data: bytes) -> None:
    for decode in (messages.decode_command, messages.decode_report, messages.decode_order, messages.decode_reply):
        with pytest.raises(msgspec.MsgspecError):
            decode(data)


def test_topics() -> None:
    expected = {
        StageRecord: "state.capture",
        TimingRecord: "timing.capture",
        LogRecord: "log.capture",
        TextRecord: "text",
        XrunRecord: "xrun",
        Acknowledged: None,
        Finished: None,
        Heartbeat: None,
    }
    assert {type(report): topic_of_capture(report) for report in REPORTS} == expected
    for stage in STAGES:
        assert messages.topic(StageRecord(stage=stage, state="ready")) == f"state.{stage}"
        record = TimingRecord(stage=stage, frame=0, start_ns=0, end_ns=0, queued=0)
        assert messages.topic(record) == f"timing.{stage}"


def topic_of_capture(report: Report) -> str | None:
    if hasattr(report, "stage"):
        report = msgspec.structs.replace(report, stage="capture")
    return messages.topic(report)


# Accounting


def test_accounting_that_holds_has_no_discrepancies() -> None:
    assert Accounting().discrepancies() == []
    exact = Accounting(
        captured=10, stepped=5, dropped=3, waiting_in=2,
        generated=5, played=3, skipped=1, waiting_out=1,
        sent=7, concealed=4,
    )  # fmt: skip
    assert exact.discrepancies() == []


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("captured", "captured = stepped + dropped + waiting_in is off by 5"),
        ("stepped", "captured = stepped + dropped + waiting_in is off by -5"),
        ("dropped", "captured = stepped + dropped + waiting_in is off by -5"),
        ("waiting_in", "captured = stepped + dropped + waiting_in is off by -5"),
        ("generated", "generated = played + skipped + waiting_out is off by 5"),
        ("skipped", "generated = played + skipped + waiting_out is off by -5"),
        ("waiting_out", "generated = played + skipped + waiting_out is off by -5"),
        ("sent", "sent = played + concealed is off by 5"),
        ("concealed", "sent = played + concealed is off by -5"),
    ],
)
def test_each_equation_is_watched(field: str, line: str) -> None:
    assert Accounting(**{field: 5}).discrepancies() == [line]


def test_what_was_cleaned_is_in_no_equation() -> None:
    counts = Accounting(cleaned=3, cleaned_answers=4)
    assert counts.discrepancies() == []
    assert json.loads(messages.encode(counts))["cleaned_answers"] == 4
    assert Accounting(cleaned_answers=-1).discrepancies() == ["cleaned_answers is -1"]


def test_reports_that_were_lost_are_shown() -> None:
    assert json.loads(messages.encode(Heartbeat(stage="capture", lost_reports=5)))["lost_reports"] == 5
    found = json.loads(messages.encode(StageStatus(state="running", pid=1, restarts=0, lost_reports=5)))
    assert found["lost_reports"] == 5
    assert json.loads(messages.encode(StageStatus(state="running", pid=1, restarts=0)))["lost_reports"] == 0


def test_one_count_may_break_two_equations() -> None:
    assert len(Accounting(played=1).discrepancies()) == 2


@pytest.mark.parametrize(
    "impossible",
    [
        Accounting(captured=10, stepped=15, waiting_in=-5),
        Accounting(generated=10, played=5, skipped=15, waiting_out=-10, sent=5),
        Accounting(generated=5, played=5, sent=2, concealed=-3),
    ],
)
def test_a_count_that_no_count_can_be_is_a_discrepancy(impossible: Accounting) -> None:
    """What waits is what is left of the others, so that its equation holds whatever they are."""
    assert impossible.discrepancies() != []
