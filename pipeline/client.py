"""A run as seen from another program: ask it, and tell it."""

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from pipeline import control, messages
from pipeline.errors import ControlError
from pipeline.messages import Reply, StatusReport
from pipeline.runtime import RunFolder

ANSWER_S: Final = 5.0
"""How long a run may take to answer, a stage's acknowledgement included."""

_BINDING_S: Final = 1.0
"""How long a run that is just beginning may take to make its sockets."""

_POLL_S: Final = 0.01


class Client:
    """The run called `name`. Raises ConfigError if it can be no run's name."""

    def __init__(self, name: str = "default") -> None:
        self._folder = RunFolder(name)

    def send(self, verb: str, values: Mapping[str, Any] | None = None, *, timeout_s: float = ANSWER_S) -> Reply:
        """Carry out a command with its `values`, and return its acknowledgement.

        Raises ControlError if the run is not up, does not answer, or refuses the command.
        """
        if verb not in messages.VERBS:
            raise ControlError(f"verb {verb!r}: expected one of {', '.join(messages.VERBS)}")
        self._find()
        command = msgspec.json.encode({**(values or {}), "verb": verb})
        reply = control.request(self._folder.control, command, timeout_s)
        if not reply.ok:
            raise ControlError(reply.error)
        return reply

    def _find(self) -> None:
        """Raises ControlError where nobody would answer, and says why."""
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
            time.sleep(_POLL_S)

    def status(self) -> StatusReport:
        """State, accounting and timing now. Raises ControlError."""
        reply = self.send("status")
        if reply.status is None:
            raise ControlError("the run's reply to status holds no status")
        return reply.status
