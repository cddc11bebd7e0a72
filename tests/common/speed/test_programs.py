"""Compiled actions are the eager ones, never in the way, and leave no trace in what is saved."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import BanditEnv, CountdownEnv, recorded_warnings, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.callbacks import ConvertCallback
from torch import nn

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.speed import graphs, programs
from sb3_qvpo.common.speed.graphs import ScoringGraph
from sb3_qvpo.common.speed.programs import Programs, ScoringProgram
from sb3_qvpo.common.speed.settings import settings as speed_settings


@pytest.fixture
def long_runs_are_short(monkeypatch):
    """Actions are compiled after 10 steps of runs of at least 20."""
    monkeypatch.setattr(programs, "COMPILE_AFTER", 10)
    monkeypatch.setattr(programs, "LONG_RUN", 20)


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(ScoringProgram, "__call__", fail)


def model_with(seed=0, env="Pendulum-v1", critic_type="twin", **policy_kwargs):
    model = tiny_qvpo(env, n_diffusion_steps=3, seed=seed, critic_type=critic_type, policy_kwargs=policy_kwargs)
    for parameter in model.policy.parameters():  # away from the initial zeros of the biases
        parameter.data.add_(0.05 * th.randn_like(parameter))
    return model


def is_compiled(model, n_candidates=None) -> bool:
    count, owner = n_candidates or model.n_behavior_candidates, model.policy.programs
    with th.no_grad(), owner.collecting(model.policy, count, n_steps=0, total=0, n_envs=1):
        return owner.find(model.policy, count) is not None


def program_of(model):
    """The program of predictions by the best of n_eval_candidates."""
    with th.no_grad():
        return model.policy.programs.find(model.policy, model.n_eval_candidates)


def scored(policy, observation, noise, enabled):
    """Candidates and their scores by the policy's program, or by the eager functions where there is none."""
    speed_settings.enabled = enabled
    try:
        with th.no_grad():
            return policy.programs.score(policy, observation, noise) or policy.score_candidates(observation, noise)[1:]
    finally:
        speed_settings.enabled = True


CASES = {
    "few candidates": (4, {}),
    "many candidates, three uneven layers": (40, dict(net_arch=[96, 64, 130])),
    "relu, one critic, one candidate": (1, dict(net_arch=[64, 64], activation_fn=nn.ReLU, n_critics=1)),
    "silu, DDIM, one layer, shared features": (
        9,
        dict(net_arch=[48], activation_fn=nn.SiLU, n_sampling_steps=2, sampling_eta=0.0, share_features_extractor=True),
    ),
    "norms, two activations, v and solver": (
        4,
        dict(
            critic_type="crossq",
            net_arch=[64, 64],
            critic_activation_fn=nn.ReLU,
            prediction="v",
            sampler="dpm++",
            normalize_features=True,
            pessimism=0.3,
        ),
    ),
    "quantiles": (4, dict(critic_type="quantile", net_arch=[64, 64])),
}
RARE = {"quantiles"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in CASES])
def test_compiled_actions_are_the_eager_ones(name):
    """With the same noise; after an update, too; and nothing is compiled again."""
    n_candidates, policy_kwargs = CASES[name]
    model = model_with(env=BanditEnv(action_dim=3), **policy_kwargs)
    policy, noise = model.policy, model.actor.draw_noise(1, n_candidates)
    assert policy.compile_actions(n_candidates)
    model.learn(5)
    with th.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            observation = th.randn(1, 2)
            (actions, values), (eager_actions, eager_values) = (
                scored(policy, observation, noise, enabled) for enabled in (True, False)
            )
            assert is_compiled(model, n_candidates)
            np.testing.assert_allclose(actions, eager_actions, atol=1e-5)
            np.testing.assert_allclose(values, eager_values, atol=1e-5)
            assert actions.shape == (1, n_candidates, 3)
            model.train(1, 4)
        model.learn(5, reset_num_timesteps=False)
    # Several observations, the target networks and gradients take the eager path
    assert scored(policy, th.randn(2, 2), n_candidates, True)[0].shape == (2, n_candidates, 3)
    assert policy.programs.score(policy, observation, noise) is None
    assert policy.score_candidates(observation, noise).scores.requires_grad


