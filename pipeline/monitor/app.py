"""The live view: keys, a footer that shows them, and the lines of `view` in between. Commands go to the run itself."""

import asyncio
import contextlib
import itertools
import threading
import time
from typing import Any, ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Footer

from pipeline.client import Client
from pipeline.errors import PipelineError
from pipeline.messages import Reply
from pipeline.monitor import view
from pipeline.monitor.feed import KEEP_UP_S, Feed
from pipeline.monitor.model import STAGES

_NOTICE_S: Final = 10.0
"""How long an answer is shown."""

_RESTART_S: Final = 120.0
"""How long a stage may take to run again: inference loads a model."""

_COMMAND_S: Final = 5.0


class Lines(Widget):
    """Lines of text, of which only those that have changed are drawn anew."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: list[Text] = []

    def show(self, shown: list[Text]) -> None:
        """Show these in place of those before."""
        before, self._shown = self._shown, shown
        for y, (old, new) in enumerate(itertools.zip_longest(before, shown)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def render_line(self, y: int) -> Strip:
        """One of the lines."""
        line = self._shown[y] if y < len(self._shown) else Text()
        segments = [part for part in line.render(self.app.console) if part.text]
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)


class Monitor(App[None]):
    """A view of the run that `feed` is about, drawn anew every `interval_s`."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { overflow: hidden hidden; background: ansi_default; }
    Lines { height: 1fr; width: 100%; background: ansi_default; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "mute", "Mute"),
        Binding("p", "pause", "Pause"),
        Binding("r", "send('reset')", "Reset"),
        Binding("1", "restart(0)", "Restart stage", key_display="1 2 3"),
        Binding("2", "restart(1)", show=False),
        Binding("3", "restart(2)", show=False),
        Binding("c", "clear", "Clear counts"),
        Binding("q,ctrl+c", "quit", "Quit", key_display="q"),
    ]

    def __init__(self, feed: Feed, client: Client, interval_s: float) -> None:
        super().__init__(ansi_color=True)
        self._feed = feed
        self._interval_s = interval_s
        self._client = client
        self._notice = ""
        self._noticed_s = 0.0
        self._lines = Lines()

    def compose(self) -> ComposeResult:
        """The lines and the keys."""
        yield self._lines
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to keep up with the run."""
        self.set_interval(min(self._interval_s, KEEP_UP_S), self.look)

    def on_resize(self) -> None:
        """Draw for the new size."""
        self.look()

    def look(self) -> None:
        """Take in what has come, and draw."""
        self._feed.update()
        now_s = time.monotonic()
        notice = self._notice if now_s - self._noticed_s < _NOTICE_S else ""
        shown = view.lines(self._feed.model, self._feed.now_ns(), self.size.width, self.size.height - 1, notice)
        self._lines.show(shown)

    def action_mute(self) -> None:
        """Silence in place of the microphone, or the microphone again."""
        self.action_send("unmute" if self._feed.model.muted else "mute")

    def action_pause(self) -> None:
        """Let the model take no more frames, or go on."""
        self.action_send("resume" if self._feed.model.paused else "pause")

    def action_restart(self, index: int) -> None:
        """End a stage in good order, and start it again."""
        self._send("restart", {"stage": STAGES[index]}, _RESTART_S)

    def action_send(self, verb: str) -> None:
        """Tell the run."""
        self._send(verb, {}, _COMMAND_S)

    def action_clear(self) -> None:
        """Let this view's counts begin now."""
        self._feed.model.clear(self._feed.now_ns())
        self._say("counts of this view cleared")

    def _send(self, verb: str, values: dict[str, Any], timeout_s: float) -> None:
        what = " ".join([verb, *values.values()])
        self._say(f"{what} ...")
        # A thread of its own, and not one that the end would wait for: an answer may take as long as a model's loading.
        arguments = (asyncio.get_running_loop(), what, verb, values, timeout_s)
        threading.Thread(target=self._ask, args=arguments, daemon=True).start()

    def _ask(
        self, loop: asyncio.AbstractEventLoop, what: str, verb: str, values: dict[str, Any], timeout_s: float
    ) -> None:
        try:
            answer = f"{what}: {_done(self._client.send(verb, values, timeout_s=timeout_s))}"
        except PipelineError as error:
            answer = f"{what}: refused, {error}"
        with contextlib.suppress(RuntimeError):  # the view was closed meanwhile
            loop.call_soon_threadsafe(self._say, answer)

    def _say(self, notice: str) -> None:
        self._notice, self._noticed_s = notice, time.monotonic()
        self.look()


def _done(reply: Reply) -> str:
    return f"done by {reply.stage}, from frame {reply.frame} on" if reply.stage else "done"
