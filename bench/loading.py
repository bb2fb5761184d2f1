"""How much memory, and time, it takes to bring a model in: packed weights, against weights quantized at run time.

    python -m bench.loading [--size small] [--repeats 3] [--json FILE]    each way in turn, on made-up checkpoints
    python -m bench.loading DIR_OR_REPO [--quality q4] [--context 10]      one checkpoint, as the engine loads it

The second loads the language model as the engine does: the weights, as they are packed in the file, and its generator,
which joins some tables and makes the rings of keys and values. Printed are the file's size, MLX's peak, what is in use
afterwards, and the process's largest resident size, against the file. `--context 10` makes the rings next to nothing,
so that what the joining takes is seen.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import mlx.core as mx
import psutil
from mlx.nn.layers.quantized import quantize
from moshi_mlx.models.lm import Lm, LmConfig

from bench import results
from bench.results import Plot, Section, Table
from pipeline import checkpoints
from pipeline.checkpoints import SIZES, Checkpoint, synthesize
from procs.model.generator import Generator
from procs.model.loading import compute_type, load_model
from procs.model.sampling import Sampling

Figures = dict[str, Any]

MB: Final = 1e6
_RSS_BYTES: Final = 1 if sys.platform == "darwin" else 1024


# The ways


def packed(checkpoint: Checkpoint) -> None:
    """Ours."""
    load_model(checkpoint)


def upstream(checkpoint: Checkpoint) -> None:
    """What moshi_mlx/local.py does with -q 4: a random model in bf16 is to be quantized, then the file is loaded."""
    model = _bare(checkpoint)
    _quantize(model)
    model.load_weights(str(checkpoint.model_file), strict=True)
    mx.eval(model.parameters())


def run_time(checkpoint: Checkpoint) -> None:
    """The weights in bf16, quantized here."""
    model = _bare(checkpoint)
    model.load_weights(str(checkpoint.model_file), strict=True)
    _quantize(model)
    mx.eval(model.parameters())


def _bare(checkpoint: Checkpoint) -> Lm:
    model = Lm(LmConfig.from_config_dict(checkpoint.config))
    model.set_dtype(mx.bfloat16)
    return model


def _quantize(model: Lm) -> None:
    """mlx.nn.quantize, as q4 is."""
    quantize(model, bits=4, group_size=32)


class Way(NamedTuple):
    """A way to come to a quantized model, and the quality of the file that it starts from."""

    title: str
    quality: str
    load: Callable[[Checkpoint], None]


WAYS: Final = {
    "packed": Way("ours: a q4 file", "q4", packed),
    "upstream": Way("upstream: a q4 file", "q4", upstream),
    "run-time": Way("a bf16 file, quantized at run time", "bf16", run_time),
}


def carry_out(way: Way, folder: Path) -> Figures:
    """Load once, in this process: how long it takes, and how much memory at most."""
    checkpoint = checkpoints.find(str(folder), way.quality)
    before = psutil.Process().memory_info().rss
    mx.reset_peak_memory()
    start = time.perf_counter()
    way.load(checkpoint)
    return {
        "load_s": time.perf_counter() - start,
        "resident_mb": (_resident_bytes() - before) / MB,
        "mlx_peak_mb": mx.get_peak_memory() / MB,
        "file_mb": checkpoint.model_file.stat().st_size / MB,
    }


def _resident_bytes() -> int:
    """The most so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins at what the process that started this one had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_BYTES


# In turn


def compare(size: str, repeats: int) -> dict[str, list[Figures]]:
    """All ways in turn, each in a process of its own."""
    found: dict[str, list[Figures]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="plload") as made:
        folders = {quality: Path(made) / quality for quality in ("q4", "bf16")}
        for quality, folder in folders.items():
            synthesize(folder, quality, size)
        for _ in range(repeats):
            for name, way in WAYS.items():
                found[name].append(_apart(name, folders[way.quality]))
    return found


