import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vreflection.benchmarking.rows import read_rows
from vreflection.benchmarking.table import report_text, short_text
from vreflection.errors import DataError

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "cpu"


def row(name="test_probe[1]", **info):
    raw = {"ours": [1.0, 1.0, 1.2], "plain": [0.4, 0.5, 0.6], "stock": [2.0, 2.0, 2.0]}
    kept = {"raw_s": raw, "speedup_over": "stock", "device": "cpu", "dtype": "float32", "torch": "2", "threads": "2"}
    return {"name": name, "fullname": f"bench/bench_probe.py::{name}", "extra_info": kept | info}


@pytest.fixture
def read(tmp_path):
    def call(*rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps({"benchmarks": list(rows)}))
        return read_rows([path])

    return call


def test_a_row(read):
    (found,) = read(row(bytes=4.0, flops=2.0, speed_of_light_s=0.25, samples_per_s={"ours": 3.0}))
    assert (found.suite, found.label, found.ours, found.base) == ("probe", "probe[1]", "ours", "stock")
    assert found.ratio("ours") == 2 and found.ratio("ours", "plain") == 0.5
    assert found.extra == {"samples_per_s": {"ours": 3.0}} and found.settings["threads"] == "2"
    # "plain" is faster, but a variant of our own and no baseline.
    assert found.hardest == "stock" and found.standing == "wins"


def test_the_fastest_baseline_decides_who_loses(read):
    (found,) = read(row(baselines=["stock", "plain"]))
    assert found.hardest == "plain" and found.standing == "loses"
    assert "| 2.00x | 1.67 to 2.00x | 0.50x plain |" in report_text([found])


def test_what_the_rounds_do_not_tell_apart_is_level(read):
    noisy = {"ours": [1.0, 1.0, 1.0, 1.0, 1.0], "stock": [0.9, 0.98, 0.99, 1.01, 1.2]}
    lost = {"ours": [3.0], "stock": [2.0]}
    rows = read(row("test_wins"), row("test_noisy", raw_s=noisy), row("test_lost", raw_s=lost))
    assert [one.standing for one in rows] == ["wins", "level", "loses"]
    text = report_text(rows)
    places = [text.index(name) for name in ("Losing rows: 1 of 3", "| lost |", "Level: 1", "| noisy |", "| wins |")]
    assert places == sorted(places)
    assert [line.split()[0] for line in short_text(rows).splitlines()] == ["LOSES", "level", "wins:"]


def test_losing_rows_come_first_the_worst_at_the_top(read):
    rows = read(
        row("test_wins"),
        row("test_loses", raw_s={"ours": [3.0], "stock": [2.0]}),
        row("test_loses_more", raw_s={"ours": [8.0], "stock": [2.0]}),
    )
    text = report_text(rows)
    places = [text.index(name) for name in ("Losing rows: 2 of 3", "loses_more", "| loses |", "Other rows", "| wins |")]
    assert places == sorted(places)
    assert "ours 8 s | stock 2 s | 0.25x" in text and "ours 1 s | stock 2 s | 2.00x | 1.67 to 2.00x" in text
    short = short_text(rows, width=30).splitlines()
    assert [line.startswith("LOSES") for line in short] == [True, True, False]
    assert all(len(line) <= 30 for line in short)


def test_share_memory_and_further_figures(read):
    memory = {"name": "test_memory", "extra_info": {"extra_peak_bytes": {"ours": 2**20, "stock": 2**22}}}
    text = report_text(read(row(speed_of_light_s=0.25), memory, row("test_rate", rate={"ours": 12.3456})))
    assert "| 250 ms, 25 % |" in text and "memory: ours 1 MiB, stock 4 MiB (ratio 0.250)" in text
    assert "rate: rate: ours 12.35" in text


def test_rows_with_nothing_to_lose_against_are_listed_apart(read):
    text = report_text(read(row(raw_s={"whole": [2.0], "part": [0.5]}, speedup_over="whole")))
    assert "Losing rows: 0 of 0" in text and "whole 2 s; part 500 ms" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object with a list `benchmarks`"),
        ('{"benchmarks": [3]}', r"benchmarks\[0\]: expected an object with a `name`"),
        (json.dumps({"benchmarks": [row(raw_s={"ours": [1.0, -1.0]})]}), "expected a list of positive seconds"),
        (json.dumps({"benchmarks": [row(raw_s={"ours": [1.0], "stock": [1.0, 2.0]})]}), "as many rounds"),
        (json.dumps({"benchmarks": [row(speedup_over="host")]}), "speedup_over: expected one of ours, plain, stock"),
        (json.dumps({"benchmarks": [row(baselines=["host"])]}), "baselines: expected names of raw_s"),
        (json.dumps({"benchmarks": [row(flops="many")]}), "flops: expected a number"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows([path])
    assert caught.value.source is not None and caught.value.source.startswith(str(path))


def test_one_row_per_line_and_a_last_one_that_a_kill_cut(tmp_path):
    path, line = tmp_path / "rows.jsonl", json.dumps(row())
    path.write_text(f"{line}\n{line}\n{line[:40]}")
    assert len(read_rows([path])) == 2
    path.write_text(f"{line[:40]}\n{line}\n")
    with pytest.raises(DataError, match="expected JSON"):
        read_rows([path])


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_rows([tmp_path / "none.json"])


def test_the_committed_table_is_the_one_of_the_committed_rows():
    paths = sorted(COMMITTED.glob("*-operators.json"))
    rows = read_rows(paths)
    text = report_text(rows)
    assert len(rows) > 70 and re.search(r"Losing rows: \d+ of \d+", text)
    for found in rows:
        assert f"{found.label}" in text


def test_needs_no_torch():
    code = (
        "import sys; from vreflection.benchmarking import comparison, plots, rows, table;"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
