"""Putting transitions into replay buffers: what is checked, and how rows are written."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qvpo.common.runs.checkpoints import cut_last_episode
from sb3_qvpo.offline.reading import Observations, Transitions, mapped, opened, rows_of, sliced


def fill_replay_buffer(
    model: OffPolicyAlgorithm | ReplayBuffer,
    dataset: Any,
    reward_transform: Callable[[np.ndarray], np.ndarray] | None = None,
    clip_actions: bool = False,
    progress_bar: bool = False,
) -> int:
    """
    Put a dataset into a replay buffer, behind what is there. Time limits are marked: values are bootstrapped from them.
    Actions are scaled to [-1, 1], as SB3 does it. After an error the buffer holds what it held before.

    :param model: An off-policy algorithm, SB3's too, or its replay buffer.
    :param dataset: See :mod:`sb3_qvpo.offline`.
    :param reward_transform: From rewards to rewards, shape (n,). The same must be done to rewards of later online training.
    :param clip_actions: Clip actions that are out of the action space's bounds. Without it they are an error.
    :param progress_bar: Show how many rows are read; needs tqdm and rich.
    :return: Transitions stored. With several environments the last ones that fill no row of the buffer are left out.
    :raises ValueError: If the dataset is of other spaces, empty, incomplete, larger than the free part of the buffer, or holds
        numbers that are not finite or out of bounds. The message names field and row.
    """
    buffer = model if isinstance(model, ReplayBuffer) else model.replay_buffer
    if buffer is None:
        raise ValueError("model must have a replay buffer, got one without")
    with opened(dataset) as source:
        check_spaces(source, buffer)
        # An episode that is going on in the environment does not go on in the data
        cut_last_episode(buffer)
        parts = (
            checked(part, buffer, reward_transform, clip_actions) for part in with_progress(rows_of(source), progress_bar)
        )
        is_plain = type(buffer) in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer) and not buffer.optimize_memory_usage
        n_rows = write_blocks(buffer, parts) if is_plain else add_one_by_one(buffer, parts)
    cut_last_episode(buffer)
    return n_rows


# Checking


def check_spaces(source: Any, buffer: ReplayBuffer) -> None:
    """
    :param source: A dataset.
    :param buffer: Where it goes.
    :raises ValueError: If the dataset names its spaces, and they are others.
    """
    for name in ("observation_space", "action_space"):
        theirs, ours = getattr(source, name, None), getattr(buffer, name)
        if theirs is None:
            continue
        same = shapes(theirs) == shapes(ours) or shapes(theirs) == shapes(ours, channels_last=True)
        if same and name == "action_space" and isinstance(theirs, spaces.Box):
            same = np.allclose(theirs.low, ours.low) and np.allclose(theirs.high, ours.high)
        if not same:
            raise ValueError(f"dataset must have the model's {name}, {ours}, got {theirs}")


def shapes(space: Any, channels_last: bool = False) -> Any:
    """The shapes in a space, by key where it is a dictionary."""
    if isinstance(space, spaces.Dict):
        return {key: shapes(value, channels_last) for key, value in space.spaces.items()}
    shape = space.shape
    return (*shape[1:], shape[0]) if channels_last and len(shape) == 3 else shape


def checked(
    part: Transitions,
    buffer: ReplayBuffer,
    reward_transform: Callable[[np.ndarray], np.ndarray] | None,
    clip_actions: bool,
) -> Transitions:
    """
    What the buffer takes: shapes as it stores them, actions in [-1, 1].

    :param part: As it was read.
    :param buffer: Where it goes.
    :param reward_transform: From rewards to rewards.
    :param clip_actions: Whether actions may be out of bounds.
    :return: Ready to be stored.
    :raises ValueError: Naming field and row, see :func:`fill_replay_buffer`.
    """
    n_rows, box = len(part.rewards), cast(spaces.Box, buffer.action_space)
    if part.rewards.shape not in ((n_rows,), (n_rows, 1)):
        raise ValueError(f"rewards must be one number a row, got shape {part.rewards.shape}")
    rewards: np.ndarray = part.rewards.astype(np.float64).reshape(n_rows)
    check_rows("rewards", rewards, part)
    if reward_transform is not None:
        rewards = np.asarray(reward_transform(rewards), np.float64)
        if rewards.shape != (n_rows,):
            raise ValueError(f"reward_transform must return shape ({n_rows},), got {rewards.shape}")
        check_rows("reward_transform of rewards", rewards, part)
    if part.actions.shape[1:] != box.shape and part.actions[:1].size != np.prod(box.shape):
        raise ValueError(f"actions must have the shape of the model's action space, {box.shape}, got {part.actions.shape[1:]}")
    actions = part.actions.reshape(n_rows, *box.shape).astype(np.float64)
    check_rows("actions", actions, part)
    scaled = (2 * (actions - box.low) / (box.high - box.low) - 1).reshape(n_rows, -1)
    if not clip_actions:
        beyond = np.abs(scaled).max(axis=1, initial=0) > 1 + 1e-3
        if beyond.any():
            row = int(beyond.argmax())
            raise ValueError(
                f"actions must be within [{box.low.min()}, {box.high.max()}], got {actions[row].tolist()} in {part.place} "
                f"{part.numbers[row]}; clip_actions=True clips them"
            )
    observations = stored("observations", part.observations, buffer, part)
    following = stored("next_observations", part.next_observations, buffer, part)
    clipped = scaled.clip(-1, 1).astype(np.float32)
    return part._replace(observations=observations, actions=clipped, rewards=rewards, next_observations=following)


def check_rows(name: str, values: np.ndarray, part: Transitions) -> None:
    """
    :param name: Of the field.
    :param values: Shape (n, ...).
    :param part: Where they come from.
    :raises ValueError: Naming the first row with a number that is not finite in float32, which buffers have.
    """
    if not np.issubdtype(values.dtype, np.floating):
        return
    by_row = values.reshape(len(values), -1)
    with np.errstate(invalid="ignore"):
        finite = (np.abs(by_row) <= np.finfo(np.float32).max).all(axis=1)  # false for NaN
    if not finite.all():
        row = int((~finite).argmax())
        raise ValueError(f"{name} must be finite, got {values[row].tolist()} in {part.place} {part.numbers[row]}")


def stored(name: str, values: Observations, buffer: ReplayBuffer, part: Transitions) -> Observations:
    """
    Observations in the shapes of the buffer; images with the channels where it has them.

    :param name: Of the field.
    :param values: Observations of a part.
    :param buffer: Where they go.
    :param part: The part.
    :return: What the buffer stores.
    :raises ValueError: If they are of another space.
    """
    shape, space = buffer.obs_shape, cast(Any, buffer.observation_space)
    if isinstance(shape, dict):
        if not isinstance(values, dict) or values.keys() != shape.keys():
            got = sorted(values) if isinstance(values, dict) else "an array"
            raise ValueError(f"{name} must have the model's keys, {sorted(shape)}, got {got}")
        return {key: as_shape(f"{name}[{key!r}]", values[key], cast(Any, shape)[key], space[key].dtype, part) for key in shape}
    if isinstance(values, dict):
        raise ValueError(f"{name} must be an array, as the model's observation space is, got keys {sorted(values)}")
    return as_shape(name, values, shape, space.dtype, part)


def as_shape(name: str, values: np.ndarray, shape: tuple[int, ...], dtype: Any, part: Transitions) -> np.ndarray:
    """
    :param name: Of the field.
    :param values: Shape (n, ...).
    :param shape: Of one observation in the buffer.
    :param dtype: Of the buffer.
    :param part: Where they come from.
    :return: Shape (n, *shape).
    :raises ValueError: If the shape is another, or the buffer cannot hold a number: it is not finite, or a fraction where the
        buffer has whole numbers.
    """
    check_rows(name, values, part)
    if np.issubdtype(dtype, np.integer) and not np.can_cast(values.dtype, dtype):
        bounds = np.iinfo(dtype)
        fits = (values >= bounds.min) & (values <= bounds.max) & (values == np.floor(values))
        fits = fits.reshape(len(values), -1).all(axis=1)
        if not fits.all():
            row = part.numbers[int((~fits).argmax())]
            wanted = f"whole numbers from {bounds.min} to {bounds.max}"
            raise ValueError(f"{name} must be {wanted}, got others in {part.place} {row}")
    if values.shape[1:] != shape and len(shape) == 3 and values.shape[1:] == (*shape[1:], shape[0]):
        values = np.moveaxis(values, -1, 1)
    if values.shape[1:] != shape and (values.shape[1:], shape) != ((), (1,)):
        raise ValueError(f"{name} must have the shape of the model's observation space, {shape}, got {values.shape[1:]}")
    return values.reshape(len(values), *shape)


# Writing


def write_blocks(buffer: ReplayBuffer, parts: Iterable[Transitions]) -> int:
    """
    Write whole parts into the arrays of a buffer. With several environments neighbours lie side by side.

    :param buffer: A plain buffer, one of dictionaries, or one with n-step returns of one environment.
    :param parts: Checked transitions.
    :return: How many were stored.
    :raises ValueError: If there are too many, or fewer than two.
    """
    if isinstance(buffer, NStepReplayBuffer) and buffer.n_envs > 1:
        raise ValueError(f"n_steps must be 1 to fill a buffer of several environments, got n-step returns of {buffer.n_envs}")
    start, n_rows, left = buffer.pos, 0, None
    free = 0 if buffer.full else buffer.buffer_size - start
    try:
        for part in parts:
            part = part if left is None else joined(left, part)
            whole = len(part.rewards) // buffer.n_envs
            if n_rows + whole > free:
                needed = (start + n_rows + whole) * buffer.n_envs
                raise ValueError(
                    f"buffer_size must hold the dataset beside the {buffer.size() * buffer.n_envs} transitions there, at "
                    f"least {needed}, got {buffer.buffer_size * buffer.n_envs}"
                )
            put(buffer, start + n_rows, part, whole)
            n_rows += whole
            left = rest(part, whole * buffer.n_envs)
        if n_rows * buffer.n_envs < 2:
            raise ValueError(f"dataset must hold at least 2 transitions, got {n_rows * buffer.n_envs}")
    except BaseException:
        # Rows behind the position count as empty, but for n-step returns these flags are read
        for array in (buffer.dones, buffer.timeouts):
            array[start : start + n_rows] = 0
        raise
    buffer.pos = (start + n_rows) % buffer.buffer_size
    buffer.full = start + n_rows == buffer.buffer_size
    return n_rows * buffer.n_envs


def put(buffer: ReplayBuffer, row: int, part: Transitions, n_rows: int) -> None:
    """Write the first ``n_rows`` times ``n_envs`` transitions of a part from a row of the buffer on."""
    rows, used, n_envs = slice(row, row + n_rows), n_rows * buffer.n_envs, buffer.n_envs

    def write(array: np.ndarray, values: np.ndarray) -> None:
        array[rows] = values[:used].reshape(n_rows, n_envs, *values.shape[1:])

    for ours, theirs in (
        (buffer.observations, part.observations),
        (buffer.next_observations, part.next_observations),
    ):
        if isinstance(ours, dict):
            for key, array in ours.items():
                write(array, theirs[key])
        else:
            write(ours, theirs)
    write(buffer.actions, part.actions)
    write(buffer.rewards, part.rewards)
    # SB3 sets both flags at a time limit
    write(buffer.dones, part.terminals | part.timeouts)
    write(buffer.timeouts, part.timeouts if buffer.handle_timeout_termination else np.zeros_like(part.timeouts))


def concatenated(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rows of one array, then of another."""
    return np.concatenate([first, second])


