"""Critics beside the paper's: batch-normalised ones without targets, and quantiles. Against the reference, fast and eager."""

import contextlib
import copy
import math
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch as th
from helpers import (
    TOLERANCE,
    BanditEnv,
    CountdownEnv,
    bit_flipping_qvpo,
    recorded_draws,
    same_weights,
    tiny_qvpo,
    weights_of,
)
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from torch import nn

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common.actor_critic import CandidateCritic
from sb3_qvpo.common.candidates import ScoredCandidates
from sb3_qvpo.common.critics import BatchNormCritic, QuantileCritic
from sb3_qvpo.common.networks import BatchRenorm1d
from sb3_qvpo.common.speed.networks import FastBatchNormCritic, FastCritic, FastQuantileCritic, can_be_folded

RELU = dict(net_arch=[8, 8], critic_activation_fn=nn.ReLU)
QUANTILE_ARGUMENTS = ["n_quantiles", "top_quantiles_to_drop_per_net"]


def shaken(model):
    """A model whose weights and running statistics are away from their start."""
    for parameter in model.policy.parameters():
        parameter.data.add_(0.3 * th.randn_like(parameter))
    for name, buffer in model.policy.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(th.randn_like(buffer))
        if name.endswith("running_var"):
            buffer.mul_(th.rand_like(buffer) + 0.5)
    return model


def crossq(env="Pendulum-v1", **kwargs):
    return shaken(tiny_qvpo(env, critic_type="crossq", **{"policy_kwargs": RELU, **kwargs}))


def normalized_layers(q_network):
    """A critic with norms in the reference's form: (gain, shift, weight, bias) of each layer."""
    layers = [layer for layer in q_network if not isinstance(layer, nn.ReLU)]
    return [
        tuple(tensor.detach().double().numpy() for tensor in (norm.weight, norm.bias, linear.weight, linear.bias))
        for norm, linear in zip(layers[::2], layers[1::2], strict=True)
    ]


# Batch normalisation without targets


