"""`generate` with latent steps: prefill, the host model as a decode step on a static cache, and the results."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import ModelOutput

from ..decoding import DecodeRules, DecodeState, DecodeTrace, SamplingSettings, decode
from ..errors import ConfigError
from .layout import BatchLayout

if TYPE_CHECKING:
    from .modeling import VReflectionForConditionalGeneration

CACHE_STEP = 64  # cache lengths are multiples of this, so that few shapes ever occur
IGNORED_HOST_ARGUMENTS = {"use_cache", "synced_gpus", "tokenizer", "num_return_sequences", "num_beams"}


@dataclass
class LatentGenerateOutput(ModelOutput):
    """Result of `generate(return_dict_in_generate=True)`.

    Attributes:
        sequences: `(batch, prompt + new)` ids; rows that finished early are padded.
        latent_mask: `(batch, new)` bool, the latent positions.
        latents, probes: with `return_latents`, per row `(spans, N, D)`: states consumed by the slots, and hidden states
            at the slots, which the student's attention starts from.
        step_hidden: with `return_latents`, `(batch, new, D)` hidden states whose logits gave each new token.
    """

    sequences: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None
    latents: list[torch.Tensor] | None = None
    probes: list[torch.Tensor] | None = None
    step_hidden: torch.Tensor | None = None


class ModelStep:
    """The host model's own forward as a decode step, on a static key/value cache that grows by whole buckets.

    Under autocast (training) keys and values differ in dtype, which a static cache refuses: `static=False` takes the
    host's dynamic cache.
    """

    def __init__(
        self,
        model: VReflectionForConditionalGeneration,
        attention_mask: torch.Tensor,
        new_tokens: int,
        static: bool = True,
    ):
        self.model, self.decoder = model, model.model.language_model
        self.prompt_mask = attention_mask
        self.static = static
        self.used = 0
        self.allocate(attention_mask.shape[1] + new_tokens)

    def allocate(self, length: int) -> None:
        """A cache of at least `length`, holding what the present one holds."""
        self.capacity = -(-length // CACHE_STEP) * CACHE_STEP
        text_config = self.model.config.get_text_config()
        if not self.static:
            cache = self.cache if self.used else DynamicCache(config=text_config)
        else:
            cache = StaticCache(config=text_config, max_cache_len=self.capacity)
        if self.used and self.static:
            for new, old in zip(cache.layers, self.cache.layers):
                new.lazy_initialization(old.keys, old.values)
                new.keys[:, :, : self.used] = old.keys[:, :, : self.used]
                new.values[:, :, : self.used] = old.values[:, :, : self.used]
                new.cumulative_length.fill_(self.used)
        self.cache = cache
        batch, prompt = self.prompt_mask.shape
        ones = self.prompt_mask.new_ones(batch, self.capacity - prompt)
        # Later columns are ones: the causal mask hides what is not written yet.
        self.mask = torch.cat([self.prompt_mask, ones], dim=1)

    def consume(self, inputs_BLD: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Run inputs `(B, L, D)` at rope positions `(3, B, L)`; the last position's hidden state `(B, D)`."""
        length = inputs_BLD.shape[1]
        if self.used + length > self.capacity:
            self.allocate(max(self.used + length, self.capacity * 3 // 2))
        output = self.decoder(
            inputs_embeds=inputs_BLD,
            attention_mask=self.mask if self.static else self.mask[:, : self.used + length],
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.used += length
        return output.last_hidden_state[:, -1]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(token_ids)

    def forward(self, inputs_BD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.consume(inputs_BD[:, None], positions[None, :, None].expand(3, -1, 1))

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden_BD)


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, and back: gradient checkpointing in training mode would drop the cache."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class LatentGenerationMixin:
    """`generate` for models with latent steps."""

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: VReflectionForConditionalGeneration,  # pyright: ignore[reportGeneralTypeIssues]
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        *,
        latent_steps: int | None = None,
        allow_other_latent_steps: bool = False,
        latent_mode: str = "clean",
        force_latent: bool = False,
        latents: torch.Tensor | None = None,
        seed: int | None = None,
        streamer=None,
        return_dict_in_generate: bool = False,
        return_latents: bool = False,
        generation_config=None,
        **settings,
    ):
        """Generate answers with latent steps.

        Args:
            input_ids, attention_mask: `(batch, L)`, left-padded.
            pixel_values, image_grid_thw, mm_token_type_ids: from the processor; or `image_features` `(T, D)`.
            latent_steps: N per span; default the checkpoint's. Another number needs `allow_other_latent_steps`.
            latent_mode: `clean` or `parity` (see `vreflection.decoding.DecodeRules`).
            force_latent: start a span right after the prompt.
            latents: `(batch, N, D)` states to consume inside spans instead of the model's own, for interventions.
            seed: of the sampling generator.
            streamer: host-library streamer (batch 1); receives no latent positions in clean mode.
            return_dict_in_generate, return_latents: see `LatentGenerateOutput`.
            settings: `max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id,
                pad_token_id`; defaults from the generation config.

        Returns:
            `(batch, L + new)` ids, or a `LatentGenerateOutput`.

        Raises:
            ConfigError: unsupported settings, or another number of latent steps without the flag.
            ValueError: right-padded prompts, or images and prompt disagree.
        """
        resolved = resolve_settings(generation_config or self.generation_config, settings)
        steps, latents = resolve_latents(self, latent_steps, allow_other_latent_steps, latents, input_ids.shape[0])
        mask: torch.Tensor = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_prompt(input_ids, mask, streamer)
        expected_new = resolved.max_new_tokens + (steps if latent_mode == "clean" else 0)
        with eval_mode(self):
            step, hidden, positions = prefill(
                self, input_ids, mask, pixel_values, image_grid_thw, mm_token_type_ids, position_ids,
                image_features, expected_new,
            )  # fmt: skip
            rules = DecodeRules(
                latent_steps=steps,
                lvr_start_id=self.config.lvr_start_id,
                lvr_id=self.config.lvr_id,
                pad_id=resolved.pad_token_id,
                eos_ids=torch.tensor(resolved.eos_token_ids, dtype=torch.long, device=input_ids.device),
                output_mode=latent_mode,
                max_new_tokens=torch.full_like(input_ids[:, 0], resolved.max_new_tokens),
            )
            penalised = resolved.sampling.repetition_penalty != 1.0
            seen = seen_ids(input_ids, mask, self.config.get_text_config().vocab_size) if penalised else None
            if streamer is not None:
                streamer.put(input_ids.cpu())
            opened = input_ids[:, -1] == self.config.lvr_start_id
            trace = decode(
                step,
                DecodeState.after_prompt(input_ids[:, -1], hidden, positions, seen),
                rules,
                resolved.sampling,
                generator=None if seed is None else torch.Generator(input_ids.device).manual_seed(seed),
                forced_first=torch.where(opened, -1, self.config.lvr_start_id) if force_latent else None,
                latent_inputs=latents,
                record=return_latents,
                on_token=None if streamer is None else stream_to(streamer, latent_mode),
            )
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([input_ids, torch.stack(trace.tokens, dim=1)], dim=1)
        if not return_dict_in_generate:
            return sequences
        return collect(sequences, trace, steps, return_latents)


@dataclass(frozen=True)
class ResolvedSettings:
    sampling: SamplingSettings
    max_new_tokens: int
    eos_token_ids: list[int]
    pad_token_id: int


def resolve_settings(config, settings: dict) -> ResolvedSettings:
    """Generation settings from arguments over the generation config; what is not supported is refused by name."""
    known = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
    known |= {"eos_token_id", "pad_token_id"}
    for name in ("num_beams", "num_return_sequences"):
        if (settings.get(name) or 1) != 1:
            raise ConfigError(f"{name}: latent decoding supports 1, got {settings[name]}")
    unknown = {name for name, value in settings.items() if value is not None} - known - IGNORED_HOST_ARGUMENTS
    if unknown:
        raise ConfigError(f"generate: unsupported settings {sorted(unknown)}; supported: {sorted(known)}")

    def value(name, default):
        for candidate in (settings.get(name), getattr(config, name, None)):
            if candidate is not None:
                return candidate
        return default

    max_new_tokens = int(value("max_new_tokens", 512))
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    eos = value("eos_token_id", [])
    eos = [int(e) for e in eos] if isinstance(eos, (list, tuple)) else [int(eos)]
    do_sample = bool(value("do_sample", False))
    sampling = SamplingSettings(
        do_sample=do_sample,
        # The host's default top_k = 50 and the like matter only when sampling.
        temperature=float(value("temperature", 1.0)) if do_sample else 1.0,
        top_k=int(value("top_k", 0)) if do_sample else 0,
        top_p=float(value("top_p", 1.0)) if do_sample else 1.0,
        repetition_penalty=float(value("repetition_penalty", 1.0)),
    )
    pad = value("pad_token_id", eos[0] if eos else 0)
    return ResolvedSettings(sampling, max_new_tokens, eos, int(pad))


def resolve_latents(model, latent_steps, allow_other, latents, batch) -> tuple[int, torch.Tensor | None]:
    """Number of latent steps, and the states to feed where they are not the model's own."""
    config = model.config
    trained = 0 if config.traits.slot_input == "none" else config.num_latent_tokens
    steps = trained if latent_steps is None else latent_steps
    if steps != trained:
        if not allow_other:
            raise ConfigError(
                f"latent_steps: this checkpoint was trained with {trained}, got {steps}; models collapse when decoded "
                "with another number, pass allow_other_latent_steps=True to do it all the same"
            )
        warnings.warn(f"decoding with {steps} latent steps, trained with {trained}", stacklevel=4)
    if latents is not None:
        if latents.dim() != 3 or latents.shape[:2] != (batch, steps) or latents.shape[2] != config.hidden_width:
            raise ValueError(f"latents: expected ({batch}, {steps}, {config.hidden_width}), got {tuple(latents.shape)}")
    elif config.traits.slot_input == "embedding" and steps:
        latents = model.get_input_embeddings().weight[config.lvr_id].expand(batch, steps, -1)
    return steps, latents


def seen_ids(input_ids: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Ids that occur in each prompt, `(batch, V)` bool."""
    # Counting keeps a padding id that also occurs as a real token.
    counts = torch.zeros(input_ids.shape[0], vocabulary, dtype=torch.long, device=input_ids.device)
    return counts.scatter_add(1, input_ids, mask.long()) > 0


def check_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor, streamer) -> None:
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids: expected (batch, L) with L >= 1, got {tuple(input_ids.shape)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
        )
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be left-padded for decoding: the last column of attention_mask holds zeros")
    if streamer is not None and input_ids.shape[0] != 1:
        raise ConfigError(f"streamer: expected one prompt, got a batch of {input_ids.shape[0]}")


def prefill(
    model, input_ids, attention_mask, pixel_values, image_grid_thw, mm_token_type_ids, position_ids, image_features, new
):
    """Consume the prompts: `(step, last hidden state (B, D), next rope position (B,))`."""
    layout = BatchLayout.from_batch(model.config, input_ids, image_grid_thw=image_grid_thw, decoding=True)
    tokens = model.batch_tokens(pixel_values, image_features, image_grid_thw)
    embeds = model.embed(input_ids, tokens, layout)
    positions = model.positions(input_ids, position_ids, mm_token_type_ids, image_grid_thw, attention_mask, None)
    step = ModelStep(model, attention_mask, new)
    hidden = step.consume(embeds, positions)
    return step, hidden, positions[-3:].amax(dim=(0, 2)) + 1


def stream_to(streamer, latent_mode: str):
    def on_token(emitted: torch.Tensor, latent: torch.Tensor) -> None:
        if latent_mode == "parity" or not bool(latent[0]):
            streamer.put(emitted.cpu())

    return on_token


def collect(sequences: torch.Tensor, trace: DecodeTrace, steps: int, with_latents: bool) -> LatentGenerateOutput:
    latent_mask = torch.stack(trace.latent, dim=1)
    if not with_latents:
        return LatentGenerateOutput(sequences=sequences, latent_mask=latent_mask)
    step_hidden = torch.stack(trace.hidden, dim=1)
    fed = torch.stack(trace.fed, dim=1) if trace.fed else step_hidden[:, :0]
    fed_latent = torch.stack(trace.fed_latent, dim=1) if trace.fed_latent else latent_mask[:, :0]
    latents, probes = [], []
    for row, mask in enumerate(fed_latent):
        # Step t + 1's hidden state is what came out of consuming the input fed after step t.
        states = fed[row][mask], step_hidden[row, 1:][mask]
        whole = len(states[0]) // steps * steps if steps else 0
        for target, value in zip((latents, probes), states):
            target.append(value[:whole].view(-1, max(steps, 1), step_hidden.shape[2]))
    return LatentGenerateOutput(
        sequences=sequences, latent_mask=latent_mask, latents=latents, probes=probes, step_hidden=step_hidden
    )
