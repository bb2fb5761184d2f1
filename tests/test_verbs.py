"""pipeline.verbs: what is typed becomes values of the commands' own types, or is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import verbs
from pipeline.errors import ControlError
from pipeline.messages import VERBS, Effect, Reply, Set


@pytest.mark.parametrize(
    ("verb", "pairs", "values"),
    [
        ("mute", [], {}),
        ("set", ["volume=0.5", "text_top_k=20"], {"volume": 0.5, "text_top_k": 20}),
        ("set", ["text_top_k=null", "audio_top_p=1"], {"text_top_k": None, "audio_top_p": 1.0}),
        ("output", ["spec=null"], {"spec": "null"}),
        ("input", ["spec=device:a=b, c"], {"spec": "device:a=b, c"}),
        ("restart", ["stage=inference"], {"stage": "inference"}),
        ("record", ["on=false"], {"on": False}),
        ("record", ["on=true", "path=null"], {"on": True, "path": None}),
        ("trace", ["seconds=1.5"], {"seconds": 1.5}),
    ],
)
def test_values_have_the_types_of_their_fields(verb: str, pairs: list[str], values: dict[str, Any]) -> None:
    assert verbs.parse(verb, pairs) == values


@pytest.mark.parametrize(
    ("verb", "pairs", "line"),
    [
        ("set", ["volume=7"], "set: volume = '7': expected a number from 0 to 1"),
        ("set", ["volume=loud"], "set: volume = 'loud': expected a number from 0 to 1"),
        ("set", ["volume=null"], "set: volume = 'null': expected a number from 0 to 1"),
        ("set", ["text_top_k=1.5"], "set: text_top_k = '1.5': expected a whole number from 1 to 100000 or null"),
        ("set", ["text_top_p=0"], "set: text_top_p = '0': expected a number above 0 to 1 or null"),
        ("set", ["loudness=1"], f"set: loudness: unknown key; expected one of {', '.join(Set.__struct_fields__)}"),
        ("set", ["volume=1", "volume=1"], "set: volume is given twice: expected once"),
        ("mute", ["verb=reset"], "mute: verb: unknown key; expected none"),
        ("mute", ["now"], "mute: 'now': expected no values"),
        ("restart", ["inference"], "restart: 'inference': expected KEY=VALUE, with one of stage"),
        ("restart", [], "restart: stage is not given: expected one of capture, inference, playback"),
        ("restart", ["stage=x"], "restart: stage = 'x': expected one of capture, inference, playback"),
        ("record", ["on=maybe"], "record: on = 'maybe': expected true or false"),
        ("input", [], "input: spec is not given: expected text"),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_what_was_expected(verb: str, pairs: list[str], line: str) -> None:
    with pytest.raises(ControlError) as caught:
        verbs.parse(verb, pairs)
    assert str(caught.value) == line


def test_files_are_looked_up_from_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert verbs.parse("input", ["spec=file:a.wav"]) == {"spec": f"file:{tmp_path}/a.wav"}
    assert verbs.parse("output", ["spec=file:/a.wav"]) == {"spec": "file:/a.wav"}
    assert verbs.parse("record", ["on=true", "path=a.wav"])["path"] == f"{tmp_path}/a.wav"
    assert verbs.parse("record", ["on=true", "path=a.wav"], here=False)["path"] == "a.wav"
    assert verbs.parse("input", ["spec=file:a.wav"], here=False) == {"spec": "file:a.wav"}


def test_what_was_done_by_whom_and_from_when_on() -> None:
    def said(*effects: tuple[str, int]) -> str:
        return verbs.outcome(Reply(ok=True, verb="set", effects=[Effect(stage=who, frame=at) for who, at in effects]))

    assert said(("capture", 7)) == "set: done by capture, from frame 7 on"
    assert said(("a", 7), ("b", 8)) == "set: done by a, from frame 7 on; by b, from frame 8 on"
    assert said(("recorder", -1)) == "set: done by recorder"
    assert said() == "set: done"


def test_every_verb_and_key_is_explained() -> None:
    rows = list(verbs.explanations())
    assert [name for name, _ in rows if not name.startswith(" ")] == list(VERBS)
    for verb, kind in VERBS.items():
        start = [name for name, _ in rows].index(verb) + 1
        fields = kind.__struct_fields__
        assert [name for name, _ in rows[start : start + len(fields)]] == [f"  {field}=" for field in fields]
    assert all(len(text) > 5 for _, text in rows)


@pytest.mark.parametrize(
    ("verb", "words", "incomplete", "found"),
    [
        # As zsh and fish split it.
        ("restart", [], "", ["stage="]),
        ("restart", [], "st", ["stage="]),
        ("restart", [], "stage=", ["stage=capture", "stage=inference", "stage=playback"]),
        ("restart", [], "stage=p", ["stage=playback"]),
        ("restart", ["stage=capture"], "", []),
        ("record", ["on=true"], "", ["path="]),
        ("record", [], "on=", ["on=true", "on=false"]),
        ("set", [], "text_top", ["text_top_k=", "text_top_p="]),
        ("set", ["volume=1"], "vol", []),
        ("set", [], "text_top_k=", ["text_top_k=null"]),
        ("set", [], "volume=", []),
        ("input", [], "spec=dev", ["spec=device", "spec=device:"]),
        ("output", [], "spec=n", ["spec=null"]),
        ("output", [], "spec=file:s", ["spec=file:sub/"]),
        ("record", [], "path=sub/", ["path=sub/b.wav"]),
        ("mute", [], "", []),
        # As bash does.
        ("restart", ["stage"], "", ["capture", "inference", "playback"]),
        ("restart", ["stage", "="], "ca", ["capture"]),
        ("restart", ["stage", "=", "capture"], "", []),
        ("set", ["volume", "=", "1"], "que", ["queue_frames="]),
        ("input", ["spec"], "", ["device", "device:", "file:", "tone:", "silence"]),
        ("input", ["spec", "=", "file"], ":", ["a.wav", "sub/"]),
        ("input", ["spec", "=", "file", ":"], "sub/", ["sub/b.wav"]),
        ("record", ["on", "=", "true", "path", "="], "a", ["a.wav"]),
    ],
)
def test_completions(
    verb: str, words: list[str], incomplete: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", ".hidden", "sub/b.wav"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert verbs.complete(verb, words, incomplete) == found


def test_a_folder_that_is_not_there_completes_nothing() -> None:
    assert verbs.complete("record", [], "path=/nowhere/x") == []
