"""What several test files need: small models, toy environments and the way from torch modules to NumPy arrays."""

import os
import random
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import DTQL, QVPO, SDAC, DiffusionPolicy, DiffusionQL
from sb3_qvpo.common.runs.finite_checks import FiniteGuard
from sb3_qvpo.offline import SpacesEnv

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
"""Between float32 here and the float64 reference."""

# Models

SCHEDULES = dict(
    learning_rate="lin_1e-3",
    qf_learning_rate=lambda p: 1e-3 * p,
    ent_coef="lin_0.5",
    training_action_noise="lin_0.5_0.1",
)
"""QVPO's arguments that may be schedules, each as one."""

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


TINY_SOFT = {
    **{name: value for name, value in TINY.items() if name not in {"n_train_candidates", "n_uniform_actions"}},
    **dict(n_reverse_samples=5, n_behavior_candidates=4, n_target_candidates=2),
}
"""The same for SDAC."""


def tiny_sdac(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A small SDAC; ``kwargs`` override :data:`TINY_SOFT`."""
    return SDAC(policy, env, **{**TINY_SOFT, **kwargs})


TINY_FROM_DATA = {
    **{name: value for name, value in TINY.items() if name not in {"n_train_candidates", "n_uniform_actions"}},
    **dict(n_behavior_candidates=6, n_target_candidates=3, target_actor_start=5),
}
"""The same for Diffusion-QL."""

TINY_TRUSTED = {
    **{
        name: value
        for name, value in TINY.items()
        if name not in {"n_train_candidates", "n_uniform_actions", "n_diffusion_steps"}
    },
    **dict(n_behavior_candidates=6, n_pretraining_updates=2),
}
"""The same for DTQL."""


def tiny_diffusion_ql(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A small Diffusion-QL; ``kwargs`` override :data:`TINY_FROM_DATA`."""
    return DiffusionQL(policy, env, **{**TINY_FROM_DATA, **kwargs})


def tiny_dtql(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    """A small DTQL; ``kwargs`` override :data:`TINY_TRUSTED`."""
    return DTQL(policy, env, **{**TINY_TRUSTED, **kwargs})


SMALL_MODELS = {
    "vector": lambda **kwargs: tiny_qvpo(n_eval_candidates=32, **kwargs),
    "image": lambda **kwargs: tiny_qvpo(
        FakeImageEnv(screen_height=36, screen_width=36, discrete=False), policy="CnnPolicy", **kwargs
    ),
    "dict": lambda **kwargs: tiny_qvpo(
        SimpleMultiObsEnv(discrete_actions=False), policy="MultiInputPolicy", **{**kwargs, "policy_kwargs": dict(net_arch=[8])}
    ),
}
"""A small QVPO for each kind of observation."""


def bandit_qvpo(**kwargs):
    """A small QVPO whose best action is the observation, between -10 and 10."""
    return tiny_qvpo(IdentityEnvBox(-10, 10), **kwargs)


def bit_flipping_qvpo(n_envs=2, **kwargs):
    """A small QVPO with hindsight, in several environments."""
    return tiny_qvpo(
        make_vec_env(BitFlippingEnv, n_envs=n_envs, env_kwargs=dict(n_bits=4, continuous=True)),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2),
        learning_starts=20,
        gradient_steps=-1,
        **kwargs,
    )


def random_sizes(seed):
    """Batch, candidates, action dimensions, observation size, diffusion steps, hidden layers."""
    rng = np.random.default_rng(seed)
    b, k, a, s, t = (int(rng.integers(low, high)) for low, high in [(1, 6), (1, 7), (1, 5), (1, 9), (1, 12)])
    layers = [int(width) for width in rng.integers(3, 20, size=seed % 4)]
    return b, k, a, s, t, layers


def random_policy(seed, schedule="cosine"):
    """A policy of random sizes and weights, observations, and noise of its chains."""
    b, k, a, s, t, layers = random_sizes(seed)
    policy = DiffusionPolicy(
        spaces.Box(-1, 1, (s,), np.float32),
        spaces.Box(-1, 1, (a,), np.float32),
        lambda _: 1e-3,
        net_arch=layers,
        n_diffusion_steps=t,
        noise_schedule=schedule,
        time_embedding_dim=4 + 2 * (seed % 3),
        n_critics=1 + seed % 3,
    )
    for parameter in policy.parameters():  # biases too, which start at 0
        parameter.data.add_(0.3 * th.randn_like(parameter))
    return policy, th.randn(b, s), th.randn(t, b, k, a)


# Environments

BOX = spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


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


def countdown(**kwargs):
    """A function that makes a :class:`CountdownEnv` with episodes of five steps."""
    return lambda: CountdownEnv(length=5, **kwargs)


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


class TwoPartsEnv(gym.ObservationWrapper):
    """Observations in two parts."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.Dict(a=env.observation_space, b=env.observation_space)

    def observation(self, observation):
        return dict(a=observation, b=observation)


def normalized(env="Pendulum-v1", **kwargs):
    """One environment in a ``VecNormalize``."""
    return VecNormalize(make_vec_env(env, n_envs=1), **kwargs)


def sampled_observations(space, n, seed=0):
    """A batch of random observations, the same for each seed."""
    space.seed(seed)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


# Data

PLACES, MEANS = 0.8 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]), np.array([3, 0, 1.5, 5])
"""The toy data of Diffusion-QL's authors: four places of actions, and the means of their rewards."""


def four_gaussians():
    """Their data in one state, in D4RL's layout, and an environment with their spaces."""
    rng, n = np.random.default_rng(0), 10_000
    which = rng.integers(4, size=n)
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "next_observations": np.zeros((n, 1), np.float32),
        "actions": (PLACES[which] + 0.05 * rng.normal(size=(n, 2))).clip(-1, 1).astype(np.float32),
        "rewards": MEANS[which] + 0.5 * rng.normal(size=n),
        "terminals": np.ones(n, bool),
    }
    return data, SpacesEnv(spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-1, 1, (2,), np.float32))


