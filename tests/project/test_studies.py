"""The studies of learning: their runs, resumed after a kill, their evaluations and their toy tasks."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import goals
import gymnasium as gym
import numpy as np
import precision
import pytest
import quickstart
import run as learning_curves
import torch as th
import toy_tasks
import values
import yaml
from evaluation import FixedEvaluation
from helpers import ROOT, output_of, tiny_qvpo
from run import append, training_command
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_learning_with_both_types_of_candidates(tmp_path, monkeypatch):
    """The same seed's runs differ in the type alone; runs that are in the file are skipped."""
    monkeypatch.setattr(gym.registry["Pendulum-v1"], "max_episode_steps", 50)
    file = tmp_path / "precision.csv"
    options = ("--seeds", "7", "--steps", "600", "--eval-freq", "300", "--csv", file)
    for _ in range(2):
        output_of(precision.main, "precision.py", *options)
    rows = list(csv.DictReader(file.open()))
    assert [(row["algo"], row["step"]) for row in rows] == [
        (dtype, step) for dtype in ("float32", "bfloat16") for step in ("300", "600")
    ]
    random, trained_on = [[row["mean_return"] for row in rows if row["step"] == step] for step in ("300", "600")]
    assert random[0] == random[1], "no update yet, and evaluations take float32"
    assert trained_on[0] != trained_on[1]


def test_the_study_of_the_quick_start(tmp_path, monkeypatch):
    """Both settings; seeds that are in the file are skipped."""
    monkeypatch.setattr(gym.registry["Pendulum-v1"], "max_episode_steps", 3)
    file = tmp_path / "quickstart.csv"
    for settings in ("small", "version_0.1", "small"):
        options = ("--seeds", "7", "--steps", "20", "--eval-freq", "10", "--csv", file, "--settings", settings)
        output_of(quickstart.main, "quickstart.py", *options)
    rows = list(csv.DictReader(file.open()))
    assert [(row["algo"], row["step"]) for row in rows] == [
        (name, n) for name in ("small", "version_0.1") for n in ("10", "20")
    ]
    assert all(float(row["worst_return"]) <= float(row["mean_return"]) < 0 for row in rows)


