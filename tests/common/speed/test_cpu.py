"""The CPU's fast path computes what the eager functions compute, and only where it pays."""

import inspect
import os
import platform
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, tiny_qvpo
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.speed import cpu

CPU = th.device("cpu")


def test_mish_of_negated():
    x = th.cat([th.linspace(-120, 120, 20_001), th.linspace(-3, 3, 20_001), th.tensor([0.0, 1e-30, -1e-30])])
    np.testing.assert_allclose(cpu.mish_of_negated(-x, cpu.Scratch()), F.mish(x.double()), atol=3e-6, rtol=1e-6)


def test_trainable_mish():
    """Values, gradients, and gradients against finite differences in float64."""
    x = th.cat([th.linspace(-60, 60, 4001), th.linspace(-4, 4, 4001)]).requires_grad_()
    gradient = th.randn_like(x)
    results = [(function(x), *th.autograd.grad(function(x), x, gradient)) for function in (F.mish, cpu.TrainableMish.apply)]
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result.detach(), expected.detach(), atol=6e-6)
    x = th.randn(20, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(cpu.TrainableMish.apply, x)
    assert th.autograd.gradgradcheck(cpu.TrainableMish.apply, x)


def precision() -> str:
    return th.backends.mkldnn.matmul.fp32_precision


@pytest.mark.skipif(not hasattr(th.backends.mkldnn, "matmul"), reason="torch before 2.9 has no such setting")
@pytest.mark.parametrize(
    "activations", [[nn.ReLU] * 4, [nn.ReLU, nn.Mish, nn.ReLU, nn.ReLU], [nn.ReLU, nn.SiLU, nn.ReLU, nn.Mish]]
)
@pytest.mark.parametrize("widths", [[64, 64, 64, 64], [64, 32, 32, 64], [32, 64, 64, 32]])
def test_layers_that_work_in_place_overwrite_nothing_they_need(activations, widths):
    """Called twice, because memory is used again."""
    layers = []
    for activation, n_inputs, n_outputs in zip(activations, widths, [*widths[1:], 2], strict=True):
        layers += [activation(), nn.Linear(n_inputs, n_outputs)]
    with th.no_grad():
        fast = cpu.FastLayers(layers, th.float32, cpu.Scratch())
        for _ in range(2):
            hidden = th.randn(128, widths[0])
            expected = nn.Sequential(*layers)(hidden)
            np.testing.assert_allclose(fast(fast.sign * hidden), expected, atol=1e-5)


def test_onednn_multiplies_where_it_costs_no_precision(settings, monkeypatch):
    """Within an update only, put back after an error, not against a user's setting, and not where bits would be lost."""
    model = tiny_qvpo(n_diffusion_steps=2, policy_delay=1000)
    model.learn(4)
    seen, critic_loss = [], model._critic_loss

    def watched(*args, **kwargs):
        seen.append(precision())
        if len(seen) == 2:
            raise RuntimeError("broken loss")
        return critic_loss(*args, **kwargs)

    monkeypatch.setattr(model, "_critic_loss", watched)
    before = precision()
    model.train(1, 4)
    assert seen == ["bf16" if cpu.onednn_keeps_float32() else before] and precision() == before
    with pytest.raises(RuntimeError, match="broken loss"):
        model.train(1, 4)
    assert precision() == before
    settings.enabled = False
    model.train(1, 4)
    settings.enabled = True
    monkeypatch.setattr(cpu, "onednn_keeps_float32", lambda: False)
    model.train(1, 4)
    assert seen[2:] == [before, before]
    monkeypatch.setattr(cpu, "onednn_keeps_float32", lambda: True)
    th.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        model.train(1, 4)
        assert seen[4:] == ["tf32"] and precision() == "tf32"
    finally:
        th.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.skipif(not cpu.onednn_keeps_float32(), reason="nothing is switched here")
def test_threads_that_overlap():
    """The last one to leave puts the setting back."""
    before, steps = precision(), [threading.Event() for _ in range(3)]

    @cpu.OneDnnProducts()
    def first():
        steps[0].set()
        steps[1].wait(10)

    @cpu.OneDnnProducts()
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
    probe = inspect.unwrap(cpu.onednn_keeps_float32)  # without its memory
    assert probe() == cpu.onednn_keeps_float32()
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
from sb3_qvpo.common.speed import cpu
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [th.ones(700_000) + 1 for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
th.set_num_threads(1)
cpu.keep_freed_memory()
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
        covered = [states[block] for block in cpu.blocks(n_states, n_candidates, width, th.float32)]
        np.testing.assert_array_equal(np.concatenate(covered), states)
    assert len(cpu.blocks(256, 64, 256, th.float32)) == n_blocks
    assert len(cpu.blocks(2560, 64, 256, th.float32)) == (5 if n_threads == 64 else 10 * n_blocks)


@pytest.mark.parametrize("n_rows", [255, 256, 300])
def test_few_rows_take_the_eager_path(n_rows):
    layers = [nn.Mish(), nn.Linear(64, 64), nn.Mish(), nn.Linear(64, 1)]
    with th.no_grad():
        assert cpu.worth_blocking(layers, n_rows, th.device("cpu")) == (n_rows >= 256)  # of width 64
        assert not cpu.worth_blocking(layers, n_rows, th.device("meta"))
        assert not cpu.worth_blocking([], n_rows, th.device("cpu"))
        assert not cpu.worth_blocking([nn.Linear(64, 64), nn.Mish()], n_rows, th.device("cpu"))
    assert not cpu.worth_blocking(layers, n_rows, th.device("cpu")), "gradients need the eager path"


@pytest.mark.parametrize(("load", "n_threads", "is_warned_of"), [(3.1, 2, True), (2.9, 2, False), (3.1, 1, False)])
def test_cores_that_several_runs_share_are_warned_of(load, n_threads, is_warned_of, monkeypatch):
    """Once, and only where one thread would be faster; no message where the system does not tell."""
    monkeypatch.setattr(cpu, "has_warned", False)
    monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        tiny_qvpo(CountdownEnv()).learn(40)
    messages = [str(warning.message) for warning in record if "want to run" in str(warning.message)]
    assert len(messages) == is_warned_of
    assert not messages or messages[0].startswith("3.1 threads want to run on 2 cores, 2 of them of this run: ")
    monkeypatch.setattr(cpu, "has_warned", False)
    monkeypatch.delattr(os, "getloadavg")
    cpu.warn_of_busy_cores()
    assert not cpu.has_warned
