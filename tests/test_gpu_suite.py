"""Control flow of `bench/gpu_suite.sh` without a GPU: stand-ins for Python and the tools it calls, real `timeout`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and coreutils' timeout"
)

# Says what it was called with, and does what BEHAVIOUR says for the first of its patterns that fits the call.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in *"bench report"*) cat "$BENCH_ROWS"; exit 0;; esac
while IFS='|' read -r pattern act; do
  [[ -n "$pattern" && "$*" == *$pattern* ]] && { eval "$act"; exit $?; }
done <<< "$BEHAVIOUR"
exit 0
"""
ROW = 'printf \'{"row": "%s"}\\n\' '


@pytest.fixture
def suite(tmp_path):
    """A checkout with the script alone, and a function that runs it."""
    (tmp_path / "repo" / "bench").mkdir(parents=True)
    (tmp_path / "repo" / "vreflection").mkdir()
    (tmp_path / "repo" / "kernels").mkdir()
    shutil.copy(ROOT / "bench" / "gpu_suite.sh", tmp_path / "repo" / "bench")
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name in ("python3", "compute-sanitizer"):
        (stand_ins / name).write_text(PYTHON)
        (stand_ins / name).chmod(0o755)

    class Suite:
        repo, out, calls = tmp_path / "repo", tmp_path / "out", tmp_path / "calls"

        def start(self, behaviour="", **settings):
            self.calls.write_text("")
            known = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "OUT": str(self.out), "CALLS": str(self.calls)}
            given = {"LEAST_S": "1", "RESERVE_S": "2", "BEHAVIOUR": behaviour, **settings}
            return subprocess.Popen(
                ["bash", str(self.repo / "bench" / "gpu_suite.sh")], env={"HOME": str(tmp_path), **known, **given},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
            )  # fmt: skip

        def run(self, behaviour="", **settings):
            process = self.start(behaviour, **settings)
            said = process.communicate(timeout=60)[0]
            return process.returncode, said

        def called(self):
            return self.calls.read_text().splitlines()

    return Suite()


def test_everything_is_run_by_value_and_the_table_comes_last(suite):
    rows = f"""bench_probe_attention|{ROW} probe >> "$BENCH_ROWS"
-m gpu tests|echo "12 passed, 3 skipped in 9s"
"""
    code, said = suite.run(rows)
    assert code == 0
    order = ("pip install", "info --json", "-m gpu tests", "bench_probe_attention", "bench_decode_shapes.py -k 7b",
             "bench_training_shapes.py -k 7b", "bench_training_shapes.py -k 3b", "bench_losses", "racecheck",
             "bench report")  # fmt: skip
    calls = suite.called()
    places = [next(i for i, call in enumerate(calls) if name in call) for name in order]
    assert places == sorted(places)
    lines = said.splitlines()
    assert lines[0] == '{"row": "probe"}' and lines[1] == "--- parts"
    assert re.search(r"gpu_tests: exit 0 after \d+ s: 12 passed, 3 skipped in 9s", said)
    assert lines[-1].startswith("--- ") and "of 530" in lines[-1]


def test_every_suite_it_names_exists(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_suite.sh")], capture_output=True, text=True, check=True,
        env={**os.environ, "DRY": "1", "OUT": str(tmp_path), "BUDGET_S": "5000"},
    ).stdout  # fmt: skip
    named = {word for line in done.splitlines() for word in line.split() if word.startswith("bench/bench_")}
    assert len(named) > 8 and all((ROOT / name).exists() for name in named), named


def test_a_failing_part_does_not_stop_the_rest_and_its_failures_are_named(suite):
    behaviour = """-v -m gpu tests|echo "FAILED tests/test_gpu.py::test_x - no"; echo "1 failed, 2 passed in 3s"; false
bench_probe|exit 3
"""
    code, said = suite.run(behaviour)
    assert code == 0
    assert re.search(
        r"gpu_tests: exit 1 after \d+ s: 1 failed, 2 passed in 3s\n    FAILED tests/test_gpu.py::test_x", said
    )
    assert "probe_attention: exit 3" in said and "region_attention: exit 0" in said and "race_check: exit 0" in said


