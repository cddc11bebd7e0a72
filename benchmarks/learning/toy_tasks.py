"""
The bandit of the paper's Figure 2 and four equally good goals: how many good actions does a policy keep, and what does it do
once the goal that it prefers is blocked? And how fast does a policy that has become narrow follow when other actions become
the best ones?

``python benchmarks/learning/toy_tasks.py bandit --seeds 0 1 2``, ``... multi_goal --seeds 0 1 2 3 4``, ``... blocked_goal``
and ``... follow``. The tasks of the first three are those of ``examples/``. Runs that are in the CSV file are skipped. Each
run has one thread. The column ``minutes`` is the whole run by the clock. Needs matplotlib.
``... samples`` writes what the figure of the bandit and the animation of a chain show, ``bandit_samples.csv`` and
``bandit_chain.csv``.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # is no package

from bandit import PEAKS, ThreePeaksEnv
from goals import BLOCKED, MULTI_GOAL, SMALL, SOFT, Row, blocked_goal, drawn_by_weight, multi_goal, samples, soft
from run import FAST, append, read, setup, steps, write

from sb3_qvpo import QVPO

HERE = Path(__file__).parent
VARIED: dict[str, dict[str, Any]] = {
    **{f"T {T}, ent_coef {c}": dict(n_diffusion_steps=T, ent_coef=c) for T in (5, 10, 20) for c in (0.0, 0.01)},
    # K_t would change nothing: every step ends the episode
    **{f"K_b {b}": dict(n_behavior_candidates=b) for b in (1, 20)},
    "qcut": dict(q_weighting="qcut"),
    "ent_coef 0.1": dict(ent_coef=0.1),
    "N_d 4": dict(n_train_candidates=4),
    "drawn by weight": dict(q_weighting=drawn_by_weight),
    # Learning rates, clipping, layers; their ent_coef falls from 0.02 to 0.002, on average as much as the default's 0.01
    "the authors' settings": dict(
        **dict(learning_rate=1e-4, qf_learning_rate=3e-4, max_grad_norm=2.0),
        policy_kwargs=dict(net_arch=[64, 64, 64], optimizer_kwargs=dict(eps=1e-5)),
    ),
}
"""What is changed of the defaults (T 20, ent_coef 0.01, K_b 4): the paper's Figures 4 and 5, and its weightings."""
BANDIT: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    **{name: (QVPO, arguments) for name, arguments in VARIED.items()},
    **SOFT,
    # The peaks are a fortieth of the box: at the temperatures of the goals the rest may outweigh them
    **soft(0.1, 0.2),
}
"""Algorithms and what is changed of the defaults, for the bandit."""


