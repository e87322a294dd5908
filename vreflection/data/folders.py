"""Folders that a command writes to."""

import os
from pathlib import Path

from ..errors import ConfigError


def make_folder(folder: Path, setting: str = "out") -> None:
    """Make a folder where it is missing.

    Args:
        setting: what the message calls the folder's option.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file of that name is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"{setting}: expected a folder that can be made, got {str(folder)!r} ({why})") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{setting}: expected a folder that can be written to, got {str(folder)!r}; choose another")
