"""Checkpoints are taken when they are due, and what prevents them is found out at the start."""

import re

import numpy as np
import pytest
from helpers import CountdownEnv, countdown, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_qvpo import QVPO, ResumableCheckpointCallback


def test_checkpoints_are_taken_when_they_are_due(tmp_path, capsys):
    """Every 7 steps; at the end of episodes of 5 steps: the next one after 7; without an end at the latest after 14."""

    def saved_at(env, **kwargs):
        callback = ResumableCheckpointCallback(7, tmp_path / "run", verbose=2, **kwargs)
        tiny_qvpo(env).learn(30, callback)
        return [int(step) for step in re.findall(r"Saved a checkpoint after (\d+) steps", capsys.readouterr().out)]

    assert saved_at(CountdownEnv(length=5)) == [7, 14, 21, 28, 30]
    assert saved_at(CountdownEnv(length=5), at_episode_end=True) == [10, 20, 30]
    assert saved_at(CountdownEnv(length=100), at_episode_end=True) == [14, 28, 30]
    with pytest.raises(ValueError, match="save_freq must be a whole number of at least 1, got 0"):
        ResumableCheckpointCallback(0, tmp_path / "run")


def test_the_end_of_an_episode_is_the_end_of_all(tmp_path, capsys):
    """Of two environments with episodes of 3 and 4 steps; and the buffer knows which end was a termination."""
    env = DummyVecEnv([countdown(), lambda: CountdownEnv(length=4, truncate=True)])
    callback = ResumableCheckpointCallback(14, tmp_path / "run", at_episode_end=True, verbose=2)
    model = tiny_qvpo(env, gradient_steps=-1)
    with pytest.warns(UserWarning, match="no common end of all episodes within 28 steps"):
        model.learn(100, callback)
    assert re.findall(r"Saved a checkpoint after (\d+) steps", capsys.readouterr().out) == ["28", "56", "80", "100"]
    ends = np.arange(50)
    np.testing.assert_array_equal(model.replay_buffer.dones[:50, 0], (ends + 1) % 5 == 0)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:50, 0], 0)  # terminations stay terminations
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:50, 1], (ends + 1) % 4 == 0)


def test_a_checkpoint_in_the_middle_of_an_episode_changes_nothing(tmp_path):
    plain = tiny_qvpo(CountdownEnv(length=5)).learn(40)
    saved = tiny_qvpo(CountdownEnv(length=5)).learn(40, ResumableCheckpointCallback(3, tmp_path / "run"))
    assert same_weights(weights_of(plain), weights_of(saved))


def test_where_the_callback_cannot_work_is_found_out_at_the_start(tmp_path):
    def callback():
        return ResumableCheckpointCallback(10, tmp_path / "run", at_episode_end=True)

    with pytest.raises(ValueError, match=r"must be given to learn.* got inside EveryNTimesteps"):
        tiny_qvpo().learn(5, EveryNTimesteps(5, callback()))
    with pytest.raises(ValueError, match=r"the model must have save_checkpoint\(\), as QVPO has, got SAC"):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").learn(5, callback())
    with pytest.raises(ValueError, match="at_episode_end must be False for environments with Monitor"):
        tiny_qvpo(Monitor(CountdownEnv(), allow_early_resets=False)).learn(5, callback())
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(IsADirectoryError, match="the path of a checkpoint must not be a folder"):
        tiny_qvpo().learn(5, ResumableCheckpointCallback(10, tmp_path / "folder"))
    (tmp_path / "run").mkdir()  # a folder of the name without the suffix is no obstacle
    for vec_env_class in (SubprocVecEnv, DummyVecEnv):
        tiny_qvpo(vec_env_class([CountdownEnv])).learn(25, callback())
    assert QVPO.resume(tmp_path / "run", CountdownEnv()).num_timesteps == 25


def test_a_checkpoint_that_cannot_be_written_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny_qvpo()
    with pytest.raises(OSError, match=r"could not save|Not a directory|File exists"):
        model.learn(5, ResumableCheckpointCallback(1000, tmp_path / "file" / "run"))
    assert model.num_timesteps == 0
    model.learn(5, ResumableCheckpointCallback(1000, tmp_path / "new folder" / "run"))
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["run.zip"]
