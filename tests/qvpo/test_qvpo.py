"""Whole calls of ``QVPO.train()`` against the float64 reference, parameter by parameter; and each of QVPO's arguments."""

import inspect

import numpy as np
import pytest
import reference
import torch as th
from helpers import (
    SHARED_ALIVE,
    TINY,
    TOLERANCE,
    BanditEnv,
    CountdownEnv,
    actor_noise,
    actor_parameters,
    actor_to_numpy,
    assert_gradients_close,
    critics_to_numpy,
    differ,
    ent_coef_of,
    metric_sums,
    recorded_draws,
    tiny_qvpo,
    to_double,
    trained_weights,
    weighting_in_use,
    weights_of,
)

from sb3_qvpo import QVPO, DiffusionPolicy

SETTINGS = {
    "paper": dict(),
    "qcut": dict(q_weighting="qcut"),
    "custom weighting": dict(q_weighting=lambda q: (q - q.amin(dim=1, keepdim=True)) ** 2),
    "clipped": dict(max_grad_norm=0.05),
    "delayed": dict(policy_delay=2),
    "no entropy": dict(ent_coef=0.0),
    "one candidate each": dict(n_target_candidates=1, n_train_candidates=1, q_weighting="qcut"),
    "authors' code": dict(
        learning_rate=1e-4,
        qf_learning_rate=3e-4,
        max_grad_norm=2.0,
        ent_coef="lin_0.02_0.002_0.9",
        n_target_candidates=4,
        replay_buffer_kwargs=dict(handle_timeout_termination=False),
        policy_kwargs=dict(net_arch=[8, 8, 8], time_embedding_dim=6),
    ),
    "n-step": dict(n_steps=3),
    "normalised weights": dict(q_weighting="qadv_normalized"),
    "improved candidates": dict(n_improvement_steps=2, improvement_step=0.2),
    "noisy actions": dict(training_action_noise=0.4),
    "v and solver": dict(policy_kwargs=dict(prediction="v", sampler="dpm++")),
    "other sizes": dict(policy_kwargs=dict(net_arch=dict(pi=[9], qf=[5, 7]), n_critics=3, noise_schedule="vp"), gamma=0.9),
}


def weighting_of(settings):
    named = {"qadv": reference.qadv, "qadv_normalized": reference.qadv_normalized}
    named |= {"qcut": lambda values: reference.qcut(values, 1e-3)}
    weighting = settings.get("q_weighting", "qadv")
    return named[weighting] if isinstance(weighting, str) else lambda values: [(v - min(values)) ** 2 for v in values]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("env", ["Pendulum-v1", "countdown", "time limit"])
def test_train_step_by_step(name, env):
    """Three updates in a row, on real transitions: terminations, time limits and n-step discounts among them."""
    settings = SETTINGS[name]
    policy_kwargs = dict(net_arch=[8, 8], time_embedding_dim=4, optimizer_kwargs=dict(eps=1e-5))
    policy_kwargs.update(settings.get("policy_kwargs", {}))
    environment = env if env == "Pendulum-v1" else CountdownEnv(truncate=env == "time limit")
    model = tiny_qvpo(environment, learning_starts=30, **{**settings, "policy_kwargs": policy_kwargs, "tau": 0.1})
    model.learn(30)
    for parameter in model.policy.parameters():  # targets that differ from the online networks, biases that are not 0
        parameter.data.add_(0.2 * th.randn_like(parameter))
    records = recorded_draws(model)

    learner = reference.Learner(
        *(actor_to_numpy(actor) for actor in (model.actor, model.actor_target)),
        *(critics_to_numpy(critic) for critic in (model.critic, model.critic_target)),
        dict(
            betas=reference.vp_betas(3) if policy_kwargs.get("noise_schedule") else reference.cosine_betas(3),
            tau=0.1,
            gamma=model.gamma,
            weighting=weighting_of(settings),
            ent_coef=0.002 if name == "authors' code" else settings.get("ent_coef", 0.01),
            actor_learning_rate=settings.get("learning_rate", 3e-4),
            critic_learning_rate=3e-4,
            adam_epsilon=1e-5,
            max_grad_norm=settings.get("max_grad_norm"),
            policy_delay=settings.get("policy_delay", 1),
            prediction=policy_kwargs.get("prediction", "noise"),
            solver_steps=[0, 1, 2] if policy_kwargs.get("sampler") == "dpm++" else None,
            n_improvement_steps=settings.get("n_improvement_steps", 0),
            improvement_step=settings.get("improvement_step"),
            training_action_noise=settings.get("training_action_noise"),
        ),
    )
    for _ in range(3):
        for results in records.values():
            results.clear()
        metric_sums(model).clear()
        model.actor.optimizer.zero_grad()
        model.train(gradient_steps=1, batch_size=6)
        batch = {field: to_double(value) for field, value in records["batch"][0]._asdict().items()}
        batch["rewards"], batch["dones"] = batch["rewards"][:, 0], batch["dones"][:, 0]
        batch["discounts"] = None if batch["discounts"] is None else batch["discounts"][:, 0]
        actor_step = bool(records["actor_noise"])
        actor_noise = None
        if actor_step:
            actor_noise = {field: to_double(value) for field, value in records["actor_noise"][0]._asdict().items()}
            actor_noise["timesteps"] = records["actor_noise"][0].timesteps.numpy()
        critic_gradients, actor_gradients = learner.update(batch, to_double(records["target_noise"][0]), actor_noise)

        assert (actor_gradients is not None) == actor_step
        assert_gradients_close(model.critic.parameters(), critic_gradients)
        if actor_step:
            assert_gradients_close(actor_parameters(model.actor), actor_gradients)
        pairs = [
            (model.critic.parameters(), learner.critic_arrays()),
            (actor_parameters(model.actor), learner.actor_arrays(learner.actor)),
            (actor_parameters(model.actor_target), learner.actor_arrays(learner.actor_target)),
            (model.critic_target.parameters(), [a for layers in learner.critics_target for a in reference.flatten(layers)]),
        ]
        for parameters, arrays in pairs:
            for parameter, array in zip(parameters, arrays, strict=True):
                np.testing.assert_allclose(parameter.detach(), array, **TOLERANCE)
        for metric in ("critic_loss", "q_value", *(list(learner.metrics)[2:] if actor_step else [])):
            logged = model.logger.name_to_value[f"train/{metric}"]
            np.testing.assert_allclose(logged, learner.metrics[metric], err_msg=metric, **TOLERANCE)


