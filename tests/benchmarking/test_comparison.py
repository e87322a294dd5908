import numpy as np
import pytest

from vreflection.benchmarking.comparison import compare_rows, comparison_text
from vreflection.benchmarking.rows import Row
from vreflection.errors import DataError


def make(name, ours, stock, device="cpu", base: str | None = "stock", torch="2"):
    seconds = {"ours": tuple(ours)} | ({} if stock is None else {"stock": tuple(stock)})
    settings = {"device": device, "torch": torch, "threads": "2"}
    return Row(name, "probe", seconds, base, ("stock",), None, None, None, {}, {}, {}, settings)


def a_run(rng, rows=20, rounds=7, noise=0.05, drift=0.0, slower=None, by=1.3):
    """Rows whose machine drifts from round to round by up to a half, in both variants alike."""
    found = []
    for index in range(rows):
        machine = np.exp(rng.uniform(-0.4, 0.4, rounds))
        level = np.exp(drift * rng.standard_normal()) * (by if index == slower else 1.0)
        ours, stock = (machine * np.exp(noise * rng.standard_normal(rounds)) for _ in range(2))
        found.append(make(f"test_{index}", 0.2 * level * ours, stock))
    return found


def test_a_slower_row_is_flagged_through_the_machines_drift():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = compare_rows(a_run(rng), a_run(rng, slower=3, by=1.5))
        assert [change.row for change in found.slower] == ["3"]
        assert found.slower[0].change == pytest.approx(1.5, rel=0.2) and found.slower[0].low > 1


def test_unchanged_runs_are_rarely_flagged_although_each_run_has_its_own_level():
    """100 pairs of runs of the same code, 20 rows each, which differ by 8 % from run to run beyond their rounds."""
    flagged = 0
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        flagged += bool(compare_rows(a_run(rng, drift=0.08), a_run(rng, drift=0.08)).slower)
    assert flagged <= 8


def test_a_run_that_is_slower_everywhere_is_flagged():
    rng = np.random.default_rng(0)
    old = a_run(rng, noise=0.01)
    new = [
        make(row.name, [1.2 * s for s in row.seconds["ours"]], row.seconds["stock"]) for row in a_run(rng, noise=0.01)
    ]
    assert len(compare_rows(old, new).slower) == 20


def test_many_different_changes_are_unclear_and_not_hidden():
    """Nearly every row changed, each differently (another machine, a rewrite): the spread is no noise then."""
    rng = np.random.default_rng(0)
    old, new = a_run(rng, noise=0.01), a_run(rng, noise=0.01, drift=0.3)
    found = compare_rows(old, new)
    assert sum(change.verdict == "unclear" for change in found.changes) > 10
    assert "unclear, up to" in comparison_text(found)


def test_faster_is_no_regression():
    rng = np.random.default_rng(0)
    found = compare_rows(a_run(rng), a_run(rng, slower=3, by=0.5))
    assert not found.slower and [change.row for change in found.changes if change.verdict == "faster"] == ["3"]


def test_few_rounds_are_not_judged_and_repetitions_help():
    old, new = make("test_a", [1.0] * 3, [2.0] * 3), make("test_a", [3.0] * 3, [2.0] * 3)
    (change,) = compare_rows([old], [new]).changes
    assert change.verdict == "few rounds" and change.change == pytest.approx(3)
    (change,) = compare_rows([old, old], [new, new]).changes
    assert change.verdict == "slower"


def test_seconds_are_compared_only_when_asked():
    old = make("test_a", [1.0] * 5, [2.0] * 5)
    new = make("test_a", [2.0] * 5, [4.0] * 5)
    assert not compare_rows([old], [new]).slower
    assert {change.variant for change in compare_rows([old], [new], seconds=True).slower} == {"ours", "stock"}


def test_what_cannot_be_compared_is_named():
    alone = make("test_alone", [1.0] * 5, None, base="ours")
    old = [make("test_a", [1.0] * 5, [2.0] * 5), make("test_gone", [1.0] * 5, [2.0] * 5), alone]
    new = [make("test_a", [1.0] * 5, [2.0] * 5, torch="3"), make("test_fresh", [1.0] * 5, [2.0] * 5), alone]
    found = compare_rows(old, new)
    assert (found.only_old, found.only_new, found.unpaired) == (("gone",), ("fresh",), ("alone",))
    text = comparison_text(found)
    for told in (
        "only in the old run: gone",
        "only in the new run: fresh",
        "nothing to compare with: alone",
        "torch differs",
    ):
        assert told in text
    assert "noise between runs is not known" in text


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (make("test_a", [1.0], [2.0], device="cuda"), "same device, got cpu and cuda"),
        (make("test_b", [1.0], [2.0]), "rows of the same suites"),
    ],
)
def test_other_machines_and_other_suites_are_refused(new, message):
    with pytest.raises(DataError, match=message):
        compare_rows([make("test_a", [1.0], [2.0])], [new])


def test_slower_rows_are_shown_first():
    rng = np.random.default_rng(1)
    lines = comparison_text(compare_rows(a_run(rng), a_run(rng, slower=7, by=1.5))).splitlines()
    assert lines[2].startswith("| 7 | ours |") and lines[2].endswith("slower |")
    assert "20 variants judged, 1 slower" in "\n".join(lines)
