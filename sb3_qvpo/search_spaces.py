"""
What Optuna may try, algorithm by algorithm, in RL Zoo's manner: a function samples, another one turns what was sampled into
keyword arguments, also when they come from a finished study.
"""

import math
import os
from typing import TYPE_CHECKING, Any

from sb3_qvpo import presets

if TYPE_CHECKING:
    import optuna

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
        # From 1 to 16
        "n_behavior_candidates_pow": trial.suggest_int("n_behavior_candidates_pow", 0, 4),
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
        "training_action_noise": trial.suggest_float("training_action_noise", 0.0, 0.3),
        "training_action_noise_falls": trial.suggest_categorical("training_action_noise_falls", [False, True]),
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
    # Studies from before it was sampled have none
    if params.pop("training_action_noise_falls", False):
        std = params["training_action_noise"]
        params["training_action_noise"] = f"lin_{std}_{std / 4}_0.3"
    own = dict(net_arch=WIDTHS[net_arch], optimizer_kwargs=_betas_for(params["critic_type"]))
    return {**_kept_from(presets.fast), **params, "policy_kwargs": {**presets.fast["policy_kwargs"], **own}}


def _kept_from(preset: presets.Preset) -> dict[str, Any]:
    """
    What a trial takes from a preset where the search does not choose. The warm-up and the length of returns are left to the
    settings file: they depend on the task, and observations that are dictionaries have returns of one step only.
    """
    return {name: value for name, value in preset.items() if name not in ("learning_starts", "n_steps")}


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
        "n_improvement_steps": trial.suggest_int("n_improvement_steps", 0, 2),
        "training_action_noise": trial.suggest_float("training_action_noise", 0.0, 0.3),
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
    # A trial that does not name them is from before there were any
    params = {**_kept_from(presets.sdac), "n_improvement_steps": 0, **sampled_params}
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["gradient_steps"] = params["train_freq"]  # one update for each step
    for name in ("n_reverse_samples", "n_target_candidates"):
        params[name] = 2 ** params.pop(f"{name}_pow")
    own = dict(net_arch=WIDTHS[params.pop("net_arch")], optimizer_kwargs=_betas_for(params["critic_type"]))
    params["policy_kwargs"] = {**presets.sdac["policy_kwargs"], **own}
    return _gather_her(params)


def sample_diffusion_ql_params(
    trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler of Diffusion-QL's hyperparameters, in RL Zoo's manner, around the paper's rows for its tasks. A trial costs at most
    about six times the cheapest one.

    :param trial: Optuna's trial.
    :param n_actions: Action dimensions (not used).
    :param n_envs: Number of environments (not used).
    :param additional_args: RL Zoo's further information: whether the replay buffer is HER's, and its arguments.
    :return: Keyword arguments for Diffusion-QL.
    """
    sampled: dict[str, Any] = {
        **_sample_for_data(trial),
        "eta": trial.suggest_float("eta", 0.005, 5.0, log=True),
        "max_q_backup": trial.suggest_categorical("max_q_backup", [False, True]),
        "n_target_candidates": trial.suggest_int("n_target_candidates", 2, 10),
        "target_actor_interval": trial.suggest_int("target_actor_interval", 1, 5),
    }
    converted = convert_diffusion_ql_params(_with_sampled_her(trial, sampled, additional_args))
    trial.set_user_attr("gamma", converted["gamma"])
    return converted


def convert_diffusion_ql_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into keyword arguments for Diffusion-QL.

    :param sampled_params: What :func:`sample_diffusion_ql_params` sampled, or the parameters of a trial of a study.
    :return: Keyword arguments for Diffusion-QL.
    """
    return _gather_her(_convert_for_data({"target_actor_start": 0, **sampled_params}))


def sample_dtql_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler of DTQL's hyperparameters, in RL Zoo's manner, around the rows of its authors' code. A trial costs at most about
    four times the cheapest one.

    :param trial: Optuna's trial.
    :param n_actions: Action dimensions (not used).
    :param n_envs: Number of environments (not used).
    :param additional_args: RL Zoo's further information: whether the replay buffer is HER's, and its arguments.
    :return: Keyword arguments for DTQL.
    """
    sampled: dict[str, Any] = {
        **_sample_for_data(trial),
        "alpha": trial.suggest_float("alpha", 0.3, 1_500.0, log=True),
        "expectile": trial.suggest_float("expectile", 0.6, 0.95),
        "log_prob_coef": trial.suggest_categorical("log_prob_coef", [0.0, 1.0]),
        "n_pretraining_updates": trial.suggest_int("n_pretraining_updates", 0, 2_000, step=500),
    }
    converted = convert_dtql_params(_with_sampled_her(trial, sampled, additional_args))
    trial.set_user_attr("gamma", converted["gamma"])
    return converted


def convert_dtql_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled values into keyword arguments for DTQL.

    :param sampled_params: What :func:`sample_dtql_params` sampled, or the parameters of a trial of a study.
    :return: Keyword arguments for DTQL.
    """
    return _gather_her(_convert_for_data(sampled_params))


def _sample_for_data(trial: "optuna.Trial") -> dict[str, Any]:
    """What both algorithms for data have."""
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        "qf_learning_rate": trial.suggest_float("qf_learning_rate", 1e-4, 0.002, log=True),
        "tau": trial.suggest_float("tau", 0.001, 0.02, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 10),
        "selection_temperature": trial.suggest_float("selection_temperature", 0.05, 5.0, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
    }


def _convert_for_data(sampled_params: dict[str, Any]) -> dict[str, Any]:
    params = sampled_params.copy()
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["gradient_steps"] = params["train_freq"]  # one update for each step
    params["policy_kwargs"] = dict(net_arch=WIDTHS[params.pop("net_arch")][:1] * 3)
    return params
