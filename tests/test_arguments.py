"""Every constructor argument does something, and every bad one is refused by name."""

import copy
import inspect

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from helpers import TINY, BanditEnv, CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common.arguments import parse_schedule
from sb3_qvpo.common.finite_checks import FiniteGuard


class OtherBuffer(ReplayBuffer):
    """A buffer of another class."""


def trained_weights(model):
    return weights_of(model.learn(16))


def prediction(deterministic):
    def observe(model):
        th.manual_seed(1)
        return model.predict(np.full((6, 3), 0.3, np.float32), deterministic=deterministic)[0]

    return observe


# For each argument: another value than TINY's, and what changes with it
ALIVE = {
    "learning_rate": (1e-2, trained_weights),
    "buffer_size": (100, lambda model: model.replay_buffer.buffer_size),
    "learning_starts": (9, trained_weights),
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
    "ent_coef": (0.5, trained_weights),
    "qf_learning_rate": (1e-2, trained_weights),
    "n_behavior_candidates": (7, prediction(deterministic=False)),
    "n_target_candidates": (5, trained_weights),
    "n_eval_candidates": (1, prediction(deterministic=True)),
    "n_train_candidates": (7, trained_weights),
    "n_uniform_actions": (5, trained_weights),
    "q_weighting": ("qcut", trained_weights),
    "n_diffusion_steps": (5, trained_weights),
    "n_shared_steps": (1, trained_weights),
    "policy_delay": (2, trained_weights),
    "max_grad_norm": (1e-3, trained_weights),
    "use_sde": (True, None),  # refused: test below
    "sde_sample_freq": (4, None),  # without effect, like SAC's without gSDE
    "use_sde_at_warmup": (True, None),  # the same
    "stats_window_size": (3, lambda model: model.learn(1).ep_info_buffer.maxlen),
    "tensorboard_log": (None, None),  # needs a folder: test below
    "policy_kwargs": (dict(net_arch=[9]), trained_weights),
    "verbose": (1, None),  # needs the output: test below
    "seed": (1, trained_weights),
    "device": ("meta", lambda model: model.device),
    "_init_setup_model": (False, lambda model: hasattr(model, "policy")),
}


def differ(first, second):
    if isinstance(first, dict):
        return not same_weights(first, second)
    return not np.array_equal(first, second) if isinstance(first, np.ndarray) else first != second


@pytest.mark.parametrize("name", [name for name, (_, observe) in ALIVE.items() if observe])
def test_argument_is_alive(name):
    value, observe = ALIVE[name]
    kwargs = {name: value}
    if name == "optimize_memory_usage":
        kwargs["replay_buffer_kwargs"] = dict(handle_timeout_termination=False)
    if name == "device":  # a device without memory: enough to see where the model would go
        kwargs["_init_setup_model"] = False
    baseline = {**kwargs, name: TINY.get(name, inspect.signature(QVPO).parameters[name].default)}
    first, second = (observe(tiny_qvpo(**arguments)) for arguments in (baseline, kwargs))
    assert differ(first, second)
    assert not differ(first, observe(tiny_qvpo(**baseline))), "must not change from run to run"


def test_policy_env_tensorboard_log_and_verbose_are_alive(tmp_path, capsys):
    class OtherPolicy(DiffusionPolicy):
        """A policy of another class."""

    model = tiny_qvpo(BanditEnv(), policy=OtherPolicy)
    assert type(model.policy) is OtherPolicy
    assert model.observation_space.shape == (2,)
    assert capsys.readouterr().out == ""
    tiny_qvpo(verbose=1)
    assert "Using cpu device" in capsys.readouterr().out
    assert QVPO.policy_aliases.keys() == {"MlpPolicy", "CnnPolicy", "MultiInputPolicy"}
    tiny_qvpo(tensorboard_log=str(tmp_path)).learn(8)
    assert list(tmp_path.glob("QVPO_1/*tfevents*"))


def test_every_argument_is_covered():
    parameters = set(inspect.signature(QVPO).parameters) - {"policy", "env"}
    assert set(ALIVE) == parameters


POLICY_ALIVE = {
    "net_arch": [5],
    "activation_fn": th.nn.ReLU,
    "features_extractor_kwargs": None,  # FlattenExtractor takes none: covered with images in test_policies.py
    "features_extractor_class": None,  # test_policies.py
    "normalize_images": None,  # test_policies.py
    "share_features_extractor": None,  # test_policies.py
    "optimizer_class": th.optim.SGD,
    "optimizer_kwargs": dict(eps=1e-1),
    "n_critics": 3,
    "noise_schedule": "vp",
    "n_sampling_steps": 2,
    "sampling_eta": 0.5,
    "time_embedding_dim": 8,
    "noise_bank_seed": 1,
}


