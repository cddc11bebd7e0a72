"""
Do the critics of a trained model value what it does too high or too low?

``python benchmarks/learning/values.py run.zip Walker2d-v5`` plays episodes with the best of 1, 4 and 32 samples in each step.
It compares the critics' values of the actions (the minimum, mean over all states) with the discounted rewards to the end of
the episode. If a time limit ends it, the last state counts with its value.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from evaluation import SEED, best_of

from sb3_qvpo import QVPO


def discounted(rewards: list[float], last_value: float | None, gamma: float) -> np.ndarray:
    """
    What follows each step: its reward and all later ones, discounted.

    :param rewards: Rewards of an episode.
    :param last_value: Value of the last step, its reward included, if the episode was cut off there; None if it was the end
        of the task.
    :param gamma: Discount factor.
    :return: Of the same length.
    """
    result = np.zeros(len(rewards))
    result[-1] = rewards[-1] if last_value is None else last_value
    for i in range(len(rewards) - 2, -1, -1):
        result[i] = rewards[i] + gamma * result[i + 1]
    return result


def played(model: QVPO, env: gym.Env[Any, Any], seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    """
    One episode.

    :return: Its return, the critics' value of each step, and what follows it.
    """
    (observation, _), over = env.reset(seed=seed), False
    observations, actions, rewards = [], [], []
    while not over:
        action, _ = model.predict(observation, deterministic=False)
        observations.append(observation)
        actions.append(model.policy.scale_action(action))
        observation, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
        over = terminated or truncated
    with th.no_grad():
        batch, _ = model.policy.obs_to_tensor(np.array(observations))
        both = model.critic(batch, th.as_tensor(np.array(actions), device=model.device))
        values = th.stack(both).min(dim=0).values.flatten().cpu().numpy()
    return sum(rewards), values, discounted(rewards, None if terminated else float(values[-1]), model.gamma)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a saved model or a checkpoint; VecNormalize is not supported")
    parser.add_argument("task")
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--episodes", type=int, default=10)
    arguments = parser.parse_args()
    model, env = QVPO.load(arguments.model, device="cpu"), gym.make(arguments.task)
    for n_candidates in arguments.candidates:
        with best_of(model.policy, n_candidates):
            returns, values, following = zip(*(played(model, env, SEED + i) for i in range(arguments.episodes)), strict=True)
        print(
            f"Best of {n_candidates:2d}: return {np.mean(returns):.0f} +- {np.std(returns):.0f}, "
            f"value {np.mean(np.concatenate(values)):.1f}, what follows {np.mean(np.concatenate(following)):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
