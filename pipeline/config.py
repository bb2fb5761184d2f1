"""The settings of a run: run.toml, checked key by key, and what the command line overrides."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import ConfigError

DEFAULT_FILE: Final = Path("run.toml")

EngineName = Literal["moshi", "echo"]
Quality = Literal["q4", "q8", "bf16"]
Milliseconds = Annotated[float, Meta(ge=0, le=1_000)]
Temperature = Annotated[float, Meta(ge=0, le=10)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Probability = Annotated[float, Meta(gt=0, le=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Frames = Annotated[int, Meta(ge=1, le=100)]
QueueFrames = Annotated[int, Meta(ge=2, le=100)]
PrebufferMs = Annotated[float, Meta(ge=0, le=80)]
Volume = Annotated[float, Meta(ge=0, le=1)]
StepMs = Annotated[float, Meta(ge=0, le=10_000)]
Ppm = Annotated[float, Meta(ge=-10_000, le=10_000)]


class _Section(Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of run.toml. A key that it does not have is an error."""


class CaptureConfig(_Section):
    """The microphone's side."""

    input: str = "device"
    """`device`, `device:NAME` (or its index), `file:PATH`, `tone:HZ` or `silence`."""
    block_ms: Annotated[float, Meta(ge=1, le=80)] = 5.0
    """What one device callback moves."""
    latency_ms: Milliseconds = 20.0
    """What is asked of the device. It reports what it gives."""
    origin: Annotated[int, Meta(ge=0)] = 0
    """Samples that were captured before this input was taken. Set by the command `input`."""


class PlaybackConfig(_Section):
    """The speaker's side."""

    output: str = "device"
    """`device`, `device:NAME` (or its index), `file:PATH` or `null`."""
    block_ms: Annotated[float, Meta(ge=1, le=80)] = 5.0
    """What one device callback moves."""
    latency_ms: Milliseconds = 40.0
    """What is asked of the device at first. It reports what it gives. One that runs dry twice within a minute is opened
    anew and asked for twice as much, up to 80."""
    volume: Volume = 1.0
    """What samples are multiplied by before they are sent; 1 sends them as they are."""
    prebuffer_ms: PrebufferMs | None = None
    """How long the first frame waits, so that a later one may be late by as much. Unset: 3 for echo, 40 for moshi.
    More where the jitter asks for it, up to a frame."""
    queue_frames: QueueFrames = 3
    """More frames than these waiting for the speaker are skipped, oldest first, down to two."""


class InferenceConfig(_Section):
    """How far the model may fall behind the microphone, in frames."""

    backlog_target: Frames = 3
    """What is left waiting when a backlog is dropped."""
    backlog_limit: Frames = 8
    """More than these waiting are dropped, oldest first."""
    step_down: bool = False
    """Go on with the model's q4, in a new conversation, where q8 or bf16 is too slow and q4 was downloaded too."""
    codec: Literal["auto", "mlx", "rust"] = "auto"
    """What turns sound into codes and back: Mimi on MLX's device, or rustymimi on the CPU. `auto` takes what was
    measured to be faster where MLX computes."""


Cut = tuple[int | None, float | None, float | None]
"""Top-k, top-p and min-p, of which at most one is set."""


class SamplerConfig(_Section):
    """How tokens are drawn. Of each kind's three cuts one at most is set; where none is, its top-k is the default's."""

    text_temperature: Temperature = 0.7
    """What logits are divided by; 0 always takes the likeliest token."""
    text_top_k: Count | None = None
    """So many of the likeliest tokens may be drawn. Unset, like the other two: 25."""
    text_top_p: Probability | None = None
    """The likeliest tokens that together have this probability may be drawn; 1 is no cut."""
    text_min_p: Probability | None = None
    """Tokens with at least this share of the likeliest one's probability may be drawn."""
    audio_temperature: Temperature = 0.8
    audio_top_k: Count | None = None
    """Unset, like the other two: 250."""
    audio_top_p: Probability | None = None
    audio_min_p: Probability | None = None
    seed: Seed | None = None
    """Unset: another conversation each time."""

    @property
    def text_cut(self) -> Cut:
        """Which text tokens may be drawn."""
        return _cut(self.text_top_k, self.text_top_p, self.text_min_p, _TEXT_TOP_K)

    @property
    def audio_cut(self) -> Cut:
        """Which audio tokens may be drawn."""
        return _cut(self.audio_top_k, self.audio_top_p, self.audio_min_p, _AUDIO_TOP_K)