def test_predictions():
    """Both kinds, with the same random numbers as before."""
    model = model_with(net_arch=[32, 32])
    observation = np.ones(3, np.float32)
    predictions = []
    for stance in ("default", "fail_on_recompile"):
        assert stance == "default" or model.policy.compile_actions()
        th.manual_seed(1)
        with th.compiler.set_stance(stance):
            predictions.append([model.predict(observation, deterministic=flag)[0] for flag in (True, False, False)])
    np.testing.assert_allclose(*predictions, atol=1e-5)
    assert is_compiled(model) and is_compiled(model, model.n_eval_candidates) and not is_compiled(model, 7)


def test_a_graph_of_the_eager_functions():
    """What a GPU takes, with a stand-in for the graph that records without running."""
    runs = []

    def record(function, device):
        results = {}
        return lambda: (runs.append(1), results.update(function())), results

    model = model_with(net_arch=[32, 32])
    graph = ScoringGraph(model.actor, model.critic, capture=record)
    with th.no_grad():
        kept = []
        for _ in range(3):
            observation, noise = th.randn(1, 3), model.actor.draw_noise(1, 5)
            kept.append((graph(observation, observation, noise), model.policy.score_candidates(observation, noise)[1:]))
        model.actor.noise_predictor.first_layer = copy.deepcopy(model.actor.noise_predictor.first_layer)
        for n_runs in [3] * graphs.EAGER_DECISIONS + [4, 5]:
            assert graph(observation, observation, noise)[0].equal(kept[-1][0][0]) and len(runs) == n_runs
        assert graph.graph.addresses.unchanged(), "captured again for the layer that has taken the place of another"
    for results, expected in kept:  # later runs have not overwritten them
        for result, eager in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, eager, atol=1e-6)


@pytest.fixture
def captures(monkeypatch):
    """A GPU that is none, with a stand-in for graphs; the list grows with each that is captured."""
    captured = []

    def record(function, device):
        captured.append(function()["scores"].shape[1])
        results = {}
        return lambda: results.update(function()), results

    monkeypatch.setattr(graphs, "cuda_graph", record)
    monkeypatch.setattr(programs, "is_on_gpu", lambda actor: True)
    return captured


def actions(model, n_times, deterministic=True, n_observations=None):
    th.manual_seed(0)
    observation = np.ones(3 if n_observations is None else (n_observations, 3), np.float32)
    return [model.predict(observation, deterministic=deterministic)[0] for _ in range(n_times)]


SOME = graphs.EAGER_DECISIONS


def test_a_gpu_captures_predictions_on_its_own(captures, settings, monkeypatch, tmp_path):
    """After some of each number of candidates; the same actions; not for several observations at once."""
    model = model_with(net_arch=[32, 32])
    model.n_eval_candidates = 7
    with no_graphs():
        expected = {flag: actions(model, 2 * SOME, flag) for flag in (True, False)}
    actions(model, 2 * SOME, deterministic=False, n_observations=2)
    settings.compile_actions = False
    actions(model, 2 * SOME)
    settings.compile_actions = True
    with monkeypatch.context() as patch:
        patch.setattr(th, "is_autocast_enabled", lambda device: device == "cuda")
        actions(model, 2 * SOME)
    actions(model, SOME)
    assert not captures
    np.testing.assert_allclose(actions(model, 2 * SOME), expected[True], atol=1e-6)
    assert captures == [7]
    np.testing.assert_allclose(actions(model, 2 * SOME, False), expected[False], atol=1e-6)
    assert captures == [7, model.n_behavior_candidates]
    model.save_checkpoint(tmp_path / "run")
    copied = copy.deepcopy(model)
    np.testing.assert_allclose(actions(copied, SOME), expected[True][:SOME], atol=1e-6)
    QVPO.resume(tmp_path / "run", gym.make("Pendulum-v1"))
    assert len(captures) == 2, "neither copies nor checkpoints take graphs along"
    with no_graphs():
        assert program_of(model) is None, "the policy was moved to the CPU"
        np.testing.assert_allclose(actions(model, SOME), expected[True][:SOME], atol=1e-6)
        assert model.policy.compile_actions(7) and isinstance(program_of(model), ScoringProgram)
    assert isinstance(program_of(model), ScoringGraph)
    assert model.policy.compile_actions(7) and captures == [7, 4, 7], "asked for, after it was compiled on the CPU"


