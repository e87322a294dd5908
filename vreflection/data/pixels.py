"""From an opened image to RGB pixels: transparency, depth, colour profile and orientation, by one of two views.

- `shown`: what a viewer shows. Turned as EXIF says, colour profile converted to sRGB.
- `stored`: the pixels in the order of the file, with their numbers as colours. Boxes of public training and evaluation
  data refer to these, and published numbers were made with their colours.

Both put transparent pixels on white and bring every depth to 8 bits, so that white is (255, 255, 255).
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageChops

from vreflection.errors import ConfigError, DataError

ImageView = Literal["shown", "stored"]

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Only the quarter turns differ from their own inverse.
_BACK = {**{number: number for number in _TURNS}, 6: 8, 8: 6}
# Which colours a profile must be about, by the mode of the pixels. Grey pixels are also fit for an RGB profile.
_PROFILE_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}
# Deep grey is scaled this many pixels at a time, which bounds the memory beside the image itself.
_PIXELS_AT_ONCE = 2**20


def checked_view(view: Any, name: str) -> ImageView:
    """A view, or ConfigError. `name` is the setting's."""
    if view not in get_args(ImageView):
        raise ConfigError(f"{name}: expected shown or stored, got {view!r}")
    return view


def to_rgb(image: Image.Image, view: ImageView) -> Image.Image:
    """Copy of an image in RGB. It carries no metadata: nothing that could turn or colour it again.

    Args:
        image: any mode; best not yet loaded, because the library then still tells 2- and 4-bit grey from 8-bit.
        view: see the module.

    Raises:
        DataError: `image-depth` for 32-bit integers and floats, whose white is unknown.
    """
    file = _FilePixels.of(image)
    # The library turns TIFF as it loads it, and then no longer reports the orientation. Others matter to one view only.
    matters = view == "shown" or image.format == "TIFF"
    before = orientation(image) if matters else 1
    _load(image)
    after = orientation(image) if matters else 1
    colours, alpha = _colours_and_alpha(image, file)
    profile = image.info.get("icc_profile") if view == "shown" else None
    rgb = _srgb(colours, profile)
    if alpha is not None:
        white = Image.new("RGB", rgb.size, (255, 255, 255))
        white.paste(rgb, mask=alpha)
        rgb = white
    turn = after if view == "shown" else _BACK.get(before, 1) if after != before else 1
    if turn in _TURNS:
        rgb = rgb.transpose(_TURNS[turn])
    rgb.info = {}
    return rgb


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, without decoding pixels; 1 where it is absent or makes no sense."""
    try:
        if image.format == "PNG" and getattr(image, "tile", None):
            _read_late_exif(image)
            exif = Image.Image.getexif(image)  # the PNG reader's own decodes the whole image first
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
    # Damaged EXIF raises many types; a viewer shows such an image as it is.
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height (px) as stored of an image that is not yet loaded."""
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        return int(tags[256]), int(tags[257])
    return image.size


@dataclass(frozen=True)
class _FilePixels:
    """What a file tells about its pixels and the library forgets once they are loaded.

    Attributes:
        white: level of white in 16-bit modes. white_is_zero: the levels are the other way round.
        grey_step: 8-bit levels per stored level of 2- and 4-bit grey.
        low: the low bytes of 16-bit RGB with a transparent colour.
    """

    white: int = 65535
    white_is_zero: bool = False
    grey_step: int = 1
    sixteen: bool = False
    low: Image.Image | None = None

    @classmethod
    def of(cls, image: Image.Image) -> _FilePixels:
        rawmode = _rawmode(image)
        tags: Any = getattr(image, "tag_v2", None)
        if image.format == "TIFF" and tags is not None and image.mode.startswith("I;16"):
            bits = tags.get(_BITS, (16,))
            white = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
            return cls(white=white, white_is_zero=tags.get(_PHOTOMETRIC) == 0)
        if image.format == "PNG" and image.mode == "L":
            return cls(grey_step={"L;2": 85, "L;4": 17}.get(rawmode, 1))
        if rawmode == "RGB;16B" and image.format == "PNG" and "transparency" in image.info:
            return cls(sixteen=True, low=_low_bytes(image))
        return cls()


def _load(image: Any) -> None:
    name = getattr(image, "filename", "")
    if image.format != "TIFF" or not name:
        image.load()
        return
    # Mapped into memory by its name, a grey TIFF that lies on its side would get the sides of the upright one.
    image.filename = ""
    try:
        image.load()
    finally:
        image.filename = name


