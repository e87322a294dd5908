import functools
import json

import pytest
from PIL import Image

from vreflection.data.rows import open_rows


@pytest.fixture
def run(command_line):
    return functools.partial(command_line, "data")


@pytest.fixture
def workplace(tmp_path):
    """`rows.json` with a good and a bad row, and `images/a.png`."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "<lvr> !"}]
    good = {"image": "a.png", "conversations": turns, "bboxes": [[0, 0, 0.5, 1]]}
    (tmp_path / "rows.json").write_text(json.dumps([good, {**good, "image": "b.png"}]))
    return tmp_path


def test_check_reports_and_writes_a_clean_index(run, workplace):
    data = workplace / "rows.json"
    done = run("check", "--data", data, "--image-folder", workplace / "images")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 2 rows kept, 1 dropped, 0 boxes clamped\n  image-missing: 1\n")
    assert f"{data}:2: expected 'b.png'" in done.stdout and "box area, %: min 50" in done.stdout
    rows = open_rows(f"{data}.clean")
    assert len(rows) == 1 and rows[0].source == f"{data}:1" and rows.image_sizes(0) == [(40, 30)]
    assert json.loads((workplace / "rows.json.clean.report.json").read_text())["dropped"] == {"image-missing": 1}


def test_check_as_json_strict_and_elsewhere(run, workplace):
    data, out = workplace / "rows.json", workplace / "out.clean"
    arguments = ("check", "--data", data, "--image-folder", workplace / "images", "--out", out, "--json", "--no-decode")
    assert run(*arguments).returncode == 0
    done = run(*arguments, "--strict", "--workers", 2)
    assert done.returncode == 1 and json.loads(done.stdout)["kept"] == 1 and done.stderr == ""
    assert len(open_rows(out)) == 1 and not (workplace / "rows.json.clean").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": "none.json"}, "none.json: expected a readable data file"),
        ({"--image-folder": "none"}, "expected a folder of images at none, got none"),
        ({"--image-folder": None}, "--image-folder: expected image_folder for the rows of"),
        ({"--out": "none/x.clean"}, "--out: expected a folder that can be written to, got"),
        ({"--out": "rows.json"}, "--out: expected another file than the data"),
        ({"--image-folder": "."}, "rows.json: expected a usable row, got none; rows.json.clean.report.json says why"),
    ],
)
def test_bad_input_exits_with_2(run, workplace, changes, message, monkeypatch):
    monkeypatch.chdir(workplace)
    options = {"--data": "rows.json", "--image-folder": "images", **changes}
    done = run("check", *[part for option in options.items() if option[1] for part in option])
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert not list(workplace.glob("*.clean"))


def test_an_interrupt_leaves_nothing_half_written(run, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    before = sorted(workplace.iterdir())

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vreflection.data.check.open_image", interrupt)
    done = run("check", "--data", "rows.json", "--image-folder", "images")
    assert done.returncode and sorted(workplace.iterdir()) == before
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("vreflection.data.atomic.os.replace", interrupt)
    run("check", "--data", "rows.json", "--image-folder", "images")
    assert sorted(workplace.iterdir()) == before


def test_convert_gives_rows_that_pass_the_check(run, workplace):
    flat = [
        {"image": "a.png", "bbox": [0, 0, 20, 15], "width": 40, "height": 30, "expression": "a corner"},
        {"image": "a.png", "bbox": [0, 0, 20, 0], "width": 40, "height": 30, "expression": "a line"},
    ]
    (workplace / "flat.json").write_text(json.dumps(flat))
    out = workplace / "rows.jsonl"
    arguments = ("convert", "--from", "refcoco", "--annotations", workplace / "flat.json", "--out", out)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 rows written, 1 annotations left out\n  zero-area: 1 (annotation 2)\n")
    assert json.loads((workplace / "rows.jsonl.report.json").read_text())["left_out"] == {"zero-area": ["2"]}
    assert run("check", "--data", out, "--image-folder", workplace / "images", "--strict").returncode == 0
    assert json.loads(run(*arguments, "--json", "--question-template", "Say {name}.").stdout)["rows"] == 1
    assert open_rows(out, workplace / "images")[0].conversations[0].text == "<image>\nSay a corner."
    assert "expected one of coco, refcoco, got 'voc'" in run(*arguments, "--from", "voc").stderr
