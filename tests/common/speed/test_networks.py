"""The fast actor and critics give what the eager ones give, in whole updates too, and hand on what they do not know."""

import functools

import numpy as np
import pytest
import torch as th
from helpers import BanditEnv, same_weights, tiny_qvpo, weights_of
from scipy.stats import ks_2samp
from torch import nn

from sb3_qvpo.common.speed import cpu, networks

CPU = th.device("cpu")


def model_with(action_dim=1, **policy_kwargs):
    model = tiny_qvpo(BanditEnv(action_dim=action_dim), n_diffusion_steps=6, policy_kwargs=policy_kwargs)
    for parameter in model.policy.parameters():  # away from the initial zeros of the biases
        parameter.data.add_(0.05 * th.randn_like(parameter))
    return model


NETWORKS = {
    "the paper's": dict(net_arch=[256, 256]),
    "three uneven layers": dict(net_arch=[96, 64, 130]),
    "one layer": dict(net_arch=[64]),
    "relu": dict(net_arch=[128, 128], activation_fn=nn.ReLU),
    "silu": dict(net_arch=[128, 128], activation_fn=nn.SiLU),
    "linear": dict(net_arch=[64, 64, 64], activation_fn=nn.Identity),
    "in place": dict(net_arch=[64, 64, 64], activation_fn=functools.partial(nn.ReLU, inplace=True)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("action_dim", "block_size"), [(1, 2**19), (3, 2**19), (3, 2**15)])
def test_candidates_and_values_are_those_of_the_eager_functions(name, action_dim, block_size, settings, monkeypatch):
    """With the same noise, in one block or in several."""
    monkeypatch.setitem(cpu.BLOCK_SIZES, th.float32, block_size)
    policy = model_with(action_dim, **NETWORKS[name]).policy
    observations, noise = th.randn(37, 2), th.randn(6, 37, 64, action_dim)
    results = []
    for enabled in (False, True):
        settings.enabled = enabled
        with th.no_grad():
            assert cpu.worth_blocking(list(policy.actor.noise_predictor.later_layers), 37 * 64, CPU)
            results.append(policy.score_candidates(observations, noise))
    (_, eager_actions, eager_values), (_, actions, values) = results
    np.testing.assert_allclose(actions, eager_actions, atol=1e-5)
    np.testing.assert_allclose(values, eager_values, atol=1e-5)
    assert actions.std() > 0.01


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("action_dim", "n_candidates"), [(1, 4), (3, 1), (3, 4), (3, 70)])
def test_candidates_of_one_state(name, action_dim, n_candidates, settings):
    """An action: few rows have a path of their own."""
    actor = model_with(action_dim, **NETWORKS[name]).actor
    features, noise = th.randn(1, 2), th.randn(6, 1, n_candidates, action_dim)
    results = []
    for enabled in (False, True):
        settings.enabled = enabled
        with th.no_grad():
            results.append(actor.sample_candidates(features, noise))
    np.testing.assert_allclose(*results, atol=1e-5)
    assert results[0].shape == (1, n_candidates, action_dim)


LARGE = dict(n_train_candidates=64, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fewer_sampling_steps(eta, settings):
    """A whole run, and predictions that are the same after loading."""
    settings.candidate_dtype = "float32"
    kwargs = dict(net_arch=[64, 64], n_sampling_steps=2, sampling_eta=eta)
    results = []
    for enabled in (False, True):
        settings.enabled = enabled
        model = tiny_qvpo(n_diffusion_steps=8, **{**LARGE, "policy_kwargs": kwargs}).learn(10)
        results.append(weights_of(model))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-5, err_msg=name)
    assert model.policy.noise_bank(4).shape == (1 if eta == 0 else 2, 1, 4, 1)


@pytest.mark.parametrize("name", ["the paper's", "three uneven layers", "relu"])
def test_the_loss_and_its_gradients_are_the_eager_ones(name, settings):
    actor = model_with(action_dim=3, **NETWORKS[name]).actor
    observations, actions, noise = th.randn(64, 2), th.rand(64, 11, 3) * 2 - 1, th.randn(64, 11, 3)
    timesteps, results = th.randint(6, (64, 11)), []
    for enabled in (False, True):
        settings.enabled = enabled
        actor.zero_grad()
        loss = actor.denoising_loss(observations, actions, timesteps, noise)
        loss.mean().backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in actor.parameters())])
        is_fast = networks.trainable(actor.noise_predictor, 64 * 11) is not None
        assert is_fast == (enabled and name != "relu")
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert networks.trainable(actor.noise_predictor, 10) is None


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_the_critics_and_their_gradients_are_the_eager_ones(share_features_extractor, settings, monkeypatch):
    """SB3's own critics, which the eager path is, on the same weights."""
    model = model_with(action_dim=3, net_arch=[256, 256], share_features_extractor=share_features_extractor)
    observations, actions = th.randn(100, 2), th.rand(100, 3)
    parameters, results = [p for q_network in model.critic.q_networks for p in q_network.parameters()], []
    applied, apply = [], cpu.TrainableMish.apply
    monkeypatch.setattr(cpu.TrainableMish, "apply", lambda x: (applied.append(1), apply(x))[1])
    for enabled in (False, True):
        settings.enabled = enabled
        values = model.critic(observations, actions)
        sb3_values = super(type(model.critic), model.critic).forward(observations, actions)
        np.testing.assert_allclose(*(th.stack(each).detach() for each in (values, sb3_values)), atol=1e-5)
        assert len(applied) == (4 if enabled else 0), "two layers of two critics"
        applied.clear()
        results.append(th.autograd.grad(th.stack(values).square().sum(), parameters))
    for eager, gradient in zip(*results, strict=True):
        np.testing.assert_allclose(gradient, eager, atol=1e-5 * float(eager.abs().max()))


