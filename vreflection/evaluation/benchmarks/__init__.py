"""The six benchmarks, read from the files they are distributed as."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError
from . import blink, hrbench, mme_realworld_lite, mmvp, vstar
from .source import Benchmark, Spec, check_items, counts_verified, fetch, find_folder, revision_of

BENCHMARKS: dict[str, Spec] = {
    spec.name: spec
    for spec in (mmvp.SPEC, blink.SPEC, vstar.SPEC, hrbench.SPEC_4K, hrbench.SPEC_8K, mme_realworld_lite.SPEC)
}

__all__ = ["BENCHMARKS", "Benchmark", "Spec", "load_benchmark"]


def load_benchmark(
    name: str, root: str | Path | None, *, hub: bool = False, allow_other_counts: bool = False
) -> Benchmark:
    """Read and check a benchmark's texts; its images stay where they are until an item opens them.

    Args:
        name: one of `BENCHMARKS`.
        root: folder that holds it, itself or under one of its usual names.
        hub: download what is not in `root` (or everything, without a root) from the hub, at the pinned revision.
        allow_other_counts: go on where the row counts are not the published ones; `verified` is then off.

    Raises:
        ConfigError: unknown name, or neither a root nor the hub. DataError: files, columns, rows or images are
            missing, damaged or not those of the benchmark.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmarks: expected some of {', '.join(BENCHMARKS)}, got {name!r}")
    spec = BENCHMARKS[name]
    folder = _folder(spec, root, hub)
    contents = spec.read(folder, spec.max_pixels)
    check_items(spec, contents.items, folder)
    return Benchmark(
        name=name,
        items=tuple(contents.items),
        files=contents.files,
        folder=folder,
        verified=counts_verified(spec, contents.items, folder, allow_other_counts),
        revision=revision_of(folder),
        licence=spec.source.licence,
    )


def _folder(spec: Spec, root: str | Path | None, hub: bool) -> Path:
    if root is None and not hub:
        raise ConfigError("data-root: expected the folder that holds the benchmarks, got none; or pass --hub")
    if root is not None:
        path = Path(root)
        if not path.is_dir():
            raise ConfigError(f"data-root: expected a folder, got {str(root)!r}")
        if not hub:
            return find_folder(spec, path)
        from ...errors import DataError

        try:
            return find_folder(spec, path)
        except DataError:
            pass  # asked for: what is not there is downloaded
    return fetch(spec)
