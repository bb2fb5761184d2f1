"""pipeline.stretch: where a frame may lose samples, and that it is not heard."""

from pathlib import Path
from typing import Final

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import Samples, falling, rising
from pipeline.stretch import ALIKE, LEAST, MOST, OVERLAP, QUIET, Joint, find_joint
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.helpers import largest_step, speech_like, tone

SPEECH_FILE: Final = Path(__file__).parents[1] / "pipeline" / "assets" / "speech.flac"

SPOKEN: Final[Samples] = soundfile.read(SPEECH_FILE, dtype="float32")[0]


def shortened(frame: Samples, joint: Joint) -> Samples:
    at, after = joint.at, joint.at + joint.lag
    crossfade = frame[at : at + OVERLAP] * falling(OVERLAP) + frame[after : after + OVERLAP] * rising(OVERLAP)
    return np.concatenate((frame[:at], crossfade, frame[after + OVERLAP :]))


def assert_fits(joint: Joint, most: int) -> None:
    assert LEAST <= joint.lag <= most
    assert 0 <= joint.at <= FRAME - OVERLAP - joint.lag


def frames_of(signal: Samples) -> list[Samples]:
    return np.split(signal[: len(signal) // FRAME * FRAME], len(signal) // FRAME)


def voiced(hz: float, seed: int = 0) -> Samples:
    """A frame of a voice: many harmonics, and a little breath."""
    time_s = np.arange(FRAME) / SAMPLE_RATE
    harmonics = [np.sin(2 * np.pi * hz * number * time_s + number**2) / number for number in range(1, 20)]
    breath = 0.01 * np.random.default_rng(seed).standard_normal(FRAME)
    sound: Samples = (0.1 * (np.sum(harmonics, axis=0) + breath)).astype(np.float32)
    return sound


@pytest.mark.parametrize("hz", [70.0, 97.0, 130.0, 220.0, 390.0])
def test_a_voice_loses_whole_periods(hz: float) -> None:
    joint = find_joint(voiced(hz), MOST)
    assert joint is not None
    assert_fits(joint, MOST)
    periods = joint.lag * hz / SAMPLE_RATE
    assert abs(periods - round(periods)) < 0.02


@pytest.mark.parametrize("hz", [97.0, 200.0, 440.0, 1_000.0])
@pytest.mark.parametrize("phase", [0.0, 1.3])
def test_a_tone_goes_on_as_if_nothing_were_missing(hz: float, phase: float) -> None:
    frame = tone(1, hz=hz, phase=phase)
    joint = find_joint(frame, MOST)
    assert joint is not None
    result = shortened(frame, joint)
    assert len(result) == FRAME - joint.lag
    assert largest_step(result) <= 1.03 * largest_step(frame)
    spectrum = np.abs(np.fft.rfft(result * np.hanning(len(result))))
    heard_hz = np.argmax(spectrum) * SAMPLE_RATE / len(result)
    assert abs(heard_hz - hz) <= SAMPLE_RATE / len(result)


def test_silence_loses_as_much_as_is_asked_for_at_once() -> None:
    frame = np.zeros(FRAME, np.float32)
    assert find_joint(frame, 100) == Joint(0, 100)
    assert find_joint(frame, 10 * FRAME) == Joint(0, FRAME - OVERLAP)


def test_a_pause_is_shortened_rather_than_the_sound_next_to_it() -> None:
    frame = tone(1)
    frame[600:1_440] = QUIET / 2
    joint = find_joint(frame, 10 * FRAME)
    assert joint == Joint(600, 840 - OVERLAP)
    frame[1_000] = 2 * QUIET  # now no part of it is long enough
    joint = find_joint(frame, 10 * FRAME)
    assert joint is None or joint.lag <= MOST


@pytest.mark.parametrize("most", [0, 1, LEAST - 1, -100])
def test_where_there_is_little_to_gain_nothing_is_done(most: int) -> None:
    assert find_joint(tone(1), most) is None
    assert find_joint(np.zeros(FRAME, np.float32), most) is None


def test_noise_is_left_alone_unless_less_will_do() -> None:
    frames = frames_of(speech_like(40))
    assert not any(find_joint(frame, MOST) for frame in frames)
    assert all(find_joint(frame, MOST, alike=-1.0) for frame in frames)


def test_nearly_all_that_is_said_can_be_shortened() -> None:
    found = [find_joint(frame, FRAME) for frame in frames_of(SPOKEN)]
    assert sum(joint is not None for joint in found) >= 0.85 * len(found)


@pytest.mark.parametrize("most", [LEAST, LEAST + 1, 100, 359, MOST, FRAME])
def test_what_fades_into_each_other_is_as_alike_as_asked(most: int) -> None:
    for frame in frames_of(SPOKEN)[40:80]:
        if (joint := find_joint(frame, most)) is None:
            continue
        assert_fits(joint, most)
        before, after = frame[joint.at :][:OVERLAP], frame[joint.at + joint.lag :][:OVERLAP]
        if np.abs(frame[joint.at : joint.at + joint.lag + OVERLAP]).max() > QUIET:
            # The search looks at what is below 2 kHz.
            assert np.dot(before, after) >= 0.75 * ALIKE * np.sqrt(np.dot(before, before) * np.dot(after, after))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1_000),
    st.integers(LEAST, FRAME),
    st.sampled_from([-1.0, 0.5, ALIKE]),
    st.lists(st.tuples(st.integers(0, FRAME), st.integers(1, 600)), max_size=4),
    st.sampled_from([1e-5, 0.01, 1.0]),
)
def test_any_frame_is_shortened_without_a_click(
    seed: int, most: int, alike: float, pauses: list[tuple[int, int]], level: float
) -> None:
    """The crossfade adds to no step more than its own slope."""
    frame = speech_like(1, seed=seed, level=level)
    for start, length in pauses:
        frame[start : start + length] = 0
    joint = find_joint(frame, most, alike)
    if joint is None:
        assert alike > 0
        return
    assert_fits(joint, most)
    result = shortened(frame, joint)
    peak = float(np.abs(frame).max())
    assert np.abs(result).max() <= peak * (1 + 1e-6)
    assert largest_step(result) <= largest_step(frame) + peak * np.pi / (OVERLAP + 1)
