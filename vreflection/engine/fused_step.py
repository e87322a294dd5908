"""The decode step on our Triton kernels: weights read in place, seven launches at most per layer.

Shape suffixes: B rows, D width, H query heads, K key/value heads, E head width, I MLP width, V vocabulary.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from ..decoding import DecodeState, PickPlan, SamplingRows, pick_from_logits
from ..decoding.sampling import draw_keys
from ..ops import dispatch
from .cache import KVCache
from .steps import QwenStep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device and dtype, or None."""
    if dispatch.TRITON_MISSING:
        return dispatch.TRITON_MISSING
    if dispatch.INTERPRETING:
        return "triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA (or interpreted, with TRITON_INTERPRET=1), the model is on {device}"
    return None if dtype in DTYPES else f"the Triton kernels take float32, bfloat16 or float16, got {dtype}"


class FusedStep(QwenStep):
    """`QwenStep`'s maths in five kernels per layer (six where the cache is long enough to be split)."""

    name = "fused"
    # Launches that start while the one before drains (capability 9.0). Not measured yet, hence off.
    overlap = False

    def __init__(self, model: nn.Module, cache: KVCache):
        super().__init__(model, cache)
        # Importing the kernels imports triton.
        self.linear, self.attention, self.picking = (
            importlib.import_module(f"vreflection.kernels.decode_{part}") for part in ("linear", "attention", "pick")
        )
        self.query_width = self.layers[0].wq.shape[0]
        self.qkv_width = self.query_width + 2 * self.layers[0].wk.shape[0]

    def forward(self, inputs_BD, position, length, extent):
        cache, linear = self.cache, self.linear
        x = inputs_BD.clone()  # the residual stream, updated in place
        rows = x.shape[0]
        qkv = x.new_empty(rows, self.qkv_width)
        mixed, hidden = x.new_empty(rows, self.query_width), x.new_empty(rows, self.layers[0].gate.shape[0])
        cos, sin = self.rope(position, x.dtype)
        scale, overlap = cache.width**-0.5, self.overlap
        for layer, w in enumerate(self.layers):
            linear.norm_linear(x, w.norm1, w.eps, (w.wq, w.wk, w.wv), (w.bq, w.bk, w.bv), qkv, overlap=overlap)
            self.attention.rope_attention(
                qkv, cos, sin, length, cache.keys[layer][:rows], cache.values[layer][:rows], mixed,
                scale=scale, extent=extent, overlap=overlap,
            )  # fmt: skip
            linear.linear_add(mixed, w.wo, x, overlap=overlap)
            linear.norm_gate_up(x, w.norm2, w.eps, w.gate, w.up, hidden, overlap=overlap)
            linear.linear_add(hidden, w.down, x, overlap=overlap)
        out = torch.empty_like(x)
        return linear.rms_norm(x, self.final_norm.weight, self.final_norm.variance_epsilon, out, overlap=overlap)

    def pick(self, hidden_BD, needed, rows: SamplingRows, plan: PickPlan, state: DecodeState):
        """Where no row needs a token the kernels return before they read the vocabulary's weights."""
        weight = self.lm_head.weight
        if plan.truncate or plan.adjust:
            wide = torch.promote_types(hidden_BD.dtype, torch.float32)
            logits = hidden_BD.new_empty(len(hidden_BD), len(weight), dtype=wide)
            self.picking.lm_head_logits(hidden_BD, weight, needed, logits, overlap=self.overlap)
            return pick_from_logits(logits, rows, plan, state)
        asked: dict = {"overlap": self.overlap}
        if plan.penalty:
            asked |= {"seen_BV": state.seen, "penalty_B": rows.repetition_penalty}
        if plan.sample:
            keys = draw_keys(rows.seed, state.counted)
            asked |= {"temperature_B": rows.temperature, "sample_B": rows.do_sample, "key_B": keys}
        return self.picking.lm_head_pick(hidden_BD, weight, needed, torch.zeros_like(state.last_token), **asked)
