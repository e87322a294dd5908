import ast
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

import vreflection.data
from vreflection.data import check as check_module
from vreflection.data.check import check_rows, write_check
from vreflection.data.images import _FOLDERS
from vreflection.data.reasons import ROW_REASONS
from vreflection.data.rows import open_rows
from vreflection.errors import ConfigError, DataError

LOOK, TALK = "<image>\nWhat colour?", "What colour?"


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# One row per reason; see `images` for the files.
BAD_ROWS = {
    "row-type": {"dataset": 3},
    "missing-key": {"conversations": ...},
    "conversation-type": {"conversations": "hi"},
    "conversation-order": {"conversations": []},
    "text-surrogate": {"conversations": turns(LOOK, "<lvr>\ud83d")},
    "reserved-token": {"conversations": turns(LOOK, "<lvr><|im_end|>")},
    "image-type": {"image": 5},
    "image-count": {"image": ["notes/a.png", "notes/b.png"]},
    "image-missing": {"image": "notes/none.png"},
    "path-escape": {"image": "notes/link.png"},
    "image-empty": {"image": "notes/empty.png"},
    "not-an-image": {"image": "notes/text.png"},
    "image-too-large": {"image": "notes/huge.png"},
    "image-aspect": {"image": "notes/thin.png"},
    "image-depth": {"image": "notes/float.tiff"},
    "image-corrupt": {"image": "notes/cut.png"},
    "box-shape": {"bboxes": [0, 0, 1, 1]},
    "box-nan": {"bboxes": [[0, 0, float("inf"), 1]]},
    "box-outside": {"bboxes": [[10, 20, 60, 70]]},
    "box-inverted": {"bboxes": [[0.6, 0, 0.5, 1]]},
    "box-empty": {"bboxes": [[0.5, 0, 0.5, 1]]},
    "box-count": {"bboxes": []},
    "box-image-ambiguous": {"image": ["notes/a.png"] * 2, "conversations": turns("<image>" + LOOK, "<lvr>")},
    "box-images": {"box_images": [1]},
}


@pytest.fixture
def images(image_folder, tmp_path):
    notes = image_folder / "notes"
    (notes / "empty.png").touch()
    (notes / "text.png").write_text("no image")
    (notes / "cut.png").write_bytes((notes / "a.png").read_bytes()[:2000])
    (tmp_path / "outside.png").write_bytes((notes / "a.png").read_bytes())
    (notes / "link.png").symlink_to(tmp_path / "outside.png")
    Image.new("F", (5, 5)).save(notes / "float.tiff")
    Image.new("1", (201, 1)).save(notes / "thin.png")
    Image.new("1", (10_000, 9_000)).save(notes / "huge.png")
    return image_folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_every_kind_of_bad_row_is_reported_with_its_place(workers, images, write_rows, row, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "_CHUNK", 4)
    for module in ("row_index", "rows"):
        monkeypatch.setattr(f"vreflection.data.{module}.MAX_ROW_BYTES", 2000)
    lines = [json.dumps(row()), "{", json.dumps(row(text="x" * 3000))]
    lines += [json.dumps(row(**changes)) for changes in BAD_ROWS.values()]
    lines.append(json.dumps(row(question_id=8, bboxes=[[0, 0, 1.01, 0.5]])))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    entry = {"ds_name": "x", "data_path": "rows.jsonl", "image_folder": "images"}
    meta = write_rows([entry, {**entry, "data_path": 1}], "meta.json")
    report = check_rows(open_rows(meta), workers=workers)
    expected = {reason: f"{tmp_path}/rows.jsonl:{number}" for number, reason in enumerate(BAD_ROWS, start=4)}
    expected |= {"row-not-json": f"{tmp_path}/rows.jsonl:2", "row-too-large": f"{tmp_path}/rows.jsonl:3"}
    expected["meta-entry"] = f"{meta}:2"
    assert {reason: [error.source for error in errors] for reason, errors in report.dropped.items()} == {
        reason: [source] for reason, source in expected.items()
    }
    assert report.dropped.keys() == ROW_REASONS.keys()
    assert (report.rows, report.kept, report.clamped) == (len(lines) + 1, 2, 1)
    assert report.chosen == [0, len(lines) - 1] and report.sizes == [((84, 112),)] * 2
    summary = report.summary()
    assert summary.startswith(f"2 of {len(lines) + 1} rows kept, {len(ROW_REASONS)} dropped, 1 boxes clamped\n")
    assert all(f"  {reason}: 1\n    {source}: expected" in summary for reason, source in expected.items())


