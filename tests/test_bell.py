"""pipeline.bell over real named pipes, between real processes."""

import contextlib
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.bell import Bell
from tests.helpers import PATIENCE_S


def rung(bell: Bell, timeout_s: float = 0) -> bool:
    return bool(select.select([bell], [], [], timeout_s)[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bell"


@contextlib.contextmanager
def a_bell(path: Path) -> Iterator[Bell]:
    bell = Bell(path)
    try:
        yield bell
    finally:
        bell.close()


def test_a_ring_is_seen_until_it_is_cleared(path: Path) -> None:
    with a_bell(path) as writer, a_bell(path) as reader:
        assert not rung(reader)
        writer.ring()
        assert rung(reader)
        assert rung(reader)
        reader.clear()
        assert not rung(reader)
        reader.clear()  # also where nothing rang


def test_many_rings_are_one(path: Path) -> None:
    with a_bell(path) as writer, a_bell(path) as reader:
        for _ in range(100):
            writer.ring()
        reader.clear()
        assert not rung(reader)


def test_a_full_pipe_never_blocks_and_still_wakes(path: Path) -> None:
    with a_bell(path) as writer, a_bell(path) as reader:
        for _ in range(200_000):  # more than any pipe holds
            writer.ring()
        assert rung(reader)
        for _ in range(100):
            reader.clear()
        assert not rung(reader)
        writer.ring()
        assert rung(reader)


def test_the_pipe_is_for_its_user_alone(path: Path) -> None:
    with a_bell(path):
        found = path.stat()
        assert stat.S_ISFIFO(found.st_mode)
        assert stat.S_IMODE(found.st_mode) & 0o077 == 0


def test_either_end_may_be_first_and_either_may_come_again(path: Path) -> None:
    with a_bell(path) as reader:
        for _ in range(3):
            with a_bell(path) as writer:
                writer.ring()
            assert rung(reader)  # although the writer is gone
            reader.clear()
            assert not rung(reader)  # a writer that has closed is no end of file


def test_a_ring_before_the_reader_came_is_kept_while_anyone_has_the_pipe_open(path: Path) -> None:
    with a_bell(path) as writer:
        writer.ring()
        with a_bell(path) as reader:
            assert rung(reader)


def test_it_is_not_inherited(path: Path) -> None:
    with a_bell(path) as bell:
        assert not os.get_inheritable(bell.fileno())


def test_another_process_is_woken(path: Path) -> None:
    program = (
        "import select, sys; from pathlib import Path; from pipeline.bell import Bell; bell = Bell(Path(sys.argv[1]));"
        "print('waiting', flush=True); ready, _, _ = select.select([bell], [], [], 20); print(len(ready))"
    )
    with a_bell(path) as bell:
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        bell.ring()
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert said == "1\n"