def test_gradients_flow_through_the_chain():
    actor = model_with(net_arch=[256, 256]).actor
    actor.sample_candidates(actor.features(th.randn(8, 2)), actor.draw_noise(8, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in actor.noise_predictor.parameters())


def test_updates_in_float32_are_the_eager_ones(settings):
    """The same weights after five updates, but for rounding; one that chose another best candidate would be far away."""
    settings.candidate_dtype = "float32"
    results = []
    for enabled in (False, True):
        settings.enabled = enabled
        results.append(weights_of(tiny_qvpo(**LARGE).learn(10)))
    assert not same_weights(*results), "the fast path was not taken"
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_run(dtype, settings):
    settings.candidate_dtype = dtype
    first, second = (weights_of(tiny_qvpo(**LARGE).learn(15)) for _ in range(2))
    assert same_weights(first, second)


def test_bfloat16_on_other_devices(settings, monkeypatch):
    """A GPU takes the eager functions with hidden layers in bfloat16: the numbers that the CPU's own path gives."""
    assert not networks.gpu_bfloat16(CPU) and not networks.gpu_bfloat16(th.device("meta"))
    monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = th.device("cuda")
    with th.no_grad():
        assert networks.gpu_bfloat16(gpu)
        settings.candidate_dtype = "float32"
        assert not networks.gpu_bfloat16(gpu)
        settings.candidate_dtype = "auto"
        monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: (7, 5))
        assert not networks.gpu_bfloat16(gpu)
        monkeypatch.setattr(networks, "gpu_bfloat16", lambda device: True)
        for kwargs in NETWORKS.values():
            actor = model_with(action_dim=3, **kwargs).actor
            features, noise = th.randn(8, 2), th.randn(6, 8, 64, 3)
            condition, predictor = actor.noise_predictor.condition(features), actor.noise_predictor
            on_the_cpu = cpu.sample_in_blocks(actor.diffusion, predictor, condition, noise, th.bfloat16)
            exact = actor.diffusion.sample(predictor, condition, noise)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "worth_blocking", lambda *args: False)  # otherwise the CPU's own path comes first
                candidates = actor.sample_candidates(features, noise, for_training=True)
                assert th.equal(actor.sample_candidates(features, noise), exact)
            assert (candidates - on_the_cpu).abs().mean() < 1e-3
            assert (candidates - exact).abs().max() > 0 or len(predictor.later_layers) == 2
            assert (candidates - exact).abs().mean() < 2e-3
        unusual = model_with(action_dim=3).actor
        unusual.noise_predictor.later_layers.insert(1, nn.Dropout())
        unusual.eval()
        condition = unusual.noise_predictor.condition(features)
        exact = unusual.diffusion.sample(unusual.noise_predictor, condition, noise)
        assert th.equal(unusual.sample_candidates(features, noise, for_training=True), exact)


def test_reduced_precision_is_for_training_candidates_only(settings, monkeypatch):
    """Actions, predictions and all values are in float32."""
    settings.candidate_dtype = "bfloat16"
    dtypes, sample, value = [], cpu.sample_in_blocks, cpu.value_in_blocks
    monkeypatch.setattr(cpu, "sample_in_blocks", lambda *args: (dtypes.append(args[4]), sample(*args))[1])
    monkeypatch.setattr(cpu, "value_in_blocks", lambda *args: (dtypes.append(("value", args[3])), value(*args))[1])
    model = tiny_qvpo(**LARGE, n_target_candidates=8)
    model.learn(6)
    in_float32 = [("value", th.float32)] * 2
    assert dtypes == [th.bfloat16, *in_float32, th.bfloat16, *in_float32]  # TD target, policy step
    dtypes.clear()
    model.n_eval_candidates = model.n_behavior_candidates = 512
    for deterministic in (True, False):
        model.predict(np.zeros((2, 3), np.float32), deterministic=deterministic)
    # One observation at a time has a path of its own, in float32
    assert dtypes == [*in_float32, *in_float32, th.float32, *in_float32]


