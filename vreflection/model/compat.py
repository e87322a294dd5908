"""Which host-library versions are supported, said before anything subtle goes wrong."""

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
