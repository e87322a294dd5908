"""How the student's step grows with tokens, boxes and width: `pytest bench/bench_growth.py -s`."""

import pytest
import torch

from vreflection.modules import DynamicAutoregressiveCompression

SWEEPS = {
    "tokens N": [(n, 1, 1792) for n in (64, 256, 1024, 4096)],
    "boxes B": [(256, b, 1792) for b in (1, 4, 16)],
    "width D": [(1024, 1, d) for d in (448, 896, 1792, 3584)],
}
CASES = {
    f"{name}-{case[('tokens N', 'boxes B', 'width D').index(name)]}": case for name, cs in SWEEPS.items() for case in cs
}


@pytest.mark.parametrize("case", list(CASES))
def test_growth(interleaved, lab, case):
    count, boxes, width = CASES[case]
    dtype = torch.bfloat16 if lab.CUDA else torch.float32
    torch.manual_seed(0)
    ours = DynamicAutoregressiveCompression(width).to(lab.DEVICE, dtype)
    stock = lab.StockResampler(DynamicAutoregressiveCompression(width).to(lab.DEVICE, dtype))
    tokens = torch.randn(boxes * count, width, device=lab.DEVICE, dtype=dtype)
    probes = torch.randn(boxes, 8, width, device=lab.DEVICE, dtype=dtype, requires_grad=True)
    grids, box_image = torch.tensor([[1, count]] * boxes), torch.arange(boxes)
    keys = tokens.view(boxes, count, width)
    steps = {
        "auto": lab.timed_step(ours, lambda: ours(probes, tokens, grids, box_image), "forward_backward", [probes]),
        "stock": lab.timed_step(stock, lambda: stock(probes, keys), "forward_backward", [probes]),
    }
    work = lab.resampler_work(boxes, boxes * count, boxes * count, width, tokens.element_size(), True)
    interleaved(steps, "stock", 7, work, dtype)
