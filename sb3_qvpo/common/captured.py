"""
Updates on a GPU as one graph each: a few hundred small kernels, which cost more to launch than to run, become one launch.

No mathematics is defined here. The first updates run as they are written; then one is captured in a CUDA graph and checked:
the same update, from the same state with the same random numbers, must give the same weights both ways. If it does not, or if
it cannot be captured (a features extractor that reads numbers back, say), there is one warning and all goes on as before.

Capturing needs tensors that stay where they are. So batches are copied into fixed ones, and learning rates and the steps of
optimisers are tensors on the device; saved files hold plain numbers instead (:func:`plain_state`).
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch as th
from torch import nn

EAGER_UPDATES = 10
"""Updates of a kind that run as they are written before one is captured."""

MOST_GRAPHS = 8
"""Kinds of updates that are captured: settings that change all the time are not."""

TOLERANCE = 0.05
"""Largest mean difference between the weights after the captured and after the written update, relative to the mean step."""

Results = dict[str, th.Tensor]
Function = Callable[..., Results]
Capture = Callable[[Callable[[], Results], th.device], tuple[Callable[[], None], Results]]

_learning_rates: WeakKeyDictionary[th.optim.Optimizer, list[th.Tensor]] = WeakKeyDictionary()


@functools.cache
def side_stream(device: th.device) -> Any:
    """
    The stream on which functions are captured.

    :param device: A GPU.
    :return: Its stream, always the same.
    """
    return th.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def cuda_graph(function: Callable[[], Results], device: th.device) -> tuple[Callable[[], None], Results]:
    """
    Capture a function that takes and returns tensors that stay where they are. It is not run.

    :param function: The function.
    :param device: Its device.
    :return: A function that runs it, and its results, which are overwritten at each run.
    """
    graph = th.cuda.CUDAGraph()
    # Other threads may go on with their own work on the device
    with th.cuda.device(device), th.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def on_side_stream(function: Callable[[], Results], device: th.device, may_wait: bool = False) -> Results:
    """
    Run a function on the stream on which it is to be captured afterwards. Waiting for the device in it is an error, which it
    would be in a graph, too, but there it can leave random generators in disorder.

    :param function: The function.
    :param device: Its device.
    :param may_wait: For functions that are known not to wait: to find out is to make it an error in all threads.
    :return: Its results.
    :raises RuntimeError: If it waits for the device.
    """
    if device.type != "cuda":
        return function()
    stream = side_stream(device)
    stream.wait_stream(th.cuda.current_stream(device))
    mode = th.cuda.get_sync_debug_mode()
    try:
        if not may_wait:
            _set_sync_debug_mode("error")
        with th.cuda.stream(stream):
            results = function()
    finally:
        if not may_wait:
            _set_sync_debug_mode(mode)
        th.cuda.current_stream(device).wait_stream(stream)
    return results


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # torch says, once, that the mode is a prototype: nothing that the user could do something about
        warnings.simplefilter("ignore")
        th.cuda.set_sync_debug_mode(mode)


class Places:
    """
    Where the tensors lie that a graph reads and writes: whether something else was put in the place of one, a loaded optimiser
    state for instance, is seen in some 50 microseconds.

    :param modules: The modules that the graph uses.
    :param optimizers: Its optimisers.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizers: Sequence[th.optim.Optimizer] = ()):
        holders: list[dict[str, Any]] = [
            cast(dict[str, Any], holder)
            for root in modules
            for module in root.modules()
            for holder in (module._parameters, module._buffers, module._modules)
        ]
        for optimizer in optimizers:
            holders += [cast(dict[str, Any], optimizer.state), *optimizer.state.values()]
        self.sizes = [(holder, len(holder)) for holder in holders]
        places = [(holder, name) for holder in holders for name in holder]
        places += [(vars(optimizer), "state") for optimizer in optimizers]
        self.places = [(holder, name, holder[name], self._address(holder[name])) for holder, name in places]

    @staticmethod
    def _address(value: object) -> int:
        return value.data_ptr() if isinstance(value, th.Tensor) else 0

    def are_the_same(self) -> bool:
        """
        Whether all is where it was.

        :return: False if a tensor, its memory, a module or the state of an optimiser is another.
        """
        return all(len(holder) == size for holder, size in self.sizes) and all(
            holder.get(name) is value and self._address(value) == address for holder, name, value, address in self.places
        )


