"""A small container of arrays for memory maps: a prefix of any bytes, then arrays, a JSON header and a checksum."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TRAILER = struct.Struct("<QQI8s")  # length of the arrays, length of the header, CRC-32 of both, magic


def write_arrays(file: BinaryIO, magic: bytes, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Append arrays and a JSON-able header; `magic` (8 bytes) names kind and version of the content."""
    file.write(b"\0" * (-file.tell() % 8))
    places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    length = crc = 0
    for name, array in arrays.items():
        body = array.tobytes()
        body += b"\0" * (-len(body) % 8)
        places[name] = (length, array.dtype.str, array.shape)
        length += len(body)
        crc = zlib.crc32(body, crc)
        file.write(body)
    text = json.dumps({"arrays": places, **header}).encode()
    file.write(text)
    file.write(_TRAILER.pack(length, len(text), zlib.crc32(text, crc), magic))


def read_arrays(path: str | Path, magic: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and memory-mapped arrays, or None where the file is absent, damaged or of another kind or version.

    The checksum covers arrays and header, not the prefix.
    """
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # absent, or empty
        return None
    end = len(whole) - _TRAILER.size
    if end < 0:
        return None
    length, header_length, crc, found = _TRAILER.unpack(whole[end:].tobytes())
    start = end - header_length - length
    if found != magic or start < 0 or start % 8 or zlib.crc32(whole[start:end].data) != crc:
        return None
    header = json.loads(whole[end - header_length : end].tobytes())
    arrays: dict[str, np.ndarray] = {}
    for name, (at, kind, shape) in header.pop("arrays").items():
        size = np.dtype(kind).itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[name] = whole[start + at : start + at + size].view(kind).reshape(shape)
    return header, arrays


def has_magic(path: str | Path, magic: bytes) -> bool:
    """Whether a file ends as `write_arrays` ends one of this kind."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - len(magic)))
            return file.read() == magic
    except OSError:
        return False
