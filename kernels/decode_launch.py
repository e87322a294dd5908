"""Tile sizes and split counts of the decode kernels: pure Python, from shapes alone.

A decode step reads every weight once for one token per row, so it is as fast as memory allows if enough bytes are on
the way: programs x (num_stages - 1) x tile bytes should be a few MB on a device that moves 4 TB/s with a latency near
a microsecond. Nothing here imports triton or torch, or reads a device value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .launch import H200_MULTIPROCESSORS, PROGRAMS_PER_MULTIPROCESSOR, ceil_div, next_power_of_2

# Up to two rows are multiplied and added in float32; from three on they fill the N side of a tensor-core product.
MAX_ROWS_WITHOUT_DOT = 2
# From nine rows on, reading them once per tile (from L2) costs more than a few idle multiprocessors: wide tiles first.
FEW_ROWS = 8
MANY_ROWS_PROGRAMS = 0.75  # per multiprocessor
MAX_ROWS = 32  # rows per program; more rows become more programs that read the weights again
# One program reads this many keys faster than a second launch could add its parts (262 KB in 16 bits, near 2 us).
UNSPLIT_KEYS = 512
MAX_SPLITS = 64
MIN_HEAD_TILE = 16


@dataclass(frozen=True)
class ProductConfig:
    """How one product of a few rows with a weight (N, K) is cut.

    `columns` rows of the weight (of each weight, where two are read side by side) belong to one program, which walks K
    in steps of `depth`. `rows` is the padded batch: 1 or 2 multiply and add, 16 or 32 use `tl.dot`.
    """

    columns: int
    depth: int
    rows: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        sizes = (self.columns, self.depth, self.rows)
        if any(size < 1 or size & (size - 1) for size in sizes) or (self.dot and min(sizes) < 16):
            raise ValueError(
                f"ProductConfig: expected powers of two, all at least 16 where rows > {MAX_ROWS_WITHOUT_DOT}, got "
                f"columns={self.columns}, depth={self.depth}, rows={self.rows}; use ProductConfig.from_shape"
            )

    @property
    def dot(self) -> bool:
        return self.rows > MAX_ROWS_WITHOUT_DOT

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options. FP fusion is explicit because Triton 3.10 changes its default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    @property
    def tiles(self) -> dict[str, int]:
        return {
            "COLUMN_TILE": self.columns,
            "DEPTH_TILE": self.depth,
            "ROW_TILE": self.rows,
            "STAGES": self.num_stages,
        }

    @classmethod
    def from_shape(
        cls,
        family: str,
        rows: int,
        columns: int,
        element_size: int,
        multiprocessors: int = H200_MULTIPROCESSORS,
    ) -> ProductConfig:
        """The widest shipped tile of `family` that still fills the device, else the narrowest."""
        tiles = PRODUCT_TILES[family, "32" if element_size > 2 else "16"]
        padded = row_padding(rows)
        fitting = [tile for tile in tiles if tile.rows == padded]
        wanted = multiprocessors * (PROGRAMS_PER_MULTIPROCESSOR if rows <= FEW_ROWS else MANY_ROWS_PROGRAMS)
        return next((tile for tile in fitting if ceil_div(columns, tile.columns) >= wanted), fitting[-1])


def row_padding(rows: int) -> int:
    """Rows of a program for a batch: as they are without `tl.dot`, else the 16 or 32 that it accepts."""
    if rows <= MAX_ROWS_WITHOUT_DOT:
        return max(rows, 1)
    return 16 if rows <= 16 else MAX_ROWS


def product_programs(config: ProductConfig, rows: int, columns: list[int]) -> tuple[int, int]:
    """Grid: column tiles (no tile crosses from one weight to the next) by row blocks."""
    return sum(ceil_div(size, config.columns) for size in columns), ceil_div(rows, config.rows)


# Widest first. `linear` reads one weight, `pair` two side by side, `vocabulary` one with some 150,000 rows.
PRODUCT_TILES: dict[tuple[str, str], tuple[ProductConfig, ...]] = {
    ("linear", "16"): (
        ProductConfig(16, 256, 1, 4, 4),
        ProductConfig(8, 512, 1, 4, 4),
        ProductConfig(16, 256, 2, 4, 4),
        ProductConfig(8, 512, 2, 4, 4),
        ProductConfig(32, 128, 16, 4, 5),
        ProductConfig(16, 256, 16, 4, 5),
        ProductConfig(32, 128, 32, 4, 5),
        ProductConfig(16, 256, 32, 4, 5),
    ),
    ("linear", "32"): (
        ProductConfig(8, 256, 1, 4, 4),
        ProductConfig(8, 256, 2, 4, 4),
        ProductConfig(16, 32, 16, 4, 4),
        ProductConfig(32, 32, 32, 8, 4),
    ),
    ("pair", "16"): (
        ProductConfig(8, 256, 1, 4, 4),
        ProductConfig(8, 256, 2, 4, 4),
        ProductConfig(32, 64, 16, 4, 5),
        ProductConfig(64, 64, 32, 8, 4),
    ),
    ("pair", "32"): (
        ProductConfig(8, 128, 1, 4, 4),
        ProductConfig(8, 128, 2, 4, 4),
        ProductConfig(16, 32, 16, 4, 4),
        ProductConfig(16, 32, 32, 8, 4),
    ),
    ("vocabulary", "16"): (
        ProductConfig(32, 256, 1, 8, 4),
        ProductConfig(32, 256, 2, 8, 4),
        ProductConfig(64, 128, 16, 4, 4),
        ProductConfig(128, 64, 32, 8, 4),
    ),
    ("vocabulary", "32"): (
        ProductConfig(16, 256, 1, 8, 4),
        ProductConfig(16, 256, 2, 8, 4),
        ProductConfig(32, 64, 16, 4, 4),
        ProductConfig(32, 64, 32, 4, 4),
    ),
}


@dataclass(frozen=True)
class DecodeAttentionConfig:
    """How the keys of one row and key head are cut: `splits` programs, each in steps of `keys`."""

    keys: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        if self.keys < 16 or self.keys & (self.keys - 1) or not 1 <= self.splits <= MAX_SPLITS:
            raise ValueError(
                f"DecodeAttentionConfig: expected keys a power of two from 16 on and 1 to {MAX_SPLITS} splits, got "
                f"keys={self.keys}, splits={self.splits}; use DecodeAttentionConfig.from_shape"
            )

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def split_keys(self, extent: int) -> int:
        """Keys per split, whole steps; the last split also takes whatever lies past `extent`."""
        return ceil_div(ceil_div(max(extent, 1), self.splits), self.keys) * self.keys

    @classmethod
    @functools.lru_cache(maxsize=1024)  # asked once per layer and step
    def from_shape(
        cls,
        rows: int,
        kv_heads: int,
        extent: int,
        element_size: int,
        multiprocessors: int = H200_MULTIPROCESSORS,
    ) -> DecodeAttentionConfig:
        """The fewest splits that end soonest, one where a second launch costs more."""
        keys, num_warps, num_stages = ATTENTION_TILES["32" if element_size > 2 else "16"]
        limit = min(ceil_div(extent, keys), MAX_SPLITS) if extent > UNSPLIT_KEYS else 1

        def cost(splits: int) -> int:
            """Steps until the last program ends; one more step stands for what a program does before its first."""
            steps = ceil_div(ceil_div(extent, splits), keys)
            return waves(rows * kv_heads * ceil_div(extent, steps * keys), multiprocessors) * (steps + 1)

        best = min(range(1, limit + 1), key=cost)
        # Whole steps of keys may need fewer splits than were asked for.
        splits = ceil_div(extent, ceil_div(ceil_div(extent, best), keys) * keys)
        return cls(keys, splits, num_warps, num_stages)


def waves(programs: int, multiprocessors: int) -> int:
    """Rounds of programs on the device, two at a time on each multiprocessor."""
    return max(ceil_div(programs, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors), 1)


# keys per step, num_warps, num_stages
ATTENTION_TILES = {"16": (64, 4, 3), "32": (32, 4, 2)}


def head_tile(head_size: int) -> int:
    """Padded width of a head: a power of two that `tl.dot` accepts."""
    return max(next_power_of_2(head_size), MIN_HEAD_TILE)


def shipped_decode_configs() -> dict[str, tuple[ProductConfig, ...]]:
    """Every product tile a launcher may pick, by family and element size; attention's are `ATTENTION_TILES`."""
    return {f"{family}/{bits}": tiles for (family, bits), tiles in PRODUCT_TILES.items()}
