"""
Many rows through the readable networks, without gradients, at the speed of the processor and with the same numbers.

No mathematics is defined here: :meth:`GaussianDiffusion.sample` runs the chain as always, with a network that returns what
:class:`NoisePredictor` returns, and critics are valued as :meth:`CandidateCritic.value_candidates` values them. What is
different:

- Rows go through in blocks that fit into the processor's caches, which also bounds memory. Freed memory is kept:
  :func:`keep_freed_memory`.
- Mish costs three vectorised passes instead of torch's ``log1p`` and ``tanh`` one number at a time: :func:`mish_of_negated`.
- Products of matrices go to oneDNN, see :class:`OneDnnProducts`: in float32 torch takes MKL by default, which is half as fast
  on AMD processors. This and Mish also serve the losses.
- Candidates that only serve training may have their hidden layers multiplied in bfloat16 where the processor has it in
  hardware. No gradient flows through them; their values, and all that is trained, stay in float32.

Few rows of several states and other devices than the CPU take the readable path: :func:`pays_off`. The candidates of one
state, an action, are few: there the calls cost more than the numbers, and :func:`sample_for_one_state` makes five calls a step
for the network instead of a dozen.

Shapes: B batch, K candidates for each state, A action dimensions, R rows of a block, H width of a hidden layer.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.diffusion import GaussianDiffusion, NoiseNetwork
from sb3_qvpo.common.networks import Condition, NoisePredictor

BLOCK_SIZES = {th.float32: 2**18, th.bfloat16: 2**19}
"""Numbers in a hidden layer of a block for each thread, by type: 1024 and 2048 rows of width 256 were the fastest."""

LARGEST_BLOCK = 2**23
"""Numbers in a hidden layer of a block on many threads, 32 MB in float32: what bounds memory there."""

SMALLEST_SIZE = 2**14
"""Numbers in a hidden layer, 64 rows of width 256, below which the readable path is as fast."""

SMALLEST_VECTORIZED = 2**12
"""Numbers, 16 rows of width 256, for which five vectorised calls are faster than one that is not."""

CANDIDATE_DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class SpeedSettings:
    """
    How the fast paths work in this process. No saved file holds anything of them.

    :param enabled: Whether they are used at all.
    :param compile_actions: Whether long runs compile their actions, and whether a GPU captures decisions in graphs on its own,
        see :mod:`sb3_qvpo.common.compiled`.
    :param candidate_dtype: In what candidates for training are drawn: ``"float32"``, ``"bfloat16"`` or ``"auto"``, bfloat16
        where the processor multiplies it in hardware.
    """

    enabled: bool = True
    compile_actions: bool = True
    candidate_dtype: str = "auto"


settings = SpeedSettings()


def has_bfloat16(device: th.device) -> bool:
    """
    Whether a device multiplies bfloat16 in hardware.

    :param device: The device.
    :return: True for processors with AVX-512 BF16 or AMX and for NVIDIA GPUs from Ampere on.
    """
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(th.cpu, "get_capabilities"):
        capabilities = th.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(th.cpu._is_avx512_bf16_supported())  # torch 2.8


def candidate_dtype(device: th.device) -> th.dtype:
    """
    In what candidates for training are drawn, by ``settings.candidate_dtype``.

    :param device: Where they are drawn.
    :return: ``torch.float32`` or ``torch.bfloat16``.
    :raises ValueError: If the setting is unknown.
    """
    if settings.candidate_dtype not in CANDIDATE_DTYPES:
        known = ", ".join(map(repr, CANDIDATE_DTYPES))
        raise ValueError(f"settings.candidate_dtype must be one of {known}, got {settings.candidate_dtype!r}")
    reduced = settings.candidate_dtype == "bfloat16" or (settings.candidate_dtype == "auto" and has_bfloat16(device))
    return th.bfloat16 if reduced else th.float32


def pays_off(layers: Sequence[nn.Module], n_rows: int, device: th.device) -> bool:
    """
    Whether rows should go through :class:`FastLayers`.

    :param layers: What follows a network's first linear layer.
    :param n_rows: Number of rows.
    :param device: The network's device.
    :return: True for many rows where :func:`applies` is.
    """
    return applies(layers, device) and n_rows * cast(nn.Linear, layers[1]).in_features >= SMALLEST_SIZE


def applies(layers: Sequence[nn.Module], device: th.device) -> bool:
    """
    Whether there are fast paths here.

    :param layers: What follows a network's first linear layer.
    :param device: The network's device.
    :return: False with gradients, while a graph is traced, off the CPU, and for layers that are unknown here.
    """
    if not settings.enabled or th.is_grad_enabled() or device.type != "cpu" or th.compiler.is_compiling():
        return False
    return alternate(layers)


def alternate(layers: Sequence[nn.Module]) -> bool:
    """
    Whether layers are what follows the first linear layer of a usual network.

    :param layers: The layers.
    :return: True for activation, linear layer, activation, ..., linear layer.
    """
    linear = [type(layer) is nn.Linear and layer.bias is not None for layer in layers]
    return len(layers) >= 2 and linear == [i % 2 == 1 for i in range(len(layers))]


@functools.cache
def onednn_keeps_float32() -> bool:
    """
    Whether oneDNN, where torch lets it multiply float32 in bfloat16, multiplies in float32 all the same.

    It does on processors that have no faster way, those without AMX. Seen from the error of a product, once in a process.

    :return: False also if torch has no such setting (before 2.9) or was built without oneDNN.
    """
    has_onednn: bool = th.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    matmul: Any = getattr(th.backends.mkldnn, "matmul", None)
    if not (has_onednn and hasattr(matmul, "fp32_precision")):
        return False
    generator = th.Generator().manual_seed(0)
    x, weight = th.randn(512, 256, generator=generator), th.randn(256, 256, generator=generator)
    exact = x.double() @ weight.double().t()
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        error = (F.linear(x, weight) - exact).abs().max()
    finally:
        matmul.fp32_precision = before
    return bool(error < 1e-3)  # about 5e-5 in float32, 0.2 in bfloat16, for values up to 80


class OneDnnProducts(ContextDecorator):
    """
    Products of float32 matrices by oneDNN while it lasts, if that costs no precision (:func:`onednn_keeps_float32`).

    Torch only offers this as a setting of the process, which the last thread to leave puts back; a user's own setting stays.
    Meanwhile ``torch.get_float32_matmul_precision()`` raises an error: torch sees a mix of its old and new interfaces.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _n_users: ClassVar[int] = 0
    _before: ClassVar[str] = "none"

    def _recreate_cm(self) -> "OneDnnProducts":
        return OneDnnProducts()  # a decorated function may run in several threads

    def __enter__(self) -> None:
        """Start."""
        self.counted = False
        if not (settings.enabled and onednn_keeps_float32()):
            return
        matmul = cast(Any, th.backends.mkldnn).matmul
        with self._lock:
            if OneDnnProducts._n_users == 0:
                if matmul.fp32_precision not in ("none", "ieee"):
                    return
                OneDnnProducts._before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            OneDnnProducts._n_users += 1
            self.counted = True

    def __exit__(self, *_: object) -> None:
        """End."""
        if not self.counted:
            return
        with self._lock:
            OneDnnProducts._n_users -= 1
            if OneDnnProducts._n_users == 0:
                cast(Any, th.backends.mkldnn).matmul.fp32_precision = self._before


