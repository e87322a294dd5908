"""The decode step on the CPU as one C++ call: `csrc/decode_step.cpp`."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import dispatch
from .cache import KVCache
from .steps import QwenStep

# Up to here ours was measured, and faster everywhere (docs/kernels.md, "The CPU step"); above, the library's products.
MAX_ROWS = 128
MAX_PICK_ROWS = 32  # 32 rows, 1024 words, width 192, float32: 172 us, the library's product 144 us; at 8 rows 48 and 55


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ step cannot run on tensors of this device and dtype, or None."""
    if device.type != "cpu":
        return f"the C++ step runs on the CPU, the model is on {device}"
    if dtype not in dispatch.CPP_DTYPES:
        return f"the C++ step takes float32, float64 or bfloat16, got {dispatch.short(dtype)}"
    return dispatch.CPP_MISSING or None


def why_not_weights(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why weights cannot be read where they are, or None."""
    weights = model.model.language_model.named_parameters()
    for name, weight in (*weights, ("lm_head.weight", model.get_output_embeddings().weight)):
        if weight.dtype != dtype:
            found = dispatch.short(weight.dtype)
            return f"the C++ step needs weights of the cache's {dispatch.short(dtype)}, {name} has {found}"
        if not weight.is_contiguous():
            return f"the C++ step reads weights where they are, {name} is not contiguous"
    return None


class CppStep(QwenStep):
    """`QwenStep`'s maths in one call; weights are read in place, each once."""

    name = "cpp"

    def __init__(self, model: nn.Module, cache: KVCache):
        super().__init__(model, cache)
        no_bias = self.final_norm.weight.new_empty(0)
        self.weights = [no_bias if w is None else w for layer in self.layers for w in layer if not isinstance(w, float)]
        self.weights.append(self.final_norm.weight)
        self.eps = [*(layer.eps for layer in self.layers), self.final_norm.variance_epsilon]

    def forward(self, inputs_BD, position, length, extent):
        if inputs_BD.shape[0] > MAX_ROWS:
            return super().forward(inputs_BD, position, length, extent)
        return torch.ops.vreflection.decode_step.default(
            inputs_BD, position, length, extent, self.weights, self.eps, self.inverse_frequency, self.rope_scale,
            self.cache.keys, self.cache.values,
        )  # fmt: skip

    def pick(self, hidden_BD, needed, rows, plan, state):
        if plan.sample or plan.penalty or plan.adjust or hidden_BD.shape[0] > MAX_PICK_ROWS:
            return super().pick(hidden_BD, needed, rows, plan, state)
        return torch.ops.vreflection.decode_pick.default(hidden_BD, needed, self.lm_head.weight)
