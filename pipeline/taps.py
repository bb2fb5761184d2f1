"""Taps: a run's audio, read by another program while it runs. The stages do not know of them, and cannot be slowed.

A `Tap` reads one ring, a `Conversation` two of them, aligned in time. Both are iterated over, with `for` or with
`async for`, and end with the run: a later run of the same name needs a new one. A block that is not there yet is
slept for; nothing polls at a rate.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, Literal, NamedTuple, Self

import numpy as np

from pipeline.errors import ConfigError
from pipeline.ring import Anchor, Ring, RingReader, Samples
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns
from pipeline.topology import SAMPLE_RATE

RingName = Literal["capture", "heard", "playback"]

BLOCK_MS_MIN: Final = 1.0
BLOCK_MS_MAX: Final = 1_000.0

JUMP_NS: Final = 100 * NS_PER_MS
"""A date that is off by more is no drift: a device was opened anew, or a stage was started again."""

CORRECT_FROM: Final = 2 * SAMPLE_RATE // 1_000
"""Samples by which the sides of a conversation may be apart before that is corrected: 2 ms."""

CORRECT_TO: Final = SAMPLE_RATE // 2_000
"""Samples at which correcting ends: 0.5 ms."""

GENTLY: Final = 100
"""Samples of which one at most is left out or put in."""

LATE_NS: Final = 500 * NS_PER_MS
"""How long a conversation waits for what was sent to the speaker; then there is silence in its place."""

ABSENT_NS: Final = 2 * NS_PER_S
"""How long it waits for the microphone."""

_STEADY: Final = 8
"""Blocks over which the distance of the two sides is averaged: dates jitter."""

_FLOOR_S: Final = 0.004
_LONGEST_S: Final = 0.08
_LOOK_AFTER_NS: Final = 250 * NS_PER_MS
_LINES: Final = 64


class Block(NamedTuple):
    """A piece of audio, and where and when it belongs."""

    samples: Samples
    """Shape (n,); of a conversation (n, 2), left the microphone, right what was sent to the speaker."""
    position: int
    """Of the first sample in its ring; of a conversation in rows from its beginning."""
    time_ns: int
    """When the device converted, or will convert, the first sample, on the monotonic clock."""
    lost: int
    """Samples before this block that were overwritten before they were read."""


def samples_in(duration_ns: float) -> int:
    """How many samples a duration is."""
    return round(duration_ns * SAMPLE_RATE / NS_PER_S)


def ns_of(samples: int) -> int:
    """How long so many samples are."""
    return samples * NS_PER_S // SAMPLE_RATE


def block_of(block_ms: float) -> int:
    """How many samples a block of so many ms has. Raises ConfigError."""
    if not BLOCK_MS_MIN <= block_ms <= BLOCK_MS_MAX:
        raise ConfigError(f"block_ms {block_ms!r}: expected a number of ms from {BLOCK_MS_MIN:g} to {BLOCK_MS_MAX:g}")
    return samples_in(block_ms * NS_PER_MS)


def zeros(count: int) -> Samples:
    """`count` samples of silence."""
    return np.zeros(count, np.float32)


class Line(NamedTuple):
    """Positions from `start` on, dated by `anchor`."""

    start: int
    anchor: Anchor

    def time_ns(self, position: int) -> int:
        """When the sample at `position` is converted."""
        return self.anchor.time_ns + ns_of(position - self.anchor.position)

    def position(self, time_ns: int) -> float:
        """What is converted at `time_ns`; between two samples it is a fraction."""
        return self.anchor.position + (time_ns - self.anchor.time_ns) * SAMPLE_RATE / NS_PER_S


class Dates:
    """Which position of a ring belongs to which time, from the anchors that were seen.

    A new anchor replaces the last. One that is off by more than JUMP_NS begins a new line at what was written when it
    was looked last: until a device is opened anew nothing is written.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._seen = 0

    def see(self, position: int, anchor: Anchor | None) -> None:
        """`position` samples were written, and then `anchor` was the newest."""
        if anchor is None:
            return
        last = self.lines[-1] if self.lines else None
        if last is None:
            self.lines = [Line(0, anchor)]
        elif abs(last.time_ns(anchor.position) - anchor.time_ns) > JUMP_NS:
            self.lines = [*self.lines[1 - _LINES :], Line(min(self._seen, anchor.position), anchor)]
        elif anchor != last.anchor:
            self.lines[-1] = Line(last.start, anchor)
        self._seen = position

    def at(self, position: int) -> tuple[Line, int | None]:
        """The line that dates `position`, and the position where the next one begins."""
        after = None
        for line in reversed(self.lines[1:]):
            if position >= line.start:
                return line, after
            after = line.start
        return self.lines[0], after

    def when(self, time_ns: int) -> tuple[Line, Line | None]:
        """The line that is in force at a time, and the next one."""
        after = None
        for line in reversed(self.lines[1:]):
            if time_ns >= line.time_ns(line.start):
                return line, after
            after = line
        return self.lines[0], after


