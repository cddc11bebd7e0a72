"""
The networks of a diffusion policy for Stable-Baselines3: the actor, which draws candidates, and the critics, which score them.

Shapes: B batch, K candidates for each state, A action dimensions, S state features, T diffusion steps, C critics. A critic
predicts M numbers for an action: 1 in :class:`CandidateCritic`. Actions are scaled to [-1, 1].
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.arguments import check_choice, check_count
from sb3_qvpo.common.candidates import ScoredCandidates
from sb3_qvpo.common.diffusion import DiffusionProcess, GaussianDiffusion
from sb3_qvpo.common.networks import INITIALIZATIONS, NoisePredictor, RunningNorm, init_linear_layers
from sb3_qvpo.common.noise_schedules import NoiseSchedule, make_betas


def network_options(time_hidden_dim: int | None, initialization: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Arguments of actor and critics that differ from the defaults. Networks of users may not know the others.

    :param time_hidden_dim: See :class:`DiffusionActor`.
    :param initialization: See :class:`DiffusionActor`.
    :return: Those of the actor and those of the critics.
    :raises ValueError: If one is out of its range.
    """
    check_choice("initialization", initialization, INITIALIZATIONS)
    common = {} if initialization == "normal" else {"initialization": initialization}
    own = {} if time_hidden_dim is None else {"time_hidden_dim": check_count("time_hidden_dim", time_hidden_dim)}
    return {**own, **common}, common


def fixed_noise(seed: int, sizes: tuple[int, int, int]) -> th.Tensor:
    """
    Noise of candidates that is the same for good: on every device, in every version. Longer draws extend shorter ones.

    :param seed: Seed, in 0 ... 2^32 - 1.
    :param sizes: Candidates K, steps N and action dimensions A.
    :return: Standard normal noise of shape (N, 1, K, A), on the CPU.
    """
    # NumPy's legacy generator: torch's generators promise none of these
    draws = np.random.RandomState(seed).standard_normal(sizes)
    return th.as_tensor(draws, dtype=th.float32, device="cpu").transpose(0, 1).unsqueeze(1)


