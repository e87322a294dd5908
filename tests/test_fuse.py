import copy
import pickle

import pytest
import torch
from torch import nn

import vreflection as vr

WIDTH, HEADS, QUERIES = 32, 2, 3


class Resampler(nn.Module):
    """Somebody else's: learnable queries, a norm on the input, stock attention, feed-forward."""

    def __init__(self, kdim=None, batch_first=True, bias=True):
        super().__init__()
        self.batch_first = batch_first
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.norm = nn.LayerNorm(kdim or WIDTH)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=batch_first, bias=bias)
        self.output_norm = nn.LayerNorm(WIDTH)

    def forward(self, x, mask=None, need_weights=True):
        x = self.norm(x)
        queries = self.queries.expand(x.shape[0 if self.batch_first else 1], -1, -1)
        if not self.batch_first:
            queries = queries.transpose(0, 1)
        out, weights = self.cross_attn(queries, x, x, key_padding_mask=mask, need_weights=need_weights)
        return self.output_norm(out), weights


def outcome(module, x, **kwargs):
    x = x.clone().requires_grad_()
    out, weights = module(x, **kwargs)
    loss = out.square().sum() + (0 if weights is None else weights.square().sum())
    grads = torch.autograd.grad(loss, [x, *module.parameters()])
    return [t for t in (out, weights, *grads) if t is not None]


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


@pytest.fixture(autouse=True)
def absorb_always(request, monkeypatch):
    """These shapes are so small that the cost model would pick the stock forward."""
    if "real_costs" not in request.keywords:
        monkeypatch.setattr(vr.ops.cost_model, "absorbed_cost", lambda *_: 0.0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kdim", [None, 48])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_outputs_weights_and_gradients_are_the_stock_ones(batch_first, bias, kdim, need_weights):
    torch.manual_seed(0)
    module = randomise(Resampler(kdim, batch_first, bias))
    x = torch.randn(4, 9, kdim or WIDTH, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    expected = outcome(module, x, need_weights=need_weights)
    handle = vr.fuse(module)
    got = outcome(module, x, need_weights=need_weights)
    assert handle.calls == {"cross_attn": {"absorbed": 1, "stock": 0}}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_kind", ["right", "scattered"])
def test_padding_masks_and_garbage_in_padded_keys(mask_kind):
    torch.manual_seed(1)
    module, x = randomise(Resampler()), torch.randn(3, 7, WIDTH, dtype=torch.float64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    if mask_kind == "right":
        mask[0, 5:] = mask[2, 1:] = True
    else:
        mask[0, 2] = mask[1, 0] = mask[2, 3:5] = True
    (expected, expected_weights) = module(x, mask)
    vr.fuse(module)
    out, weights = module(x, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
    poisoned = x.masked_fill(mask[..., None], float("nan"))
    torch.testing.assert_close(module(poisoned, mask)[0], expected, rtol=0, atol=1e-12)


def test_given_queries_unbatched():
    torch.manual_seed(2)
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS))
    query, x = torch.randn(QUERIES, WIDTH, dtype=torch.float64), torch.randn(9, WIDTH, dtype=torch.float64)
    expected = attention(query, x, x)
    with vr.fuse(attention) as handle:
        got = attention(query, x, x)
    assert handle.calls[""]["absorbed"] == 1
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_two_views_of_the_same_keys_are_one_set_of_tokens():
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS))
    query, x = torch.randn(2, 1, WIDTH, dtype=torch.float64), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    expected = attention(query, x.transpose(0, 1), x.transpose(0, 1))[0]
    vr.fuse(attention)
    torch.testing.assert_close(attention(query, x.transpose(0, 1), x.transpose(0, 1))[0], expected)


def test_parameters_state_dict_and_class_stay_and_undo_restores():
    module = Resampler()
    before, identities = copy.deepcopy(module.state_dict()), [id(p) for p in module.parameters()]
    handle = vr.fuse(module)
    assert list(module.state_dict()) == list(before) and [id(p) for p in module.parameters()] == identities
    assert type(module.cross_attn) is not nn.MultiheadAttention and isinstance(module.cross_attn, nn.MultiheadAttention)
    other = Resampler()
    other(torch.randn(1, 4, WIDTH))
    assert type(other.cross_attn) is nn.MultiheadAttention
    handle.undo()
    handle.undo()
    assert type(module.cross_attn) is nn.MultiheadAttention and not hasattr(module.cross_attn, "_fused_calls")
    module(torch.randn(1, 4, WIDTH))
    assert handle.calls["cross_attn"] == {"absorbed": 0, "stock": 0}


