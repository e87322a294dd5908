"""The six benchmarks in miniature: a handful of rows in each one's exact schema, from the embedded photographs.

`python tests/evaluation/demo_bench.py FOLDER` writes them; then `vreflection eval … --data-root FOLDER
--allow-other-counts`. Answers are drawn, not true: this is for the path, not for scores.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from vreflection.evaluation.benchmarks import BENCHMARKS, blink
from vreflection.quickstart.photos import load_photo

PHOTOS = ("china", "coffee", "rocket", "chelsea", "flower", "astronaut")
COLOURS = ("red", "green", "blue", "white")
SIZE = (112, 84)


def picture(number, size=SIZE):
    """A crop that no other number has."""
    image = Image.fromarray(load_photo(PHOTOS[number % len(PHOTOS)]))
    left, top = 7 * number % (image.width - size[0]), 5 * number % (image.height - size[1])
    return image.crop((left, top, left + size[0], top + size[1]))


def encoded(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_mmvp(root, indices=(1, 2, 3, 4, 99, 100)):
    folder = root / "MMVP"
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Index", "Question", "Options", "Correct Answer"])
        for index in indices:
            question = f"Is the animal, seen from pair {(index + 1) // 2}, awake?"
            table.writerow([index, question, "(a) Wide awake (b) Asleep", "(a)" if index % 2 else "(b)"])
            (folder / "MMVP Images" / f"{index}.jpg").write_bytes(encoded(picture(index)))
    return folder


def write_blink(root, rows=1):
    folder, image = root / "BLINK", pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("idx", pa.string()), ("sub_task", pa.string()), ("question", pa.string()), ("prompt", pa.string())]
        + [(column, image) for column in blink.IMAGES]
        + [("choices", pa.list_(pa.string())), ("answer", pa.string())]
    )
    for place, task in enumerate(blink.TASKS):
        made = []
        for number in range(1, rows + 1):
            images = 1 + (place + number) % 4
            choices = list(COLOURS[: 2 + place % 3])
            row = {
                "idx": f"val_{task}_{number}", "sub_task": task, "question": f"Which colour is closest, in {task}?",
                "prompt": f"Look closely.\nWhich colour is closest, in {task}?\n" + "\n".join(
                    f"({letter}) {choice}" for letter, choice in zip("ABCD", choices)
                ),
                "choices": choices, "answer": f"({'ABCD'[number % len(choices)]})",
            }  # fmt: skip
            for column, name in enumerate(blink.IMAGES):
                data = encoded(picture(100 + 10 * place + 3 * number + column), "PNG")
                row[name] = {"bytes": data, "path": f"{task}_{number}_{column}.png"} if column < images else None
            made.append(row)
        (folder / task).mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(made, schema), folder / task / blink.FILE)
    return folder


def write_vstar(root):
    folder = root / "vstar_bench"
    rows = []
    for number, category in enumerate(["direct_attributes"] * 3 + ["relative_position"] * 2):
        name = f"{category}/sa_{number}.jpg"
        if category == "direct_attributes":
            question, options = "What is the color of the cup?", COLOURS
        else:
            question, options = "Is the cup on the left or right side of the plate?", ("right", "left")
        lines = [question, *(f"({letter}) {option}" for letter, option in zip("ABCD", options))]
        rows.append(
            {
                "image": name, "category": category, "label": "AB"[number % 2], "question_id": str(number),
                "text": "\n".join([*lines, "Answer with the option's letter from the given choices directly."]),
            }
        )  # fmt: skip
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(300 + number)))
        boxes = {"target_object": ["cup"], "bbox": [[10 + number, 20, 28, 21]], "question": question}
        (folder / name).with_suffix(".json").write_text(json.dumps({**boxes, "options": list(options)}))
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hrbench_rows(questions, size=SIZE, encode=encoded):
    """Four rotations of each question, one after the other."""
    for number in range(questions):
        image = base64.b64encode(encode(picture(400 + number, size))).decode()
        for cycle in range(4):
            options = COLOURS[-cycle:] + COLOURS[:-cycle] if cycle else COLOURS
            yield {
                "index": 4 * number + cycle, "question": f"What is the colour of sign {number}?",
                "answer": "ABCD"[options.index(COLOURS[number % 4])], "category": ("single", "cross")[number % 2],
                **dict(zip("ABCD", options)), "cycle_category": cycle, "image": image,
            }  # fmt: skip


def write_hrbench(root, name="4k", questions=3, rows=None):
    folder = root / "HR-Bench"
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(hrbench_rows(questions)) if rows is None else rows
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"hr_bench_{name}.parquet", row_group_size=len(rows))
    return folder


def mme_rows():
    for number in range(5):
        task, domain = (("Perception", "Remote Sensing"), ("Reasoning", "Monitoring"))[number % 2]
        yield {
            "Question_id": f"{task.lower()}/demo/{number:04}", "Image": f"demo_{number % 4}.png",
            "Text": f"How many cars are in lane {number}?", "Question Type": "Multiple Choice",
            "Answer choices": [
                f"({letter}) {text}" for letter, text in zip("ABCDE", ("1", "2", "3", "4", "It does not show a lane."))
            ],
            "Ground truth": "ABCDE"[number], "Category": "count", "Subtask": domain, "Task": task,
        }  # fmt: skip


def write_mme(root, rows=None, unpacked=False):
    folder = root / "MME-RealWorld-Lite"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/MME-RealWorld-Lite.json", json.dumps(list(mme_rows()) if rows is None else rows))
        for number in range(4):
            archive.writestr(f"data/imgs/demo_{number}.png", encoded(picture(500 + number), "PNG"))
        archive.writestr("__MACOSX/data/imgs/._demo_0.png", b"fork")
    if unpacked:
        with zipfile.ZipFile(folder / "data.zip") as archive:
            archive.extractall(folder)
        (folder / "data.zip").unlink()
    return folder


def write_all(root):
    root.mkdir(parents=True, exist_ok=True)
    write_mmvp(root), write_blink(root), write_vstar(root), write_mme(root)
    write_hrbench(root, "4k"), write_hrbench(root, "8k", questions=2)
    return root


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
    print(f"--data-root {sys.argv[1]} --benchmarks {','.join(BENCHMARKS)} --allow-other-counts")
