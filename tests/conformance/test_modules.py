import pytest
import torch

from vreflection.modules import BoxGuidedCompression, DynamicAutoregressiveCompression


def pack(padded_BND, lengths):
    """The padded golden batch as packed one-row images, each with a box over the whole image."""
    leaf = padded_BND.clone().requires_grad_()
    tokens = torch.cat([leaf[i, :n] for i, n in enumerate(lengths.tolist())])
    return leaf, tokens, torch.tensor([[1, n] for n in lengths.tolist()]), torch.arange(len(lengths))


def select(numbers, prefix):
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", ["bcm", "dac"])
def test_outputs_and_gradients(golden, name, impl):
    numbers = select(golden("modules.safetensors"), f"{name}.")
    state = select(numbers, "param.")
    width = state["output_norm.weight"].numel()
    if name == "bcm":
        module = BoxGuidedCompression(width, num_latents=state["queries"].shape[1], impl=impl)
    else:
        module = DynamicAutoregressiveCompression(width, impl=impl)
    module.load_state_dict(state)
    leaf, tokens, grids, box_image = pack(numbers["in.x"], numbers["in.lengths"])
    gradients = {"in.x": leaf}
    if name == "bcm":
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(grids), 4)
        latents, maps = module(tokens, grids, boxes, box_image, return_attention=True)
    else:
        gradients["in.hidden"] = probes = numbers["in.hidden"].clone().requires_grad_()
        latents, maps = module(probes, tokens, grids, box_image, return_attention=True)

    expected = numbers["out.attention"]
    attention = torch.stack([torch.nn.functional.pad(m.flatten(1), (0, expected.shape[2] - m.shape[2])) for m in maps])
    torch.testing.assert_close(latents, numbers["out.latents"], rtol=0, atol=1e-5)
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-5)

    loss = (latents * numbers["cotangent.latents"]).sum() + (attention * numbers["cotangent.attention"]).sum()
    loss.backward()
    gradients |= {f"param.{key}": value for key, value in module.named_parameters()}
    assert set(gradients) == set(select(numbers, "grad."))
    for key, value in gradients.items():
        expected = numbers[f"grad.{key}"]
        error = (value.grad - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < 1e-5, f"{key}: {error:.2e} of the largest entry"