def joined(first: Transitions, second: Transitions) -> Transitions:
    """One part after another."""
    return second._replace(
        **{name: mapped(concatenated, getattr(first, name), getattr(second, name)) for name in Transitions._fields[:6]}
    )


def rest(part: Transitions, start: int) -> Transitions | None:
    """The rows from one on, None if there are none."""
    if start == len(part.rewards):
        return None
    return part._replace(**{name: sliced(getattr(part, name), slice(start, None)) for name in Transitions._fields[:6]})


def add_one_by_one(buffer: ReplayBuffer, parts: Iterable[Transitions]) -> int:
    """
    Hand the transitions to ``add()`` of a buffer that keeps them in its own way, for hindsight say.

    :param buffer: Of one environment.
    :param parts: Checked transitions. All are read before the first is added.
    :return: How many were stored.
    :raises ValueError: If there are too many, or fewer than two, or several environments.
    """
    if buffer.n_envs > 1:
        raise ValueError(f"{type(buffer).__name__} can be filled for one environment only, got {buffer.n_envs}")
    everything = list(parts)
    n_rows = sum(len(part.rewards) for part in everything)
    if n_rows < 2:
        raise ValueError(f"dataset must hold at least 2 transitions, got {n_rows}")
    if buffer.full or n_rows > buffer.buffer_size - buffer.pos:
        raise ValueError(f"buffer_size must hold the dataset, at least {buffer.size() + n_rows}, got {buffer.buffer_size}")
    for part in everything:
        for i in range(len(part.rewards)):
            row = slice(i, i + 1)
            infos = [{"TimeLimit.truncated": bool(part.timeouts[i])}]
            done = part.terminals[row] | part.timeouts[row]
            observations = (sliced(part.observations, row), sliced(part.next_observations, row))
            buffer.add(*observations, part.actions[row], part.rewards[row], done, infos)
    return n_rows


def with_progress(parts: Iterator[Transitions], progress_bar: bool) -> Iterator[Transitions]:
    """The same parts, counted."""
    if not progress_bar:
        yield from parts
        return
    try:
        from tqdm.rich import tqdm
    except ImportError as error:
        raise ImportError('progress_bar=True needs tqdm and rich: pip install ".[progress]"') from error
    with tqdm(unit=" rows") as bar:
        for part in parts:
            yield part
            bar.update(len(part.rewards))
