"""Every pure function against the float64 reference, on random sizes, at 1e-5."""

import numpy as np
import pytest
import reference
import torch as th
from gymnasium import spaces
from helpers import actor_to_numpy, critics_to_numpy

from sb3_qvpo import DiffusionPolicy
from sb3_qvpo.common import candidates as cand
from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.networks import NoisePredictor, init_linear_layers, sinusoidal_embedding
from sb3_qvpo.common.noise_schedules import NOISE_SCHEDULES, linear_betas, make_betas
from sb3_qvpo.qvpo import weights as w

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
SCHEDULES = {"cosine": reference.cosine_betas, "vp": reference.vp_betas, "linear": reference.linear_betas}


def random_sizes(seed):
    """Batch, candidates, action dimensions, observation size, diffusion steps, hidden layers."""
    rng = np.random.default_rng(seed)
    b, k, a, s, t = (int(rng.integers(low, high)) for low, high in [(1, 6), (1, 7), (1, 5), (1, 9), (1, 12)])
    layers = [int(width) for width in rng.integers(3, 20, size=seed % 4)]
    return b, k, a, s, t, layers


def random_policy(seed, schedule="cosine"):
    b, k, a, s, t, layers = random_sizes(seed)
    policy = DiffusionPolicy(
        spaces.Box(-1, 1, (s,), np.float32),
        spaces.Box(-1, 1, (a,), np.float32),
        lambda _: 1e-3,
        net_arch=layers,
        n_diffusion_steps=t,
        noise_schedule=schedule,
        time_embedding_dim=4 + 2 * (seed % 3),
        n_critics=1 + seed % 3,
    )
    for parameter in policy.parameters():  # biases too, which start at 0
        parameter.data.add_(0.3 * th.randn_like(parameter))
    return policy, th.randn(b, s), th.randn(t, b, k, a)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20, 100, 1000])
def test_noise_schedules(name, n_steps):
    betas = make_betas(name, n_steps)
    assert betas.dtype == th.float64
    np.testing.assert_allclose(betas.numpy(), SCHEDULES[name](n_steps), rtol=1e-9, atol=1e-12)
    assert NOISE_SCHEDULES.keys() == SCHEDULES.keys()


def test_every_schedule_ends_in_noise_from_few_to_many_steps():
    """The chain starts from pure noise, so little of the action may be left in x_T."""
    for name in SCHEDULES:
        for n_steps in (5, 20, 100, 1000):
            assert reference.alpha_bar(make_betas(name, n_steps).numpy(), n_steps - 1) < 0.01
    # The constants of DDPM without re-spacing would leave 82 % of the variance after 20 steps
    unscaled = make_betas(lambda n_steps: th.linspace(1e-4, 2e-2, n_steps), 20).numpy()
    assert reference.alpha_bar(unscaled, 19) == pytest.approx(0.817, abs=1e-3)


def test_linear_schedule_above_its_own_length():
    """Beyond 1000 steps the same amount of noise is spread over more steps."""
    for n_steps in (1001, 2000):
        betas = linear_betas(n_steps).numpy()
        assert betas.shape == (n_steps,) and (np.diff(betas) > 0).all()
        assert reference.alpha_bar(betas, n_steps - 1) == pytest.approx(4.0e-5, rel=0.05)


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


def test_time_embedding():
    embedding = sinusoidal_embedding(th.arange(30), 32)
    for t in range(30):
        np.testing.assert_allclose(embedding[t], reference.sinusoidal_embedding(t, 32), **TOLERANCE)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_candidates_their_values_and_the_best(schedule, seed):
    """The reverse chain given its noise, the critics over candidates, best of K."""
    policy, observation, noise = random_policy(seed, schedule)
    with th.no_grad():
        candidates, q_values = policy.rank_candidates(observation, noise.shape[2], noise)
        best = cand.best_candidate(candidates, q_values)
        plain = th.cat(policy.critic(observation, candidates[:, 0]), dim=1)
    actor, critics = actor_to_numpy(policy.actor), critics_to_numpy(policy.critic)
    betas = make_betas(schedule, policy.n_diffusion_steps).numpy()
    for i, state in enumerate(observation.numpy().astype(np.float64)):
        expected = reference.draw_candidates(actor, state, noise[:, i].numpy().astype(np.float64), betas)
        np.testing.assert_allclose(candidates[i], expected, **TOLERANCE)
        expected_values = [reference.q_values(critics, state, action) for action in expected]
        np.testing.assert_allclose(q_values[i], [min(values) for values in expected_values], **TOLERANCE)
        np.testing.assert_allclose(plain[i], expected_values[0], **TOLERANCE)
        np.testing.assert_allclose(best[i], reference.best_of_k(critics, state, expected)[0], **TOLERANCE)


