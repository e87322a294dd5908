"""Put the absorbed few-query attention into somebody else's model: two lines, in place, reversible.

`handle = vr.fuse(model)` gives every suitable `torch.nn.MultiheadAttention` *instance* a forward that runs
`vreflection.ops`; classes are never touched, parameters and state dict stay as they are, `handle.undo()` restores it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from .ops import AttentionWeights, RegionPlan, cost_model, image_plan, region_attention, resample
from .ops.dispatch import IMPLEMENTATIONS, fastest
from .ops.regions import autocast_values, rect_plan
from .ops.resample import is_expanded, merge_box_heads

logger = logging.getLogger(__name__)


@dataclass
class FusedHandle:
    """What `fuse` changed.

    Attributes:
        fused: names of the attention modules that now run our operators.
        refused: name → reason, for those that were left alone.
        calls: how often each fused module ran `"absorbed"`, or `"stock"` where making keys and values is cheaper.
    """

    fused: dict[str, nn.MultiheadAttention]
    refused: dict[str, str]
    calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def undo(self) -> None:
        """Give every module that this handle fused its own forward back; calling it twice does nothing more.

        Raises:
            RuntimeError: a parametrisation or sharding has changed the class of a module since; nothing is undone.
        """
        ours = {n: m for n, m in self.fused.items() if m.__dict__.get("_fused_calls") is self.calls[n]}
        wrapped = {name: type(m).__name__ for name, m in ours.items() if type(m) is not FusedMultiheadAttention}
        if wrapped:
            raise RuntimeError(
                f"undo: expected modules of the class that fuse gave them, got {wrapped}; remove the parametrisation "
                "or the sharding first, which was put on top"
            )
        for module in ours.values():
            module.__class__ = nn.MultiheadAttention
            del module._fused_calls, module._fused_impl, module._fused_id

    def __enter__(self) -> FusedHandle:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def fuse(model: nn.Module, impl: str = "auto") -> FusedHandle:
    """Swap the few-query attention of `model` (any module, or an attention itself) for ours, in place.

    Suitable is an `nn.MultiheadAttention` called with few queries over many tokens that are both keys and values: a
    Perceiver-style resampler with learnable or given queries, `kdim = vdim` of any width, with or without bias, batched
    or not, with `key_padding_mask`. Outputs, averaged weights and gradients are the stock module's up to rounding.
    On a GPU such a mask costs one synchronisation per call, to read the lengths.
    Calls where that would cost more (self-attention, many queries, few keys, per-head weights) run the stock forward.

    Args:
        model: searched with all its submodules. impl: as in `vreflection.ops.resample`.

    Returns:
        A handle: `.undo()`, `.fused`, `.refused` (with reasons), `.calls`. It is also a context manager.

    Raises:
        ValueError: nothing in `model` can be swapped; the message says why for each candidate. Later, in a fused
            module's own forward: an `attn_mask`, or keys and values that differ (as rotary embedding or key
            normalisation would make them), which the absorbed form cannot honour.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    fused, refused = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        reason = why_not_fused(module)
        if reason:
            refused[name] = reason
        else:
            fused[name] = module
    if not fused:
        told = "; ".join(f"{name or 'the module itself'}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"nothing to fuse in {type(model).__name__}: "
            + (told or "it holds no torch.nn.MultiheadAttention; call vreflection.ops.resample from your own module")
        )
    handle = FusedHandle(fused, refused)
    for name, module in fused.items():
        handle.calls[name] = {"absorbed": 0, "stock": 0}
        module._fused_calls, module._fused_impl, module._fused_id = handle.calls[name], impl, id(module)
        module.__class__ = FusedMultiheadAttention
    logger.info("fused %s; left alone: %s", sorted(fused), refused or "nothing")
    return handle


def why_not_fused(module: nn.MultiheadAttention) -> str:
    """Why this attention cannot be swapped without changing its result; an empty string when it can."""
    # A copy of a fused module belongs to no handle yet.
    if isinstance(module, FusedMultiheadAttention) and module._fused_id == id(module):
        return "it is fused already; undo the first handle"
    if type(module) not in (nn.MultiheadAttention, FusedMultiheadAttention):
        return (
            f"{type(module).__name__} is a subclass with its own rules; rotary embedding or a norm on queries and keys "
            "could not be absorbed"
        )
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance; restore it first"
    if module.dropout:
        return f"dropout={module.dropout} acts on attention weights, which are never made per head in one piece; set 0"
    if module.add_zero_attn:
        return "add_zero_attn=True adds a key of zeros"
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv=True adds a learnable key"
    if module.kdim != module.vdim:
        return f"kdim={module.kdim} and vdim={module.vdim} differ, so keys and values cannot be the same tokens"
    return ""