@pytest.mark.parametrize("critic_type", ["crossq", "quantile"])
def test_values_that_only_serve_a_choice_are_in_reduced_precision_too(critic_type, settings, monkeypatch):
    """Those of the TD target's candidates, if the target's value comes from elsewhere; none while acting."""
    settings.candidate_dtype = "bfloat16"
    dtypes, value = [], cpu.value_in_blocks
    monkeypatch.setattr(cpu, "value_in_blocks", lambda *args: (dtypes.append(args[3]), value(*args))[1])
    model = tiny_qvpo(**LARGE, n_target_candidates=16, critic_type=critic_type)
    model.learn(6)
    assert dtypes == [th.bfloat16] * 2 + [th.float32] * 2  # TD target, policy step
    dtypes.clear()
    model.n_eval_candidates = model.n_behavior_candidates = 1024
    for deterministic in (True, False):
        model.predict(np.zeros((2, 3), np.float32), deterministic=deterministic)
    # Deterministic actions are chosen one observation at a time
    assert dtypes == [th.float32] * 6


@pytest.mark.parametrize("critic_type", ["crossq", "quantile"])
def test_the_choice_in_reduced_precision_is_as_good(critic_type, settings):
    """Rounding is a hundredth of what values differ by. So what is chosen among 16 actions is nearly the best."""
    model = tiny_qvpo(**LARGE, critic_type=critic_type)
    critic = model.critic.eval()
    with th.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.2 * th.randn_like(parameter))
        features, candidates = th.randn(64, 3), 2 * th.rand(64, 16, 1) - 1
        scores, ranks = critic.score(features, candidates), {}
        for dtype in ("float32", "bfloat16"):
            settings.candidate_dtype = dtype
            ranks[dtype] = critic.rank(features, candidates)
    assert th.equal(ranks["float32"], scores)
    assert not th.equal(ranks["bfloat16"], scores)
    chosen = scores.gather(1, ranks["bfloat16"].argmax(dim=1, keepdim=True)).squeeze(1)
    lost = (scores.max(dim=1).values - chosen) / scores.std(dim=1)
    assert lost.mean() < 0.005
    assert (ranks["bfloat16"] - scores).std() < 0.01 * scores.std()


def test_critics_with_scores_of_their_own_choose_by_those(settings):
    """A subclass may score in another way, which the fast path does not know."""
    settings.candidate_dtype = "bfloat16"
    model = tiny_qvpo(**LARGE, critic_type="crossq")

    class Opposite(type(model.critic)):
        def score(self, features, candidates):
            return -super().score(features, candidates)

    critic, features, candidates = model.critic.eval(), th.randn(64, 3), 2 * th.rand(64, 16, 1) - 1
    with th.no_grad():
        critic.__class__, scores = Opposite, critic.score(features, candidates)
        assert th.equal(critic.rank(features, candidates), -scores)


TRAINED = {
    "two peaks": dict(env=BanditEnv(lambda action: -min((action[0] - 0.6) ** 2, (action[0] + 0.6) ** 2)), ent_coef=0.1),
    "narrow": dict(env=BanditEnv(lambda action: -10 * (action[0] - 0.3) ** 2), ent_coef=0.0),
    "two dimensions": dict(env=BanditEnv(lambda action: action[0] * action[1], action_dim=2), ent_coef=0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_bfloat16_does_not_change_the_distribution_of_a_policy(name):
    """
    The Kolmogorov-Smirnov distance of two samples of 400 000 actions, one drawn in each type, is below a hundredth, in each
    dimension and in their sum; chance alone gives up to 0.0036 (one in a hundred). With three million actions the "narrow"
    policy shows 0.005, a shift of its mean by a hundredth of its standard deviation, the others nothing beyond chance.
    """
    settings = dict(n_diffusion_steps=10, batch_size=64, n_train_candidates=16, learning_rate=3e-3)
    model = tiny_qvpo(**TRAINED[name], **settings, policy_kwargs=dict(net_arch=[64, 64])).learn(300)
    shape = (10, 400, 1000, model.actor.action_dim)
    dtypes = (th.float32, th.bfloat16)

    def draw(dtype, noise):
        with th.no_grad():
            condition = model.actor.noise_predictor.condition(th.zeros(noise.shape[1], 2))
            actions = cpu.sample_in_blocks(model.actor.diffusion, model.actor.noise_predictor, condition, noise, dtype)
        return actions.flatten(0, 1).double().numpy()

    exact, reduced = (draw(dtype, th.randn(shape)) for dtype in dtypes)
    for direction in (*np.eye(exact.shape[1]), np.ones(exact.shape[1])):
        assert ks_2samp(exact @ direction, reduced @ direction).statistic < 0.01
    assert 0.01 < exact.std() < 1.01, "a policy worth comparing"
    noise = th.randn(shape)[:, :40]
    distances = np.abs(draw(th.float32, noise) - draw(th.bfloat16, noise))
    assert 0 < distances.mean() < 2e-3
    shifted = exact + 0.05 * exact.std()
    assert ks_2samp(shifted[:, 0], reduced[:, 0]).statistic > 0.01, "the test would notice a twentieth of a standard deviation"
