"""Whether the model answers within a frame's 80 ms: foretold from the memory's bandwidth, or measured on this machine.

A step reads every weight once, so that it takes at least

    floor = bytes of weights read / bandwidth of the memory

whatever the processor. What a step takes beyond its floor is the rest of the computation, and waiting.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec
import psutil
from msgspec import Struct
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pipeline import __version__, checkpoints, chips
from pipeline.chips import Bandwidth
from pipeline.errors import PipelineError
from pipeline.headers import Table, read_header
from pipeline.layout import OFFICIAL, ModelConfig, model_table
from pipeline.messages import Spread
from pipeline.topology import FRAME_MS

SCHEMA: Final = 1
"""Version of Report."""

DEFAULT_FRAMES: Final = 250
MOST_FRAMES: Final = 100_000

MOST_FLOOR_MS: Final = 0.65 * FRAME_MS
"""What a step's floor may be if the model is to fit: 52 ms. A user of upstream's measured 50 ms for q4 on a chip whose
floor is 46 ms, 1.09 times the floor. A floor of 52 ms is then a step of 57 ms, and leaves 23 ms of a frame for the
codec, the host's work and a step that is slower than the others."""

_EMBEDDING: Final = re.compile(r"(text_emb|audio_embs\.\d+|depformer\.slices\.\d+\.emb)\.(weight|scales|biases)")
_PACKAGES: Final = ("mlx", "moshi_mlx", "rustymimi", "numpy")
_GIT_S: Final = 10


class BudgetError(PipelineError):
    """The measurement did not come to its end."""


# Foretold


def step_bytes(table: Table) -> int:
    """Bytes of weights that a step reads: all of the model's, but of embedding tables, of which it reads a row each."""
    return sum(tensor.nbytes for name, tensor in table.items() if not _EMBEDDING.fullmatch(name))


def official_step_bytes(quality: str) -> int:
    """The same of Moshi 7B, without its file."""
    return step_bytes(model_table(msgspec.convert(dict(OFFICIAL), ModelConfig), quality))


def floor_ms(nbytes: int, gb_s: float) -> float:
    """The least time, in ms, in which memory of `gb_s` GB/s (1 GB is 1e9 bytes) delivers so many bytes."""
    return nbytes / gb_s / 1e6


def can_fit(floor_ms: float) -> bool:
    """Whether a model with such a floor can be expected to answer within a frame."""
    return floor_ms <= MOST_FLOOR_MS


# Measured


class Measured(Struct, kw_only=True):
    """What the program procs.measure tells: times in ms, memory in MB of 1e6 bytes."""

    device: str
    """`gpu` or `cpu`: what MLX computes on."""
    codec: str
    """`mlx`, on the same device, or `rust`, on the CPU: what encodes and decodes."""
    load_ms: float
    """From files to weights in memory."""
    warm_up_ms: float
    """Steps until the next is as fast as any."""
    first_frame_ms: float
    encode: Spread
    step: Spread
    decode: Spread
    sum: Spread
    """Of each frame's three parts."""
    peak_mb: float
    """The most that the process had in memory."""
    mlx_peak_mb: float
    """The most that MLX held; on a GPU with memory of its own, this is what has to fit there."""
    bandwidth_gb_s: float
    """The best of several passes over an array that no cache holds, of bytes read and written, by MLX on its device."""


class Machine(Struct, kw_only=True):
    """Where it was measured. Nothing in it tells whose machine it is."""

    chip: str
    published_gb_s: list[float]
    """What the chip's maker publishes; two values where models of one name differ; none where it is not known."""
    cores: int
    memory_gb: float
    os: str
    python: str
    packages: dict[str, str]


class Model(Struct, kw_only=True):
    """What was measured."""

    name: str
    quality: str
    dim: int
    layers: int
    step_bytes: int
    """Of weights that a step reads."""


class Report(Struct, kw_only=True):
    """One row for publication."""

    schema: int = SCHEMA
    date: str
    """The day, UTC."""
    version: str
    commit: str | None
    """Of the checkout, with `+` if it was changed since; None where the package was installed without one."""
    machine: Machine
    model: Model
    measured: Measured
    floor_ms: float
    """From the measured bandwidth."""
    share: float
    """Of the bandwidth, what a step reached: floor / median."""
    budget_ms: float = FRAME_MS
    fits: bool
    """Whether encode, step and decode together take no more than the budget in 95 of 100 frames."""


