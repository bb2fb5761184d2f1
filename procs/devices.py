"""Where samples come from and go to: PortAudio devices, sound files, and stand-ins that need no sound card.

The only module that imports sounddevice, and only when a device is asked for: from file to file needs no PortAudio.
What reads files, and what resamples, is imported only when it is needed too: a stage is ready sooner without.

Every input calls `on_block(samples, adc_ns, xrun)` and every output `on_block(samples, dac_ns, xrun)`, in a thread of
its own, with samples of shape (n,), float32, mono, at 24 kHz. `adc_ns` and `dac_ns` are when the device converted, or
will convert, the first of them, on the monotonic clock. An output's `on_block` fills what it is given.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from pipeline import apple
from pipeline.audio import FULL_SCALE, Samples
from pipeline.drift import MOST_PPM, PPM, Vernier
from pipeline.errors import DeviceError, DeviceLostError, PipelineError
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns, promote_thread, threads
from pipeline.topology import FRAME, SAMPLE_RATE

if TYPE_CHECKING:
    import soundfile
    import soxr

OnBlock = Callable[[Samples, int, bool], None]
Ppm = Callable[[], float]
Write = Callable[[Samples], None]

INPUT_SPECS: Final = "device, device:NAME, file:PATH, tone:HZ or silence"
OUTPUT_SPECS: Final = "device, device:NAME, file:PATH or null"

_PACED_INPUT_BLOCK: Final = FRAME
"""Samples that a stand-in for a microphone delivers at once: the last of a frame comes no later for it."""

_LOOK_AGAIN_S: Final = 0.001
"""How long nothing is moved from or to a file, where there is no room or nothing has come."""

_TONE_LEVEL: Final = 0.25
_RESAMPLER: Final = "HQ"
_JOIN_S: Final = 2.0

_EXTENSIBLE: Final = frozenset({"AIFF", "AU", "CAF", "RAW", "RF64", "W64", "WAV"})
"""Kinds of sound file that can be added to. Another is gone on with in a second file: answer.2.flac."""

_SET_ADD_PEAK_CHUNK: Final = 0x1050
"""libsndfile's SFC_SET_ADD_PEAK_CHUNK, which the package soundfile does not name."""

_CALLBACKS: Final = 25
"""Whose median dates a block."""

_SLIP_NS: Final = 5 * NS_PER_MS
"""By how much later than foretold a device's dates are, at least, where it had to put in silence."""

_SAME_S: Final = 0.05
"""Blocks that make up for an underrun and are less apart make up for one and the same, for a second at most."""

_FOLLOW_S: Final = 1.0
"""In about so long what is foretold follows dates that wander, as a sound server's do by 2 ms a second."""

_FIRST_CALL_NS: Final = 5 * NS_PER_S
"""How long a device may take to call back for the first time: a wireless one takes a second or two."""

_NEXT_CALL_NS: Final = NS_PER_S
"""How long after that it may be silent before it is taken for lost."""

_LOOKS: Final = 4
"""How often it has to be found silent: a stage that was stopped itself finds what it missed when it looks again."""

_LIST: Final = (sys.executable, "-P", "-m", "procs.devices")
_LIST_S: Final = 2.0

_LET_GO_S: Final = 0.5
"""How long a device that is let go of for good may take."""


class DefaultChangedError(DeviceLostError):
    """The device works, but what is wanted is the system's default, which is another now."""


class Device(Protocol):
    """A source or a sink of samples, open from its construction, running from `start` to `stop`."""

    detail: str

    @property
    def latency_ms(self) -> float:
        """Between the converter and the callback, beyond the block itself, as the device reports it."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def failure(self) -> DeviceError | None:
        """Why it stopped by itself, if it did: DeviceLostError if it may come back."""


class Unopened:
    """Stands where a device will be, until it is opened."""

    detail = ""
    latency_ms = 0.0

    def start(self) -> None:
        """Nothing is open."""

    def stop(self) -> None:
        """Nothing is open."""

    def failure(self) -> DeviceError | None:
        return None


class Absent(Unopened):
    """Stands where a device is to be that cannot be had at present, and `why`."""

    def __init__(self, detail: str, why: DeviceError) -> None:
        self.detail = detail
        self._why = DeviceLostError(str(why))

    def failure(self) -> DeviceError | None:
        return self._why


def _resampler(source_rate: int, target_rate: int) -> "soxr.ResampleStream | None":
    """What brings mono samples from one rate to the other; None where they are the same."""
    if source_rate == target_rate:
        return None
    import soxr

    return soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality=_RESAMPLER)


def silence(count: int) -> Samples:
    """`count` zeros."""
    return np.zeros(count, np.float32)


def open_input(
    spec: str,
    *,
    block: int,
    latency_ms: float,
    resume_at: int,
    on_block: OnBlock,
    on_end: Callable[[], None],
    skew_ppm: float = 0.0,
) -> Device:
    """Open what `spec` names. A file goes on at sample `resume_at`, and calls `on_end` after its last.

    A stand-in's clock is faster than the monotonic one by `skew_ppm`. Raises DeviceError.
    """
    kind, _, name = spec.partition(":")
    match kind:
        case "device":
            return _PortAudioInput(name, block, latency_ms, on_block)
        case "file" if name:
            return _PacedInput(f"file {name}", _file_blocks(Path(name), resume_at), on_block, on_end, skew_ppm)
        case "tone":
            return _PacedInput(f"tone {name} Hz", _tone_blocks(name, resume_at), on_block, on_end, skew_ppm)
        case "silence" if not name:
            return _PacedInput("silence", _silent_blocks(), on_block, on_end, skew_ppm)
    raise DeviceError(f"input {spec!r}: expected {INPUT_SPECS}")


def _no_correction() -> float:
    return 0.0


def open_output(
    spec: str,
    *,
    block: int,
    latency_ms: float,
    resume: bool,
    on_block: OnBlock,
    correction_ppm: Ppm = _no_correction,
    skew_ppm: float = 0.0,
) -> Device:
    """Open what `spec` names. With `resume`, a file is added to and not begun anew. Raises DeviceError.

    It asks `on_block` for samples faster than its own clock by `correction_ppm`, which it calls for each block. A
    stand-in's clock is faster than the monotonic one by `skew_ppm`.
    """
    kind, _, name = spec.partition(":")
    match kind:
        case "device":
            return _PortAudioOutput(name, block, latency_ms, on_block, correction_ppm)
        case "file" if name:
            sink = _FileSink(Path(name), resume)
            vernier = Vernier(on_block, correction_ppm)
            return _PacedOutput(f"file {name}", block, vernier.fill, sink, lambda: skew_ppm)
        case "null" if not name:
            # What nobody hears need not be resampled: its clock is set.
            return _PacedOutput("null", block, on_block, None, lambda: skew_ppm + correction_ppm())
    raise DeviceError(f"output {spec!r}: expected {OUTPUT_SPECS}")


def open_source(spec: str, *, on_block: OnBlock, on_end: Callable[[], None], has_room: Callable[[], bool]) -> Device:
    """Open the file that `spec` names, to be read as fast as `has_room` says that a block may follow.

    Raises DeviceError.
    """
    name = spec.removeprefix("file:")
    return _EagerInput(f"file {name}", _file_blocks(Path(name), 0), on_block, on_end, has_room)


def open_sink(spec: str, *, move: Callable[[Write], bool], ended: Callable[[], bool]) -> "EagerOutput":
    """Open the file that `spec` names, for what `move` writes to it whenever it has something. Raises DeviceError."""
    name = spec.removeprefix("file:")
    return EagerOutput(f"file {name}", move, ended, _FileSink(Path(name), resume=False))


# Stand-ins: they keep the monotonic clock's time, or what a test makes of it, as a device keeps its crystal's. Offline
# they keep none.


class _Mover:
    """A thread that moves samples from its start to its stop, and what ended it if something did."""

    def __init__(self, detail: str) -> None:
        self._detail = detail
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self.failure: DeviceError | None = None

    def _run(self) -> None:
        try:
            self._move()
        except Exception as error:  # whatever it is, the stage has to hear of it
            why = getattr(error, "error_string", None)  # of libsndfile, which need not be loaded
            if not (why or isinstance(error, OSError | PipelineError)):
                traceback.print_exc()
            self.failure = DeviceError(f"{self._detail}: {why or error}")

    def _move(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._leave.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)


class _Pace(_Mover):
    """Calls `turn(due_ns)` once for each block's time, and catches up when it was held up."""

    def __init__(self, detail: str, block: int, turn: Callable[[int], bool], skew_ppm: Ppm) -> None:
        super().__init__(detail)
        self._block = block
        self._turn = turn
        self._skew_ppm = skew_ppm

    def _move(self) -> None:
        promote_thread()
        due_ns = float(now_ns())
        while True:
            wait_ns = due_ns - now_ns()
            if wait_ns > 0:
                time.sleep(wait_ns / NS_PER_S)
            if self._leave.is_set() or not self._turn(round(due_ns)):
                return
            due_ns += self._block * NS_PER_S / (SAMPLE_RATE * (1 + self._skew_ppm() * PPM))


class _Eager(_Mover):
    """Takes one turn after another; each says whether it moved anything. When one did not, the next comes later."""

    def __init__(self, detail: str, turns: Iterator[bool]) -> None:
        super().__init__(detail)
        self._turns = turns

    def _move(self) -> None:
        for moved in self._turns:
            if self._leave.wait(0 if moved else _LOOK_AGAIN_S):
                return


class _EagerInput:
    """Blocks from an iterator, each delivered as soon as there is room for it."""

    latency_ms = 0.0

    def __init__(
        self,
        detail: str,
        blocks: Iterator[Samples],
        on_block: OnBlock,
        on_end: Callable[[], None],
        has_room: Callable[[], bool],
    ) -> None:
        self.detail = detail
        self._blocks = blocks
        self._on_block = on_block
        self._on_end = on_end
        self._has_room = has_room
        self._eager = _Eager(f"input {detail}", self._turns())

    def _turns(self) -> Iterator[bool]:
        for block in self._blocks:
            while not self._has_room():
                yield False
            self._on_block(block, now_ns(), False)
            yield True
        self._on_end()

    def start(self) -> None:
        self._eager.start()

    def stop(self) -> None:
        self._eager.stop()

    def failure(self) -> DeviceError | None:
        return self._eager.failure


class EagerOutput:
    """A file that gets what there is as soon as it is there, and is closed after the last of it."""

    latency_ms = 0.0

    def __init__(
        self, detail: str, move: Callable[[Write], bool], ended: Callable[[], bool], sink: "_FileSink"
    ) -> None:
        self.detail = detail
        self._move = move
        self._ended = ended
        self._sink = sink
        self._eager = _Eager(f"output {detail}", self._turns())
        self.complete = False
        """Whether everything was written and the file is closed."""

    def _turns(self) -> Iterator[bool]:
        while not self._ended():
            yield self._move(self._sink.write)
        self._sink.close()
        self.complete = True

    def start(self) -> None:
        self._sink.open()
        self._eager.start()

    def stop(self) -> None:
        self._eager.stop()
        self._sink.close()

    def failure(self) -> DeviceError | None:
        return self._eager.failure


class _PacedInput:
    """Blocks from an iterator, each delivered when its last sample would have been converted."""

    latency_ms = 0.0

    def __init__(
        self,
        detail: str,
        blocks: Iterator[Samples],
        on_block: OnBlock,
        on_end: Callable[[], None],
        skew_ppm: float,
    ) -> None:
        self.detail = detail
        self._blocks = blocks
        self._on_block = on_block
        self._on_end = on_end
        self._first = True
        try:
            self._block = next(blocks, None)  # to read a file for the first time takes long
        except RuntimeError as error:
            if (why := getattr(error, "error_string", None)) is None:  # not of libsndfile, which need not be loaded
                raise
            raise DeviceError(f"input {detail}: {why}") from None
        self._pace = _Pace(f"input {detail}", _PACED_INPUT_BLOCK, self._turn, lambda: skew_ppm)

    def _turn(self, due_ns: int) -> bool:
        if self._first:
            self._first = False  # the first block is complete one block later
        elif self._block is not None:
            self._on_block(self._block, due_ns - _PACED_INPUT_BLOCK * NS_PER_S // SAMPLE_RATE, False)
            self._block = next(self._blocks, None)
        if self._block is None:
            self._on_end()
        return self._block is not None

    def start(self) -> None:
        self._pace.start()

    def stop(self) -> None:
        self._pace.stop()

    def failure(self) -> DeviceError | None:
        return self._pace.failure


class _PacedOutput:
    """A sink that asks for each block when its first sample is due, and writes it to a file if there is one."""

    latency_ms = 0.0

    def __init__(self, detail: str, block: int, on_block: OnBlock, sink: "_FileSink | None", skew_ppm: Ppm) -> None:
        self.detail = detail
        self._on_block = on_block
        self._sink = sink
        self._samples = silence(block)
        self._pace = _Pace(f"output {detail}", block, self._turn, skew_ppm)

    def _turn(self, due_ns: int) -> bool:
        self._on_block(self._samples, due_ns, False)
        if self._sink is not None:
            self._sink.write(self._samples)
        return True

    def start(self) -> None:
        if self._sink is not None:
            self._sink.open()
        self._pace.start()

    def stop(self) -> None:
        self._pace.stop()
        if self._sink is not None:
            self._sink.close()

    def failure(self) -> DeviceError | None:
        return self._pace.failure


def _open_source(path: Path) -> "soundfile.SoundFile":
    import soundfile

    try:
        source = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        # Path.exists raises where a name is too long.
        if not os.path.exists(path):
            raise DeviceError(f"input file:{path}: no such file") from None
        raise DeviceError(f"input file:{path}: not a sound file: {error.error_string}") from None
    except (OSError, TypeError) as error:
        raise DeviceError(f"input file:{path}: not a sound file that can be read: {error}") from None
    if not source.frames:
        raise DeviceError(f"input file:{path}: holds 0 samples; expected at least 1")
    return source


def _file_blocks(path: Path, resume_at: int) -> Iterator[Samples]:
    """The file's samples from `resume_at` on, mixed to mono at 24 kHz, in blocks, the last one shorter."""
    source = _open_source(path)
    rate = source.samplerate

    def parts() -> Iterator[Samples]:
        resampler = _resampler(rate, SAMPLE_RATE)
        with source:
            for part in source.blocks(rate, dtype="float32", always_2d=True):
                mono = part[:, 0].copy() if part.shape[1] == 1 else part.mean(axis=1, dtype=np.float32)
                yield mono if resampler is None else resampler.resample_chunk(mono)
            if resampler is not None:
                yield resampler.resample_chunk(silence(0), last=True)

    def blocks() -> Iterator[Samples]:
        to_skip = resume_at
        rest = silence(0)
        for part in parts():
            skipped = min(to_skip, len(part))
            to_skip -= skipped
            rest = np.concatenate((rest, part[skipped:]))
            while len(rest) >= _PACED_INPUT_BLOCK:
                yield rest[:_PACED_INPUT_BLOCK]
                rest = rest[_PACED_INPUT_BLOCK:]
        if len(rest):
            yield rest

    return blocks()


def _tone_blocks(name: str, resume_at: int) -> Iterator[Samples]:
    """A sine wave of `name` Hz, for ever."""
    try:
        hz = float(name)
    except ValueError:
        hz = 0.0
    if not 0 < hz < SAMPLE_RATE / 2:
        raise DeviceError(f"input tone:{name}: expected a frequency between 0 and {SAMPLE_RATE // 2} Hz")

    def blocks() -> Iterator[Samples]:
        index = np.arange(resume_at, resume_at + _PACED_INPUT_BLOCK, dtype=np.float64)
        while True:
            yield (_TONE_LEVEL * np.sin(2 * np.pi * ((index * hz / SAMPLE_RATE) % 1.0))).astype(np.float32)
            index += _PACED_INPUT_BLOCK

    return blocks()


def _silent_blocks() -> Iterator[Samples]:
    block = silence(_PACED_INPUT_BLOCK)
    while True:
        yield block


class _FileSink:
    """A sound file to write to, of float samples where the format can hold them: in it is what was sent.

    It is looked at when it is made, and opened, with the loss of what it held, only when there is something to write.
    Raises DeviceError from both.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        import soundfile

        self._path = path
        self._resume = resume
        self._file: soundfile.SoundFile | None = None
        self._kind = path.suffix.lstrip(".").upper()
        known = soundfile.available_formats()
        if self._kind not in known:
            expected = ", ".join(sorted(known)).lower()
            raise DeviceError(
                f"output file:{path}: unknown kind of sound file {path.suffix!r}; expected one of {expected}"
            )
        there = path if os.path.exists(path) else path.parent
        if not os.path.exists(there) or os.path.isdir(path):
            raise DeviceError(f"output file:{path}: cannot be written: no such folder, or a folder itself")
        if not os.access(there, os.W_OK):
            raise DeviceError(f"output file:{path}: cannot be written: not permitted")

    def open(self) -> None:
        import soundfile

        path, kind = self._path, self._kind
        try:
            if self._resume and path.exists():
                if kind in _EXTENSIBLE:
                    self._file = soundfile.SoundFile(path, "r+")
                    self._file.seek(0, soundfile.SEEK_END)
                    return
                path = next(
                    other for n in itertools.count(2) if not (other := path.with_stem(f"{path.stem}.{n}")).exists()
                )
            subtype = "FLOAT" if soundfile.check_format(kind, "FLOAT") else soundfile.default_subtype(kind)
            self._file = soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, subtype, format=kind)
            # It would hold the time of day, and no file of two equal runs would be the other's.
            soundfile._snd.sf_command(self._file._file, _SET_ADD_PEAK_CHUNK, soundfile._ffi.NULL, False)
        except (OSError, soundfile.LibsndfileError) as error:
            reason = getattr(error, "error_string", None) or str(error)
            raise DeviceError(f"output file:{path}: cannot be written: {reason}") from None

    def write(self, samples: Samples) -> None:
        if self._file is not None:
            import soundfile

            try:
                self._file.write(samples)
            except soundfile.LibsndfileError as error:
                why = error.error_string.rstrip(".")
                raise DeviceError(f"cannot be written: {why}; is the disk full?") from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# PortAudio.


class _Dating:
    """Dates a stream's samples. The median of the last callbacks' dates takes out how late each callback was.

    A callback that comes late by 4 ms dates its block 4 ms wrong; with the median, half a millisecond is left
    (docs/latency.md). The first callbacks, before the device runs, are forgotten after as many.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._position = 0
        self._origins: deque[int] = deque(maxlen=_CALLBACKS)
        self._distances: deque[int] = deque(maxlen=_CALLBACKS)

    def date(self, count: int, distance_ns: int) -> int:
        """When the first sample of the next block, of `count` samples, is converted.

        `distance_ns` is how far from now that is by this callback's own account, negative where it was before.
        """
        elapsed_ns = self._position * NS_PER_S // self._rate
        self._position += count
        self._origins.append(now_ns() + distance_ns - elapsed_ns)
        self._distances.append(distance_ns)
        return _median(self._origins) + elapsed_ns

    @property
    def position(self) -> int:
        """Samples that were dated so far."""
        return self._position

    @property
    def distance_ms(self) -> float | None:
        """How far from its callback a block's first sample is converted; None before the first callback."""
        return _median(self._distances) / NS_PER_MS if self._distances else None


class _Underruns:
    """Notices that a device ran dry, whether PortAudio says so or not. It says it of each block that makes up for it.

    A sound server that had nothing to play for a moment puts in silence, and all dates are later from then on. The
    earliest of the last dates is looked at: a callback that is late dates its block later, and none dates it earlier.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._position = 0
        self._origins: deque[float] = deque(maxlen=_CALLBACKS)
        self._foretold_ns = 0.0
        self._sure_from = rate
        self._told_at = self._counted_at = -rate

    def seen(self, count: int, dac_ns: int, told: bool) -> bool:
        """Whether it ran dry, as no earlier block has said.

        The block has `count` samples, of which the first is due at `dac_ns` by its own callback's account. What is not
        told is found 25 callbacks later.
        """
        self._origins.append(dac_ns - self._position * NS_PER_S / self._rate)
        origin_ns = min(self._origins)
        sure = self._position >= max(self._sure_from, 2 * _CALLBACKS * count)
        slipped = sure and not told and origin_ns - self._foretold_ns > _SLIP_NS
        if sure and not slipped:
            self._foretold_ns += (origin_ns - self._foretold_ns) * min(1.0, count / self._rate / _FOLLOW_S)
        else:
            self._foretold_ns = origin_ns
        if slipped or told:
            # What the dates will be is not known before all that are looked at are from after it.
            self._sure_from = self._position + 2 * _CALLBACKS * count
        new = slipped or (told and self._is_another())
        self._position += count
        return new

    def _is_another(self) -> bool:
        """Whether a block that is said to make up for an underrun makes up for another one than the last that was."""
        since, self._told_at = self._position - self._told_at, self._position
        if since < _SAME_S * self._rate and self._position - self._counted_at < self._rate:
            return False
        self._counted_at = self._position
        return True


class _Silence:
    """Notices a device that calls no more though it is not said to have stopped.

    So does a card that was pulled out on macOS, and a sound server that hangs.
    """

    def __init__(self, clock: Callable[[], int] = now_ns) -> None:
        self._clock = clock
        self._position = 0
        self._since_ns = clock()
        self._looks = 0

    def lasts(self, position: int) -> bool:
        """Whether it has lasted too long, where the device has moved `position` samples so far."""
        now = self._clock()
        if position != self._position:
            self._position, self._since_ns, self._looks = position, now, 0
        self._looks += 1
        longest_ns = _NEXT_CALL_NS if position else _FIRST_CALL_NS
        return self._looks > _LOOKS and now - self._since_ns > longest_ns


def _median(values: deque[int]) -> int:
    return sorted(values)[len(values) // 2]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ALSA's and JACK's libraries write to standard error when PortAudio looks for devices."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _portaudio() -> Any:
    """The module sounddevice. Raises DeviceError where PortAudio is not installed."""
    try:
        with _quiet():
            import sounddevice
    except OSError as error:
        install = "brew install portaudio" if sys.platform == "darwin" else "apt-get install libportaudio2"
        raise DeviceError(f"the PortAudio library is missing ({error}): install it with `{install}`") from None
    return sounddevice


def renew() -> None:
    """Have PortAudio look for devices anew, which it does only when it begins. None of its streams may be open.

    Raises DeviceError.
    """
    sd = sys.modules.get("sounddevice")
    if sd is None:
        return
    try:
        with _quiet():
            while sd._initialized:
                sd._terminate()
            sd._initialize()
    except sd.PortAudioError as error:
        raise DeviceError(f"PortAudio does not begin: {error}") from None


class _Chosen(NamedTuple):
    device: int
    name: str
    rate: int


def _choose(sd: Any, name: str, kind: str) -> _Chosen:
    """The device that `name` (a part of its name, its index, or nothing) means, and the rate to open it at."""
    spec = f"{kind} device:{name}" if name else f"{kind} device"
    device = int(name) if name.isdecimal() else name or None
    try:
        found = sd.query_devices(device, kind)
    except (ValueError, sd.PortAudioError) as error:
        names = [repr(d["name"]) for d in sd.query_devices() if d[f"max_{kind}_channels"]]
        have = ", ".join(names) or "none"
        why = "is ambiguous" if "Multiple" in str(error) else "not found" if name else "there is no default"
        raise DeviceError(f"{spec}: {why}; {kind} devices here: {have}") from None
    check = sd.check_input_settings if kind == "input" else sd.check_output_settings
    own = round(found["default_samplerate"])
    for rate in (SAMPLE_RATE, own):
        with contextlib.suppress(sd.PortAudioError), _quiet():
            check(device=found["index"], channels=1, dtype="float32", samplerate=rate)
            return _Chosen(found["index"], found["name"], rate)
    raise DeviceError(f"{spec}: {found['name']!r} does neither {SAMPLE_RATE} nor {own} Hz, mono, float32")


class _PortAudioStream:
    """What input and output share: the stream, and that it may stop by itself when its device is lost."""

    _dating: _Dating

    def __init__(self, stream: Any, kind: str, chosen: _Chosen, threads_before: set[int], asked: str) -> None:
        self.name = chosen.name
        self.detail = f"{chosen.name} at {chosen.rate} Hz"
        self._kind = kind
        self._stream = stream
        self._threads_before = threads_before
        self._started = False
        self._silence = _Silence()
        self._default = apple.DefaultWatch(kind) if not asked else None

    def start(self) -> None:
        try:
            self._stream.start()
        except Exception as error:  # sounddevice's own, which is not imported here
            raise DeviceLostError(f"{self._kind} {self.detail}: cannot be started: {error}") from None
        # PortAudio's own, which calls back, and the sound system's, without which it would have nothing to call for.
        for thread in threads() - self._threads_before:
            promote_thread(thread)
        self._silence = _Silence()
        self._started = True

    def stop(self) -> None:
        self._started = False
        if not self._stream.closed:
            # Not stop(): that waits for buffers, for ever if the sound server is gone.
            self._stream.abort(ignore_errors=True)
            self._stream.close(ignore_errors=True)

    def failure(self) -> DeviceError | None:
        if not self._started:
            return None
        if not self._stream.active:
            return self._lost("the device has stopped")
        if self._silence.lasts(self._dating.position):
            return self._lost(f"the device has not called for {_NEXT_CALL_NS / NS_PER_S:g} s")
        if self._default is not None and self._default.has_changed(now_ns()):
            return DefaultChangedError(f"{self._kind} {self.detail}: another device is the default now")
        return None

    def _lost(self, why: str) -> DeviceLostError:
        return DeviceLostError(f"{self._kind} {self.detail}: {why}")


def is_found_anew(direction: str, spec: str) -> bool:
    """Whether a process that asks PortAudio now finds an `input` or `output` by the name in `spec`."""
    kind, _, name = spec.partition(":")
    if kind != "device" or not name:
        return False
    import subprocess

    try:
        done = subprocess.run(_LIST, capture_output=True, timeout=_LIST_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    found = json.loads(done.stdout)["devices"]
    return any(name.lower() in one["name"].lower() and one[f"{direction}s"] for one in found)


def is_portaudio(device: Device) -> bool:
    """Whether it is a device of PortAudio's, and none that stands in for one."""
    return isinstance(device, _PortAudioStream)


def let_go(device: Device) -> None:
    """Stop a device for good, and wait no longer than a moment for PortAudio: that of a dead sound system may block."""
    if not is_portaudio(device):
        device.stop()
        return
    stopping = threading.Thread(target=device.stop, name="let go", daemon=True)
    stopping.start()
    stopping.join(_LET_GO_S)


def by_name(spec: str, device: Device) -> str:
    """`spec`, or where it gives an index, which is another device's once one has come or gone, the same by its name."""
    if isinstance(device, _PortAudioStream) and spec.removeprefix("device:").isdecimal():
        return f"device:{device.name}"
    return spec


def _open_stream(sd: Any, make: Any, chosen: _Chosen, kind: str, **options: Any) -> Any:
    try:
        with _quiet():
            return make(
                device=chosen.device, channels=1, dtype="float32", samplerate=chosen.rate, clip_off=True,
                dither_off=True, **options,
            )  # fmt: skip
    except sd.PortAudioError as error:
        raise DeviceError(f"{kind} device {chosen.name!r} cannot be opened: {error}") from None


class _PortAudioInput(_PortAudioStream):
    """A microphone. The callback copies, resamples where the device cannot do 24 kHz, and hands on."""

    def __init__(self, name: str, block: int, latency_ms: float, on_block: OnBlock) -> None:
        threads_before = threads()
        sd = _portaudio()
        chosen = _choose(sd, name, "input")
        self._on_block = on_block
        self._rate = chosen.rate
        self._dating = _Dating(chosen.rate)
        self._resampler = _resampler(chosen.rate, SAMPLE_RATE)
        self._taken = 0
        self._given = 0
        device_block = block * chosen.rate // SAMPLE_RATE
        self._samples = silence(device_block)
        stream = _open_stream(
            sd, sd.InputStream, chosen, "input",
            blocksize=device_block, latency=latency_ms / 1_000, callback=self._callback,
        )  # fmt: skip
        super().__init__(stream, "input", chosen, threads_before, name)

    @property
    def latency_ms(self) -> float:
        distance_ms = self._dating.distance_ms
        if distance_ms is None:
            return float(self._stream.latency) * 1_000
        return max(0.0, -distance_ms - len(self._samples) * 1_000 / self._rate)

    def _callback(self, data: Samples, count: int, at: Any, status: Any) -> None:
        # Differences of two of a callback's own times: which clock PortAudio keeps depends on version and system.
        adc_ns = self._dating.date(count, round((at.inputBufferAdcTime - at.currentTime) * NS_PER_S))
        samples = self._samples[:count]
        samples[:] = data[:, 0]
        if self._resampler is not None:
            # The resampler's output lags behind its input by what it still holds.
            held_ns = self._taken * NS_PER_S // self._rate - self._given * NS_PER_S // SAMPLE_RATE
            adc_ns -= held_ns
            samples = self._resampler.resample_chunk(samples)
            self._taken += count
            self._given += len(samples)
        self._on_block(samples, adc_ns, bool(status.input_overflow))


class _Converter:
    """What a Vernier is, for a device with a rate of its own: the resampler that it needs has the drift in its ratio.

    soxr's variable rate is used because it takes a new ratio without a joint, and holds 10 ms where its fixed one
    comes with 35 ms at once.
    """

    def __init__(self, rate: int, block: int, on_block: OnBlock, correction_ppm: Ppm) -> None:
        import soxr

        self._rate = rate
        self._on_block = on_block
        self._correction_ppm = correction_ppm
        fastest = SAMPLE_RATE * (1 + MOST_PPM * PPM)
        self._resampler = soxr.ResampleStream(fastest, rate, 1, dtype="float32", quality=_RESAMPLER, vr=True)
        self._samples = silence(block)
        self._held = silence(0)
        self._ahead = 0.0  # samples that were asked for and not delivered
        self._xrun = False

    @property
    def ahead_ms(self) -> float:
        """How long before its time a sample is asked for."""
        return self._ahead * 1_000 / SAMPLE_RATE

    def fill(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        """Fill one block, shape (n,), whose first sample the device converts at `dac_ns`."""
        pace = SAMPLE_RATE * (1 + self._correction_ppm() * PPM)
        self._resampler.set_io_ratio(pace, self._rate)
        self._xrun |= xrun
        while len(self._held) < len(out):
            # What was asked for and not delivered yet sounds before this block does.
            self._on_block(self._samples, dac_ns + round(self._ahead * NS_PER_S / pace), self._xrun)
            self._xrun = False
            self._ahead += len(self._samples)
            self._held = np.concatenate((self._held, self._resampler.resample_chunk(self._samples)))
        np.clip(self._held[: len(out)], -FULL_SCALE, FULL_SCALE, out=out)
        self._held = self._held[len(out) :]
        self._ahead -= len(out) * pace / self._rate


class _PortAudioOutput(_PortAudioStream):
    """A speaker. The callback asks for as many samples as the device wants, and copies them."""

    def __init__(self, name: str, block: int, latency_ms: float, on_block: OnBlock, correction_ppm: Ppm) -> None:
        threads_before = threads()
        sd = _portaudio()
        chosen = _choose(sd, name, "output")
        self._dating = _Dating(chosen.rate)
        self._underruns = _Underruns(chosen.rate)
        self._edge: Vernier | _Converter
        if chosen.rate == SAMPLE_RATE:
            self._edge = Vernier(on_block, correction_ppm)
        else:
            self._edge = _Converter(chosen.rate, block, on_block, correction_ppm)
        stream = _open_stream(
            sd, sd.OutputStream, chosen, "output",
            blocksize=block * chosen.rate // SAMPLE_RATE, latency=latency_ms / 1_000, callback=self._callback,
        )  # fmt: skip
        super().__init__(stream, "output", chosen, threads_before, name)

    @property
    def latency_ms(self) -> float:
        distance_ms = self._dating.distance_ms
        device_ms = float(self._stream.latency) * 1_000 if distance_ms is None else max(0.0, distance_ms)
        return device_ms + self._edge.ahead_ms

    def _callback(self, data: Samples, count: int, at: Any, status: Any) -> None:
        distance_ns = round((at.outputBufferDacTime - at.currentTime) * NS_PER_S)
        xrun = self._underruns.seen(count, now_ns() + distance_ns, bool(status.output_underflow))
        self._edge.fill(data[:, 0], self._dating.date(count, distance_ns), xrun)


def describe() -> dict[str, Any]:
    """Every PortAudio device: index, name, host API, channels, own rate and latencies. Raises DeviceError."""
    sd = _portaudio()
    apis = sd.query_hostapis()
    inputs, outputs = sd.default.device
    return {
        "portaudio": sd.get_portaudio_version()[1],
        "devices": [
            {
                "index": device["index"],
                "name": device["name"],
                "api": apis[device["hostapi"]]["name"],
                "inputs": device["max_input_channels"],
                "outputs": device["max_output_channels"],
                "rate": device["default_samplerate"],
                "input_latency_ms": device["default_low_input_latency"] * 1_000,
                "output_latency_ms": device["default_low_output_latency"] * 1_000,
                "default_input": device["index"] == inputs,
                "default_output": device["index"] == outputs,
            }
            for device in sd.query_devices()
        ],
    }


def main() -> None:
    """Print the devices as JSON, for programs that may not load PortAudio themselves."""
    argparse.ArgumentParser(prog="python -m procs.devices", description=main.__doc__).parse_args()
    try:
        print(json.dumps(describe()))
    except DeviceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
