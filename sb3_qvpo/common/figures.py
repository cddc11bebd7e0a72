"""
Look at a policy: the candidates that it draws for a few observations, their values, the one that it chooses, and a chain while
it denoises.

Shapes: B observations, K candidates for each, A action dimensions, S reverse steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qvpo.common.arguments import check_count
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.runs.files import atomic_file, check_writable

if TYPE_CHECKING:  # the package works without matplotlib
    from matplotlib.animation import FuncAnimation
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Observations = np.ndarray | dict[str, np.ndarray]
"""B observations, as ``predict()`` takes them."""


class Snapshot(NamedTuple):
    """
    What a policy draws for some observations at one moment of training.

    :param step: Environment steps so far.
    :param actions: Candidates in the units of the environment, shape (B, K, A).
    :param values: What the critics give each, the minimum or mean over critics; shape (B, K).
    """

    step: int
    actions: np.ndarray
    values: np.ndarray


def seeded_noise(policy: DiffusionPolicy, n_candidates: int, seed: int) -> th.Tensor:
    """
    The same noise at every call and for every observation, without a change of torch's generators.

    :param policy: The policy whose chains start from it.
    :param n_candidates: K.
    :param seed: Which noise.
    :return: Standard normal noise of shape (N, 1, K, A).
    """
    shape = (policy.actor.diffusion.n_noises, 1, n_candidates, policy.actor.action_dim)
    return th.randn(shape, generator=th.Generator().manual_seed(seed)).to(policy.device)


def snapshot(
    policy: DiffusionPolicy, observations: Observations, n_candidates: int = 64, seed: int = 0, step: int = 0
) -> Snapshot:
    """
    Draw candidates and value them. Equal seeds give equal noise, so that between two moments only the policy differs.

    :param policy: The policy.
    :param observations: B observations; normalised ones if the policy was trained on such.
    :param n_candidates: K.
    :param seed: Which noise the chains start from.
    :param step: Environment steps so far.
    :return: The candidates and their values.
    :raises ValueError: If the observations do not fit the policy, or ``n_candidates`` is below 1.
    """
    check_count("n_candidates", n_candidates)
    batch, is_batch = policy.obs_to_tensor(observations)
    if not is_batch:
        raise ValueError("observations must have a first dimension that counts them, got a single one")
    some = next(iter(batch.values())) if isinstance(batch, dict) else batch
    noise = seeded_noise(policy, n_candidates, seed).expand(-1, len(some), -1, -1)
    with th.no_grad():
        _, candidates, values = policy.score_candidates(batch, noise)
    shape = cast(tuple[int, ...], policy.action_space.shape)
    actions = policy.unscale_action(candidates.cpu().numpy().reshape(len(some), n_candidates, *shape))
    return Snapshot(step, actions.reshape(candidates.shape), values.cpu().numpy())


def denoise(policy: DiffusionPolicy, observation: Observations, n_candidates: int = 64, seed: int = 0) -> np.ndarray:
    """
    All states of the chain that draws candidates for one observation.

    :param policy: The policy.
    :param observation: One observation, without a first dimension that counts.
    :param n_candidates: K.
    :param seed: Which noise the chain starts from.
    :return: Noisy actions from the noise to the candidates, shape (S + 1, K, A), scaled as actions in [-1, 1] are to the
        environment's units. Before the end they may lie outside the bounds.
    """
    states: list[th.Tensor] = []
    actor = policy.actor

    def watched(x_t: th.Tensor, t: Any, cond: Any) -> th.Tensor:
        states.append(x_t[0])
        return cast(th.Tensor, actor.noise_predictor(x_t, t, cond))

    batch, _ = policy.obs_to_tensor(observation)
    with th.no_grad():
        condition = actor.noise_predictor.condition(actor.features(batch))
        states.append(actor.diffusion.sample(watched, condition, seeded_noise(policy, n_candidates, seed))[0])
    low, high = bounds_of(policy)  # unscale_action() would clip
    scaled: np.ndarray = low + (high - low) * (th.stack(states).cpu().numpy() + 1) / 2
    return scaled


def empty_figure(**arguments: Any) -> "Figure":
    """
    A figure of its own, which no window shows.

    :param arguments: Of matplotlib's ``Figure``.
    :return: The figure, with a canvas to be drawn on.
    :raises ImportError: Without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install ".[figures]"') from error
    figure = Figure(**arguments)
    FigureCanvasAgg(figure)
    return figure


