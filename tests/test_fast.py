"""The fast paths compute what the readable functions compute, and only where they pay off."""

import functools
import inspect
import platform
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch as th
from helpers import BanditEnv, same_weights, tiny_qvpo, weights_of
from scipy.stats import ks_2samp
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common import fast, policies
from sb3_qvpo.common.actor_critic import DiffusionActor

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


def test_mish_of_negated():
    x = th.cat([th.linspace(-120, 120, 20_001), th.linspace(-3, 3, 20_001), th.tensor([0.0, 1e-30, -1e-30])])
    np.testing.assert_allclose(fast.mish_of_negated(-x, fast.Scratch()), F.mish(x.double()), atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("action_dim", "block_size"), [(1, 2**19), (3, 2**19), (3, 2**15)])
def test_candidates_and_values_are_those_of_the_readable_functions(name, action_dim, block_size, settings, monkeypatch):
    """With the same noise, in one block or in several."""
    monkeypatch.setitem(fast.BLOCK_SIZES, th.float32, block_size)
    policy = model_with(action_dim, **NETWORKS[name]).policy
    observations, noise = th.randn(37, 2), th.randn(6, 37, 64, action_dim)
    results = []
    for enabled in (False, True):
        settings.enabled = enabled
        with th.no_grad():
            assert fast.pays_off(list(policy.actor.noise_predictor.later_layers), 37 * 64, th.device("cpu")) == enabled
            results.append(policy.rank_candidates(observations, 64, noise))
    (readable_actions, readable_values), (actions, values) = results
    np.testing.assert_allclose(actions, readable_actions, atol=1e-5)
    np.testing.assert_allclose(values, readable_values, atol=1e-5)
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
            results.append(actor.sample_candidates(features, n_candidates, noise))
    np.testing.assert_allclose(*results, atol=1e-5)
    assert results[0].shape == (1, n_candidates, action_dim)


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


@pytest.mark.parametrize("n_shared_steps", [1, 3, 5])
def test_shared_steps(n_shared_steps, settings):
    """
    As if the candidates had the same start and the same noise up to the step that parts them, in either path; each alone is
    distributed as without, and all that are shared are taken once.
    """
    settings.candidate_dtype = "float32"
    actor = model_with(action_dim=2, net_arch=[64, 64]).actor
    features, noise = th.randn(5, 2), th.randn(6, 5, 300, 2)
    same = noise.clone()
    same[:n_shared_steps] = noise[:n_shared_steps, :, :1]
    results = []
    with th.no_grad():
        for enabled in (False, True):
            settings.enabled = enabled
            results.append(actor.sample_candidates(features, 300, noise, n_shared_steps=n_shared_steps))
        expected = actor.sample_candidates(features, 300, same)
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)
    rows = []
    settings.enabled = False
    actor.noise_predictor.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with th.no_grad():
        actor.sample_candidates(features, 300, noise, n_shared_steps=n_shared_steps)
        assert rows == [1] * n_shared_steps + [300] * (6 - n_shared_steps)
        one_state = th.zeros(4000, 2)
        alone = actor.sample_candidates(one_state, 2, n_shared_steps=n_shared_steps)[:, 0]
        independent = actor.sample_candidates(one_state, 2)[:, 0]
    assert ks_2samp(alone.flatten(), independent.flatten()).pvalue > 0.01


