"""The commands that speak to a run: `status`, `send`, `down`, and what belongs to them."""

import time
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from pipeline import messages, report, verbs
from pipeline.cli import options
from pipeline.client import Client
from pipeline.errors import ControlError
from pipeline.runtime import RunFolder


@click.command()
@options.name
@options.remote
@options.json
def down(name: str, remote: str | None, as_json: bool) -> int:
    """End a run, or clear what a dead one left."""
    folder = RunFolder(name)
    if remote is None and not folder.is_locked():
        if not folder.path.exists():
            raise ControlError(f"no run is up under {name!r}, and none has left anything")
        from pipeline.supervisor import end_orphans

        folder.lock()
        end_orphans(folder)
        folder.release()
        if as_json:
            options.print_json(None)
        else:
            click.echo(f"no run was up under {name!r}; what a dead one had left is cleared")
        return 0
    final = Client(name, remote=remote).send("shutdown").status
    if as_json:
        options.print_json(final)
    elif final is not None:
        options.out().print(report.summary(final))
    until = time.monotonic() + 5
    while remote is None and folder.control.exists():
        if time.monotonic() > until:
            raise ControlError(f"the run {name!r} has stopped its stages, but does not end")
        time.sleep(0.01)
    return 0


@click.command()
@options.name
@options.remote
@options.json
def status(name: str, remote: str | None, as_json: bool) -> int:
    """State, accounting and timing now."""
    found = Client(name, remote=remote).status()
    if as_json:
        options.print_json(found)
    else:
        options.out().print(report.status_view(found))
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


@click.command(cls=_SendCommand)
@options.name
@options.remote
@options.json
@click.argument("verb", type=click.Choice(list(messages.VERBS)), metavar="VERB", shell_complete=_complete_verb)
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_complete_value)
def send(name: str, remote: str | None, as_json: bool, verb: str, values: tuple[str, ...]) -> int:
    """Send a command to a run, and wait until it is carried out.

    A relative path is looked up in this folder; with --remote, where the run was started.
    """
    reply = Client(name, remote=remote).send(verb, verbs.parse(verb, values, here=remote is None))
    if as_json:
        options.print_json(reply)
    elif reply.status is not None:
        options.out().print(report.status_view(reply.status))
    elif verb == "trace":
        click.echo(f"trace: {len(reply.records)} records; --json prints them")
    else:
        click.echo(verbs.outcome(reply))
    return 0


@click.command()
@click.option("--client", metavar="NAME", help="Let another machine in: make the keys that it needs.")
@options.json
def keys(client: str | None, as_json: bool) -> int:
    """The keys by which a second machine reaches runs on this one: made, if there are none, and listed.

    Runs listen where their setting remote.listen says. $PIPELINE_KEYS_DIR is another folder for keys.
    """
    from pipeline import keys as own

    if client is not None:
        carried = own.make_client(client)
        if as_json:
            options.print_json({"client": client, "files": sorted(str(path) for path in carried.iterdir())})
        else:
            click.echo(f"{client} is let in. Copy both files in {carried} to its folder of keys (`pipeline keys` there")
            click.echo(
                "names it), remove them here, and try there: pipeline status --remote ADDRESS_OF_THIS_MACHINE:PORT"
            )
        return 0
    own.make_server()
    found = own.found()
    if as_json:
        options.print_json(found)
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


@click.command()
@click.argument("shell", type=click.Choice(list(_SETUP)))
def completion(shell: str) -> int:
    """Print what makes a shell complete commands, verbs, keys, values and names of runs."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ControlError(f"shell {shell}: click has no completion for it")
    from pipeline.cli import cli

    script = kind(cli, {}, "pipeline", "_PIPELINE_COMPLETE").source()
    # After `key=` and a folder's / comes more: bash is to put no space there.
    script = script.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=($value); [[ "$value" == *[=:/] ]] && compopt -o nospace'
    )
    click.echo(f"# To have it in every shell, add to {_SETUP[shell]}\n{script}")
    return 0
