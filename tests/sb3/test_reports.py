"""What users of Stable-Baselines3 report in public, tried here: each test is one kind of fault with its twins."""

import errno
import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    ROOT,
    BanditEnv,
    CountdownEnv,
    Samples,
    add_metrics_through,
    batch_of,
    recorded_warnings,
    same_weights,
    tiny_qvpo,
    value_now_through,
    weights_of,
)
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.runs import files
from sb3_qvpo.common.runs.files import atomic_file, check_writable
from sb3_qvpo.zoo import ZooQVPO


def linear(value):
    return lambda progress_remaining: progress_remaining * value


# Schedules


BEYOND_THE_END = {
    "four environments": (lambda: make_vec_env("Pendulum-v1", 4), dict(gradient_steps=-1), 101),
    "eight steps a rollout": (lambda: "Pendulum-v1", dict(train_freq=8), 90),
    "an episode a rollout": (lambda: CountdownEnv(length=7), dict(train_freq=(1, "episode")), 25),
}


@pytest.mark.filterwarnings("ignore:gradient_steps=1")
@pytest.mark.parametrize("name", BEYOND_THE_END)
@pytest.mark.parametrize("argument", ["ent_coef", "learning_rate", "qf_learning_rate"])
def test_a_schedule_that_reaches_zero_ends_a_run(name, argument):
    """The last rollout goes beyond the total. The schedule stays at its end there, and never turns negative."""
    env, kwargs, n_steps = BEYOND_THE_END[name]
    seen = []
    model = tiny_qvpo(env(), **kwargs, **{argument: linear(0.02)})
    value_now_through(model, lambda *name_and_value: seen.append(name_and_value))
    model.learn(n_steps)
    values = [value for name, value in seen if name == argument]
    assert model.num_timesteps > n_steps and values[-1] == 0.0 and min(values) == 0.0
    assert model.actor.optimizer.param_groups[0]["lr"] >= 0


def test_a_schedule_that_turns_negative_is_named():
    model = tiny_qvpo()
    model.lr_schedule = lambda progress_remaining: progress_remaining - 0.9
    with pytest.raises(ValueError, match=r"learning_rate must be a number in \[0, inf\), got -0"):
        model.learn(30)


def test_changed_learning_rates_count_from_the_next_learn():
    """Both of them. A schedule that a script has put in place stays."""
    model = tiny_qvpo(learning_rate=1e-3).learn(10)
    model.learning_rate, model.qf_learning_rate = 2e-3, "lin_4e-3"
    model.learn(10)
    assert model.actor.optimizer.param_groups[0]["lr"] == 2e-3
    assert model.critic.optimizer.param_groups[0]["lr"] < 4e-3
    model.lr_schedule = lambda _: 5e-3
    model.learn(10)
    assert model.actor.optimizer.param_groups[0]["lr"] == 5e-3
    model.qf_learning_rate = -1.0
    before = weights_of(model)
    with pytest.raises(ValueError, match="qf_learning_rate must be a number in"):
        model.learn(10)
    assert same_weights(before, weights_of(model))


CHANGED = dict(tau=5.0, gamma=-1.0, n_train_candidates=1, policy_delay=0, max_grad_norm=-1.0, ent_coef=-1.0, batch_size=0)


@pytest.mark.parametrize("name", [*CHANGED, "tau is NaN"])
def test_changed_attributes_are_checked_before_learning_begins(name):
    """By the list that checks the constructor's arguments; nothing has changed then."""
    model = tiny_qvpo().learn(10)
    before, value = weights_of(model), CHANGED.get(name, float("nan"))
    setattr(model, name.split()[0], value)
    with pytest.raises(ValueError, match=name.split()[0]):
        model.learn(10, reset_num_timesteps=False)
    assert same_weights(before, weights_of(model)) and model.num_timesteps == 10


def test_frozen_targets_can_be_asked_for():
    """``tau=0``, on construction and later. Running statistics are copied all the same."""
    policy_kwargs = dict(net_arch=[8], features_extractor_class=Normalized)
    model = tiny_qvpo(tau=0.0, policy_kwargs=policy_kwargs)
    before = weights_of(model)
    after = weights_of(model.learn(20))
    for name in before:
        if "_target" in name and "running_" not in name and "num_batches" not in name:
            assert th.equal(before[name], after[name]), name
    mean = "features_extractor.norm.running_mean"
    assert th.equal(after[f"critic_target.{mean}"], after[f"critic.{mean}"]) and after[f"critic.{mean}"].any()