_TEXT_TOP_K: Final = 25
_AUDIO_TOP_K: Final = 250
"""As Kyutai's own programs for PyTorch draw."""


def _cut(top_k: int | None, top_p: float | None, min_p: float | None, default: int) -> Cut:
    return (top_k, top_p, min_p) if top_k or top_p or min_p else (default, None, None)


_ADDRESS: Final = re.compile(r"(?:tcp://)?(?P<host>[A-Za-z0-9._-]+|\*|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


class Address(NamedTuple):
    """Where a run is reached over TCP: commands at `port`, events at the one after it."""

    host: str
    port: int

    @classmethod
    def parse(cls, spec: str, key: str) -> Self:
        """Of tcp://HOST:PORT, also without tcp://. Raises ConfigError, which names the `key`."""
        found = _ADDRESS.fullmatch(spec)
        if found is None or not 1 <= int(found["port"]) <= 65_534:
            raise ConfigError(f"{key} = {spec!r}: expected tcp://ADDRESS:PORT, with a PORT from 1 to 65534")
        return cls(found["host"], int(found["port"]))

    @property
    def control(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def events(self) -> str:
        return f"tcp://{self.host}:{self.port + 1}"


class RemoteConfig(_Section):
    """Reaching the run from a second machine."""

    listen: str | None = None
    """`tcp://ADDRESS:PORT`, an address of this machine: commands at PORT, events at PORT + 1, encrypted, and for those
    whose key was made by `pipeline keys`. Unset: no other machine reaches the run."""


class FaultsConfig(_Section):
    """What is made worse than it is. For tests: docs/reliability.md."""

    step_ms: StepMs = 0.0
    """A step of the model takes at least so long, so that echo can stand in for a model of that speed."""
    jitter_ms: StepMs = 0.0
    """So much is added to each step at most: another share of it each time."""
    seed: Seed = 0
    """Another one, other jitter."""
    hang: Literal["lock", "loop"] | None = None
    """What SIGUSR2 does to a stage. `lock`: its main thread keeps the interpreter's lock for ever. `loop`: it turns for
    ever, and its other threads go on. Unset: nobody can make a stage hang."""
    input_ppm: Ppm = 0.0
    """How much faster than the monotonic clock's is the clock of an input that is no device."""
    output_ppm: Ppm = 0.0
    """The same, of an output that is no device."""


class Config(_Section):
    """Everything that a run can be told before it starts."""

    engine: EngineName = "moshi"
    quality: Quality = "q4"
    model: str | None = None
    """A checkpoint's folder or a repository. Unset: the official one of the quality."""
    seconds: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """Stop after so long. Unset: run until stopped, or until an input file is answered."""
    ring_seconds: Annotated[float, Meta(ge=10, le=600)] = 12.0
    """What each ring holds: how long the model may stall before microphone samples are lost."""
    offline: bool = False
    """From file to file, as fast as it goes, with back-pressure instead of drops. Set by `pipeline run`."""
    capture: CaptureConfig = msgspec.field(default_factory=CaptureConfig)
    inference: InferenceConfig = msgspec.field(default_factory=InferenceConfig)
    playback: PlaybackConfig = msgspec.field(default_factory=PlaybackConfig)
    sampler: SamplerConfig = msgspec.field(default_factory=SamplerConfig)
    remote: RemoteConfig = msgspec.field(default_factory=RemoteConfig)
    faults: FaultsConfig = msgspec.field(default_factory=FaultsConfig)


_PREBUFFER_MS: Final[dict[EngineName, float]] = {"echo": 3.0, "moshi": 40.0}


def prebuffer_ms(config: Config) -> float:
    """The prebuffer that a run begins with, in ms."""
    given = config.playback.prebuffer_ms
    return _PREBUFFER_MS[config.engine] if given is None else given


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """The settings of `path` (None: run.toml if there is one, else the defaults), then `overrides` by dotted key.

    Raises ConfigError, one line that names the key, the value and what was expected.
    """
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    data = _read(path) if path is not None else {}
    config = _convert(data, str(path))
    config = _override(config, overrides, "command line")
    source, sink = config.capture.input, config.playback.output
    read, written = _file(source), _file(sink)
    if read is not None and written is not None and same_file(read, written):
        raise ConfigError(f"playback.output = {sink!r}: expected another file than the input")
    if config.offline:
        _check_files(config)
    _check(config, str(path or "defaults"))
    return config


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The settings with `values`, by dotted key, while they are in force; of a kind's three cuts the new one counts.

    Raises ConfigError.
    """
    new = dict(values)
    for cuts in CUTS:
        if any(values.get(key) is not None for key in cuts):
            new = dict.fromkeys(cuts) | new
    config = _override(config, new, "set")
    _check(config, "set")
    return config


def check_switch(spec: str, other: str, *, may_exist: bool) -> None:
    """Refuse, for one side of a run, the file that its `other` side has, and to write over a file that is there.

    Raises ConfigError.
    """
    path, others = _file(spec), _file(other)
    if path is None:
        return
    if others is not None and same_file(path, others):
        raise ConfigError(f"spec = {spec!r}: expected another file than the run's other side has")
    if not may_exist and os.path.lexists(path):
        raise ConfigError(f"spec = {spec!r}: it exists already; expected a new file")


def _override(config: Config, values: Mapping[str, Any], source: str) -> Config:
    merged = msgspec.to_builtins(config)
    for key, value in values.items():
        *tables, last = key.split(".")
        table = merged
        for name in tables:
            if not isinstance(table.get(name), dict):
                raise ConfigError(f"{source}: {key}: unknown key")
            table = table[name]
        table[last] = value
    return _convert(merged, source)


def _check(config: Config, source: str) -> None:
    """What no single key can tell."""
    _check_cuts(config.sampler, source)
    if config.remote.listen is not None:
        Address.parse(config.remote.listen, f"{source}: remote.listen")
    inference = config.inference
    if inference.backlog_limit < inference.backlog_target:
        raise ConfigError(
            f"{source}: inference.backlog_limit = {inference.backlog_limit}: "
            f"expected at least inference.backlog_target, {inference.backlog_target}"
        )


CUTS: Final = [[f"sampler.{kind}_{cut}" for cut in ("top_k", "top_p", "min_p")] for kind in ("text", "audio")]
"""Of which at most one is set."""


def _check_cuts(sampler: SamplerConfig, source: str) -> None:
    values = {f"sampler.{name}": getattr(sampler, name) for name in sampler.__struct_fields__}
    for cuts in CUTS:
        given = [key for key in cuts if values[key] is not None]
        if len(given) > 1:
            raise ConfigError(f"{source}: {given[1]} = {values[given[1]]}: expected to be unset, as {given[0]} is set")


def _check_files(config: Config) -> None:
    """Where nothing keeps time, only what is a file has an end."""
    for key, spec in (("capture.input", config.capture.input), ("playback.output", config.playback.output)):
        if not spec.startswith("file:"):
            raise ConfigError(f"{key} = {spec!r}: expected file:PATH where offline = true")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, by whatever links and letters."""
    with contextlib.suppress(OSError, ValueError):  # one of them is not there yet
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _file(spec: str) -> Path | None:
    kind, _, name = spec.partition(":")
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name that is none: the device will say so
        return Path(name).resolve() if kind == "file" else None
    return None


def encode(config: Config) -> bytes:
    """The settings as JSON, for the stages."""
    return msgspec.json.encode(config)


def decode(data: bytes) -> Config:
    """What `encode` made."""
    return msgspec.json.decode(data, type=Config)


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _convert(data: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), data)}") from None


