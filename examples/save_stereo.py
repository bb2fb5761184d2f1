"""Saves some seconds of a run: left what the microphone heard, right what was sent to the speaker at that moment.

python examples/save_stereo.py --name default --seconds 10 both.wav
"""

import argparse
import sys

import soundfile

from pipeline.client import Client
from pipeline.errors import PipelineError
from pipeline.topology import SAMPLE_RATE


def save(path: str, name: str, seconds: float) -> None:
    """Write a WAV file of two channels."""
    left = round(seconds * SAMPLE_RATE)
    with (
        Client(name).conversation() as conversation,
        soundfile.SoundFile(path, "w", SAMPLE_RATE, 2, "FLOAT", format="WAV") as file,
    ):
        for block in conversation:
            file.write(block.samples[:left])
            left -= len(block.samples)
            if left <= 0:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="the WAV file to write")
    parser.add_argument("--name", default="default", help="the run's name")
    parser.add_argument("--seconds", type=float, default=10.0)
    try:
        save(**vars(parser.parse_args()))
    except (PipelineError, soundfile.LibsndfileError) as error:
        sys.exit(str(error))
