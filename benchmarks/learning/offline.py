"""
Learning from data that the project records itself: a trained agent and random actions take turns in each episode.

``python benchmarks/learning/offline.py record MODEL.zip Hopper-v5 hopper-mixed`` writes a Minari dataset of a few MB.
``python benchmarks/learning/offline.py learn hopper-mixed Hopper-v5 --csv mine_offline.csv`` learns from it, with
Diffusion-QL, DTQL and behaviour cloning, and then goes on in the environment with ``--steps``. Both need
``pip install ".[offline,mujoco]"``.

A run that is in the CSV already is not made again; one that broke off is. Returns are means of 10 episodes from the same start
states: of the policies' own way to act (one of many draws, by a softmax of values; ``mean_return``), and of
``predict(deterministic=True)`` (``greedy_return``). ``data_return`` is the mean over the data's episodes, ``agent_return``
what the trained agent reaches alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from evaluation import SEED
from minari.data_collector import EpisodeBuffer
from run import append, read, setup, write
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qvpo import DTQL, QVPO, DiffusionQL, presets

NO_CHOICE = dict(n_behavior_candidates=1, n_eval_candidates=1)
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "diffusion_ql": (DiffusionQL, dict(presets.diffusion_ql)),
    "behaviour_cloning": (DiffusionQL, {**presets.diffusion_ql, **NO_CHOICE, "eta": 0.0}),
    "dtql": (DTQL, dict(presets.dtql)),
}
"""DTQL's ``greedy_return`` is the policy alone."""


def record(model_file: Path, task: str, name: str, n_transitions: int, stretch: float, seed: int) -> None:
    """
    Write a dataset in which a trained agent and random actions take turns within each episode.

    :param model_file: The agent.
    :param task: The environment.
    :param name: Of the dataset.
    :param n_transitions: At least so many, in whole episodes.
    :param stretch: Mean number of steps that each of the two acts before the other goes on.
    :param seed: Of all that is random.
    """
    model, env, rng = QVPO.load(model_file, device="cpu"), gym.make(task), np.random.default_rng(seed)
    env.action_space.seed(seed)
    th.manual_seed(seed)

    def agent(observation: np.ndarray) -> np.ndarray:
        return model.predict(observation)[0]

    def mixed(observation: np.ndarray) -> np.ndarray:
        nonlocal is_random
        is_random ^= rng.random() < 1 / stretch
        return env.action_space.sample() if is_random else agent(observation)

    is_random, episodes, n = False, [], 0
    while n < n_transitions:
        episodes.append(episode_of(mixed, env, len(episodes), seed))
        n += len(episodes[-1].rewards)
    alone = float(np.mean([sum(episode_of(agent, env, number, seed + 10_000).rewards) for number in range(10)]))
    print(f"{len(episodes)} episodes, {np.mean([sum(episode.rewards) for episode in episodes]):.0f}; agent alone {alone:.0f}")
    about = dict(algorithm_name="QVPO and random actions", author="sb3_qvpo", description="In turns, half of the steps each.")
    dataset = minari.create_dataset_from_buffers(f"sb3_qvpo/{name}-v0", episodes, env=env, **about)
    dataset.storage.update_metadata({"agent_return": alone})


def episode_of(act: Callable[[np.ndarray], np.ndarray], env: gym.Env[Any, Any], number: int, seed: int) -> Any:
    """An episode, in Minari's form."""
    observation, _ = env.reset(seed=seed + number)
    observations, actions, rewards, ends = [observation], [], [], []
    while not ends or not any(ends[-1]):
        actions.append(act(observations[-1]))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(float(reward))
        ends.append((terminated, truncated))
    terminations, truncations = (list(flags) for flags in zip(*ends, strict=True))
    return EpisodeBuffer(
        id=number,
        seed=seed + number,
        observations=np.array(observations),
        actions=np.array(actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


def returns_of_data(dataset: minari.MinariDataset) -> dict[str, float]:
    """The mean return of the episodes, and that of the agent alone, which was measured when they were recorded."""
    returns = [float(episode.rewards.sum()) for episode in dataset.iterate_episodes()]
    return {"data_return": float(np.mean(returns)), "agent_return": float(dataset.storage.metadata["agent_return"])}


def evaluated(model: Any, task: str) -> dict[str, float]:
    """Returns of both ways to act."""
    results = {}
    for name, deterministic in (("mean_return", False), ("greedy_return", True)):
        env = Monitor(gym.make(task))
        env.reset(seed=SEED)
        results[name] = float(np.mean(evaluate_policy(model, env, 10, deterministic=deterministic, warn=False)[0]))
    return results


def learn(name: str, task: str, algo: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run, evaluated at its half and its end; then, if asked for, steps in the environment."""
    dataset = minari.load_dataset(f"sb3_qvpo/{name}-v0")
    algorithm, settings = SETTINGS[algo]
    n_rows = dataset.total_steps + arguments.steps + 1_000
    model = algorithm("MlpPolicy", gym.make(task), seed=seed, device="cpu", buffer_size=n_rows, **settings)
    known, updates, steps = {"task": task, "algo": algo, "seed": seed, **returns_of_data(dataset)}, arguments.updates, 0
    minutes = 0.0

    def note() -> None:
        row = {**known, "updates": model._n_updates, "steps": steps, **evaluated(model, task), "minutes": minutes, **setup()}
        append(arguments.csv, [{key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}])
        print(row)

    for half in range(2):
        start = time.process_time()
        if half == 0:
            model.learn_offline(dataset, updates // 2)
        else:
            model.learn_offline(gradient_steps=updates // 2, reset_num_timesteps=False)
        minutes += (time.process_time() - start) / 60
        note()
    for _ in range(2 if arguments.steps else 0):
        start = time.process_time()
        model.learn(arguments.steps // 2, reset_num_timesteps=False)
        steps += arguments.steps // 2
        minutes += (time.process_time() - start) / 60
        note()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("model", type=Path)
    recording.add_argument("task")
    recording.add_argument("name")
    recording.add_argument("--transitions", type=int, default=40_000)
    recording.add_argument("--stretch", type=float, default=10, help="mean number of steps before the other one acts")
    recording.add_argument("--seed", type=int, default=0)
    learning = commands.add_parser("learn")
    learning.add_argument("name")
    learning.add_argument("task")
    learning.add_argument("--algos", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    learning.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    learning.add_argument("--updates", type=int, default=5_000)
    learning.add_argument("--steps", type=int, default=0, help="in the environment, afterwards")
    learning.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    if arguments.command == "record":
        record(arguments.model, arguments.task, arguments.name, arguments.transitions, arguments.stretch, arguments.seed)
        return
    for seed in arguments.seeds:
        for algo in arguments.algos:
            rows = read(arguments.csv)
            own = [row for row in rows if (row["task"], row["algo"], row["seed"]) == (arguments.task, algo, str(seed))]
            if any(int(row["updates"]) >= arguments.updates and int(row["steps"]) >= arguments.steps for row in own):
                print(f"{arguments.task} {algo} seed {seed}: is there")
                continue
            if own:  # it broke off
                write(arguments.csv, [row for row in rows if row not in own], list(rows[0]))
            learn(arguments.name, arguments.task, algo, seed, arguments)


if __name__ == "__main__":
    main()
