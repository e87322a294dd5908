"""Weights as bytes: read in pieces from safetensors files, written to new ones, cast on the way if asked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError
from .checkpoint import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, StoredTensor

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
TORCH_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 16 * 2**20  # bytes


def same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(a == b for a, b in zip(chunks(left), chunks(right), strict=True))


def chunks(tensor: StoredTensor) -> Iterable[bytes]:
    """A tensor's bytes in pieces of whole elements."""
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        remaining = tensor.size
        while remaining:
            piece = file.read(min(CHUNK, remaining))
            while len(piece) % DTYPE_BYTES[tensor.dtype] and (rest := file.read(1)):
                piece += rest
            if not piece:
                raise CheckpointError(f"{tensor.file}: it became shorter while it was read; copy it again")
            remaining -= len(piece)
            yield piece


def written_dtype(tensor: StoredTensor, dtype: str | None) -> str:
    return DTYPES[dtype][0] if dtype is not None and tensor.dtype in TORCH_FLOATS else tensor.dtype


def written_bytes(tensor: StoredTensor, dtype: str | None) -> int:
    return tensor.size // DTYPE_BYTES[tensor.dtype] * DTYPE_BYTES[written_dtype(tensor, dtype)]


def plan_shards(tensors: dict[str, StoredTensor], limit: int, dtype: str | None) -> list[dict[str, StoredTensor]]:
    """Consecutive tensors per file, each file within `limit` bytes unless a single tensor is larger."""
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = written_bytes(tensor, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    # Wide elements first, as safetensors itself does: every tensor starts at a multiple of its element size.
    return [
        dict(sorted(shard.items(), key=lambda item: -DTYPE_BYTES[written_dtype(item[1], dtype)])) for shard in shards
    ]


def write_weights(
    partial: Path,
    shards: list[dict[str, StoredTensor]],
    dtype: str | None,
    total: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Write all files and, for several, their index; returns the file names."""
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (partial / name).open("wb") as file:
            for written in write_shard(file, shard, dtype):
                done += written
                if on_progress is not None:
                    on_progress(done, total)
    return names


def write_shard(file: BinaryIO, shard: dict[str, StoredTensor], dtype: str | None) -> Iterable[int]:
    """Write one safetensors file; yields the bytes of every piece written."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        start, end = end, end + written_bytes(tensor, dtype)
        header[name] = {"dtype": written_dtype(tensor, dtype), "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in shard.items():
        for piece in chunks(tensor):
            if written_dtype(tensor, dtype) != tensor.dtype:
                piece = cast(piece, tensor, DTYPES[dtype][1], name)  # pyright: ignore[reportArgumentType]
            file.write(piece)
            yield len(piece)


def cast(piece: bytes, tensor: StoredTensor, dtype: torch.dtype, name: str) -> bytes:
    """Floating-point bytes in another precision."""
    values = torch.frombuffer(bytearray(piece), dtype=TORCH_FLOATS[tensor.dtype])
    result = values.to(dtype)
    if not torch.equal(result.isinf(), values.isinf()):
        largest = float(values[values.isfinite()].abs().max())
        raise CheckpointError(
            f"{name}: {largest:.3g} is too large for {dtype}; choose --dtype bfloat16 or float32, or leave it out"
        )
    return result.view(torch.uint8).numpy().tobytes()