def test_a_part_that_hangs_is_stopped_and_what_it_did_is_kept(suite):
    behaviour = f"""bench_probe|{ROW} kept >> "$BENCH_ROWS"; echo "half a log"; exec sleep 60
-m gpu tests|echo "a PASSED"; echo "b FAILED"; echo "c PASSED"; exec sleep 60
"""
    begin = time.monotonic()
    code, said = suite.run(behaviour, BUDGET_S="5", PARTS="gpu_tests")
    assert code == 0 and time.monotonic() - begin < 20
    # Three seconds are left of five; less, if a whole second passed before.
    assert re.search(r"gpu_tests: stopped at its [123] s: 1 FAILED, 2 PASSED", said)
    code, said = suite.run(behaviour, BUDGET_S="5", PARTS="ops")
    assert code == 0 and re.search(r"probe_attention: stopped at its [123] s", said)
    assert "region_attention: left out: the 5 s are used up" in said
    assert said.splitlines()[0] == '{"row": "kept"}'
    assert (suite.out / "rows.jsonl").read_text() == '{"row": "kept"}\n'
    assert "half a log" in (suite.out / "log.txt").read_text()


def test_stopped_from_outside_it_still_prints_the_table(suite):
    behaviour = f"""bench_probe|{ROW} kept >> "$BENCH_ROWS"; echo begun; exec sleep 60
"""
    process = suite.start(behaviour)
    deadline = time.monotonic() + 30
    while not (suite.out / "rows.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 143
    lines = said.splitlines()
    assert lines[0] == '{"row": "kept"}' and lines[1] == "--- parts" and lines[-1].startswith("--- ")
    assert "probe_attention: stopped from outside" in said and "gpu_tests: exit 0" in said
    assert "begun" in (suite.out / "log.txt").read_text()


def test_without_an_installation_it_goes_on_from_the_source_tree(suite):
    behaviour = 'pip install|exit 1\ninfo --json|ls -l vreflection; echo "path $PYTHONPATH"\n'
    code, said = suite.run(behaviour)
    assert code == 0 and "install: exit 1" in said and "NOT INSTALLED: runs from the source tree" in said
    log = (suite.out / "log.txt").read_text()
    assert "kernels -> ../kernels" in log and f"path {suite.repo}" in log
    assert not (suite.repo / "vreflection" / "kernels").exists()


def test_parts_can_be_chosen(suite):
    suite.run(PARTS="training race_check")
    calls = [call for call in suite.called() if "pytest" in call]
    assert len(calls) == 3 and all("training_shapes" in call or "racecheck" in call for call in calls)


def test_dry_mode_runs_nothing_and_plans_within_the_budget(suite):
    code, said = suite.run(DRY="1")
    assert code == 0 and suite.called() == ["-c import xdist"]
    limits = [int(line.split(" within ")[1].split()[0]) for line in said.splitlines() if " within " in line]
    assert len(limits) >= 8 and sum(limits) <= 530 - 2
    assert "left out: the 530 s are used up" in said  # all at their limits do not fit: the last ones wait


def test_few_files_come_back(suite):
    suite.run(f'bench_probe|{ROW} probe >> "$BENCH_ROWS"\n')
    assert {path.name for path in suite.out.iterdir()} <= {"rows.jsonl", "log.txt", "summary.txt", "table.md"}


def test_rows_are_kept_as_they_are_measured(tmp_path):
    """The suites' own side of it: a row of each finished case is in the file although the run is killed.

    And the threads of one case are not those of the next.
    """
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "test_two.py").write_text(
        "import os, time, torch\n"
        "def test_zero(): torch.set_num_threads(1 + torch.get_num_threads())\n"
        "def test_one(interleaved): interleaved({'ours': lambda: time.sleep(1e-4), 'b': lambda: None}, 'b', 2)\n"
        "def test_two(benchmark): os._exit(9)\n"
    )
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], cwd=tmp_path, check=False,
        env={**os.environ, "BENCH_ROWS": str(tmp_path / "rows.jsonl")}, capture_output=True, text=True,
    )  # fmt: skip
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["extra_info"]["threads"] == str(torch.get_num_threads())
    assert done.returncode == 9 and row["name"] == "test_one" and len(row["extra_info"]["raw_s"]["ours"]) == 2
