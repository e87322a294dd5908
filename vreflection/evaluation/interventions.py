"""What is done to the latents of an answer, and to which checkpoints it can be done.

Shape suffixes: S spans of an answer, N latents per span, D width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from ..errors import ConfigError

OWN = "own"


@dataclass(frozen=True)
class Intervention:
    """One way to meddle.

    Attributes:
        name, label: for files, for tables. needs: the slot inputs of a checkpoint (`StageTraits.slot_input`) for which
            it changes anything. steps: latent positions per span, where others than trained. hide_images: no position
            after the prompt attends to image tokens. span: the only span that it changes, from 1; default every one.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    steps: int | None = None
    hide_images: bool = False
    span: int | None = None

    @property
    def kind(self) -> str:
        """The name without the span."""
        return self.name if self.span is None else ONE_SPAN.sub("", self.name)

    @property
    def own_latents(self) -> bool:
        """Whether the model makes its own latents under it."""
        return self.steps is not None or self.hide_images


LATENT_ONLY, SLOTS, ANY = ("latents",), ("latents", "embedding"), ("latents", "embedding", "none")
REPLACED = {
    "zero": Intervention("zero", "latents set to zero", SLOTS),
    "noise": Intervention("noise", "noise of the same norm", SLOTS),
    "swap": Intervention("swap", "another question's latents", LATENT_ONLY),
    "repeat": Intervention("repeat", "the first latent at every step", LATENT_ONLY),
    "skip": Intervention("skip", "no latent step, the boundary alone", SLOTS, steps=0),
    "image": Intervention("image", "image hidden after the prompt", ANY, hide_images=True),
}
NAMES = (*REPLACED, "steps")
# What can be done to one span alone, such as `swap_span_2`; later spans are the model's own again.
PER_SPAN = ("zero", "noise", "swap", "repeat")
ONE_SPAN = re.compile(r"_span_([1-9]\d*)$")


def chosen_interventions(names: Sequence[str] | None, steps: Sequence[int] | None, config) -> list[Intervention]:
    """What to do to a checkpoint.

    Args:
        names: of `NAMES`, or one of `PER_SPAN` with the number of a span, such as `swap_span_2`; default all of `NAMES`
            that change anything for its stage. steps: numbers of latent steps for `steps`; default half as many and
            twice as many as it was trained with.

    Raises:
        ConfigError: an unknown name, or one that does nothing to this stage.
    """
    single = [name for name in names or () if ONE_SPAN.sub("", name) in PER_SPAN and name not in NAMES]
    unknown = sorted(set(names or ()) - {*NAMES, *single})
    if unknown:
        raise ConfigError(
            f"interventions: expected some of {', '.join(NAMES)}, or {', '.join(PER_SPAN)} of one span such as "
            f"swap_span_2, got {', '.join(unknown)}"
        )
    kind, trained = config.traits.slot_input, config.num_latent_tokens
    if names is not None:
        idle = [n for n in names if kind not in (SLOTS if n == "steps" else REPLACED[ONE_SPAN.sub("", n)].needs)]
        if idle:
            why = "has no latent positions" if kind == "none" else "feeds every latent position the same embedding"
            raise ConfigError(
                f"interventions: {', '.join(idle)} would change nothing: a checkpoint of stage {config.stage!r} {why}; "
                "leave them out"
            )
    chosen = [REPLACED[n] for n in REPLACED if kind in REPLACED[n].needs and (names is None or n in names)]
    if kind in SLOTS and (names is None or "steps" in names):
        counts = sorted({trained // 2, 2 * trained} if steps is None else set(steps)) if trained else []
        if any(count < 1 for count in counts):
            raise ConfigError(f"steps: expected at least 1 (the intervention `skip` takes none), got {min(counts)}")
        chosen += [
            Intervention(f"steps_{count}", f"{count} latent steps instead of {trained}", SLOTS, steps=count)
            for count in counts
            if count != trained
        ]
    return chosen + sorted((of_one_span(name) for name in dict.fromkeys(single)), key=lambda one: (one.kind, one.span))


def of_one_span(name: str) -> Intervention:
    """Such as `swap_span_2`."""
    kind, _, number = name.rpartition("_span_")
    whole = REPLACED[kind]
    return replace(whole, name=name, label=f"{whole.label}, span {number} only", span=int(number))


def replaced_latents(
    kind: str, own_SND: torch.Tensor, partner_SND: torch.Tensor | None, seed: int, ident: str
) -> torch.Tensor:
    """What the slots of every span consume instead of the model's own states: `(S, N, D)`."""
    if kind == "zero":
        return torch.zeros_like(own_SND)
    if kind == "noise":
        # Of the question, so that the draw depends on neither order nor batch.
        digest = hashlib.blake2b(f"{seed}:{ident}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        noise = torch.stack([torch.randn(own_ND.shape, generator=generator) for own_ND in own_SND])
        return noise * (own_SND.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    if kind == "repeat":
        return own_SND[:, :1].expand_as(own_SND)
    if kind == "swap" and partner_SND is not None:
        return partner_SND
    raise ValueError(f"{kind}: expected an intervention that replaces latents")


def in_span(states_SND: torch.Tensor, span: int | None) -> torch.Tensor | list[torch.Tensor | None]:
    """What to ask the decoder for: these states in every span, or in one alone, the others left to the model."""
    if span is None:
        return states_SND
    # The list starts over after its end, which an answer with twice as many spans does not reach.
    spans = [states if number == span else None for number, states in enumerate(states_SND, 1)]
    return [*spans, *[None] * len(spans)]


def with_span_length(tokens: Sequence[int], latent: Sequence[bool], steps: int, lvr_id: int, start_id: int):
    """An answer's ids and latent flags with `steps` latent positions in every span."""
    new_tokens: list[int] = []
    new_latent: list[bool] = []
    for inside, group in groupby(zip(tokens, latent, strict=True), key=lambda pair: pair[1]):
        if inside:
            continue
        for token, _ in group:
            new_tokens.append(token)
            new_latent.append(False)
            if token == start_id:
                new_tokens += [lvr_id] * steps
                new_latent += [True] * steps
    return new_tokens, new_latent
