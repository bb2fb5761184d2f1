"""Upstream's own front end, moshi_mlx/local.py as it is installed, with a stand-in for the model and the codec.

    python -P bench/upstream.py --ready FILE [--step-ms 50] [--jitter-ms 0] [--seed 0]

Its processes, queues, asyncio loops, callbacks and devices are upstream's; it speaks with the default devices. Only
this is put in their place: the language model, each step of which takes as long as it is told to and answers with the
codes that it was given; the codec, which keeps a frame and gives it back for the codes that stand for it; the text
tokenizer and the files, none of which are there. The frame of 80 ms that the model itself puts between what it hears
and what it says is left out: our echo has none either.

FILE gets the process id of the process that runs the model, once it answers the microphone. Runs in the peers'
environment (bench/peers.py): imports nothing of ours.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]
Samples = npt.NDArray[np.float32]

CODEBOOKS: Final = 8
CARDINALITY: Final = 2_048
"""Values that a code of Mimi's may have."""

WARM_UP_FRAMES: Final = 4
"""What local.py has the model answer before it opens the devices."""

PENDING: Final = 3
"""A text token that local.py prints nothing for."""

STEPS: Final = 10**9
"""The stand-in has no most; upstream's model stops after 4,000 steps, 320 s, if it is not told otherwise."""

_NO_FILE: Final = "none"
_SETTINGS: Final = "UPSTREAM_STAND_INS"
"""The environment variable by which local.py's processes learn of them."""


def codes_of(number: int) -> Codes:
    """The codes that stand for a frame, shape (8, 1): its number, to the base of 2,048."""
    digits = [number // CARDINALITY**place % CARDINALITY for place in range(CODEBOOKS)]
    return np.array(digits, np.uint32)[:, None]


def number_of(codes: Codes) -> int:
    """The number of the frame that codes, shape (1, 8), stand for."""
    return sum(int(digit) * CARDINALITY**place for place, digit in enumerate(codes[0]))


class Codec:
    """In the place of rustymimi.StreamTokenizer, which works in threads and returns None until something is there."""

    def __init__(self, path: str) -> None:
        self._count = 0
        self._frames: dict[int, Samples] = {}
        self._encoded: deque[Codes] = deque()
        self._decoded: deque[Samples] = deque()

    def encode(self, pcm: Samples) -> None:
        """Take in a frame."""
        self._frames[self._count] = pcm
        self._encoded.append(codes_of(self._count))
        self._count += 1

    def get_encoded(self) -> Codes | None:
        """Return the codes of the oldest frame that are not yet returned, shape (8, 1)."""
        return self._encoded.popleft() if self._encoded else None

    def decode(self, codes: Codes) -> None:
        """Take in codes, shape (1, 8)."""
        self._decoded.append(self._frames.pop(number_of(codes)))

    def get_decoded(self) -> Samples | None:
        """Return the oldest decoded frame that is not yet returned."""
        return self._decoded.popleft() if self._decoded else None


class Model:
    """In the place of moshi_mlx.models.Lm."""

    def __init__(self, config: Any) -> None:
        """There are no weights."""

    def set_dtype(self, dtype: Any) -> None:
        """There are no weights."""

    def load_weights(self, path: str, strict: bool) -> None:
        """There are no weights."""

    def warmup(self) -> None:
        """There is nothing to compile."""


class Generator:
    """In the place of moshi_mlx.models.LmGen."""

    def __init__(self, step_ms: float, jitter_ms: float, seed: int, ready: str, **_: Any) -> None:
        self._step_ms = step_ms
        self._jitter_ms = jitter_ms
        self._random = random.Random(seed)  # noqa: S311  (nothing is secret)
        self._ready = Path(ready)
        self._steps = 0
        self._codes: Any = None

    def step(self, codes: Any) -> Any:
        """Take as long as the model would; returns a text token, shape (1,). `codes` has the shape (1, 8)."""
        due_s = time.monotonic() + (self._step_ms + self._random.uniform(0, self._jitter_ms)) / 1_000
        self._codes = codes
        self._steps += 1
        if self._steps == WARM_UP_FRAMES + 1:
            self._ready.write_text(str(os.getpid()))
        time.sleep(max(0.0, due_s - time.monotonic()))
        return np.array([PENDING])

    def last_audio_tokens(self) -> Any:
        """Return the codes that were given; None after the first step, as upstream's, for which local.py is made."""
        return self._codes if self._steps > 1 else None


class TextTokenizer:
    """In the place of sentencepiece.SentencePieceProcessor: nothing is said."""

    def __init__(self, path: str) -> None:
        """There is no file."""


def put_in_place(local: Any, settings: dict[str, Any]) -> None:
    """Put the stand-ins where local.py, the module, looks for the real ones."""
    local.rustymimi.StreamTokenizer = Codec
    local.sentencepiece.SentencePieceProcessor = TextTokenizer
    local.models.Lm = Model
    local.models.LmGen = functools.partial(Generator, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ready", required=True)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--jitter-ms", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    os.environ[_SETTINGS] = json.dumps(vars(parser.parse_args()))
    # Behind a shell it would be ignored, and Ctrl-C is how local.py is ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As on macOS. Where they are forked, as on Linux, the sound server's library refuses to work in them.
    multiprocessing.set_start_method("spawn")
    files = [option for name in ("tokenizer", "moshi-weight", "mimi-weight") for option in (f"--{name}", _NO_FILE)]
    sys.argv = ["local", *files, "--steps", str(STEPS)]
    importlib.import_module("moshi_mlx.local").main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # one of local.py's two processes, before its own work
    put_in_place(importlib.import_module("moshi_mlx.local"), json.loads(os.environ[_SETTINGS]))
