"""
CUDA graphs: a few hundred small kernels, which cost more to launch than to run, become one launch.

No mathematics is defined here. A graph is recorded once and replayed. It reads and writes the addresses that it was recorded
with, so :class:`TensorAddresses` watches these.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple, cast

import torch as th
from torch import nn

from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor

EAGER_DECISIONS = 10
"""Decisions for one state, by each number of candidates, that a GPU takes eagerly before it captures one."""

Results = dict[str, th.Tensor]
Capture = Callable[[Callable[[], Results], th.device], tuple[Callable[[], None], Results]]


@functools.cache
def side_stream(device: th.device) -> Any:
    """The stream of a GPU on which functions are captured, always the same."""
    return th.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def cuda_graph(function: Callable[[], Results], device: th.device) -> tuple[Callable[[], None], Results]:
    """
    Capture a function that takes and returns tensors at fixed addresses, without running it. Return a function that runs it,
    and its results, which each run overwrites.
    """
    graph = th.cuda.CUDAGraph()
    # Other threads may go on with their own work on the device
    with th.cuda.device(device), th.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def on_side_stream(function: Callable[[], Results], device: th.device, trusted: bool = False) -> Results:
    """
    Run a function on the stream on which it is to be captured afterwards.

    Synchronising is an error in a graph, and could leave random generators in disorder there. So it is an error here already.
    The check affects all threads. Functions that are known not to synchronise are ``trusted`` and skip it.

    :raises RuntimeError: If it synchronises.
    """
    if device.type != "cuda":
        return function()
    stream = side_stream(device)
    stream.wait_stream(th.cuda.current_stream(device))
    mode = th.cuda.get_sync_debug_mode()
    try:
        if not trusted:
            _set_sync_debug_mode("error")
        with th.cuda.stream(stream):
            results = function()
    finally:
        if not trusted:
            _set_sync_debug_mode(mode)
        th.cuda.current_stream(device).wait_stream(stream)
    return results


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # torch says, once, that the mode is a prototype. The user can do nothing about it
        warnings.simplefilter("ignore")
        th.cuda.set_sync_debug_mode(mode)


def squeezed(error: Exception) -> str:
    """An error's message in one line of at most 200 characters."""
    return " ".join(f"{error}".split())[:200] or repr(error)


class TensorAddresses:
    """
    Where the tensors lie that a graph reads and writes: those of its modules and optimisers. Detects, in about 50 µs, that a
    tensor or its memory was replaced, by loading an optimiser state for instance.
    """

    def __init__(self, modules: Sequence[nn.Module], steppers: Sequence[th.optim.Optimizer] = ()):
        holders: list[dict[str, Any]] = [
            cast(dict[str, Any], holder)
            for root in modules
            for module in root.modules()
            for holder in (module._parameters, module._buffers, module._modules)
        ]
        for optimizer in steppers:
            holders += [cast(dict[str, Any], optimizer.state), *optimizer.state.values()]
        self.sizes = [(holder, len(holder)) for holder in holders]
        places = [(holder, name) for holder in holders for name in holder]
        places += [(vars(optimizer), "state") for optimizer in steppers]
        self.places = [(holder, name, holder[name], self._address(holder[name])) for holder, name in places]

    @staticmethod
    def _address(value: object) -> int:
        return value.data_ptr() if isinstance(value, th.Tensor) else 0

    def unchanged(self) -> bool:
        """False if a tensor, its memory, a module or the state of an optimiser was replaced."""
        return all(len(holder) == size for holder, size in self.sizes) and all(
            holder.get(name) is value and self._address(value) == address for holder, name, value, address in self.places
        )


class Graph(NamedTuple):
    """A captured function: what runs it, the tensors it reads and writes, and the addresses it relies on."""

    replay: Callable[[], None]
    inputs: list[th.Tensor]
    results: Results
    addresses: TensorAddresses

    def run(self, arguments: Sequence[th.Tensor]) -> Results:
        """Run it with these arguments. The next run overwrites the results."""
        for fixed, argument in zip(self.inputs, arguments, strict=True):
            fixed.copy_(argument, non_blocking=True)
        self.replay()
        return self.results


# Decisions


class ScoringGraph:
    """
    The candidates of one state and their scores on a GPU: the eager functions, captured in a graph.

    If a weight tensor is replaced, the graph is dropped and the next :data:`EAGER_DECISIONS` decisions run eagerly, because
    more replacements may follow. Networks that are known not to synchronise are ``trusted``, see :func:`on_side_stream`.
    """

    def __init__(self, actor: DiffusionActor, critic: CandidateCritic, trusted: bool = False, capture: Capture | None = None):
        self.actor = actor
        self.critic = critic
        self.trusted = trusted
        self.capture = capture or cuda_graph
        self.graph: Graph | None = None
        self.n_eager_left = 0
        self.lock = Lock()

    def __call__(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw candidates from noise (N, 1, K, A) and score them. Features of the state are (1, S), the candidates (1, K, A),
        their scores (1, K).
        """
        # All threads share the graph's tensors, which must not be those of an inference mode that ends
        with self.lock, th.inference_mode(False), th.no_grad():
            results = self._run((actor_features, critic_features, noise))
            return results["candidates"].clone(), results["scores"].clone()

    def _run(self, arguments: tuple[th.Tensor, th.Tensor, th.Tensor]) -> Results:
        if self.graph is not None and not self.graph.addresses.unchanged():
            self.graph, self.n_eager_left = None, EAGER_DECISIONS
        if self.graph is None and self.n_eager_left > 0:
            self.n_eager_left -= 1
            return self._score(*arguments)
        if self.graph is None:
            inputs, device = [argument.clone() for argument in arguments], arguments[0].device
            on_side_stream(lambda: self._score(*inputs), device, self.trusted)  # so that libraries set themselves up before
            replay, results = self.capture(lambda: self._score(*inputs), device)
            self.graph = Graph(replay, inputs, results, TensorAddresses([self.actor, self.critic]))
        return self.graph.run(arguments)

    def _score(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> Results:
        candidates = self.actor.sample_candidates(actor_features, noise)
        return {"candidates": candidates, "scores": self.critic.score(critic_features, candidates)}
