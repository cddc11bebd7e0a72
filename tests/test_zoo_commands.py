"""The commands of the README, as a user types them: in a fresh environment, from a built wheel, from another folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]


def run(command, cwd, **environment):
    """Run a command; its output is part of the failure's message."""
    # One thread: the networks are small, and the tests may share the machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, built from a copy of the repository's files."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*_cache", "dist", "logs", "build")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"], folder)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return folder / "source", wheel, sdist


def test_wheel_and_sdist_are_complete(distributions):
    _, wheel, sdist = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py", "sb3_qvpo/py.typed", "sb3_qvpo/qvpo/qvpo.py"} <= names
    assert {"sb3_qvpo/hyperparams/qvpo.yml", "sb3_qvpo/hyperparams/qvpo_official.yml"} <= names
    assert not [name for name in names if "_autoload/" in name or name.startswith(("tests", "examples"))]
    pth = zipfile.ZipFile(wheel).read("sb3_qvpo_autoload.pth").decode()
    assert pth.splitlines() == ["import sb3_qvpo_autoload"]
    listing = run(["tar", "tzf", sdist], ROOT)
    for name in ("sb3_qvpo/_autoload/sb3_qvpo_autoload.pth", "hyperparams/qvpo.yml", "tests/reference.py", "constraints.txt"):
        assert f"/{name}\n" in listing


