"""The host library: which versions are supported, said before anything subtle goes wrong; and keeping it quiet."""

from __future__ import annotations

import re

MINIMUM_TRANSFORMERS = (5, 5, 4)


def check_transformers_version(version: str) -> None:
    """Refuse versions that are too old or known to compute wrong positions.

    Raises:
        ImportError: naming the installed version, the reason and the command that mends it.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    parts = tuple(int(part or 0) for part in (match.groups() if match else ()))
    if parts >= MINIMUM_TRANSFORMERS:
        return
    wanted = ".".join(map(str, MINIMUM_TRANSFORMERS))
    why = "rotates still images wrongly" if parts >= (5, 3, 0) else "lacks interfaces this package needs"
    raise ImportError(
        f"transformers {version} {why}; expected at least {wanted}. Mend it with: pip install 'transformers>={wanted}'"
    )


def quiet_host_library() -> None:
    """Its own bars and notices would tear ours apart."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch.utils.data")
