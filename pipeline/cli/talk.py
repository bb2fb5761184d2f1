"""The commands that make a run: `up`, in real time, and `run`, from file to file."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import click

from pipeline import config as settings
from pipeline import offline, packages
from pipeline.cli import options
from pipeline.client import Client
from pipeline.config import Config
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import LogLevel, TextRecord
from pipeline.runtime import RunFolder
from pipeline.supervisor import Supervisor

_READY_S: Final = 600.0
_LEVEL_STYLE: Final[dict[LogLevel, str]] = {"info": "dim", "warning": "yellow", "error": "red"}


@click.command()
@options.name
@options.settings
@click.option("--detach", is_flag=True, help="Leave it running in the background.")
def up(
    name: str,
    config: Path | None,
    engine: str | None,
    quality: str | None,
    model: str | None,
    input_: str | None,
    output: str | None,
    seconds: float | None,
    detach: bool,
) -> int:
    """Start everything, and talk. Ctrl-C ends it; a file as input ends it when it is answered."""
    given = {
        "engine": engine,
        "quality": quality,
        "model": model,
        "capture.input": input_,
        "playback.output": output,
        "seconds": seconds,
    }
    chosen = settings.load(config, {key: value for key, value in given.items() if value is not None})
    _check_model(chosen)
    if detach:
        return _detach(name)
    supervisor = Supervisor(chosen, RunFolder(name), on_text=_on_text, on_log=_on_log)
    code = supervisor.run()
    if supervisor.final is not None and supervisor.final.accounting.sent:
        from pipeline import report

        options.out().print()
        options.out().print(report.summary(supervisor.final))
    return code


@click.command()
@options.name
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--seed", type=int, metavar="N", help=f"Another one, another answer.  [default: {offline.SEED}]")
@click.option("--transcript", type=click.Path(path_type=Path), help="A file for the words; by default standard output.")
@options.checkpoint
@options.json
def run(
    name: str,
    source: Path,
    target: Path,
    seed: int | None,
    transcript: Path | None,
    config: Path | None,
    engine: str | None,
    quality: str | None,
    model: str | None,
    as_json: bool,
) -> int:
    """Answer the sound file IN with the sound file OUT, as fast as it goes, the same each time.

    OUT is as long as IN, in whole frames of 80 ms, and an OUT that is there is overwritten. The words of the answer,
    each with its time in OUT in seconds, are printed as they come.
    """
    given = {"engine": engine, "quality": quality, "model": model, "sampler.seed": seed}
    fixed = {
        "offline": True,
        "capture.input": f"file:{source}",
        "playback.output": f"file:{target}",
        "seconds": None,
    }
    chosen = settings.load(config, fixed | {key: value for key, value in given.items() if value is not None})
    if chosen.sampler.seed is None:
        chosen.sampler.seed = offline.SEED
    _check_model(chosen)
    if transcript is not None and any(settings.same_file(transcript, other) for other in (source, target)):
        raise ConfigError(f"transcript {transcript}: expected another file than IN and OUT")
    words = offline.Transcript(transcript, to_stdout=not as_json)
    code, result = offline.Run(chosen, RunFolder(name), words, options.err()).run()
    if result is not None and result.complete:
        from pipeline import report

        options.err().print(report.accounting_line(result.accounting))
        options.err().print(result.line())
    if result is not None and as_json:
        options.print_json(result)
    return code


def _check_model(chosen: Config) -> None:
    """Before anything is started. Raises PipelineError."""
    if chosen.engine == "moshi":
        from pipeline import checkpoints

        packages.need_moshi_mlx()
        checkpoints.find(chosen.model, chosen.quality)


def _on_text(record: TextRecord) -> None:
    sys.stdout.write(record.text)
    sys.stdout.flush()


def _on_log(stage: str, level: LogLevel, message: str) -> None:
    prefix = "pipeline" if stage == "supervisor" else stage
    options.err().print(f"{prefix}: {message}", style=_LEVEL_STYLE[level])


def _detach(name: str) -> int:
    """Start this very command again, in the background, and come back when it runs."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    import tempfile

    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        client = Client(name)
        until = time.monotonic() + _READY_S
        try:
            while process.poll() is None and time.monotonic() < until:
                with contextlib.suppress(ControlError):
                    found = client.status()
                    if found.pid == process.pid and found.state == "running":
                        click.echo(f"{name} is up; `pipeline down --name {name}` ends it")
                        return 0
                time.sleep(0.05)
        except KeyboardInterrupt:
            process.terminate()
            raise
        if process.poll() is None:
            process.terminate()
            raise ControlError(f"{name} was not running after {_READY_S:g} s")
        said.seek(0)
        sys.stderr.write(said.read().decode())
        return process.returncode
