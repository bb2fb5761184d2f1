"""What the inference stage asks of an engine, and `echo`, the engine that returns what it was given."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]


@dataclass(slots=True)
class Step:
    """What an engine made of one frame."""

    audio: Samples
    """Shape (FRAME,), float32, full scale 1.0: the answer to the frame that was given."""
    text: str = ""
    """The words, or parts of a word, that came with this frame."""
    encode_ms: float = 0.0
    step_ms: float = 0.0
    decode_ms: float = 0.0
    new_conversation: bool = False
    """The engine began anew with this frame, by itself: its memory was full, or no longer held numbers."""


class Engine(Protocol):
    """Turns a frame of the microphone into a frame for the speaker."""

    name: str

    def load(self) -> None:
        """Bring the model into memory and run real steps until the next is as fast as any.

        Raises CheckpointError.
        """

    def step(self, frame: Samples) -> Step:
        """Answer one frame, shape (FRAME,), float32, finite and within full scale."""

    def reset(self) -> None:
        """Begin a new conversation, without loading anything again."""


class Echo:
    """Returns the frame that it was given: a sound check."""

    name = "echo"

    def load(self) -> None:
        """Nothing to load."""

    def step(self, frame: Samples) -> Step:
        return Step(audio=frame)

    def reset(self) -> None:
        """Nothing is remembered between frames."""