def test_trainable_mish():
    """Values, gradients, and gradients against finite differences in float64."""
    x = th.cat([th.linspace(-60, 60, 4001), th.linspace(-4, 4, 4001)]).requires_grad_()
    gradient = th.randn_like(x)
    results = [(function(x), *th.autograd.grad(function(x), x, gradient)) for function in (F.mish, fast.TrainableMish.apply)]
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result.detach(), expected.detach(), atol=6e-6)
    x = th.randn(20, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(fast.TrainableMish.apply, x)
    assert th.autograd.gradgradcheck(fast.TrainableMish.apply, x)


@pytest.mark.parametrize("name", ["the paper's", "three uneven layers", "relu"])
def test_the_loss_and_its_gradients_are_the_readable_ones(name, settings):
    actor = model_with(action_dim=3, **NETWORKS[name]).actor
    observations, actions, noise = th.randn(64, 2), th.rand(64, 11, 3) * 2 - 1, th.randn(64, 11, 3)
    timesteps, results = th.randint(6, (64, 11)), []
    for enabled in (False, True):
        settings.enabled = enabled
        actor.zero_grad()
        loss = actor.denoising_loss(observations, actions, timesteps, noise)
        loss.mean().backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in actor.parameters())])
        is_fast = fast.trainable(actor.noise_predictor, 64 * 11) is not actor.noise_predictor
        assert is_fast == (enabled and name != "relu")
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert fast.trainable(actor.noise_predictor, 10) is actor.noise_predictor


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_the_critics_and_their_gradients_are_the_readable_ones(share_features_extractor, settings, monkeypatch):
    """SB3's own critics, which the readable path is, on the same weights."""
    model = model_with(action_dim=3, net_arch=[256, 256], share_features_extractor=share_features_extractor)
    observations, actions = th.randn(100, 2), th.rand(100, 3)
    parameters, results = [p for q_network in model.critic.q_networks for p in q_network.parameters()], []
    applied, apply = [], fast.TrainableMish.apply
    monkeypatch.setattr(fast.TrainableMish, "apply", lambda x: (applied.append(1), apply(x))[1])
    for enabled in (False, True):
        settings.enabled = enabled
        values = model.critic(observations, actions)
        sb3_values = super(type(model.critic), model.critic).forward(observations, actions)
        np.testing.assert_allclose(*(th.stack(each).detach() for each in (values, sb3_values)), atol=1e-5)
        assert len(applied) == (4 if enabled else 0), "two layers of two critics"
        applied.clear()
        results.append(th.autograd.grad(th.stack(values).square().sum(), parameters))
    for readable, gradient in zip(*results, strict=True):
        np.testing.assert_allclose(gradient, readable, atol=1e-5 * float(readable.abs().max()))


def precision() -> str:
    return th.backends.mkldnn.matmul.fp32_precision


@pytest.mark.skipif(not hasattr(th.backends.mkldnn, "matmul"), reason="torch before 2.9 has no such setting")
def test_onednn_multiplies_where_it_costs_no_precision(settings, monkeypatch):
    """Within ``train()`` only, put back after an error, not against a user's setting, and not where bits would be lost."""
    model = tiny_qvpo(n_diffusion_steps=2)
    model.learn(4)
    seen, sample = [], model.replay_buffer.sample

    def watched(*args, **kwargs):
        seen.append(precision())
        if len(seen) == 2:
            raise RuntimeError("broken buffer")
        return sample(*args, **kwargs)

    monkeypatch.setattr(model.replay_buffer, "sample", watched)
    before = precision()
    model.train(1, 4)
    assert seen == ["bf16" if fast.onednn_keeps_float32() else before] and precision() == before
    with pytest.raises(RuntimeError, match="broken buffer"):
        model.train(1, 4)
    assert precision() == before
    settings.enabled = False
    model.train(1, 4)
    settings.enabled = True
    monkeypatch.setattr(fast, "onednn_keeps_float32", lambda: False)
    model.train(1, 4)
    assert seen[2:] == [before, before]
    monkeypatch.setattr(fast, "onednn_keeps_float32", lambda: True)
    th.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        model.train(1, 4)
        assert seen[4:] == ["tf32"] and precision() == "tf32"
    finally:
        th.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.skipif(not fast.onednn_keeps_float32(), reason="nothing is switched here")
def test_threads_that_overlap():
    """The last one to leave puts the setting back."""
    before, steps = precision(), [threading.Event() for _ in range(3)]

    @fast.OneDnnProducts()
    def first():
        steps[0].set()
        steps[1].wait(10)

    @fast.OneDnnProducts()
    def second():
        steps[2].wait(10)

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    steps[0].wait(10)
    steps[1].set()
    threads[0].join()
    assert precision() == "bf16", "the other one is still at work"
    steps[2].set()
    threads[1].join()
    assert precision() == before