def test_evaluations_are_repeatable_and_leave_training_alone(tmp_path):
    def run(name):
        model = tiny_qvpo()
        env = make_vec_env("Pendulum-v1", seed=3)
        zoos = EvalCallback(env, eval_freq=20, n_eval_episodes=2, log_path=str(tmp_path / name), verbose=0)
        ours = [FixedEvaluation(str(tmp_path / "ours.jsonl"))] if name == "both" else []
        model.learn(40, [*ours, zoos])
        return model, np.load(tmp_path / name / "evaluations.npz")["results"]

    (alone, _), (both, results) = run("alone"), run("both")
    for one, other in zip(alone.policy.parameters(), both.policy.parameters(), strict=True):
        assert th.equal(one, other)
    first, second = map(json.loads, (tmp_path / "ours.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (20, 40)
    assert 0 < first["train_minutes"] < second["train_minutes"] < second["minutes"]
    assert (second["mean_return"], second["std_return"], second["episodes"]) == (results[-1].mean(), results[-1].std(), 2)
    # The last evaluation again, one update later: the same episodes, the best of all candidates and single samples
    env = make_vec_env("Pendulum-v1")
    env.seed(1_000_000)
    again, _ = evaluate_policy(both, env, 2, return_episode_rewards=True)
    assert again == pytest.approx(results[-1].tolist(), rel=1e-3)
    assert second["single_return"] != pytest.approx(np.mean(again), rel=1e-2)
    both.n_behavior_candidates = 1
    env.seed(1_000_000)
    th.manual_seed(1_000_000)
    single, _ = evaluate_policy(both, env, 2, deterministic=False, return_episode_rewards=True)
    assert np.mean(single) == pytest.approx(second["single_return"], rel=1e-3)


def test_values_are_compared_with_what_follows(tmp_path, monkeypatch, capsys):
    np.testing.assert_allclose(values.discounted([1.0, 2.0, 4.0], None, 0.5), [3, 4, 4])
    np.testing.assert_allclose(values.discounted([1.0, 2.0, 4.0], 8.0, 0.5), [4, 6, 8])
    model = tiny_qvpo("Pendulum-v1", gamma=0.0).learn(30)
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.zero_()
        for network, value in zip(model.critic.q_networks, (7.0, 5.0), strict=True):
            [*network.parameters()][-1].fill_(value)
    model.save(tmp_path / "model.zip")
    command = ["values.py", str(tmp_path / "model.zip"), "Pendulum-v1", "--episodes", "1", "--candidates", "2"]
    monkeypatch.setattr(sys, "argv", command)
    values.main()
    total, value, following = re.fullmatch(
        r"Best of  2: return (-\d+) \+- 0, value (.+), what follows (.+)\n", capsys.readouterr().out
    ).groups()
    assert value == "5.0", "of both critics the minimum"
    # Without a discounted future the rewards follow, and after the time limit the value of the last step
    assert 200 * float(following) == pytest.approx(float(total) + 5, abs=10 + 16.3)


def test_other_algorithms_get_their_tuned_settings(tmp_path):
    for algo, learning_starts in (("sac", 10_000), ("td3", 10_000), ("tqc", 10_000), ("crossq", 5_000)):
        command = training_command("HalfCheetah-v5", algo, 0, tmp_path, 10, ["--eval-freq", "5"])
        settings = yaml.safe_load(Path(command[command.index("-conf") + 1]).read_text())
        assert settings["HalfCheetah-v5"]["learning_starts"] == learning_starts, algo
    assert "-conf" not in training_command("Pendulum-v1", "sac", 0, tmp_path, 10, ["--eval-freq", "5"])
    assert "-conf" not in training_command("HalfCheetah-v5", "qvpo_ddpm5", 0, tmp_path, 10, ["--eval-freq", "5"])


def test_files_get_the_columns_that_they_lack(tmp_path):
    """What an earlier version wrote stays, and a run of hours is not lost for a column."""
    file = tmp_path / "new" / "a.csv"
    append(file, [{"a": 1}], ["a", "b"])
    append(file, [{"c": 3, "b": "x"}, {"a": 2, "c": 4, "b": "y,z"}])
    assert file.read_text() == 'a,b,c\n1,,\n,x,3\n2,"y,z",4\n'
    append(file, [{"c": 5}])
    assert file.read_text().splitlines()[-1] == ",,5"
    assert [path.name for path in file.parent.iterdir()] == ["a.csv"]


def test_steps_of_a_checkpoint(tmp_path):
    """They say where a run that was broken off goes on."""
    file = tmp_path / "run.zip"
    assert learning_curves.steps_in(file) == 0
    model = tiny_qvpo(learning_starts=10)
    model.learn(7)
    model.save_checkpoint(file)
    assert learning_curves.steps_in(file) == 7


@pytest.mark.slow
def test_learning_curves_are_resumed(tmp_path):
    """Through RL Zoo; after a kill QVPO goes on from its checkpoint, finished runs are skipped, others start again."""
    file, checkpoint = tmp_path / "results.csv", tmp_path / "runs" / "Pendulum-v1_qvpo_ddim5_3_700" / "run.zip"
    options = ["--tasks", "Pendulum-v1", "--algos", "qvpo_ddim5", "--seeds", "3", "--steps", "700", "--eval-freq", "350"]
    options += ["--episodes", "2", "--csv", str(file), "--folder", str(tmp_path / "runs")]
    command = [sys.executable, str(ROOT / "benchmarks" / "learning" / "run.py"), *options]

    def rows():
        return list(csv.DictReader(file.open())) if file.exists() else []

    process = subprocess.Popen(command, start_new_session=True)
    while not (checkpoint.exists() and rows()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [row["step"] for row in rows()] == ["350"]
    first = rows()[0]
    # As if it had been killed before the evaluation was copied, and after one that the checkpoint does not know
    file.write_text(file.read_text().splitlines(keepends=True)[0] + ",".join({**first, "step": "699"}.values()) + "\n")

    def run(*more):
        output = output_of(learning_curves.main, "run.py", *options, *more)
        return [line for line in output.splitlines() if "started" in line]

    half = {**first, "algo": "sac"}
    with file.open("a") as opened:  # broken off without a checkpoint
        opened.write(",".join(half.values()) + "\n")
    stale = tmp_path / "runs" / "Pendulum-v1_sac_3_700" / "evaluations.jsonl"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"step": 350, "mean_return": 123.0, "minutes": 9.0}) + "\n")
    assert run("--algos", "qvpo_ddim5", "sac") == [
        "Pendulum-v1 qvpo_ddim5 seed 3: started from step 350",
        "Pendulum-v1 sac seed 3: started",
    ]
    of_qvpo, of_sac = ([row for row in rows() if row["algo"] == algo] for algo in ("qvpo_ddim5", "sac"))
    assert [row["step"] for row in of_qvpo] == ["350", "700"]
    assert of_qvpo[0] == first
    assert float(of_qvpo[1]["minutes"]) > float(first["minutes"])
    assert float(of_qvpo[1]["train_minutes"]) > float(first["train_minutes"])
    assert all(-2000 < float(row["single_return"]) < 0 for row in of_qvpo)
    assert all(-2000 < float(row["mean_return"]) < 0 and row["episodes"] == "2" and row["torch"] for row in of_qvpo)
    assert [(row["step"], row["single_return"]) for row in of_sac] == [("350", ""), ("700", "")]
    assert not checkpoint.parent.exists()
    assert all(float(row["mean_return"]) < 0 for row in rows())
    assert float(of_sac[0]["minutes"]) != 9

    finished = rows()
    assert run("--algos", "sac", "qvpo_ddim5") == []
    assert rows() == finished


