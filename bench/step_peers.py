"""How long a step of the language model takes: ours, upstream's on MLX, and upstream's on PyTorch.

    python -m bench.step_peers --peer ours --quality q4 --size 7b [--context 3000] [--greedy] [--json FILE]
    python -m bench.step_peers --all --order AB BA --out DIR

A step is what a frame of 80 ms asks of the language model: eight codes that were heard go in as integers on the host,
a text token and eight codes to speak come back to the host. The codec is no part of it. Frames follow each other at
once, and each one's wall time is taken. Codes and weights are random and made on the device, the same for the same
seed, so nothing is downloaded and 7b is Moshi's true shape; `stock` and `ours` get identical weights, and with
--greedy the first text tokens are printed, to be compared. Random weights take as long as trained ones.

    stock      moshi_mlx's LmGen, called and read back as moshi_mlx/local.py does, with its samplers
    ours       procs.model's Generator, with the same sampling
    pytorch    the package moshi's LMGen in bfloat16, sampling as its server does, with CUDA graphs where there is CUDA

--context is the number of frames before the timed ones, 3000 being as far as Moshi looks back; a few frames always
come before, in which kernels are compiled. `stock` is wrong from frame 4096 on, so that context and frames should
together stay below it.

--all runs each peer in each quality, each in a process of its own: in the order AB, in the reverse order BA, and, as
LONG, with 3000 frames before; any of the three may be named, and what a machine does over time shows as a difference
between AB and BA. What --budget leaves no time for is named in the table. A Markdown table ends it; DIR gets the
table, a JSON line a run, and what the runs printed. On a Mac with MLX, where the package moshi is not installed,
`pytorch` is left out:

    python -m bench.step_peers --all --order AB BA LONG --out DIR --budget 3600 --limit 900

--section is a part of `make bench`: `stock` and `ours` in turn, of size tiny, on whatever mlx computes with here.
"""

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import psutil

from bench import results
from bench.results import Plot, Section, Table, Target
from pipeline.headers import Tensor
from pipeline.layout import DEFAULT_QUALITY, OFFICIAL, QUALITIES, ModelConfig, model_table
from pipeline.synthesis import SIZES, palette

Codes = npt.NDArray[np.uint32]
Figures = dict[str, Any]

WARM_UP_FRAMES: Final = 20
"""Frames that are never timed: kernels are compiled in them, and CUDA graphs captured."""

FIRST: Final = 20
"""Frames, counted from the very first, of which the tokens are kept."""

LONG_CONTEXT: Final = 3_000

PLAN: Final = (
    ("stock", "q4"),
    ("ours", "q4"),
    ("stock", "q8"),
    ("ours", "q8"),
    ("stock", "bf16"),
    ("ours", "bf16"),
    ("pytorch", "bf16"),
)
LONG_PLAN: Final = (("stock", "q4"), ("ours", "q4"), ("pytorch", "bf16"))

PACKAGES: Final = ("mlx", "mlx-cuda-13", "mlx-cuda-12", "mlx-cuda", "moshi_mlx", "torch", "moshi", "numpy")

PERCENTILES: Final = (50, 90, 95, 99)

STOCK_TEMPERATURE: Final = 0.8
STOCK_TOP_P: Final = 0.95
"""What moshi_mlx's Sampler() draws with, for text and audio alike."""

LEAST_S: Final = 10.0
"""A run that would have less time than this is not begun."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    peer: str
    quality: str
    size: str
    frames: int
    context: int
    seed: int
    greedy: bool

    @property
    def untimed(self) -> int:
        return max(self.context, WARM_UP_FRAMES)

    @property
    def config(self) -> dict[str, Any]:
        return dict(OFFICIAL) | dict(SIZES[self.size].config)


class Said(NamedTuple):
    """A frame's tokens, on the host."""

    text: int | None
    spoken: list[int] | None


class Memory(NamedTuple):
    """MB on the device, and the most since the model was built; None where the device does not tell."""

    now_mb: float | None
    peak_mb: float | None


