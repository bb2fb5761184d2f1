"""The ring against a plain model of it, its layout and its life, in one process."""

import contextlib
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import posix_ipc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline import ring as rings
from pipeline.errors import RingError
from pipeline.messages import Accounting
from pipeline.ring import Consumer, Ring, RingReader, RingWriter
from pipeline.topology import FRAME, SAMPLE_RATE
from tests.ring_writer import positions

TWO_FRAMES_S = 2 * FRAME / SAMPLE_RATE


@pytest.fixture
def name() -> Iterator[str]:
    segment = f"/pl-test-{os.getpid()}"
    rings.unlink(segment)
    yield segment
    rings.unlink(segment)


@pytest.fixture
def ring(name: str) -> Iterator[Ring]:
    made = Ring.create(name, TWO_FRAMES_S)
    yield made
    made.close()


def values(samples: rings.Samples) -> list[int]:
    return [int(value) for value in samples.view(np.uint32)]


class RingModel(RuleBasedStateMachine):
    """Any order of writes, reads and restarts: what is read is what was written, and what was lost is known."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"/pl-model-{os.getpid()}"
        rings.unlink(self.name)
        self.ring = Ring.create(self.name, TWO_FRAMES_S)
        self.capacity = self.ring.capacity
        self.writer = RingWriter(self.ring)
        self.generation = 1
        self.written = 0
        self.torn = 0  # samples up to which a killed writer may have overwritten
        self.readers: list[tuple[RingReader, int]] = []

    @rule(count=st.integers(0, 2 * FRAME))
    def write(self, count: int) -> None:
        self.writer.write(positions(self.written, count))
        self.written += count

    @rule(count=st.integers(1, 2 * FRAME))
    def write_and_be_killed(self, count: int) -> None:
        words, data = self.ring.words, self.ring.data
        words[rings._RESERVED_AT] = max(words[rings._RESERVED_AT], self.written + count)
        half = np.arange(self.written, self.written + count // 2) % self.capacity
        data[half] = np.nan
        self.torn = max(self.torn, self.written + count)
        self.restart()

    @rule()
    def restart(self) -> None:
        self.writer = RingWriter(self.ring)
        self.generation += 1

    @precondition(lambda self: len(self.readers) < 4)
    @rule(back=st.integers(0, 3 * FRAME))
    def join(self, back: int) -> None:
        start = max(0, self.written - back)
        self.readers.append((RingReader(self.ring, start), start))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), count=st.integers(0, 3 * FRAME))
    def read(self, data: st.DataObject, count: int) -> None:
        index = data.draw(st.integers(0, len(self.readers) - 1))
        reader, start = self.readers[index]
        before, lost_before = reader.position, reader.lost
        out = np.zeros(count, np.float32)
        got = reader.read(out)
        oldest = max(self.written, self.torn) - self.capacity
        expected_lost = max(0, oldest - before)
        first = before + expected_lost
        assert reader.lost - lost_before == expected_lost
        assert got == min(count, self.written - first)
        assert values(out[:got]) == list(range(first, first + got))
        assert reader.position == first + got
        self.readers[index] = (reader, start)

    @invariant()
    def accounts(self) -> None:
        assert self.ring.position == self.written
        assert self.ring.generation == self.generation
        for reader, start in self.readers:
            assert reader.available == self.written - reader.position
            assert reader.position >= start

    def teardown(self) -> None:
        self.ring.close()
        rings.unlink(self.name)


TestRingModel = RingModel.TestCase
TestRingModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_any_number_of_readers_see_the_same(ring: Ring) -> None:
    writer, readers = RingWriter(ring), [RingReader(ring) for _ in range(20)]
    writer.write(positions(0, 500))
    for reader in readers:
        out = np.zeros(500, np.float32)
        assert reader.read(out) == 500
        assert values(out) == list(range(500))


def test_a_new_reader_starts_at_the_newest_sample(ring: Ring) -> None:
    writer = RingWriter(ring)
    writer.write(positions(0, 700))
    reader = RingReader(ring)
    assert reader.available == 0
    writer.write(positions(700, 1))
    assert reader.available == 1


def test_positions_do_not_wrap(ring: Ring) -> None:
    """Past 2**40 samples, over a year, and past what 32 bits hold."""
    writer = RingWriter(ring)
    far = 2**40 + 5
    ring.words[rings._POSITION_AT] = far
    ring.words[rings._RESERVED_AT] = far
    reader = RingReader(ring)
    writer.write(np.full(FRAME, 0.5, np.float32))
    out = np.zeros(FRAME, np.float32)
    assert reader.read(out) == FRAME
    assert reader.position == far + FRAME
    assert (out == 0.5).all()


def test_more_than_the_ring_holds_is_refused(ring: Ring) -> None:
    with pytest.raises(ValueError, match=f"{ring.capacity + 1} samples do not fit a ring of {ring.capacity}"):
        RingWriter(ring).write(np.zeros(ring.capacity + 1, np.float32))


def test_the_end_is_known_to_readers_and_taken_back_by_the_next_writer(ring: Ring) -> None:
    writer, reader = RingWriter(ring), RingReader(ring)
    writer.write(positions(0, 10))
    assert not reader.ended
    assert ring.end is None
    writer.end()
    assert not reader.ended  # ten samples are still to be read
    reader.read(np.zeros(10, np.float32))
    assert reader.ended
    assert ring.end == 10
    RingWriter(ring)
    assert not reader.ended


def test_anchor(ring: Ring) -> None:
    writer = RingWriter(ring)
    assert ring.anchor is None
    writer.anchor(480, 123_456_789)
    assert ring.anchor == (480, 123_456_789)
    ring.words[rings._ANCHOR_VERSION_AT] += 1  # a writer that was killed half-way
    assert ring.anchor is None
    RingWriter(ring).anchor(960, 5)
    assert ring.anchor == (960, 5)


def test_marks_are_kept_as_long_as_their_frames(ring: Ring) -> None:
    writer = RingWriter(ring)
    for frame in range(5):
        writer.mark(frame * FRAME, frame, captured_ns=frame, start_ns=10 + frame, end_ns=20 + frame)
        writer.write(np.zeros(FRAME, np.float32))
    assert ring.mark_count == 5
    assert ring.mark(4) == (4 * FRAME, 4, 4, 14, 24)
    assert ring.mark(5) is None
    assert ring.mark(2) is None  # its frame is overwritten, or about to be
    assert ring.mark(-1) is None


def test_a_successor_forgets_the_mark_of_an_unfinished_frame(ring: Ring) -> None:
    writer = RingWriter(ring)
    writer.mark(0, 0, 1, 2, 3)
    writer.write(np.zeros(FRAME, np.float32))
    writer.mark(FRAME, 1, 1, 2, 3)  # killed before the frame itself
    RingWriter(ring)
    assert ring.mark_count == 1


def test_a_successor_goes_on_consuming_where_the_first_was_killed(ring: Ring) -> None:
    writer = RingWriter(ring)
    writer.write(positions(0, 2 * FRAME))
    first = Consumer(ring)
    out = np.zeros(FRAME, np.float32)
    first.read(out)
    first.consume(FRAME)
    first.read(out)  # and killed before the work on it was done
    second = Consumer(ring)
    assert second.read(out) == FRAME
    assert values(out)[0] == FRAME
    second.drop(FRAME)
    ledger = ring.ledger()
    assert (ledger.written, ledger.consumed, ledger.dropped, ledger.waiting) == (2 * FRAME, FRAME, FRAME, 0)


def test_a_consumer_that_was_lapped_has_dropped_what_it_lost(ring: Ring) -> None:
    writer, consumer = RingWriter(ring), Consumer(ring)
    for frame in range(5):
        writer.write(positions(frame * FRAME, FRAME))
    out = np.zeros(FRAME, np.float32)
    assert consumer.read(out) == FRAME
    consumer.consume(FRAME)
    consumer.skip(100)
    ledger = ring.ledger()
    assert (ledger.consumed, ledger.dropped) == (FRAME, 3 * FRAME + 100)
    assert ledger.waiting == consumer.available == FRAME - 100


class _Killed(BaseException):
    """Stands for kill -9: nothing after it is carried out."""


class Deadly:
    """The words of a ring, whose `stores`th store is the last thing but one that its process does."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self._words = words
        self.left = stores

    def __getitem__(self, at: int) -> int:
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        if not self.left:
            raise _Killed
        self.left -= 1
        self._words[at] = value


