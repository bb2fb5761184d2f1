"""What a run needs, looked at one by one: what is there, and what to do about what is wrong."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from msgspec import Struct

from pipeline import budget, checkpoints, chips, packages, runtime
from pipeline.config import Config
from pipeline.errors import DeviceError, PipelineError
from pipeline.headers import read_header
from pipeline.layout import QUALITIES
from pipeline.runtime import RunFolder
from pipeline.topology import FRAME_MS, RINGS, SAMPLE_RATE

_GB: Final = 1e9
_WORKING_GB: Final = 2.5
"""What the model needs besides its weights: the KV cache at full context (1.6 GB), Mimi, and the rest."""

_PROBE_S: Final = 30

_ASK_MLX: Final = "import mlx.core as mx; print(mx.default_device())"

_WITHOUT_DEVICES: Final = "Without devices use --input file:PATH --output file:PATH"


class Finding(Struct, kw_only=True):
    """One line of the doctor's."""

    what: str
    state: Literal["ok", "note", "wrong"]
    found: str
    advice: str = ""


def audio_devices() -> dict[str, Any]:
    """What PortAudio knows, asked in another process. Raises DeviceError."""
    probe = [sys.executable, "-P", "-m", "procs.devices"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"PortAudio did not list its devices within {_PROBE_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DeviceError(f"PortAudio was ended by {name} when it looked for devices: is ALSA's configuration whole?")
    if done.returncode:
        raise DeviceError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def examine(config: Config, name: str) -> list[Finding]:
    """Everything, in the order in which a run needs it."""
    looks: list[Callable[[Config, str], Finding]] = [
        _python, _packages, _mlx, _audio, _scheduling, _memory, _speed, _shared_memory, _folder, _checkpoint,
    ]  # fmt: skip
    return [look(config, name) for look in looks]


def _python(config: Config, name: str) -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding(
        what="Python",
        state="ok" if good else "wrong",
        found=found,
        advice="" if good else "Use 3.11, 3.12 or 3.13: rustymimi 0.4.1 has no wheel for others",
    )


def _packages(config: Config, name: str) -> Finding:
    versions = packages.versions()
    missing = [package for package, version in versions.items() if version is None]
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version is not None)
    if missing:
        others = [package for package in missing if package != "moshi_mlx"]
        commands = [f"`pip install {' '.join(others)}`"] if others else []
        if "moshi_mlx" in missing:
            commands.append(f"`{packages.ADD_MOSHI_MLX}`")
        advice = f"Install with {', then '.join(commands)}"
        return Finding(what="packages", state="wrong", found=f"missing {', '.join(missing)}", advice=advice)
    mlx = versions["mlx"]
    if mlx is not None and packages.is_pinned(mlx):
        advice = (
            "An old mlx, as moshi_mlx pins it: on a CPU no faster, and compiled bfloat16 can crash there; "
            f"`make install` or `{packages.UPGRADE_MLX}` brings the newest"
        )
        return Finding(what="packages", state="note", found=found, advice=advice)
    return Finding(what="packages", state="ok", found=found)


def _mlx(config: Config, name: str) -> Finding:
    done = _python_says(_ASK_MLX)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        advice = "Install it with `pip install 'mlx[cpu]'`" if sys.platform == "linux" else "`pip install mlx`"
        return Finding(what="mlx", state="wrong", found=f"cannot be loaded: {reason}", advice=advice)
    device = done.stdout.strip()
    if "gpu" in device:
        return Finding(what="mlx", state="ok", found=f"computes on {device}")
    if not shutil.which("g++"):
        advice = "mlx compiles for the CPU at run time: `apt-get install g++`"
        return Finding(what="mlx", state="wrong", found=f"computes on {device}, and g++ is missing", advice=advice)
    advice = "Enough for a tiny synthetic checkpoint; the real model needs a GPU"
    return Finding(what="mlx", state="note", found=f"computes on {device}", advice=advice)


def _audio(config: Config, name: str) -> Finding:
    specs = {"input": config.capture.input, "output": config.playback.output}
    wanted = [kind for kind, spec in specs.items() if spec.startswith("device")]
    try:
        found = audio_devices()
    except DeviceError as error:
        state: Literal["note", "wrong"] = "wrong" if wanted else "note"
        return Finding(what="audio", state=state, found=str(error), advice=_WITHOUT_DEVICES)
    counts = {kind: sum(device[f"{kind}s"] > 0 for device in found["devices"]) for kind in specs}
    text = f"{found['portaudio']}, {counts['input']} inputs, {counts['output']} outputs"
    lacking = [kind for kind in wanted if not counts[kind]]
    if lacking:
        advice = f"No {' and no '.join(lacking)} device: connect one. {_WITHOUT_DEVICES}"
        return Finding(what="audio", state="wrong", found=text, advice=advice)
    return Finding(what="audio", state="ok", found=text)


