"""Golden numbers of the public reference implementation, read from `VREFLECTION_GOLDEN` where that folder exists."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("VREFLECTION_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden():
    if not GOLDEN.is_dir():
        pytest.skip(f"golden numbers not found at {GOLDEN}; set VREFLECTION_GOLDEN to the folder that holds them")

    def load(name: str):
        path = GOLDEN / name
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())

    return load
