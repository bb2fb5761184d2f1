"""Prints what the model says, as it says it: waits for the run, and goes on with the next one. Ends with Ctrl-C.

python examples/live_transcript.py --name default
"""

import argparse
import asyncio
import contextlib
import sys

from pipeline.client import Client
from pipeline.errors import PipelineError
from pipeline.messages import TextRecord


async def transcribe(name: str) -> None:
    """Print the text of the run called `name`."""
    async for event in Client(name).events("text"):
        if isinstance(event, TextRecord):
            print(event.text, end="", flush=True)


def main() -> None:
    """Read the arguments, and print until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="default", help="the run's name")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(transcribe(parser.parse_args().name))
    except PipelineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