class Normalized(BaseFeaturesExtractor):
    """A features extractor with batch normalisation."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, observation):
        return self.norm(observation)


# Replay buffers of the user's own


FIELDS = {
    "array": lambda n: np.arange(n),
    "list": lambda n: [1] * n,
    "number": lambda n: 0.5,
    "text": lambda n: "half",
    "infos": lambda n: {"a": ["b"] * n},
    "tensor": lambda n: th.ones(n),
    "NaN that no update reads": lambda n: np.full(n, np.nan),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_samples_with_further_fields(kind):
    class Priorities(ReplayBuffer):
        def sample(self, batch_size, env=None):
            return Samples(*super().sample(batch_size, env)[:5], indices=FIELDS[kind](batch_size))

    model = tiny_qvpo(replay_buffer_class=Priorities).learn(20)
    assert model._n_updates == 15 and isinstance(batch_of(model, 4), Samples)


class Rows(ReplayBuffer):
    """Keeps its rows in a list, and has none of SB3's arrays."""

    def __init__(self, buffer_size, observation_space, action_space, device="auto", n_envs=1, **kwargs):
        self.rows, self.device, self.n_envs, self.buffer_size = [], device, n_envs, buffer_size

    def add(self, *row):
        self.rows.append(row)

    def size(self):
        return len(self.rows)

    def sample(self, batch_size, env=None):
        rows = [self.rows[i] for i in np.random.randint(len(self.rows), size=batch_size)]
        column = lambda i: th.as_tensor(np.concatenate([row[i] for row in rows]), dtype=th.float32)  # noqa: E731
        return Samples(column(0), column(2), column(1), column(4).unsqueeze(1), column(3).unsqueeze(1))


class CrashingEnv(CountdownEnv):
    def step(self, action):
        self.n_done = getattr(self, "n_done", 0) + 1
        if self.n_done == 15:
            raise self.error
        return super().step(action)


@pytest.mark.parametrize("error", [RuntimeError("simulator crashed"), KeyboardInterrupt(), EOFError()])
def test_the_real_error_comes_through(error, tmp_path):
    """Also where the buffer is of the user's own; the model can be saved after it."""
    env = CrashingEnv()
    env.error = error
    model = tiny_qvpo(env, replay_buffer_class=Rows)
    with pytest.raises(type(error)) as caught:
        model.learn(40)
    assert caught.value is error
    model.save(tmp_path / "model")
    QVPO.load(tmp_path / "model")


def test_a_clean_up_that_fails_is_a_warning():
    class Broken(ReplayBuffer):
        def size(self):
            if self.pos >= 14:
                raise OSError("memory-mapped file is gone")
            return super().size()

    env = CrashingEnv()
    env.error = RuntimeError("simulator crashed")
    with pytest.warns(UserWarning, match="memory-mapped file is gone"), pytest.raises(RuntimeError, match="simulator crashed"):
        tiny_qvpo(env, replay_buffer_class=Broken, learning_starts=100).learn(40)


# Devices


DEFAULT_DEVICE = """
import torch as th
{before}
import numpy as np
from helpers import BanditEnv, tiny_diffusion_ql, tiny_dtql, tiny_qvpo
{between}
model = tiny_qvpo(BanditEnv(action_dim=2), n_train_candidates=64, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))
th.set_default_device("meta")
model.learn(70)
for build in (tiny_diffusion_ql, tiny_dtql):
    th.set_default_device(None)
    other = build(BanditEnv(action_dim=2))
    th.set_default_device("meta")
    assert np.isfinite(other.learn(20).predict(np.zeros((2, 2), np.float32))[0]).all()
for deterministic in (True, False):
    assert np.isfinite(model.predict(np.zeros((2, 2), np.float32), deterministic=deterministic)[0]).all()
    assert np.isfinite(model.predict(np.zeros(2, np.float32), deterministic=deterministic)[0]).all()
model.save("{path}")
model.set_parameters(model.get_parameters())
model.save_checkpoint("{path}_run")
th.set_default_device(None)
model.learn(10, reset_num_timesteps=False)
print("done")
"""


@pytest.mark.parametrize("reset", ["before the import", pytest.param("after it", marks=pytest.mark.slow)])
def test_every_tensor_names_its_device(reset, tmp_path):
    """``torch.set_default_device`` to another than the model's: before the import, after it, and reset. In a new process."""
    switch = 'th.set_default_device("meta")'
    before, between = (switch, "th.set_default_device(None)") if reset == "before the import" else ("", "")
    code = DEFAULT_DEVICE.format(before=before, between=between, path=tmp_path / "model")
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "tests")
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr[-2000:]


