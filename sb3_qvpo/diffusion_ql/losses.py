"""
Diffusion-QL's own arithmetic: what it takes from the critics.

Shapes: C critics, B batch, K candidates.
"""

import torch as th


def q_term(q_values: th.Tensor, coin: th.Tensor, data_q_values: th.Tensor | None = None) -> th.Tensor:
    """
    What the policy gains by its actions, in units of the values' size: ``-mean Q_i(s, a) / mean |Q_j|``. A coin chooses the
    critic i; the next one is j. The denominator has no gradient, so that a reward times ten changes nothing.

    :param q_values: Values of the policy's actions, shape (C, B), with gradients.
    :param coin: Uniform in [0, 1), a scalar on the device.
    :param data_q_values: Values of the data's actions, shape (C, B). Where they are given, the denominator is the mean of
        ``|Q_i|`` at these, as in the paper; in the authors' code it is that of ``|Q_j|`` at the policy's actions.
    :return: A scalar.
    """
    n_critics = len(q_values)
    # As a tensor of one number: indexing by a scalar would read it back from a GPU
    chosen = (coin * n_critics).long().clamp(max=n_critics - 1).view(1)
    if data_q_values is None:
        size = q_values.index_select(0, (chosen + 1) % n_critics)
    else:
        size = data_q_values.index_select(0, chosen)
    return -q_values.index_select(0, chosen).mean() / size.detach().abs().mean()


def max_q_target(q_values: th.Tensor) -> th.Tensor:
    """
    The value of the next state: for each critic the largest over candidates, then the smallest critic (Kumar et al., 2020).
    One candidate gives the plain target of Eq. 4.

    :param q_values: Values of the target policy's candidates by the target critics, shape (C, B, K).
    :return: Shape (B, 1).
    """
    return q_values.max(dim=2).values.min(dim=0).values.unsqueeze(1)
