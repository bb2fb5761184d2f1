"""Mimi on MLX: code for code what rustymimi and the whole signal at once give, for as long as one likes."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from moshi_mlx.models.mimi import Mimi

from pipeline.checkpoints import FULL_MIMI, MIMI_STRIDE, SIZES, MimiShape, Size, synthesize
from pipeline.topology import FRAME
from procs.engines import Samples
from procs.model import mimi, rotation
from procs.model.codec import Codes, MlxMimi, RustMimi
from tests.helpers import speech_like

CODEBOOKS: Final = 8

WRAP: Final = mimi.SPAN // MIMI_STRIDE
"""Frames after which all that attention looks at is of other frames than at first."""

FRAMES: Final = 2 * WRAP + 48
"""Two wraps and more."""

AUDIO: Final = 1e-5
"""The most by which a sample may differ."""

Float = npt.NDArray[np.float64]


def small(layers: int) -> MimiShape:
    return MimiShape(filters=2, dim=128, layers=layers, hidden=128, codebook_dim=16, codebooks=16, bins=256)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Mimi:
    """Two layers, of two heads, that matter: what a layer adds is not made small, as it is where training begins."""
    size = Size({**SIZES["tiny"].config, "card": 256}, small(layers=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small codec", size)
        checkpoint = synthesize(tmp_path_factory.mktemp("small"), "bf16", "small codec")
    loaded = mimi.load(checkpoint.mimi_file, checkpoint.mimi_shape, CODEBOOKS)
    for transformer in (loaded.encoder_transformer, loaded.decoder_transformer):
        for layer in transformer.transformer.layers:
            layer.layer_scale_1.scale = mx.ones(128)
            layer.layer_scale_2.scale = mx.ones(128)
    return loaded


# The reference: each step of the computation on the whole signal, attention in float64 and written out


class Reference:
    """The whole signal at once. A position sees itself and `context` before it."""

    def __init__(self, module: Any, context: int = 250) -> None:
        self._module, self._context = module, context

    def codes(self, sound: Samples) -> Codes:
        """Shape (frames, codebooks)."""
        module = self._module
        x = module.encoder(mx.array(sound)[None, None])
        x = module.downsample(self._transformed(module.encoder_transformer, x))
        codes: Codes = np.array(module.quantizer.encode(x))[0].T.astype(np.uint32)
        return codes

    def sound(self, codes: Codes) -> Samples:
        module = self._module
        x = module.upsample(module.quantizer.decode(mx.array(codes.T[None].astype(np.int32))))
        x = module.decoder(self._transformed(module.decoder_transformer, x))
        return np.array(x, np.float32).reshape(-1)

    def _transformed(self, transformer: Any, x: mx.array) -> mx.array:
        y = np.array(x)[0].T.astype(np.float64)
        for layer in transformer.transformer.layers:
            y = self._layer(layer, y)
        return mx.array(np.ascontiguousarray(y.T[None], np.float32))

    def _layer(self, layer: Any, x: Float) -> Float:
        x = x + weight(layer.layer_scale_1.scale) * self._attention(layer.self_attn, norm(layer.norm1, x))
        hidden = norm(layer.norm2, x) @ weight(layer.gating.linear1.weight).T
        return x + weight(layer.layer_scale_2.scale) * (gelu(hidden) @ weight(layer.gating.linear2.weight).T)

    def _attention(self, attention: Any, x: Float) -> Float:
        heads, dim = attention.cfg.num_heads, attention.cfg.head_dim
        made = (x @ weight(attention.in_proj.weight).T).reshape(len(x), 3, heads, dim)
        seen = np.empty((len(x), heads, dim))
        ago = np.arange(len(x))[:, None] - np.arange(len(x))[None]
        for head in range(heads):
            queries, keys, values = made[:, 0, head], made[:, 1, head], made[:, 2, head]
            logits = turned(queries) @ turned(keys).T / np.sqrt(dim)
            logits[(ago < 0) | (ago > self._context)] = -np.inf
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            seen[:, head] = shares / shares.sum(axis=1, keepdims=True) @ values
        return seen.reshape(len(x), heads * dim) @ weight(attention.out_proj.weight).T


def weight(array: mx.array) -> Float:
    return np.array(array, np.float64)


def norm(layer: Any, x: Float) -> Float:
    centred = x - x.mean(axis=1, keepdims=True)
    scale = weight(layer.weight) / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    normed: Float = centred * scale + weight(layer.bias)
    return normed


def gelu(x: Float) -> Float:
    return x / 2 * (1 + np.array(mx.erf(mx.array((x / np.sqrt(2)).astype(np.float32))), np.float64))


def turned(x: Float) -> Float:
    """Rotary embedding of neighbouring pairs, by one radian a position and slower."""
    count, dim = x.shape
    angles = np.arange(count)[:, None] * 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    pairs = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack((pairs.real, pairs.imag), axis=-1).reshape(count, dim)


class Passage(NamedTuple):
    """A signal, and what it should become."""

    frames: list[Samples]
    codes: Codes
    sound: Samples


@pytest.fixture(scope="module")
def passage(module: Mimi) -> Passage:
    sound = speech_like(FRAMES)
    reference = Reference(module)
    codes = reference.codes(sound)
    return Passage(np.split(sound, FRAMES), codes, reference.sound(codes))


@pytest.fixture
def ours(module: Mimi) -> MlxMimi:
    return MlxMimi(module)


def heard(codec: MlxMimi, frames: list[Samples]) -> Codes:
    """Shape (frames, codebooks)."""
    return np.stack([codec.hear(frame).result()[0] for frame in frames])


def said(codec: MlxMimi, codes: Codes) -> Samples:
    return np.concatenate([codec.say(frame).result()[0] for frame in codes])


def frames_that_differ(one: Codes, other: Codes) -> list[int]:
    """Their numbers."""
    found: list[int] = np.flatnonzero((one != other).any(axis=1)).tolist()
    return found


class TestAgainstTheWhole:
    def test_each_code_is_right_before_at_and_after_each_wrap(self, ours: MlxMimi, passage: Passage) -> None:
        assert FRAMES > 2 * WRAP
        codes = heard(ours, passage.frames)
        assert codes.shape == (FRAMES, CODEBOOKS)
        assert frames_that_differ(codes, passage.codes) == []
        assert len(np.unique(codes)) > 200  # they say something

    def test_each_sample_is_right_before_at_and_after_each_wrap(self, ours: MlxMimi, passage: Passage) -> None:
        sound = said(ours, passage.codes)
        assert sound.dtype == np.float32
        assert sound.shape == (FRAMES * FRAME,)
        assert np.abs(sound).max() > 0.1  # of a silence it would not say much
        assert np.abs(sound - passage.sound).max() < AUDIO

    @pytest.mark.parametrize("context", [249, 251])
    def test_a_position_more_or_less_would_be_seen(self, module: Mimi, passage: Passage, context: int) -> None:
        """That the two above would fail where attention looked one position too far, or not far enough."""
        other = Reference(module, context)
        assert np.abs(other.sound(passage.codes) - passage.sound).max() > 10 * AUDIO
        codes = other.codes(np.concatenate(passage.frames))
        different = frames_that_differ(codes, passage.codes)
        assert different
        assert min(different) >= WRAP - 2  # before that there is nothing to be cut off

    def test_both_directions_at_once_do_not_disturb_each_other(self, ours: MlxMimi, passage: Passage) -> None:
        for number, frame in enumerate(passage.frames[:20]):
            hearing, saying = ours.hear(frame), ours.say(passage.codes[number])
            expected = passage.sound[number * FRAME : (number + 1) * FRAME]
            assert np.abs(saying.result()[0] - expected).max() < AUDIO
            assert np.array_equal(hearing.result()[0], passage.codes[number])

    def test_positions_may_be_counted_anew_at_any_time(
        self, module: Mimi, passage: Passage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mimi, "REBASE", 30)
        rebased, original = [0], rotation.turn_back

        def turn_back(rope: Any, keys: mx.array, positions: int) -> mx.array:
            rebased[0] += 1
            return original(rope, keys, positions)

        monkeypatch.setattr(mimi, "turn_back", turn_back)
        ours = MlxMimi(module)
        assert frames_that_differ(heard(ours, passage.frames), passage.codes) == []
        layers = 2
        assert rebased[0] >= 8 * layers  # in each direction
        assert np.abs(said(ours, passage.codes) - passage.sound).max() < 1e-4
        assert rebased[0] >= 16 * layers


def arrays(codec: MlxMimi) -> list[mx.array]:
    return [*codec._ears._stream._state, *codec._mouth._stream._state]


class TestState:
    def test_it_is_of_one_size_for_ever(self, ours: MlxMimi, passage: Passage) -> None:
        shapes, held = [], []
        for number in range(400):
            codes, _ = ours.hear(passage.frames[number % FRAMES]).result()
            ours.say(codes).result()
            mx.eval(arrays(ours))
            if number in (0, 99, 399):
                shapes.append([(array.shape, array.dtype) for array in arrays(ours)])
                gc.collect()
                held.append(mx.get_active_memory())
        assert shapes[0] == shapes[1] == shapes[2]
        assert len(shapes[0]) > 30
        assert held[2] == pytest.approx(held[1], rel=0.01)

    def test_a_reset_leaves_nothing_of_what_was(self, module: Mimi, ours: MlxMimi, passage: Passage) -> None:
        heard(ours, passage.frames[:150])
        said(ours, passage.codes[:150])
        ours.reset()
        fresh = MlxMimi(module)
        frames, codes = passage.frames[100:110], passage.codes[100:110]
        assert np.array_equal(heard(ours, frames), heard(fresh, frames))
        assert np.array_equal(said(ours, codes), said(fresh, codes))

    def test_a_reset_makes_nothing(self, ours: MlxMimi, passage: Passage) -> None:
        """It is at once: the first state is still there."""
        first = arrays(ours)
        heard(ours, passage.frames[:2])
        said(ours, passage.codes[:2])
        assert not any(now is then for now, then in zip(arrays(ours), first, strict=True))
        ours.reset()
        assert all(now is then for now, then in zip(arrays(ours), first, strict=True))

    def test_what_is_in_the_making_outlives_a_reset(self, ours: MlxMimi, passage: Passage) -> None:
        heard(ours, passage.frames[:3])
        pending = ours.hear(passage.frames[3])
        ours.reset()
        assert np.array_equal(pending.result()[0], passage.codes[3])


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """385 MB, not left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "full codec", Size(SIZES["tiny"].config, FULL_MIMI))
        file = synthesize(tmp_path_factory.mktemp("full"), "bf16", "full codec").mimi_file
    yield file
    file.unlink()


