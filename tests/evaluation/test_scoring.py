import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vreflection.cli.eval import app
from vreflection.errors import ConfigError, DataError
from vreflection.evaluation.scoring import score_run
from vreflection.evaluation.statistics import grouped_wilson, wilson
from vreflection.evaluation.tables import score_text

RUNS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("scored_runs.py"))))
answer, write_run = RUNS.answer, RUNS.write_run

# Pairs: right right, right wrong, wrong wrong, unparsed right.
MMVP = ["A", "B", "A", "A", "B", "A", "hm", "B"]


def scored(folder, rows, **options):
    score = score_run(write_run(folder, rows), **options)
    return {part.benchmark: part for part in score.benchmarks}


def shares(part):
    return {metric.name: (metric.correct, metric.n) for metric in part.metrics}


def test_mmvp(tmp_path):
    part = scored(tmp_path, {"mmvp": RUNS.mmvp(MMVP)})["mmvp"]
    assert shares(part) == {
        "individual": (4, 8), "pair": (1, 4), "individual, corrected labels": (2, 8), "pair, corrected labels": (0, 4)
    }  # fmt: skip
    assert part.main is part.metrics[0]
    assert (part.metrics[0].low, part.metrics[0].groups) == (grouped_wilson([2, 1, 0, 1], [2, 2, 2, 2]).low, 4)
    assert part.metrics[1].low == wilson(1, 4).low
    assert (part.unparsed.correct, part.beyond, part.corrected) == (1, 0, 2)
    assert part.gold_letters == {"A": 4, "B": 4} and part.predicted_letters == {"A": 4, "B": 3}
    assert (part.floor_letter, part.floor.value) == ("A", 0.5)


def test_corrected_labels(tmp_path):
    write_run(tmp_path, {"mmvp": RUNS.mmvp(["B", "A", *MMVP[2:]])})
    original, corrected = (score_run(tmp_path, labels=labels).benchmarks[0] for labels in ("original", "corrected"))
    assert shares(original)["individual"] == shares(corrected)["individual, original labels"] == (2, 8)
    assert shares(corrected)["pair"] == shares(original)["pair, corrected labels"] == (1, 4)
    assert score_run(tmp_path).labels == "original"
    assert score_run(write_run(tmp_path / "l", {"mmvp": RUNS.mmvp(MMVP)}, "lmms-eval")).labels == "corrected"
    with pytest.raises(ConfigError, match="labels: expected one of .*'original', 'corrected'.*, got 'new'"):
        score_run(tmp_path, labels="new")


def test_blink(tmp_path):
    rows = []
    for index, task in enumerate(RUNS.BLINK_TASKS):
        said = ["A"] * (index + 1) + ["B"] * 2
        rows += [answer("blink", f"{task}_{i}", text, labels={"task": task}) for i, text in enumerate(said)]
    part = scored(tmp_path, {"blink": rows})["blink"]
    n, right = sum(range(3, 17)), sum(range(1, 15))
    found = shares(part)
    assert found["blink-14 micro"] == (right, n) and part.main.name == "blink-14 micro"
    five = [
        RUNS.BLINK_TASKS.index(t) for t in ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
    ]
    assert found["blink-5 micro"] == (sum(i + 1 for i in five), sum(i + 3 for i in five))
    macro = part.metric("blink-14 macro")
    assert macro.value == pytest.approx(sum((i + 1) / (i + 3) for i in range(14)) / 14)
    assert (macro.kind, macro.n) == ("mean", n) and macro.low < macro.value < macro.high
    assert found["Jigsaw"] == (6, 8) and len(found) == 17
    fewer = scored(tmp_path / "few", {"blink": rows[:7]})["blink"]  # no number is called what it is not
    assert set(shares(fewer)) == {"2 of 14 tasks micro", "2 of 14 tasks macro", "Art_Style", "Counting"}
    assert fewer.main.name == "2 of 14 tasks micro"


