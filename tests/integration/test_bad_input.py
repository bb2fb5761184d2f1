"""What a user may get wrong: one clear line, a code that is not 0, and nothing lost or left behind."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.runs import Runs, noise, write_wav

FILES = ("--engine", "echo", "--output", "null")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    with Runs() as runs:
        made = runs.call("models", "synth", str(folder), "--quality", "q4")
        assert made.returncode == 0, made.stderr
    return folder


def refusal(runs: Runs, *arguments: str) -> str:
    """The one line with which `pipeline ARGUMENTS` refuses."""
    done = runs.call(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pipeline: ")
    assert runs.leftovers() in ([], ["default"])
    return lines[0].removeprefix("pipeline: ")


def up(runs: Runs, source: str) -> str:
    return refusal(runs, "up", *FILES, "--input", source)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engin = 'echo'", "engin: unknown key; expected one of engine, quality, model, seconds, ring_seconds, "),
        ("[capture]\nblok_ms = 5", "capture.blok_ms: unknown key; expected one of input, block_ms, latency_ms"),
        ("ring_seconds = 'long'", "ring_seconds = 'long': expected `float`, got `str`"),
        ("engine = 'mosh'", "engine = 'mosh': expected one of moshi, echo"),
        ("[playback]\nblock_ms = 500", "playback.block_ms = 500: expected `float` <= 80.0"),
        ("engine = ", "not TOML: Invalid value (at end of document)"),
    ],
)
def test_settings(runs: Runs, text: str, line: str) -> None:
    path = runs.config(text)
    assert refusal(runs, "up", "--config", str(path)).startswith(f"{path}: {line}")


def test_settings_that_are_not_there(runs: Runs) -> None:
    assert refusal(runs, "up", "--config", "nowhere.toml") == "nowhere.toml: No such file or directory"


def test_a_missing_sound_file(runs: Runs) -> None:
    assert up(runs, "file:nowhere.wav") == "capture: input file:nowhere.wav: no such file"


def test_a_sound_file_with_no_samples(runs: Runs) -> None:
    path = write_wav(runs.folder / "empty.wav", np.zeros(0, np.float32))
    assert up(runs, f"file:{path}") == f"capture: input file:{path}: holds 0 samples; expected at least 1"


def test_a_text_file_named_wav(runs: Runs) -> None:
    path = runs.folder / "text.wav"
    path.write_text("It was the best of times.\n")
    assert up(runs, f"file:{path}").startswith(f"capture: input file:{path}: not a sound file: ")


def test_a_folder_as_sound_file(runs: Runs) -> None:
    assert up(runs, f"file:{runs.folder}").startswith(f"capture: input file:{runs.folder}: not a sound file")


@pytest.mark.parametrize("spec", ["microphone", "tone:loud", "tone:-1", "file:", ""])
def test_an_input_that_is_none(runs: Runs, spec: str) -> None:
    assert "expected" in up(runs, spec)


@pytest.mark.parametrize("spec", ["speaker", "file:out.xyz", "file:/nowhere/out.wav"])
def test_an_output_that_is_none(runs: Runs, spec: str) -> None:
    line = refusal(runs, "up", "--engine", "echo", "--input", "silence", "--output", spec)
    assert line.startswith("playback: output ")


def test_an_unknown_device_is_named_beside_those_that_are_there(runs: Runs) -> None:
    line = up(runs, "device:Nowhere 9000")
    assert line.startswith("capture: input device:Nowhere 9000: not found; input devices here: ")


def test_no_portaudio_library(runs: Runs) -> None:
    """The dynamic loader is made to find none; what needs no device still runs."""
    hidden = runs.folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import ctypes.util\nctypes.util.find_library = lambda name: None\n")
    runs.environment["PYTHONPATH"] = str(hidden)
    line = up(runs, "device")
    assert line.startswith("capture: the PortAudio library is missing (")
    assert "install it with `apt-get install libportaudio2`" in line or "brew install portaudio" in line
    fine = runs.call("up", *FILES, "--input", "silence", "--seconds", "0.3")
    assert fine.returncode == 0, fine.stderr
    assert refusal(runs, "devices").startswith("the PortAudio library is missing")


def test_no_model_and_no_network(runs: Runs) -> None:
    line = refusal(runs, "up", "--input", "silence", "--output", "null")
    assert line.startswith("kyutai/moshiko-mlx-q4 is not downloaded (5.2 GB)")
    assert "pipeline models pull kyutai/moshiko-mlx-q4" in line


def test_a_folder_that_is_no_checkpoint(runs: Runs) -> None:
    empty = runs.folder / "empty"
    empty.mkdir()
    line = refusal(runs, "up", "--model", str(empty), "--input", "silence", "--output", "null")
    assert str(empty) in line
    assert "model.q4.safetensors" in line


def test_a_truncated_checkpoint(runs: Runs, model: Path) -> None:
    copy = runs.folder / "cut"
    shutil.copytree(model, copy)
    weights = copy / "model.q4.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) - 1_000])
    line = refusal(runs, "up", "--model", str(copy), "--input", "silence", "--output", "null")
    assert str(weights) in line
    assert str(len(data)) in line  # what was expected
    assert str(len(data) - 1_000) in line  # what is there


def test_a_checkpoint_of_another_quality(runs: Runs, model: Path) -> None:
    copy = runs.folder / "other"
    shutil.copytree(model, copy)
    (copy / "model.q4.safetensors").rename(copy / "model.q8.safetensors")
    line = refusal(runs, "up", "--model", str(copy), "--quality", "q8", "--input", "silence", "--output", "null")
    assert "q4" in line


def test_weights_that_are_not_there_are_not_zeros(runs: Runs, model: Path) -> None:
    """The header says where every tensor ends; a file that only claims so is refused."""
    copy = runs.folder / "claims"
    shutil.copytree(model, copy)
    weights = copy / "model.q4.safetensors"
    data = weights.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("out_norm.weight")
    packed = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])
    line = refusal(runs, "up", "--model", str(copy), "--input", "silence", "--output", "null")
    assert "leaves a gap before it" in line


def test_unknown_words_on_the_command_line(runs: Runs) -> None:
    line = refusal(runs, "up", "--loud")
    assert line.startswith("No such option '--loud'")
    assert line.endswith("See `pipeline up --help`.")
    assert refusal(runs, "sing").startswith("No such command 'sing'")
    assert "'q5' is not one of" in refusal(runs, "up", "--quality", "q5")
    assert "expected 1 to 32 letters" in refusal(runs, "up", *FILES, "--input", "silence", "--name", "../up")
    assert refusal(runs, "up", *FILES, "--input", "silence", "--seconds", "-1").startswith("command line: seconds = -1")


def test_a_run_that_is_refused_does_not_touch_what_was_recorded(runs: Runs) -> None:
    """The output file of an earlier run survives a run that cannot begin."""
    kept = write_wav(runs.folder / "kept.wav", noise(0.5))
    before = kept.read_bytes()
    refusal(runs, "up", "--engine", "echo", "--input", "file:nowhere.wav", "--output", f"file:{kept}")
    assert kept.read_bytes() == before