# Files


def test_a_file_that_cannot_be_renamed_over_is_written_in_place(tmp_path, monkeypatch):
    """A bind mount, or a share that knows no renaming. With a warning; the file is whole."""
    model, replace = tiny_qvpo(), type(tmp_path).replace
    for number in (errno.EBUSY, errno.EXDEV, errno.EPERM):

        def refuse(self, target, number=number):
            raise OSError(number, os.strerror(number), str(target))

        monkeypatch.setattr(type(tmp_path), "replace", refuse)
        (tmp_path / "model.zip").write_bytes(b"old and longer than nothing")
        with pytest.warns(UserWarning, match="is written in place"):
            model.save(tmp_path / "model")
        monkeypatch.setattr(type(tmp_path), "replace", replace)
        assert same_weights(weights_of(QVPO.load(tmp_path / "model")), weights_of(model))
        assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    monkeypatch.setattr(type(tmp_path), "replace", refuse)
    monkeypatch.setattr(shutil, "copyfile", lambda *args: refuse(*args))
    with (
        pytest.warns(UserWarning, match="is written in place"),
        pytest.raises(OSError, match=r"all that was to be saved is in .*model\.zip\.tmp\); the model in memory is intact"),
    ):
        model.save(tmp_path / "model")
    assert same_weights(weights_of(QVPO.load(tmp_path / "model.zip.tmp")), weights_of(model))


def refused(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("what", ["mode", "synchronisation"])
def test_what_a_file_system_cannot_do_is_left_out(what, tmp_path, monkeypatch):
    """The mode of the file before, and waiting for the disk. A checkpoint's probe and its saving take both."""
    if what == "mode":
        monkeypatch.setattr(os, "chmod", refused(errno.EPERM))
    else:
        monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    check_writable(tmp_path / "model.zip")
    callback = ResumableCheckpointCallback(10, tmp_path / "run")
    model = tiny_qvpo().learn(30, callback=callback)
    for _ in range(2):
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        model.policy.save(tmp_path / "policy")
    assert QVPO.resume(tmp_path / "run", gym.make("Pendulum-v1")).num_timesteps == 30


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_loses_data_is_an_error(number, tmp_path, monkeypatch):
    """A failed synchronisation of that kind means that the file may not be there."""
    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", refused(number))
    with pytest.raises(OSError, match="what was saved there before is intact"), atomic_file(tmp_path / "file") as file:
        file.write(b"after")
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_folder_that_only_admits_the_files_that_are_there(tmp_path, monkeypatch):
    target, open_file = tmp_path / "file", type(tmp_path).open

    def open_existing(self, mode="r", *args, **kwargs):
        if "w" in mode and not self.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return open_file(self, mode, *args, **kwargs)

    target.write_bytes(b"before")
    monkeypatch.setattr(type(tmp_path), "open", open_existing)
    check_writable(target)
    with pytest.warns(UserWarning, match="is written in place"), atomic_file(target) as file:
        file.write(b"after")
    assert target.read_bytes() == b"after"
    with pytest.raises(OSError, match="could not save"), atomic_file(tmp_path / "new") as file:
        file.write(b"after")
    with pytest.raises(OSError, match="could not save"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize("length", [251, 252, 255])
def test_names_as_long_as_they_can_be(length, tmp_path):
    target = tmp_path / ("x" * (length - 4) + ".zip")
    check_writable(target)
    for _ in range(2):
        with atomic_file(target) as file:
            file.write(b"content")
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


def test_checkpoints_go_where_they_were_to_go(tmp_path, monkeypatch):
    """Although the environment changes the working directory."""

    class MovingEnv(CountdownEnv):
        def step(self, action):
            os.chdir(tmp_path / "elsewhere")
            return super().step(action)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callback = ResumableCheckpointCallback(10, "run")
    tiny_qvpo(MovingEnv()).learn(40, callback=callback)
    assert (tmp_path / "run.zip").is_file() and not list((tmp_path / "elsewhere").iterdir())


# Environments


class Unseedable(DummyVecEnv):
    def seed(self, seed=None):
        raise NotImplementedError("this simulator has no seed")


def test_vector_environments_that_cannot_be_seeded(tmp_path):
    """A resumed run goes on with a warning; what promises to be bit for bit refuses them at the start."""
    model = tiny_qvpo(Unseedable([CountdownEnv]), seed=None).learn(
        20, callback=ResumableCheckpointCallback(10, tmp_path / "run")
    )
    resumed = QVPO.resume(tmp_path / "run", Unseedable([CountdownEnv]))
    with pytest.warns(UserWarning, match=r"cannot be seeded \(this simulator has no seed\).* not as the uninterrupted one"):
        resumed.learn(10, reset_num_timesteps=False)
    assert resumed.num_timesteps == 30
    with pytest.raises(ValueError, match="at_episode_end must be False for environments that cannot be seeded, got True"):
        model.learn(20, callback=ResumableCheckpointCallback(10, tmp_path / "other", at_episode_end=True))
    random_state = np.random.get_state()[1].copy()
    assert tiny_qvpo(seed=None).can_seed_environments()
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)


def with_actions(space):
    env = CountdownEnv()
    env.action_space = space
    return env


SPACES = {
    "whole numbers": (spaces.Box(0, 20, (2,), np.int32), r"floating-point numbers, such as Box\(..., dtype=np.float32\)"),
    "no finite width": (spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)), "high - low is finite"),
    "discrete": (spaces.Discrete(3), r"must be a Box \(continuous actions\)"),
    "multi-discrete": (spaces.MultiDiscrete([2, 2]), r"must be a Box \(continuous actions\)"),
}


