"""A few held-out scenes of the quickstart's task, for the server's page."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

logger = logging.getLogger(__name__)


def page_examples(count: int = 4) -> list[dict[str, Any]]:
    """`title`, `question`, `image` (a data address) and `box` of each; none where the photographs are not installed."""
    from .photos import INSTALL_HINT

    try:
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        logger.info("no examples on the page; they need: %s", INSTALL_HINT)
        return []
    from PIL import Image

    from .notes import JPEG_QUALITY, QUESTION, scene_at

    made = []
    for index in range(count):
        scene = scene_at("test", index, 1)
        asked = scene.notes[0]
        held = io.BytesIO()
        Image.fromarray(scene.pixels_HWC).save(held, "JPEG", quality=JPEG_QUALITY)
        made.append(
            {
                "title": f"{asked.colour} note",
                "question": QUESTION.format(colour=asked.colour),
                "image": "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode(),
                "box": list(asked.box),
            }
        )
    return made