# Targets of the critics


def test_time_limits_bootstrap_and_terminations_do_not():
    """The reference sees ``dones``; this one checks where they come from."""
    for truncate, kwargs, expected in [
        (False, {}, 1.0),
        (True, {}, 0.0),
        (True, dict(replay_buffer_kwargs=dict(handle_timeout_termination=False)), 1.0),
    ]:
        model = tiny_qvpo(CountdownEnv(length=4, truncate=truncate), learning_starts=100, **kwargs)
        model.learn(4)  # the only transition with an end is the last
        batch = model.replay_buffer._get_samples(np.array([3]))
        assert batch.dones.item() == expected


def test_value_of_a_task_that_ends_and_of_one_that_is_cut_off():
    """
    Reward 1 a step. Where step 4 ends the task, Q(first step) = 1 + g + g^2 + g^3; where it is only a time limit,
    Q = 1 / (1 - g) everywhere. The authors' setting turns the second into the first, and a longer return changes neither.
    """
    gamma = 0.8
    ends, continues = sum(gamma**i for i in range(4)), 1 / (1 - gamma)
    cases = [
        (False, {}, ends),
        (True, {}, continues),
        (True, dict(replay_buffer_kwargs=dict(handle_timeout_termination=False)), ends),
        (False, dict(n_steps=3), ends),
        (True, dict(n_steps=3), continues),
    ]
    for truncate, kwargs, expected in cases:
        model = tiny_qvpo(
            CountdownEnv(length=4, truncate=truncate),
            learning_starts=100, batch_size=32, learning_rate=2e-2, tau=0.3, gamma=gamma,
            policy_kwargs=dict(net_arch=[32]), n_diffusion_steps=2, **kwargs,
        )  # fmt: skip
        model.learn(100)
        model.train(150, batch_size=32)
        with th.no_grad():
            q_value = float(th.cat(model.critic(th.zeros(1, 1), th.zeros(1, 1)), dim=1).min())
        assert q_value == pytest.approx(expected, abs=0.15), (truncate, kwargs)


# Losses and draws


def test_entropy_loss_is_a_part_of_the_actor_loss():
    with_entropy = tiny_qvpo(ent_coef=0.5).learn(20).logger.name_to_value
    assert 0 < with_entropy["train/entropy_loss"] < with_entropy["train/actor_loss"]
    without = tiny_qvpo(ent_coef=0.0).learn(20).logger.name_to_value
    assert without["train/entropy_loss"] == 0
    assert without["train/weight"] == pytest.approx(without["train/critic_contrast"], rel=1e-5)  # qadv: the same number


