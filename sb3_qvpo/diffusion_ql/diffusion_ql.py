"""
Diffusion-QL: a diffusion policy that imitates the replay buffer's actions and follows the critics, by gradients through its
chain.

Shapes: B batch, K candidates, A action dimensions, N noises of a chain, C critics.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule

from sb3_qvpo.common.arguments import PolicyValue, check_choice, check_count, check_interval
from sb3_qvpo.common.networks import evaluation_mode, frozen
from sb3_qvpo.common.off_policy_algorithm import Metrics
from sb3_qvpo.common.policies import DiffusionPolicy
from sb3_qvpo.common.td_algorithm import CandidateTDAlgorithm
from sb3_qvpo.diffusion_ql.losses import max_q_target, q_term
from sb3_qvpo.diffusion_ql.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

SelfDiffusionQL = TypeVar("SelfDiffusionQL", bound="DiffusionQL")


class ActorNoise(NamedTuple):
    """
    All random draws of a policy step.

    :param chain: Noise of the chains that draw one action a state, shape (N, B, 1, A).
    :param timesteps: Diffusion steps of the imitation loss, shape (B, 1).
    :param denoising: Noise of the imitation loss, shape (B, 1, A).
    :param coin: Uniform in [0, 1), chooses the critic.
    """

    chain: th.Tensor
    timesteps: th.Tensor
    denoising: th.Tensor
    coin: th.Tensor


class DiffusionQL(CandidateTDAlgorithm):
    """
    Diffusion-QL: behaviour cloning by diffusion, guided by critics; for data that are there already, ``learn_offline()``.

    ``learn()`` trains it online, with the replay buffer as data, which the paper does not.

    Paper: Wang, Hunt, Zhou (2023), *Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning*, ICLR
    2023, https://arxiv.org/abs/2208.06193. ``docs/diffusion_ql.md`` lists where its authors' code differs, and which of both
    is the default.

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
    :param eta: Weight of the critics' term against imitation, at least 0; 0 is behaviour cloning.
    :param q_normalization: Unit of the critics' term. ``"policy"``: the other critic's mean ``|Q|`` at the policy's actions,
        as in the authors' code. ``"data"``: the same critic's at the buffer's actions, as in the paper.
    :param max_q_backup: Whether the TD target takes the best of ``n_target_candidates`` draws for each critic, instead of one.
    :param selection_temperature: Of the softmax over values by which ``predict(deterministic=False)`` chooses, above 0.
    :param target_actor_interval: The target actor moves every this many updates.
    :param target_actor_start: The first update after which it moves; until then it is the untrained actor.
    :param qf_learning_rate: Learning rate of the critics, in the same forms as ``learning_rate``, which it equals if None.
    :param n_behavior_candidates: Candidates of ``predict(deterministic=False)`` and while collecting, at least 1. Several
        differ by episode. After an episode that reached its time limit, the next draws one. All others take the largest.
    :param n_target_candidates: Draws in the TD target, with ``max_q_backup=True`` only.
    :param n_eval_candidates: Best of this many candidates in ``predict(deterministic=True)``, at least 1.
    :param n_diffusion_steps: T, steps of the diffusion, at least 1.
    :param max_grad_norm: Largest Euclidean norm of the gradients of actor and of critics; None for no clipping.
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
    _policy_arguments: ClassVar[tuple[str, ...]] = (*CandidateTDAlgorithm._policy_arguments, "selection_temperature")
    _count_arguments: ClassVar[tuple[str, ...]] = (*CandidateTDAlgorithm._count_arguments, "target_actor_interval")

    selection_temperature = PolicyValue()
    """Of the softmax by which ``predict(deterministic=False)`` chooses; can be changed at any time."""

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
        eta: float = 1.0,
        q_normalization: str = "policy",
        max_q_backup: bool = False,
        selection_temperature: float = 1.0,
        target_actor_interval: int = 5,
        target_actor_start: int = 1_000,
        qf_learning_rate: float | str | Schedule | None = 3e-4,
        n_behavior_candidates: int | Sequence[int] = 50,
        n_target_candidates: int = 10,
        n_eval_candidates: int = 50,
        n_diffusion_steps: int = 5,
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
            n_diffusion_steps=n_diffusion_steps,
            n_behavior_candidates=n_behavior_candidates,
            n_target_candidates=n_target_candidates,
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
        self.eta = eta
        self.q_normalization = q_normalization
        self.max_q_backup = max_q_backup
        self.selection_temperature = selection_temperature
        self.target_actor_interval = target_actor_interval
        self.target_actor_start = target_actor_start

        if _init_setup_model:
            self._setup_model()

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        The paper's algorithm: critics (Eq. 4), policy (Eq. 3), then the targets.

        :param gradient_steps: Number of updates.
        :param batch_size: B, transitions in each update.
        :raises ValueError: At the first loss or gradient that is not finite; the weights stay as they were before it.
        """
        self._begin_updates()
        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self._sample_batch(batch_size)
            self._run_update(self._update_critics, batch)
            self._run_update(self._update_policy, batch)
            if self._n_updates >= self.target_actor_start and self._n_updates % self.target_actor_interval == 0:
                self.policy.update_targets(self.tau, ["actor"])
        self._log_updates()

    def _update_critics(self, batch: ReplayBufferSamples) -> Metrics:
        n_draws = self.n_target_candidates if self.max_q_backup else 1
        loss, metrics = self._critic_loss(batch, self.actor_target.draw_noise(len(batch.rewards), n_draws))
        self._optimize(self.critic.optimizer, "critic_loss", loss)
        return metrics

    def _critic_loss(self, batch: ReplayBufferSamples, target_noise: th.Tensor | int) -> tuple[th.Tensor, Metrics]:
        """
        Eq. 4: ``y = r + gamma^n (1 - done) min_c Q'_c(s', a')`` with a' from the target actor, and ``sum over critics of mean
        (Q_c(s, a) - y)^2``.

        :param batch: Transitions.
        :param target_noise: Noise of the target actor's chains, shape (N, B, K, A).
        :return: The loss and its metrics.
        """
        with th.no_grad(), evaluation_mode(self.actor_target, self.critic_target):
            features, critic_features = self.policy.encode(batch.next_observations, of="target")
            candidates = self.actor_target.sample_candidates(features, cast(th.Tensor, target_noise), for_training=True)
            next_values = max_q_target(self.critic_target.value_candidates(critic_features, candidates).squeeze(-1))
        return self._td_loss(batch, self.critic(batch.observations, batch.actions), next_values)

    def _update_policy(self, batch: ReplayBufferSamples) -> Metrics:
        loss, metrics = self._actor_loss(batch, self._draw_actor_noise(len(batch.rewards)))
        self._optimize(self.actor.optimizer, "actor_loss", loss)
        self.policy.update_targets(self.tau, ["critic"])
        return metrics

    def _actor_loss(self, batch: ReplayBufferSamples, noise: ActorNoise) -> tuple[th.Tensor, Metrics]:
        """
        Eq. 3: the imitation loss of the buffer's actions plus ``eta`` times the critics' term at actions of the policy. The
        gradient of the second goes back through the whole chain.

        :param batch: Transitions.
        :param noise: All random draws.
        :return: The loss and its metrics.
        """
        actions = batch.actions.unsqueeze(1)
        cloning = self.actor.denoising_loss(batch.observations, actions, noise.timesteps, noise.denoising).mean()
        if self.eta == 0:
            return cloning, {"actor_loss": cloning, "bc_loss": cloning}
        drawn = self.actor.sample_candidates(self.actor.features(batch.observations), noise.chain)
        with frozen(self.critic), evaluation_mode(self.critic):
            with th.no_grad():
                features = self.critic.features(batch.observations)
            q_values = self.critic.value_candidates(features, drawn).flatten(1)
            at_data = None
            if self.q_normalization == "data":
                at_data = self.critic.value_candidates(features, actions).flatten(1)
            guidance = q_term(q_values, noise.coin, at_data)
        loss = cloning + self.eta * guidance
        metrics = {"actor_loss": loss, "bc_loss": cloning, "q_loss": guidance, "policy_q_value": q_values.detach().mean()}
        return loss, metrics

    def _draw_actor_noise(self, batch_size: int) -> ActorNoise:
        """
        All random draws of a policy step.

        :param batch_size: B.
        :return: The draws.
        """
        return ActorNoise(
            chain=self.actor.draw_noise(batch_size, 1),
            timesteps=self.actor.diffusion.draw_timesteps((batch_size, 1), self.device),
            denoising=th.randn((batch_size, 1, self.actor.action_dim), device=self.device),
            coin=th.rand((), device=self.device),
        )

    def _n_policy_candidates(self) -> int:
        return 1

    def _resolve_arguments(self) -> None:
        super()._resolve_arguments()
        if not issubclass(self.policy_class, MlpPolicy):
            raise ValueError(
                f"policy must be a name or a subclass of diffusion_ql.MlpPolicy, got {self.policy_class.__name__}"
            )
        check_interval("eta", self.eta, 0, float("inf"))
        check_choice("q_normalization", self.q_normalization, ("policy", "data"))
        self.target_actor_start = check_count("target_actor_start", self.target_actor_start, 0)

    def learn(
        self: SelfDiffusionQL,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DiffusionQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDiffusionQL:
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
