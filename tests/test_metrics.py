"""pipeline.metrics: what events become, as Prometheus reads it; the dashboard, alerts and document that use it."""

import contextlib
import http.client
import itertools
import json
import re
import socket
import struct
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from prometheus_client import generate_latest

from pipeline import messages, metrics
from pipeline.config import Config
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import (
    Accounting,
    CommandRecord,
    Event,
    RunRecord,
    RunState,
    Spread,
    StageSpread,
    StageState,
    StageStatus,
    StatusRecord,
    StatusReport,
    Timing,
    TimingRecord,
    Xruns,
)
from pipeline.metrics import FRESH_S, RECENT_FRAMES, Figures
from pipeline.timing import NS_PER_MS, NS_PER_S
from pipeline.topology import StageName
from tests import prometheus
from tests.prometheus import promtool

ROOT: Final = Path(__file__).parent.parent
ASSETS: Final = resources.files("pipeline") / "assets"
NOW_NS: Final = 1_000 * NS_PER_S


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


def status(pid: int = 1, state: RunState = "running", drift_ppm: float | None = 12.5) -> StatusReport:
    """A run's, in which no two figures are the same."""
    return StatusReport(
        name="t",
        pid=pid,
        muted=True,
        paused=False,
        state=state,
        engine="moshi",
        uptime_s=30.5,
        time_ns=NOW_NS,
        recording=None,
        settings=Config(ring_seconds=20),
        stages={
            "capture": StageStatus(state="running", pid=2, restarts=0, device_latency_ms=11, memory_mb=50, cpu_s=1.5),
            "inference": StageStatus(state="backoff", pid=None, restarts=3, lost_reports=4),
            "playback": StageStatus(state="ready", pid=4, restarts=1, device_latency_ms=22),
        },
        accounting=Accounting(
            captured=201,
            stepped=202,
            dropped=203,
            waiting_in=204,
            generated=205,
            played=206,
            skipped=207,
            waiting_out=208,
            sent=209,
            concealed=210,
            gaps=211,
            cleaned=212,
            cleaned_answers=213,
        ),
        timing=Timing(
            capture=Spread(frames=101),
            inference=StageSpread(frames=102, late=5),
            playback=Spread(frames=103),
            mic_to_speaker_ms=Spread(),
        ),
        xruns=Xruns(capture=6, playback=7),
        drift_ppm=drift_ppm,
    )


def frame(stage: StageName = "inference", duration_ms: float = 1.0, **fields: Any) -> TimingRecord:
    return TimingRecord(stage=stage, frame=0, start_ns=0, end_ns=round(duration_ms * NS_PER_MS), queued=0, **fields)


def command(verb: str, ok: bool = True) -> CommandRecord:
    return CommandRecord(verb=verb, ok=ok, start_ns=0, end_ns=1)


def stopped() -> RunRecord:
    return RunRecord(name="t", pid=1, state="stopped", muted=False, paused=False, engine="moshi", time_ns=NOW_NS)


def heard(*events: Event, clock: Clock | None = None) -> Figures:
    figures = Figures("t", clock or Clock())
    for event in events:
        figures.take(messages.encode(event))
    return figures


def text(figures: Figures) -> str:
    return generate_latest(figures.registry).decode()


