"""
QVPO as a Stable-Baselines3 algorithm. :meth:`QVPO.train` is Algorithm 1 of the paper.

Shapes: B batch, K candidates for each state, A action dimensions, T diffusion steps, C critics. Actions are in [-1, 1].

==========================  ==================  =====================================================
argument or variable        symbol              meaning
==========================  ==================  =====================================================
``n_behavior_candidates``   K_b                 best of this many while collecting
``n_target_candidates``     K_t                 best of this many in the TD target
``n_train_candidates``      N_d                 samples of which the best is trained on
``n_uniform_actions``       N_e                 uniform actions in the entropy term
``ent_coef``                omega_ent           weight of the entropy term
``n_improvement_steps``     m                   gradient steps on the best of them (not in the paper)
``improvement_step``        eta                 length of such a step, over sqrt(A) (not in the paper)
``training_action_noise``   sigma               deviation of noise on the action trained on (not in the paper)
``weights``                 omega_eq(s, a_i)    Q-weights of the candidates
``best_actions``            a_max               the candidate trained on
``denoising_losses``        norm in (6), (10)   ``mean over dimensions of (epsilon - epsilon_theta)^2``
==========================  ==================  =====================================================
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_qvpo.common.arguments import check_count, check_interval, parse_schedule
from sb3_qvpo.common.candidates import candidate_std, critic_contrast
from sb3_qvpo.common.off_policy_algorithm import Metrics
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.policy_aliases import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qvpo.common.td_algorithm import CandidateTDAlgorithm
from sb3_qvpo.qvpo.weights import QWeighting, add_uniform_actions, resolve_q_weighting, select_training_actions

SelfQVPO = TypeVar("SelfQVPO", bound="QVPO")


class ActorNoise(NamedTuple):
    """
    All random draws of one policy step.

    :param chain: Noise of the candidates' reverse chains, shape (N, B, N_d, A), or N_d if it is drawn with the candidates.
    :param uniform_actions: Uniform actions in [-1, 1], shape (B, N_e, A).
    :param timesteps: Diffusion steps of the loss, shape (B, 1 + N_e).
    :param denoising: Noise epsilon of the loss, shape (B, 1 + N_e, A).
    :param action: Noise for a_max, of deviation 1, shape (B, A). None if ``training_action_noise`` is the number 0.
    """

    chain: th.Tensor | int
    uniform_actions: th.Tensor
    timesteps: th.Tensor
    denoising: th.Tensor
    action: th.Tensor | None


class QVPO(CandidateTDAlgorithm):
    """
    Q-weighted Variational Policy Optimization: a diffusion policy trained online and off-policy.

    Paper: Ding et al. (2024), *Diffusion-based Reinforcement Learning via Q-weighted Variational Policy Optimization*,
    NeurIPS 2024, https://arxiv.org/abs/2405.16173. The defaults are its Tables 2 and 3.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of ``DiffusionPolicy``.
    :param env: The environment to learn from (if registered in Gymnasium, can be a string). Its action space must be a
        finite ``Box``.
    :param learning_rate: Learning rate of the actor, and of the critics unless ``qf_learning_rate`` is given. A number, a
        function of the remaining progress (from 1 to 0) or a string such as ``"lin_3e-4"``.
    :param buffer_size: Size of the replay buffer, in transitions.
    :param learning_starts: Environment steps with uniformly random actions before the first update.
    :param batch_size: B, transitions in each update.
    :param tau: Step size of the target networks, in [0, 1]. 0 freezes them.
    :param gamma: Discount factor, in [0, 1].
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: Updates after each rollout (see ``train_freq``); -1 for as many as environment steps were done.
    :param action_noise: Noise added to actions while collecting (none by default).
    :param replay_buffer_class: Replay buffer class (for instance ``HerReplayBuffer``); chosen automatically if None.
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer. ``dict(handle_timeout_termination=False)`` treats
        time limits as the end of the task, as the authors' code does.
    :param optimize_memory_usage: Use SB3's memory-saving variant of the replay buffer.
    :param n_steps: Length of n-step returns.
    :param ent_coef: omega_ent, weight of the entropy term (Eq. 10), at least 0. A number, a function of the remaining
        progress, or a string. ``"lin_0.02_0.002_0.9"`` falls linearly from 0.02 to 0.002 over 90 % of training.
        0 switches the term off.
    :param qf_learning_rate: Learning rate of the critics, in the same forms as ``learning_rate``, which it equals if None.
    :param n_behavior_candidates: K_b, best of this many candidates while collecting (Algorithm 1, line 2), at least 1.
        Several, such as ``(2, 8, 16)``, differ by episode. After an episode that reached its time limit, the next draws one.
        All others take the largest. So does ``predict(deterministic=False)``.
    :param n_target_candidates: K_t, best of this many candidates in the TD target (Algorithm 1, line 10), at least 1.
    :param n_eval_candidates: K, best of this many candidates in ``predict(deterministic=True)`` (Sec. 5.1), at least 1.
    :param n_train_candidates: N_d, candidates of each state of which the best is trained on (Algorithm 1, lines 5-7),
        at least 1, with ``"qadv"`` at least 2.
    :param n_uniform_actions: N_e, uniform actions of each state in the entropy term (Algorithm 1, line 8), at least 1.
    :param q_weighting: omega_eq: ``"qadv"`` (Eq. 9), ``"qadv_normalized"`` (Eq. 9 in units of the deviation of each state's
        values), ``"qcut"`` (Sec. 4.2) or a function from values (B, N_d + m) to weights of at least 0, of the same shape. A
        function is tried on construction and at the start of each ``learn()``.
    :param n_diffusion_steps: T, steps of the diffusion, at least 1.
    :param policy_delay: Update actor and targets every this many critic updates.
    :param max_grad_norm: Largest Euclidean norm of the gradients of actor and of critics; None for no clipping.
    :param critic_type: ``"twin"`` for clipped double Q-learning with target networks (Sec. 5.1); ``"crossq"`` for critics with
        batch normalisation and without targets; ``"quantile"`` for truncated quantiles. See
        :mod:`sb3_qvpo.common.critics`.
    :param n_improvement_steps: m, gradient steps on the best of the N_d candidates. Each of its m results is a candidate too.
        0, the paper's choice, for none.
    :param improvement_step: eta, length of such a step in units of sqrt(A), above 0. Each dimension moves by about eta.
    :param training_action_noise: sigma, deviation of normal noise added to a_max before the policy is trained on it, at least
        0. The sum is clipped to the box. Above 0 the policy stays about that wide; the box and chains of few steps narrow it.
        A number, a schedule, or a string as for ``ent_coef``. 0 is the paper's choice.
    :param eval_noise_scale: Deviation of the noise that candidates of ``predict(deterministic=True)`` start from, at least 0.
        Below 1 they are closer to the middle of the policy; at 0 they are all alike.
    :param use_sde: Must be False: gSDE belongs to Gaussian policies. Accepted, like the next two, only so that scripts written
        for SAC run unchanged.
    :param sde_sample_freq: Has no effect without gSDE.
    :param use_sde_at_warmup: Has no effect without gSDE.
    :param stats_window_size: Episodes over which rollout statistics are averaged in the log.
    :param tensorboard_log: Folder for TensorBoard logs (None for none).
    :param policy_kwargs: Further arguments of the policy, see :class:`~sb3_qvpo.common.policies.DiffusionPolicy`.
    :param verbose: 0 for no output, 1 for information messages, 2 for debug messages.
    :param seed: Seed of all random generators.
    :param device: Device to run on (cpu, cuda, ...); ``"auto"`` uses a GPU if there is one.
    :param _init_setup_model: Whether to build the networks on creation.
    :raises ValueError: If an argument is out of its range, the action space is not a finite ``Box``, or gSDE is asked for.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    _count_arguments: ClassVar[tuple[str, ...]] = (
        *CandidateTDAlgorithm._count_arguments,
        "n_train_candidates",
        "n_uniform_actions",
    )
    _preset: ClassVar[tuple[str, int, int]] = ("fast", 1_493, 256)
    _not_read_by_updates: ClassVar[frozenset[str]] = CandidateTDAlgorithm._not_read_by_updates | {
        "_ent_coef_schedule",
        "_action_noise_schedule",
    }

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: float | str | Schedule = 0.01,
        qf_learning_rate: float | str | Schedule | None = None,
        n_behavior_candidates: int | Sequence[int] = 4,
        n_target_candidates: int = 2,
        n_eval_candidates: int = 32,
        n_train_candidates: int = 64,
        n_uniform_actions: int = 10,
        q_weighting: str | Callable[[th.Tensor], th.Tensor] = "qadv",
        n_diffusion_steps: int = 20,
        policy_delay: int = 1,
        max_grad_norm: float | None = None,
        critic_type: str = "twin",
        n_improvement_steps: int = 0,
        improvement_step: float = 0.1,
        training_action_noise: float | str | Schedule = 0.0,
        eval_noise_scale: float = 1.0,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            qf_learning_rate=qf_learning_rate,
            n_diffusion_steps=n_diffusion_steps,
            n_behavior_candidates=n_behavior_candidates,
            n_target_candidates=n_target_candidates,
            n_eval_candidates=n_eval_candidates,
            policy_delay=policy_delay,
            max_grad_norm=max_grad_norm,
            critic_type=critic_type,
            eval_noise_scale=eval_noise_scale,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
        )
        self.ent_coef = ent_coef
        self.n_train_candidates = n_train_candidates
        self.n_uniform_actions = n_uniform_actions
        self.q_weighting = q_weighting
        self.n_improvement_steps = n_improvement_steps
        self.improvement_step = improvement_step
        self.training_action_noise = training_action_noise

        if _init_setup_model:
            self._setup_model()

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Algorithm 1, lines 4-11. The critic comes first, as in the authors' code, then the actor and the targets.

        :param gradient_steps: Number of updates.
        :param batch_size: B, transitions in each update.
        :raises ValueError: At the first loss or gradient that is not finite; the weights stay as they were before it.
        """
        self._begin_updates()
        coefficients = self._policy_coefficients()
        for _ in range(gradient_steps):
            self._n_updates += 1
            # Line 4: sample a mini-batch
            batch = self._sample_batch(batch_size)

            # Lines 10-11: TD target and critics
            self._run_update(self._update_critics, batch)

            if self._n_updates % self.policy_delay == 0:
                # Lines 5-9: weighted candidates, uniform actions, policy; then the targets
                self._run_update(self._update_policy, batch, *coefficients)

        self._log_updates()

    def _update_policy(
        self, batch: ReplayBufferSamples, ent_coef: float | th.Tensor, action_noise_std: float | th.Tensor
    ) -> Metrics:
        noise = self._draw_actor_noise(len(batch.rewards))
        loss, metrics = self._actor_loss(batch.observations, ent_coef, action_noise_std, noise)
        self._optimize(self.actor.optimizer, "actor_loss", loss)
        self.policy.update_targets(self.tau)
        return metrics

    def _actor_loss(
        self,
        observations: PyTorchObs,
        ent_coef: float | th.Tensor,
        action_noise_std: float | th.Tensor,
        noise: ActorNoise,
    ) -> tuple[th.Tensor, Metrics]:
        """
        Algorithm 1, lines 5-9: ``(1/B) sum_b [omega_b l_b + sum_e ent_coef omega_b l_be]``, Eq. 6 plus Eq. 10.

        :param observations: B observations.
        :param ent_coef: omega_ent.
        :param action_noise_std: sigma.
        :param noise: All random draws.
        :return: The loss and its metrics.
        """
        with th.no_grad():
            # Line 5: N_d samples of the policy for each state, valued by the critics: their minimum by default
            scored = self.policy.score_candidates(observations, noise.chain, for_training=True)
            spread = candidate_std(scored.candidates)
            if self.n_improvement_steps:
                step_length = self.improvement_step * math.sqrt(self.actor.action_dim)
                scored = self.policy.improve_best(scored, self.n_improvement_steps, step_length)
            _, candidates, q_values = scored
            # Line 6: weights, Eq. 9 (or Sec. 4.2)
            weights = self._q_weighting(q_values)
            # Line 7: only the sample with the largest weight is trained on
            best_actions, best_weights = select_training_actions(candidates, q_values, weights)
            if noise.action is not None:
                best_actions = (best_actions + action_noise_std * noise.action).clamp(-1, 1)
            # Line 8: N_e uniform samples, each with weight omega_ent * omega_eq(s, a_max)
            actions, action_weights = add_uniform_actions(best_actions, best_weights, noise.uniform_actions, ent_coef)

        # Line 9: the sum of Eqs. 6 and 10
        denoising_losses = self.actor.denoising_loss(observations, actions, noise.timesteps, noise.denoising)
        weighted_losses = action_weights * denoising_losses
        entropy_loss = weighted_losses[:, 1:].sum(dim=1).mean()
        loss = weighted_losses[:, 0].mean() + entropy_loss
        metrics = {
            "actor_loss": loss,
            "entropy_loss": entropy_loss,
            "weight": best_weights.mean(),
            "critic_contrast": critic_contrast(q_values),
            "candidate_std": spread,
        }
        return loss, metrics

    def _n_policy_candidates(self) -> int:
        return self.n_train_candidates

    def _updates_are_pure(self) -> bool:
        # A user's function may have state of its own
        return isinstance(self.q_weighting, str)

    def _draw_actor_noise(self, batch_size: int) -> ActorNoise:
        """
        All random draws of a policy step.

        :param batch_size: B.
        :return: The draws.
        """
        uniform_shape = (batch_size, self.n_uniform_actions, self.actor.action_dim)
        loss_shape = (batch_size, 1 + self.n_uniform_actions)
        return ActorNoise(
            chain=self.policy.draw_noise(batch_size, self.n_train_candidates),
            uniform_actions=2 * th.rand(uniform_shape, device=self.device) - 1,
            timesteps=self.actor.diffusion.draw_timesteps(loss_shape, self.device),
            denoising=th.randn((*loss_shape, self.actor.action_dim), device=self.device),
            action=th.randn((batch_size, self.actor.action_dim), device=self.device) if self._trains_on_noise else None,
        )

    def _policy_coefficients(self) -> tuple[float, float]:
        """
        What schedules say now.

        :return: omega_ent and sigma.
        """
        ent_coef = self._value_now("ent_coef", self._ent_coef_schedule)
        action_noise_std = self._value_now("training_action_noise", self._action_noise_schedule)
        self.logger.record("train/ent_coef", ent_coef)
        self.logger.record("train/training_action_noise", action_noise_std)
        return ent_coef, action_noise_std

    def _resolve_arguments(self) -> None:
        super()._resolve_arguments()
        self.n_improvement_steps = check_count("n_improvement_steps", self.n_improvement_steps, 0)
        check_interval("improvement_step", self.improvement_step, 0, math.inf, low_allowed=False)
        self._action_noise_schedule = parse_schedule("training_action_noise", self.training_action_noise)
        # Decided together with the schedule, so that a change counts as a whole from the next learn() on
        self._trains_on_noise = self.training_action_noise != 0
        self._q_weighting: QWeighting = resolve_q_weighting(
            self.q_weighting, self.n_train_candidates, self.device, self.n_improvement_steps
        )
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            raise ValueError(
                f"ent_coef must be a number, a schedule or a string such as 'lin_0.02_0.002_0.9', got {self.ent_coef!r}: it "
                "is the weight of uniform actions here (Eq. 10), not a temperature that could be learnt as in SAC"
            )
        self._ent_coef_schedule = parse_schedule("ent_coef", self.ent_coef)

    def _setup_model(self) -> None:
        # Files of version 0.1 have it
        n_shared_steps = self.__dict__.pop("n_shared_steps", 0)
        if n_shared_steps:
            warnings.warn(
                f"n_shared_steps is {n_shared_steps} in the saved model; the option is gone, and candidates share no steps",
                stacklevel=4,
            )
        super()._setup_model()

    def _excluded_save_params(self) -> list[str]:
        resolved = ["_q_weighting", "_ent_coef_schedule", "_action_noise_schedule", "_trains_on_noise"]
        return [*super()._excluded_save_params(), *resolved]

    def learn(
        self: SelfQVPO,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "QVPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfQVPO:
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
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
