"""Files that version 0.1 wrote load, decide the same and train on as it did: ``tests/data``."""

import json

import numpy as np
import pytest
import torch as th
from helpers import ROOT, CountdownEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qvpo import QVPO, DiffusionPolicy

DATA = ROOT / "tests" / "data"
EXPECTED = json.loads((DATA / "expected_0_1.json").read_text())
OBSERVATIONS = np.linspace(-1, 1, 7, dtype=np.float32).reshape(-1, 1)


def environment():
    return DummyVecEnv([lambda: CountdownEnv(length=5)])


def loaded():
    env = VecNormalize.load(str(DATA / "vec_normalize_0_1.pkl"), environment())
    model = QVPO.load(DATA / "model_0_1.zip", env=env, device="cpu")
    model.load_replay_buffer(DATA / "replay_buffer_0_1.pkl")
    return model


MODELS = {"model": loaded, "checkpoint": lambda: QVPO.resume(DATA / "checkpoint_0_1.zip", environment(), device="cpu")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_or_a_run_of_version_0_1(kind):
    """The actions that version 0.1 chose, before and after three more updates, and everything that it had set."""
    model = MODELS[kind]()
    assert (model.num_timesteps, model._n_updates) == (EXPECTED["num_timesteps"], EXPECTED["n_updates"])
    assert (model.n_behavior_candidates, model.n_eval_candidates, model.qf_learning_rate) == (3, 4, 1e-3)
    assert len(model.actor.diffusion.sampling_steps) == 2
    assert "n_shared_steps" not in vars(model)
    actions = model.predict(OBSERVATIONS, deterministic=True)[0]
    np.testing.assert_allclose(actions, EXPECTED["actions"], atol=1e-5)
    model._setup_learn(0, reset_num_timesteps=False)  # a logger; random states of the checkpoint
    th.manual_seed(3)
    np.random.seed(3)
    model.train(3, batch_size=8)
    actions = model.predict(OBSERVATIONS, deterministic=True)[0]
    np.testing.assert_allclose(actions, EXPECTED["actions_after_three_updates"], atol=1e-4)
    model.learn(10, reset_num_timesteps=False)


def test_a_policy_of_version_0_1():
    policy = DiffusionPolicy.load(DATA / "policy_0_1.pth", device="cpu")
    np.testing.assert_allclose(policy.predict(OBSERVATIONS, deterministic=True)[0], EXPECTED["actions"], atol=1e-5)


def test_shared_steps_of_version_0_1_are_said_to_be_gone(tmp_path):
    """The option has no successor: the model loads, and trains without it."""
    model = QVPO.load(DATA / "model_0_1.zip", device="cpu")
    model.n_shared_steps = 2  # as the file of a model with that option has it
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="n_shared_steps is 2 in the saved model; the option is gone"):
        later = QVPO.load(tmp_path / "model", device="cpu")
    assert "n_shared_steps" not in vars(later)