@pytest.mark.slow
def test_the_study_of_learning_from_data(tmp_path, monkeypatch):
    """Recorded, learnt from, gone on with in the environment; a second call makes nothing again."""
    minari = pytest.importorskip("minari", reason="make test-oldest installs no Minari")
    import offline

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    tiny_qvpo("Pendulum-v1").save(tmp_path / "model.zip")
    small = dict(learning_starts=0, policy_kwargs=dict(net_arch=[8]), n_behavior_candidates=2, n_eval_candidates=2)
    settings = {name: (kind, {**own, **small}) for name, (kind, own) in offline.SETTINGS.items()}
    monkeypatch.setattr(offline, "SETTINGS", settings)
    output_of(offline.main, "offline.py", "record", tmp_path / "model.zip", "Pendulum-v1", "t", "--transitions", "800")
    assert minari.load_dataset("sb3_qvpo/t-v0").total_steps == 800
    file = tmp_path / "offline.csv"
    command = ("learn", "t", "Pendulum-v1", "--seeds", "0", "--updates", "20", "--steps", "200", "--csv", file)
    output_of(offline.main, "offline.py", *command)
    rows = list(csv.DictReader(file.open()))
    assert [(row["updates"], row["steps"]) for row in rows[:4]] == [("10", "0"), ("20", "0"), ("120", "100"), ("220", "200")]
    assert [row["algo"] for row in rows[::4]] == ["diffusion_ql", "behaviour_cloning", "dtql"]
    assert output_of(offline.main, "offline.py", *command).count("is there") == 3


