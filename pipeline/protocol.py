"""The protocol, written down from the code that speaks it: `python -m pipeline.protocol > docs/protocol.md`.

With --schema it is docs/protocol.schema.json. What a field means is the docstring below it, its unit is the last word
of its name, its limits are those that a message is checked against, and the examples are encoded as on the wire.
"""

import argparse
import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

import msgspec
from msgspec import NODEFAULT, UNSET, Struct
from msgspec import inspect as types

from pipeline import messages
from pipeline.config import Config
from pipeline.messages import (
    SCHEMA,
    Accounting,
    AnyCommand,
    CommandRecord,
    Effect,
    Event,
    Input,
    LogRecord,
    Mute,
    Output,
    OverloadRecord,
    Pause,
    Record,
    RecordingRecord,
    Reply,
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
    Status,
    StatusRecord,
    StatusReport,
    TextRecord,
    Timing,
    TimingRecord,
    Trace,
    Unmute,
    XrunRecord,
    Xruns,
)
from pipeline.topology import FRAME, FRAME_NS, RECORDER, StageName

UNITS: Final = {
    "ns": ("ns", "nanoseconds of the machine's monotonic clock, stamped where the thing happened"),
    "ms": ("ms", "milliseconds, a duration"),
    "s": ("s", "seconds, a duration"),
    "seconds": ("s", "the same"),
    "dbfs": ("dBFS", "decibels of full scale: 0 at full scale, -120 for silence"),
    "ppm": ("ppm", "millionths"),
    "mb": ("MiB", "2^20 bytes"),
    "frame": ("frame", "the number of a microphone frame, from 0 at the run's start; 80 ms each"),
    "frames": ("frames", "a count of frames of 80 ms"),
}
"""The last word of a field's name, the unit that it stands for, and what that is."""

_NOW_NS: Final = 81_235_064_112_907
_FRAME: Final = 812
_STEPPED: Final = (_FRAME + 1) * FRAME

_STAGES: Final = {
    "capture": StageStatus(
        state="running", pid=4102, restarts=0, detail="MacBook Pro Microphone, 48000 Hz", device_latency_ms=14.5,
        memory_mb=41.2, cpu_s=0.52,
    ),
    "inference": StageStatus(
        state="running", pid=4101, restarts=0, detail="kyutai/moshiko-mlx-q4", memory_mb=5120.7, cpu_s=31.84
    ),
    "playback": StageStatus(
        state="running", pid=4100, restarts=0, detail="MacBook Pro Speakers, 48000 Hz", device_latency_ms=18.2,
        memory_mb=43.6, cpu_s=0.61,
    ),
}  # fmt: skip

STATUS: Final = StatusReport(
    name="default",
    pid=4099,
    muted=False,
    state="running",
    engine="moshi",
    uptime_s=69.4,
    time_ns=_NOW_NS,
    paused=False,
    recording=None,
    settings=Config(),
    stages=msgspec.convert(_STAGES, dict[StageName, StageStatus]),
    accounting=Accounting(
        captured=_STEPPED + 480, stepped=_STEPPED, waiting_in=480,
        generated=_STEPPED, played=_STEPPED - 960, waiting_out=960,
        sent=_STEPPED + 240, concealed=1_200,
    ),
    timing=Timing(
        capture=Spread(frames=813, p50_ms=5.2, p95_ms=5.9, p99_ms=6.3, max_ms=8.8),
        inference=StageSpread(frames=813, p50_ms=58.1, p95_ms=61.7, p99_ms=64.0, max_ms=83.2, late=1),
        playback=Spread(frames=812, p50_ms=41.0, p95_ms=43.4, p99_ms=47.7, max_ms=52.5),
        mic_to_speaker_ms=Spread(frames=812, p50_ms=202.3, p95_ms=206.8, p99_ms=211.4, max_ms=229.5),
    ),
    xruns=Xruns(),
    drift_ppm=-3.4,
)  # fmt: skip
"""A run that has answered for a minute."""


def _done(command: AnyCommand) -> Reply:
    effects = [Effect(stage=stage, frame=_FRAME) for stage in _carried_out_by(command)]
    return Reply(ok=True, verb=_verb(command), stage=effects[0].stage, frame=_FRAME, effects=effects)


def _carried_out_by(command: AnyCommand) -> Sequence[str]:
    match command:
        case Restart(stage=stage):
            return [stage]
        case Record():
            return [RECORDER.name]
    return messages.carried_out_by(command)


