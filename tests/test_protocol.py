"""docs/protocol.md: what it says is what the code does, and nothing that is said is missing from it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import pytest
from msgspec import Struct

from pipeline import messages, protocol
from pipeline.config import Config
from pipeline.messages import AnyCommand, Event, Reply
from pipeline.topology import PROCESSES

DOCS: Final = Path(__file__).parent.parent / "docs"

EVIDENT: Final = frozenset({
    "accounting", "engine", "late", "name", "on", "schema", "stage", "stages", "state", "status", "timing", "verb",
    "ok", "xruns", "muted", "paused", "message", "level", "end_ns", "time_ns", "capture", "playback",
    "p50_ms", "p95_ms", "p99_ms", "max_ms", "budget_ms",
})  # fmt: skip
"""Fields that need no sentence: the name, the unit or the record says it all."""


@pytest.mark.parametrize(
    ("file", "arguments"), [("protocol.md", []), ("protocol.schema.json", ["--schema"])], ids=["page", "schema"]
)
def test_what_is_in_docs_is_what_the_code_says(file: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline.protocol", *arguments]
    made = subprocess.run(command, capture_output=True, check=True, cwd=DOCS.parent).stdout
    assert (DOCS / file).read_bytes() == made, f"run: python -m pipeline.protocol {' '.join(arguments)} > docs/{file}"


def test_every_command_and_every_event_has_an_example() -> None:
    assert [type(command) for command, _ in protocol.EXCHANGES] == list(messages.VERBS.values())
    assert {type(event) for event in protocol.EVENTS} == set(get_args(Event))
    assert len(protocol.EVENTS) == len(get_args(Event))


@pytest.mark.parametrize(("command", "reply"), protocol.EXCHANGES, ids=list(messages.VERBS))
def test_examples_are_what_the_wire_takes(command: AnyCommand, reply: Reply) -> None:
    assert messages.decode_command(messages.encode(command)) == command
    assert messages.decode_reply(messages.encode(reply)) == reply
    assert reply.verb == json.loads(messages.encode(command))["verb"]
    assert [effect.stage for effect in reply.effects][: len(messages.carried_out_by(command))] == (
        messages.carried_out_by(command)
    )


@pytest.mark.parametrize("event", protocol.EVENTS, ids=lambda event: type(event).__name__)
def test_topics_are_those_that_are_published_under(event: Event) -> None:
    topic = messages.topic(event)
    assert topic is not None
    page = protocol.page()
    row = next(
        line for line in page.splitlines() if line.startswith("|") and f"(#{type(event).__name__.lower()})" in line
    )
    pattern = row.split("`")[1]
    assert re.fullmatch(pattern.replace(".", r"\.").replace("<stage>", "[a-z]+"), topic)
    assert messages.decode_event(messages.encode(event)) == event


def test_the_status_in_the_example_is_one_that_can_be() -> None:
    assert protocol.STATUS.accounting.discrepancies() == []
    assert list(protocol.STATUS.stages) == [process.name for process in reversed(PROCESSES)]


@pytest.mark.parametrize("kind", list(protocol.structs()), ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(kind: type[Struct]) -> None:
    docs = protocol.field_docs(kind)
    unsaid = set(kind.__struct_fields__) - set(docs)
    assert unsaid <= EVIDENT


@pytest.mark.parametrize("kind", list(protocol.structs()), ids=lambda kind: kind.__name__)
def test_every_field_is_on_the_page(kind: type[Struct]) -> None:
    heading = kind.__name__.lower() if kind in get_args(AnyCommand) else kind.__name__
    section = re.split(rf"^##+ {heading}$", protocol.page(), flags=re.MULTILINE)[1].split("\n#")[0]
    for name in kind.__struct_fields__:
        assert name == "schema" or f"\n| `{name}` | " in section


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("| `volume` | number from 0 to 1 |  | as it is | `playback.volume`. ", "limits, and run.toml's words"),
        ("| `text_top_k` | integer from 1 to 100,000 or null |  | as it is | ", "what is none"),
        ("| `seconds` | number above 0 to 86,400 or null | s | `null` | ", "a default, and a unit"),
        ("| `stage` | `capture`, `inference`, `playback` |  |  | ", "choices; must be given"),
        ("| `spec` | string up to 4,096 characters |  |  | ", "how long"),
        ("| `stages` | object: `capture`, `inference`, `playback` to [StageStatus](#stagestatus) |", "a table"),
        ("| `effects` | list of [Effect](#effect) |  | `[]` | Each stage that carried it out. |", "a list"),
        ("| `drift_ppm` | number or null | ppm |  | ", "a unit of its own"),
        ("| `level_dbfs` | number | dBFS | `-120.0` | ", "a default that is a level"),
    ],
)
def test_rows(line: str, why: str) -> None:
    assert line in protocol.page(), why


def test_a_unit_is_the_last_word_of_a_name() -> None:
    assert [protocol.unit(name) for name in ("time_ns", "prebuffer_ms", "seconds", "frame")] == [
        "ns",
        "ms",
        "s",
        "frame",
    ]
    assert protocol.unit("volume") == protocol.unit("items") == protocol.unit("") == ""


def test_every_link_has_a_target() -> None:
    page = protocol.page()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= headings
    for file in re.findall(r"\]\(([^#)]+)\)", page):
        assert (DOCS / file).exists(), file


def test_the_schema_knows_every_message() -> None:
    schema = json.loads(protocol.schema())
    definitions: dict[str, Any] = schema["$defs"]
    kinds: list[type[Struct]] = [*protocol.structs(), Config]
    for kind in kinds:
        assert set(kind.__struct_fields__) <= set(definitions[kind.__name__]["properties"])
    for kind in get_args(AnyCommand):
        assert definitions[kind.__name__]["additionalProperties"] is False
    for kind in get_args(Event):
        assert "additionalProperties" not in definitions[kind.__name__]  # fields may be added
    commands, reply, events = schema["anyOf"]
    assert set(commands["discriminator"]["mapping"]) == set(messages.VERBS)
    assert reply == {"$ref": "#/$defs/Reply"}
    assert len(events["anyOf"]) == len(get_args(Event))


def test_readers_of_one_version_bear_what_a_later_one_adds() -> None:
    for event in protocol.EVENTS:
        more = {**json.loads(messages.encode(event)), "of a later version": [1]}
        assert messages.decode_event(msgspec.json.encode(more)) == event
