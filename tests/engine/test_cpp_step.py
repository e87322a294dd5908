"""The decode step in C++ against the one in plain PyTorch."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vreflection as vr
from vreflection.engine import cpp_step
from vreflection.engine.cache import KVCache
from vreflection.engine.choice import choose_step, step_report
from vreflection.engine.cpp_step import CppStep
from vreflection.engine.steps import QwenStep
from vreflection.errors import ConfigError
from vreflection.ops import dispatch

pytestmark = pytest.mark.skipif(bool(dispatch.CPP_MISSING), reason=dispatch.CPP_MISSING)
ISAS = ("generic", "avx2", "avx512", "avx512bf16")
CPU = torch.device("cpu")

# name: head width, query heads, key heads, MLP width, biases, rows
SHAPES = {
    "one head": (16, 1, 1, 40, True, 1),
    "seven to one": (20, 7, 1, 37, True, 2),
    "wide heads": (128, 2, 2, 133, True, 3),
    "quickstart": (32, 6, 2, 512, True, 8),
    "no biases": (16, 9, 3, 64, False, 5),
    "every head its own": (20, 3, 3, 9, True, 6),
    "many rows": (32, 4, 2, 100, True, 33),
}
COLUMNS = 70


def make_model(width, heads, groups, inner, biases, dtype=torch.float64, seed=0):
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = Qwen2_5_VLTextConfig(
        vocab_size=30,
        hidden_size=width * heads,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 2 - 2, 1, 1]},
        bos_token_id=0,
        eos_token_id=1,
    )
    decoder = Qwen2_5_VLTextModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(decoder.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(
            noise / weight.shape[1] ** 0.5 if weight.dim() == 2 else noise * 0.3 + (1.0 if "norm" in name else 0)
        )
    for layer in decoder.layers if not biases else ():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias = None
    head = torch.nn.Linear(width * heads, 30, bias=False)
    frequencies = decoder.rotary_emb.inv_freq.clone()
    decoder.to(dtype).rotary_emb.inv_freq = frequencies  # float32 in every precision, as a loaded model has them
    model = SimpleNamespace(model=SimpleNamespace(language_model=decoder))
    model.get_input_embeddings, model.get_output_embeddings = lambda: decoder.embed_tokens, lambda: head.to(dtype)
    return model


def make_case(shape, dtype, columns=COLUMNS, seed=0):
    """Inputs, positions, lengths, and a cache factory: always the same content, rounded to `dtype`."""
    width, heads, groups, *_, rows = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    random = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, content = random(rows, width * heads), random(4, rows + 1, groups, columns, width)
    length = torch.randint(columns, (rows,), generator=generator)
    length[-1], length[0] = columns - 1, 0 if rows > 1 else 5
    position = torch.randint(2000, (rows,), generator=generator)

    def cache():
        made = KVCache(2, rows + 1, groups, columns, width, dtype, CPU)
        for tensor, values in zip((*made.keys, *made.values), content):
            tensor.copy_(values)
        return made

    return inputs.to(dtype), position, length, cache


def cached(cache):
    return [*cache.keys, *cache.values]


def run(step_class, model, case, extent=COLUMNS):
    inputs, position, length, make_cache = case
    step = step_class(model, make_cache())
    with torch.inference_mode():
        return [step.forward(inputs.clone(), position, length, extent), *cached(step.cache)]


def errors(actual, exact):
    difference = (actual.double() - exact).abs()
    scale = exact.abs().max()
    return (difference.max() / scale).item(), (difference.mean() / scale).item()


@pytest.fixture(autouse=True)
def _threads_and_rows(monkeypatch):
    monkeypatch.setattr(cpp_step, "MAX_ROWS", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float64_it_is_the_torch_step(shape):
    model = make_model(*SHAPES[shape][:5])
    inputs, position, length, cache = make_case(shape, torch.float64)
    # Angles are float32 numbers, whose cosines differ in their last bit between libraries; angle 0 is exact.
    for where, limit in ((position * 0, 1e-12), (position, 1e-6)):
        case = (inputs, where, length, cache)
        for got, expected in zip(run(CppStep, model, case), run(QwenStep, model, case), strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert errors(got, expected)[0] < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_error_is_at_most_twice_the_torch_steps(shape, dtype):
    low = make_model(*SHAPES[shape][:5], dtype)
    truth = make_model(*SHAPES[shape][:5], dtype)
    truth.model.language_model.double().rotary_emb.inv_freq = low.model.language_model.rotary_emb.inv_freq
    results = []
    for seed in range(10):  # one row of a narrow model alone says nothing about an error's size
        inputs, position, length, cache = make_case(shape, dtype, seed=seed)

        def wide(cache=cache):
            made = cache()
            for tensors in (made.keys, made.values):
                tensors[:] = [tensor.double() for tensor in tensors]
            return made

        case = (inputs, position, length, cache)
        exact = run(QwenStep, truth, (inputs.double(), position, length, wide))
        results.append([run(CppStep, low, case), run(QwenStep, low, case), exact])
    floor = 1e-6 if dtype == torch.float32 else 0
    for tensors in zip(*(zip(*result, strict=True) for result in results), strict=True):
        got, plain, expected = (torch.stack(of_seeds) for of_seeds in zip(*tensors, strict=True))
        assert got.dtype == dtype
        for mine, budget in zip(errors(got, expected), errors(plain, expected)):
            assert mine <= 2 * budget + floor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nan_past_a_rows_end_reaches_nothing_and_nothing_else_is_written(shape, dtype):
    model = make_model(*SHAPES[shape][:5], dtype)
    inputs, position, length, cache = make_case(shape, dtype)
    past = torch.arange(COLUMNS) >= length[:, None]  # the new key's own column included

    def poisoned():
        made = cache()
        for tensor in cached(made):
            tensor[: len(length)].masked_fill_(past[:, None, :, None], float("nan"))
            tensor[len(length) :] = float("nan")
        return made

    clean = run(CppStep, model, (inputs, position, length, cache))
    dirty = run(CppStep, model, (inputs, position, length, poisoned))
    assert clean[0].isfinite().all() and torch.equal(clean[0], dirty[0])
    written = torch.arange(COLUMNS) == length[:, None]
    for got, before in zip(dirty[1:], cached(poisoned())):
        changed = ~((got == before) | (got.isnan() & before.isnan())).all(dim=3).all(dim=1)
        assert torch.equal(changed[: len(length)], written) and not changed[len(length) :].any()


@pytest.mark.parametrize("extent", [1, 17, 64, COLUMNS])
def test_rows_at_every_place(extent):
    """Empty, about full, full; past the extent a row sees what the extent shows."""
    model = make_model(*SHAPES["quickstart"][:5])
    inputs, position, _, cache = make_case("quickstart", torch.float64)
    length = torch.tensor([0, 1, 15, 16, 17, COLUMNS - 1, COLUMNS, COLUMNS + 9])
    case = (inputs, position * 0, length, cache)
    for got, expected in zip(run(CppStep, model, case, extent), run(QwenStep, model, case, extent), strict=True):
        assert errors(got, expected)[0] < 1e-12


def test_results_do_not_depend_on_threads_or_on_who_shares_the_batch():
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(64, 8, 2, 700, True, dtype)
        SHAPES["big"] = (64, 8, 2, 700, True, 8)
        inputs, position, length, cache = make_case("big", dtype)
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results += [run(CppStep, model, (inputs, position, length, cache)) for _ in range(5)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        for count in (1, 2, 3, 5):
            some = run(CppStep, model, (inputs[:count], position[:count], length[:count], cache))
            assert torch.equal(some[0], results[0][0][:count])
    del SHAPES["big"]


def test_weights_are_read_where_they_are():
    model = make_model(*SHAPES["quickstart"][:5])
    inputs, position, length, make_cache = make_case("quickstart", torch.float64)
    step = CppStep(model, make_cache())
    with torch.inference_mode():
        step.forward(inputs, position, length, COLUMNS)
        for weight in model.model.language_model.parameters():
            weight.mul_(1.1)
        step.cache.keys[:], step.cache.values[:] = make_cache().keys, make_cache().values
        got = step.forward(inputs, position, length, COLUMNS)
    assert torch.equal(got, run(CppStep, model, (inputs, position, length, make_cache))[0])
    assert errors(got, run(QwenStep, model, (inputs, position, length, make_cache))[0])[0] < 1e-6


def test_no_rows_and_many_rows(monkeypatch):
    model = make_model(*SHAPES["quickstart"][:5])
    inputs, position, length, cache = make_case("quickstart", torch.float64)
    assert run(CppStep, model, (inputs[:0], position[:0], length[:0], cache))[0].shape == (0, 192)
    monkeypatch.setattr(cpp_step, "MAX_ROWS", 7)
    case = (inputs, position, length, cache)
    assert torch.equal(run(CppStep, model, case)[0], run(QwenStep, model, case)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize(("rows", "words", "width"), [(1, 1, 8), (3, 65, 20), (8, 5000, 192), (33, 130, 64)])
def test_greedy_words(rows, words, width, dtype):
    generator = torch.Generator().manual_seed(rows)
    # Whole numbers: every sum is exact, and many logits are equal.
    hidden = torch.randint(-1, 2, (rows, width), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (words, width), generator=generator).to(dtype)
    needed = torch.rand(rows, generator=generator) < 0.7
    needed[0] = True
    logits = hidden.double() @ weight.double().T
    for threads in (1, 2):
        torch.set_num_threads(threads)
        picked = torch.ops.vreflection.decode_pick(hidden, needed, weight)
        assert torch.equal(picked, torch.where(needed, logits.argmax(dim=1), 0))
    if words > 1:
        weight[words // 2] = weight[words - 1] = float("nan")
        assert int(torch.ops.vreflection.decode_pick(hidden, needed, weight)[0]) == words // 2
        assert torch.ops.vreflection.decode_pick(hidden, ~(needed | True), weight).eq(0).all()


@pytest.mark.parametrize("mode", ["clean", "parity"])
@pytest.mark.parametrize("rows", [1, 3])
def test_whole_answers(lab, mode, rows):
    model = lab.lively()
    prompts = [lab.prompt(n, opened=n % 3 == 0) for n in range(lab.count)]

    def answers(step):
        decoder = vr.LatentDecoder(model, max_batch_size=rows, step=step, latent_mode=mode)
        assert decoder.step.name == step
        return decoder.generate(prompts, max_new_tokens=40, return_latents=True)

    expected = answers("model")
    assert any(answer.latent.count(True) for answer in expected)
    for step in ("torch", "cpp"):
        for ours, hosts in zip(answers(step), expected, strict=True):
            assert ours.tokens == hosts.tokens and ours.latent == hosts.latent
            torch.testing.assert_close(ours.step_hidden, hosts.step_hidden, rtol=1e-4, atol=1e-4)


def test_a_growing_cache(lab):
    model = lab.lively()
    settings = {"max_new_tokens": 400, "eos_token_id": 319}
    prompts = [lab.prompt(0), lab.prompt(1)]
    answers = [vr.LatentDecoder(model, step=step).generate(prompts, **settings) for step in ("cpp", "torch")]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    assert len(answers[0][0].tokens) >= 400


def test_it_passes_opcheck_and_traces_whole():
    model = make_model(*SHAPES["quickstart"][:5], torch.float32)
    inputs, position, length, make_cache = make_case("quickstart", torch.float32)
    step = CppStep(model, make_cache())
    weights = [weight.detach() for weight in step.weights]
    arguments = (
        inputs, position, length, COLUMNS, weights, step.eps, step.inverse_frequency, step.rope_scale,
        step.cache.keys, step.cache.values,
    )  # fmt: skip
    op = torch.ops.vreflection.decode_step.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    torch._dynamo.reset()
    with torch.inference_mode():
        step.cache.keys[:], step.cache.values[:] = make_cache().keys, make_cache().values
        got = torch.compile(step.forward, fullgraph=True, backend="aot_eager")(inputs, position, length, COLUMNS)
    expected = run(CppStep, model, (inputs, position, length, make_cache))
    for ours, theirs in zip([got, *cached(step.cache)], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_choice(lab):
    model, settings = lab.lively(), {"max_batch_size": 1, "max_length": 64}
    assert vr.LatentDecoder(model, **settings).step.name == "cpp"
    assert step_report(CPU, torch.float32).startswith("cpp; not fused")
    assert "cpp takes" not in step_report(CPU, torch.float16) and step_report(CPU, torch.float16).startswith("torch")
    with pytest.raises(ConfigError, match='step="cpp": .*float32, float64 or bfloat16, got float16'):
        vr.LatentDecoder(lab.lively().half(), step="cpp", **settings)
    gate = model.model.language_model.layers[1].mlp.gate_proj
    gate.weight.data = gate.weight.data.T.contiguous().T
    assert vr.LatentDecoder(model, **settings).step.name == "torch"
    with pytest.raises(ConfigError, match=r'step="cpp": .*layers\.1\.mlp\.gate_proj\.weight is not contiguous'):
        vr.LatentDecoder(model, step="cpp", **settings)
    with pytest.raises(ConfigError, match='step="cpp": .*runs on the CPU, the model is on meta'):
        choose_step("cpp", model, KVCache(2, 1, 2, 64, 16, torch.float32, torch.device("meta")))


def test_errors_name_what_was_expected_and_given():
    model = make_model(*SHAPES["quickstart"][:5])
    inputs, position, length, cache = make_case("quickstart", torch.float64)
    forward = CppStep(model, cache()).forward
    for arguments, message in (
        ((inputs.float(), position, length, 9), "norm1: expected Float, got Double"),
        ((inputs[:, 1:], position, length, 9), "norm1: expected size 191 on axis 0, got 192"),
        ((inputs, position[1:], length, 9), "position: expected size 8 on axis 0, got 7"),
        ((inputs, position, length.int(), 9), "length: expected Long, got Int"),
        ((inputs, position, length - 1, 9), "length: expected at least 0, got -1"),
        ((inputs, position, length, 0), "extent: expected at least 1 column, got 0"),
        ((inputs.repeat(2, 1), position.repeat(2), length.repeat(2), 9), "at most the cache's 9 rows, got 16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    model.model.language_model.layers[1].mlp.up_proj.weight.data = torch.ones(192, 512, dtype=torch.float64).T
    with pytest.raises(RuntimeError, match="up: expected a contiguous tensor, got a strided one"):
        CppStep(model, cache()).forward(inputs, position, length, 9)


@pytest.mark.skipif("VREFLECTION_CPU_ISA" in os.environ, reason="this is such a run")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes(isa):
    environment = {**os.environ, "VREFLECTION_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    probe = "import torch, vreflection.ops; x = torch.ones(1, 1, 1); torch.ops.vreflection.skinny_nt(x, x)"
    first = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "this machine and build go up to" in first.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert first.returncode == 0, first.stderr
    subset = "float64 or twice or nan or place or threads or greedy"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", subset, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
