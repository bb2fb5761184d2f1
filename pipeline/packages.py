"""The packages a run needs: which are here, and how to come by those that are not.

moshi_mlx 0.3.0 pins an old mlx and a sentencepiece that cannot be installed on Python 3.13: a plain install leaves it
out there, and keeps to its pins elsewhere. `make install` installs it without them (docs/dependencies.md).
"""

import importlib.util
import re
import sys
from typing import Final

from pipeline.errors import ConfigError

NAMES: Final = (
    "moshi_mlx", "mlx", "rustymimi", "sentencepiece", "sounddevice", "numpy", "huggingface_hub", "pyzmq", "msgspec",
    "pymembar", "posix_ipc", "soundfile", "soxr",
)  # fmt: skip

MOSHI_MLX: Final = "moshi_mlx==0.3.0"

ADD_MOSHI_MLX: Final = f"pip install --no-deps {MOSHI_MLX}"
"""Its own pins would take an old mlx, or nothing at all; what it imports is among our own dependencies."""

MLX: Final = "mlx[cpu]" if sys.platform == "linux" else "mlx"

UPGRADE_MLX: Final = f"pip install --upgrade '{MLX}'"

PINNED_MLX: Final = (0, 27)
"""moshi_mlx's pins keep mlx below this."""


def need_moshi_mlx() -> None:
    """Before anything is started. Raises ConfigError with the command that adds it."""
    if importlib.util.find_spec("moshi_mlx") is None:
        raise ConfigError(f"moshi_mlx is not installed: `{ADD_MOSHI_MLX}`")


def versions() -> dict[str, str | None]:
    """Of each package; None if it is missing."""
    return {name: version(name) for name in NAMES}


def version(name: str) -> str | None:
    """Of an installed package; None where it is not there."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_pinned(mlx: str) -> bool:
    """Whether this version of mlx is one that moshi_mlx's pins allow."""
    return tuple(int(number) for number in re.findall(r"\d+", mlx)[:2]) < PINNED_MLX