def _python_says(code: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of Python in a process of its own; one that hangs counts as failed."""
    command = [sys.executable, "-P", "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {_PROBE_S} s")


def _scheduling(config: Config, name: str) -> Finding:
    if sys.platform != "linux":
        return Finding(what="scheduling", state="ok", found="audio threads are real-time by the system's own doing")
    # In a process of its own: to ask is to be promoted.
    code = "import sys; from pipeline.timing import promote_thread; sys.exit(0 if promote_thread() else 1)"
    if _python_says(code).returncode == 0:
        return Finding(what="scheduling", state="ok", found="real-time scheduling is permitted to audio threads")
    advice = "Sound may stutter when the machine is busy: permit rtprio in /etc/security/limits.d"
    return Finding(what="scheduling", state="note", found="real-time scheduling is not permitted", advice=advice)


def _memory(config: Config, name: str) -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    if config.engine == "echo" or config.model is not None:
        return Finding(what="memory", state="ok", found=found)
    need = checkpoints.QUALITIES[config.quality].model_bytes / _GB + _WORKING_GB
    if memory.total / _GB < need:
        advice = f"{config.quality} needs {need:.1f} GB: choose a smaller --quality, or end other programs"
        return Finding(what="memory", state="wrong", found=found, advice=advice)
    return Finding(what="memory", state="ok", found=f"{found}; {config.quality} needs {need:.1f}")


def _speed(config: Config, name: str) -> Finding:
    """What can be foretold before a download: from the bandwidth of the memory, whether a frame is answered in time."""
    if config.engine == "echo":
        return Finding(what="speed", state="ok", found="echo takes no time")
    chip = _chip()
    bandwidth = chips.bandwidth(chip)
    if bandwidth is None:
        advice = "Measure with `pipeline bench` whether a checkpoint fits"
        return Finding(what="speed", state="note", found=f"{chip}: memory bandwidth unknown", advice=advice)
    reads = _reads(config)
    floors = {quality: budget.floor_ms(nbytes, bandwidth.least) for quality, nbytes in reads.items()}
    fitting = [quality for quality, floor_ms in floors.items() if budget.can_fit(floor_ms)]
    told = ", ".join(f"{quality} {floor_ms:.0f} ms" for quality, floor_ms in floors.items())
    found = (
        f"{chip}, {bandwidth}: the weights of a step take {told}; "
        f"up to {budget.MOST_FLOOR_MS:.0f} ms can fit {FRAME_MS:.0f} ms: {', '.join(fitting) or 'none'}"
    )
    if config.quality in fitting:
        return Finding(what="speed", state="ok", found=found)
    advice = f"Choose --quality {fitting[-1]}" if fitting else "See with `pipeline bench` what it takes in truth"
    return Finding(what="speed", state="note", found=found, advice=advice)


def _chip() -> str:
    """What the model is computed on: an NVIDIA GPU only where MLX uses it."""
    gpu = chips.nvidia()
    return gpu if gpu and "gpu" in _python_says(_ASK_MLX).stdout else chips.processor()


def _reads(config: Config) -> dict[str, int]:
    """Bytes that a step reads: of the checkpoint that was chosen, if it is a folder, else of all official ones."""
    if checkpoints.is_folder(config.model):
        with contextlib.suppress(PipelineError):  # that it is damaged is said elsewhere
            table = read_header(checkpoints.find(config.model, config.quality).model_file)
            return {config.quality: budget.step_bytes(table)}
    return {quality: budget.official_step_bytes(quality) for quality in QUALITIES}


def _shared_memory(config: Config, name: str) -> Finding:
    need = round(len(RINGS) * config.ring_seconds * SAMPLE_RATE * 4)
    folder = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
    if not folder.is_dir():
        return Finding(what="shared memory", state="ok", found=f"rings need {need / 1e6:.1f} MB")
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e6:.0f} MB free in {folder}, rings need {need / 1e6:.1f}"
    if free < need:
        return Finding(what="shared memory", state="wrong", found=found, advice=f"Make room in {folder}")
    return Finding(what="shared memory", state="ok", found=found)


def _folder(config: Config, name: str) -> Finding:
    try:
        folder = RunFolder(name)
        base = folder.path.parent
        existing = next(path for path in (base, *base.parents) if path.exists())
    except PipelineError as error:
        return Finding(what="runtime folder", state="wrong", found=str(error))
    if not os.access(existing, os.W_OK):
        advice = "Set PIPELINE_RUNTIME_DIR to a folder of your own"
        return Finding(what="runtime folder", state="wrong", found=f"{base} cannot be written", advice=advice)
    dead = [other for other in runtime.names() if not RunFolder(other).is_locked()]
    if dead:
        advice = f"Clear them with `pipeline down --name {dead[0]}`"
        found = f"{base}; dead runs: {', '.join(dead)}"
        return Finding(what="runtime folder", state="note", found=found, advice=advice)
    return Finding(what="runtime folder", state="ok", found=str(base))


def _checkpoint(config: Config, name: str) -> Finding:
    if config.engine == "echo":
        return Finding(what="checkpoint", state="ok", found="echo needs none")
    try:
        checkpoint = checkpoints.find(config.model, config.quality)
    except PipelineError as error:
        return Finding(what="checkpoint", state="wrong", found=str(error))
    return Finding(what="checkpoint", state="ok", found=f"{checkpoint.folder}, {checkpoint.quality}")
