"""The errors that a user may cause, each one clear line."""

from typing import Final

EXIT_REFUSED: Final = 2
"""Exit code where nothing was begun: the command, a setting, a device or a model is wrong."""


class PipelineError(Exception):
    """Something that the user can put right. str() is one line: what was given and what was expected."""


class ConfigError(PipelineError):
    """A setting, in run.toml or on the command line, is wrong."""


class DeviceError(PipelineError):
    """An audio device or sound file is missing or cannot do what was asked."""


class DeviceLostError(DeviceError):
    """An audio device that worked has stopped. It may come back."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, damaged, or not of the quality that was asked for."""


class RingError(PipelineError):
    """A shared-memory ring is missing, of another layout, or cannot be made."""


class ControlError(PipelineError):
    """A run did not answer, or answered with an error."""
