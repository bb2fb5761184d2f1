"""A model that is too slow for real time: noticed, and what helps against it on this machine."""

import sys
from collections import deque
from typing import Final, NamedTuple

from pipeline.config import Config
from pipeline.errors import CheckpointError
from pipeline.messages import TimingRecord
from pipeline.timing import NS_PER_MS
from pipeline.topology import FRAME_MS

WINDOW: Final = 125
"""Frames that are looked back on: 10 s of them."""

_EVERY: Final = 12
"""Frames from one look to the next."""

_RECOVERED_MS: Final = 0.9 * FRAME_MS
"""What 95 % of the frames may take at most before an overload is said to be over: not at each frame something else."""

LIGHT: Final = "q4"
"""The quality that is fastest."""


class Change(NamedTuple):
    """An overload that has begun or is over."""

    on: bool
    p95_ms: float
    """What 95 % of the frames of the window took at most."""


class Overload:
    """Takes the inference stage's timing records, in order.

    What a frame took is counted from when work on it began, or from when the frame before it was done if that was
    later: frames that are worked on at a time are not counted twice. The machine is overloaded when p95 of the last
    WINDOW frames is over a frame's 80 ms, because then every frame waits longer than the one before.
    """

    def __init__(self) -> None:
        self._took_ms: deque[float] = deque(maxlen=WINDOW)
        self._end_ns = 0
        self._since_look = 0
        self.on = False

    def take(self, record: TimingRecord) -> Change | None:
        """Count a frame; returns the change, if it makes one."""
        self._took_ms.append((record.end_ns - max(record.start_ns, self._end_ns)) / NS_PER_MS)
        self._end_ns = record.end_ns
        self._since_look += 1
        if self._since_look < _EVERY or len(self._took_ms) < WINDOW:
            return None
        self._since_look = 0
        p95_ms = sorted(self._took_ms)[WINDOW * 95 // 100]
        if p95_ms > (_RECOVERED_MS if self.on else FRAME_MS):
            return self._set(True, p95_ms)
        return self._set(False, p95_ms)

    def _set(self, on: bool, p95_ms: float) -> Change | None:
        before, self.on = self.on, on
        return Change(on, p95_ms) if on != before else None

    def clear(self) -> None:
        """Forget all: another model takes over."""
        self._took_ms.clear()
        self.on = False


def lighter(config: Config) -> tuple[str | None, str] | None:
    """The same model in the fastest quality, as `model` and `quality`, if its files are on this machine."""
    if config.engine != "moshi" or config.quality == LIGHT:
        return None
    from pipeline import checkpoints

    model = config.model
    if model is not None and not checkpoints.is_folder(model) and (label := checkpoints.label_of(model)):
        model = model.removesuffix(label) + LIGHT
    try:
        checkpoints.find(model, LIGHT)
    except CheckpointError:
        return None
    return model, LIGHT


def advice(config: Config) -> str:
    """What the user can do, in a line."""
    from pipeline import budget, chips

    if config.engine == "moshi" and config.quality != LIGHT:
        first = "" if lighter(config) else f"`pipeline models pull --quality {LIGHT}`, and then "
        return f"{LIGHT} is faster than {config.quality}: {first}`pipeline up --quality {LIGHT}`"
    if config.engine == "moshi" and sys.platform == "linux" and chips.nvidia() is None:
        return "mlx computes on the processor here, which is fast enough for tiny models alone: use a GPU"
    speed = chips.bandwidth(chips.processor()) if config.engine == "moshi" else None
    if speed is not None:
        floor_ms = budget.floor_ms(budget.official_step_bytes(LIGHT), speed.most)
        if not budget.can_fit(floor_ms):
            return f"{LIGHT} takes {floor_ms:.0f} ms at best on {chips.processor()}: it needs faster memory"
    return "end other programs that compute, and see `pipeline bench`"
