"""The student at the 7B width: probes against all tokens of an image. `pytest bench/bench_probe_attention.py -s`.

BENCH_COMPILE=1 compiles the stock modules on a CPU too.
"""

import functools
import json
import subprocess
import sys

import pytest
import torch

from vreflection.benchmarking.prediction import projected_extra_bytes, resampler_extra_bytes, resampler_work
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


def memory_row(extra: dict, count: int, itemsize: int) -> dict:
    predicted = {
        "auto": resampler_extra_bytes(1, count, WIDTH, itemsize),
        "stock": projected_extra_bytes(count, WIDTH, itemsize),
    }
    sweep = {"figure": "memory", "axis": "tokens", "value": count}
    return {"extra_peak_bytes": extra, "predicted_bytes": predicted, "sweep": sweep}


MEMORY_PROBE = """
import resource, sys, torch
from vreflection.benchmarking.prediction import projected_extra_bytes, resampler_extra_bytes, resampler_work
from vreflection.modules import DynamicAutoregressiveCompression
which, count, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def now(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
module = DynamicAutoregressiveCompression(width)
attention, norm = module.cross_attn, module.output_norm
tokens, probes = torch.randn(count, width), torch.randn(1, 8, width, requires_grad=True)
def step(tokens):
    if which == "stock":
        out = norm(attention(probes, tokens[None], tokens[None], need_weights=False)[0])
    else:
        out = module(probes, tokens, torch.tensor([[1, len(tokens)]]), torch.tensor([0]))
    out.sum().backward()
step(tokens[:64])  # libraries load their code and workspaces; gradients exist from here on
module.zero_grad(set_to_none=True); probes.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = now()
step(tokens)
gradients = sum(p.grad.numel() * p.grad.element_size() for p in [*module.parameters(), probes])
print(peak() - before - gradients)
"""


@pytest.mark.parametrize("count", [256, 1024, 5120])
def test_extra_peak_memory_forward_backward(benchmark, lab, count):
    """Peak memory of one step beyond parameters, inputs and gradients, each variant in a process of its own."""
    extra = {}
    if lab.CUDA:
        pytest.skip("measured by torch.cuda.max_memory_allocated in the GPU suite")
    for which in ("auto", "stock"):
        command = [sys.executable, "-c", MEMORY_PROBE, which, str(count), str(WIDTH)]
        extra[which] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    benchmark.extra_info.update(memory_row(extra, count, 2 if lab.CUDA else 4) | lab.versions())
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\n{benchmark.name}: {json.dumps({k: f'{v / 2**20:.0f} MiB' for k, v in extra.items()})}, "
          f"ratio {extra['auto'] / extra['stock']:.3f}")  # fmt: skip


@pytest.mark.parametrize("count", [256, 1024, 5120, 16384])
def test_extra_peak_memory_on_the_gpu(benchmark, lab, count):
    if not lab.CUDA:
        pytest.skip("needs a CUDA device")
    extra = {}
    tokens = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
    probes = torch.randn(1, QUERIES, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for which in ("auto", "stock"):
        module = build("auto", "cuda", torch.bfloat16)
        stock = lab.StockResampler(module)
        if which == "stock":
            call = lambda: stock(probes, tokens[None])  # noqa: E731, B023
        else:
            call = lambda: module(probes, tokens, torch.tensor([[1, count]]), torch.tensor([0]))  # noqa: E731, B023
        for _ in range(2):
            module.zero_grad(set_to_none=True)
            probes.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call().sum().backward()
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in [*module.parameters(), probes])
            extra[which] = torch.cuda.max_memory_allocated() - before - gradients
    benchmark.extra_info.update(memory_row(extra, count, 2 if lab.CUDA else 4) | lab.versions())
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\n{benchmark.name}: {extra}, ratio {extra['auto'] / extra['stock']:.3f}")
