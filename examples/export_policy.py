"""
Train on Pendulum-v1 with normalised observations, export the policy to ONNX, and drive the pendulum with onnxruntime alone.

It needs ``pip install ".[export]"`` in a clone. The exported file takes raw observations: the normalisation is inside.
"""

import argparse

import gymnasium as gym
import numpy as np
import onnxruntime
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO, presets


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=float, default=5_000, help="environment steps")
    parser.add_argument("--episodes", type=int, default=20, help="episodes to drive")
    arguments = parser.parse_args()

    model = QVPO(
        "MlpPolicy",
        VecNormalize(make_vec_env("Pendulum-v1"), norm_reward=False),
        **presets.small,
        gamma=0.98,
        seed=0,
    )
    model.learn(arguments.timesteps)
    model.export("pendulum.onnx")

    # From here on neither torch nor this package is needed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # silences a warning of the optional input, the noise
    session = onnxruntime.InferenceSession("pendulum.onnx", options)
    env = gym.make("Pendulum-v1")
    returns = np.zeros(arguments.episodes)
    for episode in range(arguments.episodes):
        observation, _ = env.reset(seed=1_000 + episode)
        over = False
        while not over:
            (actions,) = session.run(None, {"observation": observation[None]})
            observation, reward, terminated, truncated, _ = env.step(actions[0])
            returns[episode] += reward
            over = terminated or truncated
    print(f"Return of pendulum.onnx over {len(returns)} episodes: {returns.mean():.0f} +- {returns.std():.0f}")
    return float(returns.mean())


if __name__ == "__main__":
    main()
