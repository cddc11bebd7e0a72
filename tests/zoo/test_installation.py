"""What is built and installed: wheel, sdist, editable installation, and RL Zoo's commands in an environment of their own."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import optuna
import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sb3_qvpo import __version__

DEPENDENCIES = Path(sysconfig.get_path("purelib"))
"""Where the packages lie that the tests use."""


def run(command, cwd, **environment):
    """Run a command; its output is part of the failure's message."""
    # One thread: the networks are small, and the tests may share the machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    for name in ("PYTHONPATH", "SB3_QVPO_ZOO"):
        environment.pop(name, None)
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, built once from a copy of the repository's files."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*_cache", "dist", "logs", "build", "_build")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"], folder)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return folder / "source", wheel, sdist


def test_wheel_and_sdist_are_complete(distributions):
    source, wheel, sdist = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py", "sb3_qvpo/py.typed"} <= names
    assert {"sb3_qvpo/hyperparams/qvpo.yml", "sb3_qvpo/hyperparams/qvpo_official.yml"} <= names
    modules = {str(file.relative_to(source)) for file in (source / "sb3_qvpo").rglob("*.py")}
    modules = {name for name in modules if "_autoload/" not in name}
    assert "sb3_qvpo/qvpo/qvpo.py" in modules
    assert not modules - names, "every module is in the wheel"
    assert not [name for name in names if "_autoload/" in name or name.startswith(("tests", "examples"))]
    pth = zipfile.ZipFile(wheel).read("sb3_qvpo_autoload.pth").decode()
    assert pth.splitlines() == ["import sb3_qvpo_autoload"]
    listing = run(["tar", "tzf", sdist], ROOT)
    for name in ("sb3_qvpo/_autoload/sb3_qvpo_autoload.pth", "hyperparams/qvpo.yml", "tests/reference.py", "constraints.txt"):
        assert f"/{name}\n" in listing


def test_the_extras_are_those_of_the_tests(distributions):
    """The wheel asks for packages and versions that the tests use; test_make_train_from_the_wheel lets pip find them."""
    metadata = zipfile.ZipFile(distributions[1]).read(f"sb3_qvpo-{__version__}.dist-info/METADATA").decode()
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.M)]
    for extra in ("", "zoo", "mujoco"):
        wanted = [each for each in required if each.marker is None or each.marker.evaluate({"extra": extra})]
        assert {"stable-baselines3", "torch", "gymnasium", "numpy"} <= {each.name for each in wanted}
        assert extra or len(wanted) == 4, "no more than it must"
        for each in wanted:
            assert each.specifier.contains(importlib.metadata.version(each.name), prereleases=True), each


def needed(name, found):
    """All distributions that one asks for without an extra, and those that they ask for."""
    if name not in found:
        found.add(name)
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(canonicalize_name(requirement.name), found)
    return found


BARE = """
from sb3_qvpo import DTQL, QVPO, SDAC, CandidateFigureCallback, DiffusionQL, presets

model = QVPO("MlpPolicy", "Pendulum-v1", **{**presets.small, "learning_starts": 3}).learn(6)
model.save("model")
print(QVPO.load("model").predict(model.observation_space.sample(), deterministic=True)[0].shape)
try:
    model.learn(5, CandidateFigureCallback(2, "figure.png"))
except ImportError as error:
    print(error)
"""


def test_it_works_without_any_extra(tmp_path):
    """With what it asks for and nothing else: it trains, saves and loads. Only a figure needs more, and says what."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sb3_qvpo").symlink_to(ROOT / "sb3_qvpo")
    for name in needed("sb3-qvpo", set()) - {"sb3-qvpo"}:
        for top in {file.parts[0] for file in importlib.metadata.files(name)} - {"..", "__pycache__"}:
            (site / top).symlink_to(DEPENDENCIES / top)
    assert (site / "stable_baselines3").exists() and not (site / "matplotlib").exists() and not (site / "pandas").exists()
    # Without the tests' own packages: -S leaves them out
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", BARE]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(1,)", 'figures need matplotlib: pip install ".[figures]"']


def environment_with(folder, *installation):
    """
    The interpreter of a new environment with this package, and with the dependencies of the environment of the tests.

    A line of a path file adds their folder. Start-up files in that folder are not read.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{DEPENDENCIES}\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--no-deps"]
    run([*pip, *installation], folder, PIP_NO_INDEX="1")
    return folder / "bin" / "python", site


