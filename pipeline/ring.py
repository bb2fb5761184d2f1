"""Single-writer, many-reader ring buffers of float32 samples in POSIX shared memory.

The writer never blocks, allocates nothing that lasts and never looks at a reader: when the ring is full it overwrites
the oldest samples. Each reader keeps its own position and learns exactly how many samples it lost when it was lapped.
Positions count samples since the ring was made; they are 64-bit and never wrap, so accounting is subtraction.

Why it is right. Two words of the header bound what may be read: POSITION, up to which samples are complete, and
RESERVED, up to which the writer may be writing at this moment. Sample `p` is intact while
`RESERVED - capacity <= p < POSITION`.

    writer: RESERVED = p + n | fence | copy n samples | fence | POSITION = p + n
    reader: read POSITION | fence | copy | fence | read RESERVED, discard what it says was being overwritten

The first writer's fence keeps a sample from changing before RESERVED says so, the second keeps POSITION from being seen
before the samples. The reader's fences order the same two pairs from the other side. Python itself orders nothing
between processes and Apple silicon reorders freely, so the fences are real instructions, from the package `membar`.
Every word is 8 bytes, aligned, and stored or loaded by one machine instruction, so that no word is ever seen half
written. A writer that is killed in mid-write leaves RESERVED above POSITION; its successor goes on from POSITION and
never lowers RESERVED, so that the half-written samples, and the old ones they destroyed, are read by no one.

Besides samples a ring holds an anchor, which dates a position on the monotonic clock; marks, one for each frame,
which say which microphone frame it belongs to; and counters, which outlive the process that keeps them.
"""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import membar
import numpy as np
import numpy.typing as npt
import posix_ipc

from pipeline.errors import RingError
from pipeline.topology import FRAME, SAMPLE_RATE

Samples = npt.NDArray[np.float32]
T = TypeVar("T")

LAYOUT: Final = 1
"""Version of the layout below. A ring of another version is refused."""

_MAGIC: Final = int.from_bytes(b"PLRING\r\n", "little")
_WORD: Final = 8
_HEADER_BYTES: Final = 4_096
_MARK_WORDS: Final = 8
_NAME_MAX: Final = 30  # macOS: PSHMNAMLEN is 31, with the NUL

# Words of the header. Those of different writers are 128 bytes apart, a cache line of Apple silicon.
_MAGIC_AT: Final = 0
_LAYOUT_AT: Final = 1
_RATE_AT: Final = 2
_CAPACITY_AT: Final = 3
_FRAME_AT: Final = 4
_MARKS_AT: Final = 5
_GENERATION_AT: Final = 16
_POSITION_AT: Final = 17
_RESERVED_AT: Final = 18
_END_AT: Final = 19
_MARK_COUNT_AT: Final = 20
_PAUSED_AT: Final = 21
_ANCHOR_VERSION_AT: Final = 32
_ANCHOR_POSITION_AT: Final = 33
_ANCHOR_NS_AT: Final = 34
_DRIFT_AT: Final = 35
_LEDGER_VERSION_AT: Final = 48
_COUNTERS_AT: Final = 49
_CONSUMER_VERSION_AT: Final = 64
_CONSUMED_AT: Final = 65
_DROPPED_AT: Final = 66
_TAKEN_AT: Final = 67

_NO_END: Final = -1
_RETRIES: Final = 50
"""Readings of what a living writer changes in microseconds before it is taken for dead."""

COUNTERS: Final = ("concealed", "gaps", "xruns", "cleaned")
"""What a ring's writer counts besides samples: samples of concealment, gaps in the audio that were concealed,
over- and underruns that the device reported, samples that were not finite or beyond full scale."""

_COUNTER_AT: Final = {name: _COUNTERS_AT + index for index, name in enumerate(COUNTERS)}


class RingExistsError(RingError):
    """A ring is to be made where there is one already."""


class Mark(NamedTuple):
    """What is known of one frame. Times are monotonic ns."""

    position: int
    """Of the frame's first sample in this ring."""
    frame: int
    """The microphone frame that this frame is, or answers; -1 where there is none."""
    captured_ns: int
    """When that microphone frame's first sample was converted by the device."""
    start_ns: int
    """When work on the frame began: in `heard`, when its first sample reaches the speaker."""
    end_ns: int
    """When the frame was complete and in the ring."""


class Anchor(NamedTuple):
    """The sample at `position` was, or will be, converted by the device at `time_ns`, monotonic."""

    position: int
    time_ns: int


