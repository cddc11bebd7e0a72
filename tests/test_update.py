"""Whole calls of ``QVPO.train()`` against the float64 reference, parameter by parameter, gradients included."""

import numpy as np
import pytest
import reference
import torch as th
from helpers import CountdownEnv, actor_parameters, actor_to_numpy, critics_to_numpy, tiny_qvpo

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


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
    "other sizes": dict(policy_kwargs=dict(net_arch=dict(pi=[9], qf=[5, 7]), n_critics=3, noise_schedule="vp"), gamma=0.9),
}


def recorded(model, names):
    """Let methods of a model run as they are, and keep what they return."""
    records = {name: [] for name in names}
    for name in names:
        owner = model.replay_buffer if name == "sample" else model
        method = getattr(owner, name)

        def recorder(*args, _method=method, _results=records[name], **kwargs):
            _results.append(_method(*args, **kwargs))
            return _results[-1]

        setattr(owner, name, recorder)
    return records


def to_double(tensor):
    return None if tensor is None else tensor.numpy().astype(np.float64)


def weighting_of(settings):
    named = {"qadv": reference.qadv, "qcut": lambda values: reference.qcut(values, 1e-3)}
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
    records = recorded(model, ["sample", "_draw_chain_noise", "_draw_actor_noise"])

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
        ),
    )
    for _ in range(3):
        for results in records.values():
            results.clear()
        model._metric_sums.clear()
        model.actor.optimizer.zero_grad()
        model.train(gradient_steps=1, batch_size=6)
        batch = {field: to_double(value) for field, value in records["sample"][0]._asdict().items()}
        batch["rewards"], batch["dones"] = batch["rewards"][:, 0], batch["dones"][:, 0]
        batch["discounts"] = None if batch["discounts"] is None else batch["discounts"][:, 0]
        actor_step = bool(records["_draw_actor_noise"])
        actor_noise = None
        if actor_step:
            actor_noise = {field: to_double(value) for field, value in records["_draw_actor_noise"][0]._asdict().items()}
            actor_noise["timesteps"] = records["_draw_actor_noise"][0].timesteps.numpy()
        critic_gradients, actor_gradients = learner.update(batch, to_double(records["_draw_chain_noise"][0]), actor_noise)

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
            learning_starts=100, batch_size=32, learning_rate=3e-3, tau=0.05, gamma=gamma,
            policy_kwargs=dict(net_arch=[32]), n_diffusion_steps=2, **kwargs,
        )  # fmt: skip
        model.learn(100)
        model.train(800, batch_size=32)
        with th.no_grad():
            q_value = float(th.cat(model.critic(th.zeros(1, 1), th.zeros(1, 1)), dim=1).min())
        assert q_value == pytest.approx(expected, abs=0.15), (truncate, kwargs)
