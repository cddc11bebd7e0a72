"""Stopping at the first number that is not finite, before it reaches the weights."""

from collections.abc import Mapping

import numpy as np
import torch as th
from torch import nn

from sb3_qvpo.common.speed.optimizers import check_fused, step_or_undo

REPORT_INTERVAL = 100
"""How many updates may pass on an accelerator before a step that was undone is reported."""


def check_finite_array(name: str, value: np.ndarray | Mapping[str, np.ndarray], step: int) -> None:
    """
    Refuse an array from the environment, or a dictionary of arrays, that holds NaN or infinity.

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

    On the CPU a bad batch, loss or gradient raises at once. On an accelerator reading a number back would stall every update.
    So errors are ``deferred`` there: a bad step is undone on the device and reported within :data:`REPORT_INTERVAL` updates.
    """

    def __init__(self, deferred: bool, device: th.device | str = "cpu"):
        self.deferred = deferred
        self.last_report = 0
        self._first_bad_update: dict[str, th.Tensor] = {}
        self._update = 0
        # The same number on the device, always in one tensor, because a graph reads it
        self._update_on_device = th.zeros((), dtype=th.int64, device=device)

    def start_update(self, update: int, batch: Mapping[str, object]) -> None:
        """
        Refuse a batch that holds NaN or infinity, before it reaches batch-norm statistics. If ``deferred``, report what is due
        instead. Updates are counted from 1. Fields that are neither tensors nor dictionaries of them are not looked at.

        :raises ValueError: If any number is not finite, naming the tensor.
        """
        self._update = update
        if not self.deferred:
            self._check_batch(batch)
            return
        self._update_on_device.fill_(update)
        if update - self.last_report >= REPORT_INTERVAL:
            self.report(update)

    def _check_batch(self, batch: Mapping[str, object]) -> None:
        for name, value in batch.items():
            if isinstance(value, Mapping):
                self._check_batch({f"{name}[{key!r}]": part for key, part in value.items()})
            elif isinstance(value, th.Tensor) and not value.isfinite().all():
                raise ValueError(self._message(f"{name} in the replay buffer", self._update))

    def step(self, optimizer: th.optim.Optimizer, loss_name: str, loss: th.Tensor, max_grad_norm: float | None = None) -> None:
        """
        Take an optimiser step after ``loss.backward()``, if loss and gradients are finite. Before it, clip the Euclidean norm
        of all gradients together, unless ``max_grad_norm`` is None.

        :raises ValueError: If the loss or a gradient is not finite (later, in :meth:`report`, if ``deferred``).
        """
        check_fused(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        finite = loss.detach().isfinite() & norm.isfinite()
        if not self.deferred and not finite:
            optimizer.zero_grad()
            value = loss.item()
            what = f"{loss_name} ({value})" if not np.isfinite(value) else f"gradient of {loss_name}"
            raise ValueError(self._message(what, self._update))
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        if self.deferred:
            step_or_undo(optimizer, parameters, finite)
            # In place: in a graph it stays the same tensor
            first = self._first_bad_update.setdefault(loss_name, th.zeros((), dtype=th.int64, device=loss.device))
            first.copy_(th.where((first == 0) & ~finite, self._update_on_device, first))
        else:
            optimizer.step()

    def tensors(self) -> list[th.Tensor]:
        """The tensors that steps write to while errors are deferred."""
        return list(self._first_bad_update.values())

    def report(self, update: int) -> None:
        """
        Raise if a step was undone since the last report. Waits for the accelerator.

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
            "replay buffer are intact and can be saved. Usual causes: rewards or observations of very large size, a learning "
            "rate that is too high (try max_grad_norm), or a custom network."
        )
