"""The page in a real browser: it asks the real server, and nobody else."""

import base64
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as made:
        opened = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """`visit(server)`: the page of a server in a context of its own; every request goes to its own origin."""
    contexts = []

    def go(server, **context):
        context = {"reduced_motion": "reduce", "viewport": {"width": 1200, "height": 1000}, **context}
        made = browser.new_context(**context)
        page = made.new_page()
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        contexts.append((made, asked, problems, server.url))
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("tiny, stage")
        return page

    yield go
    for made, asked, problems, url in contexts:
        made.close()
        assert not problems
        assert all(address.startswith((url, "data:")) for address in asked), asked


@contextmanager
def served(serve, parts, tools, **settings):
    from vreflection.serving.launch import answer_maps

    boxes = {"a": [0.0, 0.0, 0.5, 1.0], "b": [0.25, 0.5, 0.75, 1.0]}
    examples = [
        {"title": name, "question": f"what is on {name} ?", "image": tools.picture(seed), "box": boxes[name]}
        for seed, name in ((3, "a"), (4, "b"))
    ]
    with serve(maps=answer_maps(parts[0]), examples=examples, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def site(serve, parts, tools):
    with served(serve, parts, tools) as server:
        yield server


def upload(page, tools, seed=3):
    content = base64.b64decode(tools.picture(seed).partition(",")[2])
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    expect(page.locator("#picture")).to_be_visible()


def ask(page, question="which?"):
    page.fill("#question", question)
    page.check("#force")
    page.click("#send")


def card(page, number=0):
    return page.locator("article").nth(number)


def test_upload_ask_and_walk_through_the_steps(site, visit, tools):
    page = visit(site)
    upload(page, tools)
    ask(page)
    first = card(page)
    expect(first.locator(".counts")).to_contain_text("latent steps")
    expect(first.locator("figure")).to_be_visible()
    expect(first.locator(".which")).to_have_text("mean of all latent steps")
    expect(first.locator(".source")).to_contain_text("student")
    look = first.locator(".look")
    pictures = [look.evaluate("canvas => canvas.toDataURL()")]
    slider = first.locator("input[type=range]")
    for step in (1, 2, 3):
        slider.press("ArrowRight")
        total = slider.get_attribute("max")
        expect(first.locator(".which")).to_have_text(f"latent step {step} of {total}")
        assert slider.get_attribute("aria-valuetext") == f"latent step {step} of {total}"
        pictures.append(look.evaluate("canvas => canvas.toDataURL()"))
    assert len(set(pictures)) == 4


def test_a_box_by_mouse_and_by_keyboard_shows_the_share_inside(site, visit, tools):
    page = visit(site)
    upload(page, tools)
    area = page.locator("#picture").bounding_box()
    page.mouse.move(area["x"] + 1, area["y"] + 1)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + area["height"] - 1, steps=4)
    page.mouse.up()
    assert abs(float(page.input_value("#x1")) - 50) < 1 and float(page.input_value("#y1")) > 98
    ask(page)
    first = card(page)
    expect(first.locator(".inside")).to_contain_text("of this attention is in the box")
    body = {"model": "tiny", "messages": [tools.user("which?", tools.picture(3))], "max_tokens": 128}
    body["latent"] = {"force": True, "include": ["maps"]}
    answer = httpx.post(f"{site.base}/chat/completions", json=body).json()
    (maps,) = answer["choices"][0]["latent"]["maps"]["images"]
    mean = np.mean(maps["steps"][:3], axis=0).reshape(maps["grid"])
    assert maps["grid"] == [2, 3]
    expect(first.locator(".inside")).to_contain_text(f"{100 * mean[:, :2].sum():.1f} %")
    for name, value in (("x0", "40"), ("y0", "0"), ("x1", "100"), ("y1", "40")):
        page.fill(f"#{name}", value)
    expect(first.locator(".inside")).to_contain_text(f"{100 * mean[0, 1:].sum():.1f} %")
    page.click("#nobox")
    expect(first.locator(".inside")).to_have_text("")


