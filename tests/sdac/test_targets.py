"""What SDAC's regression aims at: draws around a noisy action, their weights, and closed forms of their mean."""

import math

import numpy as np
import pytest
import reference
import torch as th

from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.noise_schedules import make_betas
from sb3_qvpo.sdac.targets import (
    boltzmann_weights,
    divergence,
    log_importance,
    log_truncated_density,
    mixed_actions,
    posterior_mean,
    total_noise_level,
    truncated_actions,
    unbounded_actions,
    with_its_noise,
)
from sb3_qvpo.sdac.temperature import official_temperature


def levels(bar):
    bars = th.as_tensor(bar, dtype=th.float64).view(-1, 1, 1)
    return bars.sqrt(), (1 - bars).sqrt()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("bar", [1 - 1e-3, 0.6374, 0.1094, 5.27e-6])
def test_truncated_draws_follow_the_cut_distribution(bar, dtype):
    """Against bisection, from the middle of the box to six deviations beyond it."""
    signal, noise_level = levels(bar)
    actions = th.tensor([-1.0, -0.3, 0.0, 1.0], dtype=th.float64).view(-1, 1, 1)
    noisy = signal * actions + noise_level * th.tensor([-6.0, 0.5, 0.0, 6.0], dtype=th.float64).view(-1, 1, 1)
    uniforms = th.tensor([0.001, 0.3, 0.5, 0.9, 0.999], dtype=th.float64).view(1, -1, 1).expand(4, -1, 1)
    drawn = truncated_actions(*(value.to(dtype) for value in (noisy, signal, noise_level, uniforms)))
    assert drawn.dtype == dtype and drawn.shape == (4, 5, 1)
    mean, std = noisy / signal, noise_level / signal
    for b in range(4):
        for m, u in enumerate(uniforms[0, :, 0].tolist()):
            expected = reference.truncated_normal(mean[b].item(), std.item(), u)
            assert drawn[b, m].item() == pytest.approx(expected, abs=2e-3 if dtype == th.float32 else 1e-6), (b, u)


def test_truncated_draws_stay_in_the_box_wherever_the_noisy_action_is():
    noisy = th.linspace(-100, 100, 401).view(-1, 1, 1)
    uniforms = th.tensor([0.0, 0.5, 1 - 1e-7]).view(1, 3, 1).expand(401, 3, 1)
    drawn = truncated_actions(noisy, th.tensor(0.99), th.tensor(0.1), uniforms)
    assert drawn.isfinite().all() and drawn.abs().max() == 1
    th.testing.assert_close(drawn[:150], -th.ones(150, 3, 1))  # far outside all mass is at the near edge
    th.testing.assert_close(drawn[-150:], th.ones(150, 3, 1))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("bar", [1 - 1e-3, 0.6374, 0.1094, 5.27e-6])
def test_density_of_truncated_draws(bar, dtype):
    """Against the error function, from the middle of the box to six deviations beyond it."""
    signal, noise_level = levels(bar)
    actions = th.tensor([-1.0, -0.3, 0.0, 1.0], dtype=th.float64).view(-1, 1, 1)
    means = (actions * signal + noise_level * th.tensor([-6.0, 0.5, 0.0, 6.0], dtype=th.float64).view(-1, 1, 1)) / signal
    std = noise_level / signal
    near = (actions + std * th.tensor([-2.0, 0.0, 1.0], dtype=th.float64).view(1, -1, 1)).clamp(-1, 1)
    densities = log_truncated_density(*(value.to(dtype) for value in (near, means, std)))
    assert densities.dtype == dtype and densities.shape == (4, 3)
    expected = [[reference.log_truncated_density(a, mean.item(), std.item()) for a in row] for row, mean in
                zip(near[..., 0].tolist(), means, strict=True)]  # fmt: skip
    np.testing.assert_allclose(densities, expected, rtol=0, atol=2e-2 if dtype == th.float32 else 1e-7)


