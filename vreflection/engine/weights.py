"""Have the parameters changed since a decoder last looked? What was computed with the old ones must not be reused."""

from __future__ import annotations

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .steps import hooked

_optimizer_steps = 0


def _count(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write without raising a tensor's version, so steps are counted as well.
register_optimizer_step_post_hook(_count)


class WeightWatch:
    """Compares a model's parameters with those of the last look.

    Sees parameters that were replaced, moved, changed in place or stepped by any torch optimizer of this process, and
    forward hooks that came or went; not writes through `.data` or by other libraries.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.places, self.values = self.look()

    def look(self) -> tuple[list, list]:
        places, values = [], []
        for part in self.model.modules():
            if hooked(part):
                places.append((id(part), 0))
            for p in part._parameters.values():
                if p is not None:
                    places.append((id(p), p.data_ptr()))
                    # Tensors made in inference mode carry no version.
                    values.append(0 if p.is_inference() else p._version)
        return places, [*values, _optimizer_steps]

    def changed(self) -> tuple[bool, bool]:
        """Whether parameters are elsewhere, and whether their values may differ, since the last call."""
        places, values = self.look()
        moved = places != self.places
        different = moved or values != self.values
        self.places, self.values = places, values
        return moved, different
