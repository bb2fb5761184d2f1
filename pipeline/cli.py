"""The command `pipeline`."""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.shell_completion import CompletionItem, get_completion_class
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import (
    __version__,
    budget,
    checkpoints,
    doctor,
    inventory,
    messages,
    offline,
    packages,
    report,
    runtime,
    verbs,
)
from pipeline import config as settings
from pipeline.client import Client
from pipeline.errors import ConfigError, ControlError, PipelineError
from pipeline.messages import LogLevel, TextRecord
from pipeline.runtime import RunFolder
from pipeline.supervisor import EXIT_REFUSED, Supervisor, end_orphans

_READY_S: Final = 600.0
_LEVEL_STYLE: Final[dict[LogLevel, str]] = {"info": "dim", "warning": "yellow", "error": "red"}

# What users name, files and devices, may look like markup.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _complete_name(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in runtime.names() if name.startswith(incomplete)]


_name = click.option(
    "--name", default="default", show_default=True, shell_complete=_complete_name, help="The run's name."
)
_remote = click.option("--remote", metavar="HOST:PORT", help="A run on another machine, that listens there.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _print_json(data: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(data)).decode())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pipeline")
def cli() -> None:
    """Real-time, full-duplex speech with Kyutai's Moshi on your own machine."""


def _checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--config", type=click.Path(path_type=Path), help="Settings; by default run.toml, if there."),
            click.option("--engine", type=click.Choice(["moshi", "echo"]), help="echo returns what it hears."),
            click.option("--quality", type=click.Choice(list(checkpoints.QUALITIES)), help="Of the checkpoint."),
            click.option("--model", metavar="DIR_OR_REPO", help="A checkpoint; by default the quality's official one."),
        ]
    ):
        command = option(command)
    return command


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--input", "input_", metavar="SPEC", help="device[:NAME], file:PATH, tone:HZ or silence."),
            click.option("--output", metavar="SPEC", help="device[:NAME], file:PATH or null."),
            click.option("--seconds", type=float, metavar="N", help="End after so long."),
        ]
    ):
        command = option(command)
    return _checkpoint_options(command)


@cli.command()
@_name
@_settings_options
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
    if chosen.engine == "moshi":
        packages.need_moshi_mlx()
        checkpoints.find(chosen.model, chosen.quality)  # before anything is started
    if detach:
        return _detach(name)
    supervisor = Supervisor(chosen, RunFolder(name), on_text=_on_text, on_log=_on_log)
    code = supervisor.run()
    if supervisor.final is not None and supervisor.final.accounting.sent:
        out.print()
        out.print(report.summary(supervisor.final))
    return code


@cli.command()
@_name
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--seed", type=int, metavar="N", help=f"Another one, another answer.  [default: {offline.SEED}]")
@click.option("--transcript", type=click.Path(path_type=Path), help="A file for the words; by default standard output.")
@_checkpoint_options
@_json
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
    if chosen.engine == "moshi":
        packages.need_moshi_mlx()
        checkpoints.find(chosen.model, chosen.quality)  # before anything is started
    if transcript is not None and any(settings.same_file(transcript, other) for other in (source, target)):
        raise ConfigError(f"transcript {transcript}: expected another file than IN and OUT")
    words = offline.Transcript(transcript, to_stdout=not as_json)
    code, result = offline.Run(chosen, RunFolder(name), words, err).run()
    if result is not None and result.complete:
        err.print(report.accounting_line(result.accounting))
        err.print(result.line())
    if result is not None and as_json:
        _print_json(result)
    return code


def _on_text(record: TextRecord) -> None:
    sys.stdout.write(record.text)
    sys.stdout.flush()


def _on_log(stage: str, level: LogLevel, message: str) -> None:
    prefix = "pipeline" if stage == "supervisor" else stage
    err.print(f"{prefix}: {message}", style=_LEVEL_STYLE[level])