def bandit(setting: str, seed: int, timesteps: int = 4_000) -> list[Row]:
    """Reward of the policy itself, and which share of its samples is near each peak, at four moments of training."""
    th.set_num_threads(1)
    algorithm, arguments = BANDIT[setting]
    model = algorithm("MlpPolicy", ThreePeaksEnv(), **{**SMALL, **arguments, "learning_starts": 200, "seed": seed})
    rows = []
    for i in range(4):
        model.learn(timesteps // 4, reset_num_timesteps=i == 0)
        actions = samples(model, np.zeros((2_000, 1), np.float32), 1)
        near = (np.linalg.norm(actions[:, None] - PEAKS, axis=-1) < 0.3).mean(axis=0)
        numbers = {"reward": ThreePeaksEnv.reward(actions).mean(), "std": actions.std(axis=0).mean()}
        numbers |= {f"peak_{peak}": share for peak, share in enumerate(near)}
        rows.append({"step": model.num_timesteps, **{name: round(float(value), 3) for name, value in numbers.items()}})
    return rows


class FollowEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    Reward ``-|a - f(s)|^2``, one step an episode, with as many actions as a walking robot has.

    :param goal: Which of two functions f.
    """

    def __init__(self, goal: int = 0) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (6,), np.float32)
        self.goal = goal

    def best_actions(self, states: np.ndarray) -> np.ndarray:
        """
        The two functions: random networks with values in [-0.6, 0.6].

        :param states: Of shape (N, 4).
        :return: Actions of shape (N, 6).
        """
        rng = np.random.default_rng(self.goal)
        first, second = rng.normal(size=(4, 16)), rng.normal(size=(16, 6))
        return 0.6 * np.tanh(np.tanh(states @ first) @ second / 2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self.np_random.normal(size=4).astype(np.float32)
        return self._state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._state, float(self.rewards(self._state[None], action[None])[0]), True, False, {}

    def rewards(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """
        Rewards of any transitions.

        :param states: Of shape (N, 4).
        :param actions: Of shape (N, 6).
        :return: Of shape (N,).
        """
        return -((actions - self.best_actions(states)) ** 2).sum(axis=-1)


SMALL_FAST: dict[str, Any] = {**FAST, **steps(5, net_arch=[64, 64])}
NOISE = NormalActionNoise(np.zeros(6), np.full(6, 0.3))
FOLLOW: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "QVPO as in `qvpo_fast.yml`": (QVPO, SMALL_FAST),
    "... without the delay": (QVPO, {**SMALL_FAST, "policy_delay": 1}),
    "... N_d 64": (QVPO, {**SMALL_FAST, "n_train_candidates": 64}),
    "... ent_coef 0": (QVPO, {**SMALL_FAST, "ent_coef": 0.0}),
    "... ent_coef 0.25": (QVPO, {**SMALL_FAST, "ent_coef": 0.25}),
    "... action noise 0.3": (QVPO, {**SMALL_FAST, "action_noise": NOISE}),
    "... 5 DDIM steps": (QVPO, {**SMALL_FAST, **steps(5, 0.0, net_arch=[64, 64])}),
    "... all 20 steps": (QVPO, {**SMALL_FAST, "policy_kwargs": dict(net_arch=[64, 64])}),
    "SAC": (SAC, dict(policy_kwargs=dict(net_arch=[64, 64]))),
}
"""``hyperparams/qvpo_fast.yml`` with one thing changed."""


def root_mean_square(values: np.ndarray) -> float:
    """The root of the mean square of all entries."""
    return float(np.sqrt((values**2).mean()))


def best_of_critics(model: BaseAlgorithm, states: th.Tensor, actions: np.ndarray) -> np.ndarray:
    """
    Where the minimum of the critics is largest.

    :param states: Of shape (N, 4).
    :param actions: Where the search starts, shape (N, 6).
    :return: Actions of shape (N, 6).
    """
    best = th.tensor(actions, requires_grad=True)  # a copy
    optimizer = th.optim.Adam([best], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (-th.stack(model.critic(states, best)).min(dim=0).values.sum()).backward()
        optimizer.step()
        best.data.clamp_(-1, 1)
    return best.detach().numpy()


def follow(setting: str, seed: int, timesteps: int = 6_000) -> list[Row]:
    """
    How far the policy is from the best actions. First after two thirds of the steps. Then f and all rewards in the replay
    buffer are replaced, and it is measured at once and after 1/24, 1/12, 1/6 and 1/3 of the steps.
    """
    th.set_num_threads(1)
    algorithm, arguments = FOLLOW[setting]
    env = FollowEnv()
    model = algorithm("MlpPolicy", env, learning_starts=500, batch_size=256, gamma=0.0, seed=seed, **arguments)
    states = np.random.default_rng(seed).normal(size=(200, 4)).astype(np.float32)
    rows = []

    def measure(moment: str) -> None:
        # 32 samples of the policy itself for each state
        drawn = samples(model, np.repeat(states, 32, axis=0), 1).reshape(200, 32, 6)
        mean, goals = drawn.mean(axis=1), env.best_actions(states)
        critics = best_of_critics(model, th.as_tensor(states), mean)
        numbers = {"distance": root_mean_square(mean - goals), "std": drawn.std(axis=1).mean()}
        numbers |= {"critics_distance": root_mean_square(critics - goals), "to_critics": root_mean_square(mean - critics)}
        rounded = {name: round(float(value), 3) for name, value in numbers.items()}
        rows.append({"step": model.num_timesteps, "moment": moment, **rounded})

    model.learn(timesteps * 2 // 3)
    measure("before")
    env.goal, buffer = 1, model.replay_buffer
    known = slice(0, buffer.pos)
    buffer.rewards[known, 0] = env.rewards(buffer.observations[known, 0], buffer.actions[known, 0])
    measure("at once")
    for part, before in ((24, 0), (12, timesteps // 24), (6, timesteps // 12), (3, timesteps // 6)):
        model.learn(timesteps // part - before, reset_num_timesteps=False)
        measure(f"after {timesteps // part}")
    return rows


def chain(model: QVPO, n_candidates: int) -> list[np.ndarray]:
    """All states of the chain that draws so many candidates for the bandit's one observation, in the scale of actions."""
    states: list[np.ndarray] = []
    actor = model.actor

    def recording(x_t: th.Tensor, t: int, condition: Any) -> th.Tensor:
        states.append(x_t[0].numpy())
        return actor.noise_predictor(x_t, t, condition)

    with th.no_grad():
        condition = actor.noise_predictor.condition(actor.features(th.zeros(1, 1)))
        states.append(actor.diffusion.sample(recording, condition, actor.draw_noise(1, n_candidates))[0].numpy())
    return [2 * state for state in states]  # the box is [-2, 2]


def write_samples(folder: Path, timesteps: int = 4_000) -> None:
    """Samples of the policy at four moments of training, and one chain in the middle of it."""
    th.set_num_threads(1)
    drawn: list[Row] = []
    denoised: list[Row] = []
    for ent_coef in (0.0, 0.01):
        model = QVPO("MlpPolicy", ThreePeaksEnv(), learning_starts=200, seed=0, device="cpu", **SMALL, ent_coef=ent_coef)
        for i in range(4):
            model.learn(timesteps // 4, reset_num_timesteps=i == 0)
            points = samples(model, np.zeros((300, 1), np.float32), 1).round(3).tolist()
            drawn += [{"ent_coef": ent_coef, "step": model.num_timesteps, "x": x, "y": y} for x, y in points]
            if ent_coef and i == 1:
                for step, state in enumerate(chain(model, 100)):
                    points = state.round(3).tolist()
                    denoised += [{"step": step, "candidate": k, "x": x, "y": y} for k, (x, y) in enumerate(points)]
    # All at the end, so that earlier files stay until then
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("bandit_samples", drawn), ("bandit_chain", denoised)):
        write(folder / f"{name}.csv", rows, list(rows[0]))


STUDIES: dict[str, tuple[Callable[..., list[Row]], dict[str, Any]]] = {
    "bandit": (bandit, BANDIT),
    "multi_goal": (multi_goal, MULTI_GOAL),
    "blocked_goal": (blocked_goal, BLOCKED),
    "follow": (follow, FOLLOW),
}


def run_one(study: str, timesteps: int | None, key: tuple[str, int]) -> tuple[tuple[str, int], list[Row]]:
    """One setting with one seed, in a process of its own."""
    changed = {} if timesteps is None else {"timesteps": timesteps}
    start = time.perf_counter()
    rows = STUDIES[study][0](*key, **changed)
    minutes = round((time.perf_counter() - start) / 60, 2)
    return key, [{**row, "minutes": minutes} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "samples"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", help="some of the study's settings; all by default")
    parser.add_argument("--timesteps", type=int, help="environment steps of each run")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, help="the study's CSV file; beside this script by default")
    parser.add_argument("--folder", type=Path, default=HERE, help="where samples are written")
    arguments = parser.parse_args()
    if arguments.study == "samples":
        write_samples(arguments.folder, **({"timesteps": arguments.timesteps} if arguments.timesteps else {}))
        return
    file = arguments.csv or HERE / f"{arguments.study}.csv"
    done = {(row["setting"], int(row["seed"])) for row in read(file)}
    settings = arguments.settings or list(STUDIES[arguments.study][1])
    waiting = [(setting, seed) for seed in arguments.seeds for setting in settings if (setting, seed) not in done]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for (setting, seed), rows in pool.imap_unordered(partial(run_one, arguments.study, arguments.timesteps), waiting):
            rows = [{"setting": setting, "seed": seed, **row, **setup()} for row in rows]
            append(file, rows)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
