"""Hindsight experience replay, and its buffers in files."""

import numpy as np
import pytest
from helpers import GoalEnv, batch_of_an_update, bit_flipping_qvpo, recorded_warnings, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from sb3_qvpo import QVPO


def her_qvpo(env, strategy="future", copy_info_dict=False, **kwargs):
    replay_buffer_kwargs = dict(goal_selection_strategy=strategy, n_sampled_goal=2, copy_info_dict=copy_info_dict)
    kwargs = {**dict(learning_starts=12, gradient_steps=-1), **kwargs}
    return tiny_qvpo(
        env,
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=replay_buffer_kwargs,
        **kwargs,
    )


@pytest.mark.parametrize("strategy", ["final", "episode", "future", *GoalSelectionStrategy])
def test_every_goal_selection_strategy_trains(strategy):
    """Two environments, two updates each time, action noise; relabelled goals were really achieved."""
    noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    env = make_vec_env(GoalEnv, n_envs=2)
    model = her_qvpo(env, strategy, gradient_steps=2, train_freq=4, action_noise=noise).learn(48)
    assert model._n_updates == 2 * 5  # at steps 16, 24, ... 48
    batch = model.replay_buffer.sample(100).observations
    goals = {tuple(goal) for goal in model.replay_buffer.observations["desired_goal"].reshape(-1, 2).tolist()}
    achieved = {tuple(goal) for goal in model.replay_buffer.next_observations["achieved_goal"].reshape(-1, 2).tolist()}
    sampled = {tuple(goal) for goal in batch["desired_goal"].tolist()}
    assert sampled <= goals | achieved
    assert sampled & (achieved - goals)


class InfoBitFlippingEnv(BitFlippingEnv):
    """Remembers what ``compute_reward`` is told."""

    infos: tuple = ()

    def compute_reward(self, achieved_goal, desired_goal, info):
        self.infos = (*self.infos, *(info if isinstance(info, (list, np.ndarray)) else []))
        return super().compute_reward(achieved_goal, desired_goal, info)


@pytest.mark.parametrize("image", [False, True])
def test_hindsight_with_images_infos_and_evaluation(image):
    """``copy_info_dict``: the rewards of new goals are computed with the stored infos."""
    env = InfoBitFlippingEnv(n_bits=4, continuous=True, image_obs_space=image, max_steps=4)
    model = her_qvpo(env, copy_info_dict=True, train_freq=4, gradient_steps=1).learn(20)
    assert model._n_updates == 2  # at steps 16 and 20
    assert env.infos
    assert all("is_success" in info for info in env.infos)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=2)
    assert -4 <= mean <= 0


def test_a_full_hindsight_buffer_draws_whole_episodes():
    """14 rows after 63 steps: the last one of a torn episode, two whole ones of 5, the first three of an unfinished one."""
    env = make_vec_env(GoalEnv, n_envs=2)
    model = her_qvpo(env, buffer_size=28, learning_starts=16, train_freq=3).learn(126)
    buffer = model.replay_buffer
    assert (buffer.full, buffer.pos, model._n_updates) == (True, 7, 126 - 12)
    whole = [step % 14 for step in range(50, 60)]
    expected = buffer.next_observations["observation"][whole].reshape(-1, 2).tolist()
    drawn = buffer.sample(1000).next_observations["observation"].tolist()
    assert {tuple(each) for each in drawn} == {tuple(each) for each in expected}


def test_hindsight_with_normalisation():
    """Statistics are those of the environment in use, and updates see observations normalised by them."""
    env = VecNormalize(DummyVecEnv([GoalEnv]), clip_obs=10)
    other = VecNormalize(DummyVecEnv([GoalEnv]), training=False, norm_reward=False, clip_obs=10)
    model = her_qvpo(env)
    model.set_env(other)
    model.learn(10)
    assert model.get_vec_normalize_env() is other
    assert env.obs_rms["observation"].count < 1
    model.set_env(env)
    model.learn(40)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms["observation"].count > 40
    raw, seen = (each.observations["observation"] for each in (model.replay_buffer.sample(200), batch_of_an_update(model)))
    assert float(seen.std()) < 2 < 5 < float(raw.std())


def test_environments_in_processes_of_their_own():
    """The same run, bit for bit, as with all environments in this process."""

    def run(**kwargs):
        env = make_vec_env(GoalEnv, n_envs=2, **kwargs)
        model = her_qvpo(env, train_freq=4).learn(40)
        env.close()
        return model._n_updates, weights_of(model)

    n_updates, weights = run(vec_env_cls=SubprocVecEnv)
    expected, in_this_process = run()
    assert n_updates == expected == 4 * 8  # after steps 16, 24, 32, 40
    assert same_weights(weights, in_this_process)


# In files


@pytest.mark.parametrize("truncate_last_traj", [True, False])
def test_her_with_saved_buffer(truncate_last_traj, tmp_path):
    env = BitFlippingEnv(n_bits=3, continuous=True)
    kwargs = dict(goal_selection_strategy="future", n_sampled_goal=2)
    model = tiny_qvpo(
        env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs, learning_starts=20
    ).learn(50)
    assert model._n_updates == 30
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QVPO.load(tmp_path / "model", env=env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=truncate_last_traj)
    loaded.learn(10, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (60, 40)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_loaded_hindsight_buffer_has_the_same_contents(n_envs, tmp_path):
    model = bit_flipping_qvpo(n_envs).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = bit_flipping_qvpo(n_envs)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    old, new, rows = model.replay_buffer, loaded.replay_buffer, slice(30 // n_envs)
    for key in ("observation", "achieved_goal", "desired_goal"):
        np.testing.assert_array_equal(old.observations[key][rows], new.observations[key][rows])
        np.testing.assert_array_equal(old.next_observations[key][rows], new.next_observations[key][rows])
    for name in ("actions", "rewards", "dones", "ep_start", "ep_length"):
        np.testing.assert_array_equal(getattr(old, name)[rows], getattr(new, name)[rows], err_msg=name)
    assert loaded.learn(30, reset_num_timesteps=False).replay_buffer.size() == 60 // n_envs


@pytest.mark.parametrize("truncate_last_traj", [True, False])
def test_cutting_an_unfinished_hindsight_episode_is_warned_of(truncate_last_traj, tmp_path):
    """Continuing in another environment would join two episodes; in the same one nothing is cut and nothing said."""
    model = bit_flipping_qvpo().learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    unfinished = (model.replay_buffer.pos - model.replay_buffer._current_ep_start).tolist()
    assert all(unfinished)
    with recorded_warnings() as caught:
        model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=truncate_last_traj)
    messages = [str(each.message) for each in caught if "truncated" in str(each.message)]
    assert len(messages) == truncate_last_traj
    cut = model.replay_buffer.ep_length[model.replay_buffer.pos - 1] != 0
    assert cut.tolist() == [truncate_last_traj] * 2
