"""Noising, reverse chains and losses against the float64 reference, and against results that are known on paper."""

import math
import re

import numpy as np
import pytest
import reference
import torch as th
from helpers import TOLERANCE, random_sizes

from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.noise_schedules import make_betas

SCHEDULES = ["cosine", "vp", "linear"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(4))
def test_forward_noising(schedule, seed):
    b, k, a, _, n_steps, _ = random_sizes(seed)
    actions, noise, t = th.rand(b, k, a) * 2 - 1, th.randn(b, k, a), th.randint(n_steps, (b, k))
    betas = make_betas(schedule, n_steps)
    noisy = GaussianDiffusion(betas).add_noise(actions, t, noise)
    for i in range(b):
        for j in range(k):
            expected = reference.add_noise(actions[i, j].numpy(), int(t[i, j]), noise[i, j].numpy(), betas.numpy())
            np.testing.assert_allclose(noisy[i, j], expected, **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n_steps", "n_sampling_steps"), [(20, 5), (20, 19), (20, 20), (20, 2), (20, 1), (1, 1), (7, 3)])
def test_fewer_and_less_noisy_steps(n_steps, n_sampling_steps, eta):
    betas = make_betas("cosine", n_steps)
    diffusion = GaussianDiffusion(betas, n_sampling_steps=n_sampling_steps, sampling_eta=eta)
    seen = []

    def network(x_t, t, cond):
        seen.append(t)
        return th.sin(3 * x_t + t)

    noise = th.randn(diffusion.n_noises, 6, 2)
    samples = diffusion.sample(network, None, noise)
    steps = seen[::-1]
    assert len(steps) == n_sampling_steps and steps[-1] == n_steps - 1 and sorted(set(steps)) == steps
    assert n_sampling_steps == 1 or steps[0] == 0
    assert max(np.diff(steps), default=0) - min(np.diff(steps), default=0) <= 1  # evenly spaced
    assert diffusion.n_noises == (n_sampling_steps if eta > 0 else 1)
    for i in range(6):
        draws = noise[:, i].numpy().astype(np.float64)
        expected = reference.respaced_chain(lambda x, t: np.sin(3 * x + t), draws, betas.numpy(), steps, eta)
        np.testing.assert_allclose(samples[i], expected, **TOLERANCE)
        if eta == 1 and n_sampling_steps == n_steps:  # two ways to the same chain
            posterior_form = reference.reverse_chain(lambda x, t: np.sin(3 * x + t), draws, betas.numpy())
            np.testing.assert_allclose(expected, posterior_form, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "karras"])
@pytest.mark.parametrize(("n_steps", "n_sampling_steps"), [(20, 5), (20, 20), (20, 2), (20, 1), (1, 1), (5, 5)])
def test_second_order_solver(schedule, n_steps, n_sampling_steps):
    betas = make_betas(schedule, n_steps)
    diffusion = GaussianDiffusion(betas, n_sampling_steps=n_sampling_steps, sampler="dpm++")
    assert diffusion.n_noises == 1
    noise = th.randn(1, 6, 2)
    samples = diffusion.sample(lambda x_t, t, cond: th.sin(3 * x_t + t), None, noise)
    steps, differences = diffusion.sampling_steps, []
    for i in range(6):
        draws = noise[:, i].numpy().astype(np.float64)
        expected = reference.solver_chain(lambda x, t: np.sin(3 * x + t), draws[0], betas.numpy(), steps)
        np.testing.assert_allclose(samples[i], expected, **TOLERANCE)
        first_order = reference.respaced_chain(lambda x, t: np.sin(3 * x + t), draws, betas.numpy(), steps, 0.0)
        differences.append(np.abs(expected - first_order).max())
    # Two steps are of first order anyway: one has no step before it, the other ends without noise
    assert (max(differences) > 1e-2) == (n_sampling_steps > 2)


