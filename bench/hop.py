"""Two processes and one way of passing frames between them, for bench/ring.py.

    python -m bench.hop TRANSPORT FOLDER

It starts a writer and a reader, reads one task a line from standard input and prints one result a line, both JSON. Its
files are in the folder, or named after it: who made that removes them, however this program ends. It runs in the
peers' environment too: outside of the transports that are ours it imports numpy and the standard library alone.

All transports do the same work. The writer makes a new array for each message, as one makes it who has just recorded
or computed it, then stamps it with the monotonic clock and sends it. The message has arrived when the reader has it as
a numpy array that stays as it is when the next one comes; then the reader looks at the clock.
"""

import asyncio
import ctypes
import json
import multiprocessing
import queue
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
Task = dict[str, Any]
"""samples: of a message; count: messages; interval_s: between them, 0 for back to back; before_s: nothing is sent."""

LARGEST: Final = 1_920
_RING_S: Final = 10.0
_TICK_S: Final = 0.16
"""How long a stage sleeps at most."""
_POLL_S: Final = 0.001
_UNREAD: Final = 64
_STAMP: Final = slice(0, 2)
_NUMBER_AT: Final = 2


class Writer(Protocol):
    """The sending end, made with a folder for its files and what the transport's two ends share."""

    def __init__(self, folder: Path, shared: Any) -> None: ...

    def send(self, samples: Samples) -> None:
        """Send one message; wait where a bounded transport is full."""


class Reader(Protocol):
    """The receiving end."""

    def __init__(self, folder: Path, shared: Any) -> None: ...

    def receive(self, samples: int) -> Samples:
        """Sleep until there is a message of so many samples, and take it."""


# Ours


class RingWriter:
    """Writes and rings the bell, as the capture stage does. Where nothing may be lost it waits for room, as offline."""

    def __init__(self, folder: Path, shared: Any) -> None:
        from pipeline import ring
        from pipeline.bell import Bell

        self._writer = ring.RingWriter(ring.Ring.attach(ring.segment_name(folder, "bench")))
        self._bell = Bell(folder / "bell")

    def send(self, samples: Samples) -> None:
        while self._writer.room < len(samples):
            time.sleep(_POLL_S)
        self._writer.write(samples)
        self._bell.ring()


class RingReader:
    """Waits as the inference stage does: for the bell and for orders of the supervisor."""

    def __init__(self, folder: Path, shared: Any) -> None:
        from pipeline import ring
        from pipeline.bell import Bell
        from pipeline.control import StageLink

        self._reader = ring.Consumer(ring.Ring.attach(ring.segment_name(folder, "bench")))
        self._bell = Bell(folder / "bell")
        self._link = StageLink(folder / "stages", "inference")
        self._link.watch(self._bell)

    def receive(self, samples: int) -> Samples:
        out = np.empty(samples, np.float32)
        while self._reader.available < samples:
            self._link.wait(_TICK_S)
            self._bell.clear()
        self._reader.read(out)
        self._reader.consume(samples)
        return out


class PromotedWriter(RingWriter):
    """At the priority of the thread in which an audio device calls."""

    def __init__(self, folder: Path, shared: Any) -> None:
        from pipeline.timing import promote_thread

        super().__init__(folder, shared)
        promote_thread()


class PromotedReader(RingReader):
    """At the priority of an inference stage that only copies."""

    def __init__(self, folder: Path, shared: Any) -> None:
        from pipeline.timing import promote_thread

        super().__init__(folder, shared)
        promote_thread()


@contextmanager
def ring_place(folder: Path) -> Iterator[Any]:
    """A ring, and the supervisor's end of the stage's line."""
    from pipeline import ring
    from pipeline.control import Hub

    ring.Ring.create(ring.segment_name(folder, "bench"), _RING_S).close()
    hub = Hub(folder / "control", folder / "events", folder / "stages")
    try:
        yield None
    finally:
        hub.close()


# Upstream's


class QueueWriter:
    """put_nowait, as in upstream's local.py."""

    def __init__(self, folder: Path, shared: Any) -> None:
        self._queue = shared

    def send(self, samples: Samples) -> None:
        self._queue.put_nowait(samples)


