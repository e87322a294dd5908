"""The free-running curriculum: some samples train on their own fed-back states, the inference regime.

The states are rolled out one after another without gradient; the training pass then runs once, in parallel, with these
fixed inputs in the slots.

Shape suffixes: B boxes (= spans), Q slots per span, D width, L length.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from ..engine.steps import eval_mode
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration


def choose_samples(batch_size: int, share: float, seed: int, step: int, rank: int = 0) -> torch.Tensor:
    """Which samples run free, `(batch,)` bool: `share` of them, at random, a function of seed, step and rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 4099 + rank)
    # A fractional count is settled by a draw, so that small batches follow the share too.
    count = int(batch_size * share + float(torch.rand((), generator=generator)))
    chosen = torch.zeros(batch_size, dtype=torch.bool)
    chosen[torch.randperm(batch_size, generator=generator)[:count]] = True
    return chosen


@torch.no_grad()
def roll_out(
    model: VReflectionForConditionalGeneration,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    tokens_TD: torch.Tensor,
    layout: BatchLayout,
    chosen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fed-back states of the chosen samples' slots.

    Args:
        input_ids: `(batch, L)`, right-padded. position_ids: `(3, batch, L)`. tokens_TD: the batch's visual tokens.
        chosen: `(batch,)` bool on the host.

    Returns:
        slot inputs `(B, Q, D)`, zero where not rolled out, and `(B,)` bool saying where they were.
    """
    with eval_mode(model):  # gradient checkpointing in training mode would drop the cache
        embeds = model.embed(input_ids, tokens_TD, layout)
        span_sample = torch.from_numpy(layout.box_sample)
        free = chosen[span_sample]
        spans, slots = layout.slot_index_BQ.shape
        inputs_BQD = embeds.new_zeros(spans, slots, embeds.shape[2])
        # Spans come in the order of their samples: a span's turn is its distance from its sample's first.
        ordinal = torch.arange(spans) - torch.searchsorted(span_sample, span_sample)
        for turn in range(int(ordinal.max()) + 1 if spans else 0):
            active = (free & (ordinal == turn)).nonzero()[:, 0].to(input_ids.device)
            if not len(active):
                continue
            inputs_BQD[active] = roll_out_spans(model, embeds, position_ids, layout.slot_index_BQ[active])
            flat = embeds.flatten(0, 1)
            flat[layout.slot_index_BQ[active].flatten()] = inputs_BQD[active].flatten(0, 1)
    # Casts cached while gradients were off could be reused, without a graph, by the training pass.
    torch.clear_autocast_cache()
    return inputs_BQD, free.to(input_ids.device)


def roll_out_spans(model, embeds_SLD, position_ids, slot_index_BQ) -> torch.Tensor:
    """States `(B, Q, D)` fed back in the given spans, of different samples, in one left-padded batch."""
    length = embeds_SLD.shape[1]
    sample = slot_index_BQ[:, 0] // length
    start = slot_index_BQ[:, 0] % length  # the prefix ends with <|lvr_start|>, just before the first slot
    prefix = int(start.max())
    column = start[:, None] - prefix + torch.arange(prefix, device=start.device)
    mask = (column >= 0).long()
    column = column.clamp(min=0)
    decoder = model.model.language_model
    # Not the engine's static cache: under autocast keys and values differ in dtype.
    cache = DynamicCache(config=model.config.get_text_config())

    def consume(inputs_BLD, positions):
        nonlocal mask
        if cache.get_seq_length():
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = decoder(
            inputs_embeds=inputs_BLD,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    z = consume(embeds_SLD[sample[:, None], column], position_ids[-3:, sample[:, None], column])
    states = [z]
    for slot in range(slot_index_BQ.shape[1] - 1):
        position = position_ids[-1].flatten()[slot_index_BQ[:, slot]]
        z = consume(z[:, None].to(embeds_SLD.dtype), position[None, :, None].expand(3, -1, 1))
        states.append(z)
    return torch.stack(states, dim=1).to(embeds_SLD.dtype)