@pytest.mark.parametrize("kind", SPACES)
def test_action_spaces_that_cannot_be_served(kind):
    """A ``ValueError``, and an ``AssertionError`` as SB3's algorithms raise."""
    space, message = SPACES[kind]
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=message):
            tiny_qvpo(with_actions(space))


def test_huge_observations_are_named():
    class HugeEnv(CountdownEnv):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation * np.float32(1e30), *rest

    with pytest.raises(ValueError, match="rewards or observations of very large size"):
        tiny_qvpo(HugeEnv(), max_grad_norm=None).learn(60)


# Predictions


def test_predictions_of_nothing_and_of_nan():
    model = tiny_qvpo(BanditEnv(action_dim=2))
    for deterministic in (True, False):
        assert model.predict(np.zeros((0, 2), np.float32), deterministic=deterministic)[0].shape == (0, 2)
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match=f"observation must be finite, got {value}"):
                model.predict(np.array([0, value], np.float32), deterministic=deterministic)


class Traceable(nn.Module):
    """SB3's recipe for C++ and ONNX."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy._predict(observation, deterministic=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("n_eval_candidates", [4, 64])
def test_a_traced_policy_decides_as_predict_does(n_eval_candidates, tmp_path):
    """For any number of observations, frozen or not, after predictions or before any."""
    model = tiny_qvpo(n_eval_candidates=n_eval_candidates, policy_kwargs=dict(net_arch=[64, 64]))
    for parameter in model.policy.parameters():
        parameter.data.add_(0.05 * th.randn_like(parameter))
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with th.no_grad():
        traced = th.jit.trace(Traceable(model.policy).eval(), th.zeros(1, 3))
    expected = model.policy.scale_action(model.predict(observations, deterministic=True)[0])
    frozen = th.jit.freeze(traced)
    traced.save(tmp_path / "policy.pt")
    for program in (traced, frozen, th.jit.optimize_for_inference(frozen), th.jit.load(tmp_path / "policy.pt")):
        for n in (1, 5):
            actions = program(th.as_tensor(observations[:n]))
            assert actions.shape == (n, 1)
            np.testing.assert_allclose(actions.detach(), expected[:n], atol=1e-4)


# Parameters


def test_parameters_are_parameters(tmp_path):
    """Evolution strategies replace every entry of a state dict by numbers of its shape."""
    model = tiny_qvpo()
    for load in (model.policy.load_state_dict, lambda random: model.set_parameters({"policy": random}, exact_match=False)):
        random = {name: th.rand_like(value) for name, value in model.policy.state_dict().items()}
        load(random)
        assert same_weights(weights_of(model), random)
    assert {name for name in model.policy.state_dict() if "betas" in name or "normalized" in name} == set()
    model.save(tmp_path / "model")
    model.set_parameters(str(tmp_path / "model"))


@pytest.mark.parametrize("how", ["file", "dictionary"])
def test_weights_of_another_schedule_are_refused(how, tmp_path):
    """By what is saved beside them; the model is as it was."""
    other = tiny_qvpo(policy_kwargs=dict(net_arch=[8, 8], time_embedding_dim=4, noise_schedule="vp"))
    more_steps = tiny_qvpo(n_diffusion_steps=7)
    model = tiny_qvpo(seed=1)
    before = weights_of(model)
    for source, message in ((other, "another noise schedule"), (more_steps, "n_diffusion_steps is 3 in this model")):
        source.save(tmp_path / "source")
        parameters = str(tmp_path / "source.zip") if how == "file" else source.get_parameters()
        with pytest.raises(RuntimeError, match=message):
            model.set_parameters(parameters)
        assert same_weights(before, weights_of(model))


# Counts, the log, messages


def test_every_count_takes_numpys_integers():
    n = np.int64
    model = QVPO(
        "MlpPolicy", "Pendulum-v1", learning_starts=n(5), batch_size=n(8), buffer_size=n(200), n_train_candidates=n(4),
        n_uniform_actions=n(2), n_target_candidates=n(2), n_behavior_candidates=n(3), n_eval_candidates=n(4),
        n_diffusion_steps=n(3), policy_delay=n(2), n_steps=n(2), stats_window_size=n(10), train_freq=n(2), gradient_steps=n(1),
        seed=n(0), policy_kwargs=dict(net_arch=[n(8), n(8)], time_embedding_dim=n(4), n_sampling_steps=n(2), n_critics=n(2)),
        device="cpu",
    )  # fmt: skip
    model.learn(n(20))
    assert model.predict(np.zeros(3, np.float32), deterministic=True)[0].shape == (1,)


class Kept(KVWriter):
    def __init__(self):
        self.dumps = []

    def write(self, key_values, key_excluded, step=0):
        assert key_values.keys() == key_excluded.keys()
        self.dumps.append(dict(key_values))

    def close(self):
        pass


def test_logged_losses_are_means_since_the_last_dump_by_anyone():
    """``EvalCallback`` dumps the log in the middle of an episode."""
    kept, losses = Kept(), []
    model = tiny_qvpo(CountdownEnv(length=10), learning_starts=5)
    add_metrics_through(model, losses.append)
    model.set_logger(Logger(None, [kept]))
    callback = EvalCallback(CountdownEnv(length=2), eval_freq=7, n_eval_episodes=1, verbose=0, warn=False)
    model.learn(40, callback=callback, log_interval=1)
    seen = 0
    for dump in kept.dumps:
        if "train/critic_loss" in dump:
            count = next(
                n for n in range(1, 20) if np.isclose(mean_of(losses[seen:], n), dump["train/critic_loss"], rtol=1e-5)
            )
            seen += 2 * count  # critics, then the policy
    n_dumped = sum("train/critic_loss" in dump for dump in kept.dumps)
    assert n_dumped >= 6 and 60 <= seen <= len(losses)


def mean_of(metrics, n):
    """Mean of the first n critic losses."""
    return np.mean([float(each["critic_loss"].detach()) for each in metrics if "critic_loss" in each][:n])


def test_an_error_before_the_first_step_counts_nothing(tmp_path):
    """Also where RL Zoo continues a run (``-i``) and asks to count from 0: the counts are those of this ``learn()``."""
    ZooQVPO("MlpPolicy", CountdownEnv(), **{"learning_starts": 5, "batch_size": 8, "buffer_size": 100}).learn(20).save(
        tmp_path / "model"
    )

    class DeadEnv(CountdownEnv):
        def reset(self, **kwargs):
            if getattr(self, "is_dead", False):
                raise RuntimeError("no licence")
            return super().reset(**kwargs)

    env = DeadEnv()
    model = ZooQVPO.load(tmp_path / "model", env=env)
    env.is_dead = True
    with pytest.raises(RuntimeError, match="no licence") as caught:
        model.learn(20)
    assert not getattr(caught.value, "__notes__", [])
    env = CrashingEnv()
    env.error = RuntimeError("simulator crashed")
    model = ZooQVPO.load(tmp_path / "model", env=env)
    with pytest.raises(RuntimeError, match="simulator crashed") as caught:
        model.learn(40)
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__[0].startswith("Training stopped after 14 environment steps (34 in all).")


def test_no_warning_of_writing_in_place_where_renaming_works(tmp_path):
    with recorded_warnings() as caught:
        tiny_qvpo().save(tmp_path / "model")
        check_writable(tmp_path / "model.zip")
    assert not caught and files.CANNOT_RENAME
