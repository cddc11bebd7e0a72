"""
The algorithms in RL Zoo (rl_zoo3): registration, default settings, learning from data. Only this module and the search spaces
know rl_zoo3. Another algorithm is another row of :data:`ALGORITHMS`.

After installation nothing needs to be called: ``sb3_qvpo_autoload`` calls :func:`register_loaded` when rl_zoo3 is imported.
Explicitly: :func:`register`, or ``python -m sb3_qvpo.zoo train --algo qvpo ...`` instead of ``python -m rl_zoo3.train ...``.
"""

import functools
import importlib
import inspect
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger

from sb3_qvpo.common.off_policy_algorithm import DiffusionOffPolicyAlgorithm
from sb3_qvpo.common.runs.checkpoints import is_checkpoint
from sb3_qvpo.diffusion_ql import DiffusionQL
from sb3_qvpo.dtql import DTQL
from sb3_qvpo.offline import fill_replay_buffer
from sb3_qvpo.qvpo import QVPO
from sb3_qvpo.sdac import SDAC
from sb3_qvpo.search_spaces import (
    convert_diffusion_ql_params,
    convert_dtql_params,
    convert_qvpo_params,
    convert_sdac_params,
    sample_diffusion_ql_params,
    sample_dtql_params,
    sample_qvpo_params,
    sample_sdac_params,
)

if TYPE_CHECKING:
    import optuna

SCRIPTS = ("train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub", "cli")
"""RL Zoo's scripts that ``python -m sb3_qvpo.zoo`` can run."""

SelfInZoo = TypeVar("SelfInZoo", bound="InZoo")


