"""Decoder steps on a `KVCache`: the host model's own forward, and ours for Qwen2-type decoders.

Shape suffixes: B rows, D width, H query heads, K key/value heads, E head width, C cache columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..decoding import DecodeState, PickPlan, SamplingRows, pick_from_logits
from .cache import HostCache, KVCache, cache_argument, flat_index


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, and back: gradient checkpointing in training mode would drop the cache."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def masked_attention(decoder: nn.Module, needed: bool) -> Iterator[None]:
    """Attention kernels that take no mask (flash) are set aside for calls that need one."""
    config = decoder.config
    chosen = config._attn_implementation
    if needed and chosen not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa"  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        config._attn_implementation = chosen  # pyright: ignore[reportAttributeAccessIssue]


class HostStep:
    """What every step shares: embeddings, the vocabulary projection, prefill through the host's own forward."""

    name = "model"

    def __init__(self, model: nn.Module, cache: KVCache):
        self.model, self.cache = model, cache
        self.decoder = model.model.language_model
        self.embed_tokens, self.lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        self.host_cache, self.cache_argument = HostCache(cache), cache_argument(type(self.decoder))

    def prefill(
        self, embeds_BLD: torch.Tensor, position_ids: torch.Tensor, rows: list[int], last: list[int], start: int = 0
    ) -> torch.Tensor:
        """Consume prompts from column `start` on: hidden states `(B, D)` of each prompt's last position.

        Right padding is harmless: no earlier position sees it, and its keys are overwritten.

        Args:
            position_ids: `(3, B, L)`. rows: cache rows. last: of each prompt, its last position in `embeds_BLD`.
            start: columns that the rows share with what is cached.
        """
        self.host_cache.rows_for_prompt(rows, start)
        mask = None
        if start:
            length = embeds_BLD.shape[1]
            column = torch.arange(start + length, device=embeds_BLD.device)
            mask = self.full_mask((column <= column[start:, None])[None, None], embeds_BLD.dtype)
        with masked_attention(self.decoder, mask is not None):
            return self.run_host(embeds_BLD, position_ids, mask)[range(len(last)), last]

    def run_host(self, embeds_BLD, position_ids, mask):
        return self.decoder(
            inputs_embeds=embeds_BLD,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_argument: self.host_cache},
        ).last_hidden_state

    @staticmethod
    def full_mask(visible: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """An additive mask in the form that keeps the host from building its own."""
        blocked = torch.finfo(dtype).min
        return {
            "full_attention": torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
                ~visible, blocked
            )
        }

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(token_ids)

    def forward(self, inputs_BD, position, length, extent):
        self.host_cache.rows_for_step(length, extent)
        visible = torch.arange(extent, device=length.device) <= length[:, None]
        mask = self.full_mask(visible[:, None, None], inputs_BD.dtype)
        with masked_attention(self.decoder, True):
            hidden = self.run_host(inputs_BD[:, None], position[None, :, None].expand(3, -1, 1), mask)
        return hidden[:, 0]

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """`(B, V)`."""
        return self.lm_head(hidden_BD)

    def pick(self, hidden_BD, needed, rows: SamplingRows, plan: PickPlan, state: DecodeState):
        return pick_from_logits(self.logits(hidden_BD), rows, plan, state)


