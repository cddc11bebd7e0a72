"""Weights of candidates against the float64 reference, and what they do to a policy with two modes."""

import functools

import numpy as np
import pytest
import reference
import torch as th
from helpers import TOLERANCE, BanditEnv, tiny_qvpo

from sb3_qvpo.qvpo import weights as w


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_q_weights(shift):
    q_values = th.randn(5, 7) + shift
    for i in range(5):
        values = [float(value) for value in q_values[i]]
        np.testing.assert_allclose(w.qadv(q_values)[i], reference.qadv(values), **TOLERANCE)
        np.testing.assert_allclose(w.qadv_normalized(q_values)[i], reference.qadv_normalized(values), **TOLERANCE)
        np.testing.assert_allclose(w.qcut(q_values)[i], reference.qcut(values, w.QCUT_EPSILON), **TOLERANCE)
        np.testing.assert_allclose(w.qcut(q_values, 0.5)[i], reference.qcut(values, 0.5), **TOLERANCE)


def test_normalized_weights_do_not_depend_on_the_scale_of_values():
    q_values = th.randn(6, 5).double()
    scaled = w.qadv_normalized(q_values * th.tensor([1.0, 1e-3, 1e3, 7.0, 1.0, 1.0]).double().view(-1, 1) + 100)
    th.testing.assert_close(scaled, w.qadv_normalized(q_values), rtol=1e-5, atol=1e-8)
    # One candidate above all others has the largest weight there is
    assert w.qadv_normalized(th.tensor([[0.0, 0.0, 0.0, 0.0, 5.0]])).max().item() == pytest.approx(2.0)
    # Equal values, also up to rounding, teach nothing
    for equal in (th.zeros(1, 4), th.full((1, 4), 1234.5), th.tensor([[1000.0, 1000.00006, 1000.0, 1000.0]])):
        weights = w.qadv_normalized(equal)
        assert weights.isfinite().all() and weights.max() < 0.1


def test_a_function_is_tried_on_as_many_values_as_it_will_see():
    """Improved candidates are among them."""

    def for_four(q_values):
        return q_values.softmax(dim=1) * th.ones(4)

    with pytest.raises(RuntimeError):
        tiny_qvpo(n_train_candidates=4, n_improvement_steps=2, q_weighting=for_four)
    tiny_qvpo(n_train_candidates=2, n_improvement_steps=2, q_weighting=for_four).learn(8)
    tiny_qvpo(n_train_candidates=1, n_improvement_steps=1).learn(8)  # the advantage of two is well defined


def test_the_heaviest_candidate_is_trained_on():
    candidates = th.arange(4.0).view(1, 4, 1)
    q_values = th.tensor([[-3.0, -1.0, -2.0, -4.0]])
    for weighting in (w.qadv, w.qcut):  # qcut: all weights equal, the value decides
        action, weight = w.select_training_actions(candidates, q_values, weighting(q_values))
        assert action.item() == 1.0 and weight.item() == pytest.approx(float(weighting(q_values)[0, 1]))
    # Algorithm 1, line 7 goes by weight: a weighting may prefer another candidate than the best
    action, weight = w.select_training_actions(candidates, q_values, th.tensor([[1.0, 0.0, 2.0, 0.0]]))
    assert (action.item(), weight.item()) == (2.0, 2.0)


@pytest.mark.parametrize("values", [[5e-4, -1.0, -2.0], [0.0, -1.0, -2.0], [-2.0, -1e-9, -1.0], [1e-3, 2e-3, -5.0]])
def test_qcut_always_trains_on_the_best_candidate(values):
    """Also where the best value is smaller than the epsilon that negative values are worth."""
    q_values = th.tensor([values])
    action, _ = w.select_training_actions(q_values.unsqueeze(-1), q_values, w.qcut(q_values))
    assert action.item() == q_values.max().item()


def test_uniform_actions_get_the_entropy_weight():
    best, weights, uniform = th.randn(3, 2), th.rand(3), th.rand(3, 5, 2)
    actions, action_weights = w.add_uniform_actions(best, weights, uniform, 0.3)
    assert actions.shape == (3, 6, 2)
    assert th.equal(actions[:, 0], best) and th.equal(actions[:, 1:], uniform)
    assert th.equal(action_weights[:, 0], weights)
    for e in range(5):
        th.testing.assert_close(action_weights[:, 1 + e], 0.3 * weights)


# A bandit with two peaks: what the weights and the entropy term do to a policy that starts with both

