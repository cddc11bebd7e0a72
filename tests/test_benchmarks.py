"""The benchmarks run, what they compare with computes the same losses, and the package is several times faster."""

import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timing
import torch as th
import toy_tasks
import values
import yaml
from evaluation import FixedEvaluation
from helpers import tiny_qvpo
from run import append, training_command
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from timing import interleaved, reference_here, reference_of, reference_process, trained

from sb3_qvpo import QVPO

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def copy_layers(source, target):
    """The weights of linear layers, in order."""
    pairs = [[layer for layer in module.modules() if isinstance(layer, th.nn.Linear)] for module in (source, target)]
    for first, second in zip(*pairs, strict=True):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("hidden", [[32, 24], [16, 16, 16]])
def test_the_reference_computes_the_same_losses(hidden):
    model = trained(QVPO, 5, 2, 300, n_train_candidates=6, n_diffusion_steps=7, policy_kwargs=dict(net_arch=hidden))
    reference = reference_of(model, hidden)
    for name in ("actor", "actor_target"):
        own, theirs = getattr(model, name).noise_predictor, getattr(reference, name)
        copy_layers(own.time_mlp, theirs.time_mlp)
        copy_layers(th.nn.ModuleList([own.first_layer, own.later_layers]), theirs.network)
        # The package orders the first layer's inputs in the same way: action, time, state
    for name in ("critic", "critic_target"):
        for own, theirs in zip(getattr(model, name).q_networks, getattr(reference, name).critics, strict=True):
            copy_layers(own, theirs)
    batch = model.replay_buffer.sample(16)
    target_noise, noise = model._draw_chain_noise(16, 2), model._draw_actor_noise(16)
    critic_loss, _ = model._critic_loss(batch, target_noise)
    th.testing.assert_close(reference.critic_loss(batch, target_noise.flatten(1, 2)), critic_loss, atol=1e-5, rtol=1e-5)
    actor_loss, _ = model._actor_loss(batch.observations, 0.01, noise)
    # Here the best action's row comes first for each state, there for all states
    rows = [th.cat([part[:, 0], part[:, 1:].flatten(0, 1)]) for part in (noise.timesteps, noise.denoising)]
    draws = (noise.chain.flatten(1, 2), noise.uniform_actions.flatten(0, 1), *rows)
    th.testing.assert_close(reference.actor_loss(batch.observations, draws), actor_loss, atol=1e-6, rtol=1e-4)


def test_an_update_is_several_times_faster_than_the_reference():
    """
    Half of what is aimed at, so that a regression cannot slip in. The fastest of several repeats: what else the machine does
    can only make one slower.
    """
    model = trained(QVPO, 11, 3, 300)
    with reference_process(model, [256, 256], 256) as reference:
        times = interleaved({"reference": reference, "QVPO": lambda: model.train(1, 256)}, repeats=5)
    assert min(times["reference"]) > 4 * min(times["QVPO"])


def test_on_a_gpu_the_reference_is_in_the_same_process():
    """Where the model is; tried on the CPU."""
    model = trained(QVPO, 3, 2, 300, n_train_candidates=4, n_diffusion_steps=3, policy_kwargs=dict(net_arch=[8]))
    sampled = []
    model.replay_buffer.sample = lambda *args: (
        sampled.append(args) or type(model.replay_buffer).sample(model.replay_buffer, *args)
    )
    with reference_here(model, [8], 16) as reference:
        reference()
    assert sampled == [(16,)]