def test_ddim_has_a_name_of_its_own():
    noise, network = th.randn(1, 3, 2), lambda x_t, t, cond: th.sin(x_t + t)
    by_eta = GaussianDiffusion(make_betas("cosine", 6), sampling_eta=0.0).sample(network, None, noise)
    assert th.equal(GaussianDiffusion(make_betas("cosine", 6), sampler="ddim").sample(network, None, noise), by_eta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sampler="euler"), "sampler must be one of 'ddpm', 'ddim', 'dpm"),
        (dict(prediction="x0"), "prediction must be one of 'noise', 'v', got 'x0'"),
        (dict(sampler="dpm++", sampling_eta=0.5), "sampling_eta belongs to sampler='ddpm'"),
    ],
)
def test_unknown_options(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianDiffusion(make_betas("cosine", 4), **arguments)


@pytest.mark.parametrize("schedule", ["cosine", "karras"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_v_prediction(schedule, sampler):
    """A network of v and one of the noise that say the same give the same samples and, up to a factor, the same loss."""
    betas = make_betas(schedule, 6)
    by_noise = GaussianDiffusion(betas, sampler=sampler)
    by_v = GaussianDiffusion(betas, prediction="v", sampler=sampler)
    actions, noise, t = th.rand(3, 5, 2) * 2 - 1, th.randn(3, 5, 2), th.randint(6, (3, 5))
    targets = by_v.velocity(actions, t, noise)
    guesses = th.randn(3, 5, 2)
    losses = by_v.loss(lambda x_t, t, cond: guesses, actions, None, t, noise)
    for i in range(3):
        for j in range(5):
            a, z, step = (each[i, j].numpy().astype(np.float64) for each in (actions, noise, t))
            v = reference.velocity(a, int(step), z, betas.numpy())
            np.testing.assert_allclose(targets[i, j], v, **TOLERANCE)
            assert losses[i, j].item() == pytest.approx(np.mean((v - guesses[i, j].numpy()) ** 2), rel=1e-4)
            x_t = reference.add_noise(a, int(step), z, betas.numpy())
            np.testing.assert_allclose(reference.noise_of_velocity(x_t, int(step), v, betas.numpy()), z, atol=1e-9)

    def v_network(x_t, t, cond):
        return th.sin(2 * x_t + t)

    def noise_network(x_t, t, cond):
        bar = reference.alpha_bar(betas.numpy(), t)
        return math.sqrt(1 - bar) * x_t + math.sqrt(bar) * v_network(x_t, t, cond)

    draws = th.randn(by_v.n_noises, 4, 2)
    expected = by_noise.sample(noise_network, None, draws)
    th.testing.assert_close(by_v.sample(v_network, None, draws), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "n_steps", "n_sampling_steps", "sampler", "share"),
    [
        ("cosine", 20, 5, "ddpm", 0.52),
        ("cosine", 20, 20, "ddpm", 0.64),
        ("cosine", 20, 5, "dpm++", 0.64),
        ("karras", 5, 5, "ddpm", 0.57),
        ("karras", 5, 5, "dpm++", 0.97),
    ],
)
def test_how_much_a_sampler_narrows_what_was_learnt(schedule, n_steps, n_sampling_steps, sampler, share):
    """
    Width of samples over width of the data, for Gaussian actions of deviation 0.1 and the exact predictor. Every step is
    linear then, so the width follows from the slope of the chain: of its mean for the start, of each draw for the rest.
    """
    betas = make_betas(schedule, n_steps)
    diffusion = GaussianDiffusion(
        betas, clip_denoised=False, n_sampling_steps=n_sampling_steps, sampler=sampler, prediction="v"
    ).double()

    def exact(x_t, t, cond):
        bar = reference.alpha_bar(betas.numpy(), t)
        gain = math.sqrt(bar) * 0.1**2 / (bar * 0.1**2 + 1 - bar)  # E[x_0 | x_t] = gain x_t, for data of mean 0
        return (math.sqrt(bar) - gain) / math.sqrt(1 - bar) * x_t  # of v = (sqrt(bar) x_t - x_0) / sqrt(1 - bar)

    slopes = diffusion.sample(exact, None, th.eye(diffusion.n_noises, dtype=th.float64).unsqueeze(-1))
    assert float((slopes**2).sum().sqrt()) / 0.1 == pytest.approx(share, abs=5e-3)


def test_sampling_rejects_unclear_noise():
    diffusion = GaussianDiffusion(make_betas("cosine", 4))
    network = lambda x_t, t, cond: th.zeros_like(x_t)  # noqa: E731
    assert diffusion.sample(network, None, th.zeros(4, 2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="4 entries"):
        diffusion.sample(network, None, th.zeros(3, 2, 3))


# Actions from a normal distribution, whose best noise predictor is known

MEAN, STD = 0.4, 0.5


class OptimalPredictor:
    """
    For actions from N(MEAN, STD^2) the best noise predictor is linear:
    ``E[epsilon | x_t] = sqrt(1 - bar) (x_t - sqrt(bar) MEAN) / (bar STD^2 + 1 - bar)``.
    """

    def __init__(self, betas):
        bars = th.tensor([reference.alpha_bar(betas.numpy(), t) for t in range(len(betas))])
        self.signal, self.noise = bars.sqrt(), (1 - bars).sqrt()
        self.variance = bars * STD**2 + 1 - bars

    def __call__(self, x_t, t, cond):
        t = th.full(x_t.shape[:-1], t) if isinstance(t, int) else t
        scale, shift = self.noise[t] / self.variance[t], self.signal[t] * MEAN
        return scale.unsqueeze(-1) * (x_t - shift.unsqueeze(-1))


def sampled(diffusion, network, *shape):
    """Samples of some shape, from noise that is drawn for them."""
    return diffusion.sample(network, None, th.randn(diffusion.n_noises, *shape))


def exact_mean_and_variance(betas, posterior_variance=True):
    """The chain with the optimal predictor is linear, so its mean and variance follow from a recursion over the steps."""
    mean, variance = 0.0, 1.0
    for t in range(len(betas) - 1, -1, -1):
        bar, before = reference.alpha_bar(betas, t), reference.alpha_bar(betas, t - 1)
        c1 = math.sqrt(before) * betas[t] / (1 - bar)
        c2 = math.sqrt(1 - betas[t]) * (1 - before) / (1 - bar)
        gain = math.sqrt(bar) * STD**2 / (bar * STD**2 + 1 - bar)  # of E[x_0 | x_t] = MEAN + gain (x_t - sqrt(bar) MEAN)
        step_variance = (1 - before) / (1 - bar) * betas[t] if posterior_variance else betas[t] * (t > 0)
        mean = c1 * (MEAN + gain * (mean - math.sqrt(bar) * MEAN)) + c2 * mean
        variance = (c1 * gain + c2) ** 2 * variance + step_variance
    return mean, variance


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20, 100])
def test_chain_returns_the_known_mean_and_variance(schedule, n_steps):
    betas = make_betas(schedule, n_steps)
    n = 100_000
    diffusion = GaussianDiffusion(betas, clip_denoised=False)
    samples = sampled(diffusion, OptimalPredictor(betas), n, 1).double()
    mean, variance = exact_mean_and_variance(betas.numpy())
    five_sigma_mean, five_sigma_variance = 5 * math.sqrt(variance / n), 5 * variance * math.sqrt(2 / n)
    assert samples.mean().item() == pytest.approx(mean, abs=five_sigma_mean)
    assert samples.var().item() == pytest.approx(variance, abs=five_sigma_variance + 1e-6)
    # Wrong options must not pass: beta instead of its posterior form (as some implementations have it), or clipping
    if n_steps > 1:
        _, wrong_variance = exact_mean_and_variance(betas.numpy(), posterior_variance=False)
        assert abs(samples.var().item() - wrong_variance) > five_sigma_variance
    if n_steps >= 20:
        clipped = sampled(GaussianDiffusion(betas), OptimalPredictor(betas), n, 1)
        assert abs(clipped.var().item() - variance) > five_sigma_variance


@pytest.mark.parametrize(
    ("n_steps", "n_sampling_steps", "eta", "known_variance"),
    [
        *((1000, 20, 0.0, 0.2126), (1000, 20, 1.0, 0.1847)),
        *((20, 10, 0.0, 0.1861), (20, 10, 1.0, 0.1501), (20, 5, 0.0, 0.1277), (20, 5, 1.0, 0.0919)),
    ],
)
def test_some_steps_of_a_chain(n_steps, n_sampling_steps, eta, known_variance):
    """
    With the optimal predictor every step is linear, so mean and variance follow from a recursion. Without noise (DDIM) the
    variance is closer to the data's 0.25 than with it.
    """
    betas = make_betas("cosine", n_steps)
    diffusion = GaussianDiffusion(betas, clip_denoised=False, n_sampling_steps=n_sampling_steps, sampling_eta=eta)
    mean, variance, bars = 0.0, 1.0, [reference.alpha_bar(betas.numpy(), t) for t in range(n_steps)]
    steps = diffusion.sampling_steps
    for i in reversed(range(n_sampling_steps)):
        bar, before = bars[steps[i]], bars[steps[i - 1]] if i > 0 else 1.0
        gain = math.sqrt(bar) * STD**2 / (bar * STD**2 + 1 - bar)
        sigma2 = eta**2 * (1 - before) / (1 - bar) * (1 - bar / before)
        c2 = math.sqrt((1 - before - sigma2) / (1 - bar)) if i > 0 else 0.0
        c1 = math.sqrt(before) - c2 * math.sqrt(bar)
        mean = c1 * (MEAN + gain * (mean - math.sqrt(bar) * MEAN)) + c2 * mean
        variance = (c1 * gain + c2) ** 2 * variance + sigma2
    assert variance == pytest.approx(known_variance, abs=1e-4)
    samples = sampled(diffusion, OptimalPredictor(betas), 100_000, 1).double()
    assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 100_000))
    assert samples.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 100_000))