class QueueReader:
    """get(), as in upstream's server."""

    def __init__(self, folder: Path, shared: Any) -> None:
        self._queue = shared

    def receive(self, samples: int) -> Samples:
        received: Samples = self._queue.get()
        return received


class PollingReader:
    """Looks every millisecond, from asyncio, as upstream's client does."""

    def __init__(self, folder: Path, shared: Any) -> None:
        self._queue = shared
        self._loop = asyncio.new_event_loop()

    def receive(self, samples: int) -> Samples:
        return self._loop.run_until_complete(self._next())

    async def _next(self) -> Samples:
        while True:
            try:
                received: Samples = self._queue.get(block=False)
            except queue.Empty:
                await asyncio.sleep(_POLL_S)
            else:
                return received


@contextmanager
def queue_place(_: Path) -> Iterator[Any]:
    """The queue, which the two processes inherit."""
    shared = multiprocessing.get_context("spawn").Queue()
    yield shared
    shared.close()
    shared.join_thread()


# ZeroMQ


class ZmqWriter:
    """PUSH over ipc, without a copy in Python."""

    def __init__(self, folder: Path, shared: Any) -> None:
        import zmq

        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(f"ipc://{folder}/zmq")

    def send(self, samples: Samples) -> None:
        self._socket.send(samples.data, copy=False)


class ZmqReader:
    """PULL over ipc; the array lies in the message's own memory."""

    def __init__(self, folder: Path, shared: Any) -> None:
        import zmq

        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.bind(f"ipc://{folder}/zmq")

    def receive(self, samples: int) -> Samples:
        return np.frombuffer(self._socket.recv(copy=False).buffer, np.float32)


@contextmanager
def nothing(_: Path) -> Iterator[Any]:
    """What a transport needs that the two ends make by themselves."""
    yield None


# iceoryx2


def iceoryx2_services(folder: Path) -> tuple[Any, Any]:
    """A publish-subscribe and an event service whose files are all found by the folder's name."""
    import iceoryx2 as iox2  # type: ignore[import-not-found]  # in the peers' environment

    iox2.set_log_level(iox2.LogLevel.Error)
    config = iox2.config.default()
    config.global_cfg.prefix = iox2.FileName.new(f"{folder.name}_")
    config.global_cfg.root_path = iox2.Path.new(f"{folder}/iceoryx2")
    node = iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)
    name = iox2.ServiceName.new("bench")
    messages = node.service_builder(name).publish_subscribe(iox2.Slice[ctypes.c_uint8])
    messages = messages.enable_safe_overflow(False).subscriber_max_buffer_size(_UNREAD).open_or_create()
    return messages, node.service_builder(name).event().open_or_create()


class Iceoryx2Writer:
    """Writes into a loaned sample, sends it and notifies, as its examples of event-based communication do."""

    def __init__(self, folder: Path, shared: Any) -> None:
        import iceoryx2 as iox2

        self._messages, self._events = iceoryx2_services(folder)
        builder = self._messages.publisher_builder().initial_max_slice_len(4 * LARGEST)
        self._publisher = builder.backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered).create()
        self._notifier = self._events.notifier_builder().create()

    def send(self, samples: Samples) -> None:
        sample = self._publisher.loan_slice_uninit(samples.nbytes)
        np.frombuffer(sample.payload().as_memory_view(), np.float32)[:] = samples
        sample.assume_init().send()
        self._notifier.notify()


class Iceoryx2Reader:
    """Sleeps in the listener, no longer than a stage does; copies the sample, so that it goes back at once."""

    def __init__(self, folder: Path, shared: Any) -> None:
        import iceoryx2 as iox2

        self._tick = iox2.Duration.from_millis(round(_TICK_S * 1_000))
        self._messages, self._events = iceoryx2_services(folder)
        self._subscriber = self._messages.subscriber_builder().create()
        self._listener = self._events.listener_builder().create()

    def receive(self, samples: int) -> Samples:
        while (sample := self._subscriber.receive()) is None:
            self._listener.timed_wait(self._tick)
        received = np.frombuffer(sample.payload().as_memory_view(), np.float32).copy()
        sample.delete()
        return received


