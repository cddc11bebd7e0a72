"""
Diffusion with continuous noise levels, preconditioned: the EDM of Karras et al. (2022), *Elucidating the Design Space of
Diffusion-Based Generative Models*, in the form that DTQL uses.

Nothing here owns a network or switches gradients off. A *network* is called as ``network(c_in x_t, ln(sigma) / 4, cond)``.

======================  ==================================================  ==========
variable                symbol and meaning                                  shape
======================  ==================================================  ==========
``x0``                  a, the clean action                                 (..., A)
``x_t``                 a + sigma epsilon, the noisy action                 (..., A)
``t``                   sigma, the noise level                              (...)
``noise``               epsilon                                             (..., A)
``sigma_data``          sd, the deviation that the data are taken to have   a number
``c_skip``              sd^2 / (sigma^2 + sd^2)                             (..., 1)
``c_out``               sigma sd / sqrt(sigma^2 + sd^2)                     (..., 1)
``c_in``                1 / sqrt(sigma^2 + sd^2)                            (..., 1)
======================  ==================================================  ==========
"""

import math
from typing import Any, NamedTuple

import torch as th

from sb3_qvpo.common.diffusion import DiffusionProcess, NoiseNetwork


class Scalings(NamedTuple):
    """
    What keeps inputs and targets of the network near deviation 1 at every level.

    :param c_skip: Share of the noisy action in the estimate of the clean one, shape (..., 1).
    :param c_out: Factor of the network's output, shape (..., 1).
    :param c_in: Factor of its input, shape (..., 1).
    """

    c_skip: th.Tensor
    c_out: th.Tensor
    c_in: th.Tensor


