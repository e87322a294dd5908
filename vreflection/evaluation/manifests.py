"""`run.json`: what a run is, written before its first answer; who goes on with the run must be asking for the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.atomic import atomic_write
from ..errors import ConfigError, DataError
from .records import Manifest

logger = logging.getLogger(__name__)

RUN = "run.json"
ABSENT = object()
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
    if isinstance(before, Mapping) and isinstance(before.get("notes"), dict):
        before["notes"].setdefault("image_view", "stored")  # runs from before it was written down
    found = dict(differences(before, wanted))
    refused = [f"{key}: {change}" for key, change in found.items() if key not in LOOSE]
    if refused:
        more = f"; and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise ConfigError(
            f"out: {str(out)!r} holds a run with other settings: {'; '.join(refused[:8])}{more}. Set them back to go "
            "on with it, or choose another --out"
        )
    for key, change in found.items():
        logger.info("%s: %s", key, change)
    return True


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys whose values differ, with both values; what is in one of the two only is named as a whole."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in (*then, *(key for key in now if key not in then)):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(then.get(key, ABSENT), now.get(key, ABSENT), inner)
    elif then != now:
        yield name, f"{_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return "given" if isinstance(value, Mapping) else repr(value)[:80]
