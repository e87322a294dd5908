"""The same rows in the other forms in which the benchmarks are passed around."""

import base64
import csv
import json
import textwrap

import pyarrow as pa
import pytest
from pyarrow import parquet

from vreflection.errors import DataError
from vreflection.evaluation.benchmarks import blink, load_benchmark

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def load(name, root):
    return load_benchmark(name, root, allow_other_counts=True)


def contents(name, root):
    """Everything about the items but where their images are."""
    kept = []
    for item in load(name, root).items:
        pictures = [image().tobytes() for image in item.images]
        kept.append((item.id, item.question, item.options, item.gold, item.labels, item.group, item.prompt, pictures))
    return kept


def write_tsv(path, rows, wrap=None):
    """As pandas writes it: fields with line breaks or tabs are quoted."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        for row in rows:
            image = row["image"] if wrap is None else "\n".join(textwrap.wrap(row["image"], wrap))
            table.writerow({**row, "image": image})


@pytest.mark.parametrize("wrap", [None, 76])
@pytest.mark.parametrize("order", [sorted, lambda rows: sorted(rows, key=lambda row: row["cycle"])])
def test_hrbench_as_tab_separated_text(demo, tmp_path, wrap, order):
    rows = [{**row, "question": row["question"] + "\tor\nnot? “é”"} for row in demo.hrbench_rows(3)]
    rows = rows if order is sorted else sorted(rows, key=lambda row: row["cycle_category"])
    expected = contents("hrbench4k", demo.write_hrbench(tmp_path / "parquet", rows=rows).parent)
    (tmp_path / "tsv" / "HR-Bench").mkdir(parents=True)
    path = tmp_path / "tsv" / "HR-Bench" / "hr_bench_4k.tsv"
    write_tsv(path, rows, wrap)
    assert contents("hrbench4k", tmp_path / "tsv") == expected and len(expected) == 12
    assert list(load("hrbench4k", tmp_path / "tsv").files) == ["hr_bench_4k.tsv"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [row[-1] for row in contents("hrbench4k", tmp_path / "tsv")] == [row[-1] for row in expected]


def test_wrapped_base64_in_parquet(demo, tmp_path):
    rows = list(demo.hrbench_rows(1))
    expected = contents("hrbench4k", demo.write_hrbench(tmp_path / "plain", rows=rows).parent)
    rows = [{**row, "image": base64.encodebytes(base64.b64decode(row["image"])).decode()} for row in rows]
    assert contents("hrbench4k", demo.write_hrbench(tmp_path / "wrapped", rows=rows).parent) == expected


def test_text_files_that_are_refused(demo, tmp_path):
    rows, path = list(demo.hrbench_rows(1)), tmp_path / "hr_bench_4k.tsv"

    def check(reason, part):
        with pytest.raises(DataError, match=part) as caught:
            contents("hrbench4k", tmp_path)
        assert caught.value.reason == reason and "hr_bench_4k.tsv" in str(caught.value)

    write_tsv(path, [{key: value for key, value in row.items() if key != "category"} for row in rows])
    check("file-columns", "missing: category")
    write_tsv(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\t")] + b"\n")
    check("row-shape", "expected 10 fields, got 9")
    path.write_bytes(whole.replace(b"What", b"\xff\xfe"))
    check("file-not-tsv", "expected tab-separated UTF-8 text")
    path.write_bytes(whole[: whole.rindex(b"\t") + 1] + b'"no end')
    check("file-not-tsv", "expected tab-separated UTF-8 text")
    write_tsv(path, [{key: "" if value == "red" else value for key, value in row.items()} for row in rows])
    check("row-options", "expected a question and four options")


def mirror(folder, name, rows):
    (folder / "data").mkdir(parents=True)
    schema = pa.schema([(key, IMAGE if key == "image" else pa.array([rows[0][key]]).type) for key in rows[0]])
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        parquet.write_table(
            pa.Table.from_pylist(part, schema), folder / "data" / f"{name}-0000{number}-of-00002.parquet"
        )


@pytest.mark.parametrize("corrected", [False, True])
def test_mmvp_as_a_mirror_with_either_labels(demo, tmp_path, corrected):
    folder = demo.write_mmvp(tmp_path / "plain")
    expected = contents("mmvp", tmp_path / "plain")
    rows = []
    with (folder / "Questions.csv").open() as table:
        for row in csv.DictReader(table):
            index = int(row["Index"])
            swapped = {99: "(b)", 100: "(a)"}.get(index) if corrected else None
            image = {"bytes": (folder / "MMVP Images" / f"{index}.jpg").read_bytes(), "path": None}
            rows.append({**row, "Index": index, "Correct Answer": swapped or row["Correct Answer"], "image": image})
    mirror(tmp_path / "mirror" / "MMVP", "train", rows)
    assert contents("mmvp", tmp_path / "mirror") == expected
    assert expected[4][3] == {"original": "A", "corrected": "B"}
    assert list(load("mmvp", tmp_path / "mirror").files) == [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    mirror(tmp_path / "plain", "train", [{"text": "something else", "image": None}] * 2)
    assert contents("mmvp", tmp_path / "plain") == expected  # the distributed files come first


def test_vstar_as_a_mirror_has_no_boxes(demo, tmp_path):
    folder = demo.write_vstar(tmp_path / "plain")
    rows = [json.loads(line) for line in (folder / "test_questions.jsonl").read_text().splitlines()]
    images = [{"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} for row in rows]
    mirror(tmp_path / "mirror" / "vstar-bench", "test", [{**r, "image": i} for r, i in zip(rows, images, strict=True)])
    assert contents("vstar", tmp_path / "mirror") == contents("vstar", tmp_path / "plain")
    assert [item.boxes for item in load("vstar", tmp_path / "mirror").items] == [()] * len(rows)
    mirror(tmp_path / "other" / "vstar", "test", [{**row, "image": None, "label": "blue"} for row in rows])
    with pytest.raises(DataError, match="test-00000-of-00002.parquet:0: expected one letter, got 'blue'"):
        load("vstar", tmp_path / "other")


def test_blink_images_that_are_absent_or_have_no_path(demo, tmp_path):
    expected = contents("blink", demo.write_blink(tmp_path / "plain").parent)
    for path in demo.write_blink(tmp_path / "structs").rglob("*.parquet"):
        table = parquet.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            for column in blink.IMAGES:
                row[column] = {"bytes": row[column] and row[column]["bytes"], "path": None}
        parquet.write_table(pa.Table.from_pylist(rows, table.schema), path)
    assert contents("blink", tmp_path / "structs") == expected
    assert {len(row[-1]) for row in expected} == {1, 2, 3, 4}
