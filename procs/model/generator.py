"""Moshi's step: what was heard and said a frame ago goes in, the next text token and audio codes come out.

The weights and their modules are moshi_mlx's; the order of the work is ours. Token for token it gives what moshi_mlx's
LmGen gives (tests/test_generator.py), with one read from the device a frame where that has 21:

- The history of tokens is a few integers on the host. All of a frame's embeddings are one gather from one table.
- Each layer's keys and values are a ring of `context` positions, made once and written in place. Its slots are not in
  order of time once it is full, which attention does not mind: a key carries its position in its rotation.
- What lies between two attentions is one compiled function, and so is everything after the last one: the text token,
  then the depformer with a cache of a position a codebook, for which nothing comes back to the host.
- The first layers are on the device while the graph of the others is still being made.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from moshi_mlx.models.lm import Lm

from procs.model.sampling import Sampling, draw

Codes = npt.NDArray[np.integer[Any]]

REBASE: Final = 1 << 15
"""Positions, 44 min, after which they are counted from the context's start again: as float32 tells large angles from
each other less and less, keys would turn by what is not quite their position."""

_SUBMIT_LAYERS: Final = 8
"""Layers after which the device is given what there is of the graph."""

_UNSAID: Final = -1
"""Stands in the history where nothing was said or heard yet."""


class Tokens(NamedTuple):
    """What one step gave."""

    text: int
    spoken: npt.NDArray[np.int32] | None
    """Shape (codebooks,): the audio that is complete with this step; None while the delayed codebooks are to come."""


class Generator:
    """One conversation at a time with a model, without a maximum of steps."""

    def __init__(self, model: Lm, sampling: Sampling, seed: int | None = None) -> None:
        """Takes `model` over: some of its tables are joined into one, and gone from it.

        `seed` makes each conversation draw alike; None makes each another.
        """
        config = model.cfg
        self.context: int = config.transformer.context
        """Positions that attention sees, the present one included."""
        self.heard_codebooks: int = config.other_codebooks
        self._delays: list[int] = list(config.audio_delays)
        self._spoken: int = config.depformer.num_slices
        self._latest = max(self._delays[: self._spoken], default=0)
        self._begin_text: int = config.text_out_vocab_size
        self._begin_audio: int = config.audio_padding_token
        self._seed = seed
        self._sampling = sampling
        self._embed = _Embeddings(model)
        self._layers = _Layers(model)
        self._depformer = _Depformer(model)
        self._rings = [_Ring(model, self.context, self._embed.dtype) for _ in model.transformer.layers]
        self.reset()

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; may be set between two frames."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._numbers = sampling.text.numbers(self._embed.dtype) + sampling.audio.numbers(self._embed.dtype)

    def reset(self) -> None:
        """Begin a new conversation: at once, since what the rings still hold is not looked at before it is overwritten."""
        self.sampling = self._sampling
        self._key = mx.random.key(np.random.SeedSequence().entropy % 2**63 if self._seed is None else self._seed)
        self._frame = 0
        self._position = 0
        self._text = self._begin_text
        # As long as the longest delay: what is older is not looked at.
        self._history = np.full((max(self._delays) + 2, len(self._delays)), _UNSAID, np.int32)

    def step(self, heard: Codes) -> Tokens:
        """Answer one frame's codes, shape (heard_codebooks,). The one read from the device is in here."""
        drawn = self.submit(heard)
        mx.eval(drawn)
        return self._take(np.array(drawn))

    def submit(self, heard: Codes) -> mx.array:
        """Give the device a frame's work; returns the tokens to come, shape (1 + codebooks,), text first."""
        if self._position == REBASE + self.context:
            self._rebase()
        self._row(self._frame)[self._spoken :] = heard
        position = mx.array(self._position)
        x = self._embed(self._inputs())
        queries, keys, values = self._layers.first(x, position)
        slot, count = self._position % self.context, min(self._position + 1, self.context)
        for index, ring in enumerate(self._rings):
            attended = ring.attend(queries, keys, values, slot, count)
            if index + 1 < len(self._rings):
                x, queries, keys, values = self._layers.between[index](x, attended, position)
                if index % _SUBMIT_LAYERS == _SUBMIT_LAYERS - 1:
                    mx.async_eval(x, queries)
        _, hidden, logits = self._layers.last(x, attended)
        mx.async_eval(logits)
        drawn, self._key = self._depformer(hidden, logits, self._key, self._sampling, self._numbers)
        mx.async_eval(drawn, self._key)
        return drawn

    def _inputs(self) -> mx.array:
        """The frame's tokens: text first, each codebook as many frames back as it is delayed, and one more."""
        tokens = [self._text]
        for codebook, delay in enumerate(self._delays):
            frame = self._frame - 1 - delay
            tokens.append(self._row(frame)[codebook] if frame >= 0 else self._begin_audio)
        return mx.array(np.array(tokens, np.int32) + self._embed.offsets)

    def _row(self, frame: int) -> npt.NDArray[np.int32]:
        """The history's tokens of one frame, a codebook each."""
        row: npt.NDArray[np.int32] = self._history[frame % len(self._history)]
        return row

    def _take(self, drawn: npt.NDArray[np.int32]) -> Tokens:
        self._text = int(drawn[0])
        for codebook, token in enumerate(drawn[1:]):
            # Of the frames before the first one there is nothing to be said.
            if (frame := self._frame - self._delays[codebook]) >= 0:
                self._row(frame)[codebook] = token
        complete = self._frame - self._latest
        spoken = self._row(complete)[: self._spoken].copy() if complete >= 0 else None
        self._frame += 1
        self._position += 1
        return Tokens(self._text, spoken)

    def _rebase(self) -> None:
        """Turn all keys back by REBASE positions, and count on from there."""
        for ring in self._rings:
            ring.turn(-REBASE)
        shift = REBASE % self.context
        if shift:
            # A position's slot is its remainder: the slots move with the positions.
            for ring in self._rings:
                ring.roll(-shift)
        self._position -= REBASE


