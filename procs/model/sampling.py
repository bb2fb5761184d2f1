"""Draws tokens from logits, token for token as moshi_mlx's Sampler does for the same seed.

What is drawn depends on a key that is passed in and handed on, not on MLX's global state: two engines do not disturb
each other, and a draw may be part of a compiled function. Numbers that users change while a conversation runs, like
the temperature, are inputs of that function; only another kind of cut, or another top-k, compiles it anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pipeline.config import SamplerConfig

Kind = tuple[str, int]
"""What decides the shape of a draw's computation: the name of a cut, and top-k's k."""


@dataclass(frozen=True)
class Choice:
    """How one kind of token is drawn. At most one of the three cuts is set; without any, all tokens may be drawn."""

    temperature: float = 0.8
    """What the logits are divided by; 0 always takes the likeliest token."""
    top_k: int | None = None
    """So many of the likeliest tokens may be drawn."""
    top_p: float | None = None
    """The likeliest tokens that together have this probability may be drawn; 1 and more is no cut."""
    min_p: float | None = None
    """Tokens with at least this share of the likeliest one's probability may be drawn."""

    @property
    def kind(self) -> Kind:
        """What decides the shape of the computation."""
        if self.temperature == 0:
            return "greedy", 0
        if self.top_k is not None:
            return "top_k", self.top_k
        if self.top_p is not None and 0 < self.top_p < 1:
            return "top_p", 0
        return ("min_p", 0) if self.min_p else ("all", 0)

    def numbers(self, dtype: Any) -> list[mx.array]:
        """What goes into the computation, in the logits' own type, as a Python number beside them would be taken."""
        inverse = 1 / self.temperature if self.temperature else 1.0
        cut = {"top_p": 1 - (self.top_p or 0.0), "min_p": self.min_p or 0.0}.get(self.kind[0], 0.0)
        return [mx.array(inverse, dtype), mx.array(cut, dtype)]


@dataclass(frozen=True)
class Sampling:
    """How a conversation's tokens are drawn."""

    text: Choice = field(default_factory=lambda: Choice(0.7, top_k=25))
    audio: Choice = field(default_factory=lambda: Choice(0.8, top_k=250))


def sampling_of(sampler: SamplerConfig) -> Sampling:
    """What the settings ask for."""
    return Sampling(
        text=Choice(sampler.text_temperature, *sampler.text_cut),
        audio=Choice(sampler.audio_temperature, *sampler.audio_cut),
    )


def draw(logits: mx.array, kind: Kind, numbers: Sequence[mx.array], key: mx.array) -> mx.array:
    """One token, int32, for each row of logits, shape (..., tokens)."""
    name, top_k = kind
    if name == "greedy":
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return _CUTS[name](logits, numbers[0], numbers[1], top_k, key).astype(mx.int32)


def _all(logits: mx.array, inverse: mx.array, cut: mx.array, top_k: int, key: mx.array) -> mx.array:
    return mx.random.categorical(logits * inverse, key=key)


def _top_k(logits: mx.array, inverse: mx.array, cut: mx.array, top_k: int, key: mx.array) -> mx.array:
    logits = logits * inverse
    if top_k < logits.shape[-1]:
        others = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[..., top_k:]
        logits = mx.put_along_axis(logits, others, mx.array(-float("inf"), logits.dtype), axis=-1)
    return mx.random.categorical(logits, key=key)


def _top_p(logits: mx.array, inverse: mx.array, cut: mx.array, top_k: int, key: mx.array) -> mx.array:
    probabilities = mx.softmax(logits * inverse, axis=-1)
    order = mx.argsort(probabilities, axis=-1)
    rising = mx.take_along_axis(probabilities, order, axis=-1)
    kept = mx.where(mx.cumsum(rising, axis=-1) > cut, rising, mx.array(0, rising.dtype))
    return _picked(order, kept, key)


def _min_p(logits: mx.array, inverse: mx.array, cut: mx.array, top_k: int, key: mx.array) -> mx.array:
    probabilities = mx.softmax(logits * inverse, axis=-1)
    order = mx.argsort(-logits, axis=-1)
    falling = mx.take_along_axis(probabilities, order, axis=-1)
    rank = mx.arange(falling.shape[-1])
    kept = mx.where((falling < cut * falling[..., :1]) & (rank > 0), mx.array(0, falling.dtype), falling)
    return _picked(order, kept, key)


def _picked(order: mx.array, probabilities: mx.array, key: mx.array) -> mx.array:
    rank = mx.random.categorical(mx.log(probabilities), axis=-1, key=key)
    return mx.take_along_axis(order, rank[..., None], axis=-1).squeeze(-1)


_CUTS = {"all": _all, "top_k": _top_k, "top_p": _top_p, "min_p": _min_p}
