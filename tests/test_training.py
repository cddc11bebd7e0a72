"""How ``learn()`` behaves: step counts, update counts, several environments, n-step returns, logs, repeatability."""

import io
import os
import warnings
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo.common import busy_cores


@pytest.mark.parametrize("progress_bar", [False, True])
def test_a_float_number_of_steps(progress_bar):
    model = tiny_qvpo().learn(2e1, progress_bar=progress_bar)
    assert model.num_timesteps == 20
    assert isinstance(model._total_timesteps, int)


@pytest.mark.parametrize(
    ("kwargs", "n_updates"),
    [
        (dict(), 15),  # learning starts after 5 of 20 steps
        (dict(train_freq=4), 4),  # after steps 8, 12, 16, 20
        (dict(train_freq=(4, "step"), gradient_steps=3), 12),
        (dict(train_freq=(4, "step"), gradient_steps=-1), 16),
        (dict(train_freq=(1, "episode"), gradient_steps=-1), 16),  # episodes of 4 steps
        (dict(train_freq=(2, "episode"), gradient_steps=2), 6),  # ends after 8, 16 and 24 steps
        (dict(gradient_steps=0), 0),
        (dict(learning_starts=100), 0),
    ],
)
def test_number_of_updates(kwargs, n_updates):
    model = tiny_qvpo(CountdownEnv(), **kwargs).learn(20)
    assert model._n_updates == n_updates


def test_policy_delay_counts_critic_updates():
    model = tiny_qvpo(policy_delay=3).learn(5)
    actor_steps = []
    for _ in range(7):
        before = weights_of(model)
        model.learn(1, reset_num_timesteps=False)
        after = weights_of(model)
        changed = {name.split(".")[0] for name in before if not (before[name] == after[name]).all()}
        assert "critic" in changed
        assert ("actor" in changed) == ("actor_target" in changed) == ("critic_target" in changed)
        actor_steps.append("actor" in changed)
    assert actor_steps == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("gradient_steps", [1, -1])
def test_several_environments(gradient_steps):
    env = make_vec_env(lambda: CountdownEnv(), n_envs=3)
    model = tiny_qvpo(env, gradient_steps=gradient_steps).learn(30)
    assert model.num_timesteps == 30
    assert model.replay_buffer.size() == 10
    rollouts_after_warm_up = 9  # of 3 steps each: at 6, 9, ... 30
    assert model._n_updates == rollouts_after_warm_up * (1 if gradient_steps == 1 else 3)


