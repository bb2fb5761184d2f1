"""What people read: the timing table, the accounting line, the stages."""

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.messages import Accounting, Spread, StageSpread, StatusReport
from pipeline.topology import SAMPLE_RATE


def timing_table(status: StatusReport) -> Table:
    """How long each part took a frame."""
    table = Table(title="Timing, ms a frame", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "frames", "p50", "p95", "p99", "max", "budget", "late"):
        table.add_column(column, justify="left" if not column else "right")
    timing = status.timing
    rows: list[tuple[str, Spread]] = [
        ("capture to ring", timing.capture),
        ("inference", timing.inference),
        ("ring to speaker", timing.playback),
        ("microphone to speaker", timing.mic_to_speaker_ms),
    ]
    for name, spread in rows:
        figures = [f"{value:.1f}" for value in (spread.p50_ms, spread.p95_ms, spread.p99_ms, spread.max_ms)]
        limits = [f"{spread.budget_ms:.0f}", str(spread.late)] if isinstance(spread, StageSpread) else ["", ""]
        table.add_row(name, str(spread.frames), *(figures if spread.frames else ["-"] * 4), *limits)
    return table


def accounting_line(counts: Accounting) -> str:
    """Where every sample is, in samples."""
    return (
        f"captured {counts.captured} = stepped {counts.stepped} + dropped {counts.dropped}"
        f" + waiting {counts.waiting_in}; "
        f"generated {counts.generated} = played {counts.played} + skipped {counts.skipped}"
        f" + waiting {counts.waiting_out}; "
        f"sent {counts.sent} = played {counts.played} + concealed {counts.concealed}"
    )


def health_line(status: StatusReport) -> str:
    """What went wrong, in a word each."""
    counts, xruns = status.accounting, status.xruns
    concealed_ms = counts.concealed * 1_000 / SAMPLE_RATE
    drift = "not measured yet" if status.drift_ppm is None else f"{status.drift_ppm:+.0f} ppm"
    return (
        f"gaps {counts.gaps}, xruns {xruns.capture} in {xruns.playback} out, cleaned {counts.cleaned}, "
        f"silence before, between and after {concealed_ms:.0f} ms, drift {drift}"
    )


def summary(status: StatusReport) -> RenderableType:
    """The end of a run."""
    return Group(timing_table(status), Text(health_line(status)), Text(accounting_line(status.accounting)))


def stages_table(status: StatusReport) -> Table:
    """A row for each stage."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "state", "pid", "restarts", "memory", "CPU", "device latency", "works with"):
        justify: JustifyMethod = "left" if column in {"stage", "state", "works with"} else "right"
        table.add_column(column, justify=justify, no_wrap=column == "stage")
    for name, stage in status.stages.items():
        table.add_row(
            name,
            stage.state,
            str(stage.pid or "-"),
            str(stage.restarts),
            f"{stage.memory_mb:.0f} MiB",
            f"{stage.cpu_s:.1f} s",
            f"{stage.device_latency_ms:.1f} ms",
            Text(stage.detail),
        )
    return table


def status_view(status: StatusReport) -> RenderableType:
    """Everything that `status` knows."""
    head = f"{status.name}: {status.state}, engine {status.engine}, up {status.uptime_s:.1f} s"
    return Group(Text(head), stages_table(status), summary(status))
