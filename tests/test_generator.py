"""The model's step: moshi_mlx's tokens, what attention sees for ever, and what a frame costs in counts."""

import collections
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx.nn.layers.quantized import quantize
from moshi_mlx.models.generate import LmGen
from moshi_mlx.models.lm import Lm, LmConfig
from moshi_mlx.utils.sampling import Sampler

from pipeline.checkpoints import QUALITIES, SIZES, Checkpoint, Size, synthesize
from pipeline.layout import OFFICIAL
from procs.model import generator as generators
from procs.model.generator import Generator, Tokens
from procs.model.loading import compute_type, load_model
from procs.model.sampling import Choice, Sampling
from tests.test_layout import CONFIGS

SEED: Final = 42
FRAMES: Final = 500
GREEDY: Final = Sampling(text=Choice(0), audio=Choice(0))

Codes = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {quality: synthesize(tmp_path_factory.mktemp(quality) / "model", quality, "tiny") for quality in QUALITIES}


def heard(checkpoint: Checkpoint, frames: int) -> Codes:
    config = checkpoint.config
    shape = (frames, config["n_q"] - config["dep_q"])
    codes: Codes = np.random.default_rng(0).integers(0, min(config["card"], 2048), shape)
    return codes


def upstreams_model(checkpoint: Checkpoint) -> Lm:
    """moshi_mlx's own, computing in the type that ours does."""
    model = Lm(LmConfig.from_config_dict(checkpoint.config))
    model.set_dtype(mx.bfloat16)
    if checkpoint.bits is not None and checkpoint.group is not None:
        quantize(model, bits=checkpoint.bits, group_size=checkpoint.group)
    model.load_weights(str(checkpoint.model_file), strict=True)
    model.set_dtype(compute_type(checkpoint))
    mx.eval(model.parameters())
    return model


def upstreams_tokens(model: Lm, samplers: tuple[Sampler, Sampler], codes: Codes) -> list[Tokens]:
    mx.random.seed(SEED)
    text, audio = samplers
    upstream = LmGen(model, max_steps=len(codes) + 1, text_sampler=text, audio_sampler=audio)
    told = []
    for row in codes:
        token, _ = upstream.step(mx.array(row.astype(np.int32))[None])
        spoken = upstream.last_audio_tokens()
        told.append(Tokens(int(token.item()), None if spoken is None else np.array(spoken[0], np.int32)))
    return told


def generator(checkpoint: Checkpoint, sampling: Sampling, seed: int = SEED) -> Generator:
    return Generator(load_model(checkpoint), sampling, seed, compute_type(checkpoint))


def told(step: Callable[[Codes], Tokens], codes: Codes) -> list[Tokens]:
    return [step(row) for row in codes]


def same(ours: list[Tokens], theirs: list[Tokens]) -> int:
    """Frames until the first that differs."""
    for frame, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.text != other.text or (one.spoken is None) != (other.spoken is None):
            return frame
        if one.spoken is not None and not np.array_equal(one.spoken, np.array(other.spoken)):
            return frame
    return len(ours)


DRAWS: Final = {
    "greedy": (GREEDY, (Sampler(temp=0.0), Sampler(temp=0.0))),
    "top_k": (
        Sampling(Choice(0.7, top_k=25), Choice(0.8, top_k=250)),
        (Sampler(temp=0.7, top_k=25), Sampler(temp=0.8, top_k=250)),
    ),
    "top_p": (Sampling(Choice(0.7, top_p=0.95), Choice(0.8, top_p=0.9)), (Sampler(0.7), Sampler(0.8, top_p=0.9))),
    "min_p": (
        Sampling(Choice(0.7, min_p=0.05), Choice(0.8, min_p=0.1)),
        (Sampler(0.7, top_p=0, min_p=0.05), Sampler(0.8, top_p=0, min_p=0.1)),
    ),
    "no cut": (Sampling(Choice(0.7), Choice(0.8)), (Sampler(0.7, top_p=0), Sampler(0.8, top_p=0))),
    "greedy text": (Sampling(Choice(0), Choice(0.8, top_k=250)), (Sampler(temp=0.0), Sampler(temp=0.8, top_k=250))),
}