def bench(model: str | None, quality: str, frames: int, on_progress: Callable[[str], None]) -> Report:
    """Run so many frames of speech through a checkpoint, as fast as it goes, in another process.

    `on_progress` is called with a line now and then. Raises CheckpointError and BudgetError.
    """
    checkpoint = checkpoints.find(model, quality)
    config = checkpoint.config
    described = Model(
        name=_name(model, quality),
        quality=quality,
        dim=config["dim"],
        layers=config["num_layers"],
        step_bytes=step_bytes(read_header(checkpoint.model_file)),
    )
    arguments = ["--quality", quality, "--frames", str(frames), *(["--model", model] if model else [])]
    return assemble(described, _measure(arguments, on_progress))


def assemble(model: Model, measured: Measured) -> Report:
    """The report of a measurement that was made here and now."""
    floor = floor_ms(model.step_bytes, measured.bandwidth_gb_s)
    return Report(
        date=datetime.now(UTC).date().isoformat(),
        version=__version__,
        commit=_commit(),
        machine=_machine(measured.device),
        model=model,
        measured=measured,
        floor_ms=floor,
        share=floor / measured.step.p50_ms,
        fits=measured.sum.p95_ms <= FRAME_MS,
    )


def _name(model: str | None, quality: str) -> str:
    """A repository's name, or of a folder's path the last part: the others are nobody's business."""
    if checkpoints.is_folder(model):
        return Path(str(model)).expanduser().resolve().name
    return checkpoints.repository(model, quality)


def _measure(arguments: list[str], on_progress: Callable[[str], None]) -> Measured:
    command = [sys.executable, "-P", "-m", "procs.measure", *arguments]
    line = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for said in process.stderr or ():
                line = said.strip() or line
                on_progress(line)
            found = process.stdout.read() if process.stdout else ""
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise BudgetError(f"the measurement was ended by signal {-process.returncode}: is there enough memory?")
    if process.returncode:
        raise BudgetError(line or f"the measurement ended with exit code {process.returncode}")
    return msgspec.json.decode(found, type=Measured)


def _machine(device: str) -> Machine:
    chip = (chips.nvidia() if device == "gpu" else None) or chips.processor()
    return Machine(
        chip=chip,
        published_gb_s=sorted(set(chips.bandwidth(chip) or ())),
        cores=os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        os=platform.platform(),
        python=platform.python_version(),
        packages={package: metadata.version(package) for package in _PACKAGES},
    )


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit or None


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


# Shown


def view(report: Report) -> RenderableType:
    """A report for people."""
    measured, machine, model = report.measured, report.machine, report.model
    head = (
        f"{model.name}, {model.quality}, on {machine.chip} ({measured.device}), "
        f"{machine.memory_gb:g} GB, {machine.os}, codec {measured.codec}\n"
        f"load {measured.load_ms:.0f} ms, warm-up {measured.warm_up_ms:.0f} ms, "
        f"first frame {measured.first_frame_ms:.1f} ms; "
        f"memory at most {measured.peak_mb:.0f} MB, of MLX {measured.mlx_peak_mb:.0f} MB"
    )
    return Group(Text(head), _table(measured), Text(_verdict(report)))


def _table(measured: Measured) -> RichTable:
    table = RichTable(title="ms a frame", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "frames", "p50", "p95", "p99", "max"):
        table.add_column(column, justify="left" if not column else "right")
    parts = {"encode": measured.encode, "step": measured.step, "decode": measured.decode, "sum": measured.sum}
    for name, spread in parts.items():
        figures = (spread.p50_ms, spread.p95_ms, spread.p99_ms, spread.max_ms)
        table.add_row(name, str(spread.frames), *(f"{figure:.1f}" for figure in figures))
    return table


def _verdict(report: Report) -> str:
    measured = report.measured
    published = f", published {Bandwidth(*_ends(report))}" if report.machine.published_gb_s else ""
    return (
        f"memory {measured.bandwidth_gb_s:.1f} GB/s{published}; a step reads {report.model.step_bytes / 1e9:.3g} GB: "
        f"{report.floor_ms:.1f} ms at least, {report.share:.0%} of the bandwidth reached\n"
        f"fits {report.budget_ms:.0f} ms: {'yes' if report.fits else 'no'} (p95 {measured.sum.p95_ms:.1f} ms)"
    )


def _ends(report: Report) -> tuple[float, float]:
    values = report.machine.published_gb_s
    return values[0], values[-1]
