"""All benchmarks that have a peer or a target, one after another, and the page they make.

    python -m bench.suite [--out docs] [SECTION ...]

Writes benchmarks.json, benchmarks.md and the plots, img/bench-*.svg, into the folder. With names of sections only those
are run, and a page of them is written only where --out says into which folder: the page in docs/ is of one run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bench import peers, results
from bench.results import ROOT, Plot, Section, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTIONS: Final = {
    "ring": "--json",
    "frontend": "--json",
    "step_peers": "--section",
    "start": "--json",
    "loading": "--json",
    "telemetry": "--section",
}
"""The benchmarks, and the option by which each writes a section to a file."""

_TITLES: Final = {
    "ring": "a hop between processes, against queues and other transports",
    "frontend": "our front end against upstream's, heard from outside",
    "step_peers": "the model's step, against upstream's",
    "start": "the start, memory, and a run at rest",
    "loading": "loading a checkpoint",
    "telemetry": "what telemetry costs",
}

PAGE: Final = "benchmarks.md"
_WIDTH_IN, _HEIGHT_IN = 9.0, 4.5
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """What is in benchmarks.json."""

    machine: dict[str, str]
    seconds: float
    sections: list[Section]
    failed: list[str]
    """Benchmarks that ended with an error."""


def run(names: Sequence[str]) -> Report:
    """Run these, each as a program of its own."""
    began_s = time.monotonic()
    report = Report(results.machine(), 0.0, [], [])
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {_TITLES.get(name, name)} (bench.{name})", file=sys.stderr, flush=True)
            section = _section(name, Path(folder))
            if section:
                report.sections.append(section)
            else:
                report.failed.append(name)
    report.machine |= {f"the peers' {name}": version for name, version in peers.versions().items()}
    report.seconds = time.monotonic() - began_s
    return report


def _section(name: str, folder: Path) -> Section | None:
    path = folder / f"{name}.json"
    # What one section could not install the next ones do not try again.
    environment = {**os.environ, peers.TRIED: str(folder / "tried")}
    command = [sys.executable, "-m", f"bench.{name}", SECTIONS[name], str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode or not path.exists():
        print(f"bench.{name} failed: exit code {done.returncode}", file=sys.stderr, flush=True)
        return None
    section = results.read(path)
    print(f"bench.{name} took {section.seconds:.0f} s: {_met([section])}", file=sys.stderr, flush=True)
    return section


def _met(sections: Sequence[Section]) -> str:
    targets = [target for section in sections for target in section.targets]
    return f"{sum(target.met for target in targets)} of {len(targets)} targets met"


# The page


def write(report: Report, folder: Path) -> None:
    """The page, what it was made of, and its plots."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    results.write(report, folder / "benchmarks.json")
    (folder / PAGE).write_text(page(report))
    for section in report.sections:
        for plot in section.plots:
            draw(plot, folder / "img" / f"bench-{plot.name}.svg")


def page(report: Report) -> str:
    """The page, as Markdown."""
    targets = [target for section in report.sections for target in section.targets]
    parts = [
        "# Measured side by side",
        "Made by `make bench`, which runs us and each peer on the same work, in one run, in turns. A figure with two "
        "in brackets is the median of the repeats, with the smallest and the largest, and ratios are taken within a "
        "repeat, where a section does not say otherwise. The same, with every repeat, is in "
        "[benchmarks.json](benchmarks.json).",
        results.markdown_table(["", ""], [[key, value] for key, value in report.machine.items()]),
        f"{report.seconds / 60:.0f} minutes; {_met(report.sections)}.",
        *_missed(targets),
        *(f"`bench.{name}` ended with an error, and is missing here." for name in report.failed),
        *(results.markdown(section, "img").rstrip() for section in report.sections),
    ]
    return "\n\n".join(parts) + "\n"


def _missed(targets: Sequence[Target]) -> list[str]:
    lines = [
        f"- missed: {target.what}: {target.limit}, measured {target.measured}" for target in targets if not target.met
    ]
    return ["\n".join(lines)] if lines else []


def draw(plot: Plot, path: Path) -> None:
    """One plot as SVG, the same bytes for the same figures."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        drawing = Figure((_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = drawing.add_subplot(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        (_bars if plot.kind == "bars" else _lines)(axes, plot)
        if plot.log:
            axes.set_yscale("log")
        if len(plot.series) > 1:
            drawing.legend(loc="outside lower center", ncols=3)
        drawing.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _lines(axes: "Axes", plot: Plot) -> None:
    for name, points in plot.series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)


def _bars(axes: "Axes", plot: Plot) -> None:
    """Side by side, a group for each word."""
    words = list(dict.fromkeys(str(x) for points in plot.series.values() for x, _ in points))
    width = 0.8 / len(plot.series)
    for number, (name, points) in enumerate(plot.series.items()):
        shift = (number - (len(plot.series) - 1) / 2) * width
        axes.bar([words.index(str(x)) + shift for x, _ in points], [y for _, y in points], width, label=name)
    axes.set_xticks(range(len(words)), ["\n".join(textwrap.wrap(word, 18)) for word in words])


def main() -> None:
    """Run them, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--out", type=Path, help="folder of the page; docs where all sections are run")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"section {unknown[0]!r}: expected one of {', '.join(SECTIONS)}")
    names = arguments.sections or list(SECTIONS)
    print(f"Benchmarks: {', '.join(names)}. Other programs disturb them: leave the machine alone.", file=sys.stderr)
    report = run(names)
    out = arguments.out or (None if arguments.sections else ROOT / "docs")
    if out:
        write(report, out)
    print(f"Done in {report.seconds / 60:.0f} minutes: {_met(report.sections)}.")
    if report.failed:
        print(f"Ended with an error: {', '.join(report.failed)}.")
    print(f"The page is {out / PAGE}" if out else "Of single sections no page is written: --out FOLDER writes one")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
