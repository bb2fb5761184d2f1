"""`pipeline models` and `pipeline doctor`, as a user calls them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import serve
from tests.runs import Runs

REPO = "someone/tiny-moshi-mlx-q4"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def runs() -> Iterator[Runs]:
    with Runs() as made:
        made.environment["HF_HOME"] = str(made.folder / "hub")
        made.environment["HF_ENDPOINT"] = NOWHERE
        yield made


@pytest.fixture
def model(runs: Runs) -> Path:
    folder = runs.folder / "model"
    made = runs.call("models", "synth", str(folder), "--quality", "q4")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"{folder}: tiny, q4, ")
    return folder


def test_pulled_once_it_runs_with_no_network(runs: Runs, model: Path) -> None:
    with serve({REPO: model}) as endpoint:
        runs.environment["HF_ENDPOINT"] = endpoint
        pulled = runs.call("models", "pull", REPO)
        assert pulled.returncode == 0, pulled.stderr
        assert pulled.stdout.endswith(": complete\n")
    runs.environment["HF_ENDPOINT"] = NOWHERE
    options = ("--model", REPO, "--input", "silence", "--output", "null", "--seconds", "0.5")
    answered = runs.call("up", *options)
    assert answered.returncode == 0, answered.stderr


def test_no_network_is_one_line(runs: Runs) -> None:
    pulled = runs.call("models", "pull")
    assert pulled.returncode == 2
    assert pulled.stderr.splitlines()[-1] == (
        "pipeline: model kyutai/moshiko-mlx-q4: the hub cannot be reached: check the network, and try again"
    )
    assert "Traceback" not in pulled.stderr


def test_a_repository_that_is_not_there_or_is_no_checkpoint(runs: Runs) -> None:
    empty = runs.folder / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing here")
    with serve({"someone/empty": empty}) as endpoint:
        runs.environment["HF_ENDPOINT"] = endpoint
        for repo in ("someone/empty", "someone/else", "not a repository"):
            pulled = runs.call("models", "pull", repo)
            assert pulled.returncode == 2
            assert pulled.stderr.splitlines()[-1].startswith(
                f"pipeline: model {repo!r}: " if " " in repo else "pipeline: model "
            )
            assert "Traceback" not in pulled.stderr


def test_list(runs: Runs) -> None:
    rows = json.loads(runs.call("models", "list", "--json").stdout)
    assert [(row["quality"], row["repo"], row["folder"]) for row in rows] == [
        (quality, f"kyutai/moshiko-mlx-{quality}", "") for quality in ("q4", "q8", "bf16")
    ]
    assert "not downloaded: `pipeline models pull kyutai/moshiko-mlx-q4`" in runs.call("models", "list").stdout


def test_synth_refuses_to_overwrite(runs: Runs, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    again = runs.call("models", "synth", str(model), "--quality", "q4")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def findings(runs: Runs, *options: str) -> tuple[int, dict[str, Any]]:
    done = runs.call("doctor", "--json", *options)
    return done.returncode, {finding["what"]: finding for finding in json.loads(done.stdout)}


def test_the_doctor_finds_nothing_wrong_with_what_needs_little(runs: Runs, model: Path) -> None:
    options = ("--input", "silence", "--output", "null")
    code, found = findings(runs, "--engine", "echo", *options)
    assert code == 0, found
    assert {f["state"] for f in found.values()} <= {"ok", "note"}
    code, found = findings(runs, "--model", str(model), *options)
    assert code == 0, found
    assert found["checkpoint"]["found"] == f"{model}, q4"


def test_the_doctor_says_what_to_do(runs: Runs) -> None:
    dead = runs.folder / "run" / "dead"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (runs.folder / "run" / "holiday pictures").mkdir()  # no run's: not to be cleared
    code, found = findings(runs)
    assert code == 1
    assert "pipeline models pull kyutai/moshiko-mlx-q4" in found["checkpoint"]["found"]
    assert found["runtime folder"]["advice"] == "Clear them with `pipeline down --name dead`"
    told = runs.call("doctor")
    assert len(told.stdout.splitlines()) == len(found)


def test_the_doctor_without_audio(runs: Runs) -> None:
    """No sound server is up here: PortAudio finds no device."""
    runs.environment |= {"PULSE_SERVER": "unix:/nowhere"}
    code, found = findings(runs, "--engine", "echo")
    assert code == 1
    assert found["audio"]["state"] == "wrong"
    assert "use --input file:PATH --output file:PATH" in found["audio"]["advice"]
