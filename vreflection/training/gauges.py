"""Gauges that tell a working latent stage from a collapsed one; the alignment loss alone cannot.

Shape suffixes: B boxes, Q latents per box, D width.
"""

from __future__ import annotations

import torch


def latent_gauges(latents_BQD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Spread of latents, as scalars on their device.

    Returns:
        `std_over_samples`: standard deviation over boxes, averaged over queries and channels (0 = every image gets the
        same latents); `query_diversity`: standard deviation over the Q queries of a box (0 = all queries alike). Empty
        for fewer than two boxes.
    """
    if latents_BQD.shape[0] < 2:
        return {}
    latents = latents_BQD.detach().float()
    gauges = {"std_over_samples": latents.std(dim=0).mean()}
    if latents.shape[1] > 1:
        gauges["query_diversity"] = latents.std(dim=1).mean()
    return gauges
