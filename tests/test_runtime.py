"""pipeline.runtime: names, folders and locks, across real processes."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import runtime
from pipeline.bell import Bell
from pipeline.errors import ConfigError, ControlError
from pipeline.ring import Ring, segment_name
from pipeline.runtime import SOCKET_PATH_MAX, RunFolder
from pipeline.topology import RINGS
from tests import helpers
from tests.helpers import segments_left

folder = helpers.folder
runtime_dir = helpers.runtime_dir

HOLDER = """
import sys
from pipeline import runtime
from pipeline.errors import ControlError
from pipeline.runtime import RunFolder
runtime._PATIENCE_S = 0.05
folder = RunFolder("t")
try:
    folder.lock(shared=sys.argv[1] == "shared")
except ControlError as error:
    print(f"refused: {error}", flush=True)
else:
    print("held", flush=True)
    if sys.stdin.readline().strip() == "leave":
        folder.leave()
        print("left", flush=True)
        sys.stdin.readline()
"""


class Holder:
    """Another process that locks the run `t`, or is refused."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said = self.read()

    @property
    def held(self) -> bool:
        return self.said == "held"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("leave\n")
        self.process.stdin.flush()
        assert self.read() == "left"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def holding(kind: str) -> Iterator[Holder]:
    holder = Holder(kind)
    try:
        yield holder
    finally:
        holder.end()


# Names and paths


@pytest.mark.parametrize("name", ["default", "a", "0", "A.b_c-d", "x" * 32, "a..b", "1.2"])
def test_names_that_are_good(runtime_dir: Path, name: str) -> None:
    run = RunFolder(name)
    assert run.path == runtime_dir / name
    assert runtime.names() == []
    run.lock()
    assert runtime.names() == [name]
    run.release()
    assert runtime.names() == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "../a", "a b", "é", "x" * 33, "a\n", "a\0"]
)
def test_names_that_are_not(runtime_dir: Path, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunFolder(name)
    assert str(refused.value) == f"name {name!r}: expected 1 to 32 letters, digits, '.', '_' or '-'"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_no_name_leads_out_of_the_folder_of_runs(name: str) -> None:
    with contextlib.suppress(ConfigError):
        run = RunFolder(name)
        assert run.path.parent == runtime.base().absolute()
        assert Path(os.path.normpath(run.path)) == run.path


def test_names_lists_the_folders_that_hold_a_lock(runtime_dir: Path) -> None:
    """Of a run that is up or has died; another folder is not a run's."""
    assert runtime.names() == []
    (runtime_dir / "a-file").touch()
    for name in ("not-a-runs", "-odd"):
        (runtime_dir / name).mkdir()
    (runtime_dir / "-odd" / "lock").touch()
    RunFolder("made").make()
    runs = {name: RunFolder(name) for name in ("b", "a")}
    for run in runs.values():
        run.lock()
    assert runtime.names() == ["a", "b"]
    runs["b"].release()
    assert runtime.names() == ["a"]
    runs["a"].release(keep_logs=True)
    assert runtime.names() == ["a"]  # until another run of the name clears it


def test_where_nothing_was_ever_run_there_are_no_names(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(runtime_dir / "never"))
    assert runtime.names() == []
    assert not RunFolder("t").is_locked()


def test_without_the_variable_the_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIPELINE_RUNTIME_DIR", raising=False)
    assert runtime.base().name == "pipeline"
    assert runtime.base().is_absolute()
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", "")
    assert runtime.base().name == "pipeline"


def test_a_relative_folder_is_the_same_one_from_everywhere(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runtime_dir)
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", ".")
    run = RunFolder("t")
    assert run.path.is_absolute()
    monkeypatch.undo()
    assert run.segment("capture") == segment_name(runtime_dir / "t", "capture")


def test_a_path_that_is_too_long_for_a_socket_says_by_how_much(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = len(os.fsencode(runtime_dir)) + len("//t/control.ipc")
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(runtime_dir / ("x" * (SOCKET_PATH_MAX - fixed))))
    run = RunFolder("t")
    run.make()
    assert len(os.fsencode(run.control)) == SOCKET_PATH_MAX
    too_long = runtime_dir / ("x" * (SOCKET_PATH_MAX - fixed + 7))
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(too_long))
    with pytest.raises(ConfigError) as refused:
        RunFolder("t")
    assert str(refused.value) == (
        f"runtime folder {too_long / 't'} is too long for a socket's path by 7 bytes: "
        "set PIPELINE_RUNTIME_DIR to a shorter one"
    )


