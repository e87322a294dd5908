"""The free-running curriculum: some samples train on their own fed-back states, the inference regime.

The states are rolled out one after another; the training pass then runs once, in parallel, with these inputs in the
slots. By default they are fixed. With `backpropagate` they stay connected to the roll-out, and the training pass gives
the gradient of the whole chain.

Shape suffixes: B boxes (= spans), Q slots per span, D width, L length, N positions of all sequences, R rows (samples
that are rolled out).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..engine.cache import cache_argument
from ..engine.steps import eval_mode
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration
from ..ops.regions import device_tensor


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
    model: VReflectionForConditionalGeneration,
    inputs: dict[str, Any],
    chosen: torch.Tensor,
    rounds: int,
    backpropagate: bool = False,
) -> dict[str, torch.Tensor | None]:
    """What to change in a batch so that the chosen samples train on their own states.

    Returns:
        `slot_inputs` and `free_running` (see `roll_out`), and the visual tokens, so that the vision tower ran once.
    """
    tokens = model.batch_tokens(
        inputs.get("pixel_values"), inputs.get("image_features"), inputs.get("image_grid_thw")
    )  # fmt: skip
    states, free = roll_out(
        model, inputs["input_ids"], inputs["position_ids"], tokens, inputs["layout"], chosen, rounds, backpropagate
    )
    return {"slot_inputs": states, "free_running": free, "image_features": tokens, "pixel_values": None}


def roll_out(
    model: VReflectionForConditionalGeneration,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    tokens_TD: torch.Tensor | None,
    layout: BatchLayout,
    chosen: torch.Tensor,
    rounds: int | None = None,
    backpropagate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fed-back states of the chosen samples' slots.

    A round takes every row through its next span, in as many calls of the language model as a span has slots: one for
    the text before the span, whatever its length, and one per slot but the last.

    Args:
        input_ids: `(batch, L)`, right-padded or packed. position_ids: `(3, batch, L)`. tokens_TD: the batch's visual
            tokens.
        chosen: `(samples,)` bool on the host.
        rounds: how many times the model is run through a span; default as many as needed. Processes that share a
            sharded model pass the largest need of any, and run along on a token of padding where they have nothing.
        backpropagate: keep the states connected to the weights that made them.

    Returns:
        slot inputs `(B, Q, D)`, zero where not rolled out, and `(B,)` bool saying where they were.
    """
    rounds = rounds_needed(layout, chosen) if rounds is None else rounds
    # Gradient checkpointing in training mode would drop the cache.
    with eval_mode(model), torch.set_grad_enabled(backpropagate):
        embeds = model.embed(input_ids, tokens_TD, layout)
        flat, positions = embeds.flatten(0, 1), position_ids[-3:].flatten(1)
        slots = layout.slot_index_BQ.cpu().numpy()
        free, turns = chosen.numpy()[layout.box_sample], layout.turns_B
        inputs_BQD = embeds.new_zeros(len(slots), model.config.num_latent_tokens, embeds.shape[2])
        prefixes = CachedPrefixes(model, flat, positions)
        rows = np.zeros(0, dtype=np.int64)  # the spans of the round before
        for turn in range(rounds):
            spans = np.flatnonzero(free & (turns == turn))
            if not len(spans):
                # Each round anew, so that the padding never adds up.
                CachedPrefixes(model, flat, positions).through_spans(np.zeros(1, np.int64), np.ones((1, 1), np.int64))
                continue
            if turn == 0:
                states = prefixes.through_spans(layout.starts[layout.box_sample[spans]], slots[spans])
            else:
                # Spans of a sample are neighbours: the one before has the number before.
                prefixes.keep_rows(np.searchsorted(rows, spans - 1))
                states = prefixes.through_spans(slots[spans - 1, -1], slots[spans])
            index = device_tensor(spans, flat.device)
            inputs_BQD = inputs_BQD.index_copy(0, index, states)
            rows = spans
    # Casts cached while gradients were off could be reused, without a graph, by the training pass.
    torch.clear_autocast_cache()
    return inputs_BQD, device_tensor(free, input_ids.device)


class CachedPrefixes:
    """Samples on their way through their spans: keys and values of all that was consumed stay cached.

    Args:
        flat_ND: all sequences' embeddings end to end. positions_3N: their rope positions.
    """

    def __init__(self, model: VReflectionForConditionalGeneration, flat_ND: torch.Tensor, positions_3N: torch.Tensor):
        self.decoder, self.steps = model.model.language_model, model.config.num_latent_tokens
        self.flat_ND, self.positions_3N = flat_ND, positions_3N
        # Not the engine's static cache: under autocast keys and values differ in dtype.
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.cache_argument = cache_argument(type(self.decoder))
        self.mask: torch.Tensor | None = None  # (R, columns of the cache)
        self.last_RD: torch.Tensor | None = None  # the last slot's state, not consumed yet

    def keep_rows(self, rows: np.ndarray) -> None:
        """Go on with these rows only, in this order."""
        assert self.mask is not None and self.last_RD is not None
        if len(rows) == len(self.mask):
            return
        index = device_tensor(rows, self.flat_ND.device)
        self.cache.batch_select_indices(index)
        self.mask, self.last_RD = self.mask[index], self.last_RD[index]

    def through_spans(self, begin_R: np.ndarray, slots_RQ: np.ndarray) -> torch.Tensor:
        """States `(R, Q, D)` fed back in each row's next span.

        Args:
            begin_R: flat position where each row goes on: its sequence's start, later the last slot of the span before.
            slots_RQ: flat positions of the span's slots.
        """
        device = self.flat_ND.device
        length = slots_RQ[:, 0] - begin_R  # what is consumed ends with <|lvr_start|>, just before the first slot
        offset = np.arange(length.max()) - (length.max() - length)[:, None]
        source = device_tensor(begin_R[:, None] + offset.clip(0), device)
        inputs = self.flat_ND[source]
        if self.last_RD is not None:
            inputs = torch.where(device_tensor(offset == 0, device)[..., None], self.last_RD[:, None], inputs)
        # Left-padded, so that every row's last token lies in the last column.
        z = self.consume(inputs, self.positions_3N[:, source], device_tensor(offset >= 0, device))
        states, one_column = [z], torch.ones(len(z), 1, dtype=torch.bool, device=device)
        for slot in range(self.steps - 1):
            # A row without a span of its own has one position for all.
            index = device_tensor(slots_RQ[:, min(slot, slots_RQ.shape[1] - 1)], device)
            z = self.consume(z[:, None], self.positions_3N[:, index, None], one_column)
            states.append(z)
        self.last_RD = z
        return torch.stack(states, dim=1)

    def consume(self, inputs_RLD: torch.Tensor, positions_3RL: torch.Tensor, real_RL: torch.Tensor) -> torch.Tensor:
        """The state `(R, D)` after the last column; `real_RL` says which columns are no padding."""
        self.mask = real_RL.long() if self.mask is None else torch.cat([self.mask, real_RL.long()], dim=1)
        output = self.decoder(
            inputs_embeds=inputs_RLD,
            attention_mask=self.mask,
            position_ids=positions_3RL,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return output.last_hidden_state[:, -1].to(self.flat_ND.dtype)
