"""What only a GPU can show. Run with `pytest -m gpu`."""

import pytest
import torch

from vreflection.modules import BoxGuidedCompression, DynamicAutoregressiveCompression

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRIDS = torch.tensor([[31, 33], [9, 40], [1, 1]])
BOXES = torch.tensor([[0.1, 0.1, 0.9, 0.6], [0.3, 0.0, 0.31, 1.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.9, 0.99]])
BOX_IMAGE = torch.tensor([0, 1, 2, 0])
WIDTH = 512


def results(module, tokens, probes):
    """Latents and every gradient, in float64 on the CPU."""
    tokens = tokens.clone().requires_grad_()
    if isinstance(module, BoxGuidedCompression):
        latents = module(tokens, GRIDS, BOXES, BOX_IMAGE)
    else:
        latents = module(probes, tokens, GRIDS, BOX_IMAGE)
    latents.square().sum().backward()
    return [x.detach().double().cpu() for x in (latents, tokens.grad, *(p.grad for p in module.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["window", "roi_align", "student"])
def test_error_stays_within_twice_the_reference_in_the_same_precision(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(int(GRIDS.prod(1).sum()), WIDTH, generator=generator)
    probes = torch.randn(4, 8, WIDTH, generator=generator)

    def build(impl, dtype, device):
        torch.manual_seed(1)
        if kind == "student":
            module = DynamicAutoregressiveCompression(WIDTH, impl=impl)
        else:
            module = BoxGuidedCompression(WIDTH, region=kind, query_init_std=1.0, impl=impl)
        return results(module.to(device, dtype), tokens.to(device, dtype), probes.to(device, dtype))

    truth = build("reference", torch.float64, "cpu")
    ours, plain = build("triton", dtype, "cuda"), build("reference", dtype, "cuda")
    for name, exact, got, budget in zip(range(len(truth)), truth, ours, plain):
        scale = exact.abs().max().clamp(min=1e-12)
        floor = torch.finfo(dtype).eps * scale
        for measure in (torch.max, torch.mean):
            error, allowed = measure((got - exact).abs()), 2 * measure((budget - exact).abs()) + floor
            assert error <= allowed, f"tensor {name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_step_with_host_geometry_does_not_synchronise(region):
    module = BoxGuidedCompression(WIDTH, region=region).cuda()
    tokens = torch.randn(int(GRIDS.prod(1).sum()), WIDTH, device="cuda")
    plan = module.plan(tokens, GRIDS, BOXES, BOX_IMAGE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents, _ = module.resample(module.queries[0], tokens, plan)
        latents.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_decoding_gives_the_tokens_of_the_cpu():
    from vreflection.model.modeling import VReflectionForConditionalGeneration
    from vreflection.quickstart.base import base_dir

    model = VReflectionForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=16, eos_token_id=400)
    got = model.cuda().generate(ids.cuda(), max_new_tokens=16, eos_token_id=400)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_vision_tower_in_one_kernel_errs_no_more_than_window_by_window(tiny, dtype):
    model = tiny.model("stage1").eval()
    images = [(3, 4), (8, 8), (5, 2), (6, 9)]
    pixels, grids = tiny.pixels(images), torch.tensor([[1, 2 * h, 2 * w] for h, w in images])
    with torch.no_grad():
        wanted = model.visual_tokens(pixels, grids).double()
        model.to("cuda", dtype)
        on_gpu = pixels.to("cuda", dtype), grids.cuda()
        ours = model.visual_tokens(*on_gpu).double().cpu()
        plain = torch.cat(list(model.model.get_image_features(*on_gpu).pooler_output)).double().cpu()
    allowed, found = (plain - wanted).abs(), (ours - wanted).abs()
    assert found.max() <= 2 * allowed.max() and found.mean() <= 2 * allowed.mean()
