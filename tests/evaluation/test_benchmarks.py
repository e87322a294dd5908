"""The loaders on files in the benchmarks' exact schemas, and on files that are not."""

import base64
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vreflection.errors import ConfigError, DataError
from vreflection.evaluation.benchmarks import (
    BENCHMARKS,
    blink,
    hrbench,
    load_benchmark,
    source,
    zip_images,
)
from vreflection.evaluation.benchmarks.choices import letter_of, split_lettered, without_letter
from vreflection.evaluation.benchmarks.pictures import decode_picture
from vreflection.evaluation.fingerprints import WHOLE, file_digest, listing_digest
from vreflection.evaluation.run import limited, units


def load(name, root):
    return load_benchmark(name, root, allow_other_counts=True)


def pixels(image):
    return image.mode, image.size, image.tobytes()


def refused(name, root, reason, *parts):
    with pytest.raises(DataError) as caught:
        for item in load(name, root).items:
            for opener in item.images:
                opener()
    assert caught.value.reason == reason, caught.value
    for part in parts:
        assert part in str(caught.value)


def test_published_counts_are_those_of_the_papers():
    assert {name: spec.rows for name, spec in BENCHMARKS.items()} == {
        "mmvp": 300, "blink": 1901, "vstar": 191, "hrbench4k": 800, "hrbench8k": 800, "mme-realworld-lite": 1919,
    }  # fmt: skip
    for spec in BENCHMARKS.values():
        assert not spec.counts or sum(spec.counts.values()) == spec.rows, spec.name
    assert len(blink.TASKS) == 14
    used = ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
    assert sum(blink.TASKS[task] for task in used) == 697


@pytest.mark.parametrize("name", BENCHMARKS)
def test_other_counts_are_refused_and_may_be_allowed(demo_root, name):
    with pytest.raises(DataError, match=f"expected {BENCHMARKS[name].rows} rows, got") as caught:
        load_benchmark(name, demo_root)
    assert "hf download" in str(caught.value) and "--allow-other-counts" in str(caught.value)
    assert not load(name, demo_root).verified


def test_a_whole_benchmark_is_verified(demo, tmp_path):
    demo.write_mmvp(tmp_path, range(1, 301))
    whole = load_benchmark("mmvp", tmp_path)
    assert whole.verified and len(whole.items) == 300 and len({item.group for item in whole.items}) == 150
    changed = {item.id for item in whole.items if item.gold["corrected"] != item.gold["original"]}
    assert changed == {"99", "100", "279", "280"}


def test_rows_count_within_their_tasks(demo, tmp_path):
    """As many rows in all, but not in each task."""
    rows = [{**row, "cycle_category": 0} for row in demo.hrbench_rows(1)]
    with pytest.raises(DataError, match="row-rotations|four rotations"):
        demo.write_hrbench(tmp_path, rows=rows)
        load("hrbench4k", tmp_path)
    items = load("blink", demo.write_all(tmp_path / "all")).items
    spec = BENCHMARKS["blink"]
    wrong = source.Spec(spec.name, spec.source, spec.read, 14, "task", {**dict.fromkeys(blink.TASKS, 1), "Jigsaw": 2})
    with pytest.raises(DataError, match="Jigsaw: 2 expected, 1 found"):
        source.counts_verified(wrong, items, tmp_path, allow_other=False)


def test_mmvp_joins_images_by_number(demo, demo_root):
    items = load("mmvp", demo_root).items
    assert [item.id for item in items] == ["1", "2", "3", "4", "99", "100"]
    for item in items:
        expected = decode_picture(demo.encoded(demo.picture(int(item.id))), "expected", 10**6)
        assert pixels(item.images[0]()) == pixels(expected), item.id
        assert item.options == ("Wide awake", "Asleep") and item.group == item.labels["pair"]
    assert items[4].gold == {"original": "A", "corrected": "B"} and items[4].group == "50"
    assert items[5].gold == {"original": "B", "corrected": "A"}
    assert items[0].gold == {"original": "A", "corrected": "A"}


