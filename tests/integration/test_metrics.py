"""`pipeline metrics` beside real runs, scraped by hand and by a real Prometheus."""

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, Final

from tests import prometheus
from tests.runs import Run, Runs, wait_for

ECHO: Final = ("--engine", "echo", "--input", "tone:440", "--output", "null")
NONE_YET: Final = {"pipeline_drift_ppm"}
"""What a run has no figures of in its first half minute."""


def fetch(url: str) -> str:
    """A page, ten times a second at most: the run has work to do."""
    time.sleep(0.1)
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310  (a server of the test's own)
        return str(answer.read().decode())


def url_of(served: Run) -> str:
    """Where it listens."""
    line = wait_for(lambda: served.out, "its URL")
    found = re.fullmatch(r"figures of the run 'default': (http://127\.0\.0\.1:\d+/metrics)\n", line)
    assert found, line
    return found[1]


@contextmanager
def serving(runs: Runs) -> Iterator[tuple[Run, str]]:
    """`pipeline metrics`, and its URL."""
    with Run(runs, "metrics", ("metrics", "--port", "0")) as served:
        yield served, url_of(served)


SAMPLES: Final = ("captured", "stepped", "dropped", "generated", "played", "skipped", "sent", "concealed")


def growing(status: dict[str, Any]) -> dict[tuple[str, str], float]:
    """What a status tells that never becomes less, by the counter's name and its stage."""
    counts = {(f"{name}_samples_total", ""): status["accounting"][name] for name in SAMPLES}
    counts["gaps_total", ""] = status["accounting"]["gaps"]
    counts["late_frames_total", ""] = status["timing"]["inference"]["late"]
    for name, stage in status["stages"].items():
        counts["frames_total", name] = status["timing"][name]["frames"]
        counts["stage_cpu_seconds_total", name] = stage["cpu_s"]
        counts["stage_restarts_total", name] = stage["restarts"]
        counts["lost_reports_total", name] = stage["lost_reports"]
    return counts


def test_the_figures_are_those_of_status(runs: Runs) -> None:
    with runs.up(*ECHO) as run, serving(runs) as (served, url):
        wait_for(lambda: prometheus.value(fetch(url), "up"), "word of the run")
        before = run.running()
        assert runs.call("send", "mute").returncode == 0
        wait_for(lambda: prometheus.value(fetch(url), "muted"), "word that it is muted")
        scrape, after = fetch(url), run.status()
        least, most = growing(before), growing(after)
        for name, stage in least:
            told = prometheus.value(scrape, name, **({"stage": stage} if stage else {}))
            assert told is not None, name
            assert least[name, stage] <= told <= most[name, stage], name
        for name, found in after["stages"].items():
            assert prometheus.value(scrape, "stage_state", stage=name, state=found["state"]) == 1
            assert (prometheus.value(scrape, "stage_memory_bytes", stage=name) or 0) > 1e6
        assert prometheus.value(scrape, "ring_size_samples") == after["settings"]["ring_seconds"] * 24_000
        assert prometheus.value(scrape, "commands_total", verb="mute", outcome="ok") == 1
        prometheus.promtool("check", "metrics", text=scrape)
        assert run.interrupt() == 0
        wait_for(lambda: prometheus.value(fetch(url), "up") == 0, "word of the end")
        assert served.interrupt() == 0
        assert served.err == ""
    assert runs.leftovers() == []


def test_runs_come_and_go(runs: Runs) -> None:
    with serving(runs) as (served, url):

        def figure(name: str) -> float:
            return prometheus.value(fetch(url), name) or 0

        assert prometheus.value(fetch(url), "up") == 0  # before there is a run
        with runs.up(*ECHO) as run:
            wait_for(lambda: figure("up") and figure("captured_samples_total"), "its figures")
            assert run.interrupt() == 0
        wait_for(lambda: not figure("up"), "word of the end")
        assert figure("captured_samples_total")
        steps = figure("step_seconds_count")
        with runs.up(*ECHO) as run:
            wait_for(lambda: figure("up") and figure("step_seconds_count") > steps, "the next one's")
            run.process.kill()
            wait_for(lambda: not figure("up"), "word that it was killed")
        assert runs.call("down").returncode == 0
        assert served.interrupt() == 0
        assert served.err == ""
    assert runs.leftovers() == []


def test_a_port_that_is_taken(runs: Runs) -> None:
    with serving(runs) as (served, url):
        port = str(urllib.parse.urlsplit(url).port)
        second = runs.call("metrics", "--port", port)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.startswith(f"pipeline: --address 127.0.0.1 --port {port}: cannot be listened on: ")
        assert len(second.stderr.splitlines()) == 1
        assert prometheus.value(fetch(url), "up") == 0  # unharmed
        served.process.terminate()
        assert served.wait() == 0
    assert runs.leftovers() == []


@contextmanager
def prometheus_server(runs: Runs, target: str) -> Iterator[str]:
    """Prometheus with the alerts, which scrapes `target` each second; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(resources.files("pipeline") / "assets" / "alerts.yml")],
        "scrape_configs": [{"job_name": "pipeline", "static_configs": [{"targets": [target]}]}],
    }
    file = runs.folder / "prometheus.yml"
    file.write_text(json.dumps(config))
    program = [prometheus.require("prometheus"), f"--config.file={file}", f"--web.listen-address={address}"]
    with (runs.folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [*program, f"--storage.tsdb.path={runs.folder / 'tsdb'}"], stdout=log, stderr=log, cwd=runs.folder
        )
    try:
        yield f"http://{address}/api/v1"
    finally:
        server.terminate()
        server.wait()


def ask(api: str, path: str, **values: str) -> Any:
    """The data that Prometheus answers with; None while it cannot."""
    try:
        answer = json.loads(fetch(f"{api}/{path}?{urllib.parse.urlencode(values)}"))
    except OSError:
        return None
    assert answer["status"] == "success"
    return answer["data"]


def test_prometheus_answers_every_panel_of_the_dashboard(runs: Runs) -> None:
    panels = json.loads((resources.files("pipeline") / "assets" / "grafana.json").read_text(encoding="utf-8"))["panels"]
    expressions = [prometheus.without_variables(asked, "10s") for asked in prometheus.expressions(panels)]
    empty = {asked for asked in expressions if any(name in asked for name in NONE_YET)}
    with (
        runs.up(*ECHO) as run,
        serving(runs) as (_, url),
        prometheus_server(runs, urllib.parse.urlsplit(url).netloc) as api,
    ):
        wait_for(lambda: prometheus.value(fetch(url), "up"), "word of the run")
        run.running()
        assert runs.call("send", "unmute").returncode == 0

        def unanswered() -> set[str]:
            found = {asked: ask(api, "query", query=asked) for asked in expressions}
            return {asked for asked, data in found.items() if not (data and data["result"])}

        wait_for(lambda: unanswered() <= empty, "an answer to every panel")
        rules = ask(api, "rules")["groups"][0]["rules"]
        assert [(rule["name"], rule["health"]) for rule in rules if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
