"""procs.recorder: its files, its words, and the program itself on rings that the test writes."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import soundfile

from pipeline import messages
from pipeline.control import Hub
from pipeline.errors import EXIT_REFUSED, ConfigError
from pipeline.messages import RecordingRecord, Stop, TextRecord, Trace
from pipeline.ring import Ring, RingWriter, Samples
from pipeline.runtime import RunFolder
from pipeline.taps import Block, ns_of
from pipeline.timing import now_ns
from pipeline.topology import FRAME, FRAME_NS, RECORDER, SAMPLE_RATE
from procs.recorder import HEADER_EVERY, SUBTYPES, SoundFile, Transcript, UnwritableError
from tests import helpers
from tests.helpers import speech_like, temporary_ring, wait_until

runtime_dir = helpers.runtime_dir
folder = helpers.folder

EXACT: Final = sorted(kind for kind, subtype in SUBTYPES.items() if subtype == "FLOAT")
LOSSLESS: Final = [*EXACT, "FLAC"]

FILE_MAX: Final = 400_001
"""Bytes; in the middle of a row."""

LEFT_OPEN: Final = """
import os, sys
from pathlib import Path
import numpy as np
from procs.recorder import SoundFile
file = SoundFile(Path(sys.argv[1]))
rows = np.load(sys.argv[2])
for at in range(0, len(rows), 1920):
    file.write(rows[at : at + 1920])
os.kill(os.getpid(), 9)
"""


def rows_of(frames: int) -> Samples:
    """Both sides, never the same."""
    return np.stack((speech_like(frames), speech_like(frames, seed=1)), axis=1)


def read(path: Path) -> Samples:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == SAMPLE_RATE
    assert samples.shape[1] == 2
    read_rows: Samples = samples
    return read_rows


def assert_same(found: Samples, expected: Samples, kind: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if kind in EXACT else 1 / 2**15)


# The sound file


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_kind_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    rows = rows_of(30)
    file = SoundFile(path := tmp_path / f"both.{kind.lower()}")
    for at in range(0, len(rows), FRAME):
        file.write(rows[at : at + FRAME])
    file.close()
    assert_same(read(path), rows, kind)


def test_ogg_is_as_long(tmp_path: Path) -> None:
    file = SoundFile(path := tmp_path / "both.ogg")
    file.write(rows_of(30))
    file.close()
    assert len(read(path)) == 30 * FRAME


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_a_killed_writer_leaves_can_be_played_to_the_last_second(tmp_path: Path, kind: str) -> None:
    rows = rows_of(50)
    np.save(tmp_path / "rows.npy", rows)
    path = tmp_path / f"both.{kind.lower()}"
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN, path, tmp_path / "rows.npy"], check=False)
    assert done.returncode == -signal.SIGKILL
    found = read(path)
    assert len(rows) - SAMPLE_RATE < len(found) <= len(rows)
    assert_same(found, rows[: len(found)], kind)


def test_a_short_wav_file_is_a_wav_file_also_while_it_is_written(tmp_path: Path) -> None:
    file = SoundFile(path := tmp_path / "both.wav")
    file.write(rows_of(1 + HEADER_EVERY // FRAME))
    assert path.read_bytes()[:4] == b"RIFF"
    file.close()
    assert path.read_bytes()[:4] == b"RIFF"


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Files cannot grow beyond FILE_MAX."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system with room for FILE_MAX bytes. Skips the test where this user may not mount one."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={FILE_MAX}", "pl-test", str(path)]
    if sys.platform != "linux" or os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> tuple[Samples, str, int]:
    """Write until no more can be written; returns what was offered, why it ended, and the rows said to be written."""
    rows, file = rows_of(200), SoundFile(path)
    why = ""
    try:
        for at in range(0, len(rows), FRAME):
            file.write(rows[at : at + FRAME])
    except UnwritableError as error:
        why = str(error)
    finally:
        file.close(whole=False)
    return rows, why, file.rows


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_file_that_cannot_grow_holds_what_was_written_until_then(tmp_path: Path, kind: str) -> None:
    with small_files():
        rows, why, written = fill(path := tmp_path / f"both.{kind.lower()}")
    assert why == "file too large"
    found = read(path)
    assert abs(len(found) - written) <= FRAME
    assert len(found) > SAMPLE_RATE
    assert_same(found, rows[: len(found)], kind)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_full_disk_leaves_a_file_that_can_be_played(tmp_path: Path, kind: str) -> None:
    with small_disk(tmp_path / "disk"):
        rows, why, written = fill(path := tmp_path / "disk" / f"both.{kind.lower()}")
        found = read(path)
    assert why == "no space left on device"
    assert abs(len(found) - written) <= FRAME
    assert_same(found, rows[: len(found)], kind)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("both.xyz", "unknown kind of sound file '.xyz'; expected one of aiff, au, caf, flac, ogg, rf64, w64, wav"),
        ("both", "unknown kind of sound file ''"),
        ("nowhere/both.wav", "cannot be written: No such file or directory"),
        ("there.wav", "there.wav exists already; expected the name of a new file"),
    ],
)
def test_a_path_that_will_not_do_is_refused_in_one_line(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "there.wav").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        SoundFile(tmp_path / name)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.wav", "mine")]


# The words


BEGIN_NS: Final = 10**12


def text(frame: int, words: str, time_ns: int = BEGIN_NS) -> TextRecord:
    return TextRecord(frame=frame, text=words, time_ns=time_ns + frame)


def block(frame: int) -> Block:
    """The recording's frame of that number."""
    return Block(np.zeros((FRAME, 2), np.float32), frame * FRAME, BEGIN_NS + frame * FRAME_NS, 0)


