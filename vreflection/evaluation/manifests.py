"""`run.json`: what a run is, written before its first answer; who goes on with the run must be asking for the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.atomic import atomic_write
from ..errors import ConfigError, DataError
from .records import Manifest

logger = logging.getLogger(__name__)

RUN = "run.json"
# Told, not refused: where the same weights lie, and what does not decide an answer beyond rounding.
LOOSE = ("model", "versions.python", "versions.device")


def settle_manifest(out: Path, manifest: Manifest) -> bool:
    """Write the manifest of a new run, or check that it is the one that is there; whether it was there.

    Raises:
        ConfigError: the run in `out` was started with other settings. DataError: `raw-damaged` for an unreadable one.
    """
    path = out / RUN
    wanted = json.loads(json.dumps(manifest.as_dict()))
    if not path.exists():
        if any((out / "raw").glob("*.jsonl")):
            raise DataError(
                "raw-damaged",
                f"expected {RUN} beside the raw answers, got none: what they were made with is not known; restore it, "
                "or choose another --out",
                str(out),
            )
        with atomic_write(path) as file:
            file.write((json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            "raw-damaged", f"expected JSON, got {error}; restore it, or choose another --out", str(path)
        ) from None
    then, now = flat(before), flat(wanted)
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    refused = [f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in changed if key not in LOOSE]
    if refused:
        more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise ConfigError(
            f"out: {str(out)!r} holds a run with other settings: {'; '.join(refused[:8])}{more}; set them back to go "
            "on with it, or choose another --out"
        )
    for key in changed:
        logger.info("%s: %r then, %r now", key, then.get(key), now.get(key))
    return True


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result