class TestTokens:
    @pytest.mark.parametrize("quality", QUALITIES)
    @pytest.mark.parametrize(("draw", "frames"), [("greedy", FRAMES), ("top_k", FRAMES), ("top_p", 40)])
    def test_they_are_upstreams(self, found: dict[str, Checkpoint], quality: str, draw: str, frames: int) -> None:
        checkpoint = found[quality]
        sampling, samplers = DRAWS[draw]
        codes = heard(checkpoint, frames)
        theirs = upstreams_tokens(upstreams_model(checkpoint), samplers, codes)
        assert same(told(generator(checkpoint, sampling).step, codes), theirs) == frames
        assert len({tokens.text for tokens in theirs}) > 5

    @pytest.mark.parametrize("draw", ["min_p", "no cut", "greedy text"])
    def test_they_are_upstreams_however_drawn(self, found: dict[str, Checkpoint], draw: str) -> None:
        checkpoint = found["bf16"]
        sampling, samplers = DRAWS[draw]
        codes = heard(checkpoint, 40)
        theirs = upstreams_tokens(upstreams_model(checkpoint), samplers, codes)
        assert same(told(generator(checkpoint, sampling).step, codes), theirs) == len(codes)

    @pytest.mark.parametrize("quality", ["bf16", "q4"])
    @pytest.mark.parametrize("name", [name for name in CONFIGS if name != "moshi"])
    def test_they_are_upstreams_for_other_models_of_the_family(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: str, name: str
    ) -> None:
        monkeypatch.setitem(SIZES, name, Size(CONFIGS[name], SIZES["tiny"].mimi._replace(bins=64)))
        checkpoint = synthesize(tmp_path / "model", quality, name)
        codes = heard(checkpoint, 30) % 64
        theirs = upstreams_tokens(upstreams_model(checkpoint), DRAWS["top_p"][1], codes)
        assert same(told(generator(checkpoint, DRAWS["top_p"][0]).step, codes), theirs) == len(codes)

    def test_nothing_is_said_until_the_delayed_codebooks_have_come(self, found: dict[str, Checkpoint]) -> None:
        first, second = told(generator(found["bf16"], GREEDY).step, heard(found["bf16"], 2))
        assert first.spoken is None
        assert second.spoken is not None

    def test_a_seed_repeats_a_conversation_and_another_does_not(self, found: dict[str, Checkpoint]) -> None:
        codes, sampling = heard(found["bf16"], 10), DRAWS["top_k"][0]
        one = generator(found["bf16"], sampling)
        first = told(one.step, codes)
        one.reset()
        assert same(told(one.step, codes), first) == len(codes)
        assert same(told(generator(found["bf16"], sampling, SEED + 1).step, codes), first) < len(codes)

    def test_how_tokens_are_drawn_may_change_between_two_frames(self, found: dict[str, Checkpoint]) -> None:
        codes = heard(found["bf16"], 12)
        one, greedy = generator(found["bf16"], DRAWS["top_k"][0]), generator(found["bf16"], GREEDY)
        plain = generator(found["bf16"], DRAWS["top_k"][0])
        first = told(one.step, codes[:4])
        assert same(told(plain.step, codes[:4]), first) == 4
        one.sampling = GREEDY
        assert same(told(one.step, codes[4:8]), told(plain.step, codes[4:8])) < 4
        # Nothing of what was drawn otherwise is left but the tokens themselves.
        one.reset()
        assert same(told(one.step, codes), told(greedy.step, codes)) == len(codes)

    def test_a_change_takes_its_keys_from_where_the_last_frame_left_them(self, found: dict[str, Checkpoint]) -> None:
        codes, (sampling, _) = heard(found["bf16"], 8), DRAWS["top_k"]
        one, other = generator(found["bf16"], sampling), generator(found["bf16"], sampling)
        told(one.step, codes[:4])
        told(other.step, codes[:4])
        one.sampling = GREEDY
        one.sampling = sampling
        assert same(told(one.step, codes[4:]), told(other.step, codes[4:])) == 4


CONTEXT: Final = 24


