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

import secrets
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from moshi_mlx.models.lm import Lm

from procs.model.rotation import REBASE, turn, turn_back
from procs.model.sampling import Kind, Sampling, draw

Codes = npt.NDArray[np.integer[Any]]

_SUBMIT_LAYERS: Final = 2
"""Layers after which the device is given what there is of the graph."""

_UNSAID: Final = -1
"""Stands in the history where nothing was said or heard yet."""

_silu: Any = nn.silu  # type: ignore[attr-defined, unused-ignore]

Keys = list[mx.array]
"""Keys of random numbers, each of shape (2,)."""


class Tokens(NamedTuple):
    """What one step gave."""

    text: int
    spoken: npt.NDArray[np.int32] | None
    """Shape (codebooks,): the audio that is complete with this step; None while the delayed codebooks are to come."""


class Generator:
    """One conversation at a time with a model, without a maximum of steps."""

    def __init__(self, model: Lm, sampling: Sampling, seed: int | None = None, dtype: Any = None) -> None:
        """Takes `model` over: some of its tables are joined into one, and gone from it.

        `seed` makes each conversation draw alike; None makes each another. `dtype` is what is computed in, by default
        the weights' own type.
        """
        config = model.cfg
        parts: Any = model  # moshi_mlx's types do not allow for what is taken away
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
        self._dtype = dtype or model.out_norm.weight.dtype
        self._embed = _Embeddings(parts, self._dtype)
        self._layers = _Layers(parts)
        self._depformer = _Depformer(parts, self._dtype)
        self._rings = [_Ring(parts, self.context, self._dtype) for _ in model.transformer.layers]
        self.reset()

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; may be set between two frames."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # The keys for the next frame were made for the draws as they were.
        self._split = mx.compile(self._chain)
        self._key = self._root
        self._next_keys()
        self._numbers = sampling.text.numbers(self._dtype) + sampling.audio.numbers(self._dtype)

    @property
    def seen(self) -> int:
        """Positions that attention sees."""
        return min(self._position, self.context)

    def _chain(self, key: mx.array) -> tuple[Keys, mx.array]:
        """A key for each draw of a frame, one split off after the other; and the one for the rest.

        What is drawn greedily needs none, and takes none, so that the others draw as upstream's do.
        """
        kinds = [self._sampling.text.kind] + [self._sampling.audio.kind] * self._spoken
        keys = []
        for name, _ in kinds:
            if name == "greedy":
                keys.append(key)
                continue
            key, own = mx.random.split(key)
            keys.append(own)
        return keys, key

    def reset(self) -> None:
        """Begin a new conversation, at once: what the rings still hold is not looked at before it is overwritten."""
        self._root = mx.random.key(secrets.randbits(63) if self._seed is None else self._seed)
        self.sampling = self._sampling
        self._frame = 0
        self._position = 0
        self._text = self._begin_text
        # As long as the longest delay: what is older is not looked at.
        self._history = np.full((max(self._delays) + 2, len(self._delays)), _UNSAID, np.int32)

    def warm_up(self) -> None:
        """Look back over each kind of length: a GPU's kernels for them are made when they are first asked for."""
        ring, count = self._rings[0], 1
        queries = mx.zeros((*ring.keys.shape[:2], 1, ring.keys.shape[3]), self._dtype)
        while count < 2 * self.context:
            mx.eval(ring.attend(queries, queries, queries, 0, min(count, self.context)))
            count *= 2

    def step(self, heard: Codes) -> Tokens:
        """Answer one frame's codes, shape (heard_codebooks,). The one read from the device is in here."""
        drawn = self.submit(heard)
        mx.eval(drawn)
        return self._take(np.array(drawn))

    def submit(self, heard: Codes) -> mx.array:
        """Give the device a frame's work; returns the tokens to come, shape (1 + codebooks,), text first."""
        if self._position == REBASE + self.context:
            for ring in self._rings:
                ring.rebase()
            self._position -= REBASE
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
        drawn = self._depformer(hidden, logits, self._keys, self._sampling, self._numbers)
        mx.async_eval(drawn)
        # The next frame's, while the device is at this one's.
        self._next_keys()
        return drawn

    def _next_keys(self) -> None:
        self._root = self._key
        self._keys, self._key = self._split(self._key)
        mx.async_eval(self._keys, self._key)

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