def _newest_date(ring: Ring) -> Anchor | None:
    """The ring's anchor; where no device dates it, when its last frame was written."""
    if (anchor := ring.anchor) is not None:
        return anchor
    mark = ring.mark(ring.mark_count - 1)
    return None if mark is None else Anchor(mark.position, mark.end_ns)


class _Source:
    """A ring with its dates, read from any position."""

    def __init__(self, ring: Ring, position: int | None = None) -> None:
        self.ring = ring
        self.dates = Dates()
        self._reader = RingReader(ring, position)
        self.look()

    @property
    def position(self) -> int:
        """Of the sample that `read` begins with."""
        return self._reader.position

    def look(self) -> None:
        """Take note of what the ring's dates are now."""
        written = self.ring.position
        self.dates.see(written, _newest_date(self.ring))

    def read(self, out: Samples) -> tuple[int, int]:
        """Copy what follows into `out`; returns how many samples that are, and how many before them were lost."""
        before = self._reader.lost
        return self._reader.read(out), self._reader.lost - before

    def fetch(self, position: int, out: Samples) -> int:
        """Copy what begins at `position` into `out`, and leave `out` as it is where there is nothing (any more).

        Returns how many samples were overwritten before.
        """
        self._reader.position = position
        copied = np.empty(len(out), np.float32)
        count, lost = self.read(copied)
        lost = min(lost, len(out))
        count = min(count, len(out) - lost)
        out[lost : lost + count] = copied[:count]
        return lost


class _Blocks(ABC):
    """What Tap and Conversation have in common: waiting, and the end."""

    def __init__(self, is_over: Callable[[], bool], clock: Callable[[], int]) -> None:
        self._is_over = is_over
        self._clock = clock
        self._looked_ns = clock()
        self._tries = 0
        self._finishing = False
        self.ended = False
        """Whether nothing comes any more."""

    @abstractmethod
    def _take(self) -> Block | None:
        """The next block if it is there; when finishing, what there is of it."""

    @abstractmethod
    def _missing(self) -> int:
        """Samples that have to come before it is there."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the shared memory."""

    def poll(self) -> Block | None:
        """The next block, or None if it is not there yet."""
        block = self._take()
        if block is None and not self._finishing and self._sees_end():
            self._finishing = True
            block = self._take()
        self._tries = 0 if block is not None else self._tries + 1
        self.ended = block is None and self._finishing
        return block

    def _sees_end(self) -> bool:
        now = self._clock()
        if now - self._looked_ns < _LOOK_AFTER_NS:
            return False
        self._looked_ns = now
        return self._is_over()

    def finish(self) -> None:
        """Let what is there now be the last: `poll` and the iteration end with it."""
        self._finishing = True

    def wait_s(self) -> float:
        """How long to sleep before the next `poll`: first until the block should be there, then longer each time."""
        if self._tries <= 1:
            return max(_FLOOR_S, self._missing() / SAMPLE_RATE)
        return min(_LONGEST_S, _FLOOR_S * 2.0 ** min(self._tries - 2, 8))

    def __iter__(self) -> Iterator[Block]:
        while not self.ended:
            if (block := self.poll()) is not None:
                yield block
            elif not self.ended:
                time.sleep(self.wait_s())

    async def __aiter__(self) -> AsyncIterator[Block]:
        while not self.ended:
            if (block := self.poll()) is not None:
                yield block
            elif not self.ended:
                await asyncio.sleep(self.wait_s())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tap(_Blocks):
    """One ring, from now or from `position` on, in blocks of `block` samples.

    The last block is shorter, and so is one that ends where a device was opened anew: within a block time is even.
    """

    def __init__(
        self,
        ring: Ring,
        block: int,
        position: int | None = None,
        *,
        is_over: Callable[[], bool],
        clock: Callable[[], int] = now_ns,
    ) -> None:
        super().__init__(is_over, clock)
        self._source = _Source(ring, position)
        self._block = block
        self.lost = 0
        """Samples that were overwritten before they were read, in all."""

    @property
    def stream_ended(self) -> bool:
        """Whether the ring's stream is at its end, which comes before the run's."""
        return self._source.ring.end is not None

    @property
    def position(self) -> int:
        """Of the next sample."""
        return self._source.position

    @property
    def written(self) -> int:
        """Samples from there on that are written."""
        return self._source.ring.position - self._source.position

    def _missing(self) -> int:
        return self._block - self.written

    def _take(self) -> Block | None:
        return self.read(short=self._finishing)

    def read(self, *, short: bool) -> Block | None:
        """The next block; None if it is not there, or with `short` nothing of it."""
        source = self._source
        source.look()
        if not source.dates.lines:
            return None
        position = source.position
        until = source.dates.at(position)[1]
        count = self._block if until is None else min(self._block, until - position)
        if self.written < count and not (short or self.stream_ended):
            return None
        samples = np.empty(count, np.float32)
        got, lost = source.read(samples)
        self.lost += lost
        if not got:
            return None
        first = source.position - got
        return Block(samples[:got], first, source.dates.at(first)[0].time_ns(first), first - position)

    def close(self) -> None:
        self._source.ring.close()