class _Ring:
    """One layer's keys and values."""

    def __init__(self, model: Lm, context: int, dtype: Any) -> None:
        config = model.cfg.transformer
        shape = (1, config.num_heads, context, config.head_dim)
        self._rope = model.transformer.layers[0].self_attn.rope
        self._scale = config.head_dim**-0.5
        self.keys, self.values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
        mx.eval(self.keys, self.values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, slot: int, count: int) -> mx.array:
        """Put one position into `slot`, and look at the first `count` slots, which are those of the context."""
        self.keys[:, :, slot : slot + 1] = keys
        self.values[:, :, slot : slot + 1] = values
        seen, told = self.keys, self.values
        if count < seen.shape[2]:
            seen, told = seen[:, :, :count], told[:, :, :count]
        return mx.fast.scaled_dot_product_attention(queries, seen, told, scale=self._scale)

    def turn(self, positions: int) -> None:
        if self._rope is None:
            return
        _, heads, slots, dim = self.keys.shape
        turned = _turn(self._rope, self.keys.reshape(1, heads * slots, 1, dim), mx.array(positions))
        self.keys = turned.reshape(1, heads, slots, dim)
        mx.eval(self.keys)

    def roll(self, slots: int) -> None:
        self.keys, self.values = mx.roll(self.keys, slots, axis=2), mx.roll(self.values, slots, axis=2)
        mx.eval(self.keys, self.values)


def _turn(rope: Any, x: mx.array, position: mx.array) -> mx.array:
    """Rotary embedding of one position, given as an array, so that compiled code need not know it."""
    return mx.fast.rope(
        x, rope.dims, traditional=rope.traditional, base=rope.base, scale=rope.scale, offset=position
    )


class _Embeddings:
    """All embedding tables of the temporal transformer's input, joined."""

    def __init__(self, model: Lm) -> None:
        tables = [model.text_emb, *model.audio_embs]
        self._table = _Rows(tables)
        self.dtype = self._table.dtype
        self.offsets = np.cumsum([0, *(len(table.weight) for table in tables[:-1])]).astype(np.int32)
        model.text_emb, model.audio_embs = None, []
        self._sum = mx.compile(self._add)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens, shape (tables,), with the offset of each one's table; returns the input, shape (1, 1, dim)."""
        return self._sum(tokens)

    def _add(self, tokens: mx.array) -> mx.array:
        rows = self._table(tokens)
        x = rows[0:1]
        for index in range(1, rows.shape[0]):
            x = x + rows[index : index + 1]
        return x[None]


class _Rows:
    """Rows of some embeddings, quantized or not, numbered through."""

    def __init__(self, tables: list[Any]) -> None:
        first = tables[0]
        self._quantized = hasattr(first, "scales")
        names = ("weight", "scales", "biases") if self._quantized else ("weight",)
        self._parts = [mx.concatenate([getattr(table, name) for table in tables]) for name in names]
        mx.eval(self._parts)
        self._packing = {"group_size": first.group_size, "bits": first.bits} if self._quantized else {}
        self.dtype = self._parts[-1].dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        parts = [part[tokens] for part in self._parts]
        return mx.dequantize(*parts, **self._packing) if self._quantized else parts[0]