def everything() -> str:
    """A scrape in which every series is."""
    frames = [frame("capture"), frame("inference", context=1), frame("playback", mic_to_speaker_ms=200)]
    return text(heard(StatusRecord(status=status()), *frames, command("mute")))


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("up", {}, 1),
        ("frames_total", {"stage": "capture"}, 101),
        ("frames_total", {"stage": "inference"}, 102),
        ("frames_total", {"stage": "playback"}, 103),
        ("late_frames_total", {}, 5),
        ("gaps_total", {}, 211),
        ("xruns_total", {"stage": "capture"}, 6),
        ("xruns_total", {"stage": "playback"}, 7),
        ("captured_samples_total", {}, 201),
        ("stepped_samples_total", {}, 202),
        ("dropped_samples_total", {}, 203),
        ("generated_samples_total", {}, 205),
        ("played_samples_total", {}, 206),
        ("skipped_samples_total", {}, 207),
        ("sent_samples_total", {}, 209),
        ("concealed_samples_total", {}, 210),
        ("cleaned_samples_total", {"stage": "capture"}, 212),
        ("cleaned_samples_total", {"stage": "playback"}, 213),
        ("waiting_samples", {"ring": "capture"}, 204),
        ("waiting_samples", {"ring": "playback"}, 208),
        ("ring_size_samples", {}, 480_000),
        ("stage_restarts_total", {"stage": "inference"}, 3),
        ("lost_reports_total", {"stage": "inference"}, 4),
        ("stage_cpu_seconds_total", {"stage": "capture"}, 1.5),
        ("stage_memory_bytes", {"stage": "capture"}, 50 * 1024 * 1024),
        ("device_latency_seconds", {"stage": "capture"}, 0.011),
        ("device_latency_seconds", {"stage": "playback"}, 0.022),
        ("run_info", {"engine": "moshi", "quality": "q4"}, 1),
        ("uptime_seconds", {}, 30.5),
        ("muted", {}, 1),
        ("paused", {}, 0),
        ("recording", {}, 0),
        ("drift_ppm", {}, 12.5),
    ],
)
def test_what_a_run_tells_of_itself(name: str, labels: dict[str, str], expected: float) -> None:
    assert prometheus.value(text(heard(StatusRecord(status=status()))), name, **labels) == expected


def test_every_series_names_the_run() -> None:
    found = prometheus.series(everything())
    assert len(found) > 100
    assert all(("run", "t") in labels for _, labels in found)


def test_a_state_is_one_of_all() -> None:
    scrape = text(heard(StatusRecord(status=status())))
    for stage, state in (("capture", "running"), ("inference", "backoff"), ("playback", "ready")):
        values = {s: prometheus.value(scrape, "stage_state", stage=stage, state=s) for s in get_args(StageState)}
        assert values == {s: float(s == state) for s in get_args(StageState)}
    assert [prometheus.value(scrape, "run_state", state=s) for s in get_args(RunState)] == [0, 1, 0, 0]


def test_drift_that_is_not_known_is_no_figure() -> None:
    assert prometheus.value(text(heard(StatusRecord(status=status(drift_ppm=None)))), "drift_ppm") is None


def test_before_the_run_is_up() -> None:
    scrape = text(heard())
    assert prometheus.series(scrape) == {("pipeline_up", frozenset({("run", "t")})): 0}
    promtool("check", "metrics", text=scrape)


def test_after_its_end_counters_stay_and_gauges_go() -> None:
    scrape = text(heard(StatusRecord(status=status()), frame("playback"), stopped()))
    assert prometheus.value(scrape, "up") == 0
    assert prometheus.value(scrape, "played_samples_total") == 206
    gauges = {f"pipeline_{figure.name}" for figure in metrics.GAUGES}
    assert gauges.isdisjoint(name for name, _ in prometheus.series(scrape))


def test_a_run_that_falls_silent_is_not_up() -> None:
    clock = Clock()
    figures = heard(StatusRecord(status=status()), clock=clock)
    clock.now_ns += int(FRESH_S * NS_PER_S) - 1
    assert prometheus.value(text(figures), "up") == 1
    clock.now_ns += 1
    assert prometheus.value(text(figures), "up") == 0


def test_the_next_run_goes_on_without_the_last_ones_levels() -> None:
    figures = heard(StatusRecord(status=status()), frame("capture", level_dbfs=-20.0), stopped())
    figures.take(messages.encode(StatusRecord(status=status(pid=2))))
    scrape = text(figures)
    assert prometheus.value(scrape, "up") == 1
    assert prometheus.value(scrape, "level_dbfs", stage="capture") is None