class Conversation(_Blocks):
    """Both sides: left what the microphone heard, right what was sent to the speaker at the same moment.

    The microphone is the clock: each of its samples is a row, and where samples of it were lost, or none came, there is
    silence for as long. The other side is fitted to it by the dates of both. As long as they are less than 2 ms
    apart every sample of it is as it was sent, in order. More is corrected by leaving out or putting in one sample of a
    hundred at most, until it is under 0.5 ms; more than 100 ms by silence, or a skip, at once.
    """

    def __init__(
        self,
        microphone: Ring,
        speaker: Ring,
        block: int,
        position: int | None = None,
        *,
        is_over: Callable[[], bool],
        clock: Callable[[], int] = now_ns,
    ) -> None:
        super().__init__(is_over, clock)
        self._left = Tap(microphone, block, position, is_over=lambda: False, clock=clock)
        self._right = _Fitted(speaker)
        self._block = block
        self._heard: Block | None = None
        self._turn: Block | None = None
        self._due_ns: int | None = None
        self._rows = 0
        self._overlap = 0

    @property
    def lost(self) -> int:
        """Samples of either side that were overwritten before they were read. Silence stands for them."""
        return self._left.lost + self._overlap + self._right.lost

    @property
    def written_s(self) -> float:
        """Seconds of the microphone that are there and were not given out."""
        return self._left.written / SAMPLE_RATE

    def _missing(self) -> int:
        return 0 if self._turn is not None else self._left._missing()

    def _take(self) -> Block | None:
        self._right.look()
        if self._turn is None:
            self._turn = self._next()
        turn = self._turn
        if turn is None:
            return None
        count = len(turn.samples)
        late = self._clock() > turn.time_ns + ns_of(count) + LATE_NS
        if not (late or self._finishing or self._right.has(turn.time_ns, count)):
            return None
        rows = np.stack((turn.samples, self._right.take(turn.time_ns, count)), axis=1)
        self._turn = None
        self._rows += count
        return Block(rows, self._rows - count, turn.time_ns, turn.lost)

    def _next(self) -> Block | None:
        """The next block of the left side, silence where it has none."""
        if self._heard is None:
            self._heard = self._receive(short=self._finishing)
        block = self._heard
        if block is None:
            return self._absence()
        gap = self._gap(block)
        if gap > 0:
            return self._say(zeros(min(gap, self._block)), self._due_ns or 0, 0)
        self._heard = None
        self._overlap -= gap
        return self._say(block.samples[-gap:], block.time_ns + ns_of(-gap), block.lost)

    def _receive(self, *, short: bool) -> Block | None:
        while (block := self._left.read(short=short)) is not None:
            begin_ns = block.time_ns - ns_of(block.lost)
            if self._due_ns is None or abs(begin_ns - self._due_ns) <= JUMP_NS:
                self._due_ns = begin_ns  # it is the clock
            if self._gap(block) > -len(block.samples):
                break
            self._overlap += len(block.samples)
        return block

    def _gap(self, block: Block) -> int:
        """Rows of silence that are due before a block; negative, where its first samples come too late."""
        return samples_in(block.time_ns - (self._due_ns or 0))

    def _absence(self) -> Block | None:
        """Silence, where the microphone has been waited for long enough."""
        if self._due_ns is None or self._finishing:
            return None
        patience_ns = 0 if self._left.stream_ended else ABSENT_NS
        if self._clock() < self._due_ns + ns_of(self._block) + patience_ns:
            return None
        self._heard = self._receive(short=True)
        return self._next() if self._heard is not None else self._say(zeros(self._block), self._due_ns, 0)

    def _say(self, samples: Samples, time_ns: int, lost: int) -> Block:
        self._due_ns = time_ns + ns_of(len(samples))
        return Block(samples, self._rows, time_ns, lost)

    def close(self) -> None:
        self._left.close()
        self._right.close()


