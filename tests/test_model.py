"""Moshi as an engine, on made-up weights: every frame is answered, alike each time, for as long as one likes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import mlx.core as mx
import numpy as np
import pytest
import rustymimi
from moshi_mlx.models.lm import Lm, LmConfig
from moshi_mlx.models.mimi import Mimi

from pipeline import checkpoints
from pipeline.checkpoints import FULL_MIMI, QUALITIES, SIZES, Checkpoint, Size, synthesize
from pipeline.errors import CheckpointError
from pipeline.topology import FRAME
from procs import model
from procs.engines import Engine, Samples, Step
from procs.model import MlxMimi, Moshi, RustMimi

SEED: Final = 7
FRAMES: Final = 30


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {quality: synthesize(tmp_path_factory.mktemp(quality), quality, "tiny") for quality in QUALITIES}


@pytest.fixture(scope="module")
def engines(found: dict[str, Checkpoint]) -> dict[str, Moshi]:
    engines = {quality: Moshi(checkpoint, seed=SEED) for quality, checkpoint in found.items()}
    for engine in engines.values():
        engine.load()
    return engines


@pytest.fixture
def engine(engines: dict[str, Moshi]) -> Iterator[Moshi]:
    """The fastest one on a CPU, at the start of a conversation."""
    engines["bf16"].reset()
    yield engines["bf16"]
    engines["bf16"].reset()


def speech(frames: int, seed: int = 0) -> list[Samples]:
    """Noise that swells and ebbs."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal(frames * FRAME) * np.sin(np.arange(frames * FRAME) / FRAME)
    return [frame.astype(np.float32) for frame in np.split(0.1 * noise, frames)]


def answers(engine: Engine, frames: list[Samples]) -> list[Step]:
    return [engine.step(frame) for frame in frames]


