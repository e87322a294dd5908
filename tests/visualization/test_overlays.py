import base64
import io

import numpy as np
import pytest
from PIL import Image

from vreflection.visualization.overlays import attention_overlay, colour_bar, colour_ramp, data_uri, outline_box


def grey(width=80, height=40, level=128):
    return Image.new("RGB", (width, height), (level,) * 3)


def saturation(image):
    pixels = np.asarray(image).astype(int)
    return pixels.max(axis=-1) - pixels.min(axis=-1)


def oklab_lightness(rgb):
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ np.array([0.2104542553, 0.7936177850, -0.0040720468])


def test_ramp_gets_lighter_evenly():
    lightness = oklab_lightness(colour_ramp())
    steps = np.diff(lightness)
    assert (steps > 0).all() and steps.max() < 4 * steps.mean()


def test_the_attended_token_is_coloured_and_no_other():
    heat = np.zeros((2, 4))
    heat[1, 2] = 0.6
    coloured = saturation(attention_overlay(grey(), heat)) > 30
    expected = np.zeros((40, 80), dtype=bool)
    expected[20:40, 40:60] = True
    assert np.array_equal(coloured, expected)


def test_brightest_pixels_lie_under_the_largest_weight():
    heat = np.random.default_rng(1).random((4, 8)) * 0.5
    heat[3, 6] = 1.0
    light = np.asarray(attention_overlay(grey(level=60), heat).convert("L"))
    rows, columns = np.nonzero(light == light.max())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 39, 60, 69)


def test_smooth_maps_peak_at_the_token_centre():
    heat = np.zeros((5, 5))
    heat[1, 3] = 1.0
    light = np.asarray(attention_overlay(grey(100, 100, 20), heat, smooth=True).convert("L"))
    assert light[30, 70] == light.max() and light[30, 70] > light[30, 62] > light[30, 50]


def test_vmax_puts_two_maps_on_one_scale():
    strong, weak = np.full((2, 2), 0.8), np.full((2, 2), 0.2)
    pixel = lambda heat, vmax: attention_overlay(grey(), heat, vmax=vmax).getpixel((5, 5))  # noqa: E731
    assert pixel(strong, None) == pixel(weak, None)  # each on its own scale
    assert pixel(strong, 0.8) != pixel(weak, 0.8)
    assert pixel(weak, 0.8) == pixel(2 * weak, 1.6)  # only the share of vmax matters
    assert pixel(strong, 0.4) == pixel(weak, 0.2)  # saturated


def test_an_empty_map_leaves_the_photograph_grey():
    assert saturation(attention_overlay(grey(), np.zeros((2, 2)))).max() == 0


@pytest.mark.parametrize("level", [0, 128, 255])
def test_box_is_drawn_on_its_edges_and_contrasts_with_any_background(level):
    framed = np.asarray(outline_box(grey(80, 80, level), (0.25, 0.5, 0.75, 1.0)))[..., 0].astype(int)
    assert (framed[40, 20:60] == 255).all() and (framed[79, 20:60] == 255).all()
    assert (framed[40:80, 20] == 255).all() and (framed[40:80, 59] == 255).all()
    assert (framed[39, 20:60] == 16).all() and (framed[40:80, 19] == 16).all()
    assert (framed[45:75, 25:55] == level).all() and (framed[:38] == level).all() and (framed[:, 62:] == level).all()


def test_overlay_draws_the_box_it_is_given():
    heat = np.ones((2, 2))
    with_box = np.asarray(attention_overlay(grey(80, 80), heat, box=(0.5, 0.5, 1, 1)))
    assert (with_box[40, 40:80] == 255).all()
    assert np.array_equal(with_box[:38], np.asarray(attention_overlay(grey(80, 80), heat))[:38])


@pytest.mark.parametrize(
    ("heat", "box", "vmax", "named"),
    [
        (np.ones(4), None, None, "shape"),
        (np.array([[np.nan]]), None, None, "finite"),
        (np.array([[-0.1]]), None, None, "negative"),
        (np.ones((2, 2)), None, 0.0, "vmax"),
        (np.ones((2, 2)), (0.5, 0.1, 0.4, 0.9), None, "box"),
        (np.ones((2, 2)), (0.5, 0.1, 1.4, 0.9), None, "box"),
    ],
)
def test_refusals_name_what_is_wrong(heat, box, vmax, named):
    with pytest.raises(ValueError, match=named):
        attention_overlay(grey(), heat, box, vmax)


def test_colour_bar_shows_the_overlay_colours_and_its_ends():
    bar = colour_bar(0.372)
    strongest = "#" + "".join(
        f"{c:02x}" for c in attention_overlay(grey(level=round(127.5)), np.ones((1, 1))).getpixel((0, 0))
    )
    last = bar.rsplit('fill="', 1)[1][:7]
    assert max(abs(int(last[i : i + 2], 16) - int(strongest[i : i + 2], 16)) for i in (1, 3, 5)) <= 1
    assert ">0<" in bar and ">0.186<" in bar and ">0.372<" in bar


@pytest.mark.parametrize(("format", "mime"), [("WEBP", "webp"), ("png", "png"), ("JPEG", "jpeg")])
def test_data_uri_decodes_to_the_image(format, mime):
    image = grey(33, 21, 90)
    head, body = data_uri(image, format).split(",")
    assert head == f"data:image/{mime};base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")
    assert decoded.size == (33, 21) and abs(decoded.getpixel((9, 9))[0] - 90) <= 3


def test_data_uri_refuses_other_formats():
    with pytest.raises(ValueError, match="GIF"):
        data_uri(grey(), "GIF")
