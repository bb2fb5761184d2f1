"""A checkpoint's files into memory: weights as they are packed in the file, never quantized here."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import mlx.core as mx
import sentencepiece
from mlx.nn.layers.quantized import quantize
from moshi_mlx.models.lm import Lm, LmConfig

from pipeline.checkpoints import Checkpoint
from pipeline.errors import CheckpointError

SILENT_TOKENS: Final = (0, 3)
"""Text tokens that stand for no word: the end of padding, and padding."""


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into one line: CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} does not load: {reason}") from error


def spare_the_compiler() -> None:
    """On a CPU mx.compile calls g++ at run time: without one, go on uncompiled."""
    if mx.default_device() == mx.cpu and shutil.which("g++") is None:
        mx.disable_compile()


def load_model(checkpoint: Checkpoint) -> Lm:
    """moshi_mlx's model with the weights of `checkpoint`. Raises CheckpointError."""
    with loading(checkpoint.model_file):
        model = Lm(LmConfig.from_config_dict(checkpoint.config))
        model.set_dtype(mx.bfloat16)
        if checkpoint.bits is not None and checkpoint.group is not None:
            # Shapes only: MLX is lazy, the random weights that this would quantize are replaced before they exist.
            quantize(model, bits=checkpoint.bits, group_size=checkpoint.group)
        model.load_weights(str(checkpoint.model_file), strict=True)
        # The generator has caches of its own.
        model.transformer_cache, model.depformer_cache = [], []
        mx.eval(model.parameters())
        return model


def compute_type(checkpoint: Checkpoint) -> mx.Dtype:
    """What the model computes in: on a CPU mlx multiplies quantized weights six times as fast with float32."""
    quantized = checkpoint.bits is not None
    return mx.float32 if quantized and mx.default_device() == mx.cpu else mx.bfloat16


def load_pieces(checkpoint: Checkpoint) -> list[str]:
    """What each text token prints. Raises CheckpointError."""
    with loading(checkpoint.tokenizer_file):
        processor = sentencepiece.SentencePieceProcessor(str(checkpoint.tokenizer_file))
        expected = checkpoint.config["text_card"]
        if processor.vocab_size() < expected:
            raise ValueError(f"{processor.vocab_size()} pieces, the model speaks {expected}")
        pieces = [processor.id_to_piece(token).replace("\u2581", " ") for token in range(expected)]
    for token in range(expected):
        if token in SILENT_TOKENS or processor.is_control(token):
            pieces[token] = ""
    return pieces
