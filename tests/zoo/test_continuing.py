"""What RL Zoo loads to play or to train on: buffers, counters, schedules and checkpoints."""

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3
import torch as th
from helpers import TINY, CountdownEnv, tiny_qvpo
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qvpo import QVPO, zoo


def test_playing_allocates_no_full_size_buffer(tmp_path):
    tiny_qvpo(buffer_size=1_000_000).save(tmp_path / "model")
    as_enjoy_does = dict(custom_objects={"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}, seed=0)
    as_push_to_hub_does = dict(custom_objects={}, env=gym.make("Pendulum-v1"), seed=0)
    for arguments in (as_enjoy_does, as_push_to_hub_does):
        assert zoo.ZooQVPO.load(tmp_path / "model", **arguments).replay_buffer.buffer_size == 1
    assert rl_zoo3.ALGOS["qvpo"].__name__ == "QVPO"  # in model cards
    assert zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1")).replay_buffer.buffer_size == 1_000_000


def test_continuing_skips_the_warm_up_and_keeps_the_schedule(tmp_path):
    model = tiny_qvpo(learning_starts=10, ent_coef="lin_1.0").learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    with_buffer = zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    with_buffer.load_replay_buffer(tmp_path / "buffer")
    random_actions = []
    with_buffer.action_space.sample = lambda: random_actions.append(1)
    ent_coefs, starts = [], []

    def record(*_):
        ent_coefs.append(with_buffer._ent_coef_schedule(with_buffer._current_progress_remaining))
        starts.append(with_buffer.learning_starts)
        with_buffer.save(tmp_path / "during")
        return True

    with_buffer.learn(20, callback=record)
    assert (with_buffer.num_timesteps, with_buffer._n_updates) == (40, 30)
    assert not random_actions
    assert set(starts) == {0}
    assert with_buffer.learning_starts == QVPO.load(tmp_path / "during").learning_starts == 10
    assert ent_coefs[1] == pytest.approx(1 - 21 / 40)  # the second half of 40 steps, not a second 1.0

    again = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").learn(15)
    assert (again.num_timesteps, again._n_updates) == (15, 10 + 5)  # an empty buffer: warm-up as in SB3


def test_a_checkpoint_is_resumed(tmp_path):
    """Given to ``-i``: with its buffer, counters, normalisation and random states, as by ``resume()``."""

    def env(**settings):
        return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), **settings)

    model = zoo.ZooQVPO("MlpPolicy", env(), **{**TINY, "learning_starts": 10, "seed": 0}).learn(20)
    model.save_checkpoint(tmp_path / "run")
    as_training_does = dict(env=env(), seed=5, device="cpu", learning_starts=10, n_diffusion_steps=TINY["n_diffusion_steps"])
    resumed = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), **as_training_does)
    assert (resumed.num_timesteps, resumed._n_updates, resumed.replay_buffer.size()) == (20, 10, 20)
    np.testing.assert_array_equal(resumed.get_vec_normalize_env().obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    resumed.learn(5)
    by_hand = QVPO.resume(tmp_path / "run", env(), device="cpu").learn(5, reset_num_timesteps=False)
    assert (resumed.num_timesteps, resumed._n_updates) == (25, 15)
    for one, other in zip(resumed.policy.parameters(), by_hand.policy.parameters(), strict=True):
        assert th.equal(one, other)
    # RL Zoo loads any buffer that it finds beside the file: not over the checkpoint's own
    model.save_replay_buffer(tmp_path / "replay_buffer")
    again = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), **{**as_training_does, "env": env()})
    buffer = again.replay_buffer
    with pytest.warns(UserWarning, match="the checkpoint has its own replay buffer"):
        again.load_replay_buffer(tmp_path / "replay_buffer")
    assert again.replay_buffer is buffer
    again.save(tmp_path / "saved")
    later = zoo.ZooQVPO.load(tmp_path / "saved", env=env(), device="cpu")
    later.load_replay_buffer(tmp_path / "replay_buffer")
    assert later.replay_buffer.size() == 20
    played = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), custom_objects={})
    assert (played.num_timesteps, played.replay_buffer.buffer_size) == (20, 1)


@pytest.mark.parametrize("cls", [QVPO, zoo.ZooQVPO])
def test_continuing_without_a_buffer_fills_it_first(cls, tmp_path):
    tiny_qvpo(learning_starts=10).learn(20).save(tmp_path / "model")
    model = cls.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    sizes = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda *args, **kwargs: (sizes.append(model.replay_buffer.size()), sample(*args, **kwargs))[1]
    model.learn(15, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (35, 10 + 5)
    assert sizes == [11, 12, 13, 14, 15]


def test_continuing_with_her_without_a_buffer(tmp_path):
    def env():
        return BitFlippingEnv(n_bits=3, continuous=True)

    her = dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=10)
    tiny_qvpo(env(), **her).learn(30).save(tmp_path / "model")
    model = zoo.ZooQVPO.load(tmp_path / "model", env=env(), device="cpu").learn(20)
    assert model.num_timesteps == 50
    assert model._n_updates == 20 + 10


def test_continuing_keeps_the_number_of_diffusion_steps(tmp_path):
    """RL Zoo passes all settings of the task to load(), but the policy is the model's."""
    tiny_qvpo(n_diffusion_steps=3).learn(10).save(tmp_path / "model")
    settings = dict(n_diffusion_steps=20, ent_coef=0.5, env=gym.make("Pendulum-v1"), device="cpu")
    with pytest.warns(UserWarning, match="n_diffusion_steps stays 3, as in the saved model; 20 was asked for"):
        model = zoo.ZooQVPO.load(tmp_path / "model", **settings).learn(10)
    assert (model.policy.n_diffusion_steps, model.ent_coef) == (3, 0.5)


def test_continuing_writes_its_own_tensorboard_folder(tmp_path):
    def train(**kwargs):
        return zoo.ZooQVPO("MlpPolicy", "Pendulum-v1", **{**TINY, "tensorboard_log": str(tmp_path / "tb")}).learn(8)

    train().save(tmp_path / "model")
    train()  # another run
    model = zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").learn(8)
    assert model.num_timesteps == 16
    files = sorted(path.parent.name for path in (tmp_path / "tb").glob("*/*tfevents*"))
    assert files == ["QVPO_1", "QVPO_2", "QVPO_3"]


def test_what_is_fixed_stays_the_models(tmp_path):
    """RL Zoo hands on all settings of the task's entry, which may have other critics than the saved model."""
    tiny = {"learning_starts": 5, "batch_size": 8, "buffer_size": 100, "n_diffusion_steps": 3, "n_train_candidates": 4}
    zoo.ZooQVPO("MlpPolicy", CountdownEnv(), **tiny).learn(10).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="critic_type stays twin, as in the saved model; crossq was asked for"):
        model = zoo.ZooQVPO.load(tmp_path / "model", env=CountdownEnv(), critic_type="crossq", n_diffusion_steps=3)
    model.learn(10)
    model.save_checkpoint(tmp_path / "run.zip")
    with pytest.warns(UserWarning, match="n_diffusion_steps stays 3"):
        zoo.ZooQVPO.load(tmp_path / "run.zip", env=CountdownEnv(), n_diffusion_steps=20).learn(10)