def test_target_networks_rank_target_candidates():
    policy, observation, noise = random_policy(1)
    with th.no_grad():
        candidates, q_values = policy.rank_candidates(observation, noise.shape[2], noise, target=True)
        online_candidates, _ = policy.rank_candidates(observation, noise.shape[2], noise)
    assert not th.allclose(candidates, online_candidates)
    actor, critics = actor_to_numpy(policy.actor_target), critics_to_numpy(policy.critic_target)
    betas = make_betas("cosine", policy.n_diffusion_steps).numpy()
    for i, state in enumerate(observation.numpy().astype(np.float64)):
        expected = reference.draw_candidates(actor, state, noise[:, i].numpy().astype(np.float64), betas)
        np.testing.assert_allclose(candidates[i], expected, **TOLERANCE)
        _, best_value = reference.best_of_k(critics, state, expected)
        np.testing.assert_allclose(q_values[i].max(), best_value, **TOLERANCE)


def test_top_candidates_are_sorted_and_start_with_the_best():
    candidates, q_values = th.randn(3, 6, 2), th.randn(3, 6)
    actions, values = cand.top_candidates(candidates, q_values, 4)
    assert actions.shape == (3, 4, 2)
    for i in range(3):
        order = sorted(range(6), key=lambda k: -float(q_values[i, k]))[:4]
        assert th.equal(actions[i], candidates[i, order]) and th.equal(values[i], q_values[i, order])
    assert th.equal(actions[:, 0], cand.best_candidate(candidates, q_values))


def test_candidate_statistics():
    candidates, q_values = th.randn(3, 6, 2), th.randn(3, 6)
    spread = np.mean([[np.std(candidates[i, :, d].numpy()) for d in range(2)] for i in range(3)])
    assert float(cand.candidate_std(candidates)) == pytest.approx(spread, abs=1e-6)
    contrast = np.mean([max(row) - np.mean(row) for row in q_values.numpy()])
    assert float(cand.critic_contrast(q_values)) == pytest.approx(contrast, abs=1e-6)
    assert float(cand.candidate_std(candidates[:, :1].expand(3, 6, 2))) == pytest.approx(0, abs=1e-6)
    assert float(cand.candidate_std(candidates[:, :1])) == 0  # one candidate: 0, not NaN


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_q_weights(shift):
    q_values = th.randn(5, 7) + shift
    for i in range(5):
        values = [float(value) for value in q_values[i]]
        np.testing.assert_allclose(w.qadv(q_values)[i], reference.qadv(values), **TOLERANCE)
        np.testing.assert_allclose(w.qcut(q_values)[i], reference.qcut(values, w.QCUT_EPSILON), **TOLERANCE)
        np.testing.assert_allclose(w.qcut(q_values, 0.5)[i], reference.qcut(values, 0.5), **TOLERANCE)


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


def test_sampling_rejects_unclear_noise():
    diffusion = GaussianDiffusion(make_betas("cosine", 4))
    network = lambda x_t, t, cond: th.zeros_like(x_t)  # noqa: E731
    assert diffusion.sample(network, None, shape=(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="either noise"):
        diffusion.sample(network, None)
    with pytest.raises(ValueError, match="either noise"):
        diffusion.sample(network, None, th.zeros(4, 2, 3), shape=(2, 3))
    with pytest.raises(ValueError, match="4 entries"):
        diffusion.sample(network, None, th.zeros(3, 2, 3))


def test_polyak_step():
    policy, _, _ = random_policy(3)
    online = [parameter.detach().numpy().astype(np.float64) for parameter in policy.actor.parameters()]
    online += [parameter.detach().numpy().astype(np.float64) for parameter in policy.critic.parameters()]
    targets = [*policy.actor_target.parameters(), *policy.critic_target.parameters()]
    expected = [parameter.detach().numpy().astype(np.float64) for parameter in targets]
    reference.polyak(expected, online, 0.3)
    policy.update_targets(0.3)
    for parameter, value in zip(targets, expected, strict=True):
        np.testing.assert_allclose(parameter.detach(), value, **TOLERANCE)


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


@pytest.mark.parametrize("dim", [3, 2, 0, 33])
def test_time_embedding_dim_must_be_even(dim):
    with pytest.raises(ValueError, match=f"time_embedding_dim must be an even number of at least 4, got {dim}"):
        sinusoidal_embedding(th.arange(3), dim)
