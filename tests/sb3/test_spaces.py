"""All spaces that SB3 users have: vectors, images, dictionaries, actions of any bounds."""

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from helpers import BOX, IMAGE, AnySpacesEnv, SeededEnv, tiny_qvpo
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage, is_vecenv_wrapped

from sb3_qvpo import QVPO


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Box(-5, 5, (3,), np.float64),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
        spaces.Discrete(4),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiBinary(5),
        IMAGE,
        spaces.Dict(vector=BOX, other=spaces.Box(0, 1, (1,), np.float32)),
        spaces.Dict(vector=BOX, image=IMAGE, kind=spaces.Discrete(3)),
    ],
)
def test_observation_spaces(observation_space, tmp_path):
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    policy = "CnnPolicy" if observation_space is IMAGE else policy
    model = tiny_qvpo(AnySpacesEnv(observation_space, BOX), policy=policy).learn(12)
    assert model._n_updates == 7
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model")
    observation = observation_space.sample()
    actions = [each.predict(observation, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-0.4, 0.4, (17,), np.float32),
        spaces.Box(-1, 1, (2,), np.float64),
        spaces.Box(np.array([-3.0, 0.5], np.float32), np.array([-1.0, 0.75], np.float32)),
        spaces.Box(0, 1e-3, (1,), np.float32),
        spaces.Box(-1, 1, (2, 2), np.float32),
    ],
)
def test_action_spaces(action_space):
    """The environment checks every action that it gets; the buffer holds scaled ones."""
    model = tiny_qvpo(AnySpacesEnv(BOX, action_space)).learn(20)
    stored = model.replay_buffer.actions[: model.replay_buffer.pos]
    assert stored.dtype == np.float32
    assert np.abs(stored).max() <= 1 + 1e-6
    assert np.abs(stored).max() > 0.5


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
