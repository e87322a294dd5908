"""Where the rows of a large JSON list lie in its file, found without ever holding more than a window of it."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vreflection.errors import DataError

# Longer rows are refused: no sane row comes near, and a damaged or hostile file must not fill the memory.
MAX_ROW_BYTES = 64 * 2**20
_BLOCK = 2**20
# An error this close to the window's end may come from a cut escape, number or literal rather than from the file.
_CUT_ZONE = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_FIX = "repair the file or download it again"


def scan_json_list(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (first byte, byte after the last, value) of each element of a JSON list.

    Every element is parsed by the standard decoder, so what is yielded is valid JSON; compact and pretty-printed
    files, escapes, any UTF-8 text, a byte-order mark and CRLF are read alike.

    Args:
        file: the data file, open for reading in binary mode, at its start.
        path: its name, for messages.

    Raises:
        DataError: `file-not-json` with the position, or `file-shape` where the file is JSON but not a list.
    """
    window = _TextWindow(file, path)
    if window.next_char() != "[":
        value = window.decode()
        if window.next_char():
            hint = "; name a file of one object per line .jsonl" if isinstance(value, dict) else ""
            raise window.error(f"Extra data{hint}", window.position)
        kind = type(value).__name__
        raise DataError("file-shape", f"expected a list of rows, got {kind}; wrap the rows in a list", str(path))
    window.advance(window.position + 1)
    first = True
    while (char := window.next_char()) != "]":
        if not first:
            if char != ",":
                raise window.error("Expecting ',' delimiter", window.position)
            window.advance(window.position + 1)
            window.next_char()
        first = False
        start = window.byte
        value = window.decode()
        yield start, window.byte, value
    window.advance(window.position + 1)
    if window.next_char():
        raise window.error("Extra data", window.position)


class _TextWindow:
    """A stretch of decoded text that moves over the file and knows its byte position."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file = file
        self.path = path
        self.text = ""
        self.position = 0  # in text
        self.byte = 0  # of `position`, in the file
        self._decoder = json.JSONDecoder()
        self._undecoded = b""
        self._decoded_to = 0
        if self._grow() and self.text.startswith("\ufeff"):
            self.advance(1)

    def next_char(self) -> str:
        """Skip white space; the character at the new position, "" at the file's end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.advance(match.end() if match else self.position)
            if self.position < len(self.text) or not self._grow():
                return self.text[self.position : self.position + 1]

    def advance(self, position: int) -> None:
        """Move to a later position of the text."""
        self.byte += _num_bytes(self.text, self.position, position)
        self.position = position

    def decode(self) -> Any:
        """The JSON value that starts here; moves behind it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - _CUT_ZONE or error.msg.startswith("Unterminated")
                ahead = error.pos - self.position  # growing moves the text
                if cut and self._grow():
                    continue
                raise self.error(error.msg, self.position + ahead) from None
            except (ValueError, RecursionError) as error:  # numbers too long to convert, and absurd nesting
                raise self.error(str(error), self.position) from None
            if end >= len(self.text) - _CUT_ZONE:  # a number may go on behind the window's end
                end -= self.position
                if self._grow():
                    continue
            self.advance(end)
            return value

    def error(self, what: str, position: int) -> DataError:
        """`file-not-json` at a position of the text."""
        byte = self.byte + _num_bytes(self.text, self.position, position)
        line, column = _line_and_column(self.path, byte)
        where = f"line {line} column {column} (byte {byte})"
        return DataError("file-not-json", f"expected JSON, got {what}: {where}; {_FIX}", str(self.path))

    def _grow(self) -> bool:
        """Forget the text before the position and read on; False at the file's end."""
        self.text = self.text[self.position :]
        self.position = 0
        if len(self.text) > MAX_ROW_BYTES:
            raise self.error(f"a row of more than {MAX_ROW_BYTES >> 20} MB", 0)
        # Doubling keeps the work on a long row linear: it is parsed again whenever the window grows.
        block = self.file.read(max(_BLOCK, len(self.text)))
        data = self._undecoded + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            where = self._decoded_to + error.start
            raise DataError(
                "file-not-json",
                f"expected UTF-8 JSON, got byte 0x{data[error.start]:02x} at position {where}; check the file type",
                str(self.path),
            ) from None
        self._undecoded = data[used:]
        self._decoded_to += used
        self.text += text
        return bool(text) or bool(block) and self._grow()


def _num_bytes(text: str, start: int, end: int) -> int:
    """UTF-8 length of text[start:end]."""
    return end - start if text.isascii() else len(text[start:end].encode())


def _line_and_column(path: Path, byte: int) -> tuple[int, int]:
    """Line and column, both from 1, of a byte of a UTF-8 file."""
    line, line_start, at = 1, 0, 0
    with open(path, "rb") as file:
        while at < byte and (block := file.read(min(_BLOCK, byte - at))):
            line += block.count(b"\n")
            newline = block.rfind(b"\n")
            line_start = at + newline + 1 if newline >= 0 else line_start
            at += len(block)
        file.seek(line_start)
        return line, len(file.read(min(byte - line_start, MAX_ROW_BYTES)).decode("utf-8-sig", "replace")) + 1