def test_editable_install(distributions, tmp_path):
    """Registers QVPO as well, finds the checkout's settings, and leaves no package folder that would hide the checkout."""
    source, _, _ = distributions
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", source], tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    added = {path.name for path in site.iterdir() if "qvpo" in path.name and not path.name.endswith(".dist-info")}
    assert added == {"_sb3_qvpo.pth", "sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py"}
    # The dependencies of the environment that runs the tests, without its start-up files
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({dependencies!r}); import rl_zoo3; from sb3_qvpo import zoo; "
        "print(rl_zoo3.ALGOS['qvpo'].__qualname__, zoo.hyperparams_folder())"
    )
    assert run([python, "-c", code], tmp_path).split() == ["ZooQVPO", str(source / "hyperparams")]


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A fresh environment with the wheel and its extras, as pip resolves them, and an empty folder to work in."""
    _, wheel, _ = distributions
    folder = tmp_path_factory.mktemp("fresh")
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    run([folder / "venv/bin/python", "-m", "pip", "install", "-q", f"{wheel}[zoo,mujoco]"], folder, **constraints)
    (folder / "work").mkdir()
    return folder / "venv" / "bin", folder / "work"


@pytest.fixture(scope="module")
def zoo(installed):
    """Runs ``python -m rl_zoo3.SCRIPT --algo qvpo ...``."""
    binaries, work = installed

    def zoo_command(script, *arguments):
        return run([binaries / "python", "-m", f"rl_zoo3.{script}", "--algo", "qvpo", *arguments], work)

    return zoo_command


@pytest.fixture(scope="module")
def pendulum(zoo, installed):
    """What ``make train`` does first."""
    output = zoo("train", "--env", "Pendulum-v1", "-P", "--seed", "0", "--save-replay-buffer")
    assert "Loading hyperparameters from: " in output
    assert "site-packages/sb3_qvpo/hyperparams/qvpo.yml" in output
    return installed[1] / "logs/qvpo/Pendulum-v1_1"


def saved_data(model_zip):
    """The numbers that SB3 stores beside the weights."""
    with zipfile.ZipFile(model_zip) as archive:
        return json.loads(archive.read("data"))


def test_train_saves_model_config_and_buffer(pendulum):
    assert saved_data(pendulum / "Pendulum-v1.zip")["num_timesteps"] == 6000
    assert saved_data(pendulum / "Pendulum-v1.zip")["_n_updates"] == 5500
    config = yaml.unsafe_load((pendulum / "Pendulum-v1/config.yml").read_text())
    assert dict(config)["n_train_candidates"] == 16
    assert (pendulum / "replay_buffer.pkl").is_file()


def test_enjoy_plays_a_policy_that_has_learnt(zoo, pendulum):
    output = zoo("enjoy", "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "4000")
    mean = float(re.search(r"20 Episodes\nMean reward: (-[\d.]+)", output).group(1))
    assert mean > -250  # measured: -148 over three seeds


def test_record_video(zoo, pendulum):
    zoo("record_video", "--env", "Pendulum-v1", "-f", "logs", "-n", "200")
    (video,) = (pendulum / "videos").glob("*.mp4")
    assert video.stat().st_size > 10_000


def test_hopper_with_changed_settings_and_evaluation(zoo, installed):
    zoo(
        *("train", "--env", "Hopper-v5", "-params", "n_behavior_candidates:8", "ent_coef:0.02", "learning_starts:100"),
        *("n_train_candidates:8", "--eval-freq", "60", "-n", "120", "--eval-episodes", "2"),
    )
    folder = installed[1] / "logs/qvpo/Hopper-v5_1"
    config = dict(yaml.unsafe_load((folder / "Hopper-v5/config.yml").read_text()))
    assert (config["n_behavior_candidates"], config["ent_coef"], config["n_target_candidates"]) == (8, 0.02, 1)
    evaluations = np.load(folder / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [60, 120]
    assert evaluations["results"].shape == (2, 2)
    assert (folder / "best_model.zip").is_file()


def test_continuing_uses_the_buffer_and_counts_on(zoo, installed, pendulum):
    model = "logs/qvpo/Pendulum-v1_1/Pendulum-v1.zip"
    output = zoo("train", "--env", "Pendulum-v1", "-i", model, "-n", "300", "--save-replay-buffer")
    assert "Loading replay buffer" in output
    (folder,) = (path for path in (installed[1] / "logs/qvpo").glob("Pendulum-v1_*") if path != pendulum)
    data = saved_data(folder / "Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (6300, 5800)  # no second warm-up of 500 steps
    assert (folder / "replay_buffer.pkl").is_file()


def test_a_trial_can_be_continued(zoo, study, installed):
    """Its sizes need not be those of the settings file."""
    zoo("train", "--env", "Pendulum-v1", *STUDY, "--trial-id", "1", "-n", "20", "-f", "trial1")
    model = "trial1/qvpo/Pendulum-v1_1/Pendulum-v1.zip"
    zoo("train", "--env", "Pendulum-v1", "-i", model, "-n", "20", "-f", "trial1")
    data = [saved_data(installed[1] / f"trial1/qvpo/Pendulum-v1_{i}/Pendulum-v1.zip") for i in (1, 2)]
    assert data[0]["n_diffusion_steps"] == data[1]["n_diffusion_steps"] == 5 * 2 ** study[1][2]["diffusion_steps_pow"]
    assert data[1]["num_timesteps"] >= 40


def test_the_console_script(installed):
    binaries, work = installed
    run([binaries / "rl_zoo3", "train", "--algo", "qvpo", "--env", "Pendulum-v1", "-n", "20", "-f", "other"], work)
    assert (work / "other/qvpo/Pendulum-v1_1/Pendulum-v1.zip").is_file()


def test_the_official_settings_from_a_wheel(zoo, installed):
    binaries, work = installed
    folder = run([binaries / "python", "-m", "sb3_qvpo.zoo", "hyperparams"], work).strip()
    zoo(
        "train",
        "--env",
        "Hopper-v5",
        "-conf",
        f"{folder}/qvpo_official.yml",
        "-n",
        "10",
        "-f",
        "official",
        "--eval-freq",
        "-1",
    )
    data = saved_data(work / "official/qvpo/Hopper-v5_1/Hopper-v5.zip")
    assert (data["ent_coef"], data["n_target_candidates"]) == ("lin_0.02_0.002_0.9", 4)


STUDY = ("--storage", "study.log", "--study-name", "q")


@pytest.fixture(scope="module")
def study(zoo, installed):
    """The tuning command, as in the README."""
    tuning = ("-optimize", "--n-trials", "4", "-n", "1000", *STUDY, "--sampler", "tpe", "--pruner", "median")
    output = zoo("train", "--env", "Pendulum-v1", *tuning)
    assert "Number of finished trials:  4" in output
    return trials(installed, "study.log", "q")


def trials(installed, storage, name):
    """Number, state and parameters of the trials in a journal."""
    code = f"""
