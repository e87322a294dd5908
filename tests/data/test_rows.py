import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vreflection.data import row_index
from vreflection.data.collate import Collator
from vreflection.data.encode import LatentDataset
from vreflection.data.row_index import INDEX_SUFFIX
from vreflection.data.rows import open_rows
from vreflection.data.visual_cot import read_visual_cot
from vreflection.errors import DataError


def ids(rows):
    return [sample.question_id for sample in rows]


@pytest.fixture
def builds(monkeypatch):
    """Paths whose index was built, in order; small files count as large ones."""
    built = []
    build = row_index._build
    monkeypatch.setattr(row_index, "SMALL_FILE_BYTES", 0)
    monkeypatch.setattr(row_index, "_build", lambda path, *rest: [built.append(path.name), build(path, *rest)][1])
    return built


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_read_when_asked_for(name, write_rows, image_folder, row, builds):
    path = write_rows([row(question_id="a"), row(bboxes=[[0, 0, 9, 9]]), row(question_id="😀", dataset=...)], name)
    rows = open_rows(path, image_folder, "other")
    assert len(rows) == 3 and ids([rows[0], rows[-1]]) == ["a", "😀"] and rows[2].dataset == "other"
    assert [rows.source(i) for i in range(3)] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert ids(rows[::2]) == ["a", "😀"] and rows[2].source == f"{path}:3"
    with pytest.raises(DataError, match=f"{path}:2: expected coordinates") as caught:
        rows[1]
    assert caught.value.reason == "box-outside"
    for outside in (3, -4):
        with pytest.raises(IndexError, match=f"below 3, got {outside}"):
            rows[outside]
    again = pickle.loads(pickle.dumps(rows))
    assert ids([again[2]]) == ["😀"] and len(pickle.dumps(rows)) < 1000
    assert builds == [name]
    assert path.with_name(name + INDEX_SUFFIX).is_file() and len(list(path.parent.iterdir())) == 3


def test_json_lines_with_blank_and_broken_lines_carriage_returns_and_a_mark(tmp_path, image_folder, row):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(row(question_id="é"), ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([b"", good, b" \t", b"{", good[:-1] + b'\xff"}', b"\xff", good]))
    rows = open_rows(path, image_folder)
    assert [rows.source(i).rpartition(":")[2] for i in range(len(rows))] == ["2", "4", "5", "6", "7"]
    assert rows[0].question_id == rows[4].question_id == "é"
    _, report = read_visual_cot(path, image_folder)
    assert report.dropped == {"row-not-json": [f"{path}:{line}" for line in (4, 5, 6)]}


def test_a_line_without_end_is_one_bad_row(tmp_path, image_folder, row, monkeypatch):
    monkeypatch.setattr("vreflection.data.row_index.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("vreflection.data.rows.MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(more="x" * 5000)) + "\n" + json.dumps(row()))
    samples, report = read_visual_cot(path, image_folder)
    assert [sample.source for sample in samples] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {"row-too-large": [f"{path}:2"]}


def test_an_index_of_another_version_or_damaged_anywhere_is_rebuilt(write_rows, image_folder, row, builds):
    path = write_rows([row(question_id="a"), row(question_id="b")])
    open_rows(path, image_folder)
    index = path.with_name(path.name + INDEX_SUFFIX)
    whole = index.read_bytes()
    places = range(0, len(whole), 5)
    for at in places:
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert ids(open_rows(path, image_folder)) == ["a", "b"]
    for end in (0, 1, 20, len(whole) - 1):
        index.write_bytes(whole[:end])
        assert ids(open_rows(path, image_folder)) == ["a", "b"]
    assert index.read_bytes() == whole and len(builds) == 1 + len(places) + 4
    status = path.stat()
    write_rows([row(question_id="c"), row(question_id="d")])
    assert path.stat().st_size == status.st_size
    assert ids(open_rows(path, image_folder)) == ["c", "d"]
    os.utime(path, ns=(0, 0))
    assert ids(open_rows(path, image_folder)) == ["c", "d"]
    assert len(builds) == 1 + len(places) + 6


