"""Sound to codes and back, beside the model's step: what is begun here is waited for later, in any thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import rustymimi

from pipeline import apple
from pipeline.checkpoints import FULL_MIMI, Checkpoint
from pipeline.timing import NS_PER_MS, now_ns
from pipeline.topology import FRAME
from procs.engines import Samples
from procs.model import mimi
from procs.model.loading import loading

Codes = npt.NDArray[np.uint32]
CodecName = Literal["mlx", "rust"]

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Pending(Protocol[Result_co]):
    """Something that is being computed."""

    def result(self) -> tuple[Result_co, float]:
        """Wait for it, in any thread; returns it and the ms that it took."""


class Codec(Protocol):
    """Both directions of Mimi. Each frame is begun in the thread that made the codec, one after the other."""

    name: CodecName

    def hear(self, frame: Samples) -> Pending[Codes]:
        """Begin to turn a frame, shape (FRAME,), into codes, shape (codebooks,)."""

    def say(self, codes: Codes) -> Pending[Samples]:
        """Begin to turn codes, shape (codebooks,), into a frame, shape (FRAME,)."""

    def reset(self) -> None:
        """Forget what was heard and said, at once."""

    def renew(self) -> None:
        """Be as it was when it was loaded, to the bit, however long that takes."""


def load(checkpoint: Checkpoint, name: CodecName | None) -> Codec:
    """The codec of `checkpoint`; by default the one that is faster where MLX computes. Raises CheckpointError."""
    config = checkpoint.config
    codebooks = max(config["dep_q"], config["n_q"] - config["dep_q"])
    with loading(checkpoint.mimi_file):
        if choose(checkpoint, name) == "rust":
            return RustMimi(checkpoint.mimi_file, codebooks)
        return MlxMimi(mimi.load(checkpoint.mimi_file, checkpoint.mimi_shape, codebooks))


def choose(checkpoint: Checkpoint, name: CodecName | None) -> CodecName:
    """The codec asked for, where it can do the checkpoint's dimensions: rustymimi has the official ones built in."""
    if checkpoint.mimi_shape != FULL_MIMI:
        return "mlx"
    # Measured, docs/model.md: on a CPU rustymimi is several times as fast, on an NVIDIA GPU MLX is. On Apple's GPUs
    # nobody has measured for us yet; the GPU has the model to do there, and the CPU has nothing else.
    return name or ("mlx" if mx.default_device() == mx.gpu and not mx.metal.is_available() else "rust")


class _Direction(Generic[Result]):
    """One direction of Mimi on MLX. Its work is begun where it is asked for, and waited for in a thread of its own.

    So the time is that of the work, whenever somebody asks for what came of it.
    """

    def __init__(self, part: mimi.Part, read: Callable[[mx.array], Result]) -> None:
        self._stream = mimi.Stream(part)
        self._read = read
        self._thread = ThreadPoolExecutor(1, initializer=apple.raise_thread)

    def begin(self, given: mx.array) -> "Future[tuple[Result, float]]":
        begun_ns = now_ns()
        return self._thread.submit(self._wait, self._stream.step(given), begun_ns)

    def _wait(self, made: mx.array, begun_ns: int) -> tuple[Result, float]:
        mx.eval(made)  # waits, no more: the work was begun before
        return self._read(made), (now_ns() - begun_ns) / NS_PER_MS

    def reset(self) -> None:
        self._stream.reset()


class MlxMimi:
    """Mimi of any dimensions, on MLX's device."""

    name: CodecName = "mlx"

    def __init__(self, module: Any) -> None:
        """`module` is moshi_mlx's Mimi, loaded."""
        self._ears = _Direction(mimi.encoder(module), lambda codes: np.array(codes, np.uint32))
        self._mouth = _Direction(mimi.decoder(module), lambda sound: np.array(sound, np.float32).reshape(FRAME))

    def hear(self, frame: Samples) -> Pending[Codes]:
        return self._ears.begin(mx.array(frame).reshape(1, FRAME, 1))

    def say(self, codes: Codes) -> Pending[Samples]:
        return self._mouth.begin(mx.array(codes.astype(np.int32)))

    def reset(self) -> None:
        self._ears.reset()
        self._mouth.reset()

    def renew(self) -> None:
        self.reset()