@dataclass(frozen=True)
class Peer:
    """A model ready to take its first step."""

    step: Callable[[Codes], Said]
    load_s: float
    device: str
    memory: Callable[[], Memory]


# The peers


def _stock(settings: Settings) -> Peer:
    import mlx.core as mx
    from moshi_mlx.models.generate import LmGen
    from moshi_mlx.utils.sampling import Sampler

    began = time.perf_counter()
    model = _mlx_model(settings)
    mx.random.seed(settings.seed)
    model.warmup()
    load_s = time.perf_counter() - began
    sampler = Sampler(temp=0.0) if settings.greedy else Sampler(STOCK_TEMPERATURE, STOCK_TOP_P)
    generator = LmGen(
        model,
        max_steps=settings.untimed + settings.frames + 5,
        text_sampler=sampler,
        audio_sampler=sampler,
        check=False,
    )

    def step(heard: Codes) -> Said:
        # As in moshi_mlx/local.py, whose codec gives codes of shape (codebooks, 1).
        data = mx.array(heard[:, None]).transpose(1, 0)[:, :8]
        text = generator.step(data)
        token = text[0].item()
        spoken = generator.last_audio_tokens()
        if spoken is None:
            return Said(token, None)
        return Said(token, np.array(spoken).astype(np.uint32)[0].tolist())

    return Peer(step, load_s, _mlx_device(), _mlx_memory)


def _ours(settings: Settings) -> Peer:
    from procs.model.generator import Generator
    from procs.model.sampling import Choice, Sampling

    choice = Choice(temperature=0.0) if settings.greedy else Choice(STOCK_TEMPERATURE, top_p=STOCK_TOP_P)
    began = time.perf_counter()
    generator = Generator(_mlx_model(settings), Sampling(text=choice, audio=choice), settings.seed)
    load_s = time.perf_counter() - began

    def step(heard: Codes) -> Said:
        text, spoken = generator.step(heard)
        return Said(text, None if spoken is None else spoken.tolist())

    return Peer(step, load_s, _mlx_device(), _mlx_memory)


def _pytorch(settings: Settings) -> Peer:
    torch: Any = importlib.import_module("torch")
    loaders: Any = importlib.import_module("moshi.models.loaders")
    lm: Any = importlib.import_module("moshi.models.lm")

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    # Some of its layers do not pass the device on: they would be made on the host, and then copied.
    with torch.device(device):
        model = loaders.get_moshi_lm(None, lm_kwargs=settings.config, device=device, dtype=torch.bfloat16)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    load_s = time.perf_counter() - began
    generator = lm.LMGen(model, use_sampling=not settings.greedy)
    generator.streaming_forever(1)

    def step(heard: Codes) -> Said:
        codes = torch.from_numpy(heard.astype(np.int64)).to(device)[None, :, None]
        said = generator.step(codes)
        if said is None:
            if cuda:
                torch.cuda.synchronize()
            return Said(None, None)
        text, *spoken = said[0, :, 0].tolist()
        return Said(text, spoken)

    def memory() -> Memory:
        if not cuda:
            return Memory(None, None)
        return Memory(torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6)

    return Peer(step, load_s, torch.cuda.get_device_name() if cuda else _processor(), memory)


PEERS: Final[dict[str, Callable[[Settings], Peer]]] = {"stock": _stock, "ours": _ours, "pytorch": _pytorch}


# A model of random weights for MLX


def _mlx_model(settings: Settings) -> Any:
    """An Lm as it is loaded from a file, the weights being made up tensor by tensor instead."""
    import mlx.core as mx
    from mlx.nn.layers.quantized import quantize
    from moshi_mlx.models.lm import Lm, LmConfig

    quality = QUALITIES[settings.quality]
    model = Lm(LmConfig.from_config_dict(settings.config))
    model.set_dtype(mx.bfloat16)
    if quality.bits is not None and quality.group is not None:
        quantize(model, bits=quality.bits, group_size=quality.group)
    model.load_weights(list(_mlx_weights(settings)), strict=True)
    if quality.bits is not None and mx.default_device() == mx.cpu:
        # As the product does on a CPU, where quantized products of bfloat16 are slow and inexact.
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    return model


