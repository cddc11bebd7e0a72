"""
Updates captured in graphs do what the eager ones do. There is no GPU here. A stand-in for a CUDA graph records a function
without running it. On replay it runs the function with the tensors that it was recorded with, as a graph does. ``test_gpu.py``
has the real ones.
"""

import copy
import sys
from collections import defaultdict
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import (
    SCHEDULES,
    TINY,
    TINY_FROM_DATA,
    TINY_SOFT,
    TINY_TRUSTED,
    DictEnv,
    Samples,
    batch_of,
    guard_of,
    metric_sums,
    report_errors_later,
    runner_of,
    same_weights,
    take_bad_steps,
    tiny_diffusion_ql,
    tiny_dtql,
    tiny_qvpo,
    tiny_sdac,
    use_runner,
    weights_of,
)
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_qvpo import DTQL, QVPO, SDAC, DiffusionQL
from sb3_qvpo.common.speed import optimizers, updates
from sb3_qvpo.common.speed.updates import UpdateRunner, flat_items, rebuild


def recorded(function, device):
    """The stand-in for :func:`sb3_qvpo.common.speed.graphs.cuda_graph`."""
    results = {}
    return lambda: results.update({name: value.detach().clone() for name, value in function().items()}), results


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch):
    """Adam refuses the CPU; its arithmetic works there."""
    adam = sys.modules["torch.optim.adam"]  # torch.optim hides it
    known = adam._get_capturable_supported_devices()
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *args, **kwargs: [*known, "cpu"])


class RunnerOnTheCpu(UpdateRunner):
    """Captures updates as on a GPU."""

    captures_on = ("cpu",)


def on_an_accelerator(capture=recorded, env="Pendulum-v1", policy="MlpPolicy", algorithm=QVPO, defaults=TINY, **kwargs):
    """A model that trains as on a GPU, but on the CPU."""
    model = algorithm(policy, env, **{**defaults, **kwargs})
    use_runner(model, RunnerOnTheCpu(capture))
    report_errors_later(model)
    return model


def close(first, second) -> bool:
    first, second = weights_of(first), weights_of(second)
    return all(th.allclose(first[name], second[name], rtol=1e-5, atol=1e-5) for name in first)


CASES = {
    "plain": dict(),
    "delayed": dict(policy_delay=2, max_grad_norm=0.5),
    "schedules": SCHEDULES,
    "dictionaries": dict(env=DictEnv(), policy="MultiInputPolicy"),
    "n-step, normalised features": dict(n_steps=3, policy_kwargs=dict(net_arch=[8], normalize_features=True)),
    "norms and gradients of actions": dict(
        critic_type="crossq",
        n_improvement_steps=2,
        training_action_noise=0.3,
        n_target_candidates=2,
        policy_delay=2,
        policy_kwargs=dict(net_arch=[8], prediction="v", sampler="dpm++", optimizer_kwargs=dict(eps=1e-3)),
    ),
    "renormalisation that starts meanwhile": dict(critic_type="crossq", policy_kwargs=dict(net_arch=[8], renorm_start=20)),
    "mean of the critics": dict(critic_type="crossq", policy_kwargs=dict(net_arch=[8], pessimism=0)),
    "quantiles": dict(critic_type="quantile"),
}


SOFT_CASES = {
    "authors' schedule": dict(),
    "learnt temperature": dict(temperature="auto", q_scaling="spread"),
    "without chains": dict(temperature="lin_1_0.5", q_scaling="spread", proposal_actions="replay", critic_type="crossq"),
    "improved draws": dict(n_improvement_steps=2, temperature=0.2, training_action_noise="lin_0.4_0.1"),
}


@pytest.mark.parametrize("name", SOFT_CASES)
def test_captured_training_of_sdac_is_training(name):
    """What it learns beside its networks, temperature and spread, among what graphs change."""
    model = on_an_accelerator(algorithm=SDAC, defaults=TINY_SOFT, **SOFT_CASES[name]).learn(60)
    plain = tiny_sdac(**SOFT_CASES[name]).learn(60)
    assert close(model, plain)
    assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed
    th.testing.assert_close(model.log_temperature, plain.log_temperature)
    th.testing.assert_close(model.value_spread, plain.value_spread)


