"""Prints what the model says, as it says it. Ends with Ctrl-C.

python examples/live_transcript.py --name default
"""

import argparse
import asyncio
import contextlib

from pipeline.client import Client
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
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(transcribe(parser.parse_args().name))


if __name__ == "__main__":
    main()