@contextmanager
def no_graphs():
    """The CPU that it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "is_on_gpu", lambda actor: False)
        yield


def test_a_gpu_captures_no_more_than_a_few_counts(captures):
    model = model_with(net_arch=[32, 32])
    for count in range(1, programs.MOST_PROGRAMS + 3):
        model.n_eval_candidates = count
        actions(model, 2 * SOME)
    assert captures == [1, 2, 3, 4][: programs.MOST_PROGRAMS]


def test_graphs_in_inference_mode_and_after_it(captures):
    model = model_with(net_arch=[32, 32])
    expected = actions(model, SOME)
    with th.inference_mode():
        np.testing.assert_allclose(actions(model, SOME), expected, atol=1e-6)
    with recorded_warnings() as caught:
        np.testing.assert_allclose(actions(model, SOME), expected, atol=1e-6)
    assert len(captures) == 1 and not caught


def test_threads_share_a_graph(captures, monkeypatch):
    """Between the copy of one thread's inputs and its results no other thread comes in."""
    model = model_with(net_arch=[32, 32])
    observations = [np.full(3, x, np.float32) for x in np.linspace(-1, 1, 8)]
    with no_graphs():
        expected = [model.predict(each, deterministic=True)[0] for each in observations]
    actions(model, SOME + 1)
    run = ScoringGraph._run
    monkeypatch.setattr(ScoringGraph, "_run", lambda *args: (run(*args), time.sleep(0.01))[0])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: model.predict(each, deterministic=True)[0], observations))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("why", ["subclass", "hook", "batch of one"])
def test_what_a_gpu_does_not_capture_on_its_own(why, captures):
    """Networks of which not all is known, and the candidates of a training batch of one state."""
    model = model_with(net_arch=[32, 32])
    if why == "subclass":
        predictor = model.actor.noise_predictor
        predictor.__class__ = type("Predictor", (type(predictor),), {})
    elif why == "hook":
        model.critic.register_forward_hook(lambda *args: None)
    else:
        model.learn(10)
        model.n_behavior_candidates = model.n_train_candidates  # those of actions are captured
        model.train(2 * SOME, 1)
        assert not captures
        return
    with recorded_warnings() as caught:
        actions(model, 2 * SOME)
    assert not captures and not caught
    assert model.policy.compile_actions(5) and captures == [5], "asked for"


def test_a_graph_that_fails_is_warned_of_once(captures, monkeypatch):
    def fail(function, device):
        raise RuntimeError("no graph\nhere")

    model = model_with(net_arch=[32, 32])
    expected = actions(model, SOME)
    monkeypatch.setattr(graphs, "cuda_graph", fail)
    with recorded_warnings() as caught:
        np.testing.assert_array_equal(actions(model, SOME), expected)
        actions(model, SOME)
    assert [str(each.message) for each in caught] == [
        "Actions are not captured in a graph and take several times as long: no graph here"
    ]


@pytest.mark.parametrize("what", ["actions", "values"])
def test_a_compiler_that_errs_is_found_out(what, monkeypatch):
    score = ScoringProgram._score

    def wrong(self, *arguments):
        candidates, scores = score(self, *arguments)
        return (candidates + 0.01, scores) if what == "actions" else (candidates, scores + 0.01)

    monkeypatch.setattr(th, "compile", lambda function, **kwargs: lambda *args: wrong(function.__self__, *args))
    model = model_with(net_arch=[32, 32])
    with pytest.warns(UserWarning, match=r"Actions are not compiled .* differ by .* scores by"):
        assert not model.policy.compile_actions(5)


