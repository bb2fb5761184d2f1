"""A monitor's figures as lines of text, as wide as the terminal. Colour only repeats what words and marks say."""

import itertools
from typing import Final, NamedTuple

from rich.text import Text

from pipeline.messages import Spread, StatusReport
from pipeline.monitor.model import COLUMN_S, SILENT_S, STAGES, Entry, Figures, Model, StageFigures, level_share
from pipeline.topology import FRAME_MS, StageName

WIDTH_MIN: Final = 80
HEIGHT_MIN: Final = 23
"""Lines without a footer. With fewer the last are not seen."""

_WIDE: Final = 100
_TALL: Final = 32
_STEPS: Final = " ▁▂▃▄▅▆▇█"
_BAR: Final = "━"
_EMPTY: Final = "·"
_RULE: Final = "─"
_PEAK: Final = "|"
_BUDGETS: Final = 2
"""How many budgets high the timeline is."""

_AXIS: Final = 4
_BAR_WIDTH: Final = 12
_BAR_WIDE: Final = 24

_STATE_STYLE: Final = {
    "running": "green",
    "ready": "cyan",
    "starting": "yellow",
    "backoff": "bold yellow",
    "fatal": "bold red",
    "stopped": "dim",
}
_KIND_STYLE: Final = {
    "state": "cyan",
    "command": "green",
    "refused": "bold red",
    "xrun": "yellow",
    "info": "",
    "warning": "yellow",
    "error": "bold red",
}
_KIND_MARK: Final = {"refused": "!", "xrun": "!", "warning": "!", "error": "!"}


class _Column(NamedTuple):
    """A column of the stages' table. Widths below zero are of text, which begins at the left."""

    title: str
    width: int


class _Cell(NamedTuple):
    """A column of the timeline."""

    longest_ms: float
    silent: bool


_COLUMNS: Final = [
    _Column("stage", -11),
    _Column("state", -8),
    _Column("pid", 7),
    _Column("WAIT", 4),
    _Column("BUSY", 4),
    _Column("load", 4),
    _Column("p50", 4),
    _Column("p95", 4),
    _Column("p99", 4),
    _Column("max", 4),
    _Column("late", 5),
    _Column("rst", 3),
    _Column("xrun", 4),
]
_WIDE_COLUMNS: Final = [_Column("CPU", 4), _Column("MiB", 5)]


def lines(model: Model, now_ns: int, width: int, height: int, notice: str = "") -> list[Text]:
    """All of a view of at least WIDTH_MIN columns, `height` lines of it. `notice` is what a command was answered."""
    width = max(width, WIDTH_MIN)
    height = max(height, HEIGHT_MIN)
    figures = model.figures(now_ns)
    rows = 8 if height >= _TALL else 4
    top = [
        _head(figures, width),
        *_table(figures, width),
        _alert(model, figures, now_ns, notice),
        *_timeline(model, figures, now_ns, width, rows),
        *_gauges(figures, width),
    ]
    return [_fit(line, width) for line in [*top, *_words(figures, width, height - len(top))]]


def plain(model: Model, now_ns: int, width: int) -> str:
    """The same for a file or a pipe: as high as it needs to be, with no blanks at the ends of lines."""
    return "\n".join(line.plain.rstrip() for line in lines(model, now_ns, width, HEIGHT_MIN + 4)).rstrip()


def absence(model: Model, now_ns: int) -> str:
    """One line of a run that is not up."""
    return f"{model.name}: {_state(model.figures(now_ns)).plain}"


