"""The flight recorder: the events of the last minutes, kept as they were published, in bounded memory."""

from collections import deque
from typing import Final

import msgspec

from pipeline.timing import NS_PER_S

KEPT_S: Final = 300
"""Seconds of events that are kept, if they fit."""

KEPT_BYTES: Final = 16 << 20
"""What all records that are kept may take together; a run of 40 records a second fills a fifth of it."""


class FlightRecorder:
    """Takes every event, and forgets the oldest."""

    def __init__(self, kept_s: float = KEPT_S, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_ns = round(kept_s * NS_PER_S)
        self._kept_bytes = kept_bytes
        self._events: deque[tuple[int, str, bytes]] = deque()
        self._bytes = 0

    def add(self, topic: str, record: bytes, time_ns: int) -> None:
        """Keep an event that was published at `time_ns`, monotonic."""
        self._events.append((time_ns, topic, record))
        self._bytes += len(record)
        while self._events and (self._bytes > self._kept_bytes or self._events[0][0] < time_ns - self._kept_ns):
            self._bytes -= len(self._events.popleft()[2])

    def since(self, time_ns: int) -> list[msgspec.Raw]:
        """The events published from `time_ns` on, oldest first, each the JSON [topic, record]."""
        return [
            msgspec.Raw(b'["%b",%b]' % (topic.encode(), record))
            for at_ns, topic, record in self._events
            if at_ns >= time_ns
        ]