def test_small_files_leave_no_index(write_rows, image_folder, row, tmp_path):
    path = write_rows([row()])
    rows = open_rows(path, image_folder)
    assert len(list(path.parent.glob("*rows*"))) == 1
    assert len(open_rows(path, image_folder, index_folder=tmp_path / "new" / "indexes")) == len(rows) == 1
    assert len(list((tmp_path / "new" / "indexes").iterdir())) == 1


def test_folders_that_take_no_index(write_rows, image_folder, row, builds, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_rows([row()])
    write = row_index.atomic_write

    def refuse(target):
        if target.parent in refused:
            raise PermissionError(13, "Permission denied")
        return write(target)

    monkeypatch.setattr(row_index, "atomic_write", refuse)
    refused = [path.parent]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(open_rows(path, image_folder)) == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "Permission denied" in told[0] and str(tmp_path / "cache") in told[0]
    assert builds == ["rows.json"]
    with pytest.raises(DataError, match="expected a folder that can hold the row index, got .*; free space") as caught:
        refused.append(tmp_path)
        open_rows(path, image_folder, index_folder=tmp_path)
    assert caught.value.reason == "file-index"


def test_a_user_without_a_home_keeps_the_index_beside_the_data(write_rows, image_folder, row, builds, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(row_index.Path, "home", no_home)
    assert len(open_rows(write_rows([row()]), image_folder)) == 1


def test_a_file_that_changes_after_it_was_opened(write_rows, image_folder, row, builds):
    path = write_rows([row(question_id=str(i)) for i in range(9)])
    rows = open_rows(path, image_folder)
    packed = pickle.dumps(rows)
    path.write_text(path.read_text()[:600])
    with pytest.raises(DataError, match="expected the file that was opened, got another version") as caught:
        rows[8]
    assert caught.value.reason == "file-changed"
    with pytest.raises(DataError) as caught:
        read_visual_cot(path, image_folder)
    assert caught.value.reason == "file-not-json"
    write_rows([row() for _ in range(9)])
    with pytest.raises(DataError) as caught:
        pickle.loads(packed)
    assert caught.value.reason == "file-changed"


def test_a_file_written_to_while_it_is_indexed(write_rows, image_folder, row, monkeypatch):
    path = write_rows([row()])
    versions = iter([row_index.fingerprint(path), row_index.fingerprint(path)._replace(mtime_ns=1)])
    monkeypatch.setattr(row_index, "fingerprint", lambda _: next(versions))
    with pytest.raises(DataError, match="written to while it was indexed"):
        open_rows(path, image_folder)


LOAD = (
    "import sys, time; from vreflection.data import row_index\n"
    "built, build = [], row_index._build\n"
    "row_index._build = lambda *given: [built.append(1), time.sleep(0.02), build(*given)][2]\n"
    "for i in range(15):\n"
    "    index = row_index.load_index(sys.argv[1], f'{sys.argv[2]}/{i}')\n"
    "    assert len(index.spans_n3) == 300 and index.spans_n3[299, 2] == 300\n"
    "print(len(built))\n"
)


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_may_need_the_same_index_at_once(locks, write_rows, row, tmp_path):
    """With locks it is built once for all; without, nothing breaks."""
    path = write_rows([row(question_id=str(i)) for i in range(300)])
    code = LOAD if locks else "import sys; sys.modules['fcntl'] = None\n" + LOAD
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "indexes")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    built = [int(process.communicate()[0]) for process in started]
    assert sum(built) == 15 if locks else sum(built) >= 15
    assert len(list((tmp_path / "indexes").glob("*/*"))) == len(list((tmp_path / "indexes").glob("*/*.vr-index"))) == 15


def test_meta_entries_that_lead_back_are_refused(write_rows, row, image_folder):
    inner = [{"ds_name": "out", "data_path": "outer.json", "image_folder": "images"}]
    inner.append({"ds_name": "in", "data_path": "rows.json", "image_folder": "images"})
    write_rows([row(), row(dataset=...)])
    write_rows(inner, "inner.json")
    outer = write_rows([{"ds_name": "x", "data_path": "inner.json", "image_folder": "images"}], "outer.json")
    rows = open_rows(outer)
    assert len(rows) == 3 and rows[2].dataset == "in"
    assert rows.source(0) == f"{outer.with_name('inner.json')}:1"
    with pytest.raises(DataError, match="leads back here") as caught:
        rows[0]
    assert caught.value.reason == "meta-entry"
    assert ids(pickle.loads(pickle.dumps(rows))[1:]) == ids(rows[1:])


TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "<lvr> é"}]
SILENT = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]


