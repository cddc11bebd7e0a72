"""Environments that are set, loaded with a model, several at once, or of the wrong kind."""

import gymnasium as gym
import numpy as np
import pytest
from helpers import CountdownEnv, bandit_qvpo, tiny_qvpo
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qvpo import QVPO


def test_setting_environments():
    """A reset unless told otherwise; plain environments are wrapped; another number of them is refused."""
    model = bandit_qvpo(train_freq=4).learn(16)
    other = DummyVecEnv([lambda: IdentityEnvBox(-10, 10)])
    model.set_env(other, force_reset=True)
    assert (model._last_obs, model.get_env()) == (None, other)
    assert model.learn(16).num_timesteps == 16
    model.set_env(IdentityEnvBox(-10, 10))
    assert isinstance(model.get_env(), DummyVecEnv)
    assert model.learn(16).num_timesteps == 16
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(IdentityEnvBox, n_envs=2, env_kwargs=dict(low=-10, high=10)))
    last_obs = model._last_obs
    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is last_obs
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32


def test_loading_with_an_environment(tmp_path):
    """In the middle of its episode or with a reset; the count of steps is kept; the number of environments may change."""
    model = bandit_qvpo().learn(16)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=model.get_env(), force_reset=False)
    np.testing.assert_array_equal(loaded._last_obs, model._last_obs)
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 32
    reset = QVPO.load(tmp_path / "model", env=IdentityEnvBox(-10, 10), force_reset=True)
    assert reset._last_obs is None
    assert reset.learn(16, reset_num_timesteps=False).num_timesteps == 32
    assert reset._n_updates == 2 * model._n_updates  # its empty buffer was filled first
    at_once = QVPO.load(tmp_path / "model", env=IdentityEnvBox(-10, 10), learning_starts=0)
    assert at_once.learn(16, reset_num_timesteps=False)._n_updates == model._n_updates + 16
    two = make_vec_env(IdentityEnvBox, n_envs=2, env_kwargs=dict(low=-10, high=10))
    widened = QVPO.load(tmp_path / "model", env=two, gradient_steps=-1).learn(16)
    assert (widened.n_envs, widened.num_timesteps, widened.replay_buffer.size()) == (2, 16, 8)
    assert widened._n_updates == model._n_updates + 6 * 2  # after steps 6, 8, ... 16


def test_environments_with_other_spaces_are_refused():
    model = tiny_qvpo()
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(CountdownEnv())


def test_gym_and_vec_env_mix_up_is_explained():
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        tiny_qvpo().predict(gym.make("Pendulum-v1").reset())


@pytest.mark.parametrize("gradient_steps", [1, -1])
def test_several_environments(gradient_steps):
    env = make_vec_env(lambda: CountdownEnv(), n_envs=3)
    model = tiny_qvpo(env, gradient_steps=gradient_steps).learn(30)
    assert model.num_timesteps == 30
    assert model.replay_buffer.size() == 10
    rollouts_after_warm_up = 9  # of 3 steps each: at 6, 9, ... 30
    assert model._n_updates == rollouts_after_warm_up * (1 if gradient_steps == 1 else 3)


def test_the_logged_number_of_updates_counts_all_environments():
    """One rollout of 3 steps in 2 environments is 6 transitions, so 6 updates."""
    env = make_vec_env(CountdownEnv, n_envs=2)
    model = tiny_qvpo(env, train_freq=3, gradient_steps=-1, learning_starts=0).learn(3)
    assert model.logger.name_to_value["train/n_updates"] == 6
    assert model.num_timesteps == 6


def test_time_limits_and_noise_of_several_environments():
    """Each environment ends by its own time limit and has noise of its own."""
    env = DummyVecEnv([lambda: CountdownEnv(3, truncate=True), lambda: CountdownEnv(5, truncate=True)])
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    model = tiny_qvpo(env, action_noise=noise, gradient_steps=-1, learning_starts=30).learn(60)
    rows = np.arange(1, 31)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:30, 0], rows % 3 == 0)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:30, 1], rows % 5 == 0)
    assert not model.replay_buffer._get_samples(np.arange(30)).dones.any()  # bootstrapped
    first, second = model.action_noise()
    assert first != second


def test_evaluation_with_sb3():
    model = tiny_qvpo(CountdownEnv(length=4)).learn(10)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2) == (4.0, 0.0)