def _detach(name: str) -> int:
    """Start this very command again, in the background, and come back when it runs."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
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


@cli.command()
@_name
@_remote
@_json
def down(name: str, remote: str | None, as_json: bool) -> int:
    """End a run, or clear what a dead one left."""
    folder = RunFolder(name)
    if remote is None and not folder.is_locked():
        if not folder.path.exists():
            raise ControlError(f"no run is up under {name!r}, and none has left anything")
        folder.lock()
        end_orphans(folder)
        folder.release()
        if as_json:
            _print_json(None)
        else:
            click.echo(f"no run was up under {name!r}; what a dead one had left is cleared")
        return 0
    final = Client(name, remote=remote).send("shutdown").status
    if as_json:
        _print_json(final)
    elif final is not None:
        out.print(report.summary(final))
    until = time.monotonic() + 5
    while remote is None and folder.control.exists():
        if time.monotonic() > until:
            raise ControlError(f"the run {name!r} has stopped its stages, but does not end")
        time.sleep(0.01)
    return 0


@cli.command()
@_name
@_remote
@_json
def status(name: str, remote: str | None, as_json: bool) -> int:
    """State, accounting and timing now."""
    found = Client(name, remote=remote).status()
    if as_json:
        _print_json(found)
    else:
        out.print(report.status_view(found))
    return 0


class _SendCommand(click.Command):
    """Its help lists the verbs and their keys."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs, and the keys of each"):
            formatter.write_dl(list(verbs.explanations()), col_max=24)


