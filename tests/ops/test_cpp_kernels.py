"""The compiled CPU operators against dense PyTorch in float64. Shapes: see `vreflection.ops.regions`; W = wide."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vreflection
import vreflection.ops.schemas  # defines the operators that the extension implements

EXTENSION = Path(vreflection.__file__).parent / "_C.abi3.so"
pytestmark = pytest.mark.skipif(
    not EXTENSION.exists(), reason=f"{EXTENSION.name} is not built: pip install --no-build-isolation -e ."
)
if EXTENSION.exists():
    torch.ops.load_library(str(EXTENSION))
OPS = torch.ops.vreflection
ISAS = ("generic", "avx2", "avx512", "avx512bf16")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the oracle ------------------------------------------------------------------------------------------------------


class Geometry:
    """Boxes `(first, stride, height, width)` with, for `side > 0`, random RoI taps (one of them padding)."""

    def __init__(self, boxes, side=0, taps=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        begins = [0]
        for _, _, height, width in boxes:
            begins.append(begins[-1] + height * width)
        self.spans = torch.tensor([[*box, begin] for box, begin in zip(boxes, begins)], dtype=torch.long).view(-1, 5)
        self.keys = [
            torch.tensor([first + y * stride + x for y in range(height) for x in range(width)])
            for first, stride, height, width in boxes
        ]
        self.key_box = torch.repeat_interleave(
            torch.arange(len(boxes), dtype=torch.int32), torch.tensor([len(k) for k in self.keys], dtype=torch.long)
        )
        self.index = self.weight = None
        if side:
            self.index = torch.zeros(2, len(boxes), side, taps, dtype=torch.long)
            self.weight = torch.rand(2, len(boxes), side, taps, generator=generator, dtype=torch.float64)
            for b, (_, _, height, width) in enumerate(boxes):
                self.index[0, b] = torch.randint(height, (side, taps), generator=generator)
                self.index[1, b] = torch.randint(width, (side, taps), generator=generator)
            self.weight /= self.weight.sum(-1, keepdim=True)
            self.index[..., -1], self.weight[..., -1] = 0, 0

    def taps(self, wide):
        return (None, None) if self.index is None else (self.index, self.weight.to(wide))

    def cell_map(self, b):
        """Dense `(C, n)` matrix of box b."""
        _, _, height, width, _ = self.spans[b].tolist()
        axes = []
        for axis, size in enumerate((height, width)):
            dense = torch.zeros(self.index.shape[2], size, dtype=torch.float64)
            axes.append(dense.scatter_add_(1, self.index[axis, b], self.weight[axis, b]))
        return torch.einsum("ph,qw->pqhw", *axes).reshape(-1, height * width)


def oracle(rows, tokens, geometry, heads=0):
    """context, weights, cells, maps as plain products; differentiable; in the dtype of its inputs."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    context, weights, cells = [], [], []
    for b, keys in enumerate(geometry.keys):
        region = tokens[keys]
        scores = (region @ rows[b if rows.shape[0] > 1 else 0].T).to(wide)
        if geometry.index is None:
            weight = scores.softmax(0)
        else:
            cell_map = geometry.cell_map(b).to(wide)
            cells.append((cell_map @ scores).softmax(0))
            weight = cell_map.T @ cells[-1]
        weights.append(weight)
        context.append(weight.to(tokens.dtype).T @ region)
    weights = torch.cat(weights)
    maps = weights.unflatten(1, (heads, -1)).mean(1) if heads else weights.new_empty(0)
    return torch.stack(context), weights, torch.stack(cells) if cells else weights.new_empty(0), maps


def oracle_gradients(rows, tokens, geometry, grad_context, grad_maps, heads):
    rows, tokens = rows.detach().clone().requires_grad_(), tokens.detach().clone().requires_grad_()
    context, _, _, maps = oracle(rows, tokens, geometry, heads)
    outputs, grads = [context], [grad_context.to(context.dtype)]
    if grad_maps is not None:
        outputs, grads = [*outputs, maps], [*grads, grad_maps.to(maps.dtype)]
    return torch.autograd.grad(outputs, (rows, tokens), grads)


