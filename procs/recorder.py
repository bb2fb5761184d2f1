"""The recorder: both sides of a run into a sound file of two channels, and its words into a text file beside it.

Started by the supervisor on the command `record`. It is a tap: no stage knows of it, and it runs at a low priority.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec
import soundfile

from pipeline import control, messages, taps
from pipeline.control import StageLink, Subscription
from pipeline.errors import EXIT_REFUSED, ConfigError, ControlError, PipelineError
from pipeline.messages import RecordingRecord, Stop, TextRecord, Trace
from pipeline.ring import Ring, Samples
from pipeline.runtime import RunFolder
from pipeline.taps import Block
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import FRAME, RECORDER, SAMPLE_RATE
from pipeline.words import Word, Words

SUBTYPES: Final = {
    "WAV": "FLOAT", "RF64": "FLOAT", "W64": "FLOAT", "CAF": "FLOAT", "AIFF": "FLOAT", "AU": "FLOAT",
    "FLAC": "PCM_16", "OGG": "VORBIS",
}  # fmt: skip
"""The kinds of sound file that can be recorded to, by suffix, and what they hold: floats where they can."""

HEADER_EVERY: Final = SAMPLE_RATE // 2
"""Rows after which the header is written anew: what a killed recorder leaves can be played so far."""

_NICE: Final = 5
_MARK_PATIENCE_NS: Final = NS_PER_S
_SAID_BEFORE_S: Final = 1.0
"""What is played when the recording begins may have been said so long before."""

_ASK_S: Final = 1.0
_MARKS_KEPT: Final = 1_000
_PROBE: Final = bytes(1 << 20)

# libsndfile's commands that the package soundfile does not name.
_SET_ADD_PEAK_CHUNK: Final = 0x1050
_UPDATE_HEADER_NOW: Final = 0x1060
_RF64_AUTO_DOWNGRADE: Final = 0x1210

_FLAC_BLOCK: Final = 4_096
_FLAC_LENGTH_AT: Final = 18
"""Where in a FLAC file the 8 bytes are whose last 36 bits are its length in rows."""

_decode_traced: Final = msgspec.json.Decoder(tuple[str, msgspec.Raw]).decode


class UnwritableError(PipelineError):
    """A file cannot be written any more."""


def _kind(path: Path) -> str:
    """The kind of sound file that the suffix names. Raises ConfigError."""
    kind = path.suffix.lstrip(".").upper()
    if kind not in SUBTYPES:
        expected = ", ".join(sorted(SUBTYPES)).lower()
        raise ConfigError(
            f"record path = {str(path)!r}: unknown kind of sound file {path.suffix!r}; expected one of {expected}"
        )
    return kind


def _create(path: Path) -> int:
    """Make a file that was not there. Raises ConfigError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise ConfigError(f"record path: {path} exists already; expected the name of a new file") from None
    except OSError as error:
        raise ConfigError(f"record path: {path} cannot be written: {error.strerror}") from None


