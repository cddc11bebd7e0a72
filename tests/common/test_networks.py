"""The noise predictor against the float64 reference, its initialisation, and the mode of networks."""

import math

import numpy as np
import pytest
import reference
import torch as th
from gymnasium import spaces
from helpers import TOLERANCE, actor_to_numpy, random_policy
from torch import nn

from sb3_qvpo import DiffusionPolicy
from sb3_qvpo.common.networks import (
    BatchRenorm1d,
    NoisePredictor,
    RunningNorm,
    evaluation_mode,
    init_linear_layers,
    sinusoidal_embedding,
)


def test_width_of_the_time_network_and_initial_weights():
    """torch starts biases at random; the authors of QVPO start them at 0."""
    sizes = dict(action_dim=2, features_dim=3, n_steps=5, net_arch=[8], time_embedding_dim=4)
    plain = NoisePredictor(**sizes)
    assert plain.time_mlp[0].out_features == 32 and not plain.first_layer.bias.any()
    other = NoisePredictor(**sizes, time_hidden_dim=6, initialization="torch")
    assert [layer.out_features for layer in other.time_mlp if isinstance(layer, nn.Linear)] == [6, 4]
    limit = 1 / math.sqrt(other.first_layer.in_features)
    for values in (other.first_layer.weight, other.first_layer.bias):
        assert 0 < values.abs().max() <= limit


