"""
Noise schedules: how much noise each diffusion step adds.

A schedule is a pure function of the number of steps T. It returns the variances ``betas`` of Eq. 1 of the QVPO paper,
``q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)``, as a float64 tensor of shape (T,) with values in (0, 1).

==============  ===========================  ======
variable        symbol                       shape
==============  ===========================  ======
``betas``       beta_t                       (T,)
``alpha_bars``  product of (1 - beta_s)      (T+1,)
==============  ===========================  ======
"""

import math
from collections.abc import Callable

import torch as th

NoiseSchedule = Callable[[int], th.Tensor]

MAX_BETA = 0.999
"""Largest variance of a step: a beta of 1 would erase the action and make the reverse step divide by zero."""


def cosine_betas(n_steps: int, offset: float = 0.008) -> th.Tensor:
    """
    Cosine schedule: ``alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2)`` and
    ``beta_t = 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T)``.

    Source: Nichol and Dhariwal (2021), *Improved Denoising Diffusion Probabilistic Models*, Eq. 17. It is the schedule of
    the QVPO authors' code.

    :param n_steps: Number of diffusion steps T, at least 1.
    :param offset: The small offset s that keeps the first steps from being too small.
    :return: Variances of shape (T,), float64, each in (0, 0.999].
    """
    grid = th.linspace(0, 1, n_steps + 1, dtype=th.float64)
    alpha_bars = th.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=MAX_BETA)


def vp_betas(n_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> th.Tensor:
    """
    Variance-preserving schedule: ``1 - beta_t = exp(-beta_min / T - (beta_max - beta_min) (2t - 1) / (2 T^2))``, t = 1 ... T.

    It is the exact discretisation of the variance-preserving diffusion whose rate grows linearly from ``beta_min`` to
    ``beta_max``.

    Source: Song et al. (2021), *Score-Based Generative Modeling through Stochastic Differential Equations*, Appendix C. The
    constants are those of Xiao et al. (2022), *Tackling the Generative Learning Trilemma with Denoising Diffusion GANs*.

    :param n_steps: Number of diffusion steps T, at least 1.
    :param beta_min: Rate at the first step.
    :param beta_max: Rate at the last step.
    :return: Variances of shape (T,), float64, each in (0, 1).
    """
    t = th.arange(1, n_steps + 1, dtype=th.float64)
    return 1 - th.exp(-beta_min / n_steps - (beta_max - beta_min) * (2 * t - 1) / (2 * n_steps**2))


def linear_betas(n_steps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> th.Tensor:
    """
    Linear schedule of 1000 steps from ``beta_start`` to ``beta_end``, re-spaced to T: ``beta_i = 1 - alpha_bar(S_i) /
    alpha_bar(S_{i-1})`` at T evenly spaced steps S_i of the 1000.

    Source: Ho et al. (2020), *Denoising Diffusion Probabilistic Models*, Sec. 4, whose constants are meant for 1000 steps.
    Re-spacing is that of Nichol and Dhariwal (2021), Sec. 4. Above 1000 steps the variances are scaled by 1000 / T instead.

    With only 20 steps the constants themselves would leave 90 % of the action's amplitude in x_T, while the reverse chain
    starts from pure noise. ``lambda n: th.linspace(1e-4, 2e-2, n)`` as noise schedule gives them all the same.

    :param n_steps: Number of diffusion steps T, at least 1.
    :param beta_start: First variance at 1000 steps.
    :param beta_end: Last variance at 1000 steps.
    :return: Variances of shape (T,), float64, each in (0, 1).
    """
    fine_steps = max(1000, n_steps)
    fine_betas = th.linspace(beta_start, beta_end, fine_steps, dtype=th.float64) * (1000 / fine_steps)
    fine_alpha_bars = th.cat([th.ones(1, dtype=th.float64), th.cumprod(1 - fine_betas, dim=0)])
    steps = th.linspace(0, fine_steps, n_steps + 1, dtype=th.float64).round().long()
    alpha_bars = fine_alpha_bars[steps]
    return 1 - alpha_bars[1:] / alpha_bars[:-1]


class FixedSchedule:
    """
    A schedule with given values: what becomes of a function when a policy is saved.

    :param betas: Variances of shape (T,).
    """

    def __init__(self, betas: th.Tensor):
        self.betas = betas

    def __call__(self, n_steps: int) -> th.Tensor:
        """
        The values.

        :param n_steps: Number of diffusion steps T, which must be the number of values.
        :return: Variances of shape (T,).
        :raises ValueError: If T is another number.
        """
        if n_steps != len(self.betas):
            raise ValueError(f"n_diffusion_steps must be {len(self.betas)}, the length of the saved schedule, got {n_steps}")
        return self.betas


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {"cosine": cosine_betas, "vp": vp_betas, "linear": linear_betas}
"""The schedules that can be asked for by name."""


def make_betas(noise_schedule: str | NoiseSchedule, n_steps: int) -> th.Tensor:
    """
    The variances of a schedule given by name or as a function.

    :param noise_schedule: ``"cosine"``, ``"vp"``, ``"linear"``, or a function from the number of steps T to a tensor (T,).
    :param n_steps: Number of diffusion steps T, at least 1.
    :return: Variances of shape (T,), float64, each in (0, 1).
    :raises ValueError: If the name is unknown, ``n_steps`` is below 1, or a function returns anything but T values in (0, 1).
    """
    if n_steps < 1:
        raise ValueError(f"n_diffusion_steps must be at least 1, got {n_steps}")
    if isinstance(noise_schedule, str):
        if noise_schedule not in NOISE_SCHEDULES:
            known = ", ".join(repr(name) for name in NOISE_SCHEDULES)
            raise ValueError(f"noise_schedule must be one of {known} or a function T -> betas, got {noise_schedule!r}")
        noise_schedule = NOISE_SCHEDULES[noise_schedule]
    if not callable(noise_schedule):
        raise ValueError(f"noise_schedule must be a name or a function T -> betas, got {noise_schedule!r}")
    betas = th.as_tensor(noise_schedule(n_steps), dtype=th.float64)
    if betas.shape != (n_steps,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"noise_schedule must return {n_steps} values in (0, 1), got {betas.tolist()}")
    return betas
