"""What is done to the latents of an answer, and to which checkpoints it can be done.

Shape suffixes: N latents per span, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
            after the prompt attends to image tokens.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    steps: int | None = None
    hide_images: bool = False

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


def chosen_interventions(names: Sequence[str] | None, steps: Sequence[int] | None, config) -> list[Intervention]:
    """What to do to a checkpoint.

    Args:
        names: of `NAMES`; default all that change anything for its stage. steps: numbers of latent steps for `steps`;
            default half as many and twice as many as it was trained with.

    Raises:
        ConfigError: an unknown name, or one that does nothing to this stage.
    """
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise ConfigError(f"interventions: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
    kind, trained = config.traits.slot_input, config.num_latent_tokens
    if names is not None:
        idle = [n for n in names if kind not in (SLOTS if n == "steps" else REPLACED[n].needs)]
        if idle:
            why = "has no latent positions" if kind == "none" else "feeds every latent position the same embedding"
            raise ConfigError(
                f"interventions: {', '.join(idle)} would change nothing: a checkpoint of stage {config.stage!r} {why}; "
                "leave them out"
            )
    found = [REPLACED[n] for n in REPLACED if kind in REPLACED[n].needs and (names is None or n in names)]
    if kind in SLOTS and (names is None or "steps" in names):
        counts = sorted({trained // 2, 2 * trained} if steps is None else set(steps)) if trained else []
        if any(count < 1 for count in counts):
            raise ConfigError(f"steps: expected at least 1 (the intervention `skip` takes none), got {min(counts)}")
        found += [
            Intervention(f"steps_{count}", f"{count} latent steps instead of {trained}", SLOTS, steps=count)
            for count in counts
            if count != trained
        ]
    return found


def replaced_latents(
    name: str, own_ND: torch.Tensor, partner_ND: torch.Tensor | None, seed: int, ident: str
) -> torch.Tensor:
    """What the slots consume instead of the model's own states: `(N, D)`."""
    if name == "zero":
        return torch.zeros_like(own_ND)
    if name == "noise":
        # Of the question, so that the draw depends on neither order nor batch.
        digest = hashlib.blake2b(f"{seed}:{ident}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        noise = torch.randn(own_ND.shape, generator=generator)
        return noise * (own_ND.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    if name == "repeat":
        return own_ND[:1].expand_as(own_ND)
    if name == "swap" and partner_ND is not None:
        return partner_ND
    raise ValueError(f"{name}: expected an intervention that replaces latents")


def partners_of(answers: Sequence[str], images: Sequence[str], usable: Sequence[bool]) -> list[int | None]:
    """For each usable question the next usable one, cyclically, with another answer and on another image.

    Raises:
        ConfigError: some usable question has none.
    """
    count = len(answers)
    partners: list[int | None] = [None] * count
    for index in (i for i in range(count) if usable[i]):
        after = ((index + step) % count for step in range(1, count))
        partners[index] = next(
            (j for j in after if usable[j] and answers[j] != answers[index] and images[j] != images[index]), None
        )
        if partners[index] is None:
            raise ConfigError(
                f"interventions: swap needs questions with other answers on other images; question {index + 1} of "
                f"{count} has none that opened a span. Ask more, or leave swap out"
            )
    return partners


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
