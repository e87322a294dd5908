"""Figures, animations, pages and the command: sizes, scales, what is on them, and what bad input gives."""

import base64
import io
import json
import re
from dataclasses import replace

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
from vreflection.visualization.look_panels import painted, panel_rows, scale_top, tile
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
@pytest.mark.parametrize("kind", ["all", "looks", "steps", "mean", "queries"])
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
    mean = panel_rows(looks(), "mean")[0].panels
    assert mean[0].heat is None and np.allclose(mean[1].heat, looks().maps[0].mean(0))
    assert [row.title for row in panel_rows(looks(), "queries")] == ["teacher, per query", "latent steps"]


HOP_BOXES = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.0, 0.5, 0.5, 1.0))


def labels(row):
    return [panel.label.replace("\u202f", " ") for panel in row.panels]


def hop_shares(answer, hop, box):
    rows, columns = (slice(round(4 * box[n]), round(4 * box[n + 2])) for n in (1, 0))
    return [float(one[rows, columns].sum()) for one in answer.maps[0][2 * hop : 2 * hop + 2]]


def test_rows_of_a_figure_with_several_hops():
    answer = looks(boxes=HOP_BOXES, steps=2, spans=3)
    shares = [hop_shares(answer, hop, box) for hop, box in enumerate(HOP_BOXES)]
    assert len({round(share, 3) for hop in shares for share in hop}) == 6
    rows = panel_rows(answer)
    assert [row.title for row in rows] == [
        "mean over latent steps", "look 1 of 3", "look 2 of 3", "look 3 of 3", "teacher of box 1, per query",
        "teacher of box 2, per query", "teacher of box 3, per query",
    ]  # fmt: skip
    words = [[f"{100 * share:.0f} % in box" for share in [*hop, sum(hop) / 2]] for hop in shares]
    assert labels(rows[0]) == ["image and boxes", "mean", *(f"look {n + 1}, mean: {words[n][2]}" for n in range(3))]
    for hop, row in enumerate(rows[1:4]):
        steps = [f"look {hop + 1}, step {step + 1}: {words[hop][step]}" for step in range(2)]
        assert labels(row) == [*steps, f"teacher of box {hop + 1}: mean"]
        assert [panel.span for panel in row.panels] == [hop] * 3
        assert np.array_equal(row.panels[1].heat, answer.maps[0][2 * hop + 1])
    assert [labels(row) for row in panel_rows(answer, "steps")] == [labels(row)[:2] for row in rows[1:4]]
    (hops,) = panel_rows(answer, "looks")
    assert labels(hops)[0] == "image and boxes" and [panel.span for panel in hops.panels] == [None, 0, 1, 2]
    (means,) = panel_rows(answer, "mean")
    assert labels(means)[2:4] == [f"look 1, mean: {words[0][2]}", "teacher of box 1: mean"]
    assert [row.title for row in panel_rows(answer, "queries")] == [
        title for n in (1, 2, 3) for title in (f"teacher of box {n}, per query", f"look {n} of 3")
    ]


def test_a_box_alone_belongs_to_every_hop_and_boxes_may_lie_in_two_images():
    alone = looks(steps=2, spans=2)
    assert alone.in_own_box() == alone.in_box() and alone.shares() == alone.in_boxes()
    assert labels(panel_rows(alone)[2])[2] == "teacher: mean"
    assert [row.title for row in panel_rows(alone, "queries")] == ["teacher, per query", "look 1 of 2", "look 2 of 2"]
    fewer = looks(boxes=HOP_BOXES[:2], steps=2, spans=3)
    assert fewer.in_own_box()[4:] == [None, None] and None not in fewer.in_own_box()[:4]
    assert labels(panel_rows(fewer)[3]) == ["look 3, step 1", "look 3, step 2"]
    two = replace(looks(sizes=((4, 4), (4, 4)), boxes=HOP_BOXES, steps=2, spans=3), box_images=(0, 1, 0))
    assert [share is None for share in two.shares(0)] == [False, False, True, True, False, False]
    assert [share is None for share in two.shares(1)] == [True, True, False, False, True, True]
    assert two.shown_boxes(1, 1) == [(2, HOP_BOXES[1])] and two.shown_boxes(0, 1) == []
    assert two.shown_boxes(0, None) == [(1, HOP_BOXES[0]), (3, HOP_BOXES[2])]
    assert looks(boxes=HOP_BOXES).shown_boxes(0, 0) == [(None, box) for box in HOP_BOXES]
    assert "teacher of box 2: mean" in labels(panel_rows(two)[8])


