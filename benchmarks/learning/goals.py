"""
Four equally good goals: which of them does a policy reach, and what does it do once the one that it prefers is blocked? The
task is that of ``examples/multi_goal.py``; ``toy_tasks.py`` runs this.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib import CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # is no package

from evaluation import best_of
from multi_goal import GOALS, MultiGoalEnv

from sb3_qvpo import QVPO, SDAC, DiffusionPolicy, presets
from sb3_qvpo.qvpo.weights import qadv

Row = dict[str, Any]
SMALL = dict(learning_rate=1e-3, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))
"""Settings of the bandit and the goals, for all algorithms."""
EPISODES, PATHS = 200, 20
"""Episodes of an evaluation, and those whose paths are kept."""
NAMES = ("right", "left", "top", "bottom")


def drawn_by_weight(q_values: th.Tensor) -> th.Tensor:
    """
    One candidate, drawn in proportion to its advantage weight, instead of the best (line 7 of Algorithm 1). It gets the mean
    of all weights, so that the loss is on average that of Eq. 6 over all candidates.

    :param q_values: Values of the candidates, shape (B, K).
    :return: Weights of shape (B, K), all but one of each row 0.
    """
    weights = qadv(q_values) + 1e-8  # equal candidates are equally likely
    return th.zeros_like(weights).scatter(1, th.multinomial(weights, 1), weights.mean(dim=1, keepdim=True))


def small(preset: dict[str, Any]) -> dict[str, Any]:
    """A preset with the networks and batches of :data:`SMALL`."""
    return {**preset, **SMALL, "policy_kwargs": {**preset["policy_kwargs"], "net_arch": [64, 64]}}


def soft(*temperatures: float) -> dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]]:
    """``presets.sdac_several`` at other temperatures."""
    return {f"SDAC, temperature {t}": (SDAC, {**presets.sdac_several, "temperature": t}) for t in temperatures}


SOFT = soft(0.5, 1.0, 2.0)
"""SDAC at three temperatures, in units of the values' spread."""
MULTI_GOAL: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "QVPO": (QVPO, dict(n_train_candidates=16)),
    "QVPO, ent_coef 0.1": (QVPO, dict(n_train_candidates=16, ent_coef=0.1)),
    "QVPO, N_d 2": (QVPO, dict(n_train_candidates=2)),
    "QVPO, drawn by weight": (QVPO, dict(n_train_candidates=16, q_weighting=drawn_by_weight)),
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
}
"""Algorithms and what is changed of the defaults, for the goals as they are."""
BLOCKED: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    **SOFT,
    "SDAC, temperature auto": (SDAC, {**presets.sdac_several, "temperature": "auto"}),
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
    "CrossQ": (CrossQ, {}),
    "QVPO": (QVPO, dict(n_train_candidates=16)),
    "QVPO, presets.fast": (QVPO, small(presets.fast)),
}
"""The same for the goals of which one is blocked later."""


def samples(model: BaseAlgorithm, observations: np.ndarray, n_candidates: int) -> np.ndarray:
    """An action of the policy for each observation, for a diffusion policy the best of so many candidates."""
    with best_of(model.policy, n_candidates) if isinstance(model.policy, DiffusionPolicy) else nullcontext():
        return model.predict(observations)[0]


def goals_env(open_goals: np.ndarray) -> gym.Env[np.ndarray, np.ndarray]:
    """The task with some goals, episodes of at most 30 steps."""
    env = MultiGoalEnv()
    env.open_goals = open_goals
    return gym.wrappers.TimeLimit(env, 30)