@pytest.mark.parametrize(
    ("n_target_candidates", "renorm_start", "pessimism"),
    [(1, None, None), (3, None, None), (3, 0, None), (1, None, 0), (3, None, 0.3), (3, 0, 1)],
)
def test_one_pass_of_both_sides(n_target_candidates, renorm_start, pessimism, monkeypatch):
    """Loss, targets, gradients and running statistics of one update on real transitions."""
    policy_kwargs = dict(RELU, renorm_start=renorm_start, pessimism=pessimism)
    kwargs = dict(policy_kwargs=policy_kwargs, n_target_candidates=n_target_candidates)
    model = crossq(CountdownEnv(length=4), learning_starts=30, policy_delay=2, **kwargs)
    model.learn(30)
    records, drawn, score_candidates = recorded_draws(model), [], model.policy.score_candidates
    monkeypatch.setattr(
        model.policy, "score_candidates", lambda *args, **kw: drawn.append(score_candidates(*args, **kw)) or drawn[-1]
    )
    critics = [normalized_layers(q_network) for q_network in model.critic.q_networks]
    before = {name: buffer.clone().double() for name, buffer in model.critic.named_buffers() if "running" in name}
    model.train(1, batch_size=6)

    batch, next_candidates = records["batch"][0], drawn[0]
    arrays = {name: getattr(batch, name).double().numpy() for name in ("observations", "actions", "next_observations")}
    arrays |= {name: getattr(batch, name)[:, 0].double().numpy() for name in ("rewards", "dones")}
    chosen = next_candidates.scores.argmax(dim=1)
    next_actions = next_candidates.candidates[th.arange(6), chosen].double().numpy()
    assert (next_candidates.scores == 0).all() == (n_target_candidates == 1), "one candidate needs no score"
    running = None
    if renorm_start is not None:
        running = [
            [tuple(before[f"qf{i}.{3 * layer}.running_{name}"].numpy() for name in ("mean", "var")) for layer in range(3)]
            for i in range(2)
        ]
    beta = 1 if pessimism is None else pessimism
    loss, targets, statistics = reference.crossq_loss(critics, arrays, next_actions, model.gamma, running, beta)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(loss, rel=1e-4)
    assert len(set(arrays["dones"])) == 2, "the batch has ends of the task"

    n = 12  # rows of the joint pass
    for i, each in enumerate(statistics):
        for layer, (mean, variance) in enumerate(each):
            name, norm = f"qf{i}.{3 * layer}", model.critic.q_networks[i][3 * layer]
            expected_variance = 0.99 * before[f"{name}.running_var"] + 0.01 * th.as_tensor(variance) * n / (n - 1)
            expected_mean = 0.99 * before[f"{name}.running_mean"] + 0.01 * th.as_tensor(mean)
            np.testing.assert_allclose(norm.running_mean, expected_mean, **TOLERANCE)
            np.testing.assert_allclose(norm.running_var, expected_variance, **TOLERANCE)

    # Gradients by central differences of the reference, with the targets held fixed as the loss holds them
    rows = [np.concatenate(pair) for pair in zip(arrays["observations"], arrays["actions"], strict=True)]
    rows += [np.concatenate(pair) for pair in zip(arrays["next_observations"], next_actions, strict=True)]

    corrections = []  # r and d are held fixed, too
    reference.normalized_forward(critics[0], rows, running=running and running[0], corrections=corrections)

    def loss_of(layers):
        outputs, _ = reference.normalized_forward(layers, rows, corrections=corrections)
        return sum((outputs[i][0] - targets[i]) ** 2 / 6 for i in range(6))

    gradients = [parameter.grad.double().numpy() for parameter in model.critic.q_networks[0].parameters()]
    arrays_of_layers = [array for layer in critics[0] for array in layer]
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for array, gradient in zip(arrays_of_layers, gradients, strict=True):
        for index in list(np.ndindex(array.shape))[::5]:
            values = []
            for change in (1e-5, -2e-5):
                array[index] += change
                values.append(loss_of(critics[0]))
            array[index] += 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert gradient[index] == pytest.approx(slope, rel=1e-3, abs=1e-4 * largest)


@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_pessimism_is_between_mean_and_minimum(n_critics):
    """Closed form, for scores, gradients and more critics than two."""
    models = {
        beta: crossq(BanditEnv(), seed=1, policy_kwargs=dict(RELU, n_critics=n_critics, pessimism=beta))
        for beta in (0, 0.25, 1)
    }
    features, candidates = th.randn(5, 2), 2 * th.rand(5, 7, 1) - 1
    scores, gradients = {}, {}
    for beta, model in models.items():
        model.policy.load_state_dict(models[0].policy.state_dict())
        model.policy.set_training_mode(False)
        with th.no_grad():
            scores[beta] = model.critic.score(features, candidates)
        _, gradients[beta] = model.critic.action_gradient(features, candidates[:, 0])
    with th.no_grad():
        predictions = models[0].critic.value_candidates(features, candidates).squeeze(-1)
    th.testing.assert_close(scores[0], predictions.mean(dim=0))
    assert th.equal(scores[1], predictions.min(dim=0).values), "bit for bit, as without the argument"
    for values in (scores, gradients):
        th.testing.assert_close(values[0.25], 0.75 * values[0] + 0.25 * values[1])
        assert (values[0] - values[1]).abs().max() > 1e-3 or n_critics == 1


@pytest.mark.parametrize("pessimism", [-0.1, 1.1, float("nan"), "low", True])
def test_bad_pessimism(pessimism):
    with pytest.raises(ValueError, match=rf"pessimism must be a number in \[0, 1\], got {pessimism!r}"):
        tiny_qvpo(critic_type="crossq", policy_kwargs=dict(pessimism=pessimism))


def running_value(q_network, row):
    """What a critic predicts with its running statistics, in float64."""
    for layer in q_network:
        if isinstance(layer, nn.BatchNorm1d):
            mean, variance, gain, shift = (
                tensor.detach().double().numpy()
                for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            )
            row = gain * (row - mean) / np.sqrt(variance + 1e-3) + shift
        elif isinstance(layer, nn.Linear):
            row = layer.weight.detach().double().numpy() @ row + layer.bias.detach().double().numpy()
        else:
            row = np.maximum(row, 0)
    return row[0]


