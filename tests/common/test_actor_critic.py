"""The actor's loss against the float64 reference, actors alone, and critics of other sizes."""

import numpy as np
import pytest
import reference
import torch as th
from helpers import SMALL_MODELS, TOLERANCE, actor_to_numpy, changed_names, random_policy, same_weights, tiny_qvpo, weights_of

from sb3_qvpo.common.noise_schedules import make_betas


@pytest.mark.parametrize("seed", range(6))
def test_weighted_variational_loss(seed):
    """Eq. 6 plus Eq. 10 for given timesteps and noise, with the gradients of every parameter."""
    policy, observation, noise = random_policy(seed)
    b, k, a = noise.shape[1:]
    actions, denoising_noise, action_weights = th.rand(b, k, a) * 2 - 1, th.randn(b, k, a), th.rand(b, k)
    t = th.randint(policy.n_diffusion_steps, (b, k))
    losses = policy.actor.denoising_loss(observation, actions, t, denoising_noise)
    assert losses.shape == (b, k)
    loss = (losses * action_weights).sum(dim=1).mean()
    loss.backward()
    double = [tensor.numpy().astype(np.float64) for tensor in (observation, actions, action_weights)]
    expected, _, gradients = reference.weighted_loss(
        actor_to_numpy(policy.actor),
        *double,
        t.numpy(),
        denoising_noise.numpy().astype(np.float64),
        make_betas("cosine", policy.n_diffusion_steps).numpy(),
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    predictor = policy.actor.noise_predictor
    parameters = {
        "time": list(predictor.time_mlp.parameters()),
        "main": [*predictor.first_layer.parameters(), *predictor.later_layers.parameters()],
    }
    for part, expected_gradients in gradients.items():
        for parameter, gradient in zip(parameters[part], reference.flatten(expected_gradients), strict=True):
            np.testing.assert_allclose(parameter.grad, gradient, **TOLERANCE)


def test_loss_draws_timesteps_and_noise_when_not_given():
    policy, observation, _ = random_policy(5)
    actions = th.rand(len(observation), 400, policy.actor.action_dim) * 2 - 1
    seen = []
    original = policy.actor.noise_predictor.first_output

    def spy(x_t, t, cond):
        seen.append(t)
        return original(x_t, t, cond)

    policy.actor.noise_predictor.first_output = spy
    first, second = (policy.actor.denoising_loss(observation, actions) for _ in range(2))
    assert not th.equal(first, second)
    assert seen[0].unique().tolist() == list(range(policy.n_diffusion_steps))  # uniform over 0 ... T-1, nothing beyond


def test_the_actor_alone_is_a_policy():
    model = tiny_qvpo()
    action, _ = model.actor.predict(np.zeros(3, np.float32))
    assert model.action_space.contains(action)
    assert model.policy(th.zeros(2, 3)).shape == (2, 1)


def test_the_actor_is_saved_and_loaded_alone(tmp_path):
    model = tiny_qvpo()
    model.actor.save(tmp_path / "actor")
    loaded = type(model.actor).load(tmp_path / "actor")
    obs = th.zeros(4, 3)
    draws = []
    for actor in (model.actor, loaded):
        th.manual_seed(1)
        draws.append(actor(obs))
    assert th.equal(*draws)


def test_a_cnn_actor_is_saved_and_loaded_alone(tmp_path):
    model = SMALL_MODELS["image"](buffer_size=20)
    model.actor.save(tmp_path / "actor")
    loaded = type(model.actor).load(tmp_path / "actor", device="cpu")
    assert same_weights(model.actor.state_dict(), loaded.state_dict())
    obs, draws = model.observation_space.sample(), []
    for actor in (model.actor, loaded):
        th.manual_seed(1)
        draws.append(actor.predict(obs)[0])
    np.testing.assert_array_equal(*draws)


def test_one_critic_is_enough():
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], n_critics=1)).learn(6)
    assert len(model.critic.q_networks) == 1
    before = weights_of(model)
    model.train(1, batch_size=8)
    assert {name for name in before if name.startswith("critic.")} <= changed_names(before, weights_of(model))


def test_no_hidden_layers():
    """``net_arch=[]``: a linear critic of state and action, and it trains."""
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[])).learn(6)
    layers = [layer for layer in model.critic.q_networks[0] if isinstance(layer, th.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(4, 1)]
    before = weights_of(model)
    model.train(1, batch_size=8)
    assert {"actor", "critic"} <= {name.split(".")[0] for name in changed_names(before, weights_of(model))}