def balance(ring: Ring) -> Accounting:
    counts = ring.ledger()
    return Accounting(
        captured=counts.written, stepped=counts.consumed, dropped=counts.dropped, waiting_in=counts.waiting
    )


@pytest.mark.parametrize("change", ["consume", "drop", "skip", "lapped"])
def test_a_consumer_killed_between_two_stores_leaves_a_ledger_that_balances(ring: Ring, change: str) -> None:
    writer = RingWriter(ring)
    out = np.zeros(500, np.float32)
    for stores in itertools.count():
        writer.write(positions(writer.position, 1_000))
        consumer = Consumer(ring)
        assert ring.words[rings._CONSUMER_VERSION_AT] % 2 == 0  # what the one before left odd
        assert consumer.position == ring.ledger().consumed + ring.ledger().dropped
        assert balance(ring).discrepancies() == []
        if change == "lapped":
            for _ in range(5):
                writer.write(positions(writer.position, 1_000))
        elif change != "skip":
            consumer.read(out)
        before = ring.ledger()
        consumer._words = Deadly(ring.words, stores)  # type: ignore[assignment]
        killed = False
        try:
            if change == "lapped":
                consumer.read(out)
            else:
                getattr(consumer, change)(500)
        except _Killed:
            killed = True
        assert balance(ring).discrepancies() == [], stores
        after = ring.ledger()
        moved = after.consumed + after.dropped - before.consumed - before.dropped
        assert before.waiting - after.waiting == moved
        if not killed:
            assert stores == 4  # the version, the counter, the position, the version
            assert moved == (500 if change != "lapped" else before.waiting - ring.capacity)
            return