def test_a_word_has_the_time_at_which_its_first_piece_was_played() -> None:
    with temporary_ring() as heard:
        writer = RingWriter(heard)
        transcript = Transcript(out := io.StringIO(), heard)
        for record in (text(7, " he"), text(8, "llo"), text(9, " you")):
            transcript.add(record)
        transcript.write(block(10), BEGIN_NS)
        assert out.getvalue() == ""
        for frame in (7, 8, 9):
            writer.mark(0, frame, 0, BEGIN_NS + (frame + 3) * FRAME_NS, 0)
        transcript.write(block(11), BEGIN_NS)
        assert out.getvalue() == ""  # " you" begins in what is not recorded yet
        transcript.write(block(12), BEGIN_NS)
        assert out.getvalue() == "0.80  hello\n"
        transcript.end(block(12))
        assert out.getvalue() == "0.80  hello\n0.96  you\n"


def test_a_piece_of_a_frame_that_is_not_played_has_its_own_time_after_a_second() -> None:
    with temporary_ring() as heard:
        transcript = Transcript(out := io.StringIO(), heard)
        transcript.add(text(0, " skipped ", BEGIN_NS + 2 * FRAME_NS))
        transcript.write(block(5), BEGIN_NS + 2 * FRAME_NS + 999_000_000)
        assert out.getvalue() == ""
        transcript.write(block(5), BEGIN_NS + 2 * FRAME_NS + 1_000_000_000)
        assert out.getvalue() == "0.16  skipped\n"


def test_words_before_and_after_the_recording_are_none_of_it() -> None:
    with temporary_ring() as heard:
        writer = RingWriter(heard)
        transcript = Transcript(out := io.StringIO(), heard)
        for frame, played in ((1, -1), (2, 0), (3, 4), (4, 5)):
            transcript.add(text(frame, f" word{frame}"))
            transcript.add(text(frame, f" word{frame}"))  # told twice
            writer.mark(0, frame, 0, BEGIN_NS + played * FRAME_NS, 0)
        transcript.add(text(5, " unheard"))
        transcript.end(block(4))
        assert out.getvalue() == "0.00  word2\n0.32  word3\n"


# The program


def ramp(begin: int, count: int) -> Samples:
    """Samples that tell their position."""
    return np.arange(begin, begin + count, dtype=np.float32) / np.float32(2**24)


class Rig:
    """A run as far as the recorder sees it: rings that are written in real time, and the supervisor's sockets."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rings = [Ring.create(folder.segment(name), 5.0) for name in ("capture", "heard")]
        self.writers = [RingWriter(ring) for ring in self.rings]
        self.hub = Hub(folder.control, folder.events, folder.stages)
        self.begin_ns = now_ns()
        self.said: list[RecordingRecord] = []
        self.before: list[TextRecord] = []
        self.alive_read, self.alive_write = os.pipe()
        self.process: subprocess.Popen[bytes] | None = None

    def record(self, path: Path, position: int = 0) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", RECORDER.module, "--name", self.folder.name]
        command += ["--supervised", str(self.alive_read), "--path", str(path), "--position", str(position)]
        self.process = subprocess.Popen(command, pass_fds=(self.alive_read,))
        return self.process

    def turn(self) -> None:
        """Write what is due, and answer what is asked."""
        while now_ns() >= self.begin_ns + ns_of(self.writers[0].position + FRAME):
            for side, writer in enumerate(self.writers):
                position = writer.position
                writer.anchor(position, self.begin_ns + ns_of(position))
                if side:
                    writer.mark(position, position // FRAME, 0, self.begin_ns + ns_of(position), 0)
                writer.write(ramp(position, FRAME))
        self.hub.wait(0.01)
        self.said += [
            record for data in self.hub.reports() if isinstance(record := messages.decode_report(data), RecordingRecord)
        ]
        for address, data in self.hub.commands():
            assert isinstance(messages.decode_command(data), Trace)
            records = [messages.encode(("text", record)) for record in self.before]
            self.hub.reply(address, messages.decode_reply(b'{"ok":true,"records":[%b]}' % b",".join(records)))

    def until(self, true: Callable[[], bool], what: str) -> None:
        def turned() -> bool:
            self.turn()
            return true()

        wait_until(turned, what)

    def begun(self) -> RecordingRecord:
        self.until(lambda: bool(self.said), "the recording to begin")
        return self.said[0]

    def ended(self) -> tuple[RecordingRecord, int]:
        """The recorder's last word, and its exit code."""
        process = self.process
        assert process is not None
        self.until(lambda: process.poll() is not None, "the recorder to end")
        self.turn()
        return self.said[-1], process.returncode

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in {self.alive_read, self.alive_write}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.hub.close()
        for ring in self.rings:
            ring.close()