@pytest.mark.parametrize(("schedule", "variance_at_20"), [("cosine", 0.187), ("vp", 0.172), ("linear", 0.153)])
def test_chain_approaches_the_data_with_more_steps(schedule, variance_at_20):
    """Variance of the result; the data's is 0.25. Few steps are too narrow, by what the posterior form leaves out."""
    variances = {n: exact_mean_and_variance(make_betas(schedule, n).numpy())[1] for n in (5, 20, 100, 1000)}
    assert variances[20] == pytest.approx(variance_at_20, abs=1e-3)
    for n_steps in (20, 1000):
        betas = make_betas(schedule, n_steps)
        samples = sampled(GaussianDiffusion(betas, clip_denoised=False), OptimalPredictor(betas), 20_000, 1)
        assert samples.var().item() == pytest.approx(variances[n_steps], rel=5 * math.sqrt(2 / 20_000))
    errors = [STD**2 - variance for variance in variances.values()]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert variances[1000] == pytest.approx(STD**2, rel=0.02)
    mean, _ = exact_mean_and_variance(make_betas(schedule, 20).numpy())
    assert mean == pytest.approx(MEAN, abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_steps", [5, 20])
def test_loss_of_the_optimal_predictor(schedule, n_steps):
    """Its expected loss at step t is Var(epsilon | x_t) = bar STD^2 / (bar STD^2 + 1 - bar); no other slope does better."""
    betas = make_betas(schedule, n_steps)
    predictor, diffusion = OptimalPredictor(betas), GaussianDiffusion(betas)
    n = 400_000
    actions, noise, t = MEAN + STD * th.randn(n, 1), th.randn(n, 1), th.randint(n_steps, (n,))
    losses = diffusion.loss(predictor, actions, None, t, noise)
    assert losses.shape == (n,)
    expected = float(np.mean([1 - float(predictor.noise[s] ** 2 / predictor.variance[s]) for s in range(n_steps)]))
    assert losses.mean().item() == pytest.approx(expected, abs=5 * float(losses.std()) / math.sqrt(n))
    for factor in (0.9, 1.1):
        worse = diffusion.loss(lambda x, t, cond, factor=factor: factor * predictor(x, t, cond), actions, None, t, noise)
        assert worse.mean() > losses.mean()
