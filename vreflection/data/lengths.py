"""Tokens per sample before any pixel is decoded: what packing plans with, and where unusable rows are found early."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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
# An image file when it was measured: path, bytes, nanoseconds of its last change; -1 where it could not be seen.
Stamp = tuple[str, int, int]


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
            Rows that were unusable, and rows whose image files have another size or time than then, are measured
            again; a damaged file is none.
        on_progress: called with (measured, all).

    A sample that cannot be used is dropped with its reason; a broken image body shows only when it is decoded.

    Raises:
        DataError: a reason that starts with `file-`: the data file itself cannot be used.
    """
    # Rows held in memory have no version to know them by, and stored features none that shows in their images.
    cache = cache if isinstance(dataset.samples, Rows) and dataset.feature_cache is None else None
    key = cache_key(dataset) if cache is not None else ""
    count = len(dataset)
    rows = (_read(cache, key) if cache is not None else None) or _RowLengths.unknown(count)
    todo_k = np.flatnonzero(rows.tokens_n == 0)
    chunks = [todo_k[at : at + CHUNK].tolist() for at in range(0, len(todo_k), CHUNK)]
    done = count - len(todo_k)
    dropped: list[DataError] = []
    with _mapper(dataset, workers if count > CHUNK * workers else 0) as measure:
        for chunk, (found, errors) in zip(chunks, measure(chunks)):
            for row, tokens, clamped, images in found:
                rows.put(row, tokens, clamped, images)
            dropped += errors
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, count)
    if cache is not None and rows.tokens_n[todo_k].any():
        _write(cache, key, rows)
    return SampleLengths(rows.tokens_n, int(rows.clamped_n.sum()), dropped)


def cache_key(dataset: LatentDataset) -> str:
    """What the lengths depend on: rows, image folders, text and image settings, and the latents per box."""
    processor, samples = dataset.processor, dataset.samples
    sizes = [processor.image_grid(width, height) for width, height in ((640, 480), (4000, 3000), (40, 30))]
    words = processor.encode_text("Where is the small red note? <answer> 7 </answer>")
    parts = [getattr(samples, "versions", None), len(dataset), dataset.slot_style, dataset.num_latents]
    parts += [dataset.max_length, sizes, words, image_roots(samples) if isinstance(samples, Rows) else None]
    if isinstance(samples, Rows) and samples.image_view != "stored":
        parts.append(samples.image_view)
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def image_roots(rows: Rows) -> list[tuple[str, str]]:
    """Image folder, links resolved, and stand-in dataset name of every file behind the rows."""
    found = []
    for part in rows._parts:
        inner, folder = getattr(part, "rows", None), getattr(part, "image_folder", None)
        if isinstance(inner, Rows):
            found += image_roots(inner)
        elif folder is not None:
            found.append((os.path.realpath(folder), getattr(part, "dataset", "")))
    return found


def measure_sample(dataset: LatentDataset, index: int) -> tuple[int, int, list[Stamp]]:
    """Tokens of one sample, how many of its boxes were clamped, and its image files as they were.

    Raises:
        DataError: it cannot be used, as far as text, boxes and image headers tell.
    """
    rows = dataset.samples
    sample, clamped = rows.parse(index) if isinstance(rows, Rows) else (rows[index], 0)
    sizes = rows.image_sizes(index) if isinstance(rows, Rows) else None
    images = [(path, *_size_and_time(path)) for path in sample.image_paths]  # before their headers are read
    grids = _grids(dataset, sample, sizes)
    tokens = sample_length(sample, dataset.processor, dataset.slot_style, grids, dataset.num_latents)
    if dataset.max_length is not None and tokens > dataset.max_length:
        raise DataError(
            "too-long",
            f"expected at most {dataset.max_length} tokens, got {tokens}; raise max_length or lower max_visual_tokens",
            sample.source,
        )
    return tokens, clamped, images


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _grids(dataset: LatentDataset, sample: Sample, sizes: Sequence[tuple[int, int]] | None) -> list[tuple[int, ...]]:
    if dataset.feature_cache is not None:
        return [tuple(int(v) for v in dataset.cached(path, sample.source)[1]) for path in sample.image_paths]
    try:
        # A clean index knows the sizes; otherwise the images' headers do.
        sizes = [image_size(path, view=sample.image_view) for path in sample.image_paths] if sizes is None else sizes
        return [dataset.processor.image_grid(width, height) for width, height in sizes]
    except DataError as error:
        raise DataError(error.reason, error.message, sample.source) from error