def sound(steps: list[Step]) -> Samples:
    return np.concatenate([step.audio for step in steps])


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
        assert all(min(step.encode_ms, step.step_ms, step.decode_ms) > 0.1 for step in steps[1:])

    def test_a_new_conversation_is_like_the_first(
        self, engines: dict[str, Moshi], found: dict[str, Checkpoint], quality: str
    ) -> None:
        engine, fresh = engines[quality], Moshi(found[quality], seed=SEED)
        fresh.load()
        first = answers(fresh, speech(10))
        answers(engine, speech(5, seed=1))
        engine.reset()
        again = answers(engine, speech(10))
        assert np.array_equal(sound(first), sound(again))
        assert [step.text for step in first] == [step.text for step in again]

    def test_packed_weights_are_loaded_and_never_made(
        self, found: dict[str, Checkpoint], quality: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = found[quality]
        file_bytes = checkpoint.model_file.stat().st_size
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loaded = model._load_model(checkpoint)
        peak = mx.get_peak_memory() - before
        assert file_bytes * 0.9 < peak < file_bytes * 1.25
        del loaded
        # The same measure sees it at once where weights are made before they are replaced.
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        materialised = Lm(LmConfig.from_config_dict(checkpoint.config))
        mx.eval(materialised.parameters())
        assert mx.get_peak_memory() - before > file_bytes * 1.5

    def test_bits_stay_as_they_are_in_the_file(self, found: dict[str, Checkpoint], quality: str) -> None:
        loaded = model._load_model(found[quality])
        for name, stored in mx.load(str(found[quality].model_file)).items():
            if name.startswith(checkpoints.PROBE):
                there = getattr(loaded.transformer.layers[0].self_attn.in_proj, name.rpartition(".")[2])
                assert mx.array_equal(there.astype(stored.dtype), stored).item()


class TestConversation:
    def test_another_seed_says_other_things(self, engine: Moshi, found: dict[str, Checkpoint]) -> None:
        other = Moshi(found["bf16"], seed=SEED + 1)
        other.load()
        assert not np.array_equal(sound(answers(engine, speech(5))), sound(answers(other, speech(5))))

    def test_what_is_heard_matters(self, engine: Moshi) -> None:
        first = answers(engine, speech(5))
        engine.reset()
        assert not np.array_equal(sound(first), sound(answers(engine, speech(5, seed=1))))

    def test_it_goes_on_past_the_generators_end(self, engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "conversation_frames", 6)
        engine.reset()
        frames = speech(6)
        steps = answers(engine, frames * 3)
        assert [index for index, step in enumerate(steps) if step.new_conversation] == [6, 12]
        assert np.array_equal(sound(steps[:6]), sound(steps[6:12]))
        assert np.array_equal(sound(steps[:6]), sound(steps[12:]))

    def test_it_begins_anew_before_the_cache_goes_wrong(self, engine: Moshi) -> None:
        assert engine.conversation_frames <= engine._model.cfg.transformer.max_seq_len

    def test_numbers_that_are_none_end_the_conversation(self, engine: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        first = answers(engine, speech(4))
        monkeypatch.setattr(engine._codec, "decode", lambda _: np.full(FRAME, np.nan, np.float32))
        broken = engine.step(speech(1)[0])
        assert broken.new_conversation
        assert not broken.audio.any()
        monkeypatch.undo()
        assert np.array_equal(sound(answers(engine, speech(4))), sound(first))

    def test_words_are_printed_as_words(self, engine: Moshi) -> None:
        words = [step.text for step in answers(engine, speech(20)) if step.text]
        assert words
        assert all(word.startswith(" ") and word[1:].isalpha() for word in words)

    def test_padding_is_not_printed(self, engine: Moshi) -> None:
        pieces = engine._pieces
        assert len(pieces) == SIZES["tiny"].config["text_card"]
        assert [token for token, piece in enumerate(pieces) if not piece] == [0, 1, 2, 3]

    @pytest.mark.parametrize("top_k", [1, 25, 10**6])
    def test_top_k(self, found: dict[str, Checkpoint], top_k: int) -> None:
        engine = Moshi(found["bf16"], seed=SEED, text_top_k=top_k, audio_top_k=top_k)
        engine.load()
        assert np.isfinite(sound(answers(engine, speech(3)))).all()

    def test_without_temperature_no_seed_is_needed(self, found: dict[str, Checkpoint]) -> None:
        engine = Moshi(found["bf16"], text_temperature=0.0, audio_temperature=0.0)
        engine.load()
        first = answers(engine, speech(5))
        engine.reset()
        assert np.array_equal(sound(first), sound(answers(engine, speech(5))))


def positions(mimi: Mimi) -> int:
    """The most positions that an attention cache of Mimi's has room for."""
    caches = [layer.self_attn.state for layer in (*mimi.encoder_cache, *mimi.decoder_cache)]
    return max(len(keys[0, 0]) for keys, _ in caches if keys is not None)


class TestMimi:
    def test_bounded_caches_change_nothing(self, found: dict[str, Checkpoint]) -> None:
        """Past the context of 250 positions, two a frame, upstream's caches go on growing."""
        checkpoint = found["bf16"]
        upstream = Mimi(model._mimi_config(checkpoint.mimi_shape))
        upstream.load_pytorch_weights(str(checkpoint.mimi_file))
        model._keep_codebooks(upstream, 8)
        ours = MlxMimi(checkpoint.mimi_file, checkpoint.mimi_shape, 8)
        for frame in speech(150):
            codes = np.array(upstream.encode_step(mx.array(frame)[None, None])[0, :, 0])
            audio = np.array(upstream.decode_step(mx.array(codes)[None, :, None])[0, 0])
            assert np.array_equal(ours.encode(frame), codes)
            assert np.allclose(ours.decode(codes.astype(np.uint32)), audio, atol=1e-6)
        assert positions(upstream) >= 300
        assert positions(ours._mimi) <= 252

    def test_the_full_size_runs_in_rust(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SIZES, "full codec", Size(SIZES["tiny"].config, FULL_MIMI))
        engine = Moshi(synthesize(tmp_path / "full", "bf16", "full codec"), seed=SEED)
        # rustymimi ends after so many positions, two a frame, whether or not it is reset: by default after 4096 frames.
        monkeypatch.setattr(rustymimi, "Tokenizer", partial(rustymimi.Tokenizer, max_seq_len=12))
        engine.load()
        assert isinstance(engine._codec, RustMimi)
        monkeypatch.setattr(engine, "conversation_frames", 4)
        engine.reset()
        steps = answers(engine, speech(4) * 2)
        shutil.rmtree(tmp_path / "full")
        assert {(step.audio.shape, step.audio.dtype.name) for step in steps} == {((FRAME,), "float32")}
        assert np.isfinite(sound(steps)).all()
        assert sound(steps).any()
        assert [step.new_conversation for step in steps] == [False] * 4 + [True] + [False] * 3
        assert np.array_equal(sound(steps[:4]), sound(steps[4:]))


class TestLoading:
    def refusal(self, checkpoint: Checkpoint) -> str:
        with pytest.raises(CheckpointError) as caught:
            Moshi(checkpoint).load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_file_that_went_away(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        gone = tmp_path / "gone.safetensors"
        expected = f"{gone} does not load: "
        assert self.refusal(replace(found["bf16"], model_file=gone)).startswith(expected)
        assert self.refusal(replace(found["bf16"], mimi_file=gone)).startswith(expected)
        assert self.refusal(replace(found["bf16"], tokenizer_file=gone)).startswith(expected)

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

    def test_without_a_compiler(self, found: dict[str, Checkpoint], tmp_path: Path) -> None:
        """Upstream's samplers would have mx.compile call g++ on a CPU, and end the process where there is none."""
        program = (
            "import sys; from pipeline.checkpoints import find; from procs.model import Moshi;"
            "engine = Moshi(find(sys.argv[1], 'bf16'), text_top_k=5); engine.load(); print('loaded')"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(found["bf16"].folder)],
            # An empty TMPDIR: nothing was compiled before.
            env={**os.environ, "PATH": str(tmp_path), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr
