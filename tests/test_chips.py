"""pipeline.chips, with what the system says of its chips made up."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import chips
from pipeline.chips import Bandwidth

Says = Callable[..., "subprocess.CompletedProcess[str]"]


def saying(program: str, said: str, code: int = 0) -> Says:
    """A subprocess.run for which there is one program."""

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        if command[0] != program:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, code, said, "")

    return run


@pytest.mark.parametrize(
    ("chip", "least", "most"),
    [
        ("Apple M1", 68.25, 68.25),
        ("Apple M3", 100, 100),
        ("Apple M3 Pro", 150, 150),
        ("Apple M3 Max", 300, 400),
        ("Apple M4 Max", 410, 546),
        ("Apple M5", 153, 153),
        ("NVIDIA H100 80GB HBM3", 3_350, 3_350),
    ],
)
def test_what_is_published(chip: str, least: float, most: float) -> None:
    assert chips.bandwidth(chip) == Bandwidth(least, most)


@pytest.mark.parametrize("chip", ["", "M3", "Apple M3 Pro Max", "Apple M99", "Apple ", "AMD EPYC", "NVIDIA H100 NVL"])
def test_of_a_chip_that_is_not_known_nothing_is_guessed(chip: str) -> None:
    assert chips.bandwidth(chip) is None


def test_every_pro_is_faster_than_its_base_and_every_max_than_its_pro() -> None:
    for generation in range(1, 6):
        found = [chips.bandwidth(f"Apple M{generation}{kind}") for kind in ("", " Pro", " Max")]
        least = [one.least for one in found if one is not None]
        assert len(least) == 3
        assert least == sorted(set(least))


def test_one_figure_or_two() -> None:
    assert str(Bandwidth(68.25, 68.25)) == "68.25 GB/s"
    assert str(Bandwidth(300.0, 400.0)) == "300 or 400 GB/s"


def test_on_a_mac_the_processor_is_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", saying("sysctl", "Apple M4 Pro\n"))
    assert chips.processor() == "Apple M4 Pro"


def test_on_linux_the_processor_is_what_the_kernel_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "processor\t: 0\nmodel name\t: A Processor: the 2nd\nprocessor\t: 1\nmodel name\t: Another\n"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert chips.processor() == "A Processor: the 2nd"


def test_a_processor_without_a_name_still_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags\t: none\n")
    assert chips.processor()


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (saying("nvidia-smi", "NVIDIA H200\nNVIDIA H200\n"), "NVIDIA H200"),
        (saying("nvidia-smi", "NVIDIA-SMI has failed", code=9), None),
        (saying("nvidia-smi", ""), None),
        (saying("another", ""), None),
    ],
)
def test_the_gpu_is_what_its_driver_tells(monkeypatch: pytest.MonkeyPatch, run: Says, found: str | None) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    assert chips.nvidia() == found
