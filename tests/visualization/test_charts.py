import xml.etree.ElementTree as ET

import pytest

from vreflection.visualization.charts import accuracy_bars, curve_keys, training_curve
from vreflection.visualization.svg import number, percent, tag, text


def texts(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter("text")]


def of_class(svg, name):
    return [node for node in ET.fromstring(svg).iter() if name in node.get("class", "").split()]


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def bar_rows(metrics):
    return [*metrics["arms"], {**metrics["interventions"][1], "group": "intervention"}]


def test_bars_have_the_length_of_the_accuracy_and_whiskers_of_the_interval(metrics):
    svg = accuracy_bars(bar_rows(metrics), 0.1, 0.2)
    assert [bar.get("width") for bar in of_class(svg, "bar")] == ["80.50%", "16.50%", "75.00%", "58.50%"]
    ink = [line for line in of_class(svg, "ink") if line.get("y1") == line.get("y2")]
    assert [(line.get("x1"), line.get("x2")) for line in ink] == [
        ("75.40%", "84.80%"),
        ("11.40%", "20.80%"),
        ("69.90%", "79.30%"),
        ("53.40%", "62.80%"),
    ]


def test_bars_name_groups_intervals_counts_and_references(metrics):
    svg = accuracy_bars(bar_rows(metrics), 0.1, 0.2)
    words = texts(svg)
    order = [words.index(word) for word in ("With latent steps", "Stage two", "Latents changed", "Swapped latents")]
    assert order == sorted(order)
    assert any("80.5" in word and "[75.4, 84.8]" in word and "n = 200" in word for word in words)
    assert [line.get("x1") for line in of_class(svg, "reference") if "mark" not in line.get("class")] == [
        "10.00%",
        "20.00%",
    ]
    description = ET.fromstring(svg).find("desc").text
    assert "Stage two: 80.5" in description and "chance 10.0" in description


def test_bars_escape_and_shorten_labels_but_keep_them_whole_in_the_description(metrics):
    metrics["arms"][0]["label"] = "<b>" + "x" * 80
    svg = accuracy_bars(metrics["arms"], 0.1, 0.2)
    assert "<b>" not in svg and any(word.endswith("…") for word in texts(svg))
    assert "x" * 80 in ET.fromstring(svg).find("desc").text


def test_curve_puts_values_at_their_height():
    svg = training_curve({"a": [{"step": 0, "v": 0.0}, {"step": 50, "v": 1.0}, {"step": 100, "v": 2.0}]}, "v", "c", "V")
    (line,) = of_class(svg, "s0")
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    marks = {
        node.text: float(node.get("y")) - 4
        for node in ET.fromstring(svg).iter("text")
        if node.get("text-anchor") == "end"
    }
    assert marks["0"] == pytest.approx(y0) and marks["1"] == pytest.approx(y1) and marks["2"] == pytest.approx(y2)
    assert {"0", "50", "100", "step"} <= set(texts(svg))


def test_wide_positive_ranges_get_a_logarithmic_axis_that_says_so():
    svg = training_curve({"a": [{"step": s, "v": 10.0**-s} for s in range(4)]}, "v", "c", "V")
    heights = [y for _, y in points(of_class(svg, "s0")[0])]
    gaps = [lower - upper for upper, lower in zip(heights, heights[1:])]
    assert max(gaps) - min(gaps) < 0.3
    assert any("logarithmic" in word for word in texts(svg)) and {"0.001", "1"} <= set(texts(svg))


def test_an_arm_keeps_its_style_in_every_panel(metrics):
    svg = training_curve(metrics["curves"], "attention_kl", "c", "KL", {"stage2": "Stage two"})
    assert len(of_class(svg, "s1")) == 1 and not of_class(svg, "s0")
    assert ET.fromstring(svg).find("desc").text == "Stage two: 19.8 at step 1, 10.0 at step 40"


def test_long_curves_are_averaged_and_gaps_left_out():
    curve = [{"step": s, "v": 1.0 if s % 2 else 3.0} for s in range(1, 801)] + [
        {"step": 801, "v": float("nan")},
        {"step": 802},
    ]
    line = points(of_class(training_curve({"a": curve}, "v", "c", "V"), "s0")[0])
    assert len(line) == 200 and len({y for _, y in line}) == 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [-2.0, 3.0], [5.0], [1e-7, 2e-7]])
def test_unusual_ranges_draw(values):
    svg = training_curve({"a": [{"step": s, "v": v} for s, v in enumerate(values)]}, "v", "c", "V")
    assert "nan" not in svg and of_class(svg, "s0")


def test_a_curve_without_values_is_refused():
    with pytest.raises(ValueError, match="'v'"):
        training_curve({"a": [{"step": 1, "v": float("inf")}]}, "v", "c", "V")


def test_curve_keys_keep_their_order(metrics):
    assert curve_keys(metrics["curves"]) == ["loss", "cross_entropy", "attention_kl"]


def test_svg_writer_escapes():
    assert (
        tag("g", text("<&>"), class_="a", data_x='"') == '<g class="a" data-x="&quot;"><text>&lt;&amp;&gt;</text></g>'
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (0, "0"),
        (0.0784, "0.0784"),
        (12345.6, "12346"),
        (1.0, "1.00"),
        (float("nan"), "not finite"),
        (1e-9, "1.00e-09"),
    ],
)
def test_number(value, written):
    assert number(value) == written


def test_percent():
    assert percent(0.1234) == "12.3\u202f%" and percent(None) == "–"
