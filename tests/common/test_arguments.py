"""Every bad argument is refused by name, and a schedule is a number, a string or a function."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from helpers import BanditEnv, CountdownEnv, GoalEnv, bandit_qvpo, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.utils import LinearSchedule

from sb3_qvpo.common.arguments import parse_schedule

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
    (dict(q_weighting="best"), "q_weighting must be one of 'qadv', 'qadv_normalized', 'qcut' or a function .*, got 'best'"),
    (dict(q_weighting=3), "q_weighting must be a name or a function"),
    (dict(q_weighting=lambda q: q.mean(dim=1)), r"q_weighting must return .* shape of its input, \(2, 4\), got shape \(2,\)"),
    (dict(q_weighting=lambda q: q), "q_weighting must return finite weights of at least 0"),
    (
        dict(policy_kwargs=dict(noise_schedule="square")),
        "noise_schedule must be one of 'cosine', 'vp', 'linear', 'karras', a function .*'square'",
    ),
    (
        dict(policy_kwargs=dict(noise_schedule=3)),
        "noise_schedule must be a name, a function .* or a list of noise levels, got 3",
    ),
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
    (dict(ent_coef="lin_0.1_0.2_0"), r"with FRACTION in \(0, 1\], or the same with 'cos', got 'lin_0.1_0.2_0'"),
    (dict(ent_coef="lin_0.1_0.2_2"), r"with FRACTION in \(0, 1\], or the same with 'cos', got 'lin_0.1_0.2_2'"),
    (dict(ent_coef="lin_-0.1"), "ent_coef at progress_remaining=1.0 must be a number in"),
    (dict(ent_coef=[0.1]), "ent_coef must be a number, a schedule or a string"),
    (dict(qf_learning_rate="fast"), "qf_learning_rate must be a number or 'lin_START'.*, got 'fast'"),
    (dict(learning_rate="fast"), "learning_rate must be a number or 'lin_START'.*, got 'fast'"),
    (dict(learning_rate=-1.0), "learning_rate must be a number in"),
    (dict(tau=-0.1), r"tau must be a number in \[0, 1\], got -0.1"),
    (dict(tau=1.5), r"tau must be a number in \[0, 1\], got 1.5"),
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
    (dict(eval_noise_scale=-0.1), r"eval_noise_scale must be a number in \[0, inf\), got -0.1"),
    (dict(training_action_noise=-0.1), r"training_action_noise must be a number in \[0, inf\), got -0.1"),
    (dict(training_action_noise="auto"), "training_action_noise must be a number or 'lin_START'.*, got 'auto'"),
    (dict(training_action_noise="lin_0.1_-0.1"), "training_action_noise at progress_remaining=0.0 must be a number in"),
    (dict(policy_kwargs=dict(noise_bank_seed="x")), "noise_bank_seed must be .* of at least 0 .*, got 'x'"),
    (dict(policy_kwargs=dict(noise_bank_seed=2**32)), "noise_bank_seed must be .* at most 4294967295, got 4294967296"),
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


def test_returns_of_several_steps_of_dictionaries_are_refused():
    with pytest.raises(ValueError, match=r"n_steps must be 1 with a Dict observation space, got 3: .*presets.fast"):
        tiny_qvpo(GoalEnv(), policy="MultiInputPolicy", n_steps=3)
    her = tiny_qvpo(GoalEnv(), policy="MultiInputPolicy", n_steps=1, replay_buffer_class=HerReplayBuffer)
    assert type(her.replay_buffer) is HerReplayBuffer


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[f"{next(iter(k))}-{i}" for i, (k, _) in enumerate(BAD)])
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_qvpo(**kwargs)


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "non_sense", (1, "close")])
def test_a_train_freq_that_means_nothing_is_refused(train_freq):
    with pytest.raises(ValueError, match=r"[Tt]rain_?\s?freq"):
        tiny_qvpo(CountdownEnv(), train_freq=train_freq).learn(12)


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


def test_schedules_return_plain_numbers(tmp_path):
    """NumPy numbers in optimisers would end up in files that newer versions of torch refuse to load."""
    for value in (np.float32(0.5), "lin_0.5", lambda progress: np.float64(progress)):
        assert type(parse_schedule("learning_rate", value)(0.3)) is float
    model = bandit_qvpo(learning_rate=lambda progress: np.float64(1e-3)).learn(8)
    assert type(model.actor.optimizer.param_groups[0]["lr"]) is float
    assert type(model.critic.optimizer.param_groups[0]["lr"]) is float


def test_a_cosine_schedule():
    """Half a cosine: slow, fast, slow. Then it stays."""
    schedule = parse_schedule("learning_rate", "cos_1.0_0.2_0.5")
    values = [schedule(progress) for progress in (1.0, 0.875, 0.75, 0.625, 0.5, 0.0)]
    low, high = (1 - 2**-0.5) / 2, (1 + 2**-0.5) / 2
    assert values == pytest.approx([1.0, 0.2 + 0.8 * high, 0.6, 0.2 + 0.8 * low, 0.2, 0.2])
    assert parse_schedule("learning_rate", "cos_3e-4")(0.0) == pytest.approx(0.0)