IMPLICIT = dict(net_arch=[8], one_step_policy="implicit", normalize_features=True)


@pytest.mark.parametrize(
    ("algorithm", "defaults", "settings", "n_graphs"),
    [
        (DiffusionQL, TINY_FROM_DATA, dict(max_grad_norm=0.5), 2),
        (DiffusionQL, TINY_FROM_DATA, dict(q_normalization="data", max_q_backup=True), 2),
        (DTQL, TINY_TRUSTED, dict(log_prob_coef=1.0), 3),
        (DTQL, TINY_TRUSTED, dict(value_target="online", policy_kwargs=IMPLICIT), 3),
    ],
)
def test_captured_training_of_algorithms_for_data_is_training(algorithm, defaults, settings, n_graphs):
    """Gradients through a chain, and those that are read back for the log. What happens every few updates is no part of it."""
    model = on_an_accelerator(algorithm=algorithm, defaults=defaults, **settings).learn(60)
    plain = algorithm("MlpPolicy", "Pendulum-v1", **{**defaults, **settings}).learn(60)
    assert close(model, plain)
    assert len(runner_of(model).graphs) == n_graphs and not runner_of(model).failed
    assert metric_sums(model).keys() == metric_sums(plain).keys()


@pytest.mark.parametrize("name", CASES)
def test_captured_training_is_training(name):
    """Weights, metrics and random numbers; each kind of update is captured once."""
    model = on_an_accelerator(**CASES[name]).learn(60)
    random_number = th.rand(1)
    plain = tiny_qvpo(**CASES[name]).learn(60)
    assert th.equal(random_number, th.rand(1))
    assert close(model, plain)
    assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed
    assert model._n_updates == plain._n_updates == 55
    model.logger.name_to_value.clear()
    for each in (model, plain):
        metric_sums(each).clear()
        th.manual_seed(0)
        np.random.seed(0)
        each.train(4, 8)
    assert metric_sums(model).keys() == metric_sums(plain).keys()
    for metric, (total, count) in metric_sums(plain).items():
        np.testing.assert_allclose(metric_sums(model)[metric][0], total, rtol=1e-2, atol=1e-4, err_msg=metric)
        assert metric_sums(model)[metric][1] == count


def test_only_replays_run_once_captured():
    """The update itself is called for the first ones, the check and the recording, then never again."""
    runs = []

    def counting(function, device):
        replay, results = recorded(function, device)
        return lambda: (runs.append(1), replay()), results

    model = on_an_accelerator(counting).learn(60)
    assert len(runs) == 2 * (55 - updates.EAGER_UPDATES)  # of critics, of the policy
    model.gamma = 0.5  # another kind
    model.train(updates.EAGER_UPDATES + 3, 8)
    assert len(runs) == 2 * (55 - updates.EAGER_UPDATES + 3) and len(runner_of(model).graphs) == 4
    model.train(updates.EAGER_UPDATES + 3, 4)  # another batch size
    assert len(runner_of(model).graphs) == 6


def test_settings_that_change_all_the_time_are_not_captured(monkeypatch):
    monkeypatch.setattr(updates, "MOST_GRAPHS", 2)
    monkeypatch.setattr(updates, "EAGER_UPDATES", 1)
    model = on_an_accelerator().learn(6)
    for gamma in (0.1, 0.2, 0.3, 0.4):
        model.gamma = gamma
        model.train(3, 8)
    assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed


def twice(function, device):
    replay, results = recorded(function, device)
    return lambda: (replay(), replay()), results


def too_early(function, device):
    """Runs the function while recording, as kernels on another device would, and nothing on replay."""
    return lambda: None, function()


def idle(function, device):
    """A graph that does nothing."""
    return lambda: None, {}


def broken(function, device):
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (twice, "captured and eager update differ by"),
        (too_early, "was run instead of being captured"),
        (idle, "captured and eager update differ by"),
        (broken, "operation not permitted when stream"),
    ],
)
def test_what_cannot_be_captured_is_done_eagerly(capture, message):
    """One warning, and the run is the one without graphs."""
    model = on_an_accelerator(capture)
    with pytest.warns(UserWarning, match=f"not captured in a graph .* longer: .*{message}") as record:
        model.learn(60)
    assert len(record) == 1 and runner_of(model).failed and not runner_of(model).graphs
    random_number = th.rand(1)
    plain = tiny_qvpo().learn(60)
    assert th.equal(random_number, th.rand(1)) and close(model, plain) and model._n_updates == plain._n_updates


