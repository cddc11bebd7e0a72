"""
Train a diffusion policy on Pendulum-v1 in two minutes, and print its return.

It needs ``pip install ".[progress]"`` in a clone. Twenty seeds returned -141 to -152, ``benchmarks/learning/quickstart.csv``.
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qvpo import QVPO, presets


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=float, default=5_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # The paper's settings are meant for MuJoCo. One action dimension needs fewer candidates and steps
    model = QVPO(
        "MlpPolicy",
        "Pendulum-v1",
        **presets.small,
        gamma=0.98,
        seed=arguments.seed,
    )
    model.learn(arguments.timesteps, progress_bar=True)
    model.save("qvpo_pendulum")

    env = make_vec_env("Pendulum-v1", seed=1_000)
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"Return over 20 episodes after {model.num_timesteps} steps: {mean:.0f} +- {std:.0f} (a random policy: about -1200)")
    return mean


if __name__ == "__main__":
    main()
