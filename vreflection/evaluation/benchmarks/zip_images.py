"""Images inside a zip archive, read without unpacking it; names never become paths."""

from __future__ import annotations

import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ...errors import DataError
from .source import REPAIR

# Far above any image or question file of the benchmarks; what claims more is not unpacked.
MAX_MEMBER_BYTES = 2**30
# Images hardly compress again; text does by less than this.
MAX_RATIO = 100


class ZipImages:
    """Files of an archive by their last name.

    Raises:
        DataError: `file-not-zip`.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError("file-not-zip", f"expected a zip archive, got {error}; {REPAIR}", str(path)) from None
        self.members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in self.archive.infolist():
            # Resource forks of another system bear the images' names.
            if not info.is_dir() and "__MACOSX" not in info.filename:
                self.members.setdefault(PurePosixPath(info.filename).name, []).append(info)

    def find(self, name: str) -> zipfile.ZipInfo | None:
        """The one member whose path ends in `name`, or None.

        Raises:
            DataError: `path-escape` for absolute names and `..`, `image-missing` where several members fit.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        if wanted.is_absolute() or ".." in wanted.parts or not wanted.parts:
            raise DataError(
                "path-escape", f"expected a relative name without '..', got {name!r}; {REPAIR}", str(self.path)
            )
        tail = wanted.parts
        fitting = [
            info
            for info in self.members.get(wanted.name, ())
            if PurePosixPath(info.filename).parts[-len(tail) :] == tail
        ]
        if len(fitting) > 1:
            several = ", ".join(info.filename for info in fitting[:3])
            raise DataError("image-missing", f"expected one {name!r}, got {several}; {REPAIR}", str(self.path))
        return fitting[0] if fitting else None

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """A member's bytes, whole and as its checksum says.

        Raises:
            DataError: `file-too-large` for what unpacks to an absurd size, `file-not-zip` for a damaged member.
        """
        source = f"{self.path}:{info.filename}"
        # The ratio of tiny files means nothing.
        absurd = info.file_size > MAX_RATIO * max(info.compress_size, 2**16)
        if info.file_size > MAX_MEMBER_BYTES or absurd:
            raise DataError(
                "file-too-large",
                f"expected a file of at most {MAX_MEMBER_BYTES >> 20} MiB that unpacks to at most {MAX_RATIO} times "
                f"its size, got {info.compress_size} bytes that claim to be {info.file_size}; {REPAIR}",
                source,
            )
        try:
            # The claimed size bounds what is read: a member that holds more fails its checksum.
            with self.lock, self.archive.open(info) as member:
                return member.read()
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise DataError("file-not-zip", f"expected a whole archive member, got {error}; {REPAIR}", source) from None
