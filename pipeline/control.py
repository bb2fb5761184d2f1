"""The sockets: ZeroMQ over ipc, and nothing of it outside this module.

`control.ipc` (clients ask, the supervisor replies), `events.ipc` (the supervisor publishes, monitors subscribe) and
`stages.ipc` (each stage's line to the supervisor) are in the run's folder, which only its user may enter.

Where a run is to be reached from a second machine, sockets of their own do over TCP what `control.ipc` and `events.ipc`
do. There everything is encrypted, and who comes is let in by its key alone (CurveZMQ).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import zmq
from zmq.utils import z85

from pipeline import messages
from pipeline.errors import ControlError
from pipeline.messages import Order, Reply, Report

_MESSAGE_MAX: Final = 1 << 16
"""Bytes that a message to the supervisor may have; a larger one closes its connection."""

_BACKLOG: Final = 1_000
"""Messages kept for a peer that does not read. What comes after is lost to it."""

_UNREAD: Final = 32
"""Replies kept for a client that does not read them; one to `trace` has megabytes."""

_FAREWELL_MS: Final = 500
"""How long the last replies may take to leave a run that ends."""

_LAST_WORDS_MS: Final = 1_000
"""How long a stage's last reports may take to leave it."""

_HANDSHAKE_MS: Final = 5_000
"""How long a connection over TCP may take to show its key before it is closed."""

_HEARTBEAT_MS: Final = 5_000
_LIFELESS_MS: Final = 15_000
"""A peer over TCP that has been silent for so long is taken for gone."""

_RECONNECT_MS: Final = 2_000
"""The longest time between two attempts to reach a run on another machine."""

_GATE: Final = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks whether a key is let in (its RFC 27, ZAP)."""


class HasFileno(Protocol):
    """What can be waited on."""

    def fileno(self) -> int: ...


class KeyPair(NamedTuple):
    """A machine's key for CurveZMQ, in Z85, 40 characters each."""

    public: bytes
    secret: bytes


class Listening(NamedTuple):
    """Where a run is reached from a second machine, and by whom."""

    control: str
    """Such as tcp://192.168.1.5:5570."""
    events: str
    keys: KeyPair
    is_authorized: Callable[[bytes], bool]
    """Of a public key, in Z85."""


class Remote(NamedTuple):
    """One socket of a run on another machine, and the keys that open it."""

    address: str
    server: bytes
    """The run's public key, in Z85."""
    keys: KeyPair


Peer = Path | Remote
"""Where a run's socket is, from a client's side."""


def make_keys(folder: Path, name: str) -> None:
    """Write a new key pair into `folder`, as NAME.key, without the secret, and NAME.key_secret, with it."""
    from zmq import auth

    auth.create_certificates(folder, name)


def read_keys(path: Path) -> tuple[bytes, bytes | None]:
    """A key file's public and secret key. Raises OSError and ValueError."""
    from zmq import auth

    return auth.load_certificate(path)


def _ipc(path: Path) -> str:
    return f"ipc://{path}"


def _prepare_tcp(socket: "zmq.Socket[bytes]", address: str, keys: KeyPair) -> None:
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _LIFELESS_MS)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


def _connect(socket: "zmq.Socket[bytes]", run: Peer) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    if isinstance(run, Path):
        socket.connect(_ipc(run))
        return
    _prepare_tcp(socket, run.address, run.keys)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS)
    socket.setsockopt(zmq.CURVE_SERVERKEY, run.server)
    socket.connect(run.address)


