"""RL Zoo's commands as the documentation shows them, with few steps; each runs once, in the process of the tests."""

import json
import re
import runpy
import sys
import zipfile

import gymnasium as gym
import matplotlib
import numpy as np
import optuna
import pytest
import yaml
from helpers import output_of
from rl_zoo3 import cli

from sb3_qvpo.zoo import convert_qvpo_params

PENDULUM = ("--env", "Pendulum-v1")
STUDY = ("--storage", "study.log", "--study-name", "q")
QUICK = ("-n", "40", "--eval-episodes", "1", "-params", "learning_starts:30")
"""Trials that update ten times."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which all commands run. Episodes of Pendulum are short, which saves most of the time."""
    matplotlib.use("agg")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(gym.registry["Pendulum-v1"], "max_episode_steps", 50)
        yield tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def zoo(work):
    """Runs ``rl_zoo3 SCRIPT --algo qvpo ...`` and returns what it prints."""

    def zoo_command(script, *arguments):
        return output_of(cli.main, "rl_zoo3", script, "--algo", "qvpo", *arguments, folder=work)

    return zoo_command


@pytest.fixture(scope="module")
def pendulum(zoo, work):
    """What ``make train`` does first: the folder of the run."""
    output = zoo("train", *PENDULUM, "-P", "--seed", "0", "--save-replay-buffer", "-n", "520")
    assert "Loading hyperparameters from: " in output
    assert "hyperparams/qvpo.yml" in output
    return work / "logs/qvpo/Pendulum-v1_1"


def saved_data(model_zip):
    """The numbers that SB3 stores beside the weights."""
    with zipfile.ZipFile(model_zip) as archive:
        return json.loads(archive.read("data"))


def saved_settings(folder, env):
    """What RL Zoo writes down of the settings."""
    return dict(yaml.unsafe_load((folder / env / "config.yml").read_text()))


# Training and playing