def shares_of_places(actions):
    """Which part of actions, shape (n, 2), is near each of the four places."""
    return (np.linalg.norm(actions[:, None] - PLACES, axis=-1) < 0.3).mean(axis=0)


# From torch modules to NumPy arrays


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


# Logs


class Recorder(KVWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


# Comparisons


def weights_of(model):
    """A copy of all weights of a model."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same_weights(first, second):
    """Whether two results of :func:`weights_of` agree bit for bit."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


def changed_names(before, after):
    """Names of the weights that differ between two results of :func:`weights_of`."""
    return {name for name in before if not th.equal(before[name], after[name])}


def trained_weights(model):
    """All weights after a short training."""
    return weights_of(model.learn(16))


def prediction(deterministic):
    """A function that lets a model of Pendulum decide, always with the same random numbers."""

    def observe(model):
        th.manual_seed(1)
        return model.predict(np.full((6, 3), 0.3, np.float32), deterministic=deterministic)[0]

    return observe


def differ(first, second):
    """Whether two results differ: weights, arrays or anything else."""
    if isinstance(first, dict):
        return not same_weights(first, second)
    return not np.array_equal(first, second) if isinstance(first, np.ndarray) else first != second


def shake(model):
    """Random weights, the noise schedule apart."""
    for parameter in model.policy.parameters():
        parameter.data.copy_(th.rand_like(parameter))


# Interruptions

CONTINUE = dict(reset_num_timesteps=False)
"""For ``learn()``."""


class Interrupt(BaseCallback):
    """Ctrl-C at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps >= self.at:
            raise KeyboardInterrupt
        return True


def scramble():
    """Another process draws other numbers."""
    for seed in (random.seed, np.random.seed, th.manual_seed):
        seed(int.from_bytes(os.urandom(3), "big"))


# The package's own names: what tests reach into is only named here


def report_errors_later(model):
    """Undo bad steps and report them later, as on an accelerator."""
    model._finite_guard = FiniteGuard(deferred=True)


def errors_are_deferred(model):
    """Whether bad steps are reported later."""
    return model._finite_guard.deferred


def guard_of(model):
    """What keeps numbers that are not finite out of a model's weights."""
    return model._finite_guard


def runner_of(model):
    """What runs a model's updates, and holds their graphs."""
    return model._update_runner


def use_runner(model, runner):
    """Let another object run a model's updates."""
    model._update_runner = runner


def batch_of(model, batch_size):
    """A mini-batch as an update gets it."""
    return model._sample_batch(batch_size)


def add_metrics_through(model, watch):
    """Let ``watch(metrics)`` see the metrics of each update before a model adds them up."""
    add = model._add_metrics
    model._add_metrics = lambda metrics: (watch(metrics), add(metrics))[1]


def value_now_through(model, watch):
    """Let ``watch(name, value)`` see each value that a model takes from a schedule."""
    value_now = model._value_now

    def watched(name, schedule):
        value = value_now(name, schedule)
        watch(name, value)
        return value

    model._value_now = watched


def assert_gradients_close(parameters, expected):
    """
    Gradients can be small as a whole, so they are also compared relative to the largest entry of their layer, at 1e-4 in
    float32. Of the layer, as its weights and biases are sums of the same terms: those of a single bias can cancel.
    """
    gradients = [parameter.grad.numpy() for parameter in parameters]
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    for layer in range(0, len(expected), 2):  # weights, then biases
        scale = max(1e-12, *(np.abs(gradient).max() for gradient in expected[layer : layer + 2]))
        for ours, theirs in zip(gradients[layer : layer + 2], expected[layer : layer + 2], strict=True):
            np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-4)


