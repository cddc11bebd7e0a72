"""A run that was broken off continues: from a checkpoint bit for bit, from the model in memory without loss."""

import errno
import io
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, same_weights, tiny_qvpo, weights_of
from resumable_run import run
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.checkpoints import open_checkpoint, unpickle
from sb3_qvpo.common.interruptions import cut_last_episode

CONTINUE = dict(reset_num_timesteps=False)


class Interrupt(BaseCallback):
    """Ctrl-C at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps >= self.at:
            raise KeyboardInterrupt
        return True


def normalized(env="Pendulum-v1", **kwargs):
    return VecNormalize(make_vec_env(env, n_envs=1), **kwargs)


class TwoPartsEnv(gym.ObservationWrapper):
    """Observations in two parts."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Dict(a=env.observation_space, b=env.observation_space)

    def observation(self, observation):
        return dict(a=observation, b=observation)


def countdown(**kwargs):
    return lambda: CountdownEnv(length=5, **kwargs)


HER = dict(
    policy="MultiInputPolicy",
    replay_buffer_class=HerReplayBuffer,
    replay_buffer_kwargs=dict(goal_selection_strategy="future", n_sampled_goal=2),
    learning_starts=20,
)
RUNS = {
    "plain": (countdown(), dict()),
    "random starts": (lambda: make_vec_env("Pendulum-v1", n_envs=1), dict()),
    "two environments": (lambda: make_vec_env(countdown(), n_envs=2), dict(gradient_steps=-1)),
    "normalised": (normalized, dict()),
    "rewards normalised only": (lambda: normalized(norm_obs=False), dict()),
    "n-step": (countdown(truncate=True), dict(n_steps=3)),
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
    "in the warm-up": (countdown(), dict(learning_starts=110)),
    "episodic": (countdown(), dict(train_freq=(2, "episode"), gradient_steps=-1)),
}
STEPS = {"random starts": 900, "normalised": 900, "rewards normalised only": 900}


def scramble():
    """Another process draws other numbers."""
    for seed in (random.seed, np.random.seed, th.manual_seed):
        seed(int.from_bytes(os.urandom(3), "big"))


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_is_bit_for_bit_the_uninterrupted_one(name, tmp_path):
    make_env, kwargs = RUNS[name]
    n_steps = STEPS.get(name, 150)
    frequency = n_steps // 9
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


def test_no_second_warm_up_and_the_schedule_goes_on(tmp_path):
    model = tiny_qvpo(CountdownEnv(), learning_starts=20, ent_coef="lin_1.0")
    callback = ResumableCheckpointCallback(10, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, CallbackList([callback, Interrupt(51)]))
    model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
    assert (model.num_timesteps, model.remaining_timesteps, model._n_updates) == (50, 50, 30)
    assert model.replay_buffer.size() == 50
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 31
    model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False)
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.0, abs=1e-6)
    assert (model._n_updates, model.remaining_timesteps) == (80, 0)


def test_checkpoints_are_taken_when_they_are_due(tmp_path, capsys):
    """Every 7 steps; at the end of episodes of 5 steps: the next one after 7; without an end at the latest after 14."""

    def saved_at(env, **kwargs):
        callback = ResumableCheckpointCallback(7, tmp_path / "run", verbose=2, **kwargs)
        tiny_qvpo(env).learn(30, callback)
        return [int(step) for step in re.findall(r"Saved a checkpoint after (\d+) steps", capsys.readouterr().out)]

    assert saved_at(CountdownEnv(length=5)) == [7, 14, 21, 28, 30]
    assert saved_at(CountdownEnv(length=5), at_episode_end=True) == [10, 20, 30]
    assert saved_at(CountdownEnv(length=100), at_episode_end=True) == [14, 28, 30]
    with pytest.raises(ValueError, match="save_freq must be a whole number of at least 1, got 0"):
        ResumableCheckpointCallback(0, tmp_path / "run")


def test_the_end_of_an_episode_is_the_end_of_all(tmp_path, capsys):
    """Of two environments with episodes of 3 and 4 steps; and the buffer knows which end was a termination."""
    env = DummyVecEnv([countdown(), lambda: CountdownEnv(length=4, truncate=True)])
    callback = ResumableCheckpointCallback(14, tmp_path / "run", at_episode_end=True, verbose=2)
    model = tiny_qvpo(env, gradient_steps=-1)
    with pytest.warns(UserWarning, match="no common end of all episodes within 28 steps"):
        model.learn(100, callback)
    assert re.findall(r"Saved a checkpoint after (\d+) steps", capsys.readouterr().out) == ["28", "56", "80", "100"]
    ends = np.arange(50)
    np.testing.assert_array_equal(model.replay_buffer.dones[:50, 0], (ends + 1) % 5 == 0)
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:50, 0], 0)  # terminations stay terminations
    np.testing.assert_array_equal(model.replay_buffer.timeouts[:50, 1], (ends + 1) % 4 == 0)


