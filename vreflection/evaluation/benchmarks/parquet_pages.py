"""One text or bytes column of a Parquet row group, value by value, without ever holding a page.

The usual library reads pages whole, and writers put all distinct images of a row group into one dictionary page: that
takes gigabytes twice over, packed and unpacked. Here a page is unpacked as a stream and one value of it is held.
Layout: the Parquet format's thrift definition (pages, PLAIN and RLE_DICTIONARY values, RLE / bit-packed hybrid) and the
Snappy format description.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD")
# Snappy looks back less than this far, in every compressor that works block by block.
_WINDOW = 2**16
_CHUNK = 2**18
_HEADER = 2**16

Read = Callable[[int], bytes]


class NotStreamable(ValueError):
    """Pages that are laid out in a way this file does not read; or not a whole file."""


@dataclass(frozen=True)
class Page:
    """A page's place in the file and what its header says. `rows`: of the row group before it."""

    header: dict[int, Any]
    start: int
    rows: int

    @property
    def kind(self) -> int:
        return self.header[1]

    @property
    def packed(self) -> int:
        return self.header[3]

    @property
    def detail(self) -> dict[int, Any]:
        return self.header[{DATA: 5, DICTIONARY: 7, DATA_V2: 8}[self.kind]]


class StreamedColumn:
    """Values of one column chunk by row.

    Args:
        path: the file. chunk: its metadata, as pyarrow gives it. optional: whether values may be null.

    Raises:
        NotStreamable: here or in `value`.
    """

    def __init__(self, path: Path, chunk: Any, optional: bool):
        if chunk.physical_type != "BYTE_ARRAY" or chunk.compression not in CODECS:
            raise NotStreamable(f"{chunk.physical_type} values in {chunk.compression}")
        self.path, self.codec, self.optional = path, chunk.compression, optional
        self.file: BinaryIO = io.BufferedReader(io.FileIO(path), _CHUNK)
        self.dictionary: Values | None = None
        self.page: Page | None = None
        self.ranks: list[int | None] | None = None
        self.indices: list[int] | None = None
        self.plain: Values | None = None
        starts = [chunk.data_page_offset]
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            starts.append(chunk.dictionary_page_offset)
        self.pages = list(self._pages(min(starts), chunk.num_values))

    def value(self, row: int) -> bytes | None:
        """The value of a row of the row group; cheap for ascending rows."""
        page = self.page
        if page is None or not page.rows <= row < page.rows + page.detail[1]:
            fitting = [p for p in self.pages if p.rows <= row < p.rows + p.detail[1]]
            if not fitting:
                raise NotStreamable(f"no page holds row {row}")
            page = fitting[0]
            self._open(page)
        place = row - page.rows
        rank = place if self.ranks is None else self.ranks[place]
        if rank is None:
            return None
        if self.indices is None:
            assert self.plain is not None
            return self.plain.at(rank)
        if self.dictionary is None:
            raise NotStreamable("indices without a dictionary")
        return self.dictionary.at(self.indices[rank])

    def _pages(self, start: int, values: int) -> Iterator[Page]:
        """Data pages; the dictionary page is kept aside."""
        rows = 0
        while rows < values:
            self.file.seek(start)
            header, used = thrift_struct(self.file.read(_HEADER))
            page = Page(header, start + used, rows)
            if page.kind == DICTIONARY:
                if page.detail[2] not in (PLAIN, PLAIN_DICTIONARY):
                    raise NotStreamable(f"a dictionary in encoding {page.detail[2]}")
                self.dictionary = Values(lambda page=page: self._body(page))
            elif page.kind in (DATA, DATA_V2):
                yield page
                rows += page.detail[1]
            start = page.start + page.packed

    def _open(self, page: Page) -> None:
        second = page.kind == DATA_V2
        encoding = page.detail[4] if second else page.detail[2]
        if encoding not in (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY):
            raise NotStreamable(f"values in encoding {encoding}")
        count = page.detail[1]
        body = self._body(page)
        levels = b""
        if second:
            levels = self._levels(page)
        elif self.optional:
            levels = body(int.from_bytes(body(4), "little"))
        self.ranks = _ranks(hybrid(levels, 1, count)) if self.optional else None
        present = count if self.ranks is None else sum(rank is not None for rank in self.ranks)
        self.indices = self.plain = None
        if encoding == PLAIN:
            skipped = 0 if second or not self.optional else 4 + len(levels)
            self.plain = Values(lambda: self._body(page), skipped)
        else:
            # Indices are small, whatever they point at.
            width = body(1)[0]
            self.indices = hybrid(self._rest(page, body, levels), width, present)
        self.page = page

    def _rest(self, page: Page, body: Read, levels: bytes) -> bytes:
        """What is left of a page of indices."""
        if page.kind == DATA_V2:
            return body(page.header[2] - page.detail[5] - page.detail.get(6, 0) - 1)
        return body(page.header[2] - 1 - (4 + len(levels) if self.optional else 0))

    def _levels(self, page: Page) -> bytes:
        """Definition levels of the second page layout: before the values, never packed."""
        self.file.seek(page.start + page.detail.get(6, 0))
        return self.file.read(page.detail[5])

    def _body(self, page: Page) -> Read:
        """A page's unpacked bytes, from its first value or level on."""
        start, size, codec = page.start, page.packed, self.codec
        if page.kind == DATA_V2:
            levels = page.detail[5] + page.detail.get(6, 0)
            start, size = start + levels, size - levels
            codec = codec if page.detail.get(7, True) else "UNCOMPRESSED"
        return exact(unpacked(_Section(self.path, start, size), codec))


