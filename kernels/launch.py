"""Tile sizes, split counts and the byte/flop model of the Triton kernels: pure Python, from shapes alone.

Nothing here imports triton or reads a device value, so grids and workspaces are the same for every batch of a shape and
a launch can be captured in a CUDA graph. Every `(num_warps, num_stages)` a launcher may use is in `shipped_configs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

H200_MULTIPROCESSORS = 132
MAX_CELLS_PER_SIDE = 64
# Two programs per multiprocessor hide the latency of each other's loads.
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_DEPTH_SPLITS = 4


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class TileConfig:
    """Compile-time shape of one kernel: tokens (or keys) by channels, warps, pipeline stages."""

    tokens: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options. FP fusion is explicit because Triton 3.10 changes its default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Scores: tokens x channels per step. 64 tokens reach wgmma on sm_90; 128 halve the re-reads of the rows from L2.
SCORE_TILES_16BIT = (TileConfig(64, 64, 4, 4), TileConfig(128, 64, 8, 4))
SCORE_TILES_32BIT = (TileConfig(64, 32, 4, 2),)
# Context: tokens per step x channels per program.
CONTEXT_TILES_16BIT = (TileConfig(64, 128, 8, 3),)
CONTEXT_TILES_32BIT = (TileConfig(32, 64, 4, 2),)
# Token gradient: tokens x channels per program. 128 channels spill on sm_90, 4 warps on sm_80 (ptxas, triton 3.7.1).
TOKEN_GRADIENT_TILES_16BIT = (TileConfig(64, 64, 8, 2),)
TOKEN_GRADIENT_TILES_32BIT = (TileConfig(32, 64, 4, 2),)
# RoI-Align on the channels themselves: (unused) x channels, and tokens x channels for its transpose.
CELL_TILE = TileConfig(1, 128, 4, 2)
CELL_GRADIENT_TILE = TileConfig(32, 64, 4, 2)
# Kernels on scores, weights, cells and loss terms: small, no matrix product to pipeline.
ELEMENTWISE = TileConfig(1, 1, 4, 1)
# Grid axes after the first hold at most 65535 programs.
MAX_BOXES = 32768
MAX_PROGRAMS = 2**31
# Positions of tokens and keys are 32-bit numbers, those past the end of a last tile included.
MAX_TOKENS = 2**31 - 2**15


def row_tile(rows: int, limit: int = 128) -> int:
    """Query rows per program: a power of two that `tl.dot` accepts; more rows become more programs."""
    return min(max(next_power_of_2(rows), 16), limit)


def tile_slots(keys: int, boxes: int, tile: int) -> int:
    """Programs that cover every box in tiles of its own keys, whatever the boxes' sizes.

    Box b owns the slots from `key_offset // tile + b`. That leaves it at least `ceil(n / tile)` slots and needs no size
    of a single box; programs past a box's end return at once.
    """
    return keys // tile + boxes


def token_grid(tokens: int, depth: int, tile: TileConfig) -> tuple[int]:
    """Programs over every tile of tokens and channels, along the one axis that holds 2^31 - 1 of them.

    Raises:
        ValueError: more programs, or more tokens than 32-bit positions count.
    """
    programs = ceil_div(tokens, tile.tokens) * ceil_div(depth, tile.depth)
    if programs >= MAX_PROGRAMS or tokens > MAX_TOKENS:
        raise ValueError(
            f"tokens: expected at most {MAX_TOKENS} of them, and fewer than {MAX_PROGRAMS} tiles of {tile.tokens} x "
            f"{tile.depth}, got {tokens} tokens of width {depth}; split the pack"
        )
    return (programs,)


def chunk_slots(keys: int, chunk: int) -> int:
    """Workspace slots for boxes that need more than one chunk.

    A chunk that starts at packed key p uses slot `2 * (p // chunk) + (it is its box's first)`. Two chunks can only
    start within the same `chunk` keys as the last of one box and the first of the next, so no slot is used twice.
    """
    return 2 * (keys // chunk + 1)


@dataclass(frozen=True)
class AttentionConfig:
    """How one call of `attend` or `attend_backward` is cut into programs."""

    scores: TileConfig
    context: TileConfig
    token_gradient: TileConfig
    depth_splits: int  # partial score products per key tile, summed in order afterwards
    chunk: int  # keys per context program
    cell_rows: int = field(default=16)  # query rows per RoI sampling program

    def __post_init__(self):
        if self.depth_splits < 1 or self.chunk < 1 or self.chunk % self.context.tokens:
            raise ValueError(
                f"AttentionConfig: expected depth_splits >= 1 and chunk a positive multiple of {self.context.tokens} "
                f"keys, got depth_splits={self.depth_splits}, chunk={self.chunk}; use AttentionConfig.from_shape"
            )

    @classmethod
    def from_shape(
        cls,
        keys: int,
        rows: int,
        depth: int,
        element_size: int,
        multiprocessors: int = H200_MULTIPROCESSORS,
    ) -> AttentionConfig:
        """Choose tiles and splits so that even one small box gives every multiprocessor work."""
        wide = element_size > 2
        wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        score_tiles = SCORE_TILES_32BIT if wide else SCORE_TILES_16BIT
        row_blocks = ceil_div(rows, row_tile(rows))
        scores = next(
            (tile for tile in reversed(score_tiles) if ceil_div(keys, tile.tokens) * row_blocks >= wanted),
            score_tiles[0],
        )
        context = (CONTEXT_TILES_32BIT if wide else CONTEXT_TILES_16BIT)[0]
        return cls(
            scores=scores,
            context=context,
            token_gradient=(TOKEN_GRADIENT_TILES_32BIT if wide else TOKEN_GRADIENT_TILES_16BIT)[0],
            depth_splits=depth_splits(keys, row_blocks, depth, scores, wanted),
            chunk=chunk_keys(keys, row_blocks, depth, context, wanted),
        )

    def with_splits(self, depth_splits: int, chunk: int) -> AttentionConfig:
        return replace(self, depth_splits=depth_splits, chunk=chunk)


def depth_splits(keys: int, row_blocks: int, depth: int, tile: TileConfig, wanted: int) -> int:
    """How many programs share one key tile's score product along D."""
    tiles = max(ceil_div(keys, tile.tokens) * row_blocks, 1)
    enough_steps = max(depth // (4 * tile.depth), 1)  # below four steps a pipelined loop is mostly its prologue
    return max(min(ceil_div(wanted, tiles), MAX_DEPTH_SPLITS, enough_steps), 1)


def chunk_keys(keys: int, row_blocks: int, depth: int, tile: TileConfig, wanted: int) -> int:
    """Keys per context program: all of a box where the channels alone fill the device, else a balanced share."""
    columns = ceil_div(depth, tile.depth) * row_blocks
    chunks = max(ceil_div(wanted, columns), 1)
    share = ceil_div(max(keys, 1), chunks)
    floor = 4 * tile.tokens
    return max(ceil_div(share, tile.tokens) * tile.tokens, floor)


def loss_block(elements: int, step: int, programs: int = 1024) -> int:
    """Elements per program of the loss kernels: whole steps, few enough programs for one to add their sums."""
    return max(ceil_div(ceil_div(elements, programs), step), 1) * step


def shipped_configs() -> dict[str, tuple[TileConfig, ...]]:
    """Every tile, `num_warps` and `num_stages` a launcher may pick, by kernel family and element size."""
    return {
        "scores/16": SCORE_TILES_16BIT,
        "scores/32": SCORE_TILES_32BIT,
        "context/16": CONTEXT_TILES_16BIT,
        "context/32": CONTEXT_TILES_32BIT,
        "token_gradient/16": TOKEN_GRADIENT_TILES_16BIT,
        "token_gradient/32": TOKEN_GRADIENT_TILES_32BIT,
        "cells": (CELL_TILE,),
        "cell_gradient": (CELL_GRADIENT_TILE,),
        "elementwise": (ELEMENTWISE,),
    }


@dataclass(frozen=True)
class SpeedOfLight:
    """What an op must do at least: each input read once, each output written once.

    `moved` also counts every pass over the tokens and the score-sized intermediates, some of which stay in L2.
    """

    bytes: int
    moved: int
    flops: int
    token_passes: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def speed_of_light(
    op: str,
    *,
    keys: int,
    boxes: int,
    rows: int,
    depth: int,
    element_size: int,
    tokens: int | None = None,
    shared_rows: bool = True,
    map_heads: int = 0,
    cells: int = 0,
    taps: int = 0,
    rows_grad: bool = True,
    tokens_grad: bool = False,
) -> SpeedOfLight:
    """Byte and flop floor of one call.

    Args:
        op: `attend`, `attend_backward`, `roi_align` or `roi_align_backward`.
        keys: packed keys S. tokens: distinct tokens read (default: `keys`); in the backward ops also the gradient's T.
        cells, taps: cells per box C and taps per axis K of RoI-Align; 0 for windows.
        rows: query rows R (ignored by the roi_align ops).
    """
    tokens = keys if tokens is None else tokens
    row = depth * element_size
    if op in ("roi_align", "roi_align_backward"):
        moved = tokens * row + boxes * cells * row
        return SpeedOfLight(moved, moved, 2 * boxes * cells * taps * taps * depth, 1)
    if op not in ("attend", "attend_backward"):
        raise ValueError(f"op: expected attend, attend_backward, roi_align or roi_align_backward, got {op!r}")
    scores = 4 * keys * rows
    product = 2 * keys * rows * depth
    sampling = 4 * boxes * cells * rows * taps * taps
    row_bytes = (1 if shared_rows else boxes) * rows * row
    context_bytes = boxes * rows * row
    maps = 4 * keys * (rows // map_heads) if map_heads else 0
    cell_bytes = 4 * boxes * cells * rows
    if op == "attend":
        small = row_bytes + context_bytes + scores + maps + cell_bytes
        return SpeedOfLight(
            bytes=tokens * row + small,
            moved=2 * keys * row + small + 3 * scores,
            flops=2 * product + sampling,
            token_passes=2,
        )
    passes = 1 + rows_grad
    products = 1 + rows_grad + 2 * tokens_grad
    small = context_bytes + scores + maps + cell_bytes + row_bytes * (tokens_grad + rows_grad)
    written = tokens * row if tokens_grad else 0
    return SpeedOfLight(
        bytes=tokens * row + small + written,
        moved=passes * keys * row + small + written + 3 * scores,
        flops=products * product + sampling,
        token_passes=passes,
    )