def test_each_hop_shows_its_own_box_with_its_number():
    answer = looks(boxes=HOP_BOXES, steps=2, spans=3)
    plain, rows = photo().convert("L").convert("RGB"), panel_rows(answer)
    changed = []
    for hop in range(3):
        panel = rows[1 + hop].panels[0]
        bare, drawn = (np.asarray(painted(plain, panel, boxes, 1.0)) for boxes in ((), answer.shown_boxes(0, hop)))
        y, x = (bare != drawn).any(-1).nonzero()
        changed.append((x.min() / 120, y.min() / 120, x.max() / 120, y.max() / 120))
    for box, edges in zip(HOP_BOXES, changed):
        assert edges[0] == pytest.approx(box[0], abs=0.05) and edges[2] == pytest.approx(box[2], abs=0.05)
    # The number stands above the second box.
    assert changed[1][1] < HOP_BOXES[1][1] - 0.05
    everything = painted(plain, rows[0].panels[0], answer.shown_boxes(0, None), 1.0)
    assert not np.array_equal(everything, painted(plain, rows[0].panels[0], [(None, box) for box in HOP_BOXES], 1.0))


@pytest.mark.parametrize("size", SHAPES[:3])
@pytest.mark.parametrize("kind", ["all", "looks", "steps", "mean", "queries"])
def test_figures_and_frames_of_several_hops(size, kind):
    answer = looks(boxes=HOP_BOXES, steps=2, spans=3)
    figure = look_figure(answer, [photo(*size)], "start at the red note , follow 2 times : what digit ?", kind)
    assert 560 <= figure.width <= 1760
    frames = look_frames(answer, [photo(*size)], "what is it?")
    assert len(frames) == 6 and len({frame.size for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == 6


def test_a_page_groups_steps_by_hop():
    answer = looks(sizes=((4, 4), (2, 6)), boxes=HOP_BOXES, steps=2, spans=3)
    page = render_card(answer, [photo(), photo()], "q")
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["Look 1", "Look 2", "Look 3"] * 2
    assert page.count('class="step"') == 12 and page.count('type="range"') == 2 and page.count('max="6"') == 2
    assert page.count("Attention at each latent step, look 2, image 1") == 1
    assert page.count('<span class="meter"') == 6 and page.count("teacher of box 2: mean</span>") == 1
    assert "<h4>" not in render_card(looks(), [photo()], "q")


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
    with pytest.raises(ConfigError, match="kind: expected one of all, looks, steps, mean, queries"):
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
    assert told["span"] == [step // tiny.SLOTS for step in range(told["steps"])]
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


def test_shares_are_printed_hop_by_hop():
    from vreflection.cli.visualize import _told

    result = {"answer": "5", "attention": "student", "out": "a.png"}
    one = _told({**result, "span": [0, 0], "in_box": [0.5, 0.25]})
    assert "in the box per step: 50 %, 25 %\n" in one
    two = _told({**result, "span": [0, 0, 1], "in_box": [0.5, 0.25, None]})
    assert "in the box per step: look 1: 50 %, 25 %; look 2: –\n" in two


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


def side(path, width=84, height=112):
    """A photo that lies on its side in the file, and its upright picture."""
    upright, tags = photo(width, height), Image.Exif()
    tags[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=tags)
    return upright


@pytest.mark.parametrize("ending", ["png", "html"])
def test_a_photo_is_asked_and_drawn_upright(visualize, tmp_path, ending):
    side(tmp_path / "side.png").save(tmp_path / "upright.png")
    made = []
    for name in ("side.png", "upright.png"):
        words = ("--image", name, "--question", "what?", "--force-latent", "--max-new-tokens", 4, "--json")
        done = visualize(*words, "--box", "0.1,0.1,0.6,0.6", "--out", f"a.{ending}")
        assert done.returncode == 0, done.stderr
        made.append((json.loads(done.stdout), (tmp_path / f"a.{ending}").read_bytes()))
    assert made[0] == made[1]


def test_figures_turn_photos_as_the_processor_does(tmp_path):
    upright, answer = side(tmp_path / "side.png"), looks()
    with Image.open(tmp_path / "side.png") as opened:
        assert look_figure(answer, [opened], "q").tobytes() == look_figure(answer, [upright], "q").tobytes()


def test_a_gallery_reads_images_as_its_rows_do(visualize, rows, tmp_path, monkeypatch):
    side(tmp_path / "0.png")
    sizes, own = [], look_run.look

    def noted(model, processor, images, question, **settings):
        sizes.append(images[0].size)
        return own(model, processor, images, question, **settings)

    monkeypatch.setattr(look_run, "look", noted)
    for number, (view, size) in enumerate((((), (112, 84)), (("--image-view", "shown"), (84, 112)))):
        done = visualize(*rows[:-1], f"{number}.html", "--limit", 1, *view)
        assert done.returncode == 0 and sizes[-1] == size, done.stderr
    done = visualize(*rows, "--image-view", "upright")
    assert done.returncode == 2 and "--image-view: expected shown or stored, got 'upright'" in done.stderr
