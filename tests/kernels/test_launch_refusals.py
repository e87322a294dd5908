"""Refusals that need no GPU: a CUDA tensor without storage is enough."""

import contextlib
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


class Recorder:
    """In a kernel's place: writes down its grid."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


def test_grids_of_a_pack_of_millions_of_tokens(oracle, monkeypatch):
    """Three million tokens, more than 65535 tiles; nothing is allocated."""
    region, roi, launch = (oracle.kernel_module(name) for name in ("region_attention", "roi_align", "launch"))
    recorders = {}
    for module in (region, roi):
        monkeypatch.setattr(module, "on_device", lambda _: contextlib.nullcontext())
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, recorders.setdefault(name, Recorder()))
    tokens, width, boxes = 3_000_000, 128, 2
    config = launch.AttentionConfig.from_shape(tokens, 8, width, 2)
    with FakeTensorMode():
        make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, device="cuda", dtype=dtype)  # noqa: E731
        spans, key_box = make(boxes, 5, dtype=torch.int64), make(tokens, dtype=torch.int32)
        weights = make(tokens, 8, dtype=torch.float32)
        region.attend_backward(
            make(boxes, 8, width), None, make(1, 8, width), make(tokens, width), weights, make(0), spans, key_box,
            None, None, 0, True, True, config=config,
        )  # fmt: skip
        taps = make(2, boxes, 2, 4, dtype=torch.int64), make(2, boxes, 2, 4, dtype=torch.float32)
        roi.roi_align_backward(make(boxes, 4, width), spans, *taps, tokens)
        many = make(2**31, dtype=torch.int32)
        with pytest.raises(ValueError, match="attend: expected at most 2147450880 packed tokens and keys"):
            region.attend(make(1, 8, width), make(tokens, width), spans, many, None, None, 0, config=config)
    grids = [grid for recorder in recorders.values() for grid in recorder.grids]
    assert len(recorders["_token_gradient_kernel"].grids) == len(recorders["_roi_align_backward_kernel"].grids) == 1
    assert all(grid[0] < 2**31 and all(axis < 2**16 for axis in grid[1:]) for grid in grids)


def test_mixed_devices_are_named(oracle):
    rows, tokens, *rest = arguments("cpu", torch.float32)
    with pytest.raises(ValueError, match="expected all tensors on one device, got rows on meta, tokens on cpu"):
        oracle.kernel_module("region_attention").attend(rows.to("meta"), tokens, *rest)