class Ledger(NamedTuple):
    """A ring's counts at one moment, in samples where the unit is not another."""

    written: int
    consumed: int
    dropped: int
    waiting: int
    """Samples written that the consumer's reader has not come to."""
    concealed: int
    gaps: int
    xruns: int
    cleaned: int
    generation: int


def segment_name(folder: Path, ring: str) -> str:
    """The shared-memory name of `ring` in the run whose folder is `folder`.

    It follows from the folder, so that a later run of the same name finds, and clears, what a dead one left.
    """
    name = f"/pl-{_digest(os.fsencode(folder.resolve())):012x}-{ring}"
    if len(name) > _NAME_MAX:
        raise ValueError(f"ring name {ring!r} is too long by {len(name) - _NAME_MAX} characters")
    return name


def _digest(data: bytes) -> int:
    """FNV-1a of 64 bits, folded to 48: that of `hashlib` would load OpenSSL, 4 MB in every process."""
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest >> 48 ^ digest & 0xFFFFFFFFFFFF


def unlink(name: str) -> bool:
    """Remove the segment called `name`; False if there was none."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return False
    return True


class Ring:
    """A mapped ring: its geometry, and the words and samples that writer and readers share.

    `capacity` is in samples and a whole number of frames. Close it when done; the segment itself lives until `unlink`.
    """

    def __init__(self, name: str, memory: mmap.mmap) -> None:
        self.name = name
        self._memory = memory
        self.words = memoryview(memory)[:_HEADER_BYTES].cast("q")
        self.capacity = self.words[_CAPACITY_AT]
        self.mark_capacity = self.words[_MARKS_AT]
        marks_end = _HEADER_BYTES + self.mark_capacity * _MARK_WORDS * _WORD
        self.marks = memoryview(memory)[_HEADER_BYTES:marks_end].cast("q")
        self.data: Samples = np.frombuffer(memory, np.float32, self.capacity, marks_end)

    @classmethod
    def create(cls, name: str, seconds: float) -> "Ring":
        """Make a segment that holds `seconds` of samples, rounded up to whole frames.

        Raises RingError if the segment is there already, or if there is not enough shared memory.
        """
        frames = max(2, -(-round(seconds * SAMPLE_RATE) // FRAME))
        capacity = frames * FRAME
        size = _HEADER_BYTES + frames * _MARK_WORDS * _WORD + capacity * 4
        try:
            segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            raise RingExistsError(f"shared memory {name} exists already: is the run up?") from None
        except (posix_ipc.PermissionsError, OSError, ValueError) as error:
            raise RingError(f"shared memory {name} of {size} bytes cannot be made: {error}") from None
        try:
            # Without it a full /dev/shm is found out by a SIGBUS in the audio callback.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(segment.fd, 0, size)
            memory = mmap.mmap(segment.fd, size)
        except OSError as error:
            unlink(name)
            reason = "no space left in /dev/shm" if error.errno == errno.ENOSPC else str(error)
            raise RingError(f"shared memory {name} of {size} bytes cannot be made: {reason}") from None
        finally:
            segment.close_fd()
        words = memoryview(memory)[:_HEADER_BYTES].cast("q")
        words[_LAYOUT_AT] = LAYOUT
        words[_RATE_AT] = SAMPLE_RATE
        words[_CAPACITY_AT] = capacity
        words[_FRAME_AT] = FRAME
        words[_MARKS_AT] = frames
        words[_END_AT] = _NO_END
        membar.wmb()
        words[_MAGIC_AT] = _MAGIC  # last: whoever sees it sees the rest
        words.release()
        return cls(name, memory)

    @classmethod
    def open(cls, name: str, seconds: float) -> "Ring":
        """Attach to a segment, or make it where there is none. Raises RingError."""
        try:
            return cls.create(name, seconds)
        except RingExistsError:
            return cls.attach(name)

    @classmethod
    def attach(cls, name: str) -> "Ring":
        """Map a segment that another process made.

        Raises RingError if there is none, or if it is no ring of this layout, rate and frame size.
        """
        try:
            segment = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError:
            raise RingError(f"shared memory {name} does not exist: is the run up?") from None
        except (posix_ipc.PermissionsError, OSError) as error:
            raise RingError(f"shared memory {name} cannot be opened: {error}") from None
        try:
            size = os.fstat(segment.fd).st_size  # macOS rounds it up to a page
            if size < _HEADER_BYTES:
                raise RingError(f"shared memory {name} is {size} bytes, too short for a ring")
            memory = mmap.mmap(segment.fd, size)
        finally:
            segment.close_fd()
        words = memoryview(memory)[:_HEADER_BYTES].cast("q")
        magic = words[_MAGIC_AT]
        membar.rmb()
        found = (words[_LAYOUT_AT], words[_RATE_AT], words[_FRAME_AT])
        needed = _HEADER_BYTES + words[_MARKS_AT] * _MARK_WORDS * _WORD + words[_CAPACITY_AT] * 4
        words.release()
        if magic != _MAGIC:
            memory.close()
            raise RingError(f"shared memory {name} is no ring of this program")
        if found != (LAYOUT, SAMPLE_RATE, FRAME) or size < needed:
            memory.close()
            raise RingError(
                f"ring {name} has layout {found[0]}, {found[1]} Hz, frames of {found[2]}; "
                f"expected layout {LAYOUT}, {SAMPLE_RATE} Hz, frames of {FRAME}"
            )
        return cls(name, memory)

    @property
    def position(self) -> int:
        """Samples written so far."""
        return self.words[_POSITION_AT]

    @property
    def generation(self) -> int:
        """How many writers this ring has had."""
        return self.words[_GENERATION_AT]

    @property
    def end(self) -> int | None:
        """The position at which the stream ended, or None while it goes on."""
        end = self.words[_END_AT]
        return None if end == _NO_END else end

    @property
    def paused(self) -> bool:
        """Whether the writer writes nothing, and means it."""
        return bool(self.words[_PAUSED_AT])

    @property
    def mark_count(self) -> int:
        """Marks made so far. In the rings `capture` and `playback` mark `i` belongs to the frame at `i * FRAME`."""
        return self.words[_MARK_COUNT_AT]

    @property
    def anchor(self) -> Anchor | None:
        """The newest anchor, or None if none was set. None too if the writer died while setting it."""
        words = self.words
        for _ in range(_RETRIES):
            version = words[_ANCHOR_VERSION_AT]
            membar.rmb()
            anchor = Anchor(words[_ANCHOR_POSITION_AT], words[_ANCHOR_NS_AT])
            membar.rmb()
            if version == words[_ANCHOR_VERSION_AT] and not version & 1:
                return anchor if version else None
        return None

    @property
    def drift_ppm(self) -> float | None:
        """How much faster the microphone's clock is than that of the device this ring is sent to; None if unknown."""
        known = self.words[_DRIFT_AT]
        return (known >> 1) / 1_000 if known else None

    @drift_ppm.setter
    def drift_ppm(self, ppm: float | None) -> None:
        # In thousandths, above a bit which says that it is known: 0 is what a new ring holds.
        self.words[_DRIFT_AT] = 0 if ppm is None else round(ppm * 1_000) << 1 | 1

    def count(self, counter: str, amount: int) -> None:
        """Add to one of COUNTERS, which are the writer's to keep."""
        self.words[_COUNTER_AT[counter]] += amount

    def mark(self, index: int) -> Mark | None:
        """Mark number `index`, or None if it is not made yet or was overwritten."""
        count = self.mark_count
        membar.rmb()
        if not max(0, count - self.mark_capacity) <= index < count:
            return None
        at = index % self.mark_capacity * _MARK_WORDS
        mark = Mark(*self.marks[at : at + len(Mark._fields)])
        membar.rmb()
        # Strictly less: the writer may be at work on the mark that follows the last one it announced.
        return mark if self.mark_count - index < self.mark_capacity else None

    def ledger(self) -> Ledger:
        """The counts now. The consumer's come first, so that it never seems ahead of the writer."""
        words = self.words
        consumed, dropped, taken = _steadily(words, _CONSUMER_VERSION_AT, self._consumer_counts)
        if words[_CONSUMER_VERSION_AT] & 1:
            taken = consumed + dropped  # killed in the middle of a change, which its successor will make again
        membar.rmb()
        concealed, gaps, xruns, cleaned = words[_COUNTERS_AT : _COUNTERS_AT + len(COUNTERS)]
        written = words[_POSITION_AT]
        generation = words[_GENERATION_AT]
        return Ledger(written, consumed, dropped, written - taken, concealed, gaps, xruns, cleaned, generation)

    def _consumer_counts(self) -> tuple[int, int, int]:
        return self.words[_CONSUMED_AT], self.words[_DROPPED_AT], self.words[_TAKEN_AT]

    @property
    def changing(self) -> bool:
        """Whether the writer is between `begin` and `commit`, or died there."""
        return bool(self.words[_LEDGER_VERSION_AT] & 1)

    def steadily(self, reading: Callable[[], T]) -> T:
        """Call `reading` until no change of this ring's writer (RingWriter.begin) fell into it, and return its result.

        Gives up, with the last result, when the writer seems to have died in the middle of a change.
        """
        return _steadily(self.words, _LEDGER_VERSION_AT, reading)

    def close(self) -> None:
        """Unmap the ring. Readers and writers of it are of no use afterwards."""
        self.words.release()
        self.marks.release()
        self.data = np.empty(0, np.float32)
        self._memory.close()