def test_where_the_callback_cannot_work_is_found_out_at_the_start(tmp_path):
    def callback():
        return ResumableCheckpointCallback(10, tmp_path / "run", at_episode_end=True)

    with pytest.raises(ValueError, match=r"must be given to learn.* got inside EveryNTimesteps"):
        tiny_qvpo().learn(5, EveryNTimesteps(5, callback()))
    with pytest.raises(ValueError, match=r"the model must have save_checkpoint\(\), as QVPO has, got SAC"):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").learn(5, callback())
    with pytest.raises(ValueError, match="at_episode_end must be False for environments with Monitor"):
        tiny_qvpo(Monitor(CountdownEnv(), allow_early_resets=False)).learn(5, callback())
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(IsADirectoryError, match="the path of a checkpoint must not be a folder"):
        tiny_qvpo().learn(5, ResumableCheckpointCallback(10, tmp_path / "folder"))
    (tmp_path / "run").mkdir()  # a folder of the name without the suffix is no obstacle
    for vec_env_class in (SubprocVecEnv, DummyVecEnv):
        tiny_qvpo(vec_env_class([CountdownEnv])).learn(25, callback())
    assert QVPO.resume(tmp_path / "run", CountdownEnv()).num_timesteps == 25


def test_a_buffer_that_was_being_refilled_goes_on_being_refilled(tmp_path):
    model = tiny_qvpo(CountdownEnv(), learning_starts=40).learn(60)
    loaded = QVPO.load(saved(model), env=CountdownEnv(), device="cpu")  # without its buffer: filled again up to step 100
    with pytest.raises(KeyboardInterrupt):
        loaded.learn(60, CallbackList([ResumableCheckpointCallback(10, tmp_path / "run"), Interrupt(75)]), **CONTINUE)
    for model in (loaded, QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")):
        assert model._n_updates == 20
        model.learn(100 - model.num_timesteps, **CONTINUE)
        assert model._n_updates == 20
        model.learn(1, **CONTINUE)
        assert model._n_updates == 21


def test_saving_and_seeding_between_resume_and_learn(tmp_path):
    tiny_qvpo(CountdownEnv()).learn(20).save_checkpoint(tmp_path / "run")
    results = []
    for change in ("nothing", "saved again", "seeded"):
        scramble()
        model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
        if change == "saved again":
            model.save_checkpoint(tmp_path / "again")
            scramble()
            model = QVPO.resume(tmp_path / "again", CountdownEnv(), device="cpu")
        if change == "seeded":
            model.set_random_seed(5)
        results.append(weights_of(model.learn(20, **CONTINUE)))
    assert same_weights(results[0], results[1])
    assert not same_weights(results[0], results[2])


def test_the_cut_of_a_full_buffer_at_its_edge():
    model = tiny_qvpo(CountdownEnv(length=100), buffer_size=20, learning_starts=100).learn(40)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (0, True)
    cut_last_episode(model.replay_buffer)
    assert model.replay_buffer.timeouts[:, 0].tolist() == [0.0] * 19 + [1.0]


def test_a_checkpoint_in_the_middle_of_an_episode_changes_nothing(tmp_path):
    plain = tiny_qvpo(CountdownEnv(length=5)).learn(40)
    saved = tiny_qvpo(CountdownEnv(length=5)).learn(40, ResumableCheckpointCallback(3, tmp_path / "run"))
    assert same_weights(weights_of(plain), weights_of(saved))


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


def test_a_run_that_is_killed_loses_nothing_older_than_the_last_checkpoint(tmp_path):
    """Twelve times SIGKILL, every other time while a checkpoint is being written; in the end nothing is different."""
    path, temporary, n_steps, pause = tmp_path / "run.zip", tmp_path / "run.zip.tmp", 1000, random.Random(0)
    script = Path(__file__).with_name("resumable_run.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(script.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(script), str(path), str(n_steps)]
    promised, unfinished_files = 0, 0
    for kill in range(12):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            first_line = process.stdout.readline()
            assert first_line == "started\n" or int(first_line.removeprefix("resumed at ")) >= promised
            time.sleep(pause.uniform(0, 0.15))
            while kill % 2 and not temporary.exists() and process.poll() is None:
                pass
            process.send_signal(signal.SIGKILL)
            output = process.stdout.read()
        assert process.returncode == -signal.SIGKILL, "the run must be long enough to be killed"
        unfinished_files += temporary.exists()
        promised = max([promised, *map(int, re.findall(r"checkpoint after (\d+) steps", output))])
        if path.exists():
            resumed = QVPO.resume(path, CountdownEnv(length=4), device="cpu")
            assert resumed.num_timesteps >= promised
            assert resumed.replay_buffer.size() == resumed.num_timesteps
            promised = resumed.num_timesteps
    assert promised > 0
    assert unfinished_files > 0
    continued, uninterrupted = run(path, n_steps), run(tmp_path / "other.zip", n_steps)
    assert continued.num_timesteps == uninterrupted.num_timesteps == n_steps
    assert same_weights(weights_of(continued), weights_of(uninterrupted))


# Errors in the middle: weights, buffer and what is on disk stay whole


class FailingEnv(CountdownEnv):
    """Raises at one step."""

    def __init__(self, at=13, **kwargs):
        super().__init__(**kwargs)
        self.at, self.total = at, 0

    def step(self, action):
        self.total += 1
        if self.total == self.at:
            raise ConnectionError("the robot does not answer")
        return super().step(action)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_an_environment_that_raises(n_steps):
    model = tiny_qvpo(FailingEnv(length=5), n_steps=n_steps)
    with pytest.raises(ConnectionError, match="the robot does not answer") as raised:
        model.learn(30)
    if sys.version_info >= (3, 11):
        (note,) = raised.value.__notes__
        assert "Training stopped after 12 environment steps. Weights and replay buffer are intact" in note
    assert (model.replay_buffer.size(), model._n_updates) == (12, 7)
    before = weights_of(model)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (22, 17)
    assert not same_weights(before, weights_of(model))
    assert model.replay_buffer.observations[12, 0, 0] == 0  # a reset
    assert bool(model.replay_buffer.timeouts[11, 0])


def test_after_an_interruption_by_hand_training_goes_on_in_memory():
    model = tiny_qvpo(CountdownEnv(length=100), n_steps=3)
    with pytest.raises(KeyboardInterrupt):
        model.learn(50, Interrupt(30))
    stored = model.replay_buffer.pos
    model.learn(model.remaining_timesteps, **CONTINUE)
    assert model.num_timesteps == 50
    assert model.replay_buffer.observations[stored, 0, 0] == 0  # a new episode
    assert bool(model.replay_buffer.timeouts[stored - 1, 0])


def test_environments_in_processes_that_die():
    model = tiny_qvpo(SubprocVecEnv([FailingEnv]))
    with pytest.raises((EOFError, ConnectionResetError)) as raised:
        model.learn(30)
    if sys.version_info >= (3, 11):
        assert "one of these is dead: set_env() new ones first" in raised.value.__notes__[0]
    model.set_env(make_vec_env(CountdownEnv))
    model.learn(model.remaining_timesteps, **CONTINUE)
    assert model.num_timesteps == 30


def test_refused_numbers_of_a_dictionary_leave_no_trace():
    env = normalized(lambda: TwoPartsEnv(NaNAtReset()))
    with pytest.raises(ValueError, match=r"non-finite observation\['a'\]"):
        tiny_qvpo(env, policy="MultiInputPolicy").learn(50)
    for part in ("a", "b"):
        assert np.isfinite(env.obs_rms[part].mean).all()
        assert env.obs_rms[part].count == pytest.approx(1e-4 + 4)  # the first observation and three steps


class NaNAtReset(CountdownEnv):
    """NaN at its second reset, or at its first if ``at_once``."""

    def __init__(self, at_once=False):
        super().__init__()
        self.resets = int(at_once)

    def reset(self, **kwargs):
        self.resets += 1
        observation, info = super().reset(**kwargs)
        return observation * (np.nan if self.resets == 2 else 1), info


def test_a_first_observation_that_is_refused_leaves_no_trace():
    env = normalized(lambda: NaNAtReset(at_once=True))
    model = tiny_qvpo(env)
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(50)
    assert env.obs_rms.count == pytest.approx(1e-4)
    assert np.isfinite(env.obs_rms.mean).all()
    model.learn(8)


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_refused_number_leaves_no_trace_in_the_normalisation(what):
    class Broken(CountdownEnv):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            if self.steps == 17:
                observation, reward = (observation * np.nan, reward) if what == "observation" else (observation, np.inf)
            return observation, reward, *rest

    env = VecNormalize(make_vec_env(lambda: Broken(length=100), n_envs=1))
    model = tiny_qvpo(env)
    with pytest.raises(ValueError, match=f"non-finite {what}"):
        model.learn(50)
    for statistics in (env.obs_rms, env.ret_rms):
        assert np.isfinite(statistics.mean).all()
        assert np.isfinite(statistics.var).all()
    assert env.obs_rms.count == pytest.approx(1e-4 + 17)  # the first observation and 16 steps
    np.testing.assert_allclose(env.obs_rms.mean, 0.08, rtol=1e-4)
    model.learn(5, reset_num_timesteps=False)
    assert np.isfinite(env.returns).all()


@pytest.fixture
def full_disk():
    """No file can grow beyond 50 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else limits[0], limits[1]))

    yield set_full
    set_full(False)


@pytest.mark.parametrize(
    ("method", "name"), [("save", "a.zip"), ("save_replay_buffer", "a.pkl"), ("save_checkpoint", "a.zip"), ("policy", "a.pt")]
)
def test_a_full_disk_leaves_the_previous_file(method, name, full_disk, tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[64, 64]), buffer_size=10_000).learn(20)
    save = model.policy.save if method == "policy" else getattr(model, method)
    save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert len(content) > 50_000
    model.learn(5)
    full_disk(True)
    with pytest.raises(OSError, match=r"could not save .*what was saved there before is intact.* and save again") as raised:
        save(tmp_path / name)
    assert raised.value.errno == errno.EFBIG
    full_disk(False)
    assert (tmp_path / name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]
    save(tmp_path / name)
    assert (tmp_path / name).read_bytes() != content


def test_training_goes_on_after_a_full_disk(full_disk, tmp_path):
    model = tiny_qvpo(buffer_size=10_000)
    callback = ResumableCheckpointCallback(10, tmp_path / "run")
    full_disk(True)
    with pytest.raises(OSError, match="could not save"):
        model.learn(50, callback)
    full_disk(False)
    assert (model.num_timesteps, model.replay_buffer.size()) == (10, 10)
    model.learn(model.remaining_timesteps, callback, reset_num_timesteps=False)
    assert QVPO.resume(tmp_path / "run", model.get_env()).num_timesteps == 50


def test_nothing_is_said_of_training_that_never_started():
    model = QVPO.load(saved(tiny_qvpo()))
    with pytest.raises(AssertionError, match="You must set the environment") as raised:
        model.learn(5)
    assert not hasattr(raised.value, "__notes__")


def saved(model):
    """A file in memory."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def test_a_checkpoint_that_cannot_be_written_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny_qvpo()
    with pytest.raises(OSError, match=r"could not save|Not a directory|File exists"):
        model.learn(5, ResumableCheckpointCallback(1000, tmp_path / "file" / "run"))
    assert model.num_timesteps == 0
    model.learn(5, ResumableCheckpointCallback(1000, tmp_path / "new folder" / "run"))
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["run.zip"]


@pytest.mark.parametrize("path", ["file/model", "x" * 300])
def test_a_path_that_cannot_be_is_an_error_that_says_what_is_intact(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not save .* so is the model in memory"):
        tiny_qvpo().save(tmp_path / path)
    with pytest.raises(ValueError, match=r"path must name a file, got '\.'"):
        tiny_qvpo().save("")


def test_where_files_go(tmp_path):
    """As in SB3: the suffix is added, folders are made, a folder of the name is left alone. A link stays a link."""
    model = tiny_qvpo()
    model.save(tmp_path / "deep" / "folder" / "model")
    assert (tmp_path / "deep" / "folder" / "model.zip").is_file()
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        model.save(tmp_path / "folder")
    assert (tmp_path / "folder.zip_2").is_file()
    os.chmod(tmp_path / "folder.zip_2", 0o640)
    (tmp_path / "folder.zip_2").rename(tmp_path / "mode.zip")
    model.save(tmp_path / "mode")
    assert (tmp_path / "mode.zip").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link.zip").symlink_to(tmp_path / "target.zip")
    model.save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "target.zip")
    with pytest.raises(OSError, match="No space left on device"):
        model.save("/dev/full")
    assert Path("/dev/full").is_char_device()


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