def test_steps_are_counted_around_80_ms() -> None:
    scrape = text(heard(*(frame(duration_ms=ms, encode_ms=3, step_ms=40, decode_ms=7) for ms in (72, 79, 81, 9_000))))
    buckets = {le: prometheus.value(scrape, "step_seconds_bucket", le=le) for le in ("0.07", "0.08", "0.085", "+Inf")}
    assert buckets == {"0.07": 0, "0.08": 2, "0.085": 3, "+Inf": 4}
    assert prometheus.value(scrape, "step_seconds_sum") == pytest.approx(9.232)
    sums = [prometheus.value(scrape, "step_part_seconds_sum", part=part) for part in ("encode", "model", "decode")]
    assert sums == pytest.approx([0.012, 0.16, 0.028])


def test_latency_is_of_what_was_played() -> None:
    scrape = text(heard(frame("playback", mic_to_speaker_ms=195), frame("capture"), frame()))
    assert prometheus.value(scrape, "mic_to_speaker_seconds_count") == 1
    assert prometheus.value(scrape, "mic_to_speaker_seconds_bucket", le="0.18") == 0
    assert prometheus.value(scrape, "mic_to_speaker_seconds_bucket", le="0.2") == 1


def test_levels_are_those_of_the_last_ten_seconds() -> None:
    loud = frame("capture", level_dbfs=-3.0, peak_dbfs=0.0)
    halves = [frame("capture", level_dbfs=dbfs, peak_dbfs=dbfs + 3) for dbfs in (-20.0, -120.0)]
    recent = list(itertools.islice(itertools.cycle(halves), RECENT_FRAMES - 1))
    scrape = text(heard(StatusRecord(status=status()), loud, *recent, halves[0]))
    assert prometheus.value(scrape, "level_dbfs", stage="capture") == pytest.approx(-23, abs=0.1)  # half of the power
    assert prometheus.value(scrape, "peak_dbfs", stage="capture") == -17
    assert prometheus.value(scrape, "level_dbfs", stage="playback") is None


def test_context_and_prebuffer_are_the_last_frames() -> None:
    frames = [frame(context=c, context_size=3_000) for c in (7, 8)] + [frame("playback", prebuffer_ms=40)]
    scrape = text(heard(StatusRecord(status=status()), *frames))
    assert prometheus.value(scrape, "context_frames") == 8
    assert prometheus.value(scrape, "context_size_frames") == 3_000
    assert prometheus.value(scrape, "prebuffer_seconds") == 0.04


def test_commands_are_counted_by_verbs_that_there_are() -> None:
    scrape = text(heard(command("mute"), command("mute"), command("mute", ok=False), command("x" * 99, ok=False)))
    assert prometheus.value(scrape, "commands_total", verb="mute", outcome="ok") == 2
    assert prometheus.value(scrape, "commands_total", verb="mute", outcome="error") == 1
    assert prometheus.value(scrape, "commands_total", verb="unknown", outcome="error") == 1


@pytest.mark.parametrize("data", [b"", b"{", b'{"type":"status"}', b'{"type":"of the future"}'])
def test_an_event_of_another_version_is_one_line(data: bytes) -> None:
    with pytest.raises(ControlError, match=r"is not understood .*: is the run of another version") as error:
        heard().take(data)
    assert "\n" not in str(error.value)


def test_promtool_has_no_complaint() -> None:
    promtool("check", "metrics", text=everything())


# The server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server that has heard of a run."""
    with metrics.serving(heard(StatusRecord(status=status())), "127.0.0.1", 0) as url:
        yield port_of(url)


def port_of(url: str) -> int:
    return int(url.removesuffix("/metrics").rpartition(":")[2])


def answer(port: int, method: str = "GET", body: bytes | None = None) -> tuple[http.client.HTTPResponse, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, "/metrics", body=body)
        response = connection.getresponse()
        return response, response.read().decode()


def test_a_scrape(port: int) -> None:
    response, scrape = answer(port)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert prometheus.value(scrape, "captured_samples_total") == 201


@pytest.mark.parametrize(("method", "body"), [("POST", b"x"), ("PUT", b"x"), ("DELETE", None), ("HEAD", None)])
def test_there_is_nothing_but_to_read(port: int, method: str, body: bytes | None) -> None:
    assert answer(port, method, body)[0].status == 405


