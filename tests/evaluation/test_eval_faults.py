"""Real processes that are killed, interrupted, run side by side, or given images far larger than what they may hold."""

import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vreflection.evaluation.benchmarks import BENCHMARKS

ALL = ",".join(BENCHMARKS)
ITEMS = 50
# The command itself, slowed down so that there is a moment to kill it in; after `HOLD` answers it waits for that.
SLOW = """
import os, time
from vreflection.cli import main
from vreflection.evaluation.raw_files import RawWriter
write, left = RawWriter.write, [int(os.environ.get("HOLD", "1000"))]
def slowly(self, answer):
    write(self, answer)
    left[0] -= 1
    time.sleep(0.02 if left[0] > 0 else 120)
RawWriter.write = slowly
main()
"""
# The high-water mark since this program began; what getrusage tells is also that of the process it was forked from.
MEASURED = """
import re
from vreflection.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
READ = """
import re, sys
from pathlib import Path
from vreflection.evaluation.benchmarks.parquet_rows import RowReader
peak = lambda: print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
reader = RowReader(Path(sys.argv[1]), ("index",))
reader.row(0)
peak()
reader = RowReader(Path(sys.argv[1]), ("image",))
assert len({hash(reader.row(number)["image"]) for number in range(16)}) == 4
peak()
"""


def lines(out):
    return sorted(line for path in out.glob("raw/*.jsonl") for line in path.read_bytes().splitlines(True))


def whole_lines(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("raw/*.jsonl"))


@pytest.fixture
def arguments(checkpoint, demo_root, short):
    def made(out, *more, data_root=demo_root, benchmarks=ALL):
        words = ["eval", "--model", checkpoint, "--benchmarks", benchmarks, "--data-root", data_root, "--out", out]
        return [str(word) for word in (*words, "--protocol", short, "--allow-other-counts", *more)]

    return made


def heed_interrupts():
    """Shells start background jobs deaf to interrupts, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start():
    """Start a Python process; those still running at the end are killed."""
    running = []

    def started(*words, hold=1000):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOLD": str(hold)}
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        running.append(process)
        return process

    yield started
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_answers(process, out, count):
    while whole_lines(out) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, checkpoint, demo_root, short):
    """A run without trouble, unsharded, in this process."""
    from vreflection.evaluation.run import EvalSettings, run_evaluation

    out = tmp_path_factory.mktemp("reference") / "run"
    run_evaluation(
        EvalSettings(str(checkpoint), tuple(BENCHMARKS), out, demo_root, str(short), allow_other_counts=True)
    )
    assert len(lines(out)) == ITEMS
    return lines(out)


def test_killed_interrupted_and_resumed_is_as_uninterrupted(start, arguments, evaluate, tmp_path, reference):
    out, dice = tmp_path / "run", random.Random(os.getpid())
    wanted = dice.randint(1, 20)
    killed = start("-c", SLOW, *arguments(out), hold=wanted + 4)
    wait_for_answers(killed, out, wanted)
    time.sleep(dice.random() * 0.1)
    other = evaluate(out, benchmarks=ALL)
    assert other.returncode == 2 and f"is being worked on by process {killed.pid}" in other.stderr
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    kept = whole_lines(out)
    assert kept < ITEMS

    wanted = dice.randint(1, 10)
    interrupted = start("-c", SLOW, *arguments(out, "--batch-size", "3"), hold=wanted + 4)
    wait_for_answers(interrupted, out, kept + wanted)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 1 and "run the same command again to go on" in said and "Traceback" not in said
    assert kept < whole_lines(out) < ITEMS

    last = evaluate(out, benchmarks=ALL)
    assert last.returncode == 0, last.stderr
    assert lines(out) == reference


def test_shards_side_by_side_one_of_them_killed(start, arguments, tmp_path, reference):
    out = tmp_path / "run"
    held = {0: 8, 1: 1000}
    first, second = (start("-c", SLOW, *arguments(out, "--shard", f"{n}/2"), hold=held[n]) for n in (0, 1))
    wait_for_answers(first, out, 5)
    first.kill()
    _, said = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert len(lines(out)) < ITEMS
    again = start("-m", "vreflection", *arguments(out, "--shard", "0/2", "--json"))
    told, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert sum(json.loads(told)["done"].values()) == ITEMS and json.loads(told)["score"]["missing"] == 0
    assert lines(out) == reference


def test_torchrun(start, arguments, tmp_path, reference):
    out = tmp_path / "run"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vreflection")
    job = start(*launch, *arguments(out, "--json"))
    told, said = job.communicate(timeout=180)
    assert job.returncode == 0, said
    assert json.loads(told)["score"]["missing"] == 0  # printed once, by the process that waited for the other one
    assert {path.name for path in out.glob("raw/mmvp*")} == {"mmvp.0-of-2.jsonl", "mmvp.1-of-2.jsonl"}
    assert lines(out) == reference


def write_8k(demo, root, questions):
    """HR-Bench 8K with different images of 20 MB in base64 each, written as one row group with one dictionary page."""
    noise = Image.effect_noise((7680, 4320), 60)
    images = []
    for number in range(questions):
        made, file = Image.merge("RGB", (noise, noise, noise)), io.BytesIO()
        made.paste(demo.picture(number), (0, 0))
        made.save(file, "JPEG", quality=75)
        images.append(base64.b64encode(file.getvalue()).decode())
    assert len(images[0]) > 20 * 2**20
    columns = pa.Table.from_pylist([{**row, "image": ""} for row in demo.hrbench_rows(questions)])
    of_row = pa.DictionaryArray.from_arrays(pa.array([n // 4 for n in range(4 * questions)], pa.int32()), images)
    columns = columns.set_column(columns.schema.get_field_index("image"), "image", of_row)
    folder = root / "HR-Bench"
    folder.mkdir(parents=True)
    parquet.write_table(columns, folder / "hr_bench_8k.parquet", row_group_size=len(columns), store_schema=False)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's count of resident memory")
def test_memory_does_not_grow_with_the_number_of_8k_images(demo, start, arguments, tmp_path):
    peaks = []
    for questions in (1, 4):
        root, out = tmp_path / str(questions), tmp_path / f"run{questions}"
        write_8k(demo, root, questions)
        process = start("-c", MEASURED, *arguments(out, data_root=root, benchmarks="hrbench8k"))
        told, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert len(lines(out)) == 4 * questions
        peaks.append(int(told.split()[-1]) / 1024)
    print("peak MiB:", peaks)
    assert peaks[1] < 2048
    assert peaks[1] - peaks[0] < 200  # three more decoded images would be 300

    path = tmp_path / "4" / "HR-Bench" / "hr_bench_8k.parquet"
    told, said = start("-c", READ, str(path)).communicate(timeout=120)
    before, after = (int(number) / 1024 for number in told.split())
    print("reader MiB:", before, after)
    assert path.stat().st_size > 80 * 2**20 and after - before < 70  # not the page, packed and unpacked
