"""
A whole training run in one file, and back: the model, its replay buffer, the normalisation, the random states. Two more
functions put replay buffer and normalisation in order when an episode is interrupted.

The file is a zip archive:

=======================  =============================================================================================
``model.zip``            what ``model.save()`` writes: weights, optimisers, settings, counters, position in schedules
``replay_buffer.pkl``    what ``model.save_replay_buffer()`` writes
``vec_normalize.pkl``    what ``VecNormalize.save()`` writes, if the environment is normalised
``run.pkl``              random states, number of environments, the step at which a warm-up ends
=======================  =============================================================================================
"""

import errno
import io
import pickle
import random
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_qvpo.common.runs.files import atomic_file

RandomStates = dict[str, Any]
"""States of the random generators, by library."""

NormalizerState = list[tuple[RunningMeanStd, dict[str, np.ndarray | float]]]
"""Running statistics and what they held at some time."""


def get_random_states(action_space: spaces.Space[Any]) -> RandomStates:
    """
    The states of all random generators that training draws from: Python's, NumPy's, torch's, and those of CUDA devices. The
    action space has one too, which draws the actions of the warm-up.
    """
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "action_space": action_space.np_random.bit_generator.state,
    }
    if th.cuda.is_available():
        states["cuda"] = th.cuda.get_rng_state_all()
    return states


def set_random_states(states: RandomStates, action_space: spaces.Space[Any]) -> None:
    """Put random generators back. States of CUDA devices are left out if the number of devices has changed."""
    action_space.np_random.bit_generator.state = states["action_space"]
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if "cuda" in states and th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(states["cuda"])


def checkpoint_path(path: str | Path) -> Path:
    """
    Where a checkpoint is, or is to be: the path, with ``.zip`` if it has no suffix.

    :raises IsADirectoryError: If there is a folder.
    """
    path = Path(path)
    if path.suffix == "" and path.name:
        path = path.with_name(f"{path.name}.zip")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the path of a checkpoint must not be a folder", str(path))
    return path


