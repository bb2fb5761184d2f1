"""pipeline.client: what a program that asks a run gets, and what it is told where there is none to ask."""

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipeline import client as clients
from pipeline import messages
from pipeline.client import AsyncClient, Client, Events
from pipeline.control import Hub
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import SCHEMA, VERBS, Event, LogRecord, Reply, StageRecord, TextRecord, TimingRecord
from pipeline.runtime import RunFolder
from tests import helpers
from tests.helpers import PATIENCE_S, wait_until

T = TypeVar("T")

folder = helpers.folder
runtime_dir = helpers.runtime_dir


class Watched(Hub):
    """A hub that shows what was subscribed to."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.control, folder.events, folder.stages)
        self.prefixes: set[bytes] = set()

    def _welcome(self, publisher: Any, wanted: set[bytes]) -> None:
        super()._welcome(publisher, wanted)
        self.prefixes |= wanted


class Serving:
    """A run of the name, as far as a client sees it."""

    def __init__(self, folder: RunFolder, answer: Callable[[bytes], Reply]) -> None:
        self._to_publish: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._hub = Watched(folder)
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.is_set():
            self._hub.wait(0.02)
            for address, data in self._hub.commands():
                self._hub.reply(address, self._answer(data))
            with contextlib.suppress(queue.Empty):
                while True:
                    self._hub.publish(*self._to_publish.get_nowait())

    def publish(self, record: Event | bytes, topic: str = "") -> None:
        encoded = record if isinstance(record, bytes) else messages.encode(record)
        self._to_publish.put((topic or str(messages.topic(messages.decode_event(encoded))), encoded))

    def wait_for_subscriber(self, topic: str = "text") -> None:
        wait_until(lambda: self.is_wanted(topic), f"a subscription to {topic}")

    def is_wanted(self, topic: str) -> bool:
        return any(topic.encode().startswith(prefix) for prefix in self._hub.prefixes)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._hub.close()


@contextlib.contextmanager
def up(folder: RunFolder, answer: Callable[[bytes], Reply] = lambda _: Reply(ok=True)) -> Iterator[Serving]:
    folder.lock()
    serving = Serving(folder, answer)
    try:
        yield serving
    finally:
        serving.close()
        folder.release()


def text(frame: int) -> TextRecord:
    return TextRecord(frame=frame, text=f" word{frame}", time_ns=frame)


def state(time_ns: int) -> StageRecord:
    return StageRecord(stage="capture", state="running", time_ns=time_ns)


def take(events: Events, count: int) -> list[Event]:
    return [next(events) for _ in range(count)]


def resources() -> tuple[int, int]:
    """Open descriptors and threads of this process, ZeroMQ's own included."""
    return len(os.listdir("/dev/fd")), len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    before = resources()
    yield
    wait_until(lambda: resources() == before, f"{before} descriptors and threads, and not {resources()}")


def within_patience(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work, PATIENCE_S)

    return asyncio.run(limited())


def refused(verb: str = "status", timeout_s: float = PATIENCE_S) -> str:
    with pytest.raises(ControlError) as error:
        Client("t").send(verb, timeout_s=timeout_s)
    return str(error.value)


def test_a_command_and_its_values_are_sent_and_its_reply_returned(folder: RunFolder) -> None:
    asked: list[object] = []

    def answer(data: bytes) -> Reply:
        asked.append(json.loads(data))
        return Reply(ok=True, verb="mute", stage="capture", frame=7)

    with up(folder, answer):
        client = Client("t")
        assert client.send("mute") == Reply(ok=True, verb="mute", stage="capture", frame=7)
        client.send("mute", {"at": 3, "how": "softly", "verb": "dance"}, timeout_s=PATIENCE_S)
        client.send("set", volume=0.5, text_top_k=None)
    assert asked == [
        {"verb": "mute"},
        {"verb": "mute", "at": 3, "how": "softly"},
        {"verb": "set", "volume": 0.5, "text_top_k": None},
    ]


def test_a_stage_that_loads_a_model_and_a_file_that_is_closed_have_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, float] = {}

    def request(_: object, command: bytes, timeout_s: float) -> Reply:
        limits[json.loads(command)["verb"]] = timeout_s
        return Reply(ok=True)

    monkeypatch.setattr("pipeline.control.request", request)
    monkeypatch.setattr(Client, "_binding", lambda self: iter(()))
    for verb in ("mute", "restart", "record"):
        Client("t").send(verb)
    Client("t").send("reset", timeout_s=0.5)
    assert limits == {"mute": 5, "restart": 150, "record": 10, "reset": 0.5}


def test_what_the_run_refuses_is_an_error(folder: RunFolder) -> None:
    with up(folder, lambda _: Reply(ok=False, error="capture is backoff, not running")):
        assert refused("mute") == "capture is backoff, not running"


