"""
What SDAC's noise predictor learns: the posterior mean of a noisy action under the policy ``exp(Q / temperature) / Z``.

Shapes: B batch, M clean actions for each state, A action dimensions. A noisy action is x of shape (B, 1, A). Forward noising
is ``x = signal a + noise_level epsilon``, with signal ``sqrt(bar alpha_t)`` and noise_level ``sqrt(1 - bar alpha_t)`` of
shape (B, 1, 1). All functions are pure.
"""

import math

import torch as th

BOXES = ("truncated", "clip")
"""What to do with clean actions beyond [-1, 1]."""


def _box_in_deviations(mean: th.Tensor, std: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    The ends of [-1, 1] in deviations from a mean, mirrored where they lie to the right of it. Small probabilities keep their
    digits, those near 1 do not.

    :param mean: Means, shape (B, 1, A).
    :param std: Deviations above 0, shape (B, 1, 1).
    :return: The lower end, the upper end, and whether they are mirrored, each of shape (B, 1, A).
    """
    low, high = (-1 - mean) / std, (1 - mean) / std
    mirrored = low + high > 0
    return th.where(mirrored, -high, low), th.where(mirrored, -low, high), mirrored


def truncated_actions(noisy: th.Tensor, signal: th.Tensor, noise_level: th.Tensor, uniforms: th.Tensor) -> th.Tensor:
    """
    Clean actions around a noisy one: ``N(x / signal, (noise_level / signal)^2 I)`` cut to the box [-1, 1], by the inverse of
    its distribution function. With weights ``exp(Q / temperature)`` their mean is the exact posterior mean in the box.

    :param noisy: x, shape (B, 1, A).
    :param signal: ``sqrt(bar alpha_t)``, shape (B, 1, 1).
    :param noise_level: ``sqrt(1 - bar alpha_t)``, shape (B, 1, 1).
    :param uniforms: Uniform numbers in [0, 1), shape (B, M, A).
    :return: Actions of shape (B, M, A) in [-1, 1].
    """
    mean, std = noisy / signal, noise_level / signal
    low, high, mirrored = _box_in_deviations(mean, std)
    # 0 and 1 are the ends of the box, however unlikely
    uniforms = uniforms.clamp(2**-24, 1 - 2**-24)
    # Not by ndtr, whose float32 version is 0 from six deviations on
    below, above = (th.erfc(end * -math.sqrt(0.5)) / 2 for end in (low, high))
    normals = th.special.ndtri(below + th.where(mirrored, 1 - uniforms, uniforms) * (above - below))
    # Where even those digits are used up, all mass is at the near edge
    normals = th.where(normals.isfinite(), normals, high)
    return (mean + std * th.where(mirrored, -normals, normals)).clamp(-1, 1)


def unbounded_actions(noisy: th.Tensor, signal: th.Tensor, noise_level: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """
    Clean actions around a noisy one without regard to the box, ``(x - noise_level epsilon) / signal``: the reverse-sampling
    distribution of the paper.

    :param noisy: x, shape (B, 1, A).
    :param signal: ``sqrt(bar alpha_t)``, shape (B, 1, 1).
    :param noise_level: ``sqrt(1 - bar alpha_t)``, shape (B, 1, 1).
    :param noise: Standard normal noise epsilon, shape (B, M, A).
    :return: Actions of shape (B, M, A).
    """
    return (noisy - noise_level * noise) / signal


def log_truncated_density(actions: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Logarithm of the density of ``N(mean, std^2 I)`` cut to the box [-1, 1].

    :param actions: Actions of shape (B, M, A) in [-1, 1].
    :param mean: Means, shape (B, 1, A), also beyond the box.
    :param std: Deviations above 0, shape (B, 1, 1).
    :return: Log densities of shape (B, M).
    """
    low, high, _ = _box_in_deviations(mean, std)
    above, below = th.special.log_ndtr(high), th.special.log_ndtr(low)
    # The ends differ, even where the box is too narrow for the digits of their probabilities
    log_mass = above + (-th.expm1((below - above).clamp(max=-th.finfo(above.dtype).eps))).log()
    exponents = -0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    densities: th.Tensor = (exponents - log_mass).sum(dim=-1)
    return densities


def log_importance(log_wanted: th.Tensor, log_other: th.Tensor, share: float) -> th.Tensor:
    """
    How much draws of a mixture count where those of one of its parts were wanted: ``log(p / ((1 - share) p + share q))``. The
    balance heuristic of Veach and Guibas (1995), which stays bounded however rare a draw is under p.

    :param log_wanted: log p of each draw, shape (B, M).
    :param log_other: log q of each draw, shape (B, M).
    :param share: Which share of the draws is from q, in (0, 1).
    :return: Logarithms of the ratio, shape (B, M), at most ``-log(1 - share)``.
    """
    ratio = log_other - log_wanted
    return -th.logaddexp(th.full_like(ratio, math.log1p(-share)), ratio + math.log(share))


def mixed_actions(
    noisy: th.Tensor,
    signal: th.Tensor,
    noise_level: th.Tensor,
    improved: th.Tensor,
    improved_std: float,
    uniforms: th.Tensor,
    n_improved: int,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Clean actions of which some surround another action than the noisy one, and how much each counts.

    :param noisy: x, shape (B, 1, A).
    :param signal: ``sqrt(bar alpha_t)``, shape (B, 1, 1).
    :param noise_level: ``sqrt(1 - bar alpha_t)``, shape (B, 1, 1).
    :param improved: The other action, shape (B, 1, A) in [-1, 1].
    :param improved_std: Deviation of the draws around it, above 0.
    :param uniforms: Uniform numbers in [0, 1), shape (B, M, A).
    :param n_improved: How many of the M surround it, the first ones.
    :return: Actions of shape (B, M, A) in [-1, 1], and what :func:`log_importance` says of them, (B, M).
    """
    one, width = th.ones_like(signal), th.full_like(signal, improved_std)
    around = truncated_actions(improved, one, width, uniforms[:, :n_improved])
    clean = th.cat([around, truncated_actions(noisy, signal, noise_level, uniforms[:, n_improved:])], dim=1)
    log_wanted = log_truncated_density(clean, noisy / signal, noise_level / signal)
    log_other = log_truncated_density(clean, improved, width)
    return clean, log_importance(log_wanted, log_other, n_improved / clean.shape[1])


def boltzmann_weights(q_values: th.Tensor, temperature: float | th.Tensor, log_ratios: float | th.Tensor = 0.0) -> th.Tensor:
    """
    ``softmax over M of Q / temperature``. Factors that all M have in common do not change the minimiser of the loss.

    :param q_values: Values of shape (B, M).
    :param temperature: lambda, above 0.
    :param log_ratios: What :func:`log_importance` returned for draws of a mixture, shape (B, M); added to the exponents.
    :return: Weights of shape (B, M) that add up to 1.
    """
    return (q_values / temperature + log_ratios).softmax(dim=1)


def posterior_mean(clean: th.Tensor, weights: th.Tensor) -> th.Tensor:
    """
    The weighted mean of the clean actions. One row with this mean as its target has the gradient of M weighted rows.

    :param clean: Actions of shape (B, M, A).
    :param weights: Weights of shape (B, M) that add up to 1.
    :return: Mean actions of shape (B, 1, A).
    """
    return (weights.unsqueeze(-1) * clean).sum(dim=1, keepdim=True)


def total_noise_level(signal: th.Tensor, noise_level: th.Tensor, action_noise_std: float | th.Tensor) -> th.Tensor:
    """
    Deviation of a noisy action around ``signal a`` where the policy learns ``a + sigma xi`` in the place of a:
    ``x = signal (a + sigma xi) + noise_level epsilon``.

    :param signal: ``sqrt(bar alpha_t)``, shape (B, 1, 1).
    :param noise_level: ``sqrt(1 - bar alpha_t)``, shape (B, 1, 1).
    :param action_noise_std: sigma, at least 0.
    :return: ``sqrt(noise_level^2 + (signal sigma)^2)``, shape (B, 1, 1).
    """
    return th.hypot(noise_level, signal * action_noise_std)


def with_its_noise(mean_action: th.Tensor, seen: th.Tensor, share: th.Tensor) -> th.Tensor:
    """
    The mean of ``a + sigma xi`` given a noisy action, from the mean of a: ``E[a | x] + share^2 (x / signal - E[a | x])``. Both
    noises are normal, so xi has its share of the distance between them.

    :param mean_action: E[a | x], shape (B, 1, A).
    :param seen: ``x / signal``, shape (B, 1, A).
    :param share: ``signal sigma / total_noise_level``, shape (B, 1, 1), in [0, 1].
    :return: Mean actions of shape (B, 1, A), which may lie outside the box.
    """
    return mean_action + share**2 * (seen - mean_action)


def divergence(weights: th.Tensor) -> th.Tensor:
    """
    By how much the weights prefer some of the M actions: ``KL(weights || uniform) = log M + sum w log w``, mean over states.

    :param weights: Weights of shape (B, M) that add up to 1.
    :return: A scalar in [0, log M].
    """
    negative_entropy: th.Tensor = th.special.xlogy(weights, weights).sum(dim=1).mean()
    return math.log(weights.shape[1]) + negative_entropy
