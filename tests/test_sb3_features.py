"""What SB3 offers around an algorithm works with QVPO: buffers, callbacks, noise, wrappers, observation and action spaces."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_qvpo import QVPO


class AnySpacesEnv(gym.Env):
    """Random observations and rewards in given spaces, episodes of five steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space, self.steps = observation_space, action_space, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), self.np_random.normal(), self.steps == 5, False, {}


BOX = spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


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


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise_class, n_envs):
    noise = noise_class(np.zeros(1), 0.5 * np.ones(1))
    env = make_vec_env("Pendulum-v1", n_envs=n_envs)
    noisy = weights_of(tiny_qvpo(env, action_noise=noise).learn(20))
    assert not same_weights(noisy, weights_of(tiny_qvpo(make_vec_env("Pendulum-v1", n_envs=n_envs)).learn(20)))


def test_optimize_memory_usage():
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    model = tiny_qvpo(**kwargs).learn(250)  # beyond the buffer's 200
    assert model.replay_buffer.full
    assert not hasattr(model.replay_buffer, "next_observations")


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


def test_set_parameters_and_custom_objects(tmp_path):
    model = tiny_qvpo().learn(12)
    model.save(tmp_path / "model")
    other = tiny_qvpo(seed=7)
    assert not same_weights(weights_of(other), weights_of(model))
    other.set_parameters(tmp_path / "model")
    assert same_weights(weights_of(other), weights_of(model))
    other.set_parameters(model.get_parameters())
    moments = [each.actor.optimizer.state_dict()["state"][0]["exp_avg"] for each in (model, other)]
    np.testing.assert_array_equal(*moments)
    changed = QVPO.load(tmp_path / "model", custom_objects=dict(learning_rate=0.5, n_uniform_actions=3))
    assert (changed.lr_schedule(1.0), changed.n_uniform_actions) == (0.5, 3)
    with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
        QVPO.load(tmp_path / "model", policy_kwargs=dict(net_arch=[3]))


def test_models_and_policies_of_other_algorithms_are_refused(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac")
    with pytest.raises(
        ValueError, match=r"policy must be .* subclass of DiffusionPolicy, got SACPolicy: .* saved model\) of another"
    ):
        QVPO.load(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"policy must be .* subclass of DiffusionPolicy, got SACPolicy"):
        QVPO(SACPolicy, "Pendulum-v1")
    tiny_qvpo().save(tmp_path / "model")
    with pytest.raises(ValueError, match="The environment is of type <class 'str'>"):
        QVPO.load(tmp_path / "model", env="Pendulum-v1")


def test_environments_with_other_spaces_are_refused():
    model = tiny_qvpo()
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(CountdownEnv())
