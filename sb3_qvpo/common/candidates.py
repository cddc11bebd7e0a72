"""
Choosing among candidate actions by their value.

Shapes: B batch, K candidates for each state, A action dimensions, C critics. Candidates are always (B, K, A), their
values (B, K). All functions are pure.
"""

import torch as th


def minimum_q(q_values: th.Tensor) -> th.Tensor:
    """
    The minimum over critics, as in SAC and TD3 (clipped double Q-learning); Sec. 5.1 of the QVPO paper uses it throughout.

    :param q_values: Values of shape (C, B, K).
    :return: Values of shape (B, K).
    """
    return q_values.min(dim=0).values


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


def top_candidates(candidates: th.Tensor, q_values: th.Tensor, k: int) -> tuple[th.Tensor, th.Tensor]:
    """
    The k candidates of highest value, best first.

    :param candidates: Actions of shape (B, K, A).
    :param q_values: Their values, shape (B, K).
    :param k: How many to keep, 1 ... K.
    :return: Actions of shape (B, k, A) and their values, shape (B, k).
    """
    values, index = q_values.topk(k, dim=1)
    return candidates.gather(1, index.unsqueeze(-1).expand(-1, -1, candidates.shape[-1])), values


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
