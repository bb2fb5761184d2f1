"""Shows how loud both sides are, until the run ends or for some seconds.

python examples/level_meter.py --name default
"""

import argparse
import sys

from pipeline.audio import Samples, level
from pipeline.client import Client
from pipeline.errors import PipelineError
from pipeline.messages import dbfs
from pipeline.topology import SAMPLE_RATE

FLOOR_DBFS = -60
WIDTH = 30


def bar(samples: Samples) -> str:
    """The level of samples, shape (n,), as in `##########          -40.0 dBFS`."""
    mean_dbfs = dbfs(level(samples)[0])
    filled = round(WIDTH * max(0.0, 1 - mean_dbfs / FLOOR_DBFS))
    return f"{'#' * filled:{WIDTH}} {mean_dbfs:6.1f} dBFS"


def show(name: str, seconds: float) -> None:
    """Print a line for each tenth of a second."""
    with Client(name).conversation(block_ms=100) as conversation:
        for block in conversation:
            microphone, speaker = block.samples.T
            print(f"microphone {bar(microphone)}   speaker {bar(speaker)}", flush=True)
            if (block.position + len(block.samples)) / SAMPLE_RATE >= seconds:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="default", help="the run's name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="by default until the run ends")
    try:
        show(**vars(parser.parse_args()))
    except PipelineError as error:
        sys.exit(str(error))