@pytest.mark.parametrize("name", [name for name, value in POLICY_ALIVE.items() if value is not None])
def test_policy_argument_is_alive(name):
    observe = prediction(deterministic=True) if name == "noise_bank_seed" else trained_weights
    changed = {**TINY["policy_kwargs"], name: POLICY_ALIVE[name]}
    assert differ(observe(tiny_qvpo()), observe(tiny_qvpo(policy_kwargs=changed)))


def test_every_policy_argument_is_covered():
    given_by_sb3_or_qvpo = {
        *("observation_space", "action_space", "lr_schedule"),
        *("n_diffusion_steps", "n_behavior_candidates", "n_eval_candidates"),
    }
    assert set(inspect.signature(DiffusionPolicy).parameters) == POLICY_ALIVE.keys() | given_by_sb3_or_qvpo


COUNTS = [
    *("n_behavior_candidates", "n_target_candidates", "n_eval_candidates", "n_train_candidates", "n_uniform_actions"),
    *("n_diffusion_steps", "policy_delay", "batch_size", "buffer_size", "n_steps"),
]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_counts_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        tiny_qvpo(**{name: value})


BAD = [
    (dict(n_train_candidates=1), "n_train_candidates must be .* at least 2 with q_weighting='qadv' .*, got 1"),
    (dict(q_weighting="best"), "q_weighting must be one of 'qadv', 'qcut' or a function .*, got 'best'"),
    (dict(q_weighting=3), "q_weighting must be a name or a function"),
    (dict(q_weighting=lambda q: q.mean(dim=1)), r"q_weighting must return .* shape of its input, \(2, 4\), got shape \(2,\)"),
    (dict(q_weighting=lambda q: q), "q_weighting must return finite weights of at least 0"),
    (
        dict(policy_kwargs=dict(noise_schedule="square")),
        "noise_schedule must be one of 'cosine', 'vp', 'linear' .*'square'",
    ),
    (dict(policy_kwargs=dict(noise_schedule=3)), "noise_schedule must be a name or a function"),
    (dict(policy_kwargs=dict(noise_schedule=lambda n: th.ones(n))), r"noise_schedule must return 3 values in \(0, 1\)"),
    (dict(policy_kwargs=dict(noise_schedule=lambda n: th.full((n + 1,), 0.1))), "noise_schedule must return 3 values"),
    (dict(policy_kwargs=dict(time_embedding_dim=5)), "time_embedding_dim must be an even number of at least 4, got 5"),
    (
        dict(policy_kwargs=dict(n_sampling_steps=4)),
        "n_sampling_steps must be a whole number from 1 to n_diffusion_steps = 3, got 4",
    ),
    (dict(policy_kwargs=dict(n_sampling_steps=0)), "n_sampling_steps must be a whole number from 1 .*, got 0"),
    (dict(policy_kwargs=dict(n_sampling_steps=1.5)), "n_sampling_steps must be a whole number from 1 .*, got 1.5"),
    (dict(policy_kwargs=dict(sampling_eta=-0.1)), r"sampling_eta must be a number in \[0, 1\], got -0.1"),
    (dict(policy_kwargs=dict(sampling_eta=float("nan"))), r"sampling_eta must be a number in \[0, 1\], got nan"),
    (dict(n_shared_steps=-1), "n_shared_steps must be a whole number of at least 0, got -1"),
    (dict(n_shared_steps=3), "n_shared_steps must be below 3, .* got 3"),
    (dict(n_shared_steps=1, policy_kwargs=dict(sampling_eta=0.0)), "n_shared_steps must be below 1, .* got 1"),
    (dict(policy_kwargs=dict(n_critics=0)), "n_critics must be a whole number of at least 1, got 0"),
    (
        dict(policy_kwargs=dict(n_diffusion_steps=5)),
        "n_diffusion_steps must be an argument of QVPO, not of policy_kwargs",
    ),
    (dict(ent_coef=-0.1), r"ent_coef must be a number in \[0, inf\), got -0.1"),
    (dict(ent_coef=float("nan")), "ent_coef must be a number"),
    (dict(ent_coef=LinearSchedule(0.1, -0.1, 1.0)), "ent_coef at progress_remaining=0.0 must be a number in"),
    (dict(ent_coef="auto"), "ent_coef must be a number, a schedule or a string .*, got 'auto': .* not a temperature"),
    (dict(ent_coef="auto_0.1"), "ent_coef must be a number, a schedule or a string .*, got 'auto_0.1'"),
    (dict(ent_coef="fast"), "ent_coef must be a number or 'lin_START'.*, got 'fast'"),
    (dict(use_sde=True), "use_sde must be left out, got True: gSDE replaces the noise of SB3's Gaussian policies"),
    (dict(policy_kwargs=dict(log_std_init=-3)), "log_std_init must be left out, got -3: gSDE"),
    (dict(policy_kwargs=dict(use_expln=False)), "use_expln must be left out, got False: gSDE"),
    (dict(policy_kwargs=dict(clip_mean=2.0)), "clip_mean must be left out, got 2.0: gSDE"),
    (dict(policy_kwargs=dict(full_std=True)), "full_std must be left out, got True: gSDE"),
    (dict(ent_coef="lin_"), "ent_coef must be a number or 'lin_START'.*, got 'lin_'"),
    (dict(ent_coef="lin_0.1_0.2_0.5_1"), "ent_coef must be a number or 'lin_START'"),
    (dict(ent_coef="lin_0.1_0.2_0"), r"with FRACTION in \(0, 1\], got 'lin_0.1_0.2_0'"),
    (dict(ent_coef="lin_0.1_0.2_2"), r"with FRACTION in \(0, 1\], got 'lin_0.1_0.2_2'"),
    (dict(ent_coef="lin_-0.1"), "ent_coef at progress_remaining=1.0 must be a number in"),
    (dict(ent_coef=[0.1]), "ent_coef must be a number, a schedule or a string"),
    (dict(qf_learning_rate="fast"), "qf_learning_rate must be a number or 'lin_START'.*, got 'fast'"),
    (dict(learning_rate="fast"), "learning_rate must be a number or 'lin_START'.*, got 'fast'"),
    (dict(learning_rate=-1.0), "learning_rate must be a number in"),
    (dict(tau=0.0), r"tau must be a number in \(0, 1\], got 0.0"),
    (dict(tau=1.5), r"tau must be a number in \(0, 1\], got 1.5"),
    (dict(gamma=1.1), r"gamma must be a number in \[0, 1\], got 1.1"),
    (
        dict(policy_kwargs=dict(optimizer_class="SGD")),
        "optimizer_class must be a subclass of torch.optim.*Optimizer, got 'SGD'",
    ),
    (dict(policy_kwargs=dict(optimizer_class=int)), "optimizer_class must be a subclass of .*, got <class 'int'>"),
    (dict(policy_kwargs=dict(activation_fn="relu")), "activation_fn must be a subclass of torch.nn.*Module, got 'relu'"),
    (dict(policy_kwargs=dict(activation_fn=th.nn.ReLU())), r"activation_fn must be a subclass of .*, got ReLU\(\)"),
    (dict(policy_kwargs=dict(features_extractor_class="cnn")), "features_extractor_class must be a subclass of .*, got 'cnn'"),
    (dict(policy_kwargs=dict(net_arch=256)), "net_arch must be a list of sizes or a dict.*, got 256"),
    (dict(policy_kwargs=dict(net_arch=dict(pi=[8]))), r"net_arch must be a list .*, got \{'pi': \[8\]\}"),
    (dict(policy_kwargs=dict(net_arch=[8, 0])), "each size in net_arch must be a whole number of at least 1, got 0"),
    (dict(policy_kwargs="net"), "policy_kwargs must be a dictionary, got 'net'"),
    (dict(policy_kwargs=dict(time_embedding_dim="x")), "time_embedding_dim must be a whole number of at least 4, got 'x'"),
    (dict(policy_kwargs=dict(sampling_eta=None)), r"sampling_eta must be a number in \[0, 1\], got None"),
    (dict(policy_kwargs=dict(noise_bank_seed="x")), "noise_bank_seed must be a whole number of at least 0, got 'x'"),
    (dict(policy_kwargs=dict(noise_bank_seed=2**32)), r"noise_bank_seed must be below 2\*\*32, got 4294967296"),
    (dict(learning_starts=-2), r"learning_starts must be a number in \[0, inf\), got -2"),
    (dict(learning_starts=float("inf")), r"learning_starts must be a number in \[0, inf\), got inf"),
    (dict(gradient_steps=-2), "gradient_steps must be a whole number of at least -1, got -2"),
    (dict(gradient_steps=1.5), "gradient_steps must be a whole number of at least -1, got 1.5"),
    (dict(train_freq=0), "train_freq must be a whole number of at least 1, got 0"),
    (dict(train_freq=(-1, "episode")), "train_freq must be a whole number of at least 1, got -1"),
    (dict(stats_window_size=0), "stats_window_size must be a whole number of at least 1, got 0"),
    (dict(seed=1.5), "seed must be a whole number of at least 0, got 1.5"),
    (dict(action_noise=0.1), "action_noise must be an ActionNoise .*, got 0.1"),
    (dict(replay_buffer_class="HerReplayBuffer"), "replay_buffer_class must be a subclass of .*, got 'HerReplayBuffer'"),
    (dict(max_grad_norm=0.0), r"max_grad_norm must be a number in \(0, inf\), got 0.0"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[f"{next(iter(k))}-{i}" for i, (k, _) in enumerate(BAD)])
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_qvpo(**kwargs)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(3),
        spaces.MultiBinary(2),
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
        spaces.Box(np.array([-1, -1], np.float32), np.array([1, np.inf], np.float32)),
        spaces.Box(np.array([-1, 1], np.float32), np.array([1, 1], np.float32)),
    ],
)
def test_action_spaces_without_finite_bounds_are_refused(action_space):
    env = BanditEnv()
    env.action_space = action_space
    with pytest.raises(ValueError, match="action_space must be a Box"):
        tiny_qvpo(env)


