import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vreflection.cli.eval import app
from vreflection.errors import ConfigError, DataError
from vreflection.evaluation.comparison import compare_all, compare_runs
from vreflection.evaluation.scoring import score_run
from vreflection.evaluation.statistics import mcnemar, paired, tango
from vreflection.evaluation.tables import comparison_text

RUNS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("scored_runs.py"))))
answer, write_run = RUNS.answer, RUNS.write_run


def vstar(said, **more):
    return {"vstar": [answer("vstar", str(index), text, **more) for index, text in enumerate(said)]}


def difference(found, name, benchmark=0):
    return next(d for d in found.benchmarks[benchmark].differences if d.name == name)


def test_items_are_paired_by_id(tmp_path):
    first, second = "AAABBB", "AAAABA"
    a = write_run(tmp_path / "a", vstar(first))
    b = write_run(tmp_path / "b", {"vstar": vstar(second)["vstar"][::-1]})  # answered in another order
    found = difference(compare_runs(a, b), "overall")
    assert (found.first, found.second) == (3 / 6, 5 / 6)
    counts = found.paired
    assert (counts.both, counts.first_only, counts.second_only, counts.neither) == (3, 0, 2, 1)
    assert (counts.low, counts.high) == tango(0, 2, 6) and counts.p == mcnemar(0, 2)[0]
    back = difference(compare_runs(b, a), "overall").paired
    assert (back.difference, back.p) == (-counts.difference, counts.p)


def test_a_run_against_itself(tmp_path):
    a = write_run(tmp_path / "a", vstar("AAB"))
    found = compare_runs(a, a)
    assert (difference(found, "overall").paired.discordant, difference(found, "overall").paired.p) == (0, 1)
    assert found.told == {} and "the same model and settings" in comparison_text([found])


def test_rotations_are_flipped_together(tmp_path):
    first, second = "ABCDBBBBBBBBBBBBABCD", "ABCDABCDABCDABCDABCD"
    a = write_run(tmp_path / "a", {"hrbench4k": RUNS.hrbench(first)})
    b = write_run(tmp_path / "b", {"hrbench4k": RUNS.hrbench(second)})
    found = compare_runs(a, b)
    counts = difference(found, "mean of cycles").paired
    assert (counts.second_only, counts.groups) == (9, 5)
    assert counts.p == mcnemar(0, 9)[0] and counts.grouped_p == 0.25  # 2 of 2 ** 3 sign patterns
    assert difference(found, "all four right").paired.second_only == 3
    assert difference(found, "all four right").kind == "groups"
    assert difference(found, "cycle 1").paired.discordant == 0


def test_pairs_of_images(tmp_path):
    a = write_run(tmp_path / "a", {"mmvp": RUNS.mmvp("ABAABA")})
    b = write_run(tmp_path / "b", {"mmvp": RUNS.mmvp("AAABBA")})
    found = compare_runs(a, b)
    assert [d.name for d in found.benchmarks[0].differences] == ["individual", "pair"]
    pair = difference(found, "pair").paired
    assert (pair.n, pair.both, pair.first_only, pair.second_only) == (3, 0, 1, 1)
    individual = difference(found, "individual").paired
    right_a, right_b = [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0]
    assert individual == paired(right_a, right_b, [0, 0, 1, 1, 2, 2])
    swapped = difference(compare_runs(a, b, labels="corrected"), "individual")
    assert (swapped.first, swapped.second) == (1 / 6, 3 / 6)


def test_what_may_differ_is_told(tmp_path):
    a = write_run(tmp_path / "a", vstar("AB"), steps=4)
    b = write_run(tmp_path / "b", vstar("AA"), model="other", digest="d2", generation={"dtype": "bfloat16"})
    found = compare_runs(a, b)
    assert found.told["latents.steps"] == (4, 8) and found.told["digest"] == ("d1", "d2")
    assert found.told["dtype"] == ("float32", "bfloat16")
    assert "- latents.steps: 4 against 8" in comparison_text([found])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "reference"}, "expected one protocol, got strict@1 and reference@1; .* cannot be compared"),
        (
            {"pixels": {"min": 1, "max": 2}},
            "expected one pixel range, got {'min': 3136, 'max': 12845056} and {'min': 1",
        ),
        ({"generation": {"do_sample": True}}, "expected the same generation, got .*: answer one of them again"),
        (
            {"benchmarks": {"vstar": {"asked": 3, "files": {"f": "2"}}}},
            "expected the same files of vstar, got {'f': '1'}",
        ),
    ],
)
def test_unlike_runs_are_refused(tmp_path, changes, message):
    a, b = write_run(tmp_path / "a", vstar("AAB")), write_run(tmp_path / "b", vstar("AAB"), **changes)
    with pytest.raises(DataError, match=message):
        compare_runs(a, b)


