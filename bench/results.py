"""What a benchmark found: tables, targets, plots and the raw figures, as JSON and as Markdown."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import msgspec
import psutil

from pipeline import apple, packages

ROOT: Final = Path(__file__).parent.parent
_PACKAGES: Final = ("moshi-pipeline", "numpy", "msgspec", "pyzmq", "pymembar", "posix_ipc", "mlx", "moshi_mlx")


class Target(msgspec.Struct, forbid_unknown_fields=True):
    """What was to be reached, and whether it was."""

    what: str
    limit: str
    measured: str
    met: bool
    why: str = ""
    """Where it was missed: the reason, and what was tried."""


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A table. Cells are text, with their units in the columns' names."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Plot(msgspec.Struct, forbid_unknown_fields=True):
    """A plot: series of points (x, y); x is a word where `kind` is "bars". `log`: the y axis."""

    name: str
    """Of its file, docs/img/bench-NAME.svg."""
    title: str
    x: str
    y: str
    kind: Literal["lines", "bars"]
    log: bool
    series: dict[str, list[tuple[float | str, float]]]


class Section(msgspec.Struct, forbid_unknown_fields=True):
    """One benchmark's results."""

    name: str
    title: str
    command: str
    text: str
    """Markdown: what is measured, what stands in for what, what is not comparable."""
    seconds: float
    """That it took."""
    tables: list[Table]
    targets: list[Target]
    plots: list[Plot]
    figures: dict[str, Any]
    """Raw numbers, with every repeat."""


def write(found: msgspec.Struct, path: Path) -> None:
    """A section, or what holds several, as JSON, one figure a line."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def read(path: Path) -> Section:
    """What `write` wrote. Raises msgspec.ValidationError."""
    return msgspec.json.decode(path.read_bytes(), type=Section)


def figure(value: float) -> str:
    """Three digits that count, and no exponent."""
    if not value:
        return "0"
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if abs(value) >= 100 else text if "e" not in text else f"{value:.6f}"


def spread(values: Sequence[float]) -> str:
    """median (min to max), of at least one value."""
    if len(values) == 1:
        return figure(values[0])
    return f"{figure(median(values))} ({figure(min(values))} to {figure(max(values))})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, in which a line is a row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


def markdown(section: Section, images: str | None = None) -> str:
    """The section as Markdown; its plots too where the folder of their files, seen from the page, is given."""
    parts = [f"## {section.title}", section.text, f"`{section.command}`, {section.seconds:.0f} s."]
    if section.targets:
        rows = [[t.what, t.limit, t.measured, "met" if t.met else "**missed**", t.why] for t in section.targets]
        parts.append(markdown_table(["target", "limit", "measured", "", "why"], rows))
    for table in section.tables:
        parts += [f"### {table.title}", markdown_table(table.columns, table.rows)]
        parts += [table.note] if table.note else []
    if images is not None:
        parts += [f"![{plot.title}]({images}/bench-{plot.name}.svg)" for plot in section.plots]
    return "\n\n".join(parts) + "\n"


def finish(section: Section, path: Path | None) -> None:
    """What a benchmark ends with: print the section, and write it where a file is given."""
    print(markdown(section))
    if path:
        write(section, path)


def machine() -> dict[str, str]:
    """Where and when this is measured, and with what."""
    found = {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load average at the start": "{:.2f} (1 min), {:.2f} (5 min), {:.2f} (15 min)".format(*os.getloadavg()),
        "real-time scheduling": real_time(),
    }
    return found | {name: version for name in _PACKAGES if (version := packages.version(name))}


def real_time() -> str:
    """Whether programs of this user get real-time scheduling: "permitted" or "not permitted"."""
    # In a process of its own: to ask is to be promoted.
    code = "import sys; from pipeline.timing import promote_thread; sys.exit(not promote_thread())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    return "not permitted" if done.returncode else "permitted"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        return names[0] if names else platform.machine()
    return apple.sysctl("machdep.cpu.brand_string") or platform.machine()


def _commit() -> str:
    """The commit, and whether files were changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
