"""Whole calls of ``SDAC.train()`` against the float64 reference; each of its arguments; what it keeps, saves and refuses."""

import inspect
import math

import numpy as np
import pytest
import reference
import torch as th
from helpers import (
    SHARED_ALIVE,
    TINY_SOFT,
    TOLERANCE,
    BanditEnv,
    CountdownEnv,
    DictEnv,
    actor_parameters,
    actor_to_numpy,
    assert_gradients_close,
    critics_to_numpy,
    differ,
    metric_sums,
    recorded_draws,
    report_errors_later,
    same_weights,
    tiny_sdac,
    to_double,
    trained_weights,
    weights_of,
)
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.noise import NormalActionNoise

from sb3_qvpo import QVPO, SDAC

SETTINGS = {
    "authors' schedule": dict(),
    "clipped": dict(box="clip", temperature=0.5),
    "from the buffer": dict(proposal_actions="replay", temperature=0.1),
    "in units of the spread": dict(q_scaling="spread", temperature=0.7),
    "learnt temperature": dict(
        temperature="auto_0.3", q_scaling="spread", target_divergence=0.2, temperature_learning_rate=0.5
    ),
    "delayed, n-step": dict(policy_delay=2, n_steps=3),
    "improved draws": dict(n_improvement_steps=2, improvement_step=0.2, temperature=0.1),
    "improved draws from the buffer": dict(
        **dict(n_improvement_steps=1, improvement_step=0.4, improved_std=0.15, proposal_actions="replay"),
        **dict(temperature="auto_0.3", q_scaling="spread", target_divergence=0.2, temperature_learning_rate=0.5),
    ),
    "noisy actions": dict(training_action_noise=0.4, temperature=0.3),
    "improved draws with noisy actions": dict(n_improvement_steps=1, training_action_noise=0.2, temperature=0.1),
    "clipped with noisy actions": dict(box="clip", training_action_noise=0.4, temperature=0.5),
    "v and solver": dict(policy_kwargs=dict(prediction="v", sampler="dpm++"), proposal_actions="replay", temperature=0.3),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("env", ["Pendulum-v1", "countdown"])
def test_train_step_by_step(name, env):
    """Three updates in a row on real transitions: gradients, weights, targets and what is logged."""
    settings = {"policy_delay": 1, **SETTINGS[name]}
    policy_kwargs = dict(net_arch=[8, 8], time_embedding_dim=4, optimizer_kwargs=dict(eps=1e-5))
    policy_kwargs.update(settings.get("policy_kwargs", {}))
    environment = env if env == "Pendulum-v1" else CountdownEnv()
    model = tiny_sdac(environment, learning_starts=30, **{**settings, "policy_kwargs": policy_kwargs, "tau": 0.1})
    model.learn(30)
    for parameter in model.policy.parameters():  # targets that differ from the online networks, biases that are not 0
        parameter.data.add_(0.2 * th.randn_like(parameter))
    records = recorded_draws(model)
    learns = str(settings.get("temperature", "")).startswith("auto")
    improvement = {}
    if n_steps := settings.get("n_improvement_steps"):
        length = settings.get("improvement_step", 0.1) * math.sqrt(model.actor.action_dim)
        improvement["improved"] = (n_steps, length, settings.get("improved_std", 0.3))
    learner = reference.SoftLearner(
        *(actor_to_numpy(actor) for actor in (model.actor, model.actor_target)),
        *(critics_to_numpy(critic) for critic in (model.critic, model.critic_target)),
        dict(
            betas=reference.cosine_betas(3),
            tau=0.1,
            gamma=model.gamma,
            actor_learning_rate=3e-4,
            critic_learning_rate=3e-4,
            adam_epsilon=1e-5,
            max_grad_norm=None,
            policy_delay=settings["policy_delay"],
            prediction=policy_kwargs.get("prediction", "noise"),
            solver_steps=[0, 1, 2] if policy_kwargs.get("sampler") == "dpm++" else None,
            temperature=0.3 if learns else settings.get("temperature", 5 * math.exp(-0.007)),
            box=settings.get("box", "truncated"),
            spread=settings.get("q_scaling") == "spread",
            training_action_noise=settings.get("training_action_noise", 0),
            **(dict(target_divergence=0.2, temperature_rate=0.5) if learns else {}),
            **improvement,
        ),
    )
    for _ in range(3):
        for results in records.values():
            results.clear()
        metric_sums(model).clear()
        model.train(gradient_steps=1, batch_size=6)
        batch = {field: to_double(value) for field, value in records["batch"][0]._asdict().items()}
        batch["rewards"], batch["dones"] = batch["rewards"][:, 0], batch["dones"][:, 0]
        batch["discounts"] = None if batch["discounts"] is None else batch["discounts"][:, 0]
        noise = None
        if records["actor_noise"]:
            noise = {field: to_double(value) for field, value in records["actor_noise"][0]._asdict().items()}
            noise |= dict(timesteps=records["actor_noise"][0].timesteps.numpy(), actions=batch["actions"])
        critic_gradients, actor_gradients = learner.update(batch, to_double(records["target_noise"][0]), noise)
        assert (actor_gradients is None) == (noise is None)
        assert_gradients_close(model.critic.parameters(), critic_gradients)
        if noise:
            assert_gradients_close(actor_parameters(model.actor), actor_gradients)
        for parameters, arrays in [
            (model.critic.parameters(), learner.critic_arrays()),
            (actor_parameters(model.actor), learner.actor_arrays(learner.actor)),
            (actor_parameters(model.actor_target), learner.actor_arrays(learner.actor_target)),
        ]:
            for parameter, array in zip(parameters, arrays, strict=True):
                np.testing.assert_allclose(parameter.detach(), array, **TOLERANCE)
        for metric in ("critic_loss", "q_value", *(["divergence", "temperature", "effective_actions"] if noise else [])):
            logged = model.logger.name_to_value[f"train/{metric}"]
            np.testing.assert_allclose(logged, learner.metrics[metric], err_msg=metric, rtol=1e-4, atol=1e-5)
    assert model.log_temperature.item() == pytest.approx(learner.log_temperature, abs=1e-5)
    assert (model.log_temperature.item() != 0) == learns


ALIVE = {
    **SHARED_ALIVE,
    "buffer_size": (50, lambda model: model.replay_buffer.buffer_size),
    "learning_starts": (1, trained_weights),
    "temperature": (0.01, trained_weights),
    "target_divergence": (0.1, trained_weights),
    "temperature_learning_rate": (1.0, trained_weights),
    "q_scaling": ("spread", trained_weights),
    "n_reverse_samples": (7, trained_weights),
    "proposal_actions": ("replay", trained_weights),
    "box": ("clip", trained_weights),
    "n_improvement_steps": (1, trained_weights),
    "improvement_step": (0.4, trained_weights),
    "improved_std": (0.1, trained_weights),
    "training_action_noise": (0.5, trained_weights),
    "policy_delay": (3, trained_weights),
}


@pytest.mark.parametrize("name", [name for name, (_, observe) in ALIVE.items() if observe])
def test_argument_is_alive(name):
    value, observe = ALIVE[name]
    kwargs = {name: value}
    if name == "optimize_memory_usage":
        kwargs["replay_buffer_kwargs"] = dict(handle_timeout_termination=False)
    if name in ("target_divergence", "temperature_learning_rate"):
        kwargs["temperature"] = "auto_0.01"
    if name in ("improvement_step", "improved_std"):
        kwargs["n_improvement_steps"] = 2
    if name == "device":  # a device without memory: enough to see where the model would go
        kwargs["_init_setup_model"] = False
    baseline = {**kwargs, name: TINY_SOFT.get(name, inspect.signature(SDAC).parameters[name].default)}
    first, second = (observe(tiny_sdac(**arguments)) for arguments in (baseline, kwargs))
    assert differ(first, second)
    assert not differ(first, observe(tiny_sdac(**baseline))), "must not change from run to run"


def test_every_argument_is_covered_and_shared_ones_are_qvpos():
    parameters = inspect.signature(SDAC).parameters
    assert ALIVE.keys() == parameters.keys() - {"policy", "env"}
    shared = [name for name in parameters if name in inspect.signature(QVPO).parameters]
    own = {"temperature", "target_divergence", "temperature_learning_rate", "q_scaling", "n_reverse_samples", "box"}
    assert parameters.keys() - set(shared) == own | {"proposal_actions", "improved_std"}
    assert [str(parameters[name].annotation) for name in shared] == [
        str(inspect.signature(QVPO).parameters[name].annotation) for name in shared
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(temperature=0.0), "temperature must be a number above 0, .*, got 0.0"),
        (dict(temperature="lin_0.2"), "temperature must be a number above 0, .*, got 'lin_0.2'"),
        (dict(temperature="offical"), "'official', 'auto' or 'auto_0.5', got 'offical'"),
        (dict(temperature="auto0.5"), "got 'auto0.5'"),
        (dict(temperature="auto_lin_1"), "got 'auto_lin_1'"),
        (dict(box="clip", policy_kwargs=dict(prediction="v")), "box='clip' needs prediction='noise', got prediction='v'"),
        (dict(temperature="auto_0"), "got 'auto_0'"),
        (dict(n_reverse_samples=1), "n_reverse_samples must be .*, got 1"),
        (
            dict(temperature="auto", n_reverse_samples=4, target_divergence=1.5),
            r"target_divergence must be a number in \[0, 1.386",
        ),
        (dict(temperature_learning_rate=0), r"temperature_learning_rate must be a number in \(0, inf\), got 0"),
        (dict(q_scaling="std"), "q_scaling must be one of 'none', 'spread', got 'std'"),
        (dict(proposal_actions="buffer"), "proposal_actions must be one of 'policy', 'replay', got 'buffer'"),
        (dict(box=None), "box must be one of 'truncated', 'clip', got None"),
        (dict(n_improvement_steps=-1), "n_improvement_steps must be .*, got -1"),
        (dict(improvement_step=0.0), r"improvement_step must be a number in \(0, inf\), got 0.0"),
        (dict(improved_std=1e-4), r"improved_std must be a number in \[0.001, 10\], got 0.0001"),
        (dict(improved_std=11), r"improved_std must be a number in \[0.001, 10\], got 11"),
        (dict(training_action_noise=-0.1), r"training_action_noise must be a number in \[0, inf\), got -0.1"),
        (dict(n_improvement_steps=1, n_reverse_samples=3), "n_reverse_samples must be .* at least 4, got 3"),
        (dict(n_improvement_steps=1, box="clip"), "n_improvement_steps above 0 needs box='truncated', got box='clip'"),
        (
            dict(n_improvement_steps=1, temperature="auto", n_reverse_samples=4, target_divergence=1.0),
            r"target_divergence must be a number in \[0, 0.693",
        ),
        (dict(n_target_candidates=0), "n_target_candidates must be"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_sdac(**kwargs)


def test_noise_that_turns_negative_in_training_is_refused():
    with pytest.raises(ValueError, match=r"training_action_noise must be a number in \[0, inf\)"):
        tiny_sdac(training_action_noise=lambda progress: -1.0 if 0.1 < progress < 0.4 else 0.1).learn(40)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(), dict(n_improvement_steps=2)])