def test_reasons_are_all_listed():
    """Whatever the modules that check rows can raise is in the table."""
    folder = Path(vreflection.data.__file__).parent
    raised = set()
    for name in ("row_schema", "rows", "boxes", "images", "pixels", "template"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataError":
                raised |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert {reason for reason in raised if not reason.startswith("file-")} == set(ROW_REASONS)


def test_a_header_check_misses_only_what_lies_behind_the_header(images, write_rows, row):
    rows = [row(), row(image="notes/cut.png"), row(image="notes/text.png"), row(image="notes/thin.png")]
    report = check_rows(open_rows(write_rows(rows), images), decode=False)
    assert report.chosen == [0, 1] and sorted(report.dropped) == ["image-aspect", "not-an-image"]


def test_images_that_rows_share_are_opened_once(images, write_rows, row, monkeypatch):
    opened = []
    real = check_module.open_image
    monkeypatch.setattr(check_module, "open_image", lambda path, **view: [opened.append(path), real(path, **view)][1])
    rows = [row(question_id=i, image=f"notes/{name}.png") for i, name in enumerate(["a", "cut", "a", "cut", "b"])]
    path = write_rows(rows)
    report = check_rows(open_rows(path, images))
    assert report.kept == 3 and len(opened) == 3
    assert [error.source for error in report.dropped["image-corrupt"]] == [f"{path}:2", f"{path}:4"]


def test_the_clean_index_stands_for_its_rows(images, write_rows, row, tmp_path):
    two = ["notes/a.png", "notes/b.png"]
    rows = [
        row(bboxes=[]),
        row(question_id="a", dataset=...),
        row(image=5),
        row(question_id="text", image=None, bboxes=None, conversations=turns(TALK, "red")),
        row(question_id="two", image=two, conversations=turns("<image><image>?", "no")) | {"bboxes": []},
        row(question_id="a", dataset="other"),
    ]
    path = write_rows(rows)
    progress = []
    opened = open_rows(path, images, "other")
    report = check_rows(opened, on_progress=lambda done, total: progress.append((done, total)))
    out = tmp_path / "clean" / "rows.clean"
    out.parent.mkdir()
    target = write_check(out, report, opened, images, "other")
    written = json.loads(target.read_text())
    assert written["dropped_rows"]["image-type"][0]["row"] == f"{path}:3"
    assert written["kept"] == 4 and written["repeated_question_ids"] == 1 and written["rows_without_image"] == 1
    assert (
        written["image_width"] == {"min": 84, "p5": 84, "median": 84, "p95": 126, "max": 140}
        or written["image_width"]["max"] == 140
    )
    assert written["box_area_percent"]["median"] == pytest.approx(25) and progress[-1] == (6, 6)
    clean = open_rows(out)
    assert [sample.question_id for sample in clean] == ["a", "text", "two", "a"] and clean[0].dataset == "other"
    assert [clean.source(i) for i in (0, -1)] == [f"{path}:{n}" for n in (2, 6)]
    assert [clean.image_sizes(i) for i in range(4)] == [[(84, 112)], [], [(84, 112), (140, 56)], [(84, 112)]]
    assert open_rows(path, images).image_sizes(0) is None
    assert str(out) in clean.versions and len(clean.versions) == 2


@pytest.fixture
def clean(images, write_rows, row, tmp_path):
    path = write_rows([row(), row(image=5), row(question_id="last")])
    rows = open_rows(path, images)
    write_check(tmp_path / "rows.clean", check_rows(rows), rows, images)
    return path, tmp_path / "rows.clean"


def test_a_clean_index_is_refused_once_the_data_file_changed(clean, row, write_rows, tmp_path):
    path, index = clean
    text = path.read_text()
    (tmp_path / "elsewhere").mkdir()
    path.unlink()
    with pytest.raises(DataError, match="expected the data file of this clean index at .*, got none; move it"):
        open_rows(index)
    path.write_text(text)  # the same bytes at another time
    assert len(open_rows(index)) == 2
    path.write_text(text.replace("last", "tsal"))
    with pytest.raises(
        DataError, match=f"got another version of .*; run `vreflection data check --data {path} "
    ) as caught:
        open_rows(index)
    assert caught.value.reason == "file-changed" and caught.value.source == str(index)
    path.write_text(text)
    whole = index.read_bytes()
    for at in range(0, len(whole) - 8, 5):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="got a damaged one; run `vreflection data check`"):
            open_rows(index)


