"""
What every algorithm that trains a :class:`DiffusionPolicy` off-policy shares: checked arguments, candidate counts that can be
changed, learning rates, metrics that do not stall an accelerator.

A subclass sets its own arguments, calls ``_setup_model()``, and writes ``train()``.
"""

import copy
import io
import pathlib
import warnings
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_qvpo.common.arguments as arguments
import sb3_qvpo.common.busy_cores as busy_cores
import sb3_qvpo.common.captured as captured
import sb3_qvpo.common.compiled as compiled
import sb3_qvpo.common.fast as fast
import sb3_qvpo.common.fused_steps as fused_steps
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.batches import flat_items, rebuild, sample_batch
from sb3_qvpo.common.guarded_algorithm import GuardedOffPolicyAlgorithm
from sb3_qvpo.common.policies import DiffusionPolicy

COMPILE_AFTER, LONG_RUN = 10_000, 100_000
"""Environment steps after which actions are compiled, in calls of ``learn()`` that are this long: see ``docs/speed.md``."""

Metrics = dict[str, th.Tensor]
"""Named scalars of a loss, still on the device."""


class DiffusionOffPolicyAlgorithm(GuardedOffPolicyAlgorithm):
    """
    Base of off-policy algorithms with a diffusion policy. All arguments are keywords here; see the subclasses.

    :param policy: Name of a policy or a subclass of :class:`DiffusionPolicy`.
    :param env: The environment to learn from.
    :param learning_rate: Learning rate of the actor: a number, a schedule or a string such as ``"lin_3e-4"``.
    :param qf_learning_rate: Learning rate of the critics, ``learning_rate`` if None.
    :param n_diffusion_steps: T, steps of the diffusion.
    :param n_behavior_candidates: K_b, best of this many candidates in ``predict(deterministic=False)``.
    :param n_eval_candidates: K, best of this many candidates in ``predict(deterministic=True)``.
    :param policy_delay: Update actor and targets every this many critic updates.
    :param max_grad_norm: Largest Euclidean norm of the gradients of actor and of critics; None for no clipping.
    :param kwargs: Further arguments of SB3's ``OffPolicyAlgorithm``.
    :raises ValueError: If the action space is not a finite ``Box``, a candidate count is below 1, or gSDE is asked for.
    """

    policy: DiffusionPolicy
    actor: DiffusionActor
    actor_target: DiffusionActor
    critic: CandidateCritic
    critic_target: CandidateCritic

    _policy_arguments: ClassVar[tuple[str, ...]] = ("n_diffusion_steps", "n_behavior_candidates", "n_eval_candidates")
    _update_settings: ClassVar[tuple[str, ...]] = ("gamma", "tau", "max_grad_norm")
    """Attributes that an update reads and a script may change."""
    _count_arguments: ClassVar[tuple[str, ...]] = (
        *("batch_size", "buffer_size", "n_steps", "policy_delay"),
        *_policy_arguments,
    )

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | str | Schedule,
        qf_learning_rate: float | str | Schedule | None,
        n_diffusion_steps: int,
        n_behavior_candidates: int,
        n_eval_candidates: int,
        policy_delay: int,
        max_grad_norm: float | None,
        **kwargs: Any,
    ):
        # Strings are parsed in _setup_lr_schedule()
        super().__init__(policy, env, cast(Any, learning_rate), sde_support=False, support_multi_env=True, **kwargs)
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)  # SB3 adds to it: not to the user's own
        self.qf_learning_rate = qf_learning_rate
        self.n_diffusion_steps = n_diffusion_steps
        self.n_behavior_candidates = n_behavior_candidates
        self.n_eval_candidates = n_eval_candidates
        self.policy_delay = policy_delay
        self.max_grad_norm = max_grad_norm

    # The two counts that predict() uses belong to the policy, and can be changed there or here at any time. SB3 saves and
    # loads what is in the instance's dictionary, so they stand there until there is a policy, and when the model is saved.

    @property
    def n_behavior_candidates(self) -> int:
        """K_b, best of this many candidates in ``predict(deterministic=False)``; can be changed at any time."""
        return self._candidate_count("n_behavior_candidates")

    @n_behavior_candidates.setter
    def n_behavior_candidates(self, value: int) -> None:
        self._set_candidate_count("n_behavior_candidates", value)

    @property
    def n_eval_candidates(self) -> int:
        """K, best of this many candidates in ``predict(deterministic=True)``; can be changed at any time."""
        return self._candidate_count("n_eval_candidates")

    @n_eval_candidates.setter
    def n_eval_candidates(self, value: int) -> None:
        self._set_candidate_count("n_eval_candidates", value)

    @property
    def n_diffusion_steps(self) -> int:
        """T, steps of the diffusion; fixed once there is a policy."""
        return cast(int, self.__dict__["n_diffusion_steps"])

    @n_diffusion_steps.setter
    def n_diffusion_steps(self, value: int) -> None:
        if "policy" in self.__dict__ and value != self.policy.n_diffusion_steps:
            raise ValueError(f"n_diffusion_steps is fixed by the policy, {self.policy.n_diffusion_steps}, got {value!r}")
        self.__dict__["n_diffusion_steps"] = value

    def _candidate_count(self, name: str) -> int:
        return cast(int, getattr(self.policy, name) if "policy" in self.__dict__ else self.__dict__[name])

    def _set_candidate_count(self, name: str, value: int) -> None:
        self.__dict__[name] = arguments.check_count(name, value)
        if "policy" in self.__dict__:
            setattr(self.policy, name, value)

    # Building and saving

    def _setup_model(self) -> None:
        self._resolve_arguments()
        # Not there: in a later learn() 0 freezes the targets
        arguments.check_interval("tau", self.tau, 0, 1, low_allowed=False)
        self._warned_of_few_updates = False
        self._metric_sums: dict[str, tuple[th.Tensor, int]] = {}
        self._captured_updates: captured.CapturedUpdates | None = None
        own_kwargs = {name: getattr(self, name) for name in self._policy_arguments}
        policy_kwargs = self.policy_kwargs
        for name in own_kwargs.keys() & policy_kwargs.keys():
            raise ValueError(
                f"{name} must be an argument of {type(self).__name__}, not of policy_kwargs, got {policy_kwargs[name]!r} there"
            )
        # What the user gave is saved with the model and stays as it was given
        self.policy_kwargs = {**policy_kwargs, **own_kwargs}
        n_step_kwargs = dict(self.replay_buffer_kwargs) if self.replay_buffer_class is None and self.n_steps > 1 else None
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = policy_kwargs
        if self.device.type == "cpu":
            fast.keep_freed_memory()
        if n_step_kwargs is not None:
            # SB3 has put its n-step buffer here: saved like that, a loaded model would ignore its own n_steps and gamma
            self.replay_buffer_class, self.replay_buffer_kwargs = None, n_step_kwargs
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _resolve_arguments(self) -> None:
        """Check all arguments and prepare those with several forms, before anything large is built."""
        if not issubclass(self.policy_class, DiffusionPolicy):
            raise ValueError(
                f"policy must be a name or a subclass of DiffusionPolicy, got {self.policy_class.__name__}: a policy (or a "
                "saved model) of another algorithm cannot be used"
            )
        arguments.check_no_sde(self.use_sde, self.policy_kwargs)
        for name in self._count_arguments:
            arguments.check_count(name, getattr(self, name))
        arguments.check_interval("gamma", self.gamma, 0, 1)
        arguments.check_options(self.action_noise, self.replay_buffer_class, self.max_grad_norm)
        arguments.check_step_counts(self.learning_starts, self.train_freq, self.gradient_steps, self._stats_window_size)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule: FloatSchedule = arguments.parse_schedule("learning_rate", self.learning_rate)
        self._qf_lr_schedule: FloatSchedule | None = None
        if self.qf_learning_rate is not None:
            self._qf_lr_schedule = arguments.parse_schedule("qf_learning_rate", self.qf_learning_rate)

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
        for name in ("n_behavior_candidates", "n_eval_candidates"):
            self.__dict__[name] = self._candidate_count(name)
        super().save(path, exclude, include)

    def export(
        self,
        path: str | pathlib.Path,
        format: str | None = None,
        vec_normalize: VecNormalize | Literal[False] | None = None,
    ) -> None:
        """
        Write the whole deterministic decision to a file that runs without this package, with the normalisation of the
        environment if it has one. See :mod:`sb3_qvpo.common.export`.

        :param path: Path of the file; ``.onnx`` or ``.pt2`` is added if it has no suffix.
        :param format: ``"onnx"``, or ``"torch"`` for ``torch.export.load()``; by the suffix of ``path`` if None.
        :param vec_normalize: The normalisation that the model was trained with, if it is not its environment's (a loaded model
            has no environment). False to leave it to whoever runs the file.
        :raises ValueError: If ``format`` is another, ``vec_normalize`` belongs to other observations, or it is missing.
        """
        self.policy.export(path, format, self.get_vec_normalize_env() if vec_normalize is None else vec_normalize)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load weights and optimiser states into this model. After an error the model is as it was.

        :param load_path_or_dict: Path of a saved model, or what ``get_parameters()`` returned.
        :param exact_match: Whether all parameters must be there.
        :param device: Device to load to.
        :raises RuntimeError: If the weights do not fit this model, with another number of diffusion steps or another noise
            schedule for instance.
        """
        before = copy.deepcopy(self.get_parameters())
        for optimizer in (self.actor.optimizer, self.critic.optimizer):
            captured.forget(optimizer)
        self._captured_updates = None  # its graphs hold on to the state that the optimisers had
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except Exception as error:  # whatever is wrong, the model must be as it was
            super().set_parameters(cast(Any, before), exact_match=True, device=self.device)
            if "size mismatch for actor.diffusion.betas" not in str(error):
                raise
            raise RuntimeError(
                f"n_diffusion_steps is {self.n_diffusion_steps} in this model, other than in the saved policy; it is fixed "
                "when a policy is trained, because the noise predictor has learnt these steps and no others"
            ) from error
        finally:
            for optimizer in (self.actor.optimizer, self.critic.optimizer):
                fused_steps.use_fused(optimizer)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """
        Weights and optimiser states, as they are saved.

        :return: State dictionaries by name.
        """
        parameters = cast(dict[str, dict[str, Any]], super().get_parameters())
        for name in ("actor.optimizer", "critic.optimizer"):
            state = captured.plain_state(parameters[name])
            # What the user has chosen
            choice = attrgetter(name)(self).defaults.get("fused")
            groups = [{**group, "fused": choice} if "fused" in group else group for group in state["param_groups"]]
            parameters[name] = {**state, "param_groups": groups}
        return parameters

    def _excluded_save_params(self) -> list[str]:
        networks = ["actor", "actor_target", "critic", "critic_target"]
        of_the_process = ["_qf_lr_schedule", "_metric_sums", "_warned_of_few_updates", "_captured_updates"]
        return [*super()._excluded_save_params(), *networks, *of_the_process]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []

    # Updates

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        """
        A mini-batch from the replay buffer.

        :param batch_size: B.
        :return: B transitions on the model's device.
        """
        return sample_batch(cast(ReplayBuffer, self.replay_buffer), batch_size, self._vec_normalize_env, self.device)

    def _draw_chain_noise(self, batch_size: int, n_candidates: int) -> th.Tensor | None:
        """
        Noise of reverse chains.

        :param batch_size: B.
        :param n_candidates: Candidates K of each state.
        :return: Standard normal noise of shape (N, B, K, A); N is T unless samples take fewer steps. None where it would take
            too much memory at once: it is drawn with the candidates then.
        """
        if batch_size > self.policy.states_at_once(n_candidates):
            return None
        return self.actor.draw_noise(batch_size, n_candidates)

    def _update_learning_rates(self) -> None:
        # Looked up here, because lr_schedule is a public attribute that scripts replace
        learning_rate = self.lr_schedule(self._current_progress_remaining)
        qf_learning_rate = (self._qf_lr_schedule or self.lr_schedule)(self._current_progress_remaining)
        captured.set_learning_rate(self.actor.optimizer, learning_rate)
        captured.set_learning_rate(self.critic.optimizer, qf_learning_rate)
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/learning_rate_qf", qf_learning_rate)

    def _make_captured_updates(self) -> captured.CapturedUpdates:
        def state() -> list[th.Tensor]:
            return [*self.policy.state_dict().values(), *self._finite_guard.tensors()]

        return captured.CapturedUpdates(self.policy, state, [self.actor.optimizer, self.critic.optimizer], self.device)

    def _run_update(self, update: Callable[..., Metrics], batch: ReplayBufferSamples, *numbers: float) -> None:
        """
        Run an update, on a GPU as a captured graph, see :mod:`sb3_qvpo.common.captured`.

        :param update: A method of the algorithm that takes a batch and numbers, and returns metrics.
        :param batch: Transitions.
        :param numbers: What changes from update to update.
        """
        if not (self._can_be_captured() and fast.settings.enabled):
            self._add_metrics(update(batch, *numbers))
            return
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self._captured_updates is None or self._captured_updates.optimizers != optimizers:
            self._captured_updates = self._make_captured_updates()
        tensors = [tensor for _, tensor in flat_items(batch._asdict())]

        def update_of_tensors(n_updates: th.Tensor, *inputs: th.Tensor) -> Metrics:
            values, rest = inputs[: len(numbers)], iter(inputs[len(numbers) :])
            self._update_on_device = n_updates
            try:
                metrics = update(ReplayBufferSamples(**rebuild(batch._asdict(), rest)), *values)
                # Graphs of gradients must not outlive the update
                return {name: value.detach() for name, value in metrics.items()}
            finally:
                self._update_on_device = None

        n_updates = th.full((), self._n_updates, device=self.device)
        inputs = [n_updates, *(th.full((), number, device=self.device) for number in numbers), *tensors]
        settings = [update.__name__, batch.discounts is None, fast.settings.candidate_dtype]
        settings += [getattr(self, name) for name in self._update_settings]
        self._add_metrics(self._captured_updates(update_of_tensors, inputs, tuple(settings)))

    def _can_be_captured(self) -> bool:
        """Whether updates are functions of tensors and settings alone, on a GPU."""
        return self.device.type == "cuda"

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        # By counts of steps, so that the same seed gives the same run, also broken off and resumed
        steps, total = self.num_timesteps - self._first_timestep, self._total_timesteps - self._first_timestep
        if n_envs == 1 and steps >= COMPILE_AFTER and total >= LONG_RUN and fast.settings.compile_actions:
            compiled.compile_ranking(self.policy, self.actor, self.critic, self.n_behavior_candidates, for_predictions=False)
        with compiled.collecting(self.policy):
            return super()._sample_action(learning_starts, action_noise, n_envs)

    def _process_state(self) -> dict[str, Any]:
        counts, for_predictions = compiled.tried_counts(self.policy)
        return {**super()._process_state(), "compiled": counts, "compiled_for_predictions": for_predictions}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        super()._restore_process_state(state)
        for count in state["compiled"]:
            for_predictions = count in state.get("compiled_for_predictions", ())
            compiled.compile_ranking(self.policy, self.actor, self.critic, count, for_predictions)

    # Metrics: summed on the device, read back when they are logged

    def _add_metrics(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            total, count = self._metric_sums.get(name, (th.zeros((), device=self.device), 0))
            self._metric_sums[name] = (total + value.detach(), count + 1)

    def _log_updates(self) -> None:
        """Log at the end of ``train()``. Reading numbers back would stall an accelerator: there it waits for the dump."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.device.type == "cpu":
            self._record_metrics()

    def _record_metrics(self) -> None:
        """Hand the means since the last dump of the log to the logger, reading all numbers back at once."""
        if self._metric_sums:
            means = th.stack([total / count for total, count in self._metric_sums.values()]).tolist()
            for name, mean in zip(self._metric_sums, means, strict=True):
                self.logger.record(f"train/{name}", mean)

    def dump_logs(self) -> None:
        """Write the log, with the means of the training metrics since it was last written."""
        self._record_metrics()
        super().dump_logs()
        self._metric_sums.clear()
        busy_cores.warn_of_busy_cores()

    # Starting

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # Checked here because every environment passes here, before SB3's own assertions
        if hasattr(env, "action_space"):
            arguments.check_action_space(env.action_space)
        return OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._resolve_arguments()  # attributes may have been changed since the last time
        self._warn_of_few_updates()
        self._metric_sums.clear()
        vec_normalize = self.get_vec_normalize_env()
        self.policy.normalized_observations.fill_(vec_normalize is not None and vec_normalize.norm_obs)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _warn_of_few_updates(self) -> None:
        if self.n_envs > 1 and self.gradient_steps == 1 and not self._warned_of_few_updates:
            self._warned_of_few_updates = True
            warnings.warn(
                f"gradient_steps=1 with {self.n_envs} environments: one update for {self.n_envs} or more environment steps. "
                "gradient_steps=-1 makes as many updates as steps.",
                stacklevel=6,
            )