@pytest.fixture
def folding(monkeypatch):
    """Norms are folded into the linear layers however few candidates are scored."""
    monkeypatch.setattr(FastBatchNormCritic, "few_rows", 0)


def test_many_candidates_are_scored_by_folded_networks(monkeypatch):
    """Few are scored as they are, because folding costs more than it saves."""
    model, folded = crossq(BanditEnv()), []
    model.policy.set_training_mode(False)
    plain_networks = FastBatchNormCritic.plain_networks
    monkeypatch.setattr(FastBatchNormCritic, "plain_networks", lambda self: folded.append(plain_networks(self)) or folded[-1])
    for n_states, n_folded in ((1, 0), (64, 0), (65, 1)):
        with th.no_grad():
            model.critic.score(th.randn(n_states, 2), th.rand(n_states, 8, 1))
        assert len(folded) == n_folded
    assert len(folded[0]) == 2


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize(("n_states", "renorm_start"), [(1, None), (3, None), (40, None), (40, 0)])
def test_scores_use_running_statistics(n_states, renorm_start, settings):
    """Also where norms are folded into the linear layers, for few rows and for many, whatever the mode was."""
    policy_kwargs = dict(net_arch=[64, 32], critic_activation_fn=nn.ReLU, renorm_start=renorm_start)
    model = crossq(BanditEnv(action_dim=3), policy_kwargs=policy_kwargs)
    observation, noise = th.randn(n_states, 2), th.randn(3, n_states, 8, 3)
    for training in (False, True):
        model.policy.set_training_mode(training)
        before, results = weights_of(model), []
        for settings.enabled in (False, True):
            with th.no_grad():
                results.append(model.policy.score_candidates(observation, noise))
        for eager, fast in zip(*results, strict=True):
            np.testing.assert_allclose(fast, eager, **TOLERANCE)
        assert same_weights(before, weights_of(model)) and model.critic.training == training
    values = [
        min(running_value(q_network, np.concatenate([observation[0], action])) for q_network in model.critic.q_networks)
        for action in results[0].candidates[0].numpy()
    ]
    np.testing.assert_allclose(results[0].scores[0], values, **TOLERANCE)


@pytest.mark.usefixtures("folding")
def test_folded_networks_follow_the_model(settings):
    """Its weights, and a layer that is replaced; and they are no part of it."""
    model = crossq(BanditEnv())
    observation, noise, results = th.randn(4, 2), th.randn(3, 4, 5, 1), []
    for change in (
        lambda: model.learn(20),
        lambda: [setattr(q_network, "2", nn.Tanh()) for q_network in model.critic.q_networks],
    ):
        change()
        for settings.enabled in (False, True):
            with th.no_grad():
                results.append(model.policy.score_candidates(observation, noise).scores)
        np.testing.assert_allclose(results[-1], results[-2], **TOLERANCE)
    assert not th.equal(results[1], results[3])
    assert model.policy.state_dict().keys() == crossq(BanditEnv()).policy.state_dict().keys()


@pytest.mark.usefixtures("folding")
def test_decisions_in_inference_mode_leave_the_model_usable():
    model = crossq(BanditEnv())
    observation = np.zeros((3, 2), np.float32)
    with th.inference_mode():
        first, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], first)
    model.learn(12)


@pytest.mark.usefixtures("folding")
def test_threads_score_at_the_same_time():
    model = crossq(BanditEnv(), policy_kwargs=dict(net_arch=[64, 64], critic_activation_fn=nn.ReLU))
    model.policy.set_training_mode(False)
    features, candidates = th.randn(8, 2), th.rand(8, 4, 1)
    with th.no_grad():
        expected = model.critic.score(features, candidates)

    def agree(_):
        with th.no_grad():
            return all(th.equal(model.critic.score(features, candidates), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agree, range(4)))