def test_blink_has_its_images_options_and_own_prompt(demo, demo_root):
    items = load("blink", demo_root).items
    assert Counter(item.labels["task"] for item in items) == dict.fromkeys(blink.TASKS, 1)
    assert {len(item.images) for item in items} == {1, 2, 3, 4}
    for place, item in enumerate(items):
        for column, opener in enumerate(item.images):
            assert pixels(opener()) == pixels(demo.picture(100 + 10 * place + 3 + column))
        assert item.prompt.endswith(f"({item.letters[-1]}) {item.options[-1]}") and "(A)" not in item.question
        assert item.id == f"val_{item.labels['task']}_1" and set(item.gold) == {"original"}


def test_vstar_boxes_are_shares_of_the_image(demo_root):
    items = load("vstar", demo_root).items
    assert Counter(item.labels["category"] for item in items) == {"direct_attributes": 3, "relative_position": 2}
    assert items[0].question == "What is the color of the cup?"
    assert items[0].options == ("red", "green", "blue", "white") and items[4].options == ("right", "left")
    assert items[1].boxes == ((11 / 112, 20 / 84, 39 / 112, 41 / 84),)
    assert items[3].gold == {"original": "B"} and items[3].id == "relative_position/3"


def test_vstar_boxes_are_in_stored_pixels(demo, tmp_path):
    """A photo that a viewer would turn keeps its pixels, and so its boxes keep their place."""
    demo.write_vstar(tmp_path)
    before = load("vstar", tmp_path).items[1]
    (path,) = [path for path in tmp_path.rglob("*") if before.image_keys[0].endswith(f"/{path.name}")]
    tags = Image.Exif()
    tags[0x0112] = 6
    with Image.open(path) as opened:
        plain = opened.convert("RGB")
    plain.save(path, exif=tags, **({} if path.suffix == ".png" else {"quality": 95}))
    item = load("vstar", tmp_path).items[1]
    assert item.boxes == before.boxes and item.images[0]().size == plain.size


