"""What this machine computes with, and how fast such a chip reads its memory, as its maker publishes it."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

from pipeline import apple

_ASK_S: Final = 10


class Bandwidth(NamedTuple):
    """GB/s that memory delivers at best: 1 GB is 1e9 bytes."""

    least: float
    most: float
    """More than `least` where models of one name differ."""

    def __str__(self) -> str:
        return f"{self.least:g} GB/s" if self.least == self.most else f"{self.least:g} or {self.most:g} GB/s"


# Apple's technical specifications of the Macs that have them. Of two, the greater is of the model with more GPU cores.
_APPLE: Final = {
    "M1": (68.25,), "M1 Pro": (200,), "M1 Max": (400,), "M1 Ultra": (800,),
    "M2": (100,), "M2 Pro": (200,), "M2 Max": (400,), "M2 Ultra": (800,),
    "M3": (100,), "M3 Pro": (150,), "M3 Max": (300, 400), "M3 Ultra": (819,),
    "M4": (120,), "M4 Pro": (273,), "M4 Max": (410, 546),
    "M5": (153,), "M5 Pro": (307,), "M5 Max": (460, 614),
}  # fmt: skip

# NVIDIA's data sheets, by the names that nvidia-smi prints.
_NVIDIA: Final = {
    "Tesla T4": 320, "NVIDIA L4": 300, "NVIDIA L40S": 864,
    "NVIDIA GeForce RTX 3090": 936, "NVIDIA GeForce RTX 4090": 1_008,
    "NVIDIA A100-SXM4-40GB": 1_555, "NVIDIA A100-SXM4-80GB": 2_039,
    "NVIDIA H100 PCIe": 2_000, "NVIDIA H100 80GB HBM3": 3_350, "NVIDIA H200": 4_800,
}  # fmt: skip


def bandwidth(chip: str) -> Bandwidth | None:
    """What its maker publishes of the chip of this exact name; None of one that is not in the tables: no guess."""
    values = _APPLE.get(chip.removeprefix("Apple ")) if chip.startswith("Apple ") else None
    if values is None and chip in _NVIDIA:
        values = (_NVIDIA[chip],)
    return None if values is None else Bandwidth(float(values[0]), float(values[-1]))


def processor() -> str:
    """The name of this machine's processor: on Apple silicon, of the chip with all that is on it."""
    name = apple.sysctl("machdep.cpu.brand_string")
    if name is None and sys.platform == "linux":
        name = _of_cpuinfo()
    return name or platform.processor() or platform.machine()


def _of_cpuinfo() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def nvidia() -> str | None:
    """The name of the first NVIDIA GPU, as its driver tells it; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