def test_the_advice_for_unbounded_actions_works():
    env = BanditEnv()
    env.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    with pytest.raises(ValueError, match=r"TransformAction\(env, lambda action: action, Box\(low, high\)\)"):
        tiny_qvpo(env)
    bounded = TransformAction(env, lambda action: action, spaces.Box(-2, 2, (1,), np.float32))
    assert tiny_qvpo(bounded).learn(8).action_space.high == 2


def test_settings_may_change_between_two_calls_of_learn():
    """They count from the next call on, and are checked at its start as on construction."""
    model = tiny_qvpo(learning_starts=0).learn(5)
    model.ent_coef, model.q_weighting = "lin_0.5", "qcut"
    model.learn(5)
    assert model._ent_coef_schedule(1.0) == 0.5
    assert model._q_weighting is not tiny_qvpo()._q_weighting
    model.q_weighting, model.n_train_candidates = "qadv", 1
    with pytest.raises(ValueError, match="n_train_candidates must be a whole number of at least 2"):
        model.learn(5)
    model.n_train_candidates, model.gradient_steps = 4, "3"
    with pytest.raises(ValueError, match="gradient_steps must be a whole number of at least -1, got '3'"):
        model.learn(5)


def test_numpy_integers_are_seeds():
    assert same_weights(weights_of(tiny_qvpo(seed=np.int64(3))), weights_of(tiny_qvpo(seed=3)))


