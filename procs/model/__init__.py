"""Moshi as an engine: the only module of the stages that imports mlx and what belongs to it.

A conversation lasts CONVERSATION_FRAMES at most. Upstream's generator has a fixed length, the language model's cache is
wrong from position 4096 on, and rustymimi stops there; so the engine begins a new conversation by itself
before that, and says so in `Step.new_conversation`. The frame on which it does is silent, like the first of any
conversation, because the model's codebooks come one frame apart.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import rustymimi
import sentencepiece
from mlx.nn.layers.quantized import quantize
from moshi_mlx.models.generate import LmGen
from moshi_mlx.models.lm import Lm, LmConfig
from moshi_mlx.models.mimi import Mimi, mimi_202407
from moshi_mlx.utils.sampling import Sampler

from pipeline.checkpoints import FULL_MIMI, MIMI_HEAD_DIM, Checkpoint, MimiShape
from pipeline.errors import CheckpointError
from pipeline.topology import FRAME
from procs.engines import Samples, Step

Codes = npt.NDArray[np.uint32]

CONVERSATION_FRAMES: Final = 4_000
"""Frames in a conversation, 5 min 20 s: what upstream's own program allows."""

WARM_UP_FRAMES: Final = 4
"""Steps until every kernel is compiled and every buffer is there: the first ones differ in shape."""

SILENT_TOKENS: Final = (0, 3)
"""Text tokens that stand for no word: the end of padding, and padding."""


class Codec(Protocol):
    """Turns sound into codes and back, frame by frame."""

    def encode(self, frame: Samples) -> Codes:
        """Codes, shape (codebooks,), of a frame, shape (FRAME,)."""

    def decode(self, codes: Codes) -> Samples:
        """A frame, shape (FRAME,), of codes, shape (codebooks,)."""

    def reset(self) -> None:
        """Forget what was heard and said."""


class MlxMimi:
    """Mimi of any dimensions, on MLX's device."""

    def __init__(self, path: Path, shape: MimiShape, codebooks: int) -> None:
        self._mimi = Mimi(_mimi_config(shape))
        self._mimi.load_pytorch_weights(str(path), strict=True)
        _keep_codebooks(self._mimi, codebooks)
        # Upstream's caches keep every position since the start. These hold what attention may look at: the context and,
        # of a frame's two positions, the other one.
        self._mimi.encoder_cache = self._mimi.encoder_transformer.make_rot_cache()
        self._mimi.decoder_cache = self._mimi.decoder_transformer.make_rot_cache()
        mx.eval(self._mimi.parameters())

    def encode(self, frame: Samples) -> Codes:
        return np.array(self._mimi.encode_step(mx.array(frame)[None, None])[0, :, 0], np.uint32)

    def decode(self, codes: Codes) -> Samples:
        return np.array(self._mimi.decode_step(mx.array(codes)[None, :, None])[0, 0], np.float32)

    def reset(self) -> None:
        self._mimi.reset_all()  # type: ignore[no-untyped-call]


def _mimi_config(shape: MimiShape) -> Any:
    official = mimi_202407(shape.codebooks)
    seanet = replace(official.seanet, dimension=shape.dim, nfilters=shape.filters)
    transformer = replace(
        official.transformer,
        d_model=shape.dim,
        num_heads=shape.dim // MIMI_HEAD_DIM,
        num_layers=shape.layers,
        dim_feedforward=shape.hidden,
        max_seq_len=official.transformer.context + 1,
    )
    return replace(
        official,
        seanet=seanet,
        transformer=transformer,
        quantizer_bins=shape.bins,
        quantizer_dim=shape.codebook_dim,
    )


def _keep_codebooks(mimi: Mimi, codebooks: int) -> None:
    """Mimi's file has more codebooks than the model speaks; to search the others would be a waste."""
    rest = mimi.quantizer.rvq_rest.vq
    rest.layers = rest.layers[: codebooks - 1]


class RustMimi:
    """Mimi of the official dimensions, on the CPU: several times faster there than MLX's."""

    def __init__(self, path: Path, codebooks: int) -> None:
        self._path = path
        self._codebooks = codebooks
        self.reset()

    def encode(self, frame: Samples) -> Codes:
        codes: Codes = self._mimi.encode_step(np.ascontiguousarray(frame)[None, None])[0, :, 0]
        return codes

    def decode(self, codes: Codes) -> Samples:
        audio: Samples = self._mimi.decode_step(np.ascontiguousarray(codes)[None, :, None])[0, 0]
        return audio

    def reset(self) -> None:
        # Not its own reset(): that leaves the count of positions where it was, which fails after 4096 frames, and what
        # the resamplers hold of the last frame. A new one takes 0.3 s; the old one goes first, for it holds 300 MB.
        self._mimi: Any = None
        with _loading(self._path):
            self._mimi = rustymimi.Tokenizer(str(self._path), num_codebooks=self._codebooks)


