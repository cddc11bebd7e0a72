"""Learning from a replay buffer alone, with the callbacks, logs, checkpoints and guards of learning in an environment."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_qvpo.common.arguments import check_count
from sb3_qvpo.common.runs.guarded_algorithm import GuardedOffPolicyAlgorithm
from sb3_qvpo.offline.buffers import fill_replay_buffer

SelfOfflineLearner = TypeVar("SelfOfflineLearner", bound="OfflineLearner")


class OfflineLearner(GuardedOffPolicyAlgorithm):
    """An off-policy algorithm that can learn without a step in its environment."""

    def learn_offline(
        self: SelfOfflineLearner,
        dataset: Any = None,
        gradient_steps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int = 1_000,
        tb_log_name: str = "offline",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        reward_transform: Callable[[np.ndarray], np.ndarray] | None = None,
        clip_actions: bool = False,
    ) -> SelfOfflineLearner:
        """
        Learn from data that are there already. ``learn()`` may follow in the environment: it begins without random steps, and
        the data stay in the replay buffer. ``model.replay_buffer.reset()`` drops them first.

        One gradient step counts as one step, for callbacks, schedules, logs and :attr:`remaining_timesteps`. The constructor's
        ``learning_starts``, ``train_freq`` and ``gradient_steps`` have no meaning here. After a kill,
        ``resume(path, env).learn_offline(gradient_steps=model.remaining_timesteps, reset_num_timesteps=False)`` goes on.

        :param dataset: What :func:`~sb3_qvpo.offline.fill_replay_buffer` takes, put behind what is in the replay buffer. None
            for what is there.
        :param gradient_steps: Number of updates.
        :param callback: Callback(s), called at every gradient step.
        :param log_interval: Gradient steps between two entries of the log.
        :param tb_log_name: Name of the run for TensorBoard.
        :param reset_num_timesteps: Start counting steps (and schedules) from 0 again.
        :param progress_bar: Show a progress bar (needs tqdm and rich).
        :param reward_transform: From the dataset's rewards to those that are stored. Later online rewards need the same.
        :param clip_actions: Clip the dataset's actions that are out of bounds. Without it they are an error.
        :return: The trained model.
        :raises ValueError: If the dataset is refused, if the replay buffer is empty, if ``gradient_steps`` is below 1, or when
            a loss or a gradient is not finite. Weights and buffer are intact after any error.
        """
        total = check_count("gradient_steps", gradient_steps)
        log_interval = check_count("log_interval", log_interval)
        if dataset is not None:
            fill_replay_buffer(self, dataset, reward_transform, clip_actions, progress_bar)
        buffer = self.replay_buffer
        if not isinstance(buffer, ReplayBuffer) or buffer.size() == 0:
            raise ValueError("dataset must be given, or the replay buffer be filled before, got an empty buffer")
        with self._surviving_errors("gradient steps", "learn_offline"):
            total, callbacks = self._setup_learn(total, callback, reset_num_timesteps, tb_log_name, progress_bar)
            self._run_offline(total, callbacks, log_interval)
        return self

    def _run_offline(self, total: int, callbacks: BaseCallback, log_interval: int) -> None:
        # What callbacks find of a step in an environment. No episode ends, and a run may stop between any two steps
        nothing = {"dones": np.zeros(self.n_envs, bool), "rewards": np.zeros(self.n_envs), "new_obs": self._last_obs}
        step: dict[str, Any] = {
            "self": self,
            "infos": [{} for _ in range(self.n_envs)],
            "total_timesteps": total,
            "offline": True,
            **nothing,
        }
        callbacks.on_training_start(step, globals())
        goes_on = True
        while goes_on and self.num_timesteps < total:
            callbacks.on_rollout_start()
            self.num_timesteps += 1
            self._update_current_progress_remaining(self.num_timesteps, total)
            self.train(gradient_steps=1, batch_size=self.batch_size)
            callbacks.update_locals(step)
            goes_on = callbacks.on_step()
            callbacks.on_rollout_end()
            if self.num_timesteps % log_interval == 0:
                self.dump_logs()
        callbacks.on_training_end()
