"""The engine `moshi`: hears, thinks and speaks, each part while the others work on other frames."""

import contextlib
from collections import deque
from typing import Final, NamedTuple

import mlx.core as mx
import numpy as np

from pipeline import apple
from pipeline.audio import make_fit
from pipeline.checkpoints import Checkpoint
from pipeline.config import SamplerConfig
from pipeline.timing import NS_PER_MS, now_ns
from pipeline.topology import FRAME
from procs.engines import Answer, Samples, Step
from procs.model import codec as codecs
from procs.model.codec import Codec, CodecName, Codes, Pending
from procs.model.generator import Generator
from procs.model.loading import compute_type, load_model, load_pieces, loading, spare_the_compiler
from procs.model.sampling import Sampling, sampling_of

WARM_UP_MOST: Final = 50
"""Steps of warm-up at most: on a machine that never becomes steady there is no use in waiting for it."""

STEADY: Final = 5
"""Steps in a row that are as fast as any before them, nearly, when a model is warm."""

_NEARLY: Final = 1.25

BFLOAT16_BYTES: Final = 2


class Loaded(NamedTuple):
    """How long it took until the first frame could be answered."""

    load_ms: float
    """Files into memory."""
    warm_up_ms: float
    """Steps on silence until they were as fast as they get."""
    first_frame_ms: float
    """The first step after that, at the start of a conversation."""


class Moshi:
    """Speaks with Moshi: a frame in, a frame out, for as long as one likes.

    `listen` and `respond` belong to one thread. `respond` ends when the tokens are there; the sound may still be in
    the making, and the answer's `result` waits for it in any thread.
    """

    name = "moshi"
    overlaps = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        seed: int | None = None,
        sampling: Sampling | None = None,
        codec: CodecName | None = None,
    ) -> None:
        """`seed` makes each conversation repeatable; None makes each another. `codec` None takes the faster one."""
        self.checkpoint = checkpoint
        self._seed = seed
        self._sampling = sampling or Sampling()
        self._wanted = codec
        self._heard: deque[Pending[Codes]] = deque()
        self._conversation = 0
        self._broken = False

    def load(self) -> None:
        """Bring the model into memory, and take steps on silence until they are as fast as they get.

        Raises CheckpointError.
        """
        spare_the_compiler()
        start_ns = now_ns()
        self._pieces = load_pieces(self.checkpoint)
        with loading(self.checkpoint.model_file):
            _wire(self.checkpoint)
        model = load_model(self.checkpoint)
        dtype = compute_type(self.checkpoint)
        self.codec: Codec = codecs.load(self.checkpoint, self._wanted)
        self.generator = Generator(model, self._sampling, self._seed, dtype)
        loaded_ns = now_ns()
        self._warm_up()
        warm_ns = now_ns()
        self.reset()
        self.step(np.zeros(FRAME, np.float32))
        first_ns = now_ns()
        self.reset()
        self.codec.renew()  # how many steps it took to warm up is to leave no trace in what is said
        parts_ns = loaded_ns - start_ns, warm_ns - loaded_ns, first_ns - warm_ns
        self.loaded = Loaded(*(part / NS_PER_MS for part in parts_ns))

    def _warm_up(self) -> None:
        self.generator.warm_up()
        fastest, steady = float("inf"), 0
        for _ in range(WARM_UP_MOST):
            start_ns = now_ns()
            self.step(np.zeros(FRAME, np.float32))
            took = float(now_ns() - start_ns)
            fastest = min(fastest, took)
            steady = steady + 1 if took <= _NEARLY * fastest else 0
            if steady == STEADY:
                return

    def reset(self) -> None:
        """Begin a new conversation, at once: frames that were taken in and not answered are forgotten."""
        self._conversation += 1
        self._broken = False
        self._heard.clear()
        self.codec.reset()
        self.generator.reset()

    def draw_by(self, sampler: SamplerConfig) -> None:
        self._sampling = self.generator.sampling = sampling_of(sampler)

    def keep_warm(self) -> None:
        mx.eval(mx.zeros(1) + 1)

    def listen(self, frame: Samples) -> None:
        make_fit(frame)
        self._heard.append(self.codec.hear(frame))

    def respond(self) -> Answer:
        new_conversation = self._broken
        if self._broken:
            # Such a value stays in the codec's memory for good: only a new conversation is rid of it.
            waiting = list(self._heard)
            self.reset()
            self._heard.extend(waiting)
        heard, encode_ms = self._heard.popleft().result()
        start_ns = now_ns()
        text, spoken = self.generator.step(heard[: self.generator.heard_codebooks])
        step = Step(
            audio=np.zeros(FRAME, np.float32),
            text=self._pieces[text],
            encode_ms=encode_ms,
            step_ms=(now_ns() - start_ns) / NS_PER_MS,
            context=self.generator.seen,
            context_size=self.generator.context,
            new_conversation=new_conversation,
        )
        if spoken is None:
            return _Silence(step)
        return _Speech(self, self._conversation, step, self.codec.say(spoken.astype(np.uint32)))

    def step(self, frame: Samples) -> Step:
        """Answer one frame, each part after the other."""
        self.listen(frame)
        return self.respond().result()

    def lost_numbers(self, conversation: int) -> None:
        """The codec gave something that is no sound: the next frame begins a new conversation, if none has begun."""
        self._broken = self._broken or conversation == self._conversation


def _wire(checkpoint: Checkpoint) -> None:
    """On a Mac: keep the weights and the cache where the GPU reaches them."""
    config = checkpoint.config
    cache_bytes = 2 * BFLOAT16_BYTES * config["num_layers"] * config["dim"] * config["context"]
    limit = apple.wired_limit_bytes(checkpoint.model_file.stat().st_size + cache_bytes)
    if limit is not None:
        # Before macOS 15 there is no such thing, and above the system's own limit it is refused.
        with contextlib.suppress(ValueError, RuntimeError):
            mx.set_wired_limit(limit)


class _Silence:
    """The answer before the delayed codebooks have come."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def result(self) -> Step:
        return self._step


class _Speech:
    def __init__(self, engine: Moshi, conversation: int, step: Step, sound: Pending[Samples]) -> None:
        self._engine, self._conversation, self._step, self._sound = engine, conversation, step, sound

    def result(self) -> Step:
        audio, self._step.decode_ms = self._sound.result()
        if np.isfinite(audio).all():
            self._step.audio = audio
        else:
            self._engine.lost_numbers(self._conversation)
        return self._step
