"""Checks of arguments with messages that name the argument, and schedules written as strings."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, overload

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule, TrainFreq
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

SDE_POLICY_KWARGS = {"use_sde", "log_std_init", "use_expln", "clip_mean", "full_std"}
"""What SB3's Gaussian policies take for gSDE."""


class UnsupportedSpaceError(ValueError, AssertionError):
    """A space that cannot be served. It is an ``AssertionError`` too, because SB3's algorithms raise one there."""


def check_action_space(action_space: spaces.Space[Any]) -> None:
    """
    Refuse action spaces that a diffusion over [-1, 1] cannot cover.

    :raises ValueError: If the space is not a ``Box`` with finite bounds, each low below its high.
    """
    if not isinstance(action_space, spaces.Box):
        raise UnsupportedSpaceError(f"action_space must be a Box (continuous actions), got {action_space}")
    if not np.issubdtype(action_space.dtype, np.floating):
        raise UnsupportedSpaceError(
            f"action_space must be a Box of floating-point numbers, such as Box(..., dtype=np.float32), got {action_space}"
        )
    if not np.isfinite([action_space.low, action_space.high]).all():
        raise ValueError(
            f"action_space must be a Box with finite bounds, got {action_space}: give the "
            "environment bounds with gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high))"
        )
    with np.errstate(over="ignore"):
        width = action_space.high - action_space.low
    if not np.isfinite(width).all():
        raise UnsupportedSpaceError(
            f"action_space must be a Box whose high - low is finite in {action_space.dtype}, got {action_space}: actions are "
            "scaled by it"
        )
    if not (action_space.low < action_space.high).all():
        raise ValueError(f"action_space must be a Box with each low below its high, got {action_space}")


def check_no_sde(use_sde: bool, policy_kwargs: dict[str, Any]) -> None:
    """
    Refuse gSDE (generalized state-dependent exploration), with the reason. SAC takes arguments of gSDE in ``policy_kwargs``,
    so these are checked too.

    :raises ValueError: If gSDE is asked for.
    """
    if not isinstance(policy_kwargs, dict):
        raise ValueError(f"policy_kwargs must be a dictionary, got {policy_kwargs!r}")
    asked = (
        {"use_sde": use_sde} if use_sde else {name: policy_kwargs[name] for name in SDE_POLICY_KWARGS & policy_kwargs.keys()}
    )
    if asked:
        name, value = min(asked.items())
        raise ValueError(
            f"{name} must be left out, got {value!r}: gSDE replaces the noise of SB3's Gaussian policies by a function of the "
            "state, and a diffusion policy has no Gaussian over actions. It explores by sampling; for noise that is "
            "correlated in time use action_noise"
        )


def check_count(name: str, value: Any, minimum: int = 1, maximum: float = math.inf) -> int:
    """
    The value of the argument ``name`` as an ``int``.

    :raises ValueError: If it is not a whole number of at least ``minimum``, and at most ``maximum``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not minimum <= int(value) <= maximum:
        limit = "" if maximum == math.inf else f" and at most {maximum}"
        raise ValueError(f"{name} must be a whole number of at least {minimum}{limit}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """
    The value of the argument ``name``, one of several names.

    :raises ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


class PolicyValue:
    """
    A number above 0 that belongs to a policy. It can be read and set on the policy, and on the algorithm that trains it.

    SB3 saves and loads an instance's ``__dict__``. The algorithm keeps the number there until its policy exists.
    Every value that is set is checked.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def checked(self, value: Any) -> Any:
        """
        The value as it is kept.

        :raises ValueError: If it is not a finite number above 0.
        """
        return check_interval(self.name, value, 0, math.inf, low_allowed=False)

    @overload
    def __get__(self, instance: None, owner: type) -> "PolicyValue": ...

    @overload
    def __get__(self, instance: object, owner: type) -> Any: ...

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        policy = vars(instance).get("policy")
        return vars(instance)[self.name] if policy is None else getattr(policy, self.name)

    def __set__(self, instance: object, value: Any) -> None:
        vars(instance)[self.name] = self.checked(value)
        if "policy" in vars(instance):
            setattr(vars(instance)["policy"], self.name, value)


def policy_values(owner: type) -> list[str]:
    """The names of a class's values that belong to its policy."""
    return [name for base in owner.__mro__ for name, value in vars(base).items() if isinstance(value, PolicyValue)]


class PolicyCount(PolicyValue):
    """The same for a whole number of at least 1."""

    def checked(self, value: Any) -> int:
        """
        The value as it is kept.

        :raises ValueError: If it is not a whole number of at least 1.
        """
        return check_count(self.name, value)


class PolicyScale(PolicyValue):
    """The same for a number of at least 0."""

    def checked(self, value: Any) -> float:
        """
        The value as it is kept.

        :raises ValueError: If it is not a finite number of at least 0.
        """
        return check_interval(self.name, value, 0, math.inf)


def check_class(name: str, value: Any, base: type) -> Any:
    """
    The value of the argument ``name``, a class or a function that takes its place. Its name or an instance will not do.

    :raises ValueError: If it is neither a function nor a subclass of ``base``.
    """
    fits = issubclass(value, base) if isinstance(value, type) else callable(value) and not isinstance(value, base)
    if not fits:
        raise ValueError(f"{name} must be a subclass of {base.__module__}.{base.__qualname__}, got {value!r}")
    return value


def check_train_freq(train_freq: Any) -> Any:
    """
    The value of ``train_freq``, as SB3 takes it. SB3 checks its units.

    :raises ValueError: If its number is below 1.
    """
    if isinstance(train_freq, TrainFreq):
        return train_freq
    frequency, *unit = train_freq if isinstance(train_freq, tuple | list) and train_freq else [train_freq]
    if isinstance(frequency, Integral):
        frequency = check_count("train_freq", frequency)
    return (frequency, *unit) if unit else frequency