def test_density_of_truncated_draws_integrates_to_one_and_is_finite_far_outside():
    points = ((th.arange(20_000, dtype=th.float64) + 0.5) / 10_000 - 1).view(1, -1, 1)
    for mean, std in ((0.3, 0.2), (-4.0, 1.5), (0.0, 400.0), (1.2, 0.01)):
        centre, width = (th.full((1, 1, 1), value, dtype=th.float64) for value in (mean, std))
        density = log_truncated_density(points, centre, width).exp()
        assert density.sum().item() / 10_000 == pytest.approx(1, rel=5e-3), (mean, std)
    far = log_truncated_density(th.zeros(3, 1, 2), th.tensor([-500.0, 0.0, 500.0]).view(3, 1, 1), th.full((3, 1, 1), 0.05))
    assert far.isfinite().all() and far[0] == far[2] < far[1]
    several = log_truncated_density(th.tensor([[[0.1, -0.4]]]), th.tensor([[[0.0, 0.2]]]), th.ones(1, 1, 1))
    apart = [reference.log_truncated_density(a, mean, 1.0) for a, mean in ((0.1, 0.0), (-0.4, 0.2))]
    assert several.item() == pytest.approx(sum(apart), abs=1e-5), "dimensions are independent"


def test_how_much_draws_of_a_mixture_count():
    wanted, other = th.tensor([[0.0, -1.0, -5000.0, 3.0]]), th.tensor([[0.0, 1.0, 0.0, -5000.0]])
    ratios = log_importance(wanted, other, 0.25)
    by_hand = [0.0, -math.log(0.75 + 0.25 * math.exp(2)), math.log(4) - 5000, -math.log(0.75)]
    np.testing.assert_allclose(ratios, [by_hand], rtol=1e-5, atol=1e-6)


QUADRATIC = [(0.6374, 0.4, 0.1851516354, 0.256748521, 0.018677), (0.1094, -0.7, -0.8216606203, -0.803395254, -0.859963)]
"""bar alpha, x, and the posterior mean of the noise for Q = -(a - 0.3)^2, temperature 0.5: without a box, cut, clipped."""


@pytest.mark.parametrize(("bar", "x", "free", "truncated", "clipped"), QUADRATIC)
def test_posterior_mean_of_a_quadratic_value(bar, x, free, truncated, clipped):
    """Closed form without a box; quadrature in the box. Draws at equidistant probabilities make the sums integrals."""
    n_draws = 400_001
    uniforms = ((th.arange(n_draws, dtype=th.float64) + 0.5) / n_draws).view(1, -1, 1)
    signal, noise_level = levels(bar)
    noisy = th.full((1, 1, 1), x, dtype=th.float64)

    def q_value(a):
        return -((a - 0.3) ** 2)

    def mean_noise(clean, valued):
        mean = posterior_mean(clean, boltzmann_weights(q_value(valued).squeeze(-1), 0.5))
        return ((noisy - signal * mean) / noise_level).item()

    in_box = truncated_actions(noisy, signal, noise_level, uniforms)
    around = unbounded_actions(noisy, signal, noise_level, th.special.ndtri(uniforms))
    variance = 0.25  # temperature / curvature
    closed_form = math.sqrt(1 - bar) * (x - math.sqrt(bar) * 0.3) / (bar * variance + 1 - bar)
    assert closed_form == pytest.approx(free, abs=1e-9)
    assert mean_noise(around, around) == pytest.approx(free, abs=1e-4)
    assert mean_noise(in_box, in_box) == pytest.approx(truncated, abs=1e-5)
    assert mean_noise(around, around.clamp(-1, 1)) == pytest.approx(clipped, abs=1e-4)
    on_grid = reference.posterior_mean_on_a_grid(x, bar, q_value, 0.5)
    assert (x - math.sqrt(bar) * on_grid) / math.sqrt(1 - bar) == pytest.approx(truncated, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 1.0])
