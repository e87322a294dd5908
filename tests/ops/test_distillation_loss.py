import pytest
import torch

from vreflection.losses import attention_kl, latent_mse
from vreflection.ops import distillation_loss, image_plan, window_plan

IMPLS = ["torch", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
BOXES, QUERIES, WIDTH = 3, 4, 6


def case(dtype=torch.float64):
    """Boxes inside images of different size, with the same attention as dense maps for the readable formula."""
    generator = torch.Generator().manual_seed(0)
    grids, box_image = [[4, 5], [3, 3]], [1, 0, 0]
    boxes = [[0, 0, 1, 1], [0.2, 0.2, 0.7, 0.9], [0, 0, 0.3, 0.3]]
    teacher_plan, plan = window_plan(29, grids, boxes, box_image), image_plan(29, grids, box_image)

    def attention(plan):
        logits = torch.randn(plan.num_keys, QUERIES, generator=generator, dtype=torch.float64)
        parts = [logits[plan.key_box_S == box].softmax(0) for box in range(BOXES)]
        return torch.cat(parts).to(dtype)

    latents, targets = (torch.randn(BOXES, QUERIES, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return latents.to(dtype), targets.to(dtype), attention(plan), attention(teacher_plan), plan, teacher_plan


@pytest.mark.parametrize("reduction", ["sum_queries", "mean_queries"])
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_dense_formula(ragged, impl, reduction):
    ragged.runnable("distillation_loss", impl, torch.float64)
    latents, targets, student, teacher, plan, teacher_plan = case()
    leaves = [t.requires_grad_() for t in (latents, targets, student)]
    mse, kl = distillation_loss(*leaves, teacher, teacher_plan.keys_in(plan), reduction, impl)
    grads = torch.autograd.grad(2 * mse + 3 * kl, leaves)

    def dense(maps, of):
        padded = torch.zeros(BOXES, QUERIES, 20, dtype=torch.float64)
        for box, image_map in enumerate(of.image_maps(maps)):
            padded[box, :, : image_map[0].numel()] = image_map.flatten(1)
        return padded

    exact_mse = latent_mse(leaves[0], leaves[1])
    exact_kl = attention_kl(dense(teacher, teacher_plan), dense(leaves[2], plan), reduction)
    exact = torch.autograd.grad(2 * exact_mse + 3 * exact_kl, leaves)
    for got, expected in zip([mse, kl, *grads], [exact_mse, exact_kl, *exact], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_zero_teacher_weight_adds_nothing_even_where_the_student_is_zero():
    teacher, student = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    mse, kl = distillation_loss(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), student, teacher, torch.arange(2))
    assert mse == 1 and kl.abs() < 1e-6


def test_gradcheck_and_teacher_gradient():
    latents, targets, student, teacher, plan, teacher_plan = case()
    index = teacher_plan.keys_in(plan)
    leaves = [t.requires_grad_() for t in (latents, targets, student, teacher)]
    assert torch.autograd.gradcheck(lambda *t: distillation_loss(*t, index), leaves)


def test_no_boxes_is_zero_and_connected():
    latents = torch.zeros(0, QUERIES, WIDTH, requires_grad=True)
    maps = torch.zeros(0, QUERIES, requires_grad=True)
    mse, kl = distillation_loss(latents, torch.zeros(0, QUERIES, WIDTH), maps, maps, torch.zeros(0, dtype=torch.int64))
    (mse + kl).backward()
    assert mse == 0 and kl == 0 and latents.grad is not None


def test_low_precision_inputs_give_float32_losses():
    latents, targets, student, teacher, plan, teacher_plan = case(torch.bfloat16)
    mse, kl = distillation_loss(latents, targets, student.float(), teacher.float(), teacher_plan.keys_in(plan))
    assert mse.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(mse, (latents.float() - targets.float()).square().mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(1, 2, 4)}, r"one \(B, Q, D\)"),
        ({"student_maps": torch.zeros(5, 3)}, r"student_maps: expected \(keys, 2\)"),
        ({"key_index": torch.zeros(3, dtype=torch.int64)}, r"key_index: expected \(5,\)"),
        ({"key_index": torch.zeros(5)}, "key_index: expected an int64 tensor, got torch.float32"),
        ({"kl_reduction": "max"}, "kl_reduction: expected one of"),
        ({"impl": "cpp"}, "has no cpp implementation"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "latents": torch.zeros(1, 2, 3), "targets": torch.zeros(1, 2, 3), "student_maps": torch.zeros(5, 2),
        "teacher_maps": torch.zeros(5, 2), "key_index": torch.arange(5),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(arguments | change))
