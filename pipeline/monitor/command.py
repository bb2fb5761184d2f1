"""`pipeline monitor`: the live view in a terminal, or views and lines of JSON, one an interval."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console

from pipeline import messages
from pipeline.client import Client
from pipeline.errors import ControlError
from pipeline.monitor import view
from pipeline.monitor.feed import Feed

ANSWER_S: Final = 5.0
"""How long a run that is up may take to tell its status."""

_WELCOME_S: Final = 0.2
"""How long the first of endless views waits for the run. A run that is up is heard of within some ms."""

_WIDTH: Final = 120
"""Of a view that goes to a file or a pipe, unless COLUMNS says otherwise."""

_FULL_SCREEN: Final = "\x1b[?1049h\x1b[?25l\x1b[H"
_FORMER_SCREEN: Final = "\x1b[?25h\x1b[?1049l"


def run(client: Client, *, views: int | None, interval_s: float, as_json: bool) -> int:
    """Show a run: `views` times, or until the user ends it. Returns the exit code.

    A number of views asks for a run that is up: raises ControlError if it is not. Endless ones wait for it.
    """
    if views is not None:
        client.status()
    with contextlib.closing(Feed(client)) as feed:
        if views is None and not as_json and sys.stdout.isatty() and sys.stdin.isatty():
            _live(feed, client, interval_s)
        else:
            _print(feed, views, interval_s, as_json)
    return 0


def _live(feed: Feed, client: Client, interval_s: float) -> None:
    with _preview(feed):
        from pipeline.monitor.app import Monitor  # takes 0.3 s
    Monitor(feed, client, interval_s).run()


@contextlib.contextmanager
def _preview(feed: Feed) -> Iterator[None]:
    """Show the first view while the terminal's library is loaded; it takes the screen over."""
    feed.complete(_WELCOME_S)
    console = Console(highlight=False, markup=False, emoji=False)
    console.file.write(_FULL_SCREEN)
    shown = view.lines(feed.model, feed.now_ns(), console.width, console.height - 1)
    for line in shown[: console.height - 1]:
        console.print(line, no_wrap=True, crop=True, overflow="crop")
    try:
        yield
    except BaseException:
        console.file.write(_FORMER_SCREEN)
        raise


def _print(feed: Feed, views: int | None, interval_s: float, as_json: bool) -> None:
    known = feed.complete(_WELCOME_S if views is None else ANSWER_S)
    if views is not None and not known:
        raise ControlError(f"the run {feed.model.name!r} did not tell its status within {ANSWER_S:g} s")
    due_s, before = time.monotonic(), ""
    for text in _texts(feed, as_json):
        # Of a run that is not up, one line is enough.
        if as_json or text != before or feed.model.link == "up":
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        before = text
        views = None if views is None else views - 1
        if views == 0:
            return
        due_s += interval_s
        feed.wait(due_s)


def _texts(feed: Feed, as_json: bool) -> Iterator[str]:
    while True:
        now_ns = feed.now_ns()
        if as_json:
            yield messages.encode(feed.model.figures(now_ns)).decode()
        elif feed.model.link != "up":
            yield view.absence(feed.model, now_ns)
        else:
            yield f"{view.plain(feed.model, now_ns, _width())}\n"


def _width() -> int:
    return shutil.get_terminal_size((_WIDTH, view.HEIGHT_MIN)).columns