class _Ring:
    """One layer's keys and values."""

    def __init__(self, model: Any, context: int, dtype: Any) -> None:
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

    def rebase(self) -> None:
        """As if each key stood REBASE positions earlier, in the slot of that position."""
        slots = REBASE % self.keys.shape[2]
        self.keys = mx.roll(turn_back(self._rope, self.keys, REBASE), -slots, axis=2)
        self.values = mx.roll(self.values, -slots, axis=2)
        mx.eval(self.keys, self.values)


class _Embeddings:
    """All embedding tables of the temporal transformer's input, joined."""

    def __init__(self, model: Any, dtype: Any) -> None:
        tables = [model.text_emb, *model.audio_embs]
        self._table = _Rows(tables, dtype)
        self.offsets = np.cumsum([0, *(len(table.weight) for table in tables[:-1])]).astype(np.int32)
        model.text_emb, model.audio_embs = None, []
        self._sum = mx.compile(self._add)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens, shape (tables,), with the offset of each one's table; returns the input, shape (1, 1, dim)."""
        return self._sum(tokens)

    def _add(self, tokens: mx.array) -> mx.array:
        rows = self._table.rows(tokens)
        x, *others = mx.split(rows, rows.shape[0])
        for other in others:
            x = x + other
        return x[None]


class _Rows:
    """Rows of some embeddings, quantized or not, numbered through.

    A quantized row's weights, scales and biases stand side by side, as bits: so that one gather fetches all three.
    """

    def __init__(self, tables: list[Any], dtype: Any) -> None:
        first = tables[0]
        self._quantized = hasattr(first, "scales")
        self._packing = {"group_size": first.group_size, "bits": first.bits} if self._quantized else {}
        self._dtype = dtype
        self._widen = getattr(first, "low_rank", None)
        self._words = first.weight.shape[1]
        self._packed_type = first.scales.dtype if self._quantized else None
        parts = [_side_by_side(table) if self._quantized else table.weight for table in tables]
        self._table = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        mx.eval(self._table)

    def row(self, token: mx.array) -> mx.array:
        """One token's row, shape (1, dim). The token's shape is (): on a GPU that is much faster than a list of one."""
        return self._unpacked(self._table[token][None])

    def rows(self, tokens: mx.array) -> mx.array:
        """The rows of tokens, shape (n,): shape (n, dim)."""
        # Not self._table[tokens]: on an NVIDIA GPU that takes 0.2 ms, a thread a row.
        indices = mx.broadcast_to(tokens[:, None], (tokens.shape[0], self._table.shape[1]))
        return self._unpacked(mx.take_along_axis(self._table, indices, axis=0))

    def _unpacked(self, rows: mx.array) -> mx.array:
        if not self._quantized:
            rows = rows.astype(self._dtype)
            return rows if self._widen is None else self._widen(rows)
        packed = rows[:, self._words :].view(self._packed_type).astype(self._dtype)
        scales, biases = mx.split(packed, 2, axis=1)
        return mx.dequantize(rows[:, : self._words], scales, biases, **self._packing)


def _side_by_side(table: Any) -> mx.array:
    packed = mx.concatenate((table.scales, table.biases), axis=1)
    return mx.concatenate((table.weight, packed.view(table.weight.dtype)), axis=1)


def _stacked(layers: list[Any]) -> Callable[[mx.array], mx.array]:
    """Linear layers of one input as one: their outputs side by side."""
    first = layers[0]
    names = ("weight", "scales", "biases") if hasattr(first, "scales") else ("weight",)
    parts = [mx.concatenate([getattr(layer, name) for layer in layers]) for name in names]
    mx.eval(parts)
    if len(parts) == 1:
        return lambda x: x @ parts[0].T
    packing = {"group_size": first.group_size, "bits": first.bits}
    return lambda x: mx.quantized_matmul(x, *parts, transpose=True, **packing)


class _Layers:
    """What the temporal transformer does between its attentions, compiled."""

    def __init__(self, model: Any) -> None:
        layers = model.transformer.layers
        self.first: Callable[..., Any] = mx.compile(lambda x, position: _project(layers[0], x, position))
        self.between = [mx.compile(_between(one, other)) for one, other in pairwise(layers)]
        self.last: Callable[..., Any] = mx.compile(_last(layers[-1], model))


def _between(one: Any, other: Any) -> Callable[..., Any]:
    def between(x: mx.array, attended: mx.array, position: mx.array) -> tuple[mx.array, ...]:
        x = _feed(one, x, attended)
        return (x, *_project(other, x, position))

    return between