LIFE: Final = 3_000
"""Frames after which a rustymimi tokenizer is replaced: it fails after 4,096, and grows by 125 KiB with each."""

OVERLAP: Final = 400
"""Frames that the next one hears before it takes over. Started in mid-stream it differs at first; after 190 frames no
code did any more (attention reaches 125 frames back in each layer, but what is far has next to no weight)."""

_LOAD: Final = 20
"""Frames before that in which it is loaded, 0.3 s, in a thread of its own."""


class _Relay:
    """One direction of rustymimi in a thread of its own, without an end: one tokenizer takes over from another."""

    def __init__(self, make: Callable[[], Any], step: Callable[[Any, Any], Any]) -> None:
        self._make, self._step = make, step
        self._thread = ThreadPoolExecutor(1, initializer=apple.raise_thread)
        self._loader = ThreadPoolExecutor(1)
        self._failure: Exception | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._present = self._make()
        self._next: Future[Any] | None = None
        self._frames = 0

    def begin(self, given: Any) -> "Future[tuple[Any, float]]":
        made = self._thread.submit(self._work, given)
        # Behind it: who waits for this frame does not wait for the next tokenizer to hear it too.
        self._thread.submit(self._follow, given)
        return made

    def reset(self) -> None:
        self._thread.submit(self._forget)

    def renew(self) -> None:
        """As it was at first, to the bit: it waits until a new tokenizer is loaded."""
        self._thread.submit(self._begin_anew).result()

    def _forget(self) -> None:
        # What the last frame left in the resamplers stays: the next frame's codes are others, those after it are not.
        self._present.reset()
        if self._next is not None and self._frames > LIFE - OVERLAP:
            self._next.result().reset()

    def _work(self, given: Any) -> tuple[Any, float]:
        if self._failure is not None:
            raise self._failure
        start_ns = now_ns()
        return self._step(self._present, given), (now_ns() - start_ns) / NS_PER_MS

    def _follow(self, given: Any) -> None:
        try:
            self._hand_over(given)
        except Exception as error:  # for whoever waits for the next frame
            self._failure = error

    def _hand_over(self, given: Any) -> None:
        self._frames += 1
        if self._frames == LIFE - OVERLAP - _LOAD:
            self._next = self._loader.submit(self._make)
        elif self._frames > LIFE - OVERLAP and self._next is not None:
            self._step(self._next.result(), given)
            if self._frames == LIFE:
                self._present, self._next, self._frames = self._next.result(), None, OVERLAP


class RustMimi:
    """Mimi of the official dimensions, on the CPU, a thread a direction."""

    name: CodecName = "rust"

    def __init__(self, path: Path, codebooks: int) -> None:
        def make() -> Any:
            return rustymimi.Tokenizer(str(path), num_codebooks=codebooks)

        self._ears = _Relay(make, lambda tokenizer, frame: tokenizer.encode_step(frame[None, None])[0, :, 0])
        self._mouth = _Relay(make, lambda tokenizer, codes: tokenizer.decode_step(codes[None, :, None])[0, 0])

    def hear(self, frame: Samples) -> Pending[Codes]:
        return self._ears.begin(np.array(frame, np.float32))  # a copy: the caller's next frame is soon in its place

    def say(self, codes: Codes) -> Pending[Samples]:
        return self._mouth.begin(np.array(codes, np.uint32))

    def reset(self) -> None:
        self._ears.reset()
        self._mouth.reset()

    def renew(self) -> None:
        self._ears.renew()
        self._mouth.renew()
