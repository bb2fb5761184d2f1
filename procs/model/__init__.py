"""Moshi as an engine. Nothing outside this package imports mlx and what belongs to it.

engine      one frame in, one frame out; the parts below, overlapped
loading     the model's file into moshi_mlx's modules
generator   the language model's step, with `sampling` and `rotation`
codec       sound to codes and back: `mimi` on MLX, or rustymimi on the CPU
bandwidth   how fast this machine's memory is
"""

import os

# On an NVIDIA GPU mlx would multiply float32 matrices with 10 bits: too few for Mimi's codes to be the right ones.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# mlx's attention through cuDNN is wrong on long slices of a cache.
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")

from procs.model.engine import Loaded, Moshi
from procs.model.sampling import Choice, Sampling, sampling_of

__all__ = ["Choice", "Loaded", "Moshi", "Sampling", "sampling_of"]
