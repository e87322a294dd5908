"""What a call costs before any work is done: microseconds of host time at the smallest shapes, GPU not waited for.

`pytest bench/bench_boundary.py -s`
"""

import statistics
import time

import pytest
import torch

from vreflection.modules import DynamicAutoregressiveCompression
from vreflection.ops import dispatch, image_plan, region_attention, resample

CALLS = 200


def microseconds(function) -> float:
    for _ in range(20):
        function()
    taken = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        taken.append((time.perf_counter() - start) / CALLS)
    return 1e6 * statistics.median(taken)


def cases(device):
    width, heads = 16, 2
    impl = dispatch.fastest("resample", device, torch.float32)
    tokens, probes = torch.randn(4, width, device=device), torch.randn(1, 2, width, device=device)
    grids, box_image = torch.tensor([[2, 2]]), torch.tensor([0])
    plan = image_plan(4, grids, box_image, device)
    rows = torch.randn(1, 4, width, device=device)
    module = DynamicAutoregressiveCompression(width, heads, impl=impl).to(device)
    attention, norm = module.cross_attn, module.output_norm
    operator = dispatch.operator("attend", impl, device)
    plain = torch.ops.vreflection.attend_torch
    weights = module.attention_weights
    return {
        f"operator attend ({impl})": lambda: operator(rows, tokens, *plan.geometry, 0),
        "operator attend_torch": lambda: plain(rows, tokens, *plan.geometry, 0),
        "one torch.mm": lambda: torch.mm(tokens, rows[0].T),
        "region_attention": lambda: region_attention(rows, tokens, plan, impl=impl),
        "resample": lambda: resample(probes, tokens, plan, weights, heads, impl=impl),
        "plan of one image": lambda: image_plan(4, grids, box_image, device),
        "module": lambda: module(probes, tokens, grids, box_image),
        "stock attention + norm": lambda: norm(attention(probes, tokens[None], tokens[None], need_weights=False)[0]),
    }


@pytest.mark.parametrize("grad", [False, True])
def test_boundary(benchmark, lab, grad):
    with torch.set_grad_enabled(grad):
        found = {name: microseconds(call) for name, call in cases(lab.DEVICE).items()}
    benchmark.extra_info.update({"microseconds": found, "grad": grad, **lab.versions()})
    benchmark.pedantic(lambda: None, rounds=1)
    print("\n" + "\n".join(f"{benchmark.name}: {name}: {value:.1f} us" for name, value in found.items()))