def measured(model: BaseAlgorithm, open_goals: np.ndarray, n_candidates: int) -> tuple[Row, list[np.ndarray]]:
    """
    What 200 episodes do at the same time.

    :param model: Any algorithm.
    :param open_goals: Indices of the goals that are not blocked.
    :param n_candidates: The best of so many samples acts, if the policy is a diffusion policy.
    :return: Return, how often each goal was reached and where 1000 first actions go; the episodes' positions.
    """
    envs = [goals_env(open_goals) for _ in range(EPISODES)]
    paths = [[env.reset()[0]] for env in envs]
    reached, returns = np.zeros(len(GOALS), int), np.zeros(EPISODES)
    live = list(range(EPISODES))
    while live:
        actions = samples(model, np.stack([paths[i][-1] for i in live]), n_candidates)
        over = set()
        for i, action in zip(live, actions, strict=True):
            observation, reward, terminated, truncated, info = envs[i].step(action)
            paths[i].append(observation)
            returns[i] += reward
            reached[info["goal"]] += terminated
            if terminated or truncated:
                over.add(i)
        live = [i for i in live if i not in over]
    first = samples(model, np.zeros((1_000, 2), np.float32), n_candidates)
    # Quarters around the directions to the goals: right, top, left, bottom
    quarters = np.bincount(np.round(np.arctan2(first[:, 1], first[:, 0]) / (np.pi / 2)).astype(int) % 4, minlength=4)
    directions = dict(zip(("right", "top", "left", "bottom"), quarters.tolist(), strict=True))
    row = {
        **{"candidates": n_candidates, "return": round(float(returns.mean()), 1)},
        **{f"reached_{name}": count for name, count in zip(NAMES, reached.tolist(), strict=True)},
        **{f"first_{name}": directions[name] for name in NAMES},
        "first_length": round(float(np.linalg.norm(first, axis=1).mean()), 3),
    }
    return row, [np.stack(path) for path in paths]


def built(algorithm: type[BaseAlgorithm], arguments: dict[str, Any], env: MultiGoalEnv, seed: int) -> BaseAlgorithm:
    """A model that starts to learn after 500 steps."""
    arguments = {**SMALL, **arguments, "learning_starts": 500, "seed": seed, "device": "cpu"}
    return algorithm("MlpPolicy", gym.wrappers.TimeLimit(env, 30), **arguments)


def counts(model: BaseAlgorithm) -> tuple[int, ...]:
    """The numbers of candidates whose best one is measured."""
    return (1, 4) if isinstance(model.policy, DiffusionPolicy) else (1,)


def multi_goal(setting: str, seed: int, timesteps: int = 6_000) -> list[Row]:
    """Which goals 200 episodes reach, and where first actions go, for the policy itself and the best of 4."""
    th.set_num_threads(1)
    model = built(*MULTI_GOAL[setting], MultiGoalEnv(), seed)
    rows = []
    for i in range(4):
        model.learn(timesteps // 4, reset_num_timesteps=i == 0)
        for n_candidates in counts(model):
            rows.append({"step": model.num_timesteps, **measured(model, np.arange(4), n_candidates)[0]})
    return rows


def blocked_goal(setting: str, seed: int, timesteps: int = 6_000) -> list[Row]:
    """
    The same once before and three times after the goal is blocked that most episodes reached: at once, after 1/12 and 1/3 of
    the steps more.

    :return: Rows with the number of the blocked goal. Those before have some paths, too: positions x and y, in tenths.
    """
    th.set_num_threads(1)
    env = MultiGoalEnv()
    model = built(*BLOCKED[setting], env, seed)
    model.learn(timesteps)
    rows: list[Row] = []
    total = np.zeros(4, int)
    for n_candidates in counts(model):
        row, paths = measured(model, env.open_goals, n_candidates)
        total += [row[f"reached_{name}"] for name in NAMES]
        text = "|".join(" ".join(map(str, (10 * path).round().astype(int).ravel())) for path in paths[:PATHS])
        rows.append({"moment": "before", "step": model.num_timesteps, **row, "paths": text})
    blocked = int(total.argmax())
    env.open_goals = np.delete(env.open_goals, blocked)
    done = 0
    for more in (0, timesteps // 12, timesteps // 3):
        if more:
            model.learn(more - done, reset_num_timesteps=False)
            done = more
        for n_candidates in counts(model):
            row, _ = measured(model, env.open_goals, n_candidates)
            rows.append({"moment": f"after {more}" if more else "at once", "step": model.num_timesteps, **row, "paths": ""})
    return [{**row, "blocked": NAMES[blocked]} for row in rows]
