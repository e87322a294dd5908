"""The student at the 7B width: probes against all tokens of an image. `pytest bench/bench_probe_attention.py -s`.

BENCH_COMPILE=1 compiles the stock modules on a CPU too.
"""

import functools

import pytest
import torch

from vreflection.benchmarking.prediction import resampler_work
from vreflection.modules import DynamicAutoregressiveCompression

WIDTH, QUERIES = 3584, 8
GRIDS = {1: (1, 1), 16: (4, 4), 64: (8, 8), 256: (16, 16), 1024: (32, 32), 5120: (64, 80), 16384: (128, 128)}


@functools.cache
def build(impl, device, dtype):
    torch.manual_seed(0)
    return DynamicAutoregressiveCompression(WIDTH, impl=impl).to(device, dtype)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("count", [1024, 5120, 16384, 256, 64, 16, 1])  # by value: time may run out
def test_probe(interleaved, lab, dtype, count, images, direction):
    if count > 5120 and not lab.CUDA:
        pytest.skip("real sizes: on a GPU only")
    if images > 1 and not (lab.CUDA or (count == 1024 and dtype == torch.float32)):
        pytest.skip("several large images: on a GPU only")
    grid, device = GRIDS[count], lab.DEVICE
    tokens = torch.randn(images * count, WIDTH, device=device, dtype=dtype)
    probes = torch.randn(images, QUERIES, WIDTH, device=device, dtype=dtype, requires_grad=True)
    grids, box_image = torch.tensor([grid] * images), torch.arange(images)
    ours, plain = build("auto", device, dtype), build("torch", device, dtype)
    stock = lab.StockResampler(build("reference", device, dtype))
    projected = lab.ProjectedAttention(build("reference", device, dtype))
    keys = tokens.view(images, count, WIDTH)
    calls = {
        "auto": (ours, lambda: ours(probes, tokens, grids, box_image)),
        "torch": (plain, lambda: plain(probes, tokens, grids, box_image)),
        "stock": (stock, lambda: stock(probes, keys)),
        "projected, sdpa": (projected, lambda: projected(probes, keys)),
    }
    if lab.compiled_too() and count == 5120:
        torch._dynamo.reset()
        compiled = torch.compile(stock)
        calls["stock, compiled"] = (stock, lambda: compiled(probes, keys))
    with torch.no_grad():
        expected = calls["stock"][1]()
        for _, call in calls.values():
            lab.agree(call(), expected, dtype)
    work = resampler_work(images, images * count, images * count, WIDTH, tokens.element_size(), direction != "forward")
    steps = {name: lab.timed_step(module, call, direction, [probes]) for name, (module, call) in calls.items()}
    rounds = 30 if lab.CUDA else (5 if count >= 1024 else 9)
    interleaved(steps, "stock", rounds, work, dtype, baselines=[name for name in steps if name != "auto"])
