"""
DTQL's own arithmetic: the value function's loss and the density of the Gaussian policy.

Shapes: B batch, A action dimensions.
"""

import math

import torch as th

SHRINK = 1 / (1 + 1e-3)
"""Factor of the data's actions before they are sent through atanh, which is infinite at 1."""


def expectile_loss(errors: th.Tensor, expectile: float) -> th.Tensor:
    """
    Eq. 6: ``mean of |expectile - 1(u < 0)| u^2``. Above 1/2 values that are too low cost more than values that are too high.

    :param errors: u, target minus prediction, of any shape.
    :param expectile: In (0, 1). 1/2 gives half of the mean squared error.
    :return: A scalar.
    """
    weights = (expectile - (errors.detach() < 0).to(errors)).abs()
    return (weights * errors**2).mean()


def squashed_log_density(actions: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log density of ``atanh(a)`` under a normal distribution. The Jacobian of tanh is left out, as no policy changes it.

    :param actions: Actions in [-1, 1], shape (..., A).
    :param mean: Of the normal distribution, shape (..., A).
    :param log_std: Logarithm of its deviation, shape (..., A).
    :return: Sums over dimensions, shape (...).
    """
    before_tanh = (SHRINK * actions).atanh()
    z = (before_tanh - mean) / log_std.exp()
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)
