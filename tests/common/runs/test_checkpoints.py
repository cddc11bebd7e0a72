"""A run that was broken off continues from a checkpoint bit for bit."""

import random
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, Interrupt, TwoPartsEnv, countdown, normalized, same_weights, scramble, tiny_qvpo, weights_of
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.runs.checkpoints import cut_last_episode, open_checkpoint, unpickle

HER = dict(
    policy="MultiInputPolicy",
    replay_buffer_class=HerReplayBuffer,
    replay_buffer_kwargs=dict(goal_selection_strategy="future", n_sampled_goal=2),
    learning_starts=20,
)


def pendulum():
    """Episodes of 10 steps from random starts."""
    return gym.make("Pendulum-v1", max_episode_steps=10)


RUNS = {
    "plain": (countdown(), dict()),
    "random starts": (lambda: make_vec_env(pendulum, n_envs=1), dict()),
    "two environments": (lambda: make_vec_env(countdown(), n_envs=2), dict(gradient_steps=-1)),
    "several counts": (
        lambda: make_vec_env(countdown(truncate=True), n_envs=2),
        dict(n_behavior_candidates=(1, 3, 6), gradient_steps=-1),
    ),
    "normalised": (lambda: normalized(pendulum), dict()),
    "rewards normalised only": (lambda: normalized(pendulum, norm_obs=False), dict()),
    "n-step": (countdown(truncate=True), dict(n_steps=3)),
    "renormalised critics": (countdown(), dict(critic_type="crossq", policy_kwargs=dict(net_arch=[8], renorm_start=40))),
    "hindsight": (lambda: BitFlippingEnv(n_bits=3, continuous=True), HER),
    "noise, delay, schedules": (
        countdown(),
        dict(
            action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)),
            policy_delay=3,
            learning_rate="lin_1e-2",
            ent_coef="lin_0.5",
        ),
    ),
    "small buffer": (countdown(), dict(buffer_size=33)),
    "memory saved": (
        countdown(),
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    ),
    "dictionaries normalised": (
        lambda: normalized(lambda: TwoPartsEnv(CountdownEnv(length=5)), norm_obs_keys=["a"]),
        dict(policy="MultiInputPolicy"),
    ),
    "in the warm-up": (countdown(), dict(learning_starts=66)),
    "episodic": (countdown(), dict(train_freq=(2, "episode"), gradient_steps=-1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_is_bit_for_bit_the_uninterrupted_one(name, tmp_path):
    make_env, kwargs = RUNS[name]
    n_steps, frequency = 90, 9
    models, keep = [], dict()
    for interrupted in (False, True):
        path = tmp_path / f"{interrupted}.zip"
        callback = ResumableCheckpointCallback(frequency, path, at_episode_end=True)
        model = tiny_qvpo(make_env(), **kwargs)
        if interrupted:
            for at in (n_steps // 2, n_steps // 2 + 2, int(0.8 * n_steps)):
                with pytest.raises(KeyboardInterrupt):
                    model.learn(model.remaining_timesteps or n_steps, CallbackList([callback, Interrupt(at)]), **keep)
                scramble()
                model = QVPO.resume(path, make_env(), device="cpu")
                assert 0 < model.num_timesteps < at
                keep = dict(reset_num_timesteps=False)
            model.learn(model.remaining_timesteps, callback, **keep)
        else:
            model.learn(n_steps, callback)
        models.append(model)
    first, second = models
    assert first.num_timesteps == second.num_timesteps
    assert (first._n_updates, first._episode_num) == (second._n_updates, second._episode_num)
    assert first._n_updates > 0
    assert same_weights(weights_of(first), weights_of(second))
    for name in ("observations", "actions", "rewards", "dones", "timeouts"):
        parts = [getattr(model.replay_buffer, name) for model in models]
        parts = [part if isinstance(part, dict) else {name: part} for part in parts]
        for key in parts[0]:
            np.testing.assert_array_equal(parts[0][key], parts[1][key])
    if first.get_vec_normalize_env() is not None:
        statistics = [model.get_vec_normalize_env().ret_rms for model in models]
        assert statistics[0].mean == statistics[1].mean
        assert statistics[0].count == statistics[1].count
    assert [info["r"] for info in first.ep_info_buffer] == [info["r"] for info in second.ep_info_buffer]


def test_the_comparison_would_notice_other_random_numbers(tmp_path):
    results = []
    for forget in (False, True):
        model = tiny_qvpo(CountdownEnv()).learn(40)
        model.save_checkpoint(tmp_path / "run")
        scramble()
        model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
        if forget:
            model._resumed_random_states = None
        results.append(weights_of(model.learn(20, reset_num_timesteps=False)))
    assert not same_weights(*results)


def test_a_checkpoint_holds_the_random_states(tmp_path):
    model = tiny_qvpo().learn(8)
    model.save_checkpoint(tmp_path / "run")
    with open_checkpoint(tmp_path / "run") as archive:
        states = unpickle(archive, "run")["random_states"]
    assert states.keys() >= {"python", "numpy", "torch", "action_space"}
    drawn = [random.random(), np.random.random(), float(th.rand(1))]
    scramble()
    QVPO.resume(tmp_path / "run", make_vec_env("Pendulum-v1")).learn(0, reset_num_timesteps=False)
    np.random.set_state(states["numpy"])  # one number has been drawn to seed the environment
    assert drawn == [random.random(), np.random.random(), float(th.rand(1))]


def test_the_cut_of_a_full_buffer_at_its_edge():
    model = tiny_qvpo(CountdownEnv(length=100), buffer_size=20, learning_starts=100).learn(40)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (0, True)
    cut_last_episode(model.replay_buffer)
    assert model.replay_buffer.timeouts[:, 0].tolist() == [0.0] * 19 + [1.0]


@pytest.mark.parametrize("name", ["plain", "n-step", "memory saved", "hindsight"])
def test_an_episode_in_the_middle_is_cut_off(name, tmp_path):
    """The buffer leads from no episode into another."""
    make_env, kwargs = RUNS[name]
    model = tiny_qvpo(make_env(), **kwargs).learn(23)
    model.save_checkpoint(tmp_path / "run")
    model = QVPO.resume(tmp_path / "run", make_env(), device="cpu")
    buffer = model.replay_buffer
    assert buffer.pos == 23
    # Only the memory-saving buffer cannot tell a cut from an end
    assert bool(buffer.dones[22, 0]) == (name in ("memory saved", "hindsight"))
    assert bool(buffer.timeouts[22, 0]) == (name != "memory saved")
    model.learn(10, reset_num_timesteps=False)
    if name == "n-step":
        batch = buffer._get_samples(np.array([21, 22, 23]))
        np.testing.assert_allclose(batch.rewards[:, 0], [1.99, 1.0, 2.9701], rtol=1e-5)
    if name == "hindsight":
        assert buffer.ep_start[23, 0] == 23


def test_saved_normalisation_comes_back_with_or_without_a_wrapper(tmp_path):
    model = tiny_qvpo(normalized(clip_obs=3.0)).learn(50)
    model.save_checkpoint(tmp_path / "run")
    saved = model.get_vec_normalize_env()
    for env in ("Pendulum-v1", make_vec_env("Pendulum-v1").envs[0], make_vec_env("Pendulum-v1"), normalized(clip_obs=4.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other settings, tested below
            resumed = QVPO.resume(tmp_path / "run", env, device="cpu").get_vec_normalize_env()
        np.testing.assert_array_equal(resumed.obs_rms.mean, saved.obs_rms.mean)
        assert resumed.ret_rms.var == saved.ret_rms.var
    assert resumed.clip_obs == 4.0  # the script's own settings
    with pytest.raises(ValueError, match=r"env must be 1 environment\(s\) like the saved run, got 2"):
        QVPO.resume(tmp_path / "run", make_vec_env("Pendulum-v1", n_envs=2))
    for env in (CountdownEnv(), VecNormalize(make_vec_env(CountdownEnv))):
        with pytest.raises(ValueError, match=r"env must have the spaces of the saved run|Observation spaces do not match"):
            QVPO.resume(tmp_path / "run", env)
    for switched_off in (dict(norm_obs=False), dict(norm_obs_keys=["a"])):
        env = normalized(**switched_off) if "norm_obs" in switched_off else normalized()
        env.norm_obs_keys = switched_off.get("norm_obs_keys")
        with pytest.raises(ValueError, match="env must normalise the same observations as in the saved run"):
            QVPO.resume(tmp_path / "run", env)
    with pytest.warns(UserWarning, match=r"env is normalised with other settings than .*: {.*'training': False"):
        QVPO.resume(tmp_path / "run", normalized(clip_obs=3.0, training=False))
    for env in (None, 3):
        with pytest.raises(ValueError, match=f"env must be an environment or the name of one, got {env}"):
            QVPO.resume(tmp_path / "run", env)
    tiny_qvpo().learn(5).save_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="env must not be normalised"):
        QVPO.resume(tmp_path / "run", normalized())


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a checkpoint .*: there is no file '.*\.zip'"):
        QVPO.resume(tmp_path / "none", "Pendulum-v1")
    tiny_qvpo().save(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"path must be a checkpoint .* got .*model\.zip', which is a saved model without its run: use load"
    ):
        QVPO.resume(tmp_path / "model", "Pendulum-v1")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match=r"path must be a checkpoint .* got .*text', which is damaged, incomplete or no zip"):
        QVPO.resume(tmp_path / "text", "Pendulum-v1")
    tiny_qvpo().learn(8).save_checkpoint(tmp_path / "run")
    content = bytearray((tmp_path / "run.zip").read_bytes())
    (tmp_path / "half.zip").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.zip").write_bytes(content)
    for name in ("half", "flipped"):
        with pytest.raises(ValueError, match=f"got .*{name}.zip', which is damaged"):
            QVPO.resume(tmp_path / name, "Pendulum-v1")


def test_the_model_in_a_checkpoint_can_be_loaded_alone(tmp_path):
    model = tiny_qvpo().learn(8)
    model.save_checkpoint(tmp_path / "run")
    loaded = QVPO.load(tmp_path / "run", device="cpu")
    assert same_weights(weights_of(loaded), weights_of(model))
    assert loaded.get_env() is None
    assert loaded.replay_buffer.size() == 0