class SoundFile:
    """A new sound file of two channels, which can be played also where its writer was killed.

    A WAV file becomes RF64 when it grows beyond 4 GB. Raises ConfigError.
    """

    def __init__(self, path: Path) -> None:
        self._kind = _kind(path)
        self._file = _create(path)
        # RF64 is WAV with room for a longer length; as long as the length is short it is written as WAV.
        form = "RF64" if self._kind == "WAV" else self._kind
        try:
            self._sound = soundfile.SoundFile(
                self._file, "w", SAMPLE_RATE, 2, SUBTYPES[self._kind], format=form, closefd=False
            )
        except soundfile.LibsndfileError as error:
            reason = self._reason() or error.error_string
            os.close(self._file)
            path.unlink()
            raise ConfigError(f"record path: {path} cannot be written: {reason}") from None
        self._command(_SET_ADD_PEAK_CHUNK, 0)
        if self._kind == "WAV":
            self._command(_RF64_AUTO_DOWNGRADE, 1)
        self.rows = 0
        self._told = 0

    def _command(self, command: int, value: int) -> None:
        soundfile._snd.sf_command(self._sound._file, command, soundfile._ffi.NULL, value)

    def write(self, rows: Samples) -> None:
        """Append rows, shape (n, 2). Raises UnwritableError; what was written so far stays."""
        try:
            self._sound.write(rows)
        except soundfile.LibsndfileError as error:
            raise UnwritableError(self._reason() or error.error_string.rstrip(".").lower()) from None
        self.rows += len(rows)
        if self.rows - self._told >= HEADER_EVERY:
            self._tell_length()

    def _tell_length(self) -> None:
        self._told = self.rows
        if self._kind == "FLAC":
            self._tell_flac_length()
        elif self._kind != "OGG":
            self._command(_UPDATE_HEADER_NOW, 0)

    def _tell_flac_length(self) -> int:
        """Write into the header what was encoded for certain, and return it: an encoder that is not closed leaves 0."""
        rows = max(0, self.rows // _FLAC_BLOCK - 1) * _FLAC_BLOCK
        found = int.from_bytes(os.pread(self._file, 8, _FLAC_LENGTH_AT))
        with contextlib.suppress(OSError):
            os.pwrite(self._file, (found >> 36 << 36 | rows).to_bytes(8), _FLAC_LENGTH_AT)
        return rows

    def _reason(self) -> str:
        """What the system says to a write: libsndfile keeps it to itself."""
        size = os.fstat(self._file).st_size
        try:
            for _ in range(2):  # the first may find room for a part
                os.pwrite(self._file, _PROBE, os.fstat(self._file).st_size)
        except OSError as error:
            return (error.strerror or "").lower()
        finally:
            os.ftruncate(self._file, size)
        return ""

    def close(self, *, whole: bool = True) -> None:
        """Close the file; not `whole`, where a write has failed."""
        self._sound.close()
        if not whole and self._kind == "FLAC":
            self.rows = self._tell_flac_length()
        os.close(self._file)


class Transcript:
    """The words with their times in the recording: those of the frames that were heard in it.

    A piece's time is when its frame was sent to the speaker, which the marks of the ring `heard` tell.
    """

    def __init__(self, file: TextIO, heard: Ring) -> None:
        self._file = file
        self._heard = heard
        self._next_mark = max(0, heard.mark_count - heard.mark_capacity + 1)
        self._played_ns: dict[int, int] = {}
        self._pieces: deque[TextRecord] = deque()
        self._words = Words()
        self._newest_ns = 0
        self._latest_s = 0.0

    def add(self, record: TextRecord) -> None:
        """The model said something. What is told a second time is passed over."""
        if record.time_ns > self._newest_ns:
            self._newest_ns = record.time_ns
            self._pieces.append(record)

    def write(self, block: Block, now: int) -> None:
        """Write the words that were heard until the end of `block`, the last that was recorded. Raises OSError."""
        self._read_marks()
        end_ns = block.time_ns + taps.ns_of(len(block.samples))
        while self._pieces:
            piece = self._pieces[0]
            time_ns = self._played_ns.get(piece.frame)
            if time_ns is None:
                if now - piece.time_ns < _MARK_PATIENCE_NS:
                    return
                time_ns = piece.time_ns  # it was skipped
            if time_ns >= end_ns:
                return  # sent to the speaker, and not recorded yet
            time_s = block.position / SAMPLE_RATE + (time_ns - block.time_ns) / NS_PER_S
            self._pieces.popleft()
            if time_s >= 0:
                # A word follows the one before it, also where the sides were just fitted to each other.
                self._latest_s = max(self._latest_s, time_s)
                self._print(*self._words.add_at(self._latest_s, piece.text))

    def end(self, block: Block) -> None:
        """Write what was heard until the end of the last block, and no more. Raises OSError."""
        self._read_marks()
        end_ns = block.time_ns + taps.ns_of(len(block.samples))
        self._pieces = deque(piece for piece in self._pieces if self._played_ns.get(piece.frame, end_ns) < end_ns)
        self.write(block, now_ns())
        self._print(*self._words.end())

    def _read_marks(self) -> None:
        while (mark := self._heard.mark(self._next_mark)) is not None:
            self._next_mark += 1
            self._played_ns[mark.frame] = mark.start_ns
        self._next_mark = max(self._next_mark, self._heard.mark_count - self._heard.mark_capacity + 1)
        while len(self._played_ns) > _MARKS_KEPT:
            del self._played_ns[next(iter(self._played_ns))]

    def _print(self, *words: Word) -> None:
        for word in words:
            print(word.line(), file=self._file, flush=True)


class Files:
    """The two files of a recording. If one cannot be made neither is."""

    def __init__(self, path: Path, heard: Ring) -> None:
        self.path = path
        self.transcript_path = path.with_suffix(".txt")
        self.sound = SoundFile(path)
        try:
            words = _create(self.transcript_path)
        except ConfigError:
            self.sound.close()
            path.unlink()
            raise
        self._words = os.fdopen(words, "w", encoding="utf-8")
        self.transcript = Transcript(self._words, heard)

    def close(self, *, whole: bool = True) -> None:
        """Close both."""
        self.sound.close(whole=whole)
        with contextlib.suppress(OSError):  # what was in its buffer finds no room
            self._words.close()


class Texts:
    """What the model says, and has said in the last `seconds`."""

    def __init__(self, folder: RunFolder, seconds: float) -> None:
        self._subscription = Subscription(folder.events, ("text", "state.run"))
        # The state of the run is told to whoever has just subscribed: from here on nothing is missed.
        self._subscription.receive(_ASK_S)
        self._before: list[tuple[str, bytes]] = []
        with contextlib.suppress(ControlError):  # then the first words are missing
            reply = control.request(folder.control, messages.encode(Trace(seconds=seconds)), _ASK_S)
            self._before = [(topic, bytes(record)) for topic, record in map(_decode_traced, reply.records)]

    def received(self) -> Iterator[TextRecord]:
        """The records that have come, oldest first; some may come twice."""
        before, self._before = self._before, []
        for topic, record in itertools.chain(before, iter(lambda: self._subscription.receive(0), None)):
            if topic == "text" and isinstance(event := messages.decode_event(record), TextRecord):
                yield event

    def close(self) -> None:
        """Unsubscribe."""
        self._subscription.close()


class Recorder:
    """One recording, from its first row to its last word to the supervisor."""

    def __init__(self, folder: RunFolder, link: StageLink, path: Path, position: int, alive: int) -> None:
        self._link = link
        self._alive = alive
        self._path = path
        self._frame = position // FRAME
        self._leaving = False
        self._last: Block | None = None
        self._conversation = taps.conversation(folder, FRAME, position)
        self._heard = Ring.attach(folder.segment("heard"))
        self._texts = Texts(folder, _SAID_BEFORE_S + max(0.0, self._conversation.written_s))
        self._files: Files | None = None

    def run(self) -> int:
        """Record until told to end; returns the exit code."""
        self._wake_on_signals()
        error, code = "", 0
        try:
            self._files = Files(self._path, self._heard)
            self._say(on=True)
            self._record(self._files)
        except ConfigError as refusal:
            error, code = str(refusal), EXIT_REFUSED
        except (UnwritableError, OSError) as failure:
            error = getattr(failure, "strerror", None) or str(failure)
        finally:
            self._close(whole=not error)
        if self._files is not None and error:
            error = f"{self._path}: {error.lower()}; it holds the first {self._seconds:.1f} s"
        self._say(on=False, error=error)
        return code

    def _record(self, files: Files) -> None:
        conversation = self._conversation
        while not conversation.ended:
            if self._alive in self._link.wait(conversation.wait_s()):  # the supervisor is gone
                self._link.abandon()
                self._leaving = True
            if self._leaving or any(isinstance(order, Stop) for order in self._link.orders()):
                conversation.finish()
            self._move(files)
        if self._last is not None:
            files.transcript.end(self._last)

    def _move(self, files: Files) -> None:
        """Record what is there."""
        for record in self._texts.received():
            files.transcript.add(record)
        while (block := self._conversation.poll()) is not None:
            files.sound.write(block.samples)
            self._last = block
        if self._last is not None:
            files.transcript.write(self._last, now_ns())

    @property
    def _seconds(self) -> float:
        return self._files.sound.rows / SAMPLE_RATE if self._files is not None else 0.0

    def _close(self, *, whole: bool) -> None:
        if self._files is not None:
            self._files.close(whole=whole)
        self._conversation.close()
        self._heard.close()
        self._texts.close()

    def _say(self, *, on: bool, error: str = "") -> None:
        self._link.report(
            RecordingRecord(
                path=str(self._path),
                transcript=str(self._path.with_suffix(".txt")),
                on=on,
                frame=self._frame,
                seconds=self._seconds,
                lost=self._conversation.lost,
                error=error,
                time_ns=now_ns(),
            )
        )

    def _wake_on_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave)
        self._link.watch(_Descriptor(self._alive))

    def _leave(self, *_: object) -> None:
        self._leaving = True


