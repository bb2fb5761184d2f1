"""pipeline.control: hub, stage links, requests and subscriptions over real ipc sockets."""

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
import zmq

from pipeline import messages
from pipeline.control import Hub, KeyPair, Listening, Remote, StageLink, Subscription, request
from pipeline.errors import ControlError
from pipeline.messages import Apply, Heartbeat, Mute, Order, Reply, Start, Stop
from pipeline.ring import Ring
from pipeline.runtime import RunFolder
from tests import helpers
from tests.helpers import PATIENCE_S, received, wait_until

folder = helpers.folder
runtime_dir = helpers.runtime_dir


MESSAGE_MAX: Final = 1 << 16
"""Bytes."""


@pytest.fixture
def hub(folder: RunFolder) -> Iterator[Hub]:
    hub = Hub(folder.control, folder.events, folder.stages)
    yield hub
    hub.close()


@pytest.fixture
def connect(folder: RunFolder, hub: Hub) -> Iterator[Callable[[str], StageLink]]:
    """Make a stage's line, and wait until the hub knows it."""
    links: list[StageLink] = []

    def connect(stage: str) -> StageLink:
        link = StageLink(folder.stages, stage)
        links.append(link)
        link.report(Heartbeat(stage=stage))  # type: ignore[arg-type]
        assert received(hub, 1) == [Heartbeat(stage=stage)]  # type: ignore[arg-type]
        return link

    yield connect
    for link in links:
        link.close()


@contextlib.contextmanager
def serving(hub: Hub, answer: Callable[[bytes], Reply]) -> Iterator[None]:
    """The hub's loop in a thread, as the supervisor runs it in its own."""
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            hub.wait(0.02)
            for address, data in hub.commands():
                hub.reply(address, answer(data))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def raw(folder: RunFolder, kind: int = zmq.DEALER) -> Iterator["zmq.Socket[bytes]"]:
    """A client that speaks ZeroMQ, but not necessarily this program's language."""
    with zmq.Context() as context, context.socket(kind) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.connect(f"ipc://{folder.control}")
        yield client


def orders(link: StageLink, count: int) -> list[Order]:
    found: list[Order] = []

    def enough() -> bool:
        link.wait(0.01)
        found.extend(link.orders())
        return len(found) >= count

    wait_until(enough, f"{count} orders")
    return found


# Stages


def test_orders_reach_the_stage_that_they_are_for(hub: Hub, connect: Callable[[str], StageLink]) -> None:
    links = {stage: connect(stage) for stage in ("playback", "inference", "capture")}
    apply = Apply(request=7, command=Mute())
    hub.order("capture", apply)
    hub.order("playback", Start())
    hub.order("inference", Stop())
    hub.order("capture", Stop())
    assert orders(links["capture"], 2) == [apply, Stop()]
    assert orders(links["playback"], 1) == [Start()]
    assert orders(links["inference"], 1) == [Stop()]
    assert [list(link.orders()) for link in links.values()] == [[], [], []]


def test_an_order_to_a_stage_that_is_not_there_is_lost(hub: Hub, connect: Callable[[str], StageLink]) -> None:
    hub.order("capture", Start())
    link = connect("capture")
    hub.order("capture", Stop())
    assert orders(link, 1) == [Stop()]


def test_a_restarted_stage_takes_over_its_name(hub: Hub, connect: Callable[[str], StageLink]) -> None:
    dead = connect("capture")
    successor = connect("capture")
    hub.order("capture", Start())
    assert orders(successor, 1) == [Start()]
    assert list(dead.orders()) == []


def test_reports_come_in_order_and_whole(hub: Hub, connect: Callable[[str], StageLink]) -> None:
    link = connect("inference")
    sent: list[messages.Report] = [messages.TextRecord(frame=n, text="é" * n, time_ns=n) for n in range(50)]
    for report in sent:
        link.report(report)
    assert received(hub, 50) == sent
    assert link.lost == 0


