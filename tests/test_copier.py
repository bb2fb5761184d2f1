"""procs.playback.Copier, which writes an answer to a file, driven by hand over real rings."""

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline import accounting
from pipeline.audio import Samples
from pipeline.errors import DeviceError
from pipeline.ring import Ring, RingReader, RingWriter
from pipeline.topology import FRAME
from procs.playback import Copier
from tests.helpers import speech_like, temporary_ring

CAPACITY = 12
"""Frames that the ring holds."""


class Rig:
    """A copier between its two rings."""

    def __init__(self, capture: Ring, playback: Ring, heard: Ring) -> None:
        self.rings = capture, playback, heard
        self.writer = RingWriter(playback)
        self.copier = Copier(playback, heard)
        self.written: list[Samples] = []

    def move(self) -> bool:
        return self.copier.move(lambda samples: self.written.append(samples.copy()))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with temporary_ring(CAPACITY) as capture, temporary_ring(CAPACITY) as playback, temporary_ring(CAPACITY) as heard:
        yield Rig(capture, playback, heard)


def test_what_is_written_is_what_came_and_nothing_else(rig: Rig) -> None:
    samples = speech_like(5)
    assert not rig.move()
    for frame in range(5):
        rig.writer.write(samples[frame * FRAME :][:FRAME])
        assert rig.move()
        assert not rig.move()
    assert not rig.copier.ended
    rig.writer.end()
    assert rig.copier.ended
    np.testing.assert_array_equal(np.concatenate(rig.written), samples)
    heard = np.empty(len(samples), np.float32)
    assert RingReader(rig.rings[2], position=0).read(heard) == len(samples)
    np.testing.assert_array_equal(heard, samples)
    counts, _ = accounting.read(*rig.rings)
    assert counts.discrepancies() == []
    assert (counts.generated, counts.played, counts.sent) == (len(samples),) * 3
    assert counts.skipped == counts.concealed == counts.gaps == 0


def test_a_frame_is_played_when_it_is_written_and_not_before(rig: Rig) -> None:
    rig.writer.write(speech_like(1))

    def full(_: Samples) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        rig.copier.move(full)
    counts, _ = accounting.read(*rig.rings)
    assert (counts.played, counts.sent, counts.waiting_out) == (0, 0, FRAME)


def test_an_answer_with_a_hole_is_an_error(rig: Rig) -> None:
    """Inference is to wait for room; had it not, silence would be in the file, or nothing."""
    rig.writer.write(speech_like(1))
    assert rig.move()
    for _ in range(CAPACITY + 2):
        rig.writer.write(speech_like(1))
    with pytest.raises(DeviceError, match=f"{2 * FRAME} samples were overwritten before they were written"):
        rig.move()
    assert len(rig.written) == 1