def test_a_path_is_measured_in_bytes(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(runtime_dir / ("é" * 40)))
    with pytest.raises(ConfigError, match="too long"):
        RunFolder("t")


def test_segment_names_fit_macos_and_differ_by_folder(runtime_dir: Path) -> None:
    names = {RunFolder(name).segment(spec.name) for name in ("a", "b", "x" * 32) for spec in RINGS}
    assert len(names) == 3 * len(RINGS)
    assert all(len(name) <= 30 and name[0] == "/" and "/" not in name[1:] for name in names)
    assert RunFolder("a").segment("heard") == RunFolder("a").segment("heard")


def test_segment_names_are_the_same_through_a_link(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder("t")
    run.make()
    link = runtime_dir.parent / f"{runtime_dir.name}-link"
    link.symlink_to(runtime_dir)
    try:
        monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(link))
        assert RunFolder("t").segment("capture") == run.segment("capture")
    finally:
        link.unlink()


def test_a_ring_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long by 1 characters"):
        segment_name(tmp_path, "x" * 14)


# Folders


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_folder_is_for_its_user_alone(runtime_dir: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = RunFolder("t")
        run.make()
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o500, 0o770, 0o1777])
def test_permissions_that_are_too_wide_are_tightened(runtime_dir: Path, mode: int) -> None:
    run = RunFolder("t")
    run.path.mkdir()
    run.path.chmod(mode)
    run.lock()
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    run.release()


def test_a_folder_of_another_user_is_refused(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder("t")
    above = runtime_dir / "above"
    above.mkdir()
    mine = os.getuid()
    if mine:
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    for theirs in (run.path, runtime_dir, above):
        theirs.mkdir(exist_ok=True)
        monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(above / "runs" if theirs == above else runtime_dir))
        if not mine:  # root's folders are nobody's to refuse
            os.chown(theirs, 4_242, -1)
        other = RunFolder("t")
        with pytest.raises(ConfigError) as refused:
            other.lock()
        line = str(refused.value)
        assert line.startswith(f"runtime folder {other.path}: ")
        assert line.endswith(" is not yours alone to write: set PIPELINE_RUNTIME_DIR")
        if not mine:
            assert f": {theirs} is not" in line
        assert not (other.path / "lock").exists()
        if not mine:
            os.chown(theirs, mine, -1)


@pytest.mark.parametrize(
    ("mode", "good"), [(0o777, False), (0o707, False), (0o770, True), (0o1777, True), (0o755, True)]
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_below_one_that_anyone_may_write_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, depth: int, mode: int, good: bool
) -> None:
    """Whoever may rename it could put another in its place; where the sticky bit is set, only its owner may."""
    above = runtime_dir / "a"
    monkeypatch.setenv("PIPELINE_RUNTIME_DIR", str(above.joinpath(*"bc"[:depth])))
    run = RunFolder("t")
    run.make()
    above.chmod(mode)
    if good:
        run.lock()
        run.release()
    else:
        with pytest.raises(ConfigError) as refused:
            run.lock()
        assert str(refused.value) == (
            f"runtime folder {run.path}: {above} is not yours alone to write: set PIPELINE_RUNTIME_DIR"
        )


def test_a_folder_that_anyone_may_write_is_refused_itself(runtime_dir: Path) -> None:
    run = RunFolder("t")
    run.make()
    run.path.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{run.path} is not yours alone to write"):
        run.lock()