class _Recorded:
    """A conversation of ours, with what went into the transformer and what came out of it, frame by frame."""

    def __init__(self, checkpoint: Checkpoint, frames: int, rebase: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(generators, "REBASE", rebase)
        ours = generator(checkpoint, GREEDY)
        assert ours.context == CONTEXT
        self.inputs: list[Codes] = []
        self.hidden: list[npt.NDArray[np.float32]] = []
        inputs, last = ours._inputs, ours._layers.last

        def record_inputs() -> mx.array:
            made = inputs()
            self.inputs.append(np.array(made).astype(np.int64) - ours._embed.offsets)
            return made

        def record_hidden(*given: mx.array) -> Any:
            made = last(*given)
            self.hidden.append(np.array(made[1].astype(mx.float32))[0, 0])
            return made

        monkeypatch.setattr(ours, "_inputs", record_inputs)
        monkeypatch.setattr(ours._layers, "last", record_hidden)
        told(ours.step, heard(checkpoint, frames))
        self.position = ours._position


def full_history(model: Lm, tokens: Codes, context: int) -> npt.NDArray[np.float32]:
    """The transformer's output for all frames at once, without any cache: each position sees `context` of them."""
    tables = [model.text_emb, *model.audio_embs]
    x = sum((table(mx.array(tokens[:, index]))[None] for index, table in enumerate(tables)), mx.array(0.0))
    own = np.arange(len(tokens))
    visible = (own[None, :] <= own[:, None]) & (own[None, :] > own[:, None] - context)
    mask = mx.array(np.where(visible, 0.0, -np.inf).astype(np.float32))
    for layer in model.transformer.layers:
        attention = layer.self_attn
        made = attention.in_proj(layer.norm1(x)).reshape(1, len(tokens), 3, attention.cfg.num_heads, -1)
        queries, keys, values = (made[:, :, index].swapaxes(1, 2) for index in range(3))
        rope: Any = attention.rope
        queries, keys = rope(queries), rope(keys)
        weights = mx.softmax(queries @ keys.swapaxes(-1, -2) * attention.scale + mask, axis=-1)
        x = x + attention.out_proj((weights @ values).swapaxes(1, 2).reshape(1, len(tokens), -1))
        x = x + layer.gating(layer.norm2(x))
    return np.array(model.out_norm(x)[0])


class TestAttention:
    @pytest.fixture
    def small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
        """Computes in float32, so that a difference of rounding is far from one of what is seen."""
        monkeypatch.setitem(SIZES, "short", Size({**SIZES["tiny"].config, "context": CONTEXT}, SIZES["tiny"].mimi))
        return synthesize(tmp_path / "model", "q8", "short")

    @pytest.mark.parametrize("rebase", [1 << 15, 2 * CONTEXT, 100])
    def test_it_sees_exactly_the_context_before_at_and_after_every_wrap(
        self, small: Checkpoint, monkeypatch: pytest.MonkeyPatch, rebase: int
    ) -> None:
        frames = 12 * CONTEXT + 5
        ours = _Recorded(small, frames, rebase, monkeypatch)
        model = upstreams_model(small)
        tokens = np.array(ours.inputs)
        expected = full_history(model, tokens, CONTEXT)
        error = np.abs(np.array(ours.hidden) - expected).max(axis=1)
        assert error.max() < 2e-4
        # The measure sees one position more or less at once, from the frame on at which it matters.
        for other in (CONTEXT - 1, CONTEXT + 1):
            changed = np.abs(expected - full_history(model, tokens, other)).max(axis=1)
            assert not changed[: min(other, CONTEXT)].any()
            assert (changed[max(other, CONTEXT) :] > 10 * error.max()).all()
        assert ours.position < rebase + CONTEXT + 1
        assert (ours.position < frames) == (rebase < frames)

    def test_a_reset_leaves_nothing_of_the_conversation_before(self, small: Checkpoint) -> None:
        codes = heard(small, 3 * CONTEXT)
        ours = generator(small, GREEDY)
        first = told(ours.step, codes)
        ours.reset()
        assert same(told(ours.step, codes), first) == len(codes)

    def test_what_warms_up_leaves_no_trace(self, small: Checkpoint) -> None:
        codes = heard(small, 2 * CONTEXT)
        warm = generator(small, GREEDY)
        warm.warm_up()
        assert same(told(warm.step, codes), told(generator(small, GREEDY).step, codes)) == len(codes)


class Waits:
    """Counts what makes the host wait for the device."""

    METHODS: Final = ("item", "tolist", "__bool__", "__int__", "__float__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(mx, "eval", self._counted(mx.eval))
        for name in self.METHODS:
            monkeypatch.setattr(mx.array, name, self._counted(getattr(mx.array, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.count += 1
            return function(*arguments)

        return counted


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> Lm:
    """As many layers, codebooks and slices as Moshi 7B has, each of them tiny: the same graph."""
    config = {**OFFICIAL, **SIZES["tiny"].config}
    config |= {name: OFFICIAL[name] for name in ("num_layers", "depformer_num_layers")}
    model = Lm(LmConfig.from_config_dict(config))
    model.set_dtype(mx.bfloat16)
    quantize(model, bits=4, group_size=32)
    mx.eval(model.parameters())
    return model


def primitives(outputs: list[mx.array], folder: Path) -> "collections.Counter[str]":
    """What has to be evaluated for `outputs`, by the names of MLX's operations."""
    mx.export_to_dot(str(folder / "graph.dot"), *outputs)
    return collections.Counter(re.findall(r'label ="(\w+)[^"]*", shape=rectangle', (folder / "graph.dot").read_text()))


class TestCosts:
    def test_the_host_waits_for_the_device_once_a_frame(
        self, found: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codes = heard(found["bf16"], 8)
        ours = generator(found["bf16"], DRAWS["top_k"][0])
        told(ours.step, codes[:3])
        waits = Waits(monkeypatch)
        told(ours.step, codes[3:])
        assert waits.count == len(codes) - 3

    def test_upstream_waits_20_times_more(self, found: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
        """So the count counts."""
        text, audio = DRAWS["top_k"][1]
        upstream = LmGen(upstreams_model(found["bf16"]), 10, text_sampler=text, audio_sampler=audio)
        codes = mx.zeros((1, 8), mx.int32)
        for _ in range(3):
            upstream.step(codes)
        waits = Waits(monkeypatch)
        token, _ = upstream.step(codes)
        upstream.last_audio_tokens()
        token.item()
        assert waits.count >= 20

    def test_a_frames_graph_is_less_than_half_of_upstreams(
        self, deep: Lm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # On a CPU these are made of many others; on a GPU they are one operation each.
        monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.sort(x))
        monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.sort(x))
        monkeypatch.setattr(
            mx.fast,
            "scaled_dot_product_attention",
            lambda q, k, v, **_: mx.concatenate((q, k, v), axis=2)[:, :, : q.shape[2]],
        )
        sampler = Sampler(temp=0.8, top_p=0.95)
        upstream = LmGen(deep, 10, text_sampler=sampler, audio_sampler=sampler)
        codes = np.zeros(8, np.int32)
        for _ in range(4):
            token, _ = upstream.step(mx.array(codes)[None])
            mx.eval(token, upstream.gen_sequence)
        token, _ = upstream.step(mx.array(codes)[None])
        theirs = primitives([token, upstream.gen_sequence], tmp_path)
        choice = Choice(0.8, top_p=0.95)
        generator = Generator(deep, Sampling(choice, choice), SEED)
        for _ in range(4):
            generator.step(codes)
        monkeypatch.setattr(mx, "async_eval", lambda *_: None)
        ours = primitives([generator.submit(codes)], tmp_path)
        assert ours.total() > 1_000  # nothing of it was evaluated before it was counted
        assert ours.total() < theirs.total() / 2

    def test_no_cache_is_made_anew_from_frame_to_frame(self, found: dict[str, Checkpoint]) -> None:
        ours = generator(found["bf16"], DRAWS["top_k"][0])
        codes = heard(found["bf16"], 6)
        told(ours.step, codes[:3])
        one_cache = ours._rings[0].keys.nbytes
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        told(ours.step, codes[3:])
        assert mx.get_peak_memory() - before < one_cache / 2
        assert mx.get_active_memory() - before < one_cache / 10


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    mx.clear_cache()
