"""
DTQL, Diffusion Trusted Q-Learning: a one-step policy follows the critics, and a diffusion model that has cloned the data says
how far it may go. :meth:`DTQL.train` is the paper's Algorithm 1. The diffusion model is never sampled.

Shapes: B batch, A action dimensions, S state features, C critics.

==========================  ==============  ========================================================
argument or variable        symbol          meaning
==========================  ==============  ========================================================
``alpha``                   alpha           weight of the trust region against the critics (Eq. 5)
``log_prob_coef``           xi              weight of the data's likelihood
``expectile``               tau of Eq. 6    above 1/2: V is the value of a good action of the data
``policy.cloned``           mu_phi          the diffusion model of the data
``actor``                   pi_theta        the one-step policy
``levels``                  sigma           noise levels of the diffusion model
==========================  ==============  ========================================================
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule

from sb3_qvpo.common.arguments import PolicyValue, check_choice, check_count, check_interval
from sb3_qvpo.common.networks import evaluation_mode, frozen
from sb3_qvpo.common.off_policy_algorithm import Metrics
from sb3_qvpo.common.td_algorithm import TDAlgorithm
from sb3_qvpo.dtql.losses import expectile_loss
from sb3_qvpo.dtql.networks import ImplicitCritic
from sb3_qvpo.dtql.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

SelfDTQL = TypeVar("SelfDTQL", bound="DTQL")


class DenoisingNoise(NamedTuple):
    """
    The random draws of a denoising loss.

    :param levels: Noise levels sigma, shape (B, 1).
    :param denoising: Standard normal noise, shape (B, 1, A).
    """

    levels: th.Tensor
    denoising: th.Tensor


class DTQL(TDAlgorithm):
    """
    Diffusion Trusted Q-Learning, for data that are there already: ``learn_offline()``. ``learn()`` may follow.

    Paper: Chen, Wang, Zhou (2024), *Diffusion Policies creating a Trust Region for Offline Reinforcement Learning*, NeurIPS
    2024, https://arxiv.org/abs/2405.19690. ``docs/dtql.md`` lists where its authors' code differs.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a subclass of ``dtql.MlpPolicy``.
    :param env: The environment to learn from (if registered in Gymnasium, can be a string). Its action space must be a
        finite ``Box``.
    :param learning_rate: Learning rate of both policies, and of the critics unless ``qf_learning_rate`` is given. A number, a
        function of the remaining progress (from 1 to 0) or a string such as ``"lin_3e-4"`` or ``"cos_3e-4"``.
    :param buffer_size: Size of the replay buffer, in transitions.
    :param learning_starts: Environment steps with uniformly random actions before the first update.
    :param batch_size: B, transitions in each update.
    :param tau: Step size of the target critics, in [0, 1]. 0 freezes them.
    :param gamma: Discount factor, in [0, 1].
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: Updates after each rollout (see ``train_freq``); -1 for as many as environment steps were done.
    :param action_noise: Noise added to actions while collecting (none by default).
    :param replay_buffer_class: Replay buffer class (for instance ``HerReplayBuffer``); chosen automatically if None.
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer.
    :param optimize_memory_usage: Use SB3's memory-saving variant of the replay buffer.
    :param n_steps: Length of n-step returns.
    :param alpha: Weight of the trust region (Eq. 5), at least 0, in units of reward: about the size of the critics' gradient
        over that of the trust region, which the log shows.
    :param expectile: Of the value function's loss (Eq. 6), in (0, 1).
    :param log_prob_coef: xi, weight of the data's likelihood, at least 0. 1 in the paper; in their code on AntMaze,
        and else 0. Only a Gaussian policy has one.
    :param n_pretraining_updates: Updates of the diffusion model and the critics before the policy's first one.
    :param value_target: Which critics the value function follows: ``"target"`` (Eq. 6) or ``"online"`` (the authors' code).
        With the latter the target critics stand still while pre-training, as there.
    :param selection_temperature: Of the softmax over values by which ``predict(deterministic=False)`` chooses, above 0.
    :param qf_learning_rate: Learning rate of the critics, in the same forms as ``learning_rate``, which it equals if None.
    :param n_behavior_candidates: Candidates of ``predict(deterministic=False)`` and while collecting, at least 1. Several
        differ by episode. After an episode that reached its time limit, the next draws one. All others take the largest.
    :param n_eval_candidates: Best of this many candidates in ``predict(deterministic=True)``, at least 1. With 1 it is the
        policy's centre, and an exported file holds the one-step policy alone.
    :param max_grad_norm: Largest Euclidean norm of the gradients of each network; None for no clipping.
    :param eval_noise_scale: Deviation of the noise that candidates of ``predict(deterministic=True)`` start from, at least 0.
        Below 1 they are closer to the middle of the policy; at 0 they are all alike.
    :param use_sde: Must be False: gSDE belongs to Gaussian policies. Accepted, like the next two, only so that scripts written
        for SAC run unchanged.
    :param sde_sample_freq: Has no effect without gSDE.
    :param use_sde_at_warmup: Has no effect without gSDE.
    :param stats_window_size: Episodes over which rollout statistics are averaged in the log.
    :param tensorboard_log: Folder for TensorBoard logs (None for none).
    :param policy_kwargs: Further arguments of the policy, see :class:`~sb3_qvpo.dtql.MlpPolicy`.
    :param verbose: 0 for no output, 1 for information messages, 2 for debug messages.
    :param seed: Seed of all random generators.
    :param device: Device to run on (cpu, cuda, ...); ``"auto"`` uses a GPU if there is one.
    :param _init_setup_model: Whether to build the networks on creation.
    :raises ValueError: If an argument is out of its range, the action space is not a finite ``Box``, or gSDE is asked for.
    """

    policy: MlpPolicy
    critic: ImplicitCritic

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    _policy_arguments: ClassVar[tuple[str, ...]] = (
        *("n_behavior_candidates", "n_eval_candidates", "eval_noise_scale", "selection_temperature"),
    )

    selection_temperature = PolicyValue()
    """Of the softmax by which ``predict(deterministic=False)`` chooses; can be changed at any time."""

    def __init__(
        self,
        policy: str | type[MlpPolicy],
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
        alpha: float = 1.0,
        expectile: float = 0.7,
        log_prob_coef: float = 0.0,
        n_pretraining_updates: int = 50_000,
        value_target: str = "target",
        selection_temperature: float = 1.0,
        qf_learning_rate: float | str | Schedule | None = 3e-4,
        n_behavior_candidates: int | Sequence[int] = 1024,
        n_eval_candidates: int = 1024,
        max_grad_norm: float | None = None,
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
            n_diffusion_steps=1,
            n_behavior_candidates=n_behavior_candidates,
            n_eval_candidates=n_eval_candidates,
            policy_delay=1,
            max_grad_norm=max_grad_norm,
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
        self.alpha = alpha
        self.expectile = expectile
        self.log_prob_coef = log_prob_coef
        self.n_pretraining_updates = n_pretraining_updates
        self.value_target = value_target
        self.selection_temperature = selection_temperature

        if _init_setup_model:
            self._setup_model()

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Algorithm 1. In the first ``n_pretraining_updates`` updates the policy waits.

        :param gradient_steps: Number of updates.
        :param batch_size: B, transitions in each update.
        :raises ValueError: At the first loss or gradient that is not finite; the weights stay as they were before it.
        """
        self._begin_updates()
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self._sample_batch(batch_size)
            # Step 1: Q1, Q2 and V, Eqs. 6 and 7
            self._run_update(self._update_critics, batch)
            # Step 2: the diffusion model, Eq. 2
            self._run_update(self._update_cloned, batch)
            is_pretraining = self._n_updates <= self.n_pretraining_updates
            if not is_pretraining:
                # Step 3: the policy, Eq. 5
                self._run_update(self._update_policy, batch)
            if self.value_target == "target" or not is_pretraining:
                # Step 4
                self.policy.update_targets(self.tau, ["critic"])
        self._log_updates()

    def _update_critics(self, batch: ReplayBufferSamples) -> Metrics:
        loss, metrics = self._critic_loss(batch)
        self._optimize(self.critic.optimizer, "critic_loss", loss)
        return metrics

    def _critic_loss(self, batch: ReplayBufferSamples) -> tuple[th.Tensor, Metrics]:
        """
        Eq. 7, ``sum over critics of mean (r + gamma^n (1 - done) V(s') - Q_c(s, a))^2``, plus Eq. 6, the expectile loss of
        ``min_c Q'_c(s, a) - V(s)``.

        :param batch: Transitions.
        :return: The loss and its metrics.
        """
        actions = batch.actions.unsqueeze(1)
        teacher = self.critic_target if self.value_target == "target" else self.critic
        with th.no_grad(), evaluation_mode(teacher, self.critic):
            followed = teacher.score(teacher.features(batch.observations), actions).squeeze(1)
            next_values = self.critic.state_values(self.critic.features(batch.next_observations))
        features = self.critic.features(batch.observations)
        values = self.critic.state_values(features)
        q_values = tuple(self.critic.value_candidates(features, actions).squeeze(-1))
        value_loss = expectile_loss(followed - values, self.expectile)
        td_loss, metrics = self._td_loss(batch, q_values, next_values.unsqueeze(1))
        return td_loss + value_loss, {**metrics, "value_loss": value_loss, "state_value": values.detach().mean()}

    def _update_cloned(self, batch: ReplayBufferSamples) -> Metrics:
        noise = self._draw_noise(len(batch.rewards))
        losses = self.policy.cloned.denoising_loss(batch.observations, batch.actions.unsqueeze(1), *noise)
        loss = losses.mean()
        self._optimize(self.policy.cloned.optimizer, "bc_loss", loss)
        return {"bc_loss": loss}

    def _update_policy(self, batch: ReplayBufferSamples) -> Metrics:
        chain, noise = self.actor.draw_noise(len(batch.rewards), 1), self._draw_noise(len(batch.rewards))
        actions = self.actor.sample_candidates(self.actor.features(batch.observations), chain)
        # Two names for the same actions, so that each term's gradient can be read afterwards
        for_trust, for_values = actions.clone(), actions.clone()
        if actions.requires_grad:
            for_trust.retain_grad()
            for_values.retain_grad()
        loss, metrics = self._actor_loss(batch, for_trust, for_values, noise)
        self._optimize(self.actor.optimizer, "actor_loss", loss)
        for name, branch, weight in (("trust_region", for_trust, self.alpha), ("q_value", for_values, 1.0)):
            if branch.grad is not None and weight > 0:
                metrics[f"{name}_gradient"] = len(actions) / weight * branch.grad.norm(dim=-1).mean()
        return metrics

    def _actor_loss(
        self, batch: ReplayBufferSamples, for_trust: th.Tensor, for_values: th.Tensor, noise: DenoisingNoise
    ) -> tuple[th.Tensor, Metrics]:
        """
        Eq. 5, ``alpha L_TR - mean of min_c Q_c(s, a)``. Eq. 4, L_TR, is the diffusion model's loss at the policy's actions.
        Its gradient reaches an action through the noised input and as the target. ``- log_prob_coef log pi(a | s)`` at the
        data's actions is added.

        :param batch: Transitions.
        :param for_trust: The policy's actions, shape (B, 1, A), with gradients.
        :param for_values: The same actions.
        :param noise: Draws of L_TR.
        :return: The loss and its metrics.
        """
        with frozen(self.policy.cloned, self.critic), evaluation_mode(self.policy.cloned, self.critic):
            trust = self.policy.cloned.denoising_loss(batch.observations, for_trust, *noise).mean()
            with th.no_grad():
                features = self.critic.features(batch.observations)
            q_value = self.critic.score(features, for_values).mean()
        loss = self.alpha * trust - q_value
        metrics = {"trust_region_loss": trust, "policy_q_value": q_value}
        if self.log_prob_coef > 0:
            features = self.actor.features(batch.observations)
            log_density = cast(Any, self.actor.noise_predictor).log_density(features, batch.actions.unsqueeze(1)).mean()
            loss = loss - self.log_prob_coef * log_density
            metrics["log_density"] = log_density
        return loss, {"actor_loss": loss, **metrics}

    def _draw_noise(self, batch_size: int) -> DenoisingNoise:
        """
        The draws of a denoising loss.

        :param batch_size: B.
        :return: The draws.
        """
        levels = self.policy.cloned.diffusion.draw_timesteps((batch_size, 1), self.device)
        return DenoisingNoise(levels, th.randn((batch_size, 1, self.actor.action_dim), device=self.device))

    def _resolve_arguments(self) -> None:
        super()._resolve_arguments()
        if not issubclass(self.policy_class, MlpPolicy):
            raise ValueError(f"policy must be a name or a subclass of dtql.MlpPolicy, got {self.policy_class.__name__}")
        check_interval("alpha", self.alpha, 0, float("inf"))
        check_interval("log_prob_coef", self.log_prob_coef, 0, float("inf"))
        check_interval("expectile", self.expectile, 0, 1, low_allowed=False)
        if self.expectile == 1:
            raise ValueError("expectile must be a number in (0, 1), got 1")
        check_choice("value_target", self.value_target, ("target", "online"))
        self.n_pretraining_updates = check_count("n_pretraining_updates", self.n_pretraining_updates, 0)
        if self.log_prob_coef > 0 and self.policy_kwargs.get("one_step_policy", "gaussian") != "gaussian":
            raise ValueError(
                f"log_prob_coef must be 0 with one_step_policy='implicit', which has no density, got {self.log_prob_coef}"
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.cloned = self.policy.cloned

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self._n_updates + total_timesteps <= self.n_pretraining_updates:
            warnings.warn(
                f"n_pretraining_updates is {self.n_pretraining_updates}: the policy will not be trained in the "
                f"{total_timesteps} updates or steps that were asked for",
                stacklevel=4,
            )
        return super()._setup_learn(total_timesteps, *args, **kwargs)

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {**super()._optimizers(), "cloned.optimizer": self.policy.cloned.optimizer}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "cloned"]

    def learn(
        self: SelfDTQL,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DTQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDTQL:
        """
        Train the model online; see :meth:`learn_offline` for data that are there already.

        :param total_timesteps: Number of environment steps; a float such as ``1e6`` is fine.
        :param callback: Callback(s) called at every step.
        :param log_interval: Episodes between two entries of the log.
        :param tb_log_name: Name of the run for TensorBoard.
        :param reset_num_timesteps: Start counting steps (and schedules) from 0 again.
        :param progress_bar: Show a progress bar (needs tqdm and rich).
        :return: The trained model.
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