class FusedMultiheadAttention(nn.MultiheadAttention):
    """What an instance becomes while it is fused: the same parameters, another forward. `undo` changes it back.

    A class of its own, so that copies, replicas and pickles of a fused module use their own parameters. They stay
    fused; fusing them again gives a handle that can undo it.

    Attributes:
        _fused_calls: the counts of its handle. _fused_id: of the module that was fused, which a copy is not.
    """

    _fused_calls: dict[str, int]
    _fused_impl: str
    _fused_id: int

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ):
        """`nn.MultiheadAttention.forward`, absorbed where that pays. Shapes as in PyTorch's documentation."""
        batched = query.dim() == 3
        per_head = need_weights and not average_attn_weights
        # Absorbed, keys and values are one tensor with one gradient; two views that are trained have one each.
        trained_views = two_trained_views(key, value)
        other = query is key or query.dim() != key.dim() or per_head or trained_views
        if other or not absorbing_pays(self, query, key):
            self._fused_calls["stock"] += 1
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        refuse_call(query, key, value, attn_mask, is_causal)
        query_BQE, key_BND = (batch_first(self, x) for x in (query, key))
        mask_BN = check_mask(key_padding_mask, key_BND, batched)
        if query_BQE.shape[0] != key_BND.shape[0]:
            raise ValueError(f"query and key: expected one batch size, got {query_BQE.shape[0]}, {key_BND.shape[0]}")
        self._fused_calls["absorbed"] += 1
        batch, keys, width = key_BND.shape
        # Padded keys are never read, so they need not be zero.
        tokens = key_BND.reshape(batch * keys, width)
        plan, kept = padded_plan(tokens, batch, keys, mask_BN)
        tokens = tokens if kept is None else tokens[kept]
        out, maps_SQ = attend(self, query_BQE, tokens, plan, self._fused_impl, need_weights)
        weights = None if maps_SQ is None else unpack_maps(maps_SQ, batch, keys, plan, mask_BN).to(out.dtype)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights


def batch_first(module: nn.MultiheadAttention, values: torch.Tensor) -> torch.Tensor:
    """`(B, n, D)`, whatever layout the module was called with."""
    if values.dim() == 2:
        return values[None]
    return values if module.batch_first else values.transpose(0, 1)


def refuse_call(query, key, value, attn_mask, is_causal: bool) -> None:
    fix = "; undo() the handle, or fuse only the modules that are called without it"
    if attn_mask is not None or is_causal:
        raise ValueError(f"a fused attention takes no attn_mask: rows of queries share one softmax range{fix}")
    if key is not value and (torch.compiler.is_compiling() or not same_tensor(key, value)):
        raise ValueError(
            "a fused attention needs keys and values to be the same tokens, got two tensors (rotary embedding or a "
            f"norm on the keys only?){fix}"
        )


