"""QVPO is in RL Zoo's tables: by the start-up file, or by a call."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rl_zoo3
from helpers import ROOT, output_of
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_qvpo import zoo

AUTOLOAD = ROOT / "sb3_qvpo" / "_autoload"


def test_registration_is_automatic_and_idempotent():
    """This test run has imported rl_zoo3 and called nothing."""
    assert rl_zoo3.ALGOS["qvpo"] is zoo.ZooQVPO and rl_zoo3.ALGOS["sdac"] is zoo.ZooSDAC
    assert rl_zoo3.ALGOS["diffusion_ql"] is zoo.ZooDiffusionQL and rl_zoo3.ALGOS["dtql"] is zoo.ZooDTQL
    assert HYPERPARAMS_SAMPLER["qvpo"] is zoo.sample_qvpo_params
    assert HYPERPARAMS_CONVERTER["qvpo"] is zoo.convert_qvpo_params
    before = ExperimentManager.__init__
    zoo.register()
    zoo.register()
    assert ExperimentManager.__init__ is before


def run_python(code, tmp_path, **environment):
    """Run code in an interpreter that sees the start-up file, next to whatever else is in ``tmp_path``."""
    for name in ("sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py"):
        (tmp_path / name).write_text((AUTOLOAD / name).read_text())
    code = f"import site; site.addsitedir({str(tmp_path)!r})\n{code}"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", **environment}
    return subprocess.run([sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_start_up_file_imports_nothing_and_prints_nothing(tmp_path):
    code = """
import sys
assert any(type(finder).__name__ == "ZooFinder" for finder in sys.meta_path)
assert not {"torch", "numpy", "rl_zoo3", "sb3_qvpo", "importlib.util"} & set(sys.modules) - before, sys.modules
"""
    result = run_python("import sys; before = set(sys.modules)" + code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("raise RuntimeError('rl_zoo3 is broken')", "RuntimeError: rl_zoo3 is broken"),
        ("", ""),  # a zoo without tables
        (None, "ModuleNotFoundError: No module named 'rl_zoo3'"),
    ],
)
def test_a_broken_or_missing_zoo_breaks_nothing_else(tmp_path, package, expected):
    if package is not None:
        (tmp_path / "rl_zoo3").mkdir()
        (tmp_path / "rl_zoo3" / "__init__.py").write_text(package)
    hide_installed = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]\n"
    assert run_python("print('works')", tmp_path).stdout == "works\n"
    result = run_python(hide_installed + "import rl_zoo3; print('imported')", tmp_path)
    if expected:
        assert expected in result.stderr
    else:  # there is no sb3_qvpo on this path either: one warning, and the zoo is imported
        assert result.stdout == "imported\n"
        assert "sb3_qvpo could not add QVPO to rl_zoo3" in result.stderr


@pytest.mark.parametrize(("value", "n_finders"), [("0", 0), ("false", 0), ("NO", 0), ("1", 1)])
def test_an_environment_variable_switches_it_off(value, n_finders, tmp_path):
    """The next test does the same with RL Zoo, which takes seconds to import."""
    code = "import sys; print(sum(type(finder).__name__ == 'ZooFinder' for finder in sys.meta_path))"
    result = run_python(code, tmp_path, SB3_QVPO_ZOO=value)
    assert (result.stdout, result.stderr) == (f"{n_finders}\n", "")


def run_switched(value, code):
    """Run code as a user does, with the variable set."""
    environment = {**os.environ, "SB3_QVPO_ZOO": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_explicit_registration_where_it_is_switched_off():
    """The last line is ``python -m sb3_qvpo.zoo train --help``."""
    code = """
import runpy, sys, rl_zoo3
print("registered:", "qvpo" in rl_zoo3.ALGOS)
sys.argv = ["zoo", "train", "--help"]
runpy.run_module("sb3_qvpo.zoo", run_name="__main__", alter_sys=True)
"""
    output = run_switched("0", code)
    assert "registered: False\n" in output
    assert re.search(r"--algo \{[^}]*\bqvpo\b", output)


def test_importing_the_zoo_alone_does_not_import_optuna():
    code = "import rl_zoo3, sys; assert 'qvpo' in rl_zoo3.ALGOS and 'optuna' not in sys.modules"
    run_switched("1", code)


def test_explicit_registration_and_command():
    folder = output_of(zoo.main, "zoo", "hyperparams").strip()
    assert (Path(folder) / "qvpo_official.yml").is_file()
    for arguments in ([], ["trian"]):
        with pytest.raises(SystemExit, match=r"usage: python -m sb3_qvpo.zoo \{train,enjoy"):
            output_of(zoo.main, "zoo", *arguments)
