"""
Many rows through a network without gradients, at the speed of the processor and with the eager numbers.

No mathematics is defined here: :meth:`DiffusionProcess.sample` runs the chain as always, with a network that returns what
:class:`NoisePredictor` returns. What is different:

- Rows go through in blocks that fit into the processor's caches, which also bounds memory. Freed memory is kept:
  :func:`keep_freed_memory`.
- Mish takes three vectorised passes (:func:`mish_of_negated`). torch computes ``log1p`` and ``tanh`` one number at a time.
- oneDNN multiplies matrices, see :class:`OneDnnProducts`. In float32 torch takes MKL by default, which is half as fast on AMD
  processors. Losses use this and Mish as well.
- Candidates that only serve training may have their hidden layers multiplied in bfloat16 where the processor has it in
  hardware. So may values that only choose among candidates, or weigh SDAC's draws. No gradient flows through either. All
  other values, and all that is trained, stay in float32.

Few rows of several states take the eager path: :func:`worth_blocking`. The candidates of one state, an action, are few. There
calls of torch cost more than the numbers, so :func:`sample_for_one_state` makes five calls a step instead of twelve.

Shapes: B batch, K candidates for each state, A action dimensions, R rows of a block, H width of a hidden layer.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any, ClassVar, cast

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.diffusion import DiffusionProcess
from sb3_qvpo.common.networks import Condition, NoisePredictor
from sb3_qvpo.common.speed.settings import settings

BLOCK_SIZES = {th.float32: 2**18, th.bfloat16: 2**19}
"""Elements in a hidden layer of a block for each thread, by type: 1024 and 2048 rows of width 256 were the fastest."""

LARGEST_BLOCK = 2**23
"""Largest number of elements (32 MB in float32) in a hidden layer of a block, which bounds memory on many threads."""

SMALLEST_SIZE = 2**14
"""Elements in a hidden layer, 64 rows of width 256, below which the eager path is as fast."""

SMALLEST_VECTORIZED = 2**12
"""Elements, 16 rows of width 256, from which on five vectorised calls are faster than one that is not."""

TOO_BUSY = 1.5
"""Load average per core above which to warn. One run on all cores gives 1, two give 2."""

# What an MLP looks like


class ConstantLinear:
    """
    A linear layer with given weights. It is no module, because making one takes longer than computing its weights.

    :param weight: Shape (outputs, inputs).
    :param bias: Shape (outputs,).
    """

    def __init__(self, weight: th.Tensor, bias: th.Tensor):
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Outputs of shape (R, outputs) for rows of shape (R, inputs)."""
        return F.linear(x, self.weight, self.bias)


LINEAR = (nn.Linear, ConstantLinear)
"""Types of linear layers."""

Layers = Sequence[Any]
"""Linear layers and activations in turn, the first and the last of them linear; or those behind the first."""


def is_plain_mlp(layers: Layers) -> bool:
    """Whether the layers behind a first linear one are activation, linear layer, activation, ..., linear layer."""
    linear = [type(layer) in LINEAR and layer.bias is not None for layer in layers]
    return len(layers) >= 2 and linear == [i % 2 == 1 for i in range(len(layers))]


def cpu_path_exists(layers: Layers, device: th.device) -> bool:
    """Whether this module serves the layers behind a first linear one: on the CPU, without gradients, for a plain MLP."""
    return device.type == "cpu" and not th.is_grad_enabled() and is_plain_mlp(layers)


def worth_blocking(layers: Layers, n_rows: int, device: th.device) -> bool:
    """True if the fast path exists here and there are enough rows to pay for it."""
    return cpu_path_exists(layers, device) and n_rows * int(layers[1].in_features) >= SMALLEST_SIZE


# The process


