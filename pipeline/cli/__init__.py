"""The command `pipeline`. A command's module is loaded when the command is given: the others take their time."""

import importlib
import io
import sys
from typing import Final

import click

from pipeline import __version__
from pipeline.cli import options
from pipeline.errors import EXIT_REFUSED, PipelineError

COMMANDS: Final = {
    "up": "talk",
    "run": "talk",
    "down": "control",
    "status": "control",
    "send": "control",
    "monitor": "watch",
    "trace": "watch",
    "metrics": "watch",
    "devices": "machine",
    "doctor": "machine",
    "bench": "machine",
    "chaos": "machine",
    "models": "models",
    "keys": "control",
    "completion": "control",
}
"""Each command's module in this package, where it is the function of its name."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pipeline.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pipeline")
def cli() -> None:
    """Real-time, full-duplex speech with Kyutai's Moshi on your own machine."""


def main() -> None:
    """Run the command; whatever the user did wrong becomes one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to end a conversation
    try:
        code = cli.main(prog_name="pipeline", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        options.err().print(error.format_message())
        sys.exit(EXIT_REFUSED)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        _complain(f"{' '.join(error.format_message().split())} See `{command} --help`.")
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.Abort:
        sys.exit(130)
    except PipelineError as error:
        _complain(str(error))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _complain(line: str) -> None:
    options.err().print(f"pipeline: {line}", style="red")
    sys.exit(EXIT_REFUSED)
