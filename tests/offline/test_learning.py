"""``learn_offline()``: what an online run has, without a step in the environment; then online on."""

import csv
from contextlib import suppress

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import normalized, same_weights, tiny_diffusion_ql, tiny_dtql, tiny_qvpo, tiny_sdac, weights_of
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import CandidateFigureCallback, ResumableCheckpointCallback
from sb3_qvpo.offline import SpacesEnv, fill_replay_buffer


def random_data(n=60, seed=0):
    """Flat arrays of Pendulum's shapes, two episodes."""
    rng = np.random.default_rng(seed)
    timeouts = np.zeros(n, bool)
    timeouts[[n // 2, n - 1]] = True
    return {
        "observations": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        "next_observations": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        "actions": rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n),
        "terminals": np.zeros(n, bool),
        "timeouts": timeouts,
    }


class Watch(BaseCallback):
    """Counts what it is told."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.stop_at, self.progress = [], stop_at, []

    def _on_training_start(self):
        self.calls.append("start")

    def _on_rollout_start(self):
        self.calls.append("rollout")

    def _on_step(self):
        self.calls.append("step")
        self.progress.append(self.model._current_progress_remaining)
        return self.num_timesteps != self.stop_at

    def _on_training_end(self):
        self.calls.append("end")


@pytest.mark.parametrize("build", [tiny_qvpo, tiny_sdac, tiny_diffusion_ql, tiny_dtql])
def test_it_is_a_loop_over_updates(build):
    """One gradient step is one step of callbacks, schedules and counters; nothing is done in the environment."""
    model, watch = build(learning_rate=lambda left: 1e-3 * left), Watch()
    steps = []
    step = gym.Env.step
    model.env.envs[0].unwrapped.step = lambda action: steps.append(action) or step(action)
    assert model.learn_offline(random_data(), 12, watch) is model
    assert model._n_updates == model.num_timesteps == 12 and not steps and model.remaining_timesteps == 0
    assert watch.calls == ["start", *["rollout", "step"] * 12, "end"]
    np.testing.assert_allclose(watch.progress, 1 - np.arange(1, 13) / 12)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert model.replay_buffer.size() == 60

    by_hand = build(learning_rate=lambda left: 1e-3 * left)
    fill_replay_buffer(by_hand, random_data())
    by_hand._setup_learn(12)
    for i in range(12):
        by_hand._update_current_progress_remaining(i + 1, 12)
        by_hand.train(1, by_hand.batch_size)
    assert same_weights(weights_of(model), weights_of(by_hand))


def test_callbacks_of_sb3(tmp_path):
    """They count gradient steps; no episode is seen to end."""
    evaluation = EvalCallback(make_vec_env("Pendulum-v1"), eval_freq=10, n_eval_episodes=1, verbose=0)
    checkpoint = CheckpointCallback(10, str(tmp_path))
    tiny_qvpo().learn_offline(random_data(), 20, [evaluation, checkpoint, StopTrainingOnMaxEpisodes(1)])
    assert evaluation.last_mean_reward < 0 and evaluation.n_calls == 20 and len(list(tmp_path.glob("*_steps.zip"))) == 2
    observations = random_data()["observations"][:2]
    figures = CandidateFigureCallback(10, tmp_path / "c.png", observations=observations, n_candidates=4)
    tiny_qvpo().learn_offline(random_data(), 20, figures)
    assert [moment.step for moment in figures.snapshots] == [10, 20]


def test_a_callback_stops_it_and_it_goes_on():
    model = tiny_qvpo().learn_offline(random_data(), 20, Watch(stop_at=7))
    assert (model._n_updates, model.remaining_timesteps) == (7, 13)
    model.learn_offline(gradient_steps=model.remaining_timesteps, reset_num_timesteps=False)
    assert (model._n_updates, model.num_timesteps) == (20, 20)


@pytest.mark.parametrize("kill_at", [10, 14])
def test_a_killed_run_is_resumed_bit_for_bit(kill_at, tmp_path):
    """Whatever it did after its last checkpoint."""

    class Kill(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == kill_at:
                raise KeyboardInterrupt
            return True

    def run(name, *callbacks):
        model = tiny_qvpo(learning_rate=lambda left: 1e-3 * left)
        checkpoint = ResumableCheckpointCallback(5, tmp_path / name, at_episode_end=True)
        with suppress(KeyboardInterrupt):
            model.learn_offline(random_data(), 23, [checkpoint, *callbacks])
        return model

    whole = run("whole")
    run("killed", Kill())
    model = type(whole).resume(tmp_path / "killed", "Pendulum-v1")
    assert model.num_timesteps == 10 - 5 * (kill_at == 10)
    checkpoint = ResumableCheckpointCallback(5, tmp_path / "killed", at_episode_end=True)
    steps = model.remaining_timesteps
    model.learn_offline(gradient_steps=steps, callback=checkpoint, reset_num_timesteps=False)
    assert (model._n_updates, model.num_timesteps) == (23, 23)
    assert same_weights(weights_of(whole), weights_of(model))


def test_online_learning_follows_without_random_steps():
    """The data stay, the environment's transitions come behind them."""
    model = tiny_qvpo(buffer_size=200, learning_starts=50).learn_offline(random_data(), 10)
    model.learn(15)
    assert model.replay_buffer.pos == 75 and model._n_updates == 25, "an update for each step, from the first on"
    np.testing.assert_array_equal(model.replay_buffer.rewards[:60, 0], random_data()["rewards"].astype(np.float32))
    model.replay_buffer.reset()
    model.learn(15)
    assert model.replay_buffer.pos == 15


def test_offline_learning_follows_online_learning_on_its_own_data():
    model = tiny_qvpo().learn(30)
    before = model._n_updates
    model.learn_offline(gradient_steps=5)
    assert model._n_updates == before + 5 and model.num_timesteps == 5 and model.replay_buffer.size() == 30
    assert model.replay_buffer.timeouts[29] == 1, "an episode that was cut is no end"


def test_several_environments_and_normalised_observations():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model = tiny_qvpo(env, buffer_size=200).learn_offline(random_data(), 5)
    assert model.replay_buffer.size() == 30 and model._n_updates == 5


def test_what_is_logged(tmp_path):
    model = tiny_qvpo()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn_offline(random_data(), 20, log_interval=5)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert [row["time/total_timesteps"] for row in rows] == ["5", "10", "15", "20"]
    assert all(np.isfinite(float(row["train/critic_loss"])) and row["train/n_updates"] for row in rows)


def test_without_an_environment():
    space = gym.make("Pendulum-v1")
    model = tiny_qvpo(SpacesEnv(space.observation_space, space.action_space)).learn_offline(random_data(), 5)
    assert model.predict(np.zeros(3, np.float32))[0].shape == (1,)


def test_bad_arguments():
    model = tiny_qvpo()
    with pytest.raises(ValueError, match="dataset must be given, or the replay buffer be filled before"):
        model.learn_offline(gradient_steps=5)
    for name in ("gradient_steps", "log_interval"):
        with pytest.raises(ValueError, match=name):
            model.learn_offline(random_data(), **{name: 0})
    assert model.replay_buffer.size() == 0, "nothing was stored"
    with pytest.raises(ValueError, match="must have the field 'actions'"):
        model.learn_offline({"observations": np.zeros((3, 3))}, 5)


def test_an_error_leaves_weights_and_data_whole():
    class Fault(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 6:
                self.model.max_grad_norm = float("nan")
                with th.no_grad():
                    self.model.replay_buffer.rewards[:] = np.inf
            return True

    model = tiny_qvpo()
    with pytest.raises(ValueError, match="rewards") as raised:
        model.learn_offline(random_data(), 20, Fault())
    assert any("Training stopped after" in note and "gradient steps" in note for note in raised.value.__notes__)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert model.replay_buffer.size() == 60


def test_actions_are_clipped_and_rewards_changed_on_the_way():
    data, model = random_data(), tiny_qvpo()
    data["actions"][7] = 9
    with pytest.raises(ValueError, match="in row 7; clip_actions=True clips them"):
        model.learn_offline(data, 5)
    model.learn_offline(data, 5, clip_actions=True, reward_transform=lambda rewards: 2 * rewards)
    assert model.replay_buffer.actions[7, 0, 0] == 1
    np.testing.assert_allclose(model.replay_buffer.rewards[:60, 0], 2 * data["rewards"], rtol=1e-6)


def test_a_progress_bar(capsys):
    tiny_qvpo().learn_offline(random_data(), 10, progress_bar=True)
    assert "10/10" in capsys.readouterr().out.replace(" ", "")


def test_statistics_of_the_data_normalise_them():
    """As the page about data says: given to ``VecNormalize`` first, they count when batches are drawn."""
    data = random_data(500)
    data |= {name: 5 + 3 * data[name] for name in ("observations", "next_observations")}
    env = normalized()
    env.obs_rms.update(data["observations"])
    model = tiny_qvpo(env, buffer_size=1_000).learn_offline(data, 5)
    observations = model._sample_batch(500).observations.numpy()
    np.testing.assert_allclose(observations.mean(axis=0), 0, atol=0.2)
    np.testing.assert_allclose(observations.std(axis=0), 1, atol=0.2)
