"""Fused optimiser steps are the usual ones, only where the user has not chosen, and files do not know of them."""

import gymnasium as gym
import pytest
import torch as th
from helpers import tiny_qvpo
from torch import nn

from sb3_qvpo import QVPO
from sb3_qvpo.common.speed.optimizers import check_fused, use_fused


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.AdamW])
def test_fused_steps_are_the_usual_ones(optimizer_class, settings):
    generator, weights = th.Generator().manual_seed(0), []
    gradients = [th.randn(40, 30, generator=generator) * 10.0**i for i in range(-3, 3)]
    for enabled in (False, True):
        settings.enabled = enabled
        parameter = nn.Parameter(th.ones(40, 30))
        optimizer = optimizer_class([parameter], lr=1e-2, eps=1e-5, weight_decay=0.1)
        use_fused(optimizer)
        assert optimizer.param_groups[0]["fused"] is (True if enabled else None)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        weights.append(parameter.detach())
    th.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chosen", [dict(fused=False), dict(foreach=True), dict(foreach=False), dict(differentiable=True)])
def test_what_the_user_has_chosen_is_not_fused(chosen):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], optimizer_kwargs=chosen))
    assert {name: model.actor.optimizer.param_groups[0][name] for name in chosen} == chosen
    assert not model.actor.optimizer.param_groups[0]["fused"]
    other = tiny_qvpo(policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD, optimizer_kwargs=dict(fused=None)))
    assert not other.actor.optimizer.param_groups[0]["fused"]


def test_files_do_not_say_that_steps_are_fused(tmp_path, settings):
    """It belongs to the process: a file that was written without loads with, and the other way."""
    models = {}
    for enabled in (False, True):
        settings.enabled = enabled
        models[enabled] = tiny_qvpo().learn(10)
        assert models[enabled].actor.optimizer.state_dict()["param_groups"][0]["fused"] is (True if enabled else None)
        assert models[enabled].get_parameters()["actor.optimizer"]["param_groups"][0]["fused"] is None
        models[enabled].save(tmp_path / f"{enabled}")
    for written in (False, True):
        settings.enabled = not written
        loaded = QVPO.load(tmp_path / f"{written}", env=gym.make("Pendulum-v1"))
        assert loaded.critic.optimizer.param_groups[0]["fused"] is (None if written else True)
        loaded.learn(10, reset_num_timesteps=False)
        step = next(iter(loaded.critic.optimizer.state.values()))["step"]
        assert int(step) == loaded._n_updates == 10
    settings.enabled = True
    model, chosen = (
        models[True],
        tiny_qvpo(policy_kwargs=dict(net_arch=[8, 8], time_embedding_dim=4, optimizer_kwargs=UNFUSED)),
    )
    chosen.set_parameters(model.get_parameters())
    assert chosen.actor.optimizer.param_groups[0]["fused"] is False, "the choice is the model's"
    model.set_parameters(chosen.get_parameters())
    assert model.actor.optimizer.param_groups[0]["fused"] is True
    with pytest.raises(KeyError, match="param_groups"):
        model.set_parameters({"policy": model.policy.state_dict(), "actor.optimizer": {}, "critic.optimizer": {}})
    assert model.actor.optimizer.param_groups[0]["fused"] is True, "also after an error"


UNFUSED = dict(fused=False)


@pytest.mark.parametrize("kwargs", [UNFUSED, dict(fused=True), dict(foreach=True)])
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD, type("OwnAdam", (th.optim.Adam,), {})])
def test_the_users_choice_survives_saving_and_loading(optimizer_class, kwargs, tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], optimizer_class=optimizer_class, optimizer_kwargs=kwargs)).learn(8)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model")
    for each in (model, loaded):
        assert {name: each.actor.optimizer.param_groups[0][name] for name in kwargs} == kwargs


@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
def test_steps_of_tensors_in_another_order_are_not_fused(what):
    """A part of a larger tensor, as the first layer of a pretrained network may be: the kernel takes memory as it lies."""
    whole = th.randn(6, 4)
    parts = [nn.Parameter(whole.clone()[:, :2] if what == "parameter" else whole[:, :2].clone()) for _ in range(2)]
    optimizers = [th.optim.Adam([part], lr=0.1) for part in parts]
    use_fused(optimizers[1])
    for step in range(4):
        gradient = th.randn(2, 6)
        for part, optimizer in zip(parts, optimizers, strict=True):
            part.grad = gradient.t() if what == "gradient" else gradient.t().contiguous()
            if what == "state" and step == 2:
                values = optimizer.state[part]
                values["exp_avg"] = values["exp_avg"].t().contiguous().t()
            check_fused(optimizer)
            optimizer.step()
    th.testing.assert_close(*(part.detach() for part in parts), atol=1e-6, rtol=1e-6)
    assert optimizers[1].param_groups[0]["fused"] is None
