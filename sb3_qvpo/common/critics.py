"""
Critics beside clipped double Q-learning: batch-normalised ones without target networks (CrossQ), and quantiles (TQC).

Shapes: B batch, K candidates for each state, A action dimensions, C critics, M quantiles of each.

======================================  ======================  ===========================================
argument or variable                    symbol                  meaning
======================================  ======================  ===========================================
``n_quantiles``                         M                       quantiles of each critic
``top_quantiles_to_drop_per_net``       d                       largest quantiles left out, for each critic
``fractions``                           tau_m = (2m - 1) / 2M   cumulative probability of each quantile
``pessimism``                           beta                    how far below the critics' mean a value is
======================================  ======================  ===========================================
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, cast

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.actor_critic import CandidateCritic
from sb3_qvpo.common.arguments import check_count, check_interval
from sb3_qvpo.common.candidates import ScoredCandidates, best_candidate
from sb3_qvpo.common.networks import BatchRenorm1d, evaluation_mode


def join_observations(first: PyTorchObs, second: PyTorchObs) -> PyTorchObs:
    """
    Two batches of observations as one.

    :param first: A tensor (B, ...) or a dictionary of them.
    :param second: Another one of the same kind.
    :return: Both, the first one first.
    """
    if isinstance(first, dict):
        return {key: th.cat([value, cast(dict[str, th.Tensor], second)[key]]) for key, value in first.items()}
    return th.cat([first, cast(th.Tensor, second)])


class BatchNormCritic(CandidateCritic):
    """
    Critics with batch normalisation and without target networks.

    Each linear layer has a norm before it. In the loss, (s, a) of the buffer and (s', a') of the policy go through the
    networks in one pass, so both are normalised by the statistics of their mixture. Then values need no lagging copy to be
    stable, and spread at the critics' own speed. Candidates are scored with the running statistics.

    Source: Bhatt et al. (2024), *CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample Efficiency
    and Simplicity*, Sec. 3. Epsilon and momentum are those of sb3-contrib's CrossQ.

    :param args: Positional arguments of :class:`CandidateCritic`.
    :param renorm_start: Updates after which :class:`~sb3_qvpo.common.networks.BatchRenorm1d` normalises by running statistics
        in the loss too, at least 0. Never if None. sb3-contrib's CrossQ does so after 100 000.
    :param pessimism: beta in [0, 1]: a value is ``mean_c Q_c - beta (mean_c Q_c - min_c Q_c)``. 1 for the minimum, as in the
        paper. With two critics this is their mean less beta standard deviations.
    :param kwargs: Keyword arguments of :class:`CandidateCritic`.
    :raises ValueError: If ``renorm_start`` is no whole number of at least 0, or given where ``norm_class`` is another. If
        ``pessimism`` is not in its range.
    """

    has_targets: ClassVar[bool] = False
    bootstraps_from_scores: ClassVar[bool] = False

    norm_class: ClassVar[Any] = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
    """From a number of inputs to a layer, unless ``renorm_start`` asks for another."""

    def __init__(self, *args: Any, renorm_start: int | None = None, pessimism: float = 1.0, **kwargs: Any):
        self.pessimism = check_interval("pessimism", pessimism, 0, 1)
        if renorm_start is not None:
            check_count("renorm_start", renorm_start, 0)
            if type(self).norm_class is not BatchNormCritic.norm_class:
                raise ValueError(f"renorm_start must be left out, got {renorm_start}: {type(self).__name__} has its own norms")
        self._renorm_start = renorm_start
        super().__init__(*args, **kwargs)

    def make_q_network(self, n_inputs: int, net_arch: list[int], activation_fn: type[nn.Module]) -> nn.Module:
        """
        Create the network of one critic: a norm before each linear layer.

        :param n_inputs: Number of inputs, S + A.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :return: A network from rows (R, S + A) to (R, 1).
        """
        renorm = None if self._renorm_start is None else partial(BatchRenorm1d, start=self._renorm_start)
        norm = cast(type[nn.Module], renorm or type(self).norm_class)
        return nn.Sequential(*create_mlp(n_inputs, 1, net_arch, activation_fn, pre_linear_modules=[norm]))

    def aggregate(self, q_values: th.Tensor) -> th.Tensor:
        """
        One value from the predictions of all critics, between their mean and their minimum.

        Each backup takes it again. So what the minimum lies below the mean adds up, to 1 / (1 - gamma) times as much where an
        episode goes on.

        Source: Moskovitz et al. (2021), *Tactical Optimism and Pessimism for Deep Reinforcement Learning*, whose beta has the
        other sign.

        :param q_values: Predictions of shape (C, ..., 1).
        :return: Values of shape (...).
        """
        lowest = super().aggregate(q_values)
        return lowest if self.pessimism == 1 else q_values.squeeze(-1).mean(dim=0).lerp(lowest, self.pessimism)

    def bootstrap(self, features: th.Tensor, candidates: th.Tensor, scores: th.Tensor) -> th.Tensor:
        """
        The value of the best next candidate, with running statistics. The loss takes it from :meth:`transition_values`.

        :param features: Features of the next states, shape (B, S).
        :param candidates: Candidates of the next states, shape (B, K, A).
        :param scores: Scores of these candidates, shape (B, K), by which one is chosen.
        :return: Values of shape (B, 1).
        """
        with evaluation_mode(self):
            return self.score(features, best_candidate(candidates, scores).unsqueeze(1))

    def transition_values(
        self,
        observation: PyTorchObs,
        actions: th.Tensor,
        next_observation: PyTorchObs,
        next_candidates: ScoredCandidates,
        target: CandidateCritic,
    ) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """
        Predictions for (s, a) and values of (s', a') in one pass. In training mode it moves the running statistics, those of
        frozen critics apart, and none to a number that is not finite.

        :param observation: B observations s.
        :param actions: Actions a of the buffer, shape (B, A).
        :param next_observation: The B next observations s'.
        :param next_candidates: Candidates of the next states; the best is a'.
        :param target: Not used: there are no target critics.
        :return: Predictions of each critic, shape (B, 1), with gradients; and what :meth:`aggregate` makes of them for
            (s', a'), (B, 1), without.
        """
        next_actions = best_candidate(next_candidates.candidates, next_candidates.scores)
        is_frozen = not any(parameter.requires_grad for net in self.q_networks for parameter in net.parameters())
        statistics = [buffer for net in self.q_networks for buffer in net.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in statistics]
        with evaluation_mode(self) if is_frozen else nullcontext():
            both = self(join_observations(observation, next_observation), th.cat([actions, next_actions]))
        for buffer, old in zip(statistics, before, strict=True):
            # Past the check of autograd: the gradient needs the statistics of the batch, not these
            buffer.data.copy_(th.where(buffer.isfinite(), buffer, old))
        q_values, next_q_values = zip(*(predictions.chunk(2) for predictions in both), strict=True)
        return q_values, self.aggregate(th.stack(next_q_values).detach()).unsqueeze(1)


class QuantileCritic(CandidateCritic):
    """
    Critics that predict quantiles of the return. The largest of all critics' pooled quantiles are left out of the TD target,
    which holds back overestimation. Candidates are scored by the mean of all quantiles.

    Source: Kuznetsov et al. (2020), *Controlling Overestimation Bias with Truncated Mixture of Continuous Distributional
    Quantile Critics*, Sec. 3. M = 25 and d = 2 are its Table 5.

    :param args: Positional arguments of :class:`CandidateCritic`.
    :param n_quantiles: M, at least 1.
    :param top_quantiles_to_drop_per_net: d, below M: C d of the C M pooled quantiles are left out.
    :param kwargs: Keyword arguments of :class:`CandidateCritic`.
    :raises ValueError: If M is below 1, or d not in 0 ... M-1.
    """

    bootstraps_from_scores: ClassVar[bool] = False

    fractions: th.Tensor

    def __init__(self, *args: Any, n_quantiles: int = 25, top_quantiles_to_drop_per_net: int = 2, **kwargs: Any):
        self._n_quantiles = check_count("n_quantiles", n_quantiles)
        if check_count("top_quantiles_to_drop_per_net", top_quantiles_to_drop_per_net, 0) >= n_quantiles:
            raise ValueError(
                f"top_quantiles_to_drop_per_net must be below n_quantiles = {n_quantiles}, got {top_quantiles_to_drop_per_net}"
            )
        super().__init__(*args, **kwargs)
        self.n_kept = (n_quantiles - top_quantiles_to_drop_per_net) * self.n_critics
        fractions = (th.arange(n_quantiles, dtype=th.float32) + 0.5) / n_quantiles
        self.register_buffer("fractions", fractions, persistent=False)

    def make_q_network(self, n_inputs: int, net_arch: list[int], activation_fn: type[nn.Module]) -> nn.Module:
        """
        Create the network of one critic, with M outputs.

        :param n_inputs: Number of inputs, S + A.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :return: A network from rows (R, S + A) to (R, M).
        """
        return nn.Sequential(*create_mlp(n_inputs, self._n_quantiles, net_arch, activation_fn))

    def aggregate(self, q_values: th.Tensor) -> th.Tensor:
        """
        The mean of all quantiles of all critics.

        :param q_values: Predictions of shape (C, ..., M).
        :return: Values of shape (...).
        """
        return q_values.mean(dim=(0, -1))

    def truncated(self, q_values: th.Tensor) -> th.Tensor:
        """
        The pooled quantiles of all critics without the largest C d, ascending.

        :param q_values: Predictions of shape (C, ..., M).
        :return: Quantiles of shape (..., C (M - d)).
        """
        return q_values.movedim(0, -2).flatten(-2).sort(dim=-1).values[..., : self.n_kept]

    def bootstrap(self, features: th.Tensor, candidates: th.Tensor, scores: th.Tensor) -> th.Tensor:
        """
        The truncated mixture of the best next candidate.

        :param features: Features of the next states, shape (B, S).
        :param candidates: Candidates of the next states, shape (B, K, A).
        :param scores: Scores of these candidates, shape (B, K), by which one is chosen.
        :return: Quantiles of shape (B, C (M - d)).
        """
        best = best_candidate(candidates, scores).unsqueeze(1)
        return self.truncated(self.value_candidates(features, best)).squeeze(1)

    def loss(self, q_values: tuple[th.Tensor, ...], targets: th.Tensor) -> th.Tensor:
        """
        Quantile Huber loss, Eq. 13 there: ``sum over critics, mean over samples, quantiles and targets of
        |tau_m - 1(y < theta_m)| huber(y - theta_m)``.

        :param q_values: Quantiles theta of each critic, shape (B, M).
        :param targets: Target quantiles y, shape (B, C (M - d)).
        :return: A scalar.
        """
        fractions = self.fractions.view(1, 1, -1, 1)
        errors = targets.unsqueeze(1).unsqueeze(1) - th.stack(q_values, dim=1).unsqueeze(-1)  # (B, C, M, targets)
        huber = F.huber_loss(errors, th.zeros_like(errors), reduction="none")
        asymmetric = (fractions - (errors.detach() < 0).to(fractions)).abs() * huber
        return asymmetric.mean(dim=(0, 2, 3)).sum()


CRITIC_OPTIONS: dict[str, tuple[str, type[CandidateCritic]]] = {
    "n_quantiles": ("quantile", QuantileCritic),
    "top_quantiles_to_drop_per_net": ("quantile", QuantileCritic),
    "renorm_start": ("crossq", BatchNormCritic),
    "pessimism": ("crossq", BatchNormCritic),
}
"""Arguments that not all critics have: the ``critic_type`` that has them, and its class."""


def critic_options(critic_class: type[CandidateCritic], arguments: Mapping[str, Any]) -> dict[str, float]:
    """
    The arguments that were given and that not all critics have.

    :param critic_class: Class of a policy's critics.
    :param arguments: Arguments of the policy. Those of :data:`CRITIC_OPTIONS` are None if they were not given.
    :return: Those of :data:`CRITIC_OPTIONS` that are not None.
    :raises ValueError: If there are any that these critics do not have.
    """
    given = {name: arguments[name] for name in CRITIC_OPTIONS if arguments[name] is not None}
    for name, value in given.items():
        critic_type, owner = CRITIC_OPTIONS[name]
        if not issubclass(critic_class, owner):
            reason = f"{critic_class.__name__} does not have it, but critic_type={critic_type!r}"
            raise ValueError(f"{name} must be left out, got {value!r}: {reason}")
    return given
