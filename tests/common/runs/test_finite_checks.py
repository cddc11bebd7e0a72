"""A number that is not finite never reaches the weights, and the first bad update is named."""

import copy

import numpy as np
import pytest
import torch as th
from helpers import errors_are_deferred, report_errors_later, same_weights, tiny_qvpo, trained_weights, weights_of

from sb3_qvpo.common.runs.finite_checks import FiniteGuard


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


def test_a_non_finite_critic_loss_is_named():
    """The buffer is fine, the network is not: a loss beyond float32."""
    model = tiny_qvpo().learn(10)
    model.critic.q_networks[0][-1].bias.data.fill_(1e30)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"Non-finite critic_loss \(inf\) in gradient update 6"):
        model.train(1, batch_size=8)
    assert same_weights(before, weights_of(model))


def test_a_non_finite_gradient_of_a_finite_loss_is_named():
    parameter = th.nn.Parameter(th.zeros(1))
    loss = (parameter.abs() + 1e-46).sqrt().sum() * 0 + 1.0  # the slope of the root at 0 is infinite, times 0 is NaN
    loss.backward()
    optimizer = th.optim.Adam([parameter])
    guard = FiniteGuard(deferred=False)
    guard.start_update(3, {})
    with pytest.raises(ValueError, match="Non-finite gradient of some_loss in gradient update 3"):
        guard.step(optimizer, "some_loss", loss)
    assert parameter.item() == 0
    assert parameter.grad is None


def test_gradients_are_clipped_to_the_norm():
    model = tiny_qvpo(max_grad_norm=1e-2).learn(10)
    for network in (model.actor, model.critic):
        norm = th.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        assert 0 < float(norm) <= 1e-2 * (1 + 1e-4)


# On an accelerator


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
    report_errors_later(model)
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
    model._n_updates = 95  # as if only good updates had followed: every 100 it is time for a report
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update 7"):
        model.train(8, batch_size=8)
    assert model._n_updates == 100
    model._n_updates = 195
    model.train(8, batch_size=8)  # reported once
    assert all(bool(value.isfinite().all()) for value in model.policy.state_dict().values())


def test_a_first_step_that_is_bad_leaves_no_nan_in_the_optimizer():
    model = tiny_qvpo(learning_starts=20).learn(20)
    report_errors_later(model)
    model.replay_buffer.rewards[:] = np.nan
    model.train(1, batch_size=8)
    state = model.critic.optimizer.state_dict()["state"]
    assert all(bool(value.isfinite().all()) for values in state.values() for value in values.values())


def test_on_an_accelerator_the_end_of_learn_reports():
    model = tiny_qvpo().learn(10)
    report_errors_later(model)
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update"):
        model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 18


def test_the_guard_is_deferred_off_the_cpu_only_and_changes_nothing_else():
    assert errors_are_deferred(tiny_qvpo()) is False
    assert errors_are_deferred(tiny_qvpo(device="meta", seed=None)) is True
    plain = trained_weights(tiny_qvpo(max_grad_norm=1.0))
    guarded = tiny_qvpo(max_grad_norm=1.0)
    report_errors_later(guarded)
    assert same_weights(trained_weights(guarded), plain)