def _verb(command: AnyCommand) -> str:
    return type(command).__name__.lower()


_ALTERED: Final = Set(text_temperature=0.6, volume=0.5)
_TEXT: Final = TextRecord(frame=_FRAME, text=" hello", time_ns=_NOW_NS)

EXCHANGES: Final[tuple[tuple[AnyCommand, Reply], ...]] = (
    (Status(), Reply(ok=True, verb="status", status=STATUS)),
    *((command, _done(command)) for command in (Mute(), Unmute(), Pause(), Resume(), Reset(), _ALTERED)),
    *((command, _done(command)) for command in (Input(spec="device:USB microphone"), Output(spec="null"))),
    *((command, _done(command)) for command in (Restart(stage="inference"), Record(on=True, path="call.wav"))),
    (Trace(seconds=10), Reply(ok=True, verb="trace", records=[msgspec.Raw(b'["text",%b]' % messages.encode(_TEXT))])),
    (Shutdown(), Reply(ok=True, verb="shutdown", status=STATUS)),
)
"""Every command once, and what answers it."""

EVENTS: Final[tuple[Event, ...]] = (
    TimingRecord(
        stage="inference", frame=_FRAME, start_ns=_NOW_NS, end_ns=_NOW_NS + 58_120_334, queued=1, encode_ms=6.1,
        step_ms=45.2, decode_ms=6.7, context=813, context_size=3000,
    ),
    StageRecord(stage="playback", state="running", detail="MacBook Pro Speakers, 48000 Hz", device_latency_ms=18.2,
                time_ns=_NOW_NS),
    RunRecord(name="default", pid=4099, state="running", muted=False, paused=False, engine="moshi", time_ns=_NOW_NS),
    OverloadRecord(
        on=True, p95_ms=112.4, advice="q4 is faster than q8: `pipeline up --quality q4`", time_ns=_NOW_NS
    ),
    RecordingRecord(path="/home/me/call.wav", transcript="/home/me/call.txt", on=True, frame=_FRAME, time_ns=_NOW_NS),
    _TEXT,
    XrunRecord(stage="playback", kind="gap", count=1, time_ns=_NOW_NS),
    CommandRecord(
        verb="set", values={"text_temperature": 0.6, "volume": 0.5}, ok=True, effects=_done(_ALTERED).effects,
        start_ns=_NOW_NS, end_ns=_NOW_NS + FRAME_NS,
    ),
    LogRecord(stage="inference", level="warning", message="the model is late: 9 frames dropped", time_ns=_NOW_NS),
    StatusRecord(status=STATUS),
)  # fmt: skip
"""Every event once."""

_HEAD: Final = f"""\
# The protocol

Made from [pipeline/messages.py](../pipeline/messages.py) by `python -m pipeline.protocol > docs/protocol.md`; a test
fails where the two differ. The same as JSON Schema: [protocol.schema.json](protocol.schema.json).

A run listens on two sockets of ZeroMQ in its folder, `$PIPELINE_RUNTIME_DIR/NAME` (by default `pipeline/NAME` in the
platform's runtime folder). The folder has mode 0700 and the sockets were made under a umask of 077: who may enter is
the same user, and may do everything. Nothing listens on a network unless
`remote.listen` is set, and then only for those who have a key ([api.md](api.md)).

| socket | the run's | yours | on the wire |
|---|---|---|---|
| `control.ipc` | ROUTER | REQ | one part: a [command](#commands), a JSON object; the answer is one [Reply](#reply) |
| `events.ipc` | XPUB | SUB, any number | two parts: the [topic](#topics), and a [record](#records), a JSON object |

    >>> import zmq
    >>> control = zmq.Context.instance().socket(zmq.REQ)
    >>> control.connect("ipc:///run/user/1000/pipeline/default/control.ipc")
    >>> control.send(b'@REQUEST@')
    >>> control.recv()
    b'@REPLY@'

    >>> events = zmq.Context.instance().socket(zmq.SUB)
    >>> events.connect("ipc:///run/user/1000/pipeline/default/events.ipc")
    >>> events.subscribe("text")
    >>> events.recv_multipart()
    [b'text', b'@EVENT@']

**Requests.** Every request is answered once: with `"ok": true` when everyone that it is for has carried it out, or
with `"ok": false` and an `error` that says what was wrong and what was expected. What is not JSON, names no verb that
there is, has a field that the command does not have, or a value beyond its limits, changes nothing. A message of more
than 65,536 bytes is not answered: its connection is closed. A client that sends more without reading what it is
answered should have no more than 16 requests under way: of replies that it does not read, 32 are kept. From another
program in Python, `pipeline.client` does all this; in a shell, `pipeline send VERB key=value`.

**Events.** A subscription is a prefix: `timing.` is every stage's timing, the empty one is everything. Right after
subscribing comes the last record of each `state.` topic that was subscribed, and of `status` (the welcome), so that a
newcomer knows how things are; it may come again when another joins. Nobody waits for a subscriber: one that does not
read loses what is more than 1,000 messages, and nobody else notices.

**Versions.** `schema` is {SCHEMA} in every record and in the status. Within a version fields and topics may be added,
and a field keeps its meaning, type and unit: readers ignore what they do not know. A field that goes, or means
something else, raises the version.

`stages.ipc`, in the same folder, is between the run and its own stages, and no part of this: what is said there
changes without notice.
"""

