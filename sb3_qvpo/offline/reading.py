"""The transitions of a dataset, in their order and in parts: from Minari, flat arrays, or replay buffers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_qvpo.offline.npz import columns

ROWS = 65_536
"""Rows that are read at a time."""

Observations = Any
"""An array with a first dimension that counts, or a mapping of such arrays."""


class Transitions(NamedTuple):
    """Consecutive transitions. Where neither flag is set, the next row follows in the same episode."""

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    terminals: np.ndarray
    """Where the task ended: nothing follows."""
    timeouts: np.ndarray
    """Where an episode was cut: the value of the next observation counts."""
    place: str
    """What rows are called in messages."""
    numbers: np.ndarray
    """Of each row there, shape (n,)."""


@contextmanager
def opened(dataset: Any) -> Iterator[Any]:
    """
    What a path or a name stands for; a file is closed afterwards.

    :param dataset: See :mod:`sb3_qvpo.offline`.
    :raises ValueError: For a path of another kind.
    """
    if not isinstance(dataset, str | Path):
        yield dataset
        return
    path = Path(dataset)
    if path.suffix in (".hdf5", ".h5"):
        import h5py

        with h5py.File(path, "r") as file:
            yield file
    elif path.suffix == ".npz":
        with columns(path) as arrays:
            yield arrays
    elif path.suffix == ".pkl":
        yield load_from_pkl(path)
    elif path.suffix and not path.is_dir():
        raise ValueError(
            "dataset must be a path that ends in .hdf5, .h5, .npz or .pkl, the name or folder of a Minari dataset, or arrays, "
            f"got {str(dataset)!r}"
        )
    else:
        import minari

        yield (
            minari.MinariDataset(path / "data" if (path / "data").is_dir() else path)
            if path.exists()
            else minari.load_dataset(str(dataset))
        )


def rows_of(source: Any) -> Iterator[Transitions]:
    """
    The transitions of a dataset in their order, in parts.

    :param source: What :func:`opened` gave.
    :return: The parts.
    :raises ValueError: If it is nothing that can be read.
    """
    if isinstance(source, ReplayBuffer):
        return rows_of_buffer(source)
    if is_mapping(source):
        return rows_of_arrays(source)
    if hasattr(source, "iterate_episodes"):
        return rows_of_episodes(source.iterate_episodes())
    if isinstance(source, Iterable):
        return rows_of_episodes(source)
    raise ValueError(
        "dataset must be a Minari dataset, a mapping of flat arrays, a replay buffer, episodes, or a path, got "
        f"{type(source).__name__}"
    )


def is_mapping(values: Any) -> bool:
    """Whether there are arrays by name: an HDF5 group is no ``Mapping`` of Python's."""
    return isinstance(values, Mapping) or hasattr(values, "keys")


def mapped(function: Callable[..., np.ndarray], *values: Observations) -> Observations:
    """A function of arrays, for each key where observations are dictionaries."""
    if isinstance(values[0], dict):
        return {key: function(*(value[key] for value in values)) for key in values[0]}
    return function(*values)


def sliced(values: Observations, rows: slice) -> Observations:
    """Rows of an array, or of each array of a mapping."""
    if is_mapping(values):
        return {key: np.asarray(values[key][rows]) for key in values}
    return np.asarray(values[rows])


def n_rows_of(values: Observations) -> int:
    """The first dimension, which arrays of a mapping share."""
    if is_mapping(values):
        return len(values[next(iter(values))])
    return len(values)


def flags(name: str, values: np.ndarray, place: str, first: int) -> np.ndarray:
    """
    Whether something ended at each row.

    :param name: Of the field.
    :param values: Truth values, or numbers that are 0 or 1.
    :param place: What rows are called in messages.
    :param first: The number of the first one.
    :return: Truth values, shape (n,).
    :raises ValueError: If there is another number, or several a row.
    """
    n_rows = len(values)
    if values.shape not in ((n_rows,), (n_rows, 1)):
        raise ValueError(f"{name} must be one flag a row, got shape {values.shape}")
    values = values.reshape(n_rows)
    others = ~((values == 0) | (values == 1))
    if others.any():
        row = int(others.argmax())
        raise ValueError(f"{name} must be 0 or 1, got {values[row]} in {place} {first + row}")
    return values.astype(bool)


