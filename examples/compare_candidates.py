"""
Is the best of several samples better than one? The return of one trained policy for several numbers of candidates.

It needs ``pip install matplotlib`` and draws ``candidates.png``.
"""

import argparse

import matplotlib.pyplot as plt
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qvpo import QVPO, presets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=float, default=5_000, help="environment steps")
    parser.add_argument("--episodes", type=int, default=20, help="evaluation episodes for each number of candidates")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    arguments = parser.parse_args()

    model = QVPO(
        "MlpPolicy",
        "Pendulum-v1",
        **presets.small,
        gamma=0.98,
        seed=0,
    ).learn(arguments.timesteps)

    means, errors = [], []
    for n_candidates in arguments.candidates:
        # Fresh noise. The one fixed noise of n_eval_candidates = 1 may not be typical of the policy
        model.n_behavior_candidates = n_candidates
        env = make_vec_env("Pendulum-v1", seed=1_000)  # the same episodes each time
        mean, std = evaluate_policy(model, env, n_eval_episodes=arguments.episodes, deterministic=False)
        print(f"Best of {n_candidates:2d} candidates: {mean:.0f} +- {std:.0f}")
        means.append(mean)
        errors.append(std / arguments.episodes**0.5)
    plt.errorbar(arguments.candidates, means, errors, marker="o", capsize=3)
    plt.xscale("log", base=2)
    plt.xlabel("candidates")
    plt.ylabel("return")
    plt.savefig("candidates.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
