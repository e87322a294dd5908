"""How the student's step grows with tokens, boxes and width: `pytest bench/bench_growth.py -s`."""

import pytest
import torch

from vreflection.benchmarking.prediction import resampler_work
from vreflection.modules import DynamicAutoregressiveCompression

# (tokens of an image, boxes, each with an image of its own, width); a GPU takes the sizes of real use.
CUDA = torch.cuda.is_available()
SWEEPS = {
    "tokens": [(n, 1, 3584 if CUDA else 1792) for n in ((256, 1024, 4096, 16384) if CUDA else (64, 256, 1024, 4096))],
    "boxes": [(256, b, 3584 if CUDA else 1792) for b in ((1, 4, 16, 64) if CUDA else (1, 4, 16))],
    "width": [(1024, 1, d) for d in (448, 896, 1792, 3584)],
}
CASES = {f"{axis}-{case[place]}": (axis, case) for place, (axis, found) in enumerate(SWEEPS.items()) for case in found}


@pytest.mark.parametrize("case", list(CASES))
def test_growth(interleaved, lab, case):
    axis, sizes = CASES[case]
    count, boxes, width = sizes
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
    work = resampler_work(boxes, boxes * count, boxes * count, width, tokens.element_size(), True)
    with torch.no_grad():
        stock.load_state_dict({f"attention.{n}": p for n, p in ours.cross_attn.state_dict().items()}
                              | {f"norm.{n}": p for n, p in ours.output_norm.state_dict().items()})  # fmt: skip
        lab.agree(ours(probes, tokens, grids, box_image), stock(probes, keys), dtype)
    sweep = {"figure": "growth", "axis": axis, "value": sizes[list(SWEEPS).index(axis)]}
    interleaved(steps, "stock", 7, work, dtype, sweep=sweep)
