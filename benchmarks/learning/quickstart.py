"""
Does the quick start succeed for every seed? Pendulum-v1 with ``presets.small`` and gamma 0.98, as ``make train`` has it.

``python benchmarks/learning/quickstart.py [--seeds 0 1 ...]`` takes about two minutes for each of twenty seeds, on one thread.
Seeds that are in the CSV file are skipped. ``--settings version_0.1`` takes the settings of that version instead, whose seeds
often fail: 16 candidates, five DDPM steps, two critics with targets.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from run import append, read, setup
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qvpo import QVPO, presets

SETTINGS = {
    "small": dict(presets.small, gamma=0.98),
    "version_0.1": dict(
        **dict(learning_rate=1e-3, learning_starts=500, batch_size=128, tau=0.01, gamma=0.98),
        **dict(n_train_candidates=16, n_diffusion_steps=5, policy_kwargs=dict(net_arch=[64, 64])),
    ),
}


def returns_of(model: QVPO) -> list[float]:
    """Returns of 20 episodes, with the same starts for all models."""
    env = Monitor(gym.make("Pendulum-v1"))
    env.reset(seed=1000)
    returns, _ = evaluate_policy(model, env, 20, return_episode_rewards=True)
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(20)))
    parser.add_argument("--settings", choices=SETTINGS, default="small")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--eval-freq", type=int, default=1_000)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "quickstart.csv")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    done = {(row["algo"], int(row["seed"])) for row in read(arguments.csv) if row["step"] == row["last_step"]}
    for seed in arguments.seeds:
        if (arguments.settings, seed) in done:
            continue
        rows: list[dict[str, Any]] = []
        model = QVPO("MlpPolicy", "Pendulum-v1", **SETTINGS[arguments.settings], seed=seed, device="cpu")
        trained = 0.0
        for step in range(arguments.eval_freq, arguments.steps + 1, arguments.eval_freq):
            start = time.process_time()
            model.learn(arguments.eval_freq, reset_num_timesteps=False)
            trained += time.process_time() - start
            returns = returns_of(model)
            rows.append(
                {
                    **{"task": "Pendulum-v1", "algo": arguments.settings, "seed": seed, "step": step},
                    **{"last_step": arguments.steps, "mean_return": round(float(np.mean(returns)), 2)},
                    **{"worst_return": round(float(np.min(returns)), 2), "episodes": 20},
                    **{"train_minutes": round(trained / 60, 2), **setup()},
                }
            )
        append(arguments.csv, rows)
        print(f"seed {seed}, {arguments.settings}: {rows[-1]['mean_return']}", flush=True)


if __name__ == "__main__":
    main()
