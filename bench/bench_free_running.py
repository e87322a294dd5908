"""Rolling out fed-back states over the spans of a row: the cache kept from span to span, or each prefix computed anew.

`OMP_NUM_THREADS=1 pytest bench/bench_free_running.py -s`. The quickstart's base model, 32 rows of 70 tokens with five
spans of two latents.
"""

import numpy as np
import pytest
import torch

from vreflection.data.template import LATENT_TOKENS
from vreflection.model.layout import BatchLayout
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.training.free_running import CachedPrefixes, roll_out

ROWS, PROMPT, ANSWER, LATENTS = 32, 70, 5, 2


@torch.no_grad()
def prefixes_anew(model, ids, positions, layout):
    """Every span after a prefix of its own, without what the spans before it left in the cache."""
    flat, positions = model.embed(ids, None, layout).flatten(0, 1), positions.flatten(1)
    slots = layout.slot_index_BQ.numpy().reshape(ROWS, -1, LATENTS)
    for turn in range(slots.shape[1]):
        states = CachedPrefixes(model, flat, positions).through_spans(layout.starts, slots[:, turn])
        flat[torch.from_numpy(slots[:, turn].ravel())] = states.flatten(0, 1)
    return flat[layout.slot_index_BQ]


@pytest.mark.parametrize("spans", [1, 3, 5])
def test_roll_out(interleaved, benchmark, lab, spans):
    from vreflection.quickstart.base import load_base

    base, tokenizer = load_base()
    start, slot, _, end = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    model = VReflectionForConditionalGeneration.from_base(
        base, "stage1", num_latent_tokens=LATENTS, lvr_start_id=start, lvr_id=slot, lvr_end_id=end
    ).eval()
    span = [start, *[slot] * LATENTS, end]
    row = [*torch.randint(3, 90, (PROMPT,)).tolist(), *span * spans, *[7] * ANSWER]
    ids = torch.tensor([row] * ROWS)
    positions = torch.arange(len(row)).expand(3, ROWS, -1)
    boxes = np.tile([[0.0, 0.0, 1.0, 1.0]], (ROWS * spans, 1))
    samples = np.repeat(np.arange(ROWS), spans)
    # No images: the roll-out never asks what the boxes are of.
    layout = BatchLayout.from_batch(model.config, ids, decoding=True, boxes=boxes, box_sample=samples,
                                    box_image=np.zeros(len(samples), np.int64))  # fmt: skip
    chosen = torch.ones(ROWS, dtype=torch.bool)
    calls = {
        "cache kept": lambda: roll_out(model, ids, positions, None, layout, chosen)[0],
        "prefixes anew": lambda: prefixes_anew(model, ids, positions, layout),
    }
    lab.agree(*(call() for call in calls.values()), torch.float32)
    interleaved(calls, "prefixes anew", 5)
