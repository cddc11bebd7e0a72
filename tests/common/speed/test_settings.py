"""What a user may switch, what the hardware answers, and that everything works without speed."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import same_weights, tiny_qvpo, weights_of

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.speed import settings as speed_settings

CPU = th.device("cpu")


def test_the_type_of_candidates(settings, monkeypatch):
    monkeypatch.setattr(speed_settings, "has_bfloat16", lambda device: True)
    assert speed_settings.candidate_dtype(CPU) == th.bfloat16
    monkeypatch.setattr(speed_settings, "has_bfloat16", lambda device: False)
    assert speed_settings.candidate_dtype(CPU) == th.float32
    settings.candidate_dtype = "bfloat16"
    assert speed_settings.candidate_dtype(CPU) == th.bfloat16
    settings.candidate_dtype = "float16"
    with pytest.raises(ValueError, match=r"candidate_dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"):
        speed_settings.candidate_dtype(CPU)


class EagerPolicy(DiffusionPolicy):
    """Of the eager classes alone."""

    actor_class, critic_class = DiffusionActor, CandidateCritic


LARGE = dict(n_train_candidates=64, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))


@pytest.mark.parametrize("kwargs", [{}, LARGE], ids=["tiny", "large"])
def test_switched_off_it_is_the_eager_classes(kwargs, settings):
    """Bit for bit: nothing else of ``speed/`` is taken then."""
    settings.enabled = False
    switched_off = weights_of(tiny_qvpo(**kwargs).learn(15))
    assert same_weights(switched_off, weights_of(tiny_qvpo(policy=EagerPolicy, **kwargs).learn(15)))


def test_everything_works_without_speed(settings, tmp_path):
    """Training, both kinds of predictions, saving, resuming, export; nothing is compiled, and no kernel is fused."""
    settings.enabled = False
    model = tiny_qvpo().learn(20)
    assert not model.policy.compile_actions() and model.policy.programs.tried_counts() == ([], [])
    assert model.actor.optimizer.param_groups[0]["fused"] is None
    observation = np.ones(3, np.float32)
    action = model.predict(observation, deterministic=True)[0]
    assert model.action_space.contains(model.predict(observation)[0])
    model.save(tmp_path / "model")
    model.save_checkpoint(tmp_path / "run")
    for other in (QVPO.load(tmp_path / "model"), QVPO.resume(tmp_path / "run", gym.make("Pendulum-v1"))):
        np.testing.assert_array_equal(other.predict(observation, deterministic=True)[0], action)
    other.learn(10, reset_num_timesteps=False)
    model.export(tmp_path / "policy.pt2")
    exported = th.export.load(tmp_path / "policy.pt2").module()
    np.testing.assert_allclose(exported(th.as_tensor(observation).unsqueeze(0)).squeeze(0), action, atol=1e-5)