TRANSPORTS: Final[dict[str, tuple[type[Writer], type[Reader], Any]]] = {
    "ring": (RingWriter, RingReader, ring_place),
    "promoted": (PromotedWriter, PromotedReader, ring_place),
    "queue": (QueueWriter, QueueReader, queue_place),
    "polled": (QueueWriter, PollingReader, queue_place),
    "zmq": (ZmqWriter, ZmqReader, nothing),
    "iceoryx2": (Iceoryx2Writer, Iceoryx2Reader, nothing),
}


# The two processes


def write_all(transport: str, folder: Path, shared: Any, tasks: "Connection[Any, Any]") -> None:
    """The writer's process."""
    writer = TRANSPORTS[transport][0](folder, shared)
    tasks.send(None)
    while (task := tasks.recv()) is not None:
        tasks.send(write(writer, task))


def write(writer: Writer, task: Task) -> Task:
    """Carry out a task's sending; returns when it began, and what the process used."""
    source = np.linspace(-1, 1, task["samples"], dtype=np.float32)
    used_s, switches = time.process_time(), voluntary_switches()
    time.sleep(task["before_s"])
    began_ns = time.monotonic_ns()
    for number in range(task["count"]):
        due_ns = began_ns + round(number * task["interval_s"] * 1e9)
        if task["interval_s"]:
            time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)
        message = source.copy()
        message[_NUMBER_AT] = number
        message[_STAMP].view(np.int64)[0] = time.monotonic_ns()
        writer.send(message)
    return {"began_ns": began_ns, "cpu_s": time.process_time() - used_s, "switches": voluntary_switches() - switches}


def read_all(transport: str, folder: Path, shared: Any, tasks: "Connection[Any, Any]") -> None:
    """The reader's process."""
    reader = TRANSPORTS[transport][1](folder, shared)
    tasks.send(None)
    while (task := tasks.recv()) is not None:
        tasks.send(None)  # from here on it listens
        tasks.send(read(reader, task))


def read(reader: Reader, task: Task) -> Task:
    """Carry out a task's receiving; returns each message's time on the way, and what the process used."""
    samples, count = task["samples"], task["count"]
    latency_ns = []
    used_s, switches = time.process_time(), voluntary_switches()
    for number in range(count):
        message = reader.receive(samples)
        now_ns = time.monotonic_ns()
        latency_ns.append(now_ns - int(message[_STAMP].view(np.int64)[0]))
        assert len(message) == samples
        assert message[_NUMBER_AT] == number
    return {
        "ended_ns": now_ns,
        "latency_ns": latency_ns,
        "cpu_s": time.process_time() - used_s,
        "switches": voluntary_switches() - switches,
    }


def voluntary_switches() -> int:
    """How often this process went to sleep."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


class Pair:
    """A writer's and a reader's process of one transport."""

    def __init__(self, transport: str, folder: Path, shared: Any) -> None:
        self._reader = _Program(read_all, transport, folder, shared)  # first: it is there when something is sent
        self._writer = _Program(write_all, transport, folder, shared)

    def carry_out(self, task: Task) -> Task:
        """A task's result: latencies in us, how long it took, what each process used."""
        self._reader.tasks.send(task)
        self._reader.tasks.recv()
        self._writer.tasks.send(task)
        wrote, read = self._writer.tasks.recv(), self._reader.tasks.recv()
        return {
            "latency_us": [ns / 1e3 for ns in read["latency_ns"]],
            "took_s": (read["ended_ns"] - wrote["began_ns"]) / 1e9,
            "writer_cpu_s": wrote["cpu_s"],
            "reader_cpu_s": read["cpu_s"],
            "writer_switches": wrote["switches"],
            "reader_switches": read["switches"],
        }

    def close(self) -> None:
        """End both."""
        self._writer.close()
        self._reader.close()


class _Program:
    """A process, and the pipe over which it gets its tasks."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, other = context.Pipe()
        self._process = context.Process(target=target, args=(*arguments, other), daemon=True)
        self._process.start()
        other.close()
        self.tasks.recv()

    def close(self) -> None:
        self.tasks.send(None)
        self._process.join()


def main() -> None:
    """Tasks in, results out."""
    transport, folder = sys.argv[1], Path(sys.argv[2])
    with TRANSPORTS[transport][2](folder) as shared:
        pair = Pair(transport, folder, shared)
        for line in sys.stdin:
            print(json.dumps(pair.carry_out(json.loads(line))), flush=True)
        pair.close()


if __name__ == "__main__":
    main()