def test_examples_both_modes_and_swapped_latents(site, visit):
    page = visit(site)
    page.locator("#examples button", has_text="b").click()
    expect(page.locator("#question")).to_have_value("what is on b ?")
    assert [page.input_value(f"#{name}") for name in ("x0", "y0", "x1", "y1")] == ["25", "50", "75", "100"]
    page.check("#force")
    page.check("input[value=both]")
    page.click("#send")
    expect(page.locator("article h2")).to_have_text(["With latent steps", "Without latent steps"])
    expect(page.locator(".counts", has_text="latent steps")).to_have_count(2)
    expect(page.locator("article").nth(1).locator(".counts")).to_contain_text("0 latent steps")
    page.locator("article .keep:visible").first.click()
    expect(page.locator("#keptof")).to_contain_text("what is on b ?")
    page.locator("#examples button", has_text="a").click()
    with page.expect_request("**/chat/completions") as sent:
        page.check("input[value=on]")
        page.click("#send")
    assert sent.value.post_data_json["latent"]["use"]["shape"] == [3, 64]
    expect(page.locator("article h2").first).to_have_text("With the kept latents")
    expect(card(page).locator(".counts")).to_contain_text("latent steps")
    page.click("#forget")
    expect(page.locator("#kept")).to_be_hidden()


def test_two_tabs_at_once(site, visit, tools):
    pages = [visit(site), visit(site)]
    for page, seed in zip(pages, (3, 4)):
        upload(page, tools, seed)
        ask(page, f"q{seed}")
    for page, seed in zip(pages, (3, 4)):
        expect(card(page).locator(".counts")).to_contain_text("latent steps")
        expect(card(page).locator(".asked")).to_have_text(f"q{seed}")
        expect(page.locator("article")).to_have_count(1)


def test_errors_are_said(serve, parts, tools, visit):
    with served(serve, parts, tools, max_pixels=2000) as server:
        page = visit(server)
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
        expect(page.locator("#error")).to_contain_text("not an image the browser can show")
        upload(page, tools)
        expect(page.locator("#error")).to_be_hidden()
        ask(page)
        expect(page.locator("#error")).to_contain_text("image-too-large")
        expect(page.locator("article")).to_have_count(0)
        page.click("#remove")
        ask(page, "text alone")
        expect(card(page).locator(".counts")).to_contain_text("latent steps")
        server.server.should_exit = True
        time.sleep(1)
        ask(page)
        expect(page.locator("#error")).to_contain_text("The server does not answer")


def test_stop_ends_the_answer_and_frees_its_row(serve, parts, tools, visit, monkeypatch):
    with served(serve, parts, tools) as server:
        decoder = server.service.decoder
        launch = decoder.launch
        monkeypatch.setattr(decoder, "launch", lambda look: (time.sleep(0.05), launch(1))[1])
        monkeypatch.setattr(decoder.model.generation_config, "eos_token_id", None)
        page = visit(server)
        ask(page)
        expect(page.locator("#stop")).to_be_enabled()
        expect(card(page).locator(".answer")).not_to_have_text("")
        page.click("#stop")
        expect(card(page).locator(".progress")).to_have_text("stopped")
        deadline = time.monotonic() + 5
        while decoder.busy or server.service.in_work:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_key_is_asked_for(serve, parts, tools, browser):
    with served(serve, parts, tools, api_key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#error")).to_contain_text("asks for an API key")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_contain_text("tiny")
        ask(page)
        expect(card(page).locator(".counts")).to_contain_text("latent steps")
        page.close()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_everything_has_a_name(site, visit, tools, width, scheme):
    page = visit(site, viewport={"width": width, "height": 800}, color_scheme=scheme)
    upload(page, tools)
    ask(page)
    expect(card(page).locator("figure")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button, canvas:not([aria-hidden])')]
           .filter(e => e.checkVisibility() && !(e.labels && e.labels.length) && !e.textContent.trim()
                        && !e.getAttribute('aria-label'))
           .map(e => e.outerHTML)"""
    )
    assert nameless == []
    seen = []
    for _ in range(40):  # every control is reached by the keyboard alone
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.type || ''"))
    assert {"question", "send", "x0", "range"} <= set(seen)
