"""The stock vision tower on a batch of 224x224 images at once.

Without flash-attention the host library attends image by image; for images of one size the same weights give the
same features in one batched call.
Shape suffixes: B images, N patches (256), K heads, W head width, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

# CLIP statistics, as the image processor applies them.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def pack_pixels(images_BHWC: np.ndarray, patch: int = 14, merge: int = 2) -> torch.Tensor:
    """Normalise and cut images as the Qwen2-VL image processor does.

    Args:
        images_BHWC: (B, H, W, 3) uint8, H and W multiples of `patch * merge`.

    Returns:
        (B * N, 3 * 2 * patch * patch) fp32, patches grouped by visual token, the frame repeated in time.
    """
    import torch

    pixels = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
    batch, _, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    pixels = pixels.view(batch, 3, rows, merge, patch, columns, merge, patch)
    pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [B, rows, columns, merge, merge, 3, 1, patch, patch]
    pixels = pixels.expand(*pixels.shape[:6], 2, patch, patch)
    return pixels.reshape(batch * rows * columns * merge * merge, 3 * 2 * patch * patch)


def _rotary(visual: nn.Module, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the axial rotation for a `grid` x `grid` image in patch order: two (N, 1, W) fp32."""
    import torch

    merge = visual.spatial_merge_size
    index = torch.arange(grid * grid).view(grid // merge, merge, grid // merge, merge).permute(0, 2, 1, 3).flatten()
    places_N2 = torch.stack([index // grid, index % grid], dim=-1).float()
    angles_NW = (places_N2[:, :, None] * visual.rotary_pos_emb.inv_freq.float()).flatten(1).repeat(1, 2)
    return angles_NW.cos()[:, None], angles_NW.sin()[:, None]


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    import torch

    states = states.float()
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def vision_features(visual: nn.Module, pixel_values: torch.Tensor, images: int) -> torch.Tensor:
    """Visual tokens of `images` equal square images: (B, N / 4, D), row-major, as the stock forward's `pooler_output`.

    Args:
        visual: the stock Qwen2.5-VL vision tower; every block must use full attention.
        pixel_values: (B * N, 1176) as from `pack_pixels` or the image processor.
    """
    import torch
    from torch.nn import functional as F

    if set(visual.fullatt_block_indexes) != set(range(len(visual.blocks))):
        raise ValueError(
            f"every block must use full attention; got fullatt_block_indexes={visual.fullatt_block_indexes}"
        )
    patches = pixel_values.shape[0] // images
    cos, sin = _rotary(visual, round(patches**0.5))
    kernel = visual.patch_embed.proj.weight
    hidden = F.linear(pixel_values, kernel.flatten(1)).view(images, patches, -1)  # the Conv3d, as one product
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(images, patches, 3, attention.num_heads, attention.head_dim)
        query, key, value = qkv.unbind(2)
        query, key = (_rotate(states, cos, sin).to(value.dtype) for states in (query, key))
        # bf16 SDPA on a CPU is several times slower on strided inputs.
        states_BKNW = [states.transpose(1, 2).contiguous() for states in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*states_BKNW).transpose(1, 2).reshape(images, patches, -1)
        hidden = hidden + attention.proj(mixed)
        hidden = hidden + block.mlp(block.norm2(hidden))
    features = visual.merger(hidden.reshape(images * patches, -1))
    return features.view(images, -1, features.shape[-1]).to(torch.float32)