def _steadily(words: memoryview, version_at: int, reading: Callable[[], T]) -> T:
    for _ in range(_RETRIES):
        version = words[version_at]
        membar.rmb()
        result = reading()
        membar.rmb()
        if version == words[version_at] and not version & 1:
            break
    return result


class RingWriter:
    """The one writer of a ring. To make one is to become the writer: it bumps the generation."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._words = ring.words
        self._capacity = ring.capacity
        words = self._words
        # A predecessor that was killed may have left a version odd, or marks for a frame that it never finished.
        words[_ANCHOR_VERSION_AT] += words[_ANCHOR_VERSION_AT] & 1
        words[_LEDGER_VERSION_AT] += words[_LEDGER_VERSION_AT] & 1
        words[_MARK_COUNT_AT] = min(words[_MARK_COUNT_AT], words[_POSITION_AT] // FRAME)
        words[_END_AT] = _NO_END
        words[_PAUSED_AT] = 0
        words[_DRIFT_AT] = 0
        membar.wmb()
        words[_GENERATION_AT] += 1

    @property
    def position(self) -> int:
        """Samples written so far, by this writer and its predecessors."""
        return self._words[_POSITION_AT]

    @property
    def waiting(self) -> int:
        """Samples written that the ring's consumer has not taken."""
        taken = self._words[_TAKEN_AT]
        membar.rmb()  # what is written on the strength of this is written after the consumer's copy
        return self._words[_POSITION_AT] - taken

    @property
    def room(self) -> int:
        """Samples that may be written now and overwrite none that the ring's consumer has not taken.

        `write` does not ask: who wants to lose nothing waits for room first.
        """
        return self._capacity - self.waiting

    def write(self, samples: Samples) -> None:
        """Append `samples`, shape (n,), n at most the capacity. Never blocks; overwrites the oldest."""
        count = len(samples)
        if count > self._capacity:
            raise ValueError(f"{count} samples do not fit a ring of {self._capacity}")
        words, data, capacity = self._words, self.ring.data, self._capacity
        position = words[_POSITION_AT]
        stop = position + count
        if stop > words[_RESERVED_AT]:
            words[_RESERVED_AT] = stop
        membar.wmb()
        at = position % capacity
        first = capacity - at
        if count <= first:
            data[at : at + count] = samples
        else:
            data[at:] = samples[:first]
            data[: count - first] = samples[first:]
        membar.wmb()
        words[_POSITION_AT] = stop

    def mark(self, position: int, frame: int, captured_ns: int, start_ns: int, end_ns: int) -> None:
        """Say what is known of the frame at `position`. Call it before the write that completes the frame."""
        count = self._words[_MARK_COUNT_AT]
        at = count % self.ring.mark_capacity * _MARK_WORDS
        marks = self.ring.marks
        # The count of the mark before comes first: a reader takes this slot for an old mark's until it sees it.
        membar.wmb()
        marks[at] = position
        marks[at + 1] = frame
        marks[at + 2] = captured_ns
        marks[at + 3] = start_ns
        marks[at + 4] = end_ns
        membar.wmb()
        self._words[_MARK_COUNT_AT] = count + 1

    def anchor(self, position: int, time_ns: int) -> None:
        """Date `position` on the monotonic clock: when the device converted, or will convert, that sample."""
        words = self._words
        words[_ANCHOR_VERSION_AT] += 1
        membar.wmb()
        words[_ANCHOR_POSITION_AT] = position
        words[_ANCHOR_NS_AT] = time_ns
        membar.wmb()
        words[_ANCHOR_VERSION_AT] += 1

    def count(self, counter: str, amount: int = 1) -> None:
        """Add to one of COUNTERS."""
        self.ring.count(counter, amount)

    def begin(self) -> None:
        """Begin a change of several counts, of this ring or the one it is fed from, that `steadily` sees as one."""
        self._words[_LEDGER_VERSION_AT] += 1
        membar.wmb()

    def commit(self) -> None:
        """End the change that `begin` began."""
        membar.wmb()
        self._words[_LEDGER_VERSION_AT] += 1

    def pause(self, paused: bool) -> None:
        """Say that the silence that follows is meant, or that it is over."""
        self._words[_PAUSED_AT] = paused

    def end(self) -> None:
        """Say that nothing follows the samples written so far."""
        membar.wmb()
        self._words[_END_AT] = self._words[_POSITION_AT]


