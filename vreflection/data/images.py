"""Opening images and resolving their paths, both distrustful of the data.

Every image of this package is opened here, by one of two views, `shown` or `stored` (see `pixels`). Images that people
send are read as shown; rows of training and evaluation data as stored unless a setting says otherwise, because the
boxes of the public Visual-CoT data refer to the stored pixels.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image, UnidentifiedImageError, features

from vreflection.data.file_kinds import file_kind
from vreflection.data.pixels import ImageView, orientation, stored_size, to_rgb
from vreflection.errors import DataError

# PIL's own warning threshold for decompression bombs (a quarter GiB of RGB); larger images are refused before decoding.
MAX_IMAGE_PIXELS = 89_478_485
# The host model's resize refuses images longer than this many times their width.
MAX_ASPECT_RATIO = 200
# Raster formats only: some others (EPS) start external programs when opened. JPEG includes multi-picture files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
if "avif" in features.modules and features.check("avif"):
    FORMATS += ("AVIF",)
# As much of a file as tells its kind.
_HEAD_BYTES = 1024

_FOLDERS = {
    "cub": ("cub/CUB_200_2011/images",),
    "openimages": tuple(f"openimages/train_{part}" for part in range(6)),
    "dude": ("viscot/dude", "dude", "dude/DUDE_train-val-test_binaries/images/train"),
    "sroie": ("viscot/sroie", "sroie", "dude/DUDE_train-val-test_binaries/images/train"),
    "docvqa": ("docvqa",),
    "flickr30k": ("flickr30k/flickr30k-images",),
    "gqa": ("gqa/images",),
    "infographicsvqa": ("infographicsvqa",),
    "textvqa": ("textvqa/train_images",),
    "textcap": ("textvqa/train_images",),
    "v7w": ("visual7w/images",),
    "vsr": ("vsr/images",),
    "coco": ("coco",),
}
# Datasets whose file names are only unique together with their sub-folder.
_KEEPS_SUBFOLDERS = frozenset({"cub"})


@dataclass(frozen=True)
class ImageHeader:
    """What an image file tells before its pixels are read.

    Attributes:
        stored_size: width and height (px) in the file. orientation: EXIF's, 1 (upright) to 8.
    """

    stored_size: tuple[int, int]
    orientation: int

    def size(self, view: ImageView) -> tuple[int, int]:
        width, height = self.stored_size
        return (height, width) if view == "shown" and self.orientation >= 5 else (width, height)


def open_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS, *, view: ImageView = "stored") -> Image.Image:
    """Decode an image file completely and return it as RGB, transparency on white; of an animation the first frame.

    Args:
        path: image file.
        max_pixels: width * height above this is refused before any pixel is decoded.
        view: `shown` as a viewer shows it, or `stored`; see `pixels`.

    Raises:
        DataError: `image-missing`, `image-empty` (no bytes or zero size), `not-an-image`, `image-too-large`,
            `image-aspect`, `image-depth`, or `image-corrupt` (broken or cut off).
    """
    with _opened(Path(path), max_pixels) as image:
        return to_rgb(image, view)


def decode_image(
    data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS, *, view: ImageView = "stored"
) -> Image.Image:
    """`open_image` for the bytes of an image. `name` is for messages."""
    with _opened_bytes(data, name, max_pixels) as image:
        return to_rgb(image, view)


def header_of_bytes(data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageHeader:
    """`image_header` for the bytes of an image. `name` is for messages."""
    with _opened_bytes(data, name, max_pixels) as image:
        return ImageHeader(stored_size(image), orientation(image))


def image_header(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageHeader:
    """Size and orientation of an image file; no pixel is decoded.

    Raises:
        DataError: as `open_image`, as far as the header tells.
    """
    with _opened(Path(path), max_pixels) as image:
        return ImageHeader(stored_size(image), orientation(image))


def image_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS, *, view: ImageView = "stored") -> tuple[int, int]:
    """Width and height (px) of what `open_image` gives, from the header alone. Raises as `image_header`."""
    return image_header(path, max_pixels).size(view)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image of allowed size, its pixels not yet read; whatever goes wrong inside is a `DataError`."""
    if not path.is_file():
        raise DataError("image-missing", f"expected an image file at {path}, got no such file; check the image folder")
    if path.stat().st_size == 0:
        raise DataError("image-empty", f"expected an image at {path}, got a file of 0 bytes; download it again")
    with _decoding(path, str(path), max_pixels) as image:
        yield image


