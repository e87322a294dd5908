"""Settings of one request: the caller's over the generation config's; what is not supported is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..decoding import MAX_END_IDS, SamplingSettings
from ..errors import ConfigError

IGNORED_HOST_ARGUMENTS = {"use_cache", "synced_gpus", "tokenizer", "num_return_sequences", "num_beams"}
SUPPORTED = {
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "min_new_tokens", "eos_token_id", "pad_token_id",
}  # fmt: skip


# Fields of the host library's generation config that say how to compute, or concern beams, which are refused: an answer
# does not depend on them. `return_dict_in_generate` is `generate`'s to honour.
WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config", "early_stopping", "length_penalty",
    "diversity_penalty", "num_beam_groups", "renormalize_logits", "remove_invalid_values", "use_mtp",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "bos_token_id",
    "decoder_start_token_id", "transformers_version", "return_dict_in_generate",
}  # fmt: skip
# Values, besides None, with which a field that is not supported asks for nothing.
NEUTRAL = {
    "num_beams": (1,), "num_return_sequences": (1,), "min_length": (0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1, 1.0),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({},),
    "stop_strings": ([],), "guidance_scale": (1, 1.0), "penalty_alpha": (0, 0.0), "constraints": ([],),
    "force_words_ids": ([],), "token_healing": (False,), "output_attentions": (False,),
    "output_hidden_states": (False,), "output_scores": (False,), "output_logits": (False,),
}  # fmt: skip
NEUTRAL_SAMPLING = {
    "typical_p": (1, 1.0), "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0), "top_h": (0, 0.0),
}  # fmt: skip


@dataclass(frozen=True)
class ResolvedSettings:
    sampling: SamplingSettings
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def resolve_settings(config, settings: dict) -> ResolvedSettings:
    """Settings from arguments over a generation config.

    Raises:
        ConfigError: unknown or impossible settings.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (settings.get(name) or 1) != 1:
            raise ConfigError(f"{name}: latent decoding supports 1, got {settings[name]}")
    unknown = {name for name, value in settings.items() if value is not None} - SUPPORTED - IGNORED_HOST_ARGUMENTS
    if unknown:
        raise ConfigError(f"generate: unsupported settings {sorted(unknown)}; supported: {sorted(SUPPORTED)}")

    def value(name, default):
        for candidate in (settings.get(name), getattr(config, name, None)):
            if candidate is not None:
                return candidate
        return default

    max_new_tokens = int(value("max_new_tokens", 512))
    if not 1 <= max_new_tokens < 2**31:
        raise ConfigError(f"max_new_tokens: expected at least 1 (and below 2^31), got {max_new_tokens}")
    eos: Any = value("eos_token_id", [])
    eos = eos.tolist() if isinstance(eos, torch.Tensor) else eos
    eos = tuple(int(e) for e in eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    if len(eos) > MAX_END_IDS:
        raise ConfigError(f"eos_token_id: expected at most {MAX_END_IDS} ids, got {len(eos)}")
    do_sample = bool(value("do_sample", False))
    check_fields(config, do_sample, limited=value("max_new_tokens", None) is not None)
    sampling = SamplingSettings(
        do_sample=do_sample,
        # The host's default top_k = 50 and the like matter only when sampling.
        temperature=float(value("temperature", 1.0)) if do_sample else 1.0,
        top_k=int(value("top_k", 0)) if do_sample else 0,
        top_p=float(value("top_p", 1.0)) if do_sample else 1.0,
        repetition_penalty=float(value("repetition_penalty", 1.0)),
        min_p=float(value("min_p", 0.0)) if do_sample else 0.0,
        frequency_penalty=float(value("frequency_penalty", 0.0)),
        presence_penalty=float(value("presence_penalty", 0.0)),
        logit_bias=tuple(sorted((int(token), float(bias)) for token, bias in value("logit_bias", {}).items())),
        min_new_tokens=int(value("min_new_tokens", 0)),
    )
    pad = value("pad_token_id", eos[0] if eos else 0)
    return ResolvedSettings(sampling, max_new_tokens, eos, int(pad))


def check_fields(config, do_sample: bool, limited: bool) -> None:
    """Refuse every field of a generation config that asks for something unsupported, as the same keyword would be.

    Args:
        limited: whether `max_new_tokens` is set, which goes before `max_length`.
    """
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        if value is None or name.startswith("_") or name in SUPPORTED | WITHOUT_EFFECT:
            continue
        if (name == "max_length" and limited) or (name in NEUTRAL_SAMPLING and not do_sample):
            continue
        neutral = (NEUTRAL | NEUTRAL_SAMPLING).get(name, ())
        if value not in neutral:
            instead = "set max_new_tokens instead" if name == "max_length" else f"set it to {(None, *neutral)[-1]!r}"
            raise ConfigError(f"generation config: {name}={value!r} is not supported by latent decoding; {instead}")


def resolve_latent_steps(config, latent_steps: int | None, allow_other: bool, stacklevel: int = 3) -> int:
    """Number of latents per span: the checkpoint's, or another one on explicit wish and with a warning."""
    trained = 0 if config.traits.slot_input == "none" else config.num_latent_tokens
    steps = trained if latent_steps is None else latent_steps
    if steps < 0:
        raise ValueError(f"latent_steps: expected at least 0, got {steps}")
    if steps != trained:
        if not allow_other:
            raise ConfigError(
                f"latent_steps: this checkpoint was trained with {trained}, got {steps}; models collapse when decoded "
                "with another number, pass allow_other_latent_steps=True to do it all the same"
            )
        warnings.warn(f"decoding with {steps} latent steps, trained with {trained}", stacklevel=stacklevel)
    return steps


SpanLatents = tuple[torch.Tensor | None, ...]


def resolve_latents(model, steps: int, latents: torch.Tensor | Sequence[torch.Tensor | None] | None):
    """What each span of one answer consumes, `(N, D)` per span or None for the model's own; None where all do.

    Args:
        latents: `(N, D)` for every span; `(S, N, D)`, or a sequence of `(N, D)` and None, span by span. An answer that
            opens more spans begins again with the first.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    config = model.config
    own: torch.Tensor | None = None
    if config.traits.slot_input == "embedding":
        own = model.get_input_embeddings().weight[config.lvr_id].detach().expand(steps, -1)
    if latents is None:
        return (own,) if own is not None and steps else None
    width = config.hidden_width
    one = (steps, width)
    if not isinstance(latents, Sequence):
        shape = tuple(latents.shape)
        if shape != one and not (len(shape) == 3 and shape[0] and shape[1:] == one):
            raise ValueError(f"latents: expected {one} for every span, or (spans, {steps}, {width}), got {shape}")
        spans: SpanLatents = (latents,) if shape == one else tuple(latents)
    else:
        spans = tuple(latents)
        shapes = [None if states is None else tuple(states.shape) for states in spans]
        if not spans or any(shape not in (None, one) for shape in shapes):
            raise ValueError(f"latents: expected {one} or None for each span, got {shapes}")
    if any(states is not None and not bool(states.isfinite().all()) for states in spans):
        raise ValueError("latents: expected finite numbers, got NaN or infinity")
    spans = tuple(own if states is None else states for states in spans)
    return spans if steps and any(states is not None for states in spans) else None


def latents_per_row(latents: torch.Tensor | Sequence | None, steps: int, width: int, batch: int) -> Sequence:
    """The `latents` of a batch, row by row, as `resolve_latents` takes them.

    Raises:
        ValueError: another shape.
    """
    if latents is None:
        return [None] * batch
    if not isinstance(latents, Sequence):
        shape = tuple(latents.shape)
        if len(shape) not in (3, 4) or shape[0] != batch or shape[-2:] != (steps, width):
            raise ValueError(
                f"latents: expected ({batch}, {steps}, {width}) or ({batch}, spans, {steps}, {width}), got {shape}"
            )
        return list(latents)
    if len(latents) != batch:
        raise ValueError(f"latents: expected {batch} entries, one per prompt, got {len(latents)}")
    return latents
