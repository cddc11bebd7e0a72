"""
Diffusion actor-critic policies for Stable-Baselines3: networks with their targets and optimisers, and ``predict``.

Shapes: B batch, K candidates for each state, A action dimensions, S state features, T diffusion steps, N noises of a chain.
Actions are scaled to [-1, 1] everywhere here; ``predict`` unscales them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_qvpo.common import arguments
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor, NormalizedFeatures, fixed_noise, network_options
from sb3_qvpo.common.arguments import PolicyCount, PolicyScale, check_choice, check_class, check_count, check_net_arch
from sb3_qvpo.common.candidates import ScoredCandidates, best_candidate, improve_best_candidate
from sb3_qvpo.common.critics import critic_options
from sb3_qvpo.common.diffusion import DiffusionProcess
from sb3_qvpo.common.episode_counts import CountsInUse
from sb3_qvpo.common.export import export_policy
from sb3_qvpo.common.networks import evaluation_mode, is_traced, n_observations, split_rows
from sb3_qvpo.common.noise_schedules import NoiseSchedule, picklable
from sb3_qvpo.common.runs.files import atomic_file
from sb3_qvpo.common.speed.networks import FastActor, FastBatchNormCritic, FastCritic, FastQuantileCritic
from sb3_qvpo.common.speed.optimizers import use_fused
from sb3_qvpo.common.speed.programs import Programs

CRITICS: dict[str, type[CandidateCritic]]
CRITICS = {"twin": FastCritic, "crossq": FastBatchNormCritic, "quantile": FastQuantileCritic}
"""The critics that can be asked for by name."""

LARGEST_DRAW = 2**24
"""
Largest number of elements (64 MB in float32) in the noise or a hidden layer of one draw. The paper's settings need 4 million.
"""


class DiffusionPolicy(BasePolicy):
    """
    A diffusion actor, critics, and exponential moving averages of both (their targets).

    ``predict(deterministic=False)`` is the behaviour policy: fresh noise, best of ``n_behavior_candidates``.
    ``predict(deterministic=True)`` is a function of the weights and the observation: best of ``n_eval_candidates`` under a
    fixed bank of noise. An observation gets the same action alone and anywhere in a batch.

    A subclass with another actor or other critics sets :attr:`actor_class` or :attr:`critic_class`. Critics without targets
    have none: ``actor_target`` and ``critic_target`` are the online networks then.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param lr_schedule: Learning rate schedule.
    :param net_arch: Widths of the hidden layers, a list for actor and critics or ``dict(pi=[...], qf=[...])``.
        Two layers of 256 by default (paper, Table 2).
    :param activation_fn: Activation function, Mish by default (paper, Table 2).
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments of the features extractor.
    :param normalize_images: Whether to divide images by 255.
    :param optimizer_class: Optimiser of actor and critics.
    :param optimizer_kwargs: Keyword arguments of the optimiser, without the learning rate.
    :param n_critics: Number of critics.
    :param share_features_extractor: Whether actor and critics share one features extractor, trained by the actor's loss.
    :param n_diffusion_steps: Number of diffusion steps T.
    :param noise_schedule: ``"cosine"``, ``"vp"``, ``"linear"``, ``"karras"``, a function T -> betas or a list of T noise
        levels, see :mod:`sb3_qvpo.common.noise_schedules`.
    :param time_embedding_dim: Size of the time embedding, even and at least 4.
    :param n_sampling_steps: Reverse steps of every sample, 1 ... T: fewer steps than are trained, evenly spaced. T if None.
    :param sampling_eta: Noise of the reverse steps of ``"ddpm"``, in [0, 1]: 1 for the paper's, 0 for none after the start.
    :param sampler: ``"ddpm"`` (the paper's), ``"ddim"`` or ``"dpm++"``,
        see :class:`~sb3_qvpo.common.diffusion.GaussianDiffusion`.
    :param prediction: What the network predicts: ``"noise"`` (the paper's) or ``"v"``.
    :param critic_type: ``"twin"`` for clipped double Q-learning, ``"crossq"`` for
        :class:`~sb3_qvpo.common.critics.BatchNormCritic`, ``"quantile"`` for
        :class:`~sb3_qvpo.common.critics.QuantileCritic`.
    :param critic_activation_fn: Activation function of the critics, ``activation_fn`` if None.
    :param n_quantiles: M, quantiles of each critic, only with ``critic_type="quantile"``. 25 if None.
    :param top_quantiles_to_drop_per_net: d, largest quantiles left out of the target, only with ``critic_type="quantile"``. 2
        if None.
    :param n_behavior_candidates: K_b, candidates of the behaviour policy (Algorithm 1, line 2). Of an algorithm's several
        counts, the largest.
    :param n_eval_candidates: K, candidates of deterministic predictions (Sec. 5.1).
    :param noise_bank_seed: Seed of the noise of deterministic predictions.
    :param eval_noise_scale: Deviation of that noise, at least 0. 1 for the paper's. Below 1 the candidates are closer to the
        middle of the policy; at 0 they are all alike.
    :param normalized_observations: Whether a ``VecNormalize`` normalises the observations. ``learn()`` sets it.
    :param time_hidden_dim: Width of the time embedding's hidden layer, 8 times its size if None.
    :param initialization: How weights start: ``"normal"`` as in the code of QVPO's authors, or ``"torch"``, torch's own.
    :param normalize_features: Whether running statistics shift and scale the features that actor and critics see, see
        :class:`~sb3_qvpo.common.networks.RunningNorm`.
    :param renorm_start: Updates of the critics after which batch renormalisation takes the place of batch normalisation, only
        with ``critic_type="crossq"``. Never if None.
    :param pessimism: beta, how far a value lies from the critics' mean (0) towards their minimum (1), only with
        ``critic_type="crossq"``. 1 if None.
    :raises ValueError: For an unknown noise schedule, an impossible size, or something else where a class is expected.
    """

    actor: DiffusionActor
    actor_target: DiffusionActor
    critic: CandidateCritic
    critic_target: CandidateCritic

    actor_class: ClassVar[type[DiffusionActor]] = FastActor
    """Class of the actor and its target."""
    critic_class: ClassVar[type[CandidateCritic]] = FastCritic
    """Class of the critics and their targets, unless ``critic_type`` names another."""

    n_behavior_candidates = PolicyCount()
    """K_b, best of this many candidates in ``predict(deterministic=False)``; can be changed at any time."""
    n_eval_candidates = PolicyCount()
    """K, best of this many candidates in ``predict(deterministic=True)``; can be changed at any time."""
    eval_noise_scale = PolicyScale()
    """Deviation of the noise that these candidates start from; can be changed at any time."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        n_diffusion_steps: int = 20,
        noise_schedule: str | NoiseSchedule | Sequence[float] = "cosine",
        time_embedding_dim: int = 32,
        n_sampling_steps: int | None = None,
        sampling_eta: float = 1.0,
        sampler: str = "ddpm",
        prediction: str = "noise",
        critic_type: str = "twin",
        critic_activation_fn: type[nn.Module] | None = None,
        n_quantiles: int | None = None,
        top_quantiles_to_drop_per_net: int | None = None,
        n_behavior_candidates: int = 4,
        n_eval_candidates: int = 32,
        noise_bank_seed: int = 0,
        eval_noise_scale: float = 1.0,
        normalized_observations: bool = False,
        time_hidden_dim: int | None = None,
        initialization: str = "normal",
        normalize_features: bool = False,
        renorm_start: int | None = None,
        pessimism: float | None = None,
    ):
        # Everything needed to build this policy again comes from here, so that no argument can be forgotten on saving
        constructor_arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_class("features_extractor_class", features_extractor_class, BaseFeaturesExtractor)
        check_class("optimizer_class", optimizer_class, th.optim.Optimizer)
        check_class("activation_fn", activation_fn, nn.Module)
        critic_activation_fn = check_class("critic_activation_fn", critic_activation_fn or activation_fn, nn.Module)
        check_choice("critic_type", critic_type, CRITICS)
        if critic_type != "twin" and type(self).critic_class is not DiffusionPolicy.critic_class:
            raise ValueError(f"critic_type must be left out, got {critic_type!r}: {type(self).__name__} has its own critics")
        net_arch = check_net_arch([256, 256] if net_arch is None else net_arch)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._constructor_arguments = constructor_arguments
        self.n_diffusion_steps = check_count("n_diffusion_steps", n_diffusion_steps)
        check_count("n_critics", n_critics)
        check_count("time_embedding_dim", time_embedding_dim, 4)
        actor_options, common_options = network_options(time_hidden_dim, initialization)
        self.n_behavior_candidates, self.n_eval_candidates = n_behavior_candidates, n_eval_candidates
        self.noise_bank_seed = check_count("noise_bank_seed", noise_bank_seed, 0, 2**32 - 1)
        self.eval_noise_scale = eval_noise_scale
        self.share_features_extractor, self.normalize_features = share_features_extractor, normalize_features
        self._noise_bank: th.Tensor | None = None
        self.programs, self.counts_in_use = Programs(), CountsInUse()
        # Kept by every way of saving: exported without its normalisation, a policy would act on wrong inputs
        self.normalized_observations = normalized_observations

        actor_arch, critic_arch = get_actor_critic_arch(net_arch)
        common_kwargs = dict(observation_space=observation_space, action_space=action_space, normalize_images=normalize_images)
        self.actor_kwargs = dict(
            common_kwargs,
            net_arch=actor_arch,
            activation_fn=activation_fn,
            n_diffusion_steps=n_diffusion_steps,
            noise_schedule=noise_schedule,
            time_embedding_dim=time_embedding_dim,
            n_sampling_steps=n_sampling_steps,
            sampling_eta=sampling_eta,
            sampler=sampler,
            prediction=prediction,
            **actor_options,
        )
        self.critic_type = critic_type
        self._critic_class = type(self).critic_class if critic_type == "twin" else CRITICS[critic_type]
        self.critic_kwargs = dict(
            common_kwargs,
            net_arch=critic_arch,
            activation_fn=critic_activation_fn,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
            **common_options,
            **critic_options(self._critic_class, constructor_arguments),
        )
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create networks, targets and optimisers.

        :param lr_schedule: Learning rate schedule; its first value is used until training sets the rate.
        """
        shared, has_targets = self.share_features_extractor, self._critic_class.has_targets
        self.actor = self.make_actor()
        if has_targets:
            self.actor_target = self.make_actor()
        self.critic = self.make_critic(self.actor.features_extractor if shared else None)
        if has_targets:
            self.critic_target = self.make_critic(self.actor_target.features_extractor if shared else None)
            self.actor_target.load_state_dict(self.actor.state_dict())
            self.critic_target.load_state_dict(self.critic.state_dict())
            # Targets stay in evaluation mode: set_training_mode() below never touches them
            self.actor_target.set_training_mode(False)
            self.critic_target.set_training_mode(False)
        else:
            # Past torch's own list of modules, so that a state dict has each weight once
            vars(self).update(actor_target=self.actor, critic_target=self.critic)

        learning_rate = lr_schedule(1)
        self.actor.optimizer = self._make_optimizer(list(self.actor.parameters()), learning_rate)
        self.critic.optimizer = self._make_optimizer(self.critic_parameters(self.critic), learning_rate)

    def _make_optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> th.optim.Optimizer:
        optimizer_class = cast(Any, self.optimizer_class)
        optimizer: th.optim.Optimizer = optimizer_class(parameters, lr=learning_rate, **self.optimizer_kwargs)
        use_fused(optimizer)
        return optimizer

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        Create a features extractor.

        :return: The extractor, with normalised features if ``normalize_features`` asks for them.
        """
        extractor = super().make_features_extractor()
        return NormalizedFeatures(extractor) if self.normalize_features else extractor

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> DiffusionActor:
        """
        Create an actor.

        :param features_extractor: Features extractor to share; a new one is created if None.
        :return: The actor, on the device of this policy.
        """
        return self.actor_class(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> CandidateCritic:
        """
        Create critics.

        :param features_extractor: Features extractor to share; a new one is created if None.
        :return: The critics, on the device of this policy.
        """
        return self._critic_class(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def critic_parameters(self, critic: CandidateCritic) -> list[nn.Parameter]:
        """
        The parameters that belong to a critic alone, without a features extractor that it shares with the actor.

        :param critic: The critic or its target.
        :return: Its parameters.
        """
        return [
            parameter
            for name, parameter in critic.named_parameters()
            if not (self.share_features_extractor and name.startswith("features_extractor."))
        ]

    @property
    def trained_process(self) -> DiffusionProcess:
        """The diffusion process that weights have been trained for."""
        return self.actor.diffusion

    def _networks(self, of: Literal["online", "target"]) -> tuple[DiffusionActor, CandidateCritic]:
        return (self.actor, self.critic) if of == "online" else (self.actor_target, self.critic_target)

    def encode(self, observation: PyTorchObs, of: Literal["online", "target"] = "online") -> tuple[th.Tensor, th.Tensor]:
        """
        Encode observations, once where actor and critics share a features extractor.

        :param observation: B observations.
        :param of: Whose extractors: the online networks' or the targets'.
        :return: Features of the actor and of the critics, shape (B, S) each.
        """
        actor, critic = self._networks(of)
        features = actor.features(observation)
        return features, features if self.share_features_extractor else critic.features(observation)

    def score_candidates(
        self,
        observation: PyTorchObs,
        noise: th.Tensor | int,
        of: Literal["online", "target"] = "online",
        for_training: bool = False,
        only_to_choose: bool = False,
    ) -> ScoredCandidates:
        """
        Draw candidates from the actor and let the critics score them. Each observation is encoded once.

        Always in evaluation mode: choosing actions moves no statistics. The caller switches gradients off.

        :param observation: B observations.
        :param noise: What :meth:`draw_noise` returned: noise of shape (N, B, K, A), or K if it is drawn here.
        :param of: Whose candidates: the online networks' or the targets'.
        :param for_training: Whether the candidates only serve an update, see :meth:`DiffusionActor.sample_candidates`.
        :param only_to_choose: Whether the scores only serve the choice of one candidate. A single one gets the score 0 then.
            In an update they come from :meth:`CandidateCritic.rank`.
        :return: The critics' features, shape (B, S), the candidates, (B, K, A), and their scores, (B, K).
        """
        actor, critic = self._networks(of)

        def scored(features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            candidates = actor.sample_candidates(features, noise, for_training)
            if only_to_choose and candidates.shape[1] == 1:
                return candidates, candidates.new_zeros(candidates.shape[:2])
            return candidates, (critic.rank if for_training and only_to_choose else critic.score)(critic_features, candidates)

        with evaluation_mode(actor, critic):
            features, critic_features = self.encode(observation, of)
            if isinstance(noise, th.Tensor):
                return ScoredCandidates(critic_features, *scored(features, critic_features, noise))
            size = self.states_at_once(noise)
            parts = [
                scored(part, critic_part, actor.draw_noise(len(part), noise))
                for part, critic_part in zip(th.split(features, size), th.split(critic_features, size), strict=True)
            ]
            if len(parts) == 1:
                return ScoredCandidates(critic_features, *parts[0])
            return ScoredCandidates(critic_features, *map(th.cat, zip(*parts, strict=True)))

    def improve_best(self, scored: ScoredCandidates, n_steps: int, step_length: float) -> ScoredCandidates:
        """
        Add candidates: some gradient steps of fixed length from the best one, each towards higher values.

        :param scored: Candidates of the online actor, K for each state.
        :param n_steps: m, gradient steps.
        :param step_length: Euclidean length of each step, in units of actions in [-1, 1].
        :return: K + m candidates for each state, and their scores.
        """
        with evaluation_mode(self.critic):
            return improve_best_candidate(scored, self.critic, n_steps, step_length)

    def draw_noise(self, n_states: int, n_candidates: int) -> th.Tensor | int:
        """
        Noise of reverse chains, for :meth:`score_candidates`.

        :param n_states: B.
        :param n_candidates: Candidates K of each state.
        :return: Standard normal noise of shape (N, B, K, A). K itself if the noise would take too much memory: it is then
            drawn with the candidates, for some states at a time.
        """
        if n_states > self.states_at_once(n_candidates):
            return n_candidates
        return self.actor.draw_noise(n_states, n_candidates)

    def states_at_once(self, n_candidates: int) -> int:
        """
        States whose candidates are drawn together. It bounds memory: at most :data:`LARGEST_DRAW` elements in their noise and
        in a hidden layer.

        :param n_candidates: Candidates K for each state.
        :return: Number of states, at least 1.
        """
        widths = cast(list[int], [*self.actor_kwargs["net_arch"], *self.critic_kwargs["net_arch"]])
        numbers = max([*map(int, widths), self.actor.diffusion.n_noises * self.actor.action_dim])
        return max(1, LARGEST_DRAW // (n_candidates * numbers))

    def compile_actions(self, n_candidates: int | None = None) -> bool:
        """
        Compile decisions for single observations. It takes 10 to 20 s and makes them two to four times faster. Long runs
        compile the actions that they collect on their own, and only these. Compiled actions differ in their last bits from
        eager ones. A GPU captures decisions of known networks on its own, after ten eager ones.

        Each number of candidates has a program of its own: after a change of ``n_eval_candidates`` compile again.

        :param n_candidates: For how many candidates; if None for ``n_behavior_candidates`` and ``n_eval_candidates``.
        :return: Whether they are compiled (on a GPU: captured). False for networks of subclasses on the CPU, on other devices,
            and with ``settings.enabled = False``. Without a C++ compiler False, with a warning.
        :raises ValueError: If ``n_candidates`` is not a whole number of at least 1.
        """
        both = [self.n_behavior_candidates, self.n_eval_candidates]
        counts = both if n_candidates is None else [check_count("n_candidates", n_candidates)]
        return self._scores_as_known() and all([self.programs.compile(self, count) for count in counts])

    def _scores_as_known(self) -> bool:
        """Whether no subclass scores candidates in a way of its own, which a program would not know."""
        return type(self).score_candidates is DiffusionPolicy.score_candidates

    def noise_bank(self, n_candidates: int) -> th.Tensor:
        """
        The noise of deterministic predictions. The first K entries are the same however many more are asked for.

        :param n_candidates: Number of candidates K.
        :return: Normal noise of deviation ``eval_noise_scale`` and shape (N, 1, K, A), on the policy's device. N is T unless
            samples take fewer steps.
        """
        bank = self._noise_bank
        # A trace must hold the same operations each time, and no tensor of it may stay here
        if bank is None or bank.shape[2] < n_candidates or bank.device != self.device or is_traced():
            sizes = (n_candidates, self.n_diffusion_steps, self.actor.action_dim)
            bank = fixed_noise(self.noise_bank_seed, sizes).to(self.device)
            if not is_traced():
                self._noise_bank = bank
        return cast(th.Tensor, self.eval_noise_scale * bank[: self.actor.diffusion.n_noises, :, :n_candidates])

    def update_targets(self, tau: float, networks: Sequence[str] = ("actor", "critic")) -> None:
        """
        Polyak step ``target <- (1 - tau) target + tau online`` for actor and critics. Running statistics are copied.

        A shared features extractor moves once, with the actor. Without targets there is nothing to do.

        :param tau: Step size in [0, 1].
        :param networks: Which of the two.
        """
        # All tensors in one call: what SB3's polyak_update() does one by one
        average = get_ema_multi_avg_fn(1 - tau)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        own = {"actor": lambda actor: list(actor.parameters()), "critic": self.critic_parameters}
        for name in networks:
            online, target = (getattr(self, f"{name}{suffix}") for suffix in ("", "_target"))
            if target is online:  # there is no target
                continue
            average(own[name](target), own[name](online), 0)
            polyak_update(get_parameters_by_name(online, ["running_"]), get_parameters_by_name(target, ["running_"]), 1.0)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Choose actions, see the class's docstring.

        :param observation: B observations.
        :param deterministic: Best of ``n_eval_candidates`` under fixed noise, instead of ``n_behavior_candidates`` under
            fresh noise.
        :return: Actions of shape (B, A) in [-1, 1].
        """
        return self._predict(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not deterministic:
            return self._best_action(observation, self.counts_in_use.to_draw(self.n_behavior_candidates))
        bank = self.noise_bank(self.n_eval_candidates)
        if is_traced() or n_observations(observation) == 0:
            # A loop over the observations would make their number a constant of the trace
            bank = bank.expand(-1, n_observations(observation), -1, -1)
            return best_candidate(*self.score_candidates(observation, bank)[1:])
        # One by one: float32 sums depend on the shape of the batch, and a last bit can change which candidate is best
        return th.cat([self._best_action(row, bank) for row in split_rows(observation)])

    def _best_action(self, observation: PyTorchObs, noise: th.Tensor | int) -> th.Tensor:
        by_program = None
        if self._scores_as_known():
            with evaluation_mode(self.actor, self.critic):
                by_program = self.programs.score(self, observation, noise)
        candidates, scores = by_program or self.score_candidates(observation, noise)[1:]
        return best_candidate(candidates, self.counts_in_use.restricted(scores))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions, see the class's docstring.

        :param observation: One observation, or a batch of them.
        :param state: Not used, as in SB3's policies without memory.
        :param episode_start: Not used, as in SB3's policies without memory.
        :param deterministic: Best of ``n_eval_candidates`` under fixed noise, instead of ``n_behavior_candidates`` under
            fresh noise.
        :return: Actions within the bounds of the action space, and ``state``.
        :raises ValueError: If a number of the observation is not finite.
        """
        arguments.check_finite_observation(observation)
        return super().predict(observation, state, episode_start, deterministic)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Scale from [-1, 1] to the bounds of the action space. Clipped, as SB3's formula can exceed them by a rounding error.

        :param scaled_action: Actions in [-1, 1].
        :return: Actions within the bounds.
        """
        box = cast(spaces.Box, self.action_space)
        return cast(np.ndarray, np.clip(super().unscale_action(scaled_action), box.low, box.high))

    def set_training_mode(self, mode: bool) -> None:
        """
        Switch actor and critics between training and evaluation mode; the targets always stay in evaluation mode.

        :param mode: True for training mode.
        """
        for network in (self.actor, self.critic):
            if network.training != mode:  # going through all layers costs a tenth of an action
                network.set_training_mode(mode)
        self.training = mode

    def save(self, path: str | Path | io.BufferedIOBase) -> None:
        """
        Save the policy alone, for ``DiffusionPolicy.load()``. The file holds pickles: only load files that you trust.

        :param path: Path of the file, or an open file.
        :raises OSError: If writing fails. A previous file is intact then.
        """
        content = path if isinstance(path, io.BufferedIOBase) else io.BytesIO()
        super().save(cast(Any, content))
        if isinstance(path, io.BufferedIOBase):
            return
        with atomic_file(path) as file:
            file.write(cast(io.BytesIO, content).getbuffer())

    def export(
        self, path: str | Path, format: str | None = None, vec_normalize: VecNormalize | Literal[False] | None = None
    ) -> None:
        """
        Write the whole deterministic decision to a file that runs without this package, see :mod:`sb3_qvpo.common.export`.

        :param path: Path of the file; ``.onnx`` or ``.pt2`` is added if it has no suffix.
        :param format: ``"onnx"``, or ``"torch"`` for ``torch.export.load()``; by the suffix of ``path`` if None.
        :param vec_normalize: The ``VecNormalize`` that the policy was trained with, if any; ``model.export()`` finds that of
            its environment. False to leave the normalisation to whoever runs the file.
        :raises ValueError: If ``format`` is unknown, or ``vec_normalize`` is missing or belongs to other observations.
        :raises ImportError: If the packages of the ``export`` extra are missing.
        :raises OSError: If writing fails. A previous file is intact then.
        """
        export_policy(self, path, format, vec_normalize)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Version 0.1 kept it in the state dict
        normalized_observations = state_dict.pop(f"{prefix}normalized_observations", None)
        if normalized_observations is not None:
            self.normalized_observations = bool(normalized_observations)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        current = dict(
            # The learning rate belongs to the algorithm; a policy loaded alone is not trained
            lr_schedule=self._dummy_schedule,
            normalized_observations=self.normalized_observations,
            noise_schedule=picklable(self._constructor_arguments["noise_schedule"], self.n_diffusion_steps),
        )
        values = {name: getattr(self, name) for name in arguments.policy_values(type(self))}
        return {**self._constructor_arguments, **values, **current}
