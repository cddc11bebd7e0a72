"""
Diffusion over bounded vectors: the forward noising, the reverse chain and the loss of each sample.

Nothing here owns a network, knows what a state or a reward is, or switches gradients off. Callers that only sample write
``with th.no_grad()`` themselves, because some algorithms back-propagate through the chain.

A *network* is any callable ``network(x_t, t, cond) -> prediction`` of the shape of ``x_t``. ``cond`` is handed through
untouched. Every random draw can be supplied by the caller.

======================  =====================================  ==========
variable                symbol in the paper                    shape
======================  =====================================  ==========
``x0``                  a, the clean action                    (..., A)
``x_t``                 a_t, the noisy action                  (..., A)
``t``                   t in 0 ... T-1                         int or (...)
``noise``               epsilon                                (..., A)
v                       sqrt(bar alpha_t) epsilon              (..., A)
                        - sqrt(1 - bar alpha_t) a
``betas``               beta_t (Eq. 1)                         (T,)
``alpha_bars``          bar alpha_t (Eq. 2)                    (T,)
``posterior_std``       sqrt(tilde beta_t), 0 at t = 0         (T,)
======================  =====================================  ==========
"""

from abc import ABC, abstractmethod
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, Protocol

import torch as th
from torch import nn

from sb3_qvpo.common.arguments import check_choice

PREDICTIONS = ("noise", "v")
"""What a network may predict, see :class:`GaussianDiffusion`."""

SAMPLERS = ("ddpm", "ddim", "dpm++")
"""How samples may be drawn, see :class:`GaussianDiffusion`."""


class NoiseNetwork(Protocol):
    """What the chain needs of a network: a prediction from ``x_t``, the noise in it unless the process says otherwise."""

    def __call__(self, x_t: th.Tensor, t: Any, cond: Any) -> th.Tensor:
        """
        Predict.

        :param x_t: Noisy samples of shape (..., A).
        :param t: Step in 0 ... T-1, an int for all samples or a tensor of shape (...).
        :param cond: Whatever the network is conditioned on.
        :return: Prediction of shape (..., A).
        """


