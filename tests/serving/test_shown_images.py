"""What the model gets of an image is what a viewer shows, whatever the file; previews for the page."""

import base64
import io
import json
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vreflection.serving import app as app_module
from vreflection.serving import media
from vreflection.serving.errors import ApiError
from vreflection.serving.settings import ServeSettings

httpx = pytest.importorskip("httpx")
odd_images = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data" / "odd_images.py")))
ROWS = {row.name: row for row in odd_images.CORPUS}
SETTINGS = ServeSettings(max_pixels=100_000)


def address(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def near(pixel, colour, tolerance):
    return np.abs(np.subtract(pixel[:3], colour)).max() <= tolerance


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith(("-3", "-6", "p3", "bit", "clear"))])
def test_requests_and_previews_are_what_a_viewer_shows(name):
    row = ROWS[name]
    request_image = media.decode_image(media.data_bytes(address(row.content), "x"), SETTINGS, "x")
    preview_image = Image.open(io.BytesIO(media.preview(address(row.content), SETTINGS, "x")))
    for image in (request_image, preview_image):
        assert image.size == row.shown_size
        assert all(near(image.getpixel(place), colour, row.tolerance) for place, colour in row.shown.items())


@pytest.mark.parametrize("kind", ["image/png", "image/jpg", "application/octet-stream", "", "image/png;name=a.png"])
def test_base64_as_people_write_it(kind):
    content = bytes(range(256)) * 3 + b"?"  # every letter of the alphabet, and padding
    plain = base64.b64encode(content).decode()
    lines = "\r\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    safe = base64.urlsafe_b64encode(content).decode()
    quoted = plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for text in (plain, lines, plain + "\n", plain.rstrip("="), safe, safe.rstrip("="), " " + plain, quoted):
        assert media.data_bytes(f"data:{kind};base64,{text}", "x") == content
    for text in (plain[:-3], plain + "!", "=" + plain, "\u00e4" + plain):
        with pytest.raises(ApiError, match="messages.1.content: expected base64 after the comma, got"):
            media.data_bytes(f"data:{kind};base64,{text}", "messages.1.content")


def test_refusals_name_the_image_and_its_format():
    for name, content in odd_images.REFUSED.items():
        with pytest.raises(ApiError, match=f"expected JPEG, PNG, .* at messages.2.content, got {name}; convert it"):
            media.decode_image(content, SETTINGS, "messages.2.content")
    with pytest.raises(ApiError, match="messages.0.content: expected data:image/"):
        media.image_bytes("data:text/plain;base64,AAAA", SETTINGS, "messages.0.content")


def test_a_photo_is_answered_as_its_upright_picture(server, tools):
    def prompt_and_text(url):
        body = {"model": "tiny", "messages": [tools.user("which?", url)], "max_tokens": 8, "latent": {"force": True}}
        answer = httpx.post(f"{server.base}/chat/completions", json=body).json()
        return answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["content"]

    pixels = np.random.default_rng(3).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    upright = prompt_and_text(address(odd_images.encode(Image.fromarray(pixels), "PNG")))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        photo = Image.fromarray(np.rot90(pixels))
        content = odd_images.encode(photo, kind, exif=odd_images.exif(6), **options)
        assert prompt_and_text(address(content)) == upright


def test_the_preview_passes_the_guards_and_has_limits(serve, tools, monkeypatch):
    with serve(api_key="secret", max_pixels=5000) as server:
        url, key = f"{server.url}/image", {"Authorization": "Bearer secret"}
        body = {"image": tools.picture()}
        assert httpx.post(url, json=body).status_code == 401
        assert httpx.post(url, content=json.dumps(body), headers=key).status_code == 415
        answer = httpx.post(url, json=body, headers=key)
        assert answer.headers["content-type"] == "image/png" and answer.headers["cache-control"] == "no-store"
        assert Image.open(io.BytesIO(answer.content)).size == (84, 56)
        for wrong, message in (
            ({"image": tools.picture(width=400)}, "image-too-large"),
            ({"image": "https://example.org/a.png"}, "image: expected data:image/"),
            ({"image": 3}, "image: expected {"),
            ([], "image: expected {"),
            ({"image": address(b"%PDF-1.7")}, "got PDF; convert it"),
        ):
            answer = httpx.post(url, json=wrong, headers=key)
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]
        release, real = threading.Event(), app_module.preview
        monkeypatch.setattr(app_module, "preview", lambda *rest: (release.wait(20), real(*rest))[1])
        clients = [
            threading.Thread(target=httpx.post, args=(url,), kwargs={"json": body, "headers": key, "timeout": 30})
            for _ in range(app_module.MAX_PREVIEWS)
        ]
        for client in clients:
            client.start()
        statuses = []
        while 429 not in statuses and len(statuses) < 200:
            try:
                statuses.append(httpx.post(url, json=body, headers=key, timeout=0.2).status_code)
            except httpx.TimeoutException:
                statuses.append(None)
        release.set()
        for client in clients:
            client.join()
        assert 429 in statuses
        assert httpx.post(url, json=body, headers=key, timeout=30).status_code == 200


def test_large_previews_are_made_smaller():
    large = odd_images.encode(Image.new("RGB", (3000, 1500), (9, 99, 199)), "PNG")
    preview_image = Image.open(io.BytesIO(media.preview(address(large), ServeSettings(), "x")))
    assert preview_image.size == (2048, 1024) and preview_image.getpixel((5, 5)) == (9, 99, 199)
