"""Cross-entropy of a packed row: logits at supervised positions against float32 logits everywhere, with backward pass.

`pytest bench/bench_losses.py -s`. On a GPU at the 7B head, with peak memory, and with Liger's fused form where it is
installed. The latents' losses are in bench_distillation_loss.py.
"""

import pytest
import torch
import torch.nn.functional as F

from vreflection.benchmarking.prediction import cross_entropy_work
from vreflection.errors import ConfigError
from vreflection.losses import supervised_cross_entropy
from vreflection.training.acceleration import liger_cross_entropy

IGNORE = -100
CUDA = torch.cuda.is_available()
WIDTH, VOCABULARY, TOKENS = (3584, 152064, 8192) if CUDA else (896, 32000, 1024)


def case(dtype, share: float):
    """Hidden states, head, labels of the next token (`IGNORE` where nothing is supervised)."""
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    head = (torch.randn(VOCABULARY, WIDTH, device=device, dtype=dtype) / WIDTH**0.5).requires_grad_()
    labels = torch.full((TOKENS,), IGNORE, device=device)
    rows = torch.arange(0, TOKENS, round(1 / share), device=device)
    labels[rows] = torch.randint(VOCABULARY, rows.shape, device=device)
    return hidden, head, labels, rows


def variants(hidden, head, labels, rows):
    targets = labels[rows]
    found = {
        "supervised rows": lambda: supervised_cross_entropy(F.linear(hidden[rows], head), targets),
        "all positions, float32": lambda: F.cross_entropy(F.linear(hidden, head).float(), labels, ignore_index=IGNORE),
    }
    if CUDA:
        try:
            fused = liger_cross_entropy()
            found["supervised rows, fused (Liger)"] = lambda: fused(head, hidden[rows], targets)
        except ConfigError as error:
            print(f"\nno fused form: {error}")
    return found


def step(call, leaves):
    def both():
        for leaf in leaves:
            leaf.grad = None
        call().backward()

    return both


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["10 % supervised", "all supervised"])
def test_cross_entropy(interleaved, benchmark, lab, dtype, share):
    hidden, head, labels, rows = case(dtype, share)
    calls = variants(hidden, head, labels, rows)
    wanted = None
    for call in calls.values():
        step(call, (hidden, head))()
        found = call().detach(), hidden.grad.clone(), head.grad.clone()
        wanted = wanted or found
        for left, right in zip(found, wanted, strict=True):
            lab.agree(left, right, dtype)
    del wanted, found
    if CUDA:
        benchmark.extra_info["extra_peak_bytes"] = {name: peak(call, (hidden, head)) for name, call in calls.items()}
    steps = {name: step(call, (hidden, head)) for name, call in calls.items()}
    work = cross_entropy_work(len(rows), WIDTH, VOCABULARY, hidden.element_size())
    interleaved(steps, "all positions, float32", 10 if CUDA else 5, work, dtype)


def peak(call, leaves) -> int:
    """Bytes allocated at the peak of a step beyond inputs and gradients."""
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call().backward()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
    return most - before - sum(leaf.numel() * leaf.element_size() for leaf in leaves)
