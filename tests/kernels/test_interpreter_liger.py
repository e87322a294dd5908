"""Liger's fused linear cross-entropy, under our calling convention, in Triton's interpreter."""

import pytest
import torch

pytestmark = pytest.mark.interpreter
pytest.importorskip("liger_kernel")


def test_it_is_the_mean_cross_entropy_of_the_heads_logits():
    from vreflection.training.acceleration import liger_cross_entropy

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(320, 64, generator=generator, requires_grad=True)
    hidden = torch.randn(17, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 320, (17,), generator=generator)
    loss = liger_cross_entropy()(weight, hidden, targets)
    found = torch.autograd.grad(loss, (weight, hidden))
    expected_loss = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(expected_loss, (weight, hidden))
    torch.testing.assert_close(loss, expected_loss)
    for left, right in zip(found, expected):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
