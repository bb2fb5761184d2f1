"""`pipeline models` and `pipeline doctor`, as a user calls them."""

import contextlib
import json
import os
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.layout import CONFIG_FILE, MIMI_FILE, QUALITIES, TOKENIZER_FILE
from tests.hub_server import serve
from tests.runs import PIPELINE, Runs

REPO = "someone/tiny-moshi-mlx-q4"
Q4_FILE = QUALITIES["q4"].file
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
    with serve({REPO: model}) as hub:
        runs.environment["HF_ENDPOINT"] = hub.endpoint
        pulled = runs.call("models", "pull", REPO)
        assert pulled.returncode == 0, pulled.stderr
        assert pulled.stdout.endswith(": complete\n")
        commit = hub.repositories[REPO].refs["main"]
        told = pulled.stderr.splitlines()
        assert told[0] == f"{REPO}, q4, main at {commit}:"
        assert [line.split()[0] for line in told[1:5]] == [CONFIG_FILE, Q4_FILE, MIMI_FILE, TOKENIZER_FILE]
        assert told[5].startswith("  to fetch: ")
        assert len(told) == 6  # a progress bar is for terminals
    runs.environment["HF_ENDPOINT"] = NOWHERE
    options = ("--model", REPO, "--input", "silence", "--output", "null", "--seconds", "0.5")
    answered = runs.call("up", *options)
    assert answered.returncode == 0, answered.stderr
    rows = json.loads(runs.call("models", "list", "--json").stdout)
    assert [(row["revision"], row["commit"]) for row in rows if row["folder"]] == [("main", commit)]
    assert f"main at {commit[:12]}" in runs.call("models", "list").stdout


def test_interrupted_it_goes_on(runs: Runs, model: Path) -> None:
    """On a real loss of the connection, 10 MB at most are fetched again: less than what breaks here."""
    size = (model / Q4_FILE).stat().st_size
    with (model / Q4_FILE).open("r+b") as file:
        file.truncate(size + 30_000_000)
    with serve({REPO: model}) as hub:
        runs.environment["HF_ENDPOINT"] = hub.endpoint
        hub.breaks = [25_000_000, *[0] * 20]
        broken = runs.call("models", "pull", REPO)
        assert broken.returncode == 2
        assert broken.stderr.splitlines()[-1].endswith("the hub cannot be reached: check the network, and try again")
        assert "Traceback" not in broken.stderr
        hub.breaks = []
        hub.requests.clear()
        again = runs.call("models", "pull", REPO)
        assert "21.0 MB here" in again.stderr
        assert [request.start for request in hub.requests if request.file == Q4_FILE] == [20 << 20]
        # What was made long for this test is not what its header tells.
        assert again.returncode == 2
        assert "is too long" in again.stderr.splitlines()[-1]


def test_on_a_terminal_there_is_a_progress_bar(runs: Runs, model: Path) -> None:
    with serve({REPO: model}) as hub:
        runs.environment["HF_ENDPOINT"] = hub.endpoint
        screen, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (24, 120))
        try:
            subprocess.run(
                [*PIPELINE, "models", "pull", REPO], env=runs.environment, cwd=runs.folder, stderr=terminal, check=True
            )
            os.close(terminal)
            shown = b""
            with contextlib.suppress(OSError):  # how a terminal ends
                while chunk := os.read(screen, 1 << 16):
                    shown += chunk
        finally:
            os.close(screen)
    assert b"100%|" in shown


def test_verify(runs: Runs, model: Path) -> None:
    with serve({REPO: model}) as hub:
        runs.environment["HF_ENDPOINT"] = hub.endpoint
        assert runs.call("models", "pull", REPO).returncode == 0
    runs.environment["HF_ENDPOINT"] = NOWHERE
    whole = runs.call("models", "verify", REPO)
    assert whole.returncode == 0, whole.stderr
    assert [line.split() for line in whole.stdout.splitlines()] == [
        ["ok", name, "by", "its", "hash"] for name in (CONFIG_FILE, Q4_FILE, MIMI_FILE, TOKENIZER_FILE)
    ]
    assert runs.call("models", "verify", str(model)).returncode == 0
    cached = next((runs.folder / "hub").rglob(f"snapshots/*/{Q4_FILE}")).resolve()
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.write_bytes(content)
    damaged = runs.call("models", "verify", REPO, "--json")
    assert damaged.returncode == 1
    assert {row["file"]: row["state"] for row in json.loads(damaged.stdout)} == {
        CONFIG_FILE: "ok",
        Q4_FILE: "damaged",
        MIMI_FILE: "ok",
        TOKENIZER_FILE: "ok",
    }
    nothing = runs.call("models", "verify", "moshika")
    assert nothing.returncode == 2
    assert "kyutai/moshika-mlx-q4 is not downloaded (5.2 GB), run: pipeline models pull" in nothing.stderr


def test_no_network_is_one_line(runs: Runs) -> None:
    for arguments, repo in (((), "moshiko-mlx-q4"), (("moshika", "--quality", "q8"), "moshika-mlx-q8")):
        pulled = runs.call("models", "pull", *arguments)
        assert pulled.returncode == 2
        assert pulled.stderr.splitlines() == [
            f"pipeline: model kyutai/{repo}: the hub cannot be reached: check the network, and try again"
        ]


def test_a_repository_that_is_not_there_or_is_no_checkpoint(runs: Runs) -> None:
    empty = runs.folder / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing here")
    with serve({"someone/empty": empty}) as hub:
        runs.environment["HF_ENDPOINT"] = hub.endpoint
        for arguments, line in (
            (("someone/empty",), "pipeline: model someone/empty: has no model.q4.safetensors, "),
            (("someone/else",), "pipeline: model someone/else: is not on the hub, or not for everyone: "),
            (("someone/empty", "--revision", "v9"), "pipeline: model someone/empty: has no revision 'v9': "),
            (("not a repository",), "pipeline: 'not a repository' is neither a folder nor a repository "),
            (("kyutai/moshika-mlx-q8", "--quality", "q4"), "pipeline: kyutai/moshika-mlx-q8 holds q8: use --quality"),
        ):
            pulled = runs.call("models", "pull", *arguments)
            assert pulled.returncode == 2
            assert pulled.stderr.startswith(line)
            assert len(pulled.stderr.splitlines()) == 1


def test_list(runs: Runs) -> None:
    rows = json.loads(runs.call("models", "list", "--json").stdout)
    assert [(row["quality"], row["repo"], row["folder"], row["commit"]) for row in rows] == [
        (quality, f"kyutai/{voice}-mlx-{quality}", "", "")
        for voice in ("moshiko", "moshika")
        for quality in ("q4", "q8", "bf16")
    ]
    assert "not downloaded: `pipeline models pull kyutai/moshika-mlx-q4`" in runs.call("models", "list").stdout


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
