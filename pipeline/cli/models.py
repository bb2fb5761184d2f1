"""The commands about checkpoints: on this machine, to be fetched, or made up."""

from pathlib import Path

import click

from pipeline import checkpoints, inventory
from pipeline.cli import options


@click.group()
def models() -> None:
    """Checkpoints: on this machine, to be fetched, or made up."""


@models.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--quality", type=options.qualities, default="q4", show_default=True)
@click.option("--size", type=click.Choice(list(checkpoints.SIZES)), default="tiny", show_default=True)
@click.option("--seed", default=0, show_default=True)
def synth(folder: Path, quality: str, size: str, seed: int) -> int:
    """Write a checkpoint of random weights in the official layout: it talks noise, and needs no network."""
    checkpoints.synthesize(folder, quality, size, seed=seed)
    total = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {size}, {quality}, {total / 1e6:.1f} MB of random weights")
    return 0


@models.command()
@click.argument("model", required=False, metavar="[REPO|VOICE]")
@click.option("--quality", type=options.qualities, help="By default what REPO's name says.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit; runs use it from then on.")
def pull(model: str | None, quality: str | None, revision: str) -> int:
    """Download a checkpoint from the model hub; by default the official one of the quality.

    A download that was interrupted goes on where it ended. What is here already is checked, and fetched again if it is
    damaged.
    """
    from pipeline import download  # takes half a second

    chosen = quality or checkpoints.label_of(model or "") or checkpoints.DEFAULT_QUALITY
    plan = download.plan(checkpoints.repository(model, chosen), chosen, revision)
    options.err().print(f"{plan.record.repo}, {chosen}, {revision} at {plan.record.commit}:")
    for planned in plan.files:
        here = f"{download.size(planned.here_bytes)} here" if planned.here_bytes else "to fetch"
        options.err().print(f"  {planned.file.name:48} {download.size(planned.file.size):>9}  {here}")
    options.err().print(f"  to fetch: {download.size(plan.missing_bytes)} of {download.size(plan.total_bytes)}")
    click.echo(f"{download.fetch(plan)}: complete")
    return 0


@models.command()
@click.argument("model", required=False, metavar="[REPO|VOICE|DIR]")
@click.option("--quality", type=options.qualities, help="By default what is there.")
@options.json
def verify(model: str | None, quality: str | None, as_json: bool) -> int:
    """Compare a checkpoint's files with the hashes that the hub told, and with what its config asks for."""
    verdicts = inventory.verify(model, quality or checkpoints.quality_of(model))
    if as_json:
        options.print_json(verdicts)
    else:
        for verdict in verdicts:
            found = verdict.fault or f"by its {verdict.checked}"
            options.out().print(f"{verdict.state:8} {verdict.file:48} {found}")
    return 0 if all(verdict.state == "ok" for verdict in verdicts) else 1


@models.command(name="list")
@options.json
def list_(as_json: bool) -> int:
    """The official checkpoints and others that were pulled, and which of them are on this machine."""
    entries = inventory.entries()
    if as_json:
        options.print_json(entries)
        return 0
    for entry in entries:
        pinned = f"{entry.revision} at {entry.commit[:12]}  {entry.folder}"
        place = entry.problem or (pinned if entry.folder else f"not downloaded: `pipeline models pull {entry.repo}`")
        click.echo(f"{entry.quality:5} {entry.repo:28} {entry.bytes / 1e9:5.1f} GB  {place}")
    return 0