def test_an_optimizer_that_cannot_be_captured():
    kwargs = dict(policy_kwargs=dict(net_arch=[8, 8], optimizer_class=th.optim.SGD))
    model = on_an_accelerator(**kwargs)
    with pytest.warns(UserWarning, match="the optimiser has no 'capturable' argument"):
        model.learn(60)
    assert close(model, tiny_qvpo(**kwargs).learn(60))


def test_bad_steps_are_undone_in_a_graph_too():
    """With the number of the first bad update, which is not the one that was recorded."""
    model = on_an_accelerator().learn(40)
    assert runner_of(model).graphs
    take_bad_steps(model)
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update 36"):
        guard_of(model).report(100)
    model.train(5, batch_size=8)
    guard_of(model).report(100)


def test_saved_models_carry_nothing_of_it(tmp_path):
    """They load and train anywhere; loading drops the graphs."""
    model = on_an_accelerator().learn(40)
    assert isinstance(model.actor.optimizer.param_groups[0]["lr"], th.Tensor)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    partial = model.get_parameters()
    model.set_parameters({"policy": partial["policy"]}, exact_match=False)
    assert all(group["capturable"] is False for group in model.get_parameters()["actor.optimizer"]["param_groups"])
    model.learn(40, reset_num_timesteps=False)
    for optimizer in (loaded.actor.optimizer, loaded.critic.optimizer):
        assert optimizer.param_groups[0]["capturable"] is False and type(optimizer.param_groups[0]["lr"]) is float
    loaded.learn(10, reset_num_timesteps=False)
    assert not runner_of(loaded).graphs
    assert runner_of(model).graphs
    model.set_parameters(model.get_parameters())
    assert not runner_of(model).graphs and type(model.actor.optimizer.param_groups[0]["lr"]) is float
    model.learn(40, reset_num_timesteps=False)
    assert runner_of(model).graphs and not runner_of(model).failed


def test_copies_make_their_own():
    model = on_an_accelerator().learn(40)
    copied = copy.deepcopy(model)
    assert runner_of(model).graphs and not runner_of(copied).graphs
    before = weights_of(model)
    copied.learn(40, reset_num_timesteps=False)
    assert runner_of(copied).graphs and not runner_of(copied).failed
    assert same_weights(weights_of(model), before)


def test_graphs_of_replaced_tensors_are_dropped():
    """An optimiser state that was loaded by hand: a graph would write to the memory of the old one."""
    model = on_an_accelerator().learn(40)
    before = dict(runner_of(model).graphs)
    model.actor.optimizer.load_state_dict(copy.deepcopy(model.actor.optimizer.state_dict()))
    model.train(3, 8)
    assert not runner_of(model).failed
    assert all(runner_of(model).graphs.get(kind) is not graph for kind, graph in before.items())


def new_optimizer(model, predictor, optimizer):
    model.actor.optimizer = model.policy._make_optimizer(list(model.actor.parameters()), 1e-3)


KINDS_OF_PLACES = {
    "parameter": lambda model, predictor, _: setattr(
        predictor.first_layer, "bias", th.nn.Parameter(predictor.first_layer.bias.detach().clone())
    ),
    "memory": lambda model, predictor, _: setattr(
        predictor.first_layer.bias, "data", predictor.first_layer.bias.detach().clone()
    ),
    "module": lambda model, predictor, _: setattr(predictor, "first_layer", copy.deepcopy(predictor.first_layer)),
    "buffer": lambda model, predictor, _: setattr(predictor, "time_features", predictor.time_features.clone()),
    "another buffer": lambda model, predictor, _: predictor.register_buffer("more", th.zeros(1)),
    "moment": lambda model, predictor, optimizer: optimizer.state[predictor.first_layer.bias].update(
        exp_avg=th.zeros_like(predictor.first_layer.bias)
    ),
    "moments of a parameter": lambda model, predictor, optimizer: optimizer.state.pop(predictor.first_layer.bias),
    "all moments": lambda model, predictor, optimizer: optimizer.state.clear(),
    "state": lambda model, predictor, optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "optimizer": new_optimizer,
}