class LayerWeights(NamedTuple):
    """One decoder layer's parameters, in place."""

    norm1: torch.Tensor
    eps: float
    wq: torch.Tensor
    bq: torch.Tensor | None
    wk: torch.Tensor
    bk: torch.Tensor | None
    wv: torch.Tensor
    bv: torch.Tensor | None
    wo: torch.Tensor
    norm2: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class QwenStep(HostStep):
    """A Qwen2-type decoder's step in plain PyTorch: the host's maths without its per-call work."""

    name = "torch"

    def __init__(self, model: nn.Module, cache: KVCache):
        super().__init__(model, cache)
        reason = why_not_qwen(model)
        if reason is not None:
            raise ValueError(reason)
        self.layers = [layer_weights(layer) for layer in self.decoder.layers]
        self.final_norm = self.decoder.norm
        self.width = self.final_norm.weight.shape[0]
        rotary = self.decoder.rotary_emb
        self.inverse_frequency = rotary.inv_freq.float()
        self.rope_scale = float(getattr(rotary, "attention_scaling", 1.0))
        half = torch.ones(cache.width // 2, device=cache.device, dtype=cache.dtype)
        self.half_sign = torch.cat([-half, half])
        self.heads = self.layers[0].wq.shape[0] // cache.width

    def prefill(
        self, embeds_BLD: torch.Tensor, position_ids: torch.Tensor, rows: list[int], last: list[int], start: int = 0
    ) -> torch.Tensor:
        """See `HostStep.prefill`: on the CPU the same maths, of the last layer only what the last positions need."""
        if embeds_BLD.device.type != "cpu":
            return super().prefill(embeds_BLD, position_ids, rows, last, start)
        cache, x = self.cache, embeds_BLD
        width, stop, final = cache.width, start + x.shape[1], len(self.layers) - 1
        cos, sin = (part[:, :, None] for part in self.decoder.rotary_emb(x, position_ids))
        sin = sin * self.half_sign
        visible = None
        if start:
            column = torch.arange(stop)
            visible = column <= column[start:, None]
        for layer, w in enumerate(self.layers):
            y = F.rms_norm(x, (self.width,), w.norm1, w.eps)
            keys = self.turned(F.linear(y, w.wk, w.bk), cos, sin)
            values = F.linear(y, w.wv, w.bv).unflatten(2, (-1, width)).transpose(1, 2)
            cache.keys[layer][rows, :, start:stop], cache.values[layer][rows, :, start:stop] = keys, values
            if start:
                keys, values = cache.keys[layer][rows, :, :stop], cache.values[layer][rows, :, :stop]
            if layer == final:
                place = (torch.arange(len(last)), torch.tensor(last))
                x, y, cos, sin = (tensor[place][:, None] for tensor in (x, y, cos, sin))
                visible = (torch.arange(stop) <= start + place[1][:, None])[:, None, None]
            queries, groups = self.turned(F.linear(y, w.wq, w.bq), cos, sin), self.heads // cache.heads
            if groups > 1:
                keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, is_causal=visible is None)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), w.wo)
            y = F.rms_norm(x, (self.width,), w.norm2, w.eps)
            x = x + F.linear(F.silu(F.linear(y, w.gate)) * F.linear(y, w.up), w.down)
        return F.rms_norm(x[:, 0], (self.width,), self.final_norm.weight, self.final_norm.variance_epsilon)

    def turned(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries or keys `(B, L, heads * E)` after rope, `(B, heads, L, E)`; `sin` with the lower half's sign."""
        width = self.cache.width
        states = states.unflatten(2, (-1, width))
        return torch.addcmul(states * cos, states.roll(width // 2, dims=3), sin).transpose(1, 2)

    def rope(self, position: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `(B, E)` as the host makes them; past the prompt all three rope axes are equal."""
        angle = position[:, None].float() * self.inverse_frequency
        angle = torch.cat([angle, angle], dim=1)
        cos, sin = angle.cos(), angle.sin()
        if self.rope_scale != 1.0:
            cos, sin = cos * self.rope_scale, sin * self.rope_scale
        return cos.to(dtype), sin.to(dtype)

    def forward(self, inputs_BD, position, length, extent):
        cache, x = self.cache, inputs_BD
        rows, heads, width = x.shape[0], self.heads, self.cache.width
        index = flat_index(length, cache)
        visible = (torch.arange(extent, device=length.device) <= length[:, None])[:, None, None]
        cos, sin = self.rope(position, x.dtype)
        # Rotating half a head is rolling it, with the lower half's sign in the sine.
        cos, sin = cos[:, None], (sin * self.half_sign)[:, None]
        grouped = (rows, cache.heads, heads // cache.heads, width)
        for layer, w in enumerate(self.layers):
            y = F.rms_norm(x, (self.width,), w.norm1, w.eps)
            qk = torch.cat([F.linear(y, w.wq, w.bq), F.linear(y, w.wk, w.bk)], dim=1).view(rows, -1, width)
            qk = torch.addcmul(qk * cos, qk.roll(width // 2, dims=2), sin)
            keys, values = cache.keys[layer], cache.values[layer]
            keys.view(-1, width).index_copy_(0, index, qk[:, heads:].reshape(-1, width))
            values.view(-1, width).index_copy_(0, index, F.linear(y, w.wv, w.bv).view(-1, width))
            # A head group's queries stand in one matrix: its keys are read once.
            mixed = F.scaled_dot_product_attention(
                qk[:, :heads].reshape(grouped), keys[:rows, :, :extent], values[:rows, :, :extent], attn_mask=visible
            )
            x = x + F.linear(mixed.reshape(rows, -1), w.wo)
            y = F.rms_norm(x, (self.width,), w.norm2, w.eps)
            x = x + F.linear(F.silu(F.linear(y, w.gate)) * F.linear(y, w.up), w.down)
        return F.rms_norm(x, (self.width,), self.final_norm.weight, self.final_norm.variance_epsilon)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_BD, self.lm_head.weight)


def layer_weights(layer: nn.Module) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon,
        attention.q_proj.weight, attention.q_proj.bias, attention.k_proj.weight, attention.k_proj.bias,
        attention.v_proj.weight, attention.v_proj.bias, attention.o_proj.weight,
        layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # fmt: skip


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
FIXED_ROPE = {"default", "linear", "llama3", "yarn", "mrope"}


def why_not_qwen(model: nn.Module) -> str | None:
    """Why our own step cannot stand in for the host's forward, or None where it can."""
    decoder = model.model.language_model
    config = decoder.config
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"our step knows the silu MLP only, the model has hidden_act={config.hidden_act!r}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "our step knows full attention only, the model has sliding-window layers"
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    if rope not in FIXED_ROPE:
        return f"our step needs rope frequencies that do not depend on the length, the model has rope_type={rope!r}"
    for number, layer in enumerate(decoder.layers):
        for part, names in PROJECTIONS.items():
            module = getattr(layer, part, None)
            for name in names:
                projection = getattr(module, name, None)
                # Exactly nn.Linear: adapters and quantised layers compute something else.
                if projection is None or type(projection) is not nn.Linear:
                    found = "nothing" if projection is None else type(projection).__name__
                    return f"our step needs layer {number}'s {part}.{name} to be nn.Linear, got {found}"
                if projection.bias is not None and name not in ("q_proj", "k_proj", "v_proj"):
                    return f"our step knows no bias in layer {number}'s {part}.{name}"
        if hasattr(layer.self_attn, "q_norm") or hasattr(layer.self_attn, "k_norm"):
            return f"our step knows no query or key norm, layer {number} has one"
        if layer.input_layernorm.variance_epsilon != layer.post_attention_layernorm.variance_epsilon:
            return f"our step needs one norm epsilon per layer, layer {number} has two"
    for name, part in (*decoder.named_modules(), ("lm_head", model.get_output_embeddings())):
        if hooked(part):
            return f"our step would pass over the hooks of {name or 'the decoder'}"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return f"our step needs lm_head to be nn.Linear without bias, got {head}"
    return None
