"""Run folders written by hand: a manifest and raw answers in each benchmark's shape, without a model."""

import json
from pathlib import Path

from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.records import Manifest, RawAnswer

BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw",
    "Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance",
    "Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


def answer(name, ident, text, gold="A", options=("red", "blue"), group=None, labels=None, corrected=None, **more):
    golds = {"original": gold} | ({} if corrected is None else {"corrected": corrected})
    values = {
        "finish_reason": "stop",
        "spans": 1,
        "closed": True,
        "latent_steps": 8,
        "tokens": 3,
        "visual_tokens": (64,),
    }
    return RawAnswer(
        name, ident, tuple(options), golds, labels or {}, ident if group is None else group, text, **(values | more)
    )


def mmvp(said):
    """Two letters a pair; gold is A, B, and the first pair's labels are swapped in the corrected revision."""
    rows = []
    for index, text in enumerate(said):
        gold = "AB"[index % 2]
        other = "BA"[index % 2] if index < 2 else gold
        pair = str(index // 2)
        rows.append(answer("mmvp", str(index + 1), text, gold, group=pair, labels={"pair": pair}, corrected=other))
    return rows


def hrbench(said, name="hrbench4k"):
    """Four letters a question; gold runs A, B, C, D over its cycles; even questions are `single`."""
    rows = []
    for index, text in enumerate(said):
        question, cycle = divmod(index, 4)
        labels = {"category": ("single", "cross")[question % 2], "cycle": str(cycle)}
        options = ("red", "blue", "green", "black")
        rows.append(answer(name, str(index), text, "ABCD"[cycle], options, group=f"q{question}", labels=labels))
    return rows


def write_run(folder, rows_of, protocol="strict", asked=None, steps=8, shards=1, **changes):
    """Write a run's folder; `rows_of`: answers by benchmark. `changes`: fields of the manifest."""
    folder = Path(folder)
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    chosen = load_protocol(protocol)
    benchmarks = {
        name: {
            "rows": (asked or {}).get(name, len(rows)),
            "asked": (asked or {}).get(name, len(rows)),
            "files": {"f": "1"},
        }
        for name, rows in rows_of.items()
    }
    values = {
        "protocol": chosen.tag, "model": "tiny", "digest": "d1", "stage": "stage2",
        "latents": {"steps": steps, "mode": "clean", "forced": False}, "benchmarks": benchmarks,
        "generation": {"max_new_tokens": {name: chosen.answer_tokens(name) for name in rows_of}, "dtype": "float32"},
        "pixels": {"min": 3136, "max": 12845056}, "versions": {"vreflection": "0", "torch": "2"},
        "notes": {"protocol": chosen.as_dict()},
    } | changes  # fmt: skip
    (folder / "run.json").write_text(json.dumps(Manifest(**values).as_dict()))
    for name, rows in rows_of.items():
        for shard in range(shards):
            path = folder / "raw" / (f"{name}.jsonl" if shards == 1 else f"{name}.{shard}-of-{shards}.jsonl")
            path.write_text("".join(json.dumps(row.as_dict()) + "\n" for row in rows[shard::shards]), encoding="utf-8")
    return folder