@pytest.mark.parametrize("name", ["hrbench4k", "hrbench8k"])
def test_hrbench_rotations_share_an_image(demo, demo_root, name):
    items = load(name, demo_root).items
    for number in range(len(items) // 4):
        four = items[4 * number : 4 * number + 4]
        assert [item.labels["cycle"] for item in four] == ["0", "1", "2", "3"]
        assert len({(item.group, item.image_keys, item.question) for item in four}) == 1
        assert {item.options[item.letters.index(item.gold["original"])] for item in four} == {demo.COLOURS[number]}
        expected = decode_picture(demo.encoded(demo.picture(400 + number)), "expected", 10**6)
        assert pixels(four[3].images[0]()) == pixels(expected)
    assert {item.labels["category"] for item in items} == {"single", "cross"}


def test_hrbench_rotations_may_lie_apart(demo, tmp_path):
    rows = sorted(demo.hrbench_rows(3), key=lambda row: row["cycle_category"])
    demo.write_hrbench(tmp_path, rows=rows)
    items = load("hrbench4k", tmp_path).items
    assert [item.id for item in items] == [str(n) for n in range(12)]
    for number, item in enumerate(items):
        expected = decode_picture(demo.encoded(demo.picture(400 + number // 4)), "expected", 10**6)
        assert pixels(item.images[0]()) == pixels(expected)


def test_hrbench_alike_questions_on_several_images(demo, tmp_path):
    rows = [{**row, "question": "What is it?"} for row in demo.hrbench_rows(2)]
    for row in rows:
        row["category"] = "single"
    demo.write_hrbench(tmp_path, rows=rows)
    items = load("hrbench4k", tmp_path).items
    assert [item.group for item in items] == ["0"] * 4 + ["4"] * 4
    rows[5]["image"] = rows[0]["image"]
    demo.write_hrbench(tmp_path, rows=rows)
    refused("hrbench4k", tmp_path, "row-rotations", "expected the image of row 4 in its rotation")


@pytest.mark.parametrize("unpacked", [False, True])
def test_mme_from_the_archive_or_unpacked(demo, tmp_path, unpacked):
    demo.write_mme(tmp_path, unpacked=unpacked)
    items = load("mme-realworld-lite", tmp_path).items
    assert [item.id[-1] for item in items] == ["0", "4", "1", "2", "3"]  # questions on one image side by side
    assert items[1].options == ("1", "2", "3", "4", "It does not show a lane.") and items[1].gold["original"] == "E"
    assert items[2].labels == {"task": "Reasoning", "domain": "Monitoring", "category": "count"}
    for item in items:
        assert pixels(item.images[0]()) == pixels(demo.picture(500 + int(item.id[-1]) % 4))
    assert [len(part) for part in units(items)] == [2, 1, 1, 1]
    assert not (tmp_path / "MME-RealWorld-Lite" / "data").exists() or unpacked  # nothing is unpacked on the way


def test_the_questions_may_lie_beside_the_archive(demo, tmp_path):
    folder = demo.write_mme(tmp_path)
    (folder / "MME-RealWorld-Lite.json").write_text(json.dumps(list(demo.mme_rows())[:2]))
    assert [item.images[0]().size for item in load("mme-realworld-lite", folder).items] == [demo.SIZE] * 2


def test_units_keep_groups_and_images_together(demo_root):
    assert [len(part) for part in units(load("mmvp", demo_root).items)] == [2, 2, 2]
    parts = units(load("hrbench4k", demo_root).items)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert [len(limited(parts, limit)) for limit in (1, 4, 5, 99, None)] == [1, 1, 2, 3, 3]


# What is not there, or not right


def test_missing_folders_and_unknown_names(demo_root, tmp_path):
    refused(
        "mmvp",
        tmp_path,
        "benchmark-missing",
        "expected Questions.csv or data/train-*.parquet in one of",
        "hf download MMVP/MMVP",
    )
    refused("blink", tmp_path, "benchmark-missing", "--revision a3666eb249237ba3d5eca8db21176cc47967e040")
    with pytest.raises(ConfigError, match="expected some of mmvp, blink"):
        load("mmmu", demo_root)
    with pytest.raises(ConfigError, match="data-root: expected a folder, got"):
        load("mmvp", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="or pass --hub"):
        load("mmvp", None)


def test_the_data_root_may_be_the_benchmarks_own_folder(demo_root):
    assert load("mmvp", demo_root / "MMVP").folder == demo_root / "MMVP"


def test_the_hub(demo_root, tmp_path, monkeypatch):
    """What is below the root is not downloaded; what is not, at the pinned revision; offline says what to do."""
    import huggingface_hub

    asked = []

    def snapshot(name, **settings):
        asked.append((name, settings["revision"]))
        snapshots = tmp_path / "snapshots" / "c0ffee"
        if not snapshots.exists():
            shutil.copytree(demo_root / "BLINK", snapshots)
        return str(snapshots)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    given = load_benchmark("mmvp", demo_root, hub=True, allow_other_counts=True)
    assert (given.revision, asked) == ("", [])
    found = load_benchmark("blink", None, hub=True, allow_other_counts=True)
    assert found.revision == "c0ffee" and asked == [("BLINK-Benchmark/BLINK", BENCHMARKS["blink"].source.revision)]

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="from the hub, got no route to host; connect this machine") as caught:
        load_benchmark("vstar", None, hub=True)
    assert caught.value.reason == "hub-unreachable" and "--data-root" in str(caught.value)


MMVP = "Index,Question,Options,Correct Answer\n"
GOOD = "1,Open?,(a) Open (b) Closed,(a)\n"


@pytest.mark.parametrize(
    ("table", "reason", "part"),
    [
        ("Index,Question,Options\n", "file-columns", "missing: Correct Answer"),
        ("", "file-columns", "got none"),
        (MMVP + "1,Open?,(a) Open (b) Closed,(c)\n", "row-answer", "expected the right letter among AB, got 'C'"),
        (MMVP + "1,Open?,(a) Open (b) Closed,(a) and (b)\n", "row-answer", "expected one letter"),
        (MMVP + "1,Open?,Open or closed,(a)\n", "row-options", "expected options (A)"),
        (MMVP + "1,Open?,well: (a) Open (b) Closed,(a)\n", "row-options", "before (a)"),
        (MMVP + GOOD + GOOD, "row-duplicate", "got 1 again"),
        (MMVP + "one,Open?,(a) Open (b) Closed,(a)\n", "row-shape", "expected a number as Index"),
        (MMVP + "1,Open?\n", "row-shape", "expected 4 fields"),
        (MMVP + GOOD.replace("1,", "7,"), "image-missing", "image of row 7"),
        (MMVP + GOOD.replace("Open?", ""), "row-options", "expected a question"),
    ],
)
def test_mmvp_tables_that_are_refused(demo, tmp_path, table, reason, part):
    folder = demo.write_mmvp(tmp_path, (1, 2))
    (folder / "Questions.csv").write_text(table)
    refused("mmvp", tmp_path, reason, part)


def test_a_byte_order_mark_and_other_encodings(demo, tmp_path):
    folder = demo.write_mmvp(tmp_path, (1,))
    (folder / "Questions.csv").write_bytes(b"\xef\xbb\xbf" + (MMVP + GOOD).encode())
    assert len(load("mmvp", tmp_path).items) == 1
    (folder / "Questions.csv").write_bytes((MMVP + GOOD.replace("Open?", "Ge\u00f6ffnet?")).encode("latin-1"))
    refused("mmvp", tmp_path, "file-not-csv", "expected UTF-8 CSV")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "image-empty"), (b"no image", "not-an-image"), (None, "image-corrupt")],
)
def test_broken_images_name_their_file(demo, tmp_path, content, reason):
    path = demo.write_mmvp(tmp_path, (1,)) / "MMVP Images" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    refused("mmvp", tmp_path, reason, "1.jpg")


