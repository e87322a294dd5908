"""Decoder steps by themselves: no data-dependent operator, the host's maths, weights in place."""

import pytest
import torch

import vreflection as vr
from vreflection.decoding import DecodeProgram, PickPlan, ProgramKey
from vreflection.ops import dispatch

PLANS = {
    "greedy": PickPlan(),
    "penalty": PickPlan(penalty=True),
    "sample": PickPlan(sample=True),
    "everything": PickPlan(True, True, True),
}


@pytest.fixture
def running(lab):
    """A decoder in the midst of four answers, and a program on its rows."""

    def make(step="torch", plan=PLANS["greedy"], **key):
        model = lab.lively()
        decoder = vr.LatentDecoder(model, max_batch_size=4, max_length=128, step=step)
        settings = {"do_sample": plan.sample, "top_k": 5 if plan.truncate else 0, "max_new_tokens": 60}
        for n in range(4):
            penalty = 1.3 if plan.penalty else 1.0
            decoder.submit(decoder.request(lab.prompt(n), seed=n, repetition_penalty=penalty, **settings))
        decoder.advance(2)
        with torch.inference_mode():
            decoder.buffers.rewind()
        key = ProgramKey(4, 64, plan=plan, **key)
        return decoder, DecodeProgram(decoder.step, decoder.buffers, decoder.rules, key, native=False)

    return make


@pytest.mark.parametrize(
    ("step", "plan"),
    [("torch", "greedy"), ("torch", "penalty"), ("torch", "everything"), ("cpp", "greedy"), ("model", "sample")],
)
def test_a_step_traces_whole(running, step, plan):
    """One graph, without a break: nothing in a step depends on a value on the device."""
    if step == "cpp" and dispatch.CPP_MISSING:
        pytest.skip(dispatch.CPP_MISSING)
    decoder, program = running(step, PLANS[plan])
    tensors = [*program.state, *decoder.cache.keys, *decoder.cache.values]
    with torch.inference_mode():
        before = [t.clone() for t in tensors]
        torch._dynamo.reset()
        torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=False)()
        traced = [t.clone() for t in tensors]
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        program()
    for got, expected in zip(traced, tensors, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert int(program.buffers.cursor) == 1 and any(not torch.equal(a, b) for a, b in zip(tensors, before))


@pytest.mark.parametrize("step", ["torch", "model"])
def test_the_graph_of_a_step_waits_for_nothing(running, step):
    """Every operator of a whole span and of a sampled text step; none reads a value back or has a ragged result."""
    waiting = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "index.Tensor_mask", "is_nonzero")
    for key in ({"text": False, "steps": 3}, {"plan": PLANS["everything"]}):
        _, program = running(step, **key)
        names = []

        class Listen(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, names=names):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        with torch.inference_mode(), Listen():
            program()
        assert any("linear" in name for name in names) and len(names) > 50
        assert not [name for name in names if any(word in name for word in waiting)]


def test_wide_models_and_heads_agree_with_the_host(tiny, lab):
    """Grouped heads of every kind, biases, tied weights; hidden states over a long answer."""
    for heads, kv in ((4, 4), (4, 1), (2, 2)):
        from vreflection.model.config import VReflectionConfig
        from vreflection.model.modeling import VReflectionForConditionalGeneration

        host = tiny.host_config(tie=heads == 2)
        host.text_config.num_attention_heads, host.text_config.num_key_value_heads = heads, kv
        host.text_config.rope_parameters["mrope_section"] = [64 // heads // 2 - 4, 2, 2]
        config = VReflectionConfig.from_base_config(host, "sft", **tiny.LATENT_SETTINGS)
        model = tiny.randomise(VReflectionForConditionalGeneration(config)).eval()
        answers = [
            vr.LatentDecoder(model, max_batch_size=2, step=step).generate(
                [lab.prompt(0), lab.prompt(3)], max_new_tokens=40, return_latents=True, eos_token_id=300
            )
            for step in ("torch", "model")
        ]
        for ours, hosts in zip(*answers, strict=True):
            assert ours.tokens == hosts.tokens
            torch.testing.assert_close(ours.step_hidden, hosts.step_hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(lab, dtype):
    """Against the same prompt in float64: our step's error is at most twice the host's."""
    truth = lab.lively().double()
    model = lab.lively().to(dtype)
    forced = [7, 8, 3, 4, 5, 6, 9, 10]
    states = {}
    for name, net, step in (("truth", truth, "torch"), ("host", model, "model"), ("ours", model, "torch")):
        decoder = vr.LatentDecoder(net, max_batch_size=1, max_length=128, step=step)
        prompt = lab.prompt(3)
        prompt["pixel_values"] = prompt["pixel_values"].to(net.dtype)
        with torch.inference_mode():
            embeds, positions = decoder.prefill.inputs([decoder.prompt(prompt)])[0]
            decoder.step.prefill(embeds[None], positions[:, None], [0], [len(embeds) - 1])
            length, out = embeds.shape[0], []
            for n, token in enumerate(forced):
                at = torch.tensor([length + n])
                out.append(decoder.step.forward(decoder.step.embed(torch.tensor([token])), at, at, 64))
        states[name] = torch.cat(out).double()
    errors = {name: (states[name] - states["truth"]).abs() for name in ("host", "ours")}
    for measure in (torch.max, torch.mean):
        assert measure(errors["ours"]) <= 2 * measure(errors["host"]) + 1e-9