@contextmanager
def _opened_bytes(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    if not data:
        raise DataError("image-empty", f"expected an image in {name}, got 0 bytes; send or download it again")
    with _decoding(BytesIO(data), name, max_pixels) as image:
        yield image


@contextmanager
def _decoding(source: Path | BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with Image.open(source, formats=FORMATS) as image:
            check_image_size(*image.size, name=name, max_pixels=max_pixels)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        kind = file_kind(_head(source))
        got = f"a {kind} that is broken or of a kind that cannot be read" if kind in FORMATS else kind
        raise DataError(
            "not-an-image",
            f"expected {', '.join(FORMATS)} at {name}, got {got or 'something else or a broken header'}; convert it "
            "to one of these",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            "image-too-large", f"expected at most {max_pixels} pixels in {name}, got {error}; scale it down"
        ) from None
    # PIL's decoders raise many types on damaged files; none of them is a reason to stop a run.
    except Exception as error:
        raise DataError(
            "image-corrupt",
            f"expected a complete image at {name}, got {type(error).__name__}: {error}; download it again",
        ) from error


def _head(source: Path | BytesIO) -> bytes:
    if isinstance(source, BytesIO):
        return bytes(source.getbuffer()[:_HEAD_BYTES])
    with source.open("rb") as file:
        return file.read(_HEAD_BYTES)


def check_image_size(width: int, height: int, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Raise DataError `image-empty`, `image-too-large` or `image-aspect` for sizes (px) that cannot be processed."""
    if width < 1 or height < 1:
        raise DataError(
            "image-empty", f"expected at least 1x1 pixels in {name}, got {width}x{height}; replace the image"
        )
    if width * height > max_pixels:
        raise DataError(
            "image-too-large",
            f"expected at most {max_pixels} pixels in {name}, got {width}x{height}; scale it down or raise max_pixels",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(
            "image-aspect",
            f"expected sides within a factor of {MAX_ASPECT_RATIO} in {name}, got {width}x{height}; crop the image",
        )


def resolve_image_path(image_folder: str | Path, dataset: str, name: str) -> Path:
    """Find an image named by a data row under the public folder layout.

    A leading `viscot/` and the dataset's own name are stripped; the dataset's conventional folders are searched, and
    then the name as given below `image_folder`. Datasets without a convention use the name only.

    Args:
        image_folder: root that holds all datasets; the result never leaves it, not even through symbolic links.
        dataset: dataset name of the row, any case; "" for none.
        name: relative path in the row.

    Raises:
        DataError: `path-escape` (absolute, `..`, or a link that leads outside) or `image-missing`.
    """
    _check_relative(name)
    root = _real_folder(os.path.abspath(image_folder))
    candidates = _candidates(dataset.lower(), name)
    for candidate in candidates:
        path = os.path.join(root, candidate)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue
        except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
            continue
        except OSError as error:
            raise DataError(
                "image-missing", f"expected a readable path, got {name[:200]!r} ({error}); fix it"
            ) from None
        real = os.path.realpath(path)
        if os.path.commonpath((root, real)) != root:
            raise DataError(
                "path-escape",
                f"expected {name!r} to stay inside {root}, got a link to {real}; copy the files or move image_folder",
            )
        return Path(path)
    raise DataError(
        "image-missing",
        f"expected {name!r} of dataset {dataset!r} below {root}, got nothing at {', '.join(candidates)}; "
        "check image_folder",
    )


@lru_cache(maxsize=64)
def _real_folder(folder: str) -> str:
    """An absolute folder without symbolic links; the same few are asked for with every row."""
    return os.path.realpath(folder)


def _check_relative(name: str) -> None:
    windows = PureWindowsPath(name)  # splits at both kinds of slashes
    bad_start = not PurePosixPath(name).parts or name.startswith(("/", "\\")) or windows.drive
    if bad_start or "\0" in name or ".." in windows.parts:
        raise DataError(
            "path-escape",
            f"expected a relative path without '..', got {name!r}; name images relative to image_folder",
        )


def _candidates(dataset: str, name: str) -> list[str]:
    """Relative paths to try, best first, without duplicates."""
    parts = list(PurePosixPath(name).parts)
    rest = parts[1:] if parts[0] == "viscot" and len(parts) > 1 else parts
    inner = rest[1:] if rest[0].lower() == dataset and len(rest) > 1 else rest
    candidates = ["/".join(rest)] if dataset not in _FOLDERS else []
    for folder in _FOLDERS.get(dataset, ()):
        if "/".join(rest).startswith(f"{folder}/"):
            candidates.append("/".join(rest))
        candidates.append("/".join((folder, *inner)))
        if dataset not in _KEEPS_SUBFOLDERS:
            candidates.append(f"{folder}/{inner[-1]}")
    candidates += ["/".join(rest), "/".join(parts)]
    return list(dict.fromkeys(candidates))
