"""What kind of file some bytes begin, so that a refusal can name it."""

import re

# Where the bytes stand, the bytes, the kind. The kinds that are read are called as in `images.FORMATS`.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0", "CUR"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"II\xbc\1", "JPEG XR"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
    (0, b"icns", "ICNS"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (8, b"AVI ", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
)
# Brands of the container that several image and video formats share.
_BRANDS = (
    ((b"avif", b"avis"), "AVIF"),
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    ((b"crx ",), "camera raw"),
    ((b"isom", b"iso2", b"mp41", b"mp42", b"qt  ", b"M4V "), "video"),
)


def file_kind(head: bytes) -> str | None:
    """Name of a file's kind by its first bytes; None for one that is not known here."""
    if head[4:8] == b"ftyp":
        major = head[8:12]
        # HEIC's general brands also begin AVIF files, which name their own further on.
        if major in (b"mif1", b"msf1") and re.search(b"avi[fs]", head[16:64]):
            return "AVIF"
        return next((kind for brands, kind in _BRANDS if major in brands), None)
    for place, signature, kind in _SIGNATURES:
        if head[place : place + len(signature)] == signature:
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.match(rb"p[1-7][\s#]", text):
        return "PPM"
    if text.startswith(b"<") and b"<svg" in text:
        return "SVG"
    return "HTML" if text.startswith((b"<!doctype html", b"<html")) else None
