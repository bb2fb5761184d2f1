"""What all tests share: the sound server."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Final

import pytest

from tests.soundserver import SoundServer, missing

SOUND_FIXTURES: Final = frozenset({"sound_server", "sound_cable"})


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As where the tests run behind a shell: programs that they start would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test that asks for the sound server the marker `sound`, and two more goes.

    Where others use this machine's cores a virtual sound card loses blocks, and no one is told of that.
    """
    for item in items:
        if SOUND_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("sound")
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=1))


@pytest.fixture
def sound_server() -> Iterator[SoundServer]:
    """A running sound server: microphone and speaker are two cards at 24 kHz."""
    require_sound()
    with SoundServer() as server:
        yield server


@pytest.fixture
def sound_cable() -> Iterator[SoundServer]:
    """A running sound server: microphone and speaker are one card at 24 kHz, recorded by `record_both`."""
    require_sound()
    with SoundServer(cable=True) as server:
        yield server


def require_sound() -> None:
    """Skip the test where no sound server can run. On Linux with CI set, a missing package is a failure."""
    if sys.platform != "linux":
        pytest.skip("the sound server needs Linux")
    package = missing()
    if package is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"package {package} is not installed, and in CI no test is skipped for that")
    pytest.skip(f"package {package} is not installed")