def draw_candidates(axis: "Axes", actions: np.ndarray, values: np.ndarray, dimensions: tuple[int, int] = (0, 1)) -> None:
    """
    Draw the candidates of one observation: two dimensions of the actions, coloured by value, with a star at the best one. The
    title says which values. Where actions have one dimension, the value is the height.

    :param axis: Where to draw.
    :param actions: Shape (K, A).
    :param values: Shape (K,).
    :param dimensions: Which two of the A dimensions.
    """
    best = int(values.argmax())
    x = actions[:, dimensions[0] if actions.shape[1] > 1 else 0]
    y = actions[:, dimensions[1]] if actions.shape[1] > 1 else values
    axis.scatter(x, y, c=values, cmap="viridis", s=12, alpha=0.8)
    axis.scatter(x[best], y[best], marker="*", s=140, color="C3", edgecolor="white", zorder=3)
    axis.set_title(f"values {values.min():.4g} (dark) to {values.max():.4g} (star)", fontsize=7, color="0.3")


def candidate_figure(
    policy: DiffusionPolicy, snapshots: Sequence[Snapshot], dimensions: tuple[int, int] = (0, 1), n_columns: int = 5
) -> "Figure":
    """
    A row for each observation, a column for each moment: how candidates and choice move over training.

    :param policy: The policy, whose action space gives the bounds.
    :param snapshots: In the order of training.
    :param dimensions: Which two of the A dimensions.
    :param n_columns: At most so many moments, the first and the last among them.
    :return: The figure.
    :raises ValueError: If there is no snapshot, or the actions have no such dimensions.
    :raises ImportError: Without matplotlib.
    """
    if not snapshots:
        raise ValueError("snapshots must hold at least one, got none")
    n_states, _, n_dimensions = snapshots[0].actions.shape
    if n_dimensions > 1 and (len(set(dimensions)) != 2 or not set(dimensions) <= set(range(n_dimensions))):
        raise ValueError(f"dimensions must be two of 0 ... {n_dimensions - 1}, got {dimensions!r}")
    shown = [snapshots[i] for i in sorted(set(np.linspace(0, len(snapshots) - 1, n_columns).round().astype(int)))]
    figure = empty_figure(figsize=(0.4 + 2.2 * len(shown), 0.4 + 2.2 * n_states), layout="constrained")
    axes = figure.subplots(n_states, len(shown), squeeze=False)
    low, high = bounds_of(policy)
    for j, moment in enumerate(shown):
        for i in range(n_states):
            axis = axes[i, j]
            draw_candidates(axis, moment.actions[i], moment.values[i], dimensions)
            x = dimensions[0] if n_dimensions > 1 else 0
            axis.set_xlim(*with_margin(low[x], high[x]))
            if n_dimensions > 1:
                axis.set_ylim(*with_margin(low[dimensions[1]], high[dimensions[1]]))
            axis.tick_params(labelsize=6)
        axes[0, j].set_title(f"{moment.step:,} steps\n{axes[0, j].get_title()}", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel(f"action {dimensions[0]}" if n_dimensions > 1 else "action", fontsize=8)
    for i, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"observation {i + 1}\n" + (f"action {dimensions[1]}" if n_dimensions > 1 else "value"), fontsize=8)
    return figure


def chain_animation(
    policy: DiffusionPolicy, states: np.ndarray, values: np.ndarray, dimensions: tuple[int, int] = (0, 1), n_still: int = 6
) -> "FuncAnimation":
    """
    A chain while it denoises, coloured by the values that its candidates have at the end.

    :param policy: The policy, whose action space gives the bounds; the axes reach twice as far.
    :param states: From :func:`denoise`, shape (S + 1, K, A).
    :param values: Of the candidates, shape (K,).
    :param dimensions: Which two of the A dimensions.
    :param n_still: Frames for which the result stays.
    :return: The animation; ``save()`` writes it.
    :raises ImportError: Without matplotlib.
    """
    figure = empty_figure(figsize=(4, 4))
    axis = figure.subplots()
    low, high = bounds_of(policy)

    def draw(frame: int) -> "list[Artist]":
        step = min(frame, len(states) - 1)
        axis.clear()
        draw_candidates(axis, states[step], values, dimensions)
        axis.set_title(f"{step} of {len(states) - 1} steps\n{axis.get_title()}")
        x, y = dimensions if len(low) > 1 else (0, None)
        axis.set_xlim(2 * low[x], 2 * high[x])
        if y is not None:
            axis.set_ylim(2 * low[y], 2 * high[y])
        return list(axis.get_children())

    from matplotlib.animation import FuncAnimation

    return FuncAnimation(figure, draw, frames=len(states) + n_still)


def bounds_of(policy: DiffusionPolicy) -> tuple[np.ndarray, np.ndarray]:
    """
    :param policy: The policy.
    :return: The smallest and largest actions, shape (A,) each.
    """
    box = cast(spaces.Box, policy.action_space)
    return box.low.ravel(), box.high.ravel()