class RingReader:
    """A reader with a position of its own, of which neither the writer nor another reader knows.

    It starts at the newest sample, or at `position` if that is given.
    """

    def __init__(self, ring: Ring, position: int | None = None) -> None:
        self.ring = ring
        self.position = ring.position if position is None else position
        """Of the next sample to read."""
        self.lost = 0
        """Samples that were overwritten before they were read."""
        self._words = ring.words
        self._capacity = ring.capacity

    @property
    def available(self) -> int:
        """Samples between this reader and the writer; more than the capacity if the reader was lapped."""
        return self._words[_POSITION_AT] - self.position

    @property
    def ended(self) -> bool:
        """The stream has ended and everything in it was read."""
        end = self._words[_END_AT]
        return end != _NO_END and self.position >= end

    def read(self, out: Samples) -> int:
        """Copy the next samples into `out`, shape (n,), and return how many: 0 if there are none.

        Samples that were overwritten are passed over and added to `lost`.
        """
        words = self._words
        head = words[_POSITION_AT]
        membar.rmb()
        lost = words[_RESERVED_AT] - self._capacity - self.position
        if lost > 0:
            self.position += lost
            self.lost += lost
        count = min(len(out), head - self.position)
        if count <= 0:
            return 0
        self._copy(out, count)
        membar.rmb()
        lost = words[_RESERVED_AT] - self._capacity - self.position
        if lost <= 0:
            self.position += count
            return count
        # The writer came by while the copy was made: its first `lost` samples may be of either lap.
        self.lost += lost
        self.position += max(count, lost)
        intact = max(0, count - lost)
        out[:intact] = out[count - intact : count]
        return intact

    def _copy(self, out: Samples, count: int) -> None:
        data = self.ring.data
        at = self.position % self._capacity
        first = self._capacity - at
        if count <= first:
            out[:count] = data[at : at + count]
        else:
            out[:first] = data[at:]
            out[first:count] = data[: count - first]