def test_in_full_size_it_gives_rustymimis_codes_and_sound(full_size: Path) -> None:
    """Of more frames than a CPU has the time for here: bench/codec.py."""
    ours, rust = MlxMimi(mimi.load(full_size, FULL_MIMI, CODEBOOKS)), RustMimi(full_size, CODEBOOKS)
    for frame in np.split(speech_like(6), 6):
        hearing, expected = ours.hear(frame), rust.hear(frame).result()[0]
        assert np.array_equal(hearing.result()[0], expected)
        saying, sound = ours.say(expected), rust.say(expected).result()[0]
        assert np.abs(saying.result()[0] - sound).max() < AUDIO


def test_only_the_codebooks_that_are_spoken_are_searched(module: Mimi) -> None:
    assert len(module.quantizer.rvq_first.vq.layers) + len(module.quantizer.rvq_rest.vq.layers) == CODEBOOKS


def test_the_configuration_is_the_official_one_in_other_dimensions() -> None:
    official, other = mimi.config(FULL_MIMI), mimi.config(small(layers=3))
    assert (official.transformer.num_heads, official.transformer.num_layers) == (8, 8)
    assert (other.transformer.num_heads, other.transformer.num_layers) == (2, 3)
    assert other.transformer.context == official.transformer.context == 250
