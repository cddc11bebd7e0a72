"""The EDM process: levels, preconditioning, loss and samples, against closed forms and the float64 reference."""

import numpy as np
import pytest
import reference
import torch as th
from torch import nn

from sb3_qvpo.common.edm import ElucidatedDiffusion
from sb3_qvpo.common.networks import ContinuousTimePredictor

SD = 0.5


def ideal(data_std):
    """The network whose estimate of Gaussian data of a deviation is the posterior mean, whatever sd is."""

    def network(scaled, time, cond):
        sigma = (4 * time).exp().unsqueeze(-1)
        x = scaled * (sigma**2 + SD**2).sqrt()
        mean = data_std**2 / (data_std**2 + sigma**2) * x
        skip, out = SD**2 / (sigma**2 + SD**2), sigma * SD / (sigma**2 + SD**2).sqrt()
        return (mean - skip * x) / out

    return network


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_levels_are_those_of_the_cut_distribution(sigma_data):
    diffusion = ElucidatedDiffusion(0.01, 30.0, sigma_data)
    u = np.array([0.0, 1e-4, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24])
    expected = [reference.edm_level(each, 0.01, 30.0, sigma_data) for each in u]
    np.testing.assert_allclose(diffusion.levels(th.as_tensor(u, dtype=th.float32)), expected, rtol=2e-4)
    drawn = diffusion.draw_timesteps((100_000,), th.device("cpu"))
    assert drawn.min() >= 0.01 and drawn.max() <= 30.001
    assert (drawn < sigma_data).float().mean() == pytest.approx(0.5, abs=0.01), "half of them are below sd"


def test_of_the_papers_levels_both_ends_are_reached():
    diffusion = ElucidatedDiffusion()
    ends = diffusion.levels(th.tensor([0.0, 1.0]))
    np.testing.assert_allclose(ends, [0.002, 80.0], rtol=1e-3)


def test_preconditioning():
    """At sigma = sd all of it is known by heart."""
    skip, out, scale = ElucidatedDiffusion(sigma_data=SD).scalings(th.tensor([SD]))
    np.testing.assert_allclose([skip.item(), out.item(), scale.item()], [0.5, SD / 2**0.5, 1 / (2**0.5 * SD)], rtol=1e-6)


def test_a_network_of_zero_loses_1_on_data_of_deviation_sd(monkeypatch):
    """Where the estimate is not clamped. That is what the preconditioning is for."""
    diffusion = ElucidatedDiffusion(sigma_data=0.1)
    monkeypatch.setattr(th.Tensor, "clamp", lambda self, *_: self)
    x0 = 0.1 * th.randn(200_000, 2, generator=th.Generator().manual_seed(0))
    losses = diffusion.loss(lambda x, t, cond: th.zeros_like(x), x0, None)
    assert losses.mean().item() == pytest.approx(1, abs=0.02)


def test_loss_against_the_reference():
    th.manual_seed(0)
    diffusion = ElucidatedDiffusion(sigma_data=0.7)
    x0, noise, sigma = th.rand(5, 3, 2) * 2 - 1, th.randn(5, 3, 2), diffusion.draw_timesteps((5, 3), th.device("cpu"))

    def network(x, time, cond):
        return (x + time.unsqueeze(-1)).sin() if isinstance(x, th.Tensor) else np.sin(x + time)

    losses = diffusion.loss(network, x0, None, sigma, noise)
    for i, j in np.ndindex(5, 3):
        expected = reference.edm_loss(
            lambda x, time: np.sin(x + time), x0[i, j].double().numpy(), sigma[i, j].item(), noise[i, j].double().numpy(), 0.7
        )
        assert losses[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_reaches_the_action_by_both_ways():
    """By the noised input and as the target: with the derivative of the whole, not of one of them."""
    diffusion = ElucidatedDiffusion()
    x0 = th.tensor([[0.3]], dtype=th.float64, requires_grad=True)
    sigma, noise = th.tensor([0.4], dtype=th.float64), th.tensor([[0.2]], dtype=th.float64)

    def loss(action):
        return diffusion.loss(lambda x, time, cond: 0.5 * x**2, action, None, sigma, noise).sum()

    (gradient,) = th.autograd.grad(loss(x0), x0)
    with th.no_grad():
        expected = (loss(x0 + 1e-6) - loss(x0 - 1e-6)) / 2e-6
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-6) and abs(gradient.item()) > 1e-3


def test_samples_of_gaussian_data_are_as_wide_as_the_data():
    noise = th.randn(1, 100_000, 1, generator=th.Generator().manual_seed(0))
    for n_steps, tolerance in ((20, 0.25), (200, 0.03)):
        diffusion = ElucidatedDiffusion(sigma_data=SD, n_sampling_steps=n_steps)
        samples = diffusion.sample(ideal(0.1), None, noise)
        assert samples.std().item() == pytest.approx(0.1, rel=tolerance)
    assert ElucidatedDiffusion(n_sampling_steps=1).sampling_levels() == [pytest.approx(80.0)]


def test_the_network_takes_real_times():
    """The same as that of whole steps at the same positions."""
    th.manual_seed(0)
    network = ContinuousTimePredictor(2, 3, [8, 8], time_embedding_dim=4, activation_fn=nn.ReLU)
    x, states, times = th.randn(5, 3, 2), th.randn(5, 3), th.randn(5, 3)
    output = network(x, times, network.condition(states))
    embedded = network.time_mlp(
        th.stack([th.as_tensor(reference.sinusoidal_embedding(t.item(), 4)).float() for t in times.flatten()])
    ).view(5, 3, 4)
    whole = network.first_layer(th.cat([x, embedded, states.unsqueeze(1).expand(-1, 3, -1)], dim=-1))
    np.testing.assert_allclose(output.detach(), network.later_layers(whole).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "message"),
    [((0.0, 80.0, 0.5), "sigma_min"), ((2.0, 1.0, 0.5), "sigma_min"), ((0.002, 80.0, 0.0), "sigma_data")],
)
def test_impossible_levels_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        ElucidatedDiffusion(*levels)


def test_weights_of_other_levels_are_refused():
    diffusion = ElucidatedDiffusion()
    diffusion.check_fixed_state(ElucidatedDiffusion().fixed_state())
    with pytest.raises(RuntimeError, match="sigma_data"):
        diffusion.check_fixed_state(ElucidatedDiffusion(sigma_data=0.4).fixed_state())
