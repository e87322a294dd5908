"""Figures, animations, pages and the command: sizes, scales, what is on them, and what bad input gives."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.engine.requests import Generation
from vreflection.errors import ConfigError
from vreflection.visualization import look_run
from vreflection.visualization.attention_maps import Attention, Looks
from vreflection.visualization.look_figures import (
    BAR_HEIGHT,
    BAR_WIDTH,
    MARGIN,
    look_figure,
    look_frames,
    text_width,
    training_figure,
    wrapped,
    write_animation,
    write_figure,
)
from vreflection.visualization.look_page import PageFacts, render_card, write_look_page
from vreflection.visualization.look_panels import panel_rows, scale_top, tile
from vreflection.visualization.overlays import colour_strip

STEPS = 5
BOX = (0.25, 0.25, 0.75, 0.75)


def looks(sizes=((4, 4),), boxes=(BOX,), teacher=True, steps=STEPS, spans=1, answer="an answer"):
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.rand(steps * spans, h, w, generator=generator) for h, w in sizes)
    maps = tuple(one / one.sum((1, 2), keepdim=True) for one in maps)
    shown = tuple(torch.full((3, *sizes[0]), 1.0 / (sizes[0][0] * sizes[0][1])) for _ in boxes) if teacher else None
    return Looks(
        Attention("student"), answer, Generation(0, 1), maps, tuple(s for s in range(spans) for _ in range(steps)),
        torch.zeros(steps * spans, 4), None, tuple(boxes), (0,) * len(boxes), shown if boxes else None,
    )  # fmt: skip


def photo(width=120, height=120):
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


SHAPES = [(160, 40), (40, 160), (28, 28), (3840, 2160), (120, 120), (2000, 10)]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("kind", ["all", "steps", "mean", "queries"])
def test_every_kind_opens_again_at_every_shape(tmp_path, size, kind):
    figure = look_figure(looks(), [photo(*size)], "what is it?", kind)
    path = write_figure(figure, tmp_path / "figure.png")
    with Image.open(path) as found:
        found.load()
        assert found.format == "PNG" and found.size == figure.size
    assert 560 <= figure.width <= 1760
    # The colour bar is whole, in its place above its numbers.
    bar = np.asarray(colour_strip(BAR_WIDTH, BAR_HEIGHT))
    bottom = figure.height - MARGIN - 20 - 5
    held = np.asarray(figure)[bottom - BAR_HEIGHT : bottom, MARGIN : MARGIN + BAR_WIDTH]
    assert np.array_equal(held, bar)


@pytest.mark.parametrize("size", SHAPES[:5])
def test_tiles_keep_the_images_shape(size):
    made = tile(photo(*size), 200)
    assert made.width / made.height == pytest.approx(size[0] / size[1], rel=0.03)
    assert max(made.size) <= 400 and made.width * made.height <= 200 * 200 * 1.02


def test_rows_of_a_figure():
    found = looks(sizes=((4, 4), (2, 6)))
    assert [row.title for row in panel_rows(found)] == [
        "Image 1 of 2: mean over latent steps", "Image 1 of 2: latent steps", "Image 1 of 2: teacher, per query",
        "Image 2 of 2: mean over latent steps", "Image 2 of 2: latent steps",
    ]  # fmt: skip
    steps = panel_rows(looks(), "steps")[0].panels
    share = float(looks().maps[0][2][1:3, 1:3].sum())
    assert steps[2].label.replace("\u202f", " ") == f"step 3: {100 * share:.0f} % in box"
    assert [panel.label for panel in panel_rows(looks(spans=2, boxes=()), "steps")[0].panels][4:6] == [
        "span 1, step 5", "span 2, step 1",
    ]  # fmt: skip
    mean = panel_rows(looks(), "mean")[0].panels
    assert mean[0].heat is None and np.allclose(mean[1].heat, looks().maps[0].mean(0))
    assert [row.title for row in panel_rows(looks(), "queries")] == ["teacher, per query", "latent steps"]


def test_one_scale_for_all_maps_of_a_figure():
    rows = panel_rows(looks())
    assert scale_top(rows) == max(float(looks().maps[0].max()), 1 / 16)
    assert scale_top(rows, 0.5) == 0.5
    with pytest.raises(ConfigError, match="scale_max: expected a positive number, got 0"):
        scale_top(rows, 0)


@pytest.mark.parametrize(("ending", "kind"), [(".gif", "GIF"), (".webp", "WEBP")])
@pytest.mark.parametrize("size", [(160, 40), (40, 160)])
def test_animations_have_a_frame_per_step(tmp_path, ending, kind, size):
    frames = look_frames(looks(), [photo(*size)], "what is it?")
    path = write_animation(frames, tmp_path / f"steps{ending}")
    with Image.open(path) as found:
        assert found.format == kind and found.n_frames == STEPS and found.size == frames[0].size
        assert found.info["loop"] == 0
        shown = []
        for number in range(STEPS):
            found.seek(number)
            shown.append(np.asarray(found.convert("RGB"), dtype=float))
    for frame, one in zip(frames, shown):
        assert np.abs(np.asarray(frame, dtype=float) - one).mean() < 8
    with pytest.raises(ConfigError, match=r"expected a name in \.gif or \.webp"):
        write_animation(frames, tmp_path / "steps.mp4")


def test_an_animation_of_equal_steps_keeps_them_all(tmp_path):
    even = looks()
    for one in even.maps:
        one.fill_(1 / 16)
    with Image.open(write_animation(look_frames(even, [photo()], "q"), tmp_path / "a.gif")) as found:
        assert found.n_frames == STEPS


def test_words_fit_and_nothing_is_lost_before_the_ellipsis():
    text = "word " * 200 + "x" * 400
    for most in (1, 2, 3):
        lines = wrapped(text, 20, 300, most)
        assert len(lines) == most and lines[-1].endswith("…")
        assert all(text_width(line, 20) <= 300 for line in lines)
    whole = wrapped("a long enough sentence to be broken", 20, 120, 99)
    assert " ".join(whole) == "a long enough sentence to be broken" and len(whole) > 1
    assert wrapped("", 20, 100, 2) == [""]


def test_training_figures():
    maps = {"teacher": torch.full((3, 2, 4), 1 / 8), "student, own states fed": torch.full((3, 2, 4), 1 / 8)}
    assert training_figure(photo(80, 40), maps, BOX, "step 3").size[0] >= 560


@pytest.mark.parametrize("sizes", [((4, 4),), ((4, 4), (2, 6))])
def test_pages_are_whole_in_themselves(tmp_path, sizes):
    found = looks(sizes=sizes, answer="<b>bold</b> & so")
    card = render_card(found, [photo() for _ in sizes], "<script>alert(1)</script>?")
    page = write_look_page(card, PageFacts("a/model", "stage2"), tmp_path / "page.html").read_text()
    addresses = re.findall(r"https?://[^\s\"'<>]*", page)
    assert not [address for address in addresses if not address.startswith("http://www.w3.org/")]
    assert "Content-Security-Policy" in page and "default-src 'none'; img-src data:" in page
    assert "&lt;script&gt;alert(1)" in page and "<b>bold" not in page
    assert page.count("<script>") == 1 and page.count('type="range"') == len(sizes)
    assert f'max="{STEPS}"' in page and page.count('class="step"') == STEPS * len(sizes)
    for source in re.findall(r'src="data:image/webp;base64,([^"]+)"', page):
        with Image.open(io.BytesIO(base64.b64decode(source))) as picture:
            picture.load()
            assert max(picture.size) <= 380
    assert len(re.findall(r'id="([^"]+)"', page)) == len(set(re.findall(r'id="([^"]+)"', page)))


def test_an_answer_without_a_span():
    empty = looks(steps=0)
    assert "no latent span" in render_card(empty, [photo()], "q")
    with pytest.raises(ConfigError, match="--force-latent"):
        look_figure(empty, [photo()], "q")
    with pytest.raises(ConfigError, match="queries needs the teacher's maps"):
        look_figure(looks(teacher=False), [photo()], "q", "queries")
    with pytest.raises(ConfigError, match="kind: expected one of all, steps, mean, queries"):
        look_figure(looks(), [photo()], "q", "everything")


# The command


@pytest.fixture
def visualize(monkeypatch, command_line, checkpoint, tmp_path):
    monkeypatch.chdir(tmp_path)
    photo(112, 84).save(tmp_path / "photo.png")

    def call(*words, model=checkpoint):
        return command_line("visualize", "--model", model, *words)

    return call


ONE = ("--image", "photo.png", "--question", "what?", "--force-latent", "--max-new-tokens", 4)


@pytest.mark.parametrize("ending", ["png", "gif", "webp", "html"])
@pytest.mark.parametrize("more", [(), ("--rollout",), ("--layers", "0,1", "--heads", "2")])
def test_one_question(visualize, tmp_path, tiny, ending, more):
    done = visualize(*ONE, "--box", "0.1,0.1,0.6,0.6", "--out", f"a.{ending}", "--json", *more)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] >= tiny.SLOTS and len(told["in_box"]) == told["steps"]
    assert told["attention"].startswith("language model" if more else "student")
    if ending == "html":
        assert '<div class="looks">' in (tmp_path / "a.html").read_text()
    else:
        with Image.open(tmp_path / f"a.{ending}") as found:
            assert getattr(found, "n_frames", 1) == (1 if ending == "png" else told["steps"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "nowhere.png", "--question", "q"), "expected an image file at nowhere.png"),
        ((*ONE, "--box", "0.5,0,1.5,1"), "fractions of the image"),
        ((*ONE, "--box", "0.5,0,0.5,1"), "fractions of the image"),
        ((*ONE, "--box", "1,2"), "box: expected x0,y0,x1,y1"),
        ((*ONE, "--layers", "7"), "layers: expected numbers from 0 to 1, got [7]"),
        ((*ONE, "--heads", "a"), "heads: expected whole numbers"),
        ((*ONE, "--source", "eyes"), "source: expected one of"),
        ((*ONE, "--kind", "queries"), "queries needs the teacher's maps"),
        ((*ONE, "--kind", "x"), "kind: expected one of"),
        ((*ONE, "--out", "a.mp4"), "out: expected a name in .png"),
        ((*ONE, "--out", "nowhere/a.png"), "expected a folder that can be written to"),
        ((*ONE, "--scale-max", "-1"), "scale_max: expected a positive number"),
        ((*ONE, "--dtype", "int3"), "dtype: expected one of"),
        ((*ONE, "--device", "moon"), "device: expected such as cpu"),
        (("--image", "photo.png"), "expected --image and --question, or --rows"),
        (("--rows", "rows.json", "--question", "q"), "expected --rows alone"),
        (("--rows", "rows.json"), "rows.json"),
    ],
)
def test_bad_input(visualize, words, message):
    done = visualize(*words)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_model_without_latents(visualize, tiny, tmp_path):
    folder = tmp_path / "sft"
    tiny.model("sft").save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    done = visualize(*ONE, model=folder)
    assert done.returncode == 2 and "expected a checkpoint with latent steps" in done.stderr


@pytest.fixture
def rows(tmp_path):
    """Six rows; the image of the third is missing."""
    made = []
    for number in range(6):
        photo(60 + 30 * number, 90).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\nquestion {number}?"},
            {"from": "gpt", "value": f"<lvr>\n<answer> {number} </answer>"},
        ]
        made.append({"image": f"{number}.png", "conversations": turns, "bboxes": [[0.1, 0.1, 0.5, 0.5]]})
    (tmp_path / "2.png").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return ("--rows", "rows.json", "--image-folder", ".", "--force-latent", "--max-new-tokens", 4, "--out", "all.html")


def test_a_gallery_is_made_card_by_card_and_goes_on(visualize, rows, tmp_path, monkeypatch):
    asked, own = [], look_run.look

    def counted(model, processor, images, question, **settings):
        asked.append(question)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return own(model, processor, images, question, **settings)

    monkeypatch.setattr(look_run, "look", counted)
    stopped = visualize(*rows)
    assert stopped.returncode == 1
    part = (tmp_path / "all.html").read_text()
    assert part.count("<article") == 4 and "question 3?" in part and "question 4?" not in part
    other = visualize(*rows, "--rollout")
    assert other.returncode == 2 and "parts of others" in other.stderr
    done = visualize(*rows, "--json")
    told = json.loads(done.stdout)
    assert told["rows"] == 6 and told["with_maps"] == 5
    assert len(asked) == 6  # of five that can be asked, one was cut short; none was asked twice
    page = (tmp_path / "all.html").read_text()
    assert page.count("<article") == 6 and page.count("A row that cannot be used") == 1 and "<dd>4</dd>" in page
    assert [int(n) for n in re.findall(r"question (\d)\?", page)] == [0, 1, 3, 4, 5]
    assert len(re.findall(r'id="([^"]+)"', page)) == len(set(re.findall(r'id="([^"]+)"', page)))
    assert not (tmp_path / "all.html.parts").exists()


def test_a_limit(visualize, rows):
    told = json.loads(visualize(*rows, "--limit", 2, "--json").stdout)
    assert told["rows"] == 2 and told["with_maps"] == 2