@pytest.mark.parametrize(
    ("word", "off"), [(rings._CONSUMED_AT, -7), (rings._DROPPED_AT, -7), (rings._TAKEN_AT, 7)], ids=str
)
def test_what_waits_is_counted_for_itself(ring: Ring, word: int, off: int) -> None:
    """And not as what the other counts leave over: a count that is wrong shows."""
    writer, consumer = RingWriter(ring), Consumer(ring)
    writer.write(positions(0, 1_000))
    consumer.read(np.zeros(300, np.float32))
    consumer.consume(200)
    consumer.drop(100)
    assert balance(ring).discrepancies() == []
    assert ring.ledger().waiting == 700
    ring.words[word] += 7
    assert balance(ring).discrepancies() == [f"captured = stepped + dropped + waiting_in is off by {off}"]


@pytest.mark.parametrize("uncounted", [100, -100])
def test_a_consumer_that_counts_other_than_it_reads_is_found_out(ring: Ring, uncounted: int) -> None:
    writer, consumer = RingWriter(ring), Consumer(ring)
    writer.write(positions(0, 1_000))
    consumer.read(np.zeros(500, np.float32))
    consumer.consume(500 - uncounted)
    assert balance(ring).discrepancies() == [f"captured = stepped + dropped + waiting_in is off by {uncounted}"]


def test_steadily_sees_a_change_of_two_rings_whole_or_not_at_all(ring: Ring) -> None:
    writer = RingWriter(ring)
    seen: list[int] = []

    def reading() -> int:
        if not seen:
            writer.begin()
            writer.count("concealed", 5)
            writer.commit()
        seen.append(ring.ledger().concealed)
        return seen[-1]

    assert ring.steadily(reading) == 5
    assert len(seen) == 2  # the first reading fell into the change, and was made again
    writer.begin()  # killed before commit
    assert ring.steadily(lambda: ring.ledger().concealed) == 5
    RingWriter(ring)
    assert ring.words[rings._LEDGER_VERSION_AT] % 2 == 0


def test_writing_and_reading_leave_nothing_for_the_collector(ring: Ring) -> None:
    writer, reader = RingWriter(ring), RingReader(ring)
    block, out = np.zeros(240, np.float32), np.zeros(240, np.float32)
    import gc

    gc.collect()
    gc.disable()
    try:
        before = sum(gc.get_count()[:1])
        for _ in range(2_000):
            writer.anchor(writer.position, 1)
            writer.write(block)
            reader.read(out)
        assert sum(gc.get_count()[:1]) - before < 20
    finally:
        gc.enable()


# Creation, attachment, clean-up


def test_a_ring_is_a_whole_number_of_frames_and_private(ring: Ring, name: str) -> None:
    assert ring.capacity == 2 * FRAME
    segment = posix_ipc.SharedMemory(name)
    assert os.fstat(segment.fd).st_mode & 0o777 == 0o600
    segment.close_fd()


def test_creating_twice_is_refused_and_opening_attaches(ring: Ring, name: str) -> None:
    with pytest.raises(RingError, match="exists already"):
        Ring.create(name, 1)
    again = Ring.open(name, 10)
    assert again.capacity == ring.capacity
    again.close()


def test_attaching_to_nothing(name: str) -> None:
    with pytest.raises(RingError, match=f"shared memory {name} does not exist: is the run up"):
        Ring.attach(name)


def test_another_layout_is_refused(ring: Ring, name: str) -> None:
    ring.words[rings._LAYOUT_AT] = rings.LAYOUT + 1
    with pytest.raises(RingError, match=f"has layout {rings.LAYOUT + 1}, .*expected layout {rings.LAYOUT}"):
        Ring.attach(name)


@pytest.mark.parametrize("size", [100, 8_192])
def test_what_is_no_ring_is_refused(name: str, size: int) -> None:
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size)
    segment.close_fd()
    with pytest.raises(RingError, match=r"too short for a ring|no ring of this program"):
        Ring.attach(name)


