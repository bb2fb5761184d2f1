"""Two crystals that do not agree: how far apart the microphone's clock and the speaker's run, and what undoes it.

`Drift` watches the dates of both and says by how much faster, or slower, than its own clock the output has to take
samples. `Vernier` does that: it moves the samples by fractions of one, and where there is nothing to do it copies.

Both are a delay-locked loop when taken together, as in F. Adriaensen, "Using a DLL to filter time", Linux Audio
Conference 2005. Its bandwidth is not fixed but a Kalman filter's, so that it is wide at first and narrow later, and
knows its own error (docs/drift.md).
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.audio import FULL_SCALE, Samples
from pipeline.ring import Anchor
from pipeline.timing import NS_PER_S
from pipeline.topology import SAMPLE_RATE

Floats = npt.NDArray[np.float64]

PPM: Final = 1e-6

MOST_PPM: Final = 3_000.0
"""No correction is larger: it would be heard as a change of pitch."""

KNOWN_AFTER_S: Final = 30.0
"""Before that the drift is not told: its error is 50 ppm."""

_EVERY_S: Final = 0.5
"""Dates are looked at so often: a device's are the median of up to as long, and say little new before."""

_SETTLE_S: Final = 0.5
"""Dates that a device gives before it runs, which are not looked at."""

_FIRST_NOISE_S: Final = 3e-3
_NOISE_S: Final = 1e-3
_STEADY_S: Final = 20.0
"""By how much dates are off. A sound server's wander by milliseconds until it has got to know its card."""

_FIRST_RATE: Final = 1_000 * PPM
_NEXT_RATE: Final = 100 * PPM
"""What is expected of two clocks that nothing is known of, and of a change of theirs when a device was opened anew."""

_WANDER: Final = 0.05 * PPM
"""By how much a drift changes in a second, as its square root's share: 3 ppm in an hour."""

_JUMP_NOISES: Final = 2.0
_JUMPS: Final = 4
"""So many dates in a row that are off by so much more are of a device that was opened anew, or whose buffer grew."""

_SHIFT_LOOKS: Final = 4
"""For so many looks, 2 s, what is off is so by an underrun that was told."""

_JITTER_S: Final = 0.5e-3
_JITTER_LOOKS: Final = 20
"""How much a date differs from the one before, at first, and over how many that is measured."""

_ENGAGE_S: Final = 2e-3
_RELEASE_S: Final = 0.1e-3
_RELEASE_RATE: Final = 2 * PPM
"""A correction begins when the clocks are apart by so much more than the error, and ends within the others."""

_SIGMAS: Final = 3.0
_JUMP_SIGMAS: Final = 4.0
"""What is fewer standard errors from nothing is taken for nothing, and what is fewer from the expected for no jump."""

_BACK_IN_S: Final = 10.0
"""In about so long what the clocks have come apart is taken back."""