def test_long_runs_compile_on_their_own(long_runs_are_short):
    """When they are long enough, not at once, the same with the same seed; loaded models start anew."""
    assert not is_compiled(tiny_qvpo().learn(19))

    def run():
        when = []
        model = tiny_qvpo().learn(30, callback=lambda locals_, _: when.append(is_compiled(locals_["self"])) or True)
        assert when == [False] * 10 + [True] * 20
        assert is_compiled(model.learn(5)), "once compiled, it stays so"
        return weights_of(model)

    assert same_weights(run(), run())


def test_predictions_stay_those_of_a_loaded_model(long_runs_are_short, monkeypatch, tmp_path):
    """``learn()`` compiles for the actions it collects; predictions are compiled only if the user asks, also the other way."""
    used, call = [], ScoringProgram.__call__
    monkeypatch.setattr(ScoringProgram, "__call__", lambda *args: (used.append(1), call(*args))[1])
    model = tiny_qvpo(n_behavior_candidates=4, n_eval_candidates=4).learn(30)
    assert is_compiled(model) and len(used) >= 20
    used.clear()
    model.save(tmp_path / "model")
    loaded, observation = QVPO.load(tmp_path / "model"), np.ones(3, np.float32)
    for deterministic in (True, False):
        answers = []
        for each in (model, loaded):
            th.manual_seed(0)
            answers.append(each.predict(observation, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*answers)
    assert not used
    assert model.policy.compile_actions(4), "already compiled"
    model.predict(observation)
    assert used


def test_switched_off(long_runs_are_short, monkeypatch):
    monkeypatch.setattr(speed_settings, "compile_actions", False)
    model = tiny_qvpo()
    model.learn(30)
    assert not is_compiled(model)


@pytest.mark.parametrize("broken_off_at", [7, 23])
def test_resumed_runs_are_the_uninterrupted_ones(broken_off_at, long_runs_are_short, tmp_path):
    """A resumed run compiles where the uninterrupted one did; a loaded model, or a new run, does not."""

    def run(until):
        model = tiny_qvpo(CountdownEnv(), learning_starts=4)
        callback = ResumableCheckpointCallback(4, tmp_path / f"{until}", at_episode_end=True)

        def stop(locals_, _):
            if locals_["self"].num_timesteps == until:
                raise KeyboardInterrupt
            return True

        try:
            model.learn(40, callback=[callback, ConvertCallback(stop)])
        except KeyboardInterrupt:
            model = QVPO.resume(callback.save_path, model.env)
            callback = ResumableCheckpointCallback(4, tmp_path / f"{until}", at_episode_end=True)
            assert model._first_timestep == 0 and model._excluded_save_params().count("_first_timestep") == 1
            model.learn(model.remaining_timesteps, callback=callback, reset_num_timesteps=False)
        assert is_compiled(model)
        return model

    assert same_weights(weights_of(run(None)), weights_of(run(broken_off_at)))


def test_what_was_compiled_before_is_compiled_after_resuming(tmp_path):
    """Also where the user asked for it."""
    model = tiny_qvpo(CountdownEnv())
    model.policy.compile_actions(2)
    model.learn(8)
    model.save_checkpoint(tmp_path / "run")
    resumed = QVPO.resume(tmp_path / "run", CountdownEnv())
    assert is_compiled(resumed, 2) and not is_compiled(QVPO.load(tmp_path / "run"), 2)


def test_without_a_compiler(no_compiler, long_runs_are_short, monkeypatch):
    """One line of warning, once, and the same run as without compiling."""
    model = tiny_qvpo()
    with pytest.warns(UserWarning, match=r"Actions are not compiled .* as long: no compiler here$") as record:
        model.learn(40)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(40)
    assert not is_compiled(model) and not model.policy.compile_actions(model.n_behavior_candidates)
    monkeypatch.setattr(speed_settings, "compile_actions", False)
    assert same_weights(weights_of(model), weights_of(tiny_qvpo().learn(40).learn(40)))


MISSING = """
import warnings
import numpy as np
from helpers import tiny_qvpo
model = tiny_qvpo()
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    assert not model.policy.compile_actions(5)
    model.predict(np.zeros(3, np.float32))
print(*[warning.message for warning in record if warning.category is UserWarning], sep="---")
"""


def test_torch_compile_itself_raises(long_runs_are_short, monkeypatch):
    """As it does on versions of Python that it does not know."""

    def fail(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(th, "compile", fail)
    with pytest.warns(UserWarning, match="is not supported on Python 4"):
        tiny_qvpo().learn(40)


def test_a_program_that_fails_later(monkeypatch):
    """When it is compiled anew for another number of threads, say: one warning, and the eager action."""
    model = model_with(net_arch=[32, 32])
    assert model.policy.compile_actions()
    observation, expected = np.ones(3, np.float32), model.predict(np.ones(3, np.float32), deterministic=True)[0]

    def fail(*args, **kwargs):
        raise RuntimeError("recompile_limit reached")

    monkeypatch.setattr(ScoringProgram, "__call__", fail)
    with pytest.warns(UserWarning, match="Actions are not compiled .* recompile_limit reached"):
        action, _ = model.predict(observation, deterministic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = model.predict(observation, deterministic=True)
    np.testing.assert_allclose(action, expected, atol=1e-5)
    np.testing.assert_array_equal(again, action)


@pytest.mark.slow
def test_a_missing_compiler(tmp_path):
    """As torch reports it, in a process of its own: torch remembers what it has not found."""
    environment = {**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", MISSING]
    folder = Path(__file__).parents[2]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment).stdout
    assert output.startswith("Actions are not compiled and take two to four times as long: ") and "/no/compiler" in output
    assert output.count("\n") == 1 and "---" not in output


def test_networks_that_are_not_the_usual_ones(no_compiler):
    """Activations with weights, other precision, subclasses: no warning, no program."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model_with(activation_fn=nn.PReLU).policy.compile_actions()
        assert not model_with().policy.double().compile_actions()
        model = model_with()
        model.actor.noise_predictor.__class__ = type("Subclass", (type(model.actor.noise_predictor),), {})
        assert not model.policy.compile_actions()
        for name, method in (("actor", "sample_candidates"), ("critic", "value_candidates"), ("critic", "aggregate")):
            model = model_with()
            network = getattr(model, name)
            network.__class__ = type("Subclass", (type(network),), {method: lambda *args: None})
            assert not model.policy.compile_actions()


def test_only_a_few_programs(no_compiler):
    """A schedule of candidate counts does not compile one program after the other; but whoever asks for one gets an answer."""
    model = model_with()

    def warnings_of(count, **kwargs):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model.policy.programs.compile(model.policy, count, **kwargs)
        return len(record)

    tried = [warnings_of(count, for_predictions=False) for count in (*range(1, 8), 1)]
    assert tried == [1] * programs.MOST_PROGRAMS + [0] * (8 - programs.MOST_PROGRAMS)
    assert [warnings_of(count) for count in (1, 7, 7)] == [1, 1, 1]


def test_what_cannot_be_compiled_is_refused_or_tried_again(settings):
    model = model_with(net_arch=[32, 32])
    for count in ("3", 0, 1.5):
        with pytest.raises(ValueError, match=f"n_candidates must be a whole number of at least 1, got {count!r}"):
            model.policy.compile_actions(count)
    settings.enabled = False
    assert not model.policy.compile_actions(2)
    settings.enabled = True
    assert model.policy.compile_actions(2)


def test_nothing_is_saved_or_copied(tmp_path):
    """A model with compiled actions loads anywhere; copies start without; programs go with their policy."""
    model = model_with(net_arch=[32, 32])
    before = set(model.policy.state_dict()), set(vars(model.policy)), set(vars(model))
    assert model.policy.compile_actions(2)
    assert (set(model.policy.state_dict()), set(vars(model.policy)), set(vars(model))) == before
    model.save(tmp_path / "model")
    model.n_eval_candidates = 2
    model.export(tmp_path / "policy.pt2")  # traces the eager functions
    loaded = QVPO.load(tmp_path / "model")
    assert not is_compiled(loaded, 2) and not is_compiled(copy.deepcopy(model), 2)
    assert same_weights(weights_of(model), weights_of(loaded))
    copied = pickle.loads(pickle.dumps(model.policy.programs))
    assert isinstance(copied, Programs) and copied.tried_counts() == ([], [])
    policy = weakref.ref(model.policy)
    del model
    gc.collect()
    assert policy() is None
