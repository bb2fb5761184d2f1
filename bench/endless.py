"""Whether a conversation stays as it was: 20,000 frames, 27 minutes, of a tiny model whose context is short.

    python -m bench.endless [--frames 20000]

A made-up checkpoint with a context of 100 frames hears and speaks without a pause, through the model's step and Mimi in
both directions, as the engine does it. At the start, at the first wrap of each ring, and in stretches up to the last
frame, what came out is held against plain references that see the whole stretch at once and have no cache
(tests/test_generator.py, tests/test_mimi.py). Printed are the largest differences, and memory and the time of a step
around frame 2,000 and at the end. The exit code is 1 if a code differs, attention is off by 2e-4 or sound by 1e-5, or
if memory grew by over 2 %; the times are printed and left to the reader, who knows what else the machine did.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import psutil

from pipeline.checkpoints import SIZES, Size, synthesize
from pipeline.topology import FRAME
from procs.engines import Samples
from procs.model import mimi
from procs.model.codec import MlxMimi
from procs.model.generator import Generator
from procs.model.loading import compute_type, load_model
from procs.model.sampling import Choice, Sampling
from tests.helpers import speech_like
from tests.test_generator import full_history, upstreams_model
from tests.test_mimi import Reference

CONTEXT: Final = 100
LENGTH: Final = 400
"""Frames of a stretch; as far back as anything in it can look, layer through layer."""

CHECKED: Final = 100
"""Frames at a stretch's end that are compared: what the others look at began before it."""

WINDOW: Final = 500
"""Frames over which the time of a step is taken."""

Array = npt.NDArray[Any]


class Conversation:
    """The parts of an engine, and what went through them in some stretches."""

    def __init__(self, folder: Path) -> None:
        SIZES["short"] = Size({**SIZES["tiny"].config, "context": CONTEXT}, SIZES["tiny"].mimi)
        self.checkpoint = synthesize(folder / "model", "q4", "short")
        shape = self.checkpoint.mimi_shape
        self.module = mimi.load(self.checkpoint.mimi_file, shape, 8)
        self.codec = MlxMimi(self.module)
        sampling = Sampling(Choice(0.7, top_k=25), Choice(0.8, top_k=250))
        self.generator = Generator(load_model(self.checkpoint), sampling, 1, compute_type(self.checkpoint))
        self._spy()

    def _spy(self) -> None:
        generator: Any = self.generator
        inputs, last = generator._inputs, generator._layers.last

        def kept_inputs() -> mx.array:
            self._input = inputs()
            return self._input

        def kept_hidden(*given: mx.array) -> Any:
            made = last(*given)
            self._hidden = made[1]
            return made

        generator._inputs, generator._layers.last = kept_inputs, kept_hidden

    def frame(self, frame: Samples, keep: "Stretch | None") -> float:
        """One frame; returns the ms that the step took, the codec not counted."""
        codes, _ = self.codec.hear(frame).result()
        start = time.perf_counter()
        _, spoken = self.generator.step(codes)
        took_ms = (time.perf_counter() - start) * 1e3
        said = np.zeros(8, np.uint32) if spoken is None else spoken.astype(np.uint32)
        sound, _ = self.codec.say(said).result()
        if keep is not None:
            embeddings: Any = self.generator._embed
            tokens = np.array(self._input).astype(np.int64) - embeddings.offsets
            keep.take(tokens, np.array(self._hidden.astype(mx.float32))[0, 0], frame, codes, said, sound)
        return took_ms


class Stretch:
    """Some frames in a row, with all that became of them. Its memory is taken, and written to, before the first."""

    def __init__(self, end: int, config: dict[str, Any]) -> None:
        self.end = end
        self._count = 0
        self.tokens = np.ones((LENGTH, 1 + config["n_q"]), np.int64)
        self.hidden = np.ones((LENGTH, config["dim"]), np.float32)
        self.heard = np.ones((LENGTH, FRAME), np.float32)
        self.codes = np.ones((LENGTH, 8), np.uint32)
        self.said = np.ones((LENGTH, 8), np.uint32)
        self.sound = np.ones((LENGTH, FRAME), np.float32)

    def take(self, *parts: Array) -> None:
        """Keep one frame's tokens, hidden state, sound heard, codes, codes said and sound said."""
        places = (self.tokens, self.hidden, self.heard, self.codes, self.said, self.sound)
        for place, part in zip(places, parts, strict=True):
            place[self._count] = part
        self._count += 1

    def differences(self, conversation: Conversation, model: Any) -> tuple[float, int, float]:
        """Of attention's output, of codes, and of sound."""
        # A stretch that is the conversation's start is compared from its first frame on.
        kept = slice(0 if self.end <= LENGTH else LENGTH - CHECKED, None)
        reference = Reference(conversation.module)
        hidden = full_history(model, self.tokens, CONTEXT)
        codes = reference.codes(self.heard.reshape(-1))
        sound = reference.sound(self.said).reshape(self.sound.shape)
        return (
            float(np.abs(self.hidden - hidden)[kept].max()),
            int((self.codes != codes)[kept].sum()),
            float(np.abs(self.sound - sound)[kept].max()),
        )


def memory() -> tuple[float, float]:
    """MB that MLX has in use, and MB resident."""
    return mx.get_active_memory() / 1e6, psutil.Process().memory_info().rss / 1e6


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=20_000)
    frames = parser.parse_args().frames
    with tempfile.TemporaryDirectory() as folder:
        conversation = Conversation(Path(folder))
        model = upstreams_model(conversation.checkpoint)
    sys.exit(run(conversation, model, frames))


def run(conversation: Conversation, model: Any, frames: int) -> int:
    """The conversation, its table, and the exit code."""
    config = conversation.checkpoint.config
    stretches = [Stretch(end, config) for end in (LENGTH, 2_000, frames // 2, 16_900, frames) if end <= frames]
    sound = speech_like(1_000).reshape(1_000, -1)
    times_ms = np.zeros(frames)
    gc.collect()
    gc.freeze()
    gc.disable()
    for frame in range(frames):
        keep = next((one for one in stretches if one.end - LENGTH <= frame < one.end), None)
        times_ms[frame] = conversation.frame(sound[frame % len(sound)].copy(), keep)
        if frame == 2_000:
            before = memory()
    after = memory()
    worst = [stretch.differences(conversation, model) for stretch in stretches]
    print("| frames | attention | codes that differ | sound |\n|---|---|---|---|")
    for stretch, (hidden, codes, heard) in zip(stretches, worst, strict=True):
        print(f"| up to {stretch.end} | {hidden:.1e} | {codes} | {heard:.1e} |")
    early, late = times_ms[2_000 - WINDOW // 2 : 2_000 + WINDOW // 2], times_ms[-WINDOW:]
    for name, share in (("quartile", 25), ("median", 50)):
        one, other = np.percentile(early, share), np.percentile(late, share)
        print(
            f"step, {name}: {one:.2f} ms around frame 2,000, {other:.2f} at the end: {100 * (other / one - 1):+.1f} %"
        )
    for name, first, last in zip(("in use by MLX", "resident"), before, after, strict=True):
        print(f"memory {name}: {first:.1f} MB at frame 2,000, {last:.1f} at the end: {100 * (last / first - 1):+.1f} %")
    off = any(hidden >= 2e-4 or codes or heard >= 1e-5 for hidden, codes, heard in worst)
    return int(off or any(last > 1.02 * first for first, last in zip(before, after, strict=True)))


if __name__ == "__main__":
    main()