class Moshi:
    """Speaks with Moshi: one frame in, one frame out."""

    name = "moshi"
    conversation_frames = CONVERSATION_FRAMES

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        seed: int | None = None,
        text_temperature: float = 0.8,
        text_top_k: int | None = None,
        audio_temperature: float = 0.8,
        audio_top_k: int | None = None,
    ) -> None:
        """`seed` makes each conversation repeatable. A temperature of 0 always takes the likeliest token.

        `top_k` is the number of tokens that may be drawn; None draws as upstream does, from the likeliest
        tokens that together have a probability of 0.95.
        """
        self.checkpoint = checkpoint
        self._seed = seed
        config = checkpoint.config
        self._text_sampler = _sampler(text_temperature, text_top_k, config["text_card"])
        self._audio_sampler = _sampler(audio_temperature, audio_top_k, config["card"])
        self._heard_codebooks = config["n_q"] - config["dep_q"]

    def load(self) -> None:
        """Bring the model into memory and run some steps on silence.

        Raises CheckpointError.
        """
        checkpoint = self.checkpoint
        _spare_the_compiler()
        with _loading(checkpoint.model_file):
            self._model = _load_model(checkpoint)
        with _loading(checkpoint.mimi_file):
            self._codec = _load_codec(checkpoint)
        with _loading(checkpoint.tokenizer_file):
            self._pieces = _load_pieces(checkpoint)
        self._begin()
        for _ in range(WARM_UP_FRAMES):
            self.step(np.zeros(FRAME, np.float32))
        self.reset()

    def reset(self) -> None:
        self._codec.reset()
        self._begin()

    def _begin(self) -> None:
        if self._seed is not None:
            mx.random.seed(self._seed)
        for cache in self._model.transformer_cache:
            cache.reset()  # type: ignore[no-untyped-call]
        self._frames = 0
        self._generator = LmGen(
            self._model,
            max_steps=self.conversation_frames,
            text_sampler=self._text_sampler,
            audio_sampler=self._audio_sampler,
        )

    def step(self, frame: Samples) -> Step:
        new_conversation = self._frames == self.conversation_frames
        if new_conversation:
            self.reset()
        self._frames += 1
        start_ns = time.perf_counter_ns()
        heard = self._codec.encode(frame)
        encoded_ns = time.perf_counter_ns()
        token, spoken = self._answer(heard[: self._heard_codebooks])
        stepped_ns = time.perf_counter_ns()
        audio = np.zeros(FRAME, np.float32) if spoken is None else self._codec.decode(spoken)
        if not np.isfinite(audio).all():
            # Such a value stays in the model's memory for good: only a new conversation is rid of it.
            self.reset()
            audio, new_conversation = np.zeros(FRAME, np.float32), True
        decoded_ns = time.perf_counter_ns()
        return Step(
            audio=audio,
            text=self._pieces[token],
            encode_ms=(encoded_ns - start_ns) / 1e6,
            step_ms=(stepped_ns - encoded_ns) / 1e6,
            decode_ms=(decoded_ns - stepped_ns) / 1e6,
            new_conversation=new_conversation,
        )

    def _answer(self, heard: Codes) -> tuple[int, Codes | None]:
        """The text token, and the codes to speak once the delayed codebooks have come."""
        text, _ = self._generator.step(mx.array(heard.astype(np.int32))[None])
        spoken = self._generator.last_audio_tokens()
        mx.eval(text, self._generator.gen_sequence)
        return int(text.item()), None if spoken is None else np.array(spoken[0], np.uint32)


def _sampler(temperature: float, top_k: int | None, choices: int) -> Sampler:
    # Upstream's top-k fails unless it leaves at least one token out.
    return Sampler(temp=temperature, top_k=None if top_k is None else min(top_k, choices - 1))


def _spare_the_compiler() -> None:
    """On a CPU mx.compile calls g++ at run time: without one, upstream's samplers would fail."""
    if mx.default_device() == mx.cpu and shutil.which("g++") is None:
        mx.disable_compile()


def _load_model(checkpoint: Checkpoint) -> Lm:
    model = Lm(LmConfig.from_config_dict(checkpoint.config))
    model.set_dtype(mx.bfloat16)
    if checkpoint.bits is not None and checkpoint.group is not None:
        # Shapes only: MLX is lazy, the random weights that this would quantize are replaced before they exist.
        quantize(model, bits=checkpoint.bits, group_size=checkpoint.group)
    model.load_weights(str(checkpoint.model_file), strict=True)
    if checkpoint.bits is not None and mx.default_device() == mx.cpu:
        # MLX's quantized product on a CPU is six times as fast with float32 scales as with bfloat16 ones, and exact.
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _load_codec(checkpoint: Checkpoint) -> Codec:
    config = checkpoint.config
    codebooks = max(config["dep_q"], config["n_q"] - config["dep_q"])
    if checkpoint.mimi_shape == FULL_MIMI:
        return RustMimi(checkpoint.mimi_file, codebooks)
    return MlxMimi(checkpoint.mimi_file, checkpoint.mimi_shape, codebooks)


def _load_pieces(checkpoint: Checkpoint) -> list[str]:
    """What each text token prints."""
    processor = sentencepiece.SentencePieceProcessor(str(checkpoint.tokenizer_file))
    expected = checkpoint.config["text_card"]
    if processor.vocab_size() < expected:
        raise ValueError(f"{processor.vocab_size()} pieces, the model speaks {expected}")
    pieces = [processor.id_to_piece(token).replace("\u2581", " ") for token in range(expected)]
    for token in range(expected):
        if token in SILENT_TOKENS or processor.is_control(token):
            pieces[token] = ""
    return pieces


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} does not load: {str(error).splitlines()[0]}") from error
