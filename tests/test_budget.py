"""pipeline.budget: bytes and floors against the official figures, made-up measurements, and the doctor's line."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from rich.console import Console

from pipeline import budget, chips, doctor
from pipeline.budget import BudgetError, Measured, Model, Report
from pipeline.checkpoints import find, synthesize
from pipeline.chips import Bandwidth
from pipeline.config import Config
from pipeline.errors import CheckpointError
from pipeline.headers import Tensor, read_header
from pipeline.messages import Spread

GB: Final = 1e9


def spread(p50_ms: float, p95_ms: float = 0.0) -> Spread:
    return Spread(frames=100, p50_ms=p50_ms, p95_ms=p95_ms or p50_ms, p99_ms=p95_ms or p50_ms, max_ms=99.0)


def measured(**changed: Any) -> Measured:
    """A measurement of q4 on a chip of 100 GB/s, as a user of upstream's reported it."""
    values: dict[str, Any] = {
        "device": "gpu",
        "codec": "rust",
        "load_ms": 900.0,
        "warm_up_ms": 700.0,
        "first_frame_ms": 61.0,
        "encode": spread(6.0),
        "step": spread(50.0),
        "decode": spread(6.5),
        "sum": spread(62.5, 66.0),
        "peak_mb": 700.0,
        "mlx_peak_mb": 5_300.0,
        "bandwidth_gb_s": 92.2,
    }
    return Measured(**values | changed)


