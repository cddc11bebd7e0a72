"""
The bases of algorithms whose critics learn by temporal differences, most of them from the policy's own next actions.

Shapes: B batch, K_t target candidates for each state, A action dimensions, N noises of a chain.
"""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_qvpo.common.off_policy_algorithm import DiffusionOffPolicyAlgorithm, Metrics


class TDAlgorithm(DiffusionOffPolicyAlgorithm):
    """
    Off-policy algorithms whose critics learn by temporal differences.

    :param args: Positional arguments of :class:`DiffusionOffPolicyAlgorithm`.
    :param kwargs: Its keyword arguments.
    """

    def _td_loss(
        self, batch: ReplayBufferSamples, q_values: tuple[th.Tensor, ...], next_values: th.Tensor
    ) -> tuple[th.Tensor, Metrics]:
        """
        The critics' loss from both sides of the TD error.

        :param batch: Transitions.
        :param q_values: Predictions of each critic, shape (B, M).
        :param next_values: What the target takes from the next state, shape (B, M).
        :return: The loss and its metrics.
        """
        # n-step buffers hand out gamma^n of each transition
        discounts = self.gamma if batch.discounts is None else batch.discounts
        target_q_values = batch.rewards + (1 - batch.dones) * discounts * next_values
        loss = self.critic.loss(q_values, target_q_values)
        metrics = {"critic_loss": loss, "q_value": self.critic.aggregate(th.stack(q_values).detach()).mean()}
        return loss, metrics


class CandidateTDAlgorithm(TDAlgorithm):
    """
    Off-policy algorithms with the critics' update of QVPO's Algorithm 1, lines 10-11. A subclass writes the actor's.

    :param args: Positional arguments of :class:`TDAlgorithm`.
    :param n_target_candidates: K_t, best of this many candidates in the TD target.
    :param kwargs: Its keyword arguments.
    """

    _count_arguments: ClassVar[tuple[str, ...]] = (*TDAlgorithm._count_arguments, "n_target_candidates")

    def __init__(self, *args: Any, n_target_candidates: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n_target_candidates = n_target_candidates

    def _n_policy_candidates(self) -> int:
        """Candidates for each state that a policy step draws."""
        return 0

    def _chain_rows(self) -> float:
        n_candidates = self.n_target_candidates + self._n_policy_candidates() / self.policy_delay
        return self.batch_size * self.actor.diffusion.n_reverse_steps * n_candidates

    def _update_critics(self, batch: ReplayBufferSamples) -> Metrics:
        target_noise = self.policy.draw_noise(len(batch.rewards), self.n_target_candidates)
        loss, metrics = self._critic_loss(batch, target_noise)
        self._optimize(self.critic.optimizer, "critic_loss", loss)
        return metrics

    def _critic_loss(self, batch: ReplayBufferSamples, target_noise: th.Tensor | int) -> tuple[th.Tensor, Metrics]:
        """
        ``y = r + gamma^n (1 - done) max_i min_c Q'_c(s', a'_i)`` over K_t candidates a'_i of the target actor, and ``sum over
        critics of mean (Q_c(s, a) - y)^2``.

        :param batch: Transitions.
        :param target_noise: Noise of the target actor's chains, shape (N, B, K_t, A), or K_t if it is drawn here.
        :return: The loss and its metrics.
        """
        with th.no_grad():
            # The K_t-efficient target policy takes its best candidate, chosen and valued by the same critics
            # Named only where it matters, because policies of users may not know it
            options = {} if self.critic.bootstraps_from_scores else {"only_to_choose": True}
            next_candidates = self.policy.score_candidates(
                batch.next_observations, target_noise, of="target", for_training=True, **options
            )
        q_values, next_values = self.critic.transition_values(
            batch.observations, batch.actions, batch.next_observations, next_candidates, self.critic_target
        )
        return self._td_loss(batch, q_values, next_values)