def test_blink_files_that_are_refused(demo, tmp_path):
    folder = demo.write_blink(tmp_path)
    path = folder / "Jigsaw" / blink.FILE
    table = parquet.read_table(path)
    good = table.to_pylist()[0]

    def rewritten(schema=table.schema, **changes):
        parquet.write_table(pa.Table.from_pylist([{**good, **changes}], schema), path)

    rewritten(choices=["one"])
    refused("blink", tmp_path, "row-options", "blink:val_Jigsaw_1")
    rewritten(idx="val_Counting_1")
    refused("blink", tmp_path, "row-duplicate", "'val_Counting_1' again")
    rewritten(answer="hidden")
    refused("blink", tmp_path, "row-answer", "Jigsaw")
    rewritten(image_1=None)
    refused("blink", tmp_path, "image-count", "without gaps")
    rewritten(image_1={"bytes": b"no image", "path": "a.png"})
    refused("blink", tmp_path, "not-an-image", "Jigsaw", ":0:image_1")
    rewritten(image_1={"bytes": None, "path": "a.png"})
    refused("blink", tmp_path, "image-empty", "image_1")
    parquet.write_table(table.drop_columns(["choices"]), path)
    refused("blink", tmp_path, "file-columns", "missing: choices")
    parquet.write_table(table.set_column(4, "image_1", pa.array(["a.png"])), path)
    refused("blink", tmp_path, "file-columns", "expected image_1 as a struct of bytes and path, got string")
    path.write_bytes(path.read_bytes()[:-30] if path.exists() else b"")
    refused("blink", tmp_path, "file-not-parquet", "expected a whole Parquet file")
    shutil.rmtree(path.parent)
    refused("blink", tmp_path, "benchmark-missing", "got none in Jigsaw")


