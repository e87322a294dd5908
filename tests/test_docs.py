"""The pages as a reader finds them: links lead somewhere, every page is in the map, examples run as pasted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *DOCS.glob("*.md"),
        *(ROOT / "bench").rglob("*.md"),
        ROOT / "kernels/README.md",
    ]
)
# Not tables that a command writes, nor the list of changes.
WRITTEN = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent in (ROOT, DOCS, ROOT / "bench")]
# Figures of a whole study, which the pages name before they are drawn.


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that headings get."""
    headings = re.findall(r"^#+ (.*)$", text_without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_without_code(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_relative_to(ROOT), f"{name(page)}: {target} leads out of the repository"
        assert place.exists(), f"{name(page)}: {target} does not exist"
        if anchor:
            assert anchor in anchors(place), f"{name(page)}: {target} names no heading"


def test_every_page_is_in_the_map_once():
    linked = re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "README.md").read_text())
    assert sorted(linked) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md")


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_pages_begin_with_what_they_are_for(page):
    title, opening = page.read_text().split("\n\n")[:2]
    assert title.startswith("# ") and "\n" not in title
    assert re.match(r"[`A-Z]", opening) and opening.endswith("."), f"{name(page)}: expected a sentence below the title"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 95


def test_readme_names_files_that_exist():
    quoted = re.findall(r"`([\w./-]+)`", (ROOT / "README.md").read_text())
    paths = [path for path in quoted if path.split("/")[0] in ("vreflection", "kernels", "csrc", "tests", "bench")]
    assert len([path for path in paths if "/" in path]) > 8
    for path in paths:
        assert (ROOT / path).exists(), path


def test_readme_lists_every_command(command_line):
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = re.findall(r"^\W (\w+) ", command_line("--help").stdout.rpartition("Commands")[2], re.MULTILINE)
    assert len(commands) > 5 and sorted(rows) == sorted(commands)


def test_readme_example_runs_as_pasted(checkpoint, tmp_path):
    """On a tiny random model in place of the quickstart's: nothing but the folder differs."""
    from PIL import Image

    folder = tmp_path / "quickstart"
    (folder / "arms").mkdir(parents=True)
    (folder / "arms" / "stage2").symlink_to(checkpoint)
    images = folder / "data" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (112, 84), (200, 80, 60)).save(images / "photo.jpg")
    question = {"from": "human", "value": "<image>\nwhat digit ?"}
    rows = [{"image": "photo.jpg", "conversations": [question]} for _ in range(5)]
    (folder / "data" / "test.json").write_text(json.dumps(rows))
    (block,) = python_blocks(ROOT / "README.md")
    assert block.count('"runs/quickstart"') == 1
    code = block.replace('"runs/quickstart"', repr(str(folder)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([") == 4


@pytest.mark.parametrize("page", ["library.md", "performance.md"])
def test_self_contained_examples_run_as_pasted(page):
    blocks = python_blocks(DOCS / page)
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert page != "library.md" or "torch.Size([2, 8, 256])" in done.stdout