@pytest.mark.parametrize("what", ["file", "folder", "a run's file"])
def test_a_folder_that_holds_something_else_is_refused(folder: RunFolder, what: str) -> None:
    """As where PIPELINE_RUNTIME_DIR is a home directory and the name that of a folder in it."""
    inside = {"file": folder.path / "thesis.txt", "folder": folder.path / "photos", "a run's file": folder.settings}[
        what
    ]
    if what == "folder":
        inside.mkdir()
    else:
        inside.write_text("dear")
    for shared in (False, True):
        with pytest.raises(ConfigError) as refused:
            folder.lock(shared=shared)
        assert str(refused.value) == (
            f"runtime folder {folder.path} holds something that no run put there: choose another name"
        )
    with pytest.raises(ConfigError):
        folder.make()
    assert [inside] == list(folder.path.iterdir())
    assert runtime.names() == []


def test_logs_that_say_nothing_are_not_kept(folder: RunFolder) -> None:
    folder.lock()
    folder.log("capture").touch()
    folder.log("inference").write_text("a traceback")
    folder.release(keep_logs=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["inference.log", "lock"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(runtime_dir: Path) -> None:
    run = RunFolder("t")
    run.path.touch()
    with pytest.raises(ConfigError) as refused:
        run.make()
    assert str(refused.value) == f"runtime folder {run.path} cannot be made: File exists"
    assert not run.path.is_dir()


# Locks


def test_one_run_of_a_name_at_a_time(folder: RunFolder) -> None:
    with holding("alone") as holder:
        assert holder.held
        assert folder.is_locked()
        with pytest.raises(ControlError) as refused:
            folder.lock()
        assert str(refused.value) == (
            "a run named 't' is up already: stop it with `pipeline down --name t`, or choose another --name"
        )
        with holding("alone") as another, holding("shared") as shared:
            assert [another.said[:7], shared.said[:7]] == ["refused"] * 2
        assert RunFolder("u").is_locked() is False


def test_stages_started_by_hand_share_a_name(folder: RunFolder) -> None:
    with holding("shared") as first, holding("shared") as second:
        assert [first.held, second.held] == [True, True]
        assert folder.is_locked()
        with holding("alone") as alone:
            assert not alone.held


@pytest.mark.parametrize("kind", ["alone", "shared"])
def test_the_lock_of_a_process_that_was_killed_is_free(folder: RunFolder, kind: str) -> None:
    with holding(kind) as holder:
        holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
        assert not folder.is_locked()
        folder.lock()
        assert folder.is_locked()
        folder.release()


def test_looking_at_a_lock_leaves_it_free(folder: RunFolder) -> None:
    folder.lock()
    folder.release(keep_logs=True)
    assert not folder.is_locked()
    with holding("alone") as holder:
        assert holder.held


def fill(run: RunFolder) -> None:
    """All that a run may leave."""
    for spec in RINGS:
        Ring.create(run.segment(spec.name), seconds=1).close()
    for path in (run.control, run.events, run.stages, run.settings, run.log("capture"), run.path / "lock"):
        path.write_bytes(b"left")
    Bell(run.bell("capture")).close()


def fill_but_the_lock(run: RunFolder) -> None:
    for spec in RINGS:
        Ring.create(run.segment(spec.name), seconds=1).close()
    run.control.touch()


def test_release_leaves_nothing(folder: RunFolder) -> None:
    folder.lock()
    fill(folder)
    folder.release()
    assert segments_left(folder) == []
    assert not folder.path.exists()
    assert not folder.is_locked()
    folder.lock()  # and the name can be had again
    folder.release()


def test_release_keeps_logs_where_it_is_told_to(folder: RunFolder) -> None:
    folder.lock()
    fill(folder)
    folder.release(keep_logs=True)
    assert segments_left(folder) == []
    assert sorted(path.name for path in folder.path.iterdir()) == ["capture.log", "lock"]
    assert not folder.is_locked()
    folder.lock()  # and the name can be had again
    folder.release()
    assert not folder.path.exists()


def test_a_stale_folder_is_cleared_but_for_the_lock_that_is_held(folder: RunFolder) -> None:
    fill(folder)
    folder.lock()
    folder.clear()
    assert segments_left(folder) == []
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    assert folder.is_locked()
    folder.release()


@pytest.mark.parametrize("keep_logs", [False, True])
@pytest.mark.parametrize("end", ["clear", "release"])
def test_what_no_run_put_there_is_never_removed(folder: RunFolder, end: str, keep_logs: bool) -> None:
    folder.lock()
    fill(folder)
    stray = folder.path / "stray"
    stray.mkdir()
    (stray / "file").touch()
    (folder.path / "other.log").write_text("mine")
    (folder.path / "thesis.txt").touch()
    getattr(folder, end)(keep_logs=keep_logs)
    left = {"stray", "other.log", "thesis.txt"} | ({"capture.log"} if keep_logs else set())
    assert {path.name for path in folder.path.iterdir()} - {"lock"} == left
    assert (stray / "file").exists()
    if end == "clear":
        folder.release()


def test_what_a_link_leads_to_is_never_removed(folder: RunFolder, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    folder.lock()
    folder.settings.symlink_to(kept)
    folder.release()
    assert kept.read_text() == "mine"
    assert not folder.path.exists()


def test_the_first_to_share_a_name_clears_what_a_dead_run_left(folder: RunFolder) -> None:
    fill(folder)
    with holding("shared") as first:
        assert first.held
        assert segments_left(folder) == []
        assert [path.name for path in folder.path.iterdir()] == ["lock"]
        fill(folder)
        with holding("shared") as second:
            assert second.held
            assert segments_left(folder) == [spec.name for spec in RINGS]  # the first one's
            assert folder.control.exists()


def test_a_name_that_becomes_free_in_a_moment_is_waited_for(folder: RunFolder) -> None:
    """As when `pipeline down` has returned and the run that it ended is about to leave."""
    holder = RunFolder("t")
    holder.lock()
    freeing = threading.Timer(0.1, holder.release)
    freeing.start()
    try:
        folder.lock()
    finally:
        freeing.join()
    assert folder.is_locked()
    folder.release()


def test_a_name_may_be_had_while_its_last_run_is_leaving(folder: RunFolder) -> None:
    """Whoever takes it and whoever leaves it meet at every step: it is had, or said to be taken."""
    unexpected: list[BaseException] = []
    had = [0, 0]
    until = time.monotonic() + 1

    def again_and_again(which: int) -> None:
        while time.monotonic() < until and not unexpected:
            run = RunFolder("t")
            try:
                run.lock()
                had[which] += 1
                run.release()
            except ControlError:
                pass
            except BaseException as error:
                unexpected.append(error)

    threads = [threading.Thread(target=again_and_again, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []
    assert min(had) > 0


def test_who_opened_the_lock_of_a_run_that_ended_touches_nothing_of_the_next(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its open and its flock the file was removed, and another run has made a new one."""
    last, following = RunFolder("t"), RunFolder("t")
    last.lock()
    flock = RunFolder._flock

    def late(lock: int, kind: int) -> bool:
        monkeypatch.setattr(RunFolder, "_flock", staticmethod(flock))
        last.release()
        following.lock()
        fill_but_the_lock(following)
        return flock(lock, kind)

    monkeypatch.setattr(RunFolder, "_flock", staticmethod(late))
    monkeypatch.setattr(runtime, "_PATIENCE_S", 0.05)
    with pytest.raises(ControlError):
        folder.lock(shared=True)
    assert segments_left(following) == [spec.name for spec in RINGS]
    assert following.control.exists()
    following.release()


def test_the_last_to_leave_clears_everything(folder: RunFolder) -> None:
    with holding("shared") as first, holding("shared") as second:
        fill(folder)
        first.leave()
        assert segments_left(folder) == [spec.name for spec in RINGS]
        assert folder.control.exists()
        assert folder.is_locked()
        second.leave()
        assert segments_left(folder) == []
        assert not folder.path.exists()
        with holding("alone") as third:
            assert third.held


def test_leaving_without_having_joined_changes_nothing(folder: RunFolder) -> None:
    fill(folder)
    folder.leave()
    assert folder.control.exists()


def test_a_lock_whose_file_was_removed_is_taken_anew(folder: RunFolder) -> None:
    """A run that ended just now removed the file that another has opened already."""
    folder.lock()
    (folder.path / "lock").unlink()
    with holding("alone") as holder:
        assert holder.held
        assert (folder.path / "lock").exists()
    folder.release()
