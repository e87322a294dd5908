"""The page in a real browser: what it draws is what the model gets, in every format and orientation."""

import base64
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vreflection.serving import app as app_module

httpx = pytest.importorskip("httpx")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
odd_images = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data" / "odd_images.py")))
ROWS = {row.name: row for row in odd_images.CORPUS}


def address(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def near(pixel, colour, tolerance):
    return np.abs(np.subtract(pixel[:3], colour)).max() <= tolerance


@pytest.fixture(scope="module")
def site(serve, parts, tools):
    from vreflection.serving.launch import answer_maps

    with serve(maps=answer_maps(parts[0])) as server:
        tools.follow_script(server.service.decoder, parts[1], tools.hops(1))
        yield server


@pytest.fixture
def page(browser, site):
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 1200, "height": 1000})
    made = context.new_page()
    problems = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.goto(site.url)
    expect(made.locator("#model")).to_contain_text("tiny, stage")
    yield made
    context.close()
    assert not problems


def drop(page, content, kind="image/png"):
    """Choose a file and wait until it is drawn or refused."""
    page.set_input_files("#file", {"name": "a", "mimeType": kind, "buffer": content})
    expect(page.locator("#drop[aria-busy]")).to_have_count(0)


CORNERS = """canvas => {
  const context = canvas.getContext("2d");
  const at = (x, y) => [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
  return { size: [canvas.width, canvas.height], pixels: [at(0.1, 0.1), at(0.9, 0.1), at(0.1, 0.9), at(0.9, 0.9)] };
}"""


def test_every_format_and_orientation_is_drawn_upright(page):
    names = [f"{kind}-{n}" for kind in ("jpeg", "png", "webp", "tiff", "mpo", "avif") for n in range(2, 9)]
    for name in [name for name in names if name in ROWS]:
        page.click("#remove") if page.locator("#remove").is_visible() else None
        drop(page, ROWS[name].content)
        drawing = page.locator("#picture").evaluate(CORNERS)
        assert drawing["size"][0] * 2 == drawing["size"][1] * 3, name
        for pixel, colour in zip(drawing["pixels"], odd_images.UPRIGHT.values()):
            assert near(pixel, colour, 14), (name, pixel, colour)


def test_colours_and_transparency_are_drawn_as_the_model_gets_them(page):
    for name in ("png-display-p3", "webp-display-p3", "tiff-cmyk-profile", "tiff-16-bit-white-is-zero"):
        drop(page, ROWS[name].content, "application/octet-stream")
        (x, y), colour = list(ROWS[name].shown.items())[0]
        pixel = page.locator("#picture").evaluate(
            "canvas => [...canvas.getContext('2d').getImageData(2, 2, 1, 1).data]"
        )
        assert (x, y) == (0, 0) and near(pixel, colour, 4), (name, pixel)


@pytest.mark.parametrize("name", ["png-6", "webp-8", "tiff-6", "png-5"])
def test_box_and_share_lie_on_the_upright_picture(page, site, tools, name):
    upright = address(odd_images.encode(odd_images.quadrants(1), "PNG"))
    body = {"model": "tiny", "messages": [tools.user("which?", upright)], "max_tokens": 128}
    answer = httpx.post(f"{site.base}/chat/completions", json={**body, "latent": {"include": ["maps"]}}).json()
    (maps,) = answer["choices"][0]["latent"]["maps"]["images"]
    rows, columns = maps["grid"]
    assert rows < columns
    drop(page, ROWS[name].content)
    area = page.locator("#picture").bounding_box()
    page.mouse.move(area["x"] + 1, area["y"] + 1)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 0.45 * area["height"], steps=4)
    page.mouse.up()
    # The red quarter is inside the drawn frame, the others are outside.
    pixel = page.locator("#picture").evaluate(CORNERS)["pixels"][0]
    assert near(pixel, odd_images.RED, 3)
    x1, y1 = (float(page.input_value(f"#{edge}")) / 100 for edge in ("x1", "y1"))
    assert abs(x1 - 0.5) < 0.02 and abs(y1 - 0.45) < 0.02
    page.fill("#question", "which?")
    page.click("#send")
    mean = np.mean(maps["steps"], axis=0).reshape(rows, columns)
    share = mean[: int(np.ceil(y1 * rows)), : int(np.ceil(x1 * columns))].sum()
    expect(page.locator("article .inside")).to_contain_text(f"{100 * share:.1f} % of this attention is in the box")
    look = page.locator("article .look").first.evaluate("canvas => canvas.width / canvas.height")
    assert abs(look - 1.5) < 0.01


@pytest.mark.parametrize("name", ["SVG", "HEIC", "ICO", "PDF"])
def test_what_the_server_refuses_is_not_shown(page, name):
    drop(page, odd_images.REFUSED[name], f"image/{name.lower()}")
    assert page.locator("#picture").is_hidden() and f"got {name}; convert it" in page.locator("#error").text_content()
    drop(page, ROWS["png-6"].content)
    assert page.locator("#picture").is_visible() and page.locator("#error").is_hidden()
    drop(page, odd_images.REFUSED[name], f"image/{name.lower()}")
    assert f"got {name}; convert it" in page.locator("#error").text_content()


def test_a_question_waits_for_its_image(page, site, monkeypatch):
    release, real = threading.Event(), app_module.preview
    monkeypatch.setattr(app_module, "preview", lambda *rest: (release.wait(20), real(*rest))[1])
    page.set_input_files("#file", {"name": "a", "mimeType": "image/png", "buffer": ROWS["png-6"].content})
    page.fill("#question", "which?")
    page.click("#send")
    assert page.locator("article").count() == 0
    with page.expect_request("**/chat/completions") as sent:
        release.set()
    assert sent.value.post_data_json["messages"][0]["content"][0]["type"] == "image_url"
    expect(page.locator("article .counts")).to_contain_text("latent steps")
