"""Refusals that need no GPU: a CUDA tensor without storage is enough."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the launchers import triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")


def arguments(device, dtype):
    rows, tokens = torch.empty(1, 4, 8, device=device, dtype=dtype), torch.empty(6, 8, device=device, dtype=dtype)
    spans = torch.empty(1, 5, device=device, dtype=torch.int64)
    return rows, tokens, spans, torch.empty(6, device=device, dtype=torch.int32), None, None, 0


def test_cpu_tensors_are_refused_with_the_alternatives(oracle):
    with pytest.raises(ValueError, match=r'attend: Triton kernels need CUDA tensors, got cpu; use impl="torch"'):
        oracle.kernel_module("region_attention").attend(*arguments("cpu", torch.float32))


def test_float64_is_refused_on_cuda(oracle):
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = arguments("cuda", torch.float64)
        with pytest.raises(ValueError, match="rows is float64, which the Triton kernels do not support"):
            oracle.kernel_module("region_attention").attend(*given)


def test_decode_launchers_refuse_what_needs_a_gpu_or_another_dtype(oracle):
    linear, pick = oracle.kernel_module("decode_linear"), oracle.kernel_module("decode_pick")
    with pytest.raises(ValueError, match="linear_add: Triton kernels need CUDA tensors, got cpu"):
        linear.linear_add(torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(1, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, weight = (torch.empty(2, 8, device="cuda", dtype=torch.float64) for _ in range(2))
        needed, token = (torch.empty(2, device="cuda", dtype=dtype) for dtype in (torch.bool, torch.int64))
        with pytest.raises(ValueError, match="hidden_BD is float64"):
            pick.lm_head_pick(hidden, weight, needed, token)


def test_mixed_devices_are_named(oracle):
    rows, tokens, *rest = arguments("cpu", torch.float32)
    with pytest.raises(ValueError, match="expected all tensors on one device, got rows on meta, tokens on cpu"):
        oracle.kernel_module("region_attention").attend(rows.to("meta"), tokens, *rest)
