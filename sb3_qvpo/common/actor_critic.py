"""
The networks of a diffusion policy for Stable-Baselines3: the actor, which draws candidates, and the critics, which value them.

Shapes: B batch, K candidates for each state, A action dimensions, S state features, T diffusion steps, C critics.
Actions are scaled to [-1, 1].
"""

import functools
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

import sb3_qvpo.common.fast as fast
from sb3_qvpo.common.diffusion import GaussianDiffusion, NoiseNetwork
from sb3_qvpo.common.networks import NoisePredictor, init_linear_layers
from sb3_qvpo.common.noise_schedules import NoiseSchedule, make_betas


class DiffusionActor(BasePolicy):
    """
    The diffusion policy pi_theta(a | s): a features extractor, a noise predictor and the chain that turns noise into actions.

    :param observation_space: Observation space.
    :param action_space: Action space, a finite ``Box``.
    :param net_arch: Widths of the noise predictor's hidden layers.
    :param features_extractor: Network that turns an observation into features.
    :param features_dim: Number of features S.
    :param activation_fn: Activation function.
    :param normalize_images: Whether to divide images by 255.
    :param n_diffusion_steps: Number of diffusion steps T.
    :param noise_schedule: Name of a noise schedule or a function T -> betas, see :mod:`sb3_qvpo.common.noise_schedules`.
    :param time_embedding_dim: Size of the time embedding.
    :param n_sampling_steps: Reverse steps of a sample, see :class:`GaussianDiffusion`.
    :param sampling_eta: Factor of the noise in the reverse steps, see :class:`GaussianDiffusion`.
    """

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
        noise_schedule: str | NoiseSchedule = "cosine",
        time_embedding_dim: int = 32,
        n_sampling_steps: int | None = None,
        sampling_eta: float = 1.0,
    ):
        constructor_arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self._constructor_arguments = constructor_arguments
        self.action_dim = get_action_dim(action_space)
        betas = make_betas(noise_schedule, n_diffusion_steps)
        self.diffusion = GaussianDiffusion(betas, n_sampling_steps=n_sampling_steps, sampling_eta=sampling_eta)
        self.noise_predictor = NoisePredictor(
            self.action_dim, features_dim, n_diffusion_steps, net_arch, activation_fn, time_embedding_dim
        )

    def features(self, observation: PyTorchObs) -> th.Tensor:
        """
        Encode observations.

        :param observation: B observations.
        :return: Features of shape (B, S).
        """
        return self.extract_features(observation, self.features_extractor)

    def sample_candidates(
        self,
        features: th.Tensor,
        n_candidates: int,
        noise: th.Tensor | None = None,
        reduced_precision: bool = False,
        n_shared_steps: int = 0,
    ) -> th.Tensor:
        """
        Draw candidates from pi_theta (Algorithm 1, line 5). The state enters the network once for all candidates and steps.

        :param features: State features of shape (B, S).
        :param n_candidates: Candidates K for each state.
        :param noise: Standard normal noise of shape (T, B, K, A), see :meth:`GaussianDiffusion.sample`. Drawn if None.
        :param reduced_precision: Whether hidden layers may be multiplied in bfloat16, see :mod:`sb3_qvpo.common.fast`.
        :param n_shared_steps: First steps that are shared by all candidates of a state, see :meth:`GaussianDiffusion.sample`.
        :return: Actions of shape (B, K, A) in [-1, 1].
        """
        condition = self.noise_predictor.condition(features)
        if noise is None:
            noise = self.draw_noise(len(features), n_candidates)
        n_rows, later_layers = features.shape[0] * noise.shape[2], list(self.noise_predictor.later_layers)
        if noise.shape[1] == features.shape[0] == 1 and n_shared_steps == 0 and fast.applies(later_layers, features.device):
            return fast.sample_for_one_state(self.diffusion, self.noise_predictor, condition, noise)
        if fast.pays_off(later_layers, n_rows, features.device) and noise.shape[1] == len(features):
            dtype = fast.candidate_dtype(features.device) if reduced_precision else th.float32
            return fast.sample_candidates(self.diffusion, self.noise_predictor, condition, noise, dtype, n_shared_steps)
        network: NoiseNetwork = self.noise_predictor
        if reduced_precision and fast.reduces(features.device):
            network = fast.reduced(self.noise_predictor)
        return self.diffusion.sample(network, condition, noise, n_shared_steps=n_shared_steps)

    def draw_noise(self, n_states: int, n_candidates: int) -> th.Tensor:
        """
        Noise of reverse chains.

        :param n_states: B.
        :param n_candidates: Candidates K of each state.
        :return: Standard normal noise of shape (N, B, K, A); N is T unless samples take fewer steps.
        """
        return th.randn(self.diffusion.n_noises, n_states, n_candidates, self.action_dim, device=self.device)

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
        network = fast.trainable(self.noise_predictor, actions.shape[0] * actions.shape[1])
        return self.diffusion.loss(network, actions, condition, timesteps, noise)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        One action for each observation, not chosen among candidates.

        :param observation: B observations.
        :param deterministic: Not used: a single draw of a diffusion policy is always random.
        :return: Actions of shape (B, A) in [-1, 1].
        """
        return self._predict(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.sample_candidates(self.features(observation), n_candidates=1).squeeze(1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return self._constructor_arguments


class CandidateCritic(ContinuousCritic):
    """
    SB3's critics, able to value many candidates of a state without repeating the state. Parameters as in SB3.

    :param args: Positional arguments of SB3's ``ContinuousCritic``.
    :param kwargs: Keyword arguments of SB3's ``ContinuousCritic``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for q_network in self.q_networks:
            init_linear_layers(q_network)

    def features(self, observation: PyTorchObs) -> th.Tensor:
        """
        Encode observations.

        :param observation: B observations.
        :return: Features of shape (B, S).
        """
        return self.extract_features(observation, self.features_extractor)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        Values of one action for each observation, for the critics' loss.

        :param obs: B observations.
        :param actions: Actions of shape (B, A) in [-1, 1].
        :return: Values of shape (B, 1) for each critic.
        """
        with th.set_grad_enabled(not self.share_features_extractor):  # shared ones are trained by the actor's loss
            features = self.features(obs)
        rows = th.cat([features, actions], dim=1)
        return tuple(self._value(q_network, rows) for q_network in self.q_networks)

    @staticmethod
    def _value(q_network: nn.Module, rows: th.Tensor) -> th.Tensor:
        layers = list(q_network) if type(q_network) is nn.Sequential else []
        fast_layers = fast.trainable_layers(layers, len(rows))
        if all(layer is fast_layer for layer, fast_layer in zip(layers, fast_layers, strict=True)):
            return cast(th.Tensor, q_network(rows))
        return functools.reduce(lambda hidden, layer: layer(hidden), fast_layers, rows)

    def value_candidates(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """
        Values of all candidates. The first layer is split: the state's part is computed once for all its candidates.

        :param features: State features of shape (B, S).
        :param candidates: Actions of shape (B, K, A) in [-1, 1].
        :return: Values of shape (C, B, K).
        """
        q_values = []
        for q_network in self.q_networks:
            first_layer, *later_layers = cast(nn.Sequential, q_network)
            first_weight, first_bias = cast(nn.Linear, first_layer).weight, cast(nn.Linear, first_layer).bias
            state_weight, action_weight = th.split(first_weight, [features.shape[-1], candidates.shape[-1]], dim=1)
            state_part = F.linear(features, state_weight, first_bias).unsqueeze(1)
            if fast.pays_off(later_layers, candidates.shape[0] * candidates.shape[1], features.device):
                q_values.append(fast.value_candidates(cast(nn.Sequential, q_network), state_part, candidates))
                continue
            hidden = F.linear(candidates, action_weight) + state_part
            for layer in later_layers:
                hidden = layer(hidden)
            q_values.append(hidden.squeeze(-1))
        return th.stack(q_values)