class NormalizedFeatures(BaseFeaturesExtractor):
    """
    A features extractor whose features are normalised, see :class:`~sb3_qvpo.common.networks.RunningNorm`.

    :param extractor: The extractor.
    """

    def __init__(self, extractor: BaseFeaturesExtractor):
        super().__init__(extractor._observation_space, extractor.features_dim)
        self.extractor = extractor
        self.norm = RunningNorm(extractor.features_dim)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: B observations, preprocessed.
        :return: Features of shape (B, S).
        """
        normalized: th.Tensor = self.norm(self.extractor(observations))
        return normalized


class DiffusionActor(BasePolicy):
    """
    The diffusion policy pi_theta(a | s): a features extractor, a noise predictor and the chain that turns noise into actions.

    A subclass changes the diffusion in :meth:`make_diffusion` and the network in :meth:`make_noise_predictor`.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param net_arch: Widths of the noise predictor's hidden layers.
    :param features_extractor: Network that turns an observation into features.
    :param features_dim: Number of features S.
    :param activation_fn: Activation function.
    :param normalize_images: Whether to divide images by 255.
    :param n_diffusion_steps: Number of diffusion steps T.
    :param noise_schedule: A noise schedule, see :func:`~sb3_qvpo.common.noise_schedules.make_betas`.
    :param time_embedding_dim: Size of the time embedding.
    :param time_hidden_dim: Width of its hidden layer, 8 times its size if None.
    :param initialization: How weights start, see :class:`~sb3_qvpo.common.networks.NoisePredictor`.
    :param diffusion_options: Further arguments of :class:`GaussianDiffusion`: ``n_sampling_steps``, ``sampling_eta``,
        ``prediction`` and ``sampler``.
    """

    diffusion: DiffusionProcess

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.Mish,
        normalize_images: bool = True,
        n_diffusion_steps: int = 20,
        noise_schedule: str | NoiseSchedule | Sequence[float] = "cosine",
        time_embedding_dim: int = 32,
        time_hidden_dim: int | None = None,
        initialization: str = "normal",
        **diffusion_options: Any,
    ):
        named = {name: value for name, value in locals().items() if name not in ("self", "__class__", "diffusion_options")}
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self._constructor_arguments = {**named, **diffusion_options}
        self.action_dim = get_action_dim(action_space)
        self.features_dim = features_dim
        self._network_options = dict(time_hidden_dim=time_hidden_dim, initialization=initialization)
        self.diffusion = self.make_diffusion(n_diffusion_steps, noise_schedule, **diffusion_options)
        self.noise_predictor = self.make_noise_predictor(
            features_dim, n_diffusion_steps, net_arch, activation_fn, time_embedding_dim
        )

    def make_diffusion(
        self, n_steps: int, noise_schedule: str | NoiseSchedule | Sequence[float], **options: Any
    ) -> DiffusionProcess:
        """
        Create the diffusion process.

        :param n_steps: T.
        :param noise_schedule: A noise schedule, see :func:`~sb3_qvpo.common.noise_schedules.make_betas`.
        :param options: Further arguments of :class:`GaussianDiffusion`.
        :return: The process.
        """
        return GaussianDiffusion(make_betas(noise_schedule, n_steps), **options)

    def make_noise_predictor(
        self,
        features_dim: int,
        n_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        time_embedding_dim: int,
    ) -> NoisePredictor:
        """
        Create the network that the diffusion asks at every step.

        :param features_dim: Number of state features S.
        :param n_steps: T.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :param time_embedding_dim: Size of the time embedding.
        :return: The network.
        """
        return NoisePredictor(
            self.action_dim,
            features_dim,
            n_steps,
            net_arch,
            activation_fn,
            time_embedding_dim,
            **cast(dict[str, Any], self._network_options),
        )

    def features(self, observation: PyTorchObs) -> th.Tensor:
        """
        Encode observations.

        :param observation: B observations.
        :return: Features of shape (B, S).
        """
        return self.extract_features(observation, self.features_extractor)

    def draw_noise(self, n_states: int, n_candidates: int) -> th.Tensor:
        """
        Noise of reverse chains.

        :param n_states: B.
        :param n_candidates: Candidates K of each state.
        :return: Standard normal noise of shape (N, B, K, A); N is T unless samples take fewer steps.
        """
        return th.randn(self.diffusion.n_noises, n_states, n_candidates, self.action_dim, device=self.device)

    def sample_candidates(self, features: th.Tensor, noise: th.Tensor, for_training: bool = False) -> th.Tensor:
        """
        Draw candidates from pi_theta (Algorithm 1, line 5). The state enters the network once for all candidates and steps.

        :param features: State features of shape (B, S).
        :param noise: Standard normal noise of shape (N, B, K, A), see :meth:`draw_noise`, or (N, 1, K, A) for the same noise
            in each state.
        :param for_training: Whether the candidates only serve an update. A subclass may round them then; this class does not.
        :return: Actions of shape (B, K, A) in [-1, 1].
        """
        condition = self.noise_predictor.condition(features)
        return self.diffusion.sample(self.noise_predictor, condition, noise)

    def denoising_loss(
        self,
        observation: PyTorchObs,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Unweighted denoising loss of each action, the norm in Eqs. 6 and 10.

        :param observation: B observations.
        :param actions: Clean actions of shape (B, K, A) in [-1, 1].
        :param timesteps: Diffusion steps in 0 ... T-1, shape (B, K). Drawn uniformly if None.
        :param noise: Standard normal noise of shape (B, K, A). Drawn if None.
        :return: Losses of shape (B, K).
        """
        condition = self.noise_predictor.condition(self.features(observation))
        return self.diffusion.loss(self.noise_predictor, actions, condition, timesteps, noise)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        One action for each observation, not chosen among candidates.

        :param observation: B observations.
        :param deterministic: Not used: a single draw of a diffusion policy is always random.
        :return: Actions of shape (B, A) in [-1, 1].
        """
        return self._predict(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        features = self.features(observation)
        return self.sample_candidates(features, self.draw_noise(len(features), n_candidates=1)).squeeze(1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return self._constructor_arguments


class CandidateCritic(ContinuousCritic):
    """
    SB3's critics, which can also score many candidates of a state: clipped double Q-learning, as in SAC and TD3.

    Another critic is a subclass, which overrides what differs: :meth:`make_q_network`, :meth:`aggregate`,
    :meth:`bootstrap`, :meth:`loss`, :meth:`transition_values`. See :mod:`sb3_qvpo.common.critics`.

    :param observation_space: Observation space.
    :param action_space: Action space.
    :param net_arch: Widths of the hidden layers.
    :param features_extractor: Network that turns an observation into features.
    :param features_dim: Number of features S.
    :param activation_fn: Activation function.
    :param normalize_images: Whether to divide images by 255.
    :param n_critics: Number of critics C.
    :param share_features_extractor: Whether the features extractor is the actor's, and trained by its loss.
    :param initialization: How weights start, one of :data:`~sb3_qvpo.common.networks.INITIALIZATIONS`.
    """

    has_targets: ClassVar[bool] = True
    """Whether TD targets come from moving averages of critics and actor. Without, the policy has none."""

    bootstraps_from_scores: ClassVar[bool] = True
    """Whether the TD target uses the scores of the next candidates. Otherwise they only serve the choice among them."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        initialization: str = "normal",
    ):
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images,
            n_critics=0,  # SB3's networks are always MLPs with one output
            share_features_extractor=share_features_extractor,
        )
        self.n_critics = n_critics
        self.features_dim = features_dim
        n_inputs = features_dim + get_action_dim(action_space)
        for i in range(n_critics):
            q_network = self.make_q_network(n_inputs, net_arch, activation_fn)
            self.add_module(f"qf{i}", q_network)
            self.q_networks.append(q_network)
        if initialization == "normal":
            for q_network in self.q_networks:
                init_linear_layers(q_network)

    def make_q_network(self, n_inputs: int, net_arch: list[int], activation_fn: type[nn.Module]) -> nn.Module:
        """
        Create the network of one critic.

        :param n_inputs: Number of inputs, S + A: state features, then the action.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :return: A network from rows (R, S + A) to (R, M).
        """
        return nn.Sequential(*create_mlp(n_inputs, 1, net_arch, activation_fn))

    def features(self, observation: PyTorchObs) -> th.Tensor:
        """
        Encode observations.

        :param observation: B observations.
        :return: Features of shape (B, S).
        """
        return self.extract_features(observation, self.features_extractor)

    def value_candidates(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        What each critic predicts for each candidate.

        :param features: State features of shape (B, S).
        :param candidates: Actions of shape (B, K, A) in [-1, 1].
        :return: Predictions of shape (C, B, K, M).
        """
        rows = th.cat([features.unsqueeze(1).expand(-1, candidates.shape[1], -1), candidates], dim=-1).flatten(0, 1)
        return th.stack([q_network(rows).unflatten(0, candidates.shape[:2]) for q_network in self.q_networks])

    def aggregate(self, q_values: th.Tensor) -> th.Tensor:
        """
        One value from the predictions of all critics: their minimum. Sec. 5.1 of the QVPO paper uses it throughout.

        :param q_values: Predictions of shape (C, ..., M).
        :return: Values of shape (...).
        """
        return q_values.squeeze(-1).min(dim=0).values

    def score(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        The value of each candidate, by which candidates are chosen, weighted and guided.

        :param features: State features of shape (B, S).
        :param candidates: Actions of shape (B, K, A) in [-1, 1].
        :return: Values of shape (B, K).
        """
        return self.aggregate(self.value_candidates(features, candidates))

    def rank(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        :meth:`score` where it only serves to choose or to weigh candidates. A subclass may round it; this class does not.

        :param features: State features of shape (B, S).
        :param candidates: Actions of shape (B, K, A) in [-1, 1].
        :return: Values of shape (B, K).
        """
        return self.score(features, candidates)

    def bootstrap(self, features: th.Tensor, candidates: th.Tensor, scores: th.Tensor) -> th.Tensor:
        """
        What the TD target takes from the next state (Algorithm 1, line 10): the value of its best candidate,
        ``max_i min_c Q_c(s', a'_i)``. The same critics choose and value the candidates.

        :param features: Features of the next states, shape (B, S), for subclasses only.
        :param candidates: Candidates of the next states, shape (B, K, A), for subclasses only.
        :param scores: Scores of these candidates, shape (B, K).
        :return: Values of shape (B, M).
        """
        return scores.max(dim=1, keepdim=True).values

    def transition_values(
        self,
        observation: PyTorchObs,
        actions: th.Tensor,
        next_observation: PyTorchObs,
        next_candidates: ScoredCandidates,
        target: "CandidateCritic",
    ) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """
        Both sides of the TD error, before reward and discount: predictions for (s, a) and what the target takes from s'.

        :param observation: B observations s.
        :param actions: Actions a of the buffer, shape (B, A).
        :param next_observation: The B next observations s', for subclasses only.
        :param next_candidates: Candidates of the next states and their scores.
        :param target: The target critics.
        :return: Predictions of each critic, shape (B, M), with gradients; and :meth:`bootstrap`, (B, M), without.
        """
        with th.no_grad():
            next_values = target.bootstrap(*next_candidates)
        return self(observation, actions), next_values

    def action_gradient(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The score of one action for each state, and its gradient with respect to the action. Parameters get no gradient.

        :param features: State features of shape (B, S).
        :param actions: Actions of shape (B, A).
        :return: Scores of shape (B,), and gradients of shape (B, A).
        """
        with th.enable_grad():
            actions = actions.detach().requires_grad_()
            scores = self.score(features.detach(), actions.unsqueeze(1)).squeeze(1)
            (gradient,) = th.autograd.grad(scores.sum(), actions)
        return scores.detach(), gradient

    def loss(self, q_values: tuple[th.Tensor, ...], targets: th.Tensor) -> th.Tensor:
        """
        The critics' loss (Algorithm 1, line 11): ``sum over critics of mean (Q_c(s, a) - y)^2``.

        :param q_values: Predictions of each critic, shape (B, M), as ``forward()`` returns them.
        :param targets: TD targets y, shape (B, M).
        :return: A scalar.
        """
        return th.stack([F.mse_loss(q_value, targets) for q_value in q_values]).sum()