def test_schedules():
    assert [parse_schedule("x", "lin_0.02_0.002_0.9")(p) for p in (1.0, 0.55, 0.1, 0.0)] == pytest.approx(
        [0.02, 0.011, 0.002, 0.002]
    )
    assert [parse_schedule("x", "lin_4")(p) for p in (1.0, 0.5, 0.0)] == [4.0, 2.0, 0.0]
    assert [parse_schedule("x", "lin_4_2")(p) for p in (1.0, 0.5, 0.0)] == [4.0, 3.0, 2.0]
    assert parse_schedule("x", "3e-4")(0.3) == 3e-4  # YAML reads 3e-4 as a string
    assert parse_schedule("x", np.float32(0.5))(0.3) == 0.5
    assert parse_schedule("x", lambda progress_remaining: progress_remaining**2)(0.5) == 0.25


def test_schedules_act_during_training():
    """Critic and actor rates and the entropy weight follow their own schedules."""
    seen = []
    model = tiny_qvpo(learning_rate="lin_1e-3", qf_learning_rate=1e-2, ent_coef="lin_0.02_0.002_0.9", learning_starts=0)

    def record(local_variables, _):
        if model._n_updates:
            rates = [model.actor.optimizer.param_groups[0]["lr"], model.critic.optimizer.param_groups[0]["lr"]]
            seen.append((*rates, model.logger.name_to_value["train/ent_coef"]))
        return True

    model.learn(21, callback=record)
    actor_rates, critic_rates, ent_coefs = zip(*seen, strict=True)
    np.testing.assert_allclose(actor_rates, [1e-3 * (1 - i / 21) for i in range(1, 21)])
    assert set(critic_rates) == {1e-2}
    np.testing.assert_allclose(ent_coefs, [max(0.02 - 0.018 * i / 21 / 0.9, 0.002) for i in range(1, 21)])
    without = tiny_qvpo(learning_rate="lin_1e-3", learning_starts=0).learn(11)
    assert without.critic.optimizer.param_groups[0]["lr"] == without.actor.optimizer.param_groups[0]["lr"]


