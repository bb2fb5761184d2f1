"""What the inference stage asks of an engine, and `echo`, the engine that returns what it was given."""

import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import FaultsConfig, SamplerConfig

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
    context: int = 0
    """Positions that the model's attention sees."""
    context_size: int = 0
    """The most that it can see."""
    new_conversation: bool = False
    """The engine began anew with this frame, by itself: its memory no longer held numbers."""


class Answer(Protocol):
    """What becomes of one frame."""

    def result(self) -> Step:
        """Wait until all of it is there, in any thread. Called once."""


class Engine(Protocol):
    """Turns frames of the microphone into frames for the speaker, one for one and in order."""

    name: str
    overlaps: bool
    """Whether it gains from being given a frame while it works on the one before."""

    def load(self) -> None:
        """Bring the model into memory and run real steps until the next is as fast as any.

        Raises CheckpointError.
        """

    def listen(self, frame: Samples) -> None:
        """Take in one frame, shape (FRAME,), float32; what can be done before its turn comes is begun."""

    def respond(self) -> Answer:
        """Answer the oldest frame that was taken in and not yet answered."""

    def reset(self) -> None:
        """Begin a new conversation, without loading anything again. Frames not yet answered are forgotten."""

    def draw_by(self, sampler: SamplerConfig) -> None:
        """Draw tokens by these settings from the next frame on."""

    def keep_warm(self) -> None:
        """Do a tiny piece of work, for a device that would otherwise put the model out of reach."""


class Echo:
    """Returns the frame that it was given: a sound check."""

    name = "echo"
    overlaps = False

    def __init__(self) -> None:
        self._heard: deque[Samples] = deque()

    def load(self) -> None:
        """Nothing to load."""

    def listen(self, frame: Samples) -> None:
        self._heard.append(frame)

    def respond(self) -> "Echoed":
        return Echoed(self._heard.popleft())

    def reset(self) -> None:
        self._heard.clear()

    def draw_by(self, sampler: SamplerConfig) -> None:
        """Nothing is drawn."""

    def keep_warm(self) -> None:
        """There is no device."""


class Echoed:
    """An answer that was there from the start."""

    def __init__(self, frame: Samples) -> None:
        self._frame = frame

    def result(self) -> Step:
        return Step(audio=self._frame)


class Paced:
    """Another engine, each step of which takes at least as long as the settings say: a model of a set speed."""

    def __init__(self, engine: Engine, faults: FaultsConfig) -> None:
        self.name = engine.name
        self.overlaps = engine.overlaps
        self._engine = engine
        self._faults = faults
        self._random = random.Random(faults.seed)  # noqa: S311  (nothing is secret)

    def load(self) -> None:
        self._engine.load()

    def listen(self, frame: Samples) -> None:
        self._engine.listen(frame)

    def respond(self) -> Answer:
        begin_s = time.monotonic()
        due_s = begin_s + (self._faults.step_ms + self._random.uniform(0, self._faults.jitter_ms)) / 1_000
        answer = self._engine.respond()
        time.sleep(max(0.0, due_s - time.monotonic()))
        return PacedAnswer(answer, (time.monotonic() - begin_s) * 1_000)

    def reset(self) -> None:
        self._engine.reset()

    def draw_by(self, sampler: SamplerConfig) -> None:
        self._engine.draw_by(sampler)

    def keep_warm(self) -> None:
        self._engine.keep_warm()


class PacedAnswer:
    """Another answer, and how long its step was made to take."""

    def __init__(self, answer: Answer, step_ms: float) -> None:
        self._answer = answer
        self._step_ms = step_ms

    def result(self) -> Step:
        step = self._answer.result()
        step.step_ms = self._step_ms
        return step
