"""
The bandit of the paper's Figure 2: samples of the policy during training, without and with the entropy term.

It needs ``pip install matplotlib`` and draws ``bandit.png``.
"""

import argparse

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

from sb3_qvpo import QVPO

PEAKS = np.array([(-1.35, 0.65), (-0.65, 1.35), (-1.61, 1.61)])


class ThreePeaksEnv(gym.Env):
    """An episode has one step. The reward is 1.5 times the sum of three Gaussian densities of deviation 0.1 (Sec. 4.3)."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(self.reward(np.asarray(action))), True, False, {}

    @staticmethod
    def reward(actions: np.ndarray) -> np.ndarray:
        distances = ((actions[..., None, :] - PEAKS) ** 2).sum(-1)
        return (1.5 / (2 * np.pi * 0.1**2) * np.exp(-distances / (2 * 0.1**2))).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=4_000, help="environment steps")
    arguments = parser.parse_args()
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, 200)] * 2), -1)
    _, axes = plt.subplots(2, 4, figsize=(12, 6))
    for row, ent_coef in zip(axes, (0.0, 0.01), strict=True):
        settings = dict(learning_rate=1e-3, learning_starts=200, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))
        model = QVPO("MlpPolicy", ThreePeaksEnv(), ent_coef=ent_coef, seed=0, **settings)
        for i, axis in enumerate(row):
            model.learn(arguments.timesteps // 4, reset_num_timesteps=i == 0)
            model.policy.n_behavior_candidates = 1  # the policy itself, not the best of several samples
            actions, _ = model.predict(np.zeros((500, 1), np.float32))
            model.policy.n_behavior_candidates = 4
            axis.contour(grid[..., 0], grid[..., 1], ThreePeaksEnv.reward(grid), levels=[1, 5, 10, 20])
            axis.scatter(*actions.T, s=3, alpha=0.4, color="black")
            axis.set_title(f"ent_coef {ent_coef}, {model.num_timesteps} steps")
            print(f"ent_coef {ent_coef}, {model.num_timesteps} steps: reward {ThreePeaksEnv.reward(actions).mean():.1f}")
    plt.savefig("bandit.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
