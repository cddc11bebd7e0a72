"""Stopping at the first number that is not finite, before it reaches the weights."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch as th
from torch import nn

from sb3_qvpo.common.fused_steps import FUSED_KINDS

REPORT_INTERVAL = 100
"""How many updates may pass on an accelerator before a masked step is reported."""


def check_finite_array(name: str, value: np.ndarray | Mapping[str, np.ndarray], step: int) -> None:
    """
    Refuse an array from the environment that holds NaN or infinity.

    :param name: What the array is, for the message.
    :param value: An array of any shape, or a dictionary of them.
    :param step: Number of environment steps so far, for the message.
    :raises ValueError: If any number is not finite, naming the array, the step and the value.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_finite_array(f"{name}[{key!r}]", part, step)
        return
    value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.floating) or np.isfinite(value).all():
        return
    bad = value[~np.isfinite(value)].flat[0]
    raise ValueError(
        f"The environment returned a non-finite {name} ({bad}) at environment step {step}; it must be finite. It was not "
        "stored: the weights and the replay buffer are intact and can be saved. Check the environment at this step."
    )


class FiniteGuard:
    """
    Keeps numbers that are not finite out of the weights.

    On the CPU a bad batch, loss or gradient raises at once. On an accelerator reading a number back would stall every update,
    so a bad step is undone there on the device and reported within :data:`REPORT_INTERVAL` updates.

    :param deferred: Undo now and report later, instead of raising at once.
    """

    def __init__(self, deferred: bool):
        self.deferred = deferred
        self.last_report = 0
        self._first_bad_update: dict[str, th.Tensor] = {}

    def check_batch(self, batch: Mapping[str, th.Tensor | Mapping[str, th.Tensor] | None], update: int) -> None:
        """
        Refuse a batch that holds NaN or infinity, before it reaches batch-norm statistics. If ``deferred``, report what is due
        instead.

        :param batch: Tensors by name, or dictionaries of them.
        :param update: Number of this update, from 1.
        :raises ValueError: If any number is not finite, naming the tensor.
        """
        if self.deferred:
            if update - self.last_report >= REPORT_INTERVAL:
                self.report(update)
            return
        for name, value in batch.items():
            if isinstance(value, Mapping):
                self.check_batch({f"{name}[{key!r}]": part for key, part in value.items()}, update)
            elif value is not None and not value.isfinite().all():
                raise ValueError(self._message(f"{name} in the replay buffer", update))

    def step(
        self,
        optimizer: th.optim.Optimizer,
        loss_name: str,
        loss: th.Tensor,
        update: int | th.Tensor,
        max_grad_norm: float | None,
    ) -> None:
        """
        Take an optimiser step after ``loss.backward()``, if loss and gradients are finite. Also clips the gradients.

        :param optimizer: The optimiser.
        :param loss_name: Name of the loss, for the message.
        :param loss: The loss, a scalar.
        :param update: Number of this update, from 1; a tensor where updates are captured in a graph.
        :param max_grad_norm: Largest Euclidean norm of all gradients together, None for no clipping.
        :raises ValueError: If the loss or a gradient is not finite (later, in :meth:`report`, if ``deferred``).
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        finite = loss.detach().isfinite() & norm.isfinite()
        if not self.deferred and not finite:
            optimizer.zero_grad()
            value = loss.item()
            what = f"{loss_name} ({value})" if not np.isfinite(value) else f"gradient of {loss_name}"
            raise ValueError(self._message(what, int(update)))
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        if self.deferred:
            self._step_or_undo(optimizer, parameters, finite)
            # In place: in a graph it stays the same tensor
            first = self._first_bad_update.setdefault(loss_name, th.zeros((), dtype=th.int64, device=loss.device))
            first.copy_(th.where((first == 0) & ~finite, update, first))
        else:
            optimizer.step()

    @staticmethod
    def _step_or_undo(optimizer: th.optim.Optimizer, parameters: list[nn.Parameter], finite: th.Tensor) -> None:
        """Take the step, or leave parameters and optimiser state as they are if ``finite`` is false, without reading it."""
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
                # A first step creates its state: from zeros rather than from NaN
                parameter.grad = th.where(finite, cast(th.Tensor, parameter.grad), 0.0)
            optimizer.step()
            for tensor, before in kept:
                tensor.copy_(th.where(finite, tensor, before))

    def tensors(self) -> list[th.Tensor]:
        """
        What steps write to while errors are deferred.

        :return: The tensors.
        """
        return list(self._first_bad_update.values())

    def report(self, update: int) -> None:
        """
        Raise if a step was masked since the last report. Waits for the accelerator.

        :param update: Number of the latest update.
        :raises ValueError: Naming the loss and the first bad update.
        """
        self.last_report = update
        found = {loss_name: int(first.item()) for loss_name, first in self._first_bad_update.items()}
        for first in self._first_bad_update.values():
            first.zero_()
        for loss_name, bad_update in found.items():
            if bad_update > 0:
                raise ValueError(self._message(loss_name, bad_update))

    @staticmethod
    def _message(what: str, update: int) -> str:
        return (
            f"Non-finite {what} in gradient update {update}; it must be finite. The step was not taken: the weights and the "
            "replay buffer are intact and can be saved. Usual causes: rewards of very large size, a learning rate that is "
            "too high (try max_grad_norm), or a custom network."
        )
