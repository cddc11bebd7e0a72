"""
The noise-prediction network, normalised features, batch renormalisation, the initialisation of the authors' code, and the mode
in which networks are evaluated.

Shapes: B batch, K candidates for each state, A action dimensions, S state features, T steps. E is the size of the time
embedding, H the width of the first hidden layer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch as th
from torch import nn
from torch.nn import functional as F

PyTorchObs = th.Tensor | dict[str, th.Tensor]
"""A batch of observations, as SB3 has them."""


def mean_and_variance(features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    The statistics of a batch.

    :param features: Shape (B, S).
    :return: Mean and biased variance over the batch, shape (S,).
    """
    # On a CPU faster than var_mean(): 0.07 instead of 1.2 ms for (512, 256)
    mean = features.mean(0)
    return mean, (features - mean).square_().mean(0)


class RunningNorm(nn.Module):
    """
    Shift and scale features to mean 0 and deviation 1, by statistics of what the losses have seen.

    While losses are computed, so in training mode and with gradients, each batch moves the statistics. The first
    ``1 / momentum`` batches are pooled exactly. Later ones count for a share of ``momentum``, so that old ones fade. The
    result is clipped as ``VecNormalize`` clips it.

    :param n_features: Number of features S.
    :param momentum: Share of a batch once many have been seen, in (0, 1].
    :param clip: Largest magnitude of the result.
    :param epsilon: What is added to the variance.
    """

    running_mean: th.Tensor
    running_var: th.Tensor
    running_count: th.Tensor

    def __init__(self, n_features: int, momentum: float = 1e-3, clip: float = 10.0, epsilon: float = 1e-8):
        super().__init__()
        self.momentum, self.clip, self.epsilon = momentum, clip, epsilon
        # By these names a target network takes them over as they are
        self.register_buffer("running_mean", th.zeros(n_features))
        self.register_buffer("running_var", th.ones(n_features))
        self.register_buffer("running_count", th.zeros(()))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Shape (B, S).
        :return: Shape (B, S), in [-clip, clip].
        """
        if self.training and th.is_grad_enabled():
            self.observe(features.detach())
        scale = (self.running_var + self.epsilon).rsqrt()
        return ((features - self.running_mean) * scale).clamp(-self.clip, self.clip)

    @th.no_grad()
    def observe(self, features: th.Tensor) -> None:
        """
        Move the statistics towards those of a batch.

        :param features: Shape (B, S).
        """
        self.running_count += 1
        rate = self.running_count.reciprocal().clamp(min=self.momentum)
        mean, var = mean_and_variance(features)
        shift = mean - self.running_mean
        # Of the mixture: the mean's own move is part of its variance
        self.running_var.lerp_(var, rate).add_(rate * (1 - rate) * shift.square())
        self.running_mean += rate * shift


class BatchRenorm1d(nn.BatchNorm1d):
    """
    A batch norm that normalises by running statistics, in losses too, once it has seen ``start`` batches.

    Until then it is a batch norm. Later its output in training mode is ``r (x - mu_B) / sigma_B + d``, then scaled and shifted
    as learnt, with ``r = clip(sigma_B / sigma, 1 / r_max, r_max)`` and ``d = clip((mu_B - mu) / sigma, -d_max, d_max)``. Here
    mu_B and sigma_B are mean and deviation of the batch, mu and sigma the running ones before it. No gradient goes through r
    and d. Without clipping this is ``(x - mu) / sigma``: what evaluation mode gives.

    Source: Ioffe (2017), *Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models*, Algorithm
    1. The limits are those of CrossQ's authors, constant from the start on, where that paper lets them grow. The layer of
    sb3-contrib starts one batch later, divides by the unbiased variance and leaves ``eps`` out of the shift.

    :param n_features: Number of features.
    :param start: Number of batches that are normalised by their own statistics first.
    :param eps: What is added to a variance.
    :param momentum: Share of a batch in the running statistics.
    :param max_scale: r_max, at least 1.
    :param max_shift: d_max, at least 0.
    """

    running_mean: th.Tensor
    running_var: th.Tensor
    num_batches_tracked: th.Tensor

    def __init__(
        self,
        n_features: int,
        start: int,
        eps: float = 1e-3,
        momentum: float = 0.01,
        max_scale: float = 3.0,
        max_shift: float = 5.0,
    ):
        super().__init__(n_features, eps=eps, momentum=momentum)
        self.start, self.max_scale, self.max_shift = start, max_scale, max_shift

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Shape (B, S).
        :return: Shape (B, S).
        """
        if not self.training:
            return super().forward(features)
        with th.no_grad():
            mean, var = mean_and_variance(features)
            deviation = (self.running_var + self.eps).sqrt()
            # On the device, so that a captured update follows the count
            started = self.num_batches_tracked >= self.start
            scale = ((var + self.eps).sqrt() / deviation).clamp(1 / self.max_scale, self.max_scale)
            shift = ((mean - self.running_mean) / deviation).clamp(-self.max_shift, self.max_shift)
            scale, shift = th.where(started, scale, 1.0), th.where(started, shift, 0.0)
            self.num_batches_tracked += 1
        weight, bias = self.weight * scale, self.bias + self.weight * shift
        return F.batch_norm(
            features, self.running_mean, self.running_var, weight, bias, True, cast(float, self.momentum), self.eps
        )


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """
    Put modules in evaluation mode for a while: drawing candidates must not move batch-norm statistics or apply dropout.

    :param modules: The modules. Each layer's mode is restored at the end.
    """
    layers = [layer for module in modules if module.training for layer in module.modules() if layer.training]
    for layer in layers:
        set_mode(layer, False)
    try:
        yield
    finally:
        for layer in layers:
            set_mode(layer, True)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """
    Let gradients pass through modules without reaching their parameters.

    :param modules: The modules.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def set_mode(layer: nn.Module, training: bool) -> None:
    """
    Switch a layer, without those in it, between training and evaluation mode.

    :param layer: The layer.
    :param training: True for training mode.
    """
    if type(layer).train is nn.Module.train and "training" in vars(layer):
        # Torch checks each attribute that is set on a module: so each switch of a policy would take 1 ms
        vars(layer)["training"] = training
    else:
        layer.train(training)


def n_observations(observation: PyTorchObs) -> int:
    """
    The number of observations in a batch.

    :param observation: A tensor (B, ...) or a dictionary of them.
    :return: B. In a trace or an export it stays free, which ``len()`` would not.
    """
    return (next(iter(observation.values())) if isinstance(observation, dict) else observation).shape[0]


def split_rows(observation: PyTorchObs) -> list[PyTorchObs]:
    """
    Cut a batch of observations into batches of one.

    :param observation: A tensor (B, ...) or a dictionary of them.
    :return: B observations, each with a batch axis of 1.
    """
    rows = range(n_observations(observation))
    if isinstance(observation, dict):
        return [{key: value[i : i + 1] for key, value in observation.items()} for i in rows]
    return [observation[i : i + 1] for i in rows]


def is_traced() -> bool:
    """
    Whether operations are being recorded by ``torch.jit.trace`` or an exporter that uses it.

    :return: True while they are. Numbers that Python computes are constants of the trace then.
    """
    return bool(th.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]  # torch neither exports nor types it


def init_linear_layers(module: nn.Module) -> None:
    """
    Initialise all linear layers in a module: weights from N(0, (1 / (2 sqrt(fan_in)))^2), biases 0.

    This is what the QVPO authors' code does for actor and critics; the paper does not state an initialisation.

    :param module: The module, changed in place.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / (2 * math.sqrt(layer.in_features)))
            nn.init.zeros_(layer.bias)


