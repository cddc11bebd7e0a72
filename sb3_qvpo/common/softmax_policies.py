"""
Policies for data that are there already: with fresh noise they draw one of many candidates by a softmax of the target critics'
values. Deterministic predictions take the best one, as all policies here do.

Shapes: B batch, K candidates for each state.
"""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_qvpo.common.arguments import PolicyValue
from sb3_qvpo.common.candidates import best_candidate, select, softmax_choice
from sb3_qvpo.common.networks import evaluation_mode
from sb3_qvpo.common.policies import DiffusionPolicy


class SoftmaxPolicy(DiffusionPolicy):
    """
    A diffusion policy that chooses among candidates by a softmax.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param selection_temperature: Of the softmax of values, above 0.
    :param kwargs: Further arguments of :class:`~sb3_qvpo.DiffusionPolicy`.
    """

    selection_temperature = PolicyValue()
    """Of the softmax by which ``predict(deterministic=False)`` chooses; can be changed at any time."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        selection_temperature: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self.selection_temperature = selection_temperature

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic:
            return super()._predict(observation, deterministic)
        with evaluation_mode(self.actor, self.critic_target):
            features = self.actor.features(observation)
            noise = self.actor.draw_noise(len(features), self.counts_in_use.to_draw(self.n_behavior_candidates))
            candidates = self.actor.sample_candidates(features, noise)
            q_values = self.critic_target.score(self.critic_target.features(observation), candidates)
        q_values = self.counts_in_use.restricted(q_values)
        return select(candidates, softmax_choice(q_values, self.selection_temperature, th.rand_like(q_values)))

    def _best_action(self, observation: PyTorchObs, noise: th.Tensor | int) -> th.Tensor:
        # A single candidate asks no critic
        return best_candidate(*self.score_candidates(observation, noise, only_to_choose=True)[1:])

    def _scores_as_known(self) -> bool:
        # Compiled decisions take the best candidate
        return False