def test_an_ent_coef_that_turns_negative_during_training_is_refused():
    schedule = lambda progress: -1.0 if 0.1 < progress < 0.4 else 0.01  # noqa: E731
    model = tiny_qvpo(ent_coef=schedule)
    with pytest.raises(ValueError, match="ent_coef must be a number in"):
        model.learn(20)


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), -1, "10"])
def test_bad_total_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match="total_timesteps must be a number in"):
        tiny_qvpo().learn(steps)


class BreakingEnv(CountdownEnv):
    """Returns a number that is not finite at step ``at``."""

    def __init__(self, what, value, at=12, **kwargs):
        super().__init__(**kwargs)
        self.what, self.value, self.at, self.total = what, value, at, 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return (observation + self.value if self.what == "reset" else observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total == self.at:
            observation = observation + self.value if self.what == "observation" else observation
            reward = self.value if self.what == "reward" else reward
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("what", "at", "message"),
    [
        ("reward", 14, "non-finite reward .* at environment step 14"),
        ("observation", 14, "non-finite observation .* at environment step 14"),
        ("observation", 12, "non-finite terminal observation .* at environment step 12"),
        ("reset", 0, "non-finite observation .* at environment step 0"),
    ],
)
@pytest.mark.parametrize("vec_normalize", [False, True])
def test_non_finite_rewards_and_observations_stop_training(what, at, message, value, vec_normalize):
    # VecNormalize clips an infinite terminal observation to a finite number and keeps no original: nothing to refuse
    harmless = vec_normalize and "terminal" in message and np.isinf(value)
    env = DummyVecEnv([lambda: BreakingEnv(what, value, at)])
    model = tiny_qvpo(VecNormalize(env, training=False) if vec_normalize else env)
    if harmless:
        model.learn(50)
    else:
        with pytest.raises(ValueError, match=message):
            model.learn(50)
        assert model.replay_buffer.size() == max(at - 1, 0)
    assert all(bool(value.isfinite().all()) for value in model.policy.state_dict().values())
    assert np.isfinite(model.replay_buffer.observations).all()
    assert np.isfinite(model.replay_buffer.rewards).all()
    model.predict(np.zeros(1, np.float32))


def test_a_non_finite_loss_stops_training_before_it_reaches_the_weights():
    """Here the bad numbers are already in the buffer, as from a buffer file."""
    model = tiny_qvpo().learn(10)
    before = weights_of(model)
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(
        ValueError, match=r"Non-finite rewards in the replay buffer in gradient update 6; .* weights .* intact"
    ):
        model.train(1, batch_size=8)
    assert same_weights(before, weights_of(model))
    model.replay_buffer.rewards[:] = 0.0
    model.train(1, batch_size=8)  # and training can go on
    assert not same_weights(before, weights_of(model))


def test_a_non_finite_actor_loss_is_named():
    model = tiny_qvpo(q_weighting=lambda q: th.where(q.abs() > 1e4, th.inf, th.ones_like(q))).learn(10)
    before = weights_of(model)["actor.noise_predictor.first_layer.weight"]
    for q_network in model.critic.q_networks:
        q_network[-1].bias.data.fill_(1e5)
    with pytest.raises(ValueError, match=r"Non-finite actor_loss \((inf|nan)\) in gradient update"):
        model.train(1, batch_size=8)
    assert th.equal(before, weights_of(model)["actor.noise_predictor.first_layer.weight"])


def test_a_non_finite_gradient_of_a_finite_loss_is_named():
    parameter = th.nn.Parameter(th.zeros(1))
    loss = (parameter.abs() + 1e-46).sqrt().sum() * 0 + 1.0  # the slope of the root at 0 is infinite, times 0 is NaN
    loss.backward()
    optimizer = th.optim.Adam([parameter])
    with pytest.raises(ValueError, match="Non-finite gradient of some_loss in gradient update 3"):
        FiniteGuard(deferred=False).step(optimizer, "some_loss", loss, 3, None)
    assert parameter.item() == 0
    assert parameter.grad is None


