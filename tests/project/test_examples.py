"""The examples run at toy size; one of them is killed and resumed from the command line."""

import os
import re
import runpy
import subprocess
import sys
import time

import gymnasium as gym
import matplotlib.pyplot as plt
import pytest
from helpers import ROOT, GoalEnv, output_of, tiny_qvpo
from stable_baselines3.common import evaluation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

EXAMPLES = ROOT / "examples"
PENDULUM = r"Return over 20 episodes after 520 steps: -\d+ \+- \d+"
TOY = {
    "bandit.py": (["--timesteps", "216"], r"(ent_coef 0.01?, \d+ steps: reward \d+\.\d\n){8}"),
    "compare_candidates.py": (
        ["--timesteps", "520", "--episodes", "1", "--candidates", "1", "8"],
        r"Best of  1 candidates: -\d+ \+- 0\nBest of  8 candidates: -\d+ \+- 0",
    ),
    "look_at_a_policy.py": (["--timesteps", "520"], r"Values of 64 candidates: -?\d+\.\d to -?\d+\.\d"),
    "multi_goal.py": (["--timesteps", "520"], r"(Best of [14]: .* reached \[\d+, \d+, \d+, \d+\] times in 50 episodes\n){2}"),
    "resume_training.py": (["--timesteps", "520", "--save-freq", "200"], PENDULUM),
    # A small task with a goal, registered below: gymnasium-robotics needs another MuJoCo than the other tasks
    "train_her.py": (
        ["--env", "Goal-v0", "--timesteps", "1020", "--episodes", "4"],
        r"Success in \d+% of 4 episodes after 1020 steps",
    ),
    "train_images.py": (["--timesteps", "510"], r"Distance to the spot after 510 steps: \d\.\d\d \+- \d\.\d\d"),
    "train_vectorized.py": (["--timesteps", "520", "--n-envs", "2"], PENDULUM),
    "train_pendulum.py": (["--timesteps", "520"], PENDULUM),
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


def run_example(name, arguments, folder):
    """What an example prints."""
    file = str(EXAMPLES / name)
    return output_of(lambda: runpy.run_path(file, run_name="__main__"), file, *arguments, folder=folder)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Evaluations of four episodes, a task for hindsight, and pictures without a screen."""

    def short_evaluation(model, env, n_eval_episodes=10, **kwargs):
        return evaluate_policy(model, env, min(n_eval_episodes, 4), **kwargs)

    monkeypatch.setattr(evaluation, "evaluate_policy", short_evaluation)
    plt.switch_backend("agg")
    gym.register("Goal-v0", entry_point=GoalEnv)
    yield
    gym.registry.pop("Goal-v0")
    plt.close("all")


@pytest.mark.parametrize("name", TOY)
def test_example(name, tmp_path):
    """It ends with a number, or a picture and a number."""
    arguments, expected = TOY[name]
    output = run_example(name, arguments, tmp_path)
    assert re.search(expected, output), output
    pictures = re.findall(r'savefig\("(.*?)"', (EXAMPLES / name).read_text())
    assert all((tmp_path / picture).stat().st_size > 5_000 for picture in pictures)
    saved = re.findall(r'(?:save|export)\("(.*?)"\)', (EXAMPLES / name).read_text())
    assert all([*tmp_path.glob(f"{file}*")] for file in saved)


def test_a_policy_of_normalised_observations_is_looked_at_with_their_statistics(tmp_path, capsys):
    """Without them it says how to name them."""
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = tiny_qvpo(env=env).learn(20)
    model.save(tmp_path / "model")
    env.save(tmp_path / "statistics.pkl")
    arguments = ["model.zip", "--env", "Pendulum-v1"]
    with pytest.raises(SystemExit):
        run_example("look_at_a_policy.py", arguments, tmp_path)
    assert "name their statistics by --vec-normalize" in capsys.readouterr().err
    output = run_example("look_at_a_policy.py", [*arguments, "--vec-normalize", "statistics.pkl"], tmp_path)
    low, high = map(float, re.search(r"candidates: (\S+) to (\S+)\n", output).groups())
    assert low < high and (tmp_path / "chain.gif").stat().st_size > 5_000


def test_a_killed_run_is_resumed_by_the_same_command(tmp_path):
    """And ends as if nothing had happened."""
    arguments = ["--timesteps", "620", "--save-freq", "200"]
    (tmp_path / "once").mkdir()
    uninterrupted = run_example("resume_training.py", arguments, tmp_path / "once")
    # Bits agree with the same number of threads
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "resume_training.py"), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "pendulum_run.zip").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed, rest = run_example("resume_training.py", arguments, tmp_path).split("\n", 1)
    assert re.fullmatch(r"[246]00 steps are done, [42]?20 are left", resumed)
    assert uninterrupted == "0 steps are done, 620 are left\n" + rest
