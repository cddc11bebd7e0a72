"""Policies of Diffusion-QL: with fresh noise they draw one of many candidates by a softmax of the target critics' values."""

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule

from sb3_qvpo.common.arguments import check_interval
from sb3_qvpo.common.candidates import select
from sb3_qvpo.common.networks import PyTorchObs, evaluation_mode
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.diffusion_ql.losses import softmax_choice


class MlpPolicy(DiffusionPolicy):
    """
    A diffusion policy that chooses among candidates by a softmax. Deterministic predictions take the best one, as all policies
    here do.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param selection_temperature: Of the softmax of values, above 0. 1 in the authors' code.
    :param kwargs: Further arguments of :class:`~sb3_qvpo.DiffusionPolicy`. Three layers of 256, ``noise_schedule="vp"`` and
        ``time_embedding_dim=16`` by default.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        selection_temperature: float = 1.0,
        **kwargs: Any,
    ):
        check_interval("selection_temperature", selection_temperature, 0, math.inf, low_allowed=False)
        defaults: dict[str, Any] = dict(net_arch=[256, 256, 256], noise_schedule="vp", time_embedding_dim=16)
        super().__init__(observation_space, action_space, lr_schedule, **{**defaults, **kwargs})
        self.selection_temperature = selection_temperature

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic:
            return super()._predict(observation, deterministic)
        with evaluation_mode(self.actor, self.critic_target):
            features = self.actor.features(observation)
            critic_features = self.critic_target.features(observation)
            candidates = self.actor.sample_candidates(
                features, self.actor.draw_noise(len(features), self.n_behavior_candidates)
            )
            q_values = self.critic_target.score(critic_features, candidates)
        return select(candidates, softmax_choice(q_values, self.selection_temperature, th.rand_like(q_values)))

    def _scores_as_known(self) -> bool:
        # Compiled decisions take the best candidate
        return False

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "selection_temperature": self.selection_temperature}


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