def _last(layer: Any, model: Any) -> Callable[..., Any]:
    def last(x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        # mlx 0.26 lets a fused bfloat16 sum whose only use is a cast to float32 overrun its buffer on a CPU: so the sum
        # is handed out too, though nobody wants it.
        x = _feed(layer, x, attended)
        hidden = model.out_norm(x)
        return x, hidden, model.text_linear(hidden)

    return last


def _project(layer: Any, x: mx.array, position: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of one position, each of shape (1, heads, 1, head_dim)."""
    heads = layer.self_attn.cfg.num_heads
    made = _heads(layer, x)
    queries_keys, values = mx.split(made, [2 * heads], axis=1)
    queries, keys = mx.split(turn(layer.self_attn.rope, queries_keys, position), 2, axis=1)
    return queries, keys, values


def _heads(layer: Any, x: mx.array) -> mx.array:
    """Queries, keys and values, not yet turned: shape (1, 3 * heads, 1, head_dim), which one position's are as made."""
    return layer.self_attn.in_proj(layer.norm1(x)).reshape(1, 3 * layer.self_attn.cfg.num_heads, 1, -1)


def _feed(layer: Any, x: mx.array, attended: mx.array) -> mx.array:
    """The rest of a layer once attention is done."""
    x = x + layer.self_attn.out_proj(attended.reshape(1, 1, -1))
    # moshi_mlx's gating, with one operation for the two halves where it has five.
    gate, value = mx.split(layer.gating.linear_in(layer.norm2(x)), 2, axis=-1)
    return x + layer.gating.linear_out(_silu(gate) * value)


class _Depformer:
    """From the temporal transformer's output to the frame's tokens: one compiled function for each kind of draw."""

    def __init__(self, model: Any, dtype: Any) -> None:
        self._slices: list[Any] = model.depformer.slices
        self._tables = [_Rows([part.emb], dtype) for part in self._slices]
        self._enter = _stacked([part.linear_in for part in self._slices])
        for part in self._slices:
            part.emb = part.linear_in = None
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, hidden: mx.array, logits: mx.array, keys: Keys, sampling: Sampling, numbers: list[mx.array]
    ) -> mx.array:
        """Tokens, shape (1 + slices,), text first. `keys` has one for each."""
        kinds = sampling.text.kind, sampling.audio.kind
        if kinds not in self._compiled:
            # One is enough: whoever changes top-k all the time is not to fill the memory.
            self._compiled = {kinds: mx.compile(lambda *inputs: self._tokens(*kinds, *inputs))}
        tokens: mx.array = self._compiled[kinds](hidden, logits, keys, *numbers)
        return tokens

    def _tokens(
        self, text: Kind, audio: Kind, hidden: mx.array, logits: mx.array, keys: Keys, *numbers: mx.array
    ) -> mx.array:
        entered = mx.split(self._enter(hidden), len(self._slices), axis=-1)
        # Not one-dimensional: mlx 0.32 draws from such logits in another way than from upstream's.
        token = draw(logits.reshape(1, -1), text, numbers[:2], keys[0])
        tokens = [token]
        caches: list[mx.array | None] = [None] * len(self._slices[0].transformer.layers)
        for index, part in enumerate(self._slices):
            x = entered[index] + self._tables[index].row(token.reshape(()))
            for depth, layer in enumerate(part.transformer.layers):
                x, caches[depth] = self._layer(layer, x, caches[depth], index)
            token = draw(part.linear_out(x).reshape(1, -1), audio, numbers[2:], keys[index + 1])
            tokens.append(token)
        return mx.concatenate(tokens)

    def _layer(self, layer: Any, x: mx.array, cache: mx.array | None, index: int) -> tuple[mx.array, mx.array]:
        """One layer at codebook `index`; the cache, shape (2, heads, slices, head_dim), is keys, then values."""
        attention = layer.self_attn
        heads = attention.cfg.num_heads
        made = _heads(layer, x)
        if attention.rope is not None:
            turned = turn(attention.rope, made[:, : 2 * heads], mx.array(index))
            made = mx.concatenate((turned, made[:, 2 * heads :]), axis=1)
        queries, told = mx.split(made, [heads], axis=1)
        told = told.reshape(2, heads, 1, -1)
        if cache is None:
            cache = mx.zeros((2, heads, len(self._slices), told.shape[-1]), told.dtype)
        cache[:, :, index : index + 1] = told
        if index == 0:
            return _feed(layer, x, told[1:]), cache  # who looks at one thing only sees that
        keys, values = mx.split(cache[:, :, max(0, index - attention.cfg.context) : index + 1], 2)
        attended = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
        return _feed(layer, x, attended), cache