def test_vstar_files_that_are_refused(demo, tmp_path):
    folder = demo.write_vstar(tmp_path)
    table, boxes = folder / "test_questions.jsonl", folder / "direct_attributes" / "sa_1.json"
    good = table.read_text()
    box = boxes.read_text()
    for changed, reason, part in (
        ({"bbox": [[0, 0, 200, 10]]}, "box-outside", "inside 112x84"),
        ({"bbox": [[0, 0, 0, 10]]}, "box-outside", "inside 112x84"),
        ({"bbox": [[0, 0, 10]]}, "box-shape", "expected bbox as"),
        ({"bbox": []}, "box-shape", "expected bbox as"),
        ({"bbox": [[float("nan"), 0, 10, 10]]}, "box-shape", "got [[nan, 0, 10, 10]]"),
        ({"bbox": [[0, 0, float("inf"), 10]]}, "box-shape", "got [[0, 0, inf, 10]]"),
        ({"bbox": [[0, 10**400, 5, 10]]}, "box-shape", "expected bbox as"),
        ([], "box-shape", "got None"),
    ):
        boxes.write_text(json.dumps(changed))
        refused("vstar", tmp_path, reason, part, "sa_1.json")
    boxes.unlink()
    refused("vstar", tmp_path, "boxes-missing", "sa_1.json", "hf download craigwu/vstar_bench")
    boxes.write_text(box)
    for change, reason in (
        (lambda text: text.replace("direct_attributes/sa_1.jpg", "../secret.jpg"), "path-escape"),
        (lambda text: text.replace("direct_attributes/sa_1.jpg", "/etc/passwd"), "path-escape"),
        (lambda text: text.replace("direct_attributes/sa_1.jpg", "sa_9.jpg"), "image-missing"),
        (lambda text: text[:-20], "file-not-json"),
        (lambda text: text + "[]\n", "row-type"),
        (lambda text: text.replace('"label"', '"answer"'), "file-columns"),
        (lambda text: text + text.splitlines()[0] + "\n", "row-duplicate"),
    ):
        table.write_text(change(good))
        refused("vstar", tmp_path, reason)


def test_hrbench_files_that_are_refused(demo, tmp_path):
    good = list(demo.hrbench_rows(1))

    def check(reason, part, **changes):
        demo.write_hrbench(tmp_path, rows=[{**good[0], **changes}, *good[1:]])
        refused("hrbench4k", tmp_path, reason, part)

    check("row-rotations", "got [0, 2, 1, 1] rows", cycle_category=1)
    check("row-shape", "expected cycle_category 0 to 3, got 7", cycle_category=7)
    check("row-rotations", "four rotations", question="Another?")
    check("row-answer", "expected one letter, got 'red'", answer="red")
    check("not-an-image", "expected an image as base64", image="%%%")
    check("not-an-image", "got something else", image=base64.b64encode(b"text").decode())
    demo.write_hrbench(tmp_path, rows=[{**row, "category": "both"} for row in good])
    refused("hrbench4k", tmp_path, "row-shape", "single or cross")
    demo.write_hrbench(tmp_path, rows=[{key: value for key, value in row.items() if key != "image"} for row in good])
    refused("hrbench4k", tmp_path, "file-columns", "missing: image")


def test_mme_archives_that_are_refused(demo, tmp_path):
    rows = list(demo.mme_rows())

    def check(reason, part, **changes):
        shutil.rmtree(tmp_path / "MME-RealWorld-Lite", ignore_errors=True)
        demo.write_mme(tmp_path, rows=[{**rows[0], **changes}, *rows[1:]])
        refused("mme-realworld-lite", tmp_path, reason, part)

    check("image-missing", "expected 'gone.png'", Image="gone.png")
    check("path-escape", "without '..'", Image="../../etc/passwd")
    check("path-escape", "without '..'", Image="/etc/passwd")
    check("row-answer", "expected the right letter among ABCDE", **{"Ground truth": "F"})
    check("row-options", "expected (A)", **{"Answer choices": ["(B) 1", "(A) 2"]})
    check("row-type", "a list of choices", **{"Answer choices": "(A) 1 (B) 2"})
    check("row-duplicate", "reasoning/demo/0001", Question_id="reasoning/demo/0001")
    path = tmp_path / "MME-RealWorld-Lite" / "data.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused("mme-realworld-lite", tmp_path, "file-not-zip", "data.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "moved")
    refused("mme-realworld-lite", tmp_path, "benchmark-missing", "MME-RealWorld-Lite.json inside")


