"""How much memory, and time, it takes to bring a model in: `python -m bench.loading DIR_OR_REPO [--quality q4]`.

Loads the language model as the engine does: the weights, as they are packed in the file, and its generator, which joins
some tables and makes the rings of keys and values. Printed are the file's size, MLX's peak, what is in use afterwards,
and the process's largest resident size, against the file. `--context 10` makes the rings next to nothing, so that what
the joining takes is seen.
"""

import argparse
import resource
import sys
import time
from typing import Final

import mlx.core as mx

from pipeline import checkpoints
from procs.model.generator import Generator
from procs.model.loading import compute_type, load_model
from procs.model.sampling import Sampling

MB: Final = 1e6
_RSS_BYTES: Final = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Load, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a checkpoint's folder or repository")
    parser.add_argument("--quality", choices=list(checkpoints.QUALITIES), default=checkpoints.DEFAULT_QUALITY)
    parser.add_argument("--context", type=int, help="of the rings, in frames; by default the model's")
    arguments = parser.parse_args()
    checkpoint = checkpoints.find(arguments.model, arguments.quality)
    checkpoint.config["context"] = arguments.context or checkpoint.config["context"]
    file_bytes = checkpoint.model_file.stat().st_size
    print(f"{checkpoint.model_file.name}: {file_bytes / MB:.0f} MB, on {mx.default_device()}, mlx {mx.__version__}")
    start = time.perf_counter()
    model = load_model(checkpoint)
    say("weights", file_bytes, start)
    generator = Generator(model, Sampling(), 0, compute_type(checkpoint))
    say("with tables joined and rings made", file_bytes, start)
    print(f"rings: {sum(ring.keys.nbytes + ring.values.nbytes for ring in generator._rings) / MB:.0f} MB")


def say(what: str, file_bytes: int, start: float) -> None:
    """One line: the most so far, and what is left."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_BYTES
    print(
        f"{what}: {time.perf_counter() - start:.1f} s; MLX's peak {mx.get_peak_memory() / MB:.0f} MB "
        f"({mx.get_peak_memory() / file_bytes:.3f} of the file), in use {mx.get_active_memory() / MB:.0f} MB; "
        f"resident at most {resident / MB:.0f} MB ({resident / file_bytes:.3f})"
    )


if __name__ == "__main__":
    main()
