"""
The algorithms in RL Zoo (rl_zoo3): registration, default settings, the search space for Optuna. Only this module
knows rl_zoo3. Another algorithm is another row of :data:`ALGORITHMS`.

After installation nothing needs to be called: ``sb3_qvpo_autoload`` calls :func:`register_loaded` when rl_zoo3 is imported.
Explicitly: :func:`register`, or ``python -m sb3_qvpo.zoo train --algo qvpo ...`` instead of ``python -m rl_zoo3.train ...``.
"""

import functools
import importlib
import inspect
import math
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger

from sb3_qvpo import presets
from sb3_qvpo.common.off_policy_algorithm import DiffusionOffPolicyAlgorithm
from sb3_qvpo.common.runs.checkpoints import is_checkpoint
from sb3_qvpo.qvpo import QVPO
from sb3_qvpo.sdac import SDAC

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
    """

    _resumed = False

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
        return [*super()._excluded_save_params(), "_resumed"]

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


# The search space of QVPO. Costly settings share one budget, and tuning decides how to spend it. An update makes
# batch_size * n_diffusion_steps * n_train_candidates = 5 * 2**draws_pow network passes, half as many with the wider network.

WIDTHS = {"small": [128, 128], "medium": [256, 256]}
"""Hidden layers, of which a search chooses."""
DRAWS_POW = (12, 13)
"""Range of the exponent of the drawing budget 5 * 2**draws_pow: from 20 480 to 40 960 passes; the paper's is 327 680."""


def _max_draws_pow() -> int:
    """The upper end of the budget, raised by the environment variable SB3_QVPO_SEARCH_COST (a factor of at least 1)."""
    value = os.environ.get("SB3_QVPO_SEARCH_COST", "1")
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not 1 <= factor < math.inf:
        raise ValueError(f"The environment variable SB3_QVPO_SEARCH_COST must be a factor of at least 1, got {value!r}")
    return DRAWS_POW[1] + round(math.log2(factor))


def _with_sampled_her(trial: "optuna.Trial", sampled: dict[str, Any], additional_args: dict[str, Any]) -> dict[str, Any]:
    """What has been sampled, and hindsight's arguments where the replay buffer is HER's."""
    if not additional_args["using_her_replay_buffer"]:
        return sampled
    from rl_zoo3.hyperparams_opt import sample_her_params

    return sample_her_params(trial, sampled, additional_args["her_kwargs"])


def _gather_her(params: dict[str, Any]) -> dict[str, Any]:
    """Hindsight's arguments, which a trial's parameters name one by one, as those of the replay buffer."""
    her_kwargs = {name: params.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in params}
    return {**params, "replay_buffer_kwargs": her_kwargs} if her_kwargs else params


def sample_qvpo_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler of QVPO's hyperparameters, in RL Zoo's manner.

    Half of the trials are around the paper's settings, half around ``presets.fast``. A trial of the first half costs at most
    about four times the cheapest one. The environment variable ``SB3_QVPO_SEARCH_COST`` widens the range: with 16 it reaches
    the paper's settings. A trial of the second half costs at most about as much as the dearest of the first.

    :param trial: Optuna's trial.
    :param n_actions: Action dimensions (not used).
    :param n_envs: Number of environments (not used).
    :param additional_args: RL Zoo's further information: whether the replay buffer is HER's, and its arguments.
    :return: Keyword arguments for QVPO.
    """
    sampled: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "qf_learning_rate": trial.suggest_float("qf_learning_rate", 1e-5, 0.002, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 10),
        "ent_coef": trial.suggest_float("ent_coef", 0.001, 0.3, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
        # 1, 2, 4 or 8
        "n_behavior_candidates_pow": trial.suggest_int("n_behavior_candidates_pow", 0, 3),
        "around": trial.suggest_categorical("around", ["paper", "presets.fast"]),
    }
    sampled |= _sample_around_paper(trial) if sampled["around"] == "paper" else _sample_around_fast(trial)
    converted = convert_qvpo_params(_with_sampled_her(trial, sampled, additional_args))
    # Display true values
    candidate_counts = ("n_behavior_candidates", "n_target_candidates", "n_train_candidates")
    for name in ("gamma", "batch_size", "n_diffusion_steps", *candidate_counts):
        if name in converted:
            trial.set_user_attr(name, converted[name])
    return converted


def _sample_around_paper(trial: "optuna.Trial") -> dict[str, Any]:
    return {
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "q_weighting": trial.suggest_categorical("q_weighting", ["qadv", "qcut"]),
        "noise_schedule": trial.suggest_categorical("noise_schedule", ["cosine", "vp", "linear"]),
        "n_uniform_actions": trial.suggest_int("n_uniform_actions", 4, 10),
        # K_t is at most K_b: the paper found that a larger K_t overestimates (Sec. 4.4)
        "target_candidates_shift": trial.suggest_int("target_candidates_shift", 0, 3),
        # How the drawing budget is spent: 128 or 256 states, 5, 10 or 20 steps, the rest on candidates
        "batch_size_pow": trial.suggest_int("batch_size_pow", 7, 8),
        "diffusion_steps_pow": trial.suggest_int("diffusion_steps_pow", 0, 2),
        "draws_pow": trial.suggest_int("draws_pow", DRAWS_POW[0], _max_draws_pow()),
    }


def _sample_around_fast(trial: "optuna.Trial") -> dict[str, Any]:
    return {
        "critic_type": trial.suggest_categorical("critic_type", ["twin", "crossq", "quantile"]),
        "policy_delay": trial.suggest_int("policy_delay", 1, 3),
        "n_improvement_steps": trial.suggest_int("n_improvement_steps", 0, 3),
        "improvement_step": trial.suggest_float("improvement_step", 0.05, 0.5, log=True),
        "n_train_candidates_pow": trial.suggest_int("n_train_candidates_pow", 1, 3),
        "n_target_candidates_pow": trial.suggest_int("n_target_candidates_pow", 0, 2),
    }


def convert_qvpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into keyword arguments for QVPO.

    :param sampled_params: What :func:`sample_qvpo_params` sampled, or the parameters of a trial of a study. Studies of version
        0.1 are all around the paper's settings.
    :return: Keyword arguments for QVPO.
    """
    params = sampled_params.copy()
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["gradient_steps"] = params["train_freq"]  # one update for each step
    params["n_behavior_candidates"] = 2 ** params.pop("n_behavior_candidates_pow")
    convert = _convert_around_paper if params.pop("around", "paper") == "paper" else _convert_around_fast
    return _gather_her(convert(params, params.pop("net_arch")))


