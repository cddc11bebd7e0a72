"""
What only a GPU can show: updates and actions captured in graphs, and what the same code gives without them; candidates in
bfloat16; models that move between devices. Skipped where there is none; the tests of ``test_updates.py`` have stand-ins.
"""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import SCHEDULES, CountdownEnv, DictEnv, runner_of, take_bad_steps, tiny_qvpo, tiny_sdac, weights_of
from stable_baselines3.common.callbacks import ConvertCallback

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.speed import graphs, programs, updates
from sb3_qvpo.common.speed.settings import has_bfloat16

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


class ImageEnv(gym.Env):
    """Images of noise, two action dimensions."""

    def __init__(self):
        self.observation_space, self.action_space = spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8), {}

    def step(self, action):
        return self.reset()[0], float(action[0]), False, bool(self.np_random.random() < 0.2), {}


def gpu_qvpo(*args, **kwargs):
    return tiny_qvpo(*args, **{"device": "cuda", **kwargs})


def largest_difference(first, second):
    first, second = weights_of(first), weights_of(second)
    return max(float((first[name].cpu() - second[name].cpu()).abs().max()) for name in first if first[name].numel())


@pytest.fixture
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


CASES = {
    "plain": dict(),
    "delayed": dict(policy_delay=2, max_grad_norm=0.5),
    "schedules": SCHEDULES,
    "dictionaries": dict(env=DictEnv, policy="MultiInputPolicy"),
    "images": dict(env=ImageEnv, policy="CnnPolicy"),
    "n-step": dict(n_steps=3),
    "fewer sampling steps": dict(n_diffusion_steps=10, policy_kwargs=dict(net_arch=[8, 8], n_sampling_steps=4)),
    "qcut": dict(q_weighting="qcut"),
    "bfloat16 layers of 64": dict(policy_kwargs=dict(net_arch=[64, 64, 64])),
}


def arguments_of(name):
    arguments = dict(CASES[name])
    return arguments | ({"env": arguments["env"]()} if "env" in arguments else {})


@pytest.mark.parametrize("name", CASES)
def test_graphs_of_updates(name, monkeypatch, warnings_are_errors):
    """Updates of critics and of the policy are captured, once each, and train as the eager ones do."""
    model = gpu_qvpo(**arguments_of(name)).learn(60)
    assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed
    monkeypatch.setattr(updates, "EAGER_UPDATES", 1000)
    eager = gpu_qvpo(**arguments_of(name)).learn(60)
    assert not runner_of(eager).graphs
    assert model._n_updates == eager._n_updates == 55
    assert largest_difference(model, gpu_qvpo(**arguments_of(name))) > 1e-3, "it has learnt"
    assert largest_difference(model, eager) < 1e-4


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(temperature="auto", q_scaling="spread", proposal_actions="replay"),
        dict(n_improvement_steps=2, proposal_actions="replay"),
    ],
)
def test_graphs_of_sdacs_updates(kwargs, monkeypatch, warnings_are_errors):
    model = tiny_sdac(device="cuda", **kwargs).learn(60)
    assert len(runner_of(model).graphs) == 2 and not runner_of(model).failed
    monkeypatch.setattr(updates, "EAGER_UPDATES", 1000)
    eager = tiny_sdac(device="cuda", **kwargs).learn(60)
    assert largest_difference(model, eager) < 1e-4
    th.testing.assert_close(model.log_temperature, eager.log_temperature)


def predictions(model, *flags, n_times=5):
    """Actions for several states, one by one, deterministic or not."""
    th.manual_seed(1)
    observations = np.random.default_rng(0).normal(size=(n_times, 3)).astype(np.float32)
    return [model.predict(each, deterministic=flag)[0] for flag in flags for each in observations]


def test_graphs_of_actions(monkeypatch, settings, warnings_are_errors):
    """Of long runs and where asked for: the actions that the eager functions give."""
    monkeypatch.setattr(programs, "COMPILE_AFTER", 10)
    monkeypatch.setattr(programs, "LONG_RUN", 20)
    monkeypatch.setattr(programs, "EAGER_DECISIONS", 10_000)
    model = gpu_qvpo(policy_kwargs=dict(net_arch=[32, 32]), n_eval_candidates=7).learn(60)
    assert isinstance(model.policy.programs.by_count[model.n_behavior_candidates], graphs.ScoringGraph)
    assert model.policy.compile_actions() and not model.policy.programs.automatic
    captured_actions = predictions(model, True, False)
    settings.enabled = False
    np.testing.assert_allclose(predictions(model, True, False), captured_actions, atol=1e-4)
    settings.enabled = True
    model.learn(20)
    later = predictions(model, True, False)
    settings.enabled = False
    np.testing.assert_allclose(predictions(model, True, False), later, atol=1e-4)
    assert not np.allclose(later, captured_actions, atol=1e-4), "graphs read the weights that there are now"