_COMMANDS: Final = """\
## Commands

`verb` names the command; its other fields are in its table. One that has no default must be given. Below each command
are an example and its answer.
"""

_RECORDS: Final = """\
## Records

Each has `type`, as in its heading, `schema`, and every field of its table. A default is what a field holds where
there is nothing to tell.
"""


def page() -> str:
    """docs/protocol.md."""
    return "\n".join([*_first_screen(), *_units(), *_commands(), *_replies(), *_records()])


def schema() -> str:
    """docs/protocol.schema.json: a command, a reply or an event is valid against one of its three `anyOf`."""
    kinds, components = msgspec.json.schema_components([AnyCommand, Reply, Event], ref_template="#/$defs/{name}")
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"pipeline's protocol, version {SCHEMA}",
        "anyOf": list(kinds),
        "$defs": components,
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"


def _first_screen() -> Iterator[str]:
    command, reply = EXCHANGES[1]
    text = _HEAD.replace("@REQUEST@", _wire(command)).replace("@REPLY@", _wire(reply))
    yield text.replace("@EVENT@", _wire(_TEXT))
    yield "## Topics\n"
    yield "| topic | record | when |\n|---|---|---|"
    for event in EVENTS:
        topic, when = _topic(type(event))
        yield f"| `{topic}` | {_link(type(event))} | {_sentence(when)} |"
    yield ""


def _topic(kind: type[Struct]) -> tuple[str, str]:
    """A record's topic, with the stage's name left open, and when it comes: its docstring begins with both."""
    first = _doc(kind).split("\n\n")[0]
    found = re.fullmatch(r"Topic ([a-z.<>]+)[:,] (.*)", first)
    if found is None:
        raise ValueError(f"the docstring of {kind.__name__} begins with {first!r}: expected 'Topic NAME: when.'")
    return found[1], found[2]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _units() -> Iterator[str]:
    yield "## Units\n"
    yield "The last word of a field's name is its unit. Samples are at 24 kHz.\n"
    yield "| ends with | unit | |\n|---|---|---|"
    for word, (unit, meaning) in UNITS.items():
        yield f"| `{word}` | {unit} | {meaning} |"
    yield ""


def _commands() -> Iterator[str]:
    yield _COMMANDS
    for command, reply in EXCHANGES:
        yield f"### {_verb(command)}\n"
        yield f"{_doc(type(command))}\n"
        yield from _table(type(command))
        yield f"    {_wire(command)}\n    {_brief(reply)}\n"


def _replies() -> Iterator[str]:
    yield "## Reply\n"
    yield f"{_doc(Reply)} A field that holds its default is left out.\n"
    yield from _table(Reply)
    refused = Reply(ok=False, verb="mute", stage="capture", error="capture is backoff, not running")
    yield f"    {_wire(refused)}\n"
    for kind in (Effect, StatusReport, StageStatus, Accounting, Timing, StageSpread, Spread, Xruns):
        yield f"### {kind.__name__}\n"
        yield f"{_doc(kind)}\n"
        yield from _table(kind)
    yield "An example of the whole:\n"
    lines = msgspec.json.format(messages.encode(STATUS), indent=2).decode().splitlines()
    yield "\n".join(f"    {line}" for line in lines) + "\n"