MODEL: Final = Model(name="kyutai/moshiko-mlx-q4", quality="q4", dim=4096, layers=32, step_bytes=4_609_875_968)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base M3."""
    monkeypatch.setattr(chips, "nvidia", lambda: None)
    monkeypatch.setattr(chips, "processor", lambda: "Apple M3")


def shown(report: Report) -> str:
    text = io.StringIO()
    Console(file=text, width=150, markup=False).print(budget.view(report))
    return text.getvalue()


# Bytes and floors


@pytest.mark.parametrize(("quality", "gb"), [("q4", 4.61), ("q8", 7.84), ("bf16", 14.75)])
def test_a_step_of_moshi_reads_what_was_counted_by_hand(quality: str, gb: float) -> None:
    assert budget.official_step_bytes(quality) == pytest.approx(gb * GB, rel=0.001)


def test_of_embedding_tables_a_step_reads_a_row() -> None:
    table = {
        "text_emb.weight": Tensor("U32", (1_000, 32)),
        "text_emb.scales": Tensor("BF16", (1_000, 8)),
        "audio_embs.15.biases": Tensor("BF16", (1_000, 8)),
        "depformer.slices.7.emb.weight": Tensor("BF16", (1_000, 8)),
        "text_linear.weight": Tensor("U32", (10, 10)),
        "depformer.slices.7.linear_in.scales": Tensor("BF16", (10, 10)),
        "out_norm.weight": Tensor("BF16", (10,)),
    }
    assert budget.step_bytes(table) == 400 + 200 + 20


@pytest.mark.parametrize(
    ("quality", "gb_s", "ms"),
    [("q4", 100, 46), ("q8", 100, 78), ("bf16", 100, 148), ("q4", 273, 17), ("q8", 400, 20), ("bf16", 400, 37)],
)
def test_floors_are_those_that_are_published(quality: str, gb_s: float, ms: float) -> None:
    assert budget.floor_ms(budget.official_step_bytes(quality), gb_s) == pytest.approx(ms, abs=0.6)


# Reports


@pytest.mark.usefixtures("mac")
def test_a_report_says_how_near_the_floor_a_step_is() -> None:
    report = budget.assemble(MODEL, measured())
    assert report.floor_ms == pytest.approx(50.0, abs=0.05)
    assert report.share == pytest.approx(1.0, abs=0.001)
    assert report.fits
    assert (report.machine.chip, report.machine.published_gb_s) == ("Apple M3", [100.0])
    assert report.machine.packages["mlx"]
    text = shown(report)
    assert "fits 80 ms: yes (p95 66.0 ms)" in text
    assert "published 100 GB/s" in text
    assert "a step reads 4.61 GB: 50.0 ms at least, 100% of the bandwidth reached" in text


@pytest.mark.parametrize(("p95_ms", "fits"), [(80.0, True), (80.1, False)])
@pytest.mark.usefixtures("mac")
def test_95_of_100_frames_decide(p95_ms: float, fits: bool) -> None:
    report = budget.assemble(MODEL, measured(sum=spread(60.0, p95_ms)))
    assert report.fits is fits
    assert f"fits 80 ms: {'yes' if fits else 'no'}" in shown(report)


def test_of_an_unknown_chip_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "processor", lambda: "Slow CPU")
    report = budget.assemble(MODEL, measured(device="cpu"))
    assert (report.machine.chip, report.machine.published_gb_s) == ("Slow CPU", [])
    assert "published" not in shown(report)


def test_a_gpu_is_named_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "nvidia", lambda: "NVIDIA H200")
    assert budget.assemble(MODEL, measured()).machine.chip == "NVIDIA H200"
    assert budget.assemble(MODEL, measured(device="cpu")).machine.chip != "NVIDIA H200"


@pytest.mark.usefixtures("mac")
def test_a_report_comes_through_json_and_tells_nothing_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    report = budget.assemble(MODEL, measured())
    encoded = msgspec.json.encode(report)
    assert msgspec.json.decode(encoded, type=Report) == report
    assert str(Path.home()).encode() not in encoded
    assert str(Path(budget.__file__).parents[1]).encode() not in encoded


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"rev-parse": "0123456789ab\n"}, "0123456789ab"),
        ({"rev-parse": "0123456789ab\n", "status": " M README.md\n"}, "0123456789ab+"),
        ({}, None),  # a repository without a commit, or no git
    ],
)
def test_the_commit_and_whether_it_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: dict[str, str], expected: str | None
) -> None:
    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 0, answers.get(command[3], ""), "")

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(budget, "__file__", str(tmp_path / "pipeline" / "budget.py"))
    monkeypatch.setattr(subprocess, "run", run)
    assert budget._commit() == expected


def test_without_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget, "__file__", str(tmp_path / "pipeline" / "budget.py"))
    assert budget._commit() is None


# The other process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("models") / "a model", "q4", "tiny").folder


def played_by(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """A line of Python takes the part of the program that measures."""
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> "subprocess.Popen[str]":
        if command[1:4] == ["-P", "-m", "procs.measure"]:
            command = [sys.executable, "-c", program]
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def test_what_the_program_prints_becomes_the_report(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    said = msgspec.json.encode(measured()).decode()
    played_by(monkeypatch, f"import sys; print('one\\n\\ntwo', file=sys.stderr); print({said!r})")
    lines: list[str] = []
    report = budget.bench(str(checkpoint), "q4", 5, lines.append)
    assert lines == ["one", "one", "two"]
    assert report.measured == measured()
    assert (report.model.name, report.model.quality, report.model.dim, report.model.layers) == ("a model", "q4", 256, 2)
    assert report.model.step_bytes == budget.step_bytes(read_header(find(str(checkpoint)).model_file))


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import sys; sys.exit('the file does not load')", "the file does not load"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import sys; sys.exit(3)", "the measurement ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "the measurement was ended by signal 9: is there enough memory?"),
    ],
)
def test_a_measurement_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, program: str, line: str
) -> None:
    played_by(monkeypatch, program)
    with pytest.raises(BudgetError) as caught:
        budget.bench(str(checkpoint), "q4", 5, lambda line: None)
    assert str(caught.value) == line


def test_nothing_is_started_for_a_bad_checkpoint(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(CheckpointError, match="--quality q4"):
        budget.bench(str(checkpoint), "q8", 5, lambda line: None)


def test_an_interrupted_measurement_leaves_no_process(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    played_by(monkeypatch, "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(600)")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the process is waited for: this ends only if it was ended
        budget.bench(str(checkpoint), "q4", 5, interrupt)


# What the doctor foretells


@pytest.mark.parametrize(
    ("chip", "fitting"),
    [
        ("Apple M1", "none"),
        ("Apple M2", "q4"),
        ("Apple M3", "q4"),
        ("Apple M3 Pro", "q4"),
        ("Apple M4", "q4"),
        ("Apple M5", "q4, q8"),
        ("Apple M1 Pro", "q4, q8"),
        ("Apple M4 Pro", "q4, q8"),
        ("Apple M3 Max", "q4, q8, bf16"),
        ("Apple M2 Ultra", "q4, q8, bf16"),
    ],
)
def test_the_doctor_says_which_quality_can_fit(monkeypatch: pytest.MonkeyPatch, chip: str, fitting: str) -> None:
    monkeypatch.setattr(chips, "nvidia", lambda: None)
    monkeypatch.setattr(chips, "processor", lambda: chip)
    for quality in ("q4", "q8", "bf16"):
        found = doctor._speed(Config(quality=quality), "default")
        assert found.what == "speed"
        assert found.found.startswith(f"{chip}, {chips.bandwidth(chip)}: ")
        assert found.found.endswith(f"can fit 80 ms: {fitting}")
        if quality in fitting.split(", "):
            assert (found.state, found.advice) == ("ok", "")
        elif fitting == "none":
            assert (found.state, "pipeline bench" in found.advice) == ("note", True)
        else:
            assert (found.state, found.advice) == ("note", f"Choose --quality {fitting.split(', ')[-1]}")


@pytest.mark.usefixtures("mac")
def test_the_doctor_tells_the_floors() -> None:
    found = doctor._speed(Config(), "default").found
    assert "the weights of a step take q4 46 ms, q8 78 ms, bf16 147 ms; up to 52 ms can fit" in found


def test_of_an_unknown_chip_the_doctor_advises_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "nvidia", lambda: None)
    monkeypatch.setattr(chips, "processor", lambda: "Apple M99")
    found = doctor._speed(Config(), "default")
    assert (found.state, found.found) == ("note", "Apple M99: memory bandwidth unknown")
    assert "pipeline bench" in found.advice


@pytest.mark.usefixtures("mac")
def test_the_doctor_looks_into_a_checkpoint_that_is_here(checkpoint: Path) -> None:
    found = doctor._speed(Config(model=str(checkpoint)), "default")
    assert (found.state, found.found.endswith(": q4")) == ("ok", True)
    assert "q8" not in found.found


@pytest.mark.usefixtures("mac")
def test_the_doctor_has_nothing_to_say_of_echo() -> None:
    assert doctor._speed(Config(engine="echo"), "default").state == "ok"


@pytest.mark.parametrize(("device", "chip"), [("Device(gpu, 0)", "NVIDIA H200"), ("Device(cpu, 0)", "Slow CPU")])
def test_a_gpu_counts_where_the_model_uses_it(monkeypatch: pytest.MonkeyPatch, device: str, chip: str) -> None:
    monkeypatch.setattr(chips, "nvidia", lambda: "NVIDIA H200")
    monkeypatch.setattr(chips, "processor", lambda: "Slow CPU")
    done = subprocess.CompletedProcess(["python"], 0, device, "")
    monkeypatch.setattr(doctor, "_python_says", lambda code: done)
    assert doctor._speed(Config(), "default").found.startswith(chip)


def test_a_floor_at_the_bound_fits() -> None:
    assert budget.can_fit(budget.MOST_FLOOR_MS)
    assert not budget.can_fit(budget.MOST_FLOOR_MS + 0.01)
    assert budget.can_fit(budget.floor_ms(round(0.052 * 100 * GB), Bandwidth(100, 100).least))
