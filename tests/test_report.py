"""pipeline.report: the figures that people read, at the width of an old terminal."""

import re

import pytest
from rich.console import Console, RenderableType

from pipeline import report
from pipeline.config import Config
from pipeline.messages import Accounting, Spread, StageSpread, StageStatus, StatusReport, Timing, Xruns

WIDTH = 80


def rendered(what: RenderableType, width: int = WIDTH) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    try:
        console.print(what)
    finally:
        console.file.close()
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    return [line for line in lines if line]


def a_status() -> StatusReport:
    return StatusReport(
        pid=1, muted=False, name="default",
        state="running",
        engine="moshi",
        uptime_s=3_725.25,
        stages={
            "playback": StageStatus(
                state="running", pid=4_194_303, restarts=2, detail="Built-in Speaker at 48000 Hz",
                device_latency_ms=12.34, memory_mb=71.6, cpu_s=123.45,
            ),
            "inference": StageStatus(state="backoff", pid=None, restarts=8, detail="", memory_mb=12_345.6),
            "capture": StageStatus(state="running", pid=17, restarts=0, detail="tone 440 Hz"),
        },
        accounting=Accounting(
            captured=86_400_001, stepped=86_300_002, dropped=90_003, waiting_in=9_996,
            generated=86_300_004, played=86_200_005, skipped=90_006, waiting_out=9_993,
            sent=86_500_007, concealed=300_002, gaps=11, cleaned=13,
        ),
        timing=Timing(
            capture=Spread(frames=45_000, p50_ms=1.04, p95_ms=2.06, p99_ms=3.0, max_ms=44.96),
            inference=StageSpread(frames=44_948, p50_ms=50.5, p95_ms=60.25, p99_ms=70.0, max_ms=12_345.6, late=17),
            playback=Spread(),
            mic_to_speaker_ms=Spread(frames=44_000, p50_ms=250.0, p95_ms=300.0, p99_ms=310.0, max_ms=600_000.0),
        ),
        xruns=Xruns(capture=3, playback=4),
        drift_ppm=-12.6, time_ns=1, paused=False, recording=None, settings=Config(),
    )  # fmt: skip


def test_the_accounting_line_holds_the_three_equations_in_samples() -> None:
    assert report.accounting_line(a_status().accounting) == (
        "captured 86400001 = stepped 86300002 + dropped 90003 + waiting 9996; "
        "generated 86300004 = played 86200005 + skipped 90006 + waiting 9993; "
        "sent 86500007 = played 86200005 + concealed 300002"
    )


def test_the_equations_of_the_line_can_be_checked_by_reading_it() -> None:
    for equation in report.accounting_line(a_status().accounting).split(";"):
        left, right = equation.split("=")
        assert int(re.sub(r"\D", "", left)) == sum(int(count) for count in re.findall(r"\d+", right))


def test_the_timing_table() -> None:
    lines = rendered(report.timing_table(a_status()))
    assert lines[0].strip() == "Timing, ms a frame"
    assert lines[1].split() == ["frames", "p50", "p95", "p99", "max", "budget", "late"]
    # A row's name may go on in a second line; its figures do not.
    figures = [re.findall(r"(?<=\s)(?:\d+(?:\.\d)?|-)(?=\s|$)", line) for line in lines[3:]]
    assert [row for row in figures if row] == [
        ["45000", "1.0", "2.1", "3.0", "45.0"],
        ["44948", "50.5", "60.2", "70.0", "12345.6", "80", "17"],
        ["0", "-", "-", "-", "-"],
        ["44000", "250.0", "300.0", "310.0", "600000.0"],
    ]


def test_the_health_line() -> None:
    assert report.health_line(a_status()) == (
        "gaps 11, xruns 3 in 4 out, cleaned 13, silence before, between and after 12500 ms, drift -13 ppm"
    )


@pytest.mark.parametrize(("ppm", "shown"), [(None, "not measured yet"), (0.0, "+0 ppm"), (200.4, "+200 ppm")])
def test_the_drift(ppm: float | None, shown: str) -> None:
    status = a_status()
    status.drift_ppm = ppm
    assert report.health_line(status).endswith(f"drift {shown}")


def test_the_stages_table_cuts_no_name_and_no_figure_off() -> None:
    lines = rendered(report.stages_table(a_status()))
    text = "\n".join(lines)
    rows = {line.split()[0]: line.split() for line in lines}
    assert set(rows) >= {"playback", "inference", "capture"}
    assert rows["playback"][1:4] == ["running", "4194303", "2"]
    assert rows["inference"][1:4] == ["backoff", "-", "8"]
    assert rows["capture"][1:4] == ["running", "17", "0"]
    for figure in ("72", "123.5", "12.3", "12346"):
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), figure


@pytest.mark.parametrize("name", ["USB [front] mic", "[red]a device[/red]", "[/]", "Mikrofon (Gerät: [2])", "a\\"])
def test_a_device_may_be_called_anything(name: str) -> None:
    status = a_status()
    status.stages["capture"].detail = name
    text = "\n".join(rendered(report.stages_table(status), width=200))
    assert name in text


def test_the_end_of_a_run_is_the_table_the_health_and_the_accounting() -> None:
    text = " ".join(" ".join(rendered(report.summary(a_status()))).split())
    at = [
        text.index("Timing, ms a frame"),
        text.index("gaps 11"),
        text.index(report.accounting_line(a_status().accounting)),
    ]
    assert at == sorted(at)


def test_everything_that_status_knows() -> None:
    lines = rendered(report.status_view(a_status()))
    assert lines[0] == "default: running, engine moshi, up 3725.2 s"
    text = " ".join(" ".join(lines).split())
    assert "playback running 4194303" in text
    assert report.health_line(a_status()) in text
