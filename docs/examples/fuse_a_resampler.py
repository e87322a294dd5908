"""Somebody else's model and training loop, faster by two lines: `python docs/examples/fuse_a_resampler.py`.

The model knows nothing of vreflection: a Perceiver-style resampler with learnable queries over padded image features, a
classifier on top, AdamW, cross-entropy. Run with and without the two lines, the losses agree; the second run is faster.
"""

import argparse
import time

import torch
from torch import nn

import vreflection as vr


class PerceiverClassifier(nn.Module):
    def __init__(self, width: int, queries: int = 8, classes: int = 10):
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(queries, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width))
        self.head = nn.Linear(width, classes)

    def forward(self, features: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        features = self.norm(features)
        queries = self.latents.expand(len(features), -1, -1)
        latents, _ = self.attention(queries, features, features, key_padding_mask=padding, need_weights=False)
        return self.head((latents + self.mlp(latents)).mean(1))


def train(fused: bool, width: int, tokens: int, steps: int) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = PerceiverClassifier(width)
    if fused:  # the two lines: this one, and the undo() below if the stock module is wanted back
        handle = vr.fuse(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    features, labels = torch.randn(4, tokens, width), torch.arange(4)
    padding = torch.arange(tokens) >= torch.tensor([[tokens], [tokens // 2], [tokens - 3], [tokens]])
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(features, padding), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    if fused:
        print("fused:", handle.calls)
        handle.undo()
    return losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    shape = (options.width, options.tokens, options.steps)
    (stock, stock_seconds), (fused, fused_seconds) = train(False, *shape), train(True, *shape)
    for step, (a, b) in enumerate(zip(stock, fused, strict=True)):
        print(f"step {step}: loss {a:.5f} stock, {b:.5f} fused")
    assert max(abs(a - b) for a, b in zip(stock, fused)) < 1e-3
    print(f"{stock_seconds:.2f} s stock, {fused_seconds:.2f} s fused: {stock_seconds / fused_seconds:.1f}x")


if __name__ == "__main__":
    main()
