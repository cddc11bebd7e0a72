"""An exported policy decides as ``predict()`` does, with nothing of this package around it."""

import random
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from helpers import BOX, IMAGE, ROOT, AnySpacesEnv, sampled_observations, tiny_qvpo
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch.export.pt2_archive._package import load_pt2

from sb3_qvpo import QVPO

VECTORS = spaces.Dict(position=spaces.Box(-9, 9, (3,), np.float32), other=spaces.Box(0, 1, (1,), np.float64))


MIXED = spaces.Dict(vector=BOX, image=IMAGE, kind=spaces.Discrete(3))


class BatchNormExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout, which must be in evaluation mode."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=2)
        self.layers = th.nn.Sequential(th.nn.BatchNorm1d(2), th.nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


def trained(observation_space=BOX, action_space=BOX, normalize=None, **kwargs):
    """A model that has learnt a little, so that nothing is at its initial value."""
    env = make_vec_env(lambda: AnySpacesEnv(observation_space, action_space), n_envs=1)
    env = env if normalize is None else VecNormalize(env, **normalize)
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    policy = "CnnPolicy" if observation_space is IMAGE else policy
    return tiny_qvpo(env, policy, **kwargs).learn(25)


MODELS = {
    "vector": dict(),
    "dict": dict(observation_space=VECTORS),
    "image": dict(observation_space=IMAGE),
    "mixed dict": dict(observation_space=MIXED),
    "float64": dict(observation_space=spaces.Box(-5, 5, (3,), np.float64), action_space=spaces.Box(-1, 3, (2,), np.float64)),
    "discrete": dict(observation_space=spaces.Discrete(4)),
    "multi-discrete": dict(observation_space=spaces.MultiDiscrete([3, 2])),
    "matrices": dict(observation_space=spaces.Box(-1, 1, (2, 3), np.float32), action_space=spaces.Box(-0.4, 0.2, (2, 2))),
    "tiny bounds": dict(action_space=spaces.Box(np.array([-3.0, 0.5], np.float32), np.array([-1.0, 0.501], np.float32))),
    "paper's network and chain": dict(
        n_diffusion_steps=20, n_eval_candidates=32, policy_kwargs=dict(net_arch=[256, 256]), seed=5
    ),
    "one step": dict(n_diffusion_steps=1, seed=1),
    "normalised": dict(observation_space=spaces.Box(-50, 50, (3,), np.float32), normalize=dict(clip_obs=1.5)),
    "normalised dict": dict(observation_space=VECTORS, normalize=dict(norm_obs_keys=["position"])),
    "normalised, far from 0": dict(observation_space=spaces.Box(1e6 - 1, 1e6 + 1, (3,), np.float64), normalize=dict()),
    "rewards normalised only": dict(normalize=dict(norm_obs=False)),
    "normalised features": dict(observation_space=VECTORS, policy_kwargs=dict(net_arch=[8], normalize_features=True)),
    "renormalised critics": dict(critic_type="crossq", policy_kwargs=dict(net_arch=[8], renorm_start=3)),
    "mean of the critics": dict(critic_type="crossq", policy_kwargs=dict(net_arch=[8], pessimism=0)),
    "batch norm": dict(policy_kwargs=dict(features_extractor_class=BatchNormExtractor, share_features_extractor=True)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that trains one of the models and exports it, once for all tests. An export takes seconds."""
    folder, models = tmp_path_factory.mktemp("exported"), {}

    def export(name, file_format=None):
        if name not in models:
            models[name] = trained(**MODELS[name])
        path = folder / f"{list(MODELS).index(name)}{'.pt2' if file_format == 'torch' else '.onnx'}"
        if not path.exists():
            models[name].export(path.with_suffix(""), format=file_format)
        return models[name], path

    return export


def batch_of(model, n):
    """Observations as the environment returns them, others for each size."""
    return sampled_observations(model.policy.observation_space, n, seed=n)


def predicted(model, observation):
    """What SB3 users write: normalise as in training, then predict."""
    env = model.get_vec_normalize_env()
    return model.predict(observation if env is None else env.normalize_obs(observation), deterministic=True)[0]


def session_of(path):
    """Only onnxruntime from here on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(observation, **more):
    return {**(observation if isinstance(observation, dict) else dict(observation=observation)), **more}


# An ONNX export takes five seconds, and others have the parts of these: multi-discrete, vector, float64, any number of steps
RARE = (
    "discrete",
    "rewards normalised only",
    "tiny bounds",
    "one step",
    "paper's network and chain",
    "float64",
    "multi-discrete",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in MODELS])
def test_onnx_decides_like_predict(name, exported):
    model, path = exported(name)
    session = session_of(path)
    for batch_size in (1, 2, 7, 40):
        observation = batch_of(model, batch_size)
        (actions,) = session.run(None, feed(observation))
        expected = predicted(model, observation)
        assert (actions.shape, actions.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actions, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-5, "the actions must depend on the observation"


@pytest.mark.parametrize("name", ["vector", "mixed dict", "normalised dict", "float64", "batch norm"])
def test_torch_decides_like_predict(name, exported):
    model, path = exported(name, "torch")
    decide = th.export.load(path).module()
    for batch_size in (1, 2, 40):
        observation = batch_of(model, batch_size)
        tensors = {key: th.as_tensor(value) for key, value in feed(observation).items()}
        actions = decide(tensors if isinstance(observation, dict) else tensors["observation"])
        np.testing.assert_allclose(actions.numpy(), predicted(model, observation), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_candidates", [1, 9])
def test_the_noise_can_be_given(n_candidates, exported):
    """For each row or for all, with any number of candidates; it decides as score_candidates() with that noise."""
    (model, path), (_, torch_path) = (exported("vector", file_format) for file_format in (None, "torch"))
    session = session_of(path)
    program = load_pt2(torch_path).exported_programs["with_noise"].module()
    observation = batch_of(model, 6)
    for rows in (1, 6):
        noise = th.randn(3, rows, n_candidates, 2)
        with th.no_grad():
            _, candidates, q_values = model.policy.score_candidates(th.as_tensor(observation), noise.expand(-1, 6, -1, -1))
        expected = candidates[th.arange(6), q_values.argmax(dim=1)]
        (actions,) = session.run(None, feed(observation, noise=noise.numpy()))
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        np.testing.assert_allclose(program(th.as_tensor(observation), noise), expected, atol=1e-5)
    assert np.abs(actions - predicted(model, observation)).max() > 1e-3
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, feed(observation, noise=noise[:, :5].numpy()))
    with pytest.raises((IndexError, RuntimeError)):
        program(th.as_tensor(observation), noise[:, :5])


def test_the_file_describes_itself_and_nothing_else(exported):
    paths = [exported("dict", file_format)[1] for file_format in (None, "torch")]
    session = session_of(paths[0])
    assert {value.name: value.shape for value in session.get_inputs()} == {"position": ["batch", 3], "other": ["batch", 1]}
    (noise,) = session.get_overridable_initializers()
    assert (noise.name, noise.shape) == ("noise", [3, "noise_rows", "candidates", 2])
    (action,) = session.get_outputs()
    assert (action.name, action.shape) == ("action", ["batch", 2])
    content = onnx.load(paths[0])
    assert {node.domain for node in content.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    assert {entry.key: entry.value for entry in content.metadata_props} == {
        "n_diffusion_steps": "3",
        "n_noises": "3",
        "n_eval_candidates": "4",
        "vec_normalize": "False",
    }
    for path in paths:
        content = path.read_bytes()
        assert str(ROOT).encode() not in content, "paths on this machine"
        assert b"site-packages" not in content


def test_exporting_changes_nothing_and_follows_the_candidate_count(tmp_path):
    model = trained(policy_kwargs=MODELS["batch norm"]["policy_kwargs"])
    model.policy.set_training_mode(True)
    random_states = [th.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    space_state = model.policy.observation_space.np_random.bit_generator.state
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    files = []
    for count in (4, 1):
        model.n_eval_candidates = count
        model.export(tmp_path / "policy.pt2")
        files.append(th.export.load(tmp_path / "policy.pt2").module()(th.ones(1, 2)))
    model.export(tmp_path / "policy")
    assert [th.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] == random_states
    assert model.policy.observation_space.np_random.bit_generator.state == space_state
    assert all(parameter.requires_grad for parameter in model.policy.parameters())
    assert model.policy.training
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert not np.array_equal(*files)


def test_a_loaded_policy_is_exported_with_a_normalisation_given(tmp_path):
    model = trained(**MODELS["normalised"])
    model.policy.save(tmp_path / "policy.pt")
    policy = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    policy.export(tmp_path / "policy", "torch", vec_normalize=model.get_vec_normalize_env())
    observation = batch_of(model, 5)
    decide = lambda path: th.export.load(path).module()(th.as_tensor(observation)).numpy()  # noqa: E731
    actions = decide(tmp_path / "policy.pt2")
    np.testing.assert_allclose(actions, predicted(model, observation), atol=1e-5)
    with pytest.raises(ValueError, match="vec_normalize must be the VecNormalize that the policy was trained with, got None"):
        policy.export(tmp_path / "raw")
    policy.export(tmp_path / "raw.pt2", vec_normalize=False)
    assert np.abs(decide(tmp_path / "raw.pt2") - actions).max() > 1e-3

    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match="vec_normalize must be the VecNormalize"):
        loaded.export(tmp_path / "loaded")
    loaded.export(tmp_path / "loaded.pt2", vec_normalize=model.get_vec_normalize_env())
    np.testing.assert_array_equal(decide(tmp_path / "loaded.pt2"), actions)
    model.set_env(make_vec_env(lambda: AnySpacesEnv(MODELS["normalised"]["observation_space"], BOX)))
    model.learn(1).export(tmp_path / "raw.pt2")  # trained on raw observations now


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = trained()
    with pytest.raises(ValueError, match="format must be one of 'onnx', 'torch', got 'tflite'"):
        model.export(tmp_path / "policy", "tflite")
    with pytest.raises(ValueError, match=r"path must end in \.onnx .* with format='onnx', got .*policy\.pt2"):
        model.export(tmp_path / "policy.pt2", "onnx")
    with pytest.raises(ValueError, match=r"vec_normalize must be a VecNormalize, False or None, got 'statistics\.pkl'"):
        model.export(tmp_path / "policy", vec_normalize="statistics.pkl")
    with pytest.raises(ValueError, match=r"vec_normalize must normalise the policy's observations, .* got one for"):
        model.policy.export(tmp_path / "policy", vec_normalize=VecNormalize(make_vec_env("Pendulum-v1")))
    other, model = VecNormalize(make_vec_env(lambda: AnySpacesEnv(MIXED, BOX)), norm_obs_keys=["vector"]), trained(VECTORS)
    with pytest.raises(ValueError, match=r"vec_normalize must normalise the policy's observations, .* got one for"):
        model.policy.export(tmp_path / "policy", vec_normalize=other)
    clash = trained(spaces.Dict(noise=BOX, other=BOX))
    with pytest.raises(ValueError, match=r"""observations must have other keys than "noise" and "action" .* got \['noise'"""):
        clash.export(tmp_path / "policy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match='onnx and onnxscript needed for format="onnx": pip install onnx onnxscript'):
        model.export(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_without_the_export_extra():
    code = "import sys; sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None); import sb3_qvpo"
    subprocess.run([sys.executable, "-c", code], check=True)
