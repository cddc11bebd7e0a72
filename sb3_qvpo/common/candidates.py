"""
Choosing among candidate actions by their value.

Shapes: B batch, K candidates for each state, A action dimensions, S state features. Candidates are always (B, K, A), their
values (B, K). All functions are pure.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch as th
from torch.nn import functional as F


class Critic(Protocol):
    """What improving a candidate needs of the critics."""

    def score(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        The value of each candidate.

        :param features: State features of shape (B, S).
        :param candidates: Actions of shape (B, K, A).
        :return: Values of shape (B, K).
        """

    def action_gradient(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The value of one action for each state, and its gradient with respect to the action.

        :param features: State features of shape (B, S).
        :param actions: Actions of shape (B, A).
        :return: Values of shape (B,), and gradients of shape (B, A).
        """


class ScoredCandidates(NamedTuple):
    """
    The candidates of B states and their scores.

    :param features: State features of the critics that scored them, shape (B, S).
    :param candidates: Actions of shape (B, K, A).
    :param scores: Value of each candidate, shape (B, K).
    """

    features: th.Tensor
    candidates: th.Tensor
    scores: th.Tensor


def select(candidates: th.Tensor, index: th.Tensor) -> th.Tensor:
    """
    One candidate for each state.

    :param candidates: Actions of shape (B, K, A).
    :param index: Which candidate, in 0 ... K-1, shape (B,).
    :return: Actions of shape (B, A).
    """
    return candidates.gather(1, index.view(-1, 1, 1).expand(-1, 1, candidates.shape[-1])).squeeze(1)


def best_candidate(candidates: th.Tensor, q_values: th.Tensor) -> th.Tensor:
    """
    The K-efficient policy of Sec. 4.4: ``pi^K(s) = argmax over a in {a_1 ... a_K} of Q(s, a)``.

    :param candidates: Actions of shape (B, K, A).
    :param q_values: Their values, shape (B, K).
    :return: Best action of each state, shape (B, A).
    """
    return select(candidates, q_values.argmax(dim=1))


def only_first(q_values: th.Tensor, counts: Sequence[int]) -> th.Tensor:
    """
    Values among which the best one is one of the first candidates.

    :param q_values: Values of shape (B, K).
    :param counts: For each state how many candidates take part, B numbers of at least 1.
    :return: The same values, -inf for candidates that do not take part.
    """
    number = th.arange(q_values.shape[1], device=q_values.device)
    return q_values.masked_fill(number >= th.tensor(counts, device=q_values.device).unsqueeze(1), -th.inf)


def softmax_choice(q_values: th.Tensor, temperature: float, uniform: th.Tensor) -> th.Tensor:
    """
    One candidate of each state, with probability ``e^(Q / temperature)`` over the sum: Gumbel's trick.

    :param q_values: Values of shape (B, K).
    :param temperature: Above 0; towards 0 the best one.
    :param uniform: Uniform in [0, 1), shape (B, K).
    :return: Their numbers, shape (B,).
    """
    smallest = th.finfo(uniform.dtype).tiny
    gumbel = -(-uniform.clamp(min=smallest).log()).clamp(min=smallest).log()
    return (q_values / temperature + gumbel).argmax(dim=1)


def improve_best_candidate(scored: ScoredCandidates, critic: Critic, n_steps: int, step_length: float) -> ScoredCandidates:
    """
    Gradient steps from the best candidate, ``a_(j+1) = clamp(a_j + step_length g / |g|, -1, 1)`` with g the gradient of the
    score at a_j. Each a_j with j >= 1 becomes a candidate. So a step that makes the action worse is never chosen.

    :param scored: K candidates for each state, and their scores. The score of a single one is not read: the first step
        values it.
    :param critic: The critics that scored them, in evaluation mode.
    :param n_steps: m, gradient steps.
    :param step_length: Euclidean length of each step.
    :return: K + m candidates for each state, and their scores.
    """
    action = best_candidate(scored.candidates, scored.scores)
    actions, scores = [scored.candidates], [scored.scores]
    for step in range(n_steps):
        score, gradient = critic.action_gradient(scored.features, action)
        if step == 0 and scored.candidates.shape[1] == 1:
            scores[0] = score.unsqueeze(1)
        elif step > 0:
            scores.append(score.unsqueeze(1))
        action = (action + step_length * F.normalize(gradient, dim=1)).clamp(-1, 1)
        actions.append(action.unsqueeze(1))
    if n_steps > 0:
        scores.append(critic.score(scored.features, actions[-1]))
    return ScoredCandidates(scored.features, th.cat(actions, dim=1), th.cat(scores, dim=1))


def candidate_std(candidates: th.Tensor) -> th.Tensor:
    """
    How spread out the candidates of a state are: standard deviation over candidates, averaged over dimensions and states.

    :param candidates: Actions of shape (B, K, A).
    :return: A scalar, 0 if all candidates of each state coincide.
    """
    return candidates.std(dim=1, correction=0).mean()


def critic_contrast(q_values: th.Tensor) -> th.Tensor:
    """
    How much the best candidate stands out: ``mean over states of (max - mean over candidates of Q)``.

    :param q_values: Values of shape (B, K).
    :return: A scalar of at least 0; towards 0 the policy has narrowed so far that choosing the best teaches nothing.
    """
    return (q_values.max(dim=1).values - q_values.mean(dim=1)).mean()
