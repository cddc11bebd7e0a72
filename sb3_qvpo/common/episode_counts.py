"""
How many candidates an action is the best of, where that differs from episode to episode.

Episodes with few candidates try more. Those with many do what the policy is used for, so that critics are right about it.
Where a fall ends the episode, trying more means falling earlier, and there is less to learn from. So several counts take turns
only while episodes last until their time limit. After one that ended earlier the next takes the most candidates.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from sb3_qvpo.common.arguments import PolicyCount, check_count
from sb3_qvpo.common.candidates import only_first
from sb3_qvpo.common.runs.offline_learning import OfflineLearner


def largest(counts: Any) -> Any:
    """The largest of several counts; a single one as it is."""
    return max(counts) if isinstance(counts, tuple) and counts else counts


class EpisodeCounts(PolicyCount):
    """
    A whole number of at least 1, or several of them, of which each episode has one. It is set on the algorithm, and checked
    as :class:`PolicyCount` is. The policy has the largest.
    """

    def checked(self, value: Any) -> Any:
        """
        The value as it is kept: a whole number, or a tuple of them.

        :raises ValueError: If it is no whole number of at least 1, and no sequence of them.
        """
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            return super().checked(value)
        if len(value) == 0:
            raise ValueError(f"{self.name} must be a whole number of at least 1, or several of them, got {value!r}")
        return tuple(check_count(self.name, count) for count in value)

    def __get__(self, instance: object, owner: type) -> Any:
        count = super().__get__(instance, owner)
        own = vars(instance).get(self.name) if instance is not None else None
        # A count that was set on the policy holds instead
        return own if isinstance(own, tuple) and count == largest(own) else count

    def __set__(self, instance: object, value: Any) -> None:
        counts = self.checked(value)
        super().__set__(instance, largest(counts))
        vars(instance)[self.name] = counts


class CountsInUse:
    """
    The counts of a policy's actions, one for each environment, while ``learn()`` collects with several. Otherwise there are
    none, and the policy's own count holds.
    """

    def __init__(self) -> None:
        self.counts: tuple[int, ...] = ()

    @contextmanager
    def collecting(self, counts: Sequence[int]) -> Iterator[None]:
        """
        A context in which actions are collected.

        :param counts: Of how many candidates the action of each environment is the best. Empty for the policy's own count.
        """
        self.counts = tuple(counts)
        try:
            yield
        finally:
            self.counts = ()

    def to_draw(self, count: int) -> int:
        """
        How many candidates of each state must be drawn.

        :param count: The policy's own count.
        :return: The largest count in use, or ``count`` if none is.
        """
        return max(self.counts, default=count)

    def restricted(self, scores: th.Tensor) -> th.Tensor:
        """
        The scores among which the best one is chosen.

        :param scores: Scores of candidates, shape (B, K).
        :return: The same, with -inf beyond the count of each environment if there is one row for each.
        """
        applies = len(set(self.counts)) > 1 and len(self.counts) == len(scores)
        return only_first(scores, self.counts) if applies else scores


class EpisodeDraws:
    """Which of several counts the current episode of each environment has. Draws are from NumPy's global generator."""

    def __init__(self) -> None:
        self.drawn: tuple[tuple[int, ...], list[int]] | None = None
        """The choices, and the count of each environment. None before the first action, and with a single count."""

    def counts(self, choices: int | tuple[int, ...], n_envs: int) -> list[int]:
        """
        The counts of the current episodes. The first ones have the largest.

        :param choices: A count for all episodes, or several.
        :param n_envs: Number of environments.
        :return: A count for each environment. Empty if there is nothing to choose.
        """
        if isinstance(choices, int):
            self.drawn = None
            return []
        if self.drawn is None or self.drawn[0] != choices or len(self.drawn[1]) != n_envs:
            self.drawn = choices, [max(choices)] * n_envs
        return self.drawn[1]

    def end_episodes(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """
        Choose for episodes that begin: a random count after a time limit, else the largest.

        :param dones: Of which environments the episode has ended, shape (n_envs,).
        :param infos: What the environments told in the last step.
        """
        if self.drawn is not None:
            choices, counts = self.drawn
            for env in np.flatnonzero(dones):
                at_limit = infos[env].get("TimeLimit.truncated", False)
                counts[env] = int(np.random.choice(choices)) if at_limit else max(choices)


class EpisodeCountsLearner(OfflineLearner):
    """An off-policy algorithm that knows which of several counts each current episode has."""

    def _setup_model(self) -> None:
        self._episode_draws = EpisodeDraws()
        super()._setup_model()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_episode_draws"]

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is not None:
            self._episode_draws.end_episodes(dones, infos)

    def _forget_episodes(self) -> None:
        super()._forget_episodes()
        self._episode_draws.drawn = None

    def _process_state(self) -> dict[str, Any]:
        return {**super()._process_state(), "episode_counts": self._episode_draws.drawn}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        super()._restore_process_state(state)
        self._episode_draws.drawn = state.get("episode_counts")
