import functools
import json
import sys
from xml.etree import ElementTree

import pytest

SWEEP = [{"figure": "growth", "axis": "tokens", "value": n} for n in (64, 256, 1024)]


def timed(name, ours, stock, **info):
    found = {"raw_s": {"ours": ours, "stock": stock}, "speedup_over": "stock", "device": "cpu", "dtype": "float32"}
    return {"name": name, "fullname": f"bench/bench_x.py::{name}", "extra_info": {**found, **info}}


@pytest.fixture
def file(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.write_text(json.dumps({"benchmarks": rows}))
        return str(path)

    return write


@pytest.fixture
def run(command_line):
    return functools.partial(command_line, "bench")


def test_report_writes_what_it_shows(run, file, tmp_path):
    path = file("a.json", timed("test_a", [2.0], [1.0]))
    done = run("report", path, "--out", str(tmp_path / "sub" / "table.md"))
    assert done.returncode == 0 and "Losing rows: 1 of 1" in done.stdout and "--plots FOLDER" in done.stderr
    assert (tmp_path / "sub" / "table.md").read_text() == done.stdout
    assert run("report", path, "--short").stdout == "LOSES a: 2 s, 0.50x stock\n"


def test_plots(run, file, tmp_path):
    pytest.importorskip("matplotlib")
    light = {
        "bytes": 8e9,
        "flops": 4e9,
        "speed_of_light_s": 0.01,
        "ceilings": {"bytes_per_s": 8e11, "flops_per_s": 1e12},
    }
    rows = [timed(f"test_a[{s['value']}]", [s["value"] / 9e3], [s["value"] / 1e3], sweep=s, **light) for s in SWEEP]
    rows += [timed(f"test_d[{b}]", [0.1], [0.2], sweep={"figure": "decode", "axis": "batch", "value": b, "steps": 8})
             for b in (1, 8)]  # fmt: skip
    rows += [
        {"name": f"test_m[{s['value']}]", "extra_info": {
            "extra_peak_bytes": {"ours": 2**20, "stock": s["value"] * 2**20}, "sweep": {**s, "figure": "memory"}}}
        for s in SWEEP
    ]  # fmt: skip
    done = run("report", file("a.json", *rows), "--plots", str(tmp_path / "figures"))
    assert done.returncode == 0
    texts = {}
    for name in ("growth", "memory", "decode", "roofline"):
        path = tmp_path / "figures" / f"{name}.svg"
        assert str(path) in done.stdout and path.stat().st_size < 60_000
        texts[name] = " ".join("".join(n.itertext()) for n in ElementTree.parse(path).iter() if n.tag.endswith("text"))
        assert "#ffffff" not in path.read_text()  # no white background: GitHub's dark pages show through
    assert "1,024" in texts["growth"] and "speed of light" in texts["growth"] and "stock" in texts["growth"]
    assert "MiB" in texts["memory"] and "ms per step" in texts["decode"] and "flops per byte" in texts["roofline"]
    again = tmp_path / "again"
    run("report", file("a.json", *rows), "--plots", str(again))
    assert (again / "growth.svg").read_bytes() == (tmp_path / "figures" / "growth.svg").read_bytes()


def test_no_matplotlib_is_said(run, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("report", file("a.json", timed("test_a", [2.0], [1.0])), "--plots", str(tmp_path / "figures"))
    assert done.returncode == 2 and "pip install 'vreflection[bench]'" in done.stderr


def test_rows_without_curves_draw_nothing_and_say_so(run, file, tmp_path):
    pytest.importorskip("matplotlib")
    done = run("report", file("a.json", timed("test_a", [2.0], [1.0])), "--plots", str(tmp_path / "figures"))
    assert done.returncode == 0 and "no figure" in done.stdout and not list((tmp_path / "figures").iterdir())


def test_compare_exit_codes(run, file):
    steady = [1.0, 1.01, 0.99, 1.02, 1.0]
    old = file("old.json", timed("test_a", steady, [2.0] * 5))
    same = file("same.json", timed("test_a", steady[::-1], [2.0] * 5))
    slow = file("slow.json", timed("test_a", [1.4 * s for s in steady], [2.0] * 5))
    assert run("compare", old, same).returncode == 0
    done = run("compare", old, slow)
    assert done.returncode == 1 and "1 variants judged, 1 slower" in done.stdout
    found = json.loads(run("compare", old, slow, "--json").stdout)
    assert found["changes"][0]["verdict"] == "slower" and found["changes"][0]["change"] == pytest.approx(1.4)
    few = file("few.json", timed("test_a", [1.4, 1.4], [2.0] * 2))
    assert run("compare", old, few).returncode == 0
    assert run("compare", old, few, "--more-new", few, "--more-new", few).returncode == 1


def test_bad_input_is_exit_code_2(run, file, tmp_path):
    good = file("a.json", timed("test_a", [2.0], [1.0]))
    for arguments in (("report", str(tmp_path / "none.json")), ("compare", good, str(tmp_path / "none.json"))):
        done = run(*arguments)
        assert done.returncode == 2 and "none.json: cannot be read" in done.stderr
