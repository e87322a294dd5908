"""What ends or skips a step on every process alike: values that are not finite, and signals to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import TrainingError

logger = logging.getLogger(__name__)


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose next step can be left out: weights, moments and step counts stay as they are."""

    skip_next = False

    def step(self, closure=None):
        if self.skip_next:
            self.skip_next = False
            return None
        return super().step(closure)


def any_rank(flags: torch.Tensor) -> list[bool]:
    """Which of the flags is set on any process; one small reduction and one wait for the device."""
    flags = flags.to(torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(value) for value in flags.tolist()]


class StopSignal:
    """SIGTERM and the first Ctrl-C end the run after the current step, with a checkpoint; a second Ctrl-C at once."""

    def __init__(self):
        self.received: int | None = None

    @contextmanager
    def listening(self, wanted: bool = True) -> Iterator[StopSignal]:
        """Handle the signals inside the block (in the main thread; elsewhere they cannot be handled)."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)


class StepGuard:
    """Decides, once per optimizer step and on all processes together, whether the step is taken.

    Args:
        max_bad_steps: skipped steps in a row after which the run ends.
    """

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.bad_in_a_row = 0
        self.skipped = 0
        self.micro_batches: list[tuple[torch.Tensor, list[str]]] = []

    def counts(self) -> dict[str, int]:
        """What a checkpoint keeps: a resumed run goes on counting."""
        return {"skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}

    def goes_on_from(self, counts: Mapping[str, int]) -> None:
        self.skipped, self.bad_in_a_row = counts.get("skipped", 0), counts.get("bad_in_a_row", 0)

    def note(self, loss: torch.Tensor, sources: list[str]) -> None:
        """Remember a micro-batch of this step; nothing is read from the device yet."""
        self.micro_batches.append((~torch.isfinite(loss.detach()), sources))

    def decide(self, grad_norm: torch.Tensor | float | None, stop: bool, step: int) -> tuple[bool, bool]:
        """Whether to skip the step, and whether any process was told to stop.

        Raises:
            TrainingError: too many bad steps in a row, on every process alike.
        """
        losses = torch.stack([flag for flag, _ in self.micro_batches])
        norm_bad = torch.zeros((), dtype=torch.bool, device=losses.device)
        if grad_norm is not None:
            norm_bad = ~torch.isfinite(torch.as_tensor(grad_norm, device=losses.device))
        told = torch.full((), stop, device=losses.device)
        loss_bad, gradient_bad, stopping = any_rank(torch.stack([losses.any(), norm_bad, told]))
        skip = loss_bad or gradient_bad
        if skip:
            self._report(losses.tolist(), loss_bad, step)
        self.micro_batches = []
        self.bad_in_a_row = self.bad_in_a_row + 1 if skip else 0
        self.skipped += skip
        if self.bad_in_a_row >= self.max_bad_steps:
            raise TrainingError(
                f"{self.bad_in_a_row} steps in a row had a loss or gradient that is not finite (the last is step "
                f"{step}); the log names the rows. Lower the learning rate, check these rows, or resume from an "
                "earlier checkpoint"
            )
        return skip, stopping

    def _report(self, losses: list[bool], loss_bad: bool, step: int) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if not loss_bad:
            rows = [source for _, sources in self.micro_batches for source in sources]
            logger.error("step %d skipped: the gradient is not finite; rank %d had rows %s", step, rank, rows)
            return
        rows = [source for bad, (_, sources) in zip(losses, self.micro_batches) if bad for source in sources]
        if rows or any(losses):
            logger.error("step %d skipped: the loss is not finite on rank %d, rows %s", step, rank, rows)
