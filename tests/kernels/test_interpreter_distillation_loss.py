"""The fused distillation losses in Triton's interpreter against float64 autograd."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
EPS, SCALE = 2.0**-13, 0.25  # exact in float32, so float64 runs can be compared tightly


def build(shape, student_keys, teacher_keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, sample=torch.rand):
        return sample(size, generator=generator, dtype=torch.float64)

    latents, targets = (draw(*shape, sample=torch.randn).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    student, teacher = draw(student_keys, shape[1]).to(wide), draw(teacher_keys, shape[1]).to(wide)
    teacher[: teacher_keys // 3] = 0
    index = torch.randperm(student_keys, generator=generator)[:teacher_keys]
    return latents, targets, student, teacher, index


def dense(latents, targets, student, teacher, index, kind=torch.float64):
    leaves = [x.to(kind).requires_grad_() for x in (latents, targets, student)]
    mse = (leaves[0] - leaves[1]).square().mean()
    t = teacher.to(kind)
    kl = SCALE * (torch.xlogy(t, t) - t * (leaves[2][index] + EPS).log()).sum()
    (2 * mse + 3 * kl).backward()
    return mse.detach(), kl.detach(), *(x.grad for x in leaves)


def ours(oracle, data, need_target_grad=True):
    kernels = oracle.kernel_module("distillation_loss")
    wide = torch.promote_types(data[0].dtype, torch.float32)
    cotangents = torch.tensor(2.0, dtype=wide), torch.tensor(3.0, dtype=wide)
    losses = kernels.distillation(*data, EPS, SCALE)
    return *losses, *kernels.distillation_backward(*cotangents, *data, EPS, SCALE, need_target_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape, student_keys, teacher_keys",
    [((2, 3, 700), 600, 500), ((1, 1, 1), 1, 1), ((3, 5, 37), 40, 40), ((2, 8, 64), 30, 0), ((1, 7, 129), 1023, 7)],
)
def test_matches_autograd(oracle, guarded_outputs, shape, student_keys, teacher_keys, dtype):
    data = build(shape, student_keys, teacher_keys, dtype)
    got = ours(oracle, [oracle.poisoned(x) if x.is_floating_point() else x for x in data])
    guarded_outputs()
    for name, x, expected in zip(("mse", "kl", "latents", "targets", "student"), got, dense(*data)):
        # The scale factors are float32 scalars, in the interpreter too.
        oracle.assert_close(x, expected, 1e-5 if dtype == torch.float32 else 1e-7, name)


def test_many_programs_add_up(oracle, monkeypatch):
    module = oracle.kernel_module("distillation_loss")
    monkeypatch.setattr(module, "loss_block", lambda elements, step: step)
    data = build((1, 8, 700), 1500, 1400)
    for x, expected in zip(ours(oracle, data), dense(*data)):
        oracle.assert_close(x, expected, 1e-5)


def test_half_precision_latents(oracle):
    data = build((2, 8, 64), 30, 20, torch.float16)
    got, exact, plain = ours(oracle, data), dense(*data), dense(*data, kind=torch.float16)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == torch.float16
    for x, truth, budget in zip(got, exact, plain):
        floor = torch.finfo(torch.float16).eps * truth.abs().max()
        assert (x.double() - truth).abs().max() <= 2 * (budget.double() - truth).abs().max() + floor


def test_zero_teacher_entries_cost_nothing_even_where_the_student_is_zero(oracle):
    kernels = oracle.kernel_module("distillation_loss")
    latents, student = torch.ones(1, 2, 4), torch.zeros(3, 2)
    data = (latents, latents, student, torch.zeros(3, 2), torch.arange(3))
    mse, kl = kernels.distillation(*data, 0.0, 1.0)
    assert mse == kl == 0
    one = torch.tensor(1.0)
    assert not kernels.distillation_backward(one, one, *data, 0.0, 1.0, False)[2].any()


def test_nan_maps_show_in_the_loss(oracle):
    data = list(build((1, 2, 4), 3, 3))
    data[3][1, 1] = float("nan")
    assert oracle.kernel_module("distillation_loss").distillation(*data, EPS, SCALE)[1].isnan()


def test_target_gradient_only_on_request_and_strided_inputs(oracle):
    data = build((2, 3, 50), 9, 7)
    strided = [oracle.poisoned(x, row_gap=2) if x.is_floating_point() else x for x in data]
    got = ours(oracle, strided, need_target_grad=False)
    assert got[3].shape == (0,)
    for x, expected in zip(got[:3], dense(*data)):
        oracle.assert_close(x, expected, 1e-5)


def test_mismatched_maps_are_refused(oracle):
    latents, targets, student, teacher, index = build((2, 3, 50), 9, 7)
    kernels = oracle.kernel_module("distillation_loss")
    with pytest.raises(ValueError, match=r"expected teacher_maps \(7, 3\)"):
        kernels.distillation(latents, targets, student, teacher[:5], index, EPS, SCALE)
    with pytest.raises(ValueError, match="one target per latent"):
        kernels.distillation(latents, targets[:1], student, teacher, index, EPS, SCALE)


def test_places_of_maps_past_two_to_the_31(oracle):
    """A program whose block begins there, beyond the end of small maps, must read and add nothing."""
    kernels = oracle.kernel_module("distillation_loss")
    latents, targets, student, teacher, index = build((1, 4, 8), 6, 6)
    partial = torch.full((1,), 7.0)
    block, before = 1024, 2**21  # as many programs before it
    kernels._distillation_kernel[(1,)](
        latents, targets, student, teacher, index, partial, -before, latents.numel(), teacher.numel(), 4, block, EPS,
        STEP=block,
    )  # fmt: skip
    assert partial.item() == 0.0
