"""
The base of every algorithm that trains a :class:`DiffusionPolicy` off-policy.

It checks arguments, lets candidate counts change, sets learning rates, and runs updates as graphs on a GPU.

A subclass sets its own arguments, calls ``_setup_model()``, and writes ``train()``: losses, steps through ``_optimize()``, and
metrics. ``docs/development.md`` has an example.
"""

import copy
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_qvpo.common import arguments
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.arguments import PolicyCount, PolicyScale
from sb3_qvpo.common.episode_counts import EpisodeCounts, EpisodeCountsLearner, largest
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.runs.pace import Pace, step_cost, told
from sb3_qvpo.common.speed.cpu import warn_of_busy_cores
from sb3_qvpo.common.speed.keys import RUN_STATE
from sb3_qvpo.common.speed.optimizers import forget_graphs, plain_state, set_learning_rate, use_fused
from sb3_qvpo.common.speed.updates import UpdateRunner, sample_batch

Metrics = dict[str, th.Tensor]
"""Named scalars of a loss, still on the device."""

FIXED = "policy.fixed"
"""Where a file keeps what the constructor fixes and weights depend on."""

NORMALIZED = "normalized_observations"
"""Its entry that says whether a ``VecNormalize`` normalised the observations."""


class DiffusionOffPolicyAlgorithm(EpisodeCountsLearner):
    """
    Base of off-policy algorithms with a diffusion policy. All arguments are keywords here; see the subclasses.

    :param policy: Name of a policy or a subclass of :class:`DiffusionPolicy`.
    :param env: The environment to learn from.
    :param learning_rate: Learning rate of the actor: a number, a schedule or a string such as ``"lin_3e-4"``.
    :param qf_learning_rate: Learning rate of the critics, ``learning_rate`` if None.
    :param n_diffusion_steps: T, steps of the diffusion.
    :param n_behavior_candidates: K_b, best of this many candidates while collecting; several differ by episode.
    :param n_eval_candidates: K, best of this many candidates in ``predict(deterministic=True)``.
    :param policy_delay: Update actor and targets every this many critic updates.
    :param max_grad_norm: Largest Euclidean norm of the gradients of actor and of critics; None for no clipping.
    :param critic_type: ``"twin"``, ``"crossq"`` or ``"quantile"``, see :class:`DiffusionPolicy`.
    :param eval_noise_scale: Deviation of the noise that the candidates of deterministic predictions start from, at least 0.
    :param kwargs: Further arguments of SB3's ``OffPolicyAlgorithm``.
    :raises ValueError: If the action space is not a finite ``Box``, a candidate count is below 1, or gSDE is asked for.
    """

    policy: DiffusionPolicy
    actor: DiffusionActor
    actor_target: DiffusionActor
    critic: CandidateCritic
    critic_target: CandidateCritic

    n_behavior_candidates = EpisodeCounts()
    """K_b, best of this many candidates while collecting, or several; can be changed at any time."""
    n_eval_candidates = PolicyCount()
    """K, best of this many candidates in ``predict(deterministic=True)``; can be changed at any time."""
    eval_noise_scale = PolicyScale()
    """Deviation of the noise that these candidates start from; can be changed at any time."""

    _policy_arguments: ClassVar[tuple[str, ...]] = (
        *("n_diffusion_steps", "n_behavior_candidates", "n_eval_candidates", "critic_type", "eval_noise_scale"),
    )
    """Arguments that are handed on to the policy."""
    _count_arguments: ClassVar[tuple[str, ...]] = ("batch_size", "buffer_size", "n_steps", "policy_delay", "n_diffusion_steps")
    """Arguments that are whole numbers of at least 1."""
    _preset: ClassVar[tuple[str, int, int]] = ("", 0, 0)
    """The preset to name where a run takes long; its :meth:`_chain_rows`, in rows of networks of 256 units; its batch size."""
    _not_read_by_updates: ClassVar[frozenset[str]] = RUN_STATE
    """Attributes that change while graphs of updates stay valid. A name that is missing here only costs a new capture."""

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | str | Schedule,
        qf_learning_rate: float | str | Schedule | None,
        n_diffusion_steps: int,
        n_behavior_candidates: int | Sequence[int],
        n_eval_candidates: int,
        policy_delay: int,
        max_grad_norm: float | None,
        critic_type: str = "twin",
        eval_noise_scale: float = 1.0,
        **kwargs: Any,
    ):
        # Strings are parsed in _setup_lr_schedule()
        super().__init__(policy, env, cast(Any, learning_rate), sde_support=False, support_multi_env=True, **kwargs)
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)  # a copy, because SB3 adds to it
        self.qf_learning_rate = qf_learning_rate
        self.n_diffusion_steps = n_diffusion_steps
        self.n_behavior_candidates = n_behavior_candidates
        self.n_eval_candidates = n_eval_candidates
        self.policy_delay = policy_delay
        self.max_grad_norm = max_grad_norm
        self.critic_type = critic_type
        self.eval_noise_scale = eval_noise_scale

    @property
    def n_diffusion_steps(self) -> int:
        """T, steps of the diffusion; fixed once there is a policy."""
        return cast(int, self.__dict__["n_diffusion_steps"])

    @n_diffusion_steps.setter
    def n_diffusion_steps(self, value: int) -> None:
        if "policy" in self.__dict__ and value != self.policy.n_diffusion_steps:
            raise ValueError(f"n_diffusion_steps is fixed by the policy, {self.policy.n_diffusion_steps}, got {value!r}")
        self.__dict__["n_diffusion_steps"] = value

    # Building and saving

    def _setup_model(self) -> None:
        self._resolve_arguments()
        self._warned_of_few_updates = False
        self._metric_sums: dict[str, tuple[th.Tensor, int]] = {}
        self._update_runner = UpdateRunner()
        self._pace, self._shows_progress = Pace(), False
        own_kwargs = {name: getattr(self, name) for name in self._policy_arguments}
        own_kwargs["n_behavior_candidates"] = largest(self.n_behavior_candidates)
        policy_kwargs = self.policy_kwargs
        for name in own_kwargs.keys() & policy_kwargs.keys():
            raise ValueError(
                f"{name} must be an argument of {type(self).__name__}, not of policy_kwargs, got {policy_kwargs[name]!r} there"
            )
        # Add the counts only while the policy is built, so that the user's own policy_kwargs are what is saved
        self.policy_kwargs = {**policy_kwargs, **own_kwargs}
        n_step_kwargs = dict(self.replay_buffer_kwargs) if self.replay_buffer_class is None and self.n_steps > 1 else None
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = policy_kwargs
        if n_step_kwargs is not None:
            # SB3 has put its n-step buffer here. If that were saved, a loaded model would ignore its own n_steps and gamma
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
        if "policy" in vars(self) and self.critic_type != self.policy.critic_type:
            raise ValueError(f"critic_type is fixed by the policy, {self.policy.critic_type!r}, got {self.critic_type!r}")
        arguments.check_no_sde(self.use_sde, self.policy_kwargs)
        for name in self._count_arguments:
            setattr(self, name, arguments.check_count(name, getattr(self, name)))
        for name in arguments.policy_values(type(self)):
            setattr(self, name, getattr(self, name))  # loading writes past their checks
        arguments.check_interval("gamma", self.gamma, 0, 1)
        arguments.check_interval("tau", self.tau, 0, 1)  # 0 freezes the targets
        if self.max_grad_norm is not None:
            arguments.check_interval("max_grad_norm", self.max_grad_norm, 0, math.inf, low_allowed=False)
        arguments.check_action_noise(self.action_noise)
        arguments.check_replay_buffer(self.replay_buffer_class, self.n_steps, self.observation_space)
        # SB3 takes these as they are, and would fail on them in learn()
        arguments.check_interval("learning_starts", self.learning_starts, 0, math.inf)
        self.train_freq = arguments.check_train_freq(self.train_freq)
        self.gradient_steps = arguments.check_count("gradient_steps", self.gradient_steps, -1)
        self._stats_window_size = arguments.check_count("stats_window_size", self._stats_window_size)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule: FloatSchedule = arguments.parse_schedule("learning_rate", self.learning_rate)
        self._qf_lr_schedule: FloatSchedule | None = None
        if self.qf_learning_rate is not None:
            self._qf_lr_schedule = arguments.parse_schedule("qf_learning_rate", self.qf_learning_rate)
        self._rates_of_schedules = (self.learning_rate, self.qf_learning_rate)

    def _prepare_saving(self) -> None:
        # SB3 saves the instance's dictionary. Copy back what may have been changed on the policy
        for name in arguments.policy_values(type(self)):
            self.__dict__[name] = getattr(self, name)

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
        :raises ValueError: If ``format`` is unknown, or ``vec_normalize`` is missing or belongs to other observations.
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
        if isinstance(load_path_or_dict, dict):
            parameters: dict[str, Any] = dict(load_path_or_dict)
        else:
            _, parameters, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
        fixed = parameters.pop(FIXED, {})
        before, normalized_before = copy.deepcopy(self.get_parameters()), self.policy.normalized_observations
        for optimizer in self._optimizers().values():
            forget_graphs(optimizer)
        self._update_runner.forget()  # its graphs write to the optimisers' old state
        try:
            self.policy.trained_process.check_fixed_state(fixed)
            super().set_parameters(parameters, exact_match, device)
        except Exception as error:  # whatever is wrong, the model must be as it was
            try:
                del before[FIXED]
                self.policy.normalized_observations = normalized_before
                super().set_parameters(cast(Any, before), exact_match=True, device=self.device)
            except Exception as failure:  # nor may this take the place of the error
                warnings.warn(f"the parameters before {error!r} could not be put back: {failure!r}", stacklevel=2)
            raise
        else:
            if NORMALIZED in fixed:
                self.policy.normalized_observations = bool(fixed[NORMALIZED])
        finally:
            for optimizer in self._optimizers().values():
                use_fused(optimizer)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """
        Weights and optimiser states, as they are saved. Beside them stands what is fixed, ``"policy.fixed"``: weights that
        were trained on another noise schedule are refused by it.

        :return: State dictionaries by name.
        """
        parameters = cast(dict[str, dict[str, Any]], super().get_parameters())
        for name, optimizer in self._optimizers().items():
            parameters[name] = plain_state(optimizer, parameters[name])
        normalized = th.tensor(float(self.policy.normalized_observations), device="cpu")
        parameters[FIXED] = {NORMALIZED: normalized, **self.policy.trained_process.fixed_state()}
        return parameters

    def _excluded_save_params(self) -> list[str]:
        networks = ["actor", "actor_target", "critic", "critic_target"]
        not_saved = ["_qf_lr_schedule", "_rates_of_schedules", "_metric_sums", "_warned_of_few_updates", "_update_runner"]
        not_saved += ["_pace", "_shows_progress"]
        return [*super()._excluded_save_params(), *networks, *not_saved]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self._optimizers()], []

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        """All optimisers, by the names under which their states are saved."""
        return {"actor.optimizer": self.actor.optimizer, "critic.optimizer": self.critic.optimizer}

    # Updates

    def _begin_updates(self) -> None:
        """What comes before the first update of ``train()``: the mode of the networks, the learning rates."""
        self._pace.begin(time.monotonic())
        self.policy.set_training_mode(True)
        self._drop_logged_metrics()
        # Looked up here, because lr_schedule is a public attribute that scripts replace
        learning_rate = self._value_now("learning_rate", self.lr_schedule)
        qf_learning_rate = self._value_now("qf_learning_rate", self._qf_lr_schedule or self.lr_schedule)
        for name, optimizer in self._optimizers().items():
            set_learning_rate(optimizer, qf_learning_rate if name == "critic.optimizer" else learning_rate)
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/learning_rate_qf", qf_learning_rate)

    def _value_now(self, name: str, schedule: Schedule) -> float:
        """
        The value of a schedule.

        :raises ValueError: If it is negative or not finite.
        """
        # Where the last rollout goes beyond the total, SB3 lets the remaining progress fall below 0
        return arguments.check_interval(name, schedule(max(0.0, self._current_progress_remaining)), 0, math.inf)

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        """
        A mini-batch from the replay buffer, for the update of number ``_n_updates``.

        :param batch_size: B.
        :return: B transitions on the model's device.
        :raises ValueError: If a number in it is not finite.
        """
        buffer = cast(ReplayBuffer, self.replay_buffer)
        batch = sample_batch(buffer, batch_size, self._vec_normalize_env, self.device)
        self._finite_guard.start_update(self._n_updates, batch._asdict())
        return batch

    def _run_update(self, update: Callable[..., Metrics], batch: ReplayBufferSamples, *numbers: float) -> None:
        """
        Run an update, on a GPU as a graph.

        :param update: A method of the algorithm that takes a batch and numbers, and returns metrics.
        :param batch: Transitions.
        :param numbers: What changes from update to update.
        """
        self._add_metrics(self._update_runner.run(self, update, batch, numbers))

    def _update_state(self) -> list[th.Tensor]:
        """The tensors that updates change, besides those of the optimisers."""
        return [*self.policy.state_dict().values(), *self._finite_guard.tensors()]

    def _updates_are_pure(self) -> bool:
        """Whether updates depend on tensors and settings only. Only then can they be graphs."""
        return True

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        n_steps, total = self.num_timesteps - self._first_timestep, self._total_timesteps - self._first_timestep
        with self.policy.counts_in_use.collecting(self._episode_draws.counts(self.n_behavior_candidates, n_envs)):
            n_candidates = self.policy.counts_in_use.to_draw(self.policy.n_behavior_candidates)
            with self.policy.programs.collecting(self.policy, n_candidates, n_steps, total, n_envs):
                return super()._sample_action(learning_starts, action_noise, n_envs)

    def _process_state(self) -> dict[str, Any]:
        counts, for_predictions = self.policy.programs.tried_counts()
        return {**super()._process_state(), "compiled": counts, "compiled_for_predictions": for_predictions}

    def _restore_process_state(self, state: dict[str, Any]) -> None:
        super()._restore_process_state(state)
        for count in state["compiled"]:
            self.policy.programs.compile(self.policy, count, count in state.get("compiled_for_predictions", ()))

    # Metrics: summed on the device, read back once for each call of train()

    def _add_metrics(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            total, count = self._metric_sums.get(name, (th.zeros((), device=self.device), 0))
            self._metric_sums[name] = (total + value.detach(), count + 1)

    def _log_updates(self) -> None:
        """Record the means of all metrics since the log was last written, reading their numbers back at once."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self._metric_sums:
            means = th.stack([total / count for total, count in self._metric_sums.values()]).tolist()
            for name, mean in zip(self._metric_sums, means, strict=True):
                self.logger.record(f"train/{name}", mean)
        self._say_how_long_it_takes()

    def _say_how_long_it_takes(self) -> None:
        """One line for whoever watches a run on a CPU that takes hours."""
        n_left = self._total_timesteps - self.num_timesteps
        seconds = self._pace.seconds_left(self._n_updates, self.num_timesteps, n_left, time.monotonic())
        if seconds is None or self.device.type != "cpu" or not (self.verbose or self._shows_progress):
            return
        # What a preset would cost is known for usual networks only
        preset, *work = self._preset if self._has_usual_networks() else ("", 0, 0)
        share = step_cost(*work) / step_cost(self._chain_rows(), self.batch_size)
        print(told(seconds, n_left, preset, share, self._pace.share_of_updates))

    def _has_usual_networks(self) -> bool:
        return self.policy.actor_kwargs["net_arch"] == [256, 256] and self.policy.features_extractor_class is FlattenExtractor

    def _chain_rows(self) -> float:
        """Rows that pass through the noise predictor to draw actions, in an update of the critics."""
        return 0.0

    def _drop_logged_metrics(self) -> None:
        """Start new means if the log has been written. Callbacks may do that, in the middle of an episode."""
        recorded = getattr(self.logger, "name_to_value", None)
        if recorded is not None and "train/n_updates" not in recorded:
            self._metric_sums.clear()

    def dump_logs(self) -> None:
        """Write the log."""
        super().dump_logs()
        self._metric_sums.clear()
        warn_of_busy_cores()

    # Starting

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # Every environment passes here first, so the user sees our message instead of SB3's assertion
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
        if (self.learning_rate, self.qf_learning_rate) != self._rates_of_schedules:
            self._setup_lr_schedule()
        self._warn_of_few_updates()
        self._metric_sums.clear()
        self._pace, self._shows_progress = Pace(self._pace.is_told), progress_bar
        vec_normalize = self.get_vec_normalize_env()
        self.policy.normalized_observations = vec_normalize is not None and vec_normalize.norm_obs
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _warn_of_few_updates(self) -> None:
        if self.n_envs > 1 and self.gradient_steps == 1 and not self._warned_of_few_updates:
            self._warned_of_few_updates = True
            warnings.warn(
                f"gradient_steps=1 with {self.n_envs} environments: one update for {self.n_envs} or more environment steps. "
                "gradient_steps=-1 makes as many updates as steps.",
                stacklevel=6,
            )