def rows_of_arrays(arrays: Any) -> Iterator[Transitions]:
    """
    Flat arrays in D4RL's layout. Without ``next_observations`` the next row's observation follows. A transition that a time
    limit cut is left out then, because what followed is not in the data.

    :param arrays: By name.
    :return: The transitions.
    :raises ValueError: If a field is missing, or fields have different lengths.
    """
    names = set(arrays.keys())
    for name in ("observations", "actions", "rewards", "terminals"):
        if name not in names:
            raise ValueError(f"dataset must have the field {name!r}, got {sorted(map(str, names))}")
    has_next = "next_observations" in names
    if not has_next and "timeouts" not in names:
        raise ValueError(
            "dataset must have the field 'timeouts' or 'next_observations': else nobody knows where an episode was cut"
        )
    given = [name for name in ("actions", "rewards", "terminals", "timeouts", "next_observations") if name in names]
    n_rows = n_rows_of(arrays["observations"])
    for name in given:
        if n_rows_of(arrays[name]) != n_rows:
            raise ValueError(f"{name} must have as many rows as observations, {n_rows}, got {n_rows_of(arrays[name])}")
    for start in range(0, n_rows, ROWS):
        rows = slice(start, min(start + ROWS, n_rows))
        terminals = flags("terminals", sliced(arrays["terminals"], rows), "row", start)
        timeouts = np.zeros(len(terminals), bool)
        if "timeouts" in names:
            timeouts = flags("timeouts", sliced(arrays["timeouts"], rows), "row", start) & ~terminals
        numbers = np.arange(start, rows.stop)
        observations, actions = sliced(arrays["observations"], rows), sliced(arrays["actions"], rows)
        rewards = sliced(arrays["rewards"], rows)
        if has_next:
            following = sliced(arrays["next_observations"], rows)
            yield Transitions(observations, actions, rewards, following, terminals, timeouts, "row", numbers)
            continue
        following = sliced(arrays["observations"], slice(start + 1, rows.stop + 1))
        if rows.stop == n_rows:
            timeouts[-1] |= ~terminals[-1]
            # One more row, whatever it is: its transition ends the task or is left out
            following = mapped(lambda known, own: np.concatenate([known, own[-1:]]), following, observations)
        kept = ~timeouts
        if not kept.any():
            continue
        # The row before one that is left out is where its episode is cut now
        cut = np.zeros_like(timeouts)
        cut[:-1] = timeouts[1:] & ~terminals[:-1]
        if rows.stop < n_rows and "timeouts" in names and sliced(arrays["timeouts"], slice(rows.stop, rows.stop + 1)).any():
            cut[-1] = not terminals[-1]
        yield Transitions(
            mapped(lambda values, kept=kept: values[kept], observations),
            actions[kept],
            rewards[kept],
            mapped(lambda values, kept=kept: values[kept], following),
            terminals[kept],
            cut[kept],
            "row",
            numbers[kept],
        )


def rows_of_episodes(episodes: Iterable[Any]) -> Iterator[Transitions]:
    """
    Episodes with Minari's names: observations (T + 1), actions, rewards, terminations, truncations (T). An episode without a
    flag at its end counts as cut.

    :param episodes: Objects with these attributes, or mappings.
    :return: The transitions, an episode at a time.
    :raises ValueError: If an episode is empty or has other lengths.
    """
    for number, episode in enumerate(episodes):
        place = f"episode {number}, row"

        actions, rewards = np.asarray(field(episode, "actions", number)), np.asarray(field(episode, "rewards", number))
        terminals, truncations = (
            flags(f"{name} of episode {number}", np.asarray(field(episode, name, number)), place, 0)
            for name in ("terminations", "truncations")
        )
        observations, length = field(episode, "observations", number), len(actions)
        if length == 0:
            raise ValueError(f"episode {number} must have at least one action, got none")
        if n_rows_of(observations) != length + 1:
            raise ValueError(
                f"observations of episode {number} must be one more than its {length} actions, got {n_rows_of(observations)}"
            )
        for name, values in (("rewards", rewards), ("terminations", terminals), ("truncations", truncations)):
            if len(values) != length:
                raise ValueError(f"{name} of episode {number} must be as many as its {length} actions, got {len(values)}")
        timeouts = truncations & ~terminals
        timeouts[-1] |= ~terminals[-1]
        now, following = sliced(observations, slice(0, length)), sliced(observations, slice(1, length + 1))
        yield Transitions(now, actions, rewards, following, terminals, timeouts, place, np.arange(length))


def field(episode: Any, name: str, number: int) -> Any:
    """
    :param episode: An object with attributes, or a mapping.
    :param name: Of the field.
    :param number: Of the episode.
    :return: The field.
    :raises ValueError: If there is none.
    """
    value = episode.get(name) if isinstance(episode, Mapping) else getattr(episode, name, None)
    if value is None:
        raise ValueError(f"episode {number} must have the field {name!r}")
    return value


def rows_of_buffer(source: ReplayBuffer) -> Iterator[Transitions]:
    """
    A buffer of SB3, environment by environment, the oldest rows first. Its actions are scaled back to the environment's units.

    :param source: The buffer.
    :return: The transitions.
    :raises ValueError: If it keeps its rows in another way than SB3's own buffers.
    """
    if not isinstance(vars(source).get("dones"), np.ndarray) or source.optimize_memory_usage:
        raise ValueError(f"dataset must be a buffer that keeps both ends of each transition, got {type(source).__name__}")
    order = np.arange(source.size())
    if source.full:
        order = (order + source.pos) % source.buffer_size
    box = cast(spaces.Box, source.action_space)
    for env in range(source.n_envs):
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]

            def of_env(values: Any, rows: np.ndarray = rows, env: int = env) -> Any:
                return mapped(lambda array: array[rows, env], values)

            dones, timeouts = of_env(source.dones) > 0, of_env(source.timeouts) > 0
            timeouts = timeouts.copy()
            if start + ROWS >= len(order):
                timeouts[-1] |= not dones[-1]
            scaled = of_env(source.actions).reshape(len(rows), *box.shape)
            yield Transitions(
                of_env(source.observations),
                box.low + (scaled + 1) / 2 * (box.high - box.low),
                of_env(source.rewards),
                of_env(source.next_observations),
                dones & ~timeouts,
                timeouts,
                f"environment {env}, row",
                rows,
            )