def _records() -> Iterator[str]:
    yield _RECORDS
    for event in EVENTS:
        kind = type(event)
        yield f"### {kind.__name__}\n"
        topic, when = _topic(kind)
        rest = "\n\n".join(_doc(kind).split("\n\n")[1:])
        yield f'`"type": "{kind.__struct_config__.tag}"`, topic `{topic}`. {_sentence(when)}\n'
        yield from [f"{rest}\n"] * bool(rest)
        yield from _table(kind)
        yield f"    {_brief(event)}\n"


def _table(kind: type[Struct]) -> Iterator[str]:
    fields = msgspec.inspect.type_info(kind)
    if not isinstance(fields, types.StructType) or not fields.fields:
        return
    yield "| field | type | unit | default | |\n|---|---|---|---|---|"
    for field in (field for field in fields.fields if field.name != "schema"):
        meaning = field_docs(kind).get(field.name, "")
        yield f"| `{field.name}` | {_type(field.type)} | {unit(field.name)} | {_default(kind, field)} | {meaning} |"
    yield ""


def unit(name: str) -> str:
    """The unit of a field, by its name."""
    return UNITS.get(name.rpartition("_")[2], ("", ""))[0]


def _default(kind: type[Struct], field: types.Field) -> str:
    if field.required:
        return ""
    value = next(own.default for own in msgspec.structs.fields(kind) if own.name == field.name)
    if value is UNSET:
        return "as it is"
    made = field.default_factory() if field.default_factory is not NODEFAULT else field.default
    return f"`{_wire(made)}`"


def _type(kind: types.Type) -> str:
    match kind:
        case types.IntType():
            return f"integer{_limits(kind)}"
        case types.FloatType():
            return f"number{_limits(kind)}"
        case types.StrType(max_length=int(most)):
            return f"string up to {most:,} characters"
        case types.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in values)
        case types.UnionType(types=kinds):
            return " or ".join(_type(one) for one in kinds)
        case types.ListType(item_type=item):
            return f"list of {_type(item)}"
        case types.DictType(key_type=key, value_type=value):
            return f"object: {_type(key)} to {_type(value)}"
        case types.StructType(cls=own):
            return _link(own)
    return _PLAIN[type(kind)]


_PLAIN: Final[dict[type[types.Type], str]] = {
    types.StrType: "string",
    types.BoolType: "boolean",
    types.NoneType: "null",
    types.AnyType: "any",
    types.RawType: "any",
}


def _limits(kind: types.IntType | types.FloatType) -> str:
    words = (("from", kind.ge), ("above", kind.gt), ("to", kind.le), ("below", kind.lt))
    return "".join(f" {word} {limit:,}" for word, limit in words if limit is not None)


def _link(kind: type[Struct]) -> str:
    if kind is Config:
        return "[the settings](../run.toml)"
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _wire(value: Any) -> str:
    return messages.encode(value).decode()


def _brief(message: Struct) -> str:
    """As on the wire, but for the status, which is shown once."""
    return _wire(message).replace(_wire(STATUS), "{...}")


def _doc(kind: type[Struct]) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def field_docs(kind: type[Struct]) -> dict[str, str]:
    """The docstring of each field, its bases' included, on one line. A setting has that of the key in run.toml."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Struct) and base is not Struct:
            docs |= _docs_of_module(base.__module__).get(base.__name__, {})
    return docs | (_settings_docs() if kind is Set else {})


def _settings_docs() -> dict[str, str]:
    docs = {}
    for name, key in messages.ALTERS.items():
        section = type(getattr(Config(), key.partition(".")[0]))
        docs[name] = f"`{key}`. {field_docs(section).get(name, '')}".rstrip()
    return docs


@functools.cache
def _docs_of_module(name: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[name]))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_docs_of_class(node)) for node in classes}


def _docs_of_class(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for above, below in zip(node.body, node.body[1:], strict=False):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def structs() -> Iterator[type[Struct]]:
    """Everything that has a table here."""
    yield from get_args(AnyCommand)
    yield from (Reply, Effect, StatusReport, StageStatus, Accounting, Timing, StageSpread, Spread, Xruns)
    yield from get_args(Event)


def main() -> None:
    """Print the page, or the schema."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schema", action="store_true", help="the JSON Schema instead of the page")
    sys.stdout.write(schema() if parser.parse_args().schema else page())


if __name__ == "__main__":
    main()
