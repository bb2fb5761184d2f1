"""Moshi as an engine, on made-up weights: every frame is answered, alike each time, for as long as one likes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from moshi_mlx.models.lm import Lm, LmConfig

from pipeline import checkpoints
from pipeline.checkpoints import QUALITIES, SIZES, Checkpoint, synthesize
from pipeline.errors import CheckpointError
from pipeline.topology import FRAME
from procs.engines import Engine, Samples, Step
from procs.model import Choice, Moshi, Sampling, codec
from procs.model import engine as engine_module
from procs.model.generator import Generator, Tokens
from procs.model.loading import compute_type, load_model, load_pieces
from tests.helpers import PATIENCE_S, speech_like

SEED: Final = 7
FRAMES: Final = 30

GREEDY: Final = Sampling(text=Choice(0.0), audio=Choice(0.0))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {quality: synthesize(tmp_path_factory.mktemp(quality), quality, "tiny") for quality in QUALITIES}


@pytest.fixture(scope="module")
def engines(found: dict[str, Checkpoint]) -> dict[str, Moshi]:
    return {quality: loaded(checkpoint) for quality, checkpoint in found.items()}


@pytest.fixture
def engine(engines: dict[str, Moshi]) -> Iterator[Moshi]:
    """The fastest one on a CPU, at the start of a conversation."""
    engine = engines["bf16"]
    engine.reset()
    yield engine
    engine.generator.sampling = Sampling()
    engine.reset()


def loaded(checkpoint: Checkpoint, **settings: Any) -> Moshi:
    engine = Moshi(checkpoint, **{"seed": SEED, **settings})
    engine.load()
    return engine


def speech(count: int, seed: int = 0) -> list[Samples]:
    return np.split(speech_like(count, seed), count)


def answers(engine: Moshi, frames: list[Samples]) -> list[Step]:
    return [engine.step(frame.copy()) for frame in frames]


def sound(steps: list[Step]) -> Samples:
    return np.concatenate([step.audio for step in steps])


def words(steps: list[Step]) -> list[str]:
    return [step.text for step in steps]


def tokens_of(engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> list[Tokens]:
    """What the generator gives from now on."""
    given: list[Tokens] = []
    original = engine.generator.step

    def step(heard: Any) -> Tokens:
        given.append(original(heard))
        return given[-1]

    monkeypatch.setattr(engine.generator, "step", step)
    return given


@pytest.mark.parametrize("quality", QUALITIES)
class TestEachQuality:
    def test_every_frame_has_its_answer(self, engines: dict[str, Moshi], quality: str) -> None:
        engine = engines[quality]
        engine.reset()
        steps = answers(engine, speech(FRAMES))
        assert {(step.audio.shape, step.audio.dtype.name) for step in steps} == {((FRAME,), "float32")}
        assert np.isfinite(sound(steps)).all()
        assert not any(step.new_conversation for step in steps)
        # The codebooks come a frame apart: nothing can be said at once.
        assert not steps[0].audio.any()
        assert all(step.audio.any() for step in steps[1:])
        assert np.abs(sound(steps)).max() < 4.0

    def test_times_are_measured(self, engines: dict[str, Moshi], quality: str) -> None:
        steps = answers(engines[quality], speech(3))
        assert all(min(step.encode_ms, step.step_ms, step.decode_ms) > 0 for step in steps[1:])
        assert min(engines[quality].loaded) > 0

    def test_a_new_conversation_is_like_the_one_before(self, engines: dict[str, Moshi], quality: str) -> None:
        engine = engines[quality]
        engine.reset()
        first = answers(engine, speech(10))
        answers(engine, speech(5, seed=1))
        engine.reset()
        again = answers(engine, speech(10))
        assert np.array_equal(sound(first), sound(again))
        assert words(first) == words(again)

    def test_warming_up_leaves_no_trace(
        self, engines: dict[str, Moshi], found: dict[str, Checkpoint], quality: str
    ) -> None:
        """What the first conversation hears is what the parts alone give, without a step before."""
        checkpoint, engine = found[quality], loaded(found[quality])
        mimi = codec.load(checkpoint, None)
        generator = Generator(load_model(checkpoint), Sampling(), SEED, compute_type(checkpoint))
        pieces = load_pieces(checkpoint)
        for frame in speech(8):
            answer = engine.step(frame.copy())
            text, spoken = generator.step(mimi.hear(frame).result()[0])
            assert answer.text == pieces[text]
            if spoken is None:
                assert not answer.audio.any()
            else:
                assert np.array_equal(answer.audio, mimi.say(spoken.astype(np.uint32)).result()[0])


class TestOverlap:
    def test_frames_given_ahead_have_the_same_answers(self, engine: Moshi) -> None:
        frames = speech(20)
        serial = answers(engine, frames)
        engine.reset()
        pending, steps = [], []
        with ThreadPoolExecutor(1) as other:
            engine.listen(frames[0].copy())
            for frame in frames[1:]:
                engine.listen(frame.copy())
                pending.append(other.submit(engine.respond().result))
            pending.append(other.submit(engine.respond().result))
            steps = [one.result(PATIENCE_S) for one in pending]
        assert np.array_equal(sound(steps), sound(serial))
        assert words(steps) == words(serial)

    def test_sound_may_be_fetched_late(self, engine: Moshi) -> None:
        frames = speech(6)
        serial = answers(engine, frames)
        engine.reset()
        pending = []
        for frame in frames:
            engine.listen(frame.copy())
            pending.append(engine.respond())
        assert np.array_equal(sound([one.result() for one in pending]), sound(serial))

    def test_a_buffer_may_be_used_again_at_once(self, engine: Moshi) -> None:
        frames, buffer = speech(6), np.empty(FRAME, np.float32)
        serial = answers(engine, frames)
        engine.reset()
        steps = []
        for frame in frames:
            buffer[:] = frame
            engine.listen(buffer)
            buffer[:] = np.nan
            steps.append(engine.respond().result())
        assert np.array_equal(sound(steps), sound(serial))

    def test_frames_not_yet_answered_are_forgotten_with_the_conversation(self, engine: Moshi) -> None:
        frames = speech(4)
        first = answers(engine, frames)
        engine.listen(speech(1, seed=1)[0])
        engine.listen(speech(1, seed=2)[0])
        engine.reset()
        assert np.array_equal(sound(answers(engine, frames)), sound(first))

    def test_it_is_an_engine_that_overlaps(self, engine: Moshi) -> None:
        as_engine: Engine = engine
        assert as_engine.overlaps
        assert as_engine.name == "moshi"

    def test_keeping_warm_changes_nothing(self, engine: Moshi) -> None:
        frames = speech(4)
        first = answers(engine, frames)
        engine.reset()
        steps = []
        for frame in frames:
            engine.keep_warm()
            steps += answers(engine, [frame])
        assert np.array_equal(sound(steps), sound(first))


class TestConversation:
    def test_another_seed_says_other_things(self, engine: Moshi, found: dict[str, Checkpoint]) -> None:
        other = loaded(found["bf16"], seed=SEED + 1)
        assert not np.array_equal(sound(answers(engine, speech(5))), sound(answers(other, speech(5))))

    def test_without_a_seed_no_two_are_alike(self, found: dict[str, Checkpoint]) -> None:
        engine = loaded(found["bf16"], seed=None)
        first = answers(engine, speech(5))
        engine.reset()
        assert not np.array_equal(sound(answers(engine, speech(5))), sound(first))

    def test_what_is_heard_matters(self, engine: Moshi) -> None:
        first = answers(engine, speech(5))
        engine.reset()
        assert not np.array_equal(sound(first), sound(answers(engine, speech(5, seed=1))))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
    def test_a_sample_that_is_no_sound_does_no_harm(self, engine: Moshi, value: float) -> None:
        frames = speech(6)
        frames[2][500:510] = value
        cleaned = [frame.copy() for frame in frames]
        cleaned[2][500:510] = 0.0 if np.isnan(value) else np.sign(value)
        expected = answers(engine, cleaned)
        engine.reset()
        steps = answers(engine, frames)
        assert np.isfinite(sound(steps)).all()
        assert np.array_equal(sound(steps), sound(expected))
        assert not any(step.new_conversation for step in steps)

    def test_words_are_printed_as_words(self, engine: Moshi) -> None:
        said = [word for word in words(answers(engine, speech(20))) if word]
        assert said
        assert all(word.startswith(" ") and word[1:].isalpha() for word in said)

    def test_padding_is_not_printed(self, found: dict[str, Checkpoint]) -> None:
        pieces = load_pieces(found["bf16"])
        assert len(pieces) == SIZES["tiny"].config["text_card"]
        assert [token for token, piece in enumerate(pieces) if not piece] == [0, 1, 2, 3]


class _Broken:
    """Sound that is none."""

    def result(self) -> tuple[Samples, float]:
        return np.full(FRAME, np.nan, np.float32), 1.0


class TestLostNumbers:
    def break_sound(self, engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on the codec's decoder has no numbers, until it is reset."""
        original = engine.codec.reset

        def reset() -> None:
            monkeypatch.undo()
            original()

        monkeypatch.setattr(engine.codec, "say", lambda _: _Broken())
        monkeypatch.setattr(engine.codec, "reset", reset)

    def test_silence_then_a_new_conversation(self, engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        frames = speech(4)
        answers(engine, frames)
        self.break_sound(engine, monkeypatch)
        broken = engine.step(speech(1)[0])
        assert not broken.audio.any()
        assert not broken.new_conversation  # it was begun in the old one
        again = answers(engine, frames)
        assert [step.new_conversation for step in again] == [True, False, False, False]
        assert not again[0].audio.any()  # as at the start of any
        assert all(step.audio.any() for step in again[1:])
        assert np.isfinite(sound(again)).all()

    def test_the_frame_that_follows_begins_it_whatever_was_given_ahead(
        self, engine: Moshi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers(engine, speech(3))
        self.break_sound(engine, monkeypatch)
        for frame in speech(3):
            engine.listen(frame)
        assert not engine.respond().result().audio.any()
        steps = [engine.respond().result() for _ in range(2)]
        assert [step.new_conversation for step in steps] == [True, False]
        assert not steps[0].audio.any()
        assert steps[1].audio.any()

    def test_what_was_lost_before_a_conversation_does_not_end_it(
        self, engine: Moshi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two answers of the old one are in the making; the later one is fetched when the new one has begun."""
        answers(engine, speech(3))
        self.break_sound(engine, monkeypatch)
        frames = speech(6)
        for frame in frames[:2]:
            engine.listen(frame)
        early, late = engine.respond(), engine.respond()
        early.result()
        assert engine.step(frames[2]).new_conversation
        late.result()
        assert [step.new_conversation for step in answers(engine, frames[3:])] == [False] * 3

    def test_what_was_lost_before_a_reset_does_not_make_another(
        self, engine: Moshi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers(engine, speech(3))
        self.break_sound(engine, monkeypatch)
        engine.listen(speech(1)[0])
        late = engine.respond()
        engine.reset()
        late.result()
        assert not any(step.new_conversation for step in answers(engine, speech(3)))


class TestSampling:
    @pytest.mark.parametrize(
        "choice",
        [
            Choice(0.7, top_k=1),
            Choice(0.7, top_k=25),
            Choice(0.7, top_k=10**6),
            Choice(0.7, top_p=0.9),
            Choice(0.7, top_p=1.0),
            Choice(0.7, min_p=0.1),
            Choice(0.7),
            Choice(0.0),
            Choice(5.0, top_p=0.01),
        ],
        ids=str,
    )
    def test_each_way_to_draw_speaks(self, engine: Moshi, choice: Choice) -> None:
        engine.generator.sampling = Sampling(text=choice, audio=choice)
        steps = answers(engine, speech(4))
        assert np.isfinite(sound(steps)).all()
        assert all(step.audio.any() for step in steps[1:])

    def test_the_likeliest_alone_is_what_no_temperature_takes(self, engines: dict[str, Moshi]) -> None:
        engine, said = engines["q8"], []  # computes in float32 here, where no two tokens are equally likely
        for choice in (Choice(0.0), Choice(0.7, top_k=1), Choice(5.0, top_k=1)):
            engine.generator.sampling = Sampling(text=choice, audio=choice)
            engine.reset()
            said.append(answers(engine, speech(5)))
        engine.generator.sampling = Sampling()
        assert all(np.array_equal(sound(steps), sound(said[0])) for steps in said)
        assert all(words(steps) == words(said[0]) for steps in said)

    def test_without_temperature_no_seed_is_needed(self, found: dict[str, Checkpoint]) -> None:
        engine = loaded(found["bf16"], seed=None, sampling=GREEDY)
        first = answers(engine, speech(5))
        engine.reset()
        assert np.array_equal(sound(first), sound(answers(engine, speech(5))))

    def test_what_is_given_at_first_is_what_is_drawn_with(self, engine: Moshi, found: dict[str, Checkpoint]) -> None:
        from_the_start = answers(loaded(found["bf16"], sampling=GREEDY), speech(5))
        engine.generator.sampling = GREEDY
        engine.reset()
        assert np.array_equal(sound(from_the_start), sound(answers(engine, speech(5))))

    def test_a_change_has_effect_with_the_next_frame(self, engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        given, frames, at = tokens_of(engine, monkeypatch), speech(8), 5
        said: list[list[int]] = []
        # Of two ways to say the same, one compiles another function and the other only sets numbers.
        likeliest = Choice(0.0), Choice(0.7, top_k=1)
        for changed in (None, *likeliest):
            engine.generator.sampling = Sampling()
            engine.reset()
            given.clear()
            answers(engine, frames[:at])
            if changed is not None:
                engine.generator.sampling = Sampling(text=changed, audio=changed)
            answers(engine, frames[at:])
            said.append([tokens.text for tokens in given])
        unchanged, first, second = said
        assert unchanged[:at] == first[:at] == second[:at]
        assert first[at] == second[at] != unchanged[at]

    def test_the_same_again_changes_nothing(self, engine: Moshi) -> None:
        frames = speech(8)
        first = answers(engine, frames)
        engine.reset()
        steps = answers(engine, frames[:4])
        engine.generator.sampling = Sampling()
        assert np.array_equal(sound(steps + answers(engine, frames[4:])), sound(first))

    def test_a_change_loads_nothing(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(found["bf16"].folder, tmp_path / "copy"))
        engine = loaded(checkpoints.find(str(folder), "bf16"))
        shutil.rmtree(folder)
        first = answers(engine, speech(3))
        engine.generator.sampling = GREEDY
        engine.reset()
        answers(engine, speech(3))
        engine.generator.sampling = Sampling()
        engine.reset()
        assert np.array_equal(sound(first), sound(answers(engine, speech(3))))


@pytest.mark.parametrize("quality", QUALITIES)
class TestWeights:
    @pytest.fixture
    def small(self, tmp_path: Path, quality: str) -> Iterator[Checkpoint]:
        """100 to 400 MB: beside them what is not weights is little."""
        yield synthesize(tmp_path / "small", quality, "small")
        shutil.rmtree(tmp_path / "small")

    def test_packed_weights_are_loaded_and_never_made(self, small: Checkpoint, quality: str) -> None:
        file_bytes = small.model_file.stat().st_size
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = load_model(small)
        peak = mx.get_peak_memory() - before
        assert file_bytes * 0.9 < peak < file_bytes * 1.1
        stored = mx.load(str(small.model_file))
        there = dict(tree_flatten(model.parameters()))
        assert there.keys() == stored.keys()
        for name, array in stored.items():
            assert there[name].dtype == array.dtype, name
            assert mx.array_equal(there[name], array).item(), name

    def test_the_same_measure_sees_weights_that_are_made_first(
        self, found: dict[str, Checkpoint], quality: str
    ) -> None:
        file_bytes = found[quality].model_file.stat().st_size
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        made = Lm(LmConfig.from_config_dict(found[quality].config))
        mx.eval(made.parameters())
        assert mx.get_peak_memory() - before > file_bytes * 1.5


class TestLoading:
    def refusal(self, checkpoint: Checkpoint) -> str:
        with pytest.raises(CheckpointError) as caught:
            Moshi(checkpoint).load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_file_that_went_away(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        gone = tmp_path / "gone.safetensors"
        expected = f"{gone} does not load: "
        assert self.refusal(replace(found["bf16"], mimi_file=gone)).startswith(expected)
        assert self.refusal(replace(found["bf16"], tokenizer_file=gone)).startswith(expected)

    def test_weights_that_went_away(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        gone = tmp_path / "gone.safetensors"
        assert self.refusal(replace(found["bf16"], model_file=gone)).startswith(f"{gone} does not load: ")

    def test_a_damaged_tokenizer(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        damaged = tmp_path / "tokenizer.model"
        damaged.write_bytes(found["bf16"].tokenizer_file.read_bytes()[:500])
        assert self.refusal(replace(found["bf16"], tokenizer_file=damaged)).startswith(f"{damaged} does not load: ")

    def test_a_tokenizer_with_too_few_words(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        small = tmp_path / "tokenizer.model"
        small.write_bytes(checkpoints._tokenizer(100, np.random.default_rng(0)))
        line = self.refusal(replace(found["bf16"], tokenizer_file=small))
        assert line == f"{small} does not load: 100 pieces, the model speaks 1000"

    def test_weights_of_another_kind(self, found: dict[str, Checkpoint]) -> None:
        plain = replace(found["q4"], model_file=found["bf16"].model_file)
        assert "does not load: Missing" in self.refusal(plain)

    @pytest.mark.parametrize("kind", ["model_file", "mimi_file"])
    def test_a_pointer_instead_of_weights(self, found: dict[str, Checkpoint], tmp_path: Path, kind: str) -> None:
        pointer = tmp_path / "pointer.safetensors"
        pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        broken = replace(found["bf16"], **{kind: pointer})  # type: ignore[arg-type]
        assert self.refusal(broken).startswith(f"{pointer} does not load: ")

    def test_without_a_compiler(self, found: dict[str, Checkpoint], engine: Moshi, tmp_path: Path) -> None:
        """On a CPU mx.compile would call g++, and end the process where there is none."""
        program = (
            "import sys; import numpy as np; from pipeline.checkpoints import find; from procs.model import Moshi;"
            f"engine = Moshi(find(sys.argv[1], 'bf16'), seed={SEED}); engine.load();"
            f"steps = [engine.step(np.zeros({FRAME}, np.float32)) for _ in range(4)];"
            "print([step.text for step in steps], bool(steps[-1].audio.any()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(found["bf16"].folder)],
            # An empty TMPDIR: nothing was compiled before.
            env={**os.environ, "PATH": str(tmp_path), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(" True\n")

    def test_a_machine_that_never_becomes_steady_is_not_waited_for(
        self, found: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "STEADY", 10**6)
        monkeypatch.setattr(engine_module, "WARM_UP_MOST", 6)
        steps = []
        original = Moshi.step

        def step(self: Moshi, frame: Samples) -> Step:
            steps.append(frame)
            return original(self, frame)

        monkeypatch.setattr(Moshi, "step", step)
        loaded(found["bf16"])
        assert len(steps) == 6 + 1
        assert not any(frame.any() for frame in steps)
