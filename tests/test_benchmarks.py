"""What the benchmarks have in common, the page they make, and bench.ring in short: real processes, few messages."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from bench import hop, peers, results, ring, suite
from bench.results import ROOT, Plot, Section, Table, Target
from pipeline.topology import FRAME

A_SECTION = Section(
    name="a",
    title="A section",
    command="python -m bench.a",
    text="What is measured.",
    seconds=1.0,
    tables=[Table("Times", ["", "ms"], [["ours", "1"], ["a|b", "2"]], "A note.")],
    targets=[Target("fast", "at most 2", "1", True), Target("small", "at most 2", "3", False, "It is large.")],
    plots=[
        Plot("a-lines", "Lines", "s", "ms", "lines", True, {"ours": [(0.0, 1.0), (1.0, 2.0)]}),
        Plot("a-bars", "Bars", "", "ms", "bars", False, {"ours": [("x", 1.0), ("y", 2.0)], "theirs": [("y", 3.0)]}),
    ],
    figures={"ms": [1.0, 2.0]},
)
A_REPORT = suite.Report({"cpu": "one"}, 120.0, [A_SECTION], ["b"])


# What all have in common


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([2.0], "2"),
        ([3.0, 1.0, 2.0], "2 (1 to 3)"),
        ([0.12345, 12.345], "6.23 (0.123 to 12.3)"),
        ([1_234.5, 1_234_567.0], "618,000 (1,230 to 1,230,000)"),
        ([0.0, 0.00001], "0.000005 (0 to 0.000010)"),
    ],
)
def test_a_spread_is_the_median_and_both_ends(values: list[float], text: str) -> None:
    assert results.spread(values) == text


def test_a_section_is_read_as_it_was_written(tmp_path: Path) -> None:
    results.write(A_SECTION, tmp_path / "a.json")
    assert results.read(tmp_path / "a.json") == A_SECTION


def test_what_is_no_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(msgspec.to_builtins(A_SECTION) | {"more": 1}))
    with pytest.raises(msgspec.ValidationError, match="more"):
        results.read(tmp_path / "a.json")


def test_a_benchmark_ends_with_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.finish(A_SECTION, tmp_path / "a.json")
    said = capsys.readouterr().out
    assert "| small | at most 2 | 3 | **missed** | It is large. |" in said
    assert "| a\\|b | 2 |" in said
    assert "bench-a-lines.svg" not in said  # which is drawn for the page only
    assert results.read(tmp_path / "a.json") == A_SECTION


def test_the_machine_is_named() -> None:
    found = results.machine()
    assert {"cpu", "cores", "memory", "os", "python", "commit", "date", "numpy"} <= found.keys()
    assert all(found.values())
    assert found["real-time scheduling"] in {"permitted", "not permitted"}
    assert found["load average at the start"].count("min)") == 3


# The page


def test_the_page_has_targets_tables_and_plots(tmp_path: Path) -> None:
    suite.write(A_REPORT, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "2 minutes; 1 of 2 targets met." in page
    assert "- missed: small: at most 2, measured 3" in page
    assert "`bench.b` ended with an error" in page
    images = sorted(path.name for path in (tmp_path / "img").iterdir())
    assert images == ["bench-a-bars.svg", "bench-a-lines.svg"]
    assert all(f"(img/{image})" in page for image in images)
    assert msgspec.json.decode((tmp_path / "benchmarks.json").read_bytes(), type=suite.Report) == A_REPORT


def test_the_same_figures_make_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        suite.write(A_REPORT, tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_every_section_is_a_program_that_takes_its_option() -> None:
    for name, option in suite.SECTIONS.items():
        assert f'"{option}"' in (ROOT / "bench" / f"{name}.py").read_text()


def test_a_benchmark_that_fails_is_named_and_the_others_are_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "SECTIONS", {"absent": "--json", "missing": "--json"})
    assert suite.run(["absent", "missing"]).failed == ["absent", "missing"]
    said = capfd.readouterr().err
    assert "[2/2] missing (bench.missing)\n" in said
    assert "bench.missing failed: exit code 1" in said


def test_a_section_that_is_not_there_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.suite", "rings"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        "section 'rings': expected one of ring, frontend, step_peers, start, loading, telemetry\n"
    )


# The peers' environment


@pytest.fixture
def peers_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """In the place of .bench/, with this interpreter as the peers'."""
    monkeypatch.setattr(peers, "HOME", tmp_path)
    monkeypatch.setattr(peers, "_STAMP", tmp_path / "installed")
    monkeypatch.setattr(peers, "_PYTHON", Path(sys.executable))
    peers.python.cache_clear()
    yield tmp_path
    peers.python.cache_clear()


def test_an_environment_that_is_as_listed_is_taken_as_it_is(peers_home: Path) -> None:
    (peers_home / "installed").write_text(peers._wanted())
    assert peers.python() == Path(sys.executable)
    assert peers.version("numpy") is not None
    assert peers.version("no-such-package") is None
    assert peers.versions()["numpy"] == peers.version("numpy")


def test_what_cannot_be_installed_is_tried_once_in_a_run(monkeypatch: pytest.MonkeyPatch, peers_home: Path) -> None:
    tried = []

    def failed(command: list[str], what: str) -> bool:
        tried.append(command)
        return "iceoryx2" in what

    monkeypatch.setattr(peers, "_failed", failed)
    monkeypatch.setenv(peers.TRIED, str(peers_home / "tried"))
    for _ in range(2):  # two sections, each a program of its own
        peers.python()
        peers.python()
        peers.python.cache_clear()
    assert len(tried) == 1 + len(peers.requirements())
    monkeypatch.delenv(peers.TRIED)
    peers.python()
    assert len(tried) == 2 * (1 + len(peers.requirements()))


