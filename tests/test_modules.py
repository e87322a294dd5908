import pytest
import torch

from vreflection.modules import BoxGuidedCompression, DynamicAutoregressiveCompression, default_num_heads

GRIDS = torch.tensor([[4, 5], [1, 7], [6, 3]])
BOXES = torch.tensor([[0.1, 0.1, 0.9, 0.6], [0.3, 0.0, 0.31, 1.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.9, 0.99]])
BOX_IMAGE = torch.tensor([0, 1, 2, 2])
WIDTH, QUERIES = 12, 3


def tokens(seed=0, dtype=torch.float64):
    count = int(GRIDS.prod(dim=1).sum())
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def teacher(region, impl="torch", heads=2):
    torch.manual_seed(1)
    module = BoxGuidedCompression(
        WIDTH, QUERIES, heads, region=region, output_size=3, query_init_std=1.0, impl=impl
    ).double()
    torch.nn.init.normal_(module.cross_attn.in_proj_bias)
    return module


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_absorbed_equals_reference_forward_and_backward(region):
    results = []
    for impl in ("torch", "reference"):
        module, x = teacher(region, impl), tokens().requires_grad_()
        latents, maps = module(x, GRIDS, BOXES, BOX_IMAGE, return_attention=True)
        generator = torch.Generator().manual_seed(2)
        loss = (latents * torch.randn(latents.shape, generator=generator, dtype=x.dtype)).sum()
        loss = loss + sum((m * torch.randn(m.shape, generator=generator, dtype=x.dtype)).sum() for m in maps)
        loss.backward()
        results.append([latents, *maps, x.grad, *(p.grad for p in module.parameters())])
    for absorbed, reference in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, reference, rtol=0, atol=1e-12)


def test_student_absorbed_equals_reference():
    probes = torch.randn(4, QUERIES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for impl in ("torch", "reference"):
        torch.manual_seed(1)
        module = DynamicAutoregressiveCompression(WIDTH, 2, impl=impl).double()
        x, p = tokens().requires_grad_(), probes.clone().requires_grad_()
        latents, maps = module(p, x, GRIDS, BOX_IMAGE, return_attention=True)
        (latents.square().sum() + sum((m**2).sum() for m in maps)).backward()
        results.append([latents, *maps, x.grad, p.grad, *(q.grad for q in module.parameters())])
    for absorbed, reference in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_gradcheck_teacher(region):
    module = teacher(region)
    names, values = zip(*module.named_parameters())

    def run(x, *params):
        latents, maps = torch.func.functional_call(
            module, dict(zip(names, params)), (x, GRIDS[:2], BOXES[:2], BOX_IMAGE[:2], True)
        )
        return latents, *maps

    x = tokens()[: int(GRIDS[:2].prod(1).sum())].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_gradcheck_student():
    module = DynamicAutoregressiveCompression(WIDTH, 2).double()
    names, values = zip(*module.named_parameters())
    probes = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(p, x, *params):
        latents, maps = torch.func.functional_call(
            module, dict(zip(names, params)), (p, x, GRIDS[:2], BOX_IMAGE[:2], True)
        )
        return latents, *maps

    x = tokens()[: int(GRIDS[:2].prod(1).sum())].requires_grad_()
    assert torch.autograd.gradcheck(run, (probes, x, *values), fast_mode=True)


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_attention_rows_sum_to_one_inside_the_box_only(region):
    _, maps = teacher(region)(tokens(), GRIDS, BOXES, BOX_IMAGE, return_attention=True)
    for weights, image in zip(maps, BOX_IMAGE):
        assert weights.shape == (QUERIES, *GRIDS[image].tolist())
        torch.testing.assert_close(weights.sum((1, 2)), torch.ones(QUERIES, dtype=torch.float64))
    # Box 3 of image 2 starts half way down and across: nothing above or left of it is looked at.
    assert maps[3][:, :2].abs().max() == 0 and maps[3][:, :, 0].abs().max() == 0


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_one_box_never_sees_another_boxs_tokens(region):
    module, clean = teacher(region), tokens()
    poisoned = clean.clone()
    poisoned[20:27] = float("nan")  # all of image 1
    expected = module(clean, GRIDS, BOXES, BOX_IMAGE)
    got = module(poisoned, GRIDS, BOXES, BOX_IMAGE)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=0)


def test_batch_of_boxes_equals_one_at_a_time():
    module, x = teacher("window"), tokens()
    together = module(x, GRIDS, BOXES, BOX_IMAGE)
    for box in range(len(BOXES)):
        alone = module(x, GRIDS, BOXES[box : box + 1], BOX_IMAGE[box : box + 1])
        torch.testing.assert_close(alone[0], together[box], rtol=0, atol=1e-12)