class InZoo(DiffusionOffPolicyAlgorithm):
    """
    What an algorithm needs to be one of RL Zoo's. RL Zoo keeps lists of the algorithms it knows, and ours are not in them.

    A model loaded to play gets a replay buffer of one transition, as RL Zoo arranges for SAC. A model loaded to continue
    (``-i``) goes on counting steps, so that its schedules do not start again. If the file is a checkpoint of a whole run, that
    run is resumed.

    With ``dataset``, training is from data alone: :meth:`learn` makes as many updates as RL Zoo asks for steps.

    :param args: Positional arguments of the algorithm.
    :param dataset: What :func:`~sb3_qvpo.offline.fill_replay_buffer` takes, a name or a path for instance. It is not saved:
        continued without it, a model goes on in its environment.
    :param reward_transform: A function of rewards, or its source, such as ``"lambda r: 4 * (r - 0.5)"``.
    :param kwargs: Keyword arguments of the algorithm.
    """

    _resumed = False
    dataset: Any = None
    reward_transform: str | Callable[[np.ndarray], np.ndarray] | None = None

    def __init__(
        self,
        *args: Any,
        dataset: Any = None,
        reward_transform: str | Callable[[np.ndarray], np.ndarray] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.dataset, self.reward_transform = dataset, reward_transform

    @classmethod
    def load(cls: type[SelfInZoo], path: Any, *args: Any, **kwargs: Any) -> SelfInZoo:
        """
        Load a model, or resume a run to train on.

        :param path: Path of the file: a model or a checkpoint.
        :param args: Further positional arguments of the algorithm's ``load``.
        :param kwargs: Its keyword arguments. RL Zoo passes ``custom_objects`` to play and not to train, which tells both
            apart. To train it passes all settings of the task. The sizes of the policy, T among them, stay the model's.
        :return: The model.
        """
        if "custom_objects" in kwargs:
            return super().load(path, *args, **{"buffer_size": 1, "optimize_memory_usage": False, **kwargs})
        asked_for = {name: kwargs.pop(name) for name in ("n_diffusion_steps", "critic_type") if name in kwargs}
        if is_checkpoint(path):
            model = cls.resume(path, *args, **kwargs)
            model._resumed = True
        else:
            model = super().load(path, *args, **kwargs)
        for name, value in asked_for.items():
            saved = getattr(model, name)
            if value != saved:
                warnings.warn(f"{name} stays {saved}, as in the saved model; {value} was asked for", stacklevel=2)
        return model

    def learn(self: SelfInZoo, total_timesteps: float, *args: Any, **kwargs: Any) -> SelfInZoo:
        """
        Train the model, from ``dataset`` if there is one.

        :param total_timesteps: Number of environment steps, or of updates.
        :param args: Further positional arguments of the algorithm's ``learn``.
        :param kwargs: Its keyword arguments.
        :return: The trained model.
        :raises ValueError: If the dataset is refused.
        """
        if self.dataset is None:
            return super().learn(total_timesteps, *args, **kwargs)
        transform = self.reward_transform
        if isinstance(transform, str):
            transform = eval(transform, {"np": np})  # RL Zoo's way of writing functions in its settings
        fill_replay_buffer(self, self.dataset, reward_transform=transform)
        # Once: who calls it again goes on in the environment
        self.dataset = None
        return self.learn_offline(None, int(total_timesteps), *args, **kwargs)

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, unless a run has just been resumed. RL Zoo loads any ``replay_buffer.pkl`` beside the file, but a
        checkpoint has a buffer of its own.

        :param path: Path of the buffer's file, or an open file.
        :param truncate_last_traj: As in SB3.
        """
        if self._resumed:
            warnings.warn(f"{path} is not loaded: the checkpoint has its own replay buffer", stacklevel=2)
        else:
            super().load_replay_buffer(path, truncate_last_traj)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_resumed", "dataset", "reward_transform"]

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        # RL Zoo always asks to start from 0; a model that has been trained before goes on counting
        reset_num_timesteps = reset_num_timesteps and self.num_timesteps == 0
        own_logger = self._custom_logger
        if not reset_num_timesteps and not own_logger:
            # A folder of its own for TensorBoard: SB3 would write into the latest one, which may be another run's
            self.set_logger(configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps=True))
        try:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        finally:
            self._custom_logger = own_logger


def in_zoo(algorithm: type[DiffusionOffPolicyAlgorithm]) -> type[DiffusionOffPolicyAlgorithm]:
    """
    An algorithm as RL Zoo gets it.

    :param algorithm: The algorithm.
    :return: A subclass of it and of :class:`InZoo`, under the same name, which RL Zoo writes into model cards.
    """
    # Pickles look for it by its qualified name in this module
    names = {"__module__": __name__, "__qualname__": f"Zoo{algorithm.__name__}", "__doc__": algorithm.__doc__}
    return type(algorithm.__name__, (InZoo, algorithm), names)


ZooQVPO = in_zoo(QVPO)
ZooSDAC = in_zoo(SDAC)
ZooDiffusionQL = in_zoo(DiffusionQL)
ZooDTQL = in_zoo(DTQL)


def hyperparams_folder() -> Path:
    """
    Where the settings lie: for each algorithm ``NAME.yml``, its defaults, and others such as ``qvpo_official.yml``.

    :return: The folder: in the package when installed from a wheel, at the root of the repository in a checkout.
    """
    package = Path(__file__).parent
    in_wheel = package / "hyperparams"
    return in_wheel if in_wheel.is_dir() else package.parent / "hyperparams"


def register() -> None:
    """
    Add the algorithms to RL Zoo: classes, Optuna samplers and converters, default settings. May be called any number of times.

    :raises ImportError: If rl_zoo3 is not installed.
    """
    importlib.import_module("rl_zoo3.exp_manager")  # which imports the modules of all tables
    register_loaded()


def register_loaded() -> None:
    """Add the algorithms to those tables of RL Zoo whose modules have been imported. Imports nothing of RL Zoo itself."""
    tables: list[tuple[str, str, dict[str, Any]]] = [
        ("rl_zoo3", "ALGOS", {name: row.algorithm for name, row in ALGORITHMS.items()}),
        ("rl_zoo3.hyperparams_opt", "HYPERPARAMS_SAMPLER", {name: row.sample for name, row in ALGORITHMS.items()}),
        ("rl_zoo3.hyperparams_opt", "HYPERPARAMS_CONVERTER", {name: row.convert for name, row in ALGORITHMS.items()}),
    ]
    for module_name, table_name, entries in tables:
        # In place: RL Zoo's other modules hold the same dictionaries
        getattr(sys.modules.get(module_name), table_name, {}).update(entries)
    experiment_manager = getattr(sys.modules.get("rl_zoo3.exp_manager"), "ExperimentManager", None)
    if experiment_manager is not None:
        _patch_experiment_manager(experiment_manager)


class _TrialNumber(int):
    """A trial number that is true even if it is 0: RL Zoo tests ``if trial_id`` and so would ignore ``--trial-id 0``."""

    def __bool__(self) -> bool:
        return True


def _patch_experiment_manager(experiment_manager: Any) -> None:
    """Let RL Zoo find our default settings and trial 0. Other algorithms are left alone."""
    original = experiment_manager.__init__
    if hasattr(original, "_knows_sb3_qvpo"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.algo in ALGORITHMS:
            if not signature.bind(self, *args, **kwargs).arguments.get("config"):
                self.config = str(hyperparams_folder() / f"{self.algo}.yml")
            if self.trial_id is not None:
                self.trial_id = _TrialNumber(self.trial_id)

    __init__._knows_sb3_qvpo = True  # type: ignore[attr-defined]  # a mark against patching twice
    experiment_manager.__init__ = __init__


class ZooRow(NamedTuple):
    """
    What RL Zoo needs to know of an algorithm. Its default settings are in ``hyperparams/NAME.yml``.

    :param algorithm: The class, from :func:`in_zoo`.
    :param sample: From Optuna's trial to keyword arguments, see :func:`sample_qvpo_params`.
    :param convert: From a trial's parameters to keyword arguments, see :func:`convert_qvpo_params`.
    """

    algorithm: type[DiffusionOffPolicyAlgorithm]
    sample: Callable[["optuna.Trial", int, int, dict[str, Any]], dict[str, Any]]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


ALGORITHMS = {
    "qvpo": ZooRow(ZooQVPO, sample_qvpo_params, convert_qvpo_params),
    "sdac": ZooRow(ZooSDAC, sample_sdac_params, convert_sdac_params),
    "diffusion_ql": ZooRow(ZooDiffusionQL, sample_diffusion_ql_params, convert_diffusion_ql_params),
    "dtql": ZooRow(ZooDTQL, sample_dtql_params, convert_dtql_params),
}
"""The registry: the name in ``--algo``, and its row."""


def main() -> None:
    """
    Run one of RL Zoo's scripts with our algorithms registered: ``python -m sb3_qvpo.zoo train --algo qvpo ...``. Or print the
    folder of the settings: ``python -m sb3_qvpo.zoo hyperparams``.
    """
    usage = f"usage: python -m sb3_qvpo.zoo {{{','.join(SCRIPTS)}}} ... | hyperparams"
    if len(sys.argv) < 2 or sys.argv[1] not in (*SCRIPTS, "hyperparams"):
        sys.exit(usage)
    if sys.argv[1] == "hyperparams":
        print(hyperparams_folder())
        return
    register()
    os.environ["SB3_QVPO_ZOO"] = "1"  # some scripts start others in processes of their own
    script = sys.argv.pop(1)
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