def to_double(tensor):
    return None if tensor is None else tensor.numpy().astype(np.float64)


def metric_sums(model):
    """The dictionary in which a model adds its metrics up until the log is written: sum and count by name."""
    return model._metric_sums


def actor_noise(model, batch_size):
    """All random draws of a policy step."""
    return model._draw_actor_noise(batch_size)


def ent_coef_of(model):
    """The schedule of ``ent_coef`` that is in use."""
    return model._ent_coef_schedule


def weighting_in_use(model):
    """The function that weighs candidates."""
    return model._q_weighting


def batch_of_an_update(model):
    """The transitions that the next update sees."""
    seen, critic_loss = [], model._critic_loss
    model._critic_loss = lambda batch, noise: seen.append(batch) or critic_loss(batch, noise)
    model.train(1, batch_size=200)
    del model._critic_loss
    (batch,) = seen
    return batch


def recorded_draws(model):
    """Lists that fill up while a model trains: its batches, the noise of its critics' targets, that of its policy steps."""
    methods = {
        "batch": (model.replay_buffer, "sample"),
        "target_noise": (model.policy, "draw_noise"),
        "actor_noise": (model, "_draw_actor_noise"),
    }
    records = {name: [] for name in methods}
    for name, (owner, method_name) in methods.items():
        method = getattr(owner, method_name)

        def recorder(*args, _method=method, _results=records[name], **kwargs):
            _results.append(_method(*args, **kwargs))
            return _results[-1]

        setattr(owner, method_name, recorder)
    return records


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


ROOT = Path(__file__).parents[1]
"""The repository."""


def output_of(main, *command_line, folder="."):
    """
    What a command prints. It runs in this process, because the imports of another one take seconds.

    :param main: The function that the command calls.
    :param command_line: The name of the program and its arguments.
    :param folder: Where the command runs.
    """
    arguments, working_folder, n_threads = sys.argv, os.getcwd(), th.get_num_threads()
    sys.argv = [str(part) for part in command_line]
    os.chdir(folder)
    try:
        with redirect_stdout(StringIO()) as output:
            main()
    finally:
        sys.argv = arguments
        os.chdir(working_folder)
        th.set_num_threads(n_threads)
    return output.getvalue()


class Samples(NamedTuple):
    """What a replay buffer of the user's own hands out: SB3's fields, and some that SB3 does not have."""

    observations: Any
    actions: Any
    next_observations: Any
    dones: Any
    rewards: Any
    discounts: Any = None
    weights: Any = None
    indices: Any = None
    infos: Any = None


class OtherBuffer(ReplayBuffer):
    """A buffer of another class."""


SHARED_ALIVE = {
    "learning_rate": (1e-2, trained_weights),
    "batch_size": (5, trained_weights),
    "tau": (0.5, trained_weights),
    "gamma": (0.5, trained_weights),
    "train_freq": ((3, "step"), trained_weights),
    "gradient_steps": (2, trained_weights),
    "action_noise": (NormalActionNoise(np.zeros(1), np.ones(1)), trained_weights),
    "replay_buffer_class": (OtherBuffer, lambda model: type(model.replay_buffer)),
    "replay_buffer_kwargs": (
        dict(handle_timeout_termination=False),
        lambda model: model.replay_buffer.handle_timeout_termination,
    ),
    "optimize_memory_usage": (True, lambda model: hasattr(model.replay_buffer, "next_observations")),
    "n_steps": (3, trained_weights),
    "qf_learning_rate": (1e-2, trained_weights),
    "n_behavior_candidates": (7, prediction(deterministic=False)),
    "n_target_candidates": (5, trained_weights),
    "n_eval_candidates": (1, prediction(deterministic=True)),
    "eval_noise_scale": (0.5, prediction(deterministic=True)),
    "n_diffusion_steps": (5, trained_weights),
    "max_grad_norm": (1e-3, trained_weights),
    "critic_type": ("crossq", lambda model: type(model.critic)),
    "use_sde": (True, None),  # refused: a test of QVPO's
    "sde_sample_freq": (4, None),  # without effect, like SAC's without gSDE
    "use_sde_at_warmup": (True, None),  # the same
    "stats_window_size": (3, lambda model: model.learn(1).ep_info_buffer.maxlen),
    "tensorboard_log": (None, None),  # needs a folder: the same
    "policy_kwargs": (dict(net_arch=[9]), trained_weights),
    "verbose": (1, None),  # needs the output: the same
    "seed": (1, trained_weights),
    "device": ("meta", lambda model: model.device),
    "_init_setup_model": (False, lambda model: hasattr(model, "policy")),
}
"""Arguments of every algorithm here: another value than the default, and what it changes; None where nothing here shows it."""