@functools.cache
def onednn_keeps_float32() -> bool:
    """
    Whether oneDNN still multiplies in float32 where torch allows it bfloat16.

    It does on processors without AMX, which have no faster way. One product is tried, once in a process, and its error tells.
    False also if torch has no such setting (before 2.9) or was built without oneDNN.
    """
    has_onednn: bool = th.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    matmul: Any = getattr(th.backends.mkldnn, "matmul", None)
    if not (has_onednn and hasattr(matmul, "fp32_precision")):
        return False
    generator = th.Generator("cpu").manual_seed(0)
    x, weight = (th.randn(n, 256, generator=generator, device="cpu") for n in (512, 256))
    exact = x.double() @ weight.double().t()
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        error = (F.linear(x, weight) - exact).abs().max()
    finally:
        matmul.fp32_precision = before
    return bool(error < 1e-3)  # about 5e-5 in float32, 0.2 in bfloat16, for values up to 80


class OneDnnProducts(ContextDecorator):
    """
    A context in which oneDNN multiplies float32 matrices, if that costs no precision (:func:`onednn_keeps_float32`).

    torch only offers this as a setting of the process. The last thread to leave puts it back, and a user's own setting stays.
    Inside, ``torch.get_float32_matmul_precision()`` raises an error, because torch sees a mix of its old and new interfaces.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _n_users: ClassVar[int] = 0
    _before: ClassVar[str] = "none"

    def _recreate_cm(self) -> "OneDnnProducts":
        return OneDnnProducts()  # a decorated function may run in several threads

    def __enter__(self) -> None:
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
        if not self.counted:
            return
        with self._lock:
            OneDnnProducts._n_users -= 1
            if OneDnnProducts._n_users == 0:
                cast(Any, th.backends.mkldnn).matmul.fp32_precision = self._before


@functools.cache
def keep_freed_memory() -> None:
    """
    Raise glibc's threshold so that large temporaries reuse memory. Otherwise each one is mapped afresh, and the page faults
    cost more than the arithmetic.

    glibc adapts the threshold to the largest block that was freed so far, up to 32 MB. So one such block is freed here, which
    was never touched. 62 MB are kept then. Other C libraries take no notice.
    """
    th.empty(31 * 2**20, dtype=th.uint8, device="cpu")


has_warned = False


def warn_of_busy_cores() -> None:
    """
    Say once in a process that one thread would be faster, if the load average shows it.

    OpenMP's threads wait for each other actively. So on two cores, two runs with two threads each take several times as long
    as with one thread each.
    """
    global has_warned
    if has_warned or th.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return
    load, n_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > TOO_BUSY * n_cores:
        has_warned = True
        warnings.warn(
            f"{load:.1f} threads want to run on {n_cores} cores, {th.get_num_threads()} of them of this run: if several runs "
            "share the machine, each is faster with one thread, OMP_NUM_THREADS=1 or torch.set_num_threads(1)",
            stacklevel=2,
        )


# Mish


class Scratch:
    """Memory for intermediate results that is used again in every block and step."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, th.dtype], th.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: th.dtype = th.float32) -> th.Tensor:
        """An uninitialised tensor. Its content lasts until the same name is asked for again."""
        size = th.Size(shape).numel()
        tensor = self.tensors.get((name, dtype))
        if tensor is None or len(tensor) < size:
            tensor = self.tensors[name, dtype] = th.empty(size, dtype=dtype, device="cpu")
        return tensor[:size].view(shape)


_ONE = th.tensor(1.0, device="cpu")


def mish_of_negated(x: th.Tensor, scratch: Scratch) -> th.Tensor:
    """
    ``mish(-x)``, to 2e-6 for any x, where ``mish(x) = x tanh(log(1 + e^x))``. The result is valid until the next call.

    With u the sigmoid of x: ``e^-x = (1 - u) / u``, so ``tanh(log(1 + e^-x)) = (1 - u^2) / (1 + u^2)`` and
    ``mish(-x) = x - 2 x / (1 + u^2)``. torch vectorises each of these passes, but not ``F.mish``. The weights of the layer
    before take the sign.
    """
    result = scratch("mish", x.shape)
    th.sigmoid(x, out=result)
    th.addcmul(_ONE, result, result, out=result)
    return th.addcdiv(x, x, result, value=-2, out=result)


