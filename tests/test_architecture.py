"""The import rules and the topology: what keeps a slow model from being heard, and a newcomer from being lost."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import pipeline
import procs
from pipeline.cli import COMMANDS
from pipeline.topology import FRAME, FRAME_MS, FRAME_NS, PROCESSES, RINGS, SAMPLE_RATE

ROOT: Final = Path(__file__).parent.parent
STAGES: Final = tuple(process.module for process in PROCESSES)

# Of the second file of a library it may be that it does without.
ONLY_IN: Final = {
    "mlx": ["procs/model"],
    "moshi_mlx": ["procs/model"],
    "rustymimi": ["procs/model"],
    "sentencepiece": ["procs/model", "pipeline/checkpoints.py"],
    "sounddevice": ["procs/devices.py"],
    "zmq": ["pipeline/control.py"],
}


class Import(NamedTuple):
    """One import statement: the file it is in, what it imports, and whether it is carried out on import."""

    file: str
    module: str
    at_once: bool


def imports(path: Path) -> list[Import]:
    """Every module that a file imports, wherever in it, by its full name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = {id(node) for node in carried_out_on_import(tree)}
    file = path.relative_to(ROOT).as_posix()
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                assert level == 0, f"{file}:{node.lineno}: a relative import"
                # `from pipeline import ring` imports pipeline.ring.
                names = [str(module), *(f"{module}.{alias.name}" for alias in aliases)]
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module")):
                # The commands' own modules, by a table, are the exception.
                assert file == "pipeline/cli/__init__.py", f"{file}:{node.lineno}: an import that cannot be read off"
        found += [Import(file, name, id(node) in at_once) for name in names]
    return found


def carried_out_on_import(node: ast.AST) -> list[ast.AST]:
    """The nodes that are not within a function."""
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *carried_out_on_import(child)]
    return found


FILES: Final = sorted(path for package in ("pipeline", "procs") for path in (ROOT / package).rglob("*.py"))
IMPORTS: Final = [found for path in FILES for found in imports(path)]


def is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_files_that_are_looked_at_are_those_that_are_imported() -> None:
    assert len(FILES) > 20
    for package in (pipeline, procs):
        assert package.__file__ is not None
        assert Path(package.__file__) in FILES


def test_pipeline_never_imports_procs() -> None:
    assert [found for found in IMPORTS if found.file.startswith("pipeline/") and is_of(found.module, "procs")] == []


def test_stages_never_import_each_other() -> None:
    files = {f"{module.replace('.', '/')}.py" for module in STAGES}
    assert [
        found for found in IMPORTS if found.file in files and any(is_of(found.module, stage) for stage in STAGES)
    ] == []


def test_what_no_stage_is_imports_no_stage() -> None:
    """So that no stage comes by another through a module that both use."""
    assert [found for found in IMPORTS if any(is_of(found.module, stage) for stage in STAGES)] == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_library_is_imported_in_one_place(package: str) -> None:
    # A package counts as one place.
    files = {re.sub(r"^procs/model/.*", "procs/model", found.file) for found in IMPORTS if is_of(found.module, package)}
    assert ONLY_IN[package][0] in files
    assert files <= set(ONLY_IN[package])


@pytest.mark.parametrize(
    ("file", "package"), [("pipeline/checkpoints.py", "sentencepiece"), ("procs/devices.py", "sounddevice")]
)
def test_a_library_is_loaded_only_when_it_is_needed(file: str, package: str) -> None:
    assert [found for found in IMPORTS if found.file == file and is_of(found.module, package) and found.at_once] == []


def test_only_what_runs_the_model_imports_it_and_only_when_it_is_asked_for() -> None:
    imported = [found for found in IMPORTS if is_of(found.module, "procs.model")]
    found = [one for one in imported if not one.file.startswith("procs/model/")]
    assert {one.file for one in found} == {"procs/inference.py", "procs/measure.py"}
    assert not any(one.at_once for one in found)


def test_the_inference_stage_opens_no_audio_device() -> None:
    files = ("procs/inference.py", "procs/model/", "procs/engines.py")
    assert [one for one in IMPORTS if one.file.startswith(files) and is_of(one.module, "procs.devices")] == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("procs.capture", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice", "huggingface_hub"}),
        ("procs.playback", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice", "huggingface_hub"}),
        ("procs.inference", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice"}),
        ("pipeline.supervisor", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice", "soundfile"}),
        ("pipeline.cli", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice", "soundfile", "psutil"}),
        *(
            (f"pipeline.cli.{module}", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice", "textual"})
            for module in sorted(set(COMMANDS.values()))
        ),
        ("pipeline.client", {"mlx", "moshi_mlx", "rustymimi", "sentencepiece", "sounddevice"}),
    ],
)
def test_what_a_program_loads(module: str, absent: set[str]) -> None:
    """By a real process, so that what others import on its behalf counts too."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert module.partition(".")[0] in loaded
    assert loaded & absent == set()


# The tables


def test_every_process_is_a_program() -> None:
    names = [process.name for process in PROCESSES]
    assert len(names) == len(set(names)) == 3
    for process in PROCESSES:
        spec = importlib.util.find_spec(process.module)
        assert spec is not None
        assert spec.origin is not None
        last = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body[-1]
        assert isinstance(last, ast.If)
        assert ast.unparse(last.test) == "__name__ == '__main__'"
        # It is run under the name that the table gives it.
        assert f"worker.main('{process.name}', " in ast.unparse(last.body[0])


def test_every_ring_is_written_and_consumed_by_a_process() -> None:
    processes = {process.name for process in PROCESSES}
    assert len({ring.name for ring in RINGS}) == len(RINGS)
    assert {ring.writer for ring in RINGS} == processes  # each process has one to write
    for ring in RINGS:
        assert ring.consumer is None or ring.consumer in processes
        assert ring.consumer != ring.writer


def test_the_rings_lead_from_the_microphone_to_the_speaker() -> None:
    path = ["capture"]
    by_writer = {ring.writer: ring for ring in RINGS}
    while (consumer := by_writer[path[-1]].consumer) is not None:  # type: ignore[index]
        path.append(consumer)
    assert path == ["capture", "inference", "playback"]


def test_a_frame_is_80_ms_in_every_unit() -> None:
    assert FRAME_MS == 80
    assert FRAME_NS == 80_000_000
    assert FRAME * 1_000 == FRAME_MS * SAMPLE_RATE
