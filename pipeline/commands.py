"""What clients ask of a run: read, passed on to the stages that carry it out, answered, and told as an event."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from pipeline import messages
from pipeline.control import Hub
from pipeline.messages import (
    Acknowledged,
    AnyCommand,
    Apply,
    CommandRecord,
    Effect,
    RecordingRecord,
    Reply,
    Set,
    Status,
    StatusReport,
    Trace,
)
from pipeline.timing import NS_PER_S
from pipeline.topology import StageName


@dataclass(eq=False)
class Asked:
    """A command, and what has become of it so far."""

    address: list[bytes]
    command: AnyCommand
    start_ns: int
    awaits: list[str] = field(default_factory=list)
    """Who has not acknowledged it yet."""
    until_ns: int = 0
    limit_s: float = 0.0
    effects: list[Effect] = field(default_factory=list)
    recording: RecordingRecord | None = None
    answered: bool = False

    @property
    def verb(self) -> str:
        return type(self.command).__name__.lower()


class Requests:
    """The commands that came and were not answered yet.

    `publish` is given a record of each that was answered; `take_effect` each that every stage has acknowledged, before
    it is answered. `former` gives the settings in force in place of those that a Set would change: with them it is
    undone in one stage where another could not do it.
    """

    def __init__(
        self,
        hub: Hub,
        clock: Callable[[], int],
        publish: Callable[[CommandRecord], None],
        take_effect: Callable[[AnyCommand], None],
        former: Callable[[Set], Set],
    ) -> None:
        self._hub = hub
        self._clock = clock
        self._publish = publish
        self._take_effect = take_effect
        self._former = former
        self._orders = 0
        self._sent: dict[int, tuple[Asked, StageName]] = {}
        self._waiting: list[Asked] = []

    def read(self) -> Iterator[Asked]:
        """The commands that have come. What is none is answered at once."""
        for address, data in self._hub.commands():
            start_ns = self._clock()
            try:
                command = messages.decode_command(data)
            except messages.MALFORMED as error:
                self._hub.reply(address, Reply(ok=False, error=_explain(data, error)))
                continue
            yield Asked(address, command, start_ns)

    def order(self, asked: Asked, stages: list[StageName], limit_s: float) -> None:
        """Have `stages` carry it out, and wait for `limit_s` until the last of them has acknowledged it."""
        for stage in stages:
            self.wait(asked, stage, limit_s)
            self._orders += 1
            self._sent[self._orders] = asked, stage
            apply = Apply(request=self._orders, command=asked.command, until_ns=asked.until_ns)
            self._hub.order(stage, apply)

    def wait(self, asked: Asked, who: str, limit_s: float) -> None:
        """Wait for `who` to carry it out."""
        asked.awaits.append(who)
        asked.limit_s = limit_s
        asked.until_ns = self._clock() + round(limit_s * NS_PER_S)
        if asked not in self._waiting:
            self._waiting.append(asked)

    def acknowledged(self, record: Acknowledged) -> None:
        """A stage has carried out, or refused, what it was ordered."""
        if record.request not in self._sent:
            return
        asked, stage = self._sent.pop(record.request)
        if not asked.answered:
            self.carried_out(asked, stage, record.frame, record.error)
        elif not record.error:
            self._came_late(asked, stage, record.frame)

    def _came_late(self, asked: Asked, stage: StageName, frame: int) -> None:
        """What was begun in time and given up meanwhile is done all the same: so say so, or undo it."""
        if isinstance(asked.command, Set):
            self._undo(asked.command, stage)
            return
        asked.effects.append(Effect(stage=stage, frame=frame))
        self._take_effect(asked.command)
        self._tell(asked, "")

    def _undo(self, command: Set, stage: str) -> None:
        self._hub.order(stage, Apply(request=0, command=self._former(command)))

    def stage_died(self, stage: StageName) -> None:
        """What it was ordered and has not acknowledged, it never will."""
        lost = [number for number, (_, ordered) in self._sent.items() if ordered == stage]
        for asked in [self._sent.pop(number)[0] for number in lost]:
            if not asked.answered:
                self.refuse(asked, f"{stage} ended before it acknowledged {asked.verb}", stage)

    def carried_out(self, asked: Asked, who: str, frame: int, error: str = "") -> None:
        """`who` has carried it out, with effect from `frame` on, or not, because of `error`."""
        if asked not in self._waiting:
            return
        if error:
            self.refuse(asked, error, who)
            return
        asked.awaits.remove(who)
        asked.effects.append(Effect(stage=who, frame=frame))
        if not asked.awaits:
            self._take_effect(asked.command)
            self.answer(asked)

    def refuse(self, asked: Asked, error: str, who: str = "") -> None:
        """Answer that it was not carried out, and why."""
        done, asked.effects = asked.effects, []
        self._end(asked, Reply(ok=False, verb=asked.verb, stage=who, error=error))
        if isinstance(asked.command, Set):
            for effect in done:
                self._undo(asked.command, effect.stage)

    def answer(
        self, asked: Asked, *, status: StatusReport | None = None, records: list[msgspec.Raw] | None = None
    ) -> None:
        """Answer that it was carried out."""
        effects = asked.effects
        first = effects[0] if effects else Effect(stage="", frame=-1)
        self._end(
            asked,
            Reply(
                ok=True,
                verb=asked.verb,
                stage=first.stage,
                frame=first.frame,
                effects=effects,
                status=status,
                recording=asked.recording,
                records=records or [],
            ),
        )

    def _end(self, asked: Asked, reply: Reply) -> None:
        if asked.answered:
            return
        asked.answered = True
        if asked in self._waiting:
            self._waiting.remove(asked)
        self._hub.reply(asked.address, reply)
        if not isinstance(asked.command, Status | Trace):
            self._tell(asked, reply.error)

    def _tell(self, asked: Asked, error: str) -> None:
        self._publish(
            CommandRecord(
                verb=asked.verb,
                values=messages.given(asked.command),
                ok=not error,
                effects=asked.effects,
                error=error,
                start_ns=asked.start_ns,
                end_ns=self._clock(),
            )
        )

    def deadline_ns(self) -> int | None:
        """When the next of them is given up."""
        return min((asked.until_ns for asked in self._waiting), default=None)

    def give_up(self) -> None:
        """Refuse those that took too long."""
        now = self._clock()
        for asked in [asked for asked in self._waiting if now >= asked.until_ns]:
            who = asked.awaits[0]
            self.refuse(asked, f"{who} did not acknowledge {asked.verb} within {asked.limit_s:g} s", who)

    def close(self) -> None:
        """Refuse all: the run has ended."""
        for asked in list(self._waiting):
            who = asked.awaits[0]
            self.refuse(asked, f"the run ended before {who} acknowledged {asked.verb}", who)


def _explain(data: bytes, error: Exception) -> str:
    """What is wrong with a request: of a verb that there is, its value; else that it is no command."""
    with contextlib.suppress(*messages.MALFORMED):
        verb = msgspec.json.decode(data, type=_Verb).verb
        if verb in messages.VERBS:
            return f"{verb}: {str(error)[0].lower()}{str(error)[1:]}"
    known = ", ".join(messages.VERBS)
    return f'not a command: {error}; expected JSON such as {{"verb": "status"}}, with one of {known}'


class _Verb(msgspec.Struct):
    verb: str
