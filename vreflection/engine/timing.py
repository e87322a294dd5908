"""Steps without prompts, for benchmarks: a decoder's rows filled with random cache content."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..decoding import DecodeProgram, DecodeState, ProgramKey
from .decoder import LatentDecoder


class TimedSteps:
    """Rows that never end, on a decoder that answers nothing meanwhile.

    Args:
        decoder: idle; what it has cached of earlier prompts is dropped, and its rows are free again after `close`.
    """

    def __init__(self, decoder: LatentDecoder):
        if decoder.busy:
            raise RuntimeError("the decoder is busy; finish its requests first")
        self.decoder, self.lengths = decoder, []

    def start(self, lengths: Sequence[int]) -> None:
        """Fill the first rows with random keys and values.

        Args:
            lengths: keys per row, at most `max_batch_size` of them.
        """
        decoder = self.decoder
        state, count = decoder.buffers.state, len(lengths)
        decoder.forget()
        with torch.inference_mode():
            decoder.make_room(max(lengths) + 1)
            for tensor in (*decoder.cache.keys, *decoder.cache.values):
                tensor.normal_()
            idle = DecodeState.idle(decoder.max_batch_size, decoder.width, decoder.dtype, decoder.device)
            for target, value in zip(state.tensors(), idle.tensors()):
                target.copy_(value)
            far = torch.iinfo(torch.int64).max
            state.max_new_tokens.fill_(far)
            state.capacity.fill_(far)
            state.end_ids.fill_(-1)
            state.latent_steps.fill_(0)
            state.length[:count] = torch.tensor(lengths, device=decoder.device)
            state.position.copy_(state.length)
            state.finished[:count] = False
            state.z.normal_()
        decoder.prefill.dirty = [decoder.cache.columns] * decoder.max_batch_size
        self.lengths = list(lengths)

    def run(self, count: int, latent: bool = False) -> None:
        """Take steps, reading nothing back.

        Args:
            count: steps, at most as many as the decoder's ring holds.
            latent: as one latent span, which picks no token; else as single text steps.
        """
        decoder = self.decoder
        ring = decoder.buffers.emitted.shape[0]
        if not 1 <= count <= ring:
            raise ValueError(f"count: expected 1 to {ring} steps, got {count}")
        with torch.inference_mode():
            decoder.buffers.state.mode.fill_(latent)
            decoder.buffers.state.remaining.fill_(count + 1 if latent else 0)
            rows, extent = decoder.bucket(len(self.lengths)), decoder.extent(max(self.lengths) + count)
            key = ProgramKey(rows, extent, steps=count if latent else 1, text=not latent)
            if key not in decoder.programs:
                decoder.programs[key] = DecodeProgram(decoder.step, decoder.buffers, decoder.rules, key)
            decoder.buffers.rewind()
            decoder.tier.run(decoder.programs[key], 1 if latent else count)
        self.lengths = [length + count for length in self.lengths]

    def close(self) -> None:
        with torch.inference_mode():
            self.decoder.buffers.state.finished.fill_(True)
