"""pipeline.client: what a program that asks a run gets, and what it is told where there is none to ask."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import client as clients
from pipeline.client import Client
from pipeline.control import Hub
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import VERBS, Reply
from pipeline.runtime import RunFolder
from tests import helpers
from tests.helpers import PATIENCE_S

folder = helpers.folder
runtime_dir = helpers.runtime_dir


@contextlib.contextmanager
def up(folder: RunFolder, answer: Callable[[bytes], Reply]) -> Iterator[Hub]:
    """A run of the name, as far as a client sees it."""
    folder.lock()
    hub = Hub(folder.control, folder.events, folder.stages)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            hub.wait(0.02)
            for address, data in hub.commands():
                hub.reply(address, answer(data))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield hub
    finally:
        over.set()
        thread.join()
        hub.close()
        folder.release()


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
    assert asked == [{"verb": "mute"}, {"verb": "mute", "at": 3, "how": "softly"}]


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