@pytest.mark.parametrize("n_eval_candidates", [7, 32])
def test_predictions_are_captured_on_their_own(n_eval_candidates, warnings_are_errors):
    """After some, with the same bits; a policy that is moved to the CPU goes on there."""
    model = gpu_qvpo(policy_kwargs=dict(net_arch=[256, 256]), n_eval_candidates=n_eval_candidates, n_diffusion_steps=20)
    some = graphs.EAGER_DECISIONS
    for deterministic in (False, True):
        eager = predictions(model, deterministic, n_times=some)
        np.testing.assert_array_equal(predictions(model, deterministic, n_times=some), eager)
    captured = model.policy.programs.automatic
    assert set(captured) == {4, n_eval_candidates}
    assert all(isinstance(graph, graphs.ScoringGraph) for graph in captured.values())
    for device in ("cpu", "cuda"):
        model.policy.to(device)
        moved = predictions(model, True, n_times=3 * some)
        assert np.isfinite(moved).all()
        # A last bit can change which candidate is the best
        assert np.isclose(moved[:some], eager, atol=1e-3).mean() > 0.7


def test_candidates_are_those_of_the_cpu():
    """The same numbers in, the same candidates and values out; in bfloat16 to its precision."""
    on_gpu, on_cpu = (gpu_qvpo(device=device, policy_kwargs=dict(net_arch=[64, 64, 64])) for device in ("cuda", "cpu"))
    on_gpu.policy.load_state_dict(on_cpu.policy.state_dict())
    states, noise = th.randn(16, 3), on_cpu.actor.draw_noise(16, 8)
    with th.no_grad():
        _, expected, expected_q = on_cpu.policy.score_candidates(states, noise)
        _, exact, exact_q = on_gpu.policy.score_candidates(states.cuda(), noise.cuda())
        _, reduced, _ = on_gpu.policy.score_candidates(states.cuda(), noise.cuda(), for_training=True)
    assert (exact.cpu() - expected).abs().max() < 1e-3 and (exact_q.cpu() - expected_q).abs().max() < 1e-3
    difference = (reduced - exact).abs()
    assert difference.max() < 0.1 and difference.mean() < 0.01
    assert (difference.max() > 0) == has_bfloat16(th.device("cuda"))


@pytest.mark.parametrize(("trained_on", "loaded_on"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_saved_models_move_between_devices(trained_on, loaded_on, tmp_path, warnings_are_errors):
    model = gpu_qvpo(device=trained_on).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device=loaded_on)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert largest_difference(model, loaded) == 0
    loaded.learn(40, reset_num_timesteps=False)
    assert loaded._n_updates == model._n_updates + 40 and largest_difference(model, loaded) > 1e-4
    assert np.isfinite(loaded.predict(np.ones(3, np.float32), deterministic=True)[0]).all()


def test_a_resumed_run_is_the_run(tmp_path):
    """Broken off after its graphs were captured: equal to rounding, because the updates after it are eager ones at first."""

    def run(until, path):
        model = gpu_qvpo(CountdownEnv())
        save = ResumableCheckpointCallback(4, path, at_episode_end=True)

        def stop(locals_, _):
            if locals_["self"].num_timesteps == until:
                raise KeyboardInterrupt
            return True

        try:
            return model.learn(80, callback=[save, ConvertCallback(stop)])
        except KeyboardInterrupt:
            resumed = QVPO.resume(path, model.env)
            assert resumed.device.type == "cuda" and resumed.num_timesteps == 40
            save = ResumableCheckpointCallback(4, path, at_episode_end=True)
            return resumed.learn(resumed.remaining_timesteps, callback=save, reset_num_timesteps=False)

    whole, resumed = run(None, tmp_path / "whole.zip"), run(43, tmp_path / "part.zip")
    assert whole._n_updates == resumed._n_updates
    assert largest_difference(whole, resumed) < 1e-3


def test_numbers_that_are_not_finite_stop_training():
    """The steps of a captured update are not taken, and reported by the hundredth update, later than on the CPU."""
    model = gpu_qvpo().learn(60)
    assert model._n_updates == 55 and len(runner_of(model).graphs) == 2
    take_bad_steps(model)
    with pytest.raises(ValueError, match="Non-finite critic_loss in gradient update 56"):
        model.train(95, batch_size=8)
    assert model._n_updates == 100 and not runner_of(model).failed
    assert all(bool(value.isfinite().all()) for value in model.policy.state_dict().values())
