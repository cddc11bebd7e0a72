"""Cases whose answer is known on paper."""

import math

import numpy as np
import pytest
import reference
import torch as th
from helpers import BanditEnv, tiny_qvpo

from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.noise_schedules import make_betas

MEAN, STD = 0.4, 0.5
SCHEDULES = ["cosine", "vp", "linear"]


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
    samples = diffusion.sample(OptimalPredictor(betas), None, shape=(n, 1)).double()
    mean, variance = exact_mean_and_variance(betas.numpy())
    five_sigma_mean, five_sigma_variance = 5 * math.sqrt(variance / n), 5 * variance * math.sqrt(2 / n)
    assert samples.mean().item() == pytest.approx(mean, abs=five_sigma_mean)
    assert samples.var().item() == pytest.approx(variance, abs=five_sigma_variance + 1e-6)
    # Wrong options must not pass: beta instead of its posterior form (as some implementations have it), or clipping
    if n_steps > 1:
        _, wrong_variance = exact_mean_and_variance(betas.numpy(), posterior_variance=False)
        assert abs(samples.var().item() - wrong_variance) > five_sigma_variance
    if n_steps >= 20:
        clipped = GaussianDiffusion(betas).sample(OptimalPredictor(betas), None, shape=(n, 1))
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
    samples = diffusion.sample(OptimalPredictor(betas), None, shape=(100_000, 1)).double()
    assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 100_000))
    assert samples.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 100_000))


@pytest.mark.parametrize(("schedule", "variance_at_20"), [("cosine", 0.187), ("vp", 0.172), ("linear", 0.153)])
def test_chain_approaches_the_data_with_more_steps(schedule, variance_at_20):
    """Variance of the result; the data's is 0.25. Few steps are too narrow, by what the posterior form leaves out."""
    variances = {n: exact_mean_and_variance(make_betas(schedule, n).numpy())[1] for n in (5, 20, 100, 1000)}
    assert variances[20] == pytest.approx(variance_at_20, abs=1e-3)
    for n_steps in (20, 1000):
        betas = make_betas(schedule, n_steps)
        samples = GaussianDiffusion(betas, clip_denoised=False).sample(OptimalPredictor(betas), None, shape=(20_000, 1))
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


# A bandit with two peaks: what the weights and the entropy term do to a policy that starts with both

PEAKS, WIDTH = (-0.6, 0.6), 0.2


def reward(action, left=0.7):
    """Two peaks, the right one of height 1."""
    return left * np.exp(-(((action[0] - PEAKS[0]) / WIDTH) ** 2)) + np.exp(-(((action[0] - PEAKS[1]) / WIDTH) ** 2))


def modes(model):
    """Fractions of single samples near the left and the right peak, and elsewhere."""
    with th.no_grad():
        samples = model.actor.sample_candidates(th.zeros(1, 2), 4000).flatten()
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
    for _ in range(4000):
        actions = th.tensor(PEAKS)[th.randint(2, (256, 1, 1))] + 0.05 * th.randn(256, 1, 1)
        model._optimize(model.actor.optimizer, "actor_loss", model.actor.denoising_loss(th.zeros(256, 2), actions).mean())
    for _ in range(2000):
        batch = model.replay_buffer.sample(128)
        loss, _ = model._critic_loss(batch, model._draw_chain_noise(128, 1))
        model._optimize(model.critic.optimizer, "critic_loss", loss)
    model.actor_target.load_state_dict(model.actor.state_dict())
    return model


def improved(model, tmp_path, n_updates=200, **settings):
    """A copy of the model after updates with other settings."""
    model.save(tmp_path / "two_modes")
    copy = type(model).load(tmp_path / "two_modes", env=model.get_env(), learning_rate=1e-3, **settings)
    copy.replay_buffer = model.replay_buffer
    copy.set_logger(model.logger)
    th.manual_seed(1)
    copy.train(n_updates, batch_size=128)
    return copy


def test_plain_denoising_keeps_both_modes(two_mode_model):
    """Measured: 0.45 left, 0.49 right, 0.06 elsewhere."""
    left, right, elsewhere = modes(two_mode_model)
    assert 0.4 < left < 0.6 and 0.4 < right < 0.6 and elsewhere < 0.1


def test_qadv_concentrates_on_the_better_peak(two_mode_model, tmp_path):
    """Measured: 0.00 left, 0.99 right, 0.01 elsewhere."""
    left, right, _ = modes(improved(two_mode_model, tmp_path, ent_coef=0.0))
    assert right > 0.9 and left < 0.05


def test_a_larger_ent_coef_spreads_the_policy(two_mode_model, tmp_path):
    """
    Measured (left, right, elsewhere): (0.00, 0.99, 0.01) at 0, (0.03, 0.95, 0.03) at 0.01, (0.12, 0.67, 0.22) at 0.1,
    (0.24, 0.42, 0.35) at 0.5, where a uniform policy would have (0.25, 0.25, 0.5).
    """
    fractions = [modes(improved(two_mode_model, tmp_path, ent_coef=ent_coef)) for ent_coef in (0.0, 0.1, 0.5)]
    left, right, elsewhere = zip(*fractions, strict=True)
    assert elsewhere[0] < 0.05 < elsewhere[1] < elsewhere[2]
    assert left[0] < 0.05 < left[1] < left[2]
    assert right[0] > right[1] > right[2] > left[2]  # even then the better peak stays ahead