def as_text(values):
    return [None if value is None else json.dumps(value) for value in values]


def test_rows_of_text_train_beside_rows_with_images(write_rows, image_folder, row, processor):
    rows = [row(image=None, bboxes=[], conversations=SILENT), row(conversations=TURNS)]
    dataset = LatentDataset(open_rows(write_rows(rows), image_folder), processor)
    batch = Collator(processor.token_ids.pad)([dataset[0], dataset[1]])
    assert batch["image_grid_thw"].tolist() == [[1, 8, 6]] and batch["box_sample"].tolist() == [1]
    text_only = Collator(processor.token_ids.pad)([dataset[0]])
    assert "pixel_values" not in text_only and len(text_only["image_grid_thw"]) == 0
    assert (text_only["labels"] >= 0).any()


@pytest.mark.parametrize("spelling", [list, as_text], ids=["nested", "text"])
def test_parquet(spelling, tmp_path, image_folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    columns = {
        "question_id": ["a", "b", "c"],
        "image": ["notes/a.png", "notes/b.png", None],
        "conversations": spelling([TURNS, TURNS, SILENT]),
        "bboxes": spelling([[[0.0, 0.0, 0.5, 0.5]], [[0.0, 0.0, float("nan"), 0.5]], None]),
        "unrelated": [1, 2, 3],
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    rows = open_rows(path, image_folder, "notes")
    assert (
        len(rows) == 3 and rows[0].boxes.tolist() == [[0, 0, 0.5, 0.5]] and rows[0].conversations[1].text == "<lvr> é"
    )
    assert rows[2].image_paths == () and rows.source(2) == f"{path}:3"
    samples, report = read_visual_cot(path, image_folder)
    assert ids(samples) == ["a", "c"] and report.dropped == {"box-nan": [f"{path}:2"]}
    columns["image"] = [["notes/a.png"], ["notes/b.png", "notes/a.png"], []]
    parquet.write_table(pyarrow.table(columns), path)
    assert open_rows(path, image_folder)[0].image_paths == (str(image_folder / "notes/a.png"),)


def test_parquet_that_holds_no_rows(tmp_path, image_folder, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    cases = [
        ({"text": ["x"]}, "file-shape", "got text; rename the columns"),
        ({"conversations": ["[]"], "image": [b"\x89PNG"]}, "file-shape", "got binary; write the images to files"),
        ({"conversations": ["[]"], "image": [{"bytes": b"", "path": ""}]}, "file-shape", "got struct<"),
    ]
    for columns, reason, quoted in cases:
        parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(DataError) as caught:
            open_rows(path, image_folder)
        assert caught.value.reason == reason and quoted in str(caught.value)
    odd = {"conversations": [TURNS], "bboxes": ["[["], "question_id": [np.datetime64("2020-01-01", "s")]}
    parquet.write_table(pyarrow.table(odd), path)
    assert read_visual_cot(path, image_folder)[1].dropped == {"row-type": [f"{path}:1"]}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="expected a whole Parquet file, got .*; download it again") as caught:
        open_rows(path, image_folder)
    assert caught.value.reason == "file-not-parquet"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'vreflection\[train\]'") as caught:
        open_rows(path, image_folder)
    assert caught.value.reason == "file-needs-pyarrow"
