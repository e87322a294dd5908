import json
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vreflection.visualization import report
from vreflection.visualization.report import render_report, write_report

VOID = {"meta", "img", "input", "br", "link"}
LOADING = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "style"}


class Page(HTMLParser):
    """Collects elements, their text, and every mismatch between opening and closing tags."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.mismatches, self.text = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mismatches.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text).replace("\u202f", " "))


def test_page_is_balanced_html_with_unique_ids_and_working_references(metrics, images):
    page = Page(render_report(metrics, images))
    assert not page.mismatches and not page.open
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        for key in ("for", "aria-labelledby", "aria-describedby"):
            assert attrs.get(key) is None or attrs[key] in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
    assert all("alt" in image for image in page.all("img"))


def test_page_shows_every_label_and_number(metrics, images):
    words = Page(render_report(metrics, images)).words
    expected = [
        "A small report", "2025-01-02", "“start at the <colour> note”",
        "2047 questions on 1024 images", "201 questions",
        "Finding one, 58.5 %.", "Finding two says less.",
        "Stage two Noted. 80.5 % 75.4–84.8 % 80 % 70 % 60 % 137 1.31", "Plain tuning 58.5 %", "In words 75.0 %",
        "Swapped latents 16.5 %", "guessing any digit 10 %", "any digit of the image gives 20 %",
        "start at the red note , follow 1 times", "test/0", "Answered 3 ✗ wrong", "Expected 7",
        "With another image’s latents (answer there: 8) 9", "Without latent steps 4",
        "look 1 81 % on note 1", "look 2 2 % on note 2",
        "Free-running: 0.742 on average, IoU 0.613", "look 1 0.812 96 % 198", "look 2 0.634 – 197",
        "Latents of stage two 0.834 0.645 99.3 % – 0.867",
        "Total loss", "Attention divergence (KL)",
        "Teaching 42.4 s 59 %", "Sum of all parts 1 min 12 s",
        "torch 2.99.1", "cores 3", "seed 17", "stage1 steps 137 lr_llm 0.001 milestones 0.1, 0.5", "free_running yes",
        "A. N. Author", "CC BY 2.0", "https://example.org/1", "train",
    ]  # fmt: skip
    squeezed = words.replace(" ", "")
    assert [text for text in expected if text.replace(" ", "") not in squeezed] == []


def test_page_asks_the_network_for_nothing(metrics, images):
    page = render_report(metrics, images)
    parsed = Page(page)
    assert not parsed.all("link") and not any("src" in script for script in parsed.all("script"))
    for tag, attrs in parsed.elements:
        for key in LOADING & attrs.keys():
            assert "//" not in attrs[key] or attrs[key].startswith("data:image/"), (tag, key)
        if "href" in attrs:
            assert tag == "a"
    assert not re.search(r"@import|url\(|@font-face|fetch\(|XMLHttpRequest", page)
    # The only addresses are the credits' links, which load nothing until somebody follows them.
    assert set(re.findall(r"https?://[^\"'<\s]+", page)) == {"https://example.org/1"}


def test_no_script_runs_on_the_page(metrics, images):
    page = render_report(metrics, images)
    assert "<script" not in page
    (policy,) = [m["content"] for m in Page(page).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_the_page_opens_with_the_figure_and_then_shows_the_looks(metrics, images):
    page = render_report(metrics, images)
    places = [
        page.index(mark) for mark in ('id="accuracy"', 'class="curve hops"', 'id="looking"', "<article", 'id="arms"')
    ]
    assert places == sorted(places)


def test_one_number_of_hops_is_drawn_as_bars(metrics, images):
    metrics["task"]["hops"] = [0]
    for arm in metrics["arms"]:
        arm["by_hops"] = arm["by_hops"][:1]
    page = render_report(metrics, images)
    assert 'class="curve hops"' not in page and 'class="bars"' in page and "Accuracy over hops" not in page


def test_a_shipped_study_is_shown_as_such(metrics, images):
    points = [{"hops": h, "value": 0.9, "low": 0.88, "high": 0.93} for h in range(3)]
    steps = [{"hops": 0, "reached": 50, "trained": 300}, {"hops": 1, "reached": None, "trained": 300}]
    metrics["study"] = {
        "created": "2025-02-03", "command": "vreflection quickstart --study", "seeds": 5, "guess_in_image": 0.25,
        "arms": [{"label": "Latents", "style": "s0", "by_hops": points}],
        "depth": [{"title": "2 layers", "series": [{"label": "With feedback", "style": "s0", "by_hops": points}]}],
        "steps": {"level": 0.8, "series": [{"label": "Latents", "style": "s0", "steps": steps}]},
        "sentences": ["It says so."],
    }  # fmt: skip
    page = Page(render_report(metrics, images))
    assert not page.mismatches
    for phrase in (
        "Not from this run",
        "2025-02-03",
        "vreflection quickstart --study",
        "2 layers",
        "not reached",
        "It says so.",
    ):
        assert phrase in page.words
    assert page.words.count("With feedback") == 2  # the panel's description, and the key of the line styles


def test_a_study_without_steps_until_a_level_shows_its_other_figures(metrics, images):
    points = [{"hops": h, "value": 0.9, "low": 0.88, "high": 0.93} for h in range(3)]
    metrics["study"] = {
        "created": "2025-02-03", "command": "vreflection quickstart --study", "seeds": 1, "guess_in_image": 0.25,
        "arms": [{"label": "Latents", "style": "s0", "by_hops": points}], "depth": [],
        "steps": {"level": 0.8, "series": []}, "sentences": ["It says so."],
    }  # fmt: skip
    page = Page(render_report(metrics, images))
    assert "It says so." in page.words and "Training steps until" not in page.words


def test_hostile_text_stays_text(metrics, images):
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    metrics["examples"][0] |= {"question": attack, "id": attack, "predicted": attack, "predicted_swapped": attack}
    metrics["arms"][0] |= {"label": attack, "note": attack}
    metrics |= {
        "title": attack,
        "findings": [attack],
        "environment": {attack: attack},
        "settings": {attack: {attack: attack}},
    }
    metrics["curves"] = {attack: [{"step": 1, attack: 1.0}]}
    metrics["attributions"][0] |= {"source": "javascript:alert(1)", "author": attack, attack: attack}
    page = Page(render_report(metrics, images))
    assert not page.all("script") and not page.mismatches
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert not any("javascript" in link["href"] for link in page.all("a"))
    assert attack in page.words


def test_all_missing_keys_are_named_at_once(metrics, images):
    del metrics["findings"], metrics["task"]["chance"], metrics["arms"][1]["accuracy"]["low"]
    metrics["examples"][0]["boxes"] = None
    with pytest.raises(ValueError) as caught:
        render_report(metrics, images)
    for path in ("findings", "task.chance", "arms[1].accuracy.low", "examples[0].boxes"):
        assert path in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(schema=1), "schema 1"),
        (lambda m: m["arms"][0].update(group="best"), "arms[0].group is 'best'"),
        (lambda m: m["examples"][0].update(image="lost"), "'lost'"),
        (lambda m: m["examples"][0].update(mass_in_box=[0.1]), "2 spans and 2 boxes but 1"),
        (lambda m: m["curves"]["sft"][3].pop("step"), "curves['sft'][3] lacks step"),
        (lambda m: m.update(task="?"), "task (expected an object, got str)"),
    ],
)
def test_contradictions_are_named(metrics, images, change, named):
    change(metrics)
    with pytest.raises(ValueError, match=re.escape(named)):
        render_report(metrics, images)


def test_nullable_values_may_be_absent(metrics, images):
    for arm in metrics["arms"]:
        arm.pop("note")
    metrics["gauges"] = [{"label": "Nothing measured"}]
    metrics["examples"][0] |= {"predicted_swapped": None, "predicted_removed": None}
    words = Page(render_report(metrics, images)).words
    assert (
        "Nothing measured" in words and "another image’s latents (" not in words and "Without latent steps" not in words
    )


def test_an_answer_without_a_span_says_so(metrics, images):
    metrics["examples"][0] |= {"spans": [], "mass_in_box": []}
    assert "opened no latent span" in Page(render_report(metrics, images)).words


def test_empty_sections_render(metrics, images):
    metrics |= {
        "arms": [],
        "interventions": [],
        "looks": [],
        "gauges": [],
        "curves": {},
        "timings": [],
        "examples": [],
        "attributions": [],
    }
    assert not Page(render_report(metrics, {})).mismatches


def test_no_finite_curve_value_is_said(metrics, images):
    metrics["curves"] = {"sft": [{"step": 1, "loss": float("nan")}]}
    assert "No finite value was recorded." in Page(render_report(metrics, images)).words


def test_one_colour_scale_per_example(metrics, images, monkeypatch):
    scales = []
    painted = report.attention_overlay
    monkeypatch.setattr(report, "attention_overlay", lambda i, h, b, v: scales.append(v) or painted(i, h, b, v))
    page = render_report(metrics, images)
    # A tile shows the mean of its span's latents.
    assert scales == [pytest.approx(0.6)] * 2 and 'aria-label="Colour scale, attention per token: 0 to 0.600"' in page


def test_file_size_stays_small(metrics, images):
    rng = np.random.default_rng(0)
    spans = [[rng.dirichlet(np.ones(64)).reshape(8, 8).tolist()] for _ in range(5)]
    boxes = [[0.25, 0.25, 0.5, 0.5]] * 5
    metrics["examples"] = [dict(metrics["examples"][0], spans=spans, boxes=boxes, mass_in_box=[0.5] * 5)] * 12
    assert len(render_report(metrics, images)) < 3_000_000  # pixel noise: photographs compress better


def test_write_is_atomic(metrics, images, tmp_path, monkeypatch):
    path = write_report(metrics, images, tmp_path / "out" / "report.html")
    first = path.read_text(encoding="utf-8")
    assert first == render_report(json.loads(json.dumps(metrics)), images)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    metrics["title"] = "Another"
    seen = []

    def fail(source, target):
        seen.append(Path(source).parent == path.parent and "Another" in Path(source).read_text(encoding="utf-8"))
        raise OSError("disk gone")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_report(metrics, images, path)
    assert seen == [True] and path.read_text(encoding="utf-8") == first and os.listdir(path.parent) == ["report.html"]