class CapturedUpdates:
    """
    Runs updates, captured ones where there are.

    :param module: The module that an update changes.
    :param state: The tensors that an update changes, besides those of the optimisers.
    :param optimizers: The optimisers that an update uses.
    :param device: The device of the updates.
    :param capture: How to capture a function, :func:`cuda_graph` unless for a test.
    """

    def __init__(
        self,
        module: nn.Module,
        state: Callable[[], Sequence[th.Tensor]],
        optimizers: Sequence[th.optim.Optimizer],
        device: th.device,
        capture: Capture = cuda_graph,
    ):
        self.module, self.state, self.optimizers = module, state, optimizers
        self.device, self.capture = device, capture
        self.graphs: dict[Hashable, tuple[Callable[[], None], list[th.Tensor], Results, Places]] = {}
        self.counts: dict[Hashable, int] = {}
        self.failed = not all([make_capturable(optimizer) for optimizer in optimizers])
        if self.failed:
            warn_of_failure("the optimiser has no 'capturable' argument")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model makes its own."""

    def __call__(self, function: Function, arguments: Sequence[th.Tensor], kind: Hashable) -> Results:
        """
        Run an update.

        :param function: The update, a function of tensors that returns its metrics.
        :param arguments: Its arguments.
        :param kind: All settings that it reads, so that another kind is another graph.
        :return: Its metrics; the next update overwrites them.
        """
        hyperparameters = [
            (name, value)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr") and not isinstance(value, th.Tensor)
        ]
        kind = (kind, *hyperparameters, *((argument.shape, argument.dtype) for argument in arguments))
        if self.failed:
            return function(*arguments)
        if kind in self.graphs and not self.graphs[kind][3].are_the_same():
            # Something else was put in the place of a tensor: graphs write to the old one. An optimiser may have no state yet
            self.graphs.clear()
            self.counts.clear()
        if kind not in self.graphs:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if self.counts[kind] <= EAGER_UPDATES or len(self.graphs) >= MOST_GRAPHS:
                return function(*arguments)
            return self._capture(function, arguments, kind)
        replay, inputs, results, _ = self.graphs[kind]
        for fixed, argument in zip(inputs, arguments, strict=True):
            fixed.copy_(argument, non_blocking=True)
        replay()
        return results

    def _capture(self, function: Function, arguments: Sequence[th.Tensor], kind: Hashable) -> Results:
        before, random_state = self._snapshot(), self._random_state()
        try:
            written_results = on_side_stream(lambda: function(*arguments), self.device)
        except RuntimeError as error:
            self._restore(before, random_state)
            self._fail(error)
            return function(*arguments)
        after, random_state_after = self._snapshot(), self._random_state()
        try:
            self._restore(before, random_state)
            inputs = [argument.clone() for argument in arguments]
            replay, results = self.capture(lambda: function(*inputs), self.device)
            if not all(map(th.equal, self._state(), before)):
                raise RuntimeError("the update was run instead of being captured")
            replay()
            self._check(before, after)
        except Exception as error:  # whatever cannot be captured, the update is done
            self._restore(after, random_state_after)
            self._fail(error)
            return written_results
        self.graphs[kind] = replay, inputs, results, Places([self.module], self.optimizers)
        return results

    def _check(self, before: Sequence[th.Tensor], after: Sequence[th.Tensor]) -> None:
        """Compare what the graph has done with what the written update did. On average: kernels may add up in any order."""
        for captured, start, written in zip(self._state(), before, after, strict=True):
            step = (written.double() - start.double()).abs().mean()
            difference = (captured.double() - written.double()).abs().mean()
            if written.numel() and not difference <= TOLERANCE * step + 1e-6 * written.double().abs().mean():
                raise RuntimeError(
                    f"captured and written update differ by {float(difference):.2g}, in a step of {float(step):.2g}"
                )

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self.graphs.clear()
        warn_of_failure(" ".join(f"{error}".split())[:200] or repr(error))

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


def warn_of_failure(reason: str) -> None:
    """
    Say that there are no graphs.

    :param reason: Why.
    """
    warnings.warn(f"Updates are not captured in a graph and take several times longer: {reason}", stacklevel=6)


def make_capturable(optimizer: th.optim.Optimizer) -> bool:
    """
    Move what an optimiser counts and its learning rates to the device of its parameters.

    :param optimizer: The optimiser.
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
        in_place = tensors is not None and i < len(tensors)
        group["lr"] = cast(list[th.Tensor], tensors)[i].fill_(learning_rate) if in_place else learning_rate


def plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """
    The state of an optimiser as it would be without :func:`make_capturable`, for saving.

    :param state: The optimiser's ``state_dict()``.
    :return: The same with plain learning rates and counts; it is not changed itself.
    """
    if not any(isinstance(group["lr"], th.Tensor) for group in state["param_groups"]):
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