def run(rows, tokens, geometry, heads=0):
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return OPS.attend(rows, tokens, geometry.spans, geometry.key_box, *geometry.taps(wide), heads)


def run_backward(rows, tokens, geometry, forward, grad_context, grad_maps, heads, wanted=(True, True)):
    _, weights, cells, _ = forward
    taps = geometry.taps(weights.dtype)
    geometry_args = (geometry.spans, geometry.key_box, *taps)
    return OPS.attend_backward(
        grad_context, grad_maps, rows, tokens, weights, cells, *geometry_args, heads, *wanted
    )  # fmt: skip


def error(actual, exact):
    """Largest and mean error, relative to the largest exact value."""
    difference = (actual.double() - exact).abs()
    scale = exact.abs().max().clamp_min(1e-30)
    return (difference.max() / scale).item(), (difference.mean() / scale).item()


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


# -- attention against the oracle ------------------------------------------------------------------------------------

# name: boxes, tokens, channels, rows, heads
SHAPES = {
    "one token": ([(0, 1, 1, 1)], 1, 64, 8, 2),
    "one row image": ([(3, 11, 1, 11)], 20, 48, 64, 8),
    "odd": ([(5, 31, 33, 31)], 1040, 37, 64, 8),
    "overlapping": (
        [(0, 12, 7, 12), (14, 12, 5, 4), (14, 12, 5, 4), (0, 12, 2, 2), (27, 12, 3, 9)],
        90,
        96,
        16,
        4,
    ),
    "one query": ([(2, 9, 6, 5), (80, 20, 3, 20)], 150, 100, 1, 1),
    "three": ([(2, 9, 6, 5), (100, 7, 1, 1)], 150, 129, 3, 3),
    "sixty-five": ([(0, 14, 10, 9), (150, 6, 6, 6)], 190, 200, 65, 5),
    "wide": ([(0, 10, 10, 10), (100, 13, 13, 13)], 270, 1100, 64, 8),
    "narrow": ([(1, 10, 4, 4)], 40, 5, 9, 3),
}


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-box"])
@pytest.mark.parametrize("side", [0, 1, 7], ids=["window", "one cell", "cells"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_and_its_gradients_agree_with_dense_torch(shape, side, shared, dtype, limit):
    boxes, num_tokens, width, num_rows, heads = SHAPES[shape]
    geometry = Geometry(boxes, side)
    tokens = random(num_tokens, width, dtype=dtype)
    rows = random(1 if shared else len(boxes), num_rows, width, dtype=dtype, seed=1, scale=width**-0.5)
    exact = oracle(rows.double(), tokens.double(), geometry, heads)
    actual = run(rows, tokens, geometry, heads)
    for got, want in zip(actual, exact):
        assert got.shape == want.shape
        if want.numel():
            assert error(got, want)[0] < limit
    grad_context = random(*exact[0].shape, dtype=dtype, seed=2)
    grad_maps = random(*exact[3].shape, dtype=dtype, seed=3)
    for maps in (grad_maps, None):
        want = oracle_gradients(rows.double(), tokens.double(), geometry, grad_context.double(), maps, heads)
        got = run_backward(rows, tokens, geometry, actual, grad_context, maps, heads)
        scale = max(w.abs().max().item() for w in want)
        for name, g, w in zip(("rows", "tokens"), got, want):
            assert g.shape == w.shape and g.dtype == dtype
            # One token: the rows' gradient is exactly zero, so errors are judged on the scale of both.
            assert (g.double() - w).abs().max().item() < limit * max(scale, 1.0), name


@pytest.mark.parametrize("side", [0, 5], ids=["window", "cells"])
def test_strided_tokens_and_no_maps(side):
    geometry = Geometry([(1, 8, 6, 7), (10, 8, 3, 3)], side)
    storage = random(60, 90)
    tokens = storage[:, 7:77]
    rows = random(1, 16, 70, seed=1, scale=0.1)
    assert tokens.stride() == (90, 1)
    forward, packed = run(rows, tokens, geometry), run(rows, tokens.contiguous(), geometry)
    assert forward[3].shape == (0,)
    grad = random(2, 16, 70, seed=2)
    backward = run_backward(rows, tokens, geometry, forward, grad, None, 0)
    for a, b in zip(
        (*forward, *backward), (*packed, *run_backward(rows, tokens.contiguous(), geometry, packed, grad, None, 0))
    ):
        assert torch.equal(a, b)


def test_gradients_that_nobody_asked_for_are_empty():
    geometry = Geometry([(0, 5, 4, 5)])
    rows, tokens = random(1, 8, 32, seed=1), random(20, 32)
    forward = run(rows, tokens, geometry)
    grad = random(1, 8, 32, seed=2)
    both = run_backward(rows, tokens, geometry, forward, grad, None, 0)
    only_rows = run_backward(rows, tokens, geometry, forward, grad, None, 0, (True, False))
    only_tokens = run_backward(rows, tokens, geometry, forward, grad, None, 0, (False, True))
    assert torch.equal(only_rows[0], both[0]) and only_rows[1].shape == (0,)
    assert torch.equal(only_tokens[1], both[1]) and only_tokens[0].shape == (0,)


def test_no_boxes():
    geometry = Geometry([])
    rows, tokens = random(1, 8, 32), random(20, 32)
    context, weights, _, _ = forward = run(rows, tokens, geometry)
    assert context.shape == (0, 8, 32) and weights.shape == (0, 8)
    grads = run_backward(rows, tokens, geometry, forward, random(0, 8, 32), None, 0)
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("side", [0, 7], ids=["window", "cells"])
def test_bfloat16_is_as_exact_as_plain_torch(side):
    geometry = Geometry([(0, 24, 20, 24), (490, 9, 9, 9)], side)
    tokens, rows = random(600, 300, dtype=torch.bfloat16), random(1, 64, 300, dtype=torch.bfloat16, seed=1, scale=0.1)
    exact = oracle(rows.double(), tokens.double(), geometry, 8)
    plain, ours = oracle(rows, tokens, geometry, 8), run(rows, tokens, geometry, 8)
    grad = random(2, 64, 300, dtype=torch.bfloat16, seed=2)
    grad_maps = random(*exact[3].shape, seed=3)
    results = list(zip(ours, plain, exact))
    exact_grads = oracle_gradients(rows.double(), tokens.double(), geometry, grad.double(), grad_maps, 8)
    plain_grads = oracle_gradients(rows, tokens, geometry, grad, grad_maps, 8)
    results += zip(run_backward(rows, tokens, geometry, ours, grad, grad_maps, 8), plain_grads, exact_grads)
    for got, reference, want in results:
        if not want.numel():
            continue
        for mine, budget in zip(error(got, want), error(reference, want)):
            assert mine <= 2 * budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", [0, 3], ids=["window", "cells"])
def test_nan_around_a_region_reaches_nothing(side, dtype):
    boxes = [(13, 12, 3, 5), (60, 12, 4, 3)]
    geometry = Geometry(boxes, side)
    poisoned = torch.full((130, 70), float("nan"), dtype=dtype)
    clean = torch.zeros(110, 53, dtype=dtype)
    view = poisoned[10:120, 9:62]
    for keys in geometry.keys:
        view[keys] = clean[keys] = random(len(keys), 53, dtype=dtype, seed=len(keys))
    rows, grad = random(2, 6, 53, dtype=dtype, seed=1), random(2, 6, 53, dtype=dtype, seed=2)
    want, got = run(rows, clean, geometry, 2), run(rows, view, geometry, 2)
    grad_maps = random(*want[3].shape, dtype=want[3].dtype, seed=3)
    want = (*want, *run_backward(rows, clean, geometry, want, grad, grad_maps, 2))
    got = (*got, *run_backward(rows, view, geometry, got, grad, grad_maps, 2))
    for a, b in zip(want, got):
        assert torch.equal(a, b)
    assert (got[-1][:13] == 0).all()


def test_nan_stays_in_its_box():
    geometry = Geometry([(0, 6, 6, 6), (36, 6, 6, 6)])
    tokens, rows, grad = random(72, 40), random(2, 8, 40, seed=1), random(2, 8, 40, seed=2)
    want = run(rows, tokens, geometry, 2)
    want_grads = run_backward(rows, tokens, geometry, want, grad, None, 2)
    tokens[50] = float("nan")
    got = run(rows, tokens, geometry, 2)
    got_grads = run_backward(rows, tokens, geometry, got, grad, None, 2)
    assert torch.equal(got[0][0], want[0][0]) and got[0][1].isnan().all()
    assert torch.equal(got[1][:36], want[1][:36]) and got[1][36:].isnan().all()
    assert torch.equal(got_grads[0][0], want_grads[0][0]) and torch.equal(got_grads[1][:36], want_grads[1][:36])


def test_extreme_scores_do_not_overflow():
    geometry = Geometry([(0, 10, 10, 10)])
    tokens, rows = random(100, 16, scale=200.0), random(1, 8, 16, seed=1, scale=50.0)
    exact = oracle(rows.double(), tokens.double(), geometry)
    context, weights, _, _ = run(rows, tokens, geometry)
    assert weights.isfinite().all() and torch.allclose(weights.sum(0), torch.ones(8))
    assert (weights.argmax(0) == exact[1].argmax(0)).all()
    assert error(context, exact[0])[0] < 1e-2  # scores of size 1e5 carry an error of 1e-2 in float32


@pytest.mark.parametrize("side", [0, 7], ids=["window", "cells"])
def test_results_do_not_depend_on_threads_or_luck(side):
    boxes = [(0, 40, 30, 40), (3, 40, 20, 11), (500, 40, 2, 3), *[(1200 + 9 * i, 9, 1, 9) for i in range(10)]]
    geometry = Geometry(boxes, side)
    tokens, rows = random(1300, 500, dtype=torch.bfloat16), random(1, 64, 500, dtype=torch.bfloat16, seed=1)
    grad = random(len(boxes), 64, 500, dtype=torch.bfloat16, seed=2)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        forward = run(rows, tokens, geometry, 8)
        results.append((*forward, *run_backward(rows, tokens, geometry, forward, grad, forward[3], 8)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


# -- RoI-Align -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("width", [1, 37, 256, 1030])
def test_roi_align_is_the_dense_map_and_its_transpose(width, dtype, limit):
    geometry = Geometry([(0, 9, 8, 9), (10, 9, 3, 4), (72, 5, 1, 5), (80, 1, 1, 1)], side=5)
    storage = torch.full((90, width + 3), float("nan"), dtype=dtype)
    tokens = storage[:, 2 : width + 2]
    used = torch.cat(geometry.keys)
    tokens[used] = random(90, width, dtype=dtype)[used]
    want = torch.stack([geometry.cell_map(b) @ tokens[keys].double() for b, keys in enumerate(geometry.keys)])
    got = OPS.roi_align(tokens, geometry.spans, *geometry.taps(dtype))
    assert got.shape == want.shape and got.dtype == dtype and error(got, want)[0] < limit

    grad = random(4, 25, width, dtype=dtype, seed=1)
    want = torch.zeros(90, width, dtype=torch.float64)
    for b, keys in enumerate(geometry.keys):
        want.index_add_(0, keys, geometry.cell_map(b).T @ grad[b].double())
    got = OPS.roi_align_backward(grad, geometry.spans, *geometry.taps(dtype), 90)
    assert got.shape == want.shape and error(got, want)[0] < limit
    torch.set_num_threads(2)
    assert torch.equal(got, OPS.roi_align_backward(grad, geometry.spans, *geometry.taps(dtype), 90))


def test_bfloat16_roi_align_rounds_once():
    geometry = Geometry([(0, 20, 20, 20), (3, 20, 9, 9)], side=7)
    tokens, grad = random(400, 70, dtype=torch.bfloat16), random(2, 49, 70, dtype=torch.bfloat16, seed=1)
    want = torch.stack([geometry.cell_map(b) @ tokens[keys].double() for b, keys in enumerate(geometry.keys)])
    got = OPS.roi_align(tokens, geometry.spans, *geometry.taps(torch.float32))
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()
    want = torch.zeros(400, 70, dtype=torch.float64)
    for b, keys in enumerate(geometry.keys):
        want.index_add_(0, keys, geometry.cell_map(b).T @ grad[b].double())
    got = OPS.roi_align_backward(grad, geometry.spans, *geometry.taps(torch.float32), 400)
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


# -- skinny products -------------------------------------------------------------------------------------------------

SKINNY = [(1, 1, 1, 1), (1, 8, 96, 100), (2, 3, 37, 131), (1, 32, 515, 600), (3, 17, 1000, 49), (1, 65, 70, 1029)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("groups,rows,n,k", SKINNY)
def test_skinny_products(groups, rows, n, k, dtype):
    x, w = random(groups, rows, k, dtype=dtype), random(groups, n, k, dtype=dtype, seed=1)
    a = random(groups, rows, n, dtype=dtype, seed=2)
    turned = w.transpose(1, 2).contiguous()
    out = torch.full((groups, n, k), float("nan"), dtype=dtype)
    OPS.skinny_tn(out, a, x)
    products = {
        "nt": (OPS.skinny_nt(x, w), x @ w.mT, x.double() @ w.double().mT),
        "nn": (OPS.skinny_nn(x, turned), x @ turned, x.double() @ turned.double()),
        "tn": (out, a.mT @ x, a.double().mT @ x.double()),
    }
    floor = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype]
    for name, (got, plain, want) in products.items():
        assert got.shape == want.shape and got.dtype == dtype
        for mine, budget in zip(error(got, want), error(plain, want)):
            assert mine <= 2 * budget + floor, name


def test_skinny_tn_writes_nothing_else():
    storage = torch.zeros(3, 40 * 33 + 7)
    for shift in range(3):  # output addresses that are, and are not, multiples of a vector
        out = storage[1, shift : shift + 40 * 33].view(1, 40, 33)
        OPS.skinny_tn(out, torch.ones(1, 2, 40), torch.ones(1, 2, 33))
        assert (out == 2).all()
        assert storage[0].abs().max() == 0 and storage[2].abs().max() == 0
        assert storage[1, shift + 40 * 33 :].abs().max() == 0 and storage[1, :shift].abs().sum() == 0
        storage.zero_()


# -- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_what_was_expected_and_given():
    geometry = Geometry([(0, 5, 4, 5)])
    rows, tokens = random(1, 8, 32), random(20, 32)
    with pytest.raises(RuntimeError, match="tokens: expected float32, float64 or bfloat16 on the CPU, got Half"):
        run(rows.half(), tokens.half(), geometry)
    with pytest.raises(RuntimeError, match=r"spans: expected tokens in \[0, 19\)"):
        run(rows, tokens[:19], geometry)
    with pytest.raises(RuntimeError, match="rows: expected size 32 on axis 2, got 31"):
        run(rows[..., :31], tokens, geometry)
    with pytest.raises(RuntimeError, match="map_heads: expected 0 or a divisor of 8 rows, got 3"):
        run(rows, tokens, geometry, 3)
    with pytest.raises(RuntimeError, match="rows: expected Float, got Double"):
        run(rows.double(), tokens, geometry)
    geometry.key_box = geometry.key_box[:-1]
    with pytest.raises(RuntimeError, match="key_box: expected 20 packed keys"):
        run(rows, tokens, geometry)
    cells = Geometry([(0, 5, 4, 5)], side=2)
    cells.index[1, 0, 0, 0] = 5
    with pytest.raises(RuntimeError, match=r"tap_index: expected values in \[0, 5\), got 5"):
        run(rows, tokens, cells)
    with pytest.raises(RuntimeError, match="w: expected size 4 on axis 2, got 5"):
        OPS.skinny_nt(random(1, 2, 4), random(1, 3, 5))


# -- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.skipif("VREFLECTION_CPU_ISA" in os.environ, reason="this is such a run")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes(isa):
    environment = {**os.environ, "VREFLECTION_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    probe = "import torch, vreflection.ops.schemas as s; torch.ops.load_library({!r}); x = torch.ones(1, 1, 1)\n"
    probe = probe.format(str(EXTENSION)) + "torch.ops.vreflection.skinny_nt(x, x)"
    first = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "this machine and build go up to" in first.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert first.returncode == 0, first.stderr
    subset = "odd or three or wide or bfloat16 or nan or extreme or threads or roi_align or skinny"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", subset, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused():
    environment = {**os.environ, "VREFLECTION_CPU_ISA": "sse9"}
    code = f"import torch, vreflection.ops.schemas as s; torch.ops.load_library({str(EXTENSION)!r})\n"
    code += "torch.ops.vreflection.skinny_nt(torch.ones(1, 1, 1), torch.ones(1, 1, 1))"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "VREFLECTION_CPU_ISA: expected generic, avx2, avx512 or avx512bf16, got sse9" in result.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize(
    "isa,tile,product",
    [
        ("avx2", "dot_(tile|group|rows)<.*Plain<float>", "vfmadd.*ps.*%ymm"),
        ("avx2", "dot_(tile|group|rows)<.*Plain<double>", "vfmadd.*pd.*%ymm"),
        ("avx2", "mix_(tile|group|rows)<.*float", "vfmadd.*ps.*%ymm"),
        ("avx2", "outer_(tile|rows)<float", "vfmadd.*ps.*%ymm"),
        ("avx512", "dot_(tile|group|rows)<.*Plain<float>", "vfmadd.*ps.*%zmm"),
        ("avx512", "dot_(tile|group|rows)<.*Plain<double>", "vfmadd.*pd.*%zmm"),
        ("avx512", "mix_(tile|group|rows)<.*float", "vfmadd.*ps.*%zmm"),
        ("avx512", "outer_(tile|rows)<float", "vfmadd.*ps.*%zmm"),
        ("avx512bf16", "dot_(tile|group|rows)<.*Pairs", "vdpbf16ps.*%zmm"),
        ("avx512bf16", "mix_tile<8|mix_rows_in_pairs", "vdpbf16ps.*%zmm"),
    ],
)
def test_kernels_use_the_vectors_that_they_were_compiled_for(isa, tile, product):
    bodies = [body for name, body in disassembly() if f"vreflection::{isa}::" in name and re.search(tile, name)]
    if not bodies:
        pytest.skip(f"built without {isa} (another architecture or compiler, or stripped)")
    assert any(re.search(product, body) for body in bodies)
    if isa == "avx2":
        assert not any("%zmm" in body for body in bodies)


@functools.cache
def disassembly():
    """(name, instructions) of every function in the extension."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(EXTENSION)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", code, re.M)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ([1, 0x5555555555555555, 4, 3, 0], "spans: expected tokens in"),
        ([0, 2**63 - 1, 3, 3, 0], "spans: expected tokens in"),
        ([2**63 - 1, 0, 1, 3, 0], "spans: expected tokens in"),
        ([0, 0, 2**31, 1, 0], "spans: expected tokens in"),
        ([0, 0, 2**62, 1, 0], "spans: expected tokens in"),
        ([0, 2, 4, 3, 0], "spans: expected tokens in"),
    ],
)
def test_spans_whose_arithmetic_would_overflow_are_refused(span, message):
    tokens, rows = torch.randn(20, 16), torch.randn(1, 8, 16)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vreflection.attend(
            rows, tokens, torch.tensor([span]), torch.zeros(12, dtype=torch.int32), None, None, 2
        )


def test_no_cells_at_all_are_refused():
    tokens, rows = torch.randn(20, 16), torch.randn(1, 8, 16)
    taps = (torch.zeros(2, 1, 0, 4, dtype=torch.int64), torch.zeros(2, 1, 0, 4))
    with pytest.raises(RuntimeError, match="expected at least one cell and one tap"):
        torch.ops.vreflection.attend(
            rows, tokens, torch.tensor([[0, 5, 2, 3, 0]]), torch.zeros(6, dtype=torch.int32), *taps, 2
        )
