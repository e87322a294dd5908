import re
from xml.etree import ElementTree

import pytest

from vreflection.visualization.eval_charts import accuracy_by_steps, score_bars

SVG = "{http://www.w3.org/2000/svg}"


def row(label, value, floor=None, n=100):
    return {"label": label, "value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "floor": floor}


def point(steps, value):
    return {"steps": steps, "value": value, "low": value - 0.05, "high": value + 0.05}


def drawn(svg):
    """The document, which must be well-formed and show each class it uses."""
    root = ElementTree.fromstring(svg)
    style = root.find(f"{SVG}style").text
    for element in root.iter():
        for name in element.get("class", "").split():
            assert f".{name}" in style
    assert "prefers-color-scheme:dark" in style
    return root


def marked(root, tag, name):
    return [element for element in root.iter(f"{SVG}{tag}") if element.get("class") == name]


def test_bars_are_as_long_as_their_shares():
    root = drawn(score_bars([row("a <b>", 0.5, floor=0.25), row("c", 0.25)], "Title & more"))
    bars, tracks = marked(root, "rect", "bar"), marked(root, "rect", "track")
    lengths = [float(bar.get("width")) / float(track.get("width")) for bar, track in zip(bars, tracks, strict=True)]
    assert lengths == [pytest.approx(0.5, abs=1e-4), pytest.approx(0.25, abs=1e-4)]
    whisker = marked(root, "line", "whisker")[0]
    left, span = float(tracks[0].get("x")), float(tracks[0].get("width"))
    ends = [(float(whisker.get(key)) - left) / span for key in ("x1", "x2")]
    assert ends == [pytest.approx(0.4, abs=1e-4), pytest.approx(0.6, abs=1e-4)]
    floors = marked(root, "line", "floor")  # one in the legend, one at its bar
    assert sorted((float(line.get("x1")) - left) / span for line in floors)[0] == pytest.approx(0.25, abs=1e-4)
    assert len(floors) == 2
    described = root.find(f"{SVG}desc").text
    assert "a <b>: 50.0" in described and "n = 100" in described and "always the same letter 25.0" in described


def test_no_legend_without_floors():
    assert not marked(drawn(score_bars([row("a", 0.5)], "t")), "line", "floor")


def test_lines_over_steps():
    series = {"x": [point(8, 0.6), point(2, 0.5)], "y": [point(2, 0.1), point(4, 0.3), point(8, 0.2)]}
    root = drawn(accuracy_by_steps(series, "Steps"))
    lines = list(root.iter(f"{SVG}polyline"))
    assert [len(line.get("points").split()) for line in lines] == [2, 3]
    xs = [float(pair.split(",")[0]) for pair in lines[1].get("points").split()]
    assert xs == sorted(xs)
    heights = [float(pair.split(",")[1]) for pair in lines[0].get("points").split()]
    assert heights[0] > heights[1]  # 8 steps are better than 2, and y points down
    assert [line.get("class") for line in lines] == ["s0", "s1"]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"2", "4", "8", "x", "y", "latent steps"} <= set(texts)
    assert re.search(r"x: 2 steps 50.0.*8 steps 60.0", root.find(f"{SVG}desc").text)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one row"):
        score_bars([], "t")
    with pytest.raises(ValueError, match="at least one point"):
        accuracy_by_steps({}, "t")