@functools.cache
def keep_freed_memory() -> None:
    """
    Let the C library keep up to 62 MB of freed memory instead of handing it back to the kernel.

    Every large intermediate result is new memory otherwise, which costs more than the arithmetic on it. By default glibc
    adapts what it keeps to the largest block that was freed so far, up to 32 MB: freeing one such block, which was never
    touched, is enough. Other C libraries take no notice.
    """
    th.empty(31 * 2**20, dtype=th.uint8)


class Scratch:
    """Memory for intermediate results that is used again in every block and step."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, th.dtype], th.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: th.dtype = th.float32) -> th.Tensor:
        """
        An uninitialised tensor. Its content lasts until the same name is asked for again.

        :param name: What it is for.
        :param shape: Its shape.
        :param dtype: Its type.
        :return: The tensor.
        """
        size = th.Size(shape).numel()
        tensor = self.tensors.get((name, dtype))
        if tensor is None or len(tensor) < size:
            tensor = self.tensors[name, dtype] = th.empty(size, dtype=dtype)
        return tensor[:size].view(shape)


def mish_of_negated(x: th.Tensor, scratch: Scratch) -> th.Tensor:
    """
    ``mish(-x)``, to 2e-6 for any x, where ``mish(x) = x tanh(log(1 + e^x))``.

    With u the sigmoid of x: ``e^-x = (1 - u) / u``, so ``tanh(log(1 + e^-x)) = (1 - u^2) / (1 + u^2)`` and
    ``mish(-x) = x - 2 x / (1 + u^2)``. Each pass is vectorised in torch, which ``F.mish`` is not. The sign goes into the
    weights of the layer before.

    :param x: Negated pre-activations in float32.
    :param scratch: Memory for the result.
    :return: A tensor of the shape of x, valid until the next call.
    """
    result = scratch("mish", x.shape)
    th.sigmoid(x, out=result)
    th.addcmul(_ONE, result, result, out=result)
    return th.addcdiv(x, x, result, value=-2, out=result)


_ONE = th.tensor(1.0)


class TrainableMish(th.autograd.Function):
    """
    Mish and its derivative in vectorised passes, see :func:`mish_of_negated`. With the sigmoid u of -x and
    ``r = 1 / (1 + u^2)``: ``mish(x) = 2 x r - x`` and ``mish'(x) = (1 - u^2 + 4 x r u^2 (1 - u)) r``. Where a second
    derivative may follow, the first is torch's own.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        """
        Mish.

        :param ctx: Torch's store for the backward pass.
        :param x: Pre-activations.
        :return: A tensor of the same shape.
        """
        sigmoid = th.neg(x).sigmoid_()
        reciprocal = th.addcmul(_ONE.to(x.dtype), sigmoid, sigmoid).reciprocal_()
        double = th.mul(x, reciprocal).mul_(2)
        # u^2 (1 - u), then the rest of the bracket
        derivative = th.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(sigmoid)
        derivative.mul_(double).mul_(2).addcmul_(sigmoid, sigmoid, value=-1).add_(1).mul_(reciprocal)
        ctx.save_for_backward(x, derivative)
        return double.sub_(x)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        """
        Gradient of the input.

        :param ctx: Torch's store.
        :param gradient: Gradient of the output.
        :return: A tensor of the same shape.
        """
        x, derivative = ctx.saved_tensors
        if th.is_grad_enabled():
            (result,) = th.autograd.grad(F.mish(x), x, gradient, create_graph=True)
            return cast(th.Tensor, result)
        return cast(th.Tensor, derivative * gradient)


def trainable_layers(layers: Sequence[nn.Module], n_rows: int) -> Sequence[Callable[[th.Tensor], th.Tensor]]:
    """
    Layers for a loss: the same numbers and gradients, with :class:`TrainableMish` where many rows pay for it.

    :param layers: Layers of a network.
    :param n_rows: Number of rows.
    :return: The layers themselves, or what computes the same.
    """
    widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu"]
    if not (settings.enabled and widths and n_rows * max(widths) >= SMALLEST_SIZE):
        return layers
    return [cast(Any, TrainableMish.apply) if type(layer) is nn.Mish else layer for layer in layers]


def trainable(predictor: NoisePredictor, n_rows: int) -> NoiseNetwork:
    """
    The noise predictor for a loss: the same numbers and gradients, with :class:`TrainableMish` where many rows pay for it.

    :param predictor: The noise predictor.
    :param n_rows: Number of rows.
    :return: The predictor itself, or what computes the same.
    """
    layers = trainable_layers(list(predictor.later_layers), n_rows)
    if all(isinstance(layer, nn.Module) for layer in layers):
        return predictor

    def network(x_t: th.Tensor, t: int | th.Tensor, cond: Condition) -> th.Tensor:
        hidden = predictor.first_output(x_t, t, cond)
        for layer in layers:
            hidden = layer(hidden)
        return hidden

    return network


class FastLayers:
    """
    The layers behind a network's first linear one: activation, linear layer, activation, ..., linear layer.

    A snapshot: weights that change later are not seen.

    Mish takes its input negated, so that the layers before it get other signs. ``sign`` is the one of the first layer.

    :param layers: The readable layers.
    :param dtype: In what the hidden layers are multiplied, float32 or bfloat16. The last layer is multiplied in float32.
    :param scratch: Memory for intermediate results.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: th.dtype, scratch: Scratch):
        self.dtype, self.scratch = dtype, scratch
        self.activations = layers[::2]
        self.sign, *signs = [-1 if type(activation) is nn.Mish else 1 for activation in self.activations] + [1]
        linears = cast(Sequence[nn.Linear], layers[1::2])
        self.weights = [sign * layer.weight.detach() for sign, layer in zip(signs, linears, strict=True)]
        self.biases = [sign * layer.bias.detach() for sign, layer in zip(signs, linears, strict=True)]
        for i in range(len(self.weights) - 1):
            self.weights[i], self.biases[i] = self.weights[i].to(dtype), self.biases[i].to(dtype)

    def __call__(self, hidden: th.Tensor) -> th.Tensor:
        """
        Go through the layers.

        :param hidden: Output of the first linear layer times ``sign``, shape (R, H). It is overwritten.
        :return: Output of the last layer, shape (R, outputs).
        """
        for activation, weight, bias in zip(self.activations[:-1], self.weights[:-1], self.biases[:-1], strict=True):
            hidden = self._linear(self._activate(activation, hidden), weight, bias, hidden)
        return F.linear(self._activate(self.activations[-1], hidden), self.weights[-1], self.biases[-1])

    def _activate(self, activation: nn.Module, hidden: th.Tensor) -> th.Tensor:
        return mish_of_negated(hidden, self.scratch) if type(activation) is nn.Mish else cast(th.Tensor, activation(hidden))

    def _linear(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, out: th.Tensor) -> th.Tensor:
        if self.dtype == th.float32:
            # An activation may return its input
            fits = out.shape[1] == len(weight) and x.data_ptr() != out.data_ptr()
            return th.addmm(bias, x, weight.t(), out=out) if fits else F.linear(x, weight, bias)
        reduced = self.scratch("reduced", tuple(x.shape), self.dtype).copy_(x)
        product = F.linear(reduced, weight, bias)
        return out.copy_(product) if out.shape == product.shape else product.float()


