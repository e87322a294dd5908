"""One picture everywhere: every odd file of the corpus, read by both views."""

import io
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vreflection.data.images import decode_image, image_header, image_size, open_image
from vreflection.data.pixels import to_rgb
from vreflection.errors import DataError

VIEWS = ("shown", "stored")
odd_images = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("odd_images.py"))))


def check(image, row, view):
    assert image.mode == "RGB" and not image.info and image.size == getattr(row, f"{view}_size")
    for place, colour in getattr(row, view).items():
        assert np.abs(np.subtract(image.getpixel(place), colour)).max() <= row.tolerance, (
            f"{row.name} {view} at {place}: {image.getpixel(place)} instead of {colour}"
        )


def test_the_corpus_is_large_and_its_names_are_unique():
    assert len({row.name for row in odd_images.CORPUS}) == len(odd_images.CORPUS) >= 60


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("row", odd_images.CORPUS, ids=lambda row: row.name)
def test_every_file_has_its_pixels(row, view, tmp_path):
    check(decode_image(row.content, "x", view=view), row, view)
    (tmp_path / "x").write_bytes(row.content)
    check(open_image(tmp_path / "x", view=view), row, view)
    assert image_size(tmp_path / "x", view=view) == getattr(row, f"{view}_size")


@pytest.mark.parametrize("row", odd_images.CORPUS, ids=lambda row: row.name)
def test_an_opened_image_is_the_same_and_is_turned_once(row, tmp_path):
    image = to_rgb(Image.open(io.BytesIO(row.content)), "shown")
    check(image, row, "shown")
    (tmp_path / "x").write_bytes(row.content)
    with Image.open(tmp_path / "x") as opened:
        check(to_rgb(opened, "shown"), row, "shown")
    again = to_rgb(image, "shown")
    assert again is not image and again.tobytes() == image.tobytes()


@pytest.mark.parametrize("view", VIEWS)
def test_ordinary_images_have_the_pixels_of_the_library(view, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK", "RGBA", "1", "P"):
        picture = Image.fromarray(noise[..., :3]).convert(mode) if mode != "RGBA" else Image.fromarray(noise)
        for kind in {"CMYK": ("JPEG", "TIFF"), "RGBA": ("PNG",), "P": ("PNG", "GIF")}.get(mode, ("JPEG", "PNG", "BMP")):
            picture.save(tmp_path / "x", kind)
            with Image.open(tmp_path / "x") as opened:
                plain = opened.convert("RGBA" if mode == "RGBA" else "RGB")
            if mode == "RGBA":
                white = Image.new("RGB", plain.size, (255, 255, 255))
                white.paste(plain, mask=plain.getchannel("A"))
                plain = white
            assert open_image(tmp_path / "x", view=view).tobytes() == plain.tobytes(), (mode, kind)


def test_header_is_read_without_pixels(tmp_path):
    for row in odd_images.CORPUS:
        if row.name.endswith("-6") and not row.name.startswith(("avif", "webp", "mpo")):
            # Enough for the header where metadata come first; what follows the pixels needs the whole file.
            (tmp_path / "x").write_bytes(row.content)
            header = image_header(tmp_path / "x")
            assert (header.orientation, header.stored_size) == (6, row.stored_size)
            assert header.size("shown") == row.shown_size and header.size("stored") == row.stored_size


@pytest.mark.parametrize("kind", odd_images.REFUSED)
def test_other_formats_are_refused_by_name(kind, tmp_path):
    content = odd_images.REFUSED[kind]
    (tmp_path / "x").write_bytes(content)
    for read in (lambda: decode_image(content, "x"), lambda: open_image(tmp_path / "x")):
        with pytest.raises(DataError, match=rf"expected JPEG, PNG, .* at .*x, got {kind}; convert it") as caught:
            read()
        assert caught.value.reason == "not-an-image"


def test_a_rare_kind_of_a_known_format_is_said():
    ten_bits = odd_images.tiff(4, 1, [10], 1, bytes(5))
    with pytest.raises(DataError, match="got a TIFF that is broken or of a kind that cannot be read; convert it"):
        decode_image(ten_bits, "x")
    with pytest.raises(DataError, match="got something else or a broken header; convert it"):
        decode_image(b"plain words", "x")


def test_large_deep_images_are_refused_before_decoding_and_scaled_in_bands(monkeypatch):
    deep = odd_images.png(70_000, 1, 16, 0, [bytes(140_000)])
    with pytest.raises(DataError, match="70000x1") as caught:
        decode_image(deep, "x", 60_000, view="shown")
    assert caught.value.reason == "image-too-large"
    monkeypatch.setattr("vreflection.data.pixels._PIXELS_AT_ONCE", 100)
    levels = np.random.default_rng(1).integers(0, 65536, (37, 29), dtype=np.uint16)
    rows = [row.astype(">u2").tobytes() for row in levels]
    image = decode_image(odd_images.png(29, 37, 16, 0, rows), "x")
    assert np.array_equal(np.asarray(image)[..., 0], (levels.astype(int) * 255 + 32767) // 65535)
