"""Attention maps painted over photographs, and the scale that reads them.

Shape suffixes: h, w token grid; H, W image pixels; C colour channels.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

RAMP_SIZE = 256
DIM = 0.55  # unattended pixels keep this share of their brightness, so that colour means attention
STRONGEST_TINT = 0.92  # the top of the scale still lets the photograph through
_MIME = {"WEBP": "image/webp", "PNG": "image/png", "JPEG": "image/jpeg"}


@functools.cache
def colour_ramp() -> np.ndarray:
    """(256, 3) float colours in 0..1 whose perceived lightness (OKLab) rises evenly, violet over red to pale yellow."""
    import numpy as np

    t = np.linspace(0.0, 1.0, RAMP_SIZE)
    lightness = 0.42 + 0.54 * t
    chroma = np.interp(t, [0.0, 0.35, 0.65, 1.0], [0.20, 0.23, 0.18, 0.13])
    hue = np.radians(np.interp(t, [0.0, 0.35, 0.65, 1.0], [295.0, 372.0, 410.0, 465.0]))
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # OKLab to linear sRGB, matrices from Ottosson's definition.
    cone_roots = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((to_rgb @ cone_roots**3).T, 0.0, 1.0)
    ramp = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ramp.setflags(write=False)
    return ramp


def _tint(luma: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Paint `strength` (0..1) over grey `luma` (0..1) of the same shape; returns (..., 3) in 0..1."""
    import numpy as np

    colour = colour_ramp()[np.rint(strength * (RAMP_SIZE - 1)).astype(int)]
    shaded = colour * (0.8 + 0.2 * luma[..., None])  # the photograph's texture stays readable under strong tints
    opacity = STRONGEST_TINT * np.cbrt(strength)[..., None]
    return (1 - opacity) * DIM * luma[..., None] + opacity * shaded


def checked_heat(heat: np.ndarray) -> np.ndarray:
    """`heat` as float64 (h, w); ValueError unless it is two-dimensional, finite and not negative."""
    import numpy as np

    heat_hw = np.asarray(heat, dtype=np.float64)
    if heat_hw.ndim != 2 or heat_hw.size == 0:
        raise ValueError(f"heat must be a (rows, columns) map of the token grid; got shape {heat_hw.shape}")
    if not np.isfinite(heat_hw).all() or (heat_hw < 0).any():
        raise ValueError("heat must be finite and not negative: pass attention weights, not scores")
    return heat_hw


def attention_overlay(
    image: Image.Image,
    heat: np.ndarray,
    box: Sequence[float] | None = None,
    vmax: float | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Paint a token-grid attention map over a greyed photograph.

    Args:
        image: any mode; the result is RGB of the same size.
        heat: (h, w) attention weights, row-major from the top left, stretched over the whole image.
        box: x0, y0, x1, y1 as fractions of the image, outlined; None for no outline.
        vmax: weight at the top of the colour scale; larger weights saturate. Pass one value for all maps that are
            to be compared. None takes the map's own maximum.
        smooth: interpolate between token centres. The default shows each token as the block that was attended to.

    Raises:
        ValueError: heat is not a finite, non-negative (h, w) map, vmax is not positive, or box leaves [0, 1].
    """
    import numpy as np
    from PIL import Image

    heat_hw = checked_heat(heat)
    top = float(heat_hw.max()) if vmax is None else float(vmax)
    if vmax is not None and not 0 < top < float("inf"):
        raise ValueError(f"vmax must be positive and finite; got {vmax}")
    share_hw = np.clip(heat_hw / (top or 1.0), 0.0, 1.0).astype(np.float32)
    filter_ = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    share_HW = np.clip(np.asarray(Image.fromarray(share_hw).resize(image.size, filter_)), 0.0, 1.0)
    luma_HW = np.asarray(image.convert("RGB").convert("L"), dtype=np.float32) / 255
    painted_HWC = np.rint(255 * _tint(luma_HW, share_HW)).clip(0, 255).astype(np.uint8)
    overlay = Image.fromarray(painted_HWC)
    return overlay if box is None else outline_box(overlay, box)


def outline_box(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """Copy of `image` (RGB) with the box framed in white between two dark lines, visible on any background.

    The white line runs along the inside of the box's edges. Raises ValueError unless 0 <= x0 < x1 <= 1 (same in y).
    """
    from PIL import ImageDraw

    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box must be x0, y0, x1, y1 with 0 <= x0 < x1 <= 1 (same in y); got {list(box)}")
    framed = image.convert("RGB").copy()
    width, height = framed.size
    line = max(1, round((width * height) ** 0.5 / 80))
    frame = [round(x0 * width), round(y0 * height), round(x1 * width) - 1, round(y1 * height) - 1]
    frame[2], frame[3] = max(frame[0], frame[2]), max(frame[1], frame[3])
    draw = ImageDraw.Draw(framed)
    for grow, thickness, colour in ((1, 1, (16, 16, 16)), (-line, 1, (16, 16, 16)), (0, line, (255, 255, 255))):
        corners = [frame[0] - grow, frame[1] - grow, frame[2] + grow, frame[3] + grow]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=colour, width=thickness)
    return framed


def colour_strip(width: int, height: int) -> Image.Image:
    """The overlay scale from 0 (left) to its top as a picture, as the colours look over a mid-grey photograph."""
    import numpy as np
    from PIL import Image

    shares_W = np.linspace(0.0, 1.0, width)
    line_WC = np.rint(255 * _tint(np.full(width, 0.5), shares_W)).astype(np.uint8)
    return Image.fromarray(np.repeat(line_WC[None], height, axis=0))


def colour_bar(vmax: float, label: str = "attention per token", stripes: int = 48) -> str:
    """Inline SVG of the overlay scale from 0 to `vmax`, as the colours look over a mid-grey photograph."""
    import numpy as np

    from vreflection.visualization.svg import number, tag, text

    if not 0 < vmax < float("inf"):
        raise ValueError(f"vmax must be positive and finite; got {vmax}")
    shares = np.linspace(0.0, 1.0, stripes)
    colours = np.rint(255 * _tint(np.full(stripes, 0.5), shares)).astype(int)
    width = 100 / stripes
    bars = "".join(
        tag(
            "rect",
            x=f"{i * width:.2f}%",
            y=0,
            # Stripes reach under their neighbour: exact edges leave hairlines.
            width=f"{width * (1.3 if i < stripes - 1 else 1):.2f}%",
            height=10,
            fill="#" + "".join(f"{channel:02x}" for channel in colour),
        )
        for i, colour in enumerate(colours)
    )
    ticks = "".join(
        text(number(share * vmax), x=f"{100 * share:g}%", y=24, text_anchor=anchor)
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    name = f"Colour scale, {label}: 0 to {number(vmax)}"
    return tag("svg", bars + ticks, class_="colour-bar", width="100%", height=28, role="img", aria_label=name)


def data_uri(image: Image.Image, format: str = "WEBP", quality: int = 80) -> str:
    """`data:` address of the encoded image; `format` is WEBP, JPEG (both lossy at `quality`) or PNG (lossless)."""
    kind = format.upper()
    if kind not in _MIME:
        raise ValueError(f"format must be one of {', '.join(_MIME)}; got {format!r}")
    buffer = io.BytesIO()
    options = {"PNG": {"optimize": True}, "WEBP": {"quality": quality, "method": 6}, "JPEG": {"quality": quality}}[kind]
    image.convert("RGB").save(buffer, format=kind, **options)
    return f"data:{_MIME[kind]};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
