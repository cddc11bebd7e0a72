"""What learning from data needs besides data: a stand-in for the environment, and the scores that papers print."""

from typing import Any

import gymnasium as gym
from gymnasium import spaces


class SpacesEnv(gym.Env[Any, Any]):
    """
    Stands for an environment that is not there, so that a model can be built from data alone. It can be reset, not stepped.

    :param observation_space: Of the data.
    :param action_space: Of the data.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]):
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Of the space's generator.
        :param options: Not used.
        :return: A sample of the space.
        """
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param action: Not used.
        :raises RuntimeError: Always.
        """
        raise RuntimeError("SpacesEnv has no dynamics: set_env() the real environment before learn(), or use learn_offline()")


def normalized_score(returns: Any, reference_min: float, reference_max: float) -> Any:
    """
    D4RL's score, which papers print times 100.

    :param returns: A return or an array of them.
    :param reference_min: Return of a random policy.
    :param reference_max: Return of an expert.
    :return: 0 for the first, 1 for the second.
    """
    return (returns - reference_min) / (reference_max - reference_min)