INITIALIZATIONS = ("normal", "torch")
"""How weights may start: as :func:`init_linear_layers` does, or as torch's layers do."""


def sinusoidal_embedding(positions: th.Tensor, dim: int) -> th.Tensor:
    """
    Sinusoidal position features ``[sin(p w_i), cos(p w_i)]``, ``w_i = 10000^(-i / (dim/2 - 1))``, i = 0 ... dim/2 - 1.

    Source: Vaswani et al. (2017), *Attention Is All You Need*, Sec. 3.5, in the layout of Ho et al. (2020).

    :param positions: Positions of shape (...).
    :param dim: Number of features E, even and at least 4.
    :return: Features of shape (..., E).
    :raises ValueError: If ``dim`` is odd or below 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"time_embedding_dim must be an even number of at least 4, got {dim}")
    half = dim // 2
    frequencies = th.exp(-math.log(10_000) * th.arange(half, device=positions.device) / (half - 1))
    angles = positions.unsqueeze(-1) * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=-1)


class Condition(NamedTuple):
    """
    What the first layer of the noise predictor adds to the action part: fixed while a chain runs.

    :param state_part: State part of the first layer, with its bias, shape (B, 1, H).
    :param time_parts: Time part of the first layer for every step, shape (T, H).
    """

    state_part: th.Tensor
    time_parts: th.Tensor


class NoisePredictor(nn.Module):
    """
    The noise-prediction network epsilon_theta(a_t, s, t): an MLP over [a_t, emb(t), s].

    The time embedding is sinusoidal features -> Linear -> activation -> Linear. The first layer is linear in its three
    inputs, so it splits into an action part, a time part and a state part. The state part is the same for all candidates of
    a state and for all steps. The time part is the same for all rows. So :meth:`condition` computes both once, and a step only
    computes the action part. This is exact, not an approximation.

    :param action_dim: Number of action dimensions A.
    :param features_dim: Number of state features S.
    :param n_steps: Number of diffusion steps T.
    :param net_arch: Widths of the hidden layers; an empty list gives a linear network.
    :param activation_fn: Activation of the hidden layers and of the time embedding.
    :param time_embedding_dim: Size E of the time embedding, even and at least 4.
    :param time_hidden_dim: Width of its hidden layer, 8 E if None (256 at the authors' E = 32).
    :param initialization: How weights start, one of :data:`INITIALIZATIONS`.
    """

    time_features: th.Tensor

    def __init__(
        self,
        action_dim: int,
        features_dim: int,
        n_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.Mish,
        time_embedding_dim: int = 32,
        time_hidden_dim: int | None = None,
        initialization: str = "normal",
    ):
        super().__init__()
        time_hidden_dim = 8 * time_embedding_dim if time_hidden_dim is None else time_hidden_dim
        self.split_sizes = [action_dim, time_embedding_dim, features_dim]
        self.register_buffer("time_features", sinusoidal_embedding(th.arange(n_steps), time_embedding_dim), persistent=False)
        self.time_mlp = nn.Sequential(
            nn.Linear(time_embedding_dim, time_hidden_dim),
            activation_fn(),
            nn.Linear(time_hidden_dim, time_embedding_dim),
        )
        widths = [*net_arch, action_dim]
        self.first_layer = nn.Linear(sum(self.split_sizes), widths[0])
        later_layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            later_layers += [activation_fn(), nn.Linear(width_in, width_out)]
        self.later_layers = nn.Sequential(*later_layers)
        if initialization == "normal":
            init_linear_layers(self)

    def condition(self, features: th.Tensor) -> Condition:
        """
        The state and time parts of the first layer, to be computed once for a set of states.

        :param features: State features of shape (B, S).
        :return: Both parts.
        """
        _, time_weight, state_weight = th.split(self.first_layer.weight, self.split_sizes, dim=1)
        state_part = F.linear(features, state_weight, self.first_layer.bias).unsqueeze(1)
        return Condition(state_part, self._time_parts(time_weight))

    def _time_parts(self, time_weight: th.Tensor) -> th.Tensor:
        """Time part of the first layer for every step, shape (T, H)."""
        return F.linear(self.time_mlp(self.time_features), time_weight)

    def forward(self, x_t: th.Tensor, t: int | th.Tensor, cond: Condition) -> th.Tensor:
        """
        Predict the noise in noisy actions.

        :param x_t: Noisy actions of shape (B, K, A).
        :param t: Step in 0 ... T-1: an int for all actions or a tensor of shape (B, K).
        :param cond: Result of :meth:`condition` for the B states.
        :return: Predicted noise of shape (B, K, A).
        """
        output: th.Tensor = self.later_layers(self.first_output(x_t, t, cond))
        return output

    def first_output(self, x_t: th.Tensor, t: int | th.Tensor, cond: Condition) -> th.Tensor:
        """
        Output of the first layer, the sum of its action, time and state parts.

        :param x_t: Noisy actions of shape (B, K, A).
        :param t: Step in 0 ... T-1: an int for all actions or a tensor of shape (B, K).
        :param cond: Result of :meth:`condition` for the B states.
        :return: Pre-activations of shape (B, K, H).
        """
        action_weight = self.first_layer.weight[:, : self.split_sizes[0]]
        # For a tensor t the same as time_parts[t], but the gradient of that takes five times as long
        time_part = F.embedding(t, cond.time_parts) if isinstance(t, th.Tensor) else cond.time_parts[t]
        return F.linear(x_t, action_weight) + (time_part + cond.state_part)


class ContinuousTimePredictor(NoisePredictor):
    """
    The same network for diffusions whose time is a real number: the time of each row goes through the time embedding.

    :param action_dim: Number of action dimensions A.
    :param features_dim: Number of state features S.
    :param net_arch: Widths of the hidden layers.
    :param options: Further arguments of :class:`NoisePredictor`.
    """

    def __init__(self, action_dim: int, features_dim: int, net_arch: list[int], **options: Any):
        super().__init__(action_dim, features_dim, 1, net_arch, **options)

    def _time_parts(self, time_weight: th.Tensor) -> th.Tensor:
        # Times are not known in advance
        return time_weight.new_empty(0)

    def first_output(self, x_t: th.Tensor, t: int | th.Tensor, cond: Condition) -> th.Tensor:
        """
        Output of the first layer.

        :param x_t: Noisy actions of shape (B, K, A).
        :param t: Times of shape (B, K), real numbers.
        :param cond: Result of :meth:`condition` for the B states.
        :return: Pre-activations of shape (B, K, H).
        """
        action_weight, time_weight, _ = th.split(self.first_layer.weight, self.split_sizes, dim=1)
        features = sinusoidal_embedding(cast(th.Tensor, t), self.split_sizes[1])
        return F.linear(x_t, action_weight) + F.linear(self.time_mlp(features), time_weight) + cond.state_part
