"""What SB3 users rely on with SAC and TD3, here with QVPO: spaces, dictionaries, normalisation, images, hindsight."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from helpers import GoalEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from sb3_qvpo import QVPO

BOX = spaces.Box(-1, 1, (2,), np.float32)


class SeededEnv(gym.Env):
    """Random observations that repeat with the seed, reward by action, time limit after ``length`` steps."""

    def __init__(self, observation_space=BOX, action_space=BOX, length=5):
        self.observation_space, self.action_space = observation_space, action_space
        self.length, self.steps = length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(action.sum()), False, self.steps == self.length, {"step": self.steps}


def batch_of_an_update(model):
    """The transitions that the next update sees."""
    seen, critic_loss = [], model._critic_loss
    model._critic_loss = lambda batch, noise: seen.append(batch) or critic_loss(batch, noise)
    model.train(1, batch_size=200)
    del model._critic_loss
    return seen[0]


class SubclassedBox(spaces.Box):
    """A Box by inheritance."""


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (spaces.MultiBinary((3, 2)), BOX),
        (SubclassedBox(-1, 1, (2,), np.float32), SubclassedBox(-1, 1, (3,), np.float32)),
        (spaces.Box(-1, 1, (2,), np.float64), spaces.Box(-1, 1, (2,), np.float64)),
        (spaces.Box(-1, 1, (2,), np.float64), BOX),
        (spaces.Dict(a=BOX, b=spaces.Box(-1, 1, (2,), np.float64)), spaces.Box(-1, 1, (2,), np.float64)),
        (spaces.Dict(a=BOX, b=spaces.Box(-1, 1, (2,), np.float64)), BOX),
    ],
)
def test_predictions_are_of_the_action_space(observation_space, action_space):
    """Also their dtype, whatever the observations' is; and the environment checks each action while training."""
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = tiny_qvpo(SeededEnv(observation_space, action_space), policy=policy).learn(10)
    assert model._n_updates == 5
    for deterministic in (True, False):
        action, _ = model.predict(observation_space.sample(), deterministic=deterministic)
        assert action.dtype == action_space.dtype
        assert action_space.contains(action)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2)[0] <= 5 * action_space.shape[0]


def test_a_dictionary_of_one_vector_is_that_vector():
    """Both policies start and learn alike, bit for bit."""
    dict_env = SeededEnv(spaces.Dict(vector=spaces.Box(-1, 1, (2,), np.float32)))
    flat_env = FlattenObservation(SeededEnv(spaces.Dict(vector=spaces.Box(-1, 1, (2,), np.float32))))
    kwargs = dict(gamma=0.5, train_freq=4, seed=1)
    models = tiny_qvpo(dict_env, policy="MultiInputPolicy", **kwargs), tiny_qvpo(flat_env, **kwargs)
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)

    def predictions():
        return [m.predict(o, deterministic=True)[0] for m, o in zip(models, (dict(vector=obs), obs), strict=True)]

    before = predictions()
    np.testing.assert_array_equal(*before)
    for model in models:
        model.set_random_seed(1)
        model.learn(60)
    after = predictions()
    np.testing.assert_array_equal(*after)
    assert not np.array_equal(before[0], after[0])


@pytest.mark.parametrize("channel_last", [False, True])
def test_dictionaries_with_images_in_both_layouts(channel_last):
    """Trained, evaluated, and with frames stacked; the extractor of images has the size that was asked for."""
    policy_kwargs = dict(net_arch=[8], features_extractor_kwargs=dict(cnn_output_dim=32))

    def make_env():
        return SimpleMultiObsEnv(random_start=True, discrete_actions=False, channel_last=channel_last)

    layout = "last" if channel_last else "first"
    stacked = VecFrameStack(DummyVecEnv([make_env]), n_stack=3, channels_order={"vec": None, "img": layout})
    for env, frames in ((DummyVecEnv([make_env]), 1), (stacked, 3)):
        model = tiny_qvpo(env, policy="MultiInputPolicy", policy_kwargs=policy_kwargs, buffer_size=20).learn(7)
        assert model._n_updates == 2
        assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) == channel_last
        assert model.observation_space["img"].shape == (frames, 64, 64)
        assert model.actor.features_extractor.extractors["img"].features_dim == 32
        model.n_eval_candidates = 1
        assert np.isfinite(evaluate_policy(model, model.get_env(), n_eval_episodes=1, warn=False)[0])


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


# Images


def image_env(**kwargs):
    return FakeImageEnv(screen_height=36, screen_width=36, discrete=False, **kwargs)


def image_qvpo(env, **kwargs):
    return tiny_qvpo(env, policy="CnnPolicy", buffer_size=20, **kwargs)


def test_images_with_channels_last(tmp_path):
    """They are transposed on the way in: in training, in ``predict`` of raw images, and after loading without environment."""
    env = image_env(n_channels=1)
    model = image_qvpo(env).learn(7)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    assert model.observation_space.shape == (1, 36, 36)
    obs = np.stack([env.reset()[0] for _ in range(3)])
    assert obs.shape == (3, 36, 36, 1)
    assert model.predict(obs)[0].shape == (3, *env.action_space.shape)
    action, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(model.predict(obs.transpose(0, 3, 1, 2), deterministic=True)[0], action)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(QVPO.load(tmp_path / "model", device="cpu").predict(obs, deterministic=True)[0], action)
    loaded = QVPO.load(tmp_path / "model", env=image_env(n_channels=1), device="cpu")  # wrapped again, spaces compared
    assert is_vecenv_wrapped(loaded.get_env(), VecTransposeImage)
    assert loaded.learn(7, reset_num_timesteps=False).num_timesteps == 14
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        QVPO.load(tmp_path / "model", env=image_env(n_channels=3))


def test_normalised_images_are_not_divided_by_255():
    """``VecNormalize`` leaves float images without bounds: with ``normalize_images=False`` they are taken as they are."""
    env = VecNormalize(DummyVecEnv([lambda: image_env(n_channels=1, channel_first=True)]))
    model = image_qvpo(env, policy_kwargs=dict(net_arch=[8], normalize_images=False)).learn(7)
    assert model._n_updates == 2
    with pytest.raises(AssertionError, match="NatureCNN"):
        image_qvpo(env)


def test_a_cnn_actor_is_saved_and_loaded_alone(tmp_path):
    model = image_qvpo(image_env())
    model.actor.save(tmp_path / "actor")
    loaded = type(model.actor).load(tmp_path / "actor", device="cpu")
    assert same_weights(model.actor.state_dict(), loaded.state_dict())
    obs, draws = model.observation_space.sample(), []
    for actor in (model.actor, loaded):
        th.manual_seed(1)
        draws.append(actor.predict(obs)[0])
    np.testing.assert_array_equal(*draws)


# Hindsight experience replay


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
