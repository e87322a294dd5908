"""The page in a real browser: it asks the real server, and nobody else."""

import base64
import time
from contextlib import contextmanager

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect


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
        {"title": name, "question": f"what is on {name} ?", "image": tools.picture(seed), "boxes": [boxes[name]]}
        for seed, name in ((3, "a"), (4, "b"))
    ]
    with serve(maps=answer_maps(parts[0]), examples=examples, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def site(serve, parts, tools):
    """Answers open one span."""
    with served(serve, parts, tools) as server:
        tools.follow_script(server.service.decoder, parts[1], tools.hops(1))
        yield server


BOXES = [[0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5], [0.0, 0.6, 1.0, 1.0]]


@pytest.fixture(scope="module")
def hops_site(serve, parts, tools):
    """Answers open three spans, and an example has a box for each."""
    from vreflection.serving.launch import answer_maps

    examples = [{"title": "c", "question": "what is on c ?", "image": tools.picture(5), "boxes": BOXES}]
    with serve(maps=answer_maps(parts[0]), examples=examples) as server:
        tools.follow_script(server.service.decoder, parts[1], tools.hops(3, "I follow. <answer> 5 </answer>"))
        yield server


@pytest.fixture(scope="module")
def hop_maps(hops_site, tools):
    """The maps of that example as the interface gives them: `(3 hops, 3 steps, 2, 3)`."""
    body = {"model": "tiny", "messages": [tools.user("what is on c ?", tools.picture(5))], "max_tokens": 128}
    answer = httpx.post(f"{hops_site.base}/chat/completions", json={**body, "latent": {"include": ["maps"]}}).json()
    (image,) = answer["choices"][0]["latent"]["maps"]["images"]
    return np.array(image["steps"]).reshape(3, 3, 2, 3)


def upload(page, tools, seed=3):
    content = base64.b64decode(tools.picture(seed).partition(",")[2])
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    expect(page.locator("#picture")).to_be_visible()


def ask(page, question="which?", force=True):
    page.fill("#question", question)
    page.set_checked("#force", force)
    page.click("#send")


def ask_example(page):
    page.locator("#examples button").first.click()
    page.click("#send")
    expect(card(page).locator(".counts")).to_contain_text("9 latent steps")
    return card(page)


def card(page, number=0):
    return page.locator("article").nth(number)


def test_upload_ask_and_walk_through_the_steps(site, visit, tools):
    page = visit(site)
    upload(page, tools)
    ask(page)
    first = card(page)
    expect(first.locator(".counts")).to_contain_text("latent steps")
    expect(first.locator(".look")).to_be_visible()
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


def test_an_answer_is_no_longer_than_the_server_allows(serve, parts, tools, visit):
    for limit, value in ((2048, "128"), (64, "64")):
        with served(serve, parts, tools, max_tokens=limit) as server:
            page = visit(server)
            tokens = page.locator("#tokens")
            assert tokens.get_attribute("max") == str(limit) and tokens.input_value() == value
            tokens.fill(str(limit + 1))
            ask(page)
            assert tokens.evaluate("input => input.validity.rangeOverflow") and page.locator("article").count() == 0


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
    (one,) = sent.value.post_data_json["latent"]["use"]
    assert one["shape"] == [3, 64] and page.locator("#keptline").is_hidden()
    expect(page.locator("article h2").first).to_have_text("With the kept latents")
    expect(card(page).locator(".counts")).to_contain_text("latent steps")
    page.click("#forget")
    expect(page.locator("#kept")).to_be_hidden()


def share(mean, hop):
    """Of a map `(2, 3)`, inside the hop's box under the window rule."""
    rows, columns = [(slice(0, 1), slice(0, 2)), (slice(0, 1), slice(1, 3)), (slice(1, 2), slice(0, 3))][hop]
    return f"{100 * mean[rows, columns].sum():.1f} %"


def test_hops_are_walked_through_with_the_slider_and_the_filmstrip(hops_site, visit, hop_maps):
    page = visit(hops_site)
    first = ask_example(page)
    which, look, slider = first.locator(".which"), first.locator(".look"), first.locator("input[type=range]")
    expect(which).to_have_text("mean of all latent steps")
    means = ", ".join(f"look {hop + 1} {share(hop_maps[hop].mean(0), hop)}" for hop in range(3))
    expect(first.locator(".inside")).to_have_text(f"In its own box: {means}.")
    pictures = [look.evaluate("canvas => canvas.toDataURL()")]
    assert slider.get_attribute("max") == "9"
    for number in range(9):
        slider.press("ArrowRight")
        hop, step = divmod(number, 3)
        name = f"look {hop + 1} of 3, step {step + 1} of 3"
        expect(which).to_have_text(name)
        assert slider.get_attribute("aria-valuetext") == name
        inside, mean = share(hop_maps[hop, step], hop), share(hop_maps[hop].mean(0), hop)
        expect(first.locator(".inside")).to_have_text(
            f"{inside} of this attention is in box {hop + 1} (mean of the look {mean})."
        )
        pictures.append(look.evaluate("canvas => canvas.toDataURL()"))
    assert len(set(pictures)) == 10
    frames = first.locator(".film button")
    expect(frames).to_have_text(
        [f"look {hop + 1}\n{share(hop_maps[hop].mean(0), hop)} in its box" for hop in range(3)], use_inner_text=True
    )
    seen = {frame.evaluate("button => button.firstChild.toDataURL()") for frame in frames.all()}
    assert len(seen) == 3
    frames.nth(1).focus()
    page.keyboard.press("Enter")
    expect(which).to_have_text("look 2 of 3, mean of its steps")
    assert [frame.get_attribute("aria-pressed") for frame in frames.all()] == ["false", "true", "false"]
    assert slider.input_value() == "4"
    assert look.evaluate("canvas => canvas.toDataURL()") not in pictures


def test_looks_play_and_pause(hops_site, visit):
    page = visit(hops_site)
    first = ask_example(page)
    slider, play = first.locator("input[type=range]"), first.locator(".play")
    expect(play).to_have_text("Play")  # no motion that nobody asked for
    page.wait_for_timeout(700)
    assert slider.input_value() == "0"
    play.focus()
    page.keyboard.press("Enter")
    expect(play).to_have_text("Pause")
    expect(slider).to_have_value("3", timeout=5000)
    page.keyboard.press("Enter")
    expect(play).to_have_text("Play")
    paused = slider.input_value()
    page.wait_for_timeout(700)
    assert slider.input_value() == paused
    play.click()
    slider.press("ArrowRight")  # whoever moves the slider has it
    expect(play).to_have_text("Play")
    moving = visit(hops_site, reduced_motion="no-preference")
    first = ask_example(moving)
    expect(first.locator(".play")).to_have_text("Pause")
    expect(first.locator(".which")).to_have_text("look 3 of 3, step 3 of 3", timeout=10000)
    expect(first.locator(".play")).to_have_text("Play")


def test_hops_are_shown_as_they_come(hopping, tools, visit):
    with hopping(3, seconds=0.15) as server:
        page = visit(server)
        upload(page, tools)
        ask(page, force=False)
        frames = card(page).locator(".film button")
        expect(card(page).locator(".progress")).to_contain_text("looking again: look 2, step")
        expect(card(page).locator(".look")).to_be_visible()
        assert card(page).locator(".film").is_hidden()  # one hop so far
        expect(frames).to_have_count(2)
        expect(card(page).locator(".progress")).not_to_have_text("")
        expect(frames).to_have_count(3)
        expect(card(page).locator(".answer")).to_have_text("5")


def test_the_answer_is_shown_as_a_person_reads_it(hops_site, site, visit, tools):
    page = visit(hops_site)
    first = ask_example(page)
    expect(first.locator(".answer")).to_have_text("5")
    assert first.locator("pre").is_hidden()
    first.locator("summary").click()
    expect(first.locator("pre")).to_have_text("I follow. <answer> 5 </answer>")
    cases = {
        "a<answer> 1 </answer> b <answer>\n2 </answer> c": "2",
        "no tags, 1 < 2": "no tags, 1 < 2",
        "<answer> cut": "cut",
    }
    for text, shown in cases.items():
        assert page.evaluate("text => readable(text, false)", text) == shown
    # While it comes, no part of a tag is seen.
    whole = "I see. <answer> 5 </answer>"
    seen = [page.evaluate("text => readable(text, true)", whole[:length]) for length in range(len(whole) + 1)]
    assert not any("<" in text for text in seen) and seen[-1] == "5" and "I see." in seen


def test_a_box_for_each_hop(hops_site, visit, tools):
    page = visit(hops_site)
    first = ask_example(page)
    hops = page.locator("#hops button")
    expect(hops).to_have_text(["look 1", "look 2", "look 3", "Add the next look’s box"])
    hops.nth(1).click()
    assert [page.input_value(f"#{name}") for name in ("x0", "y0", "x1", "y1")] == ["40", "0", "100", "50"]
    before = first.locator(".film button").nth(1).inner_text()
    other = first.locator(".film button").nth(0).inner_text()
    page.fill("#y1", "100")
    expect(first.locator(".film button").nth(1)).not_to_have_text(before)
    assert first.locator(".film button").nth(0).inner_text() == other
    hops.nth(3).click()
    for name, value in (("x0", "0"), ("y0", "0"), ("x1", "100"), ("y1", "100")):
        page.fill(f"#{name}", value)
    expect(hops).to_have_text(["look 1", "look 2", "look 3", "look 4", "Add the next look’s box"])
    page.click("#nobox")
    expect(hops).to_have_count(0)
    expect(first.locator(".inside")).to_have_text("")
    expect(first.locator(".film button").first).to_have_text("look 1")
    page.locator("#examples button").first.click()  # as it was, whatever was drawn
    expect(hops).to_have_count(4)
    hops.nth(1).click()
    assert page.input_value("#y1") == "50"


def test_latents_of_one_hop_are_kept(hops_site, visit):
    page = visit(hops_site)
    first = ask_example(page)
    first.locator(".keep").click()
    expect(page.locator("#kepthop option")).to_have_text(["all looks", "look 1", "look 2", "look 3"])
    for choice, kept in (("all looks", [True] * 3), ("look 2", [False, True, *[False] * 6])):
        page.select_option("#kepthop", label=choice)
        with page.expect_request("**/chat/completions") as sent:
            page.click("#send")
        use = sent.value.post_data_json["latent"]["use"]
        assert [states is not None for states in use] == kept
        assert all(states["shape"] == [3, 64] for states in use if states)
        expect(card(page).locator(".counts")).to_contain_text("9 latent steps")


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
        expect(page.locator("#error")).to_contain_text("expected JPEG, PNG")
        content = base64.b64decode(tools.picture().partition(",")[2])
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
        expect(page.locator("#error")).to_contain_text("image-too-large")
        expect(page.locator("#picture")).to_be_hidden()
        ask(page, "text alone")
        expect(page.locator("#error")).to_be_hidden()
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


def test_a_desktop_is_used_and_a_phone_too(hops_site, visit):
    for width, height in ((1440, 900), (390, 844)):
        page = visit(hops_site, viewport={"width": width, "height": height})
        first = ask_example(page)
        article, look, film, question = (
            place.bounding_box()
            for place in (first, first.locator(".look"), first.locator(".film"), page.locator("#question"))
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 390:
            assert look["width"] > 320 and article["y"] > question["y"] and film["y"] > look["y"] + look["height"]
        else:
            assert article["x"] > question["x"] + question["width"] and article["width"] > 900
            # Picture and filmstrip are large, and on the screen at once.
            assert look["width"] > 480 and film["width"] > 850 and film["y"] + film["height"] < height


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_everything_has_a_name(hops_site, visit, tools, width, scheme):
    page = visit(hops_site, viewport={"width": width, "height": 800}, color_scheme=scheme)
    ask_example(page)
    expect(card(page).locator(".look")).to_be_visible()
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
    assert {"question", "send", "x0", "range"} <= set(seen) and seen.count("button") >= 4