def test_a_non_finite_critic_loss_is_named():
    """The buffer is fine, the network is not: a loss beyond float32."""
    model = tiny_qvpo().learn(10)
    model.critic.q_networks[0][-1].bias.data.fill_(1e30)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"Non-finite critic_loss \(inf\) in gradient update 6"):
        model.train(1, batch_size=8)
    assert same_weights(before, weights_of(model))


class OwnAdam(th.optim.Adam):
    """Does not know what torch's fused kernel is told."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = self.state[parameter].get("sum", 0) + parameter.grad
                parameter.data.sub_(1e-3 * parameter.grad)


@pytest.mark.parametrize(
    "optimizer",
    [
        *(dict(), dict(optimizer_class=th.optim.AdamW), dict(optimizer_class=th.optim.SGD)),
        *(dict(optimizer_kwargs=dict(foreach=False)), dict(optimizer_class=OwnAdam, optimizer_kwargs=dict(fused=True))),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_on_an_accelerator_a_bad_step_is_undone_and_reported_later(max_grad_norm, optimizer):
    """The path that a GPU takes, on the CPU: no error at once, not one weight moves, the first bad update is named."""
    model = tiny_qvpo(max_grad_norm=max_grad_norm, policy_kwargs=dict(net_arch=[8], **optimizer)).learn(10)
    model._finite_guard = FiniteGuard(deferred=True)
    model.train(1, batch_size=8)  # update 6
    before = weights_of(model)
    rewards, state = model.replay_buffer.rewards.copy(), copy.deepcopy(model.critic.optimizer.state_dict()["state"])
    model.replay_buffer.rewards[:] = np.inf
    model.train(2, batch_size=8)  # updates 7 and 8
    after = weights_of(model)
    for index, values in model.critic.optimizer.state_dict()["state"].items():
        assert all(value is None or th.equal(value, state[index][name]) for name, value in values.items())
    assert all(th.equal(before[name], after[name]) for name in before if name.startswith("critic."))
    assert not all(th.equal(before[name], after[name]) for name in before if name.startswith("actor."))  # its loss is finite
    model.replay_buffer.rewards[:] = rewards
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update 7"):
        model.train(95, batch_size=8)
    assert model._n_updates == 100
    model.train(100, batch_size=8)  # reported once
    assert all(bool(value.isfinite().all()) for value in model.policy.state_dict().values())


def test_a_first_step_that_is_bad_leaves_no_nan_in_the_optimizer():
    model = tiny_qvpo(learning_starts=20).learn(20)
    model._finite_guard = FiniteGuard(deferred=True)
    model.replay_buffer.rewards[:] = np.nan
    model.train(1, batch_size=8)
    state = model.critic.optimizer.state_dict()["state"]
    assert all(bool(value.isfinite().all()) for values in state.values() for value in values.values())


def test_on_an_accelerator_the_end_of_learn_reports():
    model = tiny_qvpo().learn(10)
    model._finite_guard = FiniteGuard(deferred=True)
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update"):
        model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 18


def test_the_guard_is_deferred_off_the_cpu_only_and_changes_nothing_else():
    assert tiny_qvpo()._finite_guard.deferred is False
    assert tiny_qvpo(device="meta", seed=None)._finite_guard.deferred is True
    plain = trained_weights(tiny_qvpo(max_grad_norm=1.0))
    guarded = tiny_qvpo(max_grad_norm=1.0)
    guarded._finite_guard = FiniteGuard(deferred=True)
    assert same_weights(trained_weights(guarded), plain)


def test_after_a_refused_observation_learning_starts_from_a_reset():
    """Otherwise the next transition would connect the last observation with one that is several steps further."""
    env = BreakingEnv("observation", np.nan, at=14, length=100)
    model = tiny_qvpo(env, learning_starts=1000)
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(50)
    model.learn(30, reset_num_timesteps=False)
    buffer = model.replay_buffer
    steps = buffer.next_observations[: buffer.pos] - buffer.observations[: buffer.pos]
    np.testing.assert_allclose(steps, 0.01, atol=1e-6)


def test_gradients_are_clipped_to_the_norm():
    model = tiny_qvpo(max_grad_norm=1e-2).learn(10)
    for network in (model.actor, model.critic):
        norm = th.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        assert 0 < float(norm) <= 1e-2 * (1 + 1e-4)
