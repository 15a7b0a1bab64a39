"""Every example runs, and in little time where it is told so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.py"))
FEW = {"custom_loop": "20", "diff_two_models": "8192", "diff_an_adapter": "8192"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    if "import peft" in example.read_text():
        pytest.importorskip("peft")
    out = tmp_path / "run"
    command = [sys.executable, str(example), str(out), FEW.get(example.stem, "10240")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "config.json").is_file() or (out / "final" / "config.json").is_file()
    assert done.stdout.strip()
