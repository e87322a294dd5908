"""The teacher at the 7B width, by window and by RoI-Align: `pytest bench/bench_region_attention.py -s`.

BENCH_COMPILE=1 compiles the stock form on a CPU too.
"""

import functools

import pytest
import torch

from vreflection.benchmarking.prediction import resampler_work
from vreflection.modules import BoxGuidedCompression
from vreflection.ops import roi_align, roi_plan, window_plan

WIDTH, SIDE = 3584, 72
FOUR = [[0.0, 0.0, 0.44, 0.44], [0.5, 0.0, 0.94, 0.44], [0.0, 0.5, 0.44, 0.94], [0.5, 0.5, 0.94, 0.94]]
# 32 boxes of about 20 tokens each, spread over the image.
MANY = [[x / 8, y / 4, x / 8 + 0.05, y / 4 + 0.06] for y in range(4) for x in range(8)]
# 64 boxes that overlap, 144 tokens each: a whole packed micro-batch of them.
HEAP = [[x / 10, y / 10, x / 10 + 0.16, y / 10 + 0.16] for y in range(8) for x in range(8)]
CASES = {
    "four boxes of 1,000 tokens": FOUR,
    "32 boxes of 20 tokens": MANY,
    "one box of 1,000 tokens": FOUR[:1],
    "64 boxes of 150 tokens": HEAP,
}


@functools.cache
def build(impl, region, device, dtype):
    torch.manual_seed(0)
    return BoxGuidedCompression(WIDTH, region=region, output_size=14, impl=impl).to(device, dtype)


def padded_keys(tokens, plan):
    """Region tokens gathered and padded to the longest box, with the mask stock attention takes."""
    longest = int((plan.spans_host[:, 2] * plan.spans_host[:, 3]).max())
    index = torch.zeros(plan.num_boxes, longest, dtype=torch.long, device=tokens.device)
    mask = torch.ones(plan.num_boxes, longest, dtype=torch.bool, device=tokens.device)
    token = plan.key_tokens()
    for box, (_, _, height, width, key) in enumerate(plan.spans_host.tolist()):
        index[box, : height * width] = token[key : key + height * width]
        mask[box, : height * width] = False
    return index, mask if mask.any() else None


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("region", ["window", "roi_align"])
@pytest.mark.parametrize("case", list(CASES))
def test_region(interleaved, lab, dtype, case, region, direction):
    if case == "64 boxes of 150 tokens" and not lab.CUDA:
        pytest.skip("real sizes: on a GPU only")
    boxes, device = torch.tensor(CASES[case]), lab.DEVICE
    grids, box_image = torch.tensor([[SIDE, SIDE]]), torch.zeros(len(boxes), dtype=torch.long)
    tokens = torch.randn(SIDE * SIDE, WIDTH, device=device, dtype=dtype)
    ours, plain, stock = (build(impl, region, device, dtype) for impl in ("auto", "torch", "reference"))
    geometry = (grids, boxes, box_image)
    queries = stock.queries.expand(len(boxes), -1, -1)
    if region == "window":
        plan = window_plan(SIDE * SIDE, grids, boxes, box_image, device)
        index, mask = padded_keys(tokens, plan)

        def reference():
            keys = tokens[index]
            attended = stock.cross_attn(queries, keys, keys, key_padding_mask=mask, need_weights=False)[0]
            return stock.output_norm(attended)
    else:
        plan = roi_plan(SIDE * SIDE, grids, boxes, box_image, 14, device=device)

        def reference():
            keys = roi_align(tokens, *geometry, 14, impl="torch")
            return stock.output_norm(stock.cross_attn(queries, keys, keys, need_weights=False)[0])

    calls = {
        "auto": (ours, lambda: ours(tokens, *geometry)),
        "torch": (plain, lambda: plain(tokens, *geometry)),
        "stock": (stock, reference),
    }
    if lab.compiled_too() and case.startswith("four") and region == "window":
        torch._dynamo.reset()
        calls["stock, compiled"] = (stock, torch.compile(reference))
    with torch.no_grad():
        expected = reference()
        for _, call in calls.values():
            lab.agree(call(), expected, dtype)
    distinct = len(plan.key_tokens().unique())
    work = resampler_work(
        len(boxes), plan.num_keys, distinct, WIDTH, tokens.element_size(), direction != "forward", shared=True
    )
    steps = {name: lab.timed_step(module, call, direction) for name, (module, call) in calls.items()}
    interleaved(
        steps, "stock", 30 if lab.CUDA else 5, work, dtype, baselines=[name for name in steps if name != "auto"]
    )