class Hub:
    """The supervisor's side of all sockets; with `remote` also of those for a second machine.

    Binding makes the sockets under a umask of 077. Raises ControlError if they cannot be made.
    """

    def __init__(self, control: Path, events: Path, stages: Path, remote: Listening | None = None) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._stages = self._make(zmq.ROUTER)
        # A stage that was restarted takes over the name of the one that died.
        self._stages.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._controls = [self._make(zmq.ROUTER, _UNREAD)]
        self._events = [_Publisher(self._make(zmq.XPUB))]
        self._gate: _Gate | None = None
        self._last: dict[str, bytes] = {}
        try:
            self._bind(control, events, stages)
            if remote is not None:
                self._listen(remote)
        except ControlError:
            self.close()
            raise

    def _make(self, kind: int, unread: int = _BACKLOG) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_MAX)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, unread)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _bind(self, control: Path, events: Path, stages: Path) -> None:
        umask = os.umask(0o077)
        try:
            for socket, path in (
                (self._controls[0], control),
                (self._stages, stages),
                (self._events[0].socket, events),
            ):
                socket.bind(_ipc(path))
        except zmq.ZMQError as error:
            raise ControlError(f"socket in {control.parent} cannot be made: {error}") from None
        finally:
            os.umask(umask)

    def _listen(self, remote: Listening) -> None:
        self._gate = _Gate(self._make(zmq.REP), remote.is_authorized)
        self._controls.append(self._make(zmq.ROUTER, _UNREAD))
        self._events.append(_Publisher(self._make(zmq.XPUB)))
        for socket, address in ((self._controls[1], remote.control), (self._events[1].socket, remote.events)):
            _prepare_tcp(socket, address, remote.keys)
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            # With no one at the gate nobody is let in, instead of everybody.
            socket.setsockopt(zmq.ZAP_DOMAIN, b"pipeline")
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                raise ControlError(f"remote.listen: {address}: {str(error).partition(' (')[0].lower()}") from None

    def watch(self, source: HasFileno) -> None:
        """Let `wait` return when `source` is readable too."""
        self._poller.register(source.fileno(), zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something came or `timeout_s` is over. Answers subscriptions, and who knocks, on the way."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1_000))))
        if self._gate is not None and self._gate.socket in ready:
            self._gate.admit()
        for publisher in self._events:
            if publisher.socket in ready:
                self._welcome(publisher, publisher.subscriptions())

    def commands(self) -> Iterator[tuple[list[bytes], bytes]]:
        """The requests that have come: where to reply to, and the request."""
        for index, control in enumerate(self._controls):
            for parts in _received(control):
                # A REQ socket puts an empty part between its address and its request.
                yield [bytes([index]), *parts[:-1]], parts[-1]

    def reply(self, address: list[bytes], reply: Reply) -> None:
        """Answer a request. A client that is gone gets nothing."""
        index, *route = address
        with contextlib.suppress(zmq.ZMQError):
            self._controls[index[0]].send_multipart([*route, messages.encode(reply)], zmq.NOBLOCK)

    def reports(self) -> Iterator[bytes]:
        """What the stages have said, oldest first."""
        for parts in _received(self._stages):
            yield parts[-1]

    def order(self, stage: str, order: Order) -> None:
        """Tell a stage. One that is not connected gets nothing."""
        with contextlib.suppress(zmq.ZMQError):
            self._stages.send_multipart([stage.encode(), messages.encode(order)], zmq.NOBLOCK)

    def publish(self, topic: str, record: bytes) -> None:
        """Send an event to all who subscribed to its topic. The last of each state, and of status, is kept."""
        if topic.startswith("state.") or topic == "status":
            self._last[topic] = record
        for publisher in self._events:
            publisher.send(topic, record)

    def _welcome(self, publisher: "_Publisher", wanted: set[bytes]) -> None:
        """Tell whoever has just subscribed to `wanted` the last value of each state, and the last status.

        Who had subscribed before is told it again: it is the value that it knows. For any number of newcomers at a time
        that is once.
        """
        for topic, record in self._last.items():
            if any(topic.encode().startswith(prefix) for prefix in wanted):
                publisher.send(topic, record)

    def close(self) -> None:
        """Close the sockets; their files stay. What is under way to a client is given a moment."""
        for socket in (self._stages, *(publisher.socket for publisher in self._events)):
            socket.close(linger=0)
        for socket in self._controls:
            socket.close(linger=_FAREWELL_MS)
        if self._gate is not None:
            self._gate.socket.close(linger=0)
        self._context.term()


class _Gate:
    """Where ZeroMQ asks who may come in over TCP. It binds first: what is bound before it would ask nobody."""

    def __init__(self, socket: "zmq.Socket[bytes]", is_authorized: Callable[[bytes], bool]) -> None:
        socket.bind(_GATE)
        self.socket = socket
        self._is_authorized = is_authorized

    def admit(self) -> None:
        """Let in those whose public key is authorized."""
        for version, request, _domain, _from, _identity, mechanism, *shown in _received(self.socket):
            known = mechanism == b"CURVE" and self._is_authorized(z85.encode(shown[0]))
            status, text = (b"200", b"OK") if known else (b"400", b"this key is not authorized")
            self.socket.send_multipart([version, request, status, text, b"", b""])


class _Publisher:
    """One socket that publishes, and what was subscribed to on it."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        # Every subscription is shown, also to a topic that someone else has: it is answered with the last value.
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.socket = socket

    def send(self, topic: str, record: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self.socket.send_multipart([topic.encode(), record], zmq.NOBLOCK)

    def subscriptions(self) -> set[bytes]:
        """What was subscribed to since this was asked last, also by another before."""
        return {parts[0][1:] for parts in _received(self.socket) if parts[0][:1] == b"\x01"}


def _received(socket: "zmq.Socket[bytes]") -> Iterator[list[bytes]]:
    """The messages that have come."""
    while True:
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


class StageLink:
    """A stage's line to the supervisor. It never waits: what cannot be sent at once is lost, and counted.

    With `alive`, a descriptor that is readable once the supervisor is gone, it waits until then, and loses nothing.
    """

    def __init__(self, stages: Path, stage: str, alive: int | None = None) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, stage.encode())
        self._socket.setsockopt(zmq.SNDHWM, _BACKLOG)
        self._socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
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
        """Close the line, after the last reports have left or a second."""
        self._socket.close()
        self._context.term()


def request(control: Peer, command: bytes, timeout_s: float) -> Reply:
    """Send one command to a run and wait for its reply. Raises ControlError if none comes in time."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        _connect(socket, control)
        socket.send(command)
        if not socket.poll(round(timeout_s * 1_000)):
            raise _silence(control, timeout_s)
        return _understood(socket.recv())


async def request_async(control: Peer, command: bytes, timeout_s: float) -> Reply:
    """The same, while others go on. Raises ControlError."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        _connect(socket, control)
        socket.send(command)
        if not await _readable(socket, timeout_s):
            raise _silence(control, timeout_s)
        return _understood(socket.recv())


async def _readable(socket: "zmq.Socket[bytes]", timeout_s: float | None) -> bool:
    """Whether a message is there, or came in time. However it ends, asyncio's loop forgets the socket at once.

    zmq.asyncio forgets it a turn of the loop later, when its descriptor may be another's.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    descriptor = socket.FD
    loop.add_reader(descriptor, changed.set)
    try:
        async with asyncio.timeout(timeout_s):
            # The descriptor is readable after a change until the events are read.
            while not socket.poll(0):
                await changed.wait()
                changed.clear()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


def _silence(control: Peer, timeout_s: float) -> ControlError:
    if isinstance(control, Path):
        return ControlError(f"the run {control.parent.name!r} did not answer within {timeout_s:g} s")
    return ControlError(
        f"{control.address} did not answer within {timeout_s:g} s: expected a run that listens there and knows this "
        "machine's key (`pipeline keys`)"
    )


def _understood(reply: bytes) -> Reply:
    try:
        return messages.decode_reply(reply)
    except messages.MALFORMED as error:
        raise ControlError(f"the run's reply was not understood, it may be of another version: {error}") from None


class Subscription:
    """Events of a run: (topic, JSON), one by one. It waits for a run that is not up yet, and outlives its restart."""

    def __init__(self, events: Peer, topics: tuple[str, ...] = ("",)) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        for topic in topics:
            self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        _connect(self._socket, events)

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """The next event, or None if there was none in time; None waits as long as it takes."""
        if not self._socket.poll(None if timeout_s is None else round(timeout_s * 1_000)):
            return None
        return self._next()

    async def receive_async(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """The same, while others go on. Where it is cancelled no event is lost."""
        return self._next() if await _readable(self._socket, timeout_s) else None

    def _next(self) -> tuple[str, bytes]:
        topic, record = self._socket.recv_multipart()
        return topic.decode(), record

    def close(self) -> None:
        """Unsubscribe."""
        self._socket.close()
        self._context.term()