def test_train_saves_model_config_and_buffer(pendulum):
    data = saved_data(pendulum / "Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (520, 20)  # 500 steps of warm-up
    assert saved_settings(pendulum, "Pendulum-v1")["n_train_candidates"] == 8
    assert (pendulum / "replay_buffer.pkl").is_file()


def test_enjoy_plays(zoo, pendulum):
    """test_installation.py plays a policy that has learnt."""
    output = zoo("enjoy", *PENDULUM, "-f", "logs", "--no-render", "-n", "100")
    assert re.search(r"2 Episodes\nMean reward: -[\d.]+", output)


def test_record_video(work, pendulum):
    command = ["record_video", "--algo", "qvpo", *PENDULUM, "-f", "logs", "-n", "100"]
    output_of(lambda: runpy.run_module("rl_zoo3.record_video", run_name="__main__"), *command, folder=work)
    (video,) = (pendulum / "videos").glob("*.mp4")
    assert video.stat().st_size > 10_000


@pytest.fixture(scope="module")
def hopper(zoo, work):
    """A run with changed settings and evaluations."""
    zoo(
        *("train", "--env", "Hopper-v5", "-params", "n_behavior_candidates:8", "ent_coef:0.02", "learning_starts:50"),
        *("n_train_candidates:8", "--eval-freq", "30", "-n", "60", "--eval-episodes", "2"),
    )
    return work / "logs/qvpo/Hopper-v5_1"


def test_hopper_with_changed_settings_and_evaluation(hopper):
    config = saved_settings(hopper, "Hopper-v5")
    assert (config["n_behavior_candidates"], config["ent_coef"], config["n_target_candidates"]) == (8, 0.02, 1)
    evaluations = np.load(hopper / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [30, 60]
    assert evaluations["results"].shape == (2, 2)
    assert (hopper / "best_model.zip").is_file()


def test_continuing_uses_the_buffer_and_counts_on(zoo, work, pendulum):
    model = pendulum.relative_to(work) / "Pendulum-v1.zip"
    output = zoo("train", *PENDULUM, "-i", model, "-n", "30", "--save-replay-buffer", "-f", "continued")
    assert "Loading replay buffer" in output
    folder = work / "continued/qvpo/Pendulum-v1_1"
    data = saved_data(folder / "Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (550, 50)  # no second warm-up
    assert (folder / "replay_buffer.pkl").is_file()


def test_plots_read_the_logs(work, pendulum, hopper):
    for arguments in (
        ("plot_train", "-a", "qvpo", "-e", "Pendulum", "-f", "logs", "-w", "5"),
        ("all_plots", "-a", "qvpo", "-e", "Hopper", "-f", "logs", "-o", "results", "--no-display"),
    ):
        output = output_of(cli.main, "rl_zoo3", *arguments, folder=work)
    assert "QVPO" in output.upper()
    assert (work / "results.pkl").is_file()


# Tuning


def trials(work, storage, name):
    """The trials in a journal."""
    backend = optuna.storages.journal.JournalFileBackend(str(work / storage))
    return optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name=name).trials


@pytest.fixture(scope="module")
def study(zoo, work):
    """The trials of two runs of the tuning command, as on two machines. The second draws the plots."""
    tuning = ("train", *PENDULUM, "-optimize", "--n-trials", "2", *QUICK, *STUDY, "--sampler", "tpe", "--pruner", "median")
    zoo(*tuning, "--no-optim-plots")
    output = zoo(*tuning)
    assert "Number of finished trials:  4" in output
    return trials(work, "study.log", "q")


def test_tuning_writes_study_and_report(study, work):
    assert [trial.number for trial in study] == [0, 1, 2, 3]
    assert {trial.state.name for trial in study} <= {"COMPLETE", "PRUNED"}
    for trial in study:
        own = {"paper": {"draws_pow", "noise_schedule"}, "presets.fast": {"critic_type", "improvement_step"}}
        assert {"ent_coef", "one_minus_gamma"} | own[trial.params["around"]] <= trial.params.keys()
    reports = (work / "logs/qvpo").glob("report_Pendulum-v1_2-trials-40-tpe-median_*.csv")
    assert sorted(len(report.read_text().splitlines()) for report in reports) == [3, 5]


def test_runs_of_a_study_draw_different_settings(study):
    assert len({json.dumps(trial.params) for trial in study}) == 4


def test_trial_0_can_be_trained(zoo, study, work):
    zoo("train", *PENDULUM, *STUDY, "--trial-id", "0", "-n", "20", "-f", "trial0")
    config = saved_settings(work / "trial0/qvpo/Pendulum-v1_1", "Pendulum-v1")
    assert config["learning_rate"] == study[0].params["learning_rate"]
    assert config["n_behavior_candidates"] == 2 ** study[0].params["n_behavior_candidates_pow"]


def test_a_trial_can_be_continued(zoo, study, work):
    """Its sizes need not be those of the settings file."""
    zoo("train", *PENDULUM, *STUDY, "--trial-id", "1", "-n", "20", "-f", "trial1")
    model = "trial1/qvpo/Pendulum-v1_1/Pendulum-v1.zip"
    zoo("train", *PENDULUM, "-i", model, "-n", "20", "-f", "trial1")
    data = [saved_data(work / f"trial1/qvpo/Pendulum-v1_{i}/Pendulum-v1.zip") for i in (1, 2)]
    wanted = convert_qvpo_params(study[1].params)
    assert data[0]["n_train_candidates"] == wanted["n_train_candidates"]
    assert data[0]["n_diffusion_steps"] == data[1]["n_diffusion_steps"] == wanted.get("n_diffusion_steps", 20)
    assert data[1]["num_timesteps"] >= 40


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


def test_a_diverging_trial_is_pruned(zoo, work, monkeypatch):
    (work / "diverging.py").write_text(DIVERGING)
    (work / "quick.yml").write_text("DivergingOnce-v0:\n  n_timesteps: 60\n  policy: MlpPolicy\n  learning_starts: 50\n")
    monkeypatch.syspath_prepend(work)
    try:
        zoo(
            *("train", "--env", "DivergingOnce-v0", "--gym-packages", "diverging", "-conf", "quick.yml", "-optimize"),
            *("--n-trials", "2", "--storage", "diverging.log", "--study-name", "d", "--no-optim-plots"),
            *("--eval-episodes", "1"),
        )
    finally:
        gym.registry.pop("DivergingOnce-v0", None)
        sys.modules.pop("diverging", None)
    assert [trial.state.name for trial in trials(work, "diverging.log", "d")] == ["PRUNED", "COMPLETE"]


# Learning from data


@pytest.mark.parametrize("algo", ["diffusion_ql", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dtql", "qvpo"))])
def test_training_from_a_dataset_then_online(work, algo):
    """As docs/offline.md shows it: updates instead of steps, evaluations and files as ever; -i goes on in the environment."""

    def run(script, *arguments):
        return output_of(cli.main, "rl_zoo3", script, "--algo", algo, *PENDULUM, *arguments, folder=work)

    rng = np.random.default_rng(0)
    np.savez(
        work / "data.npz",
        observations=rng.normal(size=(300, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (300, 1)).astype(np.float32),
        rewards=rng.normal(size=300),
        terminals=np.zeros(300, bool),
        timeouts=np.arange(300) % 50 == 49,
    )
    few = () if algo == "qvpo" else ("n_behavior_candidates:4", "n_eval_candidates:4")
    settings = ("-params", "learning_starts:10", "buffer_size:1000", "policy_kwargs:dict(net_arch=[8])", *few)
    output = run(
        "train", *settings, "dataset:'data.npz'", "reward_transform:'lambda r: r - 1'", "-n", "40", "-f", "offline",
        "--eval-freq", "20", "--eval-episodes", "1", "--save-replay-buffer", "--seed", "0",
    )  # fmt: skip
    assert output.count("Eval num_timesteps") == 2
    folder = work / "offline" / algo / "Pendulum-v1_1"
    data = saved_data(folder / "Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (40, 40) and "dataset" not in data
    buffer = np.load(folder / "evaluations.npz")
    assert buffer["timesteps"].tolist() == [20, 40]
    assert "Mean reward: -" in run("enjoy", "-f", "offline", "--no-render", "-n", "50")
    run("train", *settings, "-i", str(folder / "Pendulum-v1.zip"), "-n", "60", "-f", "offline", "--eval-episodes", "1")
    data = saved_data(work / "offline" / algo / "Pendulum-v1_2" / "Pendulum-v1.zip")
    assert (data["num_timesteps"], data["_n_updates"]) == (100, 100), "the data stay, so there are no random steps"