def test_noise_on_trained_actions_keeps_the_policy_wide(settings):
    """
    A bandit whose best action is 0.2. Measured: mean and deviation of samples 0.23 and 0.06 without noise, 0.20 and 0.25 with
    noise of 0.3; with draws around better actions 0.22 and 0.05, 0.20 and 0.23.
    """
    widths = []
    for noise in (0.0, 0.3):
        model = tiny_sdac(
            BanditEnv(lambda action: -((action[0] - 0.2) ** 2)), temperature=0.02, training_action_noise=noise, policy_delay=1,
            learning_rate=3e-3, batch_size=64, learning_starts=200, n_diffusion_steps=10, n_reverse_samples=16,
            proposal_actions="replay", policy_kwargs=dict(net_arch=[32, 32], prediction="v"), **settings,
        ).learn(800)  # fmt: skip
        with th.no_grad():
            features = model.actor.features(th.zeros(1, *model.observation_space.shape))
            drawn = model.actor.sample_candidates(features, model.actor.draw_noise(1, 2000))
        assert drawn.mean().item() == pytest.approx(0.2, abs=0.1)
        widths.append(drawn.std().item())
    assert widths[0] < 0.15 and 0.18 < widths[1] < 0.35


def test_draws_around_better_actions_are_no_part_of_the_temperature():
    """Its unit and what it holds are of the plain draws, as if there were no others."""
    settings = dict(q_scaling="spread", temperature="auto_0.3", target_divergence=0.2, proposal_actions="replay")
    mixed, plain = (tiny_sdac(n_improvement_steps=n, n_reverse_samples=8, **settings).learn(12) for n in (2, 0))
    plain.policy.load_state_dict(mixed.policy.state_dict())
    batch, noise = mixed.replay_buffer.sample(6), mixed._draw_actor_noise(6)
    metrics = {}
    for model, draws in ((mixed, noise.reverse), (plain, noise.reverse[:, 4:])):
        model.log_temperature.zero_()
        model.value_spread.zero_()
        metrics[model] = model._actor_loss(batch, 0.3, 0.0, noise._replace(reverse=draws))[1]
    for name in ("value_spread", "divergence"):
        th.testing.assert_close(metrics[mixed][name], metrics[plain][name], msg=name)
    th.testing.assert_close(mixed.log_temperature, plain.log_temperature)
    assert mixed.log_temperature != 0
    assert metrics[mixed]["effective_actions"] != metrics[plain]["effective_actions"]