def test_a_verb_that_is_none_is_refused_without_a_run(runtime_dir: Path) -> None:
    assert refused("dance") == f"verb 'dance': expected one of {', '.join(VERBS)}"


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="name"):
        Client("../x")


def test_where_there_is_no_run_it_is_said_so(runtime_dir: Path) -> None:
    assert refused() == "no run is up under 't': start one with `pipeline up`"
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("socket_left", [False, True])
def test_where_the_run_has_died_it_is_said_so(folder: RunFolder, socket_left: bool) -> None:
    (folder.path / "lock").touch()
    if socket_left:
        folder.control.touch()
    before = time.monotonic()
    assert refused() == "the run 't' has died: clear what it left with `pipeline down --name t`"
    assert time.monotonic() - before < PATIENCE_S  # it was not asked


def test_where_stages_were_started_by_hand_it_is_said_so(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_BINDING_S", 0.1)
    folder.lock(shared=True)
    assert refused() == "stages of 't' were started by hand: end them with Ctrl-C, each in its terminal"
    folder.leave()


def test_a_run_that_is_just_beginning_is_waited_for(folder: RunFolder) -> None:
    holder = RunFolder("t")
    holder.lock()
    hubs: list[Hub] = []

    def begin() -> None:
        hub = Hub(folder.control, folder.events, folder.stages)
        hubs.append(hub)
        asked = False
        while not asked:
            hub.wait(0.05)
            for address, _ in hub.commands():
                hub.reply(address, Reply(ok=True, verb="reset"))
                asked = True

    beginning = threading.Timer(0.05, begin)
    beginning.start()
    assert Client("t").send("reset", timeout_s=PATIENCE_S).verb == "reset"
    beginning.join()
    hubs[0].close()
    holder.release()


def test_a_run_that_does_not_answer_is_said_so(folder: RunFolder) -> None:
    folder.lock()
    hub = Hub(folder.control, folder.events, folder.stages)
    assert refused(timeout_s=0.1) == "the run 't' did not answer within 0.1 s"
    hub.close()
    folder.release()


def test_a_reply_to_status_without_one_is_an_error(folder: RunFolder) -> None:
    with up(folder, lambda _: Reply(ok=True, verb="status")), pytest.raises(ControlError, match="holds no status"):
        Client("t").status()


def test_a_reply_of_another_version_is_one_clear_line(folder: RunFolder) -> None:
    class Strange(Reply):
        ok: str  # type: ignore[assignment]

    with up(folder, lambda _: Strange(ok="perhaps")):
        assert refused("mute").startswith("the run's reply was not understood, it may be of another version: ")


# Events


def test_events_are_typed_and_only_those_that_were_asked_for(folder: RunFolder) -> None:
    timing = TimingRecord(stage="capture", frame=1, start_ns=1, end_ns=2, queued=0)
    with up(folder) as run, Client("t").events("timing.*", "text", timeout_s=PATIENCE_S) as events:
        run.wait_for_subscriber("timing.capture")
        run.wait_for_subscriber("text")
        run.publish(b'{"not": "asked for"}', "texture")
        run.publish(LogRecord(stage="capture", level="info", message="x", time_ns=1))
        run.publish(timing)
        run.publish(text(1))
        assert take(events, 2) == [timing, text(1)]


def test_no_topic_is_every_topic(folder: RunFolder) -> None:
    with up(folder) as run, Client("t").events(timeout_s=PATIENCE_S) as events:
        run.wait_for_subscriber()
        for record in (state(1), text(2)):
            run.publish(record)
        assert take(events, 2) == [state(1), text(2)]


def test_what_is_not_known_here_is_left_out(folder: RunFolder) -> None:
    newer = json.loads(messages.encode(text(1))) | {"schema": SCHEMA + 1}
    with up(folder) as run, Client("t").events("text", timeout_s=PATIENCE_S) as events:
        run.wait_for_subscriber()
        for record in (b'{"type": "smell", "schema": 1}', json.dumps(newer).encode(), b"no JSON", b"[]", b"\xff"):
            run.publish(record, "text")
        run.publish(text(2))
        assert take(events, 1) == [text(2)]


def test_the_last_state_comes_first_and_once_however_many_others_join(folder: RunFolder) -> None:
    with up(folder) as run, Client("t").events("state.*", timeout_s=PATIENCE_S) as events:
        run.publish(state(1))
        assert take(events, 1) == [state(1)]
        for _ in range(3):
            with Client("t").events("state.*", timeout_s=PATIENCE_S) as other:
                assert take(other, 1) == [state(1)]
        run.publish(state(2))
        assert take(events, 1) == [state(2)]


def test_events_begin_before_the_run_and_outlive_it(folder: RunFolder) -> None:
    with Client("t").events("state.*", timeout_s=PATIENCE_S) as events:
        for number in range(3):
            with up(RunFolder("t")) as run:
                run.publish(state(number))
                assert take(events, 1) == [state(number)]


def test_an_iteration_ends_when_nothing_came_and_can_be_taken_up_again(folder: RunFolder) -> None:
    with up(folder) as run, Client("t").events("text", timeout_s=0.3) as events:
        run.wait_for_subscriber()
        assert list(events) == []
        run.publish(text(1))
        assert list(events) == [text(1)]


def test_closed_events_are_at_their_end(folder: RunFolder) -> None:
    events = Client("t").events()
    events.close()
    events.close()
    assert list(events) == []

    async def rest() -> list[Event]:
        await events.aclose()
        return [event async for event in events]

    assert within_patience(rest()) == []


def test_an_early_break_leaves_nothing(folder: RunFolder) -> None:
    with up(folder) as run, nothing_left():
        run.publish(state(1))
        for event in Client("t").events("state.*", timeout_s=PATIENCE_S):
            assert event == state(1)
            break


# asyncio


def test_commands_and_status_with_asyncio(folder: RunFolder) -> None:
    def answer(data: bytes) -> Reply:
        asked = json.loads(data)
        return Reply(ok=asked["verb"] != "reset", verb=asked["verb"], frame=asked.get("n", -1), error="not now")

    async def talk() -> None:
        client = AsyncClient("t")
        replies = await asyncio.gather(*(client.send("mute", n=n) for n in range(8)))
        assert [reply.frame for reply in replies] == list(range(8))
        with pytest.raises(ControlError, match="not now"):
            await client.send("reset")
        with pytest.raises(ControlError, match="holds no status"):
            await client.status()
        with pytest.raises(ControlError, match="expected one of"):
            await client.send("dance")

    with up(folder, answer), nothing_left():
        within_patience(talk())


def test_with_asyncio_too_it_is_said_where_there_is_no_run(runtime_dir: Path) -> None:
    with pytest.raises(ControlError, match="no run is up under 't'"):
        within_patience(AsyncClient("t").send("mute"))


def test_an_answer_that_does_not_come_with_asyncio(folder: RunFolder) -> None:
    folder.lock()
    hub = Hub(folder.control, folder.events, folder.stages)
    with nothing_left(), pytest.raises(ControlError, match=r"did not answer within 0\.1 s"):
        within_patience(AsyncClient("t").send("mute", timeout_s=0.1))
    hub.close()
    folder.release()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_events_with_asyncio(folder: RunFolder, kind: type[Client] | type[AsyncClient]) -> None:
    async def listen(run: Serving) -> None:
        found: list[Event] = []
        async with kind("t").events("text", "state.*", timeout_s=PATIENCE_S) as events:
            async for event in events:
                found.append(event)
                if isinstance(event, StageRecord):
                    await asyncio.to_thread(run.wait_for_subscriber)
                    for number in range(100):
                        run.publish(text(number))
                if len(found) == 101:
                    break
        assert found == [state(1), *(text(number) for number in range(100))]

    with up(folder) as run, nothing_left():
        run.publish(state(1))
        within_patience(listen(run))


def test_an_iteration_with_asyncio_ends_when_nothing_came(runtime_dir: Path) -> None:
    async def listen() -> list[Event]:
        return [event async for event in AsyncClient("t").events(timeout_s=0.1)]

    assert within_patience(listen()) == []


def test_others_go_on_while_events_are_waited_for(folder: RunFolder) -> None:
    async def listen(run: Serving) -> None:
        events = AsyncClient("t").events("text")
        coming = asyncio.ensure_future(anext(events))
        while not run.is_wanted("text"):
            await asyncio.sleep(0.01)
        run.publish(text(1))
        assert await coming == text(1)
        await events.aclose()

    with up(folder) as run:
        within_patience(listen(run))


def test_cancelling_leaves_nothing_and_loses_nothing(folder: RunFolder) -> None:
    async def wait_for_ever() -> None:
        async for _ in AsyncClient("t").events("text"):
            raise AssertionError

    async def cancel(run: Serving) -> None:
        for _ in range(5):
            waiting = asyncio.create_task(wait_for_ever())
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            del waiting
        async with AsyncClient("t").events("text") as events:
            await asyncio.to_thread(run.wait_for_subscriber)
            for number in range(20):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.005)
                    raise AssertionError
                run.publish(text(number))
                assert await anext(events) == text(number)

    with up(folder) as run, nothing_left():
        within_patience(cancel(run))


def test_a_cancelled_command_leaves_nothing(folder: RunFolder) -> None:
    folder.lock()
    hub = Hub(folder.control, folder.events, folder.stages)

    async def cancel() -> None:
        sending = asyncio.create_task(AsyncClient("t").send("mute"))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    with nothing_left():
        within_patience(cancel())
    hub.close()
    folder.release()


def test_importing_the_client_brings_no_event_loop_and_no_authentication() -> None:
    program = "import sys, pipeline.client; print({'asyncio', 'zmq.asyncio', 'zmq.auth', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