@pytest.mark.parametrize("what", [*KINDS_OF_PLACES])
def test_what_is_replaced_is_noticed(what):
    """And nothing else: a graph is kept while all is where it was."""
    model = on_an_accelerator().learn(40)
    before = dict(runner_of(model).graphs)
    model.train(3, 8)
    assert runner_of(model).graphs == before
    KINDS_OF_PLACES[what](model, model.actor.noise_predictor, model.actor.optimizer)
    model.train(updates.EAGER_UPDATES + 3, 8)
    now = runner_of(model).graphs
    assert not runner_of(model).failed and len(now) == 2
    assert all(now.get(kind) is not graph for kind, graph in before.items())


def test_functions_of_the_user_are_not_captured():
    """They may have a state of their own, a temperature that falls say."""
    calls = []
    model = on_an_accelerator(q_weighting=lambda q_values: (calls.append(1), th.ones_like(q_values))[1]).learn(40)
    assert not runner_of(model).graphs and len(calls) >= 35


def test_batches_are_taken_apart_and_put_together():
    ones = th.ones(2, 1)
    batch = ReplayBufferSamples({"b": ones, "a": 2 * ones}, 3 * ones, {"b": 4 * ones, "a": 5 * ones}, 6 * ones, 7 * ones)
    items = flat_items(batch._asdict())
    assert [name for name, _ in items] == [
        *("observations.b", "observations.a", "actions", "next_observations.b", "next_observations.a", "dones", "rewards")
    ]
    again = rebuild(batch._asdict(), (10 * tensor for _, tensor in items))
    assert again["observations"]["a"].equal(20 * ones) and again["rewards"].equal(70 * ones) and again["discounts"] is None


class OnDeviceOnly(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor on the CPU: on a GPU a copy, for which it might wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves([args, kwargs, result]):
            assert not isinstance(value, th.Tensor) or value.device.type == "meta", f"{function} with a tensor on the CPU"
        return result


@pytest.fixture
def fused_adam_on_meta(monkeypatch):
    """A kernel that does nothing: the device has no numbers."""
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *args, **kwargs: ["meta"])
    monkeypatch.setattr(optimizers, "FUSED_ON", ("meta",))
    calls, library = [], th.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_adam_.tensor_lr", lambda *args, **kwargs: calls.append(kwargs["found_inf"]))
    yield calls
    library._destroy()


@pytest.mark.parametrize("chosen", [{}, dict(foreach=False), dict(foreach=True)])
@pytest.mark.parametrize(
    ("build", "kwargs", "metric"),
    [
        (tiny_qvpo, {}, "critic_contrast"),
        (tiny_qvpo, dict(max_grad_norm=1.0), "critic_contrast"),
        (tiny_qvpo, dict(q_weighting="qcut"), "critic_contrast"),
        (tiny_sdac, {}, "divergence"),
        (tiny_sdac, dict(temperature="auto", q_scaling="spread", proposal_actions="replay"), "divergence"),
        (tiny_sdac, dict(n_improvement_steps=2, proposal_actions="replay"), "effective_actions"),
        (tiny_diffusion_ql, dict(max_q_backup=True), "q_loss"),
        (tiny_diffusion_ql, dict(eta=0.0), "bc_loss"),
        (tiny_dtql, {}, "trust_region_gradient"),
        (tiny_dtql, dict(log_prob_coef=1.0, value_target="online"), "log_density"),
    ],
)
def test_an_update_reads_nothing_back_and_copies_nothing(build, kwargs, metric, chosen, fused_adam_on_meta):
    """On torch's meta device, where no number can be read: what stalls a GPU, or breaks a graph, fails here."""
    policy_kwargs = dict(net_arch=[8, 8], time_embedding_dim=4, optimizer_kwargs=chosen)
    model = build(device="meta", seed=None, policy_kwargs=policy_kwargs, **kwargs)
    # Moving to this device makes other parameters, which the optimisers do not know
    networks = [model.actor, model.critic, *([model.policy.cloned] if isinstance(model, DTQL) else [])]
    for network in networks:
        parameters = model.policy.critic_parameters(network) if network is model.critic else list(network.parameters())
        network.optimizer = model.policy._make_optimizer(parameters, 1e-3)
        assert optimizers.make_capturable(network.optimizer)
        assert network.optimizer.param_groups[0]["fused"] is (None if chosen else True)
    batch = ReplayBufferSamples(*(th.empty(8, size, device="meta") for size in (3, 1, 3, 1, 1)))
    # ent_coef or the temperature, and training_action_noise
    coefficients = [th.empty((), device="meta")] * {QVPO: 2, SDAC: 2}.get(type(model), 0)
    guard_of(model).start_update(1, {})
    with OnDeviceOnly():
        for _ in range(2):
            assert {"critic_loss", "q_value"} <= model._update_critics(batch).keys()
            metrics = model._update_policy(batch, *coefficients)
            if isinstance(model, DTQL):
                assert {"bc_loss"} == model._update_cloned(batch).keys()
            assert {"actor_loss", metric} <= metrics.keys()
    for network in networks:
        state = network.optimizer.state_dict()["state"]
        assert len(state) == len(network.optimizer.param_groups[0]["params"]) > 5, "all parameters were stepped"
    assert len(fused_adam_on_meta) == (0 if chosen else 2 * len(networks))
    assert all(found_inf.device.type == "meta" for found_inf in fused_adam_on_meta)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        metrics["actor_loss"].item()
    with pytest.raises(AssertionError, match="tensor on the CPU"), OnDeviceOnly():
        model.actor.noise_predictor.state_dict().popitem()[1] + th.ones(())


