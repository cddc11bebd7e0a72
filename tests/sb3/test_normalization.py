"""Training with ``VecNormalize``: which observations, whose statistics."""

import numpy as np
from gymnasium import spaces
from helpers import SeededEnv, batch_of_an_update, tiny_qvpo
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


def test_updates_see_normalised_observations_and_rewards():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1))
    model = tiny_qvpo(env, learning_starts=100).learn(100)
    batch = batch_of_an_update(model)
    raw = model.replay_buffer._get_samples(np.arange(100))
    assert float(raw.rewards.abs().max()) > 10 * float(batch.rewards.abs().max())  # divided by the deviation of the return
    assert float(batch.observations.mean(dim=0).abs().max()) < 0.5
    assert float(raw.observations.std(dim=0).max()) > 1.5 * float(batch.observations.std(dim=0).max())


def test_normalised_dictionaries():
    """``norm_obs_keys``: updates see that key normalised and the others as they are."""
    space = spaces.Dict(vector=spaces.Box(5, 9, (2,), np.float32), kind=spaces.Discrete(3), raw=spaces.Box(5, 9, (1,)))
    env = VecNormalize(DummyVecEnv([lambda: SeededEnv(space)]), norm_obs_keys=["vector"])
    model = tiny_qvpo(env, policy="MultiInputPolicy").learn(60)
    sample = batch_of_an_update(model).observations
    assert float(sample["vector"].mean(dim=0).abs().max()) < 0.7
    assert 5 <= float(sample["raw"].min()) <= float(sample["raw"].max()) <= 9
    assert np.isfinite(evaluate_policy(model, model.get_env(), n_eval_episodes=1, warn=False)[0])


def test_the_normalisation_in_use_is_that_of_the_present_environment():
    env, other = (VecNormalize(make_vec_env("Pendulum-v1", n_envs=2)) for _ in range(2))
    model = tiny_qvpo(env, gradient_steps=-1)
    assert model.get_vec_normalize_env() is env
    model.set_env(other)
    model.learn(12)
    assert model.get_vec_normalize_env() is other
    assert (env.obs_rms.count < 1, other.obs_rms.count > 12) == (True, True)
    model.set_env(env)
    model.learn(12)
    assert env.obs_rms.count > 12