def test_compiled_actions_are_several_times_faster_than_the_reference():
    """Half of what is aimed at: 6 times for the best of 4, 4 times for the best of 32."""
    model, observation = trained(QVPO, 11, 3, 300), np.ones(11, np.float32)
    reference, state = reference_of(model, [256, 256]), th.ones(1, 11)
    assert model.policy.compile_actions()
    functions = {
        "reference 4": lambda: reference.act(state, 4),
        "QVPO 4": lambda: model.predict(observation),
        "reference 32": lambda: reference.act(state, 32),
        "QVPO 32": lambda: model.predict(observation, deterministic=True),
    }
    times = {name: min(values) for name, values in interleaved(functions, repeats=5, seconds=0.1).items()}
    assert times["reference 4"] > 3 * times["QVPO 4"]
    assert times["reference 32"] > 2 * times["QVPO 32"]


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nflags : a\n",
            "AMD EPYC (family 25 model 17)",
        ),
        ("model name\t: One: fast\n", "One: fast"),
        ("CPU implementer\t: 0x41\n", platform.processor()),
        (None, platform.processor()),
    ],
)
def test_name_of_the_processor(cpuinfo, name, monkeypatch, tmp_path):
    """Two generations that a virtual machine calls alike differ by a factor of two."""
    monkeypatch.setattr(timing, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        timing.CPUINFO.write_text(cpuinfo)
    assert timing.processor() == name


@pytest.mark.parametrize("name", ["bench_update", "bench_action", "bench_learn"])
def test_benchmark(name, tmp_path):
    file = tmp_path / "results.csv"
    command = [
        sys.executable,
        str(BENCHMARKS / f"{name}.py"),
        "--quick",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--csv",
        str(file),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout
    rows = list(csv.DictReader(file.open()))
    assert len(rows) > 7
    assert all(float(row["median_ms"]) >= 0 for row in rows if row["median_ms"])
    assert all(row["cpu"] and row["threads"] == "1" for row in rows)


def test_learning_with_both_types_of_candidates(tmp_path):
    """The same seed's runs differ in the type alone; runs that are in the file are skipped."""
    file = tmp_path / "precision.csv"
    command = [sys.executable, str(BENCHMARKS / "learning" / "precision.py"), "--seeds", "7", "--steps", "700"]
    command += ["--eval-freq", "350", "--csv", str(file)]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=300)
    rows = list(csv.DictReader(file.open()))
    assert [(row["algo"], row["step"]) for row in rows] == [
        (dtype, step) for dtype in ("float32", "bfloat16") for step in ("350", "700")
    ]
    random, trained_on = [[row["mean_return"] for row in rows if row["step"] == step] for step in ("350", "700")]
    assert random[0] == random[1], "no update yet, and evaluations take float32"
    assert trained_on[0] != trained_on[1]


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


def test_learning_curves_are_resumed(tmp_path):
    """Through RL Zoo; after a kill QVPO goes on from its checkpoint, finished runs are skipped, others start again."""
    file, checkpoint = tmp_path / "results.csv", tmp_path / "runs" / "Pendulum-v1_qvpo_ddim5_3_1000" / "run.zip"
    options = ["--tasks", "Pendulum-v1", "--algos", "qvpo_ddim5", "--seeds", "3", "--steps", "1000", "--eval-freq", "500"]
    options += ["--episodes", "2", "--csv", str(file), "--folder", str(tmp_path / "runs")]
    command = [sys.executable, str(BENCHMARKS / "learning" / "run.py"), *options]

    def rows():
        return list(csv.DictReader(file.open())) if file.exists() else []

    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (checkpoint.exists() and rows()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [row["step"] for row in rows()] == ["500"]
    first = rows()[0]
    # As if it had been killed before the evaluation was copied, and after one that the checkpoint does not know
    file.write_text(file.read_text().splitlines(keepends=True)[0] + ",".join({**first, "step": "999"}.values()) + "\n")

    def run(*more):
        result = subprocess.run([*command, *more], capture_output=True, text=True, timeout=500, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return [line for line in result.stdout.splitlines() if "started" in line]

    assert run() == ["Pendulum-v1 qvpo_ddim5 seed 3: started from step 500"]
    assert [row["step"] for row in rows()] == ["500", "1000"]
    assert rows()[0] == first
    assert float(rows()[1]["minutes"]) > float(first["minutes"])
    assert float(rows()[1]["train_minutes"]) > float(first["train_minutes"])
    assert all(-2000 < float(row["single_return"]) < 0 for row in rows())
    assert all(-2000 < float(row["mean_return"]) < 0 and row["episodes"] == "2" and row["torch"] for row in rows())
    assert not checkpoint.parent.exists()

    finished = rows()
    half = {**first, "algo": "sac"}
    with file.open("a") as opened:  # broken off without a checkpoint
        opened.write(",".join(half.values()) + "\n")
    stale = tmp_path / "runs" / "Pendulum-v1_sac_3_1000" / "evaluations.jsonl"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"step": 500, "mean_return": 123.0, "minutes": 9.0}) + "\n")
    assert run("--algos", "sac", "qvpo_ddim5") == ["Pendulum-v1 sac seed 3: started"]
    assert rows()[:2] == finished
    assert [(row["algo"], row["step"], row["single_return"]) for row in rows()[2:]] == [
        ("sac", "500", ""),
        ("sac", "1000", ""),
    ]
    assert all(float(row["mean_return"]) < 0 and float(row["minutes"]) < 9 for row in rows())


