"""Messages that no run is to be harmed by, made from a seed: not commands, not reports, not even ZeroMQ's.

Whatever decodes as a command, or as a stage's report, is left out: it would be carried out.
"""

import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import zmq

from pipeline import messages
from pipeline.messages import Reply
from pipeline.protocol import EVENTS, EXCHANGES

PATIENCE_S: Final = 20.0
MESSAGE_MAX: Final = 1 << 16
"""Bytes, beyond which a message is not read."""

_BATCH: Final = 8
"""Requests that are under way at a time: less than what a socket keeps for a peer."""

_COMMANDS: Final = [messages.encode(command) for command, _ in EXCHANGES]
_REPORTS: Final = [messages.encode(event) for event in EVENTS]
_OTHERS: Final = [messages.encode(reply) for _, reply in EXCHANGES[1:3]]

_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""The first 64 bytes of ZMTP 3.0, without security."""

MEANINGLESS: Final = [
    b'{"verb":"set"}',
    b'{"verb":"set","text_top_k":5,"text_top_p":0.5}',
    b'{"verb":"set","backlog_target":9,"backlog_limit":2}',
    b'{"verb":"input","spec":""}',
    b'{"verb":"input","spec":"dance"}',
    b'{"verb":"input","spec":"tone:1e999"}',
    b'{"verb":"input","spec":"file:/no/such/file.wav"}',
    b'{"verb":"input","spec":"file:\\u0000"}',
    b'{"verb":"input","spec":"file:%b"}' % (b"x" * 4_000),
    b'{"verb":"output","spec":"tone:440"}',
    b'{"verb":"output","spec":"file:/no/such/folder/file.wav"}',
    b'{"verb":"record","on":true}',
    b'{"verb":"record","on":false}',
    b'{"verb":"record","on":true,"path":"\\u0000"}',
    b'{"verb":"record","on":true,"path":"/no/such/folder/file.wav"}',
    b'{"verb":"record","on":true,"path":"%b"}' % (b"x" * 4_000),
]
"""Commands in form that nothing can come of: each is refused, and nothing is heard of it."""

UNOPENABLE: Final = [
    b'{"verb":"output","spec":"file:\\u0000.wav"}',
    b'{"verb":"output","spec":"file:%b.wav"}' % (b"x" * 4_000),
]
"""What turns out to be no speaker only after the present one was let go, which is then taken again: that is heard."""

EXTREME: Final = [b'{"verb":"trace","seconds":%b}' % number for number in (b"86400", b"5e-324", b"1e-9")]
"""Commands with the largest and smallest of values: each is carried out."""


def _is_one(decode: Callable[[bytes], object], data: bytes) -> bool:
    try:
        decode(data)
    except (ValueError, RecursionError):
        return False
    return True


def is_command(data: bytes) -> bool:
    """Whether a run would take it for a command."""
    return _is_one(messages.decode_command, data)


def is_report(data: bytes) -> bool:
    """Whether a run would take it for what a stage says."""
    return _is_one(messages.decode_report, data)


class Maker:
    """Malformed messages, always the same ones of one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  nothing secret
        self.kinds: dict[str, Callable[[], bytes]] = {
            "empty": lambda: b"",
            "garbage": lambda: self._bytes(200),
            "text": self._text,
            "bits flipped": self._flipped,
            "cut off": self._cut_off,
            "spliced": self._spliced,
            "something after it": lambda: self._valid() + self._bytes(8),
            "nested": self._nested,
            "number": self._number,
            "wrong type": self._wrong_type,
            "no such field": self._unknown_field,
            "no such verb": self._unknown_verb,
            "duplicate keys": self._duplicate,
            "not UTF-8": self._not_utf8,
            "surrogates": self._surrogates,
            "not a command": lambda: self._random.choice([*_REPORTS, *_OTHERS]),
            "long": self._long,
        }

    def request(self) -> tuple[str, bytes]:
        """What is no command, and of which kind it is."""
        return self._refused(is_command)

    def report(self) -> tuple[str, bytes]:
        """What is no report, and of which kind it is."""
        return self._refused(is_report)

    def neither(self) -> bytes:
        """What is no command and no report."""
        return self._refused(lambda data: is_command(data) or is_report(data))[1]

    def _refused(self, is_valid: Callable[[bytes], bool]) -> tuple[str, bytes]:
        while True:
            kind = self._random.choice(list(self.kinds))
            data = self.kinds[kind]()
            if not is_valid(data):
                return kind, data

    def envelope(self, data: bytes) -> list[bytes]:
        """The parts in which a client sends it: as REQ does, or with too few, too many or odd ones before it."""
        shape = self._random.randrange(10)
        if shape == 0:
            return [data]
        if shape == 1:
            return [self._bytes(20) for _ in range(self._random.randrange(1, 9))] + [data]
        return [*[b""] * (2 if shape == 2 else 1), data]

    def topic(self) -> bytes:
        """What nobody publishes, mostly."""
        known = [b"", b"state.", b"timing.capture", b"status", b"text"]
        others = [self._bytes(40), bytes(self._random.randrange(300)), b"x" * self._random.randrange(60_000)]
        return self._random.choice(known + others)

    def stream(self) -> bytes:
        """What is written to a socket by who does not speak ZeroMQ, or stops in the middle of it."""
        ready = _command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER")
        whole = _GREETING + ready + _frame(b"") + _frame(self.neither())
        kind = self._random.randrange(8)
        if kind == 0:
            return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        if kind == 1:
            return self._bytes(300)
        if kind == 2:
            return whole[: self._random.randrange(len(whole))]
        if kind == 3:
            return self._flip(whole[: len(_GREETING) + len(ready)])
        if kind == 4:  # a frame that is longer than anything
            return (
                _GREETING + ready + b"\x02" + struct.pack(">Q", self._random.choice([1 << 20, 1 << 62, (1 << 64) - 1]))
            )
        if kind == 5:  # commands that there are none of
            return _GREETING + ready + _command(self._bytes(20)[:255], self._bytes(20))
        if kind == 6:  # flags that there are none of
            return _GREETING + ready + bytes([self._random.randrange(8, 256), 3]) + b"abc"
        return _GREETING + _command(b"READY", self._bytes(60))

    # One of each kind

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randrange(most + 1))

    def _valid(self) -> bytes:
        return self._random.choice(_COMMANDS)

    def _object(self) -> dict[str, object]:
        decoded: dict[str, object] = json.loads(self._valid())
        return decoded

    def _text(self) -> bytes:
        letters = '{}[]":,\\/ \n\tverbmute0123456789eE+-.truefalsn\x00é漢😀'
        return "".join(self._random.choices(letters, k=self._random.randrange(60))).encode()

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._random.randrange(1, 5)):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def _flipped(self) -> bytes:
        return self._flip(self._valid())

    def _cut_off(self) -> bytes:
        data = self._valid()
        return data[: self._random.randrange(len(data))]

    def _spliced(self) -> bytes:
        one, other = self._cut_off(), self._valid()
        return one + other[self._random.randrange(len(other)) :]

    def _nested(self) -> bytes:
        depth = self._random.choice([2, 50, 1_000, 10_000])
        opened, closed = self._random.choice([(b"[", b"]"), (b'{"verb":', b"}"), (b'{"a":', b"}")])
        inner = opened * depth + b"1" + closed * self._random.choice([0, depth])
        return self._random.choice([inner[:MESSAGE_MAX], b'{"verb":"set","volume":' + inner[: MESSAGE_MAX - 40] + b"}"])

    def _number(self) -> bytes:
        digits = b"9" * self._random.choice([19, 20, 309, 5_000])
        odd = [digits, b"-" + digits, b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity", b"0x10", b"1e", b"01"]
        field = self._random.choice([b"volume", b"text_top_k", b"prebuffer_ms", b"backlog_limit", b"verb"])
        return b'{"verb":"set","%b":%b}' % (field, self._random.choice(odd))

    def _wrong_type(self) -> bytes:
        message = self._object()
        wrong = [None, True, 0, -1, 1.5, "", "mute", [], {}, ["mute"], {"verb": "mute"}]
        message[self._random.choice(list(message))] = self._random.choice(wrong)
        return json.dumps(message).encode()

    def _unknown_field(self) -> bytes:
        return json.dumps(self._object() | {self._bytes(6).hex(): self._bytes(6).hex()}).encode()

    def _unknown_verb(self) -> bytes:
        verb = self._random.choice(list(messages.VERBS))
        odd = [verb.upper(), verb + " ", verb + "\x00", f"{verb}.", "", verb * 1_000, "__init__", "command"]
        return json.dumps({"verb": self._random.choice(odd)}).encode()

    def _duplicate(self) -> bytes:
        pairs = [b'"verb":"mute"', b'"verb":"dance"', b'"verb":1', b'"spec":"null"', b'"on":true', b'"on":1']
        return b"{" + b",".join(self._random.choices(pairs, k=self._random.randrange(2, 6))) + b"}"

    def _not_utf8(self) -> bytes:
        bad = self._random.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc3", b"\x80"])
        shapes = [
            b'{"verb":"%b"}', b'{"verb":"input","spec":"%b"}', b'{"verb":"record","on":true,"path":"a%bb"}',
            b'{"verb":"mute","%b":1}', b'{"%b":"mute"}', b'"%b"', b"%b",
            b'{"type":"text","frame":0,"text":"%b","time_ns":0}',
            b'{"type":"log","stage":"capture","level":"info","message":"%b","time_ns":0}',
        ]  # fmt: skip
        return self._random.choice(shapes).replace(b"%b", bad)

    def _surrogates(self) -> bytes:
        bad = self._random.choice([b"\\ud800", b"\\udc00\\ud800", b"\\ud800x", b"\\uD83D", b"\\u12", b"\\x00", b"\\"])
        shape = self._random.choice([b'{"verb":"%b"}', b'{"verb":"input","spec":"%b"}', b'{"%b":1}'])
        return shape.replace(b"%b", bad)

    def _long(self) -> bytes:
        size = self._random.choice([1_000, 10_000, 60_000])
        return b'{"verb":"input","spec":"' + b"x" * size + self._random.choice([b"", b'"', b'","more":1}'])


def _frame(data: bytes, flags: int = 0) -> bytes:
    if len(data) < 256:
        return bytes([flags, len(data)]) + data
    return bytes([flags | 2]) + struct.pack(">Q", len(data)) + data


def _command(name: bytes, data: bytes) -> bytes:
    return _frame(bytes([len(name)]) + name + data, flags=4)


class Attack:
    """Sends what a Maker makes to the sockets in a run's folder, and counts it.

    Raises AssertionError where a request gets no answer, or a success.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.maker = Maker(seed)
        self.sent: Counter[str] = Counter()
        """Messages, by where they went and of which kind they were."""
        self._random = random.Random(~seed)  # noqa: S311
        self._control, self._events, self._stages = (folder / f"{name}.ipc" for name in ("control", "events", "stages"))

    @contextlib.contextmanager
    def _client(self, path: Path, kind: int) -> Iterator["zmq.Socket[bytes]"]:
        with zmq.Context() as context, context.socket(kind) as client:
            client.setsockopt(zmq.LINGER, 0)
            client.connect(f"ipc://{path}")
            yield client

    def requests(self, count: int) -> None:
        """So many requests, each of which is to be answered with an error, in the order in which they were sent."""
        with self._client(self._control, zmq.DEALER) as client:
            for begin in range(0, count, _BATCH):
                batch = [self.maker.request() for _ in range(min(_BATCH, count - begin))]
                envelopes = [self.maker.envelope(data) for _, data in batch]
                for parts in envelopes:
                    client.send_multipart(parts)
                for (kind, data), parts in zip(batch, envelopes, strict=True):
                    assert self._answer(client, parts).ok is False, f"taken for a command: {data[:500]!r}"
                    self.sent[f"control: {kind}"] += 1

    def _answer(self, client: "zmq.Socket[bytes]", parts: list[bytes]) -> Reply:
        assert client.poll(1_000 * int(PATIENCE_S)), f"no answer to {parts[-1][:500]!r}"
        *address, answer = client.recv_multipart()
        assert address == parts[:-1], f"no answer to {parts[-1][:500]!r}"
        reply = messages.decode_reply(answer)
        assert reply.ok or reply.error
        return reply

    def commands(self, commands: list[bytes], ok: bool) -> None:
        """Commands that are answered with a success, or without."""
        with self._client(self._control, zmq.DEALER) as client:
            for data in commands:
                client.send_multipart([b"", data])
                reply = self._answer(client, [b"", data])
                assert reply.ok is ok, f"{data[:200]!r}: {reply.error or reply.verb}"
                self.sent[f"control: {'extreme' if ok else 'meaningless'}"] += 1

    def too_large(self, count: int) -> None:
        """Requests over the limit: the connection is closed, and nothing is answered."""
        for _ in range(count):
            with self._client(self._control, zmq.DEALER) as client:
                with client.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
                    client.send_multipart([b"", b"x" * self._random.randrange(MESSAGE_MAX + 1, 1 << 19)])
                    assert monitor.poll(1_000 * int(PATIENCE_S)), "a message over the limit is read"
                    client.disable_monitor()
                assert not client.poll(0)
            self.sent["control: too large"] += 1

    def reports(self, count: int) -> None:
        """To the stages' line, under names that no stage has."""
        with self._client(self._stages, zmq.DEALER) as client:
            for _ in range(count):
                kind, data = self.maker.report()
                client.send_multipart(self.maker.envelope(data))
                self.sent[f"stages: {kind}"] += 1

    def streams(self, count: int) -> None:
        """To all three sockets, by who does not speak ZeroMQ."""
        for _ in range(count):
            path = self._random.choice([self._control, self._events, self._stages])
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as plain, contextlib.suppress(OSError):
                plain.settimeout(PATIENCE_S)
                plain.connect(str(path))
                plain.sendall(self.maker.stream())
                if self._random.randrange(2):
                    plain.shutdown(socket.SHUT_WR)
                    plain.recv(4_096)
            self.sent["streams"] += 1

    def subscriptions(self, count: int) -> None:
        """Odd topics, and what no subscriber says, on the events' socket."""
        with self._client(self._events, zmq.XSUB) as client:
            for _ in range(count):
                topic = self.maker.topic()
                first = self._random.choice([b"\x01", b"\x01", b"\x00", b"\x02", b"\xff", b""])
                client.send_multipart([first + topic, *[topic[:9]] * (self._random.randrange(6) == 0)])
                self.sent["events: subscriptions"] += 1

    def storm(self, count: int) -> None:
        """Clients of every kind, also of those that no one here speaks with, that come and go."""
        kinds = [zmq.REQ, zmq.DEALER, zmq.SUB, zmq.PUSH, zmq.PULL, zmq.PAIR, zmq.PUB, zmq.ROUTER, zmq.REP]
        with zmq.Context() as context:
            for _ in range(count):
                kind = self._random.choice(kinds)
                with context.socket(kind) as client:
                    client.setsockopt(zmq.LINGER, 0)
                    client.connect(f"ipc://{self._random.choice([self._control, self._events, self._stages])}")
                    if kind in (zmq.DEALER, zmq.PUSH):
                        with contextlib.suppress(zmq.Again):
                            client.send(self.maker.neither(), zmq.NOBLOCK)
                self.sent["storm"] += 1

    def everything(self, count: int) -> None:
        """So many messages of all sorts, most of them requests."""
        self.requests(count * 85 // 100)
        self.reports(count * 4 // 100)
        self.subscriptions(count * 6 // 100)
        self.streams(count * 3 // 100)
        self.storm(count * 2 // 100)
        self.too_large(1 + count // 1_000)
