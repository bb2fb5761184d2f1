"""Mimi on MLX, of any dimensions, frame by frame: each direction is a pure function of a frame and a state.

The weights and dimensions are moshi_mlx's. What its own streaming lacks is here: of a frame's two positions the first
does not see the second, GELU is exact, and the state is of one size from the first frame on, however long it lasts.
With that each code is rustymimi's, and the sound is within 1e-5 of its sound (tests/test_mimi.py).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from moshi_mlx.models.mimi import Mimi, MimiConfig, mimi_202407

from pipeline.checkpoints import MIMI_HEAD_DIM, MIMI_STRIDE, MimiShape
from procs.model.rotation import REBASE, turn, turn_back

State = list[mx.array]

_gelu: Any = nn.gelu  # type: ignore[attr-defined, unused-ignore]


def load(path: Path, shape: MimiShape, codebooks: int) -> Mimi:
    """moshi_mlx's Mimi with the weights of `path`, and its first so many codebooks.

    The file has more of them than a model speaks; to search the others would be a waste.
    """
    mimi = Mimi(config(shape))
    mimi.load_pytorch_weights(str(path), strict=True)
    rest = mimi.quantizer.rvq_rest.vq
    rest.layers = rest.layers[: codebooks - 1]
    mx.eval(mimi.parameters())
    return mimi


def config(shape: MimiShape) -> MimiConfig:
    """The official configuration in other dimensions."""
    official = mimi_202407(shape.codebooks)
    transformer = replace(
        official.transformer,
        d_model=shape.dim,
        num_heads=shape.dim // MIMI_HEAD_DIM,
        num_layers=shape.layers,
        dim_feedforward=shape.hidden,
    )
    return replace(
        official,
        seanet=replace(official.seanet, dimension=shape.dim, nfilters=shape.filters),
        transformer=transformer,
        quantizer_bins=shape.bins,
        quantizer_dim=shape.codebook_dim,
    )


class Stream:
    """One direction of Mimi in time."""

    def __init__(self, part: "Part") -> None:
        # A queue of its own: what one direction computes waits neither for the other one nor for the model.
        self._queue = mx.new_stream(mx.default_device())
        self._part = part
        with mx.stream(self._queue):
            self._fresh = part.fresh()
            mx.eval(self._fresh)
        self._compiled = mx.compile(part.step)
        self.reset()

    def reset(self) -> None:
        """Forget what was; at once."""
        self._state, self._position = list(self._fresh), 0

    def step(self, given: mx.array) -> mx.array:
        """Begin one frame's work; what comes of it may be waited for in any thread."""
        with mx.stream(self._queue):
            if self._position >= REBASE + SPAN:
                self._state = self._part.rebased(self._state)
                self._position -= REBASE
            made, self._state = self._compiled(given, mx.array(self._position), self._state)
            mx.async_eval(made, self._state)
        self._position += MIMI_STRIDE
        return made


class Part:
    """A piece of the computation, and what it remembers from frame to frame: `size` arrays."""

    size = 0

    def fresh(self) -> State:
        """The state at a conversation's start."""
        return []

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        """What becomes of `x`, shape (1, n, channels), and of the state; `position` is the transformers'."""
        raise NotImplementedError

    def rebased(self, state: State) -> State:
        """The same state, where positions are REBASE less."""
        return state


class Plain(Part):
    """A function that remembers nothing."""

    def __init__(self, function: Callable[[mx.array], mx.array]) -> None:
        self._function = function

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        return self._function(x), state


