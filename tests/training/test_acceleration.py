"""Other libraries' faster forms give the same training."""

import importlib.util

import pytest
import torch

from vreflection.errors import ConfigError
from vreflection.model.packed_attention import PACKED_ATTENTION
from vreflection.training import acceleration
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build


def train(values):
    return run_training(build(TrainSettings, values, "test"))


def losses(result):
    return [row["loss"] for row in result.history if "loss" in row]


@pytest.fixture(scope="module")
def plain(mixed):
    return train(mixed.settings("plain"))


def test_compiled_layers(mixed, plain):
    torch._dynamo.reset()
    compiled = train(mixed.settings("compiled", compile="aot_eager"))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())


def test_compiled_layers_are_not_built_anew_for_every_pack(tiny):
    """All layers and all combinations of lengths share a handful of graphs."""
    built = []

    def backend(graph, inputs):
        built.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny.model("sft")
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, dynamic=True)

    def step(lengths):
        ids = torch.randint(1, 200, (1, sum(lengths)))
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, 1, -1)
        model(input_ids=ids, labels=ids, cu_seqlens=bounds, position_ids=positions).loss.backward()

    step([5, 7])
    step([9, 4, 6])
    so_far = len(built)
    step([3, 3, 3, 20])
    step([31])
    assert 0 < len(built) == so_far < 10
    torch._dynamo.reset()


def test_the_fused_cross_entropy_takes_the_place_of_logits_in_training_only(mixed, plain, monkeypatch):
    called = []

    def loss(weight, hidden, targets):
        called.append(len(targets))
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)

    monkeypatch.setattr(acceleration, "use_liger", lambda asked, device: True)
    monkeypatch.setattr(acceleration, "liger_cross_entropy", lambda: loss)
    fused = train(mixed.settings("fused", data={"held_out": 4}, gauges={"every": 2}))
    assert called and losses(fused)[-1] > 0
    assert any("eval_answer_loss" in row for row in fused.history)  # the probe reads logits
    called.clear()
    assert losses(train(mixed.settings("fused-2"))) == pytest.approx(losses(plain), rel=1e-6) and called


def test_what_is_asked_for_and_not_there_is_refused(mixed, monkeypatch):
    with pytest.raises(ConfigError, match=r"compile: expected one of \[.*'inductor'.*\], got 'fast'"):
        train(mixed.settings("x", compile="fast"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(ConfigError, match="liger is not installed; pip install liger-kernel"):
        train(mixed.settings("x", fused_cross_entropy="liger"))
    assert not acceleration.use_liger("auto", torch.device("cuda"))
    monkeypatch.undo()
    assert not acceleration.use_liger("auto", torch.device("cpu")) and not acceleration.use_liger(
        "off", torch.device("cpu")
    )
