"""A living decoder over a model that changes: whatever it computes with is noticed, and old results are not reused."""

import pytest
import torch

import vreflection as vr
from vreflection.engine import prefill
from vreflection.errors import ConfigError


def make(model, **settings):
    return vr.LatentDecoder(model, **{"max_batch_size": 3, "max_length": 128, **settings})


def tokens(answers):
    return [answer.tokens for answer in answers]


CHANGES = {
    "fused optimizer": lambda model: optimise(model, fused=True),
    "optimizer": lambda model: optimise(model, fused=False),
    "loaded": lambda model: model.load_state_dict({n: 0.8 * p for n, p in model.state_dict().items()}, assign=True),
    "replaced": lambda model: replace_layer(model),
    "in place": lambda model: [p.mul_(0.8) for p in model.parameters()],
}


def optimise(model, fused):
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = torch.sin(torch.arange(parameter.numel()).view(parameter.shape).float())
    torch.optim.AdamW(parameters, lr=0.05, fused=fused).step()


def replace_layer(model):
    layer = model.model.language_model.layers[1].mlp
    layer.up_proj = torch.nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", ["auto", "torch", "model"])
def test_changed_weights_are_noticed(lab, monkeypatch, change, step):
    """Shared beginnings, encoded images and the weights that a step reads."""
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model, prompts = lab.lively(), [lab.prompt(n) for n in (3, 1)]
    decoder = make(model, step=step)
    decoder.generate(prompts, max_new_tokens=5)
    torch.manual_seed(0)
    with torch.no_grad():
        CHANGES[change](model)
    expected = make(model, step=step).generate(prompts, max_new_tokens=9, return_latents=True)
    for answer, own in zip(decoder.generate(prompts, max_new_tokens=9, return_latents=True), expected, strict=True):
        assert answer.tokens == own.tokens
        torch.testing.assert_close(answer.step_hidden, own.step_hidden, rtol=1e-4, atol=1e-4)


SWITCHES = {
    "norm epsilon": lambda model: setattr(model.model.language_model.norm, "variance_epsilon", 0.5),
    "rope buffer": lambda model: model.model.language_model.rotary_emb.inv_freq.mul_(1.5),
    "another hook": lambda model: exchange_hook(model),
}


def exchange_hook(model):
    layer = model.model.language_model.layers[0].mlp
    for handle in list(layer._forward_hooks):
        del layer._forward_hooks[handle]
    layer.register_forward_hook(lambda module, inputs, output: 1.5 * output)


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_no_parameter_is_noticed_too(lab, monkeypatch, switch):
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model, prompts = lab.lively(), [lab.prompt(n) for n in (3, 1)]
    if switch == "another hook":
        model.model.language_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    decoder = make(model)
    before = decoder.generate(prompts, max_new_tokens=9, return_latents=True)
    SWITCHES[switch](model)
    expected = make(model).generate(prompts, max_new_tokens=9, return_latents=True)
    assert not torch.allclose(before[0].step_hidden[0], expected[0].step_hidden[0], rtol=1e-3)
    for answer, own in zip(decoder.generate(prompts, max_new_tokens=9, return_latents=True), expected, strict=True):
        assert answer.tokens == own.tokens
        torch.testing.assert_close(answer.step_hidden, own.step_hidden, rtol=1e-4, atol=1e-4)


@pytest.fixture
def adapted(lab):
    """A model with an adapter that changes its answers, and the model inside it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(lab.lively(), settings)
    return model, model.get_base_model()


@pytest.mark.parametrize("share", [True, False])
def test_a_switched_adapter_is_noticed(lab, adapted, monkeypatch, share):
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    wrapped, model = adapted
    prompts = [lab.prompt(n) for n in (3, 1, 2)]
    decoder = make(model, share_prefixes=share)
    first = [answer.step_hidden for answer in decoder.generate(prompts, max_new_tokens=9, return_latents=True)]
    with wrapped.disable_adapter():
        expected = make(model).generate(prompts, max_new_tokens=9, return_latents=True)
        without = decoder.generate(prompts, max_new_tokens=9, return_latents=True)
    for answer, own, with_adapter in zip(without, expected, first, strict=True):
        torch.testing.assert_close(answer.step_hidden, own.step_hidden, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(answer.step_hidden[0], with_adapter[0], rtol=1e-3)
    again = decoder.generate(prompts, max_new_tokens=9, return_latents=True)
    for answer, hidden in zip(again, first, strict=True):
        torch.testing.assert_close(answer.step_hidden, hidden, rtol=1e-4, atol=1e-4)


def test_a_model_wrapped_for_adapters_is_unwrapped(lab, adapted):
    wrapped, model = adapted
    prompts = [lab.prompt(n) for n in range(3)]
    expected = tokens(make(model).generate(prompts, max_new_tokens=9))
    decoder = make(wrapped)
    assert decoder.model is model
    assert tokens(decoder.generate(prompts, max_new_tokens=9)) == expected


def test_a_model_of_mixed_adapters_is_unwrapped(lab):
    peft = pytest.importorskip("peft")
    model = lab.lively()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    assert make(peft.get_peft_model(model, settings, mixed=True)).model is model


def test_adapters_that_lengthen_the_prompt_are_refused(lab):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(lab.lively(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="PROMPT_TUNING adapters put tokens of their own before the prompt"):
        make(wrapped)


def test_forgetting_by_hand(lab):
    model, prompts = lab.lively(), [lab.prompt(3)]
    decoder = make(model)
    decoder.generate(prompts, max_new_tokens=5)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.0  # new storage
        parameter.data.mul_(0.8)
    decoder.forget()
    expected = tokens(make(model).generate(prompts, max_new_tokens=9))
    assert tokens(decoder.generate(prompts, max_new_tokens=9)) == expected


def test_hooks_and_adapters_take_the_hosts_forward(lab):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(3)]
    decoder = make(model)
    assert decoder.step.name != "model"
    decoder.generate(prompts, max_new_tokens=4)
    handle = model.model.language_model.layers[0].mlp.register_forward_hook(lambda m, i, out: 1.5 * out)
    expected = make(model, step="model").generate(prompts, max_new_tokens=9)
    # Also on a decoder that is already there.
    assert tokens(decoder.generate(prompts, max_new_tokens=9)) == tokens(expected)
    assert decoder.step.name == "model"
    with pytest.raises(ConfigError, match="pass over the hooks of layers.0.mlp"):
        make(model, step="torch")
    handle.remove()
    assert tokens(decoder.generate(prompts, max_new_tokens=9)) != tokens(expected) and decoder.step.name != "model"