def test_a_copy_of_a_fused_model_uses_its_own_parameters():
    module = randomise(Resampler())
    vr.fuse(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.cross_attn.out_proj.weight.zero_()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    assert not torch.allclose(twin(x)[0], module(x)[0])


def test_shallow_copies_and_replicas_use_their_own_parameters():
    module = randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    vr.fuse(module)
    query, x = torch.randn(1, 2, WIDTH, dtype=torch.float64), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    for twin in (copy.copy(module), module._replicate_for_data_parallel()):
        twin._parameters = {
            name: None if p is None else nn.Parameter(torch.zeros_like(p)) for name, p in module._parameters.items()
        }
        assert not torch.allclose(twin(query, x, x)[0], module(query, x, x)[0])


def test_a_fused_model_survives_a_pickle():
    module = randomise(Resampler())
    vr.fuse(module)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


def test_gradient_of_expanded_queries_that_are_a_leaf():
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    query = torch.randn(1, 2, WIDTH, dtype=torch.float64).expand(3, -1, -1).requires_grad_()
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    (expected,) = torch.autograd.grad(attention(query, x, x)[0].square().sum(), query)
    vr.fuse(attention)
    (got,) = torch.autograd.grad(attention(query, x, x)[0].square().sum(), query)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kdim", [None, 48])
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_gradients_at_expanded_queries_are_each_ones_own(kdim, impl):
    """Not only their sum: hooks and retained gradients see them one by one."""
    torch.manual_seed(3)
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=True))
    leaf = nn.Parameter(torch.randn(2, WIDTH, dtype=torch.float64))
    x = torch.randn(3, 9, kdim or WIDTH, dtype=torch.float64)

    def outcome():
        expanded = leaf[None].expand(3, -1, -1)
        seen = []
        expanded.register_hook(lambda grad: seen.append(grad) or grad.clamp(-1, 1))
        loss = attention(expanded, x, x)[0].square().sum()
        wanted = torch.autograd.grad(loss, [leaf, *attention.parameters()])
        return [*seen, *wanted]

    expected = outcome()
    with vr.fuse(attention, impl=impl) as handle:
        got = outcome()
    assert handle.calls[""]["absorbed"] == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradients_under_autocast_are_each_ones_own():
    torch.manual_seed(3)
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).float()
    leaf, x = nn.Parameter(torch.randn(2, WIDTH)), torch.randn(3, 9, WIDTH)

    def at_queries():
        expanded = leaf[None].expand(3, -1, -1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = attention(expanded, x, x)[0].float().square().sum()
        return torch.autograd.grad(loss, expanded)[0]

    expected = at_queries()
    vr.fuse(attention)
    got = at_queries()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_two_trained_views_of_the_keys_have_a_gradient_each():
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS))
    query = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64).requires_grad_()

    def at_views():
        key, value = x.transpose(0, 1), x.transpose(0, 1)
        return torch.autograd.grad(attention(query, key, value)[0].square().sum(), [key, value, x])

    expected = at_views()
    handle = vr.fuse(attention)
    for a, b in zip(at_views(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert handle.calls[""] == {"absorbed": 0, "stock": 1}
    with torch.no_grad():
        attention(query, x.transpose(0, 1), x.transpose(0, 1))
    assert handle.calls[""] == {"absorbed": 1, "stock": 1}


def test_a_handle_undoes_only_its_own():
    module = Resampler()
    first = vr.fuse(module)
    first.undo()
    second = vr.fuse(module)
    first.undo()
    module(torch.randn(1, 9, WIDTH))
    assert second.calls["cross_attn"]["absorbed"] == 1
    second.undo()
    assert type(module.cross_attn) is nn.MultiheadAttention


def test_undo_says_what_stands_in_its_way():
    module = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    handle = vr.fuse(module)
    torch.nn.utils.parametrizations.weight_norm(module["b"], "in_proj_weight")
    with pytest.raises(RuntimeError, match="undo: .*{'b': 'ParametrizedFused.*remove the parametrisation"):
        handle.undo()
    assert all("Fused" in type(part).__name__ for part in module.values())
    torch.nn.utils.parametrize.remove_parametrizations(module["b"], "in_proj_weight")
    handle.undo()
    assert all(type(part) is nn.MultiheadAttention for part in module.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_can_be_fused_again_and_undone(copied):
    module = randomise(Resampler())
    own = vr.fuse(module)
    twin = copied(module)
    handle = vr.fuse(twin)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(twin(x), module(x))
    assert (own.calls["cross_attn"]["absorbed"], handle.calls["cross_attn"]["absorbed"]) == (1, 1)
    handle.undo()
    assert type(twin.cross_attn) is nn.MultiheadAttention and type(module.cross_attn) is not nn.MultiheadAttention
    with pytest.raises(ValueError, match="fused already"):
        vr.fuse(module)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_tracing_is_refused_where_a_plan_would_be_kept():
    class Whole(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, query, x):
            return self.attention(query, x, x, need_weights=False)[0]

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    handle = vr.fuse(attention)
    inputs = torch.randn(2, 3, WIDTH), torch.randn(2, 9, WIDTH)
    with pytest.raises(RuntimeError, match="resample: torch.jit.trace would keep the plan"):
        torch.jit.trace(Whole(attention), inputs)
    handle.undo()
    torch.jit.trace(Whole(attention), inputs)


def test_shapes_on_the_meta_device():
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, device="meta")
    handle = vr.fuse(attention)
    x = torch.empty(2, 9, WIDTH, device="meta", requires_grad=True)
    out, weights = attention(torch.empty(2, 3, WIDTH, device="meta"), x, x)
    out.sum().backward()
    assert (out.shape, weights.shape, x.grad.shape) == ((2, 3, WIDTH), (2, 3, 9), x.shape)
    assert handle.calls[""]["absorbed"] == 1


def test_the_module_of_fuse_does_not_hide_it():
    import vreflection.fused_attention

    assert vr.fuse is vreflection.fused_attention.fuse


def test_a_decoder_layer_keeps_its_masked_self_attention():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, dim_feedforward=16, dropout=0.0, batch_first=True).double()
    target, memory = torch.randn(2, 4, WIDTH, dtype=torch.float64), torch.randn(2, 30, WIDTH, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    expected = layer(target, memory, tgt_mask=mask)
    handle = vr.fuse(layer)
    torch.testing.assert_close(layer(target, memory, tgt_mask=mask), expected, rtol=0, atol=1e-12)
    assert handle.calls == {"self_attn": {"absorbed": 0, "stock": 1}, "multihead_attn": {"absorbed": 1, "stock": 0}}


def test_inference_mode_with_two_views():
    attention = randomise(nn.MultiheadAttention(WIDTH, HEADS))
    query, x = torch.randn(2, 1, WIDTH, dtype=torch.float64), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        expected = attention(query, x.transpose(0, 1), x.transpose(0, 1))[0]
        vr.fuse(attention)
        torch.testing.assert_close(attention(query, x.transpose(0, 1), x.transpose(0, 1))[0], expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiles_with_and_without_asking_for_one_graph(fullgraph):
    torch._dynamo.reset()
    module = randomise(Resampler())
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    expected = module(x)
    vr.fuse(module)
    for a, b in zip(torch.compile(module, backend="aot_eager", fullgraph=fullgraph)(x), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_our_own_modules_have_the_right_structure():
    module = vr.BoxGuidedCompression(WIDTH)
    assert list(vr.fuse(module).fused) == ["cross_attn"]


@pytest.mark.real_costs
def test_self_attention_and_small_calls_run_the_stock_forward():
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    handle = vr.fuse(attention)
    x = torch.randn(2, 9, WIDTH)
    attention(x, x, x)
    attention(x[:, :3], x, x, average_attn_weights=False)
    assert handle.calls[""] == {"absorbed": 0, "stock": 2}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), "dropout=0.1"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True"),
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True"),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6), "kdim=4 and vdim=6 differ"),
        (lambda: type("RotaryAttention", (nn.MultiheadAttention,), {})(8, 2), "RotaryAttention is a subclass"),
        (lambda: nn.Linear(8, 8), "holds no torch.nn.MultiheadAttention"),
    ],
)
def test_what_would_change_the_result_is_refused_with_the_reason(build, reason):
    with pytest.raises(ValueError, match=reason):
        vr.fuse(nn.Sequential(build()))


def test_fusing_twice_and_partial_refusal():
    module = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, dropout=0.5)})
    handle = vr.fuse(module)
    assert list(handle.fused) == ["a"] and "dropout" in handle.refused["b"]
    with pytest.raises(ValueError, match="fused already"):
        vr.fuse(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, q, x: a(q, x, x, attn_mask=torch.zeros(2, 5)), "takes no attn_mask"),
        (lambda a, q, x: a(q, x, x, is_causal=True), "takes no attn_mask"),
        (lambda a, q, x: a(q, x, x.clone()), "keys and values to be the same tokens"),
        (lambda a, q, x: a(q, x, x, key_padding_mask=torch.zeros(1, 5)), "expected bool"),
        (
            lambda a, q, x: a(q, x, x, key_padding_mask=torch.ones(1, 5, dtype=torch.bool)),
            r"no key in batch rows \[0\]",
        ),
        (lambda a, q, x: a(q, x, x, key_padding_mask=torch.zeros(5, 1).bool()), r"expected \(1, 5\), got \(5, 1\)"),
        (lambda a, q, x: a(q, *[x.expand(3, -1, -1)] * 2), "expected one batch size, got 1, 3"),
    ],
)
def test_calls_that_cannot_be_honoured_are_refused(call, message):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    vr.fuse(attention)
    with pytest.raises(ValueError, match=message):
        call(attention, torch.randn(1, 2, 8), torch.randn(1, 5, 8))


def test_autocast_gives_the_stock_dtype():
    module, x = Resampler(), torch.randn(2, 9, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)[0]
        vr.fuse(module)
        got = module(x)[0]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