def _mlx_weights(settings: Settings) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    table = model_table(msgspec.convert(settings.config, ModelConfig), settings.quality)
    for index, (name, tensor) in enumerate(table.items()):
        key = mx.random.key(settings.seed * len(table) + index)
        span = _span(name, tensor, settings.quality)
        if span is None:
            rows, columns = tensor.shape
            weights = mx.random.randint(0, 256, (rows, 4 * columns), mx.uint8, key).view(mx.uint32)
        elif span[0] == span[1]:
            weights = mx.full(tensor.shape, span[0], mx.bfloat16)
        else:
            weights = mx.random.uniform(*span, tensor.shape, mx.bfloat16, key)
        # One after the other: what a tensor takes on its way is several times its own size.
        mx.eval(weights)
        yield name, weights


def _span(name: str, tensor: Tensor, quality: str) -> tuple[float, float] | None:
    """The least and the largest of a tensor's values, as a made-up checkpoint has them; None: any bits at all."""
    values = palette(name, tensor, QUALITIES[quality])
    if values is None:
        return None
    assert tensor.dtype == "BF16"
    # bfloat16 is the upper half of a float32.
    low, high = (values[[0, -1]].astype(np.uint32) << 16).view(np.float32).tolist()
    return low, high


def _mlx_memory() -> Memory:
    import mlx.core as mx

    return Memory(mx.get_active_memory() / 1e6, mx.get_peak_memory() / 1e6)


def _mlx_device() -> str:
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return _processor()
    # Not in every version, and of another signature in some.
    with suppress(AttributeError, RuntimeError, TypeError, ValueError):
        describe = mx.device_info if hasattr(mx, "device_info") else mx.metal.device_info
        if name := describe().get("device_name"):
            return str(name)
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    return str(mx.default_device())


def _processor() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# Measuring


def measure(settings: Settings) -> Figures:
    """Build the peer, and time its steps."""
    config = settings.config
    heard = config["n_q"] - config["dep_q"]
    random = np.random.default_rng(settings.seed)
    codes = random.integers(0, config["card"], (settings.untimed + settings.frames, heard), dtype=np.uint32)
    peer = PEERS[settings.peer](settings)
    first: list[Said] = []
    times_ms = []
    began = time.perf_counter()
    for frame, row in enumerate(codes):
        start_ns = time.perf_counter_ns()
        said = peer.step(row)
        elapsed_ns = time.perf_counter_ns() - start_ns
        if frame < FIRST:
            first.append(said)
        if frame >= settings.untimed:
            times_ms.append(elapsed_ns / 1e6)
        if frame == settings.untimed - 1:
            untimed_s = time.perf_counter() - began
            # As in the product's own process, for every peer: what was made so far is not looked through again.
            gc.collect()
            gc.freeze()
            gc.disable()
    memory = peer.memory()
    return {
        **asdict(settings),
        **{f"p{point}_ms": round(float(np.percentile(times_ms, point)), 3) for point in PERCENTILES},
        "max_ms": round(max(times_ms), 3),
        "min_ms": round(min(times_ms), 3),
        "mean_ms": round(float(np.mean(times_ms)), 3),
        "load_s": round(peer.load_s, 2),
        "untimed_frames": settings.untimed,
        "untimed_s": round(untimed_s, 2),
        "device_mb": None if memory.now_mb is None else round(memory.now_mb),
        "device_peak_mb": None if memory.peak_mb is None else round(memory.peak_mb),
        "resident_mb": round(psutil.Process().memory_info().rss / 1e6),
        "first_text": [said.text for said in first],
        "first_spoken_crc": zlib.crc32(json.dumps([said.spoken for said in first]).encode()),
        "device": peer.device,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "env": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MLX_")},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def report(figures: Figures) -> str:
    """A run in four lines."""
    device_mb = "unknown" if figures["device_mb"] is None else f"{figures['device_mb']} MB"
    peak_mb = "unknown" if figures["device_peak_mb"] is None else f"{figures['device_peak_mb']} MB"
    return "\n".join(
        (
            f"{figures['peer']} {figures['quality']} {figures['size']} on {figures['device']}: "
            f"{figures['frames']} frames after {figures['untimed_frames']}",
            f"ms a step: p50 {figures['p50_ms']:.2f}  p95 {figures['p95_ms']:.2f}  p99 {figures['p99_ms']:.2f}  "
            f"max {figures['max_ms']:.2f}",
            f"loaded in {figures['load_s']} s, untimed frames {figures['untimed_s']} s; on the device {device_mb}, "
            f"at most {peak_mb}; resident {figures['resident_mb']} MB",
            f"first text tokens{', greedy' if figures['greedy'] else ''}: {figures['first_text']}, "
            f"spoken codes' CRC {figures['first_spoken_crc']:08x}",
        )
    )


# All of them


def run_all(arguments: argparse.Namespace) -> bool:
    """Run the plan, each run in a process of its own; False if one of them gave no figures."""
    deadline = time.monotonic() + arguments.budget
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Figures] = []
    for name in arguments.order:
        for peer, quality in _plan(name, arguments.peers):
            context = max(arguments.context, LONG_CONTEXT) if name == "LONG" else arguments.context
            row: Figures = {"order": name, "peer": peer, "quality": quality, "context": context}
            row |= _run(row, arguments, out, deadline - time.monotonic())
            rows.append(row)
            line = f"p50 {row['p50_ms']:.2f} ms" if "p50_ms" in row else row["fault"]
            print(f"{name} {peer} {quality}, context {context}: {line}, {row['wall_s']:.0f} s", flush=True)
    shown = table(rows) + agreement(rows)
    (out / "table.md").write_text(shown)
    print(f"\n{shown}", end="")
    return all("p50_ms" in row for row in rows)


