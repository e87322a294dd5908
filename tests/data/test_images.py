import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vreflection.data.images import open_image, resolve_image_path
from vreflection.errors import DataError


def png(width, height, pixels=b""):
    """A PNG whose header claims width x height, whatever its pixels say."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def failing(tmp_path, content, name="x.png", **options):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image(path, **options)
    message = str(caught.value)
    assert message.startswith("expected") and "got" in message and str(path) in message and ";" in message
    return caught.value.reason, message


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError, match="expected an image file at .*, got no such file; check") as caught:
            open_image(path)
        assert caught.value.reason == "image-missing"


def test_unusable_files(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "good.jpg", quality=95)
    jpeg = (tmp_path / "good.jpg").read_bytes()
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    damaged = whole[:200] + bytes(200) + whole[400:]
    assert failing(tmp_path, b"")[0] == "image-empty"
    assert failing(tmp_path, b"hello, not an image")[0] == "not-an-image"
    assert failing(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.eps")[0] == "not-an-image"
    assert failing(tmp_path, jpeg[: len(jpeg) // 2], "x.jpg")[0] == "image-corrupt"
    assert failing(tmp_path, whole[: len(whole) // 2])[0] == "image-corrupt"
    assert failing(tmp_path, damaged)[0] == "image-corrupt"
    assert failing(tmp_path, png(0, 5))[0] in ("image-empty", "not-an-image")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_decoding(tmp_path):
    reason, message = failing(tmp_path, png(100_000, 100_000))
    assert reason == "image-too-large" and "89478485" in message
    reason, message = failing(tmp_path, png(10_000, 9_999))
    assert reason == "image-too-large" and "10000x9999" in message
    reason, message = failing(tmp_path, png(10, 11, bytes(31 * 11)), max_pixels=109)
    assert reason == "image-too-large" and "at most 109 pixels" in message and "10x11" in message
    (tmp_path / "x.png").write_bytes(png(10, 11, bytes(31 * 11)))
    assert open_image(tmp_path / "x.png", max_pixels=110).size == (10, 11)


def test_extreme_aspect_ratio(tmp_path):
    reason, message = failing(tmp_path, png(201, 1, bytes(604)))
    assert reason == "image-aspect" and "factor of 200" in message and "201x1" in message


def test_sixteen_bits_keep_their_greys_and_deeper_images_are_refused(tmp_path):
    greys = np.array([[0, 128, 32768, 65535]], dtype=np.uint16)
    for name in ("x.png", "x.tiff"):
        Image.fromarray(greys).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name)).tolist() == [[[0] * 3, [0] * 3, [128] * 3, [255] * 3]]
    for dtype in (np.int32, np.float32):
        Image.fromarray(greys.astype(dtype)).save(tmp_path / "x.tiff")
        with pytest.raises(DataError, match="expected 8 or 16 bits per channel, got mode [IF]; scale it") as caught:
            open_image(tmp_path / "x.tiff")
        assert caught.value.reason == "image-depth"


def test_modes_become_rgb_and_transparency_white(tmp_path):
    for mode in ("L", "P", "1", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (3, 2)).save(tmp_path / f"x.{suffix}")
        assert open_image(tmp_path / f"x.{suffix}").mode == "RGB"
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (3, 2), (255, 0, 0, 255)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 0, 0)


def test_orientation_tag_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (8, 4)


@pytest.mark.parametrize(
    "dataset, name, stored",
    [
        ("cub", "viscot/cub/001.Albatross/x.jpg", "cub/CUB_200_2011/images/001.Albatross/x.jpg"),
        ("cub", "cub/CUB_200_2011/images/001.Albatross/x.jpg", "cub/CUB_200_2011/images/001.Albatross/x.jpg"),
        ("openimages", "viscot/openimages/x.jpg", "openimages/train_4/x.jpg"),
        ("dude", "viscot/dude/x.jpg", "viscot/dude/x.jpg"),
        ("dude", "viscot/dude/x.jpg", "dude/x.jpg"),
        ("dude", "viscot/dude/x.jpg", "dude/DUDE_train-val-test_binaries/images/train/x.jpg"),
        ("sroie", "viscot/sroie/x.jpg", "sroie/x.jpg"),
        ("docvqa", "viscot/docvqa/x.png", "docvqa/x.png"),
        ("flickr30k", "viscot/flickr30k/x.jpg", "flickr30k/flickr30k-images/x.jpg"),
        ("gqa", "viscot/gqa/x.jpg", "gqa/images/x.jpg"),
        ("infographicsvqa", "viscot/infographicsvqa/x.jpg", "infographicsvqa/x.jpg"),
        ("textvqa", "viscot/textvqa/x.jpg", "textvqa/train_images/x.jpg"),
        ("textcap", "viscot/textcap/x.jpg", "textvqa/train_images/x.jpg"),
        ("v7w", "viscot/v7w/x.jpg", "visual7w/images/x.jpg"),
        ("VSR", "viscot/vsr/x.jpg", "vsr/images/x.jpg"),
        ("coco", "viscot/coco/train2017/x.jpg", "coco/train2017/x.jpg"),
        ("coco", "viscot/coco/train2017/x.jpg", "coco/x.jpg"),
        ("mine", "a/b/x.jpg", "a/b/x.jpg"),
        ("mine", "viscot/b/x.jpg", "b/x.jpg"),
        ("gqa", "elsewhere/x.jpg", "elsewhere/x.jpg"),
        ("", "x.jpg", "x.jpg"),
    ],
)
def test_public_folder_layout(tmp_path, dataset, name, stored):
    target = tmp_path / stored
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    assert resolve_image_path(tmp_path, dataset, name) == target


def test_unknown_datasets_do_not_fall_back_to_the_bare_name(tmp_path):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(DataError, match="expected 'a/x.jpg' of dataset 'mine' below .*, got nothing at a/x.jpg; check"):
        resolve_image_path(tmp_path, "mine", "a/x.jpg")


def test_birds_keep_their_folder(tmp_path):
    stored = tmp_path / "cub/CUB_200_2011/images/x.jpg"
    stored.parent.mkdir(parents=True)
    stored.touch()
    with pytest.raises(DataError) as caught:
        resolve_image_path(tmp_path, "cub", "viscot/cub/001.Albatross/x.jpg")
    assert caught.value.reason == "image-missing"


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/hostname", "C:\\x.jpg", "..\\x.jpg", "\\\\host\\x", "", ".", "a\0b"]
)
def test_names_may_not_leave_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "x.jpg").touch()
    with pytest.raises(
        DataError, match="expected a relative path without '..', got .*; name images relative"
    ) as caught:
        resolve_image_path(tmp_path / "in", "gqa", name)
    assert caught.value.reason == "path-escape"


def test_links_may_not_leave_the_folder(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "in"
    outside.mkdir(), inside.mkdir()
    (outside / "x.jpg").touch()
    (inside / "gqa").symlink_to(outside)
    (inside / "y.jpg").symlink_to(outside / "x.jpg")
    for name in ("gqa/x.jpg", "y.jpg"):
        with pytest.raises(DataError, match="to stay inside .* got a link to .*; copy the files") as caught:
            resolve_image_path(inside, "", name)
        assert caught.value.reason == "path-escape"
    (tmp_path / "alias").symlink_to(inside)
    (inside / "z.jpg").touch()
    assert resolve_image_path(tmp_path / "alias", "", "z.jpg") == inside / "z.jpg"


def test_overlong_names_are_reported(tmp_path):
    with pytest.raises(DataError) as caught:
        resolve_image_path(tmp_path, "", "x" * 5000)
    assert caught.value.reason == "image-missing"


def test_every_listed_format_opens(tmp_path):
    image = Image.new("RGB", (4, 3), (9, 9, 9))
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tiff", "ppm"):
        image.save(tmp_path / f"x.{suffix}")
        assert open_image(tmp_path / f"x.{suffix}").size == (4, 3)
    image.save(tmp_path / "multi.mpo", save_all=True, append_images=[image])
    assert open_image(tmp_path / "multi.mpo").size == (4, 3)
