"""A conversation between a microphone and a speaker with a clock each, turned by hand: hours of it in seconds.

    python -m tests.clocks [PPM [HOURS]]

prints what the drift does to latency and sound where the microphone is faster by PPM: the player, the rings, the
estimator and the resampler are those of a run.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import pytest

from pipeline.audio import Samples
from pipeline.drift import Drift, Vernier
from pipeline.ring import Ring, RingWriter
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import FRAME, SAMPLE_RATE
from procs import devices, playback
from procs.playback import Player
from tests.helpers import temporary_ring, tone

HZ: Final = 437.5
"""35 periods a frame: a frame of it follows another without a step."""

LOOK_S: Final = 0.16
"""How often the playback stage looks at the dates."""

CLICK: Final = 1e-4
"""-80 dB of full scale: what a sample may be off from what its neighbours in a sine wave tell."""

BEGINNING: Final = 50
"""Blocks, from the silence before the first frame to after its fade in, in which nothing is looked for."""

DISTANCE_NS: Final = 20 * NS_PER_MS
"""Between a speaker's callback and the converter."""


class Crystal:
    """A device's clock: when its sample at a position is converted, by the true one, and when its callback says so."""

    def __init__(self, ppm: float, block: int, jitter_ms: float, seed: int, turn: Callable[[int], None]) -> None:
        self.ppm = ppm
        self.block = block
        self.position = 0
        self.due_ns = float(NS_PER_S)
        self._lateness_ns = np.random.default_rng(seed).uniform(0, 2 * jitter_ms * NS_PER_MS, 10_007)
        self._turn = turn
        self.dating = devices._Dating(SAMPLE_RATE)

    def date(self, distance_ns: int) -> int:
        """What the device says of the block that it comes to, late as its callback is."""
        self._turn(round(self.due_ns + self._lateness_ns[self.position // self.block % len(self._lateness_ns)]))
        return self.dating.date(self.block, distance_ns)

    def advance(self) -> None:
        """To the next block."""
        self.position += self.block
        self.due_ns += self.block * NS_PER_S / (SAMPLE_RATE * (1 + self.ppm * 1e-6))


def roughness(samples: Samples) -> float:
    """The most that a sample is off from what its two neighbours in a sine wave of HZ tell."""
    wave = samples.astype(np.float64)
    told = (wave[2:] + wave[:-2]) / (2 * np.cos(2 * np.pi * HZ / SAMPLE_RATE))
    return float(np.abs(wave[1:-1] - told).max())


class Loop:
    """A microphone, a model that answers each frame with a tone, a player and a speaker, each at its own clock."""

    def __init__(
        self, rings: tuple[Ring, Ring, Ring], mic_ppm: float, block: int, prebuffer_ms: float, jitter_ms: float
    ):
        capture, source, self.heard = rings
        self.capture = RingWriter(capture)
        self.source = RingWriter(source)
        self.player = Player(source, self.heard, round(prebuffer_ms * NS_PER_MS), queue_frames=3)
        self.drift = Drift()
        self.vernier = Vernier(self.player.fill, lambda: self.drift.correction_ppm)
        self.mic = Crystal(mic_ppm, 480, jitter_ms, 1, self._turn)
        self.speaker = Crystal(0.0, block, jitter_ms, 2, self._turn)
        self.generated = tone(1, HZ)
        self.now_ns = 0
        self._look_ns = 0.0
        self._work_ns = np.random.default_rng(3).uniform(20, 30, 10_007) * NS_PER_MS
        self._answers: list[tuple[float, int]] = []
        self._marks = 0
        self.latency_ms: list[float] = []
        self.corrections_ppm: list[float] = []
        self.roughness: list[float] = []
        self._last: Samples = devices.silence(2)
        self.sent: list[Samples] | None = None

    def _turn(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        until_ns = self.speaker.due_ns + seconds * NS_PER_S
        while self.speaker.due_ns < until_ns:
            while self.mic.due_ns <= self.speaker.due_ns:
                self._hear()
            while self._answers and self._answers[0][0] <= self.speaker.due_ns:
                self._answer(*self._answers.pop(0))
            self._say()
            if self.speaker.due_ns >= self._look_ns:
                self._look()

    def _hear(self) -> None:
        """The microphone's callback comes when the block is complete."""
        mic = self.mic
        mic.advance()
        block_ns = mic.block * NS_PER_S // SAMPLE_RATE
        self.capture.anchor(mic.position - mic.block, mic.date(-block_ns))
        if mic.position % FRAME == 0:
            frame = mic.position // FRAME - 1
            self._answers.append((mic.due_ns + self._work_ns[frame % len(self._work_ns)], frame))

    def _answer(self, ready_ns: float, frame: int) -> None:
        anchor = self.capture.ring.anchor
        assert anchor is not None
        captured_ns = anchor.time_ns + (frame * FRAME - anchor.position) * NS_PER_S // SAMPLE_RATE
        self.source.mark(frame * FRAME, frame, captured_ns, start_ns=0, end_ns=round(ready_ns))
        first = frame * FRAME % len(self.generated)
        self.source.write(self.generated[first : first + FRAME])

    def _say(self) -> None:
        out = np.full(self.speaker.block, np.nan, np.float32)
        self.vernier.fill(out, self.speaker.date(DISTANCE_NS), False)
        self.speaker.advance()
        self.roughness.append(roughness(np.concatenate((self._last, out))))
        self._last = out[-2:]
        if self.sent is not None:
            self.sent.append(out)

    def _look(self) -> None:
        self._look_ns = self.speaker.due_ns + LOOK_S * NS_PER_S
        self.drift.see(self.capture.ring.anchor, self.heard.anchor)
        self.corrections_ppm.append(self.drift.correction_ppm)
        while (mark := self.heard.mark(self._marks)) is not None:
            self._marks += 1
            self.latency_ms.append((mark.start_ns - mark.captured_ns) / NS_PER_MS)


@contextlib.contextmanager
def loop(mic_ppm: float, block: int = 1_920, prebuffer_ms: float = 40.0, jitter_ms: float = 4.0) -> Iterator[Loop]:
    """A loop on rings of its own, and its clock in place of the monotonic one."""
    with (
        temporary_ring(2) as capture,
        temporary_ring(150) as source,
        temporary_ring(150) as heard,
        pytest.MonkeyPatch.context() as patch,
    ):
        made = Loop((capture, source, heard), mic_ppm, block, prebuffer_ms, jitter_ms)
        patch.setattr(playback, "now_ns", lambda: made.now_ns)
        patch.setattr(devices, "now_ns", lambda: made.now_ns)
        yield made


def main() -> None:
    """Print, for each twelfth of the time, the drift as it is estimated and what it does."""
    ppm, hours = (*(float(argument) for argument in sys.argv[1:]), *(200.0, 1.0)[len(sys.argv) - 1 :])
    print("     s   drift ppm  error  correction  latency ms: mean    min    max  gaps  clicks")
    with loop(ppm, block=480) as made:
        for part in range(1, 13):
            frames, blocks = len(made.latency_ms), len(made.roughness)
            made.run(hours * 300)
            latency = made.latency_ms[frames:]
            clicks = sum(found > CLICK for found in made.roughness[max(blocks, BEGINNING) :])
            drift = made.drift
            print(
                f"{part * hours * 300:6.0f} {drift.ppm or 0:11.2f} {drift.error_ppm:6.2f} {drift.correction_ppm:11.2f}"
                f" {np.mean(latency):17.2f} {min(latency):6.2f} {max(latency):6.2f} {made.heard.ledger().gaps:5}"
                f" {clicks:7}"
            )


if __name__ == "__main__":
    main()