def _apart(name: str, folder: Path) -> Figures:
    command = [sys.executable, "-m", "bench.loading", str(folder), "--way", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    figures: Figures = json.loads(done.stdout)
    return figures


_TEXT: Final = """\
A language model's weights from a file until all are in memory as q4, on {device} with mlx {mlx}; each in a process of
its own, in turn. The checkpoints are made up, of size `{size}`, of random weights in the official layout, and were
just written, so that they are read from the page cache. The times of the true model's 4.8 GB (q4) and 15.4 GB (bf16)
are larger by as much as its files are, and by what the disk takes. Imports, the codec and the first step are not
counted.

*Upstream* is what `moshi_mlx/local.py -q 4` does with the file that it downloads; it asks for a random model to be
quantized first, which MLX, being lazy, never does, so that little is to be gained here. *At run time* is how models
are quantized that are downloaded in bf16: load, `nn.quantize`, evaluate. Memory is the process's largest resident
size above what it was before loading; MLX's own peak counts arrays."""


def section(size: str, repeats: int) -> Section:
    """The comparison, as a section."""
    began = time.monotonic()
    found = compare(size, repeats)
    ours = found["packed"]
    columns = ["", "file, MB", "s", "times ours", "resident, MB", "MLX's peak, MB", "peak, times ours"]
    rows = []
    for name, way in WAYS.items():
        turns = found[name]
        slower = [turn["load_s"] / own["load_s"] for turn, own in zip(turns, ours, strict=True)]
        larger = [turn["resident_mb"] / own["resident_mb"] for turn, own in zip(turns, ours, strict=True)]
        cells = [results.spread([turn[key] for turn in turns]) for key in ("load_s", "resident_mb", "mlx_peak_mb")]
        file_mb = results.figure(turns[0]["file_mb"])
        rows.append([way.title, file_mb, cells[0], results.spread(slower), *cells[1:], results.spread(larger)])
    series: dict[str, list[tuple[float | str, float]]] = {
        title: [(way.title, median(turn[key] for turn in found[name])) for name, way in WAYS.items()]
        for title, key in (("resident", "resident_mb"), ("MLX's peak", "mlx_peak_mb"))
    }
    return Section(
        name="loading",
        title="Loading a model",
        command=f"python -m bench.loading --size {size} --repeats {repeats}",
        text=_TEXT.format(device=mx.default_device(), mlx=mx.__version__, size=size),
        seconds=time.monotonic() - began,
        tables=[Table("From file to memory", columns, rows, "Peak, times ours: of the resident size.")],
        targets=[],
        plots=[Plot("loading", "Memory while loading, at most", "", "MB", "bars", False, series)],
        figures={"ways": found},
    )


# One checkpoint


def show(model: str, quality: str, context: int | None) -> None:
    """Load it as the engine does, and print."""
    checkpoint = checkpoints.find(model, quality)
    checkpoint.config["context"] = context or checkpoint.config["context"]
    file_bytes = checkpoint.model_file.stat().st_size
    print(f"{checkpoint.model_file.name}: {file_bytes / MB:.0f} MB, on {mx.default_device()}, mlx {mx.__version__}")
    start = time.perf_counter()
    loaded = load_model(checkpoint)
    say("weights", file_bytes, start)
    generator = Generator(loaded, Sampling(), 0, compute_type(checkpoint))
    say("with tables joined and rings made", file_bytes, start)
    print(f"rings: {sum(ring.keys.nbytes + ring.values.nbytes for ring in generator._rings) / MB:.0f} MB")


def say(what: str, file_bytes: int, start: float) -> None:
    """One line: the most so far, and what is left."""
    resident = _resident_bytes()
    print(
        f"{what}: {time.perf_counter() - start:.1f} s; MLX's peak {mx.get_peak_memory() / MB:.0f} MB "
        f"({mx.get_peak_memory() / file_bytes:.3f} of the file), in use {mx.get_active_memory() / MB:.0f} MB; "
        f"resident at most {resident / MB:.0f} MB ({resident / file_bytes:.3f})"
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint's folder or repository")
    parser.add_argument("--quality", choices=list(checkpoints.QUALITIES), default=checkpoints.DEFAULT_QUALITY)
    parser.add_argument("--context", type=int, help="of the rings, in frames; by default the model's")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the made-up checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(carry_out(WAYS[arguments.way], Path(arguments.model))))
    elif arguments.model:
        show(arguments.model, arguments.quality, arguments.context)
    else:
        results.finish(section(arguments.size, arguments.repeats), arguments.json)


if __name__ == "__main__":
    main()