def test_a_temperature_that_reaches_zero_in_training_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\)"):
        tiny_sdac(temperature=lambda progress: 0.0 if 0.1 < progress < 0.4 else 0.5).learn(40)


def test_a_temperature_that_is_changed_while_learning_counts_from_the_next_time_on():
    model = tiny_sdac().learn(20)
    model.temperature = 0.5
    model.train(2, batch_size=8)
    assert model.logger.name_to_value["train/temperature"] > 4
    model.learn(20, reset_num_timesteps=False)
    model.train(2, batch_size=8)
    assert model._policy_coefficients() == (0.5, 0.0)


@pytest.mark.parametrize("critic_type", ["twin", "crossq", "quantile"])
def test_a_saved_model_goes_on_as_if_it_had_never_stopped(critic_type, tmp_path):
    """Learnt temperature and spread among what is kept, in models and in checkpoints of whole runs."""
    kwargs = dict(temperature="auto", q_scaling="spread", critic_type=critic_type)
    model = tiny_sdac(**kwargs).learn(40)
    assert model.log_temperature != 0 and model.value_spread.min() > 0
    model.save(tmp_path / "model")
    loaded = SDAC.load(tmp_path / "model")
    assert th.equal(loaded.log_temperature, model.log_temperature) and th.equal(loaded.value_spread, model.value_spread)
    assert same_weights(weights_of(loaded), weights_of(model))
    whole = tiny_sdac(CountdownEnv(), **kwargs).learn(40)
    whole.save_checkpoint(tmp_path / "run")
    whole.learn(20, reset_num_timesteps=False)
    resumed = SDAC.resume(tmp_path / "run", CountdownEnv(), device="cpu")
    resumed.learn(20, reset_num_timesteps=False)
    assert same_weights(weights_of(whole), weights_of(resumed))
    assert th.equal(whole.log_temperature, resumed.log_temperature) and th.equal(whole.value_spread, resumed.value_spread)


