"""The commands that look on: `monitor`, `trace` and `metrics`. Each comes and goes as it likes."""

from pathlib import Path

import click

from pipeline.cli import options
from pipeline.client import Client


@click.command()
@options.name
@click.option("--once", is_flag=True, help="Print one view and leave.")
@click.option("-n", "count", type=click.IntRange(1), metavar="N", help="Print N views, one an interval, and leave.")
@click.option("--interval", type=click.FloatRange(0.1, 3_600), default=1.0, show_default=True, help="In seconds.")
@options.remote
@options.json
def monitor(name: str, remote: str | None, once: bool, count: int | None, interval: float, as_json: bool) -> int:
    """Watch every stage live. It comes and goes as it likes; with --json it prints a line of JSON an interval."""
    from pipeline.monitor import command  # the terminal's library takes a while

    return command.run(Client(name, remote=remote), views=1 if once else count, interval_s=interval, as_json=as_json)


@click.command()
@options.name
@click.option("-o", "path", type=click.Path(path_type=Path), required=True, metavar="FILE", help="To write.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="N", help="Only the last N seconds.")
@click.option("--next", "following", is_flag=True, help="The next N seconds, not the last.")
@options.remote
def trace(name: str, remote: str | None, path: Path, seconds: float | None, following: bool) -> int:
    """Save what happened in the last minutes as a trace that ui.perfetto.dev opens."""
    from pipeline import trace as traces

    return traces.command(Client(name, remote=remote), path, seconds=seconds, following=following)


@click.command()
@options.name
@click.option("--address", default="127.0.0.1", show_default=True, help="To listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=9_664, show_default=True, help="0 takes a free one.")
def metrics(name: str, address: str, port: int) -> int:
    """Serve the run's figures to Prometheus, until Ctrl-C."""
    from pipeline import metrics as figures

    return figures.command(name, address=address, port=port)
