"""The program `pipeline`: `pipeline.cli`, with a Ctrl-C answered quietly also while that is being imported."""

import os
import sys
from typing import Final

_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"


def main() -> None:
    """Run the command."""
    try:
        _load_numpy()
        from pipeline import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


def _load_numpy() -> None:
    """Every command needs numpy, and none its BLAS, which when it is loaded starts a thread for each core."""
    given = os.environ.get(_BLAS_THREADS)
    os.environ.setdefault(_BLAS_THREADS, "1")
    import numpy  # noqa: F401

    if given is None:
        del os.environ[_BLAS_THREADS]


if __name__ == "__main__":
    main()
