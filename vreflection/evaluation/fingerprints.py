"""Digests that tell whether files are still the same: whole files where small, samples where large."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

WHOLE = 2**24  # files up to this size are read completely
EDGE, BLOCK, BLOCKS = 2**20, 2**14, 256  # of larger ones: both ends and evenly spaced blocks, 6 MiB in all


def bytes_digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def file_digest(path: Path) -> str:
    """`sha256:…` of the content, or for more than 16 MiB `sampled:…` of the size, both ends and 256 blocks between.

    A sampled digest notices another file, another training run's weights, a cut or shifted file; a deliberate change of
    a few bytes it may miss.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= WHOLE:
            return bytes_digest(file.readall())
        hashed = hashlib.sha256(str(size).encode())
        hashed.update(file.read(EDGE))
        for number in range(BLOCKS):
            file.seek(EDGE + (size - 2 * EDGE - BLOCK) * number // (BLOCKS - 1))
            hashed.update(file.read(BLOCK))
        file.seek(size - EDGE)
        hashed.update(file.read(EDGE))
        return f"sampled:{hashed.hexdigest()}"


def listing_digest(paths: Iterable[Path], root: Path) -> str:
    """`listing:…` of the files' names and sizes: thousands of images are not read twice."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in paths)
    return f"listing:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def joined_digest(digests: Mapping[str, str]) -> str:
    """One digest of several named ones."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
