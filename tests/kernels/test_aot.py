"""Every kernel compiled for GPUs that need not be there: spills, shared memory, load width, tensor cores, fp64."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="needs triton to compile")

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile"),
]
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The decode kernels put fewer than the 64 rows of `wgmma` on the M side where more would leave multiprocessors idle.
ANY_MATRIX_INSTRUCTION = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# The streaming kernels must not spill in 16 bits. In the others ptxas (it varies with its version) trades up to
# eight words of stack for occupancy.
STREAMING = ("_region_scores_kernel", "_region_context_kernel")
STACK_LIMIT = 32
PLAIN_LAUNCH = {"OVERLAP": False}
DECODE_STREAMING = re.compile(
    "_(norm_linear|linear_add|norm_gate_up|rope_attention|lm_head_pick|lm_head_logits)_kernel"
)
# Of the 7B model: width 3584, 8 heads x 8 queries, so these are multiples of 16 at run time as well.
DIVISIBLE = {"num_rows", "depth", "token_stride", "row_stride", "chunk", "size", "block", "latent_size", "queries"}
DIVISIBLE |= {"x_stride", "out_stride", "residual_stride", "seen_stride", "qkv_stride", "rope_stride", "columns"}
DIVISIBLE |= {f"{name}_{part}" for name in ("columns", "biases") for part in range(3)}
DIVISIBLE |= {f"{name}_{axis}" for name in ("key", "value") for axis in ("row", "head", "column")}
POINTERS = {
    "spans": "i64",
    "tap_index": "i64",
    "key_index": "i64",
    "key_box": "i32",
    **dict.fromkeys(("tokens", "rows", "grad_context", "grad", "latents", "targets"), "token"),
    **dict.fromkeys(("grad_latents", "grad_targets"), "token"),
    **dict.fromkeys(("partial", "weights", "grad_maps", "peak", "total", "scores", "maps", "workspace"), "fp32"),
    **dict.fromkeys(("cells", "tap_weight", "grad_scores", "student_maps", "teacher_maps"), "fp32"),
    **dict.fromkeys(("grad_student", "grad_mse", "grad_kl", "mse_out", "kl_out"), "fp32"),
    **dict.fromkeys(("x", "norm_weight", "weight", "gate", "up", "residual", "qkv", "keys", "values"), "token"),
    **{f"{name}_{part}": "token" for name in ("weight", "bias") for part in range(3)},
    **dict.fromkeys(("cos", "sin", "statistics", "penalty", "temperature", "value", "value_out"), "fp32"),
    **dict.fromkeys(("needed", "seen", "sample"), "i1"),
    **dict.fromkeys(("lengths", "key", "token"), "i64"),
    **dict.fromkeys(("index", "index_out"), "i32"),
}
FLOATS = {"eps", "mse_scale", "kl_scale"}
# `out` holds scores in these, tokens in the others.
WIDE_OUTPUT = re.compile("_region_(scores|statistics|normalise|sample|splat)_kernel|_lm_head_logits_kernel")
ROWS = 64


def cases(launch):
    """(module, kernel, constexprs, config, what to expect) of every shipped variant; see `launch.shipped_configs`."""
    shipped = launch.shipped_configs()
    for kind in ("bf16", "fp32"):
        bits = kind[-2:]
        for tile in shipped[f"scores/{bits}"]:
            constants = {"KEY_TILE": tile.tokens, "DEPTH_TILE": tile.depth, "ROW_TILE": ROWS}
            yield "region_scores", "_region_scores_kernel", constants, tile, kind, "dot"
        for tile in shipped[f"context/{bits}"]:
            for packed in (False, True):
                constants = {"KEY_STEP": tile.tokens, "DEPTH_TILE": tile.depth, "ROW_TILE": ROWS, "PACKED": packed}
                yield "region_context", "_region_context_kernel", constants, tile, kind, "dot"
        for tile in shipped[f"token_gradient/{bits}"]:
            constants = {"TOKEN_TILE": tile.tokens, "DEPTH_TILE": tile.depth, "ROW_TILE": ROWS, "BOX_STEP": 128}
            yield "region_context", "_token_gradient_kernel", constants, tile, kind, "dot"
        for tile in shipped["cells"]:
            yield "roi_align", "_roi_align_kernel", {"SIDE_TILE": 8, "DEPTH_TILE": tile.depth}, tile, kind, "wide"
        for tile in shipped["cell_gradient"]:
            constants = {"TOKEN_TILE": tile.tokens, "SIDE_TILE": 16, "DEPTH_TILE": tile.depth, "BOX_STEP": 128}
            yield "roi_align", "_roi_align_backward_kernel", constants, tile, kind, "wide"
        for tile in shipped["elementwise"]:
            step = {"STEP": 1024}
            yield "region_context", "_sum_chunks_kernel", {"BLOCK": 1024, "PACKED": False}, tile, kind, "wide"
            yield "distillation_loss", "_distillation_kernel", step, tile, kind, "wide"
            yield "distillation_loss", "_distillation_backward_kernel", step | {"TARGETS": True}, tile, kind, "wide"
    for tile in shipped["elementwise"]:
        for backward in (False, True):
            tiles = {"KEY_TILE": 64, "ROW_TILE": ROWS}
            statistics = {"STATISTICS": "product" if backward else "softmax", "HAS_MAPS": backward}
            normalise = {"SLOT_STEP": 16, "BACKWARD": backward}
            sample = {"CELL_TILE": 64, "ROW_TILE": 16, "BACKWARD": backward}
            yield "region_scores", "_region_statistics_kernel", tiles | statistics, tile, "fp32", "wide"
            yield "region_scores", "_region_normalise_kernel", tiles | normalise, tile, "fp32", "wide"
            yield "region_cells", "_region_sample_kernel", sample, tile, "fp32", "wide"
        splat = {"KEY_TILE": 32, "SIDE_TILE": 16, "ROW_TILE": ROWS}
        yield "region_cells", "_region_splat_kernel", splat, tile, "fp32", "wide"
        yield "region_scores", "_head_mean_kernel", {"KEY_TILE": 128, "QUERY_TILE": 8}, tile, "fp32", "any"
        yield "distillation_loss", "_distillation_sum_kernel", {"STEP": 1024}, tile, "fp32", "any"


def decode_products(launch, kind):
    """Every kernel of the decode step with a weight to read, in every tile it may get."""
    kernels = {
        "linear": [
            ("decode_linear", "_norm_linear_kernel", {"EPS": 1e-6}),
            ("decode_linear", "_linear_add_kernel", {}),
        ],
        "pair": [("decode_linear", "_norm_gate_up_kernel", {"EPS": 1e-6})],
        "vocabulary": [
            ("decode_pick", "_lm_head_pick_kernel", {"PENALISE": True, "SAMPLE": True}),
            ("decode_pick", "_lm_head_logits_kernel", {}),
        ],
    }
    for family, users in kernels.items():
        for tile in launch.PRODUCT_TILES[family, "32" if kind == "fp32" else "16"]:
            for module, name, constants in users:
                constants = constants | tile.tiles | PLAIN_LAUNCH
                yield module, name, constants, tile, kind, "mma" if tile.dot else "wide"


def decode_others(launch, kind):
    """Attention in both forms and the small kernels, at the 7B head width and 7 queries per key head."""
    keys, num_warps, num_stages = launch.ATTENTION_TILES["32" if kind == "fp32" else "16"]
    tile = SimpleNamespace(num_warps=num_warps, num_stages=num_stages)
    small, norm = (SimpleNamespace(num_warps=warps, num_stages=3) for warps in (4, 8))
    head = {"HEAD": 128, "HEAD_TILE": 128} | PLAIN_LAUNCH
    group = {"SCALE_LOG2": 0.1275, "GROUP": 7, "GROUP_TILE": 16, "KEY_TILE": keys}
    for split in (True, False):
        yield "decode_attention", "_rope_attention_kernel", head | group | {"SPLIT": split}, tile, kind, "mma"
    combine = head | {"SPLIT_TILE": launch.MAX_SPLITS}
    yield "decode_attention", "_combine_splits_kernel", combine, small, kind, "wide"
    yield "decode_linear", "_rms_norm_kernel", {"EPS": 1e-6, "DEPTH_TILE": 4096} | PLAIN_LAUNCH, norm, kind, "wide"
    yield "decode_pick", "_pick_reduce_kernel", {"STEP": 1024} | PLAIN_LAUNCH, small, kind, "any"


def decode_cases(launch, architecture):
    """All in bfloat16 and float32 for Hopper, else the last tile of each kernel, or of two that stand for all."""
    for kind in ("bf16", "fp16", "fp32"):
        every = architecture == 90 and kind != "fp16"
        products = list(decode_products(launch, kind))
        last = {case[1]: case for case in products}
        few = [last["_norm_linear_kernel"], last["_norm_gate_up_kernel"]]
        yield from products if every else last.values() if kind == "bf16" else few
        if kind == "bf16" or every:
            others = list(decode_others(launch, kind))
            yield from others if every else {case[1]: case for case in others}.values()


def compile_for(kernel, constants, tile, kind, architecture):
    """The compiled kernel as the launcher would specialise it for 16-byte aligned tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in FLOATS:
            signature[name] = "fp32"
            continue
        pointee = POINTERS.get(name)
        if name == "out":
            pointee = "fp32" if WIDE_OUTPUT.match(kernel.__name__) else "token"
        signature[name] = "i32" if pointee is None else "*" + (kind if pointee == "token" else pointee)
        if pointee is not None or name in DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def cuobjdump(compiled, folder, option):
    binary = Path(folder) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout


def resources(compiled, folder):
    """Registers, stack and local bytes per thread as ptxas assigned them."""
    usage = cuobjdump(compiled, folder, "-res-usage")
    return {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def case_problems(compiled, folder, name, kind, architecture, expect):
    """What is wrong with a compiled kernel, and one line of facts about it."""
    ptx, used, shared = compiled.asm["ptx"], resources(compiled, folder), compiled.metadata.shared
    streaming = (name in STREAMING and kind == "bf16") or (DECODE_STREAMING.match(name) and kind != "fp32")
    stack_limit = 0 if streaming else STACK_LIMIT
    checks = {
        f"{used['STACK']} bytes of stack": used["STACK"] <= stack_limit,
        f"{used['LOCAL']} bytes of local memory": used["LOCAL"] == 0,
        f"{shared} bytes of shared memory": shared <= SHARED_LIMIT[architecture],
        "float64 arithmetic": ".f64" not in ptx,
        "no 16-byte load": expect == "any" or re.search(r"ld\.global\.v4|cp\.async\.cg|\.v4\.b32", ptx),
        "no tensor cores at all": expect != "mma" or kind == "fp32" or re.search(ANY_MATRIX_INSTRUCTION, ptx),
        "no tensor cores": expect != "dot" or kind == "fp32" or MATRIX_INSTRUCTION[architecture] in ptx,
    }
    facts = f"{used['REG']} registers, {shared} shared, {used['STACK']} stack"
    return [problem for problem, fine in checks.items() if not fine], facts


def assert_compile_well(oracle, folder, architecture, given):
    problems, report = [], []
    for module, name, constants, tile, kind, expect in given:
        kernel = getattr(oracle.kernel_module(module), name)
        compiled = compile_for(kernel, constants, tile, kind, architecture)
        found, facts = case_problems(compiled, folder, name, kind, architecture, expect)
        label = f"{name} {kind} {constants} warps={tile.num_warps} stages={tile.num_stages}"
        report.append(f"sm_{architecture} {label}: {facts}")
        problems += [f"{label}: {problem}" for problem in found]
    print("\n".join(report))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_shipped_kernel_compiles_well(oracle, tmp_path, architecture):
    assert_compile_well(oracle, tmp_path, architecture, cases(oracle.kernel_module("launch")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decode_kernel_compiles_well(oracle, tmp_path, architecture):
    given = decode_cases(oracle.kernel_module("decode_launch"), architecture)
    assert_compile_well(oracle, tmp_path, architecture, given)


def test_decode_weights_come_asynchronously_in_16_byte_pieces(oracle):
    """Each thread has as many 16-byte copies on the way as its share of the weight tiles of all pipeline stages."""
    for module, name, constants, tile, kind, _ in decode_products(oracle.kernel_module("decode_launch"), "bf16"):
        ptx = compile_for(getattr(oracle.kernel_module(module), name), constants, tile, kind, 90).asm["ptx"]
        copies = len(re.findall(r"cp\.async\.cg\.shared\.global\b.*?, (?:0x10|16)\b", ptx))
        weights = 2 if name == "_norm_gate_up_kernel" else 1
        share = weights * tile.columns * tile.depth * 2 // (16 * 32 * tile.num_warps)
        assert copies >= tile.num_stages * share, (
            f"{name} {tile}: {copies} copies, {tile.num_stages} x {share} expected"
        )


def test_overlapped_decode_kernels_wait_before_they_touch_an_activation(oracle, tmp_path):
    """Only prefetches of weights come before the wait, in PTX and in the machine code that ptxas makes of it."""
    launch, seen = oracle.kernel_module("decode_launch"), set()
    for module, name, constants, tile, kind, _ in decode_cases(launch, 90):
        if name in seen:
            continue
        seen.add(name)
        kernel = getattr(oracle.kernel_module(module), name)
        compiled = compile_for(kernel, constants | {"OVERLAP": True}, tile, kind, 90)
        before, after = compiled.asm["ptx"].split("griddepcontrol.wait", maxsplit=1)
        assert "griddepcontrol.launch_dependents" in before, name
        assert not re.search(r"ld\.global|cp\.async|st\.global", before), f"{name} touches memory before it waits"
        assert re.search(r"st\.global", after), name
        weights = {"_norm_linear_kernel": 1, "_linear_add_kernel": 1, "_norm_gate_up_kernel": 2}.get(name, 0)
        assert bool(weights) == ("prefetch.global.L2" in before) and "prefetch.global" not in after, name
        machine = cuobjdump(compiled, tmp_path, "-sass").split("ACQBULK", maxsplit=1)
        assert len(machine) == 2 and not re.search(r"\bLDG|\bSTG|\bLDGSTS", machine[0]), f"{name}: moved by ptxas"


def test_decode_products_in_float32_are_summed_step_by_step(oracle):
    """The compiler must not merge the steps into one chain of additions as long as the input width."""
    for module, name, constants, tile, kind, expect in decode_products(oracle.kernel_module("decode_launch"), "fp32"):
        if name == "_linear_add_kernel" and expect == "mma":
            text = compile_for(getattr(oracle.kernel_module(module), name), constants, tile, kind, 90).asm["ttgir"]
            accumulators = re.findall(r"tt\.dot %\w+, %\w+, %(\w+)", text)
            assert accumulators and all(name.startswith("cst") for name in accumulators), accumulators


def test_decode_noise_uses_an_accurate_logarithm(oracle):
    """The fast one is off by 2^-22 near one, where the inner logarithm is smaller than that."""
    for module, name, constants, tile, kind, _ in decode_products(oracle.kernel_module("decode_launch"), "bf16"):
        if name == "_lm_head_pick_kernel" and tile.dot:
            ptx = compile_for(getattr(oracle.kernel_module(module), name), constants, tile, kind, 90).asm["ptx"]
            assert "lg2.approx" not in ptx


@pytest.mark.parametrize("rows", [16, 128])
def test_few_and_many_rows_compile_well_on_hopper(oracle, tmp_path, rows):
    for module, name, constants, tile, kind, expect in cases(oracle.kernel_module("launch")):
        if name in STREAMING:
            kernel = getattr(oracle.kernel_module(module), name)
            compiled = compile_for(kernel, constants | {"ROW_TILE": rows}, tile, kind, 90)
            found, facts = case_problems(compiled, tmp_path, name, kind, 90, expect)
            assert not found, f"{name} {kind} with {rows} rows: {found} ({facts})"


def test_the_tokens_come_in_16_byte_pieces(oracle):
    """Not only some load: each token load of the two large kernels, asynchronously on sm_90."""
    launch = oracle.kernel_module("launch")
    for module, name, constants, tile, kind, _ in cases(launch):
        # The packed sum also copies int64 spans, 8 bytes each.
        if name in STREAMING and kind == "bf16" and not constants.get("PACKED"):
            ptx = compile_for(getattr(oracle.kernel_module(module), name), constants, tile, kind, 90).asm["ptx"]
            widths = re.findall(r"cp\.async\.c[ag]\.shared\.global\b.*?, (0x10|16|8|4|0x8|0x4)\b", ptx)
            assert widths, f"{name}: no asynchronous copy found"
            assert set(widths) <= {"0x10", "16"}, f"{name}: {widths}"


def test_every_kernel_of_the_folder_is_compiled_here(oracle):
    defined = set()
    for path in oracle.KERNELS.glob("*.py"):
        defined |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), flags=re.MULTILINE))
    given = [*cases(oracle.kernel_module("launch")), *decode_cases(oracle.kernel_module("decode_launch"), 90)]
    assert defined == {name for _, name, *_ in given}
