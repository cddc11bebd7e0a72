"""What the README and the docs show runs, with fewer steps, and what the README says of the arguments is true."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th

from sb3_qvpo import QVPO
from sb3_qvpo.common import fast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.name}-{i}": code
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
}


@pytest.mark.parametrize("name", BLOCKS)
def test_code_block(name, tmp_path, monkeypatch):
    code = BLOCKS[name]
    monkeypatch.chdir(tmp_path)
    learn = QVPO.learn

    def short_learn(self, total_timesteps, *args, **kwargs):
        self.learning_starts = 2
        return learn(self, min(total_timesteps, 5), *args, **kwargs)

    monkeypatch.setattr(QVPO, "learn", short_learn)
    for setting, value in vars(fast.settings).items():
        monkeypatch.setattr(fast.settings, setting, value)  # put back afterwards
    th.set_num_threads(1)
    namespace = {}
    exec(code, namespace)
    assert isinstance(namespace["model"], QVPO)
    assert namespace["model"]._n_updates > 0 or ".learn(" not in code


def test_every_row_of_the_parity_table_has_its_test():
    """No gap but gSDE, and each test that is named exists."""
    page = (ROOT / "docs" / "sb3_parity.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    features = [row for row in rows if row[-1] != "test"]
    assert len(features) > 80
    assert all(len(row) == 4 and re.fullmatch(r"`test_\w+\.py::test_\w+`", row[-1]) for row in features)
    assert [row[0].split()[0] for row in features if re.match(r"\W*no\b", row[2])] == ["gSDE"]
    named = {tuple(re.findall(r"test_\w+", row[-1])) for row in features}
    for module, function in named:
        assert f"def {function}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.py::{function}"


def test_tests_that_pages_name_exist():
    for page in PAGES:
        for module, function in re.findall(r"`(test_\w+)\.py::(test_\w+)`", page.read_text()):
            assert f"def {function}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{page.name}: {module}.py::{function}"


def test_every_deviation_from_the_paper_has_its_test():
    rows = re.findall(r"^\| (\d+)\. .*\|$", (ROOT / "docs" / "algorithm.md").read_text(), flags=re.M)
    assert rows == [str(i + 1) for i in range(15)]
    with_test = re.findall(
        r"^\| (\d+)\. .*`test_\w+\.py::test_\w+` \|$", (ROOT / "docs" / "algorithm.md").read_text(), flags=re.M
    )
    assert with_test == rows


def test_the_documentation_is_built_without_warnings(tmp_path):
    pytest.importorskip("sphinx")  # not with the oldest versions
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "K-efficient policy" in (tmp_path / "api.html").read_text()
    assert "critic_contrast" in (tmp_path / "algorithm.html").read_text()


def test_argument_table():
    parameters = inspect.signature(QVPO).parameters
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", README, flags=re.M))
    own = set(list(parameters)[list(parameters).index("ent_coef") : list(parameters).index("use_sde")])
    assert rows.keys() == own | {"policy_kwargs"}
    for name in own:
        default = parameters[name].default
        assert rows[name].strip().strip("`").strip('"') == str(default), name
