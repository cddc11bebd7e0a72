"""
SDAC as a Stable-Baselines3 algorithm: a diffusion policy that is regressed onto ``exp(Q / temperature) / Z`` itself.

Shapes: B batch, K candidates and M clean actions for each state, A action dimensions, T diffusion steps.

==========================  ======================  ====================================================
argument or variable        symbol                  meaning
==========================  ======================  ====================================================
``n_reverse_samples``       M                       clean actions around a noisy one
``temperature``             lambda                  temperature of the policy
``actions``                 a                       where noisy actions come from
``noisy``                   x = a_t                 ``sqrt(bar alpha_t) a + sqrt(1 - bar alpha_t) eps'``
``clean``                   a_0                     draws of the reverse-sampling distribution at x
``n_improvement_steps``     m                       gradient steps that half of the draws start with (not in the paper)
``improvement_step``        eta                     length of such a step, over sqrt(A) (not in the paper)
``weights``                 w                       softmax over M of ``Q(s, a_0) / lambda``
``mean_action``             E[a_0 | x]              ``sum of w a_0``, what the regression aims at
``training_action_noise``   sigma                   deviation of noise on the actions learnt (not in the paper)
==========================  ======================  ====================================================
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule

from sb3_qvpo.common.arguments import check_choice, check_count, check_interval, parse_schedule
from sb3_qvpo.common.candidates import ScoredCandidates, best_candidate
from sb3_qvpo.common.networks import evaluation_mode
from sb3_qvpo.common.off_policy_algorithm import Metrics
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.policy_aliases import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qvpo.common.td_algorithm import CandidateTDAlgorithm
from sb3_qvpo.sdac.targets import (
    BOXES,
    boltzmann_weights,
    divergence,
    mixed_actions,
    posterior_mean,
    total_noise_level,
    truncated_actions,
    unbounded_actions,
    with_its_noise,
)
from sb3_qvpo.sdac.temperature import official_temperature, parse_temperature

LARGEST_DRIFT = 20.0
"""Bound of the logarithm of a learnt temperature, for targets that no temperature reaches."""

SelfSDAC = TypeVar("SelfSDAC", bound="SDAC")


class ActorNoise(NamedTuple):
    """
    All random draws of a policy step.

    :param chain: Noise of the reverse chains that noisy actions start from, shape (N, B, K_t, A), or K_t if it is drawn with
        the candidates. None if they start from the replay buffer's.
    :param timesteps: Diffusion steps t, shape (B, 1).
    :param forward: Noise eps' of the forward process, shape (B, 1, A).
    :param reverse: Draws of the reverse-sampling distribution, shape (B, M, A): uniform in [0, 1) for the truncated one,
        standard normal for the other. The first M // 2 are around improved actions if there are such.
    """

    chain: th.Tensor | int | None
    timesteps: th.Tensor
    forward: th.Tensor
    reverse: th.Tensor


class SDAC(CandidateTDAlgorithm):
    """
    Soft Diffusion Actor-Critic: a diffusion policy proportional to ``exp(Q / temperature)``, trained online and off-policy.

    Where QVPO multiplies its policy by a weight at each update, SDAC learns the policy ``exp(Q / temperature) / Z`` itself, by
    the values of clean actions around noisy ones. So actions of equal value have equal shares of it.

    Paper: Ma et al. (2025), *Efficient Online Reinforcement Learning for Diffusion Policy*, ICML 2025,
    https://arxiv.org/abs/2502.00361. The defaults are those of its authors' code, but for what ``docs/sdac.md`` lists.

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
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer.
    :param optimize_memory_usage: Use SB3's memory-saving variant of the replay buffer.
    :param n_steps: Length of n-step returns.
    :param temperature: lambda, above 0, in units of ``q_scaling``. A number, a function of the remaining progress, or a string
        such as ``"lin_1_0.2"``. ``"official"`` is the schedule of the authors' code, from 5 to 0.984. ``"auto"`` holds
        ``target_divergence``; ``"auto_0.5"`` starts at 0.5 instead of 1.
    :param target_divergence: What ``temperature="auto"`` holds: by how much the weights prefer some of the M actions, in nats,
        see :func:`~sb3_qvpo.sdac.targets.divergence`. Between 0, a uniform policy, and log M; ``box="clip"`` reaches less.
        Draws around improved actions are left out, so M is then the number of the others.
    :param temperature_learning_rate: Step size of the logarithm of the temperature with ``"auto"``, above 0.
    :param q_scaling: Units of the temperature: ``"none"``, those of the reward, or ``"spread"``, the deviation of a state's M
        values, a running mean over states. With it one temperature serves tasks with rewards of any size. Draws around
        improved actions are left out here too.
    :param n_reverse_samples: M, clean actions around a noisy one, at least 2, with ``n_improvement_steps`` at least 4.
    :param proposal_actions: Where noisy actions start from: ``"policy"``, the best of K_t candidates, or ``"replay"``, the
        actions of the replay buffer, which need no chain.
    :param n_improvement_steps: m, gradient steps of fixed length from the action that a noisy one starts from. With m above 0,
        M // 2 of the M clean actions are drawn around the best action on this way. Their weights take into account that
        they are drawn elsewhere: the policy learns the same, up to the error of M draws.
    :param improvement_step: eta, length of such a step in units of sqrt(A), above 0. Each dimension moves by about eta.
    :param improved_std: Deviation of the draws around the improved action, in [0.001, 10]; the box has a width of 2.
    :param training_action_noise: sigma, deviation of normal noise on the actions that the policy learns, at least 0. It learns
        ``exp(Q / temperature) / Z`` blurred by this noise, so it does not become narrower. Actions beyond the box end on its
        edge. A number, a schedule, or a string as for ``temperature``. 0 is the paper's choice.
    :param box: ``"truncated"`` draws clean actions inside [-1, 1], ``"clip"`` values them clipped, as the authors' code does.
    :param qf_learning_rate: Learning rate of the critics, in the same forms as ``learning_rate``, which it equals if None.
    :param n_behavior_candidates: K_b, best of this many candidates while collecting, at least 1. Several differ by
        episode. After an episode that reached its time limit, the next draws one. All others take the largest. So does
        ``predict(deterministic=False)``.
    :param n_target_candidates: K_t, best of this many candidates in the TD target, at least 1.
    :param n_eval_candidates: K, best of this many candidates in ``predict(deterministic=True)``, at least 1.
    :param n_diffusion_steps: T, steps of the diffusion, at least 1.
    :param policy_delay: Update actor and targets every this many critic updates.
    :param max_grad_norm: Largest Euclidean norm of the gradients of actor and of critics; None for no clipping.
    :param critic_type: ``"twin"`` for clipped double Q-learning with target networks; ``"crossq"`` for critics with batch
        normalisation and without targets; ``"quantile"`` for truncated quantiles. See :mod:`sb3_qvpo.common.critics`.
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
    _preset: ClassVar[tuple[str, int, int]] = ("sdac", 640, 256)
    _not_read_by_updates: ClassVar[frozenset[str]] = CandidateTDAlgorithm._not_read_by_updates | {
        "_temperature_schedule",
        "_action_noise_schedule",
    }

    log_temperature: th.Tensor
    """Logarithm of what ``temperature="auto"`` has learnt; 0 otherwise."""
    value_spread: th.Tensor
    """Running mean of the variance of the values of a state's draws, and the sum of that mean's weights: shape (2,)."""

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
        temperature: float | str | Schedule = "official",
        target_divergence: float = 1.0,
        temperature_learning_rate: float = 3e-3,
        q_scaling: str = "none",
        n_reverse_samples: int = 64,
        proposal_actions: str = "policy",
        n_improvement_steps: int = 0,
        improvement_step: float = 0.1,
        improved_std: float = 0.3,
        training_action_noise: float | str | Schedule = 0.0,
        box: str = "truncated",
        qf_learning_rate: float | str | Schedule | None = None,
        n_behavior_candidates: int | Sequence[int] = 32,
        n_target_candidates: int = 32,
        n_eval_candidates: int = 32,
        n_diffusion_steps: int = 20,
        policy_delay: int = 2,
        max_grad_norm: float | None = None,
        critic_type: str = "twin",
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
        self.temperature = temperature
        self.target_divergence = target_divergence
        self.temperature_learning_rate = temperature_learning_rate
        self.q_scaling = q_scaling
        self.n_reverse_samples = n_reverse_samples
        self.proposal_actions = proposal_actions
        self.n_improvement_steps = n_improvement_steps
        self.improvement_step = improvement_step
        self.improved_std = improved_std
        self.training_action_noise = training_action_noise
        self.box = box

        if _init_setup_model:
            self._setup_model()

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Critics first, then actor and targets every ``policy_delay`` updates, as in the authors' code.

        :param gradient_steps: Number of updates.
        :param batch_size: B, transitions in each update.
        :raises ValueError: At the first loss or gradient that is not finite; the weights stay as they were before it.
        """
        self._begin_updates()
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self._sample_batch(batch_size)
            self._run_update(self._update_critics, batch)
            if self._n_updates % self.policy_delay == 0:
                self._run_update(self._update_policy, batch, *self._policy_coefficients())
        self._log_updates()

    def _update_policy(
        self, batch: ReplayBufferSamples, temperature: float | th.Tensor, action_noise_std: float | th.Tensor
    ) -> Metrics:
        noise = self._draw_actor_noise(len(batch.rewards))
        loss, metrics = self._actor_loss(batch, temperature, action_noise_std, noise)
        self._optimize(self.actor.optimizer, "actor_loss", loss)
        self.policy.update_targets(self.tau)
        return metrics

    def _actor_loss(
        self,
        batch: ReplayBufferSamples,
        temperature: float | th.Tensor,
        action_noise_std: float | th.Tensor,
        noise: ActorNoise,
    ) -> tuple[th.Tensor, Metrics]:
        """
        Reverse sampling score matching: ``mean over states and dimensions of (eps_theta(x, s, t) - sum over M of w eps)^2``,
        where ``x = sqrt(bar alpha_t) a_0 + sqrt(1 - bar alpha_t) eps`` for each of the M clean actions a_0 at x.

        :param batch: Transitions.
        :param temperature: lambda in units of ``q_scaling``; with ``"auto"`` a factor of what has been learnt.
        :param action_noise_std: sigma.
        :param noise: All random draws.
        :return: The loss and its metrics.
        """
        with th.no_grad():
            features, actions, improved = self._proposals(batch, noise.chain)
            # Any distribution of x with full support has the same minimiser
            noisy = self.actor.diffusion.add_noise(actions, noise.timesteps, noise.forward)
            signal, noise_level = self._levels(noise.timesteps)
            # An action that is learnt with noise lies further from x than one without
            distance = total_noise_level(signal, noise_level, action_noise_std)
            log_ratios: float | th.Tensor = 0.0
            if improved is None:
                draw = truncated_actions if self.box == "truncated" else unbounded_actions
                clean = draw(noisy, signal, distance, noise.reverse)
            else:
                # At high noise the draws are spread over the box, and seldom hit good actions. So half are drawn elsewhere
                std, n = self.improved_std, self._n_improved()
                clean, log_ratios = mixed_actions(noisy, signal, distance, improved, std, noise.reverse, n)
            with evaluation_mode(self.critic):
                q_values = self.critic.rank(features, clean.clamp(-1, 1))
            learnt = temperature * self.log_temperature.exp()
            # What the temperature depends on is the spread of plain draws, however many there are around better actions
            plain = q_values[:, self._n_improved() :]
            unit = learnt * self._q_unit(plain)
            weights = boltzmann_weights(q_values, unit, log_ratios)
            mean_action = with_its_noise(posterior_mean(clean, weights), noisy / signal, signal * action_noise_std / distance)
            preference = divergence(boltzmann_weights(plain, unit))
            if self._learns_temperature():
                # A temperature that is too low prefers too few actions. A number that is not finite must not stay
                drift = self.temperature_learning_rate * (preference - self.target_divergence)
                self.log_temperature.add_(drift.nan_to_num(0.0)).clamp_(-LARGEST_DRIFT, LARGEST_DRIFT)
        # x is between this mean and the mean noise, so the usual loss of that pair is the loss above
        mean_noise = (noisy - signal * mean_action) / noise_level
        loss = self.actor.denoising_loss(batch.observations, mean_action, noise.timesteps, mean_noise).mean()
        metrics = {
            "actor_loss": loss,
            "divergence": preference,
            "effective_actions": 1 / (weights**2).sum(dim=1).mean(),
            "value_spread": self._spread(),
            "temperature": learnt,
        }
        return loss, metrics

    def _proposals(
        self, batch: ReplayBufferSamples, chain: th.Tensor | int | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        What a policy step knows of each state before it draws clean actions.

        :param batch: B transitions.
        :param chain: Noise of the reverse chains; None for actions of the replay buffer.
        :return: The critics' features, shape (B, S); actions a from which noisy ones start, (B, 1, A); and the same improved
            by gradient steps, None without.
        """
        if chain is None:
            with evaluation_mode(self.critic):
                features, candidates = self.critic.features(batch.observations), batch.actions.unsqueeze(1)
            # Nobody needs the value of a single action
            scored = ScoredCandidates(features, candidates, candidates.new_zeros(candidates.shape[:2]))
        else:
            scored = self.policy.score_candidates(batch.observations, chain, for_training=True)
        actions, improved = best_candidate(*scored[1:]).unsqueeze(1), None
        if self.n_improvement_steps:
            step_length = self.improvement_step * math.sqrt(self.actor.action_dim)
            scored = self.policy.improve_best(scored, self.n_improvement_steps, step_length)
            improved = best_candidate(*scored[1:]).unsqueeze(1)
        return scored.features, actions, improved

    def _n_improved(self) -> int:
        """How many of the M clean actions are drawn around an improved one."""
        return self.n_reverse_samples // 2 if self.n_improvement_steps else 0

    def _n_policy_candidates(self) -> int:
        return self.n_target_candidates if self.proposal_actions == "policy" else 0

    def _levels(self, timesteps: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """``sqrt(bar alpha_t)`` and ``sqrt(1 - bar alpha_t)``, shape (B, 1, 1), of any process that adds noise linearly."""
        one = th.ones((*timesteps.shape, 1), device=self.device)
        add_noise = self.actor.diffusion.add_noise
        return add_noise(one, timesteps, th.zeros_like(one)), add_noise(th.zeros_like(one), timesteps, one)

    def _q_unit(self, q_values: th.Tensor) -> float | th.Tensor:
        """The unit of the temperature. It learns from the values of each state's plain draws, shape (B, at most M)."""
        if self.q_scaling == "none":
            return 1.0
        seen = th.stack([q_values.var(dim=1).mean(), th.ones((), device=self.device)])
        # A value that is not finite must not stay
        self.value_spread.lerp_(th.where(seen.isfinite().all(), seen, self.value_spread), 0.01)
        return self._spread().clamp(min=1e-6)

    def _spread(self) -> th.Tensor:
        return (self.value_spread[0] / self.value_spread[1].clamp(min=1e-6)).sqrt()

    def _draw_actor_noise(self, batch_size: int) -> ActorNoise:
        """
        All random draws of a policy step.

        :param batch_size: B.
        :return: The draws.
        """
        action_dim, draw = self.actor.action_dim, th.rand if self.box == "truncated" else th.randn
        from_policy = self.proposal_actions == "policy"
        return ActorNoise(
            chain=self.policy.draw_noise(batch_size, self.n_target_candidates) if from_policy else None,
            timesteps=self.actor.diffusion.draw_timesteps((batch_size, 1), self.device),
            forward=th.randn((batch_size, 1, action_dim), device=self.device),
            reverse=draw((batch_size, self.n_reverse_samples, action_dim), device=self.device),
        )

    def _learns_temperature(self) -> bool:
        return isinstance(self._temperature_in_use, str) and self._temperature_in_use.startswith("auto")

    def _policy_coefficients(self) -> tuple[float, float]:
        """
        What schedules say now.

        :return: lambda, or a factor of what has been learnt; and sigma.
        """
        action_noise_std = self._value_now("training_action_noise", self._action_noise_schedule)
        self.logger.record("train/training_action_noise", action_noise_std)
        if self._temperature_schedule is None:
            return official_temperature(self._n_updates), action_noise_std
        temperature = self._value_now("temperature", self._temperature_schedule)
        return check_interval("temperature", temperature, 0, math.inf, low_allowed=False), action_noise_std

    def _resolve_arguments(self) -> None:
        super()._resolve_arguments()
        self._temperature_schedule = parse_temperature(self.temperature)
        self._action_noise_schedule = parse_schedule("training_action_noise", self.training_action_noise)
        # One that is changed during learn() counts from the next call on
        self._temperature_in_use = self.temperature
        if not self._learns_temperature() and "log_temperature" in vars(self):
            self.log_temperature.zero_()  # what was learnt under "auto" is no factor of another temperature
        self.n_improvement_steps = check_count("n_improvement_steps", self.n_improvement_steps, 0)
        check_interval("improvement_step", self.improvement_step, 0, math.inf, low_allowed=False)
        check_interval("improved_std", self.improved_std, 1e-3, 10)
        # One action has no weight
        smallest = 4 if self.n_improvement_steps else 2
        self.n_reverse_samples = check_count("n_reverse_samples", self.n_reverse_samples, smallest)
        check_choice("q_scaling", self.q_scaling, ("none", "spread"))
        check_choice("proposal_actions", self.proposal_actions, ("policy", "replay"))
        check_choice("box", self.box, BOXES)
        if self.n_improvement_steps and self.box != "truncated":
            raise ValueError(f"n_improvement_steps above 0 needs box='truncated', got box={self.box!r}")
        largest = math.log(self.n_reverse_samples - self._n_improved()) if self._learns_temperature() else math.inf
        check_interval("target_divergence", self.target_divergence, 0, largest)
        check_interval("temperature_learning_rate", self.temperature_learning_rate, 0, math.inf, low_allowed=False)

    def _setup_model(self) -> None:
        super()._setup_model()
        prediction = getattr(self.actor.diffusion, "prediction", "noise")
        if self.box == "clip" and prediction != "noise":
            raise ValueError(
                f"box='clip' needs prediction='noise', got prediction={prediction!r}: its clean actions are hundreds wide at "
                "high noise, and v contains them. box='truncated' goes with both"
            )
        self.log_temperature = th.zeros((), device=self.device)
        self.value_spread = th.zeros(2, device=self.device)

    def _update_state(self) -> list[th.Tensor]:
        return [*super()._update_state(), self.log_temperature, self.value_spread]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return super()._get_torch_save_params()[0], ["log_temperature", "value_spread"]

    def _excluded_save_params(self) -> list[str]:
        resolved = ["_temperature_schedule", "_temperature_in_use", "_action_noise_schedule"]
        return [*super()._excluded_save_params(), *resolved]

    def learn(
        self: SelfSDAC,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SDAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSDAC:
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
