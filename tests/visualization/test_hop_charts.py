import xml.etree.ElementTree as ET

import pytest

from vreflection.visualization.hop_charts import LINE_HEIGHT, hops_chart, steps_chart, steps_to_reach


def series(*values, label="Latents", style="s0"):
    points = [{"hops": h, "value": v, "low": v - 0.05, "high": v + 0.05} for h, v in enumerate(values)]
    return {"label": label, "style": style, "by_hops": points}


def of_class(svg, name, tag=None):
    found = [node for node in ET.fromstring(svg).iter() if name in node.get("class", "").split()]
    return [node for node in found if tag is None or node.tag == tag]


def heights(svg, style):
    (line,) = of_class(svg, style, "polyline")
    return [float(pair.split(",")[1]) for pair in line.get("points").split()]


def test_points_lie_at_their_share_and_bars_span_their_interval():
    svg = hops_chart([series(1.0, 0.5, 0.0)], 0.25, "h", "Title", (920, 400))
    top, middle, bottom = heights(svg, "s0")
    assert middle == pytest.approx((top + bottom) / 2, abs=0.1) and top < bottom
    whisker = of_class(svg, "whisker-line")[1]
    assert float(whisker.get("y1")) - float(whisker.get("y2")) == pytest.approx((bottom - top) * 0.1, abs=0.2)
    (reference,) = of_class(svg, "reference")
    assert float(reference.get("y1")) == pytest.approx(bottom - 0.25 * (bottom - top), abs=0.1)
    assert "Latents: 100" in ET.fromstring(svg).find("desc").text


def test_names_beside_the_lines_never_overlap_and_stay_inside():
    lines = [series(0.9, 0.30 + 0.001 * i, label=f"arm {i}", style=f"s{i}") for i in range(9)]
    svg = hops_chart(lines, 0.25, "h", "Title", (920, 400))
    places = sorted(float(node.get("y")) for node in of_class(svg, "name"))
    assert len(places) == 9 and min(b - a for a, b in zip(places, places[1:])) >= LINE_HEIGHT - 0.2
    assert places[0] > 0 and places[-1] < 400
    assert not of_class(hops_chart(lines, 0.25, "h", "Title", labels=False), "name")


def points(*rows):
    return [{"step": step, "by_hops": [{"hops": 0, "value": value}]} for step, value in rows]


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([(100, 0.5), (200, 0.81), (300, 0.9)], 200),
        ([(100, 0.85), (200, 0.7), (300, 0.9)], 300),  # a lucky early point does not count
        ([(100, 0.85), (200, 0.7)], None),
        ([(100, 0.2)], None),
    ],
)
def test_a_level_is_reached_where_accuracy_stays_above_it(rows, step):
    assert steps_to_reach(points(*rows), 0, 0.8) == step


def test_longer_training_is_a_longer_line_and_never_is_said():
    rows = [{"hops": 0, "reached": 100, "trained": 900}, {"hops": 1, "reached": None, "trained": 900}]
    svg = steps_chart([{"label": "Fillers", "style": "s1", "steps": rows}], 0.8, "s", "Title")
    first, second = (line for line in of_class(svg, "s1", "line") if line.get("x1") == "76")
    assert float(first.get("x2")) < float(second.get("x2"))
    assert "not reached" in "".join(ET.fromstring(svg).itertext())
    assert "Fillers, 1 hop: not reached in 900 steps" in ET.fromstring(svg).find("desc").text