@pytest.mark.parametrize("renorm_start", [None, 0])
def test_frozen_critics_keep_their_statistics(renorm_start):
    model = crossq(CountdownEnv(), policy_kwargs=dict(RELU, renorm_start=renorm_start)).learn(10)
    model.critic.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.critic.named_buffers()}
    model.learn(10, reset_num_timesteps=False)
    assert all(th.equal(before[name], buffer) for name, buffer in model.critic.named_buffers())
    model.critic.requires_grad_(True)
    model.learn(10, reset_num_timesteps=False)
    assert not all(th.equal(before[name], buffer) for name, buffer in model.critic.named_buffers())


def test_statistics_stay_finite():
    """Observations whose square is not finite: the statistics are not poisoned, so the model stays of use."""
    model = crossq(CountdownEnv(), learning_starts=100).learn(20)
    model.replay_buffer.observations[:20] = 1e25
    with contextlib.suppress(ValueError):
        model.train(2, 8)
    assert all(buffer.isfinite().all() for buffer in model.critic.buffers())


def test_gradients_climb_what_scores_say():
    """A subclass that values candidates in a way of its own."""

    class Mine(FastCritic):
        def value_candidates(self, features, candidates):
            values = super().value_candidates(features, candidates)
            return values - 100 * (candidates**2).sum(-1, keepdim=True)

    model = tiny_qvpo(BanditEnv(), policy=type("Policy", (DiffusionPolicy,), {"critic_class": Mine}))
    features, actions = th.randn(4, 2), th.rand(4, 1)
    scores, gradients = model.critic.action_gradient(features, actions)
    th.testing.assert_close(scores, model.critic.score(features, actions.unsqueeze(1)).squeeze(1).detach())
    assert (gradients.abs() > 10 * actions.abs()).all()


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Mish])
@pytest.mark.parametrize("critic_type", ["twin", "crossq", "quantile"])
def test_gradients_of_actions(critic_type, activation_fn, settings):
    """Fast and eager, with running statistics, and no gradient for a parameter."""
    policy_kwargs = dict(net_arch=[32, 32], critic_activation_fn=activation_fn)
    model = shaken(tiny_qvpo(BanditEnv(action_dim=2), critic_type=critic_type, policy_kwargs=policy_kwargs))
    model.critic.set_training_mode(False)
    features, actions, results = th.randn(20, 2), th.rand(20, 2) * 2 - 1, []
    for settings.enabled in (False, True):
        results.append(model.critic.action_gradient(features, actions))
        assert not actions.requires_grad
    for eager, fast in zip(*results, strict=True):
        np.testing.assert_allclose(fast, eager, **TOLERANCE)
    assert all(parameter.grad is None for parameter in model.policy.parameters())
    step = 1e-3
    for d in range(2):
        ahead, behind = (
            model.critic.score(features, (actions + sign * step * th.eye(2)[d]).unsqueeze(1)).squeeze(1).detach()
            for sign in (1, -1)
        )
        close = ((ahead - behind) / (2 * step) - results[0][1][:, d]).abs() < 0.05
        assert close.float().mean() >= 0.85, "but where a kink lies between"


def test_there_are_no_targets(tmp_path):
    """``tau`` has no effect, a state dict has each weight once, and nothing breaks in saving, copying and resuming."""
    model = crossq().learn(12)
    policy = model.policy
    assert policy.actor_target is policy.actor and policy.critic_target is policy.critic
    assert model.critic_target is model.critic
    assert not any("target" in name for name in policy.state_dict())
    results = [weights_of(tiny_qvpo(critic_type="crossq", policy_kwargs=RELU, tau=tau).learn(12)) for tau in (0.0, 0.5)]
    assert same_weights(*results)

    clone = copy.deepcopy(policy)
    assert clone.actor_target is clone.actor and clone.actor is not policy.actor
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert same_weights(weights_of(model), weights_of(loaded)) and loaded.critic_target is loaded.critic
    assert type(loaded.critic) is FastBatchNormCritic
    loaded.learn(5, reset_num_timesteps=False)
    policy.save(tmp_path / "policy.pth")
    alone = DiffusionPolicy.load(tmp_path / "policy.pth", device="cpu")
    observation = np.zeros((3, 3), np.float32)
    for other in (alone, clone):
        np.testing.assert_array_equal(
            other.predict(observation, deterministic=True)[0], policy.predict(observation, deterministic=True)[0]
        )
    parameters = model.get_parameters()
    fresh = tiny_qvpo(critic_type="crossq", policy_kwargs=RELU)
    fresh.set_parameters(parameters)
    assert same_weights(weights_of(fresh), weights_of(model))
    with pytest.raises(RuntimeError, match="qf0"):
        tiny_qvpo(policy_kwargs=RELU).set_parameters(parameters)


