"""Offline scoring: raw rows per second, read, extracted and tabled. `pytest bench/bench_scoring.py -s`

A million answers to questions of MME-RealWorld-Lite's shape, 16 shards: short ones, as the prompt asks for, and prose
that differs in every row, so that nothing is extracted only once. No GPU is used. `SCORING_ROWS` changes the number.
"""

import json
import os
import resource
import time

import pytest

from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.records import LETTERS, Manifest, RawAnswer
from vreflection.evaluation.scoring import score_run
from vreflection.evaluation.tables import score_text

ROWS = int(os.environ.get("SCORING_ROWS", 1_000_000))
SHARDS, NAME = 16, "mme-realworld-lite"
DOMAINS = ("OCR with Complex Context", "Diagram and Table", "Remote Sensing", "Monitoring", "Autonomous_Driving")
PROSE = (
    "Looking at row {} of the picture, a large sign stands to the left of the road, and behind it there are two cars. "
)


def said(kind: str, index: int) -> str:
    letter = LETTERS[index % 5]
    if kind == "short":
        return f"<|lvr_start|><|lvr_end|><answer>{letter}</answer><|im_end|>"
    return f"<|lvr_start|><|lvr_end|>{PROSE.format(index) * 3}<answer>{letter}</answer><|im_end|>"


def written(folder, kind: str):
    """A run's folder with that many answers; its manifest asks under `strict`."""
    (folder / "raw").mkdir()
    protocol = load_protocol("strict")
    asked = {NAME: {"rows": ROWS, "asked": ROWS, "files": {}}}
    notes = {"protocol": protocol.as_dict()}
    manifest = Manifest(protocol.tag, "bench", "0", "stage2", {"steps": 8}, asked, {}, {}, {}, notes=notes)
    (folder / "run.json").write_text(json.dumps(manifest.as_dict()))
    options = ("a red car", "a blue car", "two cars", "no car", "The image does not feature the object.")
    for shard in range(SHARDS):
        with (folder / "raw" / f"{NAME}.{shard}-of-{SHARDS}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(shard, ROWS, SHARDS):
                labels = {"task": ("Perception", "Reasoning")[index % 3 == 0], "domain": DOMAINS[index // 5 % 5]}
                ident, gold = str(index), {"original": LETTERS[index % 7 % 5]}
                row = RawAnswer(
                    NAME, ident, options, gold, labels, ident, said(kind, index), "stop", 1, True, 8, 6, 900, (880,)
                )
                file.write(json.dumps(row.as_dict()) + "\n")
    return folder


@pytest.fixture(scope="module", params=["short", "prose"])
def run(request, tmp_path_factory):
    return request.param, written(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("protocol", ["strict", "reference"])
def test_scoring(benchmark, run, protocol):
    kind, folder = run
    start = time.perf_counter()
    score = benchmark.pedantic(score_run, (folder, protocol), rounds=1)
    seconds = time.perf_counter() - start
    part = score.benchmarks[0]
    assert (part.n, part.missing, part.unparsed.correct) == (ROWS, 0, 0)
    assert part.metrics[0].correct == sum(index % 5 == index % 7 % 5 for index in range(ROWS))
    assert f"answered: {ROWS} of {ROWS}" in score_text(score)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process so far
    benchmark.extra_info.update(rows=ROWS, seconds=seconds, rows_per_s=ROWS / seconds, peak_rss_mib=peak)
    speed = f"{ROWS / seconds:,.0f} rows/s, peak {peak:.0f} MiB"
    print(f"\n{kind} answers, {protocol}: {ROWS} rows in {seconds:.1f} s, {speed}")
