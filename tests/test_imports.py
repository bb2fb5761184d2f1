"""What each program of a run has loaded when it is ready: what it does not need costs its start time and memory.

By real processes, and by the names of modules, not by the clock.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.runs import PIPELINE, Runs

ROOT: Final = Path(__file__).parent.parent
THREADS: Final = "OPENBLAS_NUM_THREADS"

FOR_TERMINALS: Final = {"click", "rich", "textual", "pygments", "prompt_toolkit"}
FOR_MODELS: Final = {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "huggingface_hub", "safetensors", "sphn"}
FOR_FILES: Final = {"soundfile", "soxr", "tomllib"}
FOR_LOOKERS_ON: Final = {"perfetto", "google", "prometheus_client", "hdrh"}
FOR_PLATFORMS: Final = {"platformdirs", "psutil", "subprocess", "asyncio", "tempfile", "shutil"}
OPENSSL: Final = {"hashlib", "_hashlib", "ssl", "_ssl"}

NO_STAGE: Final = FOR_TERMINALS | FOR_MODELS | FOR_FILES | FOR_LOOKERS_ON | FOR_PLATFORMS | OPENSSL
IN_STAGES: Final = {"numpy.random", "pipeline.checkpoints", "pipeline.synthesis", "pipeline.supervisor", "pipeline.cli"}

OPENED: Final = """
import sys
from pipeline.topology import SAMPLE_RATE
from procs import devices
nothing = lambda *_: None
devices.open_input("tone:440", block=480, latency_ms=20, resume_at=0, skew_ppm=0, on_block=nothing, on_end=nothing)
devices.open_output("null", block=480, latency_ms=20, resume=False, on_block=nothing)
"""
FROM_A_FILE: Final = """
import sys
from procs import devices
nothing = lambda *_: None
spec = "file:pipeline/assets/speech.flac"
devices.open_input(spec, block=480, latency_ms=20, resume_at=0, skew_ppm=0, on_block=nothing, on_end=nothing)
"""


def loaded(program: str) -> set[str]:
    """The modules that a process has loaded when it has carried out a program."""
    printed = f"{program}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", printed], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("stage", ["capture", "playback", "inference"])
def test_a_stage_loads_what_it_needs(stage: str) -> None:
    found = loaded(f"import procs.{stage}")
    assert {"numpy", "zmq", "msgspec", "posix_ipc"} <= found
    assert found & (NO_STAGE | IN_STAGES | {"sounddevice"}) == set()


def test_what_stands_in_for_a_device_loads_nothing_more() -> None:
    assert loaded(OPENED) & (NO_STAGE | {"sounddevice"}) == set()


def test_a_file_is_read_by_what_is_loaded_then() -> None:
    found = loaded(FROM_A_FILE)
    assert "soundfile" in found
    assert "sounddevice" not in found


def test_stages_are_started_before_what_they_do_not_wait_for_is_loaded() -> None:
    """`pipeline up`: until the stages are started every import is waited for, later ones are not."""
    found = loaded("import pipeline.cli.talk")
    assert {"click", "pipeline.supervisor"} <= found
    not_yet = {"rich", "psutil", "pipeline.checkpoints", "numpy.random", "importlib.metadata", "tempfile"}
    assert found & (FOR_MODELS | FOR_FILES | FOR_LOOKERS_ON | OPENSSL | not_yet | {"sounddevice"}) == set()


def test_a_run_ends_without_what_only_models_need() -> None:
    """To the end: what is loaded late is loaded all the same, and from there."""
    arguments = ["up", "--engine", "echo", "--input", "tone:440", "--output", "null", "--seconds", "0.5"]
    program = [sys.executable, "-X", "importtime", *PIPELINE[1:], *arguments]
    with Runs() as runs:
        done = subprocess.run(
            program, capture_output=True, text=True, env=runs.environment, cwd=runs.folder, timeout=60, check=False
        )
        assert runs.leftovers() == []
    assert done.returncode == 0, done.stderr
    found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"rich", "psutil", "pipeline.report"} <= found
    assert found & (FOR_MODELS | {"pipeline.checkpoints", "pipeline.synthesis", "soundfile", "textual"}) == set()


def test_blas_starts_threads_only_where_a_model_may_use_them() -> None:
    """numpy's would have nothing to do; that of mlx on a processor has."""
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    with Runs() as runs:
        runs.environment = environment | {"PIPELINE_RUNTIME_DIR": runs.environment["PIPELINE_RUNTIME_DIR"]}
        with runs.up("--engine", "echo", "--input", "tone:440", "--output", "null") as run:
            stages = run.running()["stages"]
            found = {name: psutil.Process(stage["pid"]).environ().get(THREADS) for name, stage in stages.items()}
            run.interrupt()
    assert found == {"capture": "1", "playback": "1", "inference": None}