def _rawmode(image: Image.Image) -> str:
    """The layout of an unloaded image's pixels in its file; empty for others."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, (tuple, list)) and args else args
    return first if isinstance(first, str) else ""


def _low_bytes(image: Any) -> Image.Image | None:
    """The low byte of each channel of a 16-bit RGB PNG, of which the library loads the high bytes only."""
    if image.fp is None:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = BytesIO(image.fp.read())
    image.fp.seek(place)
    low: Any = Image.open(content, formats=("PNG",))
    # Read as little-endian, the bytes change places.
    low.tile = [(*low.tile[0][:3], "RGB;16L")]
    low.load()
    return low


def _read_late_exif(image: Any) -> None:
    """Find a PNG's EXIF where it comes after the pixels, by the lengths of the chunks between."""
    if "exif" in image.info or image.fp is None:
        return
    place = image.fp.tell()
    image.fp.seek(8)
    while len(head := image.fp.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            image.info["exif"] = b"Exif\0\0" + image.fp.read(length)
            break
        image.fp.seek(length + 4, 1)
    image.fp.seek(place)


def _colours_and_alpha(image: Image.Image, file: _FilePixels) -> tuple[Image.Image, Image.Image | None]:
    """Colours in L, RGB or CMYK, and opacity in L; None where all is opaque."""
    mode, clear = image.mode, image.info.get("transparency")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _deep_grey(image, file, clear if isinstance(clear, int) else None)
    if mode in ("I", "F"):
        raise DataError(
            "image-depth",
            f"expected 8 or 16 bits per channel, got mode {mode}; scale it to 8 bits and save again",
        )
    if mode in ("1", "L") and isinstance(clear, int):
        grey, level = image.convert("L"), clear * file.grey_step
        return grey, grey.point([0 if value == level else 255 for value in range(256)])
    if mode == "RGB" and isinstance(clear, tuple):
        return image, _all_but(image, file, clear)
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB"), rgba.getchannel("A")
    return (image if mode in _PROFILE_SPACES else image.convert("L" if mode == "1" else "RGB")), None


def _deep_grey(image: Image.Image, file: _FilePixels, clear: int | None) -> tuple[Image.Image, Image.Image | None]:
    """16-bit levels as 8-bit ones, in bands of rows. The library's own conversion cuts all above 255 to white."""
    width, height = image.size
    grey, alpha = Image.new("L", image.size), None if clear is None else Image.new("L", image.size)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        levels_HW = np.asarray(band).astype(np.uint32)
        if alpha is not None:
            alpha.paste(Image.fromarray(np.where(levels_HW == clear, 0, 255).astype(np.uint8)), (0, top))
        eight_HW = ((levels_HW * 255 + file.white // 2) // file.white).astype(np.uint8)
        grey.paste(Image.fromarray(255 - eight_HW if file.white_is_zero else eight_HW), (0, top))
    return grey, alpha


def _all_but(image: Image.Image, file: _FilePixels, colour: tuple[int, ...]) -> Image.Image:
    """Opacity of an RGB image with one transparent colour: equal in every byte that is known."""
    deep = file.sixteen or max(colour) > 255
    planes = [(image, 8 if deep else 0)] + ([] if file.low is None else [(file.low, 0)])
    equal = Image.new("L", image.size, 255)
    for plane, shift in planes:
        for channel, level in enumerate(colour):
            byte = level >> shift & 255
            same = plane.getchannel(channel).point([255 if value == byte else 0 for value in range(256)])
            equal = ImageChops.darker(equal, same)
    return ImageChops.invert(equal)


def _srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours in sRGB; a profile that is broken or about other colours is ignored, as browsers do."""
    # The colour library raises several types on broken profiles, and one more where it is not installed.
    with suppress(Exception):
        if profile:
            return _by_profile(colours, profile)
    return colours.convert("RGB")


def _by_profile(colours: Image.Image, profile: bytes) -> Image.Image:
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in _PROFILE_SPACES[colours.mode]:
        return colours.convert("RGB")
    pixels = colours.convert("RGB") if space == "RGB" else colours
    target = ImageCms.createProfile("sRGB")
    srgb = ImageCms.profileToProfile(pixels, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB")
    assert srgb is not None
    return srgb
