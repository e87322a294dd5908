"""Low-rank adapters (PEFT) inside our model: injected in place, saved alone, merged at the end."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..model.checkpoint import ADAPTER_FILE
from .settings import LoraSettings

# The vision tower has layers of the same names.
TARGETS = r"model\.language_model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"
MODULES = ("box_feature_resampler", "student_resampler")


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Put adapters on every linear layer of the language model and freeze the rest of it.

    The compression modules keep training in full where the stage trains them.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora.rank: adapters need PEFT; pip install 'vreflection[train]'") from error
    trainable = [p for name in MODULES for p in module_parameters(model, name) if p.requires_grad]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=TARGETS,
        trainable_token_indices=token_rows(model) if settings.token_rows else None,
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "trainable_tokens_delta" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for parameter in trainable:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()


def module_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(getattr(model, name).parameters()) if hasattr(model, name) else []


def token_rows(model) -> dict[str, list[int]]:
    """Rows of the latent tokens, in the embedding and, where it has weights of its own, the output head."""
    config = model.config
    rows = [config.lvr_start_id, config.lvr_id, config.lvr_latent_end_id, config.lvr_end_id]
    return {"embed_tokens": rows} if config.tie_word_embeddings else {"embed_tokens": rows, "lm_head": rows}


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def is_trained(name: str) -> bool:
    return "lora_" in name or "trainable_tokens_delta" in name or name.split(".")[0] in MODULES


def save_adapters(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Adapters and compression modules only; the base model's weights are where they were."""
    from safetensors.torch import save_file

    trained = {name: value.contiguous() for name, value in weights.items() if is_trained(name)}
    save_file(trained, folder / ADAPTER_FILE)
    model.config.save_pretrained(folder)  # pyright: ignore


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Read back what `save_adapters` wrote.

    Raises:
        CheckpointError: other adapters than the settings ask for.
    """
    from safetensors.torch import load_file

    if not (folder / ADAPTER_FILE).exists():
        raise CheckpointError(f"{folder}: expected {ADAPTER_FILE}, found none; was this run started without lora?")
    stored = load_file(folder / ADAPTER_FILE)
    expected = {name: value for name, value in model.state_dict().items() if is_trained(name)}
    wrong = sorted(set(stored) ^ set(expected)) or [n for n in stored if stored[n].shape != expected[n].shape]
    if wrong:
        raise CheckpointError(f"{folder}: the adapters are others than the settings ask for, such as {wrong[:3]}")
    model.load_state_dict(stored, strict=False)


def merge_adapters(model: nn.Module) -> None:
    """Fold the adapters into the weights: afterwards the model is a plain one again.

    Base weights are changed in their own dtype; in bfloat16 the sum is rounded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in list(model.named_modules()):
        layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if not isinstance(layer, BaseTunerLayer) or name.endswith("token_adapter"):
            continue
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    for name in MODULES:
        if hasattr(model, name):
            getattr(model, name).to(model.lm_head.weight.dtype)  # pyright: ignore
    del model.peft_config  # pyright: ignore
