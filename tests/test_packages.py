"""pipeline.packages and the lists in requirements/: what is asked for, of whom, and what is said of what is missing."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

from pipeline import doctor, packages
from pipeline.config import Config
from pipeline.errors import ConfigError

ROOT: Final = Path(__file__).parent.parent
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())

OF_MODULE: Final = {"zmq": "pyzmq", "membar": "pymembar", "hdrh": "hdrhistogram"}
"""The package of a module that has another name."""

NOT_OURS: Final = {"pipeline", "procs", "tests", "bench"}


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def imported(*folders: str) -> set[str]:
    """Packages that the files in these folders import, wherever in them."""
    found: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    found |= {alias.name.partition(".")[0] for alias in aliases}
                case ast.ImportFrom(module=str(module)):
                    found.add(module.partition(".")[0])
    return {OF_MODULE.get(name, name) for name in found - sys.stdlib_module_names - NOT_OURS}


def test_what_the_program_imports_is_what_it_asks_for() -> None:
    named = {requirement.name for name in ("run", "moshi_mlx") for requirement in requirements(name)}
    assert imported("pipeline", "procs") == named


def test_moshi_mlx_imports_nothing_that_is_not_asked_for() -> None:
    """It is installed without its dependencies. What only its own programs import is not needed."""
    spec = importlib.util.find_spec("moshi_mlx")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    entries = ["models/lm.py", "models/mimi.py", "models/generate.py", "utils/sampling.py"]
    seen, waiting = set(), [package / name for name in ("__init__.py", "models/__init__.py", *entries)]
    waiting += list((package / "modules").glob("*.py"))
    while waiting:
        path = waiting.pop()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                seen.add(node.module.partition(".")[0])
            if isinstance(node, ast.Import):
                seen |= {alias.name.partition(".")[0] for alias in node.names}
    assert seen - sys.stdlib_module_names <= {requirement.name for requirement in requirements("run")}


def test_a_plain_install_leaves_moshi_mlx_out_where_its_pins_cannot_be_kept() -> None:
    (moshi_mlx,) = requirements("moshi_mlx")
    assert f"{moshi_mlx.name}{moshi_mlx.specifier}" == packages.MOSHI_MLX
    assert moshi_mlx.marker is not None
    wanted = {version: moshi_mlx.marker.evaluate({"python_version": version}) for version in ("3.11", "3.12", "3.13")}
    assert wanted == {"3.11": True, "3.12": True, "3.13": False}


def test_no_list_says_where_files_are_downloaded_from() -> None:
    for path in (ROOT / "requirements").iterdir():
        assert not re.search(r"://|--hash|--index|--find", path.read_text()), path


def test_the_pythons_that_are_named_are_those_that_are_asked_for() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert "not (3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "Makefile").read_text()
    assert doctor._python(Config(), "default").state == "ok"


def test_without_moshi_mlx_the_command_that_adds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.need_moshi_mlx()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"moshi_mlx is not installed: `pip install --no-deps moshi_mlx==0\.3\.0`"):
        packages.need_moshi_mlx()


@pytest.mark.parametrize(
    ("lacking", "advice"),
    [
        ({"moshi_mlx"}, "Install with `pip install --no-deps moshi_mlx==0.3.0`"),
        ({"soxr", "numpy"}, "Install with `pip install numpy soxr`"),
        ({"moshi_mlx", "soxr"}, "Install with `pip install soxr`, then `pip install --no-deps moshi_mlx==0.3.0`"),
    ],
)
def test_the_doctor_says_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, lacking: set[str], advice: str
) -> None:
    versions = {name: None if name in lacking else "1.0" for name in packages.NAMES}
    monkeypatch.setattr(packages, "versions", lambda: versions)
    found = doctor._packages(Config(), "default")
    assert (found.state, found.advice) == ("wrong", advice)


@pytest.mark.parametrize(
    ("mlx", "state"), [("0.26.5", "note"), ("0.27.0", "ok"), ("0.32.4", "ok"), ("0.33.0.dev1", "ok"), ("1.0", "ok")]
)
def test_the_doctor_notes_an_old_mlx(monkeypatch: pytest.MonkeyPatch, mlx: str, state: str) -> None:
    monkeypatch.setattr(packages, "versions", lambda: dict.fromkeys(packages.NAMES, "1.0") | {"mlx": mlx})
    found = doctor._packages(Config(), "default")
    assert found.state == state
    assert ("pip install --upgrade 'mlx" in found.advice) == (state == "note")
    assert f"mlx {mlx}" in found.found