def test_vstar(tmp_path):
    rows = [answer("vstar", f"a{i}", t, labels={"category": "direct_attributes"}) for i, t in enumerate("AAB")]
    rows += [answer("vstar", f"r{i}", t, labels={"category": "relative_position"}) for i, t in enumerate("AB")]
    part = scored(tmp_path, {"vstar": rows})["vstar"]
    assert shares(part) == {"overall": (3, 5), "direct_attributes": (2, 3), "relative_position": (1, 2)}
    assert part.main.groups is None and part.main.low == wilson(3, 5).low


@pytest.mark.parametrize("name", ["hrbench4k", "hrbench8k"])
def test_hrbench(tmp_path, name):
    part = scored(tmp_path, {name: RUNS.hrbench("ABCDABCAAAAA", name)})[name]
    assert shares(part) == {
        "mean of cycles": (8, 12), "FSP": (5, 8), "FCP": (3, 4), "all four right": (1, 3),
        "cycle 0": (3, 3), "cycle 1": (2, 3), "cycle 2": (2, 3), "cycle 3": (1, 3),
    }  # fmt: skip
    assert part.metrics[0].value == pytest.approx((1 + 2 / 3 + 2 / 3 + 1 / 3) / 4)
    assert part.metrics[0].low == grouped_wilson([4, 3, 1], [4, 4, 4]).low and part.groups == 3


def test_mme_realworld(tmp_path):
    said = {
        ("Perception", "OCR with Complex Context"): "AAAB",
        ("Perception", "Remote Sensing"): "AE",
        ("Reasoning", "Monitoring"): "EB",
    }
    rows = []
    for (task, domain), letters in said.items():
        labels = {"task": task, "domain": domain, "category": "x"}
        rows += [
            answer("mme-realworld-lite", f"{task}/{domain}/{i}", text, options=tuple("vwxyz"), labels=labels)
            for i, text in enumerate(letters)
        ]
    part = scored(tmp_path, {"mme-realworld-lite": rows})["mme-realworld-lite"]
    found = shares(part)
    assert found["micro"] == (4, 8) and found["Perception"] == (4, 6) and found["Reasoning"] == (0, 2)
    assert found["Perception: Remote Sensing"] == (1, 2) and found["E rate"] == (2, 8)
    assert part.metric("Avg-C").value == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert part.metric("Avg-C Perception").value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert part.metric("Avg-C Reasoning").value == 0
    assert part.metric("E rate").kind == "rate"


def test_rates_and_ranges(tmp_path):
    rows = [
        answer("vstar", "1", "A", spans=1, closed=True, latent_steps=8, visual_tokens=(10, 20)),
        answer("vstar", "2", "A", spans=2, closed=False, latent_steps=12, visual_tokens=(30,), finish_reason="length"),
        answer("vstar", "3", "E", spans=0, closed=False, latent_steps=0, visual_tokens=(40,)),
        answer("vstar", "4", "B", spans=0, closed=False, latent_steps=0, visual_tokens=(40,)),
    ]
    write_run(tmp_path, {"vstar": rows}, "reference")
    part = score_run(tmp_path).benchmarks[0]
    assert (part.triggered.value, part.closed.value, part.closed.n) == (0.5, 0.5, 2)
    assert part.latent_steps == (0, 4, 12) and part.visual_tokens == (10, 30, 40)
    assert part.finish_reasons == {"stop": 3, "length": 1}
    assert part.beyond == 1 and part.predicted_letters == {"A": 2, "B": 1, "E": 1}


def test_another_extractor_on_the_same_answers(tmp_path):
    rows = [answer("vstar", "1", "The answer is B.", "B"), answer("vstar", "2", "Blue, I think", "B")]
    write_run(tmp_path, {"vstar": rows})
    strict, reference = score_run(tmp_path), score_run(tmp_path, "reference")
    assert shares(strict.benchmarks[0])["overall"] == (1, 2) and strict.benchmarks[0].unparsed.correct == 1
    assert shares(reference.benchmarks[0])["overall"] == (1, 2) and reference.benchmarks[0].unparsed.correct == 0
    assert reference.benchmarks[0].predicted_letters == {"B": 1, "E": 1}
    assert (reference.asked_with, reference.protocol) == ("strict@1", "reference@1")


