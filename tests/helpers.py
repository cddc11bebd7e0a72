"""What several test files need: small models, toy environments and the way from torch modules to NumPy arrays."""

import warnings
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_qvpo import QVPO

TINY = dict(
    learning_starts=5,
    batch_size=8,
    buffer_size=200,
    n_train_candidates=4,
    n_uniform_actions=2,
    n_eval_candidates=4,
    n_diffusion_steps=3,
    policy_kwargs=dict(net_arch=[8, 8], time_embedding_dim=4),
    seed=0,
    device="cpu",
)
"""Arguments that make an update take about a millisecond."""


def tiny_qvpo(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A small QVPO; ``kwargs`` override :data:`TINY`."""
    return QVPO(policy, env, **{**TINY, **kwargs})


class BanditEnv(gym.Env):
    """A bandit: one step an episode, a constant observation, reward ``reward_function(action)``."""

    def __init__(self, reward_function=lambda action: 0.0, action_dim=1):
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)
        self.reward_function = reward_function

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), float(self.reward_function(action)), True, False, {}


class CountdownEnv(gym.Env):
    """
    Reward 1 at every step; ends after ``length`` steps by termination, or by a time limit if ``truncate``. The observation
    goes round in a circle, so the one at a time limit is also seen at a start.
    """

    def __init__(self, length=4, truncate=False):
        self.observation_space = spaces.Box(0, 1, (1,), np.float32)
        self.action_space = spaces.Box(-2, 1, (1,), np.float32)
        self.length, self.truncate, self.steps = length, truncate, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        end = self.steps >= self.length
        return (
            np.full(1, self.steps % self.length / self.length, np.float32),
            1.0,
            end and not self.truncate,
            end and self.truncate,
            {},
        )


class DictEnv(CountdownEnv):
    """The same with two observations in a dictionary."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(a=self.observation_space, b=self.observation_space)

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return {"a": observation, "b": observation / 2}, info

    def step(self, action):
        observation, *rest = super().step(action)
        return {"a": observation, "b": observation / 2}, *rest


class GoalEnv(gym.Env):
    """Move a point to a goal; observations of different sizes, episodes of 5 steps."""

    def __init__(self):
        box = spaces.Box(-20, 20, (2,), np.float32)
        self.observation_space = spaces.Dict(observation=box, achieved_goal=box, desired_goal=box)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.point, self.goal = self.np_random.uniform(-20, 20, (2, 2)).astype(np.float32)
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        self.point = np.clip(self.point + action, -20, 20)
        reward = self.compute_reward(self.point, self.goal, {})
        return self._observation(), float(reward), False, self.steps == 5, {"step": self.steps, "is_success": reward == 0}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 1).astype(np.float32)

    def _observation(self):
        return dict(observation=self.point.copy(), achieved_goal=self.point.copy(), desired_goal=self.goal.copy())


def layers_to_numpy(module):
    """The linear layers of a module as float64 (weight, bias) pairs in order."""
    linear_layers = [layer for layer in module.modules() if isinstance(layer, th.nn.Linear)]
    return [tuple(p.detach().numpy().astype(np.float64) for p in (layer.weight, layer.bias)) for layer in linear_layers]


def actor_to_numpy(actor):
    """A DiffusionActor in the reference's form."""
    predictor = actor.noise_predictor
    main = [*layers_to_numpy(predictor.first_layer), *layers_to_numpy(predictor.later_layers)]
    return {"time": layers_to_numpy(predictor.time_mlp), "main": main}


def actor_parameters(actor):
    """The parameters of a DiffusionActor in the order of the reference: time MLP, then the main network."""
    predictor = actor.noise_predictor
    return [*predictor.time_mlp.parameters(), *predictor.first_layer.parameters(), *predictor.later_layers.parameters()]


def critics_to_numpy(critic):
    """A CandidateCritic in the reference's form: a list of layers for each critic."""
    return [layers_to_numpy(q_network) for q_network in critic.q_networks]


def weights_of(model):
    """A copy of all weights of a model."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same_weights(first, second):
    """Whether two results of :func:`weights_of` agree bit for bit."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


def take_bad_steps(model):
    """Two updates whose critics' losses are infinite: on a GPU these steps are undone, and reported later."""
    before, rewards = weights_of(model), model.replay_buffer.rewards.copy()
    model.replay_buffer.rewards[:] = np.inf
    model.train(2, batch_size=8)
    after = weights_of(model)
    assert all(th.equal(before[name], after[name]) for name in before if name.startswith("critic."))
    model.replay_buffer.rewards[:] = rewards


@contextmanager
def recorded_warnings():
    """All warnings, however often they have been seen before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
