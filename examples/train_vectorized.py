"""
Train on eight copies of Pendulum-v1 at once, each in a process of its own, with normalised observations.

Each step of all copies is followed by as many updates as it collected transitions (``gradient_steps=-1``).
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_qvpo import QVPO, presets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=float, default=5_000, help="environment steps, over all copies")
    parser.add_argument("--n-envs", type=int, default=8)
    arguments = parser.parse_args()

    processes = make_vec_env("Pendulum-v1", n_envs=arguments.n_envs, vec_env_cls=SubprocVecEnv, seed=0)
    env = VecNormalize(processes, norm_reward=False)
    model = QVPO(
        "MlpPolicy",
        env,
        gradient_steps=-1,
        **presets.small,
        gamma=0.98,
        seed=0,
    )
    model.learn(arguments.timesteps)

    # Evaluation uses the statistics of training, without changing them. It does not normalise rewards
    env.training = False
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"Return over 20 episodes after {model.num_timesteps} steps: {mean:.0f} +- {std:.0f}")
    env.close()


if __name__ == "__main__":
    main()