@pytest.mark.parametrize("kind", ["vector", "n-step", "dict"])
def test_batches_are_copied_from_pinned_memory(kind, monkeypatch):
    """The same ones, and the buffer is as before, also after an error. The meta device stands for a GPU."""
    where = (DictEnv(), "MultiInputPolicy") if kind == "dict" else ("Pendulum-v1", "MlpPolicy")
    model = tiny_qvpo(*where, n_steps=3 if kind == "n-step" else 1).learn(20)
    pinned, buffer = [], model.replay_buffer
    report_errors_later(model)  # as on a GPU: batches are not looked at
    monkeypatch.setattr(th.Tensor, "pin_memory", lambda self: (pinned.append(self), self)[1])
    np.random.seed(0)
    plain = batch_of(model, 8)
    assert not pinned
    monkeypatch.setattr(updates, "PINNED_FOR", ("meta",))
    model.device = buffer.device = th.device("meta")
    np.random.seed(0)
    moved = batch_of(model, 8)
    assert type(moved) is type(plain) and buffer.device.type == "meta"
    expected, tensors = flat_items(plain._asdict()), flat_items(moved._asdict())
    assert [name for name, _ in expected] == [name for name, _ in tensors] and len(pinned) == len(expected) >= 5
    for (_, value), tensor, (_, copied) in zip(expected, pinned, tensors, strict=True):
        assert th.equal(value, tensor) and copied.device.type == "meta" and copied.shape == value.shape
    pinned.clear()
    monkeypatch.setattr(buffer, "sample", lambda *args, **kwargs: moved)
    assert batch_of(model, 8).rewards is moved.rewards and not pinned, "a buffer that keeps them there"
    monkeypatch.undo()
    model.device = buffer.device = th.device("meta")
    monkeypatch.setattr(updates, "PINNED_FOR", ("meta",))
    monkeypatch.setattr(buffer, "to_torch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch_of(model, 8)
    assert buffer.device.type == "meta"


def test_graphs_outlive_a_call_of_learn():
    """And predictions between two calls: nothing that an update reads has changed."""
    model = on_an_accelerator()
    for first in (True, False, False):
        model.learn(40, reset_num_timesteps=first)
        model.predict(np.ones(3, np.float32), deterministic=True)
        assert len(runner_of(model).graphs) == 2


class OffsetQVPO(QVPO):
    """Adds to the rewards what it finds in an attribute, of which the base class knows nothing."""

    offset, offset_function = 0.0, None

    def _critic_loss(self, batch, target_noise):
        offset = self.offset if self.offset_function is None else self.offset_function()
        offset = offset + getattr(self.critic, "offset", 0.0) + sum(getattr(self.policy, "offsets", []))
        offset = offset + float(getattr(self.policy, "array", np.zeros(1))[0])
        return super()._critic_loss(batch._replace(rewards=batch.rewards + offset), target_noise)


FORGOTTEN = {
    "number": lambda model: setattr(model, "offset", 5.0),
    "NumPy's number": lambda model: setattr(model, "offset", np.float32(5)),
    "function": lambda model: setattr(model, "offset_function", lambda: 5.0),
    "attribute of a network": lambda model: setattr(model.critic, "offset", 5.0),
    "list that is changed in place": lambda model: model.policy.offsets.append(5.0),
    "tensor": lambda model: setattr(model, "offset", th.tensor(5.0)),
    "array that is changed in place": lambda model: np.copyto(model.policy.array, 5.0),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_setting_that_nobody_listed_is_a_new_graph(what):
    """Never a stale value: what changes is seen in the next update."""
    weights = []
    for make in (on_an_accelerator, lambda algorithm: algorithm("MlpPolicy", "Pendulum-v1", **TINY)):
        model = make(algorithm=OffsetQVPO)
        model.policy.offsets, model.policy.array = [], np.zeros(1)
        model.learn(40)
        FORGOTTEN[what](model)
        th.manual_seed(0)
        np.random.seed(0)
        model.train(updates.EAGER_UPDATES + 3, 8)
        weights.append(weights_of(model))
        if isinstance(runner_of(model), RunnerOnTheCpu):
            assert len(runner_of(model).graphs) == 4 and not runner_of(model).failed
    unchanged = on_an_accelerator(algorithm=OffsetQVPO).learn(40)
    th.manual_seed(0)
    np.random.seed(0)
    unchanged.train(updates.EAGER_UPDATES + 3, 8)
    for name in ("critic.qf0.0.weight", "critic.qf1.2.bias"):
        matters = (weights[0][name] - weights_of(unchanged)[name]).abs().max()
        rounding = (weights[0][name] - weights[1][name]).abs().max()
        assert rounding < 0.1 * matters, name


class PriorityBuffer(ReplayBuffer):
    def sample(self, batch_size, env=None):
        batch = super().sample(batch_size, env)
        more = th.full((batch_size,), 0.5), np.arange(batch_size), [{}] * batch_size
        return Samples(*batch[:5], None, *more)


class PriorityQVPO(QVPO):
    """Reads the tensor, and notes the type of what it gets."""

    seen: ClassVar[list] = []

    def _critic_loss(self, batch, target_noise):
        self.seen.append((type(batch), batch.indices is None))
        loss, metrics = super()._critic_loss(batch, target_noise)
        return batch.weights.mean() * loss, metrics


@pytest.mark.parametrize("captured", [False, True])
def test_further_fields_of_a_batch_are_handed_on(captured):
    """Eagerly all of them; in a graph the tensors, because anything else would be that of the recorded batch."""
    PriorityQVPO.seen.clear()
    kwargs = dict(replay_buffer_class=PriorityBuffer, algorithm=PriorityQVPO)
    if captured:
        model = on_an_accelerator(**kwargs).learn(60)
        assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed
    else:
        del kwargs["algorithm"]
        model = PriorityQVPO("MlpPolicy", "Pendulum-v1", **{**TINY, **kwargs}).learn(60)
    assert {kind for kind, _ in PriorityQVPO.seen} == {Samples}
    assert {without for _, without in PriorityQVPO.seen} == ({False, True} if captured else {False})


class IndexedQVPO(QVPO):
    """Reads a field that is no tensor."""

    def _critic_loss(self, batch, target_noise):
        loss, metrics = super()._critic_loss(batch, target_noise)
        return loss * (1 + 0 * batch.indices.sum()), metrics


def test_an_update_that_reads_a_field_that_is_no_tensor_runs_eagerly():
    """One warning when it would be captured, and training goes on with the real batches."""
    model = on_an_accelerator(algorithm=IndexedQVPO, replay_buffer_class=PriorityBuffer)
    with pytest.warns(UserWarning, match="not captured in a graph .* 'NoneType' object has no attribute 'sum'"):
        model.learn(40)
    assert model._n_updates == 35 and runner_of(model).failed