def test_random_draws_of_an_update():
    """Ranges and moments, and independence over states, candidates and steps."""
    model = tiny_qvpo(n_diffusion_steps=4, n_uniform_actions=5, n_train_candidates=6, training_action_noise=0.1)
    noise = actor_noise(model, 2000)
    shapes = [(4, 2000, 6, 1), (2000, 5, 1), (2000, 6), (2000, 6, 1), (2000, 1)]
    assert [tuple(tensor.shape) for tensor in noise] == shapes
    counts = np.bincount(noise.timesteps.flatten(), minlength=4)
    np.testing.assert_allclose(counts / 12000, 0.25, atol=0.02)  # t uniform over 0 ... T-1
    assert len(counts) == 4
    assert -1 <= noise.uniform_actions.min() < -0.99
    assert 0.99 < noise.uniform_actions.max() <= 1
    of_actions = actor_noise(model, 20_000).action
    for tensor, std in [(noise.chain, 1), (noise.denoising, 1), (noise.uniform_actions, 3**-0.5), (of_actions, 1)]:
        assert float(tensor.mean()) == pytest.approx(0, abs=0.03)
        assert float(tensor.std()) == pytest.approx(std, abs=0.03)
    for axis in range(3):
        a, b = noise.chain.transpose(0, axis).flatten(1)[:2]
        assert abs(float((a * b).mean())) < 0.2
    assert not np.array_equal(noise.denoising, actor_noise(model, 2000).denoising)


def test_policy_delay_counts_critic_updates():
    model = tiny_qvpo(policy_delay=3).learn(5)
    actor_steps = []
    for _ in range(7):
        before = weights_of(model)
        model.learn(1, reset_num_timesteps=False)
        after = weights_of(model)
        changed = {name.split(".")[0] for name in before if not (before[name] == after[name]).all()}
        assert "critic" in changed
        assert ("actor" in changed) == ("actor_target" in changed) == ("critic_target" in changed)
        actor_steps.append("actor" in changed)
    assert actor_steps == [False, False, True, False, False, True, False]


# Arguments


# For each argument: another value than TINY's, and what changes with it
ALIVE = {
    **SHARED_ALIVE,
    "buffer_size": (100, lambda model: model.replay_buffer.buffer_size),
    "learning_starts": (9, trained_weights),
    "ent_coef": (0.5, trained_weights),
    "n_train_candidates": (7, trained_weights),
    "n_uniform_actions": (5, trained_weights),
    "q_weighting": ("qcut", trained_weights),
    "policy_delay": (2, trained_weights),
    "n_improvement_steps": (2, trained_weights),
    "improvement_step": (0.5, trained_weights),
    "training_action_noise": (0.5, trained_weights),
}


@pytest.mark.parametrize("name", [name for name, (_, observe) in ALIVE.items() if observe])
def test_argument_is_alive(name):
    value, observe = ALIVE[name]
    kwargs = {name: value}
    if name == "optimize_memory_usage":
        kwargs["replay_buffer_kwargs"] = dict(handle_timeout_termination=False)
    if name == "improvement_step":
        kwargs["n_improvement_steps"] = 1
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


@pytest.mark.parametrize("name", ["ent_coef", "training_action_noise"])
def test_a_schedule_that_turns_negative_during_training_is_refused(name):
    schedule = lambda progress: -1.0 if 0.1 < progress < 0.4 else 0.01  # noqa: E731
    model = tiny_qvpo(**{name: schedule})
    with pytest.raises(ValueError, match=f"{name} must be a number in"):
        model.learn(20)


@pytest.mark.parametrize(("before", "after"), [(0.4, 0.0), (0.0, 0.4)])
def test_noise_that_is_changed_while_learning_counts_from_the_next_time_on(before, after):
    model = tiny_qvpo(training_action_noise=before).learn(20)
    model.training_action_noise = after
    for expected in (before, after):
        model.train(2, batch_size=8)
        assert model.logger.name_to_value["train/training_action_noise"] == expected
        assert (actor_noise(model, 8).action is not None) == (expected > 0)
        model.learn(4, reset_num_timesteps=False)


def test_custom_weighting_and_schedule_survive_saving(tmp_path):
    model = tiny_qvpo(
        q_weighting=lambda q: q.softmax(dim=1),
        ent_coef=lambda progress: 0.1 * progress,
        training_action_noise=lambda progress: 0.5 * progress,
    )
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model")
    assert loaded.training_action_noise(0.5) == 0.25
    assert ent_coef_of(loaded)(0.5) == pytest.approx(0.05)
    assert th.equal(weighting_in_use(loaded)(th.zeros(1, 4)), th.full((1, 4), 0.25))
