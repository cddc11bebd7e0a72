"""The examples run from the command line, at toy size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TOY = {
    "train_pendulum.py": (["--timesteps", "520"], r"Return over 20 episodes after 520 steps: -\d+ \+- \d+"),
    "export_policy.py": (
        ["--timesteps", "520", "--episodes", "1"],
        r"Return of pendulum.onnx over 1 episodes: -\d+ \+- 0",
    ),
    "train_mujoco.py": (
        ["--timesteps", "22", "--learning-starts", "20", "--episodes", "1", "--n-train-candidates", "4"],
        r"best of 1 candidates: -?\d+ .*\n.*best of 32 candidates: -?\d+",
    ),
}


def test_every_example_is_covered_and_short():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files] == sorted(TOY)
    assert all(len(file.read_text().splitlines()) < 60 for file in files)


@pytest.mark.parametrize("name", TOY)
def test_example(name, tmp_path):
    arguments, expected = TOY[name]
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(expected, result.stdout), result.stdout
    assert [*tmp_path.glob("*.zip"), *tmp_path.glob("*.onnx")]