import json, optuna
storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend({storage!r}))
trials = optuna.load_study(storage=storage, study_name={name!r}).trials
print(json.dumps([[trial.number, trial.state.name, trial.params] for trial in trials]))
"""
    return json.loads(run([installed[0] / "python", "-c", code], installed[1]).splitlines()[-1])


def test_tuning_writes_study_and_report(study, installed):
    assert [number for number, _, _ in study] == [0, 1, 2, 3]
    assert {state for _, state, _ in study} <= {"COMPLETE", "PRUNED"}
    assert {"ent_coef", "draws_pow", "one_minus_gamma", "noise_schedule"} <= study[0][2].keys()
    (report,) = (installed[1] / "logs/qvpo").glob("report_Pendulum-v1_4-trials-1000-tpe-median_*.csv")
    assert len(report.read_text().splitlines()) == 5


def test_trial_0_can_be_trained(zoo, study, installed):
    zoo("train", "--env", "Pendulum-v1", *STUDY, "--trial-id", "0", "-n", "20", "-f", "trial0")
    config = dict(yaml.unsafe_load((installed[1] / "trial0/qvpo/Pendulum-v1_1/Pendulum-v1/config.yml").read_text()))
    assert config["learning_rate"] == study[0][2]["learning_rate"]
    assert config["n_behavior_candidates"] == 2 ** study[0][2]["n_behavior_candidates_pow"]


def test_two_processes_share_a_study(installed):
    binaries, work = installed
    command = [binaries / "python", "-m", "rl_zoo3.train", "--algo", "qvpo", "--env", "Pendulum-v1", "-optimize", "-n", "300"]
    command += ["--n-trials", "2", "--storage", "shared.log", "--study-name", "s", "--no-optim-plots"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([str(c) for c in command], cwd=work, env=environment) for _ in range(2)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    found = trials(installed, "shared.log", "s")
    assert sorted(number for number, _, _ in found) == [0, 1, 2, 3]
    assert len({json.dumps(params) for _, _, params in found}) == 4


DIVERGING = """
import pathlib
import gymnasium as gym
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class DivergingOnce(PendulumEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        mark = pathlib.Path("diverged")
        if not mark.exists():
            mark.touch()
            reward = float("nan")
        return observation, reward, terminated, truncated, info

gym.register("DivergingOnce-v0", entry_point=DivergingOnce, max_episode_steps=50)
"""


def test_a_diverging_trial_is_pruned(zoo, installed):
    work = installed[1]
    (work / "diverging.py").write_text(DIVERGING)
    (work / "quick.yml").write_text("DivergingOnce-v0:\n  n_timesteps: 60\n  policy: MlpPolicy\n  learning_starts: 50\n")
    zoo(
        *("train", "--env", "DivergingOnce-v0", "--gym-packages", "diverging", "-conf", "quick.yml", "-optimize"),
        *("--n-trials", "2", "--storage", "diverging.log", "--study-name", "d", "--no-optim-plots", "--eval-episodes", "1"),
    )
    assert [state for _, state, _ in trials(installed, "diverging.log", "d")] == ["PRUNED", "COMPLETE"]


def test_plots_read_the_logs(installed, pendulum):
    binaries, work = installed
    display = {"MPLBACKEND": "agg"}
    run(
        [binaries / "python", "-m", "rl_zoo3.cli", "plot_train", "-a", "qvpo", "-e", "Pendulum", "-f", "logs", "-w", "5"],
        work,
        **display,
    )
    all_plots = ["all_plots", "-a", "qvpo", "-e", "Hopper", "-f", "logs", "-o", "results", "--no-display"]
    output = run([binaries / "python", "-m", "rl_zoo3.cli", *all_plots], work, **display)
    assert "QVPO" in output.upper()
    assert (work / "results.pkl").is_file()