def write_checkpoint(model: OffPolicyAlgorithm, path: str | Path, run: dict[str, Any]) -> None:
    """
    Save a whole training run: the model, and in ``run`` what belongs to the run rather than to the model. A kill or a full
    disk in the middle leaves the previous checkpoint as it was.

    :raises OSError: If writing fails.
    """
    model_file = io.BytesIO()
    model.save(model_file)
    vec_normalize = model.get_vec_normalize_env()
    run = {"n_envs": model.n_envs, **run}
    with atomic_file(checkpoint_path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.zip", model_file.getbuffer())
        for name, content in (("run", run), ("vec_normalize", vec_normalize), ("replay_buffer", model.replay_buffer)):
            with archive.open(f"{name}.pkl", "w", force_zip64=True) as member:
                pickle.dump(content, member, protocol=pickle.HIGHEST_PROTOCOL)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """
    Open a checkpoint for reading. ``.zip`` is added to the path if there is no such file.

    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is not a checkpoint.
    """
    given, path = path, Path(path)
    if not path.is_file():
        path = checkpoint_path(path)
    expected = "path must be a checkpoint of a training run, written by save_checkpoint() or its callback"
    if not path.is_file():
        raise FileNotFoundError(f"{expected}, got {str(given)!r}: there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "run.pkl" not in names:
                is_model = {"data", "policy.pth"} <= set(names)
                reason = "a saved model without its run: use load()" if is_model else "damaged, or some other archive"
                raise ValueError(f"{expected}, got {str(path)!r}, which is {reason}")
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(f"{expected}, got {str(path)!r}, which is damaged, incomplete or no zip file ({error})") from error


def saved_model(archive: zipfile.ZipFile) -> io.BytesIO:
    """The model in an open checkpoint, as ``model.save()`` wrote it."""
    return io.BytesIO(archive.read("model.zip"))


def is_checkpoint(path: Any) -> bool:
    """Whether a path leads to a checkpoint of a training run, rather than to a saved model. Anything but a path does not."""
    if not isinstance(path, str | Path):
        return False
    try:
        with open_checkpoint(path):
            return True
    except (OSError, ValueError):
        return False


def unpickle(archive: zipfile.ZipFile, name: str) -> Any:
    """Read one of the pickles of a checkpoint, by its name without suffix."""
    with archive.open(f"{name}.pkl") as member:
        return pickle.load(member)


# fmt: off
NORMALIZATION_SETTINGS = (
    "training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys",
)
# fmt: on
"""What the user chooses of a ``VecNormalize``."""


def restore_environment(archive: zipfile.ZipFile, env: GymEnv | str) -> VecEnv:
    """
    Give an environment the saved normalisation. Its own ``VecNormalize`` gets the statistics. Without one, the environment is
    wrapped in the saved one, and vectorised if necessary.

    :raises ValueError: If it is no environment, or has other spaces or another number of environments than the saved run. Also
        if it is normalised and the saved run was not.
    """
    if isinstance(env, str):
        env = gym.make(env)
    if not isinstance(env, gym.Env | VecEnv):
        raise ValueError(f"env must be an environment or the name of one, got {env!r}")
    if not isinstance(env, VecEnv):
        monitored_env = env if is_wrapped(env, Monitor) else Monitor(env)
        env = DummyVecEnv([lambda: monitored_env])
    run, saved = unpickle(archive, "run"), unpickle(archive, "vec_normalize")
    if env.num_envs != run["n_envs"]:
        raise ValueError(f"env must be {run['n_envs']} environment(s) like the saved run, got {env.num_envs}")
    own = unwrap_vec_normalize(env)
    if saved is None:
        if own is not None:
            raise ValueError("env must not be normalised, because the saved run's was not, got a VecNormalize")
        return env
    if own is None:
        try:
            saved.set_venv(env)
        except AssertionError as error:
            raise ValueError(f"env must have the spaces of the saved run: {error}") from error
        return cast(VecNormalize, saved)
    changed = {name: getattr(own, name) for name in NORMALIZATION_SETTINGS if getattr(own, name) != getattr(saved, name)}
    if {"norm_obs", "norm_obs_keys"} & changed.keys():
        raise ValueError(f"env must normalise the same observations as in the saved run, got {changed}")
    if changed:
        warnings.warn(f"env is normalised with other settings than in the saved run: {changed}", stacklevel=3)
    # Without normalised observations there is no obs_rms
    for name in {"obs_rms", "ret_rms"} & vars(saved).keys():
        setattr(own, name, getattr(saved, name))
    return env


def cut_last_episode(replay_buffer: ReplayBuffer) -> None:
    """
    Mark the last stored transition of each environment as cut off, unless its episode is over. The next transition to be
    stored starts from a reset.

    Plain buffers keep both ends of each transition and would not mind. But n-step returns would run on into the next episode,
    and hindsight would take its goals from there. The memory-saving buffer looks for the next observation in the following
    row, and would find the wrong one.
    """
    if isinstance(replay_buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The last trajectory in the replay buffer will be truncated")
            replay_buffer.truncate_last_trajectory()
    elif _has_sb3_arrays(replay_buffer) and replay_buffer.size() > 0:
        last = (replay_buffer.pos - 1) % replay_buffer.buffer_size
        if replay_buffer.optimize_memory_usage:
            # As SB3 does: this buffer cannot tell a cut from an end
            replay_buffer.dones[last] = True
        else:
            # A time limit, from which the value is bootstrapped
            replay_buffer.timeouts[last] = np.where(replay_buffer.dones[last], replay_buffer.timeouts[last], True)


def _has_sb3_arrays(replay_buffer: ReplayBuffer) -> bool:
    """Whether a buffer stores its rows as SB3's do. One of the user's may keep them anywhere."""
    arrays = [vars(replay_buffer).get(name) for name in ("dones", "timeouts")]
    return all(isinstance(array, np.ndarray) for array in arrays) and isinstance(vars(replay_buffer).get("pos"), int)


def normalization_statistics(vec_normalize: VecNormalize | None) -> NormalizerState:
    """
    The running statistics of a ``VecNormalize``, to be put back by :func:`restore_statistics`; nothing for None. SB3 replaces
    the arrays when it updates them, so none is copied.
    """
    if vec_normalize is None:
        return []
    # Without normalised observations there is no obs_rms
    obs_rms = vars(vec_normalize).get("obs_rms", {})
    parts = [*(obs_rms.values() if isinstance(obs_rms, dict) else [obs_rms]), vec_normalize.ret_rms]
    return [(part, dict(vars(part))) for part in parts]


def restore_statistics(statistics: NormalizerState) -> None:
    """Put back the running statistics that :func:`normalization_statistics` returned."""
    for part, values in statistics:
        vars(part).update(values)
