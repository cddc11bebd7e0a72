"""The policies that every algorithm knows by name, for vectors, images and dictionaries."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_qvpo.common.policies import DiffusionPolicy

MlpPolicy = DiffusionPolicy


class CnnPolicy(DiffusionPolicy):
    """
    Diffusion policy for images.

    :param observation_space: Observation space, an image.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param net_arch: Widths of the hidden layers, see :class:`DiffusionPolicy`.
    :param activation_fn: Activation function.
    :param features_extractor_class: Features extractor to use.
    :param kwargs: Further arguments of :class:`DiffusionPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )


class MultiInputPolicy(DiffusionPolicy):
    """
    Diffusion policy for dictionaries of vectors and images.

    :param observation_space: Observation space, a ``Dict``.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param net_arch: Widths of the hidden layers, see :class:`DiffusionPolicy`.
    :param activation_fn: Activation function.
    :param features_extractor_class: Features extractor to use.
    :param kwargs: Further arguments of :class:`DiffusionPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )
