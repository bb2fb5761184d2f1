"""Which audio callback glitches least: one in Python, or one in C (rtmixer), under which scheduling.

    python -m bench.callback [--seconds N] [--json FILE]

A ramp in which every sample names its own index is played to a virtual speaker, which is recorded, and at the same
time another one is captured from a virtual microphone. Player and capturer are processes of their own, as stages are.
Every sample that is missing, repeated, or replaced by silence is found in the recordings.

All callbacks are fed, and emptied, by a Python thread that wakes each FEED_S, with the same lookahead. The variants
take turns, and all take as many turns as there are repeats, so that whatever else the machine does hits all alike.
Needs Linux with PulseAudio, as tests/soundserver.py does, and the packages of the extra `bench`.
"""

import argparse
import contextlib
import dataclasses
import enum
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import soundfile
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.topology import SAMPLE_RATE
from tests.soundserver import MICROPHONE, SPEAKER, SoundServer, missing

Samples = npt.NDArray[np.float32]

BLOCKS: Final = (120, 240, 480)
"""Samples a callback."""

LATENCY_MS: Final = 20.0
"""What PortAudio is asked for, at every block size."""

LOOKAHEAD: Final = 1_920
"""Samples that the feeder keeps ready for the callback: 80 ms."""

RING: Final = 1 << 15
"""Samples that a ring can hold: 1.4 s. A power of two, as rtmixer's must be."""

FEED_S: Final = 0.005
REALTIME_PRIORITY: Final = 4
"""What the product asks for: below the threads of PulseAudio, which are at 5."""
BUSY_LOOPS_PER_CORE: Final = 2

SECONDS: Final = 8
REPEATS: Final = 3
MAX_SECONDS: Final = 600

RAMP_SCALE: Final = 1 << 24
"""Sample i of the ramp is (i + 1) / RAMP_SCALE: every integer up to there is exact in float32. 0 is silence."""

SETTLE_S: Final = 0.5
"""Between the start of the streams and that of the signal."""

FLUSH_S: Final = 0.4
"""Silence that is played after the signal, longer than any buffer on the way."""

CAPTURE_SPARE_S: Final = 10
CHILD_TIMEOUT_S: Final = 60
NS_PER_MS: Final = 1_000_000
MS_PER_SAMPLE: Final = 1_000 / SAMPLE_RATE
PERCENT: Final = 100
BUSY_LOOP: Final = "while True: pass"
TABLE_WIDTH: Final = 120
COLUMNS: Final = (
    "block", "callback", "glitches", "each turn", "ms", "longest", "xruns", "starved", "interval p50/p99/max ms",
    "CPU %",
)  # fmt: skip


class Realtime(enum.Enum):
    """Which threads run under SCHED_FIFO."""

    NONE = ""
    CALLBACK = " fifo"
    """The one that calls back, which PortAudio made."""
    AUDIO = " fifo all"
    """That one and those of the libraries below: PulseAudio's client has one that talks to the server."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to serve the device."""

    in_c: bool
    """The callback is rtmixer's."""
    realtime: Realtime

    @property
    def name(self) -> str:
        """As the tables call it."""
        return ("rtmixer" if self.in_c else "python") + self.realtime.value


VARIANTS: Final = tuple(Variant(in_c, realtime) for in_c in (False, True) for realtime in Realtime)


@dataclasses.dataclass(frozen=True)
class Glitches:
    """What is wrong with a ramp that was played or captured."""

    count: int
    """Places at which a sample is not followed by its successor."""
    total_ms: float
    """Silence put in, plus signal left out or repeated."""
    longest_ms: float


@dataclasses.dataclass(frozen=True)
class Served:
    """What a player or capturer tells about one turn."""

    xruns: int
    """Callbacks to which PortAudio reported an under- or overflow."""
    starved: int
    """Times at which the feeder came too late for the callback."""
    intervals_ms: tuple[float, float, float] | None
    """Between two callbacks: p50, p99 and longest; None where the callback cannot tell."""
    cpu_percent: float
    """Of one core, all threads of the process."""
    realtime: bool
    """SCHED_FIFO was granted wherever it was asked for."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One variant at one block size for the length of one signal, in one direction."""

    direction: str
    variant: str
    block: int
    loaded: bool
    repeat: int
    glitches: Glitches
    served: Served
    busy_percent: float
    """Of all cores, this benchmark included."""
    stolen_percent: float
    """Of all cores: what a virtual machine's host kept for others."""


def ramp(count: int) -> Samples:
    """`count` samples, each of which names its own index."""
    return (np.arange(1, count + 1, dtype=np.float64) / RAMP_SCALE).astype(np.float32)


def find_glitches(samples: Samples, count: int) -> Glitches:
    """Compare `samples` with `ramp(count)` between two stretches of silence."""
    names = np.rint(samples.astype(np.float64) * RAMP_SCALE).astype(np.int64)
    places = np.flatnonzero(names)
    if not len(places):
        return Glitches(1, count * MS_PER_SAMPLE, count * MS_PER_SAMPLE)
    put_in = np.diff(places) - 1
    left_out = np.diff(names[places], prepend=0, append=count + 1) - 1
    wrong = np.abs(left_out)
    wrong[1:-1] += put_in
    wrong = wrong[wrong > 0]
    longest = int(wrong.max(initial=0))
    return Glitches(len(wrong), int(wrong.sum()) * MS_PER_SAMPLE, longest * MS_PER_SAMPLE)


# A player and a capturer, each with a callback in Python and one in C.


def threads() -> set[int]:
    """The ids of this process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}


class Promoter:
    """Puts the audio threads of a stream under SCHED_FIFO. To be made before the stream is opened."""

    def __init__(self, realtime: Realtime) -> None:
        self.granted = True
        self._realtime = realtime
        self._before_open = threads()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around the start of the stream: the thread that comes into being there is the one that calls back."""
        before_start = threads()
        yield
        match self._realtime:
            case Realtime.CALLBACK:
                self._promote(threads() - before_start)
            case Realtime.AUDIO:
                self._promote(threads() - self._before_open)

    def _promote(self, chosen: set[int]) -> None:
        for thread in chosen:
            try:
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))
            except PermissionError:
                self.granted = False


class Stamps:
    """When callbacks began. Adding one allocates nothing that lasts."""

    def __init__(self, capacity: int) -> None:
        self._at_ns = np.zeros(capacity, np.int64)
        self._count = 0

    def add(self) -> None:
        """Stamp one callback."""
        self._at_ns[self._count % len(self._at_ns)] = time.monotonic_ns()
        self._count += 1

    def clear(self) -> None:
        """Forget what came before the signal."""
        self._count = 0

    def intervals_ms(self) -> tuple[float, float, float]:
        """p50, p99 and the longest."""
        intervals = np.diff(self._at_ns[: self._count]) / NS_PER_MS
        p50, p99 = np.percentile(intervals, [50, 99])
        return float(p50), float(p99), float(intervals.max())


class Ring:
    """One writer, one reader, in one process: the counts are only ever changed by their own side."""

    def __init__(self) -> None:
        self._samples = np.zeros(RING, np.float32)
        self.written = 0
        self.taken = 0

    @property
    def available(self) -> int:
        """Samples that wait to be taken."""
        return self.written - self.taken

    def write(self, samples: Samples) -> None:
        """Add samples. That there is room is the caller's care."""
        at = self.written % RING
        first = min(len(samples), RING - at)
        self._samples[at : at + first] = samples[:first]
        self._samples[: len(samples) - first] = samples[first:]
        self.written += len(samples)

    def take(self, into: Samples) -> int:
        """Fill `into`, shape (n,), as far as there are samples; returns how far."""
        count = min(len(into), self.available)
        at = self.taken % RING
        first = min(count, RING - at)
        into[:first] = self._samples[at : at + first]
        into[first:count] = self._samples[: count - first]
        self.taken += count
        return count


class Device(Protocol):
    """One side of the sound card, with its callback and the ring that it works on."""

    starved: int

    @property
    def realtime(self) -> bool: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def begin(self) -> None:
        """The signal begins now: count from here."""

    def xruns(self) -> int:
        """Since the start; of a stopped device."""

    def intervals_ms(self) -> tuple[float, float, float] | None: ...


class Speaker(Device, Protocol):
    """A device that plays what is written."""

    def room(self) -> int:
        """Samples by which the ring is short of LOOKAHEAD."""

    def write(self, samples: Samples) -> None: ...


class Microphone(Device, Protocol):
    """A device that captures."""

    def read(self) -> Samples:
        """All that has come since the last call."""


class PythonDevice:
    """A stream whose callback is a Python function that copies to or from a Ring."""

    def __init__(self, make_stream: Any, name: str, block: int, seconds: int, realtime: Realtime) -> None:
        self.starved = 0
        self.ring = Ring()
        self._xruns = 0
        self._stamps = Stamps((seconds + CAPTURE_SPARE_S) * SAMPLE_RATE // block)
        self._promoter = Promoter(realtime)
        self._stream = make_stream(**stream_options(name, block), callback=self._callback, dtype="float32")

    @property
    def realtime(self) -> bool:
        return self._promoter.granted

    def _callback(self, data: Samples, count: int, at: Any, status: Any) -> None:
        self._stamps.add()
        if status:
            self._xruns += 1
        self.serve(data[:, 0])

    def serve(self, block: Samples) -> None:
        """Move one block, shape (n,)."""
        raise NotImplementedError

    def start(self) -> None:
        with self._promoter.starting():
            self._stream.start()

    def stop(self) -> None:
        self._stream.stop()
        self._stream.close()

    def begin(self) -> None:
        self._stamps.clear()
        self.starved = self._xruns = 0

    def xruns(self) -> int:
        return self._xruns

    def intervals_ms(self) -> tuple[float, float, float] | None:
        return self._stamps.intervals_ms()


class PythonSpeaker(PythonDevice):
    """Plays from a Ring, and silence when it is empty."""

    def serve(self, block: Samples) -> None:
        taken = self.ring.take(block)
        if taken < len(block):
            block[taken:] = 0
            self.starved += self.ring.written > 0

    def room(self) -> int:
        return LOOKAHEAD - self.ring.available

    def write(self, samples: Samples) -> None:
        self.ring.write(samples)


class PythonMicrophone(PythonDevice):
    """Captures into a Ring."""

    def serve(self, block: Samples) -> None:
        if self.ring.available + len(block) > RING:
            self.starved += 1
            return
        self.ring.write(block)

    def read(self) -> Samples:
        samples = np.empty(self.ring.available, np.float32)
        self.ring.take(samples)
        return samples


class RtmixerDevice:
    """A stream whose callback is rtmixer's, in C, with its own ring buffer.

    rtmixer lets go of a ring buffer that runs empty, or full: it has to be handed over anew.
    """

    def __init__(self, make_stream: Any, ring: Any, name: str, block: int, realtime: Realtime) -> None:
        self.starved = 0
        self.ring = ring
        self._promoter = Promoter(realtime)
        self.stream = make_stream(**stream_options(name, block))

    @property
    def realtime(self) -> bool:
        return self._promoter.granted

    def start(self) -> None:
        with self._promoter.starting():
            self.stream.start()

    def stop(self) -> None:
        self.stream.stop()
        self._stats = self.stream.stats
        self.stream.close()

    def begin(self) -> None:
        self.stream.wait(self.stream.fetch_and_reset_stats())
        self.starved = 0

    def xruns(self) -> int:
        return int(self._stats.output_underflows + self._stats.input_overflows)

    def intervals_ms(self) -> tuple[float, float, float] | None:
        return None


class RtmixerSpeaker(RtmixerDevice):
    """Plays from rtmixer's ring buffer."""

    _handed_over = False

    def room(self) -> int:
        return LOOKAHEAD - int(self.ring.read_available)

    def write(self, samples: Samples) -> None:
        self.ring.write(samples)
        if not self.stream.actions:
            self.starved += self._handed_over
            self._handed_over = True
            self.stream.play_ringbuffer(self.ring)


class RtmixerMicrophone(RtmixerDevice):
    """Captures into rtmixer's ring buffer."""

    def begin(self) -> None:
        super().begin()
        self.stream.record_ringbuffer(self.ring)

    def read(self) -> Samples:
        samples = np.frombuffer(self.ring.read(), np.float32)
        if not self.stream.actions:
            self.starved += 1
            self.stream.record_ringbuffer(self.ring)
        return samples


def stream_options(name: str, block: int) -> dict[str, Any]:
    """The same stream for all."""
    return {
        "device": name,
        "channels": 1,
        "samplerate": SAMPLE_RATE,
        "blocksize": block,
        "latency": LATENCY_MS / 1_000,
    }


def open_speaker(variant: Variant, block: int, seconds: int) -> Speaker:
    """Open the virtual speaker."""
    if variant.in_c:
        import rtmixer

        ring = rtmixer.RingBuffer(np.float32().nbytes, RING)
        return RtmixerSpeaker(rtmixer.Mixer, ring, SPEAKER, block, variant.realtime)
    import sounddevice

    return PythonSpeaker(sounddevice.OutputStream, SPEAKER, block, seconds, variant.realtime)


def open_microphone(variant: Variant, block: int, seconds: int) -> Microphone:
    """Open the virtual microphone."""
    if variant.in_c:
        import rtmixer

        ring = rtmixer.RingBuffer(np.float32().nbytes, RING)
        return RtmixerMicrophone(rtmixer.Recorder, ring, MICROPHONE, block, variant.realtime)
    import sounddevice

    return PythonMicrophone(sounddevice.InputStream, MICROPHONE, block, seconds, variant.realtime)


# What the player's and the capturer's process do. Standard input says when; the last line of output is the answer.


def each_feed(turn: Callable[[], bool]) -> threading.Thread:
    """Call `turn` each FEED_S in a thread of its own, as long as it returns True."""

    def run() -> None:
        while turn():
            time.sleep(FEED_S)

    thread = threading.Thread(target=run, name="feeder")
    thread.start()
    return thread


def settle(device: Device) -> None:
    """Start the device, and wait until the parent says that the signal is due."""
    device.start()
    gc.collect()
    gc.freeze()
    gc.disable()
    time.sleep(SETTLE_S)
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")
    device.begin()
    print("begun", flush=True)


@contextlib.contextmanager
def measured(device: Device, answer: dict[str, Any]) -> Iterator[None]:
    """Stop the device at the end, and put what it served into `answer`."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    yield
    cpu_percent = PERCENT * (time.process_time() - cpu_s) / (time.monotonic() - wall_s)
    intervals = device.intervals_ms()
    starved = device.starved
    device.stop()
    answer["served"] = dataclasses.asdict(Served(device.xruns(), starved, intervals, cpu_percent, device.realtime))


def play(variant: Variant, block: int, seconds: int) -> dict[str, Any]:
    """Play the ramp."""
    signal_ = ramp(seconds * SAMPLE_RATE)
    speaker = open_speaker(variant, block, seconds)
    settle(speaker)
    fed = 0

    def feed() -> bool:
        nonlocal fed
        part = signal_[fed : fed + max(0, speaker.room())]
        speaker.write(part)
        fed += len(part)
        return fed < len(signal_)

    answer: dict[str, Any] = {}
    with measured(speaker, answer):
        each_feed(feed).join()
        starved = speaker.starved
        time.sleep(FLUSH_S)
        speaker.starved = starved
    return answer


def capture(variant: Variant, block: int, seconds: int) -> dict[str, Any]:
    """Capture until the parent says that the ramp has been fed."""
    taken = np.zeros((seconds + CAPTURE_SPARE_S) * SAMPLE_RATE, np.float32)
    microphone = open_microphone(variant, block, seconds)
    settle(microphone)
    count = 0
    leave = threading.Event()

    def drain() -> bool:
        nonlocal count
        last = leave.is_set()
        samples = microphone.read()
        taken[count : count + len(samples)] = samples
        count += len(samples)
        return not last

    answer: dict[str, Any] = {}
    with measured(microphone, answer):
        drainer = each_feed(drain)
        sys.stdin.readline()
        leave.set()
        drainer.join()
    answer["glitches"] = dataclasses.asdict(find_glitches(taken[:count], seconds * SAMPLE_RATE))
    return answer


# The benchmark itself.


class Child:
    """A player or capturer in its process."""

    def __init__(self, server: SoundServer, direction: str, variant: Variant, block: int, seconds: int) -> None:
        command = [sys.executable, "-m", "bench.callback", direction, variant.name, str(block)]
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            env=os.environ | server.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        """Return when its stream runs."""
        self._expect("ready")

    def begin(self) -> None:
        """Say that the signal is due, and wait until it is ready for that as well."""
        self.tell()
        self._expect("begun")

    def tell(self) -> None:
        """Say that it is time."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != word:
            raise RuntimeError(self._process.communicate()[1])

    def answer(self) -> dict[str, Any]:
        """What it has to say at its end."""
        output, errors = self._process.communicate(timeout=CHILD_TIMEOUT_S)
        if self._process.returncode:
            raise RuntimeError(errors)
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Have as many processes compute without a pause."""
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", BUSY_LOOP]
    burners = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.send_signal(signal.SIGKILL)
            burner.wait()


def take_turn(variant: Variant, block: int, loaded: bool, repeat: int, seconds: int) -> list[Turn]:
    """Play and capture for `seconds`, both with the same variant, on a sound server of their own."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(SoundServer(SAMPLE_RATE))
        stack.enter_context(load(BUSY_LOOPS_PER_CORE * (os.cpu_count() or 1) if loaded else 0))
        fed, heard = server.folder / "fed.wav", server.folder / "heard.wav"
        soundfile.write(fed, ramp(seconds * SAMPLE_RATE), SAMPLE_RATE, subtype="FLOAT")
        player, capturer = (Child(server, name, variant, block, seconds) for name in ("play", "capture"))
        stack.callback(player.end)
        stack.callback(capturer.end)
        player.wait_ready()
        capturer.wait_ready()
        psutil.cpu_times_percent()
        with server.record(heard):
            capturer.begin()
            player.begin()
            server.feed(fed).wait()
            played = player.answer()
        cores = psutil.cpu_times_percent()
        capturer.tell()
        captured = capturer.answer()
        samples = soundfile.read(heard, dtype="float32")[0]
        played["glitches"] = dataclasses.asdict(find_glitches(samples, seconds * SAMPLE_RATE))
    return [
        Turn(
            direction=direction,
            variant=variant.name,
            block=block,
            loaded=loaded,
            repeat=repeat,
            glitches=Glitches(**answer["glitches"]),
            served=Served(**answer["served"]),
            busy_percent=PERCENT - cores.idle,
            stolen_percent=cores.steal,
        )
        for direction, answer in (("play", played), ("capture", captured))
    ]


def take_turns(seconds: int, repeats: int, progress: Console) -> list[Turn]:
    """All variants in turn at every block size, with cores busy and idle; and all of that again for each repeat."""
    turns = []
    for repeat in range(repeats):
        for loaded in (True, False):
            for block in BLOCKS:
                for variant in VARIANTS:
                    progress.print(f"repeat {repeat + 1}, {'busy' if loaded else 'idle'}, {block}, {variant.name}")
                    turns += take_turn(variant, block, loaded, repeat, seconds)
    return turns


def table(direction: str, loaded: bool, turns: list[Turn], seconds: int) -> Table:
    """One row a variant and block size, all its turns together."""
    mine = [turn for turn in turns if turn.direction == direction and turn.loaded == loaded]
    repeats = len({turn.repeat for turn in mine})
    busy = statistics.median(turn.busy_percent for turn in mine)
    stolen = max(turn.stolen_percent for turn in mine)
    title = (
        f"{direction}, cores {'busy' if loaded else 'idle'} ({busy:.0f} %, at most {stolen:.0f} % stolen by the host)"
    )
    title += f": {repeats} x {seconds} s a row"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in COLUMNS:
        found.add_column(heading, justify="left" if heading == "callback" else "right", no_wrap=True)
    for block in BLOCKS:
        for variant in VARIANTS:
            row = [turn for turn in mine if turn.block == block and turn.variant == variant.name]
            found.add_row(str(block), *summary(variant, row))
        found.add_section()
    return found


def summary(variant: Variant, turns: list[Turn]) -> list[str]:
    """The cells of a row: sums; of the intervals the medians and the longest; of the CPU time the median."""
    glitches = [turn.glitches for turn in turns]
    served = [turn.served for turn in turns]
    spreads = [one.intervals_ms for one in served if one.intervals_ms is not None]
    intervals = "-"
    if spreads:
        p50, p99, longest = zip(*spreads, strict=True)
        intervals = f"{statistics.median(p50):.1f} / {statistics.median(p99):.1f} / {max(longest):.1f}"
    permitted = all(one.realtime for one in served)
    return [
        variant.name if permitted else f"{variant.name} (not permitted)",
        str(sum(one.count for one in glitches)),
        " ".join(str(one.count) for one in glitches),
        f"{sum(one.total_ms for one in glitches):.0f}",
        f"{max(one.longest_ms for one in glitches):.0f}",
        str(sum(one.xruns for one in served)),
        str(sum(one.starved for one in served)),
        intervals,
        f"{statistics.median(one.cpu_percent for one in served):.1f}",
    ]


def machine() -> dict[str, Any]:
    """What it ran on."""
    pulse = subprocess.run(["pulseaudio", "--version"], capture_output=True, text=True, check=True)
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pulseaudio": pulse.stdout.strip(),
        **{name: version(name) for name in ("numpy", "sounddevice", "rtmixer", "pa-ringbuffer")},
    }


def bench(seconds: int, repeats: int, path: Path | None) -> None:
    """Run all, print the tables, write the JSON."""
    package = missing()
    if package is not None:
        sys.exit(f"package {package} is not installed")
    turns = take_turns(seconds, repeats, Console(stderr=True))
    console = Console(width=TABLE_WIDTH)
    for loaded in (True, False):
        for direction in ("play", "capture"):
            console.print(table(direction, loaded, turns, seconds))
    if path is not None:
        settings = {"seconds": seconds, "repeats": repeats, "latency_ms": LATENCY_MS, "lookahead_samples": LOOKAHEAD}
        found = {"machine": machine(), "settings": settings, "turns": [dataclasses.asdict(turn) for turn in turns]}
        path.write_text(json.dumps(found, indent=1) + "\n")


def signal_seconds(text: str) -> int:
    """A signal's length: a ramp of more than RAMP_SCALE samples would not be exact."""
    seconds = int(text)
    if not 1 <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_SECONDS}, not {seconds}")
    return seconds


def main() -> None:
    """The benchmark, or, with a command, the process of a player or capturer."""
    parser = argparse.ArgumentParser(prog="python -m bench.callback", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=signal_seconds, default=SECONDS, help="of signal in each turn")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns that each variant takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn there")
    parser.add_argument("direction", nargs="?", choices=("play", "capture"), help="(used by the benchmark itself)")
    parser.add_argument("variant", nargs="?", choices=[variant.name for variant in VARIANTS], help="(likewise)")
    parser.add_argument("block", nargs="?", type=int, help="(likewise)")
    arguments = parser.parse_args()
    if arguments.direction is None:
        bench(arguments.seconds, arguments.repeats, arguments.json)
        return
    variant = next(variant for variant in VARIANTS if variant.name == arguments.variant)
    serve = play if arguments.direction == "play" else capture
    print(json.dumps(serve(variant, arguments.block, arguments.seconds)), flush=True)


if __name__ == "__main__":
    main()