def test_what_auto_has_learnt_is_no_factor_of_another_temperature():
    model = tiny_sdac(temperature="auto").learn(40)
    assert model.log_temperature != 0
    model.temperature = 0.5
    model.learn(10, reset_num_timesteps=False)
    assert model.log_temperature == 0
    assert model.logger.name_to_value["train/temperature"] == 0.5


def test_auto_holds_its_target():
    """With values that stand still and a large step."""
    model = tiny_sdac(
        temperature="auto", temperature_learning_rate=0.5, target_divergence=0.5, n_reverse_samples=32, qf_learning_rate=0.0
    )
    model.learn(300)
    metric_sums(model).clear()
    model.train(200, batch_size=64)
    assert model.logger.name_to_value["train/divergence"] == pytest.approx(0.5, abs=0.1)


def test_values_that_are_not_finite_do_not_stay_in_the_spread():
    model = tiny_sdac(q_scaling="spread").learn(20)
    before = model.value_spread.clone()
    model._q_unit(th.tensor([[math.nan, 1.0], [1.0, 2.0]]))
    assert th.equal(model.value_spread, before)


@pytest.mark.parametrize("later", [False, True])
def test_values_that_are_not_finite_do_not_stay_in_the_temperature(later):
    """Whether the error comes at once or, as on a GPU, with the next reading of losses."""
    model = tiny_sdac(temperature="auto").learn(20)
    if later:
        report_errors_later(model)
    weight = model.critic.q_networks[0][-1].bias
    kept = weight.detach().clone()
    weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="finite"):
        model.learn(10, reset_num_timesteps=False)
    assert model.log_temperature.isfinite()
    weight.data.copy_(kept)
    model.critic_target.load_state_dict(model.critic.state_dict())  # moving averages have taken up what was written here
    model.learn(20, reset_num_timesteps=False)