def test_whether_onednn_keeps_float32_is_seen_from_a_product(monkeypatch):
    """A processor that really multiplies in bfloat16 there is found out."""
    linear = F.linear
    probe = inspect.unwrap(fast.onednn_keeps_float32)  # without its memory
    assert probe() == fast.onednn_keeps_float32()
    monkeypatch.setattr(F, "linear", lambda x, weight: linear(x.bfloat16(), weight.bfloat16()).float())
    assert not probe()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_freed_memory_is_kept():
    """
    Large results are written to memory that the process has already, in a process of its own.

    The heap grows once or twice until it holds them all; what counts is what each later turn costs. Without the
    call each mostly writes to 60 000 new pages.
    """
    code = """
import resource, torch as th
from sb3_qvpo.common import fast
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [th.ones(700_000) + 1 for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
th.set_num_threads(1)
fast.keep_freed_memory()
print(min(faults() for _ in range(10)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) < 10, "of 110 000 pages that each turn writes"


@pytest.mark.parametrize(("n_threads", "n_blocks"), [(1, 16), (2, 8), (64, 1)])
def test_blocks_cover_all_states_once(n_threads, n_blocks, monkeypatch):
    """1024 rows of width 256 for each thread, until a block is large."""
    monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
    for n_states, n_candidates, width in [(256, 64, 256), (37, 64, 96), (5, 100_000, 256), (1, 1, 8)]:
        states = np.arange(n_states)
        covered = [states[block] for block in fast.blocks(n_states, n_candidates, width, th.float32)]
        np.testing.assert_array_equal(np.concatenate(covered), states)
    assert len(fast.blocks(256, 64, 256, th.float32)) == n_blocks
    assert len(fast.blocks(2560, 64, 256, th.float32)) == (5 if n_threads == 64 else 10 * n_blocks)


@pytest.mark.parametrize("n_rows", [255, 256, 300])
def test_few_rows_take_the_readable_path(n_rows):
    layers = list(model_with(net_arch=[64, 64]).actor.noise_predictor.later_layers)
    with th.no_grad():
        assert fast.pays_off(layers, n_rows, th.device("cpu")) == (n_rows >= 256)  # of width 64
        assert not fast.pays_off(layers, n_rows, th.device("meta"))
        assert not fast.pays_off([], n_rows, th.device("cpu"))
        assert not fast.pays_off([nn.Linear(64, 64), nn.Mish()], n_rows, th.device("cpu"))
    assert not fast.pays_off(layers, n_rows, th.device("cpu")), "gradients need the readable path"


def test_gradients_flow_through_the_chain():
    actor = model_with(net_arch=[256, 256]).actor
    actor.sample_candidates(actor.features(th.randn(8, 2)), 64).sum().backward()
    assert all(parameter.grad is not None for parameter in actor.noise_predictor.parameters())


LARGE = dict(n_train_candidates=64, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))
"""Large enough for the fast path in the policy step, the TD target being small."""


def test_updates_in_float32_are_the_readable_ones(settings):
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


def test_the_type_of_candidates(settings, monkeypatch):
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: True)
    assert fast.candidate_dtype(CPU) == th.bfloat16
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: False)
    assert fast.candidate_dtype(CPU) == th.float32
    settings.candidate_dtype = "bfloat16"
    assert fast.candidate_dtype(CPU) == th.bfloat16
    settings.candidate_dtype = "float16"
    with pytest.raises(ValueError, match=r"candidate_dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"):
        fast.candidate_dtype(CPU)


def test_bfloat16_on_other_devices(settings, monkeypatch):
    """A GPU takes the readable functions with hidden layers in bfloat16: the numbers that the CPU's own path gives."""
    assert not fast.reduces(CPU) and not fast.reduces(th.device("meta"))
    monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = th.device("cuda")
    with th.no_grad():
        assert fast.reduces(gpu)
        settings.candidate_dtype = "float32"
        assert not fast.reduces(gpu)
        settings.candidate_dtype = "auto"
        monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: (7, 5))
        assert not fast.reduces(gpu)
        monkeypatch.setattr(fast, "reduces", lambda device: True)
        for kwargs in NETWORKS.values():
            actor = model_with(action_dim=3, **kwargs).actor
            features, noise = th.randn(8, 2), th.randn(6, 8, 64, 3)
            condition, predictor = actor.noise_predictor.condition(features), actor.noise_predictor
            on_the_cpu = fast.sample_candidates(actor.diffusion, predictor, condition, noise, th.bfloat16)
            exact = actor.diffusion.sample(predictor, condition, noise)
            settings.enabled = False  # otherwise the CPU's own path comes first
            candidates = actor.sample_candidates(features, 64, noise, reduced_precision=True)
            assert th.equal(actor.sample_candidates(features, 64, noise), exact)
            settings.enabled = True
            assert (candidates - on_the_cpu).abs().mean() < 1e-3
            assert (candidates - exact).abs().max() > 0 or len(predictor.later_layers) == 2
            assert (candidates - exact).abs().mean() < 2e-3
    unusual = model_with().actor.noise_predictor
    unusual.later_layers.insert(1, nn.Dropout())
    assert fast.reduced(unusual) is unusual


def test_reduced_precision_is_for_training_candidates_only(settings, monkeypatch):
    """Actions, predictions and all values are in float32."""
    settings.candidate_dtype = "bfloat16"
    dtypes, sample, value = [], fast.sample_candidates, fast.value_candidates
    monkeypatch.setattr(fast, "sample_candidates", lambda *args: (dtypes.append(args[4]), sample(*args))[1])
    monkeypatch.setattr(fast, "value_candidates", lambda *args: (dtypes.append("value"), value(*args))[1])
    model = tiny_qvpo(**LARGE, n_target_candidates=8)
    model.learn(6)
    assert dtypes == [th.bfloat16, "value", "value", th.bfloat16, "value", "value"]  # TD target, policy step
    dtypes.clear()
    model.n_eval_candidates = model.n_behavior_candidates = 512
    for deterministic in (True, False):
        model.predict(np.zeros((2, 3), np.float32), deterministic=deterministic)
    # One observation at a time has a path of its own, in float32
    assert dtypes == ["value"] * 4 + [th.float32, "value", "value"]