@pytest.mark.parametrize("start", [True, -1, 0.5])
def test_bad_starts_of_renormalisation(start):
    with pytest.raises(ValueError, match=f"renorm_start must be a whole number of at least 0, got {start}"):
        tiny_qvpo(critic_type="crossq", policy_kwargs=dict(renorm_start=start))


def test_critics_of_ones_own_renormalise_too():
    """Unless they have norms of their own, which the argument would replace."""

    class OwnCritic(BatchNormCritic):
        pass

    class LayerNormCritic(BatchNormCritic):
        norm_class = nn.LayerNorm

    def policy(critic):
        return type("OwnPolicy", (DiffusionPolicy,), {"critic_class": critic})

    kwargs = dict(policy_kwargs=dict(net_arch=[8], renorm_start=5))
    assert sum(type(module) is BatchRenorm1d for module in tiny_qvpo(policy=policy(OwnCritic), **kwargs).critic.modules()) == 4
    with pytest.raises(ValueError, match="renorm_start must be left out, got 5: LayerNormCritic has its own norms"):
        tiny_qvpo(policy=policy(LayerNormCritic), **kwargs)


def renormalized(start, **kwargs):
    return crossq(policy_kwargs=dict(RELU, renorm_start=start), **kwargs)


def test_renormalisation_starts_after_so_many_updates():
    """Until then, weights are those without it, bit for bit."""
    for start in (3, 4):
        models = [each.learn(10) for each in (renormalized(start, learning_starts=10), crossq(learning_starts=10))]
        for model in models:
            th.manual_seed(0)
            np.random.seed(0)
            model.train(4, batch_size=4)
        assert same_weights(*map(weights_of, models)) == (start == 4)


def test_renormalised_critics_are_folded_and_saved(tmp_path):
    """The start and the count of updates are parts of what is saved."""
    model = renormalized(6).learn(10)
    assert all(can_be_folded(q_network) for q_network in model.critic.q_networks)
    model.save(tmp_path / "model")
    for each in (model, QVPO.load(tmp_path / "model")):
        norms = [module for module in each.critic.modules() if isinstance(module, nn.BatchNorm1d)]
        assert {(type(norm), norm.start, int(norm.num_batches_tracked)) for norm in norms} == {
            (BatchRenorm1d, 6, model._n_updates)
        }
    assert model._n_updates > 0


def test_a_norm_of_ones_own_is_used_eagerly(settings):
    """Another norm is one attribute, and takes the eager path."""

    class LayerNormCritic(BatchNormCritic):
        norm_class = nn.LayerNorm

    class LayerNormPolicy(DiffusionPolicy):
        critic_class = LayerNormCritic

    model = tiny_qvpo(policy=LayerNormPolicy).learn(12)
    assert sum(isinstance(module, nn.LayerNorm) for module in model.critic.modules()) == 6
    assert not can_be_folded(model.critic.q_networks[0])
    assert model.policy.critic_target is model.policy.critic


# Quantiles


def quantile_model(env="Pendulum-v1", **kwargs):
    kwargs = dict(net_arch=[8, 8], n_quantiles=5, top_quantiles_to_drop_per_net=2, n_critics=3) | kwargs
    return shaken(tiny_qvpo(env, critic_type="quantile", policy_kwargs=kwargs))