class Chain(Part):
    """One part after the other."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts
        self.size = sum(part.size for part in parts)

    def fresh(self) -> State:
        return [array for part in self._parts for array in part.fresh()]

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        left: State = []
        for part, own in self._shares(state):
            x, own = part.step(x, position, own)
            left += own
        return x, left

    def rebased(self, state: State) -> State:
        return [array for part, own in self._shares(state) for array in part.rebased(own)]

    def _shares(self, state: State) -> list[tuple[Part, State]]:
        shares, start = [], 0
        for part in self._parts:
            shares.append((part, state[start : start + part.size]))
            start += part.size
        return shares


class Residual(Chain):
    """A chain beside which its input goes on."""

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        made, state = super().step(x, position, state)
        return x + made, state


class Conv(Part):
    """A causal convolution: remembers the end of its input."""

    size = 1

    def __init__(self, module: Any, repeat_first: bool = False) -> None:
        """`module` is a StreamableConv1d. Before the start there were zeros, or the first position again and again."""
        self._conv = module.conv.conv
        kernel = (module._ksize - 1) * self._conv._dilation + 1
        self._kept = kernel - self._conv._stride
        self._repeat_first = repeat_first

    def fresh(self) -> State:
        return [mx.zeros((1, self._kept, self._conv.weight.shape[2]))]

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        conv, past = self._conv, state[0]
        if self._repeat_first:
            past = mx.where(position == 0, x[:, :1], past)
        x = mx.concatenate((past, x), axis=1)
        made = mx.conv1d(x, conv.weight, stride=conv._stride, dilation=conv._dilation)
        return (made if conv.bias is None else made + conv.bias), [x[:, x.shape[1] - self._kept :]]


class Transposed(Part):
    """A causal transposed convolution, twice as long as its stride: remembers what reaches beyond its output."""

    size = 1

    def __init__(self, module: Any) -> None:
        """`module` is a StreamableConvTranspose1d."""
        self._conv = module.convtr.convtr

    def fresh(self) -> State:
        return [mx.zeros((1, self._conv._stride, self._conv._expanded_weight.shape[0]))]

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        conv = self._conv
        made = mx.conv_transpose1d(x, conv._expanded_weight, stride=conv._stride)
        begun, whole = made[:, : conv._stride] + state[0], x.shape[1] * conv._stride
        out = mx.concatenate((begun, made[:, conv._stride : whole]), axis=1)
        return (out if conv.bias is None else out + conv.bias), [made[:, whole:]]


SPAN: Final = 250 + MIMI_STRIDE
"""Positions that a frame's two look at. Mimi's context is 250; like rustymimi and moshi_mlx, from which the model hears
its codes, each position sees as many before it, and itself."""


class Layer(Part):
    """A transformer's layer: remembers the keys and values of what it may look at, in order of time."""

    size = 2

    def __init__(self, module: Any) -> None:
        """`module` is a TransformerLayer."""
        self._module = module

    def fresh(self) -> State:
        config = self._module.cfg
        return [mx.zeros((1, config.num_heads, SPAN, config.head_dim)) for _ in range(self.size)]

    def step(self, x: mx.array, position: mx.array, state: State) -> tuple[mx.array, State]:
        layer, attention = self._module, self._module.self_attn
        _, count, dim = x.shape
        made = attention.in_proj(layer.norm1(x)).reshape(1, count, 3, attention.cfg.num_heads, -1)
        queries, keys, values = (made[:, :, index].swapaxes(1, 2) for index in range(3))
        queries, keys = turn(attention.rope, queries, position), turn(attention.rope, keys, position)
        keys = mx.concatenate((state[0][:, :, count:], keys), axis=2)
        values = mx.concatenate((state[1][:, :, count:], values), axis=2)
        seen = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=attention.scale, mask=_visible(count, position)
        )
        x = x + layer.layer_scale_1(attention.out_proj(seen.swapaxes(1, 2).reshape(1, count, dim)))
        fed = layer.gating.linear2(_gelu(layer.gating.linear1(layer.norm2(x))))
        return x + layer.layer_scale_2(fed), [keys, values]

    def rebased(self, state: State) -> State:
        return [turn_back(self._module.self_attn.rope, state[0], REBASE), state[1]]


def _visible(count: int, position: mx.array) -> mx.array:
    """Which of SPAN positions each of the last `count` sees, shape (count, SPAN): none later, none before the start."""
    last = mx.arange(SPAN) - (SPAN - count)
    own = mx.arange(count)[:, None]
    return (last <= own) & (last > own - (SPAN - count + 1)) & (last + position >= 0)


def encoder(mimi: Mimi) -> Part:
    """From a frame, shape (1, FRAME, 1), to its codes, shape (codebooks,)."""
    seanet = mimi.encoder
    parts: list[Part] = [Conv(seanet.init_conv1d)]
    for layer in seanet.layers:
        parts += [_residual(block) for block in layer.residuals] + [_ELU, Conv(layer.downsample)]
    parts += [_ELU, Conv(seanet.final_conv1d)]
    parts += [Layer(layer) for layer in mimi.encoder_transformer.transformer.layers]
    parts += [Conv(mimi.downsample.conv, repeat_first=True), Plain(lambda x: _codes(mimi.quantizer, x))]
    return Chain(*parts)


def decoder(mimi: Mimi) -> Part:
    """From codes, shape (codebooks,), to a frame, shape (1, FRAME, 1)."""
    seanet = mimi.decoder
    parts: list[Part] = [Plain(lambda codes: _sum(mimi.quantizer, codes)), Transposed(mimi.upsample.convtr)]
    parts += [Layer(layer) for layer in mimi.decoder_transformer.transformer.layers]
    parts.append(Conv(seanet.init_conv1d))
    for layer in seanet.layers:
        parts += [_ELU, Transposed(layer.upsample)] + [_residual(block) for block in layer.residuals]
    parts += [_ELU, Conv(seanet.final_conv1d)]
    return Chain(*parts)


_ELU: Final = Plain(nn.elu)  # type: ignore[attr-defined, unused-ignore]


def _residual(block: Any) -> Part:
    return Residual(*(part for conv in block.block for part in (_ELU, Conv(conv))))


def _codes(quantizer: Any, x: mx.array) -> mx.array:
    """Residual vector quantization of one position: the nearest entry, then the one nearest to what is left, ..."""
    codes = []
    for side in (quantizer.rvq_first, quantizer.rvq_rest):
        rest = x[:, 0] @ side.input_proj.weight[:, 0].T
        for layer in side.vq.layers:
            book = layer.codebook
            code = mx.argmin(book._c2 - rest @ book._embedding.T, axis=-1)
            rest = rest - book._embedding[code]
            codes.append(code)
    return mx.concatenate(codes)


def _sum(quantizer: Any, codes: mx.array) -> mx.array:
    """The position that codes stand for, shape (1, 1, dim)."""
    made, start = [], 0
    for side in (quantizer.rvq_first, quantizer.rvq_rest):
        entry = mx.zeros(1)
        for layer in side.vq.layers:
            entry = entry + layer.codebook._embedding[codes[start : start + 1]]
            start += 1
        made.append(entry @ side.output_proj.weight[:, 0].T)
    return (made[0] + made[1])[None]