def test_a_target_that_no_temperature_reaches_ends_at_a_bound():
    model = tiny_sdac(
        temperature="auto", target_divergence=4.1, n_reverse_samples=64, box="clip", temperature_learning_rate=5.0
    ).learn(100)
    assert model.log_temperature == -20


def test_only_its_own_features_extractor_is_used(monkeypatch):
    """The actor's statistics move once in an update, in its loss."""
    model = tiny_sdac(
        proposal_actions="replay", policy_delay=1, policy_kwargs=dict(net_arch=[8], share_features_extractor=False)
    )
    model.learn(10)
    calls, features = [], type(model.actor).features
    monkeypatch.setattr(type(model.actor), "features", lambda self, *args: calls.append(self) or features(self, *args))
    model.train(1, batch_size=8)
    assert len([actor for actor in calls if actor is model.actor]) == 1


@pytest.mark.parametrize(
    ("env", "policy"),
    [("Pendulum-v1", "MlpPolicy"), (DictEnv(), "MultiInputPolicy"), (FakeImageEnv(36, 36, discrete=False), "CnnPolicy")],
    ids=["vector", "dictionary", "image"],
)
def test_kinds_of_observations_and_several_environments(env, policy):
    model = tiny_sdac(
        make_vec_env(lambda: env, n_envs=1) if policy != "MlpPolicy" else make_vec_env(env, n_envs=3),
        policy,
        gradient_steps=-1,
        q_scaling="spread",
        policy_kwargs=dict(net_arch=[8]),
    )
    before = weights_of(model)
    assert not same_weights(before, weights_of(model.learn(30)))


def test_hindsight_from_several_environments():
    envs = make_vec_env(BitFlippingEnv, n_envs=2, env_kwargs=dict(n_bits=4, continuous=True))
    model = tiny_sdac(
        envs,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        learning_starts=20,
        gradient_steps=-1,
        q_scaling="spread",
    )
    before = weights_of(model)
    assert not same_weights(before, weights_of(model.learn(30)))


def test_stored_actions_stay_in_the_box_whatever_the_noise():
    """In the authors' code the noise comes after the clipping, and large actions reach the buffer."""
    noise = NormalActionNoise(np.zeros(1), np.full(1, 3.0))
    model = tiny_sdac(action_noise=noise, learning_starts=5).learn(40)
    stored = model.replay_buffer.actions[: model.replay_buffer.pos]
    assert (np.abs(stored) <= 1).all() and (np.abs(stored[5:]) == 1).mean() > 0.3


def test_samples_start_from_noise_of_deviation_one():
    """In the authors' code from half of it."""
    model = tiny_sdac()
    start = model.actor.draw_noise(500, 4)[0]
    assert start.std().item() == pytest.approx(1, abs=0.05)