TRAINED = {
    "two peaks": dict(env=BanditEnv(lambda action: -min((action[0] - 0.6) ** 2, (action[0] + 0.6) ** 2)), ent_coef=0.1),
    "narrow": dict(env=BanditEnv(lambda action: -10 * (action[0] - 0.3) ** 2), ent_coef=0.0),
    "two dimensions": dict(env=BanditEnv(lambda action: action[0] * action[1], action_dim=2), ent_coef=0.02),
}


@pytest.mark.parametrize("name", TRAINED)
def test_bfloat16_does_not_change_the_distribution_of_a_policy(name):
    """
    The Kolmogorov-Smirnov distance of two samples of 400 000 actions, one drawn in each type, is below a hundredth, in each
    dimension and in their sum; chance alone gives up to 0.0036 (one in a hundred). With three million actions the "narrow"
    policy shows 0.005, a shift of its mean by a hundredth of its standard deviation, the others nothing beyond chance.
    """
    settings = dict(n_diffusion_steps=10, batch_size=64, n_train_candidates=16, learning_rate=3e-3)
    model = tiny_qvpo(**TRAINED[name], **settings, policy_kwargs=dict(net_arch=[64, 64])).learn(300)
    features = th.zeros(400, 2)
    shape = (10, 400, 1000, model.actor.action_dim)
    dtypes = (th.float32, th.bfloat16)

    def draw(dtype, noise):
        with th.no_grad():
            condition = model.actor.noise_predictor.condition(features)
            actions = fast.sample_candidates(model.actor.diffusion, model.actor.noise_predictor, condition, noise, dtype)
        return actions.flatten(0, 1).double().numpy()

    exact, reduced = (draw(dtype, th.randn(shape)) for dtype in dtypes)
    for direction in (*np.eye(exact.shape[1]), np.ones(exact.shape[1])):
        assert ks_2samp(exact @ direction, reduced @ direction).statistic < 0.01
    assert 0.01 < exact.std() < 1.01, "a policy worth comparing"
    noise = th.randn(shape)
    distances = np.abs(draw(th.float32, noise) - draw(th.bfloat16, noise))
    assert 0 < distances.mean() < 2e-3
    shifted = exact + 0.05 * exact.std()
    assert ks_2samp(shifted[:, 0], reduced[:, 0]).statistic > 0.01, "the test would notice a twentieth of a standard deviation"


def test_memory_of_large_draws_has_a_bound(monkeypatch):
    """States go through in parts, each with noise of its own; what is drawn is what the parts would draw alone."""
    observations, width = th.randn(10, 3), 9
    sizes, sample = [], DiffusionActor.sample_candidates

    def watched(self, features, n_candidates, *args):
        sizes.append(len(features))
        return sample(self, features, n_candidates, *args)

    monkeypatch.setattr(DiffusionActor, "sample_candidates", watched)
    model = tiny_qvpo(n_train_candidates=6, policy_kwargs=dict(net_arch=dict(pi=[8], qf=[width])))
    policy = model.policy
    assert policy.states_at_once(6) > 10
    monkeypatch.setattr(policies, "LARGEST_DRAW", 4 * 6 * width + 1)
    assert policy.states_at_once(6) == 4 and policy.states_at_once(1000) == 1
    th.manual_seed(0)
    actions, values = policy.rank_candidates(observations, 6)
    assert sizes == [4, 4, 2] and actions.shape == (10, 6, 1) and values.shape == (10, 6)
    th.manual_seed(0)
    parts = [policy.rank_candidates(part, 6) for part in th.split(observations, 4)]
    for i, whole in enumerate((actions, values)):
        th.testing.assert_close(th.cat([part[i] for part in parts]), whole)
    policy.rank_candidates(observations, 6, model.actor.draw_noise(10, 6))
    assert sizes[-1] == 10, "the caller's noise has its size already"
    assert model._draw_actor_noise(10).chain is None and model._draw_actor_noise(4).chain.shape == (3, 4, 6, 1)
    sizes.clear()
    model.learn(7)
    assert sizes[-3:] == [8, 4, 4], "the target's candidates are two, the policy step's six"
    long_noise = tiny_qvpo(n_diffusion_steps=50).policy
    assert long_noise.states_at_once(1) == (4 * 6 * width + 1) // 50