class TrainableMish(th.autograd.Function):
    """
    Mish and its derivative in vectorised passes, see :func:`mish_of_negated`. With the sigmoid u of -x and
    ``r = 1 / (1 + u^2)``: ``mish(x) = 2 x r - x`` and ``mish'(x) = (1 - u^2 + 4 x r u^2 (1 - u)) r``. If a second
    derivative may follow, the first is torch's own.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        """Mish of pre-activations."""
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
        """Gradient of the input, from that of the output."""
        x, derivative = ctx.saved_tensors
        if th.is_grad_enabled():
            (result,) = th.autograd.grad(F.mish(x), x, gradient, create_graph=True)
            return cast(th.Tensor, result)
        return cast(th.Tensor, derivative * gradient)


def trainable_layers(layers: Layers, n_rows: int) -> Sequence[Any] | None:
    """Layers for a loss, with :class:`TrainableMish` for Mish. None if that does not pay."""
    widths = [layer.out_features for layer in layers if isinstance(layer, LINEAR) and layer.weight.device.type == "cpu"]
    has_mish = any(type(layer) is nn.Mish for layer in layers)
    if not (settings.enabled and has_mish and widths and n_rows * max(widths) >= SMALLEST_SIZE):
        return None
    return [cast(Any, TrainableMish.apply) if type(layer) is nn.Mish else layer for layer in layers]


# Rows through layers


class FastLayers:
    """
    The layers behind a network's first linear one: activation, linear layer, activation, ..., linear layer.

    A snapshot: weights that change later are not seen. Hidden layers are multiplied in ``dtype``, float32 or bfloat16, the
    last one in float32. Few rows do not pay for ``vectorized`` Mish. It takes its input negated, so the weights of the layer
    before it change their sign. ``sign`` is that of the network's first layer.
    """

    def __init__(self, layers: Layers, dtype: th.dtype, scratch: Scratch, vectorized: bool = True):
        self.dtype = dtype
        self.scratch = scratch
        is_mish = [vectorized and type(activation) is nn.Mish for activation in layers[::2]]
        self.activations: list[Callable[[th.Tensor], th.Tensor]] = [
            (lambda x: mish_of_negated(x, scratch)) if mish else in_place(activation)
            for mish, activation in zip(is_mish, layers[::2], strict=True)
        ]
        self.sign, *signs = [-1 if mish else 1 for mish in is_mish] + [1]
        linears = layers[1::2]
        self.weights = [_signed(sign, layer.weight.detach()) for sign, layer in zip(signs, linears, strict=True)]
        self.biases = [_signed(sign, layer.bias.detach()) for sign, layer in zip(signs, linears, strict=True)]
        for i in range(len(self.weights) - 1):
            self.weights[i], self.biases[i] = self.weights[i].to(dtype), self.biases[i].to(dtype)

    def __call__(self, hidden: th.Tensor) -> th.Tensor:
        """
        Output of the last layer, shape (R, outputs), from that of the first one times ``sign``, shape (R, H), which is
        overwritten.
        """
        for activate, weight, bias in zip(self.activations[:-1], self.weights[:-1], self.biases[:-1], strict=True):
            hidden = self._linear(activate(hidden), weight, bias, hidden)
        return F.linear(self.activations[-1](hidden), self.weights[-1], self.biases[-1])

    def _linear(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, out: th.Tensor) -> th.Tensor:
        if self.dtype == th.float32:
            # An activation may return its input, which must not be overwritten here
            for spare in ("first output", "second output"):
                if out.shape[1] != len(weight) or out.data_ptr() == x.data_ptr():
                    out = self.scratch(spare, (len(x), len(weight)))
            return th.addmm(bias, x, weight.t(), out=out)
        reduced = self.scratch("reduced", tuple(x.shape), self.dtype).copy_(x)
        product = F.linear(reduced, weight, bias)
        return out.copy_(product) if out.shape == product.shape else product.float()


def in_place(activation: nn.Module) -> Callable[[th.Tensor], th.Tensor]:
    """The activation, if it is ReLU without memory for its result. For inputs that nobody needs again."""
    return (lambda x: x.clamp_(min=0)) if type(activation) is nn.ReLU else activation.forward


def _signed(sign: int, tensor: th.Tensor) -> th.Tensor:
    return tensor if sign == 1 else tensor.neg()


def blocks(n_states: int, n_candidates: int, width: int, dtype: th.dtype) -> list[slice]:
    """States whose candidates go through together, as slices that cover all states."""
    size = min(BLOCK_SIZES[dtype] * th.get_num_threads(), LARGEST_BLOCK)
    step = max(1, size // (n_candidates * width))
    return [slice(start, start + step) for start in range(0, n_states, step)]


@OneDnnProducts()
def sample_in_blocks(
    diffusion: DiffusionProcess, predictor: NoisePredictor, condition: Condition, noise: th.Tensor, dtype: th.dtype
) -> th.Tensor:
    """What ``diffusion.sample(predictor, condition, noise)`` returns, with hidden layers multiplied in ``dtype``."""
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
        parts.append(diffusion.sample(network, part, noise[:, states]))
    return th.cat(parts)


def sample_for_one_state(
    diffusion: DiffusionProcess, predictor: NoisePredictor, condition: Condition, noise: th.Tensor
) -> th.Tensor:
    """What ``diffusion.sample(predictor, condition, noise)`` returns, for one state."""
    n_candidates, action_dim = noise.shape[2:]
    width = predictor.first_layer.out_features
    later_layers = FastLayers(
        list(predictor.later_layers), th.float32, Scratch(), vectorized=n_candidates * width >= SMALLEST_VECTORIZED
    )
    action_weight = _signed(later_layers.sign, predictor.first_layer.weight.detach()[:, :action_dim].t())
    biases = _signed(later_layers.sign, condition.time_parts + condition.state_part[0])
    first_biases = biases.unbind()

    # With few rows a call costs more than the numbers. So the layers are called here, without scratch memory for their results
    weights = [weight.t() for weight in later_layers.weights]
    layers = list(zip(later_layers.activations, later_layers.biases, weights, strict=True))

    def network(x_t: th.Tensor, t: int | th.Tensor, cond: None) -> th.Tensor:
        # Looking up in a tuple costs less, but a process may count its steps in a tensor
        bias_at_t = first_biases[t] if isinstance(t, int) else biases[t]
        hidden = th.addmm(bias_at_t, x_t, action_weight)
        for activate, bias, weight in layers:
            hidden = th.addmm(bias, activate(hidden), weight)
        return hidden

    return diffusion.sample(network, None, noise.squeeze(1)).unsqueeze(0)


@OneDnnProducts()
def value_in_blocks(layers: Layers, state_part: th.Tensor, candidates: th.Tensor, dtype: th.dtype) -> th.Tensor:
    """
    What one critic predicts for candidates (B, K, A), with hidden layers multiplied in ``dtype``, shape (B, K, M). The state
    part of its first layer, with the bias, has shape (B, 1, H).
    """
    n_states, n_candidates, action_dim = candidates.shape
    first_layer, *later_modules = layers
    width = first_layer.out_features
    scratch = Scratch()
    later_layers = FastLayers(later_modules, dtype, scratch)
    action_weight = later_layers.sign * first_layer.weight.detach()[:, -action_dim:].t().contiguous()
    state_part = later_layers.sign * state_part
    predictions = []
    for states in blocks(n_states, n_candidates, width, dtype):
        rows = candidates[states].reshape(-1, action_dim)
        hidden = scratch("hidden", (len(rows), width))
        th.mm(rows, action_weight, out=hidden)
        hidden.view(-1, n_candidates, width).add_(state_part[states])
        predictions.append(later_layers(hidden).view(len(rows) // n_candidates, n_candidates, -1))
    return th.cat(predictions)