def test_a_policy_that_must_follow():
    """The task's closed form, the search for the critics' best action, and that rewards change with the best actions."""
    env = toy_tasks.FollowEnv()
    states = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    best = env.best_actions(states)
    np.testing.assert_array_equal(env.rewards(states, best), 0)
    np.testing.assert_allclose(env.rewards(states, best + 0.1), -6 * 0.1**2)
    assert toy_tasks.root_mean_square(best - toy_tasks.FollowEnv(1).best_actions(states)) > 0.3
    state, _ = env.reset(seed=0)
    _, reward, terminated, _, _ = env.step(np.zeros(6, np.float32))
    assert terminated and reward == env.rewards(state[None], np.zeros((1, 6)))[0]

    goals = th.as_tensor(best, dtype=th.float32)
    critics = [lambda actions, i=i: i - (actions - goals).square().sum(dim=1, keepdim=True) for i in range(2)]
    model = SimpleNamespace(critic=lambda states, actions: [critic(actions) for critic in critics])
    start = np.zeros_like(best, dtype=np.float32)
    np.testing.assert_allclose(toy_tasks.best_of_critics(model, th.as_tensor(states), start), best, atol=0.01)
    assert not start.any()


class Compass:
    """Always goes in one direction, at full length."""

    policy = None

    def __init__(self, *direction):
        self.direction = np.array(direction, np.float32)

    def predict(self, observations):
        return np.tile(self.direction, (len(observations), 1)), None


def test_what_is_measured_of_policies_among_goals():
    row, paths = goals.measured(Compass(1, 0), np.arange(4), 1)
    assert (row["reached_right"], row["reached_left"], row["reached_top"], row["reached_bottom"]) == (200, 0, 0, 0)
    assert (row["first_right"], row["first_length"]) == (1_000, 1)
    # Five steps of length 1; the last ends within the distance of 1 that counts: at 4, 3, 2, 1 and 0 from the goal
    steps = next(i for i, position in enumerate(paths[0]) if position[0] > 4)
    assert row["return"] == pytest.approx(sum(-30 - max(0, 5 - i) ** 2 for i in range(1, steps + 1)) + 10, abs=0.05)
    assert len(paths) == 200 and {path.shape for path in paths} == {(steps + 1, 2)}
    row, _ = goals.measured(Compass(0, 1), np.array([0, 1, 3]), 1)
    assert sum(row[f"reached_{name}"] for name in goals.NAMES) == 0, "this goal is blocked"
    assert row["first_top"] == 1_000


@pytest.mark.parametrize("setting", ["SAC", "SDAC, temperature 1.0"])
def test_the_study_of_a_blocked_goal(setting, monkeypatch):
    monkeypatch.setattr(goals, "EPISODES", 3)
    rows = goals.blocked_goal(setting, 0, timesteps=24)
    counts = (1, 4) if setting.startswith("SDAC") else (1,)
    assert [(row["step"], row["moment"], row["candidates"]) for row in rows] == [
        (step, moment, n)
        for step, moment in ((24, "before"), (24, "at once"), (26, "after 2"), (32, "after 8"))
        for n in counts
    ]
    (blocked,) = {row["blocked"] for row in rows}
    assert not any(row[f"reached_{blocked}"] for row in rows if row["moment"] != "before")
    paths = [np.array(path.split(), int).reshape(-1, 2) for path in rows[0]["paths"].split("|")]
    assert len(paths) == 3 and all(2 <= len(path) <= 31 and not path[0].any() for path in paths)


@pytest.mark.parametrize("setting", ["SAC", "... without the delay"])
def test_the_study_of_policies_that_must_follow(setting):
    rows = toy_tasks.follow(setting, 0, timesteps=72)
    assert [(row["step"], row["moment"]) for row in rows] == [
        *[(48, "before"), (48, "at once"), (51, "after 3"), (54, "after 6"), (60, "after 12"), (72, "after 24")]
    ]
    # Untrained networks: neither policy nor critics have moved, the best actions have
    assert rows[0]["std"] == pytest.approx(rows[1]["std"], rel=0.1) and rows[0]["distance"] != rows[1]["distance"]