class Drift:
    """The microphone's clock against the speaker's, and the correction that holds them together.

    Its state: the phase between the two streams, in seconds by which the microphone's has come further, with the
    correction in it; the rate at which that would change without one; and the phase that it began with.
    """

    def __init__(self) -> None:
        self.correction_ppm = 0.0
        """How much faster than its own clock the output is to take samples; 0 while no drift is certain."""
        self._rate = 0.0
        self._rate_error = _FIRST_RATE
        self._jitter = _JITTER_S**2
        self._before_s = 0.0
        self._began_ns = 0
        self._state: Floats = np.zeros(3)
        self._spread: Floats = np.zeros((3, 3))
        self._first_ns: int | None = None
        self._seen: tuple[int, int] = (-1, -1)
        self._last_ns = 0
        self._settled_ns = 0
        self._running = False
        self._jumps = 0
        self._shifts = 0

    @property
    def ppm(self) -> float | None:
        """Positive where the microphone is faster; None in the first 30 s."""
        if self._first_ns is None or self._last_ns - self._first_ns < KNOWN_AFTER_S * NS_PER_S:
            return None
        return self._rate / PPM

    @property
    def error_ppm(self) -> float:
        """The standard error of `ppm`, by the filter's own account."""
        return self._rate_error / PPM

    @property
    def apart_ms(self) -> float:
        """How much longer than in the beginning a sample takes from microphone to speaker, as far as clocks go."""
        return self._apart * 1_000 if self._running else 0.0

    @property
    def _noise(self) -> float:
        steady = self._last_ns - self._began_ns > _STEADY_S * NS_PER_S
        return float((_NOISE_S if steady else _FIRST_NOISE_S) ** 2)

    @property
    def _apart(self) -> float:
        return float(self._state[0] - self._state[2])

    @property
    def _apart_error(self) -> float:
        spread = self._spread
        return float(max(0.0, spread[0, 0] + spread[2, 2] - 2 * spread[0, 2]) ** 0.5)

    def expect_shift(self) -> None:
        """A device ran dry, or lost samples: if the next dates are off, they are so by that."""
        self._shifts = _SHIFT_LOOKS

    def see(self, microphone: Anchor | None, speaker: Anchor | None) -> None:
        """Take the newest date of each stream, capture's and heard's. Where one has none, or no new one, it waits."""
        if microphone is None or speaker is None:
            return
        if microphone.position == self._seen[0] or speaker.position == self._seen[1]:
            return
        time_ns = speaker.time_ns
        if self._first_ns is None:
            self._first_ns = self._last_ns = time_ns
            self._settled_ns = time_ns + round(_SETTLE_S * NS_PER_S)
        elapsed_s = (time_ns - self._last_ns) / NS_PER_S
        if time_ns < self._settled_ns or elapsed_s < _EVERY_S:
            return
        self._seen = microphone.position, speaker.position
        self._last_ns = time_ns
        samples = microphone.position - speaker.position
        phase_s = samples / SAMPLE_RATE - (microphone.time_ns - speaker.time_ns) / NS_PER_S
        if self._running:
            self._predict(elapsed_s)
            self._observe(phase_s)
        else:
            self._begin(phase_s)
        if self._running:
            self._decide()

    def _begin(self, phase_s: float) -> None:
        self._running = True
        self._jumps = 0
        self._state = np.array((phase_s, self._rate, phase_s))
        self._began_ns = self._last_ns
        self._before_s = 0.0
        noise = self._noise
        self._spread = np.array(((noise, 0, noise), (0, self._rate_error**2, 0), (noise, 0, noise)))

    def _predict(self, elapsed_s: float) -> None:
        step = np.eye(3)
        step[0, 1] = elapsed_s
        self._state = step @ self._state
        self._state[0] -= self.correction_ppm * PPM * elapsed_s
        self._spread = step @ self._spread @ step.T
        self._spread[1, 1] += _WANDER**2 * elapsed_s

    def _observe(self, phase_s: float) -> None:
        surprise = phase_s - self._state[0]
        most_s = max(_JUMP_NOISES * self._noise**0.5, _JUMP_SIGMAS * self._jitter**0.5)
        expected, self._shifts = self._shifts > 0, max(0, self._shifts - 1)
        if expected and abs(surprise) > most_s:
            self._shift(surprise)
            return
        # In full, a jump would have the next ones taken for dates that vary, and so for a rate.
        change_s = min(most_s / 2, abs(surprise - self._before_s))
        self._jitter += (change_s**2 / 2 - self._jitter) / _JITTER_LOOKS
        self._before_s = surprise
        if abs(surprise) > most_s:
            self._jump()
            return
        self._jumps = 0
        variance = self._spread[0, 0] + self._noise
        gain = self._spread[:, 0] / variance
        self._state = self._state + gain * surprise
        self._spread = self._spread - np.outer(gain, self._spread[0])
        self._rate, self._rate_error = float(self._state[1]), float(self._spread[1, 1] ** 0.5)

    def _shift(self, by_s: float) -> None:
        """Latency that a device put in, or lost, at once is its own: it is not to be undone."""
        self._state += (by_s, 0, by_s)
        self._spread += self._noise * np.outer((1, 0, 1), (1, 0, 1))

    def _jump(self) -> None:
        """The same of a device of which nobody said that it ran dry: it may be another one now."""
        self._jumps += 1
        if self._jumps == _JUMPS:
            self._running = False
            self._settled_ns = self._last_ns + round(_SETTLE_S * NS_PER_S)
            self._rate_error = max(self._rate_error, _NEXT_RATE)
            if self.correction_ppm:
                self.correction_ppm = self._rate / PPM

    def _decide(self) -> None:
        apart, error = abs(self._apart), self._apart_error
        if self.correction_ppm:
            certain = apart > _RELEASE_S or abs(self._rate) > _RELEASE_RATE
        else:
            certain = apart - _SIGMAS * error > _ENGAGE_S
        wanted_ppm = (self._rate + self._apart / _BACK_IN_S) / PPM if certain else 0.0
        self.correction_ppm = max(-MOST_PPM, min(MOST_PPM, wanted_ppm))