def test_a_clean_index_moves_with_its_data(clean, tmp_path):
    path, index = clean
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (path, index):
        file.rename(folder / file.name)
    assert [sample.source for sample in open_rows(folder / index.name)] == [f"{folder}/rows.json:{n}" for n in (1, 3)]


def test_a_meta_file_may_name_clean_indexes(clean, write_rows, tmp_path):
    path, index = clean
    entry = {"ds_name": "x", "data_path": index.name, "image_folder": "images"}
    rows = pickle.loads(pickle.dumps(open_rows(write_rows([entry, {**entry, "data_path": path.name}], "meta.json"))))
    assert [rows.source(i) for i in range(len(rows))] == [f"{path}:{n}" for n in (1, 3, 1, 2, 3)]
    assert rows[1].question_id == "last" and rows.image_sizes(1) == [(84, 112)] and rows.image_sizes(2) is None
    assert {str(index), str(path)} <= set(rows.versions)


def test_a_clean_index_is_not_checked_again(clean):
    with pytest.raises(DataError, match="expected a data file to check, got a clean index"):
        check_rows(open_rows(clean[1]))


def test_a_data_file_that_changes_during_the_check_gives_no_clean_index(images, write_rows, row, tmp_path):
    rows = open_rows(write_rows([row()]), images)
    report = check_rows(rows)
    write_rows([row(), row()])
    with pytest.raises(DataError, match="expected the file that was checked, got another version"):
        write_check(tmp_path / "rows.clean", report, rows, images)
    assert not (tmp_path / "rows.clean").exists()


def test_the_documentation_lists_reasons_and_folders_as_the_code_has_them():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    reasons = [f"| `{reason}` | {meaning.replace('|', '&#124;')} |" for reason, meaning in ROW_REASONS.items()]
    assert "\n".join(["| reason | what is wrong |", "|---|---|", *reasons]) + "\n\n" in text
    folders = [f"| {name} | {', '.join(f'`{folder}`' for folder in places)} |" for name, places in _FOLDERS.items()]
    assert "\n".join(["| dataset | folders below the image folder |", "|---|---|", *folders]) + "\n\n" in text


def rotated(images, name, orientation):
    """A photo that lies on its side in the file."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.new("RGB", (84, 112), (9, 9, 9)).save(images / "notes" / name, exif=tags)
    return f"notes/{name}"


def test_rotated_photos_are_counted_and_the_view_is_told(images, write_rows, row):
    names = [rotated(images, "side.jpg", 6), rotated(images, "side.jpg", 6), rotated(images, "flat.tiff", 3)]
    path = write_rows([row(), *(row(image=name) for name in names)])
    report = check_rows(open_rows(path, images))
    assert (report.counts()["image_view"], report.counts()["rotated_images"]) == ("stored", 2)
    assert "boxes are read in images as stored, without EXIF orientation; 2 photos are rotated" in report.summary()
    assert "--image-view shown" in report.summary() and report.sizes[1] == ((84, 112),)
    for decode in (True, False):
        shown = check_rows(open_rows(path, images, image_view="shown"), decode)
        assert shown.sizes[1] == ((112, 84),) and shown.rotated_images == 2
        assert "boxes are read in images as a viewer shows them, upright; 2 photos" in shown.summary()
    plain = check_rows(open_rows(write_rows([row()]), images))
    assert "EXIF orientation; no photo is rotated" in plain.summary() and "--image-view" not in plain.summary()


def test_a_clean_index_remembers_the_view(images, write_rows, row, tmp_path):
    path, out = write_rows([row(image=rotated(images, "side.jpg", 6))]), tmp_path / "x.clean"
    rows = open_rows(path, images, image_view="shown")
    write_check(out, check_rows(rows), rows, images)
    clean = open_rows(out)
    assert clean.image_view == clean[0].image_view == "shown" and clean.image_sizes(0) == [(112, 84)]
    assert pickle.loads(pickle.dumps(clean)).image_view == "shown"
    with pytest.raises(
        DataError, match=r"expected images read as they were checked \(shown\), got stored; .*--image-view"
    ):
        open_rows(out, image_view="stored")
    with pytest.raises(ConfigError, match="image_view: expected shown or stored, got 'upright'"):
        open_rows(path, images, image_view="upright")
