"""Raw benchmark rows: what pytest-benchmark's JSON holds of them, checked and typed.

A file is `{"benchmarks": [{"name", "extra_info", …}, …]}`, or has one such row per line (`.jsonl`, as a run that may be
killed leaves them). Timed rows hold in `extra_info` the seconds of every round
of every variant (`raw_s`), all variants timed in turn within one run, so that round i of one and round i of another saw
the same machine.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError

_SETTINGS = ("device", "dtype", "threads", "torch")
_KNOWN = {
    "median_s", "p20_s", "p80_s", "speedup_over", "speedup", "raw_s", "bytes", "flops", "speed_of_light_s", "ceilings",
    "share_of_light", "baselines", "sweep", "commit", "extra_peak_bytes", *_SETTINGS,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case of a suite.

    Attributes:
        name: such as `test_probe[float32-1024-1-forward]`. suite: file stem, "" where the file does not tell.
        seconds: per variant one number per round; ours comes first. Empty in rows that time nothing in turn.
        base: the variant that ratios are to. baselines: what ours is judged against, `base` among them.
        bytes, flops: the fewest that one call needs. light_s: seconds they take at the ceilings of the same run.
        ceilings: `bytes_per_s` and `flops_per_s`, measured in the same run.
        memory: peak bytes per variant beyond parameters, inputs and gradients.
        sweep: `{"figure": "growth", "axis": "tokens", "value": 1024}` where the case is a point of a curve.
        settings: device, dtype, threads, torch version. commit: of the code. extra: everything else.
    """

    name: str
    suite: str
    seconds: Mapping[str, tuple[float, ...]]
    base: str | None
    baselines: tuple[str, ...]
    bytes: float | None
    flops: float | None
    light_s: float | None
    ceilings: Mapping[str, float]
    memory: Mapping[str, float]
    sweep: Mapping[str, Any]
    settings: Mapping[str, str]
    commit: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name.removeprefix("test_")

    @property
    def key(self) -> tuple[str, str]:
        return self.suite, self.name

    @property
    def ours(self) -> str | None:
        """The variant that the row is about; None where nothing was timed in turn."""
        return next(iter(self.seconds), None)

    def median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])

    def ratio(self, variant: str, base: str | None = None) -> float:
        """How many times faster `variant` is than `base` (the row's own, if none is named)."""
        base = base or self.base
        assert base is not None
        return self.median(base) / self.median(variant)

    @property
    def hardest(self) -> str | None:
        """The fastest baseline; None where there is nothing but ours."""
        others = [name for name in self.baselines if name != self.ours]
        return min(others, key=self.median) if others else None

    def spread(self, variant: str, base: str) -> tuple[float, float]:
        """20th and 80th percentile, over the rounds, of how many times faster `variant` is than `base`."""
        rounds = sorted(b / a for a, b in zip(self.seconds[variant], self.seconds[base]))
        low, high = (rounds[min(int(share * len(rounds)), len(rounds) - 1)] for share in (0.2, 0.8))
        return low, high

    @property
    def standing(self) -> str:
        """Against the fastest baseline: `loses`, `wins`, or `level` where the rounds' 20th to 80th percentile hold 1.

        Empty for rows without a baseline.
        """
        if self.ours is None or self.hardest is None:
            return ""
        low, high = self.spread(self.ours, self.hardest)
        return "loses" if high < 1 else ("level" if low <= 1 else "wins")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of all files in order.

    Raises:
        DataError: a file cannot be read, is no benchmark file, or holds a malformed row; the message names it.
    """
    return [_row(path, number, raw) for path in paths for number, raw in enumerate(_benchmarks(Path(path)))]


def _benchmarks(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # A kill may have cut the last line; a cut line before others is no such thing.
            lines = [line for line in text.splitlines() if line.strip()]
            whole = lines if text.endswith("\n") else lines[:-1]
            return [json.loads(line) for line in whole]
        loaded = json.loads(text)
    except OSError as error:
        raise DataError("unreadable", f"cannot be read: {error.strerror}; name a file that exists", str(path)) from None
    except ValueError as error:
        raise DataError(
            "not_json", f"expected JSON, got {error}; was the run cut off? Run it again", str(path)
        ) from None
    found = loaded.get("benchmarks") if isinstance(loaded, dict) else None
    if not isinstance(found, list):
        message = "expected an object with a list `benchmarks`; write one with pytest bench/ --benchmark-json=FILE"
        raise DataError("not_benchmarks", message, str(path))
    return found


def _row(path: Path, number: int, raw: Any) -> Row:
    place = f"{path}:benchmarks[{number}]"
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise DataError("bad_row", "expected an object with a `name`; run the suite again", place)
    place = f"{place} ({raw['name']})"
    info = raw.get("extra_info", {})
    if not isinstance(info, dict):
        raise DataError("bad_row", f"extra_info: expected an object, got {type(info).__name__}", place)
    seconds = _seconds(info.get("raw_s", {}), place)
    base = str(info.get("speedup_over", ""))
    if seconds and base not in seconds:
        raise DataError("bad_row", f"speedup_over: expected one of {', '.join(seconds)}, got {base!r}", place)
    baselines = tuple(info.get("baselines") or ((base,) if seconds else ()))
    if unknown := [name for name in baselines if name not in seconds]:
        raise DataError("bad_row", f"baselines: expected names of raw_s ({', '.join(seconds)}), got {unknown}", place)
    suite = raw.get("suite") or Path(str(raw.get("fullname", "")).split("::")[0]).stem
    numbers = {name: _number(info.get(name), name, place) for name in ("bytes", "flops", "speed_of_light_s")}
    return Row(
        name=raw["name"], suite=suite.removeprefix("bench_"), seconds=seconds, base=base if seconds else None,
        baselines=baselines, bytes=numbers["bytes"], flops=numbers["flops"], light_s=numbers["speed_of_light_s"],
        ceilings=info.get("ceilings", {}), memory=info.get("extra_peak_bytes", {}), sweep=info.get("sweep", {}),
        settings={name: str(info[name]) for name in _SETTINGS if name in info}, commit=str(info.get("commit", "")),
        extra={name: value for name, value in info.items() if name not in _KNOWN},
    )  # fmt: skip


def _seconds(raw: Any, place: str) -> dict[str, tuple[float, ...]]:
    if not isinstance(raw, dict):
        raise DataError("bad_row", f"raw_s: expected seconds per variant, got {type(raw).__name__}", place)
    for variant, values in raw.items():
        usable = isinstance(values, list) and values and all(_is_number(v) and v > 0 for v in values)
        if not usable:
            message = f"raw_s[{variant!r}]: expected a list of positive seconds, got {values!r}; run the suite again"
            raise DataError("bad_row", message, place)
    if len({len(values) for values in raw.values()}) > 1:
        counts = ", ".join(f"{name} {len(values)}" for name, values in raw.items())
        raise DataError("bad_row", f"raw_s: expected as many rounds of every variant, got {counts}", place)
    return {variant: tuple(values) for variant, values in raw.items()}


def _number(value: Any, name: str, place: str) -> float | None:
    if value is not None and not _is_number(value):
        raise DataError("bad_row", f"{name}: expected a number, got {value!r}; run the suite again", place)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