def test_quantile_target_and_loss():
    model = quantile_model(BanditEnv())
    features, candidates = th.randn(4, 2), th.rand(4, 6, 1) * 2 - 1
    with th.no_grad():
        quantiles = model.critic.value_candidates(features, candidates)
        scores = model.critic.score(features, candidates)
        targets = model.critic.bootstrap(features, candidates, scores)
    assert quantiles.shape == (3, 4, 6, 5) and targets.shape == (4, 9)
    for i in range(4):
        each = quantiles[:, i].double().numpy()  # critics, candidates, quantiles
        np.testing.assert_allclose(scores[i], each.mean(axis=(0, 2)), **TOLERANCE)
        best = int(scores[i].argmax())
        np.testing.assert_allclose(targets[i], reference.truncated_mixture(each[:, best], 2), **TOLERANCE)
    predicted, wanted = 2 * th.randn(3, 4, 5), 2 * th.randn(4, 9)
    expected = np.mean([reference.quantile_loss(predicted[:, i].double().numpy(), wanted[i].tolist()) for i in range(4)])
    assert float(model.critic.loss(tuple(predicted), wanted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_quantiles_of_a_known_distribution():
    """Rewards from a normal distribution, one step an episode: the quantiles become its quantiles, the score its mean."""
    rewards = np.random.default_rng(0)
    model = tiny_qvpo(
        BanditEnv(lambda action: rewards.normal(2.0, 1.0)), critic_type="quantile", learning_starts=2_000, buffer_size=2_000,
        learning_rate=1e-2, policy_kwargs=dict(net_arch=[16], n_quantiles=5, top_quantiles_to_drop_per_net=1),
    )  # fmt: skip
    model.learn(2_000)
    model.policy_delay = 10_000
    model.train(300, batch_size=256)
    model.learning_rate = 1e-3
    model.learn(1, reset_num_timesteps=False)
    model.train(300, batch_size=256)
    with th.no_grad():
        quantiles = model.critic.value_candidates(th.zeros(1, 2), th.zeros(1, 1, 1))[:, 0, 0]
        score = float(model.critic.score(th.zeros(1, 2), th.zeros(1, 1, 1)))
    # Of the Huber loss with a threshold of 1 they lie a little further inside than those of the distribution
    known = 2.0 + math.sqrt(2) * th.erfinv(2 * model.critic.fractions - 1)
    np.testing.assert_allclose(quantiles.mean(dim=0), known, atol=0.45)
    assert (quantiles.mean(dim=0).diff() > 0).all() and score == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_quantiles=0), "n_quantiles must be a whole number of at least 1, got 0"),
        (dict(n_quantiles=5, top_quantiles_to_drop_per_net=5), "top_quantiles_to_drop_per_net must be below n_quantiles = 5"),
        (dict(top_quantiles_to_drop_per_net=-1), "top_quantiles_to_drop_per_net must be a whole number of at least 0"),
        (dict(top_quantiles_to_drop_per_net=1.5), "top_quantiles_to_drop_per_net must be a whole number"),
    ],
)
def test_bad_quantiles(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_qvpo(critic_type="quantile", policy_kwargs=dict(net_arch=[4], **kwargs))


@pytest.mark.parametrize(
    ("critic_type", "name", "needed"),
    [
        *((critic_type, name, "quantile") for critic_type in ("twin", "crossq") for name in QUANTILE_ARGUMENTS),
        *((critic_type, name, "crossq") for critic_type in ("twin", "quantile") for name in ("renorm_start", "pessimism")),
    ],
)
def test_arguments_that_other_critics_do_not_have(critic_type, name, needed):
    """An argument that would have no effect is refused."""
    message = rf"{name} must be left out, got 3: Fast\w*Critic does not have it, but critic_type='{needed}'"
    with pytest.raises(ValueError, match=message):
        tiny_qvpo(critic_type=critic_type, policy_kwargs={name: 3})


# Both, wherever a policy is used

MODELS = {"crossq": crossq, "quantile": lambda *args, **kw: quantile_model(*args)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("env", ["image", "dict"])
def test_other_observations(name, env):
    policy, environment = {
        "image": ("CnnPolicy", FakeImageEnv(screen_height=36, screen_width=36, discrete=False)),
        "dict": ("MultiInputPolicy", SimpleMultiObsEnv(discrete_actions=False)),
    }[env]
    model = tiny_qvpo(environment, policy=policy, critic_type=name).learn(12)
    observation = model.observation_space.sample()
    action, _ = model.predict(observation, deterministic=True)
    assert model.action_space.contains(action)


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_a_shared_extractor_and_hindsight(share_features_extractor):
    kwargs = dict(net_arch=[8], share_features_extractor=share_features_extractor)
    for critic_type in ("crossq", "quantile"):
        bit_flipping_qvpo(critic_type=critic_type, policy_kwargs=kwargs).learn(30)


@pytest.mark.parametrize(
    ("policy", "critic_type", "message"),
    [
        ("MlpPolicy", "sac", "critic_type must be one of 'twin', 'crossq', 'quantile', got 'sac'"),
        ("MlpPolicy", None, "critic_type must be one of"),
        ("own", "crossq", "OwnPolicy has its own critics"),
    ],
)
def test_bad_critic_types(policy, critic_type, message):
    class OwnPolicy(DiffusionPolicy):
        critic_class = CandidateCritic

    with pytest.raises(ValueError, match=message):
        tiny_qvpo(policy=OwnPolicy if policy == "own" else policy, critic_type=critic_type)


def test_the_type_is_fixed_with_the_policy():
    model = tiny_qvpo().learn(6)
    model.critic_type = "crossq"
    with pytest.raises(ValueError, match="critic_type is fixed by the policy, 'twin', got 'crossq'"):
        model.learn(6)
    model.critic_type = "twin"
    model.learn(6)


@pytest.mark.parametrize("name", ["crossq", "quantile"])
def test_whole_updates_fast_and_eager(name, settings):
    """
    With improved candidates and few sampling steps, as presets have them. Plain gradient steps, because Adam makes rounding
    errors in small gradients large. One update at a time, because after some a rounding error decides between two candidates
    of nearly the same value.
    """
    settings.candidate_dtype = "float32"
    for seed in range(3):
        results = []
        for enabled in (False, True):
            settings.enabled = False
            model = tiny_qvpo(
                critic_type=name, n_train_candidates=16, batch_size=64, n_improvement_steps=2, seed=seed,
                n_diffusion_steps=8, learning_rate=1e-2,
                policy_kwargs=dict(
                    net_arch=[64, 64], prediction="v", sampler="dpm++", n_sampling_steps=3, optimizer_class=th.optim.SGD
                ),
            )  # fmt: skip
            model.learn(20)
            settings.enabled = enabled
            model.train(1, batch_size=64)
            results.append(weights_of(model))
        assert not same_weights(*results), "the fast path was not taken"
        for weight in results[0]:
            np.testing.assert_allclose(results[0][weight], results[1][weight], atol=1e-6, rtol=1e-5, err_msg=weight)


def test_critics_are_of_the_fast_kind():
    assert type(tiny_qvpo(critic_type="quantile").critic) is FastQuantileCritic
    assert issubclass(FastQuantileCritic, QuantileCritic)
    assert tiny_qvpo(critic_type="quantile").critic.q_networks[0][-1].out_features == 25


def test_bootstrap_of_normalized_critics_is_the_value_of_the_choice():
    """What another algorithm would use, that has no joint pass."""
    model = crossq(BanditEnv())
    model.critic.set_training_mode(False)
    features, candidates = th.randn(3, 2), th.rand(3, 5, 1)
    before = weights_of(model)
    with th.no_grad():
        scored = ScoredCandidates(features, candidates, model.critic.score(features, candidates))
        for training in (False, True):
            model.critic.set_training_mode(training)
            assert th.allclose(model.critic.bootstrap(*scored).squeeze(1), scored.scores.max(dim=1).values)
    assert same_weights(before, weights_of(model)) and model.critic.training
