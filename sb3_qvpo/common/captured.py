"""
Updates on a GPU as one graph each: a few hundred small kernels, which cost more to launch than to run, become one launch.

No mathematics is defined here. The first updates run as they are written; then one is captured in a CUDA graph and checked:
the same update, from the same state with the same random numbers, must give the same weights both ways. If it does not, or if
it cannot be captured (a features extractor that reads numbers back, say), there is one warning and all goes on as before.

Capturing needs tensors that stay where they are. So batches are copied into fixed ones, and learning rates and the steps of
optimisers are tensors on the device; saved files hold plain numbers instead (:func:`plain_state`).
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch as th

EAGER_UPDATES = 10
"""Updates of a kind that run as they are written before one is captured."""

MOST_GRAPHS = 8
"""Kinds of updates that are captured: settings that change all the time are not."""

TOLERANCE = 1e-4
"""Largest difference between a weight after the captured and after the written update, relative to the largest weight."""

Results = dict[str, th.Tensor]
Function = Callable[..., Results]
Capture = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]

_learning_rates: WeakKeyDictionary[th.optim.Optimizer, list[th.Tensor]] = WeakKeyDictionary()


def cuda_graph(function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """
    Capture a function that takes and returns tensors that stay where they are. It is not run.

    :param function: The function.
    :return: A function that runs it, and its results, which are overwritten at each run.
    """
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        results = function()
    return graph.replay, results


def on_side_stream(function: Callable[[], Results], device: th.device) -> Results:
    """
    Run a function that is to be captured afterwards: it must not have run on the default stream only.

    :param function: The function.
    :param device: Its device.
    :return: Its results.
    """
    if device.type != "cuda":
        return function()
    stream = th.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(th.cuda.current_stream(device))
    with th.cuda.stream(stream):
        results = function()
    th.cuda.current_stream(device).wait_stream(stream)
    return results


class CapturedUpdates:
    """
    Runs updates, captured ones where there are.

    :param state: The tensors that an update changes, besides those of the optimisers.
    :param optimizers: The optimisers that an update uses.
    :param device: The device of the updates.
    :param capture: How to capture a function, :func:`cuda_graph` unless for a test.
    """

    def __init__(
        self,
        state: Callable[[], Sequence[th.Tensor]],
        optimizers: Sequence[th.optim.Optimizer],
        device: th.device,
        capture: Capture = cuda_graph,
    ):
        self.state, self.optimizers, self.device, self.capture = state, optimizers, device, capture
        self.graphs: dict[Hashable, tuple[Callable[[], None], list[th.Tensor], Results]] = {}
        self.counts: dict[Hashable, int] = {}
        self.failed = False

    def __call__(self, function: Function, arguments: Sequence[th.Tensor], kind: Hashable) -> Results:
        """
        Run an update.

        :param function: The update, a function of tensors that returns its metrics.
        :param arguments: Its arguments.
        :param kind: All settings that it reads, so that another kind is another graph.
        :return: Its metrics; the next update overwrites them.
        """
        kind = (kind, *((argument.shape, argument.dtype) for argument in arguments))
        if self.failed:
            return function(*arguments)
        if kind not in self.graphs:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if self.counts[kind] <= EAGER_UPDATES or len(self.graphs) >= MOST_GRAPHS:
                return function(*arguments)
            return self._capture(function, arguments, kind)
        replay, inputs, results = self.graphs[kind]
        for fixed, argument in zip(inputs, arguments, strict=True):
            fixed.copy_(argument, non_blocking=True)
        replay()
        return results

    def _capture(self, function: Function, arguments: Sequence[th.Tensor], kind: Hashable) -> Results:
        try:
            if not all([make_capturable(optimizer) for optimizer in self.optimizers]):
                raise RuntimeError("the optimiser has no 'capturable' argument")
            before, random_state = self._snapshot(), self._random_state()
        except Exception as error:  # nothing has been run so far
            return self._fail(error, function, arguments)
        written_results = on_side_stream(lambda: function(*arguments), self.device)
        after, random_state_after = self._snapshot(), self._random_state()
        try:
            self._restore(before, random_state)
            inputs = [argument.clone() for argument in arguments]
            replay, results = self.capture(lambda: function(*inputs))
            replay()
            for captured, written in zip(self._state(), after, strict=True):
                difference = (captured.double() - written.double()).abs().max() if written.numel() else th.zeros(())
                if not difference <= TOLERANCE * written.double().abs().max().clamp(min=1):
                    raise RuntimeError(f"the captured update differs from the written one by {float(difference):.2g}")
        except Exception as error:  # whatever cannot be captured, the update is done
            self._restore(after, random_state_after)
            self._fail(error)
            return written_results
        self.graphs[kind] = replay, inputs, results
        return results

    def _fail(self, error: Exception, function: Function | None = None, arguments: Sequence[th.Tensor] = ()) -> Results:
        self.failed = True
        self.graphs.clear()
        reason = " ".join(f"{error}".split())[:200] or repr(error)
        warnings.warn(f"Updates are not captured in a graph and take several times longer: {reason}", stacklevel=6)
        return function(*arguments) if function is not None else {}

    def _state(self) -> list[th.Tensor]:
        in_optimizers = [
            value
            for optimizer in self.optimizers
            for values in optimizer.state.values()
            for value in values.values()
            if isinstance(value, th.Tensor)
        ]
        return [*self.state(), *in_optimizers]

    def _snapshot(self) -> list[th.Tensor]:
        return [tensor.detach().clone() for tensor in self._state()]

    def _restore(self, snapshot: Sequence[th.Tensor], random_state: th.Tensor) -> None:
        with th.no_grad():
            for tensor, saved in zip(self._state(), snapshot, strict=True):
                tensor.copy_(saved)
        if self.device.type == "cuda":
            th.cuda.set_rng_state(random_state, self.device)
        else:
            th.set_rng_state(random_state)

    def _random_state(self) -> th.Tensor:
        return th.cuda.get_rng_state(self.device) if self.device.type == "cuda" else th.get_rng_state()


def make_capturable(optimizer: th.optim.Optimizer) -> bool:
    """
    Move what an optimiser counts and its learning rates to the device of its parameters.

    :param optimizer: The optimiser, after a first step.
    :return: False if it cannot be captured: it has no ``capturable`` argument.
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
    _learning_rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
    return True


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """
    Set the learning rate, in place where a graph reads it.

    :param optimizer: The optimiser.
    :param learning_rate: Its learning rate.
    """
    tensors = _learning_rates.get(optimizer)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = learning_rate if tensors is None else tensors[i].fill_(learning_rate)


def plain_state(optimizer: th.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """
    The state of an optimiser as it would be without :func:`make_capturable`, for saving.

    :param optimizer: The optimiser.
    :param state: Its ``state_dict()``.
    :return: The same with plain learning rates and counts; it is not changed itself.
    """
    if optimizer not in _learning_rates:
        return state
    groups = [{**group, "capturable": False, "lr": float(group["lr"])} for group in state["param_groups"]]
    values = {
        index: {name: value.cpu() if name == "step" else value for name, value in cast(dict[str, Any], each).items()}
        for index, each in state["state"].items()
    }
    return {**state, "param_groups": groups, "state": values}


def forget(optimizer: th.optim.Optimizer) -> None:
    """
    After a state was loaded, with plain learning rates and counts.

    :param optimizer: The optimiser.
    """
    _learning_rates.pop(optimizer, None)