def test_a_report_never_waits_where_there_is_no_supervisor(folder: RunFolder) -> None:
    link = StageLink(folder.stages, "capture")
    begun = time.thread_time_ns()
    for _ in range(5_000):
        link.report(Heartbeat(stage="capture"))
    assert time.thread_time_ns() > begun  # it came to here
    assert 0 < link.lost < 5_000
    kept = 5_000 - link.lost
    link.report(Heartbeat(stage="capture"))
    assert link.lost == 5_000 - kept + 1
    # What is kept is bounded, and reaches a supervisor that comes later.
    hub = Hub(folder.control, folder.events, folder.stages)
    assert len(received(hub, kept)) == kept
    link.close()
    hub.close()


def test_a_report_never_waits_for_a_supervisor_that_does_not_read(folder: RunFolder, hub: Hub) -> None:
    link = StageLink(folder.stages, "capture")
    for _ in range(30_000):
        link.report(messages.LogRecord(stage="capture", level="info", message="x" * 500, time_ns=0))
    assert link.lost > 0
    read = sum(1 for _ in hub.reports())
    assert read > 0
    link.close()


def test_where_nothing_may_be_lost_a_report_waits_for_a_supervisor_that_does_not_read(
    folder: RunFolder, hub: Hub
) -> None:
    """As when the command was stopped by Ctrl-Z, and its stages were not."""
    alive, gone = os.pipe()
    link = StageLink(folder.stages, "inference", alive)
    sent = 20_000

    def report() -> None:
        for number in range(sent):
            link.report(messages.TextRecord(frame=number, text="x" * 100, time_ns=0))

    thread = threading.Thread(target=report)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    frames = [report.frame for report in received(hub, sent) if isinstance(report, messages.TextRecord)]
    thread.join(PATIENCE_S)
    assert frames == list(range(sent))
    assert link.lost == 0
    os.close(gone)
    os.close(alive)
    link.close()


def test_where_nothing_may_be_lost_a_report_waits_no_longer_than_there_is_a_supervisor(folder: RunFolder) -> None:
    alive, gone = os.pipe()
    link = StageLink(folder.stages, "inference", alive)
    os.close(gone)
    for _ in range(5_000):
        link.report(Heartbeat(stage="inference"))
    assert link.lost > 0
    link.abandon()
    link.close()
    os.close(alive)


def test_a_watched_descriptor_ends_a_wait(folder: RunFolder) -> None:
    link = StageLink(folder.stages, "capture")
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb", buffering=0) as sink:
        link.watch(source)
        assert link.wait(0) == set()
        sink.write(b"x")
        assert link.wait(PATIENCE_S) == {source.fileno()}
    link.close()


# Clients