def test_a_protocol_that_asks_otherwise_is_refused(tmp_path):
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A")]})
    with pytest.raises(
        ConfigError, match=r"vlmevalkit@1 asks vstar in another way than strict@1.*prompt .*--protocol vlmevalkit"
    ):
        score_run(tmp_path, "vlmevalkit")
    with pytest.raises(ConfigError, match=r"expected one of \['lenient'"):
        score_run(tmp_path, "no such")


def test_a_shipped_name_is_only_for_what_is_shipped(tmp_path):
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A")]})
    values = json.loads((tmp_path / "run.json").read_text())
    values["notes"]["protocol"]["extractor"] = "reference"
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=r"expected strict@1 as it is shipped, got one that differs in \['extractor'\]"
    ):
        score_run(tmp_path)
    values["notes"]["protocol"]["version"] = 9
    (tmp_path / "run.json").write_text(json.dumps(values | {"protocol": "strict@9"}))
    with pytest.raises(
        ConfigError, match="expected strict@1, got strict@9: .*use the release that has strict@9, or name --prot"
    ):
        score_run(tmp_path)
    assert score_run(tmp_path, "strict").protocol == "strict@1"


def test_missing_answers(tmp_path):
    rows = {"mmvp": RUNS.mmvp(MMVP)[:5], "vstar": [answer("vstar", "1", "A")]}
    write_run(tmp_path, rows, asked={"mmvp": 8, "vstar": 1})
    with pytest.raises(DataError, match="got none to 3 of 8 in mmvp; the same `vreflection eval` command .*--partial"):
        score_run(tmp_path)
    score = score_run(tmp_path, partial=True)
    assert (score.missing, score.expected) == (3, 9)
    part = score.benchmarks[0]
    assert shares(part)["individual"] == (3, 5) and shares(part)["pair"] == (1, 2) and part.incomplete_groups == 1
    assert score_text(score).splitlines()[0].startswith("INCOMPLETE: 3 of 9 answers are missing")
    (tmp_path / "raw/vstar.jsonl").unlink()
    assert score_run(tmp_path, partial=True).benchmarks[1].missing == 1
    (tmp_path / "raw/mmvp.jsonl").unlink()
    empty = score_run(tmp_path, partial=True)
    assert empty.missing == 9 and empty.benchmarks[0].main is None
    assert "0 of 8, 8 missing" in score_text(empty)


def test_cycles_of_unequal_size_are_averaged(tmp_path):
    write_run(tmp_path, {"hrbench4k": RUNS.hrbench("ABCDAA")}, asked={"hrbench4k": 8})
    part = score_run(tmp_path, partial=True).benchmarks[0]
    assert part.main.value == pytest.approx((1 + 1 / 2 + 1 + 1) / 4) and part.main.kind == "mean"
    assert shares(part)["all four right"] == (1, 1) and part.incomplete_groups == 1


def test_shards_are_read_together(tmp_path):
    whole = score_run(write_run(tmp_path / "one", {"mmvp": RUNS.mmvp(MMVP)}))
    parts = score_run(write_run(tmp_path / "three", {"mmvp": RUNS.mmvp(MMVP)}, shards=3))
    assert shares(whole.benchmarks[0]) == shares(parts.benchmarks[0])
    assert whole.benchmarks[0].metrics == parts.benchmarks[0].metrics


def test_a_torn_last_line_is_left_out_and_told(tmp_path):
    write_run(tmp_path, {"mmvp": RUNS.mmvp(MMVP)})
    path = tmp_path / "raw/mmvp.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    score = score_run(tmp_path, partial=True)
    assert score.benchmarks[0].torn == ["mmvp.jsonl"] and score.missing == 1
    assert "half-written last line, left out: mmvp.jsonl" in score_text(score)
    with pytest.raises(DataError, match="1 of 8 in mmvp"):
        score_run(tmp_path)


