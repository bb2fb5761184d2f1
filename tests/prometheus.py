"""What the tests of `pipeline metrics` share: Prometheus's own programs, and figures as it reads them."""

import os
import shutil
import subprocess
from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, frozenset[tuple[str, str]]]


def require(program: str) -> str:
    """Skip the test where Prometheus's `program` is not there. With CI set, that is a failure."""
    found = shutil.which(program)
    if found is None and os.environ.get("CI"):
        pytest.fail("package prometheus is not installed, and in CI no test is skipped for that")
    if found is None:
        pytest.skip("package prometheus is not installed")
    return found


def promtool(*arguments: str, text: str = "") -> None:
    """Fail the test where promtool has anything to complain of."""
    done = subprocess.run(
        [require("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}{done.stderr}"


def series(text: str) -> dict[Series, float]:
    """Every series of a scrape with its value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    """Of one series of one run; None where there is none."""
    found = [
        number
        for (series_name, pairs), number in series(text).items()
        if series_name == f"pipeline_{name}" and {key: text for key, text in pairs if key != "run"} == labels
    ]
    return found[0] if found else None


def without_variables(expression: str, over: str) -> str:
    """A dashboard's expression with Grafana's variables filled in; rates are taken `over` so long."""
    filled = {"$__rate_interval": over, "$__range": over, "$run": ".*", "$instance": ".*"}
    for variable, text in filled.items():
        expression = expression.replace(variable, text)
    return expression


def expressions(panels: Iterable[dict[str, list[dict[str, str]]]]) -> list[str]:
    """What a dashboard's panels ask."""
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]
