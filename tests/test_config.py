"""pipeline.config: every key, and every way in which one can be wrong, by the whole line that says so."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import CaptureConfig, Config, InferenceConfig, PlaybackConfig, SamplerConfig
from pipeline.errors import ConfigError

TOP = "engine, quality, model, seconds, ring_seconds, offline, capture, inference, playback, sampler, remote, faults"


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def refused(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    """The line with which settings are refused."""
    with pytest.raises(ConfigError) as error:
        config.load(path, overrides or {})
    line = str(error.value)
    assert len(line.splitlines()) == 1
    return line


def test_every_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {
        "engine": "moshi",
        "quality": "q4",
        "model": None,
        "seconds": None,
        "offline": False,
        "ring_seconds": 12.0,
        "capture": {"input": "device", "block_ms": 5.0, "latency_ms": 20.0, "origin": 0},
        "inference": {"backlog_target": 3, "backlog_limit": 8, "step_down": False, "codec": "auto"},
        "playback": {
            "output": "device",
            "block_ms": 5.0,
            "latency_ms": 40.0,
            "volume": 1.0,
            "prebuffer_ms": None,
            "queue_frames": 3,
        },
        "sampler": {
            "text_temperature": 0.7,
            "text_top_k": None,
            "text_top_p": None,
            "text_min_p": None,
            "audio_temperature": 0.8,
            "audio_top_k": None,
            "audio_top_p": None,
            "audio_min_p": None,
            "seed": None,
        },
        "remote": {"listen": None},
        "faults": {"step_ms": 0.0, "jitter_ms": 0.0, "seed": 0, "hang": None, "input_ppm": 0.0, "output_ppm": 0.0},
    }
    assert msgspec.to_builtins(config.load(None, {})) == expected


def test_the_run_toml_that_is_shipped_says_what_the_defaults_are() -> None:
    shipped = Path(__file__).parent.parent / "run.toml"
    assert config.load(shipped, {}) == Config()


FILES: Final = {"capture.input": "file:in.wav", "playback.output": "file:out.wav"}


def test_offline_is_from_file_to_file() -> None:
    assert config.load(None, {"offline": True, **FILES}).offline
    for key, spec in (("capture.input", "tone:440"), ("capture.input", "device"), ("playback.output", "null")):
        with pytest.raises(ConfigError) as caught:
            config.load(None, {"offline": True, **FILES, key: spec})
        assert str(caught.value) == f"{key} = {spec!r}: expected file:PATH where offline = true"


def test_every_key_can_be_set(run_toml: Path) -> None:
    run_toml.write_text(
        """
        engine = "echo"
        quality = "bf16"
        model = "some/repository"
        seconds = 1
        ring_seconds = 10
        [capture]
        input = "tone:440"
        block_ms = 80
        latency_ms = 0
        [inference]
        backlog_target = 1
        backlog_limit = 1
        [playback]
        output = "null"
        block_ms = 1.5
        latency_ms = 1_000
        prebuffer_ms = 0
        queue_frames = 2
        [sampler]
        text_temperature = 0
        text_top_k = 1
        audio_temperature = 10.0
        audio_top_k = 100_000
        seed = 0
        """
    )
    assert config.load(run_toml, {}) == Config(
        engine="echo",
        quality="bf16",
        model="some/repository",
        seconds=1.0,
        ring_seconds=10.0,
        capture=CaptureConfig(input="tone:440", block_ms=80.0, latency_ms=0.0),
        inference=InferenceConfig(backlog_target=1, backlog_limit=1),
        playback=PlaybackConfig(output="null", block_ms=1.5, latency_ms=1_000.0, prebuffer_ms=0.0, queue_frames=2),
        sampler=SamplerConfig(text_temperature=0.0, text_top_k=1, audio_temperature=10.0, audio_top_k=100_000, seed=0),
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engines = 'echo'", f"engines: unknown key; expected one of {TOP}"),
        (
            "[capture]\ninputs = 'device'",
            "capture.inputs: unknown key; expected one of input, block_ms, latency_ms, origin",
        ),
        (
            "[inference.more]",
            "inference.more: unknown key; expected one of backlog_target, backlog_limit, step_down, codec",
        ),
        ("[microphone]", f"microphone: unknown key; expected one of {TOP}"),
        ("engine = 3", "engine = 3: expected one of moshi, echo"),
        ("model = 1.5", "model = 1.5: expected `str | null`, got `float`"),
        ("seconds = 0", "seconds = 0: expected `float` > 0.0"),
        ("seconds = -1.5", "seconds = -1.5: expected `float` > 0.0"),
        ("seconds = nan", "seconds = nan: expected `float` > 0.0"),
        ("seconds = '9'", "seconds = '9': expected `float | null`, got `str`"),
        ("ring_seconds = 9.9", "ring_seconds = 9.9: expected `float` >= 10.0"),
        ("ring_seconds = 601", "ring_seconds = 601: expected `float` <= 600.0"),
        ("capture = 1", "capture = 1: expected `object`, got `int`"),
        ("[capture]\ninput = 4", "capture.input = 4: expected `str`, got `int`"),
        ("[capture]\nblock_ms = 0.5", "capture.block_ms = 0.5: expected `float` >= 1.0"),
        ("[capture]\nblock_ms = true", "capture.block_ms = True: expected `float`, got `bool`"),
        ("[capture]\nlatency_ms = -1", "capture.latency_ms = -1: expected `float` >= 0.0"),
        ("[capture]\nlatency_ms = 1000.1", "capture.latency_ms = 1000.1: expected `float` <= 1000.0"),
        ("[playback]\nlatency_ms = 10_000", "playback.latency_ms = 10000: expected `float` <= 1000.0"),
        ("seconds = 1_000_000_001", "seconds = 1000000001: expected `float` <= 1000000000.0"),
        ("[inference]\nbacklog_limit = 0", "inference.backlog_limit = 0: expected `int` >= 1"),
        ("[inference]\nbacklog_target = 101", "inference.backlog_target = 101: expected `int` <= 100"),
        ("[inference]\nbacklog_target = 2.5", "inference.backlog_target = 2.5: expected `int`, got `float`"),
        ("[playback]\nprebuffer_ms = 81", "playback.prebuffer_ms = 81: expected `float` <= 80.0"),
        ("[playback]\nqueue_frames = 1", "playback.queue_frames = 1: expected `int` >= 2"),
        ("[playback]\noutput = []", "playback.output = []: expected `str`, got `array`"),
        ("[sampler]\ntext_temperature = 10.1", "sampler.text_temperature = 10.1: expected `float` <= 10.0"),
        ("[sampler]\naudio_top_k = 0", "sampler.audio_top_k = 0: expected `int` >= 1"),
        ("[sampler]\nseed = 'x'", "sampler.seed = 'x': expected `int | null`, got `str`"),
        ("engine = 1979-05-27", "engine = datetime.date(1979, 5, 27): expected one of moshi, echo"),
        (
            "[inference]\nbacklog_limit = 2",
            "inference.backlog_limit = 2: expected at least inference.backlog_target, 3",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_was_expected(run_toml: Path, text: str, line: str) -> None:
    run_toml.write_text(text)
    assert refused(run_toml) == f"{run_toml}: {line}"


@pytest.mark.parametrize(
    ("text", "values"), [("engine = 'whisper'", ("moshi", "echo")), ("quality = 'q5'", ("q4", "q8", "bf16"))]
)
def test_where_a_value_is_one_of_a_few_they_are_listed(run_toml: Path, text: str, values: tuple[str, ...]) -> None:
    run_toml.write_text(text)
    line = refused(run_toml)
    assert line.startswith(f"{run_toml}: {text}: expected one of ")
    assert all(value in line for value in values)


@pytest.mark.parametrize("text", ["seconds = inf", "seconds = 1e300"])
def test_a_time_that_has_no_end_is_refused(run_toml: Path, text: str) -> None:
    """A run that goes on until it is stopped has no `seconds`; JSON, by which the stages are told, has no infinity."""
    run_toml.write_text(text)
    assert refused(run_toml).startswith(f"{run_toml}: seconds = ")


@pytest.mark.parametrize(
    ("key", "shown"), [(r'"a\nb"', "capture.a"), (r'"a`b"', "capture.a`b"), ('"é"', "capture.é"), ('""', "capture.")]
)
def test_an_odd_key_is_still_named(run_toml: Path, key: str, shown: str) -> None:
    run_toml.write_text(f"[capture]\n{key} = 1", encoding="utf-8")
    line = refused(run_toml)
    assert line.startswith(f"{run_toml}: {shown}")
    assert line.endswith("unknown key; expected one of input, block_ms, latency_ms, origin")


def test_bad_toml(run_toml: Path) -> None:
    run_toml.write_text("engine = \n")
    assert refused(run_toml) == f"{run_toml}: not TOML: Invalid value (at line 1, column 10)"
    run_toml.write_text("engine = 'echo'\nengine = 'moshi'\n")
    assert refused(run_toml).startswith(f"{run_toml}: not TOML: Cannot overwrite a value")


def test_a_file_that_is_not_text(run_toml: Path) -> None:
    run_toml.write_bytes(b"engine = '\xff'")
    line = refused(run_toml)
    assert line.startswith(f"{run_toml}: not TOML: ")
    assert "utf-8" in line


@pytest.mark.parametrize(
    "data",
    [
        b"a = " + b"[" * 20_000,
        b"a = " + b"{a=" * 20_000,
        b"a = " + b"9" * 5_000,
        b"seconds = 0x" + b"f" * 5_000,
        b"seconds = " + b"9" * 400,
    ],
    ids=["deep array", "deep table", "long number", "long hexadecimal number", "large number"],
)
def test_a_file_that_is_too_much_is_refused_like_any_other(run_toml: Path, data: bytes) -> None:
    run_toml.write_bytes(data)
    assert refused(run_toml).startswith(f"{run_toml}: ")


def test_a_file_that_is_missing_or_is_none(tmp_path: Path) -> None:
    assert refused(tmp_path / "x.toml") == f"{tmp_path / 'x.toml'}: No such file or directory"
    assert refused(tmp_path) == f"{tmp_path}: Is a directory"


def test_run_toml_is_read_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("engine = 'echo'")
    assert config.load(None, {}).engine == "echo"
    Path("other.toml").write_text("quality = 'q8'")
    chosen = config.load(Path("other.toml"), {})
    assert (chosen.engine, chosen.quality) == ("moshi", "q8")
    Path("run.toml").write_text("engine = 1")
    assert refused(None) == "run.toml: engine = 1: expected one of moshi, echo"


def test_overrides_go_over_the_file(run_toml: Path) -> None:
    run_toml.write_text("engine = 'echo'\n[capture]\ninput = 'silence'\nblock_ms = 10")
    chosen = config.load(run_toml, {"engine": "moshi", "capture.input": "tone:1", "sampler.seed": 4})
    assert chosen == Config(
        engine="moshi", capture=CaptureConfig(input="tone:1", block_ms=10.0), sampler=SamplerConfig(seed=4)
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"engine": "x"}, "command line: engine = 'x': "),
        ({"capture.block_ms": 0}, "command line: capture.block_ms = 0: expected `float` >= 1.0"),
        ({"capture.nothing": 1}, "command line: capture.nothing: unknown key; "),
        ({"nothing": 1}, "command line: nothing: unknown key; "),
        ({"nothing.at.all": 1}, "command line: nothing"),
        ({"engine.x": 1}, "command line: engine.x"),
        ({"model.x": 1}, "command line: model.x"),
        ({"": 1}, "command line: : unknown key; "),
    ],
)
def test_a_wrong_override_is_one_clear_line(run_toml: Path, overrides: dict[str, Any], line: str) -> None:
    run_toml.write_text("")
    assert refused(run_toml, overrides).startswith(line)


def test_the_backlog_is_looked_at_after_the_overrides(run_toml: Path) -> None:
    run_toml.write_text("[inference]\nbacklog_target = 20\nbacklog_limit = 30")
    assert config.load(run_toml, {"inference.backlog_limit": 20}).inference.backlog_limit == 20
    expected = "inference.backlog_limit = 19: expected at least inference.backlog_target, 20"
    assert refused(run_toml, {"inference.backlog_limit": 19}) == f"{run_toml}: {expected}"


def test_seconds_may_be_a_lifetime_of_a_machine(run_toml: Path) -> None:
    run_toml.write_text("seconds = 1e9")
    assert config.load(run_toml, {}).seconds == 1e9


@pytest.mark.parametrize("output", ["a.wav", "./a.wav", "folder/../a.wav", "link.wav", "hard.wav", "{here}/a.wav"])
def test_the_input_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("a.wav").touch()
    Path("link.wav").symlink_to("a.wav")
    Path("hard.wav").hardlink_to("a.wav")
    sink = "file:" + output.format(here=tmp_path)
    line = f"playback.output = {sink!r}: expected another file than the input"
    assert refused(None, {"capture.input": "file:a.wav", "playback.output": sink}) == line
    Path("run.toml").write_text(f"[capture]\ninput = 'file:a.wav'\n[playback]\noutput = '{sink}'")
    assert refused(None) == line
    assert config.load(None, {"playback.output": "file:b.wav"}).playback.output == "file:b.wav"


@pytest.mark.parametrize("spec", ["device", "device:a.wav", "null"])
def test_what_is_no_file_may_have_the_inputs_name(spec: str) -> None:
    chosen = config.load(None, {"capture.input": "file:a.wav", "playback.output": spec})
    assert chosen.playback.output == spec


@pytest.mark.parametrize("odd", ["\0", "loop.wav"])
def test_a_file_name_that_is_none_is_not_the_loaders_undoing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """What is opened later says what is wrong with it, or it is refused here, in one line."""
    monkeypatch.chdir(tmp_path)
    Path("loop.wav").symlink_to("loop.wav")
    with contextlib.suppress(ConfigError):
        config.load(None, {"capture.input": f"file:{odd}", "playback.output": "file:answer.wav"})
    with contextlib.suppress(ConfigError):
        config.load(None, {"capture.input": "file:a.wav", "playback.output": f"file:{odd}"})


def test_the_prebuffer_that_is_not_set_depends_on_the_engine() -> None:
    assert config.prebuffer_ms(Config(engine="echo")) == 3.0
    assert config.prebuffer_ms(Config(engine="moshi")) == 40.0
    assert config.prebuffer_ms(Config(engine="moshi", playback=PlaybackConfig(prebuffer_ms=0.0))) == 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(max_size=80).map(str.encode),
        st.text("[]{}=.,'\"\n abcdeingsx0123456789_-#\\", max_size=60).map(str.encode),
        st.builds(
            lambda key, value: f"{key} = {value}".encode(),
            st.sampled_from(["engine", "seconds", "capture", "capture.block_ms", "sampler.seed", '"\\u2028"', "x"]),
            st.sampled_from(
                ["1", "-1", "inf", "nan", "''", "[]", "{}", "true", "1e400", "9" * 25, "1979-05-27", "'é'"]
            ),
        ),
    )
)
@example(b'"\\n" = 1')
@example(b"\xef\xbb\xbfengine = 'echo'")
def test_any_bytes_load_or_are_refused_in_one_line(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        try:
            loaded = config.load(Path(file.name), {})
        except ConfigError as error:
            line = str(error)
            assert line.startswith(f"{file.name}: ")
            assert len(line.splitlines()) == 1
        else:
            assert config.decode(config.encode(loaded)) == loaded


@given(
    st.builds(
        Config,
        engine=st.sampled_from(["echo", "moshi"]),
        model=st.none() | st.text(st.characters(codec="utf-8")),
        seconds=st.none() | st.floats(0.001, 1e9),
        capture=st.builds(CaptureConfig, input=st.text(st.characters(codec="utf-8")), block_ms=st.floats(1, 80)),
        sampler=st.builds(SamplerConfig, seed=st.none() | st.integers(0, (1 << 63) - 1)),
    )
)
@settings(max_examples=50, deadline=None)
def test_what_the_stages_are_told_is_what_was_set(settings: Config) -> None:
    assert config.decode(config.encode(settings)) == settings


class TestCuts:
    """Which tokens may be drawn: one cut at most for each kind."""

    @pytest.mark.parametrize(
        ("table", "text", "audio"),
        [
            ("", (25, None, None), (250, None, None)),
            ("text_top_k = 7", (7, None, None), (250, None, None)),
            ("audio_top_p = 0.9", (25, None, None), (None, 0.9, None)),
            ("text_min_p = 0.05\naudio_top_p = 1", (None, None, 0.05), (None, 1.0, None)),
        ],
    )
    def test_unset_all_three_are_the_defaults_top_k(
        self, run_toml: Path, table: str, text: config.Cut, audio: config.Cut
    ) -> None:
        run_toml.write_text(f"[sampler]\n{table}\n")
        sampler = config.load(run_toml, {}).sampler
        assert (sampler.text_cut, sampler.audio_cut) == (text, audio)

    def test_two_cuts_of_one_kind_are_refused(self, run_toml: Path) -> None:
        run_toml.write_text("[sampler]\ntext_top_k = 7\ntext_top_p = 0.9\n")
        line = "sampler.text_top_p = 0.9: expected to be unset, as sampler.text_top_k is set"
        assert refused(run_toml) == f"{run_toml}: {line}"