def _convert_around_paper(params: dict[str, Any], net_arch: str) -> dict[str, Any]:
    batch_size_pow, steps_pow = params.pop("batch_size_pow"), params.pop("diffusion_steps_pow")
    params["batch_size"] = 2**batch_size_pow
    params["n_diffusion_steps"] = 5 * 2**steps_pow
    # A pass through the wider network costs two to three times as much: it gets half the draws
    params["n_train_candidates"] = 2 ** (params.pop("draws_pow") - batch_size_pow - steps_pow - (net_arch == "medium"))
    # At most a quarter of N_d: more would cost as much as the budget allows for the policy step
    n_target_candidates = params["n_behavior_candidates"] >> params.pop("target_candidates_shift")
    params["n_target_candidates"] = max(1, min(n_target_candidates, params["n_train_candidates"] // 4))
    params["policy_kwargs"] = dict(net_arch=WIDTHS[net_arch], noise_schedule=params.pop("noise_schedule"))
    return params


def _convert_around_fast(params: dict[str, Any], net_arch: str) -> dict[str, Any]:
    for name in ("n_train_candidates", "n_target_candidates"):
        params[name] = 2 ** params.pop(f"{name}_pow")
    kept = ("q_weighting", "n_uniform_actions")
    own = dict(net_arch=WIDTHS[net_arch], optimizer_kwargs=_betas_for(params["critic_type"]))
    return {
        **{name: presets.fast[name] for name in kept},
        **params,
        "policy_kwargs": {**presets.fast["policy_kwargs"], **own},
    }


def _betas_for(critic_type: str) -> dict[str, tuple[float, float]]:
    """Adam's, which batch normalisation wants shorter."""
    return dict(betas=(0.5, 0.999) if critic_type == "crossq" else (0.9, 0.999))


def sample_sdac_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler of SDAC's hyperparameters, in RL Zoo's manner, around ``presets.sdac``. A trial costs at most about five times the
    cheapest one.

    :param trial: Optuna's trial.
    :param n_actions: Action dimensions (not used).
    :param n_envs: Number of environments (not used).
    :param additional_args: RL Zoo's further information: whether the replay buffer is HER's, and its arguments.
    :return: Keyword arguments for SDAC.
    """
    sampled: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.003, log=True),
        "qf_learning_rate": trial.suggest_float("qf_learning_rate", 1e-4, 0.003, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 10),
        "temperature": trial.suggest_float("temperature", 0.02, 2.0, log=True),
        "critic_type": trial.suggest_categorical("critic_type", ["twin", "crossq"]),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
        "n_reverse_samples_pow": trial.suggest_int("n_reverse_samples_pow", 3, 4),
        "n_target_candidates_pow": trial.suggest_int("n_target_candidates_pow", 0, 2),
    }
    converted = convert_sdac_params(_with_sampled_her(trial, sampled, additional_args))
    for name in ("gamma", "n_reverse_samples", "n_target_candidates"):  # display true values
        trial.set_user_attr(name, converted[name])
    return converted


def convert_sdac_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into keyword arguments for SDAC.

    :param sampled_params: What :func:`sample_sdac_params` sampled, or the parameters of a trial of a study.
    :return: Keyword arguments for SDAC.
    """
    params = {
        "q_scaling": "spread",
        "proposal_actions": "replay",
        "n_behavior_candidates": 4,
        "policy_delay": 2,
        **sampled_params,
    }
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["gradient_steps"] = params["train_freq"]  # one update for each step
    for name in ("n_reverse_samples", "n_target_candidates"):
        params[name] = 2 ** params.pop(f"{name}_pow")
    own = dict(net_arch=WIDTHS[params.pop("net_arch")], optimizer_kwargs=_betas_for(params["critic_type"]))
    params["policy_kwargs"] = {**presets.sdac["policy_kwargs"], **own}
    return _gather_her(params)


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