def lines_of(folder, name="vstar"):
    path = folder / f"raw/{name}.jsonl"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_repeats_and_contradictions(tmp_path):
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A"), answer("vstar", "2", "B")]})
    path, rows = lines_of(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    part = score_run(tmp_path).benchmarks[0]
    assert (part.n, part.repeated) == (2, 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"text": "B"}]))
    with pytest.raises(
        DataError, match=r"vstar.jsonl:3: expected one answer to item 1, got a second one with another text"
    ):
        score_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"benchmark": "mmvp"},
            "vstar.jsonl:1: expected an answer to vstar with all its fields, got ValueError: benchmark 'mmvp'",
        ),
        ({"id": 7}, "vstar.jsonl:1: expected an answer .* id 7"),
        ({"gold": {"original": "C"}}, "gold letter 'C' of 2 options"),
        ({"gold": {}}, "got KeyError: 'original'"),
        ({"options": []}, "gold letter 'A' of 0 options"),
        ({"options": None}, "got TypeError"),
        ({"text": None}, "delete the line and resume the run"),
        ({"options": [1, 2]}, "got AttributeError|got TypeError"),
        ({"spans": None}, "got TypeError"),
        ({"visual_tokens": ["many"]}, "expected whole numbers of spans, steps and visual tokens"),
        ({"latent_steps": {}}, "expected whole numbers of spans, steps and visual tokens"),
    ],
)
def test_rows_that_are_refused(tmp_path, change, message):
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A")]})
    path, rows = lines_of(tmp_path)
    path.write_text(json.dumps(rows[0] | change) + "\n")
    with pytest.raises(DataError, match=message):
        score_run(tmp_path)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected run.json, got none; name a folder that `vreflection eval` wrote"):
        score_run(tmp_path)
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A")]})
    path, rows = lines_of(tmp_path)
    path.write_text("not json\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="vstar.jsonl:1: expected an answer in JSON"):
        score_run(tmp_path)
    path.write_text("".join(json.dumps(rows[0] | {"id": str(i)}) + "\n" for i in range(3)))
    with pytest.raises(DataError, match="expected at most the 1 items the run asked of vstar, got 3"):
        score_run(tmp_path)
    manifest = tmp_path / "run.json"
    values = json.loads(manifest.read_text())
    for change, message in (
        ({"format": 2}, "expected format 1, got 2; use the release that wrote it"),
        ({"speed": 1}, r"with unknown \['speed'\]"),
        ({"protocol": "strict@7"}, "expected one protocol, got strict@7 and, in its notes, strict@1"),
        ({"benchmarks": {"vstar": {}}}, "expected the number of items asked of vstar, got None"),
    ):
        manifest.write_text(json.dumps(values | change))
        with pytest.raises(DataError, match=message):
            score_run(tmp_path)
    manifest.write_text(json.dumps({key: value for key, value in values.items() if key != "digest"}))
    with pytest.raises(DataError, match=r"got without \['digest'\]"):
        score_run(tmp_path)
    manifest.write_text("{")
    with pytest.raises(DataError, match="run.json: expected a manifest in JSON"):
        score_run(tmp_path)


@pytest.mark.parametrize("field", ["protocol", "digest", "pixels", "latents", "benchmarks"])
def test_manifests_of_shards_must_agree(tmp_path, field):
    write_run(tmp_path, {"vstar": [answer("vstar", "1", "A")]})
    values = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.1.json").write_text(json.dumps(values))
    assert score_run(tmp_path).missing == 0
    values[field] = "other" if isinstance(values[field], str) else {}
    (tmp_path / "run.1.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"run.json: expected the same run as in run.1.json, got {field}: .* against"):
        score_run(tmp_path)


def test_tables_tell_everything(tmp_path):
    text = score_text(score_run(write_run(tmp_path, {"mmvp": RUNS.mmvp(MMVP), "hrbench4k": RUNS.hrbench("ABCDABCA")})))
    for told in (
        "protocol: strict@1", "labels: original", "model: tiny (stage2, d1)", "latents: steps 8, mode clean",
        "pixels per image: min 3136", "versions: vreflection 0, torch 2", "## mmvp", "## hrbench4k",
        "unparsed, counted as wrong: 12.5 % (1 of 8", "letters: gold A 4, B 4; said A 4, B 3",
        "always A: 50.0 % (4 of 8", "opened a latent span: 100.0 % (8 of 8", "closed it: 100.0 %",
        "visual tokens per image (least, median, most): 64, 64, 64", "the corrected ones differ in 2 items",
        "no item has a corrected label", "intervals are of n / design effect items",
    ):  # fmt: skip
        assert told in text
    for line in text.splitlines():
        assert "nan" not in line
        if line.startswith("| **"):
            assert line.count("|") == 7


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(range(24)),
    st.integers(1, 4),
    st.lists(st.sampled_from(["A", "B", "C", "D", "?"]), min_size=24, max_size=24),
)
def test_neither_order_nor_shards_change_a_score(order, shards, said):
    rows = RUNS.hrbench(said)
    with tempfile.TemporaryDirectory() as folder:
        scores = [
            score_run(write_run(Path(folder, name), {"hrbench4k": of_run}, shards=count)).as_dict() | {"folder": ""}
            for name, of_run, count in (("a", rows, 1), ("b", [rows[i] for i in order], shards))
        ]
    assert json.dumps(scores[0]) == json.dumps(scores[1])
    right = sum(text == "ABCD"[i % 4] for i, text in enumerate(said))
    assert scores[0]["benchmarks"][0]["metrics"][0]["correct"] == right


@pytest.mark.parametrize(
    ("more", "code"), [([], 2), (["--partial"], 0), (["--partial", "--protocol", "vlmevalkit"], 2)]
)
def test_exit_codes(tmp_path, more, code):
    run = write_run(tmp_path / "run", {"mmvp": RUNS.mmvp(MMVP)[:6]}, asked={"mmvp": 8})
    command = [sys.executable, "-m", "vreflection", "eval", "score", str(run), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: ") and done.stdout == ""
    else:
        assert done.stdout.startswith("INCOMPLETE: 2 of 8 answers are missing")


def run_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_score_on_the_command_line(tmp_path):
    run = write_run(tmp_path / "run", {"mmvp": RUNS.mmvp(MMVP)})
    done = run_cli("score", run)
    assert done.exit_code == 0, done.output
    values = json.loads((run / "score.json").read_text())
    assert values["benchmarks"][0]["metrics"][0]["correct"] == 4 and values["protocol"] == "strict@1"
    assert (run / "score.md").read_text() in done.output
    svg = (run / "score.svg").read_text()
    assert svg.startswith("<svg") and "mmvp: individual" in svg and svg.count('class="bar"') == 2
    printed = run_cli("score", run, "--json", "--out", tmp_path / "out", "--labels", "corrected")
    assert json.loads(printed.output)["labels"] == "corrected"
    assert json.loads((tmp_path / "out/score.json").read_text()) == json.loads(printed.output)


def test_partial_scores_on_the_command_line(tmp_path):
    run = write_run(tmp_path / "run", {"mmvp": RUNS.mmvp(MMVP)[:6]}, asked={"mmvp": 8})
    refused = run_cli("score", run)
    assert isinstance(refused.exception, DataError) and not (run / "score.json").exists()
    done = run_cli("score", run, "--partial")
    assert done.exit_code == 0 and done.output.startswith("INCOMPLETE: 2 of 8")
    assert "2 answers missing" in (run / "score.svg").read_text()


def test_scores_of_several_runs_by_latent_steps(tmp_path):
    runs = [
        write_run(tmp_path / name, {"vstar": [answer("vstar", str(i), t) for i, t in enumerate(said)]}, steps=steps)
        for name, said, steps in (("s2", "AABB", 2), ("s4", "AAAB", 4), ("s8", "AAAA", 8))
    ]
    done = run_cli("score", *runs, "--out", tmp_path / "out", "--baseline", runs[0])
    assert done.exit_code == 0, done.output
    assert "against baseline" in done.output and "1 won, 0 lost" in done.output
    svg = (tmp_path / "out/latent_steps.svg").read_text()
    assert svg.count("<circle") == 3 and "2 steps 50.0" in svg and "8 steps 100.0" in svg
    assert (tmp_path / "out/s4/score.md").exists()
    again = run_cli("score", runs[0], runs[0])
    assert isinstance(again.exception, ConfigError) and "names of their own" in str(again.exception)
