"""The commands about this machine: its devices, what is wrong with it, how fast it is, what it withstands."""

import contextlib
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pipeline import budget, packages
from pipeline import config as settings
from pipeline import doctor as checks
from pipeline.cli import options


@click.command()
@options.json
def devices(as_json: bool) -> int:
    """Audio devices, by the names that --input and --output take."""
    found = checks.audio_devices()
    if as_json:
        options.print_json(found)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("index", "name", "in", "out", "rate", "system", "default"):
        table.add_column(column, justify="left" if column in {"name", "system", "default"} else "right")
    for device in found["devices"]:
        default = [word for word in ("input", "output") if device[f"default_{word}"]]
        table.add_row(
            str(device["index"]),
            Text(device["name"]),
            str(device["inputs"]),
            str(device["outputs"]),
            f"{device['rate']:.0f}",
            Text(device["api"]),
            ", ".join(default),
        )
    options.out().print(table if found["devices"] else "no audio devices")
    return 0


@click.command()
@options.name
@options.settings
@options.json
def doctor(name: str, as_json: bool, config: Path | None, **given: Any) -> int:
    """What is there, what is wrong, and what to do about it."""
    keys = {"input_": "capture.input", "output": "playback.output"}
    overrides = {keys.get(key, key): value for key, value in given.items() if value is not None}
    findings = checks.examine(settings.load(config, overrides), name)
    if as_json:
        options.print_json(findings)
    else:
        styles = {"ok": "green", "note": "yellow", "wrong": "red"}
        for finding in findings:
            options.out().print(f"{finding.state:5} ", style=styles[finding.state], end="")
            options.out().print(f"{finding.what}: {finding.found}{'. ' if finding.advice else ''}{finding.advice}")
    return 1 if any(finding.state == "wrong" for finding in findings) else 0


@click.command()
@click.option("--quality", type=options.qualities, help="Of the checkpoint.")
@click.option("--model", metavar="DIR_OR_REPO", help="A checkpoint; by default the quality's official one.")
@click.option(
    "--frames",
    type=click.IntRange(1, budget.MOST_FRAMES),
    default=budget.DEFAULT_FRAMES,
    show_default=True,
    help="Of speech, 80 ms each.",
)
@options.json
def bench(quality: str | None, model: str | None, frames: int, as_json: bool) -> int:
    """How fast the model is on this machine, and whether it answers within 80 ms. Leave the machine alone meanwhile."""
    given = {key: value for key, value in {"quality": quality, "model": model}.items() if value is not None}
    chosen = settings.load(None, given)
    packages.need_moshi_mlx()
    err = options.err()
    with err.status("starting", refresh_per_second=2) if err.is_terminal else contextlib.nullcontext() as progress:
        on_progress = (lambda line: progress.update(Text(line))) if progress else (lambda line: None)
        found = budget.bench(chosen.model, chosen.quality, frames, on_progress)
    if as_json:
        options.print_json(found)
    else:
        options.out().print(budget.view(found))
    return 0


@click.command()
@options.name
@click.option("--seed", default=0, show_default=True, help="Another one, other faults.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=60.0,
    show_default=True,
    help="How long new faults begin.",
)
@click.option(
    "--faults", default="stall,slow,kill", show_default=True, metavar="LIST", help="Kinds to draw from, see above."
)
@options.json
def chaos(name: str, seed: int, seconds: float, faults: str, as_json: bool) -> int:
    """Put faults into a run that is up, and see how long it takes to be normal again. It interrupts the conversation.

    LIST, separated by commas: stall[=STAGE][:SECONDS] stops a stage, slow[=STAGE][:SECONDS] leaves it two fifths of its
    time, kill[=STAGE] kills it, hang[=STAGE] makes it hang where the run's setting faults.hang permits it, and
    fill=FOLDER fills a small disk. What is not given is drawn.
    """
    from pipeline import chaos as faulty

    return faulty.command(name, seed=seed, seconds=seconds, faults=faults, as_json=as_json)
