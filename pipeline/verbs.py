"""What `pipeline send` takes and says: verbs, keys, values of the types that the commands have, and completions."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect as types

from pipeline.errors import ControlError
from pipeline.messages import VERBS, Reply

_SPECS: Final = {
    "input": ("device", "device:", "file:", "tone:", "silence"),
    "output": ("device", "device:", "file:", "null"),
}


def parse(verb: str, pairs: Sequence[str], *, here: bool = True) -> dict[str, Any]:
    """The values of a command, each of its field's type, from KEY=VALUE.

    Where the run is `here`, on this machine, files are looked up from where the user is, not from where the run was
    started. Raises ControlError, which names key, value and what was expected.
    """
    fields = keys(verb)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise ControlError(
                f"{verb}: {pair!r}: expected {f'KEY=VALUE, with {known}' if (known := _known(fields)) else 'no values'}"
            )
        if key not in fields:
            raise ControlError(f"{verb}: {key}: unknown key; expected {_known(fields) or 'none'}")
        if key in values:
            raise ControlError(f"{verb}: {key} is given twice: expected once")
        values[key] = _convert(verb, fields[key], text)
    for key, field in fields.items():
        if field.required and key not in values:
            raise ControlError(f"{verb}: {key} is not given: expected {expected(field.type)}")
    return {key: _absolute(verb, key, value) if here else value for key, value in values.items()}


def keys(verb: str) -> dict[str, types.Field]:
    """The fields of a command."""
    found = types.type_info(VERBS[verb])
    return {field.name: field for field in found.fields} if isinstance(found, types.StructType) else {}


def _known(fields: dict[str, types.Field]) -> str:
    return f"one of {', '.join(fields)}" if fields else ""


def _convert(verb: str, field: types.Field, text: str) -> Any:
    if text == "null" and isinstance(field.type, types.UnionType):
        return None
    own = next(own.type for own in msgspec.structs.fields(VERBS[verb]) if own.name == field.name)
    try:
        return msgspec.convert(text, own, strict=False)
    except msgspec.ValidationError:
        raise ControlError(f"{verb}: {field.name} = {text!r}: expected {expected(field.type)}") from None


def expected(kind: types.Type) -> str:
    """What a value is, in words."""
    match kind:
        case types.BoolType():
            return "true or false"
        case types.NoneType():
            return "null"
        case types.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
        case types.IntType():
            return f"a whole number{_limits(kind)}"
        case types.FloatType():
            return f"a number{_limits(kind)}"
        case types.UnionType(types=kinds):
            return " or ".join(expected(one) for one in kinds)
    return "text"


def _limits(kind: types.IntType | types.FloatType) -> str:
    limits = (("from", kind.ge), ("above", kind.gt), ("to", kind.le), ("below", kind.lt))
    return "".join(f" {word} {limit:g}" for word, limit in limits if limit is not None)


def _absolute(verb: str, key: str, value: Any) -> Any:
    if key == "path" and value:
        return str(Path(value).absolute())
    if key == "spec" and value.startswith("file:") and value != "file:":
        return f"file:{Path(value.removeprefix('file:')).absolute()}"
    return value


def outcome(reply: Reply) -> str:
    """What was done, by whom, and from which frame on."""
    if (recording := reply.recording) is not None:
        if recording.on:
            return f"record: to {recording.path}, from frame {recording.frame} on"
        return f"record: {recording.seconds:.1f} s are in {recording.path}, the words in {recording.transcript}"
    done = [
        f"by {effect.stage}" + (f", from frame {effect.frame} on" if effect.frame >= 0 else "")
        for effect in reply.effects
    ]
    return f"{reply.verb}: done {'; '.join(done)}".rstrip()


def explanations() -> Iterator[tuple[str, str]]:
    """Every verb, with each of its keys below it, and what they mean."""
    from pipeline.protocol import field_docs  # reads the docstrings off the source

    for verb, kind in VERBS.items():
        yield verb, " ".join((kind.__doc__ or "").split())
        docs = field_docs(kind)
        for key, field in keys(verb).items():
            words = f"{expected(field.type)}. {docs.get(key, '')}".rstrip()
            yield f"  {key}=", words[0].upper() + words[1:]


def complete(verb: str, words: Sequence[str], incomplete: str) -> list[str]:
    """What `incomplete` may become, after the `words` that follow the verb.

    bash takes = and : for words of their own, and wants only what follows the last of them.
    """
    fields = keys(verb)
    typed = _rejoined(fields, words, incomplete)
    is_split = typed != incomplete
    key, separator, value = typed.partition("=")
    if separator and key in fields:
        found = [f"{key}={one}" for one in _values(verb, fields[key], value)]
    else:
        given = {word.partition("=")[0] for word in words}
        found = [f"{name}=" for name in fields if name not in given]
    kept = max(typed.rfind("="), typed.rfind(":")) + 1 if is_split or incomplete.startswith(":") else 0
    return [one[kept:] for one in found if one.startswith(typed)]


def _rejoined(fields: dict[str, types.Field], words: Sequence[str], incomplete: str) -> str:
    if not words or not (words[-1] in {"=", ":"} or incomplete.startswith(":") or words[-1] in fields):
        return incomplete
    start = max((index for index, word in enumerate(words) if word in fields), default=None)
    if start is None:
        return incomplete
    typed = "".join(words[start:]) + incomplete
    return typed if "=" in typed else f"{typed}="


def _values(verb: str, field: types.Field, typed: str) -> list[str]:
    if verb in _SPECS and typed.startswith("file:"):
        return [f"file:{path}" for path in _paths(typed.removeprefix("file:"))]
    if verb in _SPECS:
        return list(_SPECS[verb])
    return _paths(typed) if field.name == "path" else _choices(field.type)


def _choices(kind: types.Type) -> list[str]:
    match kind:
        case types.BoolType():
            return ["true", "false"]
        case types.NoneType():
            return ["null"]
        case types.LiteralType(values=values):
            return [str(value) for value in values]
        case types.UnionType(types=kinds):
            return [choice for one in kinds for choice in _choices(one)]
    return []


def _paths(typed: str) -> list[str]:
    """The files and folders that begin as what was typed; a folder ends in /."""
    folder, name = os.path.split(typed)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(name) and (name or not entry.name.startswith("."))
    ]