def with_protocol(folder, **changes):
    """A run asked with a protocol of one's own."""
    path = folder / "run.json"
    values = json.loads(path.read_text())
    values["notes"]["protocol"] |= {"name": "mine", **changes}
    values["protocol"] = "mine@1"
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_revision": "corrected"}, "expected one label revision, got original and corrected; .* --labels"),
        ({"extractor": "reference"}, "expected one extractor, got strict and reference"),
        ({"max_new_tokens": {"default": 7}}, "to ask vstar in one way, got {'max_new_tokens': .512, 7.}"),
        ({"min_pixels": 50}, "to ask vstar in one way, got {'min_pixels': .None, 50.}"),
    ],
)
def test_protocols_of_one_name_that_differ(tmp_path, changes, message):
    a = with_protocol(write_run(tmp_path / "a", vstar("AAB")))
    b = with_protocol(write_run(tmp_path / "b", vstar("AAB")), **changes)
    assert compare_runs(a, a).protocol == "mine@1"
    with pytest.raises(DataError, match=message):
        compare_runs(a, b)
    if "label_revision" in changes:
        assert compare_runs(a, b, labels="original").labels == "original"


def test_other_items_are_refused(tmp_path):
    a = write_run(tmp_path / "a", vstar("AAB"))
    b = write_run(tmp_path / "b", {"vstar": vstar("AABA")["vstar"][1:]})
    with pytest.raises(
        DataError, match=r"expected the same items of vstar, got 1 \(0\) and 1 \(3\) that the other lacks"
    ):
        compare_runs(a, b)
    found = compare_runs(a, b, partial=True)
    assert found.benchmarks[0].left_out == 2 and difference(found, "overall").paired.n == 2
    assert "INCOMPLETE: 2 items that only one run answered" in comparison_text([found])


@pytest.mark.parametrize("changes", [{"options": ("red", "grey")}, {"gold": "B"}, {"group": "other"}])
def test_changed_items_are_refused(tmp_path, changes):
    rows = vstar("AAB")["vstar"]
    a = write_run(tmp_path / "a", {"vstar": rows})
    b = write_run(tmp_path / "b", {"vstar": [*rows[:2], answer("vstar", "2", "B", **changes)]})
    with pytest.raises(DataError, match=r"the same options and gold letters in vstar, got 1 items that differ \(2\)"):
        compare_runs(a, b)


def test_missing_answers_are_refused(tmp_path):
    a = write_run(tmp_path / "a", vstar("AAB"))
    b = write_run(tmp_path / "b", vstar("AA"), asked={"vstar": 3})
    with pytest.raises(DataError, match="b: expected an answer to every item, got none to 1 of 3 in vstar"):
        compare_runs(a, b)
    assert difference(compare_runs(a, b, partial=True), "overall").paired.n == 2


def test_benchmarks_that_only_one_run_asked(tmp_path):
    a = write_run(tmp_path / "a", vstar("AAB"))
    b = write_run(tmp_path / "b", {**vstar("AAB"), "mmvp": RUNS.mmvp("AB")})
    found = compare_runs(a, b)
    assert (found.only_first, found.only_second) == ([], ["mmvp"])
    assert f"Only {b} asked mmvp" in comparison_text([found])
    c = write_run(tmp_path / "c", {"mmvp": RUNS.mmvp("AB")})
    with pytest.raises(DataError, match=r"a benchmark both asked, got \['vstar'\] and \['mmvp'\]"):
        compare_runs(a, c)


def test_another_extractor_for_both(tmp_path):
    a, b = write_run(tmp_path / "a", vstar("AAB")), write_run(tmp_path / "b", vstar(["All", "A", "A"]))
    assert difference(compare_runs(a, b), "overall").second == 2 / 3
    found = compare_runs(a, b, "reference")
    assert found.protocol == "reference@1" and difference(found, "overall").second == 1


def run_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_compare_on_the_command_line(tmp_path):
    runs = [
        write_run(tmp_path / name, vstar(said), steps=n)
        for name, said, n in (("a", "AB", 2), ("b", "AA", 4), ("c", "BB", 8))
    ]
    done = run_cli("compare", *runs, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"# {runs[1]} against {runs[0]}" in done.output and f"# {runs[2]} against {runs[0]}" in done.output
    values = json.loads((tmp_path / "out/compare.json").read_text())
    assert [v["benchmarks"][0]["differences"][0]["paired"]["discordant"] for v in values] == [1, 1]
    assert values == json.loads(run_cli("compare", *runs, "--json").output)
    assert (tmp_path / "out/compare.md").read_text() in done.output
    assert (tmp_path / "out/latent_steps.svg").read_text().count("<circle") == 3
    assert len(compare_all(runs)) == 2
    alone = run_cli("compare", runs[0])
    assert isinstance(alone.exception, ConfigError) and "two runs or more, got 1" in str(alone.exception)


def test_the_baseline_of_a_score_is_the_first_of_a_comparison(tmp_path):
    a, b = write_run(tmp_path / "a", vstar("AAB")), write_run(tmp_path / "b", vstar("AAA"))
    done = run_cli("score", b, "--baseline", a, "--json")
    baseline = json.loads(done.output)["baseline"]
    assert baseline == json.loads(json.dumps(compare_runs(a, b).as_dict()))
    assert score_run(b).benchmarks[0].main.value == baseline["benchmarks"][0]["differences"][0]["second"]