_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<where>[^`]*)`)?\Z", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<key>.*)`", re.DOTALL)


def _explain(message: str, data: dict[str, Any]) -> str:
    """msgspec's message, with the key first and the value that was given."""
    found = _AT.match(message)
    what, where = (found["what"], found["where"] or "") if found else (message, "")
    unknown = _UNKNOWN.fullmatch(what)
    choices: tuple[Any, ...] = ()
    table: Any = data
    struct: Any = Config
    for part in filter(None, where.split(".")):
        table = table.get(part) if isinstance(table, dict) else None
        struct = next((f.type for f in msgspec.structs.fields(struct) if f.name == part), struct)
        choices = get_args(struct) if get_origin(struct) is Literal else ()
        if not (isinstance(struct, type) and issubclass(struct, Struct)):
            struct = _Section
    if unknown:
        prefix = f"{where}." if where else ""
        known = ", ".join(field.name for field in msgspec.structs.fields(struct))
        key = "".join(c if c.isprintable() else repr(c)[1:-1] for c in unknown["key"])
        return f"{prefix}{key}: unknown key; expected one of {known}"
    if choices:
        what = f"expected one of {', '.join(choices)}"
    try:
        shown = repr(table)
    except ValueError:
        shown = "a very long number"
    return f"{where} = {shown}: {what[0].lower()}{what[1:]}"
