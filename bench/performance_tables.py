"""The page bench/predictions.md: `python bench/performance_tables.py > bench/predictions.md` writes it.

Predictions are arithmetic (vreflection.benchmarking.prediction). GPU figures beside them are those of the first run in
bench/measured.md, provisional; CPU rows come from the raw rows in bench/results/cpu.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vreflection.benchmarking.prediction import (
    DEVICES,
    Device,
    Work,
    cross_entropy_work,
    decode_work,
    prefill_work,
    projected_work,
    resampler_work,
)
from vreflection.benchmarking.rows import Row, read_rows
from vreflection.benchmarking.table import shown
from vreflection.training.memory_plan import GIB, Plan, plan_table
from vreflection.training.model_shape import NAMED

RESULTS = Path(__file__).parent / "results"
WIDTH = 3584


@dataclass(frozen=True)
class Case:
    """A case of a suite at the 7B width in bfloat16; `h200_s`: provisional measurement, None where there is none."""

    name: str
    work: Work
    h200_s: float | None = None


def stock(work: Work, h200_s: float | None = None) -> Case:
    return Case("the same, stock (projected)", work, h200_s)


def operator_cases() -> list[Case]:
    measured = {
        (1, 256): (None, None), (1, 1024): (124e-6, 217e-6), (4, 1024): (154e-6, 609e-6), (1, 5120): (152e-6, 889e-6),
        (4, 5120): (240e-6, 2730e-6), (1, 16384): (None, None),
    }  # fmt: skip
    cases = []
    for (images, count), (ours, theirs) in measured.items():
        total, told = images * count, f"N = {count:,}" + f", {images} images" * (images > 1)
        cases.append(Case(f"probe forward, {told}", resampler_work(images, total, total, WIDTH), ours))
        cases.append(stock(projected_work(images, total, WIDTH), theirs))
    for images, ours, theirs in ((1, 373e-6, 2440e-6), (4, 547e-6, 7570e-6)):
        total, told = images * 5120, "N = 5,120" + f", {images} images" * (images > 1)
        work = resampler_work(images, total, total, WIDTH, backward=True)
        cases.append(Case(f"probe forward and backward, {told}", work, ours))
        cases.append(stock(projected_work(images, total, WIDTH, backward=True), theirs))
    windows = resampler_work(4, 4096, 4096, WIDTH, shared=True)
    cases += [Case("4 windows of 1,024 tokens, forward", windows, 147e-6)]
    cases += [stock(projected_work(4, 4096, WIDTH), 626e-6)]
    cases += [Case("cross-entropy at 1,638 of 16,384 rows", cross_entropy_work(1638, WIDTH, 152064))]
    return cases


def decode_cases() -> list[Case]:
    measured = {(1, True): 3.78e-3, (1, False): 3.55e-3, (4, True): 7.11e-3, (16, True): 6.91e-3, (32, True): 7.29e-3}
    cases = []
    for batch, text in ((1, True), (1, False), (4, True), (16, True), (32, True)):
        kind = "text" if text else "latent"
        work = decode_work(NAMED["7b"], batch, 1000, text)
        cases.append(Case(f"7B {kind} step, {batch} x 1,000", work, measured[batch, text]))
    cases += [Case("7B text step, 1 x 16,000", decode_work(NAMED["7b"], 1, 16000, True))]
    cases += [Case(f"3B text step, {batch} x 1,000", decode_work(NAMED["3b"], batch, 1000, True)) for batch in (1, 32)]
    cases += [Case("7B prefill, 1 x 2,000 (1,500 visual)", prefill_work(NAMED["7b"], 1, 2000, 2000, 1500))]
    return cases


def gpu_table() -> list[str]:
    """Markdown: predicted time per GPU, and the provisional measurement over the prediction."""
    head = ("case", "MB", "Gflop", *DEVICES, "bound on H200", "H200, provisional", "measured / predicted")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for case in (*operator_cases(), *decode_cases()):
        predicted = [shown(case.work.seconds(device)) for device in DEVICES.values()]
        over = "" if case.h200_s is None else f"{case.h200_s / case.work.seconds(DEVICES['H200']):.1f}"
        measured = "not measured" if case.h200_s is None else shown(case.h200_s)
        cells = [case.name, f"{case.work.bytes / 1e6:,.0f}", f"{case.work.flops / 1e9:,.1f}", *predicted]
        lines.append(f"| {' | '.join([*cells, case.work.bound(DEVICES['H200']), measured, over])} |")
    return lines


def training_table() -> list[str]:
    """Markdown: one micro-batch of 16,384 tokens on one GPU, by `training.memory_plan`."""
    lines = ["| run | GiB | " + " | ".join(DEVICES) + " | measured |", f"|{'---|' * (len(DEVICES) + 3)}"]
    for size, rank in (("7b", 64), ("3b", 0)):
        plan = Plan("stage1", "ddp", world=1, precision="bfloat16", lora_rank=rank, accumulation=1)
        (row,) = plan_table(size, [plan], DEVICES)
        times = [f"{row.times[name].seconds:.2f} s" for name in DEVICES]
        told = f"{size.upper()}, {f'LoRA {rank}' if rank else 'all of the language model'}"
        lines.append(f"| {told} | {row.total / GIB:.1f} | {' | '.join(times)} | not measured |")
    return lines


def measured_table(rows: Iterable[Row]) -> list[str]:
    """Markdown: every measured row with a prediction; what it took over the speed of light of its own run."""
    head = ("suite", "case", "dtype", "bound by", "predicted", "measured", "measured / predicted")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        if row.light_s is None or row.ours is None or row.bytes is None or row.flops is None:
            continue
        bound = Work(row.bytes, row.flops).bound(Device(**row.ceilings))
        taken = row.median(row.ours)
        cells = (row.suite, row.label, row.settings.get("dtype", ""), bound, shown(row.light_s), shown(taken))
        lines.append(f"| {' | '.join(cells)} | {taken / row.light_s:.1f} |")
    return lines


def memory_table(rows: Iterable[Row]) -> list[str]:
    """Markdown: peak memory beyond weights, inputs and, for operators, gradients: predicted and measured."""
    head = ("suite", "case", "variant", "predicted MiB", "measured MiB", "measured / predicted")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        for variant, predicted in row.extra.get("predicted_bytes", {}).items():
            if variant in row.memory:
                taken = row.memory[variant]
                cells = (row.suite, row.label, variant, f"{predicted / 2**20:,.1f}", f"{taken / 2**20:,.1f}")
                lines.append(f"| {' | '.join(cells)} | {taken / predicted:.2f} |")
    return lines


def without_prediction(rows: Iterable[Row]) -> list[str]:
    """Suites whose rows have none."""
    return sorted({row.suite for row in rows} - {row.suite for row in rows if row.light_s is not None})


def committed(device: str) -> list[Row]:
    return read_rows([RESULTS / device / "rows.jsonl"])


def page() -> list[str]:
    """All tables, with what was measured where."""
    rows = committed("cpu")
    return [
        "# Predicted and measured times",
        "",
        "Every prediction of the [performance model](../docs/performance.md) beside what was measured, written by",
        "`python bench/performance_tables.py > bench/predictions.md`.",
        "",
        "## Operators and decode steps on GPUs",
        "",
        "bfloat16, D = 3584, cold cache. The H200 column is one run whose rows are lost ([log](measured.md#gpu)).",
        "It is provisional until `bench/gpu_suite.sh` has run again. Nothing else was measured on a GPU.",
        "",
        *gpu_table(),
        "",
        "## Training steps on GPUs",
        "",
        "One micro-batch of 16,384 packed tokens on one GPU, bfloat16, recomputed layers, 75 % visual, 10 %",
        "supervised (`vreflection.training.memory_plan`; peak GiB with its margin). The optimizer and the compression",
        "modules, under 1 % of the flops, are not counted. `bench/bench_training_shapes.py` runs these two on a GPU.",
        "",
        *training_table(),
        "",
        "## Times on CPU",
        "",
        "[Raw rows](results/cpu/rows.jsonl), [report](results/cpu/report.md): 2 shared cores of an EPYC (AVX-512,",
        "bfloat16 products), two threads, 2026-11-28. Ceilings around the rounds of each row: 46 to 79 GB/s from",
        "memory, 83 to 228 GB/s in cache, 219 to 234 Gflop/s in float32 and 959 to 1,006 in bfloat16.",
        "",
        *measured_table(rows),
        "",
        f"Without a prediction: {', '.join(without_prediction(rows))}.",
        "",
        "## Memory on CPU",
        "",
        "Resident peaks, each of a process of its own.",
        "",
        *memory_table(rows),
    ]


if __name__ == "__main__":
    print("\n".join(page()))
