"""The sockets: ZeroMQ over ipc, and nothing of it outside this module.

`control.ipc` (clients ask, the supervisor replies), `events.ipc` (the supervisor publishes, monitors subscribe) and
`stages.ipc` (each stage's line to the supervisor) are in the run's folder, which only its user may enter.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import zmq

from pipeline import messages
from pipeline.errors import ControlError
from pipeline.messages import Order, Reply, Report

_MESSAGE_MAX: Final = 1 << 16
"""Bytes that a message to the supervisor may have; a larger one closes its connection."""

_BACKLOG: Final = 1_000
"""Messages kept for a peer that does not read. What comes after is lost to it."""

_FAREWELL_MS: Final = 500
"""How long a stage's last reports may take to leave it."""


class HasFileno(Protocol):
    """What can be waited on."""

    def fileno(self) -> int: ...


def _ipc(path: Path) -> str:
    return f"ipc://{path}"


class Hub:
    """The supervisor's side of all three sockets.

    Binding makes the sockets under a umask of 077. Raises ControlError if they cannot be made.
    """

    def __init__(self, control: Path, events: Path, stages: Path) -> None:
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        self._stages = self._context.socket(zmq.ROUTER)
        self._events = self._context.socket(zmq.XPUB)
        # A stage that was restarted takes over the name of the one that died.
        self._stages.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Every subscription is shown, also to a topic that someone else has: it is answered with the last value.
        self._events.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._last: dict[str, bytes] = {}
        self._subscribed: set[bytes] = set()
        self._joined = False
        umask = os.umask(0o077)
        try:
            for socket, path in ((self._control, control), (self._stages, stages), (self._events, events)):
                socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_MAX)
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, _BACKLOG)
                socket.bind(_ipc(path))
        except zmq.ZMQError as error:
            self.close()
            raise ControlError(f"socket in {control.parent} cannot be made: {error}") from None
        finally:
            os.umask(umask)
        self._poller = zmq.Poller()
        for socket in (self._control, self._stages, self._events):
            self._poller.register(socket, zmq.POLLIN)

    def watch(self, source: HasFileno) -> None:
        """Let `wait` return when `source` is readable too."""
        self._poller.register(source.fileno(), zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something came or `timeout_s` is over. Answers subscriptions on the way."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1_000))))
        if self._events in ready:
            self._welcome()

    def commands(self) -> Iterator[tuple[list[bytes], bytes]]:
        """The requests that have come: where to reply to, and the request."""
        while True:
            try:
                parts = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A REQ socket puts an empty part between its address and its request.
            yield parts[:-1], parts[-1]

    def reply(self, address: list[bytes], reply: Reply) -> None:
        """Answer a request. A client that is gone gets nothing."""
        with contextlib.suppress(zmq.ZMQError):
            self._control.send_multipart([*address, messages.encode(reply)], zmq.NOBLOCK)

    def reports(self) -> Iterator[bytes]:
        """What the stages have said, oldest first."""
        while True:
            try:
                parts = self._stages.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield parts[-1]

    def order(self, stage: str, order: Order) -> None:
        """Tell a stage. One that is not connected gets nothing."""
        with contextlib.suppress(zmq.ZMQError):
            self._stages.send_multipart([stage.encode(), messages.encode(order)], zmq.NOBLOCK)

    def publish(self, topic: str, record: bytes) -> None:
        """Send an event to all who subscribed to its topic; the last of each state is kept for those to come."""
        if topic.startswith("state."):
            self._last[topic] = record
        self._send_event(topic, record)

    def _send_event(self, topic: str, record: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._events.send_multipart([topic.encode(), record], zmq.NOBLOCK)

    def is_wanted(self, topic: str) -> bool:
        """Whether anybody subscribed to the topic."""
        return any(topic.encode().startswith(wanted) for wanted in self._subscribed)

    def joined(self) -> bool:
        """Whether somebody subscribed since this was asked last."""
        joined, self._joined = self._joined, False
        return joined

    def _welcome(self) -> None:
        """Tell whoever has just subscribed the last value of each state.

        Who had subscribed before is told it again: it is the value that it knows. For any number of newcomers at a time
        that is once.
        """
        wanted: set[bytes] = set()
        with contextlib.suppress(zmq.Again):
            while True:
                subscription = self._events.recv(zmq.NOBLOCK)
                if subscription[:1] == b"\x01":
                    wanted.add(subscription[1:])
                else:
                    self._subscribed.discard(subscription[1:])
        self._subscribed |= wanted
        self._joined = self._joined or bool(wanted)
        for topic, record in self._last.items():
            if any(topic.encode().startswith(prefix) for prefix in wanted):
                self._send_event(topic, record)

    def close(self) -> None:
        """Close the sockets; their files stay. What is under way to a client is given a moment."""
        for socket in (self._stages, self._events):
            socket.close(linger=0)
        self._control.close(linger=_FAREWELL_MS)
        self._context.term()


class StageLink:
    """A stage's line to the supervisor. It never waits: what cannot be sent at once is lost, and counted.

    With `alive`, a descriptor that is readable once the supervisor is gone, it waits until then, and loses nothing.
    """

    def __init__(self, stages: Path, stage: str, alive: int | None = None) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, stage.encode())
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, _FAREWELL_MS)
        self._socket.connect(_ipc(stages))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._room: zmq.Poller | None = None
        if alive is not None:
            self._room = zmq.Poller()
            self._room.register(self._socket, zmq.POLLOUT)
            self._room.register(alive, zmq.POLLIN)
        self.lost = 0
        """Reports that could not be sent."""

    def watch(self, source: HasFileno) -> None:
        """Let `wait` return when `source` is readable too."""
        self._poller.register(source.fileno(), zmq.POLLIN)

    def wait(self, timeout_s: float) -> set[int]:
        """Sleep until an order came, a watched source is readable or `timeout_s` is over.

        Returns the file descriptors that are readable.
        """
        ready = self._poller.poll(max(0, round(timeout_s * 1_000)))
        return {source for source, _ in ready if isinstance(source, int)}

    def orders(self) -> Iterator[Order]:
        """The supervisor's orders that have come."""
        while True:
            try:
                yield messages.decode_order(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def report(self, report: Report) -> None:
        """Tell the supervisor."""
        if self._room is not None:
            self._room.poll()
        try:
            self._socket.send(messages.encode(report), zmq.NOBLOCK)
        except zmq.Again:
            self.lost += 1

    def abandon(self) -> None:
        """There is nobody to send to any more: let `close` wait for nothing."""
        self._socket.setsockopt(zmq.LINGER, 0)

    def close(self) -> None:
        """Close the line, after the last reports have left or half a second."""
        self._socket.close()
        self._context.term()


def request(control: Path, command: bytes, timeout_s: float) -> Reply:
    """Send one command to a run and wait for its reply. Raises ControlError if none comes in time."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(_ipc(control))
        socket.send(command)
        if not socket.poll(round(timeout_s * 1_000)):
            raise ControlError(f"the run {control.parent.name!r} did not answer within {timeout_s:g} s")
        return messages.decode_reply(socket.recv())


class Subscription:
    """Events of a run: iterate for (topic, JSON). It waits for the run if it is not up yet."""

    def __init__(self, events: Path, topics: tuple[str, ...] = ("",)) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        for topic in topics:
            self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._socket.connect(_ipc(events))

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """The next event, or None if there was none in time."""
        if not self._socket.poll(round(timeout_s * 1_000)):
            return None
        topic, record = self._socket.recv_multipart()
        return topic.decode(), record

    def close(self) -> None:
        """Unsubscribe."""
        self._socket.close()
        self._context.term()
