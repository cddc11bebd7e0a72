"""
How an optimiser takes its step: in torch's fused kernels, inside a graph, and undone if a number is not finite.

A fused step is one pass over all weights on the CPU, and one launch on a GPU. A graph needs learning rates and step counts
that are tensors on the device. Saved files hold plain numbers and the kernel that the user has chosen.
"""

from typing import Any, cast

import torch as th
from torch import nn

from sb3_qvpo.common.speed.settings import settings

FUSED_KINDS = (th.optim.Adam, th.optim.AdamW)
"""Optimisers whose steps are fused. Their fused kernels skip a step when `found_inf` is set, without a synchronisation."""

FUSED_ON = ("cpu", "cuda")
"""Devices that have these kernels."""


def chooses_kernel(optimizer: th.optim.Optimizer) -> bool:
    """Whether the user left the choice of kernel to us: Adam and AdamW (no subclasses) with neither `fused` nor `foreach`."""
    chosen = [optimizer.defaults.get(name) for name in ("fused", "foreach")]
    return type(optimizer) in FUSED_KINDS and chosen == [None, None] and not optimizer.defaults["differentiable"]


def use_fused(optimizer: th.optim.Optimizer) -> None:
    """
    Let Adam and AdamW take their step in torch's fused kernel, unless the user has chosen another. The step is the same, up to
    rounding. It takes a fifth of the time on the CPU, and one launch instead of a dozen on a GPU.

    Call it again after a state was loaded, because files hold what the user has chosen.
    """
    for group in optimizer.param_groups if "fused" in optimizer.defaults else ():
        group["fused"] = optimizer.defaults["fused"]
        parameters: list[nn.Parameter] = group["params"]
        if not (settings.enabled and chooses_kernel(optimizer)):
            continue
        if all(parameter.device.type in FUSED_ON and parameter.is_floating_point() for parameter in parameters):
            group["fused"] = True
            for parameter in parameters:
                values = optimizer.state.get(parameter, {})
                if "step" in values:
                    values["step"] = values["step"].to(parameter.device)


def check_fused(optimizer: th.optim.Optimizer) -> None:
    """
    Before a step, go back to the usual kernel if a tensor is not contiguous, as a part of a larger one may be. The fused
    kernel takes memory as it lies, and would silently be wrong.
    """
    if not chooses_kernel(optimizer):
        return
    for group in optimizer.param_groups:
        tensors = [
            tensor
            for parameter in group["params"]
            for tensor in (parameter, parameter.grad, *optimizer.state.get(parameter, {}).values())
        ]
        if group["fused"] and not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
            group["fused"] = None


def step_or_undo(optimizer: th.optim.Optimizer, parameters: list[nn.Parameter], finite: th.Tensor) -> None:
    """Take the step if ``finite``, else leave parameters and optimiser state as they are, without reading ``finite``."""
    if type(optimizer) in FUSED_KINDS and all(group["fused"] for group in optimizer.param_groups):
        # As mixed precision's GradScaler does
        cast(Any, optimizer).found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del cast(Any, optimizer).found_inf
        return
    state = [
        value
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, th.Tensor) and value.device == parameter.device
    ]
    with th.no_grad():
        kept = [(tensor, tensor.clone()) for tensor in (*parameters, *state)]
        for parameter in parameters:
            # The first step creates the optimiser's state. It must start from zeros, not from NaN
            parameter.grad = th.where(finite, cast(th.Tensor, parameter.grad), 0.0)
        optimizer.step()
        for tensor, before in kept:
            tensor.copy_(th.where(finite, tensor, before))


# In graphs

RATES = "learning_rates_in_graphs"
"""The optimiser's attribute that holds the learning rates that graphs read, one tensor for each group."""


def make_capturable(optimizer: th.optim.Optimizer) -> bool:
    """
    Move an optimiser's step counts and learning rates to the device of its parameters, so that a graph can hold its step.

    False if the optimiser has no ``capturable`` argument, and so no graph can hold it.
    """
    if not all("capturable" in group for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"] = True
        if not isinstance(group["lr"], th.Tensor):
            group["lr"] = th.full((), group["lr"], device=device)
        for parameter in group["params"]:
            values = optimizer.state.get(parameter, {})
            if isinstance(values.get("step"), th.Tensor):
                values["step"] = values["step"].to(device)
    vars(optimizer)[RATES] = [group["lr"] for group in optimizer.param_groups]
    return True


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate, in place where a graph reads it."""
    tensors: list[th.Tensor] = vars(optimizer).get(RATES, [])
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = tensors[i].fill_(learning_rate) if i < len(tensors) else learning_rate


def forget_graphs(optimizer: th.optim.Optimizer) -> None:
    """Drop the tensors that graphs read. To be called before a state is loaded, which has plain learning rates and counts."""
    vars(optimizer).pop(RATES, None)


def plain_state(optimizer: th.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """
    An optimiser's ``state_dict()`` as a file should hold it: the kernel that the user has chosen, plain learning rates and
    counts. ``state`` itself is not changed.
    """
    groups = [dict(group) for group in state["param_groups"]]
    values = state["state"]
    for group in groups:
        if "fused" in group:
            group["fused"] = optimizer.defaults.get("fused")
    if any(isinstance(group["lr"], th.Tensor) for group in groups):
        for group in groups:
            group.update(capturable=False, lr=float(group["lr"]))
        values = {
            index: {name: value.cpu() if name == "step" else value for name, value in cast(dict[str, Any], each).items()}
            for index, each in values.items()
        }
    return {**state, "param_groups": groups, "state": values}
