"""The fused linear layers of a decode step in Triton's interpreter against a dense float64 oracle."""

import os

import pytest
import torch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
]
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# rows, width, columns of up to three weights, which of them have a bias
SHAPES = {
    "one_row": (1, 64, (40, 8, 8), (True, True, True)),
    "one_row_odd_width": (1, 60, (17, 3), (True, False)),
    "two_rows": (2, 192, (33,), (True,)),
    "three_rows_no_bias": (3, 60, (20, 4, 7), (False, False, False)),
    "five_rows": (5, 60, (16, 1, 31), (False, True, False)),
    "eight_rows": (8, 64, (64, 16), (True, True)),
    "seventeen_rows": (17, 64, (9, 40), (True, True)),
    "all_rows": (32, 60, (24,), (False,)),
    "two_row_blocks": (35, 64, (18, 18), (True, True)),
}
# Every form on every batch: rows per program below, at and above the rows there are.
FORMS = {"plain_1": (8, 64, 1), "plain_2": (4, 32, 2), "dot_16": (16, 32, 16), "dot_32": (32, 16, 32)}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_norm(x, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    return weight * (x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_norm_linear(x, norm, weights, biases):
    y = plain_norm(x, norm)
    return torch.cat([F.linear(y, weight, bias) for weight, bias in zip(weights, biases)], dim=1)


def plain_gate_up(x, norm, gate, up):
    y = plain_norm(x, norm)
    return F.silu(F.linear(y, gate)) * F.linear(y, up)


def product_config(oracle, form):
    if form is None:
        return None
    return oracle.kernel_module("decode_launch").ProductConfig(*FORMS[form], num_warps=4, num_stages=2)


def poisoned_rows(oracle, tensor):
    return oracle.poisoned(tensor, row_gap=5)


def run_norm_linear(oracle, shape, dtype, form=None):
    """The kernel's output and a function of the precision that gives the plain one, on the same rounded inputs."""
    rows, width, sizes, has_bias = shape
    x, norm = (1.5 * draw(rows, width)).to(dtype), (1 + 0.2 * draw(width, seed=1)).to(dtype)
    weights = [draw(size, width, seed=2 + i, scale=width**-0.5).to(dtype) for i, size in enumerate(sizes)]
    biases = [draw(size, seed=7).to(dtype) if has else None for size, has in zip(sizes, has_bias)]
    out = poisoned_rows(oracle, torch.zeros(rows, sum(sizes), dtype=dtype))
    returned = oracle.kernel_module("decode_linear").norm_linear(
        poisoned_rows(oracle, x), oracle.poisoned(norm), EPS, [oracle.poisoned(w) for w in weights],
        [None if b is None else oracle.poisoned(b) for b in biases], out, config=product_config(oracle, form),
    )  # fmt: skip
    assert returned is out
    got = out.clone()
    oracle.assert_written_inside(out)

    def plain(kind):
        cast = [None if b is None else b.to(kind) for b in biases]
        return plain_norm_linear(x.to(kind), norm.to(kind), [w.to(kind) for w in weights], cast)

    return got, plain


def run_gate_up(oracle, rows, width, columns, dtype, form=None):
    x, norm = (1.5 * draw(rows, width)).to(dtype), (1 + 0.2 * draw(width, seed=1)).to(dtype)
    gate, up = (draw(columns, width, seed=seed, scale=2 * width**-0.5).to(dtype) for seed in (2, 3))
    out = poisoned_rows(oracle, torch.zeros(rows, columns, dtype=dtype))
    oracle.kernel_module("decode_linear").norm_gate_up(
        poisoned_rows(oracle, x), oracle.poisoned(norm), EPS, oracle.poisoned(gate), oracle.poisoned(up), out,
        config=product_config(oracle, form),
    )  # fmt: skip
    got = out.clone()
    oracle.assert_written_inside(out)
    return got, lambda kind: plain_gate_up(*(t.to(kind) for t in (x, norm, gate, up)))


def run_linear_add(oracle, rows, width, columns, dtype, form=None):
    x, weight = draw(rows, width).to(dtype), draw(columns, width, seed=2, scale=width**-0.5).to(dtype)
    residual = draw(rows, columns, seed=3).to(dtype)
    out = poisoned_rows(oracle, residual)
    oracle.kernel_module("decode_linear").linear_add(
        poisoned_rows(oracle, x), oracle.poisoned(weight), out, config=product_config(oracle, form)
    )
    got = out.clone()
    oracle.assert_written_inside(out)
    return got, lambda kind: residual.to(kind) + F.linear(x.to(kind), weight.to(kind))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_norm_linear_matches_the_oracle(oracle, name, dtype):
    got, plain = run_norm_linear(oracle, SHAPES[name], dtype)
    oracle.assert_close(got, plain(torch.float64), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width, columns", [(1, 60, 33), (2, 192, 40), (3, 60, 7), (8, 64, 90), (32, 192, 33)])
def test_gate_up_and_add_match_the_oracle(oracle, rows, width, columns, dtype):
    for run in (run_gate_up, run_linear_add):
        got, plain = run(oracle, rows, width, columns, dtype)
        oracle.assert_close(got, plain(torch.float64), TOLERANCE[dtype], run.__name__)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_every_form_serves_every_batch(oracle, form, rows):
    got, plain = run_norm_linear(oracle, (rows, 60, (20, 5, 5), (True, False, True)), torch.float32, form)
    oracle.assert_close(got, plain(torch.float64), 1e-5, "norm_linear")
    for run in (run_gate_up, run_linear_add):
        got, plain = run(oracle, rows, 60, 19, torch.float32, form)
        oracle.assert_close(got, plain(torch.float64), 1e-5, run.__name__)


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
def test_half_precision_error_stays_within_twice_the_plain_path(oracle, rows):
    runs = {
        "norm_linear": run_norm_linear(oracle, (rows, 192, (40, 24), (True, False)), torch.float16),
        "norm_gate_up": run_gate_up(oracle, rows, 192, 50, torch.float16),
        "linear_add": run_linear_add(oracle, rows, 192, 50, torch.float16),
    }
    for name, (got, plain) in runs.items():
        oracle.assert_within_budget(plain(torch.float64), got, plain(torch.float16), name)


@pytest.mark.parametrize("width", [1, 60, 700])
def test_rms_norm(oracle, width):
    kernels = oracle.kernel_module("decode_linear")
    for dtype in (torch.float32, torch.float64, torch.float16):
        x, norm = (1.5 * draw(3, width)).to(dtype), draw(width, seed=1).to(dtype)
        out = poisoned_rows(oracle, torch.zeros_like(x))
        got = kernels.rms_norm(poisoned_rows(oracle, x), oracle.poisoned(norm), EPS, out).clone()
        oracle.assert_written_inside(out)
        exact = plain_norm(x.double(), norm.double())
        if dtype == torch.float16:
            oracle.assert_within_budget(exact, got, plain_norm(x, norm))
        else:
            oracle.assert_close(got, exact, TOLERANCE[dtype])
        again = x.clone()
        assert torch.equal(kernels.rms_norm(again, norm, EPS, again), got)


@pytest.mark.parametrize("form", ["plain_1", "plain_2", "dot_16"])
def test_a_broken_row_stays_alone(oracle, form):
    kernels, config = oracle.kernel_module("decode_linear"), product_config(oracle, form)
    x, norm, weight = draw(5, 40).float(), torch.ones(40), draw(9, 40, seed=1).float()
    clean = kernels.norm_linear(x, norm, EPS, [weight], [None], torch.zeros(5, 9), config=config)
    x[3] = float("nan")
    got = kernels.norm_linear(x, norm, EPS, [weight], [None], torch.zeros(5, 9), config=config)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], clean[others])


def test_no_rows_launch_nothing(oracle):
    kernels = oracle.kernel_module("decode_linear")
    x, norm, weight = torch.zeros(0, 8), torch.ones(8), torch.zeros(4, 8)
    assert kernels.norm_linear(x, norm, EPS, [weight], [None], torch.zeros(0, 4)).shape == (0, 4)
    assert kernels.linear_add(x, weight, torch.zeros(0, 4)).shape == (0, 4)
    assert kernels.norm_gate_up(x, norm, EPS, weight, weight, torch.zeros(0, 4)).shape == (0, 4)
    assert kernels.rms_norm(x, norm, EPS, torch.zeros(0, 8)).shape == (0, 8)


def test_refusals_name_the_fix(oracle):
    kernels = oracle.kernel_module("decode_linear")
    x, norm, weight, out = torch.zeros(2, 8), torch.ones(8), torch.zeros(4, 8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="one to three weights"):
        kernels.norm_linear(x, norm, EPS, [weight] * 4, [None] * 4, out)
    with pytest.raises(ValueError, match=r"biases\[0\] \(4,\)"):
        kernels.norm_linear(x, norm, EPS, [weight], [torch.zeros(3)], out)
    with pytest.raises(ValueError, match="in the dtype of the activations"):
        kernels.linear_add(x, weight.half(), out)
    with pytest.raises(ValueError, match="copy it once"):
        kernels.linear_add(x, torch.zeros(8, 4).T, out)
    with pytest.raises(ValueError, match="rows with contiguous elements"):
        kernels.linear_add(torch.zeros(8, 2).T, weight, out)
    with pytest.raises(ValueError, match=r"expected out_BN \(2, 4\)"):
        kernels.norm_linear(x, norm, EPS, [weight], [None], torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expected up_ID \(4, 8\)"):
        kernels.norm_gate_up(x, norm, EPS, weight, weight[:3], out)
    with pytest.raises(ValueError, match="use float32 or float16"):
        kernels.linear_add(x.bfloat16(), weight.bfloat16(), out.bfloat16())
