"""Replay buffers: n-step returns, saved memory, contents that survive a file."""

import numpy as np
import pytest
from helpers import CountdownEnv, bandit_qvpo, recorded_warnings, tiny_qvpo
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv


def test_n_step_returns_use_the_buffers_discounts():
    """The TD target itself is compared with the reference in ``qvpo/test_qvpo.py``."""
    model = tiny_qvpo(CountdownEnv(length=6), n_steps=3, gamma=0.5, learning_starts=100).learn(12)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    batch = model.replay_buffer._get_samples(np.arange(12))
    np.testing.assert_allclose(batch.rewards[:6, 0], [1.75, 1.75, 1.75, 1.75, 1.5, 1.0])
    np.testing.assert_allclose(batch.discounts[:4, 0], 0.125)
    assert batch.dones[:6, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_n_step_returns_of_two_environments_do_not_mix():
    """The observation tells the environment and the steps left in it: 4, or 5."""
    env = DummyVecEnv([lambda: CountdownEnv(4), lambda: CountdownEnv(5)])
    model = tiny_qvpo(env, n_steps=3, gamma=0.5, train_freq=4, gradient_steps=-1).learn(48)
    assert (type(model.replay_buffer), model.replay_buffer.n_steps) == (NStepReplayBuffer, 3)
    batch = model.replay_buffer._get_samples(np.repeat(np.arange(20), 10))
    observations = batch.observations[:, 0].numpy()
    of_four = np.isin(observations, np.float32([0.25, 0.5, 0.75]))
    left = np.where(of_four, 4 - 4 * observations, 5 - 5 * observations).round().astype(int)
    np.testing.assert_allclose(batch.rewards[:, 0], np.array([0, 1, 1.5, 1.75, 1.75, 1.75])[left])
    assert (of_four & (left == 1)).any() and (~of_four & (left == 1)).any()


def test_optimize_memory_usage():
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    model = tiny_qvpo(buffer_size=20, **kwargs).learn(30)
    assert model.replay_buffer.full
    assert not hasattr(model.replay_buffer, "next_observations")


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_the_memory_saving_buffer_warns_when_an_episode_is_broken_off(optimize_memory_usage):
    """Not while training continues; once at a reset, where its next row would belong to another episode."""
    replay_buffer_kwargs = dict(handle_timeout_termination=not optimize_memory_usage)
    model = bandit_qvpo(buffer_size=20, optimize_memory_usage=optimize_memory_usage, replay_buffer_kwargs=replay_buffer_kwargs)
    with recorded_warnings() as caught:
        model.learn(25).learn(25, reset_num_timesteps=False)
        assert not caught
        model.learn(25)
    assert len(caught) == optimize_memory_usage
    assert all("truncated" in str(each.message) and each.category is UserWarning for each in caught)


def test_a_loaded_buffer_has_the_same_contents(tmp_path):
    """Time limits among them, which make the difference between ``dones`` and ends of the task."""
    model = tiny_qvpo(CountdownEnv(truncate=True)).learn(30)
    saved = model.replay_buffer
    model.save_replay_buffer(tmp_path / "buffer")
    model.replay_buffer = None
    model.load_replay_buffer(tmp_path / "buffer")
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(model.replay_buffer, name), getattr(saved, name), err_msg=name)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (30, False)
    assert saved.timeouts.sum() == 7
