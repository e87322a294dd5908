import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def test_fusing_somebody_elses_resampler():
    command = [sys.executable, EXAMPLES / "fuse_a_resampler.py", "--width", "512", "--tokens", "600", "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'absorbed': 2, 'stock': 0" in result.stdout and "s fused" in result.stdout