@pytest.mark.parametrize(("bar", "x"), [(0.6374, 0.4), (0.1094, -0.7), (0.9999, 1.02), (1e-4, 0.5)])
def test_actions_learnt_with_noise(bar, x, sigma):
    """Closed form without a box: two variances add up. In the box quadrature over the blurred density."""
    n_draws = 400_001
    uniforms = ((th.arange(n_draws, dtype=th.float64) + 0.5) / n_draws).view(1, -1, 1)
    signal, noise_level = levels(bar)
    noisy, distance = th.full((1, 1, 1), x, dtype=th.float64), total_noise_level(signal, noise_level, sigma)

    def mean(clean):
        weights = boltzmann_weights(-((clean - 0.3) ** 2).squeeze(-1), 0.5)
        return with_its_noise(posterior_mean(clean, weights), noisy / signal, signal * sigma / distance).item()

    variance = 0.25 + sigma**2
    closed_form = (0.3 * (1 - bar) + math.sqrt(bar) * x * variance) / (1 - bar + bar * variance)
    assert mean(unbounded_actions(noisy, signal, distance, th.special.ndtri(uniforms))) == pytest.approx(closed_form, abs=2e-4)

    clean = np.linspace(-1, 1, 2001)
    learnt = np.linspace(-1 - 5 * sigma, 1 + 5 * sigma, 4001)
    blurred = np.exp(-2 * (clean - 0.3) ** 2 - (learnt[:, None] - clean) ** 2 / (2 * sigma**2)).mean(axis=1)
    density = blurred * np.exp(-((x - math.sqrt(bar) * learnt) ** 2) / (2 * (1 - bar)))
    by_quadrature = (density * learnt).sum() / density.sum()
    assert mean(truncated_actions(noisy, signal, distance, uniforms)) == pytest.approx(by_quadrature, abs=1e-3)


def test_without_noise_nothing_is_added():
    signal, noise_level = levels(0.3)
    assert total_noise_level(signal, noise_level, 0.0) == noise_level
    assert total_noise_level(signal.float(), noise_level.float(), 1e30).isfinite()
    assert with_its_noise(th.tensor(0.4), th.tensor(9.0), th.tensor(0.0)) == 0.4


@pytest.mark.parametrize("improved", [0.3, -0.8])
@pytest.mark.parametrize(("bar", "x", "free", "truncated", "clipped"), QUADRATIC)
def test_draws_elsewhere_leave_the_posterior_mean_as_it_is(bar, x, free, truncated, clipped, improved):
    """A third of the draws around another action, good or bad: the same integral."""
    n_draws, n_improved = 300_000, 100_000
    uniforms = [((th.arange(n, dtype=th.float64) + 0.5) / n).view(1, -1, 1) for n in (n_improved, n_draws - n_improved)]
    signal, noise_level = levels(bar)
    noisy, around = (th.full((1, 1, 1), value, dtype=th.float64) for value in (x, improved))
    clean, log_ratios = mixed_actions(noisy, signal, noise_level, around, 0.3, th.cat(uniforms, dim=1), n_improved)
    q_values = -((clean - 0.3) ** 2).squeeze(-1)
    weights = boltzmann_weights(q_values, 0.5, log_ratios)
    assert ((noisy - signal * posterior_mean(clean, weights)) / noise_level).item() == pytest.approx(truncated, abs=1e-4)
    biased = posterior_mean(clean, boltzmann_weights(q_values, 0.5))
    assert abs(((noisy - signal * biased) / noise_level).item() - truncated) > 5e-3, "without the ratios it is another"


@pytest.mark.parametrize("improved_std", [0.001, 10.0])
@pytest.mark.parametrize("bar", [1 - 4e-5, 0.6, 1e-4])
def test_draws_as_narrow_or_wide_as_allowed_leave_it_too(bar, improved_std):
    """In float32, at the least and the most noise, around an action far from the noisy one and on the edge of the box."""
    n_draws = 200_000
    uniforms = ((th.arange(n_draws) + 0.5) / n_draws).view(1, -1, 1)
    signal, noise_level = (level.float() for level in levels(bar))
    noisy = 0.2 * signal.view(1, 1, 1)
    mean = posterior_mean(*_weighted(truncated_actions(noisy, signal, noise_level, uniforms), 0.0))
    for around in (-0.7, 1.0):
        both = th.cat([uniforms, uniforms], dim=1)
        clean, log_ratios = mixed_actions(noisy, signal, noise_level, th.full((1, 1, 1), around), improved_std, both, n_draws)
        assert log_ratios.isfinite().logical_or(log_ratios == -math.inf).all()
        th.testing.assert_close(posterior_mean(*_weighted(clean, log_ratios)), mean, atol=2e-3, rtol=0)


def _weighted(clean, log_ratios):
    """Actions and their weights at values of ``-(a - 0.3)^2`` and a temperature of a half."""
    return clean, boltzmann_weights(-((clean - 0.3) ** 2).squeeze(-1), 0.5, log_ratios)


