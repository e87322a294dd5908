"""Ragged cases, a dense float64 oracle and poisoned buffers for the Triton kernels; shared through `oracle`."""

import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

try:
    importlib.import_module("vreflection.kernels.launch")
except ImportError:  # a checkout whose install does not map the folder
    import vreflection

    package = types.ModuleType("vreflection.kernels")
    package.__path__ = [str(KERNELS)]
    sys.modules["vreflection.kernels"] = package
    vreflection.kernels = package


def kernel_module(stem):
    return importlib.import_module(f"vreflection.kernels.{stem}")


def geometry(grids, rects):
    """spans (B, 5), key_box (S,) from image sizes [(h, w)] and boxes [(image, y0, y1, x0, x1)]."""
    starts = [0]
    for height, width in grids:
        starts.append(starts[-1] + height * width)
    spans, key_box, offset = [], [], 0
    for box, (image, y0, y1, x0, x1) in enumerate(rects):
        stride = grids[image][1]
        spans.append([starts[image] + y0 * stride + x0, stride, y1 - y0, x1 - x0, offset])
        count = (y1 - y0) * (x1 - x0)
        key_box += [box] * count
        offset += count
    return torch.tensor(spans).reshape(-1, 5), torch.tensor(key_box, dtype=torch.int32), starts[-1]


def random_taps(spans, side, taps, generator, dtype=torch.float32):
    """Random rows and columns with repeats, some taps switched off as padding (index 0, weight 0)."""
    index = torch.zeros(2, len(spans), side, taps, dtype=torch.int64)
    weight = torch.rand(2, len(spans), side, taps, generator=generator, dtype=torch.float64)
    for axis, size in enumerate(spans[:, 2:4].T):
        for box in range(len(spans)):
            index[axis, box] = torch.randint(0, int(size[box]), (side, taps), generator=generator)
    off = torch.rand(index.shape, generator=generator) < 0.2
    index[off], weight[off] = 0, 0
    return index, weight.to(dtype)


def token_ids(span):
    first, stride, height, width, _ = span.tolist()
    return (first + torch.arange(height)[:, None] * stride + torch.arange(width)).flatten()


def cell_map(span, index_y, index_x, weight_y, weight_x):
    """Dense (C, n) map of RoI-Align on one box."""
    height, width = int(span[2]), int(span[3])
    rows = torch.zeros(index_y.shape[0], height, dtype=torch.float64)
    rows = rows.scatter_add(1, index_y, weight_y.double())
    columns = torch.zeros(index_x.shape[0], width, dtype=torch.float64)
    columns = columns.scatter_add(1, index_x, weight_x.double())
    return torch.einsum("ay,bx->abyx", rows, columns).reshape(rows.shape[0] * columns.shape[0], height * width)


def dense_attend(rows, tokens, spans, tap_index, tap_weight, map_heads):
    """The contract, box by box, differentiable: context, weights, cells, maps."""
    contexts, weights, cells = [], [], []
    for box, span in enumerate(spans):
        x = tokens[token_ids(span)]
        scores = x @ rows[box if rows.shape[0] > 1 else 0].T
        if tap_index is None:
            w = scores.softmax(0)
        else:
            m = cell_map(span, *tap_index[:, box], *tap_weight[:, box]).to(scores.dtype)
            p = (m @ scores).softmax(0)
            cells.append(p)
            w = m.T @ p
        weights.append(w)
        contexts.append(w.T @ x)
    packed = torch.cat(weights)
    maps = packed.unflatten(1, (map_heads, -1)).mean(1) if map_heads else packed.new_empty(0)
    return torch.stack(contexts), packed, torch.stack(cells) if cells else packed.new_empty(0), maps


def dense_roi_align(tokens, spans, tap_index, tap_weight):
    parts = []
    for box, span in enumerate(spans):
        m = cell_map(span, *tap_index[:, box], *tap_weight[:, box]).to(tokens.dtype)
        parts.append(m @ tokens[token_ids(span)])
    return torch.stack(parts)


def poisoned(tensor, row_gap=0):
    """The same values as a view inside a NaN buffer, optionally with rows further apart than they are wide."""
    lead, tail = 37, 61
    shape = (*tensor.shape[:-1], tensor.shape[-1] + row_gap)
    size = torch.Size(shape).numel()
    buffer = torch.full((lead + size + tail,), float("nan"), dtype=tensor.dtype)
    view = buffer[lead : lead + size].view(shape)[..., : tensor.shape[-1]]
    return view.copy_(tensor)


def assert_written_inside(view):
    """Nothing but the view itself was written in its `poisoned` buffer. Destroys the view's values."""
    view.fill_(float("nan"))
    assert view._base.isnan().all(), "a kernel stored outside its output"


def assert_within_budget(truth, got, plain, name=""):
    """Error at most twice that of the plain path in the same precision, largest and mean, both against float64."""
    floor = torch.finfo(got.dtype).eps * truth.abs().max()
    for measure in (torch.max, torch.mean):
        error = measure((got.double() - truth).abs())
        allowed = 2 * measure((plain.double() - truth).abs()) + floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_close(got, expected, tolerance, name=""):
    """Error relative to the largest expected value; NaN never passes."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        scale = expected.double().abs().max().clamp(min=1e-6)
        error = (got.double() - expected.double()).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


@pytest.fixture(scope="session")
def oracle():
    """Builders and references of this file."""
    torch.set_num_threads(1)
    return SimpleNamespace(**{name: value for name, value in globals().items() if name[0] not in "_@"})


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Every buffer a launcher allocates starts as NaN between NaN guards; `check()` fails if a guard was written."""
    guard, buffers = 41, []
    plain_new_empty = torch.Tensor.new_empty

    def guarded(shape, dtype):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * guard,), float("nan"), dtype=dtype)
        buffers.append(buffer)
        return buffer[guard : guard + size].view(shape)

    def empty(*shape, **options):
        shape = shape[0] if shape and isinstance(shape[0], (tuple, torch.Size, list)) else shape
        return guarded(shape, options.get("dtype") or torch.get_default_dtype())

    def new_empty(self, *shape, **options):
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size, list)) else shape
        if "device" in options or not self.is_floating_point() or torch.Size(shape).numel() == 0:
            return plain_new_empty(self, shape, **options)  # the interpreter's own
        return guarded(shape, options.get("dtype") or self.dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: guarded(x.shape, x.dtype))

    def check():
        assert buffers, "no buffer was allocated: the guard tests nothing"
        for buffer in buffers:
            ends = torch.cat([buffer[:guard], buffer[-guard:]])
            assert ends.isnan().all(), f"a kernel stored outside its buffer of {buffer.numel() - 2 * guard} elements"

    return check
