"""Grids, splits and the byte model: pure Python, no triton."""

import itertools
import subprocess
import sys

import pytest
import torch

SHAPES = list(itertools.product((1, 63, 1023, 5120, 20480, 300_000), (1, 8, 64, 200), (16, 37, 3584), (2, 4)))


@pytest.fixture
def launch(oracle):
    return oracle.kernel_module("launch")


@pytest.fixture
def decode_launch(oracle):
    return oracle.kernel_module("decode_launch")


def owners(launch, counts, tile):
    """Tiles per box as the device finds them: box b owns the slots from key_offset // tile + b."""
    offsets = [sum(counts[:box]) for box in range(len(counts))]
    starts = [offset // tile + box for box, offset in enumerate(offsets)] + [
        launch.tile_slots(sum(counts), len(counts), tile)
    ]
    return [end - start for start, end in zip(starts, starts[1:])]


@pytest.mark.parametrize("tile", [1, 7, 64, 128, 1024])
def test_tile_slots_cover_every_box(launch, tile):
    generator = torch.Generator().manual_seed(tile)
    for _ in range(200):
        boxes = int(torch.randint(1, 9, (), generator=generator))
        counts = torch.randint(1, 4 * tile + 2, (boxes,), generator=generator).tolist()
        for count, slots in zip(counts, owners(launch, counts, tile)):
            assert slots >= launch.ceil_div(count, tile)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_of_split_boxes_never_share_a_workspace_slot(launch, chunk):
    generator = torch.Generator().manual_seed(chunk)
    for _ in range(200):
        counts = torch.randint(1, 4 * chunk + 2, (12,), generator=generator).tolist()
        used, offset = [], 0
        for count in counts:
            if count > chunk:
                used += [2 * ((offset + begin) // chunk) + (begin == 0) for begin in range(0, count, chunk)]
            offset += count
        assert len(set(used)) == len(used)
        assert all(slot < launch.chunk_slots(offset, chunk) for slot in used)


@pytest.mark.parametrize("keys, rows, depth, element_size", SHAPES)
def test_every_choice_is_a_shipped_config(launch, keys, rows, depth, element_size):
    config = launch.AttentionConfig.from_shape(keys, rows, depth, element_size)
    shipped = launch.shipped_configs()
    bits = "32" if element_size == 4 else "16"
    assert config.scores in shipped[f"scores/{bits}"]
    assert config.context in shipped[f"context/{bits}"]
    assert config.token_gradient in shipped[f"token_gradient/{bits}"]
    steps = launch.ceil_div(depth, config.scores.depth)
    assert 1 <= config.depth_splits <= min(steps, launch.MAX_DEPTH_SPLITS)
    assert config.chunk % config.context.tokens == 0
    # Workspace of the split sums: bounded by the number of programs, not by the keys.
    columns = launch.ceil_div(depth, config.context.depth)
    chunks = launch.ceil_div(keys, config.chunk)
    assert chunks * columns <= 2 * launch.PROGRAMS_PER_MULTIPROCESSOR * launch.H200_MULTIPROCESSORS or chunks == 1


@pytest.mark.parametrize("keys", [1024, 5120, 20480])
def test_one_image_fills_the_device(launch, keys):
    config = launch.AttentionConfig.from_shape(keys, 64, 3584, 2)
    tiles = launch.ceil_div(keys, config.scores.tokens)
    wanted = launch.H200_MULTIPROCESSORS if keys > 1024 else 64
    assert tiles * config.depth_splits >= wanted
    chunks = launch.ceil_div(keys, config.chunk)
    assert chunks * launch.ceil_div(3584, config.context.depth) >= min(wanted, 100)


def test_large_inputs_use_large_score_tiles(launch):
    assert launch.AttentionConfig.from_shape(100_000, 64, 3584, 2).scores.tokens == 128
    assert launch.AttentionConfig.from_shape(1024, 64, 3584, 2).scores.tokens == 64


@pytest.mark.parametrize("rows, tile", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (128, 128), (300, 128)])
def test_row_tile(launch, rows, tile):
    assert launch.row_tile(rows) == tile
    assert launch.ceil_div(rows, tile) * tile >= rows


def test_grids_stay_inside_the_launch_limits(launch):
    """First grid axis below 2^31, the others below 2^16, for a million tokens."""
    config = launch.AttentionConfig.from_shape(1_000_000, 64, 3584, 2)
    assert launch.tile_slots(1_000_000, 1000, config.scores.tokens) < 2**31
    assert launch.tile_slots(1_000_000, 1000, config.chunk) < 2**16
    for tile in (config.token_gradient, launch.CELL_GRADIENT_TILE):
        for tokens in (1_000_000, 300_000_000):  # past what a second axis would hold
            (programs,) = launch.token_grid(tokens, 3584, tile)
            assert programs * tile.tokens * tile.depth >= tokens * 3584 and programs < 2**31
        with pytest.raises(ValueError, match="expected at most 2147450880 of them, .* split the pack"):
            launch.token_grid(2**31, 8, tile)


def test_bad_config_names_the_fix(launch):
    with pytest.raises(ValueError, match="use AttentionConfig.from_shape"):
        launch.AttentionConfig.from_shape(100, 8, 64, 2).with_splits(0, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        launch.AttentionConfig.from_shape(100, 8, 64, 2).with_splits(1, 65)


def test_speed_of_light_of_the_measured_case(launch):
    """5120 tokens of width 3584 in bf16: 37 MB, two passes; 64 rows are 56 times fewer flops than projecting."""
    sol = launch.speed_of_light("attend", keys=5120, boxes=1, rows=64, depth=3584, element_size=2)
    assert sol.token_passes == 2
    assert 5120 * 3584 * 2 < sol.bytes < 1.1 * 5120 * 3584 * 2
    assert sol.moved > 2 * 5120 * 3584 * 2
    assert sol.flops == 4 * 64 * 5120 * 3584
    assert (4 * 5120 * 3584**2) / sol.flops == 56
    assert sol.seconds(4.3e12, 790e12) == pytest.approx(sol.bytes / 4.3e12)
    backward = launch.speed_of_light(
        "attend_backward", keys=5120, boxes=1, rows=64, depth=3584, element_size=2, tokens_grad=True
    )
    assert backward.flops == 2 * sol.flops
    assert backward.bytes > 2 * 5120 * 3584 * 2
    with pytest.raises(ValueError, match="expected attend"):
        launch.speed_of_light("attention", keys=1, boxes=1, rows=1, depth=1, element_size=2)


# Model width, intermediate width, query heads, key heads, head width, vocabulary.
DECODERS = {"7b": (3584, 18944, 28, 4, 128, 152064), "3b": (2048, 11008, 16, 2, 128, 151936)}


def decode_products(name):
    """(family, columns) of every product of a decode step."""
    width, intermediate, heads, kv_heads, head, vocabulary = DECODERS[name]
    yield "linear", (heads + 2 * kv_heads) * head
    yield "linear", width
    yield "pair", intermediate
    yield "vocabulary", vocabulary


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 32])
@pytest.mark.parametrize("name", DECODERS)
def test_decode_products_fill_the_device(decode_launch, launch, name, rows):
    """Programs for nearly every multiprocessor, and enough bytes on the way to cover a microsecond at 4 TB/s."""
    for family, columns in decode_products(name):
        config = decode_launch.ProductConfig.from_shape(family, rows, columns, 2)
        assert config.rows >= min(rows, decode_launch.MAX_ROWS) and config.dot == (rows > 2)
        assert config in decode_launch.shipped_decode_configs()[f"{family}/16"]
        tiles, blocks = decode_launch.product_programs(config, rows, [columns])
        assert blocks == 1 and tiles * config.columns >= columns
        assert tiles >= 0.75 * launch.H200_MULTIPROCESSORS * (1 if rows > 2 else 2), (family, columns)
        per_program = (config.num_stages - 1) * config.columns * config.depth * 2 * (2 if family == "pair" else 1)
        resident = min(tiles, launch.H200_MULTIPROCESSORS * (200 * 1024 // per_program))
        assert resident * per_program >= 3.5e6, (family, columns, config)


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("family", ["linear", "pair", "vocabulary"])
def test_decode_tiles_exist_for_every_batch(decode_launch, family, rows, element_size):
    for columns in (1, 60, 4000, 152064):
        config = decode_launch.ProductConfig.from_shape(family, rows, columns, element_size)
        tiles, blocks = decode_launch.product_programs(config, rows, [columns, 1])
        assert tiles == -(-columns // config.columns) + 1 and (blocks - 1) * config.rows < rows <= blocks * config.rows
        assert blocks < 2**16


@pytest.mark.parametrize("rows, kv_heads", [(1, 4), (1, 2), (8, 4), (17, 4), (32, 4), (1, 1)])
@pytest.mark.parametrize("extent", [1, 16, 512, 513, 2048, 5000, 32768])
def test_decode_attention_splits_cover_the_extent(decode_launch, launch, rows, kv_heads, extent):
    config = decode_launch.DecodeAttentionConfig.from_shape(rows, kv_heads, extent, 2)
    share = config.split_keys(extent)
    assert share % config.keys == 0
    assert (config.splits - 1) * share < extent <= config.splits * share, "a split without keys, or keys without one"
    if extent <= decode_launch.UNSPLIT_KEYS:
        assert config.splits == 1
    else:
        programs, steps = config.splits * rows * kv_heads, share // config.keys
        for splits in range(1, min(decode_launch.MAX_SPLITS, -(-extent // config.keys)) + 1):
            other = decode_launch.DecodeAttentionConfig(config.keys, splits, 4, 3).split_keys(extent) // config.keys
            others = rows * kv_heads * -(-extent // (other * config.keys))
            waves = [decode_launch.waves(count, launch.H200_MULTIPROCESSORS) for count in (programs, others)]
            assert waves[0] * (steps + 1) <= waves[1] * (other + 1), f"{splits} splits would end before {config.splits}"


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("extent", [5064, 16064])
def test_long_caches_fill_the_device(decode_launch, launch, kv_heads, extent):
    for rows in range(1, 33):
        config = decode_launch.DecodeAttentionConfig.from_shape(rows, kv_heads, extent, 2)
        programs = config.splits * rows * kv_heads
        slots = decode_launch.waves(programs, launch.H200_MULTIPROCESSORS) * 2 * launch.H200_MULTIPROCESSORS
        assert programs >= 0.75 * slots or config.split_keys(extent) <= 4 * config.keys, (rows, config)


def test_bad_decode_configs_name_the_fix(decode_launch):
    with pytest.raises(ValueError, match="use ProductConfig.from_shape"):
        decode_launch.ProductConfig(8, 64, 16, 4, 3)
    with pytest.raises(ValueError, match="powers of two"):
        decode_launch.ProductConfig(12, 64, 1, 4, 3)
    with pytest.raises(ValueError, match="use DecodeAttentionConfig.from_shape"):
        decode_launch.DecodeAttentionConfig(64, 65, 4, 3)


def test_launch_imports_without_triton(oracle):
    code = (
        "import importlib.util, sys; sys.modules['triton'] = None\n"
        f"spec = importlib.util.spec_from_file_location('launch', {str(oracle.KERNELS / 'launch.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['launch'] = module\n"
        "spec.loader.exec_module(module); module.shipped_configs(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_kernel_reads_a_device_value_on_the_host_or_uses_atomics(oracle):
    for path in oracle.KERNELS.glob("*.py"):
        text = path.read_text()
        for forbidden in (".item(", ".tolist(", ".cpu(", "synchronize(", "atomic_"):
            assert forbidden not in text, f"{path.name} contains {forbidden}"
