"""Policies of Diffusion-QL, with the networks of its authors' code."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule

from sb3_qvpo.common.softmax_policies import SoftmaxPolicy


class MlpPolicy(SoftmaxPolicy):
    """
    A diffusion policy that chooses among candidates by a softmax.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param kwargs: Arguments of :class:`~sb3_qvpo.common.softmax_policies.SoftmaxPolicy`. By default three layers of 256,
        ``noise_schedule="vp"``, a time network 16, 32, 16 wide and torch's initial weights.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Box, lr_schedule: Schedule, **kwargs: Any):
        defaults: dict[str, Any] = dict(
            net_arch=[256, 256, 256],
            noise_schedule="vp",
            time_embedding_dim=16,
            time_hidden_dim=32,
            initialization="torch",
        )
        super().__init__(observation_space, action_space, lr_schedule, **{**defaults, **kwargs})


class CnnPolicy(MlpPolicy):
    """
    The same for images.

    :param args: Positional arguments of :class:`MlpPolicy`.
    :param kwargs: Its keyword arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": NatureCNN, **kwargs})


class MultiInputPolicy(MlpPolicy):
    """
    The same for dictionaries of vectors and images.

    :param args: Positional arguments of :class:`MlpPolicy`.
    :param kwargs: Its keyword arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": CombinedExtractor, **kwargs})
