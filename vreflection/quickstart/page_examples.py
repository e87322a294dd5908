"""A few held-out scenes of the quickstart's task, for the server's page."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

logger = logging.getLogger(__name__)


def page_examples(count: int = 4) -> list[dict[str, Any]]:
    """`title`, `question`, `image` (a data address) and `boxes` in hop order; none without the photographs."""
    from .photos import INSTALL_HINT

    try:
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        logger.info("no examples on the page; they need: %s", INSTALL_HINT)
        return []
    from PIL import Image

    from .notes import JPEG_QUALITY
    from .tasks import TASKS, question_text, scene_at

    task = TASKS["follow_the_notes"]
    hops = [task.hops[-1 - place % 3] for place in range(count)]
    examples = []
    for index, number in enumerate(hops):
        scene = scene_at(task, "test", index, 1)
        picture = io.BytesIO()
        Image.fromarray(scene.pixels_HWC).save(picture, "JPEG", quality=JPEG_QUALITY)
        examples.append(
            {
                "title": f"{scene.notes[0].colour}, {number} hops",
                "question": question_text(task, scene, number),
                "image": "data:image/jpeg;base64," + base64.b64encode(picture.getvalue()).decode(),
                "boxes": [list(note.box) for note in task.path(scene, number)],
            }
        )
    return examples
