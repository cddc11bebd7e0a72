"""
Weights of the variational loss, Secs. 4.2 and 4.3 of the QVPO paper. All functions are pure.

=====================  =================================================  ============
variable               symbol in the paper                                shape
=====================  =================================================  ============
``q_values``           Q(s, a_i), i = 1 ... N_d                           (B, N_d)
mean of ``q_values``   V(s)                                               (B,)
``weights``            omega_eq(s, a_i)                                   (B, N_d)
``best_weights``       omega_eq(s, a_max)                                 (B,)
``ent_coef``           omega_ent                                          scalar
``uniform_actions``    a_1 ... a_{N_e} from the uniform distribution      (B, N_e, A)
=====================  =================================================  ============
"""

from collections.abc import Callable

import torch as th

from sb3_qvpo.common.candidates import select

QWeighting = Callable[[th.Tensor], th.Tensor]

QCUT_EPSILON = 1e-3
"""The small weight of actions with a negative value under ``qcut``; the paper gives no number."""


def qadv(q_values: th.Tensor) -> th.Tensor:
    """
    Advantage weights, Eq. 9: ``max(Q(s, a) - V(s), 0)`` with V(s) the mean over the state's candidates.

    :param q_values: Values of the candidates, shape (B, K).
    :return: Weights of shape (B, K), at least 0.
    """
    return (q_values - q_values.mean(dim=1, keepdim=True)).clamp(min=0)


def qcut(q_values: th.Tensor, epsilon: float = QCUT_EPSILON) -> th.Tensor:
    """
    Cut-off weights, Sec. 4.2: the best action gets ``Q(s, a)`` if that is at least 0, else a small ``epsilon``; all others 0.

    :param q_values: Values of the candidates, shape (B, K).
    :param epsilon: Weight of a best action with a negative value.
    :return: Weights of shape (B, K), at least 0.
    """
    best_values, best = q_values.max(dim=1, keepdim=True)
    # Cutting before choosing would let an action with a negative value overtake one with a value between 0 and epsilon
    return th.zeros_like(q_values).scatter(1, best, th.where(best_values >= 0, best_values, epsilon))


def qadv_normalized(q_values: th.Tensor) -> th.Tensor:
    """
    Advantage weights in units of the state's own spread: ``max(Q(s, a) - V(s), 0) / deviation over the candidates of Q``.

    With Eq. 9 a state counts by how much its candidates differ in value, so states with steep critics decide the batch. Here
    each state counts alike. Where all candidates are worth the same, the weights are 0.

    :param q_values: Values of the candidates, shape (B, K).
    :return: Weights of shape (B, K), in [0, sqrt(K - 1)].
    """
    # Values that differ by rounding errors alone must not count as much as others
    scale = q_values.abs().amax(dim=1, keepdim=True) * SMALLEST_SPREAD
    deviations = q_values.std(dim=1, keepdim=True, correction=0).maximum(scale.clamp(min=th.finfo(q_values.dtype).tiny))
    return qadv(q_values) / deviations


SMALLEST_SPREAD = 1e-6
"""Deviation of a state's values, relative to the largest, below which they count as equal: float32 rounds at 1e-7."""

Q_WEIGHTINGS: dict[str, QWeighting] = {"qadv": qadv, "qadv_normalized": qadv_normalized, "qcut": qcut}
"""The weightings that can be asked for by name."""


def resolve_q_weighting(
    q_weighting: str | Callable[[th.Tensor], th.Tensor],
    n_train_candidates: int,
    device: th.device | str = "cpu",
    n_improvement_steps: int = 0,
) -> QWeighting:
    """
    The weighting function for a name, or the function itself after a trial.

    :param q_weighting: ``"qadv"``, ``"qadv_normalized"``, ``"qcut"`` or a function from values (B, K) to weights (B, K).
    :param n_train_candidates: N_d.
    :param device: Where the values will be.
    :param n_improvement_steps: m; K is N_d + m.
    :return: The function.
    :raises ValueError: For an unknown name, ``qadv`` with fewer than two candidates, or a function whose weights have
        another shape, are negative or not finite.
    """
    n_candidates = n_train_candidates + n_improvement_steps
    if isinstance(q_weighting, str):
        if q_weighting not in Q_WEIGHTINGS:
            known = ", ".join(repr(name) for name in Q_WEIGHTINGS)
            raise ValueError(f"q_weighting must be one of {known} or a function (B, K) -> (B, K), got {q_weighting!r}")
        if q_weighting.startswith("qadv") and n_candidates < 2:
            raise ValueError(
                f"n_train_candidates must be a whole number of at least 2 with q_weighting={q_weighting!r} (the advantage of "
                f"a single action is always 0), got {n_train_candidates}"
            )
        return Q_WEIGHTINGS[q_weighting]
    if not callable(q_weighting):
        raise ValueError(f"q_weighting must be a name or a function (B, K) -> (B, K), got {q_weighting!r}")
    trial = th.linspace(-1, 1, 2 * n_candidates, device=device).reshape(2, n_candidates)
    weights = q_weighting(trial)
    if weights.shape != trial.shape or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(
            f"q_weighting must return finite weights of at least 0 and of the shape of its input, {tuple(trial.shape)}, "
            f"got shape {tuple(weights.shape)} with values {weights.flatten().tolist()[:4]}..."
        )
    return q_weighting


def select_training_actions(candidates: th.Tensor, q_values: th.Tensor, weights: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Algorithm 1, line 7: the candidate of largest weight; among equal weights the one of largest value.

    :param candidates: Actions of shape (B, K, A).
    :param q_values: Their values, shape (B, K).
    :param weights: Their weights, shape (B, K).
    :return: The chosen actions a_max, shape (B, A), and their weights, shape (B,).
    """
    # Where all weights are equal (qcut with a best value of exactly 0, say) the value must break the tie
    heaviest = weights == weights.max(dim=1, keepdim=True).values
    index = q_values.masked_fill(~heaviest, -th.inf).argmax(dim=1)
    return select(candidates, index), weights.gather(1, index.unsqueeze(1)).squeeze(1)


def add_uniform_actions(
    best_actions: th.Tensor, best_weights: th.Tensor, uniform_actions: th.Tensor, ent_coef: float | th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Algorithm 1, line 8, for the entropy term of Eq. 10: every uniform action gets the weight
    ``omega_ent(s) = ent_coef * omega_eq(s, a_max)``.

    :param best_actions: a_max, shape (B, A).
    :param best_weights: omega_eq(s, a_max), shape (B,).
    :param uniform_actions: Uniform actions of shape (B, N_e, A).
    :param ent_coef: omega_ent, at least 0.
    :return: Actions of shape (B, 1 + N_e, A), a_max first, and their weights, shape (B, 1 + N_e).
    """
    actions = th.cat([best_actions.unsqueeze(1), uniform_actions], dim=1)
    entropy_weights = (ent_coef * best_weights).unsqueeze(1).expand(-1, uniform_actions.shape[1])
    return actions, th.cat([best_weights.unsqueeze(1), entropy_weights], dim=1)