class Values:
    """PLAIN values of a stream, forwards; asked for an earlier one it starts again. One value is held."""

    def __init__(self, opened: Callable[[], Read], skipped: int = 0):
        self.opened, self.skipped = opened, skipped
        self.position, self.held = -1, b""
        self.read: Read | None = None

    def at(self, number: int) -> bytes:
        if self.read is None or number < self.position:
            self.read, self.position = self.opened(), -1
            self.read(self.skipped)
        self.held = self.held if number == self.position else b""
        while self.position < number:
            length = int.from_bytes(self.read(4), "little")
            if self.position + 1 == number:
                self.held = self.read(length)
            else:
                for start in range(0, length, _CHUNK):
                    self.read(min(_CHUNK, length - start))
            self.position += 1
        return self.held


class _Section:
    """A stretch of a file, read through a handle of its own."""

    def __init__(self, path: Path, start: int, size: int):
        self.file: BinaryIO = io.BufferedReader(io.FileIO(path), _CHUNK)
        self.file.seek(start)
        self.left = size

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


def exact(pieces: Iterator[bytes]) -> Read:
    """A function that reads exactly so many bytes of an iterator of pieces."""
    buffer, at = b"", 0

    def read(size: int) -> bytes:
        nonlocal buffer, at
        parts: list[bytes] = []
        while size:
            if at == len(buffer):
                buffer, at = next(pieces, b""), 0
                if not buffer:
                    raise NotStreamable("a page ends early")
            part = buffer[at : at + size]
            at += len(part)
            size -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return read


def unpacked(source: _Section, codec: str) -> Iterator[bytes]:
    """A packed stretch as pieces of its content."""
    if codec == "SNAPPY":
        yield from snappy(source)
    elif codec == "UNCOMPRESSED":
        while piece := source.read(_CHUNK):
            yield piece
    else:
        import pyarrow

        whole = io.BufferedReader(_Raw(source), _CHUNK)
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(whole, "r"), codec.lower()) as stream:
            while piece := stream.read(_CHUNK):
                yield piece


class _Raw(io.RawIOBase):
    def __init__(self, source: _Section):
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def snappy(source: _Section) -> Iterator[bytes]:
    """Unpack the raw Snappy format (no frames) in pieces."""
    read = exact(iter(lambda: source.read(_CHUNK), b""))
    left, shift = 0, 0
    while True:
        byte = read(1)[0]
        left |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    out = bytearray()
    while left > 0:
        tag = read(1)[0]
        length = (tag >> 2) + 1
        if tag & 3 == 0:
            if length > 60:
                length = int.from_bytes(read(length - 60), "little") + 1
            out += read(length)
        else:
            if tag & 3 == 1:
                length = (tag >> 2 & 7) + 4
                offset = (tag >> 5 << 8) | read(1)[0]
            else:
                offset = int.from_bytes(read(2 if tag & 3 == 2 else 4), "little")
            if not 0 < offset <= len(out):
                raise NotStreamable(f"a copy from {offset} bytes back")
            start = len(out) - offset
            # A copy may reach into what it writes: then its beginning repeats.
            piece = out[start : start + length]
            out += (piece * (length // offset + 1))[:length] if offset < length else piece
        left -= length
        if len(out) >= _CHUNK + _WINDOW:
            yield bytes(out[:-_WINDOW])
            del out[:-_WINDOW]
    if left < 0:
        raise NotStreamable("more bytes than announced")
    yield bytes(out)


def hybrid(data: bytes, width: int, count: int) -> list[int]:
    """`count` numbers of `width` bits in runs of equal ones and bit-packed groups of eight."""
    values: list[int] = []
    at, mask = 0, (1 << width) - 1
    while len(values) < count:
        header, at = _varint(data, at)
        if header & 1:
            size = (header >> 1) * width
            bits = int.from_bytes(data[at : at + size], "little")
            values += [bits >> (width * n) & mask for n in range(min((header >> 1) * 8, count - len(values)))]
        else:
            size = (width + 7) // 8
            run = min(header >> 1, count - len(values))
            values += [int.from_bytes(data[at : at + size], "little")] * run
        at += size
    return values


def _ranks(levels: list[int]) -> list[int | None]:
    """Per row which of the present values it has."""
    ranks: list[int | None] = []
    present = 0
    for level in levels:
        ranks.append(present if level else None)
        present += bool(level)
    return ranks


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise NotStreamable("a number is cut off")
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def thrift_struct(data: bytes, at: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of thrift's compact protocol as field number → value, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at : at + 1] not in (b"", b"\0"):
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _signed(data, at)
        fields[number], at = _thrift(data, at, kind)
    if at >= len(data):
        raise NotStreamable("a header is cut off")
    return fields, at + 1


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _thrift(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        return _signed(data, at)
    if kind == 8:
        size, at = _varint(data, at)
        return data[at : at + size], at + size
    if kind == 12:
        return thrift_struct(data, at)
    # Page headers hold nothing else.
    raise NotStreamable(f"a header field of kind {kind}")