class DiffusionProcess(nn.Module, ABC):
    """
    What an actor needs of a diffusion: four methods and two numbers. :class:`GaussianDiffusion` is the paper's.

    A subclass may have another prediction, sampler or noise levels. An actor uses it if its ``make_diffusion()`` returns it.
    """

    n_steps: int
    """T, steps that the network is trained on."""
    n_noises: int
    """N, draws of noise that a chain takes."""

    @property
    def n_reverse_steps(self) -> int:
        """Passes of the network that one sample takes; T unless a sampler skips steps."""
        return self.n_steps

    def fixed_state(self) -> dict[str, Any]:
        """
        What the constructor fixes and a network's weights depend on, such as the noise schedule. It is saved beside weights.

        :return: Tensors and plain values by name; nothing here.
        """
        return {}

    def check_fixed_state(self, state: dict[str, Any]) -> None:
        """
        Refuse weights that were trained with something else fixed.

        :param state: What :meth:`fixed_state` returned where the weights were trained. Names may be missing, and others there.
        :raises RuntimeError: If it does not fit. Nothing is checked here.
        """

    def draw_timesteps(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """
        Steps at which :meth:`loss` is taken, uniform over 0 ... T-1.

        :param shape: Shape of the result.
        :param device: Device of the result.
        :return: Steps of that shape.
        """
        return th.randint(self.n_steps, shape, device=device)

    @abstractmethod
    def add_noise(self, x0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Forward noising in one jump, a draw from q(x_t | x_0).

        :param x0: Clean samples of shape (..., A).
        :param t: Steps in 0 ... T-1, shape (...).
        :param noise: Standard normal noise of shape (..., A).
        :return: Noisy samples of shape (..., A).
        """

    @abstractmethod
    def posterior(self, x0: th.Tensor, x_t: th.Tensor, t: int) -> tuple[th.Tensor, float]:
        """
        Mean and standard deviation of one reverse step, q(x_s | x_t, x_0) for the sampling step s before t.

        :param x0: Clean samples of shape (..., A), or estimates of them.
        :param x_t: Noisy samples of shape (..., A).
        :param t: Step in 0 ... T-1.
        :return: The mean of shape (..., A), and the deviation, the same for all dimensions.
        """

    @abstractmethod
    def sample(self, network: NoiseNetwork, cond: Any, noise: th.Tensor) -> th.Tensor:
        """
        The reverse chain.

        :param network: See the module's docstring.
        :param cond: Passed to the network at every step.
        :param noise: Standard normal noise of shape (N, ..., A): ``noise[0]`` is x_T.
        :return: Clean samples of shape (..., A).
        """

    @abstractmethod
    def loss(
        self, network: NoiseNetwork, x0: th.Tensor, cond: Any, t: th.Tensor | None = None, noise: th.Tensor | None = None
    ) -> th.Tensor:
        """
        Loss of each sample. Not reduced over samples: the caller weights and averages.

        :param network: See the module's docstring.
        :param x0: Clean samples of shape (..., A).
        :param cond: Passed to the network.
        :param t: Steps of shape (...). Drawn by :meth:`draw_timesteps` if None.
        :param noise: Standard normal noise of shape (..., A). Drawn if None.
        :return: Losses of shape (...).
        """


def sampling_steps(n_steps: int, n_sampling_steps: int | None) -> list[int]:
    """
    The steps of a chain that takes fewer of them than were trained. They are evenly spaced and include the first and the last.

    :param n_steps: T.
    :param n_sampling_steps: S; T if None.
    :return: Steps in ascending order.
    :raises ValueError: If S is not in 1 ... T.
    """
    count = n_steps if n_sampling_steps is None else n_sampling_steps
    if not isinstance(count, Integral) or isinstance(count, bool) or not 1 <= count <= n_steps:
        raise ValueError(f"n_sampling_steps must be a whole number from 1 to n_diffusion_steps = {n_steps}, got {count!r}")
    # A single step must start from pure noise
    return [n_steps - 1] if count == 1 else [round(i * (n_steps - 1) / (count - 1)) for i in range(count)]


def respaced_coefficients(alpha_bars: th.Tensor, steps: list[int], eta: float) -> dict[str, th.Tensor]:
    """
    Coefficients of a reverse step from each sampling step t to the sampling step s before it.

    Song et al. (2021), Eqs. 12 and 16, sorted by x_0 and x_t:
    ``x_s = sqrt(bar_s) x_0 + sqrt(1 - bar_s - sigma^2) (x_t - sqrt(bar_t) x_0) / sqrt(1 - bar_t) + sigma noise`` with
    ``sigma^2 = eta^2 (1 - bar_s) / (1 - bar_t) (1 - bar_t / bar_s)``.

    :param alpha_bars: bar alpha_t for all steps, shape (T,).
    :param steps: The sampling steps, ascending.
    :param eta: Factor of the noise.
    :return: ``x0_coef``, ``x_t_coef`` and ``posterior_std``, shape (T,), 0 for steps that are left out.
    """
    x0_coef, x_t_coef, std = (th.zeros_like(alpha_bars) for _ in range(3))
    before = th.ones((), dtype=alpha_bars.dtype)
    for t in steps:
        bar = alpha_bars[t]
        std[t] = eta * ((1 - before) / (1 - bar) * (1 - bar / before)).sqrt()
        x_t_coef[t] = ((1 - before - std[t] ** 2).clamp(min=0) / (1 - bar)).sqrt()
        x0_coef[t] = before.sqrt() - x_t_coef[t] * bar.sqrt()
        before = bar
    return {"x0_coef": x0_coef, "x_t_coef": x_t_coef, "posterior_std": std}


def extrapolations(alpha_bars: th.Tensor, steps: list[int]) -> th.Tensor:
    """
    By how much each step of DPM-Solver++(2M) extrapolates its estimate of x_0 from the estimate of the step before it.

    Lu et al. (2022), *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models*, Algorithm 2. With
    ``lambda_t = log(sqrt(bar_t) / sqrt(1 - bar_t))`` and ``h`` the step in lambda, it uses
    ``D = (1 + f) x_0 - f x_0'`` with ``f = h / (2 h')``; the prime marks the step before.

    :param alpha_bars: bar alpha_t for all steps, shape (T,).
    :param steps: The sampling steps, ascending.
    :return: f for each step, shape (T,). 0 at the first step of a chain, which has no step before it. 0 also at the last one,
        whose h is infinite.
    """
    factors = th.zeros_like(alpha_bars)
    lambdas = (alpha_bars / (1 - alpha_bars)).log() / 2
    for after, t, before in zip(steps, steps[1:], steps[2:], strict=False):
        factors[t] = (lambdas[after] - lambdas[t]) / (2 * (lambdas[t] - lambdas[before]))
    return factors


class GaussianDiffusion(DiffusionProcess):
    """
    Denoising diffusion (Ho et al. 2020) for samples in [-1, 1].

    The network predicts the noise, as in the paper, or the velocity ``v = sqrt(bar alpha_t) epsilon - sqrt(1 - bar alpha_t)
    x_0``. At high noise levels an error in the noise is an error many times as large in the clean sample; one in v is not.
    Source: Salimans and Ho (2022), *Progressive Distillation for Fast Sampling of Diffusion Models*, Sec. 4 and Appendix D.

    Samples may be drawn in fewer steps than are trained: S of the T steps, evenly spaced from 0 to T-1. Source: Nichol and
    Dhariwal (2021), *Improved Denoising Diffusion Probabilistic Models*, Sec. 4. Three samplers:

    - ``"ddpm"`` draws each step from its posterior. The factor eta of its noise leads to the deterministic DDIM at 0.
      Source: Song et al. (2021), *Denoising Diffusion Implicit Models*, Eqs. 12 and 16.
    - ``"ddim"`` is the same with eta = 0.
    - ``"dpm++"`` is DPM-Solver++(2M): DDIM with an estimate of x_0 of second order, see :func:`extrapolations`. In few steps
      it narrows the samples least.

    :param betas: Variances beta_t of the forward steps (Eq. 1), shape (T,), each in (0, 1).
    :param clip_denoised: Clamp the estimate of the clean sample to [-1, 1] at every reverse step, and the result.
        Only useful to switch off for unbounded data.
    :param n_sampling_steps: S, reverse steps of a sample; T if None.
    :param sampling_eta: eta in [0, 1], for ``"ddpm"`` alone: 1 draws from the posterior, 0 adds no noise after the start.
    :param prediction: What the network predicts, ``"noise"`` or ``"v"``.
    :param sampler: ``"ddpm"``, ``"ddim"`` or ``"dpm++"``.
    :raises ValueError: If S is not in 1 ... T, eta not in [0, 1], or a name is unknown.
    """

    betas: th.Tensor
    sqrt_alpha_bars: th.Tensor
    sqrt_one_minus_alpha_bars: th.Tensor

    def __init__(
        self,
        betas: th.Tensor,
        clip_denoised: bool = True,
        n_sampling_steps: int | None = None,
        sampling_eta: float = 1.0,
        prediction: str = "noise",
        sampler: str = "ddpm",
    ):
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("sampler", sampler, SAMPLERS)
        self.n_steps = len(betas)
        self.prediction = prediction
        self.clip_denoised = clip_denoised
        self.sampling_steps = sampling_steps(self.n_steps, n_sampling_steps)
        eta: Any = sampling_eta  # mypy does not know that floats are Real
        if not isinstance(eta, Real) or not 0 <= float(eta) <= 1:
            raise ValueError(f"sampling_eta must be a number in [0, 1], got {sampling_eta!r}")
        if sampler != "ddpm":
            if sampling_eta not in (0, 1):
                raise ValueError(f"sampling_eta belongs to sampler='ddpm': {sampler!r} adds no noise, got {sampling_eta!r}")
            sampling_eta = 0.0
        self.n_noises = len(self.sampling_steps) if sampling_eta > 0 else 1
        betas = betas.double()
        alphas = 1 - betas
        alpha_bars = th.cumprod(alphas, dim=0)
        previous_alpha_bars = th.cat([th.ones(1, dtype=th.float64), alpha_bars[:-1]])
        # q(x_{t-1} | x_t, x_0) = N(c1 x_0 + c2 x_t, tilde beta I): Ho et al. (2020), Eqs. 6 and 7
        coefficients = {
            "betas": betas,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "x0_coef": betas * previous_alpha_bars.sqrt() / (1 - alpha_bars),
            "x_t_coef": (1 - previous_alpha_bars) * alphas.sqrt() / (1 - alpha_bars),
            "posterior_std": (betas * (1 - previous_alpha_bars) / (1 - alpha_bars)).sqrt(),
            "extrapolation": th.zeros_like(betas),
        }
        if len(self.sampling_steps) < self.n_steps or sampling_eta < 1:
            coefficients.update(respaced_coefficients(alpha_bars, self.sampling_steps, sampling_eta))
        if sampler == "dpm++":
            coefficients["extrapolation"] = extrapolations(alpha_bars, self.sampling_steps)
        # A reverse step has one t for all samples: numbers cost less there than looking up tensors
        self._numbers: dict[str, list[float]] = {name: value.float().tolist() for name, value in coefficients.items()}
        for name in ("betas", "sqrt_alpha_bars", "sqrt_one_minus_alpha_bars"):  # looked up for many t at once
            # The schedule fixes them, so they are no parameters and stay out of the state dict
            self.register_buffer(name, coefficients[name].float(), persistent=False)

    @property
    def n_reverse_steps(self) -> int:
        """S, reverse steps of a sample."""
        return len(self.sampling_steps)

    def fixed_state(self) -> dict[str, Any]:
        """
        The noise schedule and what the network predicts.

        :return: ``betas``, shape (T,), and ``prediction``.
        """
        return {"betas": self.betas.detach().clone(), "prediction": self.prediction}

    def check_fixed_state(self, state: dict[str, Any]) -> None:
        """
        Refuse weights that were trained on another noise schedule or prediction. The network has learnt these and no others.

        :param state: What :meth:`fixed_state` returned where the weights were trained. Files of version 0.1 have no
            ``prediction``, which was the noise.
        :raises RuntimeError: If it does not fit.
        """
        prediction = state.get("prediction", "noise")
        if prediction != self.prediction:
            raise RuntimeError(f"prediction is {self.prediction!r} here: weights that predict {prediction!r} do not fit.")
        if "betas" in state:
            self._check_betas(state["betas"])

    def _check_betas(self, betas: th.Tensor) -> None:
        if betas.shape != self.betas.shape:
            raise RuntimeError(
                f"n_diffusion_steps is {self.n_steps} in this model, other than in the saved policy; it is fixed when a "
                f"policy is trained, because the noise predictor has learnt these {len(betas)} steps and no others."
            )
        if not self.betas.is_meta and not th.allclose(betas.to(self.betas), self.betas, rtol=1e-4):
            raise RuntimeError("betas are those of another noise schedule: weights trained with it do not fit.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Version 0.1 kept the betas in the state dict
        betas = state_dict.pop(f"{prefix}betas", None)
        if betas is not None:
            try:
                self._check_betas(betas)
            except RuntimeError as error:
                args[-1].append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_noise(self, x0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Forward noising in one jump, Eq. 2: ``x_t = sqrt(bar alpha_t) x_0 + sqrt(1 - bar alpha_t) noise``.

        :param x0: Clean samples of shape (..., A).
        :param t: Steps in 0 ... T-1, shape (...).
        :param noise: Standard normal noise of shape (..., A).
        :return: Noisy samples of shape (..., A).
        """
        return self.sqrt_alpha_bars[t].unsqueeze(-1) * x0 + self.sqrt_one_minus_alpha_bars[t].unsqueeze(-1) * noise

    def predict_x0(self, x_t: th.Tensor, t: int, prediction: th.Tensor) -> th.Tensor:
        """
        Estimate of the clean sample, clamped to [-1, 1] if ``clip_denoised``: Eq. 2 solved for x_0, or
        ``sqrt(bar alpha_t) x_t - sqrt(1 - bar alpha_t) v``.

        :param x_t: Noisy samples of shape (..., A).
        :param t: Step in 0 ... T-1.
        :param prediction: Predicted noise or v, shape (..., A).
        :return: Estimated clean samples of shape (..., A).
        """
        sqrt_alpha_bar, sqrt_one_minus = (self._numbers[name][t] for name in ("sqrt_alpha_bars", "sqrt_one_minus_alpha_bars"))
        if self.prediction == "v":
            x0 = th.sub(sqrt_alpha_bar * x_t, prediction, alpha=sqrt_one_minus)
        else:
            x0 = th.sub(x_t, prediction, alpha=sqrt_one_minus) / sqrt_alpha_bar
        return x0.clamp(-1, 1) if self.clip_denoised else x0

    def posterior(self, x0: th.Tensor, x_t: th.Tensor, t: int) -> tuple[th.Tensor, float]:
        """
        Mean ``c1_t x_0 + c2_t x_t`` and deviation ``sqrt(tilde beta_t)`` of q(x_{t-1} | x_t, x_0). With fewer sampling steps,
        those of q(x_s | x_t, x_0) for the sampling step s before t.

        :param x0: Estimated clean samples of shape (..., A).
        :param x_t: Noisy samples of shape (..., A).
        :param t: Step in 0 ... T-1.
        :return: The mean of shape (..., A), and the deviation, the same for all dimensions.
        """
        x0_coef, x_t_coef, posterior_std = (self._numbers[name][t] for name in ("x0_coef", "x_t_coef", "posterior_std"))
        return th.add(x0_coef * x0, x_t, alpha=x_t_coef), posterior_std

    def posterior_step(self, x0: th.Tensor, x_t: th.Tensor, t: int, noise: th.Tensor | None) -> th.Tensor:
        """
        One reverse step, a draw from :meth:`posterior`.

        :param x0: Estimated clean samples of shape (..., A).
        :param x_t: Noisy samples of shape (..., A).
        :param t: Step in 0 ... T-1.
        :param noise: Standard normal noise of shape (..., A), or None for the mean (the last step, t = 0).
        :return: Samples one step less noisy, shape (..., A).
        """
        mean, std = self.posterior(x0, x_t, t)
        return mean if noise is None else th.add(mean, noise, alpha=std)

    def sample(self, network: NoiseNetwork, cond: Any, noise: th.Tensor) -> th.Tensor:
        """
        The reverse chain: x_T from N(0, I), then S posterior steps, the last one without noise, and a final clamp. With
        ``sampler="dpm++"`` each step takes its estimate of x_0 from this step and the one before.

        :param network: Predicts the noise or v, see the module's docstring.
        :param cond: Passed to the network at every step.
        :param noise: Standard normal noise of shape (N, ..., A), N = ``n_noises``: ``noise[0]`` is x_T, ``noise[i]`` enters
            the i-th reverse step. N is S, or 1 if no step adds noise (``"ddim"``, ``"dpm++"``, ``sampling_eta=0``).
        :return: Clean samples of shape (..., A), in [-1, 1] if ``clip_denoised``.
        :raises ValueError: If ``noise`` has not N entries.
        """
        if len(noise) != self.n_noises:
            raise ValueError(f"noise must have {self.n_noises} entries, one for each step that adds noise, got {len(noise)}")
        extrapolation = self._numbers["extrapolation"]
        x_t, *step_noise = noise.unbind()
        x0_before = x_t  # its factor is 0
        for t, z in zip_longest(reversed(self.sampling_steps), step_noise):
            x0 = self.predict_x0(x_t, t, network(x_t, t, cond))
            estimate = x0 if extrapolation[t] == 0 else th.lerp(x0_before, x0, 1 + extrapolation[t])
            x_t, x0_before = self.posterior_step(estimate, x_t, t, z), x0
        return x_t.clamp(-1, 1) if self.clip_denoised else x_t

    def loss(
        self,
        network: NoiseNetwork,
        x0: th.Tensor,
        cond: Any,
        t: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Denoising loss of each sample: ``mean over dimensions of (noise - network(x_t, t, cond))^2``, the norm in Eq. 6. With
        ``prediction="v"`` it compares the network with v instead.

        The paper writes the squared norm, a sum over the action's dimensions. The mean differs by the constant factor A,
        which only matters next to Adam's epsilon and for gradient clipping.

        :param network: Predicts the noise or v, see the module's docstring.
        :param x0: Clean samples of shape (..., A).
        :param cond: Passed to the network.
        :param t: Steps in 0 ... T-1, shape (...). Drawn by :meth:`draw_timesteps` if None.
        :param noise: Standard normal noise of shape (..., A). Drawn if None.
        :return: Losses of shape (...).
        """
        if t is None:
            t = self.draw_timesteps(x0.shape[:-1], x0.device)
        if noise is None:
            noise = th.randn_like(x0)
        x_t = self.add_noise(x0, t, noise)
        target = self.velocity(x0, t, noise) if self.prediction == "v" else noise
        return ((target - network(x_t, t, cond)) ** 2).mean(dim=-1)

    def velocity(self, x0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        ``v = sqrt(bar alpha_t) noise - sqrt(1 - bar alpha_t) x_0``, what the network predicts with ``prediction="v"``.

        :param x0: Clean samples of shape (..., A).
        :param t: Steps in 0 ... T-1, shape (...).
        :param noise: Standard normal noise of shape (..., A).
        :return: v, shape (..., A).
        """
        return self.sqrt_alpha_bars[t].unsqueeze(-1) * noise - self.sqrt_one_minus_alpha_bars[t].unsqueeze(-1) * x0