@pytest.mark.parametrize("region", ["window", "roi_align"])
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_the_gradient_of_an_expanded_leaf_is_each_entrys_own(region, impl):
    """Many small boxes, where `auto` makes keys and values from views of the tokens."""
    torch.manual_seed(0)
    module = BoxGuidedCompression(24, 8, 8, region=region, output_size=2, impl=impl).double()
    geometry = [[1, 11]], [[0, 0, 0.3, 1]] * 6, [0] * 6
    expanded = torch.arange(24.0, dtype=torch.float64)[None].expand(11, -1).requires_grad_()
    plain = expanded.detach().clone().requires_grad_()
    for tokens in (expanded, plain):
        module(tokens, *geometry).sin().sum().backward()
    torch.testing.assert_close(expanded.grad, plain.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("region", ["window", "roi_align"])
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_shapes_on_the_meta_device(region, impl):
    teacher = BoxGuidedCompression(64, region=region, impl=impl).to("meta")
    student = DynamicAutoregressiveCompression(64, impl=impl).to("meta")
    tokens = torch.empty(6, 64, device="meta", requires_grad=True)
    latents, maps = teacher(tokens, [[2, 3]], [[0, 0, 1, 1]], [0], return_attention=True)
    student(latents, tokens, [[2, 3]], [0]).sum().backward()
    assert (latents.shape, maps[0].shape, tokens.grad.shape) == ((1, 8, 64), (8, 2, 3), (6, 64))


def test_compiled_modules_return_attention_too():
    torch._dynamo.reset()
    teacher, student = BoxGuidedCompression(64), DynamicAutoregressiveCompression(64)
    tokens, grids, box_image = torch.randn(18, 64), torch.tensor([[3, 4], [2, 3]]), torch.tensor([0, 1])
    boxes = torch.tensor([[0.1, 0.0, 0.6, 0.6], [0.0, 0.0, 1.0, 1.0]])
    for module, arguments in (
        (teacher, (tokens, grids, boxes, box_image)),
        (student, (torch.randn(2, 3, 64), tokens, grids, box_image)),
    ):
        latents, maps = module(*arguments, return_attention=True)
        compiled_latents, compiled_maps = torch.compile(module, backend="eager")(*arguments, return_attention=True)
        torch.testing.assert_close(compiled_latents, latents)
        for got, expected in zip(compiled_maps, maps, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_tracing_is_refused():
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = BoxGuidedCompression(64)

        def forward(self, tokens):
            return self.module(tokens, [[2, 3]], [[0, 0, 1, 1]], [0])

    with pytest.raises(RuntimeError, match="resample: torch.jit.trace would keep the plan of this one call"):
        torch.jit.trace(Whole(), torch.randn(6, 64))


def test_no_boxes_and_non_contiguous_tokens():
    module, x = teacher("window"), tokens()
    assert module(x, GRIDS, torch.zeros(0, 4), []).shape == (0, QUERIES, WIDTH)
    strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(module(strided, GRIDS, BOXES, BOX_IMAGE), module(x, GRIDS, BOXES, BOX_IMAGE))


def test_released_sizes_and_state_dict_keys():
    with torch.device("meta"):
        bcm, dac = BoxGuidedCompression(3584), DynamicAutoregressiveCompression(3584)
    assert sum(p.numel() for p in bcm.parameters()) == 51_430_400
    assert sum(p.numel() for p in dac.parameters()) == 51_401_728
    assert bcm.num_heads == dac.num_heads == default_num_heads(3584) == 8
    shared = [f"cross_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
    shared += ["output_norm.weight", "output_norm.bias"]
    assert sorted(dac.state_dict()) == sorted(shared)
    assert sorted(bcm.state_dict()) == sorted(["queries", *shared])


def test_queries_are_initialised_explicitly():
    torch.manual_seed(0)
    assert abs(BoxGuidedCompression(512, 64).queries.std().item() - 0.02) < 1e-3
    wide = BoxGuidedCompression(512, 64, query_init_std=1.0)
    wide.reset_parameters()
    assert abs(wide.queries.std().item() - 1.0) < 0.05


@pytest.mark.parametrize("kind", [BoxGuidedCompression, DynamicAutoregressiveCompression])
def test_reset_parameters_overwrites_every_value(kind):
    module = kind(64)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BoxGuidedCompression(12, num_heads=5), "expected a divisor of hidden_size 12, got 5"),
        (lambda: BoxGuidedCompression(12, region="circle"), "region: expected one of"),
        (lambda: BoxGuidedCompression(12, num_latents=0), "num_latents: expected at least 1"),
        (lambda: BoxGuidedCompression(12, impl="fast"), "impl: expected one of"),
        (lambda: teacher("window")(tokens()[:, :6], GRIDS, BOXES, BOX_IMAGE), r"expected packed \(T, 12\)"),
        (
            lambda: DynamicAutoregressiveCompression(12)(torch.zeros(2, 3, 12), tokens(), GRIDS, BOX_IMAGE),
            r"probes: expected \(4, Q, 12\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_low_precision_boxes_and_a_batch_without_boxes(region):
    module = teacher(region).bfloat16()
    x = tokens(dtype=torch.bfloat16)
    assert module(x, GRIDS, BOXES.bfloat16(), BOX_IMAGE).shape == (4, QUERIES, WIDTH)
    module(x, GRIDS, torch.zeros(0, 4), []).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_backward_inside_autocast_is_the_one_outside(impl):
    module = DynamicAutoregressiveCompression(WIDTH, 2, impl=impl)
    x, probes = tokens(dtype=torch.float32), torch.randn(4, QUERIES, WIDTH)
    grads = []
    for inside in (True, False):
        loss = module(probes, x, GRIDS, BOX_IMAGE).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(loss, module.cross_attn.in_proj_weight)[0])
    assert torch.equal(*grads)
