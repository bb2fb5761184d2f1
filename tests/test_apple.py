"""pipeline.apple, on a Mac made up at the boundary: the system's name, what it says of itself, its C library."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest

from pipeline import apple
from pipeline.apple import DefaultWatch, KeepWarm, MicrophoneWatch
from pipeline.audio import Samples
from pipeline.config import CaptureConfig, Config
from pipeline.control import Hub
from pipeline.messages import LogRecord, Mute
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_S, promote_thread
from pipeline.topology import FRAME, FRAME_NS, SAMPLE_RATE
from pipeline.worker import Context
from procs.capture import Capture
from tests import helpers
from tests.helpers import received

folder = helpers.folder
runtime_dir = helpers.runtime_dir

GIB: Final = 1 << 30
MIB: Final = 1 << 20

System = Callable[..., None]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> System:
    """Makes this a Mac whose `sysctl -n` says what it is given by name, dots as underscores, and knows nothing else."""

    def become(**said: str) -> None:
        def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
            assert command[:2] == ["sysctl", "-n"]
            found = said.get(command[2].replace(".", "_"))
            return subprocess.CompletedProcess(command, int(found is None), f"{found}\n" if found else "", "")

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(subprocess, "run", run)

    return become


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this no Mac, and fails the test where the system is asked for anything all the same."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the system was asked")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(ctypes, "CDLL", refuse)


# What the system says


def test_the_system_is_asked_by_name(mac: System) -> None:
    mac(machdep_cpu_brand_string="Apple M3")
    assert apple.sysctl("machdep.cpu.brand_string") == "Apple M3"
    assert apple.sysctl("hw.memsize") is None


@pytest.mark.parametrize("error", [FileNotFoundError("sysctl"), subprocess.TimeoutExpired("sysctl", 5)])
def test_a_system_that_cannot_be_asked_says_nothing(
    mac: System, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    mac()
    monkeypatch.setattr(subprocess, "run", fail)
    assert apple.sysctl("hw.memsize") is None
    assert apple.wired_limit_bytes(GIB) is None


# Wired memory


@pytest.mark.parametrize(
    ("memory_gib", "limit_mib", "need_gib", "expected"),
    [
        (16, 0, 6, 6 * GIB + GIB // 4),  # what is needed, and a little more
        (8, 0, 6, 8 * GIB * 2 // 3),  # what the system allows by itself
        (16, 14 * 1_024, 12, 12 * GIB + GIB // 4),  # what the user made it allow
        (16, 4 * 1_024, 12, 4 * GIB),
        (16, 16 * 1_024, 40, 15 * GIB),  # never all
        (1, 0, 6, None),  # nothing to wire
    ],
)
def test_what_is_needed_is_wired_within_bounds(
    mac: System, memory_gib: int, limit_mib: int, need_gib: int, expected: int | None
) -> None:
    mac(hw_memsize=str(memory_gib * GIB), iogpu_wired_limit_mb=str(limit_mib))
    found = apple.wired_limit_bytes(need_gib * GIB)
    assert found == expected


def test_a_system_without_a_limit_of_its_own_has_the_default(mac: System) -> None:
    mac(hw_memsize=str(12 * GIB))
    assert apple.wired_limit_bytes(100 * GIB) == 8 * GIB


@pytest.mark.parametrize("said", [{}, {"hw_memsize": "plenty"}])
def test_of_a_machine_of_unknown_memory_nothing_is_wired(mac: System, said: dict[str, str]) -> None:
    mac(**said)
    assert apple.wired_limit_bytes(GIB) is None


# Keeping warm


def test_work_is_due_each_half_second_without_a_frame_and_not_for_ever(mac: System) -> None:
    mac()
    warm = KeepWarm(0)
    due = [ms for ms in range(0, 400_000, 10) if warm.is_due(ms * 1_000_000)]
    assert due == list(range(500, 180_001, 500))


def test_while_frames_come_nothing_is_due(mac: System) -> None:
    mac()
    warm = KeepWarm(0)
    for frame in range(1, 5_000):
        assert not warm.is_due(frame * FRAME_NS)
        warm.on_frame(frame * FRAME_NS)


def test_a_frame_begins_it_anew(mac: System) -> None:
    mac()
    warm = KeepWarm(0)
    assert not warm.is_due(200 * NS_PER_S)
    warm.on_frame(200 * NS_PER_S)
    assert not warm.is_due(200 * NS_PER_S + 1)
    assert warm.is_due(201 * NS_PER_S)


# Threads


class Library:
    """A C library that knows of classes of service, and what it was asked."""

    def __init__(self, answer: int) -> None:
        self.asked: list[tuple[int, int]] = []
        self._answer = answer

    def pthread_set_qos_class_self_np(self, qos: int, priority: int) -> int:
        self.asked.append((qos, priority))
        return self._answer


@pytest.mark.parametrize(("answer", "done"), [(0, True), (1, False)])
def test_a_thread_is_put_into_the_highest_class(
    mac: System, monkeypatch: pytest.MonkeyPatch, answer: int, done: bool
) -> None:
    mac()
    library = Library(answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert promote_thread() is done
    assert library.asked == [(0x21, 0)]  # QOS_CLASS_USER_INTERACTIVE
    assert promote_thread(threading.get_native_id()) is False  # only a thread itself can
    assert len(library.asked) == 1


def test_a_library_that_knows_no_classes_changes_nothing(mac: System, monkeypatch: pytest.MonkeyPatch) -> None:
    mac()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert promote_thread() is False


# Microphones


def zeros(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def watched(spec: str, *blocks: Samples) -> list[bool]:
    """What the watch says after each block."""
    watch = MicrophoneWatch(spec)
    said = []
    for block in blocks:
        watch.take(block)
        said.append(watch.warns())
    return said


@pytest.mark.parametrize("spec", ["device", "device:MacBook Pro Microphone"])
def test_a_device_that_gives_zeros_is_warned_of_once(mac: System, spec: str) -> None:
    mac()
    assert watched(spec, zeros(1), zeros(1), zeros(1), zeros(5), zeros(5)) == [False, False, True, False, False]


@pytest.mark.parametrize("spec", ["file:device", "tone:440", "silence"])
def test_what_is_no_device_may_be_silent(mac: System, spec: str) -> None:
    mac()
    assert watched(spec, zeros(5), zeros(5)) == [False, False]


def test_a_device_that_ever_gave_something_may_be_silent(mac: System) -> None:
    mac()
    noise = zeros(0.01)
    noise[7] = 1e-7
    assert watched("device", zeros(1), noise, zeros(5), zeros(5)) == [False] * 4


@pytest.fixture
def stage(folder: RunFolder) -> Iterator[tuple[Context, Hub]]:
    with helpers.stage_context(folder, "capture", Config(capture=CaptureConfig(input="device"))) as both:
        yield both


def logged(stage: tuple[Context, Hub], muted: bool, expected: int) -> list[str]:
    """What the capture stage says while its device gives 4 s of zeros: `expected` reports besides one a frame."""
    context, hub = stage
    capture = Capture(context)
    if muted:
        capture.apply(Mute())
    for frame in range(50):
        capture.on_block(np.zeros(FRAME, np.float32), frame * FRAME_NS + 1, xrun=False)
        capture.work()
    return [report.message for report in received(hub, 50 + expected) if isinstance(report, LogRecord)]


@pytest.mark.parametrize("muted", [False, True])
def test_capture_says_what_to_do_for_a_microphone_without_permission(
    mac: System, stage: tuple[Context, Hub], muted: bool
) -> None:
    mac()
    assert logged(stage, muted, 1) == [apple.MICROPHONE_ADVICE]
    assert "System Settings > Privacy & Security > Microphone" in apple.MICROPHONE_ADVICE


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_capture_says_nothing(stage: tuple[Context, Hub]) -> None:
    assert logged(stage, False, 0) == []


# Elsewhere


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_nothing_happens() -> None:
    assert apple.sysctl("hw.memsize") is None
    assert apple.wired_limit_bytes(GIB) is None
    assert apple.raise_thread() is False
    warm = KeepWarm(0)
    assert not any(warm.is_due(second * NS_PER_S) for second in range(100))
    assert watched("device", *[zeros(1)] * 20) == [False] * 20


@pytest.mark.usefixtures("elsewhere")
def test_on_linux_threads_are_promoted_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda thread, *_: asked.append(thread))
    assert promote_thread() is True
    assert promote_thread(7) is True
    assert asked == [0, 7]


# Default devices


class CoreAudio:
    """What CoreAudio answers to a question for a default device."""

    def __init__(self) -> None:
        self.default = {b"dIn ": 40, b"dOut": 50}
        self.asked: list[bytes] = []
        self.fails = False

    def AudioObjectGetPropertyData(self, system: int, *pointers: Any) -> int:  # noqa: N802
        address, qualifiers, qualifier, size, device = (getattr(one, "_obj", one) for one in pointers)
        assert (system, qualifiers, qualifier, size.value) == (1, 0, None, 4)
        assert (address.scope.to_bytes(4), address.element) == (b"glob", 0)
        self.asked.append(address.selector.to_bytes(4))
        device.value = self.default[address.selector.to_bytes(4)]
        return int(self.fails)


@pytest.fixture
def core_audio(mac: System, monkeypatch: pytest.MonkeyPatch) -> CoreAudio:
    mac()
    library = CoreAudio()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    return library


@pytest.mark.parametrize(("kind", "selector"), [("input", b"dIn "), ("output", b"dOut")])
def test_a_new_default_device_is_noticed_within_a_second(core_audio: CoreAudio, kind: str, selector: bytes) -> None:
    watch = DefaultWatch(kind)
    assert not watch.has_changed(0)
    core_audio.default[selector] += 1
    assert not watch.has_changed(NS_PER_S - 1)
    assert core_audio.asked == [selector] * 2  # once a second, and when it was made
    assert watch.has_changed(NS_PER_S)


def test_that_there_is_no_default_for_a_while_is_no_new_one(core_audio: CoreAudio) -> None:
    watch = DefaultWatch("output")
    core_audio.default[b"dOut"] = 0
    assert not watch.has_changed(0)
    core_audio.fails = True
    core_audio.default[b"dOut"] = 7
    assert not watch.has_changed(NS_PER_S)


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_no_default_is_asked_for() -> None:
    assert not DefaultWatch("output").has_changed(0)