def test_a_damaged_member_fails_its_checksum(demo, tmp_path):
    path = demo.write_mme(tmp_path) / "data.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("data/imgs/demo_2.png").header_offset
    content[start + 200] ^= 255
    path.write_bytes(content)
    refused("mme-realworld-lite", tmp_path, "file-not-zip", "demo_2.png")


def test_archives_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("imgs/zeros.png", bytes(64 * 2**20))
        archive.writestr("imgs/twice.png", b"1")
        archive.writestr("more/imgs/twice.png", b"2")
    found = zip_images.ZipImages(path)
    with pytest.raises(DataError, match="that claim to be 67108864"):
        found.read(found.find("zeros.png"))
    with pytest.raises(DataError, match="expected one 'imgs/twice.png', got"):
        found.find("imgs/twice.png")
    assert found.find("more/imgs/twice.png").filename == "more/imgs/twice.png" and found.find("zero.png") is None


# Pieces


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("(a) Open (b) Closed", "", ("Open", "Closed")),
        ("What?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather", "What?", ("rubber", "cotton", "kevlar", "leather")),
        ("Which (x)? (A) the (b) sign (B) none", "Which (x)?", ("the", "sign (B) none")),
        ("( a ) 1 ( B )2", "", ("1", "2")),
        ("\uff08A\uff09 1 \uff08B) 2", "", ("1", "2")),
    ],
)
def test_options_in_the_text(text, question, options):
    assert split_lettered(text, "row") == (question, options)


def test_letters():
    assert [letter_of(text, "row") for text in ("(b)", "B", " B. ", "( c )", "\uff08D\uff09")] == list("BBBCD")
    for text in ("", "AB", "(a) Open", None, 1, "\u0411"):
        with pytest.raises(DataError, match="expected one letter"):
            letter_of(text, "row")
    assert without_letter("(B)Left", 1, "row") == "Left" and without_letter("Left", 1, "row") == "Left"
    assert without_letter("\uff08B\uff09 Left", 1, "row") == without_letter("(B\uff09Left", 1, "row") == "Left"


def test_picture_limits(demo):
    data = demo.encoded(Image.new("RGB", (300, 200)))
    with pytest.raises(DataError, match="expected at most 50000 pixels in row, got 300x200"):
        decode_picture(data, "row", 50_000)
    before = Image.MAX_IMAGE_PIXELS
    assert decode_picture(data, "row", 10**9).size == (300, 200) and before == Image.MAX_IMAGE_PIXELS
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_picture(demo.encoded(clear, "PNG"), "row", 100).getpixel((0, 0)) == (255, 255, 255)


def test_digests_notice_changes(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    large.write_bytes(bytes(WHOLE + 5))
    before = file_digest(small), file_digest(large), listing_digest([small, large], tmp_path)
    assert before[0].startswith("sha256:") and before[1].startswith("sampled:")
    assert before == (file_digest(small), file_digest(large), listing_digest([large, small], tmp_path))
    for change in (b"y", b"xx"):
        small.write_bytes(change)
        assert file_digest(small) != before[0]
    assert listing_digest([small, large], tmp_path) != before[2]
    for place in (0, 2**20 + 1, WHOLE + 4):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"!")
        assert file_digest(large) != before[1]
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert file_digest(large) == before[1]


def test_loaders_need_no_torch(demo_root):
    code = (
        "import sys; from vreflection.evaluation.benchmarks import BENCHMARKS, load_benchmark\n"
        f"for name in BENCHMARKS: load_benchmark(name, {str(demo_root)!r}, allow_other_counts=True)\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_cycles_in_other_types():
    for value in (2, 2.0, "2", " 2 "):
        assert hrbench.cycle_of({"cycle_category": value}, "row") == "2"