def with_margin(low: float, high: float) -> tuple[float, float]:
    """
    :param low: Where an interval begins.
    :param high: Where it ends.
    :return: The interval, a twentieth wider at each end.
    """
    margin = 0.05 * (high - low)
    return low - margin, high + margin


class CandidateFigureCallback(BaseCallback):
    """
    Draw what the policy does for a few held observations, at several moments of training: the candidates in action space,
    coloured by value, and the chosen one. The figure goes to TensorBoard, if the model logs there, and to a PNG file.

    Draws have the same noise every time, and no random state of the run changes.

    :param draw_freq: Environment steps between two draws, over all environments.
    :param save_path: The PNG file, which is replaced at every draw; None for TensorBoard alone.
    :param observations: B observations to hold, as the policy sees them. If None, ``n_observations`` are taken from the first
        ``draw_freq`` steps, at equal distances.
    :param n_observations: B, if there are no ``observations``.
    :param n_candidates: K, candidates for each observation.
    :param dimensions: Which two dimensions of the actions to draw.
    :param n_columns: At most so many moments stand beside each other, at least 2.
    :param verbose: 2 to report each draw.
    :raises ValueError: If a number is too small. When training starts, if the policy is no :class:`DiffusionPolicy`, or has no
        such dimensions or observations.
    :raises OSError: When training starts, if ``save_path`` cannot be written.
    :raises ImportError: When training starts, without matplotlib.
    """

    model: OffPolicyAlgorithm

    def __init__(
        self,
        draw_freq: int,
        save_path: str | Path | None = None,
        observations: Observations | None = None,
        n_observations: int = 3,
        n_candidates: int = 64,
        dimensions: tuple[int, int] = (0, 1),
        n_columns: int = 5,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        self.draw_freq = check_count("draw_freq", draw_freq)
        self.save_path = None if save_path is None else Path(save_path).absolute()
        self.observations = observations
        self.n_observations = check_count("n_observations", n_observations)
        self.n_candidates = check_count("n_candidates", n_candidates)
        self.dimensions = dimensions
        self.n_columns = check_count("n_columns", n_columns, 2)
        self.snapshots: list[Snapshot] = []
        self._held: list[Observations] = []
        self._last_drawn = 0

    def _init_callback(self) -> None:
        if not isinstance(self.model.policy, DiffusionPolicy):
            raise ValueError(f"the policy must be a DiffusionPolicy, got {type(self.model.policy).__name__}")

    def _on_training_start(self) -> None:
        if self.save_path is not None:
            check_writable(self.save_path)
        # What cannot be drawn is refused now rather than hours later
        policy = cast(DiffusionPolicy, self.model.policy)
        some = cast(Observations, self.model._last_obs if self.observations is None else self.observations)
        candidate_figure(policy, [snapshot(policy, some, n_candidates=2)], self.dimensions)
        self._last_drawn = self.model.num_timesteps

    def _on_step(self) -> bool:
        since = self.model.num_timesteps - self._last_drawn
        while self.observations is None and since * self.n_observations >= len(self._held) * self.draw_freq:
            self._hold(self.locals["new_obs"], len(self._held) % self.model.n_envs)
        if since >= self.draw_freq:
            self._draw()
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._last_drawn and (self.observations is not None or self._held):
            self._draw()
            self.logger.dump(self.model.num_timesteps)

    def _hold(self, new_obs: Observations, env: int) -> None:
        """Keep an environment's observation. The last one that is held completes the set."""
        self._held.append({key: value[env] for key, value in new_obs.items()} if isinstance(new_obs, dict) else new_obs[env])
        if len(self._held) == self.n_observations:
            self.observations = stacked(self._held)

    def _draw(self) -> None:
        if self.observations is None:  # a short run
            self.observations = stacked(self._held)
        policy = cast(DiffusionPolicy, self.model.policy)
        now = snapshot(policy, self.observations, self.n_candidates, step=self.model.num_timesteps)
        self.snapshots.append(now)
        self._last_drawn = self.model.num_timesteps
        figure = candidate_figure(policy, self.snapshots, self.dimensions, self.n_columns)
        self.logger.record("candidates", LoggedFigure(figure, close=False), exclude=("stdout", "log", "json", "csv"))
        if self.save_path is not None:
            with atomic_file(self.save_path, "png") as file:
                figure.savefig(cast(Any, file), format="png", dpi=100)
        if self.verbose >= 2:
            print(f"Drew the candidates after {now.step} steps" + (f" to {self.save_path}" if self.save_path else ""))


def stacked(observations: Sequence[Observations]) -> Observations:
    """
    Put single observations together.

    :param observations: Without a first dimension that counts.
    :return: With one.
    """
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.stack([cast(dict[str, np.ndarray], each)[key] for each in observations]) for key in first}
    return np.stack(cast(Sequence[np.ndarray], observations))
