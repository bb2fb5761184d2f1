"""A run's events, fed to the model: from before the run is up, over its end, and on when it is up again."""

import time
from typing import Final

from pipeline import messages
from pipeline.client import Client
from pipeline.messages import Event, StatusRecord
from pipeline.monitor.model import Model

TOPICS: Final = ("timing.", "state.", "text", "xrun", "log.", "command", "status")

FRAMES_S: Final = 0.25
"""How long a frame of every stage is waited for, once the status is known."""

KEEP_UP_S: Final = 5.0
"""What comes is kept for so long, and longer; then some of it is lost."""

_ANOTHER_CLOCK_NS: Final = 10**9
"""Clocks of one machine are not told so far apart: a status is not under way for a second."""

_GONE_S: Final = 2.0
"""The status comes every second: a run that is silent for so long is looked after."""


class Feed:
    """The model of a run, kept up with it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._subscription = client.subscribe(TOPICS)
        self._looked_s = 0.0
        self._ahead_ns = 0
        self._met = False
        self.model = Model(client.name)

    def update(self, wait_s: float = 0.0) -> None:
        """Take in what has come, of which the first may take `wait_s`."""
        received = self._subscription.receive(wait_s)
        while received is not None:
            self._take(received[1])
            received = self._subscription.receive(0)
        self._look()

    def _take(self, record: bytes) -> None:
        try:
            event = messages.decode_event(record)
        except messages.MALFORMED:
            self.model.misunderstood += 1
        else:
            self._meet_clock(event)
            self.model.take(event, self.now_ns())

    def now_ns(self) -> int:
        """The run's monotonic clock, which is another's where the run is on another machine."""
        return time.monotonic_ns() - self._ahead_ns

    def _meet_clock(self, event: Event) -> None:
        if self._client.is_remote and isinstance(event, StatusRecord):
            ahead_ns = time.monotonic_ns() - event.status.time_ns
            # The one that came fastest is nearest to the truth; another run has another clock.
            fits = self._met and abs(ahead_ns - self._ahead_ns) < _ANOTHER_CLOCK_NS
            self._ahead_ns = min(ahead_ns, self._ahead_ns) if fits else ahead_ns
            self._met = True

    def _look(self) -> None:
        """Whether a run that says nothing is there at all."""
        model, now_s = self.model, time.monotonic()
        if model.link != "up" or model.last_ns is None:
            return
        since_s = max(self._looked_s, (model.last_ns + self._ahead_ns) / 1e9)
        if now_s - since_s > _GONE_S:
            self._looked_s = now_s
            if not self._client.may_be_up():
                model.end()

    def wait(self, until_s: float) -> None:
        """Keep up with the run until that time on the monotonic clock."""
        while (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, KEEP_UP_S))
            self.update()

    def complete(self, patience_s: float) -> bool:
        """Wait until the model knows everything of now, for `patience_s` at most; whether it knows the status."""
        until_s = time.monotonic() + patience_s
        while not self.model.complete() and (left_s := until_s - time.monotonic()) > 0:
            if self.model.status is not None:
                # All that runs tells of a frame within two; what stands still does not.
                until_s = min(until_s, time.monotonic() + FRAMES_S)
                left_s = min(left_s, FRAMES_S)
            self.update(left_s)
        return self.model.status is not None

    def close(self) -> None:
        """Unsubscribe."""
        self._subscription.close()
