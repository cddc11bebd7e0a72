"""
An off-policy algorithm whose weights, replay buffer and files survive errors and interruptions: numbers that are not finite,
environments that raise, full disks, kills. Nothing here knows what is trained.
"""

import io
import math
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_qvpo.common.arguments import check_count, check_interval
from sb3_qvpo.common.runs.checkpoints import (
    NormalizerState,
    RandomStates,
    cut_last_episode,
    get_random_states,
    is_checkpoint,
    normalization_statistics,
    open_checkpoint,
    restore_environment,
    restore_statistics,
    saved_model,
    set_random_states,
    unpickle,
    write_checkpoint,
)
from sb3_qvpo.common.runs.files import atomic_file
from sb3_qvpo.common.runs.finite_checks import FiniteGuard, check_finite_array

DEAD_WORKER = (
    " If the environments run in processes of their own (SubprocVecEnv), one of these is dead: set_env() new ones first, or "
    "save and resume."
)

SelfGuardedAlgorithm = TypeVar("SelfGuardedAlgorithm", bound="GuardedOffPolicyAlgorithm")


class GuardedOffPolicyAlgorithm(OffPolicyAlgorithm):
    """
    SB3's ``OffPolicyAlgorithm`` that stops before a number that is not finite does harm, saves atomically, and resumes.

    A subclass takes its optimiser steps through ``_optimize()`` and sets ``max_grad_norm``.
    """

    max_grad_norm: float | None

    def _setup_model(self) -> None:
        self._warm_up_end: int | None = None  # of the current learn(), None for SB3's own rule
        self._warm_up_left: int | None = None  # the step at which updates may begin, over several learn()
        self._steps_at_start: int | None = None
        self._first_timestep = 0  # of the current learn(), which an interruption does not end
        self._resumed_random_states: RandomStates | None = None
        self._statistics: NormalizerState = []
        self._finite_guard = FiniteGuard(self.device.type != "cpu", self.device)
        super()._setup_model()

    def _excluded_save_params(self) -> list[str]:
        not_saved = [
            "_finite_guard",
            "_warm_up_end",
            "_warm_up_left",
            "_first_timestep",
            "_steps_at_start",
            "_resumed_random_states",
        ]
        not_saved += ["_statistics", "start_time"]
        return [*super()._excluded_save_params(), *not_saved]

    @property
    def learning_starts(self) -> int:
        """Environment steps before the first update; while training continues, the step at which updates start again."""
        warm_up_end = self.__dict__.get("_warm_up_end")
        return cast(int, self.__dict__["learning_starts"] if warm_up_end is None else warm_up_end)

    @learning_starts.setter
    def learning_starts(self, value: int) -> None:
        self.__dict__["learning_starts"] = value
        # Whoever sets it means it, also while training continues
        self._warm_up_end, self._warm_up_left = None, value

    def _optimize(self, optimizer: th.optim.Optimizer, loss_name: str, loss: th.Tensor) -> None:
        """
        One optimiser step, guarded against numbers that are not finite.

        :param optimizer: The optimiser of the networks that the loss trains.
        :param loss_name: Name of the loss, for the error message.
        :param loss: The loss, a scalar.
        """
        optimizer.zero_grad()
        if not loss.requires_grad:  # all of its networks are frozen
            return
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        self._finite_guard.step(optimizer, loss_name, loss, self.max_grad_norm)

    # Files

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file.

        :param path: Path of the file, or an open file.
        :param exclude: Attributes not to save, besides those that are never saved.
        :param include: Attributes to save although they would be excluded.
        :raises OSError: If writing fails. A previous file is intact then.
        """
        self._prepare_saving()
        if isinstance(path, io.BufferedIOBase):
            super().save(path, exclude, include)
        else:
            with atomic_file(path, "zip") as file:
                super().save(file, exclude, include)

    def _prepare_saving(self) -> None:
        """Bring the instance's dictionary, which is what SB3 saves, up to date."""

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file. As with any pickle, only load one that you trust.

        :param path: Path of the file, or an open file.
        :raises OSError: If writing fails. A previous file is intact then.
        """
        if isinstance(path, io.BufferedIOBase):
            super().save_replay_buffer(path)
        else:
            with atomic_file(path, "pkl") as file:
                super().save_replay_buffer(file)

    def save_checkpoint(self, path: str | pathlib.Path) -> None:
        """
        Save the whole training run in one file: model, replay buffer, statistics of ``VecNormalize``, random states.
        :meth:`resume` continues it. :class:`~sb3_qvpo.ResumableCheckpointCallback` saves checkpoints regularly.

        :param path: Path of the file; ``.zip`` is added if it has no suffix.
        :raises OSError: If writing fails. A previous file is intact then.
        """
        random_states = self._resumed_random_states or get_random_states(self.action_space)
        run = {"warm_up_end": self._warm_up_left, "first_timestep": self._first_timestep, **self._process_state()}
        write_checkpoint(self, path, {"random_states": random_states, **run})

    @classmethod
    def load(
        cls: type[SelfGuardedAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfGuardedAlgorithm:
        """
        Load a model. The file holds pickles, which can run any program when they are loaded: only load files that you trust.

        :param path: Path of a saved model, or an open file. Of a checkpoint only the model is loaded, see :meth:`resume`.
        :param env: Environment to train on; not needed for predictions.
        :param device: Device to load to.
        :param custom_objects: Objects that replace saved ones, for instance if these cannot be unpickled.
        :param print_system_info: Whether to print versions, those of the saved model included.
        :param force_reset: Reset the environment before training goes on.
        :param kwargs: Attributes to change.
        :return: The model.
        :raises ValueError: If it is a model of another algorithm, or ``env`` does not fit it.
        """
        if is_checkpoint(path):
            with open_checkpoint(cast(str, path)) as archive:
                path = saved_model(archive)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    @classmethod
    def resume(
        cls: type[SelfGuardedAlgorithm],
        path: str | pathlib.Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        **kwargs: Any,
    ) -> SelfGuardedAlgorithm:
        """
        Everything that :meth:`save_checkpoint` or its callback saved. To train on to the end of the interrupted run::

            model = QVPO.resume(path, env)
            model.learn(model.remaining_timesteps, callback=callback, reset_num_timesteps=False)

        The file holds pickles, which can run any program when they are loaded: only resume from files that you trust.

        :param path: Path of the checkpoint.
        :param env: The environment to continue in, built as for the saved run. Its ``VecNormalize`` gets the saved statistics.
            Without one, the environment is wrapped in the saved one. It starts with a new episode.
        :param device: Device to continue on.
        :param custom_objects: Objects that replace saved ones, see ``load()``.
        :param print_system_info: Whether to print versions, those of the saved run included.
        :param kwargs: Attributes to change, see ``load()``.
        :return: The model. Random states are put back when ``learn()`` is called.
        :raises FileNotFoundError: If there is no such file.
        :raises ValueError: If it is not a checkpoint, or ``env`` does not fit it.
        """
        with open_checkpoint(path) as archive:
            vec_env = restore_environment(archive, env)
            model = cls.load(saved_model(archive), vec_env, device, custom_objects, print_system_info, **kwargs)
            with archive.open("replay_buffer.pkl") as member:
                model.load_replay_buffer(io.BufferedReader(cast(Any, member)), truncate_last_traj=False)
            run = unpickle(archive, "run")
        model._resumed_random_states, model._warm_up_left = run["random_states"], run["warm_up_end"]
        model._first_timestep = run["first_timestep"]
        model._restore_process_state(run)
        cut_last_episode(cast(ReplayBuffer, model.replay_buffer))
        return model

    def _process_state(self) -> dict[str, Any]:
        """State outside the model that a resumed run needs to continue identically."""
        return {}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`_process_state` returned."""

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps that were left when ``learn()`` was interrupted; 0 if it came to its end."""
        return max(0, self._total_timesteps - self.num_timesteps)

    # Training that can stop anywhere

    def learn(
        self: SelfGuardedAlgorithm,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfGuardedAlgorithm:
        """
        Train the model.

        :param total_timesteps: Number of environment steps; a float such as ``1e6`` is fine.
        :param callback: Callback(s) called at every step.
        :param log_interval: Episodes between two entries of the log.
        :param tb_log_name: Name of the run for TensorBoard.
        :param reset_num_timesteps: Start counting steps (and schedules) from 0 again.
        :param progress_bar: Show a progress bar (needs tqdm and rich).
        :return: The trained model.
        :raises ValueError: If ``total_timesteps`` is not finite, or when a reward, an observation, a loss or a gradient is
            not finite. After any error in here, also of the environment, the weights and the buffer are intact, and training
            can continue with a new episode.
        """
        n_steps = int(check_interval("total_timesteps", total_timesteps, 0, math.inf))
        with self._surviving_errors("environment steps", "learn"):
            super().learn(n_steps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        return self

    @contextmanager
    def _surviving_errors(self, steps: str, method: str) -> Iterator[None]:
        """
        Training inside ends with a report of numbers that are not finite, and leaves weights and buffer whole after an error.

        :param steps: What is counted, for the note on an error.
        :param method: What continues after it.
        """
        self._steps_at_start = None  # set when there is a first observation
        try:
            yield
            self._finite_guard.report(self._n_updates)
        except BaseException as error:
            # The environment may have moved on without us, or be broken
            try:
                self._abandon_episodes()
            except Exception as failure:  # no failure of a clean-up takes the place of the error
                warnings.warn(f"the last episode in the replay buffer could not be cut off: {failure!r}", stacklevel=2)
            n_done = 0 if self._steps_at_start is None else self.num_timesteps - self._steps_at_start
            if n_done > 0 and isinstance(error, Exception) and hasattr(error, "add_note"):  # Python 3.11
                in_all = f" ({self.num_timesteps} in all)" if n_done < self.num_timesteps else ""
                error.add_note(
                    f"Training stopped after {n_done} {steps}{in_all}. Weights and replay buffer are intact: "
                    f"they can be saved, and {method}(..., reset_num_timesteps=False) continues with a new episode."
                    + (DEAD_WORKER if isinstance(error, EOFError | BrokenPipeError | ConnectionResetError) else "")
                )
            raise
        self._warm_up_end = None
        if self._warm_up_left is not None and self.num_timesteps >= self._warm_up_left:
            self._warm_up_left = None

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all random generators. After :meth:`resume` this takes the place of the saved random states.

        :param seed: The seed, at least 0; nothing happens if None.
        :raises ValueError: If it is anything else.
        """
        if seed is not None:
            seed = check_count("seed", seed, 0)
            self._resumed_random_states = None
        super().set_random_seed(seed)

    def restart_episodes(self) -> None:
        """Reset all environments with seeds drawn from NumPy's global generator, so that its state decides what follows."""
        self._abandon_episodes()
        self._reseed_environments()
        env = cast(VecEnv, self.env)
        self._last_obs = cast(np.ndarray, env.reset())
        if self._vec_normalize_env is not None:
            self._last_original_obs = cast(np.ndarray, self._vec_normalize_env.get_original_obs())

    def _reseed_environments(self) -> None:
        seed = int(np.random.randint(2**31 - 1))
        try:
            cast(VecEnv, self.env).seed(seed)
        except (AttributeError, NotImplementedError) as error:
            warnings.warn(
                f"the environments cannot be seeded ({error or type(error).__name__}): the run continues, but not as the "
                "uninterrupted one would, bit for bit",
                stacklevel=4,
            )

    def can_seed_environments(self) -> bool:
        """
        Whether the environments can be seeded. Neither their states nor NumPy's global generator are changed.

        :return: True if they can.
        """
        env, random_state = cast(VecEnv, self.env), np.random.get_state()
        try:
            env.seed(0)
            env._reset_seeds()
        except (AttributeError, NotImplementedError):
            return False
        finally:
            np.random.set_state(random_state)
        return True

    def _abandon_episodes(self) -> None:
        """The next ``learn()`` resets the environments, and no transition in the buffer leads from one episode to the next."""
        self._last_obs = None
        if self.replay_buffer is not None:
            cut_last_episode(self.replay_buffer)

    def _forget_episodes(self) -> None:
        """Called before environments are reset, but not where a checkpoint is resumed."""

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        is_resumed = self._resumed_random_states is not None and not reset_num_timesteps
        if self._resumed_random_states is not None:
            set_random_states(self._resumed_random_states, self.action_space)
            self._resumed_random_states = None
            self._reseed_environments()
        self._statistics = normalization_statistics(self._vec_normalize_env)
        if reset_num_timesteps or self._last_obs is None:  # SB3 is about to reset the environments
            if self.replay_buffer is not None:
                cut_last_episode(self.replay_buffer)
            if not is_resumed:
                self._forget_episodes()
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._steps_at_start = self.num_timesteps
        if not is_resumed:
            self._first_timestep = self.num_timesteps
        first_obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        self._check_finite("observation", cast(np.ndarray, first_obs))
        if reset_num_timesteps and self._warm_up_left != self.__dict__["learning_starts"]:
            self._warm_up_left = None  # the end of a refill, in steps that are no longer counted
        self._warm_up_end = self._warm_up_end_at_start()
        return result

    def _warm_up_end_at_start(self) -> int | None:
        """The step at which updates begin in this ``learn()``. None for SB3's own rule, ``learning_starts``."""
        if self._warm_up_left is not None and self.num_timesteps < self._warm_up_left:
            return self._warm_up_left  # set by the user, or a refill that is started below and was interrupted
        learning_starts = cast(int, self.__dict__["learning_starts"])  # not the property, which may return the end of a refill
        buffer_is_empty = cast(ReplayBuffer, self.replay_buffer).size() == 0
        if not buffer_is_empty and self._n_updates > 0:
            # SB3 would act at random again, because learn() counts from 0. But the buffer is not empty
            return 0
        if buffer_is_empty and self.num_timesteps > 0:
            # SB3 would update from a nearly empty buffer, because the count is beyond learning_starts
            self._warm_up_left = self.num_timesteps + learning_starts
            return self._warm_up_left
        return None

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        original_obs, original_reward = new_obs, reward
        if self._vec_normalize_env is not None:
            # Normalisation clips infinities away
            original_obs = self._vec_normalize_env.get_original_obs()
            original_reward = self._vec_normalize_env.get_original_reward()
        self._check_finite("reward", original_reward)
        self._check_finite("observation", original_obs)
        for info in infos:
            if info.get("terminal_observation") is not None:
                self._check_finite("terminal observation", info["terminal_observation"])
        self._statistics = normalization_statistics(self._vec_normalize_env)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_finite(self, name: str, value: np.ndarray | dict[str, np.ndarray]) -> None:
        try:
            check_finite_array(name, value, self.num_timesteps)
        except ValueError:
            # VecNormalize has already added the bad number to its statistics
            restore_statistics(self._statistics)
            raise