def measured(file):
    """The rows of a benchmark's file by setting and what was timed."""
    rows = csv.DictReader((BENCHMARKS / "results" / f"{file}.csv").open())
    return {(row["setting"], row["what"]): row for row in rows}


def numbers_beside(page, heading, label):
    """The numbers of a row of the tables between two headings."""
    section = re.split(r"^## ", (ROOT / page).read_text(), flags=re.M)
    (text,) = [part for part in section if part.startswith(heading + "\n")]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)", row.split("|", 2)[2])]


def expected(rows, setting, *whats, fields=("median_ms",)):
    return [float(rows[setting, what][field]) for what in whats for field in fields]


RATIO = ("ratio", "ratio_min", "ratio_max")
BOTH = ("update", "update_one_thread")


def test_documents_show_what_the_files_say():
    """The tables of updates and actions, to their last digit or so."""
    update, one_thread = map(measured, BOTH)
    pairs = []
    for part in (what for setting, what in update if setting == "part"):
        shown = numbers_beside("docs/speed.md", "An update", part)
        pairs.append((shown, [number for rows in (update, one_thread) for number in expected(rows, "part", part)]))
    for setting in dict.fromkeys(setting for setting, what in update if what == "QVPO"):
        numbers = []
        for rows in (update, one_thread):
            numbers += expected(rows, setting, "eager reference", "QVPO, readable", "QVPO")
            numbers += expected(rows, setting, "QVPO", fields=RATIO)
        pairs.append((numbers_beside("docs/speed.md", "An update", setting), numbers))
    paper = ("paper (Hopper)", "QVPO")
    for page, heading, files in (
        ("README.md", "Speed", BOTH),
        ("docs/speed.md", "Another processor", [f"zen4_{file}" for file in BOTH]),
    ):
        numbers = [number for file in files for number in expected(measured(file), *paper, fields=("median_ms", *RATIO))]
        pairs.append((numbers_beside(page, heading, "**QVPO**"), numbers))
    actions = [measured(file) for file in ("action", "action_one_thread")]
    for count in ("best of 4", "best of 32"):
        for label, what in (("the decision alone", "QVPO, the decision alone"), ("`predict()`", "QVPO.predict")):
            numbers = [number for rows in actions for number in expected(rows, count, what, fields=("median_ms", *RATIO))]
            pairs.append((numbers_beside("docs/speed.md", "An action", f"{count}: {label}"), numbers))
    assert len(pairs) > 20
    for shown, numbers in pairs:
        np.testing.assert_allclose(shown, numbers, rtol=0.03, atol=0.05)


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


@pytest.mark.parametrize("setting", ["SAC", "... without the delay"])
def test_the_study_of_policies_that_must_follow(setting):
    rows = toy_tasks.follow(setting, 0, timesteps=72)
    assert [(row["step"], row["moment"]) for row in rows] == [
        *[(48, "before"), (48, "at once"), (51, "after 3"), (54, "after 6"), (60, "after 12"), (72, "after 24")]
    ]
    # Untrained networks: neither policy nor critics have moved, the best actions have
    assert rows[0]["std"] == pytest.approx(rows[1]["std"], rel=0.1) and rows[0]["distance"] != rows[1]["distance"]


def test_the_commit_of_changed_code_is_marked(tmp_path, monkeypatch):
    """Not of CSV files: results of a run that goes on."""

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert timing.commit() == "", "no repository"
    (tmp_path / "benchmarks").mkdir()
    code, results = tmp_path / "benchmarks" / "run.py", tmp_path / "benchmarks" / "results.csv"
    code.touch()
    results.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = timing.commit()
    assert len(clean) >= 7 and not clean.endswith("+")
    results.write_text("1")
    assert timing.commit() == clean
    code.write_text("1")
    assert timing.commit() == clean + "+"
