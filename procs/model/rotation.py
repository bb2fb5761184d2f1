"""Rotary position embedding at positions that grow for ever."""

from typing import Any, Final

import mlx.core as mx

REBASE: Final = 1 << 15
"""Positions after which they are counted anew from the context's start: as float32 tells large angles from each other
less and less, what is turned by them would stand at not quite its position. 44 min of the model's, 22 of Mimi's."""


def turn(rope: Any, x: mx.array, position: mx.array) -> mx.array:
    """`x`, shape (1, heads, n, head_dim), turned by `position` and the ones that follow it.

    The position is an array, so that compiled code need not know it. `rope` is an mlx.nn.RoPE, or None where a model
    has none.
    """
    if rope is None:
        return x
    return mx.fast.rope(x, rope.dims, traditional=rope.traditional, base=rope.base, scale=rope.scale, offset=position)


def turn_back(rope: Any, keys: mx.array, positions: int) -> mx.array:
    """Keys, shape (1, heads, n, head_dim), as if each stood so many positions earlier."""
    _, heads, slots, dim = keys.shape
    turned = turn(rope, keys.reshape(1, heads * slots, 1, dim), mx.array(-positions))
    return turned.reshape(1, heads, slots, dim)
