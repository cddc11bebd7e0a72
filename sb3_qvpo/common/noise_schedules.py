"""
Noise schedules: how much noise each diffusion step adds.

A schedule is a pure function of the number of steps T. It returns the variances ``betas`` of Eq. 1 of the QVPO paper,
``q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)``, as a float64 tensor of shape (T,) with values in (0, 1).

==============  ===========================  ======
variable        symbol                       shape
==============  ===========================  ======
``betas``       beta_t                       (T,)
``alpha_bars``  product of (1 - beta_s)      (T+1,)
``levels``      sigma_t                      (T,)
==============  ===========================  ======

Noise levels are another way to say the same: ``sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)``, noise over signal.
"""

import math
from collections.abc import Callable, Sequence

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


def betas_of_levels(levels: Sequence[float] | th.Tensor) -> th.Tensor:
    """
    Variances of a schedule that is given by its noise levels: ``alpha_bar_t = 1 / (1 + sigma_t^2)``.

    :param levels: sigma_t, shape (T,), above 0 and ascending.
    :return: Variances of shape (T,), float64, each in (0, 1).
    :raises ValueError: If the levels are not above 0 and ascending.
    """
    sigmas = th.as_tensor(levels, dtype=th.float64)
    if sigmas.ndim != 1 or not len(sigmas) or not bool((sigmas.diff(prepend=th.zeros(1, dtype=th.float64)) > 0).all()):
        raise ValueError(f"noise_schedule must be noise levels above 0 in ascending order, got {levels!r}")
    alpha_bars = th.cat([th.ones(1, dtype=th.float64), 1 / (1 + sigmas**2)])
    return 1 - alpha_bars[1:] / alpha_bars[:-1]


def karras_betas(n_steps: int, sigma_min: float = 0.02, sigma_max: float = 3.0, rho: float = 7.0) -> th.Tensor:
    """
    The noise levels of Karras et al., which are denser at low noise:
    ``sigma_i = (sigma_min^(1/rho) + i / (T - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho``, i = 0 ... T-1.

    Source: Karras et al. (2022), *Elucidating the Design Space of Diffusion-Based Generative Models*, Eq. 5. Actions are in
    [-1, 1], so the largest level is lower than for images.

    :param n_steps: Number of diffusion steps T, at least 1.
    :param sigma_min: Smallest noise level.
    :param sigma_max: Largest noise level, that of the only step if T is 1.
    :param rho: How much denser the levels are at low noise.
    :return: Variances of shape (T,), float64, each in (0, 1).
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    share = th.linspace(0, 1, n_steps, dtype=th.float64) if n_steps > 1 else th.ones(1, dtype=th.float64)
    return betas_of_levels((low + share * (high - low)) ** rho)


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


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "cosine": cosine_betas,
    "vp": vp_betas,
    "linear": linear_betas,
    "karras": karras_betas,
}
"""The schedules that can be asked for by name."""


def make_betas(noise_schedule: str | NoiseSchedule | Sequence[float], n_steps: int) -> th.Tensor:
    """
    The variances of a schedule given by name, as a function, or by its noise levels.

    :param noise_schedule: ``"cosine"``, ``"vp"``, ``"linear"``, ``"karras"``, a function from the number of steps T to a
        tensor (T,), or T noise levels sigma_t in ascending order.
    :param n_steps: Number of diffusion steps T, at least 1.
    :return: Variances of shape (T,), float64, each in (0, 1).
    :raises ValueError: If the name is unknown, ``n_steps`` is below 1, a function returns anything but T values in (0, 1), or
        the levels are not T ascending numbers above 0.
    """
    if n_steps < 1:
        raise ValueError(f"n_diffusion_steps must be at least 1, got {n_steps}")
    if isinstance(noise_schedule, str):
        if noise_schedule not in NOISE_SCHEDULES:
            known = ", ".join(repr(name) for name in NOISE_SCHEDULES)
            raise ValueError(
                f"noise_schedule must be one of {known}, a function T -> betas or a list of levels, got {noise_schedule!r}"
            )
        noise_schedule = NOISE_SCHEDULES[noise_schedule]
    if not callable(noise_schedule) and hasattr(noise_schedule, "__len__"):  # NumPy arrays have one, too
        betas = betas_of_levels(noise_schedule)
        if len(betas) != n_steps:
            raise ValueError(f"noise_schedule must have n_diffusion_steps = {n_steps} noise levels, got {len(betas)}")
        return betas
    if not callable(noise_schedule):
        raise ValueError(
            f"noise_schedule must be a name, a function T -> betas or a list of noise levels, got {noise_schedule!r}"
        )
    betas = th.as_tensor(noise_schedule(n_steps), dtype=th.float64)
    if betas.shape != (n_steps,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"noise_schedule must return {n_steps} values in (0, 1), got {betas.tolist()}")
    return betas


def picklable(schedule: str | NoiseSchedule | Sequence[float], n_steps: int) -> str | NoiseSchedule | Sequence[float]:
    """
    A schedule that can be saved. A function may not be picklable (a lambda is not); its values are.

    :param schedule: What :func:`make_betas` takes.
    :param n_steps: Number of diffusion steps T.
    :return: The schedule, or its values where it is a function.
    """
    return FixedSchedule(make_betas(schedule, n_steps)) if callable(schedule) else schedule
