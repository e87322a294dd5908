import pytest
import torch

from vreflection.losses import (
    LatentObjective,
    attention_kl,
    latent_alignment,
    latent_mse,
    stochastic_side,
    supervised_cross_entropy,
)


def pair(seed=0, shape=(3, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).float().requires_grad_() for _ in range(2)]


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def test_symmetric_alignment_is_half_the_plain_mse_gradient():
    hidden, teacher = pair()
    symmetric = gradients(latent_alignment(hidden, teacher), hidden, teacher)
    plain = gradients(0.5 * torch.nn.functional.mse_loss(hidden, teacher), hidden, teacher)
    for a, b in zip(symmetric, plain):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(latent_alignment(hidden, teacher), torch.nn.functional.mse_loss(hidden, teacher))


@pytest.mark.parametrize(
    ("mode", "side", "receives"),
    [("llm_only", True, 0), ("bcm_only", True, 1), ("stochastic", True, 0), ("stochastic", False, 1)],
)
def test_one_sided_modes_reach_one_side_only(mode, side, receives):
    leaves = pair()
    grads = gradients(latent_alignment(*leaves, mode=mode, llm_side=side), *leaves)
    full = gradients(torch.nn.functional.mse_loss(*leaves), *leaves)
    torch.testing.assert_close(grads[receives], full[receives])
    assert grads[1 - receives] is None


def test_stochastic_draws_are_a_function_of_seed_and_step():
    draws = [stochastic_side(7, step, 0.3) for step in range(4000)]
    assert draws == [stochastic_side(7, step, 0.3) for step in range(4000)]
    assert draws != [stochastic_side(8, step, 0.3) for step in range(4000)]
    assert abs(sum(draws) / len(draws) - 0.3) < 0.03
    assert not any(stochastic_side(1, s, 0.0) for s in range(50)) and all(stochastic_side(1, s, 1.0) for s in range(50))


def test_attention_kl_by_hand_and_zero_times_log_zero():
    teacher = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    student = torch.tensor([[[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]], requires_grad=True)
    expected = torch.log(torch.tensor(2.0)) * 2
    torch.testing.assert_close(attention_kl(teacher, student), expected)
    torch.testing.assert_close(attention_kl(teacher, student, "mean_queries"), expected / 2)
    (gradient,) = torch.autograd.grad(attention_kl(teacher, student), student)
    torch.testing.assert_close(gradient, torch.tensor([[[-2.0, -2.0, 0.0], [-2.0, 0.0, 0.0]]]))
    assert attention_kl(teacher, teacher).abs() < 1e-6


def test_gradcheck_losses():
    student, teacher = (x.detach().double().softmax(-1).requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(latent_mse, (student, teacher))
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: attention_kl(fixed, s), (student,))
    assert torch.autograd.gradcheck(lambda t: attention_kl(t, student.detach()), (teacher,))
    assert torch.autograd.gradcheck(lambda s: latent_alignment(s, fixed, "llm_only"), (student,))
    assert torch.autograd.gradcheck(lambda t: latent_alignment(student.detach(), t, "bcm_only"), (teacher,))


@pytest.mark.parametrize("loss", [latent_alignment, latent_mse, attention_kl])
def test_empty_batches_are_zero_and_connected(loss):
    left, right = torch.zeros(0, 2, 3, requires_grad=True), torch.zeros(0, 2, 3, requires_grad=True)
    value = loss(left, right)
    assert value == 0 and value.requires_grad
    value.backward()


def test_cross_entropy_without_supervision_is_zero_and_connected():
    logits = torch.zeros(0, 7, requires_grad=True)
    value = supervised_cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    assert value == 0 and value.requires_grad


def test_losses_run_in_float32_for_half_inputs():
    hidden, teacher = (x.detach().to(torch.bfloat16) for x in pair())
    assert latent_mse(hidden, teacher).dtype == torch.float32
    torch.testing.assert_close(latent_mse(hidden, teacher), (hidden.float() - teacher.float()).square().mean())


def test_objectives_per_stage():
    one, two = LatentObjective.for_stage("stage1"), LatentObjective.for_stage("stage2", alignment_weight=4.0)
    assert (one.alignment_weight, one.ce_on_latent_slots, one.alignment_offset) == (0.5, True, -1)
    assert (two.distillation_weight, two.ce_on_latent_slots, two.probe_offset, two.alignment_weight) == (1, False, 0, 4)
    assert LatentObjective.for_stage("sft").alignment_weight is None


def test_a_kept_alignment_has_the_published_weight_unless_one_is_given():
    keep = lambda **given: LatentObjective.for_stage("stage2", keep_alignment=True, **given).alignment_weight  # noqa: E731
    assert (keep(), keep(alignment_weight=None), keep(alignment_weight=2.0), keep(alignment_weight=0.0)) == (
        0.5,
        0.5,
        2,
        0,
    )
    assert LatentObjective.for_stage("stage2", alignment_weight=None).alignment_weight is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentObjective(alignment="both"), "alignment: expected one of"),
        (lambda: LatentObjective(kl_reduction="mean"), "kl_reduction: expected one of"),
        (lambda: LatentObjective(stochastic_probability=1.5), "expected 0..1, got 1.5"),
        (
            lambda: LatentObjective(alignment_weight=-1.0),
            "alignment_weight: expected a finite number of at least 0, got",
        ),
        (lambda: LatentObjective(distillation_weight=float("nan")), "distillation_weight: expected a finite number"),
        (lambda: LatentObjective(attention_kl_weight=float("inf")), "attention_kl_weight: .* got inf"),
        (lambda: LatentObjective(attention_kl_weight=None), "attention_kl_weight: .* got None"),  # pyright: ignore
        (lambda: LatentObjective(alignment_offset=1), r"alignment_offset: expected 0 .* or -1 .* from the start token"),
        (lambda: LatentObjective(probe_offset=-2), r"probe_offset: expected 0 .*, got -2"),
        (lambda: LatentObjective(probe_offset=False), r"probe_offset: expected 0 .*, got False"),
        (lambda: LatentObjective.for_stage("stage1", lamda=1), "unknown objective settings"),
        (lambda: latent_mse(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)), "must have one shape"),
        (lambda: latent_alignment(*pair(), mode="x"), "mode: expected one of"),
        (lambda: attention_kl(*pair(), reduction="x"), "reduction: expected one of"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