def blocks(n_states: int, n_candidates: int, width: int, dtype: th.dtype) -> list[slice]:
    """
    States whose candidates go through together.

    :param n_states: B.
    :param n_candidates: K.
    :param width: H.
    :param dtype: In what hidden layers are multiplied.
    :return: Slices that cover all states.
    """
    size = min(BLOCK_SIZES[dtype] * th.get_num_threads(), LARGEST_BLOCK)
    step = max(1, size // (n_candidates * width))
    return [slice(start, start + step) for start in range(0, n_states, step)]


@OneDnnProducts()
def sample_candidates(
    diffusion: GaussianDiffusion,
    predictor: NoisePredictor,
    condition: Condition,
    noise: th.Tensor,
    dtype: th.dtype,
    n_shared_steps: int = 0,
) -> th.Tensor:
    """
    What ``diffusion.sample(predictor, condition, noise, n_shared_steps=n_shared_steps)`` returns.

    :param diffusion: The diffusion.
    :param predictor: The noise predictor.
    :param condition: Its condition for B states.
    :param noise: Noise of shape (T, B, K, A).
    :param dtype: In what hidden layers are multiplied.
    :param n_shared_steps: First steps that are shared by all candidates of a state.
    :return: Actions of shape (B, K, A).
    """
    _, n_states, n_candidates, action_dim = noise.shape
    width = predictor.first_layer.out_features
    scratch = Scratch()
    later_layers = FastLayers(list(predictor.later_layers), dtype, scratch)
    action_weight = later_layers.sign * predictor.first_layer.weight.detach()[:, :action_dim].t().contiguous()
    condition = Condition(later_layers.sign * condition.state_part, later_layers.sign * condition.time_parts)

    def network(x_t: th.Tensor, t: int, cond: Condition) -> th.Tensor:
        hidden = scratch("hidden", (x_t.shape[0] * x_t.shape[1], width))
        th.mm(x_t.reshape(-1, action_dim), action_weight, out=hidden)
        hidden.view(*x_t.shape[:2], width).add_(cond.time_parts[t] + cond.state_part)
        return later_layers(hidden).view(x_t.shape)

    parts = []
    for states in blocks(n_states, n_candidates, width, dtype):
        part = Condition(condition.state_part[states], condition.time_parts)
        parts.append(diffusion.sample(network, part, noise[:, states], n_shared_steps=n_shared_steps))
    return th.cat(parts)


def reduces(device: th.device) -> bool:
    """
    Whether :func:`reduced` is for a device.

    :param device: The device.
    :return: True for GPUs with bfloat16, unless float32 is asked for.
    """
    off_the_cpu = settings.enabled and not th.is_grad_enabled() and device.type != "cpu"
    return off_the_cpu and candidate_dtype(device) == th.bfloat16


def reduced(predictor: NoisePredictor) -> NoiseNetwork:
    """
    The noise predictor with its hidden layers in bfloat16, for devices that have fast kernels of their own, GPUs.

    A snapshot: weights that change later are not seen. The first and the last layer are multiplied in float32.

    :param predictor: The noise predictor.
    :return: What stands for it in :meth:`GaussianDiffusion.sample`, or the predictor itself if it is not a usual one.
    """
    layers = list(cast(Any, predictor.later_layers))
    if not alternate(layers):
        return predictor
    hidden_layers = [
        (layers[i], layers[i + 1].weight.bfloat16(), layers[i + 1].bias.bfloat16()) for i in range(0, len(layers) - 2, 2)
    ]
    last_activation, last_layer = layers[-2:]

    def network(x_t: th.Tensor, t: int, cond: Condition) -> th.Tensor:
        hidden = predictor.first_output(x_t, t, cond)
        for activation, weight, bias in hidden_layers:
            # Kernels compute activations in float32 and round what they return
            hidden = F.linear(activation(hidden).bfloat16(), weight, bias)
        return cast(th.Tensor, last_layer(last_activation(hidden.float())))

    return network


def sample_for_one_state(
    diffusion: GaussianDiffusion, predictor: NoisePredictor, condition: Condition, noise: th.Tensor
) -> th.Tensor:
    """
    What ``diffusion.sample(predictor, condition, noise)`` returns, for one state.

    :param diffusion: The diffusion.
    :param predictor: The noise predictor.
    :param condition: Its condition for the state.
    :param noise: Noise of shape (T, 1, K, A).
    :return: Actions of shape (1, K, A).
    """
    action_weight = predictor.first_layer.weight.detach()[:, : noise.shape[-1]].t()
    first_biases = (condition.time_parts + condition.state_part[0]).unbind()
    layers = list(cast(Any, predictor.later_layers))
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    later = [(activation.forward, layer.bias.detach(), layer.weight.detach().t(), 1) for activation, layer in pairs]
    first_sign = 1
    if noise.shape[2] * len(first_biases[0]) >= SMALLEST_VECTORIZED and all(type(pair[0]) is nn.Mish for pair in pairs):
        scratch = Scratch()
        first_sign, last = -1, len(pairs) - 1
        later = [
            (lambda x: mish_of_negated(x, scratch), bias, weight, 1 if i == last else -1)
            for i, (_, bias, weight, _) in enumerate(later)
        ]

    def network(x_t: th.Tensor, t: int, cond: None) -> th.Tensor:
        hidden = th.addmm(first_biases[t], x_t, action_weight, beta=first_sign, alpha=first_sign)
        for activate, bias, weight, sign in later:
            hidden = th.addmm(bias, activate(hidden), weight, beta=sign, alpha=sign)
        return hidden

    return diffusion.sample(network, None, noise.squeeze(1)).unsqueeze(0)


@OneDnnProducts()
def value_candidates(q_network: nn.Sequential, state_part: th.Tensor, candidates: th.Tensor) -> th.Tensor:
    """
    Values of candidates by one critic, in float32.

    :param q_network: The critic.
    :param state_part: State part of its first layer, with the bias, shape (B, 1, H).
    :param candidates: Actions of shape (B, K, A).
    :return: Values of shape (B, K).
    """
    n_states, n_candidates, action_dim = candidates.shape
    first_layer, *later_modules = cast(Any, q_network)
    width = first_layer.out_features
    scratch = Scratch()
    later_layers = FastLayers(later_modules, th.float32, scratch)
    action_weight = later_layers.sign * first_layer.weight.detach()[:, -action_dim:].t().contiguous()
    state_part = later_layers.sign * state_part
    values = []
    for states in blocks(n_states, n_candidates, width, th.float32):
        rows = candidates[states].reshape(-1, action_dim)
        hidden = scratch("hidden", (len(rows), width))
        th.mm(rows, action_weight, out=hidden)
        hidden.view(-1, n_candidates, width).add_(state_part[states])
        values.append(later_layers(hidden).view(-1, n_candidates))
    return th.cat(values)
