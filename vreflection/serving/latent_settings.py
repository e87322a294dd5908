"""The request's field `latent` as settings of the decoder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..visualization.attention_maps import checked_box
from .errors import bad
from .schema import Hidden, LatentField
from .settings import ServeSettings


class LatentSettings:
    """Checks `latent` against a checkpoint and a server's limits.

    Args:
        trained_steps: latent steps per span of the checkpoint, 0 for none. width: of a latent.
        has_maps: whether the server can show where steps look.
    """

    def __init__(self, settings: ServeSettings, trained_steps: int, width: int, has_maps: bool):
        self.settings, self.trained_steps, self.width, self.has_maps = settings, trained_steps, width, has_maps

    def resolved(self, latent: LatentField) -> dict[str, Any]:
        """Keywords of `LatentDecoder.request`.

        Raises:
            ApiError: 400 where the checkpoint or the server does not allow what is requested.
        """
        steps = self.steps(latent)
        if latent.force and not self.trained_steps:
            raise bad("latent.force: this checkpoint has no latent steps; leave it out", "latent.force")
        if "maps" in latent.include and not self.has_maps:
            raise bad("latent.include: this server makes no maps", "latent.include")
        self.check_boxes(latent)
        keywords: dict[str, Any] = {"latent_steps": steps, "force_latent": latent.force}
        if latent.include:
            keywords["return_latents"] = True
        if latent.use is not None:
            keywords["latents"] = self.span_latents(latent.use, steps)
        return keywords

    def steps(self, latent: LatentField) -> int:
        trained = self.trained_steps
        if latent.off and latent.steps:
            raise bad(f"latent: expected off or steps, got off with {latent.steps} steps", "latent.steps")
        steps = 0 if latent.off else trained if latent.steps is None else latent.steps
        if steps not in (0, trained):
            if not self.settings.other_latent_steps or not trained:
                raise bad(f"latent.steps: this checkpoint allows 0 or {trained}, got {steps}", "latent.steps")
            if steps > self.settings.max_latent_steps:
                raise bad(
                    f"latent.steps: expected at most {self.settings.max_latent_steps}, got {steps}", "latent.steps"
                )
        return steps

    def check_boxes(self, latent: LatentField) -> None:
        if latent.box is not None and latent.boxes is not None:
            raise bad("latent.boxes: expected box or boxes, got both", "latent.boxes")
        if latent.boxes is not None and not 0 < len(latent.boxes) <= self.settings.spans:
            raise bad(
                f"latent.boxes: expected 1 to {self.settings.spans} boxes, one per span, got {len(latent.boxes)}",
                "latent.boxes",
            )
        boxes = (
            {"latent.box": latent.box}
            if latent.boxes is None
            else {f"latent.boxes.{number}": box for number, box in enumerate(latent.boxes)}
        )
        for name, box in boxes.items():
            try:
                if box is not None:
                    checked_box(box, name)
            except DataError as error:
                raise bad(error.message, name, "invalid_value") from None

    def span_latents(self, use: Sequence[Hidden | None], steps: int) -> list[torch.Tensor | None]:
        """Latents per span, None for the model's own."""
        spans: list[torch.Tensor | None] = []
        for states in use:
            spans += [None] if states is None else self.unpacked(states, steps)
        if not 0 < len(spans) <= self.settings.spans:
            raise bad(f"latent.use: expected 1 to {self.settings.spans} spans, got {len(spans)}", "latent.use")
        return spans

    def unpacked(self, states: Hidden, steps: int) -> torch.Tensor:
        """`(spans, steps, width)`."""
        width = self.width
        spans = states.shape[0] if len(states.shape) == 3 else 1
        if states.shape[-2:] != [steps, width] or not steps or not 0 < spans <= self.settings.spans:
            raise bad(
                f"latent.use: expected shape ({steps}, {width}) or (spans, {steps}, {width}) with 1 to "
                f"{self.settings.spans} spans, got {tuple(states.shape)}",
                "latent.use",
            )
        size = 4 * spans * steps * width
        try:
            raw = base64.b64decode(states.data, validate=True)
        except ValueError as error:
            raise bad(f"latent.use: expected base64, got {error}", "latent.use") from None
        if len(raw) != size:
            raise bad(f"latent.use: expected {size} bytes, got {len(raw)}", "latent.use")
        values = np.frombuffer(raw, dtype="<f4").reshape(spans, steps, width)
        if not np.isfinite(values).all():
            raise bad("latent.use: expected finite numbers", "latent.use")
        return torch.from_numpy(values.copy())


def packed(latents: torch.Tensor) -> dict[str, Any]:
    """`Hidden` of latents of any shape."""
    values = latents.detach().float().cpu().numpy().astype("<f4")
    return {"data": base64.b64encode(values.tobytes()).decode(), "shape": list(values.shape)}