def test_running_norm_against_the_reference():
    """Pooled exactly at first, as NumPy's moments of all rows say; then old batches fade. Constants stay finite."""
    norm, rng = RunningNorm(3, momentum=0.25, clip=2.0), np.random.default_rng(0)
    batches = [rng.normal(i, 1 + i, (5, 3)) * [1, 100, 0] for i in range(7)]
    for n, (batch, (mean, variance)) in enumerate(zip(batches, reference.running_statistics(batches, 0.25), strict=True), 1):
        result = norm(th.tensor(batch, dtype=th.float32))
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(result, np.clip((batch - mean) / np.sqrt(variance + 1e-8), -2, 2), rtol=1e-4, atol=1e-4)
        if n <= 4:
            rows = np.concatenate(batches[:n])
            np.testing.assert_allclose(norm.running_mean, rows.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(norm.running_var, rows.var(0), rtol=1e-4, atol=1e-6)


def test_only_losses_move_a_running_norm():
    norm, rows = RunningNorm(2), th.randn(4, 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with th.no_grad():
        norm(rows)
    with evaluation_mode(norm):
        norm(rows)
    assert all(th.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(rows)
    assert norm.running_count == 1


def renorm(start, n_features=3, **kwargs):
    norm = BatchRenorm1d(n_features, start=start, **kwargs)
    with th.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("start", [0, 3, 10])
def test_batch_renorm_against_the_reference(start):
    """Shifts and scales within the limits and beyond them: the batches move far from what the running statistics know."""
    norm, rng = renorm(start, momentum=0.25), np.random.default_rng(0)
    batches = [rng.normal(4.0 * i, 1 + i, (5, 3)) * [1, 100, 0.01] for i in range(7)]
    gain, shift = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    expected = reference.batch_renorm(batches, start, 0.25, gain, shift)
    for batch, (rows, mean, variance) in zip(batches, expected, strict=True):
        np.testing.assert_allclose(norm(th.tensor(batch, dtype=th.float32)).detach(), rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 7


def test_batch_renorm_is_a_batch_norm_until_its_start():
    """Bit for bit."""
    norm, plain = renorm(4), nn.BatchNorm1d(3, eps=1e-3, momentum=0.01)
    plain.load_state_dict(norm.state_dict())
    for i in range(6):
        batch = 2 * th.randn(8, 3) + 1
        assert th.equal(norm(batch), plain(batch)) == (i < 4)


def test_batch_renorm_trains_on_what_evaluation_sees():
    """Closed form: without clipping, training mode gives what evaluation mode gave before the batch."""
    norm = renorm(0, momentum=0.5)
    for _ in range(20):
        norm(th.randn(64, 3) * 2 + 1)
    batch = th.randn(64, 3) * 3 - 1
    with evaluation_mode(norm):
        evaluated = norm(batch)
    th.testing.assert_close(norm(batch), evaluated, rtol=1e-4, atol=1e-5)


def test_batch_renorm_agrees_with_that_of_sb3_contrib():
    """
    But for details that are small where batches are large: theirs starts a batch later, divides by the unbiased variance of
    the batch, and leaves epsilon out of the shift.
    """
    # The oldest Stable-Baselines3 is tested without sb3-contrib, which asks for a newer one
    theirs = pytest.importorskip("sb3_contrib.common.torch_layers", reason="needs sb3-contrib").BatchRenorm1d
    ours, other = renorm(11, momentum=0.1), theirs(3, momentum=0.1, warmup_steps=10)
    with th.no_grad():
        other.scale.copy_(ours.weight)
        other.bias.copy_(ours.bias)
    corrected = 0
    for i in range(30):
        batch = (1 + 0.3 * th.rand(3)) * th.randn(4096, 3) + 0.5 * i
        mean_before = ours.running_mean.clone()
        th.testing.assert_close(ours(batch), other(batch), rtol=5e-3, atol=5e-3)
        corrected += i > 10 and bool(((batch.mean(0) - mean_before).abs() > 0.5).all())
    assert corrected == 19, "shifts that matter were compared"


def test_gradients_of_batch_renorm():
    """r and d count as constants: the gradient of the batch norm, times r."""
    norm = renorm(0, momentum=0.5)
    for _ in range(3):
        norm(th.randn(16, 3) * 2 + 1)
    batch, direction = th.randn(16, 3, requires_grad=True), th.randn(16, 3)
    deviation = (batch.var(0, correction=0) + norm.eps).sqrt()
    running = (norm.running_var + norm.eps).sqrt()
    r, d = (deviation / running).detach(), ((batch.mean(0) - norm.running_mean) / running).detach()
    plain = norm.weight * ((batch - batch.mean(0)) / deviation * r + d) + norm.bias
    inputs = (batch, norm.weight, norm.bias)
    expected = th.autograd.grad((plain * direction).sum(), inputs)
    for gradient, wanted in zip(th.autograd.grad((norm(batch) * direction).sum(), inputs), expected, strict=True):
        th.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_time_embedding():
    embedding = sinusoidal_embedding(th.arange(30), 32)
    for t in range(30):
        np.testing.assert_allclose(embedding[t], reference.sinusoidal_embedding(t, 32), **TOLERANCE)


@pytest.mark.parametrize("dim", [3, 2, 0, 33])
def test_time_embedding_dim_must_be_even(dim):
    with pytest.raises(ValueError, match=f"time_embedding_dim must be an even number of at least 4, got {dim}"):
        sinusoidal_embedding(th.arange(3), dim)


@pytest.mark.parametrize("seed", range(8))
def test_noise_network_with_split_first_layer(seed):
    policy, observation, noise = random_policy(seed)
    x_t = noise[0]
    b, k, _ = x_t.shape
    t = th.randint(policy.n_diffusion_steps, (b, k))
    network = policy.actor.noise_predictor
    with th.no_grad():
        predicted = network(x_t, t, network.condition(observation))
        at_last_step = network(x_t, policy.n_diffusion_steps - 1, network.condition(observation))
    actor = actor_to_numpy(policy.actor)
    for i in range(b):
        for j in range(k):
            args = (actor, x_t[i, j].numpy(), observation[i].numpy())
            np.testing.assert_allclose(predicted[i, j], reference.predict_noise(*args, int(t[i, j])), **TOLERANCE)
            expected = reference.predict_noise(*args, policy.n_diffusion_steps - 1)
            np.testing.assert_allclose(at_last_step[i, j], expected, **TOLERANCE)


def test_initialisation_of_the_authors_code():
    """Weights from N(0, 1/(4 fan_in)), biases 0, for actor and critics, the first layer's fan-in being all its inputs."""
    network = NoisePredictor(action_dim=6, features_dim=17, n_steps=20, net_arch=[256, 256])
    assert network.first_layer.in_features == 6 + 32 + 17
    assert [layer.out_features for layer in network.time_mlp if isinstance(layer, th.nn.Linear)] == [256, 32]
    policy = DiffusionPolicy(spaces.Box(-1, 1, (17,)), spaces.Box(-1, 1, (6,)), lambda _: 1e-3)
    layers = [m for m in [*network.modules(), *policy.critic.modules()] if isinstance(m, th.nn.Linear)]
    assert len(layers) == 5 + 6
    for layer in layers:
        assert not layer.bias.any()
        expected_std = 0.5 * layer.in_features**-0.5
        n = layer.weight.numel()
        assert float(layer.weight.detach().std()) == pytest.approx(expected_std, rel=4 / (2 * n) ** 0.5)
    untouched = th.nn.Sequential(th.nn.Conv2d(1, 1, 3))
    before = untouched[0].weight.clone()
    init_linear_layers(untouched)
    assert th.equal(before, untouched[0].weight)


def test_evaluation_mode_restores_each_mode():
    first, second = th.nn.Dropout(), th.nn.Dropout().eval()

    def fail():
        with evaluation_mode(first, second):
            assert not first.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert first.training
    assert not second.training


def test_evaluation_mode_restores_each_layer():
    """One that is frozen inside a network stays so, one that does more in train() does it, and compiled modules follow."""
    calls = []

    class Recorder(th.nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    scripted = th.jit.script(th.nn.Dropout(0.5))
    network = th.nn.Sequential(th.nn.BatchNorm1d(3), th.nn.Dropout(), Recorder(3, 3), scripted)
    network[0].eval()
    calls.clear()
    x = th.ones(64, 3)
    with evaluation_mode(network):
        assert not any(layer.training for layer in network.modules())
        assert th.equal(scripted(x), x)
    assert [layer.training for layer in network] == [False, True, True, True]
    assert calls == [False, True]
    assert not th.equal(scripted(x), x)