def check_mask(mask: torch.Tensor | None, key_BND: torch.Tensor, batched: bool) -> torch.Tensor | None:
    """The padding mask as `(B, N)` bool."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask: expected bool (True = ignore), got {mask.dtype}")
    expected = tuple(key_BND.shape[:2] if batched else key_BND.shape[1:2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"key_padding_mask: expected {expected}, got {tuple(mask.shape)}")
    return mask.view(key_BND.shape[:2])


def two_trained_views(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether keys and values are the same tokens, and autograd has a gradient for each of two tensors."""
    if key is value or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (key.requires_grad or value.requires_grad) and same_tensor(key, value)


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Two views of the same memory, laid out alike; or where there is none, two of one shape."""
    alike = left.shape == right.shape and left.stride() == right.stride()
    return alike and (left.is_meta or left.data_ptr() == right.data_ptr())


def absorbing_pays(module: FusedMultiheadAttention, query: torch.Tensor, key: torch.Tensor) -> bool:
    query_BQE, key_BND = batch_first(module, query), batch_first(module, key)
    (batch, keys, width), queries = key_BND.shape, query_BQE.shape[1]
    if queries >= keys:
        return False
    impl = module._fused_impl
    if impl == "auto":
        impl = fastest("resample", key.device.type, key.dtype)
    shape = (batch, is_expanded(query_BQE), queries, module.num_heads, width, batch * keys, key.element_size())
    return cost_model.absorbed_cost(*shape, impl) <= cost_model.projected_cost(*shape)


def padded_plan(
    tokens: torch.Tensor, batch: int, keys: int, mask_BN: torch.Tensor | None
) -> tuple[RegionPlan, torch.Tensor | None]:
    """Plan over `(batch * keys, D)` tokens, and the tokens to keep when the mask is not plain right-padding."""
    if mask_BN is None:
        return image_plan(batch * keys, [[1, keys]] * batch, list(range(batch)), tokens.device), None
    valid = ~mask_BN.detach().cpu().numpy()
    counts = valid.sum(1)
    if not counts.all():
        raise ValueError(f"key_padding_mask leaves no key in batch rows {np.flatnonzero(counts == 0).tolist()}")
    if (valid == (np.arange(keys) < counts[:, None])).all():
        rows = np.arange(batch)
        rects = np.stack([np.zeros(batch), np.ones(batch), np.zeros(batch), counts], axis=1).astype(np.int64)
        grids = np.tile(np.array([[1, keys]]), (batch, 1))
        return rect_plan(rects, grids, rows, rows * keys, tokens.device), None
    kept = torch.from_numpy(np.flatnonzero(valid)).to(tokens.device)
    return image_plan(len(kept), [[1, n] for n in counts], list(range(batch)), tokens.device), kept


def attend(module, query_BQE, tokens, plan: RegionPlan, impl: str, need_weights: bool):
    """Output `(B, Q, E)` and head-mean weights `(S, Q)` or `None`."""
    out = module.out_proj
    if module._qkv_same_embed_dim:
        in_bias, out_bias = biases(module)
        weights = AttentionWeights(module.in_proj_weight, in_bias, out.weight, out_bias)
        result = resample(query_BQE, tokens, plan, weights, module.num_heads, need_weights, impl)
        return result if isinstance(result, tuple) else (result, None)
    return attend_wide(module, query_BQE, tokens, plan, impl, need_weights)


def attend_wide(module, query_BQE, tokens, plan: RegionPlan, impl: str, need_weights: bool):
    """Keys of another width than the queries: separate projections, absorbed by plain products."""
    if is_expanded(query_BQE) and not query_BQE.requires_grad:
        query_BQE = query_BQE[:1]
    heads, embed = module.num_heads, module.embed_dim
    in_bias, out_bias = biases(module)
    query, tokens, weight_q, weight_k, weight_v, out_weight, in_bias, out_bias = autocast_values(
        query_BQE, tokens, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight,
        module.out_proj.weight, in_bias, out_bias,
    )  # fmt: skip
    bias_q, _, bias_v = in_bias.split(embed)
    projected = nn.functional.linear(query, weight_q, bias_q) * (embed // heads) ** -0.5
    rows = projected.unflatten(-1, (heads, -1)).transpose(1, 2) @ weight_k.unflatten(0, (heads, -1))
    result = region_attention(rows.flatten(1, 2), tokens, plan, heads if need_weights else 0, impl)
    context, maps = result if isinstance(result, tuple) else (result, None)
    values = context.unflatten(1, (heads, -1)) @ weight_v.unflatten(0, (heads, -1)).transpose(1, 2)
    return nn.functional.linear(merge_box_heads(values) + bias_v, out_weight, out_bias), maps


def biases(module: nn.MultiheadAttention) -> Iterable[torch.Tensor]:
    """Input and output bias; zeros where the module has none."""
    in_bias, out_bias, embed = module.in_proj_bias, module.out_proj.bias, module.embed_dim
    weight = module.out_proj.weight
    return (
        weight.new_zeros(3 * embed) if in_bias is None else in_bias,
        weight.new_zeros(embed) if out_bias is None else out_bias,
    )


def unpack_maps(maps_SQ, batch: int, keys: int, plan: RegionPlan, mask_BN) -> torch.Tensor:
    """Packed weights as `(B, Q, N)`, zero at padded keys."""
    if mask_BN is None:
        return maps_SQ.unflatten(0, (batch, keys)).transpose(1, 2)
    padded = maps_SQ.new_zeros(batch * keys, maps_SQ.shape[1])
    index = (~mask_BN).flatten().nonzero()[:, 0]
    return padded.index_copy(0, index, maps_SQ).unflatten(0, (batch, keys)).transpose(1, 2)
