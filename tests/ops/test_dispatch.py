import subprocess
import sys

import pytest
import torch

from vreflection.ops import dispatch, region_attention, roi_align


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "CPP_MISSING", "the C++ extension was not built")


def test_auto_takes_the_fastest_that_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "CPP_MISSING", "")
    monkeypatch.setattr(dispatch, "TRITON_MISSING", "")
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    assert dispatch.fastest("resample", "cpu", torch.float32) == "cpp"
    assert dispatch.fastest("resample", "cpu", torch.float16) == "torch"
    assert dispatch.fastest("resample", "cuda", torch.bfloat16) == "triton"
    assert dispatch.fastest("resample", "cuda", torch.float64) == "torch"
    assert dispatch.fastest("distillation_loss", "cpu", torch.float32) == "torch"


def test_auto_without_the_extension_is_torch(without_extension):
    tokens = torch.randn(6, 4)
    assert dispatch.choose("roi_align", "auto", tokens) == "torch"
    assert roi_align(tokens, [[2, 3]], [[0, 0, 1, 1]], [0], 2).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("op", "impl", "dtype", "reason"),
    [
        ("roi_align", "cpp", torch.float32, "was not built"),
        ("roi_align", "cpp", torch.float16, "cpp takes float32, float64 or bfloat16, got float16"),
        ("distillation_loss", "cpp", torch.float32, "distillation_loss has no cpp implementation"),
        ("roi_align", "triton", torch.float32, "triton runs on CUDA"),
    ],
)
def test_explicit_never_falls_back(without_extension, monkeypatch, op, impl, dtype, reason):
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    monkeypatch.setattr(dispatch, "TRITON_MISSING", "")
    with pytest.raises(ValueError, match=reason):
        dispatch.choose(op, impl, torch.zeros(1, dtype=dtype))


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_MISSING", "triton is not installed")
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.choose("roi_align", "triton", torch.zeros(1))


def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    monkeypatch.setattr(dispatch, "TRITON_MISSING", "")
    with pytest.raises(ValueError, match="bfloat16 wrongly"):
        dispatch.choose("roi_align", "triton", torch.zeros(1, dtype=torch.bfloat16))


def test_explanation_names_the_choice_and_what_was_passed_over(without_extension, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    monkeypatch.setattr(dispatch, "TRITON_MISSING", "")
    told = dispatch.explain("cpu", torch.float32)
    assert set(told) == set(dispatch.OPERATORS)
    assert told["resample"].startswith("torch; not triton: triton runs on CUDA")
    assert "not cpp: the C++ extension was not built" in told["resample"]
    assert told["distillation_loss"].endswith("plainer, on request: reference")


def test_choice_is_logged_once(without_extension, caplog):
    dispatch._announced.clear()
    with caplog.at_level("INFO", logger="vreflection"):
        for _ in range(3):
            roi_align(torch.randn(6, 4), [[2, 3]], [[0, 0, 1, 1]], [0], 2)
    assert [r.getMessage() for r in caplog.records] == ["roi_align on cpu, float32: torch"]


def test_import_touches_neither_triton_nor_cuda():
    code = (
        "import sys, torch, vreflection.ops; "
        "assert 'triton' not in sys.modules and 'vreflection.kernels' not in sys.modules; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_deterministic_algorithms_are_honoured(ragged, impl):
    """No implementation has an unordered reduction: bit-equal runs, and nothing raises under the strict setting."""
    ragged.runnable("region_attention", impl, torch.float32)
    plan = ragged.plan("roi", ragged.SHAPES["five boxes on one image"], torch.float32)
    tokens, rows = torch.randn(72, 12), torch.randn(6, 12)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            leaves = [rows.clone().requires_grad_(), tokens.clone().requires_grad_()]
            context, maps = region_attention(*leaves, plan, 2, impl)
            results.append([context, *torch.autograd.grad(context.sum() + maps.square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))