def test_each_client_gets_its_own_reply(folder: RunFolder, hub: Hub) -> None:
    def answer(data: bytes) -> Reply:
        return Reply(ok=True, verb=data.decode())

    replies: dict[str, str] = {}

    def ask(name: str) -> None:
        for number in range(10):
            sent = f"{name}-{number}"
            replies[sent] = request(folder.control, sent.encode(), PATIENCE_S).verb

    with serving(hub, answer):
        threads = [threading.Thread(target=ask, args=(f"client{index}",)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(replies) == 60
    assert all(sent == got for sent, got in replies.items())


def test_replies_in_another_order_than_the_requests(folder: RunFolder, hub: Hub) -> None:
    with raw(folder) as first, raw(folder) as second:
        first.send_multipart([b"", b"first"])
        second.send_multipart([b"", b"second"])
        came: dict[bytes, list[bytes]] = {}

        def both() -> bool:
            hub.wait(0.01)
            came.update({data: address for address, data in hub.commands()})
            return len(came) == 2

        wait_until(both, "both requests")
        hub.reply(came[b"second"], Reply(ok=True, verb="second"))
        hub.reply(came[b"first"], Reply(ok=True, verb="first"))
        for client, name in ((first, "first"), (second, "second")):
            assert client.poll(1_000 * int(PATIENCE_S))
            assert messages.decode_reply(client.recv_multipart()[-1]).verb == name


def test_a_client_that_is_gone_does_no_harm(folder: RunFolder, hub: Hub) -> None:
    with raw(folder) as client:
        client.send_multipart([b"", b"status"])
        came: list[list[bytes]] = []

        def asked() -> bool:
            hub.wait(0.01)
            came.extend(address for address, _ in hub.commands())
            return bool(came)

        wait_until(asked, "the request")
    hub.reply(came[0], Reply(ok=True))
    hub.reply([b"\0", b"never there"], Reply(ok=True))
    with serving(hub, lambda _: Reply(ok=True, verb="still here")):
        assert request(folder.control, b"{}", PATIENCE_S).verb == "still here"


def test_garbage_leaves_the_hub_serving(folder: RunFolder, hub: Hub) -> None:
    def answer(data: bytes) -> Reply:
        try:
            return Reply(ok=True, verb=type(messages.decode_command(data)).__name__)
        except (ValueError, RecursionError) as error:
            return Reply(ok=False, error=str(error))

    with serving(hub, answer):
        for parts in (
            [b""],
            [b"", b""],
            [b"garbage"],
            [b"\x00\xff" * 1_000],
            [b"", b"{"],
            [b"a", b"b", b"", b"c", b'{"verb": "dance"}'],
            [b"x"] * 500,
            [b"", b"[" * 60_000],
            [b"", b"x" * MESSAGE_MAX],
        ):
            with raw(folder) as client:
                client.send_multipart(parts)
                assert client.poll(1_000 * int(PATIENCE_S)), parts[:3]
                reply = messages.decode_reply(client.recv_multipart()[-1])
                assert not reply.ok
                assert reply.error
        with raw(folder, zmq.PUSH) as client, contextlib.suppress(zmq.Again):
            client.send(b"of another pattern", zmq.NOBLOCK)
        with contextlib.closing(unix_socket(folder.control)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert request(folder.control, b'{"verb": "status"}', PATIENCE_S) == Reply(ok=True, verb="Status")


@pytest.mark.parametrize("size", [MESSAGE_MAX + 1, 1 << 20])
def test_a_message_that_is_too_large_closes_the_connection_and_is_not_answered(
    folder: RunFolder, hub: Hub, size: int
) -> None:
    with serving(hub, lambda data: Reply(ok=True, verb=str(len(data)))), raw(folder) as client:
        with client.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            client.send_multipart([b"", b"x" * size])
            assert monitor.poll(1_000 * int(PATIENCE_S))
            client.disable_monitor()
        client.send_multipart([b"", b"x" * MESSAGE_MAX])  # over a new connection; the first reply that comes is its
        assert client.poll(1_000 * int(PATIENCE_S))
        assert messages.decode_reply(client.recv_multipart()[-1]).verb == str(MESSAGE_MAX)
        assert request(folder.control, b"{}", PATIENCE_S).verb == "2"


def unix_socket(path: Path) -> socket.socket:
    plain = socket.socket(socket.AF_UNIX)
    plain.connect(str(path))
    return plain


@pytest.mark.parametrize("left", ["a hub that does not answer", "a socket that no one listens to", "a file", "nothing"])
def test_a_run_that_does_not_answer_is_said_so(folder: RunFolder, left: str) -> None:
    hub = None
    if "hub" in left:
        hub = Hub(folder.control, folder.events, folder.stages)
    elif "socket" in left:
        with socket.socket(socket.AF_UNIX) as abandoned:
            abandoned.bind(str(folder.control))
    elif "file" in left:
        folder.control.touch()
    with pytest.raises(ControlError) as refused:
        request(folder.control, b"{}", 0.1)
    assert str(refused.value) == "the run 't' did not answer within 0.1 s"
    if hub is not None:
        hub.close()


# Monitors


def events_until(hub: Hub, subscription: Subscription, last: str) -> list[tuple[str, str]]:
    """What a subscriber gets, up to the topic `last`, which is published for as long as it does not come."""
    found: list[tuple[str, str]] = []

    def came() -> bool:
        hub.wait(0)
        hub.publish(last, b"0")
        while (event := subscription.receive(0.01)) is not None:
            found.append((event[0], event[1].decode()))
        return any(topic == last for topic, _ in found)

    wait_until(came, last)
    return [event for event in found if event[0] != last]


def test_a_late_subscriber_is_told_the_last_state_of_each_stage(folder: RunFolder, hub: Hub) -> None:
    for topic, record in (
        ("state.capture", b'"starting"'),
        ("state.playback", b'"ready"'),
        ("timing.capture", b"1"),
        ("text", b'"gone"'),
        ("state.capture", b'"ready"'),
        ("xrun", b"2"),
    ):
        hub.publish(topic, record)
    subscription = Subscription(folder.events)
    assert events_until(hub, subscription, "end") == [("state.capture", '"ready"'), ("state.playback", '"ready"')]
    hub.publish("text", b'"now"')
    assert subscription.receive(PATIENCE_S) is not None
    subscription.close()


@pytest.mark.parametrize(
    ("topics", "told"),
    [
        (("state.capture", "end"), ["state.capture"]),
        (("state.", "end"), ["state.capture", "state.inference"]),
        (("text", "end"), []),
        (("state.play", "timing", "end"), []),
    ],
)
def test_a_subscriber_is_told_only_what_it_asked_for(
    folder: RunFolder, hub: Hub, topics: tuple[str, ...], told: list[str]
) -> None:
    for stage in ("capture", "inference"):
        hub.publish(f"state.{stage}", b'"running"')
    subscription = Subscription(folder.events, topics)
    assert [topic for topic, _ in events_until(hub, subscription, "end")] == told
    hub.publish("log.capture", b"{}")
    assert [topic for topic, _ in events_until(hub, subscription, "end")] == []
    subscription.close()


def test_the_second_subscriber_of_a_topic_is_told_too(folder: RunFolder, hub: Hub) -> None:
    hub.publish("state.capture", b'"running"')
    first = Subscription(folder.events, ("state.capture", "end"))
    assert ("state.capture", '"running"') in events_until(hub, first, "end")
    second = Subscription(folder.events, ("state.capture", "end"))
    assert ("state.capture", '"running"') in events_until(hub, second, "end")
    first.close()
    second.close()


def test_a_subscriber_may_come_before_the_run(folder: RunFolder) -> None:
    subscription = Subscription(folder.events, ("state.", "end"))
    assert subscription.receive(0) is None
    hub = Hub(folder.control, folder.events, folder.stages)
    hub.publish("state.capture", b'"starting"')
    assert ("state.capture", '"starting"') in events_until(hub, subscription, "end")
    subscription.close()
    hub.close()


def test_a_subscriber_that_never_reads_costs_nothing(folder: RunFolder, hub: Hub) -> None:
    reader = Subscription(folder.events, ("end",))
    lazy = Subscription(folder.events)
    events_until(hub, reader, "end")
    record = json.dumps({"padding": "x" * 200}).encode()
    process = psutil.Process()
    for _ in range(20_000):
        hub.publish("timing.capture", record)
    before = process.memory_info().rss
    for _ in range(80_000):
        hub.publish("timing.capture", record)
    assert process.memory_info().rss - before < 8 << 20  # of 16 MB that were published
    events_until(hub, reader, "end")  # others get theirs
    assert lazy.receive(PATIENCE_S) is not None
    reader.close()
    lazy.close()


def test_a_subscriber_that_talks_back_does_no_harm(folder: RunFolder, hub: Hub) -> None:
    hub.publish("state.capture", b'"running"')
    with zmq.Context() as context, context.socket(zmq.XSUB) as talker:
        talker.setsockopt(zmq.LINGER, 0)
        talker.connect(f"ipc://{folder.events}")
        for message in (b"", b"\x01", b"\x00", b"\x01state.", b"\x02nonsense", b"\x01" + b"x" * 10_000):
            talker.send(message)
        talker.send_multipart([b"\x01", b"\x01state.", b"more"])
        subscription = Subscription(folder.events)
        assert ("state.capture", '"running"') in events_until(hub, subscription, "end")
        subscription.close()


# The sockets themselves


def test_no_one_else_can_open_the_sockets(folder: RunFolder) -> None:
    before = os.umask(0)
    try:
        hub = Hub(folder.control, folder.events, folder.stages)
        assert os.umask(0) == 0  # as it was
    finally:
        os.umask(before)
    for path in (folder.control, folder.events, folder.stages):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) & 0o077 == 0
    hub.close()


INTRUDER: Final = """
import os, socket, sys
from pathlib import Path
from pipeline.ring import Ring

folder, segment, user = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def connect(name):
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(folder / name))

attempts = {"list": lambda: os.listdir(folder), "ring": lambda: Ring.attach(segment).close()}
for name in ("control.ipc", "events.ipc", "stages.ipc"):
    attempts[name] = lambda name=name: connect(name)
os.setgroups([])
os.setgid(user)
os.setuid(user)
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "open")
    except Exception as error:
        print(name, "refused", error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("user", [0, 65_534])
def test_another_user_can_open_nothing(folder: RunFolder, hub: Hub, user: int) -> None:
    """What the folder of all runs would let through, the run's own does not; the user itself gets everywhere."""
    folder.path.parent.chmod(0o755)
    ring = Ring.create(folder.segment("capture"), 10)
    try:
        program = [sys.executable, "-c", INTRUDER, str(folder.path), folder.segment("capture"), str(user)]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
    finally:
        ring.close()
    found = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    expected = "open" if user == 0 else "refused"
    assert found == dict.fromkeys(("list", "ring", "control.ipc", "events.ipc", "stages.ipc"), expected), done.stdout
    assert len(re.findall("permission", done.stdout, re.IGNORECASE)) == (0 if user == 0 else 5), done.stdout


def test_sockets_of_a_dead_run_are_taken_over(folder: RunFolder) -> None:
    make = "from pathlib import Path; import os, sys; from pipeline.control import Hub; "
    make += "hub = Hub(*map(Path, sys.argv[1:])); os.kill(os.getpid(), 9)"
    paths = (folder.control, folder.events, folder.stages)
    subprocess.run([sys.executable, "-c", make, *map(str, paths)], check=False)
    assert all(path.exists() for path in paths)
    hub = Hub(*paths)
    with serving(hub, lambda _: Reply(ok=True, verb="mine")):
        assert request(folder.control, b"{}", PATIENCE_S).verb == "mine"
    hub.close()


def test_a_socket_that_cannot_be_made_is_one_clear_line(folder: RunFolder) -> None:
    missing = folder.path / "no" / "folder"
    os.umask(before := os.umask(0))
    with pytest.raises(ControlError) as refused:
        Hub(missing / "control.ipc", missing / "events.ipc", missing / "stages.ipc")
    assert str(refused.value).startswith(f"socket in {missing} cannot be made: ")
    assert "\n" not in str(refused.value)
    assert os.umask(before) == before


# A second machine


def key_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


SERVER: Final = key_pair()
LAPTOP: Final = key_pair()


def free_port() -> int:
    """One that is free, as the next one is."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port


@pytest.fixture
def listening() -> Listening:
    """Where a laptop is let in, and no one else."""
    port = free_port()
    addresses = (f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}")
    return Listening(*addresses, SERVER, lambda public: public == LAPTOP.public)


@pytest.fixture
def remote_hub(folder: RunFolder, listening: Listening) -> Iterator[Hub]:
    hub = Hub(folder.control, folder.events, folder.stages, listening)
    yield hub
    hub.close()


def control_of(listening: Listening, keys: KeyPair = LAPTOP, server: bytes = SERVER.public) -> Remote:
    return Remote(listening.control, server, keys)


def events_of(listening: Listening, keys: KeyPair = LAPTOP) -> Remote:
    return Remote(listening.events, SERVER.public, keys)


def test_both_machines_are_answered(folder: RunFolder, remote_hub: Hub, listening: Listening) -> None:
    with serving(remote_hub, lambda data: Reply(ok=True, verb=data.decode())):
        for number in range(3):
            assert request(control_of(listening), b"far%d" % number, PATIENCE_S).verb == f"far{number}"
            assert request(folder.control, b"near%d" % number, PATIENCE_S).verb == f"near{number}"


def test_a_far_subscriber_is_welcomed_and_the_near_one_is_not_told_again(
    folder: RunFolder, remote_hub: Hub, listening: Listening
) -> None:
    remote_hub.publish("state.capture", b'"running"')
    near = Subscription(folder.events, ("state.", "end"))
    assert events_until(remote_hub, near, "end") == [("state.capture", '"running"')]
    far = Subscription(events_of(listening), ("state.", "end", "text"))
    assert events_until(remote_hub, far, "end") == [("state.capture", '"running"')]
    assert events_until(remote_hub, near, "end") == []
    far.close()
    near.close()


def test_a_far_subscriber_outlives_the_run(folder: RunFolder, listening: Listening) -> None:
    far = Subscription(events_of(listening), ("state.", "end"))
    for number in range(2):
        hub = Hub(folder.control, folder.events, folder.stages, listening)
        hub.publish("state.capture", b"%d" % number)
        assert ("state.capture", str(number)) in events_until(hub, far, "end")
        hub.close()
    far.close()


@pytest.mark.parametrize("wrong", ["client", "server"])
def test_a_wrong_key_gets_nothing(folder: RunFolder, remote_hub: Hub, listening: Listening, wrong: str) -> None:
    keys, server = (key_pair(), SERVER.public) if wrong == "client" else (LAPTOP, key_pair().public)
    asked: list[bytes] = []

    def answer(data: bytes) -> Reply:
        asked.append(data)
        return Reply(ok=True)

    remote_hub.publish("state.capture", b'"running"')
    subscription = Subscription(Remote(listening.events, server, keys))
    with serving(remote_hub, answer):
        with pytest.raises(ControlError) as refused:
            request(control_of(listening, keys, server), b"{}", 0.7)
        assert str(refused.value) == (
            f"{listening.control} did not answer within 0.7 s: expected a run that listens there and knows this "
            "machine's key (`pipeline keys`)"
        )
        assert subscription.receive(0.3) is None
        assert asked == []
        assert request(control_of(listening), b"right", PATIENCE_S).ok
    subscription.close()


def test_a_client_without_encryption_gets_nothing(remote_hub: Hub, listening: Listening) -> None:
    remote_hub.publish("state.capture", b'"running"')
    with zmq.Context() as context, context.socket(zmq.REQ) as asking, context.socket(zmq.SUB) as subscribed:
        for client, address in ((asking, listening.control), (subscribed, listening.events)):
            client.setsockopt(zmq.LINGER, 0)
            client.connect(address)
        subscribed.subscribe(b"")
        asking.send(b'{"verb": "status"}')
        with serving(remote_hub, lambda _: Reply(ok=True)):
            assert not asking.poll(500)
            assert not subscribed.poll(300)
            assert request(control_of(listening), b"{}", PATIENCE_S).ok


def test_the_sockets_of_this_machine_ask_for_no_key(folder: RunFolder, remote_hub: Hub, listening: Listening) -> None:
    with serving(remote_hub, lambda _: Reply(ok=True)):
        assert request(folder.control, b"{}", PATIENCE_S).ok


def test_strangers_that_say_nothing_or_garbage_do_no_harm(remote_hub: Hub, listening: Listening) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)
    spoken = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 1_000,
        os.urandom(100_000),
        greeting,
        greeting + b"\x04\xff" * 99,
    ]
    with contextlib.ExitStack() as open_ones, serving(remote_hub, lambda _: Reply(ok=True)):
        for address in (listening.control, listening.events):
            for words in spoken * 5:
                stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
                open_ones.callback(stranger.close)
                with contextlib.suppress(OSError):  # it was shown the door meanwhile
                    stranger.sendall(words)
        assert request(control_of(listening), b"{}", PATIENCE_S).ok


def test_a_message_that_is_too_large_is_refused_over_tcp_too(remote_hub: Hub, listening: Listening) -> None:
    with serving(remote_hub, lambda data: Reply(ok=True, verb=str(len(data)))):
        with pytest.raises(ControlError, match="did not answer"):
            request(control_of(listening), b"x" * (MESSAGE_MAX + 1), 0.5)
        assert request(control_of(listening), b"{}", PATIENCE_S).verb == "2"


@pytest.mark.parametrize("taken", [0, 1])
def test_an_address_that_is_taken_is_one_clear_line(folder: RunFolder, listening: Listening, taken: int) -> None:
    address = (listening.control, listening.events)[taken]
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        other.listen()
        with pytest.raises(ControlError) as refused:
            Hub(folder.control, folder.events, folder.stages, listening)
    assert str(refused.value) == f"remote.listen: {address}: address already in use"


def test_an_address_of_another_machine_is_one_clear_line(folder: RunFolder, listening: Listening) -> None:
    elsewhere = listening._replace(control="tcp://192.0.2.1:5570")
    with pytest.raises(ControlError) as refused:
        Hub(folder.control, folder.events, folder.stages, elsewhere)
    assert str(refused.value) == "remote.listen: tcp://192.0.2.1:5570: cannot assign requested address"
