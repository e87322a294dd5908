"""Hidden states of given answers: what would the model say at every place of this text, had the latents been others?

Shape suffixes: B answers, R inputs after the prompt, L prompt tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..engine.cache import cache_argument
from ..engine.requests import Prompt
from ..engine.steps import HostStep, eval_mode, masked_attention
from ..model.modeling import VReflectionForConditionalGeneration


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to go through again.

    Attributes:
        tokens: its ids. latent: per token, whether its position is a latent one.
        latents: `(positions, D)` states that the latent positions consume, in order.
        hide_images: no position after the prompt attends to image tokens.
    """

    tokens: Sequence[int]
    latent: Sequence[bool]
    latents: torch.Tensor
    hide_images: bool = False


class ForcedScorer:
    """Goes through several answers to one prompt, computing the prompt once."""

    def __init__(self, model: VReflectionForConditionalGeneration):
        self.model = model
        self.decoder = model.model.language_model
        self.cache_argument = cache_argument(type(self.decoder))

    @torch.no_grad()
    def hidden(self, prompt: Prompt, answers: Sequence[GivenAnswer]) -> list[torch.Tensor]:
        """Per answer `(len(tokens), D)`: the hidden state whose logits give each of its tokens."""
        with eval_mode(self.model):
            return self._hidden(prompt, answers)

    def _hidden(self, prompt: Prompt, answers: Sequence[GivenAnswer]) -> list[torch.Tensor]:
        embeds, positions = self._prompt(prompt)
        cache = DynamicCache(config=self.model.config.get_text_config())
        last = self._run(embeds, positions, cache, None)[0, -1]
        image = prompt.input_ids.to(embeds.device) == self.model.config.image_token_id
        first = int(positions.max()) + 1
        lengths: dict[int, list[int]] = {}
        for number, answer in enumerate(answers):
            lengths.setdefault(len(answer.tokens), []).append(number)
        found: list[torch.Tensor] = [last[None]] * len(answers)
        for length, numbers in lengths.items():
            if length < 2:
                continue
            inputs = torch.stack([self._inputs(answers[number]) for number in numbers])
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(numbers))
            places = torch.arange(first, first + length - 1, device=embeds.device).expand(3, len(numbers), -1)
            hidden = self._run(inputs, places, own, self._visible([answers[n] for n in numbers], image, length - 1))
            for number, rows in zip(numbers, hidden):
                found[number] = torch.cat([last[None], rows])
        return found

    def _prompt(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.device
        as_batch = lambda value: None if value is None else value.to(device)[None]  # noqa: E731
        plain = lambda value: None if value is None else value.to(device)  # noqa: E731
        positions = prompt.position_ids
        embeds, positions = self.model.prompt_inputs(
            as_batch(prompt.input_ids),
            pixel_values=plain(prompt.pixel_values),
            image_features=plain(prompt.image_features),
            image_grid_thw=plain(prompt.image_grid_thw),
            mm_token_type_ids=as_batch(prompt.mm_token_type_ids),
            position_ids=None if positions is None else positions[:, None].to(device),
        )
        return embeds, positions[-3:]

    def _inputs(self, answer: GivenAnswer) -> torch.Tensor:
        """`(R, D)`: what is consumed before each token but the first."""
        device = self.model.device
        ids = torch.tensor(list(answer.tokens[:-1]), device=device)
        embeds = self.model.get_input_embeddings()(ids)
        slots = torch.tensor(list(answer.latent[:-1]), device=device)
        wanted = int(slots.sum())
        if len(answer.latents) < wanted:
            raise ValueError(f"latents: expected {wanted} for the latent positions, got {len(answer.latents)}")
        embeds[slots] = answer.latents[:wanted].to(embeds)
        return embeds

    def _visible(self, answers: Sequence[GivenAnswer], image: torch.Tensor, rest: int) -> torch.Tensor:
        """`(B, 1, R, L + R)` bool: all before oneself, less the image where it is hidden."""
        length = len(image)
        column = torch.arange(length + rest, device=image.device)
        visible = (column <= column[length:, None]).expand(len(answers), 1, -1, -1).clone()
        hidden = torch.tensor([answer.hide_images for answer in answers], device=image.device)
        visible[..., :length] &= ~(hidden[:, None, None, None] & image)
        return visible

    def _run(self, embeds_BRD, positions, cache, visible) -> torch.Tensor:
        mask = None if visible is None else HostStep.full_mask(visible, embeds_BRD.dtype)
        with masked_attention(self.decoder, mask is not None):
            return self.decoder(
                inputs_embeds=embeds_BRD,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state