def test_the_actor_acts_and_not_its_moving_average():
    """In the authors' code the average acts."""
    model = tiny_sdac()
    observation = np.zeros(3, np.float32)
    before = model.predict(observation, deterministic=True)[0]
    with th.no_grad():
        for parameter in model.actor_target.parameters():
            parameter.add_(1.0)
    assert model.predict(observation, deterministic=True)[0] == before
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter.add_(1.0)
    assert model.predict(observation, deterministic=True)[0] != before


def test_the_learning_rate_is_constant_unless_it_is_a_schedule():
    """In the authors' code the actor's falls."""
    for learning_rate, now in ((3e-4, 3e-4), (lambda left: 3e-4 * left, 0)):
        model = tiny_sdac(learning_rate=learning_rate).learn(20)
        assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(now, abs=2e-5)


@pytest.mark.parametrize("n_improvement_steps", [0, 2])
def test_weights_in_reduced_precision_are_as_good(settings, monkeypatch, n_improvement_steps):
    """What the policy is trained on changes by far less than from draws to draws."""
    model = tiny_sdac(
        batch_size=256, n_reverse_samples=16, temperature=0.05, q_scaling="spread", critic_type="crossq",
        policy_kwargs=dict(net_arch=[256, 256]), n_improvement_steps=n_improvement_steps, learning_starts=256,
    ).learn(256)  # fmt: skip
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.add_(0.2 * th.randn_like(parameter))
    means, batch = [], model.replay_buffer.sample(256)
    loss = model.actor.denoising_loss
    monkeypatch.setattr(
        model.actor, "denoising_loss", lambda obs, actions, *rest: (means.append(actions), loss(obs, actions, *rest))[1]
    )
    noise = model._draw_actor_noise(256)
    other = noise._replace(reverse=model._draw_actor_noise(256).reverse)
    for dtype, draws in (("float32", noise), ("bfloat16", noise), ("float32", other)):
        settings.candidate_dtype = dtype
        model.value_spread.zero_()
        model._actor_loss(batch, 0.05, 0.0, draws)
    exact, rounded, redrawn = means
    assert not th.equal(rounded, exact)
    assert (rounded - exact).square().mean() < 0.02 * (redrawn - exact).square().mean()


@pytest.mark.parametrize("n_improvement_steps", [0, 2])
def test_fast_code_changes_nothing(settings, n_improvement_steps):
    """At sizes where the CPU's fast code is in use, with and without it: draws of the policy, values, the actor's loss."""
    settings.candidate_dtype = "float32"
    kwargs = dict(
        batch_size=64, n_reverse_samples=16, temperature=0.2, q_scaling="spread", critic_type="crossq", n_diffusion_steps=5,
        policy_kwargs=dict(net_arch=[256, 256], activation_fn=th.nn.ReLU, prediction="v", sampler="dpm++"),
        n_improvement_steps=n_improvement_steps,
    )  # fmt: skip
    results = []
    for enabled in (True, False):
        settings.enabled = enabled
        model = tiny_sdac(**kwargs, learning_starts=40, learning_rate=1e-12).learn(40)
        model.train(2, 64)
        # Gradients and not weights: Adam makes steps of full size of gradients that are rounding errors
        gradients = [
            th.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]) for net in (model.critic, model.actor)
        ]
        th.manual_seed(0)
        observations, actions = th.randn(64, 3), 2 * th.rand(64, 16, 1) - 1
        model.policy.set_training_mode(False)
        with th.no_grad():
            drawn = model.policy.score_candidates(observations, model.policy.draw_noise(64, 16)).candidates
            values = model.critic.score(model.critic.features(observations), actions)
        results.append((*gradients, drawn, values))
    (*fast, fast_drawn, fast_values), (*slow, slow_drawn, slow_values) = results
    th.testing.assert_close(fast_values, slow_values, rtol=0, atol=1e-6)
    # The first step divides by the signal that is left in pure noise, which multiplies rounding errors by some hundred
    th.testing.assert_close(fast_drawn, slow_drawn, rtol=0, atol=2e-4)
    for of_fast, of_slow in zip(fast, slow, strict=True):
        # ... and the norms of the critics, in a batch of few states, do so again
        assert (of_fast - of_slow).norm() < 5e-3 * of_slow.norm()