def check_action_noise(action_noise: Any) -> None:
    """
    Check the noise on collected actions.

    :raises ValueError: If it is neither None nor an ``ActionNoise``.
    """
    if action_noise is not None and not isinstance(action_noise, ActionNoise):
        raise ValueError(f"action_noise must be an ActionNoise such as NormalActionNoise, or None, got {action_noise!r}")


def check_replay_buffer(replay_buffer_class: Any, n_steps: int, observation_space: spaces.Space[Any] | None) -> None:
    """
    Check the class of the replay buffer, and that SB3's own can serve these observations.

    :param replay_buffer_class: A class, a function that makes a buffer, or None for SB3's choice.
    :param n_steps: Length of n-step returns.
    :param observation_space: Space of the observations, None where it is not yet known.
    :raises ValueError: If it is not a replay buffer's class, or SB3's choice has no n-step returns.
    """
    if replay_buffer_class is not None:
        check_class("replay_buffer_class", replay_buffer_class, ReplayBuffer)
    elif n_steps > 1 and isinstance(observation_space, spaces.Dict):
        raise UnsupportedSpaceError(
            f"n_steps must be 1 with a Dict observation space, got {n_steps}: SB3's replay buffer of dictionaries has no "
            "n-step returns. With a preset: **(presets.fast | dict(n_steps=1))"
        )


def check_net_arch(net_arch: Any) -> Any:
    """
    The sizes of hidden layers: a list of sizes, or a dictionary with such lists for ``pi`` and ``qf``.

    :raises ValueError: If it is anything else, or a size is not a whole number of at least 1.
    """
    lists: list[Any] = [net_arch.get("pi"), net_arch.get("qf")] if isinstance(net_arch, dict) else [net_arch]
    if not all(isinstance(sizes, list) for sizes in lists):
        raise ValueError(f"net_arch must be a list of sizes or a dict(pi=[...], qf=[...]), got {net_arch!r}")
    for size in (size for sizes in lists for size in sizes):
        check_count("each size in net_arch", size)
    return net_arch


def check_interval(name: str, value: Any, low: float, high: float, low_allowed: bool = True) -> float:
    """
    The value of the argument ``name`` as a ``float``. ``high`` itself is allowed unless it is infinite.

    :raises ValueError: If it is not a finite number in the interval.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high and (low_allowed or number > low)):
        interval = f"{'[' if low_allowed else '('}{low}, {high}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return number


def parse_schedule(name: str, value: float | str | Schedule) -> FloatSchedule:
    """
    The argument ``name`` as a schedule, from a number, a string or a function. A function gets the remaining progress, 1 at
    the start of training and 0 at its end.

    Strings follow rl_zoo3. ``lin_0.02`` falls linearly from 0.02 to 0 over the whole training. ``lin_0.02_0.002`` ends at
    0.002. ``lin_0.02_0.002_0.9`` reaches 0.002 after a fraction 0.9 of training and stays there. ``cos_...`` is the same along
    half a cosine. Numbers may be given as strings too.

    :raises ValueError: If a string is malformed or a value negative or not finite.
    """
    if isinstance(value, str):
        value = _parse_schedule_string(name, value)
    if isinstance(value, Real) and not isinstance(value, bool):
        value = check_interval(name, value, 0, math.inf)
    elif not callable(value):
        raise ValueError(f"{name} must be a number, a schedule or a string such as 'lin_0.02_0.002_0.9', got {value!r}")
    schedule = FloatSchedule(value)
    for progress_remaining in (1.0, 0.5, 0.0):
        check_interval(f"{name} at progress_remaining={progress_remaining}", schedule(progress_remaining), 0, math.inf)
    return schedule


def _parse_schedule_string(name: str, value: str) -> float | Schedule:
    try:
        kind, has_form, _ = value.partition("_")
        if not has_form:
            return float(value)
        if kind not in ("lin", "cos"):
            raise ValueError
        numbers = [float(number) for number in value.split("_")[1:]]
        if len(numbers) > 3:
            raise ValueError
        start, end, fraction = (*numbers, *(0.0, 1.0)[len(numbers) - 1 :])
        if not 0 < fraction <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name} must be a number or 'lin_START', 'lin_START_END' or 'lin_START_END_FRACTION' "
            f"with FRACTION in (0, 1], or the same with 'cos', got {value!r}"
        ) from None
    return LinearSchedule(start, end, fraction) if kind == "lin" else CosineSchedule(start, end, fraction)


class CosineSchedule:
    """
    Half a cosine from ``start`` to ``end``.

    :param start: Value at the start of training.
    :param end: Value after a fraction ``end_fraction`` of training.
    :param end_fraction: That fraction, in (0, 1].
    """

    def __init__(self, start: float, end: float, end_fraction: float):
        self.start, self.end, self.end_fraction = start, end, end_fraction

    def __call__(self, progress_remaining: float) -> float:
        """
        The value.

        :param progress_remaining: 1 at the start of training, 0 at its end.
        :return: Between ``start`` and ``end``.
        """
        share = min(1.0, (1 - progress_remaining) / self.end_fraction)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


def check_finite_observation(observation: Any) -> None:
    """
    Check an observation, a batch of them, or a dictionary of either. SB3 takes arrays, lists and tensors.

    :raises ValueError: If a number of it is not finite.
    """
    for key, part in observation.items() if isinstance(observation, dict) else [(None, observation)]:
        try:
            array = np.asarray(part)
        except ValueError:
            continue  # what SB3 has a message for, such as a tuple of observation and info
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            name = "observation" if key is None else f"observation[{key!r}]"
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)].flat[0]}")