def test_clipping_pulls_to_the_corners_at_high_noise():
    """Its limit at t = T and x = 0 is ``-sqrt(2 / pi) tanh((Q(1) - Q(-1)) / (2 temperature))``; that of the cut draws is 0."""
    n_draws = 400_001
    normals = th.special.ndtri(((th.arange(n_draws, dtype=th.float64) + 0.5) / n_draws).view(1, -1, 1))
    signal, noise_level = levels(1e-8)
    noisy = th.zeros((1, 1, 1), dtype=th.float64)
    clean = unbounded_actions(noisy, signal, noise_level, normals)
    weights = boltzmann_weights(-((clean.clamp(-1, 1) - 0.3) ** 2).squeeze(-1), 0.5)
    noise = ((noisy - signal * posterior_mean(clean, weights)) / noise_level).item()
    assert noise == pytest.approx(-math.sqrt(2 / math.pi) * math.tanh((-0.49 + 1.69) / 1), abs=1e-3)
    clean = truncated_actions(noisy, signal, noise_level, th.special.ndtr(normals))
    weights = boltzmann_weights(-((clean - 0.3) ** 2).squeeze(-1), 0.5)
    assert ((noisy - signal * posterior_mean(clean, weights)) / noise_level).item() == pytest.approx(0, abs=1e-3)


def test_the_unlikeliest_uniform_numbers_stay_near_the_noisy_action():
    """0 is drawn once in some millions, and is no end of the box."""
    for x in (0.3, -0.3):
        drawn = truncated_actions(
            th.full((1, 1, 1), x), th.tensor(1 - 4e-5), th.tensor(0.009), th.tensor([[[0.0], [1 - 2**-24]]])
        )
        assert (drawn - x).abs().max() < 0.06


def test_the_minimiser_is_a_sampler_of_the_boltzmann_policy():
    """The exact predictor for two equal peaks, run through a whole chain: half of the samples at each peak."""
    betas = make_betas("cosine", 50)
    diffusion = GaussianDiffusion(betas).double()
    grid = th.linspace(-1, 1, 401, dtype=th.float64)
    q_values = th.maximum(-((grid - 0.6) ** 2), -((grid + 0.6) ** 2)) / 0.02

    def exact(x_t, t, cond):
        bar = reference.alpha_bar(betas.numpy(), t)
        exponents = q_values - (x_t - math.sqrt(bar) * grid) ** 2 / (2 * (1 - bar))
        mean = (exponents.softmax(dim=-1) * grid).sum(dim=-1, keepdim=True)
        return (x_t - math.sqrt(bar) * mean) / math.sqrt(1 - bar)

    noise = th.randn((50, 4000, 1), dtype=th.float64, generator=th.Generator().manual_seed(0))
    samples = diffusion.sample(exact, None, noise)
    assert (samples > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert samples.abs().mean().item() == pytest.approx(0.6, abs=0.01)
    assert 0.05 < (samples.abs() - 0.6).std().item() < 0.105  # deviation 0.1, narrowed a little by the chain


def test_weights_and_their_divergence():
    values = th.tensor([[0.0, 0.3, -0.2], [5.0, 5.0, 5.0]], dtype=th.float64)
    weights = boltzmann_weights(values, 0.5)
    for row, expected in zip(weights, values, strict=True):
        np.testing.assert_allclose(row, reference.softmax(expected.tolist(), 0.5), rtol=1e-12)
    th.testing.assert_close(weights, boltzmann_weights(values + 7, 0.5))
    assert divergence(weights[1:]).item() == pytest.approx(0, abs=1e-12)
    assert divergence(th.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(math.log(3))
    by_hand = sum(w * math.log(3 * w) for w in weights[0].tolist())
    assert divergence(weights[:1]).item() == pytest.approx(by_hand)


def test_the_schedule_of_the_authors_code():
    """Their alpha after update 0, 25 000, 50 000, 100 000 and 150 000, and its limit."""
    seen = [official_temperature(n + 1) for n in (0, 25_000, 50_000, 100_000, 150_000)]
    assert seen == pytest.approx([4.9651, 2.6169, 1.6471, 1.0737, 0.9910], abs=5e-5)
    assert official_temperature(2_000_000) == pytest.approx(10 * math.exp(-0.9) / math.sqrt(2 * math.pi * math.e), abs=1e-4)
    assert official_temperature(250) == official_temperature(1) > official_temperature(251)
