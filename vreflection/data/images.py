"""Opening images and resolving their paths, both distrustful of the data.

Images are used as stored: EXIF orientation is not applied, because the public Visual-CoT boxes refer to the stored
pixels.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from vreflection.errors import DataError

# PIL's own warning threshold for decompression bombs (a quarter GiB of RGB); larger images are refused before decoding.
MAX_IMAGE_PIXELS = 89_478_485
# The host model's resize refuses images longer than this many times their width.
MAX_ASPECT_RATIO = 200
# Raster formats only: some others (EPS) start external programs when opened. JPEG includes multi-picture files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

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


def open_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image file completely and return it as RGB, transparency composited on white.

    Args:
        path: image file.
        max_pixels: width * height above this is refused before any pixel is decoded.

    Raises:
        DataError: `image-missing`, `image-empty` (no bytes or zero size), `not-an-image`, `image-too-large`,
            `image-aspect`, `image-depth`, or `image-corrupt` (broken or cut off).
    """
    with _opened(Path(path), max_pixels) as image:
        image.load()
        return to_rgb(image)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """`open_image` for the bytes of an image. `name` is for messages."""
    if not data:
        raise DataError("image-empty", f"expected an image in {name}, got 0 bytes; send or download it again")
    with _decoding(BytesIO(data), name, max_pixels) as image:
        image.load()
        return to_rgb(image)


def image_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Width and height (px) from an image file's header; no pixel is decoded.

    Raises:
        DataError: as `open_image`, as far as the header tells.
    """
    with _opened(Path(path), max_pixels) as image:
        return image.size


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
def _decoding(source: Path | BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with Image.open(source, formats=_FORMATS) as image:
            check_image_size(*image.size, name=name, max_pixels=max_pixels)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            "not-an-image",
            f"expected one of {', '.join(_FORMATS)} at {name}, got something else or a broken header; replace it",
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Copy of an image in RGB; transparent pixels show white, 16-bit grey is scaled to 8 bits.

    Raises:
        DataError: `image-depth` for 32-bit integers and floats, whose white is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # The library's own conversion would cut every value above 255 to white.
        grey_HW = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey_HW * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            "image-depth",
            f"expected 8 or 16 bits per channel, got mode {image.mode}; scale it to 8 bits and save again",
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


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
