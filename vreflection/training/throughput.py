"""How fast a run goes: tokens and samples per second, peak memory, and the share of the device's peak it uses."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import nn

from .flops import device_peak, step_flops


class ThroughputMeter:
    """Counts what this process computed since the last reading.

    Model-flops utilisation counts the arithmetic the method needs (`flops.step_flops`), not what is recomputed under
    gradient checkpointing, over the device's dense bfloat16 peak; it is left out for devices whose peak is not known.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device, self.peak = model, device, device_peak(device)
        self.reset()

    def reset(self) -> None:
        self.started, self.tokens, self.samples, self.flops = time.perf_counter(), 0, 0, 0.0

    def note(self, batch: dict[str, Any]) -> None:
        """A micro-batch as the loader made it, still on the host."""
        bounds, mask = batch.get("cu_seqlens"), batch.get("attention_mask")
        if bounds is not None:
            lengths = bounds.diff().tolist()
        else:
            lengths = [batch["input_ids"].shape[1]] if mask is None else mask.sum(1).tolist()
        self.tokens += sum(lengths)
        self.samples += len(lengths)
        if self.peak is not None:
            supervised = int((batch["labels"] != -100).sum())
            patches = 0 if batch.get("pixel_values") is None else len(batch["pixel_values"])
            self.flops += step_flops(self.model, lengths, supervised, patches)

    def read(self) -> dict[str, float]:
        """`tokens_per_second`, `samples_per_second` (of this process), `peak_memory_gib`, `mfu`; starts anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        read = {
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak is not None:
            read["mfu"] = self.flops / seconds / self.peak
        self.reset()
        return read


def peak_memory(device: torch.device) -> int:
    """Largest memory held so far, in bytes: allocated on the device, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