class _Descriptor:
    """A bare file descriptor, for something that waits on objects."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


def _refuse(link: StageLink, path: Path, error: str) -> int:
    """Tell the supervisor why there is no recording."""
    transcript = str(path.with_suffix(".txt"))
    link.report(
        RecordingRecord(path=str(path), transcript=transcript, on=False, frame=-1, error=error, time_ns=now_ns())
    )
    return EXIT_REFUSED


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog=f"python -m {RECORDER.module}", description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="the run's name")
    parser.add_argument("--supervised", type=int, required=True, metavar="FD", help="the supervisor holds its end")
    parser.add_argument("--path", type=Path, required=True, help="the sound file to write")
    parser.add_argument("--position", type=int, required=True, help="in the capture ring, where it begins")
    return parser.parse_args()


def main() -> None:
    """Record one run to one file, and exit."""
    arguments = _arguments()
    os.nice(_NICE)
    try:
        folder = RunFolder(arguments.name)
        link = StageLink(folder.stages, RECORDER.name)
    except PipelineError as error:
        sys.exit(f"recorder: {error}")
    try:
        code = Recorder(folder, link, arguments.path, arguments.position, arguments.supervised).run()
    except PipelineError as error:
        code = _refuse(link, arguments.path, str(error))
    except Exception as error:
        traceback.print_exc()
        _refuse(link, arguments.path, f"recorder: {type(error).__name__}: {error}")
        code = 1
    finally:
        link.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
