"""Odd image files, made here, with the pixels that each view of them has at three places."""

import contextlib
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (20, 190, 40), (30, 30, 220), (230, 220, 30)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
WIDTH, HEIGHT = 48, 32
UPRIGHT = {"TL": RED, "TR": GREEN, "BL": BLUE, "BR": YELLOW}
# By EXIF's own definition of an orientation (the sides at which row 0 and column 0 of the file belong): which corners
# of the upright picture the file has top left, top right, bottom left and bottom right.
STORED_CORNERS = {
    1: "TL TR BL BR", 2: "TR TL BR BL", 3: "BR BL TR TL", 4: "BL BR TL TR",
    5: "TL BL TR BR", 6: "TR BR TL BL", 7: "BR TR BL TL", 8: "BL TL BR TR",
}  # fmt: skip


@dataclass(frozen=True)
class Odd:
    """A file; per view its size and three pixels, all channels within `tolerance`."""

    name: str
    content: bytes
    shown: dict
    stored: dict
    shown_size: tuple[int, int]
    stored_size: tuple[int, int]
    tolerance: int = 0


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, colour, rows, *chunks, interlaced=0, late=()):
    """A PNG by hand: rows without filter bytes; `chunks` before the pixels, `late` after them."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), *late, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(width, height, bits, photometric, strip, samples=1, **more):
    """An uncompressed little-endian TIFF by hand; `more`: `t<tag>=(type, values)`."""
    tags = {
        256: (4, [width]), 257: (4, [height]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, [0]), 277: (3, [samples]), 278: (4, [height]), 279: (4, [len(strip)]),
        **{int(name[1:]): value for name, value in more.items()},
    }  # fmt: skip
    after, entries = 8 + 2 + 12 * len(tags) + 4, []
    extra = b""
    for tag, (kind, values) in sorted(tags.items()):
        raw = b"".join(struct.pack({3: "<H", 4: "<I"}[kind], value) for value in values)
        if len(raw) > 4:
            extra, raw = extra + raw, struct.pack("<I", after + len(extra))
        entries.append([tag, kind, len(values), raw.ljust(4, b"\0")])
    for entry in entries:
        if entry[0] == 273:
            entry[3] = struct.pack("<I", after + len(extra))
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0\0\0\0" + extra + strip


def icc(kind, space, connection, tags):
    """An ICC profile by hand, version 2."""
    body, table = b"", b""
    for name, data in tags:
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    size = 132 + len(table) + len(body)
    head = struct.pack(">I4xI4s4s4s", size, 0x02100000, kind, space, connection).ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def text_tags(name):
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(4 + 4 + 2 + 1 + 67)
    return [(b"desc", description), (b"cprt", b"text\0\0\0\0none\0")]


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


WHITE_POINT = (b"wtpt", xyz(0.9642, 1.0, 0.8249))


def display_p3():
    """The primaries of Display P3 with sRGB's curve, as a table."""
    levels = np.linspace(0, 1, 1024)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + (linear * 65535).round().astype(">u2").tobytes()
    primaries = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
    columns = [(name, xyz(*column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)]
    curves = [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return icc(b"mntr", b"RGB ", b"XYZ ", [*text_tags(b"Display P3"), WHITE_POINT, *columns, *curves])


def linear_grey():
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    return icc(b"mntr", b"GRAY", b"XYZ ", [*text_tags(b"linear grey"), WHITE_POINT, (b"kTRC", curve)])


def grey_inks():
    """A CMYK profile in which any cyan is the grey (119, 119, 119) and all else white."""
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    table = b"".join(bytes([128 if node & 8 else 255, 128, 128]) for node in range(16))  # Lab; cyan changes slowest
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return icc(b"prtr", b"CMYK", b"Lab ", [*text_tags(b"grey inks"), WHITE_POINT, (b"A2B0", lut)])


def quadrants(orientation):
    """The stored picture whose upright picture has the corners `UPRIGHT`."""
    width, height = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    corners = [UPRIGHT[name] for name in STORED_CORNERS[orientation].split()]
    pixels_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    for place, colour in enumerate(corners):
        rows = slice(height // 2) if place < 2 else slice(height // 2, None)
        columns = slice(width // 2) if place % 2 == 0 else slice(width // 2, None)
        pixels_HWC[rows, columns] = colour
    return Image.fromarray(pixels_HWC)


def photo(name, orientation, content, tolerance=0):
    """The row of a photo that is to be turned."""

    def corners(names, width, height):
        places = [(4, 4), (width - 5, 4), (4, height - 5)]
        return {place: UPRIGHT[corner] for place, corner in zip(places, names)}

    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    stored = corners(STORED_CORNERS[orientation].split(), *size)
    shown = corners(("TL", "TR", "BL"), WIDTH, HEIGHT)
    return Odd(f"{name}-{orientation}", content, shown, stored, (WIDTH, HEIGHT), size, tolerance)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def orientations():
    kinds = {
        "jpeg": ("JPEG", 14, {"quality": 95, "subsampling": 0}),
        "png": ("PNG", 0, {}),
        "webp": ("WEBP", 0, {"lossless": True}),
        "tiff": ("TIFF", 0, {}),
        "tiff-lzw": ("TIFF", 0, {"compression": "tiff_lzw"}),
    }
    if "avif" in features.modules and features.check("avif"):
        kinds["avif"] = ("AVIF", 14, {"quality": 95, "subsampling": "4:4:4"})
    for orientation in range(2, 9):
        picture = quadrants(orientation)
        for name, (kind, tolerance, options) in kinds.items():
            yield photo(name, orientation, encode(picture, kind, exif=exif(orientation), **options), tolerance)
        more = {"save_all": True, "append_images": [Image.new("RGB", picture.size)], "quality": 95, "subsampling": 0}
        yield photo("mpo", orientation, encode(picture, "MPO", exif=exif(orientation), **more), 14)
    for orientation in (3, 6):
        picture = quadrants(orientation)
        rows = [bytes(row) for row in np.asarray(picture).reshape(picture.height, -1)]
        chunk = (b"eXIf", exif(orientation).tobytes().removeprefix(b"Exif\0\0"))
        yield photo("png-exif-first", orientation, png(*picture.size, 8, 2, rows, chunk))
        yield photo("png-exif-last", orientation, png(*picture.size, 8, 2, rows, late=[chunk]))
        deep_HWC = np.repeat(np.asarray(picture.convert("L")), 2, axis=1).reshape(picture.height, -1)
        grey = tiff(*picture.size, [16], 1, deep_HWC.tobytes(), t274=(3, [orientation]))
        yield grey_photo("tiff-16-bit", orientation, grey)
        yield grey_photo("tiff-grey", orientation, encode(picture.convert("L"), "TIFF", exif=exif(orientation)))
    cut_exif = exif(6).tobytes()[:14] + b"\xff" * 20
    jpeg = encode(quadrants(1), "JPEG", exif=cut_exif, quality=95, subsampling=0)
    yield photo("jpeg-damaged-exif-1", 1, jpeg, 14)
    yield photo("jpeg-orientation-0", 1, encode(quadrants(1), "JPEG", exif=exif(0), quality=95, subsampling=0), 14)
    yield photo("jpeg-orientation-9", 1, encode(quadrants(1), "JPEG", exif=exif(9), quality=95, subsampling=0), 14)


def grey_photo(name, orientation, content):
    row = photo(name, orientation, content)
    luma = {colour: Image.new("RGB", (1, 1), colour).convert("L").convert("RGB").getpixel((0, 0)) for colour in
            UPRIGHT.values()}  # fmt: skip
    shown, stored = ({place: luma[colour] for place, colour in view.items()} for view in (row.shown, row.stored))
    return Odd(row.name, content, shown, stored, row.shown_size, row.stored_size, 0)


def same(name, content, *pixels, tolerance=0, size=None, stored=None):
    """A row whose three places are in the first line, the same in both views unless `stored` has others."""
    pixels = pixels if len(pixels) == 3 else pixels * 3
    places = [(x, 0) for x in range(3)]
    size = size or (3, 1)
    own = dict(zip(places, pixels if stored is None else stored if len(stored) == 3 else stored * 3))
    return Odd(name, content, dict(zip(places, pixels)), own, size, size, tolerance)


def flat(mode, colour, size=(3, 1)):
    return Image.new(mode, size, colour)


def line(*colours, mode="RGB"):
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def shorts(*values, order=">"):
    return struct.pack(f"{order}{len(values)}H", *values)


def transparency():
    clear = lambda *values: (b"tRNS", shorts(*values))  # noqa: E731
    yield same("png-1-bit-clear", png(3, 1, 1, 0, [b"\x40"], clear(0)), WHITE, WHITE, WHITE)
    yield same("png-1-bit-clear-white", png(3, 1, 1, 0, [b"\x40"], clear(1)), BLACK, WHITE, BLACK)
    yield same("png-2-bit-clear", png(3, 1, 2, 0, [b"\x18"], clear(1)), BLACK, WHITE, (170, 170, 170))
    yield same("png-2-bit-clear-dark", png(3, 1, 2, 0, [b"\x18"], clear(0)), WHITE, (85, 85, 85), (170, 170, 170))
    yield same("png-4-bit-clear", png(3, 1, 4, 0, [b"\x08\x10"], clear(8)), BLACK, WHITE, (17, 17, 17))
    yield same("png-8-bit-clear", png(3, 1, 8, 0, [b"\x00\x08\x10"], clear(8)), BLACK, WHITE, (16, 16, 16))
    deep = shorts(0, 0x0808, 0x0809)
    yield same("png-16-bit-clear", png(3, 1, 16, 0, [deep], clear(0x0808)), BLACK, WHITE, (8, 8, 8))
    colour, near = (0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)
    row = shorts(*colour, *near, 0, 0, 0)
    pixels = (WHITE, (0x12, 0x56, 0x9A), BLACK)
    yield same("png-16-bit-rgb-clear", png(3, 1, 16, 2, [row], clear(*colour)), *pixels)
    passes = [shorts(*colour), shorts(0, 0, 0), shorts(*near)]  # of Adam7: pixel 0, then 2, then 1
    yield same("png-16-bit-rgb-clear-interlaced", png(3, 1, 16, 2, passes, clear(*colour), interlaced=1), *pixels)
    small = shorts(0, 0, 5, 0, 0, 6, 0, 0, 5)
    yield same("png-16-bit-rgb-clear-dark", png(3, 1, 16, 2, [small], clear(0, 0, 5)), WHITE, BLACK, WHITE)
    rgb = bytes([1, 2, 3, 4, 5, 6, 1, 2, 3])
    yield same("png-8-bit-rgb-clear", png(3, 1, 8, 2, [rgb], clear(1, 2, 3)), WHITE, (4, 5, 6), WHITE)
    palette = (b"PLTE", bytes([*RED, *GREEN, *BLUE]))
    for alpha, middle in ((b"\xff\x00", WHITE), (b"\xff\x80", (137, 222, 147))):
        content = png(3, 1, 8, 3, [b"\0\1\2"], palette, (b"tRNS", alpha))
        yield same(f"png-palette-alpha-{alpha[1]}", content, RED, middle, BLUE, tolerance=1)
    yield same("png-palette-4-bit", png(3, 1, 4, 3, [b"\x01\x20"], palette, (b"tRNS", b"\0")), WHITE, GREEN, BLUE)
    half = (191, 191, 191)
    yield same(
        "png-grey-alpha", png(3, 1, 8, 4, [bytes([128, 128, 0, 0, 9, 255])]), half, WHITE, (9, 9, 9), tolerance=1
    )
    deep = shorts(0x8080, 0x8080, 0, 0, 0x0909, 0xFFFF)
    yield same("png-16-bit-grey-alpha", png(3, 1, 16, 4, [deep]), half, WHITE, (9, 9, 9), tolerance=1)
    deep = shorts(0xFFFF, 0, 0, 0x8080, 0, 0, 0, 0, 9 * 257, 9 * 257, 9 * 257, 0xFFFF)
    yield same("png-16-bit-rgba", png(3, 1, 16, 6, [deep]), (255, 127, 127), WHITE, (9, 9, 9), tolerance=1)
    rgba = line((255, 0, 0, 128), (9, 9, 9, 0), (1, 2, 3, 255), mode="RGBA")
    pixels = ((255, 127, 127), WHITE, (1, 2, 3))
    for name, kind, options in (("png", "PNG", {}), ("webp", "WEBP", {"lossless": True}), ("tiff", "TIFF", {})):
        yield same(f"{name}-rgba", encode(rgba, kind, **options), *pixels, tolerance=1)
    premultiplied = bytes([128, 0, 0, 128, 0, 0, 0, 0, 1, 2, 3, 255])
    yield same("tiff-rgb-associated", tiff(3, 1, [8] * 4, 2, premultiplied, 4, t338=(3, [1])), *pixels, tolerance=1)
    premultiplied = bytes([64, 128, 0, 0, 9, 255])
    pixels = (half, WHITE, (9, 9, 9))
    content = tiff(3, 1, [8] * 2, 1, premultiplied, 2, t338=(3, [1]))
    with contextlib.suppress(UnidentifiedImageError):  # early versions of the library do not open it
        Image.open(io.BytesIO(content)).close()
        yield same("tiff-grey-associated", content, *pixels, tolerance=1)
    straight = bytes([128, 128, 0, 0, 9, 255])
    yield same("tiff-grey-alpha", tiff(3, 1, [8] * 2, 1, straight, 2, t338=(3, [2])), *pixels, tolerance=1)
    table = (3, [*(257 * c for c in (220, 30)), *[0] * 254, *(257 * c for c in (30, 190)), *[0] * 254,
                 *(257 * c for c in (30, 40)), *[0] * 254])  # fmt: skip
    palette_alpha = tiff(3, 1, [8] * 2, 3, bytes([0, 255, 1, 0, 1, 255]), 2, t338=(3, [2]), t320=table)
    yield same("tiff-palette-alpha", palette_alpha, RED, WHITE, (30, 190, 40))
    first = line(0, 1, 2, mode="P")
    first.putpalette([*RED, *GREEN, *BLUE])
    gif = encode(first, "GIF", transparency=1, save_all=True, append_images=[flat("P", 2)], duration=50, loop=0)
    yield same("gif-animated-clear", gif, RED, WHITE, BLUE)


def depths():
    grey = ((0, 0, 0), (128, 128, 128), WHITE)
    for kind, letter in (("png", None), ("tiff", "<")):
        levels = shorts(0, 128 * 257, 65535, order=letter or ">")
        content = png(3, 1, 16, 0, [levels]) if letter is None else tiff(3, 1, [16], 1, levels)
        yield same(f"{kind}-16-bit-grey", content, *grey)
    dark_first = shorts(65535, 127 * 257, 0, order="<")
    yield same("tiff-16-bit-white-is-zero", tiff(3, 1, [16], 0, dark_first), *grey)
    yield same("tiff-8-bit-white-is-zero", tiff(3, 1, [8], 0, bytes([255, 127, 0])), *grey)
    yield same("tiff-1-bit-white-is-zero", tiff(3, 1, [1], 0, b"\xa0"), BLACK, WHITE, BLACK)
    twelve = tiff(3, 1, [12], 1, bytes([0x00, 0x08, 0x08, 0xFF, 0xF0]))
    yield same("tiff-12-bit", twelve, *grey)
    yield same("pgm-16-bit", b"P5 3 1 65535\n" + shorts(0, 128 * 257, 65535), *grey)
    yield same("pgm-12-bit", b"P5 3 1 4095\n" + shorts(0, 2056, 4095), *grey)
    yield same("pgm-small", b"P5 3 1 100\n" + bytes([0, 50, 100]), *grey, tolerance=1)
    yield same("pgm-plain-16-bit", b"P2 3 1 65535\n0 32896 65535\n", *grey)
    yield same("pbm", b"P4 3 1\n\xa0", BLACK, WHITE, BLACK)
    wide = shorts(65535, 65535, 65535, 0, 257 * 9, 0, 0, 0, 0)
    yield same("ppm-16-bit", b"P6 3 1 65535\n" + wide, WHITE, (0, 9, 0), BLACK)
    yield same("png-16-bit-rgb", png(3, 1, 16, 2, [wide]), WHITE, (0, 9, 0), BLACK)
    little = np.frombuffer(wide, ">u2").astype("<u2").tobytes()
    yield same("tiff-16-bit-rgb", tiff(3, 1, [16] * 3, 2, little, 3), WHITE, (0, 9, 0), BLACK)
    levels = np.array([[0, 128 * 257, 65535]], dtype=np.uint16)
    content = encode(Image.fromarray(levels), "TIFF", compression="tiff_adobe_deflate")
    yield same("tiff-16-bit-deflate", content, *grey)


def colours():
    p3, sight = display_p3(), (217, 42, 23)
    colour = (200, 60, 40)
    for name, kind, options in (
        ("png", "PNG", {}), ("jpeg", "JPEG", {"quality": 100, "subsampling": 0}), ("webp", "WEBP", {"lossless": True}),
        ("tiff", "TIFF", {}),
    ):  # fmt: skip
        content = encode(flat("RGB", colour), kind, icc_profile=p3, **options)
        yield same(f"{name}-display-p3", content, sight, stored=(colour,), tolerance=3)
    clear = encode(line((200, 60, 40, 255), (200, 60, 40, 0), (200, 60, 40, 255), mode="RGBA"), "PNG", icc_profile=p3)
    yield same("png-display-p3-alpha", clear, sight, WHITE, sight, stored=(colour, WHITE, colour), tolerance=2)
    palette = flat("P", 0)
    palette.putpalette(colour)
    yield same("png-display-p3-palette", encode(palette, "PNG", icc_profile=p3), sight, stored=(colour,), tolerance=2)
    grey = encode(line(0, 55, 255, mode="L"), "PNG", icc_profile=linear_grey())
    pixels = (BLACK, (128, 128, 128), WHITE)
    yield same("png-linear-grey", grey, *pixels, stored=(BLACK, (55, 55, 55), WHITE), tolerance=1)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield same("png-srgb", encode(flat("RGB", colour), "PNG", icc_profile=srgb), colour, tolerance=1)
    for name, profile in (("broken", b"no profile at all" * 20), ("cut", p3[:300]), ("cmyk", grey_inks())):
        yield same(f"jpeg-profile-{name}", encode(flat("RGB", colour, (16, 16)), "JPEG", quality=100, subsampling=0,
                   icc_profile=profile), colour, tolerance=3, size=(16, 16))  # fmt: skip
    inks = flat("CMYK", (255, 0, 0, 0), (16, 16))
    cyan, grey_ink = (0, 255, 255), (119, 119, 119)
    yield same("jpeg-cmyk", encode(inks, "JPEG", quality=100), cyan, tolerance=3, size=(16, 16))
    content = encode(inks, "JPEG", quality=100, icc_profile=grey_inks())
    yield same("jpeg-cmyk-profile", content, grey_ink, stored=(cyan,), tolerance=3, size=(16, 16))
    content = encode(inks, "TIFF", icc_profile=grey_inks())
    yield same("tiff-cmyk-profile", content, grey_ink, stored=(cyan,), tolerance=2, size=(16, 16))
    # Stored as luminance, two differences, black: the same numbers under another transform in Adobe's marker.
    plain = encode(flat("CMYK", (55, 127, 127, 0), (16, 16)), "JPEG", quality=100)
    at = plain.index(b"Adobe") + 11
    yield same("jpeg-ycck", plain[:at] + b"\2" + plain[at + 1 :], (55, 55, 55), tolerance=3, size=(16, 16))
    lab = encode(flat("LAB", (128, 128, 128)), "TIFF")
    yield same("tiff-lab", lab, grey_ink, tolerance=2)


def frames():
    first, second = line(RED, GREEN, BLUE), flat("RGB", (9, 9, 9))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encode(first, kind, save_all=True, append_images=[second], **options)
        yield same(f"{kind.lower()}-frames", content, RED, GREEN, BLUE)


CORPUS = [*orientations(), *transparency(), *depths(), *colours(), *frames()]

# First bytes of files that are refused, and what the refusal calls them.
REFUSED = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "SVG": b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0",
    "PSD": b"8BPS\0\1" + bytes(20),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "OpenEXR": b"v/1\1\2\0\0\0",
    "DICOM": bytes(128) + b"DICM",
    "QOI": b"qoif\0\0\0\1",
    "video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2",
    "HTML": b"\xef\xbb\xbf<!DOCTYPE html><html>",
    "ZIP": b"PK\3\4\x14\0",
    "camera raw": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
}