def _fit(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return Text().append_text(line)  # a style of the whole becomes one of its parts, which is what is drawn


def number(value: float | None) -> str:
    """A duration in ms in four characters; `-` where there is none."""
    if value is None:
        return "-"
    if value < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 9_999.5 else f"{value / 1_000:.0f}s"


def count(value: int | None) -> str:
    """A count in four characters; `-` where there is none."""
    if value is None:
        return "-"
    return str(value) if value < 10_000 else f"{value // 1_000}k" if value < 1_000_000 else f"{value // 1_000_000}M"


def span(seconds: float) -> str:
    """A time for people, in its largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3_600}:{whole // 60 % 60:02}:{whole % 60:02}"


def length(ms: float) -> str:
    """Lost or added sound, in ms or in s."""
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1_000:.1f} s"


def _head(figures: Figures, width: int) -> Text:
    """The run's name and state, and what percentiles and counts are of; where there is room, more of it."""
    head = Text.assemble((f"{figures.name}: ", "bold"), _state(figures))
    for word, shown in (("MUTED", figures.muted), ("PAUSED", figures.paused), ("REC", bool(figures.recording))):
        if shown and figures.link == "up":
            head.append(" ").append(f"[{word}]", style="bold reverse")
    if figures.status is None:
        return head
    since = f"since {span(figures.since_s)} ago" if figures.since == "clear" else "of the whole run"
    note = f"percentiles and counts {since}" if width >= _WIDE else f"figures {since}"
    more = _engine(figures.status)
    if len(head) + len(more) + len(note) < width:
        head.append(more)
    return head.append(" " * max(1, width - len(head) - len(note))).append(note, style="dim")


def _state(figures: Figures) -> Text:
    if figures.link == "waiting":
        return Text("waiting for the run", style="bold yellow")
    if figures.link == "ended":
        return Text("run ended, waiting for it", style="bold yellow")
    if figures.status is None:
        return Text("up, its status is not known yet", style="yellow")
    return Text(figures.status.state, style="bold green" if figures.status.state == "running" else "bold yellow")


def _engine(status: StatusReport) -> str:
    quality = f" {status.settings.quality}" if status.engine == "moshi" else ""
    return f", {status.engine}{quality}, up {span(status.uptime_s)}"


def _columns(width: int) -> list[_Column]:
    return _COLUMNS + (_WIDE_COLUMNS if width >= _WIDE else [])


def _table(figures: Figures, width: int) -> list[Text]:
    columns = _columns(width)
    head = " ".join(_cell(column.title, column.width) for column in columns)
    more = "  works with" if width >= _WIDE else ""
    rows = [_row(figures, stage, key, columns) for key, stage in enumerate(STAGES, 1)]
    return [Text(head + more, style="bold"), *rows]


def _cell(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _row(figures: Figures, name: StageName, key: int, columns: list[_Column]) -> Text:
    stage, up = figures.stages[name], figures.link == "up"
    state = stage.state or "-"
    cells = [
        f"{key} {name}",
        state,
        str(stage.pid or "-"),
        number(stage.wait_ms),
        number(stage.busy_ms),
        "-" if stage.load is None else f"{stage.load:.0%}",
        *_percentiles(stage.spread),
        count(stage.late),
        count(stage.restarts),
        count(stage.xruns),
    ]
    if len(columns) > len(_COLUMNS):
        cells += ["-" if stage.cpu_percent is None else f"{stage.cpu_percent:.0f}%", f"{stage.memory_mb:.0f}"]
    row = Text(style="" if up else "dim")
    for text, column in zip(cells, columns, strict=True):
        row.append(_cell(text, column.width), style=_style(column.title, text, stage) if up else "")
        row.append(" ")
    if len(columns) > len(_COLUMNS) and figures.status is not None:
        row.append(f" {figures.status.stages[name].detail}", style="dim")
    return row


def _style(title: str, text: str, stage: StageFigures) -> str:
    if title == "state":
        return _STATE_STYLE.get(text, "")
    if title == "load" and stage.load is not None and stage.load > 1:
        return "bold red"
    return "yellow" if title in ("late", "rst", "xrun") and text not in ("0", "-") else ""


def _percentiles(spread: Spread) -> list[str]:
    if not spread.frames:
        return ["-"] * 4
    return [number(value) for value in (spread.p50_ms, spread.p95_ms, spread.p99_ms, spread.max_ms)]


def _alert(model: Model, figures: Figures, now_ns: int, notice: str) -> Text:
    silent = model.silent(now_ns)
    bad = [f"{stage} is {figures.stages[stage].state}" for stage in STAGES if _is_down(figures, stage)]
    if bad:
        return Text(f"! {', '.join(bad)}", style="bold red")
    if silent is not None:
        return Text(f"! no frame of {silent} for {figures.stages[silent].silent_s or SILENT_S:.1f} s", style="bold red")
    if figures.overload and not notice:
        return Text(f"! {figures.overload}", style="bold red")
    if figures.misunderstood:
        return Text(f"! events of another version of the program: {figures.misunderstood}", style="yellow")
    return Text(notice, style="bold")


def _is_down(figures: Figures, stage: StageName) -> bool:
    return figures.link == "up" and figures.stages[stage].state in ("backoff", "fatal")


def _timeline(model: Model, figures: Figures, now_ns: int, width: int, rows: int) -> list[Text]:
    """The longest work on a frame in each column of time, the newest at the right, against the budget."""
    columns = width - _AXIS - 1
    until_ns = model.last_ns if figures.link == "ended" and model.last_ns else now_ns
    newest = until_ns // (COLUMN_S * 1_000_000_000)
    longest, silent = dict(model.columns), {*model.silences, *model.silent_columns(until_ns)}
    cells = [_Cell(longest.get(column, 0.0), column in silent) for column in range(newest - columns + 1, newest + 1)]
    row_ms = _BUDGETS * FRAME_MS / rows
    drawn = [_timeline_row(cells, row * row_ms, row_ms) for row in reversed(range(rows))]
    return [_parts(figures, width), *drawn]


def _parts(figures: Figures, width: int) -> Text:
    columns = width - _AXIS - 1
    what = f"work on a frame, ms, longest in {COLUMN_S} s "
    if width >= _WIDE:
        what += f"of the last {span(columns * COLUMN_S)}; budget {FRAME_MS:.0f}; x no frame for {SILENT_S:g} s "
    parts = [("encode", figures.encode_ms), ("step", figures.step_ms), ("decode", figures.decode_ms)]
    now = "".join(f"  {name} {number(value)}" for name, value in parts if value)
    return _ruled(what, width, now)


def _ruled(title: str, width: int, end: str = "") -> Text:
    """A heading, with a line from its words to what is at its end."""
    line = Text(f"{title.rstrip()} ", style="bold")
    return line.append(_RULE * max(0, width - len(line) - len(end)), style="not bold dim").append(end)


def _timeline_row(cells: list[_Cell], from_ms: float, row_ms: float) -> Text:
    above = from_ms >= FRAME_MS
    empty = "_" if from_ms == FRAME_MS else " "
    label = f"{from_ms:.0f}" if from_ms in (0, FRAME_MS) else ""
    line = Text(label.rjust(_AXIS), style="dim")
    line.append(empty, style="yellow")
    style = "not dim bold red" if above else "not dim green"
    for drawn, same in itertools.groupby(_timeline_cell(cell, from_ms, row_ms) for cell in cells):
        many = len(list(same))
        if drawn == " ":
            line.append(empty * many, style="not dim yellow")
        else:
            line.append(drawn * many, style="not dim bold red" if drawn == "x" else style)
    return line


def _timeline_cell(cell: _Cell, from_ms: float, row_ms: float) -> str:
    top_ms = _BUDGETS * FRAME_MS
    if cell.silent and not from_ms:
        return "x"
    if cell.longest_ms > top_ms and from_ms + row_ms >= top_ms:
        return "^"
    eighths = round((cell.longest_ms - from_ms) / row_ms * 8)
    least = 1 if cell.longest_ms and not from_ms else 0
    return _STEPS[min(8, max(least, eighths))]


def _gauges(figures: Figures, width: int) -> list[Text]:
    mic, speaker = figures.stages["capture"], figures.stages["playback"]
    spread = figures.mic_to_speaker
    drift = "not known yet" if figures.drift_ppm is None else f"{figures.drift_ppm:+.0f} ppm"
    of = f"{figures.context / figures.context_size:.0%}" if figures.context_size else "-"
    found = [
        _side("mic", mic, "capture ring", figures.ring_in_ms, figures.ring_in_limit_ms, width),
        _side("speaker", speaker, "playback ring", figures.ring_out_ms, figures.ring_out_limit_ms, width),
        Text(
            f"mic to speaker {number(figures.mic_to_speaker_ms)} ms now, p50 {_known(spread, spread.p50_ms)},"
            f" p95 {_known(spread, spread.p95_ms)}, max {_known(spread, spread.max_ms)}; drift {drift}"
        ),
        Text(
            f"gaps {count(figures.gaps)}, concealed {length(figures.concealed_ms)},"
            f" dropped {length(figures.dropped_ms)}, skipped {length(figures.skipped_ms)},"
            f" cleaned {count(figures.cleaned)}"
        ),
    ]
    context = f"context {figures.context}/{figures.context_size} ({of})" if figures.context_size else "context -"
    if width >= _WIDE:
        found[-1].append(f"; {context}")
    else:
        found.append(Text(f"{context}; {_machine(figures)}"))
    if figures.recording:
        found.append(Text(f"recording to {figures.recording}"))
    return found


def _known(spread: Spread, value: float) -> str:
    return number(value if spread.frames else None)


def _machine(figures: Figures) -> str:
    stages = [figures.stages[name] for name in STAGES]
    shares = "/".join("-" if one.cpu_percent is None else f"{one.cpu_percent:.0f}" for one in stages)
    return f"CPU {shares} %, memory {'/'.join(f'{one.memory_mb:.0f}' for one in stages)} MiB"


def _side(name: str, stage: StageFigures, ring: str, fill_ms: float, limit_ms: float, width: int) -> Text:
    """A level and the fill of the ring behind it, as bars with their figures."""
    bar = _BAR_WIDE if width >= _WIDE else _BAR_WIDTH
    line = Text(f"{name:7} ")
    line.append(_meter(level_share(stage.level_dbfs), level_share(stage.peak_dbfs), bar), style="green")
    level = "    -" if stage.level_dbfs is None else f"{round(stage.level_dbfs):5}"
    peak = "   -" if stage.peak_dbfs is None else f"{round(stage.peak_dbfs):4}"
    line.append(f" {level} dBFS, peak {peak}  ")
    line.append(f"{ring:13} ")
    over = bool(limit_ms) and fill_ms > limit_ms
    line.append(_meter(fill_ms / limit_ms if limit_ms else 0.0, None, bar // 2), style="bold red" if over else "cyan")
    return line.append(f" {fill_ms:.0f} of {limit_ms:.0f} ms")


def _meter(share: float, peak: float | None, width: int) -> str:
    filled = min(width, round(share * width))
    bar = list(_BAR * filled + _EMPTY * (width - filled))
    if peak is not None and peak > 0:
        at = min(width - 1, int(peak * width))
        bar[at] = _PEAK if at >= filled else _BAR
    return "".join(bar)


def _words(figures: Figures, width: int, height: int) -> list[Text]:
    """What is said and what happened: side by side where there is room, one above the other where not."""
    if width >= _WIDE:
        left = (width - 2) * 2 // 5
        said = _panel("transcript", _said(figures.transcript, left, height - 1), left, height)
        happened = _panel("events", _happened(figures, width - left - 2, height - 1), width - left - 2, height)
        return [Text.assemble(one, "  ", other) for one, other in zip(said, happened, strict=True)]
    events = (height - 2) // 2
    said_height = height - events - 1
    return [
        *_panel("transcript", _said(figures.transcript, width, said_height - 1), width, said_height),
        *_panel("events", _happened(figures, width, events), width, events + 1),
    ]


def _panel(title: str, content: list[Text], width: int, height: int) -> list[Text]:
    """A title and lines below it, all of the same width."""
    found = [_ruled(title, width), *content]
    for line in found:
        line.truncate(width, overflow="ellipsis")
        line.pad_right(width - line.cell_len)
    return found + [Text(" " * width) for _ in range(height - len(found))]


def _said(transcript: str, width: int, height: int) -> list[Text]:
    return [Text(line) for line in _wrapped(transcript, width)[-height:]] if height > 0 else []


def _wrapped(text: str, width: int) -> list[str]:
    """Broken at blanks; in a tenth of textwrap's time."""
    found, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            found.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*found, line]


def _happened(figures: Figures, width: int, height: int) -> list[Text]:
    return [_entry(entry, figures.time_ns) for entry in figures.journal[-height:]] if height > 0 else []


def _entry(entry: Entry, now_ns: int) -> Text:
    age = span(max(0.0, (now_ns - entry.time_ns) / 1_000_000_000))
    line = Text(f"{age:>7} {_KIND_MARK.get(entry.kind, ' ')} ", style="dim")
    times = f" x{entry.count}" if entry.count > 1 else ""
    return line.append(" ".join(entry.text.split()) + times, style=f"not dim {_KIND_STYLE[entry.kind]}")