def _plan(name: str, peers: list[str]) -> list[tuple[str, str]]:
    plan = [entry for entry in (LONG_PLAN if name == "LONG" else PLAN) if entry[0] in peers]
    return plan[::-1] if name == "BA" else plan


def _run(row: Figures, arguments: argparse.Namespace, out: Path, left_s: float) -> Figures:
    if left_s < LEAST_S:
        return {"fault": "not run: out of time", "wall_s": 0.0}
    lines, log = out / "steps.jsonl", out / "log.txt"
    command = [sys.executable, "-m", "bench.step_peers", "--json", str(lines)]
    for option in ("peer", "quality", "context", "order"):
        command += [f"--{option}", str(row[option])]
    for option in ("size", "frames", "seed"):
        command += [f"--{option}", str(getattr(arguments, option))]
    for option in ("greedy", "import_torch"):
        if getattr(arguments, option):
            command.append(f"--{option.replace('_', '-')}")
    before = _read_lines(lines)
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n== {row['order']} {row['peer']} {row['quality']}, context {row['context']}\n")
        file.flush()
        try:
            limit_s = min(arguments.limit, left_s)
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s, check=False)
            fault = f"exit code {done.returncode}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            fault = f"not done in {limit_s:.0f} s"
    wall_s = time.monotonic() - began
    added = _read_lines(lines)[len(before) :]
    return {"wall_s": wall_s, **(json.loads(added[-1]) if added else {"fault": fault})}


def _read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _last_line(path: Path) -> str:
    return next((line for line in reversed(_read_lines(path)) if line.strip()), "")


