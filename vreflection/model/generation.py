"""`generate` with latent steps, in the host library's form, on the decode engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.utils import ModelOutput

from ..engine.decoder import LatentDecoder
from ..engine.requests import Generation, Prompt, Request
from ..engine.settings import latents_per_row, resolve_latent_steps, resolve_latents, resolve_settings
from ..errors import ConfigError
from .layout import BatchLayout

if TYPE_CHECKING:
    from .modeling import VReflectionForConditionalGeneration


@dataclass
class LatentGenerateOutput(ModelOutput):
    """Result of `generate(return_dict_in_generate=True)`.

    Attributes:
        sequences: `(batch, prompt + new)` ids; rows that finished early are padded.
        latent_mask: `(batch, new)` bool, the latent positions.
        latents, probes: with `return_latents`, per row `(spans, N, D)`: states that each span's slots consumed, given
            or the model's own, and hidden states that the student's attention starts from: at the slots, or before
            them (`probe_offset` of the configuration).
        step_hidden: with `return_latents`, `(batch, new, D)` hidden states whose logits gave each new token; zero after
            a row's end.
    """

    sequences: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None
    latents: list[torch.Tensor] | None = None
    probes: list[torch.Tensor] | None = None
    step_hidden: torch.Tensor | None = None


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
        latents: torch.Tensor | Sequence | None = None,
        seed: int | None = None,
        streamer=None,
        return_dict_in_generate: bool | None = None,
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
            latents: `(batch, N, D)` or `(batch, S, N, D)` states to consume inside spans instead of the model's own, or
                a list with one entry per prompt; see `LatentDecoder.request`.
            seed: row i draws from `seed + i`, whatever shares the batch; default from torch's own generator.
            streamer: host-library streamer (batch 1); receives no latent positions in clean mode.
            return_dict_in_generate: whether to return a `LatentGenerateOutput`; default from the generation config.
            return_latents: whether it holds latents, probes and hidden states.
            settings: `max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id,
                pad_token_id`; defaults from the generation config.

        Returns:
            `(batch, L + new)` ids, or a `LatentGenerateOutput`.

        Raises:
            ConfigError: unsupported settings, or another number of latent steps without the flag.
            ValueError: right-padded prompts, or images and prompt disagree.
        """
        generation_config = generation_config or self.generation_config
        resolved = resolve_settings(generation_config, settings)
        if return_dict_in_generate is None:
            return_dict_in_generate = bool(getattr(generation_config, "return_dict_in_generate", False))
        steps = resolve_latent_steps(self.config, latent_steps, allow_other_latent_steps, stacklevel=4)
        row_latents = [
            resolve_latents(self, steps, one)
            for one in latents_per_row(latents, steps, self.config.hidden_width, input_ids.shape[0])
        ]
        mask: torch.Tensor = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_prompt(input_ids, mask, streamer)
        first_seed = int(torch.randint(2**62, ())) if seed is None else seed
        decoder = LatentDecoder(
            self, max_batch_size=input_ids.shape[0], tier="eager", latent_mode=latent_mode, share_prefixes=False
        )
        embeds, positions = self.prompt_inputs(
            input_ids, mask, pixel_values, image_grid_thw, mm_token_type_ids, position_ids, image_features
        )
        requests = []
        for row, keep in enumerate(mask.bool()):
            prompt = Prompt(input_ids[row, keep].cpu(), positions[-3:, row, keep], embeds=embeds[row, keep])
            requests.append(
                Request(
                    prompt,
                    resolved.sampling,
                    resolved.max_new_tokens,
                    resolved.eos_token_ids,
                    steps,
                    first_seed + row,
                    force_latent,
                    row_latents[row],
                    return_latents,
                )  # fmt: skip
            )
        span = steps if decoder.rules.clean else 0
        decoder.make_room(input_ids.shape[1] + resolved.max_new_tokens + span)
        if streamer is None:
            answers = decoder.generate(requests)
        else:
            answers = [stream_one(decoder, requests[0], streamer, input_ids)]
        output = collect(input_ids, answers, resolved.pad_token_id, return_latents, self.config.hidden_width)
        return output if return_dict_in_generate else output.sequences

    def prompt_inputs(
        self: VReflectionForConditionalGeneration,  # pyright: ignore[reportGeneralTypeIssues]
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the language model consumes for prompts `(batch, L)`.

        Returns:
            embeddings `(batch, L, D)` with the visual tokens in their places, and rope positions `(3, batch, L)`.
        """
        layout = BatchLayout.from_batch(self.config, input_ids, image_grid_thw=image_grid_thw, decoding=True)
        tokens = self.batch_tokens(pixel_values, image_features, image_grid_thw)
        positions = self.positions(input_ids, position_ids, mm_token_type_ids, image_grid_thw, attention_mask, None)
        return self.embed(input_ids, tokens, layout), positions


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


def stream_one(decoder: LatentDecoder, request: Request, streamer, input_ids: torch.Tensor) -> Generation:
    """Decode one prompt, telling a host-library streamer every token; in clean mode no latent positions."""
    streamer.put(input_ids.cpu())
    answer = None
    for event in decoder.stream([request]):
        if not (event.latent and decoder.rules.clean):
            streamer.put(torch.tensor([event.token]))
        answer = event.generation
    streamer.end()
    assert answer is not None
    return answer


def collect(
    input_ids: torch.Tensor, answers: list[Generation], pad_id: int, with_latents: bool, width: int
) -> LatentGenerateOutput:
    """Rows of different lengths as padded tensors."""
    longest = max(len(answer.tokens) for answer in answers)
    rows = [answer.tokens + [pad_id] * (longest - len(answer.tokens)) for answer in answers]
    flags = [answer.latent + [False] * (longest - len(answer.latent)) for answer in answers]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    output = LatentGenerateOutput(
        sequences=torch.cat([input_ids, new], dim=1), latent_mask=torch.tensor(flags, device=input_ids.device)
    )
    if with_latents:
        found = [(a.latents, a.probes, a.step_hidden) for a in answers]
        latents, probes, hidden = zip(*found)
        output.latents, output.probes = list(latents), list(probes)
        output.step_hidden = torch.nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    return output
