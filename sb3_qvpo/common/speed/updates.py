"""
Updates: on the CPU eagerly, on a GPU as graphs, one for each kind of update and settings.

The first updates run eagerly. Then one is captured in a graph and checked. From the same state, with the same random numbers,
the graph must give the eager update's weights. An update may also be impossible to capture, because a features extractor reads
numbers back, for instance. If either fails, there is one warning, and all goes on eagerly.

A graph reads and writes fixed addresses. So batches are copied into fixed tensors, and the learning rates and step counts of
optimisers are tensors on the device, see :mod:`sb3_qvpo.common.speed.optimizers`. A graph also bakes in every setting that the
update reads. So graphs are keyed by all attributes that could be a setting, see :mod:`sb3_qvpo.common.speed.keys`.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_qvpo.common.speed import optimizers
from sb3_qvpo.common.speed.cpu import OneDnnProducts, keep_freed_memory
from sb3_qvpo.common.speed.graphs import (
    Capture,
    Graph,
    Results,
    TensorAddresses,
    cuda_graph,
    on_side_stream,
    squeezed,
)
from sb3_qvpo.common.speed.keys import SettingsWatch, frozen
from sb3_qvpo.common.speed.settings import settings

EAGER_UPDATES = 10
"""Updates of a kind that run eagerly before one is captured."""

MOST_GRAPHS = 8
"""At most this many kinds of updates are captured, so that settings that change all the time are not."""

TOLERANCE = 0.05
"""Largest mean difference between the weights after the captured and after the eager update, relative to the mean step."""

PINNED_FOR = ("cuda",)
"""Devices for which batches are copied from pinned memory."""

Update = Callable[..., Results]


# Batches


def is_tensor_tree(value: object) -> bool:
    """Whether a field of a batch is a tensor or a dictionary of tensors."""
    return isinstance(value, th.Tensor) or (isinstance(value, Mapping) and all(map(is_tensor_tree, value.values())))


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, th.Tensor]]:
    """Names and tensors of a batch. Fields that are neither tensors nor dictionaries of them are left out."""
    items: list[tuple[str, th.Tensor]] = []
    for name, value in tree.items():
        if isinstance(value, th.Tensor):
            items.append((f"{prefix}{name}", value))
        elif is_tensor_tree(value):
            items += flat_items(value, f"{prefix}{name}.")
    return items


def rebuild(tree: Mapping[str, Any], tensors: Iterator[th.Tensor]) -> dict[str, Any]:
    """The same tree with other tensors, in the order of :func:`flat_items`. Other fields are handed on."""
    return {
        name: next(tensors) if isinstance(value, th.Tensor) else rebuild(value, tensors) if is_tensor_tree(value) else value
        for name, value in tree.items()
    }


def sample_batch(
    buffer: ReplayBuffer, batch_size: int, vec_normalize: VecNormalize | None, device: th.device
) -> ReplayBufferSamples:
    """
    A mini-batch on the model's device, in the buffer's own type.

    SB3 copies from pageable memory, for which the host waits until all earlier updates are done. On a GPU batches are copied
    from pinned memory instead, and the host goes on.
    """
    if device.type not in PINNED_FOR:
        return buffer.sample(batch_size, env=vec_normalize)
    own_device, buffer.device = buffer.device, th.device("cpu")
    try:
        batch = buffer.sample(batch_size, env=vec_normalize)
    finally:
        buffer.device = own_device
    tensors = [tensor for _, tensor in flat_items(batch._asdict())]
    # A user's buffer may keep its transitions on the GPU
    pinned = (tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in tensors)
    return type(batch)(**rebuild(batch._asdict(), (tensor.to(device, non_blocking=True) for tensor in pinned)))


# Updates


class UpdatedModel(Protocol):
    """What the runner needs of an algorithm."""

    @property
    def policy(self) -> nn.Module:
        """The policy that updates change."""

    @property
    def device(self) -> th.device:
        """Where it is."""

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        """The optimisers that updates use, by name."""

    def _update_state(self) -> list[th.Tensor]:
        """The tensors that updates change, besides those of the optimisers."""

    @property
    def _not_read_by_updates(self) -> frozenset[str]:
        """Attributes that change while graphs of updates stay valid."""

    def _updates_are_pure(self) -> bool:
        """Whether updates depend on tensors and settings only."""


class UpdateRunner:
    """
    Runs updates: on the CPU eagerly, with oneDNN's products; on a GPU as graphs, one for each kind of update and settings.

    Nothing of it is saved, and a copy of a model makes its own.
    """

    captures_on: tuple[str, ...] = ("cuda",)
    """Types of devices on which updates are captured."""

    def __init__(self, capture: Capture | None = None):
        self.capture = capture or cuda_graph
        self.graphs: dict[Hashable, Graph] = {}
        self.counts: dict[Hashable, int] = {}
        self.steppers: list[th.optim.Optimizer] | None = None
        self.watch: SettingsWatch | None = None
        self.failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "UpdateRunner":
        return type(self)(self.capture)

    def forget(self) -> None:
        """Drop all graphs, and start anew."""
        self.graphs.clear()
        self.counts.clear()
        self.steppers, self.watch, self.failed = None, None, False

    def run(self, model: UpdatedModel, update: Update, batch: ReplayBufferSamples, numbers: Sequence[float]) -> Results:
        """
        Run an update, a method of the algorithm that takes a batch and numbers, and return its metrics. The next update may
        overwrite them. Numbers are what else changes from update to update. In a graph they are tensors.
        """
        if model.device.type == "cpu":
            keep_freed_memory()
        if not (model.device.type in self.captures_on and settings.enabled and model._updates_are_pure()):
            with OneDnnProducts():
                return update(batch, *numbers)
        steppers = list(model._optimizers().values())
        if self.steppers != steppers:
            self.forget()
            self.steppers = steppers
            self.failed = not all([optimizers.make_capturable(optimizer) for optimizer in steppers])
            if self.failed:
                warn_of_eager_updates("the optimiser has no 'capturable' argument")
        tree = batch._asdict()
        # An update that reads another field fails when it is captured, and runs eagerly from then on
        known = {name: value if is_tensor_tree(value) else None for name, value in tree.items()}
        items = flat_items(known)
        arguments = [*(th.full((), number, device=model.device) for number in numbers), *(tensor for _, tensor in items)]

        def update_of_tensors(*inputs: th.Tensor) -> Results:
            fields = rebuild(known, iter(inputs[len(numbers) :]))
            metrics = update(type(batch)(**fields), *inputs[: len(numbers)])
            # Graphs of gradients must not outlive the update
            return {name: value.detach() for name, value in metrics.items()}

        if self.watch is None or self.watch.model is not model:
            self.watch = SettingsWatch(model, model._not_read_by_updates)
        kind = (
            update.__name__,
            self.watch.key(),
            self._hyperparameters(),
            *((name, tensor.shape, tensor.dtype) for name, tensor in items),
        )
        return self._run(model, update_of_tensors, arguments, kind, lambda: update(batch, *arguments[: len(numbers)]))

    def _hyperparameters(self) -> Hashable:
        groups = [group for optimizer in self.steppers or [] for group in optimizer.param_groups]
        numbers = tuple(
            (name, frozen(value))
            for group in groups
            for name, value in group.items()
            if name not in ("params", "lr") and not isinstance(value, th.Tensor)
        )
        return numbers, tuple(parameter.requires_grad for group in groups for parameter in group["params"])

    def _run(
        self,
        model: UpdatedModel,
        function: Update,
        arguments: Sequence[th.Tensor],
        kind: Hashable,
        eagerly: Callable[[], Results],
    ) -> Results:
        if self.failed:
            return eagerly()
        if kind in self.graphs and not self.graphs[kind].addresses.unchanged():
            # The graphs' tensors have been replaced. Start anew, because a new optimiser may have no state yet
            self.graphs.clear()
            self.counts.clear()
        if kind in self.graphs:
            return self.graphs[kind].run(arguments)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= EAGER_UPDATES or len(self.graphs) >= MOST_GRAPHS:
            return eagerly()
        return self._capture(model, function, arguments, kind, eagerly)

    def _capture(
        self,
        model: UpdatedModel,
        function: Update,
        arguments: Sequence[th.Tensor],
        kind: Hashable,
        eagerly: Callable[[], Results],
    ) -> Results:
        before, random_state = self._snapshot(model), _random_state(model.device)
        try:
            eager_results = on_side_stream(lambda: function(*arguments), model.device)
        except Exception as error:  # synchronising, or a field of the batch that is no tensor
            self._restore(model, before, random_state)
            self._fail(error)
            return eagerly()
        after, random_state_after = self._snapshot(model), _random_state(model.device)
        try:
            self._restore(model, before, random_state)
            inputs = [argument.clone() for argument in arguments]
            replay, results = self.capture(lambda: function(*inputs), model.device)
            if not all(map(th.equal, self._state(model), before)):
                raise RuntimeError("the update was run instead of being captured")
            replay()
            self._check(model, before, after)
        except Exception as error:  # whatever cannot be captured, the eager update is done
            self._restore(model, after, random_state_after)
            self._fail(error)
            return eager_results
        self.graphs[kind] = Graph(replay, inputs, results, TensorAddresses([model.policy], self.steppers or []))
        return results

    def _check(self, model: UpdatedModel, before: Sequence[th.Tensor], after: Sequence[th.Tensor]) -> None:
        """Compare the graph's weights with those of the eager update, on average, because kernels may add up in any order."""
        for captured, start, eager in zip(self._state(model), before, after, strict=True):
            step = (eager.double() - start.double()).abs().mean()
            difference = (captured.double() - eager.double()).abs().mean()
            if eager.numel() and not difference <= TOLERANCE * step + 1e-6 * eager.double().abs().mean():
                raise RuntimeError(
                    f"captured and eager update differ by {float(difference):.2g}, in a step of {float(step):.2g}"
                )

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self.graphs.clear()
        warn_of_eager_updates(squeezed(error))

    def _state(self, model: UpdatedModel) -> list[th.Tensor]:
        in_optimizers = [
            value
            for optimizer in self.steppers or []
            for values in optimizer.state.values()
            for value in values.values()
            if isinstance(value, th.Tensor)
        ]
        return [*model._update_state(), *in_optimizers]

    def _snapshot(self, model: UpdatedModel) -> list[th.Tensor]:
        return [tensor.detach().clone() for tensor in self._state(model)]

    def _restore(self, model: UpdatedModel, snapshot: Sequence[th.Tensor], random_state: th.Tensor) -> None:
        with th.no_grad():
            for tensor, saved in zip(self._state(model), snapshot, strict=True):
                tensor.copy_(saved)
        if model.device.type == "cuda":
            th.cuda.set_rng_state(random_state, model.device)
        else:
            th.set_rng_state(random_state)


def _random_state(device: th.device) -> th.Tensor:
    return th.cuda.get_rng_state(device) if device.type == "cuda" else th.get_rng_state()


def warn_of_eager_updates(reason: str) -> None:
    """Say that there are no graphs."""
    warnings.warn(f"Updates are not captured in a graph and take several times longer: {reason}", stacklevel=7)