class _Measure:
    """One chunk's lengths and errors, in any process."""

    def __init__(self, dataset: LatentDataset):
        self.dataset = dataset

    def __call__(self, chunk: list[int]) -> tuple[list[tuple[int, int, int, list[Stamp]]], list[DataError]]:
        found, errors = [], []
        for row in chunk:
            try:
                found.append((row, *measure_sample(self.dataset, row)))
            except DataError as error:
                if error.reason.startswith("file-"):
                    raise
                errors.append(error)
        return found, errors


_in_worker: _Measure | None = None


def _install(dataset: LatentDataset) -> None:
    """The data set of a worker process: sent once, not with every chunk."""
    global _in_worker
    _in_worker = _Measure(dataset)


def _measure_in_worker(chunk: list[int]):
    assert _in_worker is not None
    return _in_worker(chunk)


class _mapper:
    """Measures chunks in order, here or over processes."""

    def __init__(self, dataset: LatentDataset, workers: int):
        self.dataset, self.pool = dataset, None
        if workers > 0:
            # Not forked: this process may hold threads and a device.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, _install, (dataset,))

    def __enter__(self):
        return partial(map, _Measure(self.dataset)) if self.pool is None else partial(self.pool.map, _measure_in_worker)

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


@dataclass
class _RowLengths:
    """What is known of every row: 0 tokens where nothing is; its images as places in `stamps`."""

    tokens_n: np.ndarray
    clamped_n: np.ndarray
    images: list[list[int]]
    stamps: dict[Stamp, int]

    @classmethod
    def unknown(cls, count: int) -> _RowLengths:
        return cls(np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64), [[]] * count, {})

    def put(self, row: int, tokens: int, clamped: int, images: list[Stamp]) -> None:
        self.tokens_n[row], self.clamped_n[row] = tokens, clamped
        self.images[row] = [self.stamps.setdefault(stamp, len(self.stamps)) for stamp in images]


def _read(cache: Path, key: str) -> _RowLengths | None:
    """The cached rows, without those whose image files changed."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            tokens_n, clamped_n, ends_n = stored["tokens"], stored["clamped"], stored["image_ends"]
            images_m, stamps_s2 = stored["images"], stored["stamps"]
            paths = os.fsdecode(stored["paths"].tobytes()).split("\0")[: len(stamps_s2)]
    except Exception:  # absent, or damaged, for which zip and array readers raise many types
        return None
    stamps = [(path, *stamp) for path, stamp in zip(paths, stamps_s2.tolist())]
    changed_s = np.array([_size_and_time(path) != (size, time) for path, size, time in stamps], dtype=bool)
    row_m = np.repeat(np.arange(len(tokens_n)), np.diff(ends_n, prepend=0))
    again_k = row_m[changed_s[images_m]]
    tokens_n[again_k] = clamped_n[again_k] = 0
    starts = [0, *ends_n.tolist()]
    flat = images_m.tolist()
    images = [flat[start:end] for start, end in zip(starts, starts[1:])]
    return _RowLengths(tokens_n, clamped_n, images, {stamp: place for place, stamp in enumerate(stamps)})


def _write(cache: Path, key: str, rows: _RowLengths) -> None:
    stamps = list(rows.stamps)
    usable = [images if tokens else [] for images, tokens in zip(rows.images, rows.tokens_n.tolist())]
    used, images_m = np.unique(np.array([i for images in usable for i in images], dtype=np.int64), return_inverse=True)
    kept = [stamps[place] for place in used.tolist()]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache) as file:
        np.savez(
            file,
            key=np.array(key),
            tokens=rows.tokens_n,
            clamped=rows.clamped_n,
            images=images_m,
            image_ends=np.cumsum([len(images) for images in usable], dtype=np.int64),
            stamps=np.array([stamp[1:] for stamp in kept], dtype=np.int64).reshape(-1, 2),
            paths=np.frombuffer(os.fsencode("\0".join(stamp[0] for stamp in kept)), dtype=np.uint8),
        )
