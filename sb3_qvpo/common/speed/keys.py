"""
By what graphs of updates are keyed: all settings that an update may read. A graph bakes in every one of them, so a setting
that changes must be another key. What nobody listed costs a new capture when it changes, and never gives a stale value.
"""

from collections.abc import Hashable, Iterator
from operator import is_
from types import FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch as th
from torch import nn

from sb3_qvpo.common.speed.settings import settings

TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that torch gives each module. :class:`TensorAddresses` watches the tensors and modules in them."""

NO_SETTINGS = TORCHS_OWN | {"_noise_bank", "programs"}
"""Attributes of modules that no update reads."""


# fmt: off
RUN_STATE = frozenset({
    # The position of a run
    "num_timesteps", "_num_timesteps_at_start", "_total_timesteps", "_current_progress_remaining", "_n_updates", "_n_calls",
    "_episode_num", "_first_timestep", "_steps_at_start", "_warm_up_end", "_warm_up_left", "start_time",
    "learning_starts", "train_freq",
    # What a run collects and reports
    "env", "_last_obs", "_last_original_obs", "_last_episode_starts", "_vec_normalize_env", "replay_buffer", "action_noise",
    "ep_info_buffer", "ep_success_buffer", "_logger", "_custom_logger", "_metric_sums", "_statistics",
    "_resumed_random_states", "_finite_guard", "_update_runner", "_warned_of_few_updates", "_episode_draws",
    "_pace", "_shows_progress",
    # Networks: their tensors and settings are watched separately
    "policy", "actor", "actor_target", "critic", "critic_target",
    # Handed to updates as numbers
    "lr_schedule", "_qf_lr_schedule", "_rates_of_schedules", "learning_rate", "qf_learning_rate",
})
# fmt: on
"""Attributes of an algorithm that no update reads, and that change while graphs of updates stay valid."""


class _Identity:
    """A value that equals itself alone. It is kept, so that no other object can take its address."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def frozen(value: object) -> Hashable:
    """A value to be compared later: plain values and containers by what they hold, all else by identity."""
    if value is None or isinstance(value, bool | int | float | str | bytes | th.dtype | th.device | FunctionType | type):
        # 0.0, False and 0 are equal, and so are 1.0, True and 1
        return (type(value), value)
    if isinstance(value, np.generic):
        return frozen(value.item())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (np.ndarray, value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, tuple | list):
        return (type(value), *map(frozen, value))
    if isinstance(value, dict):
        return (dict, *((frozen(name), frozen(each)) for name, each in value.items()))
    if isinstance(value, MethodType):
        return (value.__func__, _Identity(value.__self__))
    return _Identity(value)


class SettingsWatch:
    """
    The settings of an algorithm and of its policy's modules that an update may read, as one value that can be compared.

    All attributes count. If one that is no setting changes, it costs a new capture. So those that change in each update are
    left out. Most of the time nothing has changed: the same objects are in the same places, which takes about 100 µs to see.
    """

    def __init__(self, model: Any, left_out: frozenset[str]):
        self.model, self.left_out = model, left_out
        self._look()

    def key(self) -> Hashable:
        """Equal for equal settings, different otherwise."""
        if not self._unchanged():
            self._look()
        return self._key

    def _look(self) -> None:
        modules: list[nn.Module] = list(self.model.policy.modules())
        self.own = {name: value for name, value in vars(self.model).items() if name not in self.left_out}
        self.n_own = len(vars(self.model))
        values = [
            (name, value)
            for holder in (vars(settings), self.own, *map(vars, modules))
            for name, value in holder.items()
            if name not in NO_SETTINGS
        ]
        self._key: Hashable = tuple((name, frozen(value)) for name, value in values)
        # Submodules are looked at, because a new one has attributes of its own. Containers, because they can change in place
        children = [cast(dict[str, Any], module._modules) for module in modules]
        self.holders = [_Snapshot(holder) for holder in (vars(settings), *map(vars, modules), *children)]
        self.holders += [_Snapshot(part) for _, value in values for part in containers_in(value)]
        self.arrays = [(value, value.copy()) for _, value in values if isinstance(value, np.ndarray)]

    def _unchanged(self) -> bool:
        now = vars(self.model)
        return (
            len(now) == self.n_own
            and all(now.get(name, self) is value for name, value in self.own.items())
            and all(holder.unchanged() for holder in self.holders)
            and all(np.array_equal(array, before) for array, before in self.arrays)
        )


class _Snapshot:
    """The objects that a container held at some time."""

    def __init__(self, container: dict[Any, Any] | list[Any] | tuple[Any, ...]):
        self.container = container
        self.names = [*container] if isinstance(container, dict) else None
        self.values = tuple(container.values() if isinstance(container, dict) else container)

    def unchanged(self) -> bool:
        """Whether it holds the same objects."""
        values = self.container.values() if isinstance(self.container, dict) else self.container
        return (
            len(values) == len(self.values)
            and all(map(is_, values, self.values))
            and (self.names is None or [*self.container] == self.names)
        )


def containers_in(value: object) -> Iterator[dict[Any, Any] | list[Any] | tuple[Any, ...]]:
    """A value's lists and dictionaries, those in others included."""
    if isinstance(value, dict | list | tuple):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from containers_in(each)
