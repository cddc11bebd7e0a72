"""Four goals are equally good. Which does the policy reach? Draws ``multi_goal.png``; needs matplotlib."""

import argparse

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

from sb3_qvpo import QVPO

GOALS = np.array([(5, 0), (-5, 0), (0, 5), (0, -5)], np.float32)


class MultiGoalEnv(gym.Env):
    """A point starts at the centre and moves by its action. Moves and distance cost; reaching an open goal gives 10."""

    observation_space = gym.spaces.Box(-7, 7, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    open_goals = np.arange(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2, np.float32)
        return self.position, {}

    def step(self, action):
        self.position = np.clip(self.position + action, -7, 7).astype(np.float32)
        distances = np.linalg.norm(GOALS[self.open_goals] - self.position, axis=1)
        over = bool(distances.min() < 1)
        reward = float(-30 * np.sum(np.square(action)) - distances.min() ** 2 + 10 * over)
        return self.position, reward, over, False, {"goal": int(self.open_goals[distances.argmin()])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=float, default=6_000, help="environment steps")
    timesteps = parser.parse_args().timesteps
    env = gym.wrappers.TimeLimit(MultiGoalEnv(), 30)
    settings = dict(n_train_candidates=16, learning_rate=1e-3, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))
    model = QVPO("MlpPolicy", env, learning_starts=500, seed=0, **settings).learn(timesteps)
    _, axes = plt.subplots(1, 2, figsize=(9, 4.5))
    for axis, n_behavior_candidates in zip(axes, (1, 4), strict=True):
        model.policy.n_behavior_candidates = n_behavior_candidates
        reached = [0, 0, 0, 0]
        for _ in range(50):
            (observation, _), way, over = env.reset(), [np.zeros(2)], False
            while not over:
                action, _ = model.predict(observation)
                observation, _, terminated, truncated, info = env.step(action)
                way, over = [*way, observation], terminated or truncated
            reached[info["goal"]] += terminated
            axis.plot(*np.transpose(way), alpha=0.4)
        axis.scatter(*GOALS.T, marker="*", s=200)
        print(f"Best of {n_behavior_candidates}: right, left, top, bottom reached {reached} times in 50 episodes")
    plt.savefig("multi_goal.png")


if __name__ == "__main__":
    main()