def test_a_ring_cut_short_is_refused(ring: Ring, name: str) -> None:
    segment = posix_ipc.SharedMemory(name)
    os.ftruncate(segment.fd, 8_192)
    segment.close_fd()
    with pytest.raises(RingError, match="expected layout"):
        Ring.attach(name)


def test_size_may_be_rounded_up_as_macos_does(ring: Ring, name: str) -> None:
    segment = posix_ipc.SharedMemory(name)
    size = os.fstat(segment.fd).st_size
    os.ftruncate(segment.fd, -(-size // 16_384) * 16_384)
    segment.close_fd()
    again = Ring.attach(name)
    assert (again.capacity, len(again.data)) == (ring.capacity, ring.capacity)
    again.close()


def test_a_writer_knows_how_much_its_consumer_has_not_taken(ring: Ring) -> None:
    """Taken is what was counted, not what was copied: the work on it may need to be done again."""
    writer, samples = RingWriter(ring), np.zeros(FRAME, np.float32)
    assert (writer.waiting, writer.room) == (0, ring.capacity)
    writer.write(samples)
    tap = RingReader(ring, position=0)
    assert tap.read(samples) == FRAME
    assert (writer.waiting, writer.room) == (FRAME, ring.capacity - FRAME)
    consumer = Consumer(ring)
    assert consumer.read(samples) == FRAME
    assert writer.waiting == FRAME
    consumer.consume(FRAME)
    assert (writer.waiting, writer.room) == (0, ring.capacity)
    writer.write(samples)
    consumer.skip(100)
    assert (writer.waiting, writer.room) == (FRAME - 100, ring.capacity - FRAME + 100)
    # A successor of either sees the same.
    assert RingWriter(ring).waiting == FRAME - 100
    Consumer(ring)
    assert writer.waiting == FRAME - 100


def test_who_writes_no_more_than_there_is_room_for_loses_nothing(ring: Ring) -> None:
    writer, consumer = RingWriter(ring), Consumer(ring)
    fed = np.arange(10 * ring.capacity, dtype=np.float32)
    got: list[rings.Samples] = []
    written = 0
    for count in itertools.cycle((700, 1_919, 3, ring.capacity)):
        part = fed[written : written + min(count, writer.room)]
        writer.write(part)
        written += len(part)
        out = np.empty(1_000, np.float32)
        read = consumer.read(out)
        consumer.consume(read)
        got.append(out[:read])
        if written == len(fed) and not writer.waiting:
            break
    np.testing.assert_array_equal(np.concatenate(got), fed)
    assert ring.ledger().dropped == 0


def test_who_writes_more_than_there_is_room_for_is_told_afterwards(ring: Ring) -> None:
    writer = RingWriter(ring)
    for _ in range(2):
        writer.write(np.zeros(ring.capacity, np.float32))
    assert (writer.waiting, writer.room) == (2 * ring.capacity, -ring.capacity)


def test_no_room_is_one_line_and_leaves_nothing(name: str) -> None:
    with pytest.raises(RingError, match=r"cannot be made: (no space left in /dev/shm|.*[Cc]annot allocate)"):
        Ring.create(name, 1e8)
    assert not rings.unlink(name)


def test_names_fit_macos_and_follow_from_the_folder(tmp_path: Path) -> None:
    names = {rings.segment_name(tmp_path / run, ring) for run in "ab" for ring in ("capture", "playback", "heard")}
    assert len(names) == 6
    assert max(map(len, names)) <= 30
    assert rings.segment_name(tmp_path / "a", "heard") == rings.segment_name(tmp_path / "a", "heard")
    with pytest.raises(ValueError, match="too long by"):
        rings.segment_name(tmp_path, "a_ring_of_a_long_name")


def test_a_reader_that_leaves_does_not_take_the_ring_with_it(ring: Ring, name: str) -> None:
    """Before 3.13 multiprocessing's resource tracker unlinks what a process merely attached to."""
    code = f"from pipeline.ring import Ring; Ring.attach({name!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    again = Ring.attach(name)
    again.close()


def test_closing_unmaps_and_unlinking_is_idempotent(name: str) -> None:
    made = Ring.create(name, 1)
    memory = made._memory
    made.close()
    with pytest.raises(ValueError, match="closed"):
        memory[0]
    assert rings.unlink(name)
    assert not rings.unlink(name)


def test_the_header_outlives_its_makers_mapping(name: str) -> None:
    Ring.create(name, 1).close()
    with contextlib.closing(Ring.attach(name)) as again:
        assert isinstance(again._memory, mmap.mmap)
        assert again.position == 0
