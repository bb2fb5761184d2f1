"""A run as seen from another program: ask it, and tell it."""

from typing import Any

import msgspec

from pipeline import control, messages
from pipeline.errors import ControlError
from pipeline.messages import Reply, StatusReport
from pipeline.runtime import RunFolder

ANSWER_S = 5.0
"""How long a run may take to answer, a stage's acknowledgement included."""


class Client:
    """The run called `name`. Raises ConfigError if it can be no run's name."""

    def __init__(self, name: str = "default") -> None:
        self._folder = RunFolder(name)

    def send(self, verb: str, timeout_s: float = ANSWER_S, **values: Any) -> Reply:
        """Carry out a command, and return its acknowledgement.

        Raises ControlError if the run is not up, does not answer, or refuses the command.
        """
        if verb not in messages.VERBS:
            raise ControlError(f"verb {verb!r}: expected one of {', '.join(messages.VERBS)}")
        reply = control.request(self._folder.control, msgspec.json.encode({"verb": verb, **values}), timeout_s)
        if not reply.ok:
            raise ControlError(reply.error)
        return reply

    def status(self) -> StatusReport:
        """State, accounting and timing now. Raises ControlError."""
        reply = self.send("status")
        if reply.status is None:
            raise ControlError("the run's reply to status holds no status")
        return reply.status
