"""Tokens per sample before any pixel is decoded: what packing plans with, and where unusable rows are found early."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vreflection.data.atomic import atomic_write
from vreflection.data.encode import LatentDataset, sample_length
from vreflection.data.images import image_size
from vreflection.data.row_schema import Sample
from vreflection.data.rows import Rows
from vreflection.errors import DataError

# Samples per unit of work; small enough for a moving progress bar, large enough that its overhead vanishes.
CHUNK = 512


@dataclass
class SampleLengths:
    """Tokens of every sample, 0 where it cannot be used, and why not."""

    tokens: np.ndarray  # [n] int64
    clamped: int = 0  # boxes moved back into the image
    dropped: list[DataError] = field(default_factory=list)

    @property
    def usable(self) -> np.ndarray:
        """Positions of usable samples."""
        return np.flatnonzero(self.tokens)


def measure_lengths(
    dataset: LatentDataset,
    workers: int = 0,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SampleLengths:
    """Length of every sample of a data set, from its text and its images' headers.

    Args:
        dataset: see `LatentDataset`; samples above its `max_length` count as unusable.
        workers: processes; 0 measures here.
        cache: file that keeps the result. It is used only for the same rows and settings; `cache_key` says which.
        on_progress: called with (measured, all).

    A sample that cannot be used is dropped with its reason; a broken image body shows only when it is decoded.
    """
    # Rows held in memory have no version to know them by.
    cache = cache if isinstance(dataset.samples, Rows) else None
    key = cache_key(dataset) if cache is not None else ""
    if cache is not None and (found := _read(cache, key)) is not None:
        return found
    count = len(dataset)
    tokens = np.zeros(count, dtype=np.int64)
    clamped = 0
    dropped: list[DataError] = []
    starts = range(0, count, CHUNK)
    with _mapper(workers) as each:
        for start, (lengths, moved, errors) in zip(starts, each(_Measure(dataset), starts)):
            tokens[start : start + len(lengths)] = lengths
            clamped += moved
            dropped += [DataError(*parts) for parts in errors]
            if on_progress is not None:
                on_progress(start + len(lengths), count)
    measured = SampleLengths(tokens, clamped, dropped)
    if cache is not None:
        _write(cache, key, measured)
    return measured


def cache_key(dataset: LatentDataset) -> str:
    """What the lengths depend on: rows, text and image settings, and the latents per box."""
    processor = dataset.processor
    sizes = [processor.image_grid(width, height) for width, height in ((640, 480), (4000, 3000), (40, 30))]
    words = processor.encode_text("Where is the small red note? <answer> 7 </answer>")
    parts = [getattr(dataset.samples, "versions", None), len(dataset), dataset.slot_style, dataset.num_latents]
    parts += [dataset.max_length, sizes, words]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def measure_sample(dataset: LatentDataset, index: int) -> tuple[int, int]:
    """Tokens of one sample, and how many of its boxes were clamped.

    Raises:
        DataError: it cannot be used, as far as text, boxes and image headers tell.
    """
    rows = dataset.samples
    sample, clamped = rows.parse(index) if isinstance(rows, Rows) else (rows[index], 0)
    sizes = rows.image_sizes(index) if isinstance(rows, Rows) else None
    grids = _grids(dataset, sample, sizes)
    tokens = sample_length(sample, dataset.processor, dataset.slot_style, grids, dataset.num_latents)
    if dataset.max_length is not None and tokens > dataset.max_length:
        raise DataError(
            "too-long",
            f"expected at most {dataset.max_length} tokens, got {tokens}; raise max_length or lower max_visual_tokens",
            sample.source,
        )
    return tokens, clamped


def _grids(dataset: LatentDataset, sample: Sample, sizes: Sequence[tuple[int, int]] | None) -> list[tuple[int, ...]]:
    if dataset.feature_cache is not None:
        return [tuple(int(v) for v in dataset.cached(path, sample.source)[1]) for path in sample.image_paths]
    try:
        # A clean index knows the sizes; otherwise the images' headers do.
        sizes = [image_size(path) for path in sample.image_paths] if sizes is None else sizes
        return [dataset.processor.image_grid(width, height) for width, height in sizes]
    except DataError as error:
        raise DataError(error.reason, error.message, sample.source) from error


class _Measure:
    """One chunk's lengths and errors, in any process."""

    def __init__(self, dataset: LatentDataset):
        self.dataset = dataset

    def __call__(self, start: int) -> tuple[list[int], int, list[tuple[str, str, str | None]]]:
        lengths, moved, errors = [], 0, []
        for index in range(start, min(start + CHUNK, len(self.dataset))):
            try:
                length, clamped = measure_sample(self.dataset, index)
                lengths.append(length)
                moved += clamped
            except DataError as error:
                lengths.append(0)
                errors.append((error.reason, error.message, error.source))
        return lengths, moved, errors


class _mapper:
    """`map` here or over processes."""

    def __init__(self, workers: int):
        self.pool = ProcessPoolExecutor(workers) if workers > 0 else None

    def __enter__(self):
        return map if self.pool is None else self.pool.map

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _read(cache: Path, key: str) -> SampleLengths | None:
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            errors = json.loads(str(stored["dropped"]))
            return SampleLengths(stored["tokens"], int(stored["clamped"]), [DataError(*parts) for parts in errors])
    except (OSError, ValueError, KeyError):
        return None


def _write(cache: Path, key: str, measured: SampleLengths) -> None:
    errors = json.dumps([(error.reason, error.message, error.source) for error in measured.dropped])
    cache.parent.mkdir(parents=True, exist_ok=True)
    stored = {"key": np.array(key), "tokens": measured.tokens, "dropped": np.array(errors)}
    with atomic_write(cache) as file:
        np.savez(file, clamped=np.array(measured.clamped), **stored)