def test_n_step_returns_use_the_buffers_discounts():
    """The TD target itself is compared with the reference in test_update.py."""
    model = tiny_qvpo(CountdownEnv(length=6), n_steps=3, gamma=0.5, learning_starts=100).learn(12)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    batch = model.replay_buffer._get_samples(np.arange(12))
    np.testing.assert_allclose(batch.rewards[:6, 0], [1.75, 1.75, 1.75, 1.75, 1.5, 1.0])
    np.testing.assert_allclose(batch.discounts[:4, 0], 0.125)
    assert batch.dones[:6, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("env", ["Pendulum-v1", "vectorised"])
def test_same_seed_same_run_bit_for_bit(env):
    def run(seed):
        environment = env if env != "vectorised" else make_vec_env("Pendulum-v1", n_envs=2)
        return weights_of(tiny_qvpo(environment, seed=seed).learn(60))

    first = run(3)
    assert same_weights(first, run(3))
    assert not same_weights(first, run(4))


TRAIN_METRICS = {
    *("actor_loss", "entropy_loss", "critic_loss", "q_value", "weight", "critic_contrast", "candidate_std"),
    *("ent_coef", "learning_rate", "learning_rate_qf", "n_updates"),
}


def test_log():
    model = tiny_qvpo(CountdownEnv(), verbose=1)
    with redirect_stdout(io.StringIO()) as output:
        model.learn(40, log_interval=1)
    table = output.getvalue()
    for metric in TRAIN_METRICS:
        assert f" {metric} " in table, metric
    for metric in ("ep_rew_mean", "fps", "total_timesteps", "episodes"):
        assert f" {metric} " in table, metric


def test_logged_numbers_are_means_since_the_last_dump():
    model = tiny_qvpo().learn(6)
    model._metric_sums.clear()
    values = []
    for _ in range(3):
        count = model._metric_sums.get("critic_loss", (0.0, 0))
        model.train(1, batch_size=8)
        values.append(float(model._metric_sums["critic_loss"][0]) - float(count[0]))
        assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(np.mean(values), rel=1e-5)
    model.dump_logs()
    assert not model._metric_sums
    assert set(key.removeprefix("train/") for key in model.logger.name_to_value) == set()
    model.train(1, batch_size=8)
    assert {k.removeprefix("train/") for k in model.logger.name_to_value if k.startswith("train/")} == TRAIN_METRICS


def test_entropy_loss_is_a_part_of_the_actor_loss():
    with_entropy = tiny_qvpo(ent_coef=0.5).learn(20).logger.name_to_value
    assert 0 < with_entropy["train/entropy_loss"] < with_entropy["train/actor_loss"]
    without = tiny_qvpo(ent_coef=0.0).learn(20).logger.name_to_value
    assert without["train/entropy_loss"] == 0
    assert without["train/weight"] == pytest.approx(without["train/critic_contrast"], rel=1e-5)  # qadv: the same number


def test_random_draws_of_an_update():
    """Ranges and moments, and independence over states, candidates and steps."""
    model = tiny_qvpo(n_diffusion_steps=4, n_uniform_actions=5, n_train_candidates=6)
    noise = model._draw_actor_noise(2000)
    shapes = [(4, 2000, 6, 1), (2000, 5, 1), (2000, 6), (2000, 6, 1)]
    assert [tuple(tensor.shape) for tensor in noise] == shapes
    counts = np.bincount(noise.timesteps.flatten(), minlength=4)
    np.testing.assert_allclose(counts / 12000, 0.25, atol=0.02)  # t uniform over 0 ... T-1
    assert len(counts) == 4
    assert -1 <= noise.uniform_actions.min() < -0.99
    assert 0.99 < noise.uniform_actions.max() <= 1
    for tensor, std in [(noise.chain, 1), (noise.denoising, 1), (noise.uniform_actions, 3**-0.5)]:
        assert float(tensor.mean()) == pytest.approx(0, abs=0.03)
        assert float(tensor.std()) == pytest.approx(std, abs=0.03)
    for axis in range(3):
        a, b = noise.chain.transpose(0, axis).flatten(1)[:2]
        assert abs(float((a * b).mean())) < 0.2
    assert not np.array_equal(noise.denoising, model._draw_actor_noise(2000).denoising)


def test_updates_see_normalised_observations_and_rewards():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1))
    model = tiny_qvpo(env, learning_starts=100).learn(100)
    seen = []
    critic_loss = model._critic_loss
    model._critic_loss = lambda batch, noise: (seen.append(batch), critic_loss(batch, noise))[1]
    model.train(1, batch_size=200)
    (batch,) = seen
    raw = model.replay_buffer._get_samples(np.arange(100))
    assert float(raw.rewards.abs().max()) > 10 * float(batch.rewards.abs().max())  # divided by the deviation of the return
    assert float(batch.observations.mean(dim=0).abs().max()) < 0.5
    assert float(raw.observations.std(dim=0).max()) > 1.5 * float(batch.observations.std(dim=0).max())


def test_metrics_start_afresh_with_each_learn():
    model = tiny_qvpo().learn(30)
    assert model._metric_sums["critic_loss"][1] == 25
    model.learn(5, reset_num_timesteps=False)
    assert model._metric_sums["critic_loss"][1] == 5


def test_learning_continues():
    model = tiny_qvpo().learn(20)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (30, 25)
    model.learn(10)
    assert model.num_timesteps == 10


def test_evaluation_with_sb3():
    model = tiny_qvpo(CountdownEnv(length=4)).learn(10)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2) == (4.0, 0.0)


@pytest.mark.parametrize(("load", "n_threads", "is_warned_of"), [(3.1, 2, True), (2.9, 2, False), (3.1, 1, False)])
def test_cores_that_several_runs_share_are_warned_of(load, n_threads, is_warned_of, monkeypatch):
    """Once, and only where one thread would be faster; no message where the system does not tell."""
    monkeypatch.setattr(busy_cores, "has_warned", False)
    monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        tiny_qvpo(CountdownEnv()).learn(40)
    messages = [str(warning.message) for warning in record if "want to run" in str(warning.message)]
    assert len(messages) == is_warned_of
    assert not messages or messages[0].startswith("3.1 threads want to run on 2 cores, 2 of them of this run: ")
    monkeypatch.setattr(busy_cores, "has_warned", False)
    monkeypatch.delattr(os, "getloadavg")
    busy_cores.warn_of_busy_cores()
    assert not busy_cores.has_warned