def test_editable_install(distributions, tmp_path):
    """Registers QVPO as well, finds the checkout's settings, and leaves no package folder that would hide the checkout."""
    source = distributions[0]
    python, site = environment_with(tmp_path / "venv", "--no-build-isolation", "-e", source)
    added = {path.name for path in site.iterdir() if "qvpo" in path.name and not path.name.endswith(".dist-info")}
    assert added == {"_sb3_qvpo.pth", "sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py"}
    code = "import rl_zoo3; from sb3_qvpo import zoo; print(rl_zoo3.ALGOS['qvpo'].__qualname__, zoo.hyperparams_folder())"
    assert run([python, "-c", code], tmp_path).split() == ["ZooQVPO", str(source / "hyperparams")]


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The interpreter of an environment with the wheel, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("fresh")
    python, _ = environment_with(folder / "venv", distributions[1])
    (folder / "work").mkdir()
    return python, folder / "work"


def saved_data(model_zip):
    """The numbers that SB3 stores beside the weights."""
    with zipfile.ZipFile(model_zip) as archive:
        return json.loads(archive.read("data"))


def test_train_from_the_wheel(installed):
    """The settings are those of the wheel."""
    python, work = installed
    output = run([python, "-m", "rl_zoo3.train", "--algo", "qvpo", "--env", "Pendulum-v1", "-n", "20"], work)
    assert "Loading hyperparameters from: " in output
    assert "site-packages/sb3_qvpo/hyperparams/qvpo.yml" in output
    assert saved_data(work / "logs/qvpo/Pendulum-v1_1/Pendulum-v1.zip")["num_timesteps"] == 20


def test_the_console_script_and_the_official_settings_from_the_wheel(installed):
    python, work = installed
    folder = run([python, "-m", "sb3_qvpo.zoo", "hyperparams"], work).strip()
    script = Path(sys.executable).parent / "rl_zoo3"
    options = ["-conf", f"{folder}/qvpo_official.yml", "-n", "10", "-f", "official", "--eval-freq", "-1"]
    run([python, script, "train", "--algo", "qvpo", "--env", "Hopper-v5", *options], work)
    data = saved_data(work / "official/qvpo/Hopper-v5_1/Hopper-v5.zip")
    assert (data["ent_coef"], data["n_target_candidates"]) == ("lin_0.02_0.002_0.9", 4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_make_train_from_the_wheel(distributions, tmp_path):
    """The wheel and its extras as pip resolves them from the package index; then the two commands of ``make train``."""
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    run([python, "-m", "pip", "install", "-q", f"{distributions[1]}[zoo,mujoco]"], tmp_path, **constraints)
    zoo = ("--algo", "qvpo", "--env", "Pendulum-v1")
    run([python, "-m", "rl_zoo3.train", *zoo, "-P", "--seed", "0"], tmp_path)
    data = saved_data(tmp_path / "logs/qvpo/Pendulum-v1_1/Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (5000, 4500)
    output = run([python, "-m", "rl_zoo3.enjoy", *zoo, "-f", "logs", "--no-render", "-n", "4000"], tmp_path)
    mean = float(re.search(r"20 Episodes\nMean reward: (-[\d.]+)", output).group(1))
    assert mean > -250  # twenty seeds: -141 to -152, benchmarks/learning/quickstart.csv


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_share_a_study(installed):
    """At the same time; test_commands.py lets one follow the other."""
    python, work = installed
    command = [python, "-m", "rl_zoo3.train", "--algo", "qvpo", "--env", "Pendulum-v1", "-optimize", "-n", "300"]
    command += ["--n-trials", "2", "--storage", "shared.log", "--study-name", "s", "--no-optim-plots"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([str(part) for part in command], cwd=work, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    backend = optuna.storages.journal.JournalFileBackend(str(work / "shared.log"))
    found = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="s").trials
    assert sorted(trial.number for trial in found) == [0, 1, 2, 3]
    assert len({json.dumps(trial.params) for trial in found}) == 4