_AFTER: Final = 24
_BEFORE: Final = _AFTER - 1
_TAPS: Final = _BEFORE + 1 + _AFTER
"""Samples around a moment of which its value is made; what follows it, 1 ms, is asked for ahead of its time."""

_PHASES: Final = 512
_KAISER: Final = 9.0
"""Errors below -88 dB up to 10.5 kHz."""

_HOMING_PPM: Final = 100.0
"""How fast the moments go back onto samples when there is nothing more to correct."""


def _taps() -> Samples:
    """What each of the samples around a moment counts, for every phase of it: shape (_PHASES + 1, _TAPS)."""
    away = np.arange(-_BEFORE, _AFTER + 1) - np.linspace(0, 1, _PHASES + 1)[:, None]
    window = np.i0(_KAISER * np.sqrt(np.maximum(0, 1 - (away / _AFTER) ** 2)))
    taps = np.sinc(away) * window
    scaled: Samples = (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)
    return scaled


class Vernier:
    """An output's edge: asks `on_block` for samples by the conversation's clock and hands them on by the device's.

    While `correction_ppm` says 0 every sample goes through as it is, without delay. Otherwise each is computed from the
    48 around its moment, 24 of which are asked for ahead. There is no joint between the two: a correction begins at a
    whole sample, and its end waits for the next one.
    """

    def __init__(self, on_block: Callable[[Samples, int, bool], None], correction_ppm: Callable[[], float]) -> None:
        self._on_block = on_block
        self._correction_ppm = correction_ppm
        self._table = _taps()
        self._held: Samples = np.zeros(_BEFORE, np.float32)
        self._at = float(_BEFORE)  # of the next moment, in what is held

    @property
    def ahead_ms(self) -> float:
        """How long before its time a sample is asked for."""
        return (len(self._held) - self._at) * 1_000 / SAMPLE_RATE

    def fill(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        """Fill one block, shape (n,), whose first sample the device converts at `dac_ns`."""
        correction_ppm = self._correction_ppm()
        if correction_ppm or self._at != _BEFORE:
            self._bend(out, dac_ns, xrun, self._step(correction_ppm, len(out)))
        else:
            self._copy(out, dac_ns, xrun)

    def _copy(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        ahead = min(len(out), len(self._held) - _BEFORE)
        out[:ahead] = self._held[_BEFORE : _BEFORE + ahead]
        self._on_block(out[ahead:], dac_ns + ahead * NS_PER_S // SAMPLE_RATE, xrun)
        self._held = np.concatenate((self._held, out[ahead:]))[len(out) :]

    def _step(self, correction_ppm: float, count: int) -> float:
        """Samples from one moment to the next."""
        if correction_ppm:
            return 1 + correction_ppm * PPM
        apart = round(self._at) - self._at
        most = count * _HOMING_PPM * PPM
        return 1 + max(-most, min(most, apart)) / count

    def _bend(self, out: Samples, dac_ns: int, xrun: bool, step: float) -> None:
        moments = self._at + step * np.arange(len(out))
        samples = moments.astype(np.intp)
        self._ask(samples[-1] + _AFTER + 1 - len(self._held), dac_ns, xrun, step)
        phases = (moments - samples) * _PHASES
        below = phases.astype(np.intp)
        taps, above = self._table.take(below, axis=0), self._table.take(below + 1, axis=0)
        above -= taps
        above *= (phases - below).astype(np.float32)[:, None]
        taps += above
        np.vecdot(self._windows()[samples - _BEFORE], taps, out=out)
        np.clip(out, -FULL_SCALE, FULL_SCALE, out=out)
        self._move(self._at + step * len(out))

    def _windows(self) -> Samples:
        """Each _TAPS neighbours of what is held: shape (n, _TAPS), a view."""
        held = self._held
        step = held.itemsize  # sliding_window_view, which checks much, takes half of a block's time
        return np.ndarray((len(held) - _TAPS + 1, _TAPS), np.float32, held, strides=(step, step))

    def _ask(self, count: int, dac_ns: int, xrun: bool, step: float) -> None:
        asked = np.zeros(max(0, count), np.float32)
        ahead_ns = round((len(self._held) - self._at) / step * NS_PER_S / SAMPLE_RATE)
        self._on_block(asked, dac_ns + ahead_ns, xrun)
        self._held = np.concatenate((self._held, asked))

    def _move(self, at: float) -> None:
        nearest = round(at)
        at = nearest if abs(at - nearest) < _WHOLE else at
        done = int(at) - _BEFORE
        self._held = self._held[done:]
        self._at = at - done


_WHOLE: Final = 1e-9
"""What a moment may be off a sample by rounding."""
