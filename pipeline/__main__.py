"""The program `pipeline`: `pipeline.cli`, with a Ctrl-C answered quietly also while that is being imported."""

import sys


def main() -> None:
    """Run the command."""
    try:
        from pipeline import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
