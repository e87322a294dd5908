import re
import subprocess
import sys
from pathlib import Path

import pytest

import vreflection as vr

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    code = (
        "import sys, vreflection; print(sorted({'torch', 'triton', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


def test_nothing_imports_torchvision():
    code = "import vreflection.quickstart.run, vreflection.model.processor, sys; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "False", done.stderr


def test_public_names_resolve_and_unknown_ones_are_named():
    assert all(getattr(vr, name) is not None for name in vr.__all__)
    assert set(vr.__all__) <= set(dir(vr))
    with pytest.raises(AttributeError, match="no attribute 'BoxGuided'"):
        _ = vr.BoxGuided


def test_pinned_versions_meet_the_lower_bounds():
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = dict(
        line.strip().lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    text = (ROOT / "pyproject.toml").read_text()
    bounds = [Requirement(item) for item in re.findall(r'"([a-z-]+(?:>=[0-9.]+))"', text)]
    checked = [r for r in bounds if r.name in pins]
    assert len(checked) > 10
    assert all(Version(pins[r.name]) in r.specifier for r in checked)
