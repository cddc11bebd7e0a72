"""Callbacks for training."""

import warnings
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback, EventCallback

from sb3_qvpo.common.arguments import check_count
from sb3_qvpo.common.runs.checkpoints import checkpoint_path
from sb3_qvpo.common.runs.files import check_writable
from sb3_qvpo.common.runs.guarded_algorithm import GuardedOffPolicyAlgorithm


class ResumableCheckpointCallback(BaseCallback):
    """
    Save the whole training run every so often and at its end, always in the same file, to be continued with ``resume()``.

    The file holds the model, the replay buffer, the statistics of ``VecNormalize``, random states and counters. It takes the
    place of the previous file when it is complete. So a kill at any moment, even during writing, costs only what came after
    the last checkpoint. Unlike SB3's ``CheckpointCallback`` it saves between two rollouts, when the latest transition has been
    stored and trained on.

    :param save_freq: Environment steps between two checkpoints, over all environments (SB3's counts calls).
    :param save_path: Path of the file; ``.zip`` is added if it has no suffix.
    :param at_episode_end: Wait until all environments end an episode at the same step, for at most ``save_freq`` steps more.
        The next episode then starts from a reset that the run's random state seeds, as after ``resume()``. If the
        environment's randomness comes from that seed alone, a continued run is bit for bit the uninterrupted one.
    :param verbose: 2 to report each checkpoint.
    :raises ValueError: If ``save_freq`` is below 1. When training starts, if this callback is inside another that fires at
        events, or with ``at_episode_end`` if the environments refuse to be reset early.
    :raises OSError: When training starts, if nothing can be written there.
    """

    model: GuardedOffPolicyAlgorithm

    def __init__(self, save_freq: int, save_path: str | Path, at_episode_end: bool = False, verbose: int = 0):
        super().__init__(verbose)
        self.save_freq = check_count("save_freq", save_freq)
        self.save_path = Path(save_path).absolute()  # an environment may change the working directory
        self.at_episode_end = at_episode_end
        self.last_saved = 0
        self._episodes_ended = False
        self._warned = False

    def _init_callback(self) -> None:
        if not hasattr(self.model, "save_checkpoint"):
            raise ValueError(f"the model must have save_checkpoint(), as QVPO has, got {type(self.model).__name__}")
        if isinstance(self.parent, EventCallback):
            raise ValueError(
                f"{type(self).__name__} must be given to learn() itself or in a list, got inside "
                f"{type(self.parent).__name__}: it counts steps by itself"
            )

    def _on_training_start(self) -> None:
        # Now rather than hours later
        check_writable(checkpoint_path(self.save_path))
        name = "allow_early_resets"  # of Monitor. Asking a process for an attribute that it lacks kills it
        if self.at_episode_end and self.training_env.has_attr(name) and not all(self.training_env.get_attr(name)):
            raise ValueError("at_episode_end must be False for environments with Monitor(allow_early_resets=False), got True")
        if self.at_episode_end and not self.model.can_seed_environments():
            raise ValueError("at_episode_end must be False for environments that cannot be seeded, got True")
        self.last_saved = self.model.num_timesteps
        self._episodes_ended = False

    def _on_step(self) -> bool:
        self._episodes_ended = bool(self.locals.get("offline") or self.locals["dones"].all())
        return True

    def _on_rollout_start(self) -> None:
        since_last = self.model.num_timesteps - self.last_saved
        waited_enough = not self.at_episode_end or self._episodes_ended or since_last >= 2 * self.save_freq
        if since_last >= self.save_freq and waited_enough:
            self._save()
            if self.at_episode_end and self._episodes_ended:
                self.model.restart_episodes()
            elif self.at_episode_end and not self._warned:
                self._warned = True
                warnings.warn(
                    f"no common end of all episodes within {2 * self.save_freq} steps, seen between two rollouts (see "
                    f"train_freq): the checkpoint after {self.last_saved} steps is in the middle of an episode, and a resumed "
                    "run will not be bit for bit the uninterrupted one",
                    stacklevel=2,
                )

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self.last_saved:
            self._save()

    def _save(self) -> None:
        self.model.save_checkpoint(self.save_path)
        self.last_saved = self.model.num_timesteps
        if self.verbose >= 2:
            print(f"Saved a checkpoint after {self.last_saved} steps to {self.save_path}")