PEAKS, WIDTH = (-0.6, 0.6), 0.2


def reward(action, left=0.7):
    """Two peaks, the right one of height 1."""
    return left * np.exp(-(((action[0] - PEAKS[0]) / WIDTH) ** 2)) + np.exp(-(((action[0] - PEAKS[1]) / WIDTH) ** 2))


def samples_of(model):
    """Single samples of the policy."""
    with th.no_grad():
        return model.actor.sample_candidates(th.zeros(1, 2), model.actor.draw_noise(1, 4000)).flatten()


def modes(samples):
    """Fractions of samples near the left and the right peak, and elsewhere."""
    left, right = (((samples - peak).abs() < 0.25).float().mean().item() for peak in PEAKS)
    return left, right, 1 - left - right


@pytest.fixture(scope="module")
def two_mode_model():
    """A policy trained by plain denoising on both peaks, critics trained on the rewards of uniform actions."""
    th.manual_seed(0)
    model = tiny_qvpo(
        BanditEnv(reward), learning_starts=1000, buffer_size=1000, batch_size=128, learning_rate=3e-3,
        n_diffusion_steps=10, n_train_candidates=16, n_uniform_actions=10, policy_kwargs=dict(net_arch=[64, 64]),
    )  # fmt: skip
    model.learn(1000)
    model.policy.set_training_mode(True)

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(2000):
        actions = th.tensor(PEAKS)[th.randint(2, (256, 1, 1))] + 0.05 * th.randn(256, 1, 1)
        step(model.actor.optimizer, model.actor.denoising_loss(th.zeros(256, 2), actions).mean())
    for _ in range(1000):
        batch = model.replay_buffer.sample(128)
        # Each step is an episode, so the values are the rewards
        step(model.critic.optimizer, model.critic.loss(model.critic(batch.observations, batch.actions), batch.rewards))
    model.actor_target.load_state_dict(model.actor.state_dict())
    return model


@pytest.fixture(scope="module")
def improved(two_mode_model, tmp_path_factory):
    """A function: samples of a copy of the model after updates with some ``ent_coef`` and noise."""
    path = tmp_path_factory.mktemp("model") / "two_modes"
    two_mode_model.save(path)

    @functools.cache
    def improved_with(ent_coef, **kwargs):
        copy = type(two_mode_model).load(path, env=two_mode_model.get_env(), learning_rate=1e-3, ent_coef=ent_coef, **kwargs)
        copy.replay_buffer = two_mode_model.replay_buffer
        copy.set_logger(two_mode_model.logger)
        th.manual_seed(1)
        copy.train(200, batch_size=128)
        return samples_of(copy)

    return improved_with


def test_plain_denoising_keeps_both_modes(two_mode_model):
    """Measured: 0.45 left, 0.49 right, 0.06 elsewhere."""
    left, right, elsewhere = modes(samples_of(two_mode_model))
    assert 0.4 < left < 0.6 and 0.4 < right < 0.6 and elsewhere < 0.1


def test_qadv_concentrates_on_the_better_peak(improved):
    """Measured: 0.00 left, 0.99 right, 0.01 elsewhere."""
    left, right, _ = modes(improved(0.0))
    assert right > 0.9 and left < 0.05


@pytest.mark.slow
def test_a_larger_ent_coef_spreads_the_policy(improved):
    """
    Measured (left, right, elsewhere): (0.00, 0.99, 0.01) at 0, (0.03, 0.95, 0.03) at 0.01, (0.12, 0.67, 0.22) at 0.1,
    (0.24, 0.42, 0.35) at 0.5, where a uniform policy would have (0.25, 0.25, 0.5).
    """
    fractions = [modes(improved(ent_coef)) for ent_coef in (0.0, 0.1, 0.5)]
    left, right, elsewhere = zip(*fractions, strict=True)
    assert elsewhere[0] < 0.05 < elsewhere[1] < elsewhere[2]
    assert left[0] < 0.05 < left[1] < left[2]
    assert right[0] > right[1] > right[2] > left[2]  # even then the better peak stays ahead


def test_noise_on_the_trained_action_keeps_the_policy_wide(improved):
    """Measured: mean and deviation of samples 0.59 and 0.11 without noise, 0.62 and 0.20 with noise of 0.3."""
    narrow, wide = improved(0.0), improved(0.0, training_action_noise=0.3)
    assert wide.std() > 1.4 * narrow.std()
    for samples in (narrow, wide):
        assert float(samples.mean()) == pytest.approx(0.6, abs=0.08)