def test_what_cannot_be_installed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('much', 'more', sep='\\n'); sys.exit('ERROR: no such thing')"
    assert peers._failed([sys.executable, "-c", program], "x>=1 cannot be installed")
    assert capsys.readouterr().err == "x>=1 cannot be installed: ERROR: no such thing\n"


# A hop


@pytest.fixture
def own_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The transports that need no environment of their own, and nothing that they leave behind."""
    ours = {name: spec._replace(package=None) for name, spec in ring.TRANSPORTS.items() if name != "iceoryx2"}
    monkeypatch.setattr(ring, "TRANSPORTS", ours)
    before = leftovers()
    yield
    assert leftovers() == before


def leftovers() -> set[Path]:
    """Shared memory of rings and of transports, and their folders."""
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]  # noqa: S108
    return {path for folder in folders for pattern in ("pl-*-bench", "plhop*") for path in folder.glob(pattern)}


@pytest.mark.usefixtures("own_python")
@pytest.mark.parametrize("transport", ["ring", "promoted", "queue", "polled", "zmq"])
def test_every_message_comes_over(transport: str) -> None:
    with ring.hosts([transport]) as running:
        for samples, interval_s in ((FRAME, 0.002), (ring.BLOCK, 0.0)):
            task = {"samples": samples, "count": 50, "interval_s": interval_s, "before_s": 0.0}
            result = running[transport].carry_out(task)
            assert len(result["latency_us"]) == 50
            assert min(result["latency_us"]) > 0


@pytest.mark.usefixtures("own_python")
def test_a_transport_that_hangs_is_killed_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with ring.hosts(["ring"]) as running:
        monkeypatch.setattr(ring, "_PATIENCE_S", 1.0)
        program = running["ring"]._program
        os.killpg(program.pid, signal.SIGSTOP)
        with pytest.raises(ChildProcessError, match=r"ring gave no result within 1\.5 s"):
            running["ring"].carry_out({"samples": FRAME, "count": 5, "interval_s": 0.1, "before_s": 0.0})
    assert program.returncode == -signal.SIGTERM


@pytest.mark.usefixtures("own_python")
def test_a_transport_that_does_not_begin_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ring.TRANSPORTS, "pigeon", ring.Transport("pigeon"))
    with pytest.raises(ChildProcessError, match="pigeon"):
        ring.Host("pigeon").__enter__()


@pytest.mark.parametrize(("count", "percentile", "above"), [(300, 99, 3), (1_050, 99, 11), (1_050, 99.9, 2)])
def test_a_percentile_stands_on_the_messages_above_it(count: int, percentile: float, above: int) -> None:
    assert ring._above(count, percentile) == above
    values = list(range(count))
    assert sum(value > ring.pooled(values)[f"p{percentile:g}_us"] for value in values) == above


def test_a_target_is_of_all_messages_together() -> None:
    all_us = {"ring": [1.0] * 198 + [9.0] * 2, "queue": [10.0] * 200, "promoted": [1.0] * 200}
    halves = {name: [us[:100], us[100:]] for name, us in all_us.items()}
    found = {name: [ring.pooled(half) for half in both] for name, both in halves.items()}
    target, missing = ring.targets_of(ring.FRAMES, found, all_us)
    assert target.measured == "0.108 (0.1 to 0.9) times, of all repeats' 200 messages together"
    assert target.met
    assert (missing.measured, missing.met) == ("not installed", False)


@pytest.mark.skipif(not peers._STAMP.exists(), reason="the peers' environment was not made: make bench")
def test_every_message_comes_over_iceoryx2() -> None:
    before = leftovers()
    with ring.hosts(["iceoryx2"]) as running:
        result = running["iceoryx2"].carry_out({"samples": FRAME, "count": 200, "interval_s": 0, "before_s": 0.0})
        assert len(result["latency_us"]) == 200
    assert leftovers() == before


def test_a_message_that_is_missing_is_noticed() -> None:
    class Forgetful(hop.QueueReader):
        def receive(self, samples: int) -> hop.Samples:
            super().receive(samples)
            return super().receive(samples)

    with hop.queue_place(ROOT) as shared:
        hop.write(hop.QueueWriter(ROOT, shared), {"samples": 10, "count": 2, "interval_s": 0, "before_s": 0.0})
        with pytest.raises(AssertionError):
            hop.read(Forgetful(ROOT, shared), {"samples": 10, "count": 2})


@pytest.mark.usefixtures("own_python")
def test_all_is_measured_and_a_peer_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: ring.TRANSPORTS[name] for name in ("ring", "promoted", "queue")}
    monkeypatch.setattr(ring, "TRANSPORTS", two | {"iceoryx2": ring.Transport("iceoryx2", "iceoryx2")})
    monkeypatch.setattr(ring, "installed", lambda: {"ring": "", "promoted": "", "queue": "2", "iceoryx2": None})
    monkeypatch.setattr(ring, "_BURST", {FRAME: 50, ring.BLOCK: 50})
    section = ring.measure(seconds=0.2, messages=10, repeats=2)
    assert [table.title for table in section.tables[-2:]] == ["CPU, in % of a core", "Back to back"]
    assert len(section.tables) == len(ring.cases()) + 2
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    assert len(section.targets) == 2 * len(ring.cases())  # none of the promoted ring's
    against = [target for target in section.targets if "iceoryx2" in target.what]
    assert {(target.measured, target.met) for target in against} == {("not installed", False)}
    titles = [[row[0] for row in table.rows] for table in section.tables[: len(ring.cases())]]
    assert [len(found) for found in titles] == [3 if case.busy else 2 for case in ring.cases()]
    assert all(len(turns) == 2 for case in section.figures["paced"].values() for turns in case.values())
    assert msgspec.json.decode(msgspec.json.encode(section), type=Section) == section