class Consumer(RingReader):
    """The reader that a ring exists for. Its counts are in the ring, so that a successor goes on where it was killed.

    A sample is consumed when the work on it is done, not when it was copied: after `read`, call `consume` or `drop`.
    Samples that were overwritten before they were read count as dropped at once. Whoever leaves some of what was read
    uncounted for a while, between other counts, brackets it by `RingWriter.begin` and `commit` of another ring.
    """

    def __init__(self, ring: Ring) -> None:
        words = ring.words
        super().__init__(ring, position=words[_CONSUMED_AT] + words[_DROPPED_AT])
        words[_TAKEN_AT] = self.position
        words[_CONSUMER_VERSION_AT] += words[_CONSUMER_VERSION_AT] & 1

    def read(self, out: Samples) -> int:
        count = super().read(out)
        if self.lost:
            self._count(_DROPPED_AT, self.lost, self._words[_TAKEN_AT] + self.lost)
            self.lost = 0
        return count

    def consume(self, count: int) -> None:
        """Count `count` samples that were read as consumed."""
        self._count(_CONSUMED_AT, count, self.position)

    def drop(self, count: int) -> None:
        """Count `count` samples that were read as dropped."""
        self._count(_DROPPED_AT, count, self.position)

    def skip(self, count: int) -> None:
        """Pass over the next `count` samples, which are dropped."""
        self.position += count
        self._count(_DROPPED_AT, count, self.position)

    def _count(self, counter_at: int, count: int, taken: int) -> None:
        words = self._words
        words[_CONSUMER_VERSION_AT] += 1
        membar.wmb()
        words[counter_at] += count
        words[_TAKEN_AT] = taken
        membar.wmb()
        words[_CONSUMER_VERSION_AT] += 1