def table(rows: list[Figures]) -> str:
    """The runs as Markdown, with each p50 over ours of the same order, quality and context."""
    shown = [
        "| order | peer | quality | context | p50 ms | p95 ms | p99 ms | max ms | p50 / ours | load s | device MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["order"], row["peer"], row["quality"], str(row["context"])]
        if "p50_ms" in row:
            cells += [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
            device_mb = "" if row["device_mb"] is None else str(row["device_mb"])
            cells += [_ratio(row, rows), str(row["load_s"]), device_mb]
        else:
            cells += [row["fault"].replace("|", "/"), *[""] * 6]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


def _ratio(row: Figures, rows: list[Figures]) -> str:
    """Where ours did not run in the quality, it is compared in the default one, and that is said."""
    for quality in dict.fromkeys((row["quality"], DEFAULT_QUALITY)):
        for other in rows:
            wanted = ("ours", quality, row["order"], row["context"])
            if "p50_ms" in other and wanted == tuple(other[key] for key in ("peer", "quality", "order", "context")):
                label = "" if quality == row["quality"] else f" (of {quality})"
                return f"{row['p50_ms'] / other['p50_ms']:.2f}{label}"
    return ""


def agreement(rows: list[Figures]) -> str:
    """Whether stock and ours said the same, where they took the likeliest tokens."""
    shown = []
    done = [row for row in rows if row.get("greedy")]
    for row in done:
        for other in done:
            same_run = all(row[key] == other[key] for key in ("order", "quality", "context"))
            if same_run and (row["peer"], other["peer"]) == ("stock", "ours"):
                pairs = list(zip(row["first_text"], other["first_text"], strict=True))
                equal = sum(one == two for one, two in pairs)
                spoken = row["first_spoken_crc"] == other["first_spoken_crc"]
                shown.append(
                    f"{row['order']} {row['quality']}: {equal} of {len(pairs)} first text tokens equal, "
                    f"spoken codes {'equal' if spoken else 'not equal'}\n"
                )
    return "".join(f"\n{line}" for line in shown)


# A part of the suite


SECTION_QUALITIES: Final = ("q4", "bf16")
SECTION_FRAMES: Final = 100
_SECTION_LIMIT_S: Final = 180.0

_SECTION_TEXT: Final = """\
A step of the language model: eight codes that were heard go in, a text token and eight codes to speak come out.
*Stock* is moshi_mlx's LmGen, called and read back as its `local.py` does; *ours* is `procs/model/generator.py`, with
the same sampling and the same weights, which are random, of size tiny ({layers} layers of {dim}; Moshi has 32 of
4096). On {device}. Both run on the mlx that we have, {mlx}, so that only the code differs; upstream's own pin is mlx
<0.27, so that its users may have an older one. Each run is a process of its own, {frames} frames after {untimed} that
are not timed; stock and ours take turns, in both orders. A tiny model's step is nearly all host work, the part that is
ours to shorten; of the true model's, most is reading its weights, which is the same for both. True shapes on a GPU:
[model.md](model.md).

Where both take the likeliest tokens: {agreed}."""


def section(frames: int, repeats: int) -> Section:
    """Stock and ours in turn, in both orders."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plstep") as made:
        out = Path(made)
        rows = [
            _section_run(order, peer, quality, frames, out)
            for _ in range(repeats)
            for order in ("AB", "BA")
            for quality in SECTION_QUALITIES
            for peer in (("stock", "ours") if order == "AB" else ("ours", "stock"))
        ]
        greedy = [
            _section_run("AB", peer, quality, FIRST, out, greedy=True)
            for quality in SECTION_QUALITIES
            for peer in ("stock", "ours")
        ]
    tiny = SIZES["tiny"].config
    text = _SECTION_TEXT.format(
        layers=tiny["num_layers"],
        dim=tiny["dim"],
        device=rows[0]["device"],
        frames=frames,
        untimed=rows[0]["untimed_frames"],
        mlx=rows[0]["versions"]["mlx"],
        agreed="; ".join(agreement(greedy).split("\n")[1::2]),
    )
    pairs = {quality: _pairs(rows, quality) for quality in SECTION_QUALITIES}
    series: dict[str, list[tuple[float | str, float]]] = {
        peer: [(quality, median(pair[peer]["p50_ms"] for pair in pairs[quality])) for quality in pairs]
        for peer in ("stock", "ours")
    }
    return Section(
        name="step",
        title="The model's step",
        command=f"python -m bench.step_peers --section FILE --frames {frames} --repeats {repeats}",
        text=text,
        seconds=time.monotonic() - began,
        tables=[_section_table(pairs)],
        targets=[_section_target(quality, found) for quality, found in pairs.items()],
        plots=[Plot("step", "A step of the tiny model, p50", "", "ms", "bars", False, series)],
        figures={"runs": rows, "greedy": greedy},
    )


def _section_run(order: str, peer: str, quality: str, frames: int, out: Path, greedy: bool = False) -> Figures:
    arguments = argparse.Namespace(
        size="tiny", frames=frames, seed=0, greedy=greedy, import_torch=False, limit=_SECTION_LIMIT_S
    )
    row: Figures = {"order": order, "peer": peer, "quality": quality, "context": 0}
    row |= _run(row, arguments, out, _SECTION_LIMIT_S)
    if "fault" in row:
        raise RuntimeError(f"{peer} {quality}: {row['fault']}")
    return row


def _pairs(rows: list[Figures], quality: str) -> list[dict[str, Figures]]:
    """Runs of one quality that followed each other."""
    found = [row for row in rows if row["quality"] == quality]
    return [{row["peer"]: row for row in pair} for pair in zip(found[::2], found[1::2], strict=True)]


def _ratios(pairs: list[dict[str, Figures]], key: str) -> list[float]:
    return [pair["ours"][key] / pair["stock"][key] for pair in pairs]


def _section_table(pairs: dict[str, list[dict[str, Figures]]]) -> Table:
    rows = []
    for quality, found in pairs.items():
        cells = []
        for key in ("p50_ms", "p99_ms"):
            cells += [results.spread([pair[peer][key] for pair in found]) for peer in ("stock", "ours")]
            cells.append(results.spread(_ratios(found, key)))
        rows.append([quality, *cells])
    columns = [
        "quality",
        "stock, p50 ms",
        "ours, p50 ms",
        "ours / stock",
        "stock, p99 ms",
        "ours, p99 ms",
        "ours / stock",
    ]
    return Table("A step", columns, rows, "ours / stock: of runs that followed each other.")


def _section_target(quality: str, pairs: list[dict[str, Figures]]) -> Target:
    ratios = _ratios(pairs, "p50_ms")
    measured = f"{results.spread(ratios)} times"
    return Target(f"{quality}: our step's p50 against stock's", "shorter", measured, median(ratios) < 1)


def _available() -> list[str]:
    return [peer for peer in PEERS if peer != "pytorch" or importlib.util.find_spec("moshi") is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--peer", choices=PEERS)
    what.add_argument("--all", action="store_true")
    what.add_argument("--section", type=Path, metavar="FILE")
    parser.add_argument("--quality", choices=QUALITIES, default=DEFAULT_QUALITY)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--frames", type=int, help=f"timed ones; 500, or of a section's {SECTION_FRAMES}")
    parser.add_argument("--repeats", type=int, default=2, help="of a section")
    parser.add_argument("--context", type=int, default=0, help="frames before the timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--json", type=Path, help="file to which a JSON line is appended")
    parser.add_argument("--import-torch", action="store_true", help="before mlx, which may find libraries through it")
    parser.add_argument("--order", nargs="+", choices=("AB", "BA", "LONG"), default=["AB"])
    parser.add_argument("--out", type=Path, help="folder for what --all finds")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=_available(), help="those that --all runs")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for a run of --all")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of --all")
    arguments = parser.parse_args()
    if arguments.section:
        results.finish(section(arguments.frames or SECTION_FRAMES, arguments.repeats), arguments.section)
        return
    arguments.frames = arguments.frames or 500
    if arguments.all:
        if arguments.out is None:
            parser.error("--all needs --out")
        sys.exit(0 if run_all(arguments) else 1)
    if arguments.peer == "pytorch" and arguments.quality != "bf16":
        parser.error("pytorch is measured in bf16: add --quality bf16")
    if arguments.import_torch:
        importlib.import_module("torch")
    names = Settings.__dataclass_fields__
    figures = measure(Settings(**{name: getattr(arguments, name) for name in names}))
    print(report(figures))
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps({"order": arguments.order[0], **figures}) + "\n")


if __name__ == "__main__":
    main()
