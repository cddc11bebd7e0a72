"""
Hindsight experience replay on FetchReach-v4: move a gripper to a point, with a reward of 0 there and -1 elsewhere.

Needs ``pip install gymnasium-robotics "mujoco<3.12"``. Takes a few minutes on two cores.
"""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3 import HerReplayBuffer

from sb3_qvpo import QVPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="FetchReach-v4")
    parser.add_argument("--timesteps", type=float, default=5_000, help="environment steps")
    parser.add_argument("--episodes", type=int, default=50, help="evaluation episodes")
    arguments = parser.parse_args()
    if arguments.env.startswith("Fetch"):
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)

    env = gym.make(arguments.env)
    model = QVPO(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=4, goal_selection_strategy="future"),
        learning_rate=1e-3,
        learning_starts=1_000,
        gamma=0.95,
        n_train_candidates=16,
        n_diffusion_steps=5,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=0,
    )
    model.learn(arguments.timesteps)

    successes = []
    for episode in range(arguments.episodes):
        (observation, info), over = env.reset(seed=1_000 + episode), False
        while not over:
            action, _ = model.predict(observation, deterministic=True)
            observation, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        successes.append(float(info["is_success"]))
    print(f"Success in {np.mean(successes):.0%} of {len(successes)} episodes after {model.num_timesteps} steps")


if __name__ == "__main__":
    main()