class _Fitted:
    """A ring whose samples are given out by time, as another clock counts it."""

    def __init__(self, ring: Ring) -> None:
        self._source = _Source(ring)
        self._at: int | None = None
        self._given = 0
        self._apart = 0.0
        self._correcting = False
        self.lost = 0

    def look(self) -> None:
        self._source.look()

    def has(self, time_ns: int, count: int) -> bool:
        """Whether `count` samples from `time_ns` on are written."""
        dates = self._source.dates
        if not dates.lines:
            return False
        last = dates.lines[-1]
        at = max(self._beginning(last, time_ns), last.start)
        # What is to be left out has to be there too.
        surplus = count // GENTLY if last.position(time_ns) - at > CORRECT_TO else 0
        return self._source.ring.position >= at + count + surplus

    def take(self, time_ns: int, count: int) -> Samples:
        """Those samples, with silence where there are none."""
        out = zeros(count)
        done = 0
        while done < count and self._source.dates.lines:
            now = time_ns + ns_of(done)
            line, after = self._source.dates.when(now)
            stop = count
            if after is not None:
                stop = min(count, done + max(1, samples_in(after.time_ns(after.start) - now)))
            self._fill(out[done:stop], now, line, after)
            done = stop
        return out

    def _beginning(self, line: Line, time_ns: int) -> int:
        """The position that follows, which is the one that the dates ask for if it is not near it."""
        wanted = line.position(time_ns)
        if self._at is None or abs(wanted - self._at) > samples_in(JUMP_NS):
            return round(wanted)
        return self._at

    def _fill(self, out: Samples, time_ns: int, line: Line, after: Line | None) -> None:
        at = self._beginning(line, time_ns)
        apart = line.position(time_ns) - at
        self._apart = apart if at != self._at else self._apart + (apart - self._apart) / _STEADY
        correction = self._correction(len(out), self._source.ring.position - at - len(out))
        source = zeros(len(out) + correction)
        self._fetch(at, source, after)
        out[:] = _fitted(source, correction)
        self._at = at + len(source)
        self._apart -= correction

    def _correction(self, count: int, spare: int) -> int:
        """Samples to leave out, of the `spare` ones that follow the next `count`; negative, to put in."""
        size = abs(self._apart)
        self._correcting = size > (CORRECT_TO if self._correcting else CORRECT_FROM)
        if not self._correcting:
            return 0
        most = min(count // GENTLY, int(size))
        return max(0, min(most, spare)) if self._apart > 0 else -most

    def _fetch(self, at: int, out: Samples, after: Line | None) -> None:
        """Copy what begins at `at`; nothing twice, and nothing that belongs to a later line."""
        begin = max(at, self._given, 0)
        written = self._source.ring.position
        end = min(at + len(out), written if after is None else after.start)
        if begin < end:
            self.lost += self._source.fetch(begin, out[begin - at : end - at])
            self._given = end

    def close(self) -> None:
        self._source.ring.close()


def _fitted(samples: Samples, surplus: int) -> Samples:
    """`samples` with `surplus` of them left out, or put in where it is negative, evenly: the mean of two neighbours
    takes the place of both, or comes between them."""
    count = abs(surplus)
    if not count:
        return samples
    at = (np.arange(count) + 1) * (len(samples) // (count + 1))
    means = (samples[at - 1] + samples[at]) / 2
    if surplus < 0:
        return np.insert(samples, at, means)
    kept = samples.copy()
    kept[at - 1] = means
    return np.delete(kept, at)


def _identity(folder: RunFolder) -> tuple[int, int] | None:
    """What two runs of one name differ in."""
    try:
        found = folder.control.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _end_of(folder: RunFolder) -> Callable[[], bool]:
    """Tells whether the run that is up now is so no more."""
    identity = _identity(folder)
    return lambda: _identity(folder) != identity or not folder.is_locked()


def tap(folder: RunFolder, ring: RingName, block: int) -> Tap:
    """A tap on a ring of the run, from now on. Raises RingError if there is none."""
    return Tap(Ring.attach(folder.segment(ring)), block, is_over=_end_of(folder))


def conversation(folder: RunFolder, block: int, position: int | None = None) -> Conversation:
    """Both sides of the run, from now or from `position` in the capture ring on. Raises RingError if there is none."""
    microphone, speaker = (Ring.attach(folder.segment(ring)) for ring in ("capture", "heard"))
    return Conversation(microphone, speaker, block, position, is_over=_end_of(folder))