def _complete_verb(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    kinds = {verb: kind for verb, kind in messages.VERBS.items() if verb.startswith(incomplete)}
    return [CompletionItem(verb, help=(kind.__doc__ or "").partition("\n")[0]) for verb, kind in kinds.items()]


def _complete_value(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    verb, words = context.params.get("verb"), context.params.get("values") or ()
    return [CompletionItem(value) for value in verbs.complete(verb, words, incomplete)] if verb else []


@cli.command(cls=_SendCommand)
@_name
@_remote
@_json
@click.argument("verb", type=click.Choice(list(messages.VERBS)), metavar="VERB", shell_complete=_complete_verb)
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_complete_value)
def send(name: str, remote: str | None, as_json: bool, verb: str, values: tuple[str, ...]) -> int:
    """Send a command to a run, and wait until it is carried out.

    A relative path is looked up in this folder; with --remote, where the run was started.
    """
    reply = Client(name, remote=remote).send(verb, verbs.parse(verb, values, here=remote is None))
    if as_json:
        _print_json(reply)
    elif reply.status is not None:
        out.print(report.status_view(reply.status))
    elif verb == "trace":
        click.echo(f"trace: {len(reply.records)} records; --json prints them")
    else:
        click.echo(verbs.outcome(reply))
    return 0


@cli.command()
@click.option("--client", metavar="NAME", help="Let another machine in: make the keys that it needs.")
@_json
def keys(client: str | None, as_json: bool) -> int:
    """The keys by which a second machine reaches runs on this one: made, if there are none, and listed.

    Runs listen where their setting remote.listen says. $PIPELINE_KEYS_DIR is another folder for keys.
    """
    from pipeline import keys as own

    if client is not None:
        carried = own.make_client(client)
        if as_json:
            _print_json({"client": client, "files": sorted(str(path) for path in carried.iterdir())})
        else:
            click.echo(f"{client} is let in. Copy both files in {carried} to its folder of keys (`pipeline keys` there")
            click.echo(
                "names it), remove them here, and try there: pipeline status --remote ADDRESS_OF_THIS_MACHINE:PORT"
            )
        return 0
    own.make_server()
    found = own.found()
    if as_json:
        _print_json(found)
        return 0
    click.echo(found.folder)
    click.echo(f"this machine        {found.server}")
    for name, public in found.clients.items():
        click.echo(f"let in: {name:11} {public}")
    if found.remote is not None:
        click.echo(f"a client of         {found.remote}")
    return 0


_SETUP: Final = {
    "bash": '~/.bashrc: eval "$(pipeline completion bash)"',
    "zsh": '~/.zshrc, after compinit: eval "$(pipeline completion zsh)"',
    "fish": "~/.config/fish/config.fish: pipeline completion fish | source",
}


@cli.command()
@click.argument("shell", type=click.Choice(list(_SETUP)))
def completion(shell: str) -> int:
    """Print what makes a shell complete commands, verbs, keys, values and names of runs."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ControlError(f"shell {shell}: click has no completion for it")
    script = kind(cli, {}, "pipeline", "_PIPELINE_COMPLETE").source()
    # After `key=` and a folder's / comes more: bash is to put no space there.
    script = script.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=($value); [[ "$value" == *[=:/] ]] && compopt -o nospace'
    )
    click.echo(f"# To have it in every shell, add to {_SETUP[shell]}\n{script}")
    return 0


@cli.command()
@_name
@click.option("--once", is_flag=True, help="Print one view and leave.")
@click.option("-n", "count", type=click.IntRange(1), metavar="N", help="Print N views, one an interval, and leave.")
@click.option("--interval", type=click.FloatRange(0.1, 3_600), default=1.0, show_default=True, help="In seconds.")
@_json
def monitor(name: str, once: bool, count: int | None, interval: float, as_json: bool) -> int:
    """Watch every stage live. It comes and goes as it likes; with --json it prints a line of JSON an interval."""
    from pipeline.monitor import command  # the terminal's library takes a while

    return command.run(name, views=1 if once else count, interval_s=interval, as_json=as_json)


@cli.command()
@_name
@click.option("-o", "path", type=click.Path(path_type=Path), required=True, metavar="FILE", help="To write.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="N", help="Only the last N seconds.")
@click.option("--next", "following", is_flag=True, help="The next N seconds, not the last.")
def trace(name: str, path: Path, seconds: float | None, following: bool) -> int:
    """Save what happened in the last minutes as a trace that ui.perfetto.dev opens."""
    from pipeline import trace as traces

    return traces.command(name, path, seconds=seconds, following=following)


@cli.command()
@_name
@click.option("--address", default="127.0.0.1", show_default=True, help="To listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=9_664, show_default=True, help="0 takes a free one.")
def metrics(name: str, address: str, port: int) -> int:
    """Serve the run's figures to Prometheus, until Ctrl-C."""
    from pipeline import metrics as figures

    return figures.command(name, address=address, port=port)


@cli.command()
@_name
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
@_json
def chaos(name: str, seed: int, seconds: float, faults: str, as_json: bool) -> int:
    """Put faults into a run that is up, and see how long it takes to be normal again. It interrupts the conversation.

    LIST, separated by commas: stall[=STAGE][:SECONDS] stops a stage, slow[=STAGE][:SECONDS] leaves it two fifths of its
    time, kill[=STAGE] kills it, hang[=STAGE] makes it hang where the run's setting faults.hang permits it, and
    fill=FOLDER fills a small disk. What is not given is drawn.
    """
    from pipeline import chaos as faulty

    return faulty.command(name, seed=seed, seconds=seconds, faults=faults, as_json=as_json)


@cli.command()
@_json
def devices(as_json: bool) -> int:
    """Audio devices, by the names that --input and --output take."""
    found = doctor.audio_devices()
    if as_json:
        _print_json(found)
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
    out.print(table if found["devices"] else "no audio devices")
    return 0


@cli.command(name="doctor")
@_name
@_settings_options
@_json
def doctor_(name: str, as_json: bool, config: Path | None, **given: Any) -> int:
    """What is there, what is wrong, and what to do about it."""
    keys = {"input_": "capture.input", "output": "playback.output"}
    overrides = {keys.get(key, key): value for key, value in given.items() if value is not None}
    findings = doctor.examine(settings.load(config, overrides), name)
    if as_json:
        _print_json(findings)
    else:
        styles = {"ok": "green", "note": "yellow", "wrong": "red"}
        for finding in findings:
            out.print(f"{finding.state:5} ", style=styles[finding.state], end="")
            out.print(f"{finding.what}: {finding.found}{'. ' if finding.advice else ''}{finding.advice}")
    return 1 if any(finding.state == "wrong" for finding in findings) else 0


@cli.command()
@click.option("--quality", type=click.Choice(list(checkpoints.QUALITIES)), help="Of the checkpoint.")
@click.option("--model", metavar="DIR_OR_REPO", help="A checkpoint; by default the quality's official one.")
@click.option(
    "--frames",
    type=click.IntRange(1, budget.MOST_FRAMES),
    default=budget.DEFAULT_FRAMES,
    show_default=True,
    help="Of speech, 80 ms each.",
)
@_json
def bench(quality: str | None, model: str | None, frames: int, as_json: bool) -> int:
    """How fast the model is on this machine, and whether it answers within 80 ms. Leave the machine alone meanwhile."""
    given = {key: value for key, value in {"quality": quality, "model": model}.items() if value is not None}
    chosen = settings.load(None, given)
    packages.need_moshi_mlx()
    with err.status("starting", refresh_per_second=2) if err.is_terminal else contextlib.nullcontext() as progress:
        on_progress = (lambda line: progress.update(Text(line))) if progress else (lambda line: None)
        found = budget.bench(chosen.model, chosen.quality, frames, on_progress)
    if as_json:
        _print_json(found)
    else:
        out.print(budget.view(found))
    return 0


@cli.group()
def models() -> None:
    """Checkpoints: on this machine, to be fetched, or made up."""


@models.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--quality", type=click.Choice(list(checkpoints.QUALITIES)), default="q4", show_default=True)
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
@click.option("--quality", type=click.Choice(list(checkpoints.QUALITIES)), help="By default what REPO's name says.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit; runs use it from then on.")
def pull(model: str | None, quality: str | None, revision: str) -> int:
    """Download a checkpoint from the model hub; by default the official one of the quality.

    A download that was interrupted goes on where it ended. What is here already is checked, and fetched again if it is
    damaged.
    """
    from pipeline import download  # takes half a second

    chosen = quality or checkpoints.label_of(model or "") or checkpoints.DEFAULT_QUALITY
    plan = download.plan(checkpoints.repository(model, chosen), chosen, revision)
    err.print(f"{plan.record.repo}, {chosen}, {revision} at {plan.record.commit}:")
    for planned in plan.files:
        here = f"{download.size(planned.here_bytes)} here" if planned.here_bytes else "to fetch"
        err.print(f"  {planned.file.name:48} {download.size(planned.file.size):>9}  {here}")
    err.print(f"  to fetch: {download.size(plan.missing_bytes)} of {download.size(plan.total_bytes)}")
    click.echo(f"{download.fetch(plan)}: complete")
    return 0


@models.command()
@click.argument("model", required=False, metavar="[REPO|VOICE|DIR]")
@click.option("--quality", type=click.Choice(list(checkpoints.QUALITIES)), help="By default what is there.")
@_json
def verify(model: str | None, quality: str | None, as_json: bool) -> int:
    """Compare a checkpoint's files with the hashes that the hub told, and with what its config asks for."""
    verdicts = inventory.verify(model, quality or checkpoints.quality_of(model))
    if as_json:
        _print_json(verdicts)
    else:
        for verdict in verdicts:
            found = verdict.fault or f"by its {verdict.checked}"
            out.print(f"{verdict.state:8} {verdict.file:48} {found}")
    return 0 if all(verdict.state == "ok" for verdict in verdicts) else 1


@models.command(name="list")
@_json
def list_(as_json: bool) -> int:
    """The official checkpoints and others that were pulled, and which of them are on this machine."""
    entries = inventory.entries()
    if as_json:
        _print_json(entries)
        return 0
    for entry in entries:
        pinned = f"{entry.revision} at {entry.commit[:12]}  {entry.folder}"
        place = entry.problem or (pinned if entry.folder else f"not downloaded: `pipeline models pull {entry.repo}`")
        click.echo(f"{entry.quality:5} {entry.repo:28} {entry.bytes / 1e9:5.1f} GB  {place}")
    return 0


def main() -> None:
    """Run the command; whatever the user did wrong becomes one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to end a conversation
    try:
        code = cli.main(prog_name="pipeline", standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pipeline"
        _complain(f"{error.format_message()} See `{command} --help`.")
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
    err.print(f"pipeline: {line}", style="red")
    sys.exit(EXIT_REFUSED)
