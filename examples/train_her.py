"""
Hindsight experience replay on FetchReach-v4: move a gripper to a point, with a reward of 0 there and -1 elsewhere.

It needs ``pip install gymnasium-robotics "mujoco<3.12"``: FetchReach does not start with newer versions of MuJoCo.
Observations are normalised, because learning takes longer without.
"""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="FetchReach-v4")
    parser.add_argument("--timesteps", type=float, default=3_000, help="environment steps")
    parser.add_argument("--episodes", type=int, default=50, help="evaluation episodes")
    arguments = parser.parse_args()
    if arguments.env.startswith("Fetch"):
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)

    env = VecNormalize(make_vec_env(arguments.env, seed=0), norm_reward=False)
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

    env.training = False
    successes: list[float] = []

    def note(local_variables: dict, _: dict) -> None:
        if local_variables["done"]:
            successes.append(local_variables["info"]["is_success"])

    evaluate_policy(model, env, n_eval_episodes=arguments.episodes, callback=note)
    print(f"Success in {np.mean(successes):.0%} of {len(successes)} episodes after {model.num_timesteps} steps")


if __name__ == "__main__":
    main()
