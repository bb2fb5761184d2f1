"""A run as seen from another program: ask it, tell it, and hear what happens.

    client = Client()
    client.send("mute")
    for event in client.events("text", "state.*"):
        print(event)

`AsyncClient` is the same for asyncio. Either may be on another machine: docs/api.md.
"""

import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import msgspec

from pipeline import control, messages
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import SCHEMA, Event, Reply, StatusReport
from pipeline.runtime import RunFolder
from pipeline.topology import FRAME_MS

if TYPE_CHECKING:
    from pipeline.taps import Conversation, Tap

Side = Literal["microphone", "speaker", "model"]

ANSWER_S: Final = 5.0
"""How long a run may take to answer, a stage's acknowledgement included."""

LONG_ANSWERS_S: Final[dict[str, float]] = {"restart": 150.0, "record": 10.0, "shutdown": 10.0}
"""The commands that may take longer: a model is loaded, a file is closed, every stage ends."""

_BINDING_S: Final = 1.0
"""How long a run that is just beginning may take to make its sockets."""

_POLL_S: Final = 0.01


class Events:
    """What a run publishes, one record after another: a struct of `pipeline.messages`, of one of the types of `Event`.

    Iterate with `for` or with `async for`. It begins before the run does, if need be, and goes on with the next run of
    the name. First comes the last value of each `state.*` that was asked for, if a run is up. Records of a type that is
    not known here, or of a newer schema, are left out. A program that is slower than the run loses events.

    With `timeout_s` an iteration ends when nothing came for so long; it can be taken up again. `close`, the end of a
    `with` and being dropped unsubscribe. It is for one thread, or one task, at a time.
    """

    def __init__(self, subscription: control.Subscription, topics: tuple[str, ...], timeout_s: float | None) -> None:
        self._subscription = subscription
        self._topics = topics
        self._timeout_s = timeout_s
        self._states: dict[str, bytes] = {}
        self._finalizer = weakref.finalize(self, subscription.close)

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        until = self._until()
        while self._finalizer.alive and (received := self._subscription.receive(_left_s(until))) is not None:
            if (event := self._event(*received)) is not None:
                return event
        raise StopIteration

    async def __anext__(self) -> Event:
        until = self._until()
        while (
            self._finalizer.alive and (received := await self._subscription.receive_async(_left_s(until))) is not None
        ):
            if (event := self._event(*received)) is not None:
                return event
        raise StopAsyncIteration

    def _until(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def _event(self, topic: str, record: bytes) -> Event | None:
        if not any(_matches(topic, wanted) for wanted in self._topics):
            return None
        if topic.startswith("state."):
            # Told again because another has subscribed.
            if self._states.get(topic) == record:
                return None
            self._states[topic] = record
        return _decoded(record)

    def close(self) -> None:
        """Unsubscribe."""
        self._finalizer()

    async def aclose(self) -> None:
        """Unsubscribe."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _left_s(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def _matches(topic: str, wanted: str) -> bool:
    return topic.startswith(wanted[:-1]) if wanted.endswith("*") else topic == wanted


def _decoded(record: bytes) -> Event | None:
    try:
        event = messages.decode_event(record)
    except messages.MALFORMED:
        return None
    return event if event.schema <= SCHEMA else None


class _Run:
    """What both clients know of a run."""

    def __init__(self, name: str = "default", *, remote: str | None = None) -> None:
        self._folder = RunFolder(name)
        self._remote = remote
        if remote is None:
            self._control: control.Peer = self._folder.control
            self._events: control.Peer = self._folder.events
        else:
            from pipeline import keys

            self._control, self._events = keys.remote(remote)

    @property
    def folder(self) -> RunFolder:
        """The run's folder. Raises ControlError where the run is on another machine: its audio does not leave it."""
        if self._remote is not None:
            raise ControlError(f"remote {self._remote}: expected a run on this machine")
        return self._folder

    @property
    def name(self) -> str:
        """The run's; of one on another machine, where it listens."""
        return self._folder.name if self._remote is None else self._remote

    @property
    def is_remote(self) -> bool:
        """Whether the run is on another machine, with another clock."""
        return self._remote is not None

    def may_be_up(self) -> bool:
        """False where it is sure that no run of the name is up: of another machine that is not known."""
        return self._remote is not None or self._folder.is_locked()

    def subscribe(self, prefixes: tuple[str, ...]) -> control.Subscription:
        """The events of all topics that begin so, as they are on the wire."""
        return control.Subscription(self._events, prefixes)

    def events(self, *topics: str, timeout_s: float | None = None) -> Events:
        """Subscribe to `topics`; one that ends in * stands for all that begin so, and none at all for everything.

        The subscription begins here, not with the first turn of the loop.
        """
        wanted = topics or ("*",)
        prefixes = tuple(topic.removesuffix("*") for topic in wanted)
        return Events(self.subscribe(prefixes), wanted, timeout_s)

    def _binding(self) -> Iterator[None]:
        """Yields as long as the run is just beginning. Raises ControlError where nobody would answer, and says why."""
        if self._remote is not None:
            return
        name = self._folder.name
        if not self._folder.path.exists():
            raise ControlError(f"no run is up under {name!r}: start one with `pipeline up`")
        if not self._folder.is_locked():
            raise ControlError(f"the run {name!r} has died: clear what it left with `pipeline down --name {name}`")
        until = time.monotonic() + _BINDING_S
        while not self._folder.control.exists():
            if not self._folder.is_locked():
                raise ControlError(f"the run {name!r} is just ending")
            if time.monotonic() > until:
                raise ControlError(
                    f"stages of {name!r} were started by hand: end them with Ctrl-C, each in its terminal"
                )
            yield

    def audio(self, side: Side = "microphone", block_ms: float = FRAME_MS) -> "Tap":
        """What the microphone hears, what is sent to the speaker, or what the model says, from now on.

        Iterate with `for` or `async for` over blocks of `block_ms`, as arrays with their times, until the run ends.
        Raises ConfigError, and ControlError where the run is not up or on another machine.
        """
        from pipeline import taps

        rings: dict[str, taps.RingName] = {"microphone": "capture", "speaker": "heard", "model": "playback"}
        if side not in rings:
            raise ConfigError(f"side {side!r}: expected one of {', '.join(rings)}")
        return taps.tap(self._present(), rings[side], taps.block_of(block_ms))

    def conversation(self, block_ms: float = FRAME_MS) -> "Conversation":
        """Both sides in time, from now on: rows of what the microphone heard and what was sent to the speaker then.

        As `audio` otherwise.
        """
        from pipeline import taps

        return taps.conversation(self._present(), taps.block_of(block_ms))

    def _present(self) -> RunFolder:
        """The folder of a run that is up."""
        folder = self.folder
        for _ in self._binding():
            time.sleep(_POLL_S)
        return folder


class Client(_Run):
    """The run called `name` on this machine, or the one that listens at `remote`, such as tcp://192.168.1.5:5570.

    Raises ConfigError if it can be no run's name, or no address, and ControlError where there is no key for `remote`.
    """

    def send(
        self, verb: str, values: Mapping[str, Any] | None = None, /, *, timeout_s: float | None = None, **more: Any
    ) -> Reply:
        """Carry out a command with its `values`, as a mapping or by name, and return its acknowledgement.

        `timeout_s` is ANSWER_S, or the command's of LONG_ANSWERS_S. Raises ControlError if the run is not up, does not
        answer, or refuses the command.
        """
        command = _command(verb, values, more)
        for _ in self._binding():
            time.sleep(_POLL_S)
        return _accepted(control.request(self._control, command, _limit_s(verb, timeout_s)))

    def status(self) -> StatusReport:
        """State, accounting and timing now. Raises ControlError."""
        return _status(self.send("status"))


class AsyncClient(_Run):
    """The same for asyncio: `send` and `status` are awaited, and `events` iterated over with `async for`."""

    async def send(
        self, verb: str, values: Mapping[str, Any] | None = None, /, *, timeout_s: float | None = None, **more: Any
    ) -> Reply:
        """As `Client.send`. A command that was sent is carried out also where this is cancelled."""
        import asyncio

        command = _command(verb, values, more)
        for _ in self._binding():
            await asyncio.sleep(_POLL_S)
        return _accepted(await control.request_async(self._control, command, _limit_s(verb, timeout_s)))

    async def status(self) -> StatusReport:
        """State, accounting and timing now. Raises ControlError."""
        return _status(await self.send("status"))


def _command(verb: str, values: Mapping[str, Any] | None, more: Mapping[str, Any]) -> bytes:
    if verb not in messages.VERBS:
        raise ControlError(f"verb {verb!r}: expected one of {', '.join(messages.VERBS)}")
    return msgspec.json.encode({**(values or {}), **more, "verb": verb})


def _limit_s(verb: str, timeout_s: float | None) -> float:
    return LONG_ANSWERS_S.get(verb, ANSWER_S) if timeout_s is None else timeout_s


def _accepted(reply: Reply) -> Reply:
    if not reply.ok:
        raise ControlError(reply.error)
    return reply


def _status(reply: Reply) -> StatusReport:
    if reply.status is None:
        raise ControlError("the run's reply to status holds no status")
    return reply.status