@pytest.mark.parametrize(
    "said", [b"", b"\r\n", b"\x16\x03\x01\x00\xff" * 50, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000]
)
def test_bad_requests_do_nothing(port: int, said: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
        peer.sendall(said)
    assert answer(port)[0].status == 200
    assert capfd.readouterr() == ("", "")


def test_one_who_does_not_ask_keeps_nobody_waiting(port: int) -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", port))):
        assert answer(port)[0].status == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_address_of_ipv6() -> None:
    with metrics.serving(heard(), "::1", 0) as url:
        assert url.startswith("http://[::1]:")
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310  (its own)
            assert answer.status == 200


def test_a_port_that_is_taken_is_one_line(port: int) -> None:
    with pytest.raises(ConfigError) as error, metrics.serving(heard(), "127.0.0.1", port):
        pass
    assert str(error.value) == (
        f"--address 127.0.0.1 --port {port}: cannot be listened on: Address already in use; "
        "choose another --address or --port"
    )


@pytest.mark.parametrize("address", ["", "256.1.1.1", "a" * 80, "192.0.2.1"])
def test_an_address_that_is_not_ours_is_one_line(address: str) -> None:
    line = r"^--address .* --port 0: cannot be listened on: "
    with pytest.raises(ConfigError, match=line) as error, metrics.serving(heard(), address, 0):
        pass
    assert "\n" not in str(error.value)


# What uses the figures


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ASSETS / "grafana.json").read_text(encoding="utf-8"))
    return found


def names(expression: str) -> set[str]:
    """Of the figures that an expression asks for."""
    return set(re.findall(r"\bpipeline_\w+", expression))


def served_names() -> set[str]:
    return {name for name, _ in prometheus.series(everything())}


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    asked = set().union(*(names(expression) for expression in prometheus.expressions(dashboard()["panels"])))
    queries = [variable["query"]["query"] for variable in dashboard()["templating"]["list"]]
    assert asked.union(*map(names, queries)) <= served_names()
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served_names()}
    assert bases - {re.sub(r"_bucket$", "", name) for name in asked} == {"pipeline_run_info", "pipeline_run_state"}


def test_the_dashboard_imports_with_any_datasource() -> None:
    found = dashboard()
    assert [given["name"] for given in found["__inputs"]] == ["DS_PROMETHEUS"]
    assert found["schemaVersion"] >= 36
    assert found["id"] is None
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    charts = [panel for panel in found["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"] == source for panel in charts)
    assert all(target["datasource"] == source for panel in charts for target in panel["targets"])
    assert all(panel["title"] and panel["description"] for panel in charts)
    assert {panel["type"] for panel in charts} == {
        needed["id"] for needed in found["__requires"] if needed["type"] == "panel"
    }
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])


def test_no_two_panels_lie_on_each_other() -> None:
    taken: list[tuple[int, int]] = []
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        taken += itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    assert len(set(taken)) == len(taken)
    assert all(0 <= x < 24 for x, _ in taken)


def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    """As rules, which promtool reads."""
    asked = [prometheus.without_variables(e, "5m") for e in prometheus.expressions(dashboard()["panels"])]
    rules = [{"record": f"x:{number}", "expr": expression} for number, expression in enumerate(asked)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_the_alerts() -> None:
    """promtool reads them, and plays the histories in tests/alerts.yml through them."""
    promtool("check", "rules", str(ASSETS / "alerts.yml"))
    promtool("test", "rules", str(ROOT / "tests" / "alerts.yml"))


def test_the_alerts_ask_for_figures_that_there_are() -> None:
    told = (ASSETS / "alerts.yml").read_text(encoding="utf-8")
    assert names(told) <= served_names() | {"pipeline_step_seconds"}
    assert told.count("- alert:") == told.count("for: ") == told.count("severity: ") == told.count("description: ")


def test_the_document_tells_of_every_figure_and_no_other() -> None:
    told = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line for line in told.splitlines() if line.startswith("| `pipeline_")]
    expected = []
    for family in heard(StatusRecord(status=status()), frame(), frame("playback"), command("mute")).registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        own = ", ".join(label for label in labels if label not in ("run", "le"))
        expected.append(f"| `{name}` | {family.type} | {own} | {family.documentation} |")
    assert rows == expected
