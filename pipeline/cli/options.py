"""What several commands share: their options, and where they print."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import msgspec

from pipeline import runtime
from pipeline.config import EngineName, Quality

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out() -> "Console":
    """Standard output. rich is loaded when there is something to print: stages are started sooner without."""
    return _console(stderr=False)


@functools.cache
def err() -> "Console":
    """Standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    # What users name, files and devices, may look like markup.
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _complete_name(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in runtime.names() if name.startswith(incomplete)]


name = click.option(
    "--name", default="default", show_default=True, shell_complete=_complete_name, help="The run's name."
)
remote = click.option("--remote", metavar="HOST:PORT", help="A run on another machine, that listens there.")
json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


qualities = click.Choice(get_args(Quality))


def print_json(data: Any) -> None:
    """Print `data` as JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(data)).decode())


def checkpoint(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of settings and model."""
    for option in reversed(
        [
            click.option("--config", type=click.Path(path_type=Path), help="Settings; by default run.toml, if there."),
            click.option("--engine", type=click.Choice(get_args(EngineName)), help="echo returns what it hears."),
            click.option("--quality", type=qualities, help="Of the checkpoint."),
            click.option("--model", metavar="DIR_OR_REPO", help="A checkpoint; by default the quality's official one."),
        ]
    ):
        command = option(command)
    return command


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with those of the devices."""
    for option in reversed(
        [
            click.option("--input", "input_", metavar="SPEC", help="device[:NAME], file:PATH, tone:HZ or silence."),
            click.option("--output", metavar="SPEC", help="device[:NAME], file:PATH or null."),
            click.option("--seconds", type=float, metavar="N", help="End after so long."),
        ]
    ):
        command = option(command)
    return checkpoint(command)