class _Layers:
    """What the temporal transformer does between its attentions, compiled."""

    def __init__(self, model: Lm) -> None:
        layers = model.transformer.layers
        self.first: Callable[..., Any] = mx.compile(lambda x, position: _project(layers[0], x, position))
        self.between = [mx.compile(_between(one, other)) for one, other in zip(layers, layers[1:], strict=False)]
        self.last: Callable[..., Any] = mx.compile(_last(layers[-1], model))


def _between(one: Any, other: Any) -> Callable[..., Any]:
    def between(x: mx.array, attended: mx.array, position: mx.array) -> tuple[mx.array, ...]:
        x = _feed(one, x, attended)
        return (x, *_project(other, x, position))

    return between


def _last(layer: Any, model: Lm) -> Callable[..., Any]:
    def last(x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        # mlx 0.26 lets a fused bfloat16 sum whose only use is a cast to float32 overrun its buffer on a CPU: so the sum
        # is handed out too, though nobody wants it.
        x = _feed(layer, x, attended)
        hidden = model.out_norm(x)
        return x, hidden, model.text_linear(hidden)

    return last


def _project(layer: Any, x: mx.array, position: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of one position, each of shape (1, heads, 1, head_dim)."""
    attention = layer.self_attn
    heads = attention.cfg.num_heads
    # With one position, (3, heads) in a row is the same as heads apart: one rotation serves queries and keys.
    made = attention.in_proj(layer.norm1(x)).reshape(1, 3 * heads, 1, -1)
    turned, values = made[:, : 2 * heads], made[:, 2 * heads :]
    if attention.rope is not None:
        turned = _turn(attention.rope, turned, position)
    return turned[:, :heads], turned[:, heads:], values


def _feed(layer: Any, x: mx.array, attended: mx.array) -> mx.array:
    """The rest of a layer once attention is done."""
    x = x + layer.self_attn.out_proj(attended.reshape(1, 1, -1))
    return x + layer.gating(layer.norm2(x))


class _Depformer:
    """From the temporal transformer's output to the frame's tokens: one compiled function for each kind of draw."""

    def __init__(self, model: Lm) -> None:
        self._slices: list[Any] = model.depformer.slices
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, hidden: mx.array, logits: mx.array, key: mx.array, sampling: Sampling, numbers: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Tokens, shape (1 + slices,), text first, and the key for the next frame."""
        kinds = sampling.text.kind, sampling.audio.kind
        if kinds not in self._compiled:
            # One is enough: whoever changes top-k all the time is not to fill the memory.
            self._compiled = {kinds: mx.compile(lambda *inputs: self._tokens(*kinds, *inputs))}
        drawn, key = self._compiled[kinds](hidden, logits, key, *numbers)
        return drawn, key

    def _tokens(
        self, text: tuple[str, int], audio: tuple[str, int], hidden: mx.array, logits: mx.array, key: mx.array,
        *numbers: mx.array,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        token, key = draw(logits, text, list(numbers[:2]), key)
        tokens = [token.reshape(1)]
        caches: list[mx.array | None] = [None] * len(self._slices[0].transformer.layers) if self._slices else []
        for index, part in enumerate(self._slices):
            x = part.linear_in(hidden) + part.emb(token.reshape(1, 1))
            for depth, layer in enumerate(part.transformer.layers):
                x, caches[depth] = self._layer(layer, x, caches[depth], index)
            token, key = draw(part.linear_out(x), audio, list(numbers[2:]), key)
            tokens.append(token.reshape(1))
        return mx.concatenate(tokens), key

    def _layer(self, layer: Any, x: mx.array, cache: mx.array | None, index: int) -> tuple[mx.array, mx.array]:
        """One layer at codebook `index`; the cache, shape (2, heads, slices, head_dim), is keys, then values."""
        attention = layer.self_attn
        heads = attention.cfg.num_heads
        queries, keys, values = _project(layer, x, mx.array(index))
        made = mx.concatenate((keys, values))
        if cache is None:
            cache = mx.zeros((2, heads, len(self._slices), made.shape[-1]), made.dtype)
        cache[:, :, index : index + 1] = made
        seen = cache[:, :, max(0, index - attention.cfg.context) : index + 1]
        attended = mx.fast.scaled_dot_product_attention(queries, seen[:1], seen[1:], scale=attention.scale)
        return _feed(layer, x, attended), cache