class ElucidatedDiffusion(DiffusionProcess):
    """
    The process of DTQL's cloned policy. Levels are log-logistic, with location ln(sd) and scale 1/2, cut to
    [``sigma_min``, ``sigma_max``].

    :param sigma_min: Lowest noise level, above 0.
    :param sigma_max: Highest noise level, above ``sigma_min``.
    :param sigma_data: sd, above 0.
    :param n_sampling_steps: Steps of :meth:`sample`, at least 1. Training takes none.
    :raises ValueError: If a level is out of its range.
    """

    n_noises = 1

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, n_sampling_steps: int = 20):
        super().__init__()
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"sigma_min and sigma_max must be ascending, finite and above 0, got {sigma_min} and {sigma_max}")
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be finite and above 0, got {sigma_data}")
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.n_steps = n_sampling_steps

    def fixed_state(self) -> dict[str, Any]:
        """
        What weights depend on.

        :return: The lowest and the highest level, and sd.
        """
        return {"edm": th.tensor([self.sigma_min, self.sigma_max, self.sigma_data], device="cpu")}

    def check_fixed_state(self, state: dict[str, Any]) -> None:
        """
        Refuse weights that were trained with other levels.

        :param state: What :meth:`fixed_state` returned there, and anything else.
        :raises RuntimeError: If levels or sd differ.
        """
        own = self.fixed_state()["edm"]
        if "edm" in state and not th.allclose(state["edm"].cpu(), own):
            names = "sigma_min, sigma_max, sigma_data"
            raise RuntimeError(f"{names} are {own.tolist()} here, the weights were trained with {state['edm'].tolist()}")

    def draw_timesteps(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """
        Noise levels at which :meth:`loss` is taken.

        :param shape: Shape of the result.
        :param device: Device of the result.
        :return: Levels of that shape.
        """
        return self.levels(th.rand(shape, device=device))

    def levels(self, uniform: th.Tensor) -> th.Tensor:
        """
        Noise levels by inversion of their distribution, ``F(sigma) = sigma^2 / (sigma^2 + sd^2)`` between the bounds.

        :param uniform: Uniform in [0, 1), of any shape.
        :return: Levels of that shape, ``sd sqrt(u / (1 - u))`` with u between F of both bounds.
        """
        ratios = [(bound / self.sigma_data) ** 2 for bound in (self.sigma_min, self.sigma_max)]
        low = ratios[0] / (1 + ratios[0])
        # From above: near 1 a float32 has no digits left for 1 - u
        rest = 1 / (1 + ratios[1]) + (1 - uniform) * (1 / (1 + ratios[0]) - 1 / (1 + ratios[1]))
        share = low + uniform * (ratios[1] / (1 + ratios[1]) - low)
        return self.sigma_data * (share / rest).sqrt()

    def scalings(self, sigma: th.Tensor) -> Scalings:
        """
        The preconditioning.

        :param sigma: Levels of shape (...).
        :return: Its three factors, shape (..., 1) each.
        """
        sigma = sigma.unsqueeze(-1)
        variance = sigma**2 + self.sigma_data**2
        return Scalings(self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt())

    def add_noise(self, x0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        ``x_t = x_0 + sigma epsilon``.

        :param x0: Clean actions of shape (..., A).
        :param t: Levels sigma of shape (...).
        :param noise: Standard normal noise of shape (..., A).
        :return: Noisy actions of shape (..., A).
        """
        return x0 + t.unsqueeze(-1) * noise

    def denoise(self, network: NoiseNetwork, x_t: th.Tensor, sigma: th.Tensor, cond: Any) -> th.Tensor:
        """
        The estimate of the clean action, ``c_skip x_t + c_out F(c_in x_t, ln(sigma) / 4)``, clamped to [-1, 1].

        :param network: See the module's docstring.
        :param x_t: Noisy actions of shape (..., A).
        :param sigma: Levels of shape (...).
        :param cond: Passed to the network.
        :return: Estimates of shape (..., A).
        """
        c_skip, c_out, c_in = self.scalings(sigma)
        return (c_skip * x_t + c_out * network(c_in * x_t, sigma.log() / 4, cond)).clamp(-1, 1)

    def loss(
        self, network: NoiseNetwork, x0: th.Tensor, cond: Any, t: th.Tensor | None = None, noise: th.Tensor | None = None
    ) -> th.Tensor:
        """
        ``mean over dimensions of ((D - x_0) / c_out)^2`` with D from :meth:`denoise`. Together with the levels' density this
        is close to the weight of the evidence bound, DTQL's Eq. 3.

        Gradients also reach ``x0``, through the noisy action and as the target.

        :param network: See the module's docstring.
        :param x0: Clean actions of shape (..., A).
        :param cond: Passed to the network.
        :param t: Levels sigma of shape (...). Drawn by :meth:`draw_timesteps` if None.
        :param noise: Standard normal noise of shape (..., A). Drawn if None.
        :return: Losses of shape (...).
        """
        sigma = self.draw_timesteps(x0.shape[:-1], x0.device) if t is None else t
        noise = th.randn_like(x0) if noise is None else noise
        estimate = self.denoise(network, self.add_noise(x0, sigma, noise), sigma, cond)
        return ((estimate - x0) / self.scalings(sigma).c_out).square().mean(dim=-1)

    def posterior(self, x0: th.Tensor, x_t: th.Tensor, t: int) -> tuple[th.Tensor, float]:
        """
        An Euler step of the probability flow, ``x_0 + sigma_s / sigma_t (x_t - x_0)``, to the next lower level; 0 below the
        lowest.

        :param x0: Clean actions of shape (..., A), or estimates of them.
        :param x_t: Noisy actions of shape (..., A).
        :param t: Number of the level, 0 for the lowest.
        :return: The mean of shape (..., A), and the deviation 0.
        """
        grid = self.sampling_levels()
        ratio = grid[t - 1] / grid[t] if t > 0 else 0.0
        return x0 + ratio * (x_t - x0), 0.0

    def sampling_levels(self) -> list[float]:
        """
        The levels of a sample, ascending: Eq. 5 of Karras et al. with rho 7.

        :return: As many as there are sampling steps.
        """
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        # A single step starts from the highest level
        shares = [i / (self.n_steps - 1) for i in range(self.n_steps)] if self.n_steps > 1 else [1.0]
        return [(low + share * (high - low)) ** 7 for share in shares]

    def sample(self, network: NoiseNetwork, cond: Any, noise: th.Tensor) -> th.Tensor:
        """
        Deterministic samples. DTQL draws none; they show what has been cloned.

        :param network: See the module's docstring.
        :param cond: Passed to the network.
        :param noise: Standard normal noise of shape (1, ..., A).
        :return: Actions of shape (..., A) in [-1, 1].
        """
        levels = self.sampling_levels()
        x_t = levels[-1] * noise[0]
        for step in range(self.n_steps - 1, -1, -1):
            sigma = x_t.new_full(x_t.shape[:-1], levels[step])
            x_t, _ = self.posterior(self.denoise(network, x_t, sigma, cond), x_t, step)
        return x_t
