"""SB3's callbacks: evaluation, checkpoints, ways of stopping, lists."""

import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, tiny_qvpo
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO


def test_callbacks(tmp_path):
    """Evaluation with the best model, checkpoints with buffer and normalisation, two ways of stopping."""
    env = VecNormalize(make_vec_env(lambda: CountdownEnv(length=5), n_envs=1))
    eval_env = VecNormalize(make_vec_env(lambda: CountdownEnv(length=5), n_envs=1), training=False, norm_reward=False)
    evaluation = EvalCallback(eval_env, eval_freq=10, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    checkpoints = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model = tiny_qvpo(env).learn(40, callback=CallbackList([evaluation, checkpoints]))
    assert evaluation.last_mean_reward == 5.0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best_model.zip", "rl_model_40_steps.zip", "rl_model_replay_buffer_40_steps.pkl"} <= names
    continued = QVPO.load(tmp_path / "rl_model_40_steps", device="cpu")
    continued.load_replay_buffer(tmp_path / "rl_model_replay_buffer_40_steps")
    stored = continued.replay_buffer.rewards
    np.testing.assert_array_equal(stored[:39], model.replay_buffer.rewards[:39])
    env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_40_steps.pkl"), make_vec_env(lambda: CountdownEnv(5), 1))
    continued.set_env(env)
    continued.learn(5, reset_num_timesteps=False)
    assert (continued.num_timesteps, continued._n_updates) == (45, model._n_updates - 1 + 5)

    stopped = tiny_qvpo(CountdownEnv(length=5)).learn(100, callback=StopTrainingOnMaxEpisodes(max_episodes=3))
    assert stopped.num_timesteps == 15
    no_progress = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    evaluation = EvalCallback(make_vec_env(CountdownEnv), callback_after_eval=no_progress, eval_freq=10, verbose=0)
    assert tiny_qvpo(CountdownEnv()).learn(100, callback=evaluation).num_timesteps < 100


@pytest.mark.parametrize("answer", [False, np.bool_(False), th.tensor(False)])
def test_a_callback_stops_training_at_once(answer):
    calls = []
    model = tiny_qvpo(learning_starts=1, buffer_size=1, batch_size=1)
    model.learn(10, callback=lambda *_: calls.append(1) or answer)
    assert (len(calls), model.num_timesteps, model._n_updates) == (1, 1, 0)


class Watch(BaseCallback):
    """Records its counters and the observation that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append((self.n_calls, self.num_timesteps, self.model.num_timesteps, self.locals["new_obs"]))
        return True


def test_callbacks_in_a_list_see_the_same_step():
    first, second, every_four = Watch(), Watch(), Watch()
    callbacks = [first, second, EveryNTimesteps(n_steps=4, callback=every_four)]
    model = tiny_qvpo().learn(12, callback=callbacks, progress_bar=True)
    assert [seen[:3] for seen in first.seen] == [(i, i, i) for i in range(1, 13)]
    assert [seen[:3] for seen in every_four.seen] == [(i, 4 * i, 4 * i) for i in (1, 2, 3)]
    for mine, theirs in zip(first.seen, second.seen, strict=True):
        assert mine[3] is theirs[3]
        assert model.observation_space.contains(mine[3][0])
    assert all(event[3] is first.seen[4 * i + 3][3] for i, event in enumerate(every_four.seen))


@pytest.mark.parametrize(("threshold", "n_steps"), [(4.9, 10), (5.1, 30)])
def test_training_stops_at_a_reward_threshold(threshold, n_steps):
    """Every episode of this environment returns 5."""
    stop = StopTrainingOnRewardThreshold(reward_threshold=threshold)
    env = make_vec_env(lambda: CountdownEnv(length=5))
    evaluation = EvalCallback(env, callback_on_new_best=stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    assert tiny_qvpo(CountdownEnv()).learn(30, callback=evaluation).num_timesteps == n_steps
