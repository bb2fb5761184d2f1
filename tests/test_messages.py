"""pipeline.messages: what is said between processes, on the wire and back."""

import json
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UnsetType

from pipeline import messages
from pipeline.config import Config
from pipeline.messages import (
    ALTERS,
    VERBS,
    Accounting,
    Acknowledged,
    AnyCommand,
    Apply,
    Command,
    CommandRecord,
    Effect,
    Event,
    Finish,
    Finished,
    Heartbeat,
    Input,
    LogRecord,
    Mute,
    Order,
    Output,
    OverloadRecord,
    Pause,
    Record,
    RecordingRecord,
    Reply,
    Report,
    Reset,
    Restart,
    Resume,
    RunRecord,
    Set,
    Shutdown,
    Spread,
    StageRecord,
    StageSpread,
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
    XrunRecord,
    Xruns,
)
from pipeline.topology import PROCESSES

STAGES = [process.name for process in PROCESSES]

COMMANDS: list[AnyCommand] = [
    Status(),
    Mute(),
    Unmute(),
    Pause(),
    Resume(),
    Reset(),
    Set(text_temperature=0.5, text_top_k=None, volume=0.25),
    Input(spec="device:USB [front]"),
    Output(spec="null"),
    Restart(stage="inference"),
    Record(on=True, path="talk.wav"),
    Record(on=False),
    Trace(seconds=1.5),
    Trace(),
    Shutdown(),
]

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
    RecordingRecord(
        path="/talk.wav", transcript="/talk.txt", on=False, frame=3, seconds=2.5, lost=4, error="x", time_ns=5
    ),
    Acknowledged(request=3, frame=9),
    Acknowledged(request=3, frame=9, error="it cannot"),
    Finished(stage="playback"),
    Heartbeat(stage="inference", device_latency_ms=3.0, lost_reports=2),
]

OTHER_EVENTS: list[Event] = [
    OverloadRecord(on=True, p95_ms=91.5, advice="q4", time_ns=5),
    RunRecord(name="t", pid=1, state="running", muted=True, paused=False, engine="echo", time_ns=5),
    CommandRecord(
        verb="set", values={"volume": 0.5}, ok=True, effects=[Effect(stage="playback", frame=3)], start_ns=1, end_ns=2
    ),
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
        time_ns=1 << 62,
        paused=True,
        overloaded=False,
        recording="/talk.wav",
        settings=Config(engine="echo"),
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
        Reply(ok=True, verb="mute", stage="capture", frame=0, effects=[Effect(stage="capture", frame=0)]),
        Reply(ok=True, verb="trace", records=[msgspec.Raw(b'["text",{"frame":1}]'), msgspec.Raw(b"[]")]),
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
        b'{"type":"apply","request":1,"command":{"verb":"reset"},"until_ns":null}'
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


@pytest.mark.parametrize("event", [*OTHER_EVENTS, StatusRecord(status=a_status())], ids=name_of)
def test_events_go_round(event: Event) -> None:
    assert messages.decode_event(messages.encode(event)) == event


def test_every_report_that_has_a_topic_is_an_event() -> None:
    for report in REPORTS:
        if messages.topic(report) is not None:
            assert messages.decode_event(messages.encode(report)) == report
    events = {type(report) for report in REPORTS if messages.topic(report)} | {type(event) for event in OTHER_EVENTS}
    assert events | {StatusRecord} == set(typing.get_args(Event))


def test_every_command_has_a_verb() -> None:
    assert set(VERBS.values()) == set(typing.get_args(AnyCommand)) == set(Command.__subclasses__())
    for verb, kind in VERBS.items():
        assert verb == kind.__name__.lower()


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        (Mute(), ["capture"]),
        (Unmute(), ["capture"]),
        (Input(spec="silence"), ["capture"]),
        (Output(spec="null"), ["playback"]),
        (Pause(), ["inference"]),
        (Resume(), ["inference"]),
        (Reset(), ["inference"]),
        (Set(audio_top_p=0.5), ["inference"]),
        (Set(backlog_limit=4), ["inference"]),
        (Set(volume=0.0), ["playback"]),
        (Set(queue_frames=4, text_temperature=0.0), ["inference", "playback"]),
        (Set(), []),
        (Status(), []),
        (Restart(stage="capture"), []),
        (Record(on=False), []),
        (Trace(), []),
        (Shutdown(), []),
    ],
    ids=str,
)
def test_who_carries_a_command_out(command: Command, stages: list[str]) -> None:
    assert messages.carried_out_by(command) == stages


def test_what_set_may_change_are_settings_of_the_same_meaning_and_limits() -> None:
    assert set(ALTERS) == set(Set.__struct_fields__)
    tables = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for name, key in ALTERS.items():
        section, _, last = key.partition(".")
        assert last == name
        setting = next(field for field in msgspec.structs.fields(tables[section]) if field.name == name)
        given_types = {kind for kind in typing.get_args(Set.__annotations__[name]) if kind is not UnsetType}
        own = setting.type
        own_types = set(typing.get_args(own)) if type(None) in typing.get_args(own) else {own}
        assert given_types - {type(None)} == own_types - {type(None)}


def test_what_is_given_leaves_out_what_is_not() -> None:
    assert messages.given(Set(text_top_k=None, volume=1.0)) == {"text_top_k": None, "volume": 1.0}
    assert messages.given(Record(on=False)) == {"on": False, "path": None}
    assert messages.given(Mute()) == {}


@pytest.mark.parametrize(
    ("value", "level"),
    [(1.0, 0.0), (0.5, -6.0206), (0.1, -20.0), (1e-7, messages.SILENCE_DBFS), (0.0, messages.SILENCE_DBFS)],
)
def test_decibels_of_full_scale(value: float, level: float) -> None:
    assert messages.dbfs(value) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ('{"verb": "dance"}', "Invalid value 'dance' - at `$.verb`"),
        ('{"verb": "Mute"}', "Invalid value 'Mute' - at `$.verb`"),
        ('{"verb": 1}', "Expected `str` - at `$.verb`"),
        ('{"verb": "mute", "loud": true}', "Object contains unknown field `loud`"),
        ('{"loud": true}', "Object missing required field `verb`"),
        ("[]", "Expected `object`, got `array`"),
        ('{"verb": "set", "volume": 2}', "Expected `float` <= 1.0 - at `$.volume`"),
        ('{"verb": "set", "volume": null}', "Expected `float`, got `null` - at `$.volume`"),
        ('{"verb": "set", "text_top_k": 0}', "Expected `int` >= 1 - at `$.text_top_k`"),
        ('{"verb": "set", "seed": 1}', "Object contains unknown field `seed`"),
        ('{"verb": "input"}', "Object missing required field `spec`"),
        ('{"verb": "restart", "stage": "kitchen"}', "Invalid enum value 'kitchen' - at `$.stage`"),
        ('{"verb": "record", "on": 1}', "Expected `bool`, got `int` - at `$.on`"),
        ('{"verb": "trace", "seconds": 0}', "Expected `float` > 0.0 - at `$.seconds`"),
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
        RecordingRecord: "state.recording",
        Acknowledged: None,
        Finished: None,
        Heartbeat: None,
    }
    assert {type(report): topic_of_capture(report) for report in REPORTS} == expected
    others = [messages.topic(event) for event in [*OTHER_EVENTS, StatusRecord(status=a_status())]]
    assert others == ["state.overload", "state.run", "command", "status"]
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
