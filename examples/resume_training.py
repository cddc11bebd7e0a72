"""
Train on Pendulum-v1 so that a kill costs little. Run this script, kill it at any moment, and run it again.

The first run writes ``pendulum_run.zip`` every 1 000 steps. Later runs go on from this file until all steps are done. It holds
the replay buffer, the random states and the counters.
"""

import argparse
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qvpo import QVPO, ResumableCheckpointCallback, presets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=5_000, help="environment steps in all")
    parser.add_argument("--save-freq", type=int, default=1_000, help="steps between two checkpoints")
    arguments = parser.parse_args()

    path = Path("pendulum_run.zip")
    # Saved at the end of an episode, the continued run is bit for bit the uninterrupted one
    callback = ResumableCheckpointCallback(arguments.save_freq, path, at_episode_end=True)
    if path.exists():
        model = QVPO.resume(path, "Pendulum-v1")
    else:
        model = QVPO(
            "MlpPolicy",
            "Pendulum-v1",
            **presets.small,
            gamma=0.98,
            seed=0,
        )

    # The same as model.remaining_timesteps, unless --timesteps has changed
    remaining = max(0, arguments.timesteps - model.num_timesteps)
    print(f"{model.num_timesteps} steps are done, {remaining} are left")
    model.learn(remaining, callback, reset_num_timesteps=False)
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1_000), n_eval_episodes=20)
    print(f"Return over 20 episodes after {model.num_timesteps} steps: {mean:.0f} +- {std:.0f}")


if __name__ == "__main__":
    main()
