"""procs.recovery.Held, with devices that are made up, and what procs.devices takes for a lost or an empty one."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest

from pipeline.control import Hub
from pipeline.errors import DeviceError, DeviceLostError
from pipeline.messages import LogRecord
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import SAMPLE_RATE
from pipeline.worker import Context
from procs import devices, recovery
from procs.devices import DefaultChangedError, Device, Unopened
from procs.recovery import Held
from tests import helpers
from tests.helpers import received, wait_until

folder = helpers.folder
runtime_dir = helpers.runtime_dir

STOPPED: Final = DeviceLostError("output desk: the device has stopped")


@dataclass
class Shop:
    """Where devices are opened, what was done to them in its order, and what goes wrong."""

    did: list[str] = field(default_factory=list)
    away: int = 0
    """Attempts to open one that fail from now on."""
    unstartable: bool = False
    blocked: threading.Event | None = None
    """What letting go of a device waits for."""
    opened: int = 0

    def open(self) -> Device:
        if self.away:
            self.away -= 1
            self.did.append("not there")
            raise DeviceError("output device:desk: not found")
        self.opened += 1
        return Desk(self, f"desk {self.opened}")

    def begin(self) -> None:
        self.did.append("begin anew")

    def leave(self) -> None:
        self.did.append("fade out")


class Desk(Unopened):
    """One device."""

    def __init__(self, shop: Shop, detail: str) -> None:
        self.detail = detail
        self.shop = shop
        self.why: DeviceError | None = None

    def start(self) -> None:
        self.shop.did.append(f"start {self.detail}")
        if self.shop.unstartable:
            raise DeviceLostError(f"output {self.detail}: cannot be started")

    def stop(self) -> None:
        self.shop.did.append(f"stop {self.detail}")
        if self.shop.blocked is not None:
            self.shop.blocked.wait(helpers.PATIENCE_S)

    def failure(self) -> DeviceError | None:
        return self.why


@pytest.fixture
def stage(folder: RunFolder) -> Iterator[tuple[Context, Hub]]:
    with helpers.stage_context(folder, "playback") as context_and_hub:
        yield context_and_hub


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop()
    monkeypatch.setattr(recovery, "TRY_S", 0.001)
    monkeypatch.setattr(devices, "renew", lambda: shop.did.append("look"))
    return shop


@pytest.fixture
def held(stage: tuple[Context, Hub], shop: Shop) -> Held:
    held = Held(stage[0], "output", shop.open, shop.begin, shop.leave)
    held.open("device:desk", wait=False)
    held.start()
    shop.did.clear()
    return held


def lose(held: Held, why: DeviceError = STOPPED) -> None:
    assert isinstance(held.device, Desk)
    held.device.why = why
    assert held.failure() is None


def back(held: Held) -> Callable[[], bool]:
    def is_back() -> bool:
        assert held.failure() is None
        return isinstance(held.device, Desk)

    return is_back


def test_a_lost_device_is_let_go_of_first_and_tried_until_it_is_there(
    held: Held, shop: Shop, stage: tuple[Context, Hub]
) -> None:
    shop.away = 2
    lose(held)
    assert held.detail == "desk 1 lost: waiting for it"
    assert not held.works
    wait_until(back(held), "the device to be back")
    assert held.detail == "desk 2"
    assert held.works
    vain = ["look", "not there"]
    assert shop.did == ["stop desk 1", *vain, *vain, "look", "begin anew", "start desk 2"]
    lost, again = received(stage[1], 2)
    assert isinstance(lost, LogRecord)
    assert (lost.level, lost.message) == ("warning", "output desk: the device has stopped; waiting for it")
    assert isinstance(again, LogRecord)
    assert again.level == "info"
    assert again.message.startswith("output desk 2: runs, after ")


def test_one_that_opens_and_does_not_start_is_let_go_of_and_tried_again(held: Held, shop: Shop) -> None:
    shop.unstartable = True
    lose(held)
    wait_until(lambda: shop.did.count("look") > 1, "a second attempt")
    shop.unstartable = False
    wait_until(back(held), "the device to be back")
    tried = ["look", "begin anew", "start desk 2", "stop desk 2"]
    assert shop.did[:5] == ["stop desk 1", *tried]


def test_a_device_that_gives_way_to_a_new_default_fades_out_before(held: Held, shop: Shop) -> None:
    lose(held, DefaultChangedError("output desk: another device is the default now"))
    wait_until(back(held), "the new default")
    assert shop.did == ["fade out", "stop desk 1", "look", "begin anew", "start desk 2"]


def test_what_waiting_does_not_cure_is_returned(held: Held, shop: Shop) -> None:
    assert isinstance(held.device, Desk)
    held.device.why = DeviceError("output file x.wav: is the disk full?")
    assert held.failure() is held.device.why
    assert shop.did == []


def test_one_that_is_lost_before_it_starts_is_waited_for(stage: tuple[Context, Hub], shop: Shop) -> None:
    held = Held(stage[0], "output", shop.open, shop.begin)
    held.open("device:desk", wait=False)
    shop.unstartable = True
    held.start()
    shop.unstartable = False
    wait_until(back(held), "the device to run")


def test_a_successor_waits_for_a_device_and_a_first_stage_does_not(stage: tuple[Context, Hub], shop: Shop) -> None:
    held = Held(stage[0], "output", shop.open, shop.begin)
    shop.away = 3
    with pytest.raises(DeviceError, match="not found"):
        held.open("device:desk", wait=False)
    with pytest.raises(DeviceError, match="not found"):
        held.open("file:desk.wav", wait=True)  # no file comes back by itself
    held.open("device:desk", wait=True)
    held.start()
    assert held.failure() is None
    assert held.detail == "output device:desk lost: waiting for it"
    wait_until(back(held), "the device")
    lost = received(stage[1], 2)[0]
    assert isinstance(lost, LogRecord)
    assert lost.message == "output device:desk: not found; waiting for it"


def test_it_is_settled_for_another_device_and_waited_for_again_if_there_is_none(
    held: Held, shop: Shop, stage: tuple[Context, Hub]
) -> None:
    shop.away = 1_000_000
    lose(held)
    held.settle()
    shop.did.clear()
    assert not held.works
    assert held.failure() is None  # the other could not be opened
    shop.away = 0
    wait_until(back(held), "the device to be back")
    assert shop.did[0] == "look"
    assert len(received(stage[1], 2)) == 2  # it is lost once, and back once


def test_another_device_takes_the_place_of_one_that_is_away(held: Held, shop: Shop) -> None:
    shop.away = 1_000_000
    lose(held)
    held.settle()
    shop.did.clear()
    other = Desk(shop, "other")
    held.let_go()
    other.start()
    held.take(other)
    assert shop.did == ["begin anew", "start other"]
    assert held.detail == "other"
    assert held.failure() is None


def test_one_that_was_put_in_since_is_found_by_a_new_look_and_one_that_is_not_there_interrupts_nothing(
    held: Held, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "is_portaudio", lambda _: True)
    monkeypatch.setattr(devices, "is_found_anew", lambda direction, spec: (direction, spec) == ("output", "device:new"))
    shop.away = 1
    with pytest.raises(DeviceError, match="not found"):
        held.open_other("device:nowhere", shop.open)
    assert held.works
    shop.away = 1
    other = held.open_other("device:new", shop.open)
    assert shop.did == ["not there", "not there", "fade out", "stop desk 1", "look"]
    held.let_go()
    held.take(other)
    assert shop.did[-1] == "begin anew"
    assert held.works


def test_what_cannot_be_taken_back_is_waited_for(held: Held, shop: Shop) -> None:
    held.let_go()
    shop.away = 1
    with pytest.raises(DeviceError, match="other cannot be started; and then output device:desk: not found"):
        held.take_back(DeviceError("other cannot be started"))
    wait_until(back(held), "the device to be back")
    assert held.detail == "desk 2"


def test_the_end_does_not_wait_for_a_device_that_cannot_be_let_go_of(
    held: Held, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_CLOSE_S", 0.01)
    monkeypatch.setattr(recovery, "_CANCEL_S", 0.01)
    shop.blocked = threading.Event()
    lose(held)
    with pytest.raises(DeviceLostError, match="desk 1: the sound system does not answer"):
        held.settle()
    held.close()
    assert shop.did == ["stop desk 1"]
    shop.blocked.set()
    wait_until(lambda: not any(thread.name == "recovery" for thread in threading.enumerate()), "the thread's end")
    assert shop.did == ["stop desk 1"]  # nothing was opened behind it


def test_a_sound_system_that_hangs_for_long_has_the_stage_started_again(
    held: Held, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.blocked = threading.Event()
    lose(held)
    assert held.failure() is None
    monkeypatch.setattr(recovery, "HANGS_S", 0.0)
    with pytest.raises(DeviceLostError, match="desk 1: the sound system does not answer"):
        held.failure()
    shop.blocked.set()
    held.close()


# What is taken for lost


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_a_device_that_calls_no_more_is_lost_after_a_second() -> None:
    clock = Clock()
    silence = devices._Silence(clock)
    lost_at = []
    for tenth in range(40):
        clock.now_ns = tenth * NS_PER_S // 10
        if silence.lasts(480 * min(tenth, 10)):
            lost_at.append(tenth)
    assert lost_at[0] == 21


def test_a_device_may_take_five_seconds_to_call_for_the_first_time() -> None:
    clock = Clock()
    silence = devices._Silence(clock)
    for tenth in range(51):
        clock.now_ns = tenth * NS_PER_S // 10
        assert not silence.lasts(0)
    clock.now_ns += 1
    assert silence.lasts(0)


def test_a_stage_that_was_stopped_itself_takes_no_device_for_lost() -> None:
    clock = Clock()
    silence = devices._Silence(clock)
    for look in range(1, 20):
        clock.now_ns = look * 100 * NS_PER_S
        assert not silence.lasts(480 * (look // 2))


class Dates:
    """A speaker's callbacks, 200 a second, whose dates wander by 2 ms a second, and what is taken for an underrun."""

    BLOCK: Final = 120

    def __init__(self) -> None:
        self.underruns = devices._Underruns(SAMPLE_RATE)
        self.late_ms = 0.0
        self.seen_at: list[int] = []
        self.position = 0
        self._jitter_ms = np.random.default_rng(1).uniform(-1, 1, 4_000)

    def call(self, times: int, *, told: bool = False) -> None:
        for _ in range(times):
            wander_ms = 2.0 * self.position / SAMPLE_RATE
            now_ms = self.position * 1_000 / SAMPLE_RATE + self.late_ms + wander_ms
            dac_ns = round((now_ms + self._jitter_ms[self.position // self.BLOCK]) * NS_PER_MS)
            if self.underruns.seen(self.BLOCK, dac_ns, told):
                self.seen_at.append(self.position // self.BLOCK)
            self.position += self.BLOCK


@pytest.fixture
def dates() -> Dates:
    return Dates()


def test_a_speaker_whose_dates_wander_has_not_run_dry(dates: Dates) -> None:
    dates.call(3_000)
    assert dates.seen_at == []


@pytest.mark.parametrize("dry_ms", [10, 70])
def test_silence_that_a_sound_server_put_in_without_a_word_is_an_underrun(dates: Dates, dry_ms: float) -> None:
    for times in range(1, 4):
        dates.call(500)
        dates.late_ms += dry_ms
        dates.call(100)
        assert len(dates.seen_at) == times
        assert dates.seen_at[-1] - 600 * (times - 1) == 524  # when all dates that are looked at are from after it


@pytest.mark.parametrize("dry_ms", [0, 10, 70])
def test_an_underrun_that_is_told_for_each_block_that_makes_up_for_it_is_one(dates: Dates, dry_ms: float) -> None:
    dates.call(500)
    dates.call(1, told=True)
    dates.call(3)
    dates.call(1, told=True)
    dates.late_ms += dry_ms
    dates.call(500)
    assert dates.seen_at == [500]
    dates.call(1, told=True)
    assert dates.seen_at == [500, 1005]


def test_a_device_that_says_of_every_block_that_it_ran_dry_does_so_each_second(dates: Dates) -> None:
    dates.call(600, told=True)
    assert dates.seen_at == [0, 200, 400]


def test_dates_of_a_device_that_does_not_run_yet_are_no_underrun(dates: Dates) -> None:
    """Its first blocks come in a burst, and are dated up to 47 ms too early; a wireless one is known later still."""
    dates.late_ms = -47.0
    dates.call(150)
    dates.late_ms = 0.0
    dates.call(500)
    assert dates.seen_at == []


def test_callbacks_that_come_late_in_bursts_are_no_underrun(dates: Dates) -> None:
    """16 blocks of one buffer of the device's, the first of which had to wait, one buffer in two."""
    dates.call(400)
    for late_ms in (8.0, 0.0, 8.0, 0.0, 0.0) * 10:
        dates.late_ms = late_ms
        dates.call(16)
    assert dates.seen_at == []


def test_an_index_is_held_by_its_name() -> None:
    desk = object.__new__(devices._PortAudioOutput)
    desk.name = "desk"
    assert devices.by_name("device:3", desk) == "device:desk"
    assert devices.by_name("device:de", desk) == "device:de"
    assert devices.by_name("device", desk) == "device"
    assert devices.by_name("file:3", Unopened()) == "file:3"
