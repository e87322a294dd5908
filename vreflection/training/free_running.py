"""The free-running curriculum: some samples train on their own fed-back states, the inference regime.

The states are rolled out one after another without gradient; the training pass then runs once, in parallel, with these
fixed inputs in the slots.

Shape suffixes: B boxes (= spans), Q slots per span, D width, L length, N positions of all sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ..engine.cache import cache_argument
from ..engine.steps import eval_mode
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration


def choose_samples(samples: int, share: float, seed: int, number: int) -> torch.Tensor:
    """Which samples of micro-batch `number` of the run go free, `(samples,)` bool: `share` of them, at random."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    # A fractional count is settled by a draw, so that small batches follow the share too.
    count = int(samples * share + float(torch.rand((), generator=generator)))
    chosen = torch.zeros(samples, dtype=torch.bool)
    chosen[torch.randperm(samples, generator=generator)[:count]] = True
    return chosen


def rounds_needed(layout: BatchLayout, chosen: torch.Tensor) -> int:
    """Spans of one sample feed on those before, so they are rolled out in rounds: the most spans of a chosen sample."""
    free = chosen.numpy()[layout.box_sample]
    return int(layout.turns_B[free].max()) + 1 if free.any() else 0


def free_running_inputs(
    model: VReflectionForConditionalGeneration, inputs: dict[str, Any], chosen: torch.Tensor, rounds: int
) -> dict[str, torch.Tensor | None]:
    """What to change in a batch so that the chosen samples train on their own states.

    Returns:
        `slot_inputs` and `free_running` (see `roll_out`), and the visual tokens, so that the vision tower ran once.
    """
    tokens = model.batch_tokens(
        inputs.get("pixel_values"), inputs.get("image_features"), inputs.get("image_grid_thw")
    )  # fmt: skip
    states, free = roll_out(
        model, inputs["input_ids"], inputs["position_ids"], tokens, inputs["layout"], chosen, rounds
    )
    return {"slot_inputs": states, "free_running": free, "image_features": tokens, "pixel_values": None}


@torch.no_grad()
def roll_out(
    model: VReflectionForConditionalGeneration,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    tokens_TD: torch.Tensor | None,
    layout: BatchLayout,
    chosen: torch.Tensor,
    rounds: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fed-back states of the chosen samples' slots.

    Args:
        input_ids: `(batch, L)`, right-padded or packed. position_ids: `(3, batch, L)`. tokens_TD: the batch's visual
            tokens.
        chosen: `(samples,)` bool on the host.
        rounds: how many times the model is run through a span; default as many as needed. Processes that share a
            sharded model pass the largest need of any, and run along on a token of padding where they have nothing.

    Returns:
        slot inputs `(B, Q, D)`, zero where not rolled out, and `(B,)` bool saying where they were.
    """
    rounds = rounds_needed(layout, chosen) if rounds is None else rounds
    with eval_mode(model):  # gradient checkpointing in training mode would drop the cache
        embeds = model.embed(input_ids, tokens_TD, layout)
        free = chosen[torch.from_numpy(layout.box_sample)]
        turns = torch.from_numpy(layout.turns_B)
        spans = len(layout.box_sample)
        inputs_BQD = embeds.new_zeros(spans, model.config.num_latent_tokens, embeds.shape[2])
        flat, positions = embeds.flatten(0, 1), position_ids[-3:].flatten(1)
        starts = torch.from_numpy(layout.starts[layout.box_sample]).to(input_ids.device)
        for turn in range(rounds):
            active = (free & (turns == turn)).nonzero()[:, 0].to(input_ids.device)
            if not len(active):
                nowhere = turns.new_zeros(1).to(flat.device)
                roll_out_spans(model, flat, positions, nowhere[:, None] + 1, nowhere, rehearsal=True)
                continue
            slots = layout.slot_index_BQ[active]
            inputs_BQD[active] = roll_out_spans(model, flat, positions, slots, starts[active])
            flat[slots.flatten()] = inputs_BQD[active].flatten(0, 1)
    # Casts cached while gradients were off could be reused, without a graph, by the training pass.
    torch.clear_autocast_cache()
    return inputs_BQD, free.to(input_ids.device)


def roll_out_spans(model, flat_ND, positions_3N, slot_index_BQ, start_B, rehearsal: bool = False) -> torch.Tensor:
    """States `(B, Q, D)` fed back in the given spans, of different samples, in one left-padded batch.

    `flat_ND` holds all sequences' embeddings end to end, `start_B` where each span's sequence begins.
    """
    first = slot_index_BQ[:, 0]
    length = first - start_B  # the prefix ends with <|lvr_start|>, just before the first slot
    prefix = int(length.max())
    offset = length[:, None] - prefix + torch.arange(prefix, device=first.device)
    mask = (offset >= 0).long()
    source = start_B[:, None] + offset.clamp(min=0)
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
            use_cache=True,
            **{cache_argument(type(decoder)): cache},
        )
        return output.last_hidden_state[:, -1]

    z = consume(flat_ND[source], positions_3N[:, source])
    states = [z]
    for slot in range(model.config.num_latent_tokens - 1):
        position = positions_3N[-1, slot_index_BQ[:, 0 if rehearsal else slot]]
        z = consume(z[:, None].to(flat_ND.dtype), position[None, :, None].expand(3, -1, 1))
        states.append(z)
    return torch.stack(states, dim=1).to(flat_ND.dtype)