@pytest.fixture
def rig(folder: RunFolder) -> Iterator[Rig]:
    folder.lock()
    made = Rig(folder)
    yield made
    made.close()
    folder.release()


def assert_ramp(rows: Samples, begin: int) -> None:
    expected = ramp(begin, len(rows))
    np.testing.assert_array_equal(rows, np.stack((expected, expected), axis=1))


def test_it_records_from_the_position_on_until_it_is_told_to_stop(rig: Rig, tmp_path: Path) -> None:
    rig.before = [text(1, " early", rig.begin_ns), text(4, " one", rig.begin_ns), text(5, " two", rig.begin_ns)]
    path = tmp_path / "both.wav"
    rig.until(lambda: rig.writers[0].position >= 12 * FRAME, "a second")
    process = rig.record(path, 3 * FRAME)
    begun = rig.begun()
    assert (begun.on, begun.path, begun.transcript, begun.frame) == (True, str(path), str(tmp_path / "both.txt"), 3)
    process.send_signal(signal.SIGINT)  # Ctrl-C is the supervisor's
    rig.until(lambda: rig.writers[0].position >= 40 * FRAME, "some frames")
    stopped_at = rig.writers[0].position
    rig.hub.order(RECORDER.name, Stop())
    ended, code = rig.ended()
    rows = read(path)
    assert code == 0
    assert (ended.on, ended.error, ended.lost, ended.frame) == (False, "", 0, 3)
    assert ended.seconds == len(rows) / SAMPLE_RATE
    assert len(rows) >= stopped_at - 3 * FRAME
    assert_ramp(rows, 3 * FRAME)
    assert (tmp_path / "both.txt").read_text() == "0.08  one\n0.16  two\n"


def test_sigterm_closes_the_file(rig: Rig, tmp_path: Path) -> None:
    process = rig.record(path := tmp_path / "both.flac")
    rig.begun()
    process.terminate()
    ended, code = rig.ended()
    assert (code, ended.on, ended.error) == (0, False, "")
    assert len(read(path)) == round(ended.seconds * SAMPLE_RATE) > 0


def test_without_a_supervisor_it_closes_the_file_and_leaves(rig: Rig, tmp_path: Path) -> None:
    process = rig.record(path := tmp_path / "both.wav")
    rig.begun()
    rig.until(lambda: path.stat().st_size > 0, "something to be recorded")
    os.close(rig.alive_write)
    rig.until(lambda: process.poll() is not None, "the recorder to leave")
    assert process.returncode == 0
    assert_ramp(read(path), 0)


def test_what_is_refused_is_said_and_nothing_is_touched(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "both.txt").write_text("mine")
    rig.record(tmp_path / "both.wav")
    ended, code = rig.ended()
    assert code == EXIT_REFUSED
    assert len(rig.said) == 1
    assert not ended.on
    assert ended.error == f"record path: {tmp_path / 'both.txt'} exists already; expected the name of a new file"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("both.txt", "mine")]


def test_a_full_disk_ends_it_with_one_word_and_a_file_that_can_be_played(rig: Rig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        path = tmp_path / "disk" / "both.wav"
        (tmp_path / "disk" / "other").write_bytes(bytes(FILE_MAX - 300_000))
        rig.record(path)
        ended, code = rig.ended()
        rows = read(path)
    assert [record.on for record in rig.said] == [True, False]
    assert code == 0
    assert ended.error == f"{path}: no space left on device; it holds the first {ended.seconds:.1f} s"
    assert abs(len(rows) / SAMPLE_RATE - ended.seconds) < 0.1
    assert_ramp(rows, 0)


def test_it_runs_at_a_low_priority(rig: Rig, tmp_path: Path) -> None:
    process = rig.record(tmp_path / "both.wav")
    rig.begun()
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= os.getpriority(os.PRIO_PROCESS, 0) + 5
