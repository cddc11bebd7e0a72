"""
A whole training run in one file, and back: the model, its replay buffer, the normalisation, the random states.

The file is a zip archive:

=======================  =============================================================================================
``model.zip``            what ``model.save()`` writes: weights, optimisers, settings, counters, position in schedules
``replay_buffer.pkl``    what ``model.save_replay_buffer()`` writes
``vec_normalize.pkl``    what ``VecNormalize.save()`` writes, if the environment is normalised
``run.pkl``              random states; running returns of ``VecNormalize``; number of environments
=======================  =============================================================================================
"""

import io
import pickle
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_qvpo.common.safe_files import atomic_file

RandomStates = dict[str, Any]
"""States of the random generators, by library."""


def get_random_states(action_space: spaces.Space[Any]) -> RandomStates:
    """
    The states of all random generators that training draws from.

    :param action_space: The model's action space, which draws the actions of the warm-up.
    :return: States of Python's, NumPy's, torch's and the space's generators, those of CUDA devices included.
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
    """
    Put random generators back. States of CUDA devices are left out where the number of devices is another.

    :param states: What :func:`get_random_states` returned.
    :param action_space: The model's action space.
    """
    action_space.np_random.bit_generator.state = states["action_space"]
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if "cuda" in states and th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(states["cuda"])


def write_checkpoint(model: OffPolicyAlgorithm, path: str | Path) -> None:
    """
    Save a whole training run. A kill or a full disk in the middle leaves the previous checkpoint as it was.

    :param model: The model.
    :param path: Path of the file; ``.zip`` is added if it has no suffix.
    :raises OSError: If writing fails.
    """
    model_file = io.BytesIO()
    model.save(model_file)
    vec_normalize = model.get_vec_normalize_env()
    run = {
        "n_envs": model.n_envs,
        "random_states": get_random_states(model.action_space),
        # VecNormalize leaves them out of its own pickle
        "normalization_returns": None if vec_normalize is None else vec_normalize.returns,
    }
    with atomic_file(path, "zip") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.zip", model_file.getbuffer())
        for name, content in (("run", run), ("vec_normalize", vec_normalize), ("replay_buffer", model.replay_buffer)):
            with archive.open(f"{name}.pkl", "w", force_zip64=True) as member:
                pickle.dump(content, member, protocol=pickle.HIGHEST_PROTOCOL)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """
    Open a checkpoint for reading.

    :param path: Path of the file; ``.zip`` is added if there is no such file.
    :raises FileNotFoundError: If there is no such file.
    :raises ValueError: If it is not a checkpoint.
    """
    path = Path(path)
    if not path.exists() and path.suffix == "":
        path = path.with_name(f"{path.name}.zip")
    expected = "path must be a checkpoint of a training run, written by save_checkpoint() or its callback"
    if path.exists() and not zipfile.is_zipfile(path):
        raise ValueError(f"{expected}, got {path}, which is not a zip file")
    with zipfile.ZipFile(path) as archive:
        if "run.pkl" not in archive.namelist():
            raise ValueError(f"{expected}, got {path}: load a saved model with load()")
        yield archive


def unpickle(archive: zipfile.ZipFile, name: str) -> Any:
    """
    Read one of the pickles of a checkpoint.

    :param archive: The checkpoint.
    :param name: Name of the pickle, without its suffix.
    :return: What was pickled.
    """
    with archive.open(f"{name}.pkl") as member:
        return pickle.load(member)


def restore_environment(archive: zipfile.ZipFile, env: GymEnv) -> VecEnv:
    """
    Give an environment the saved normalisation: its own ``VecNormalize`` gets the statistics, or it is wrapped in one.

    :param archive: The checkpoint.
    :param env: The environment to continue in.
    :return: The environment, vectorised and normalised if necessary.
    :raises ValueError: If the number of environments is another than in the saved run, or it is normalised where the saved
        run was not.
    """
    if not isinstance(env, VecEnv):
        monitored_env = env if is_wrapped(env, Monitor) else Monitor(env)
        env = DummyVecEnv([lambda: monitored_env])
    run, saved = unpickle(archive, "run"), unpickle(archive, "vec_normalize")
    if env.num_envs != run["n_envs"]:
        raise ValueError(f"env must have {run['n_envs']} environments like the saved run, got {env.num_envs}")
    own = unwrap_vec_normalize(env)
    if saved is None:
        if own is not None:
            raise ValueError("env must not be normalised, because the saved run's was not, got a VecNormalize")
        return env
    if own is None:
        saved.set_venv(env)
        saved.returns = run["normalization_returns"]
        return cast(VecNormalize, saved)
    # Without normalised observations there is no obs_rms
    for name in {"obs_rms", "ret_rms"} & vars(saved).keys():
        setattr(own, name, getattr(saved, name))
    own.returns = run["normalization_returns"]
    return env
