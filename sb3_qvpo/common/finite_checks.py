"""Stopping at the first number that is not finite, before it reaches the weights."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch as th
from torch import nn

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
    Keeps non-finite losses and gradients out of the weights.

    On the CPU a bad step raises at once. On an accelerator reading a number back would stall every update, so a bad step is
    masked there (its gradients are set to 0) and reported within :data:`REPORT_INTERVAL` updates.

    :param deferred: Mask now and report later, instead of raising at once.
    """

    def __init__(self, deferred: bool):
        self.deferred = deferred
        self.last_report = 0
        self._first_bad_update: dict[str, th.Tensor] = {}

    def protect_step(
        self, loss_name: str, loss: th.Tensor, parameters: Iterable[nn.Parameter], update: int, max_grad_norm: float | None
    ) -> None:
        """
        To be called between ``loss.backward()`` and ``optimizer.step()``. Also clips the gradients.

        :param loss_name: Name of the loss, for the message.
        :param loss: The loss, a scalar.
        :param parameters: The parameters about to be changed.
        :param update: Number of this update, from 1.
        :param max_grad_norm: Largest Euclidean norm of all gradients together, None for no clipping.
        :raises ValueError: If the loss or a gradient is not finite (later, in :meth:`report`, if ``deferred``).
        """
        if self.deferred and update - self.last_report >= REPORT_INTERVAL:
            self.report(update)
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = loss.detach().isfinite() & norm.isfinite()
        if self.deferred:
            for gradient in gradients:
                gradient.copy_(th.where(finite, gradient, 0.0))
            norm = th.where(finite, norm, 0.0)
            bad_update = th.where(finite, 0, update)
            earlier = self._first_bad_update.get(loss_name, th.zeros_like(bad_update))
            self._first_bad_update[loss_name] = th.where(earlier == 0, bad_update, earlier)
        elif not finite:
            for parameter in parameters:
                parameter.grad = None
            value = loss.item()
            what = f"{loss_name} ({value})" if not np.isfinite(value) else f"gradient of {loss_name}"
            raise ValueError(self._message(what, update))
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)

    def report(self, update: int) -> None:
        """
        Raise if a step was masked since the last report. Waits for the accelerator.

        :param update: Number of the latest update.
        :raises ValueError: Naming the loss and the first bad update.
        """
        self.last_report = update
        found, self._first_bad_update = self._first_bad_update, {}
        for loss_name, bad_update in found.items():
            if bad_update.item() > 0:
                raise ValueError(self._message(loss_name, int(bad_update.item())))

    @staticmethod
    def _message(what: str, update: int) -> str:
        return (
            f"Non-finite {what} in gradient update {update}; it must be finite. The step was not taken: the weights and the "
            "replay buffer are intact and can be saved. Usual causes: rewards of very large size, a learning rate that is "
            "too high (try max_grad_norm), or a custom network."
        )
