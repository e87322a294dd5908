"""Visual tokens on disk: the frozen vision tower sees each image once, not once per epoch and run.

One safetensors file per image, named by the SHA-256 of the image's bytes inside a folder named by what else the tokens
depend on. A changed image, other image settings or another vision tower therefore find nothing instead of the wrong
thing. Shape legend: N visual tokens, D their width.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vreflection.data.atomic import atomic_write
from vreflection.errors import DataError

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_FORMAT = "1"


class FeatureStore(Mapping[str, tuple[Tensor, Tensor]]):
    """Image path -> (visual tokens (N, D), grid_thw (3,)), read through memory maps.

    A missing, damaged or differently computed entry is a `KeyError`; what is damaged is removed, so that filling the
    store again replaces it. A disk or system that fails to read is an `OSError`, and nothing is removed. Any number of
    processes may read and write at once. Pickles as its two settings.

    Args:
        folder: root of the store; made when something is put.
        settings_key: names everything the tokens depend on besides the image, as `training.features.feature_key` does.

    `len` and iteration walk the folder; they count entries and yield the paths under which images were put.
    """

    def __init__(self, folder: str | Path, settings_key: str):
        if not settings_key or not settings_key.isalnum():
            raise ValueError(f"expected a key of letters and digits, got {settings_key!r}; use feature_key")
        self.folder = Path(folder)
        self.settings_key = settings_key

    def __getitem__(self, path: str) -> tuple[Tensor, Tensor]:
        place = self._place(path)
        try:
            # Tells a missing file from one that cannot be opened now; `safe_open` calls both missing.
            open(place, "rb").close()
            with safe_open(place, framework="pt") as entry:
                known = self._metadata(entry)
                tokens_ND, grid_3 = entry.get_tensor("tokens"), entry.get_tensor("grid_thw")
        except FileNotFoundError:
            raise KeyError(path) from None
        except SafetensorError as error:
            self._remove(place, str(error))
            raise KeyError(path) from None
        if known is None:
            raise KeyError(path)
        if known.get("crc") != _crc(tokens_ND):
            self._remove(place, "the checksum differs")
            raise KeyError(path)
        return tokens_ND, grid_3

    def __contains__(self, path: object) -> bool:
        """Whether there is a whole entry; unlike reading it, this does not compare the checksum."""
        return isinstance(path, str) and self.grid(path) is not None

    def grid(self, path: str) -> Tensor | None:
        """An image's grid_thw (3,) without reading its tokens; None where there is no entry."""
        try:
            with safe_open(self._place(path), framework="pt") as entry:
                return None if self._metadata(entry) is None else entry.get_tensor("grid_thw")
        except (KeyError, SafetensorError, OSError):
            return None

    def put(self, path: str, tokens_ND: Tensor, grid_thw: Sequence[int] | Tensor, digest: str | None = None) -> None:
        """Store an image's tokens, whole or not at all, in the type they have.

        Args:
            path: image file.
            tokens_ND: visual tokens.
            grid_thw: the image's grid in patches.
            digest: the image's `image_digest` when it was opened; read from the file now when None.

        Raises:
            KeyError: no such image.
            ValueError: wrong shapes.
            OSError: the folder is not writable or full.
        """
        grid_3 = torch.as_tensor(grid_thw, dtype=torch.int64).reshape(-1).cpu()
        if tokens_ND.ndim != 2 or len(grid_3) != 3:
            got = f"{tuple(tokens_ND.shape)} and {tuple(grid_3.shape)}"
            raise ValueError(f"expected tokens (N, D) and grid_thw (3,), got {got}; put one image at a time")
        place = self._place(path) if digest is None else self._entry(digest)
        plain_ND = tokens_ND.detach().cpu().contiguous()
        metadata = {"format": _FORMAT, "settings": self.settings_key, "path": str(path), "crc": _crc(plain_ND)}
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place, sync=False) as file:  # an entry lost in a power cut is a miss
            file.write(save({"tokens": plain_ND, "grid_thw": grid_3}, metadata))

    def __iter__(self) -> Iterator[str]:
        for place in self._entries():
            try:
                with safe_open(place, framework="pt") as entry:
                    known = self._metadata(entry)
            except (SafetensorError, OSError):
                continue
            if known is not None:
                yield known["path"]

    def __len__(self) -> int:
        return sum(1 for _ in self._entries())

    def total_bytes(self) -> int:
        """Bytes of all entries with these settings."""
        return sum(place.stat().st_size for place in self._entries())

    def _entries(self) -> Iterator[Path]:
        return (self.folder / self.settings_key).glob(f"*/*{_SUFFIX}")

    def _entry(self, digest: str) -> Path:
        return self.folder / self.settings_key / digest[:2] / f"{digest}{_SUFFIX}"

    def _place(self, path: str) -> Path:
        try:
            return self._entry(image_digest(path))
        except DataError:
            raise KeyError(path) from None

    def _metadata(self, entry) -> dict[str, str] | None:
        """An open entry's metadata, or None where it was written by another version or for other settings."""
        known = entry.metadata() or {}
        return known if (known.get("format"), known.get("settings")) == (_FORMAT, self.settings_key) else None

    def _remove(self, place: Path, why: str) -> None:
        logger.warning("damaged features removed (%s): %s", why, place)
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("could not remove them: %s", error)


def image_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        DataError: `image-missing`. OSError: the disk or system fails to read it.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        message = f"expected an image file at {path}, got {error.strerror}; check the image folder"
        raise DataError("image-missing", message) from None


def _crc(tokens_ND: Tensor) -> str:
    return f"{zlib.crc32(memoryview(tokens_ND.reshape(-1).view(torch.uint8).numpy())):08x}"
