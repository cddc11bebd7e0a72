"""
The networks of DTQL: the one-step policy, the cloned diffusion policy, and critics with a value function.

Shapes: B batch, K candidates for each state, A action dimensions, S state features.
"""

from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.diffusion import DiffusionProcess, NoiseNetwork
from sb3_qvpo.common.edm import ElucidatedDiffusion
from sb3_qvpo.common.networks import ContinuousTimePredictor
from sb3_qvpo.dtql.losses import squashed_log_density

LOG_STD_RANGE = (-5.0, 2.0)
"""Of the Gaussian policy, as in the authors' code."""


class OneStep(DiffusionProcess):
    """No chain: the network turns noise into an action at once. So there is nothing to be noised, and no loss."""

    n_steps = n_noises = 1

    def add_noise(self, x0: th.Tensor, t: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Not there."""
        raise NotImplementedError("a one-step policy adds no noise to actions")

    def posterior(self, x0: th.Tensor, x_t: th.Tensor, t: int) -> tuple[th.Tensor, float]:
        """Not there."""
        raise NotImplementedError("a one-step policy has no reverse steps")

    def sample(self, network: NoiseNetwork, cond: Any, noise: th.Tensor) -> th.Tensor:
        """
        One pass.

        :param network: :class:`GaussianPolicy` or :class:`ImplicitPolicy`.
        :param cond: What its ``condition()`` returned.
        :param noise: Standard normal noise of shape (1, B, K, A).
        :return: Actions of shape (B, K, A) in [-1, 1].
        """
        return network(noise[0], 0, cond)

    def loss(self, network: NoiseNetwork, x0: th.Tensor, cond: Any, t: Any = None, noise: Any = None) -> th.Tensor:
        """Not there."""
        raise NotImplementedError("a one-step policy has no denoising loss; see DTQL's trust region")


class GaussianPolicy(nn.Module):
    """
    ``a = tanh(mean(s) + std(s) epsilon)``. Weights start orthogonal, biases at 0.

    :param action_dim: A.
    :param features_dim: S.
    :param net_arch: Widths of the hidden layers.
    :param activation_fn: Activation function.
    """

    def __init__(self, action_dim: int, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*create_mlp(features_dim, 2 * action_dim, net_arch, activation_fn))
        start_orthogonal(self)

    def condition(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The normal distribution before tanh.

        :param features: Shape (B, S).
        :return: Its mean and the logarithm of its deviation, shape (B, 1, A) each.
        """
        mean, log_std = self.layers(features).unsqueeze(1).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def forward(self, x_t: th.Tensor, t: Any, cond: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        """
        Actions from noise.

        :param x_t: Standard normal noise of shape (B, K, A).
        :param t: Not used.
        :param cond: Result of :meth:`condition`.
        :return: Actions of shape (B, K, A).
        """
        mean, log_std = cond
        return (mean + log_std.exp() * x_t).tanh()

    def log_density(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        How likely actions are, see :func:`~sb3_qvpo.dtql.losses.squashed_log_density`.

        :param features: Shape (B, S).
        :param actions: Shape (B, K, A), in [-1, 1].
        :return: Shape (B, K).
        """
        return squashed_log_density(actions, *self.condition(features))


class ImplicitPolicy(nn.Module):
    """
    ``a = tanh(f(epsilon, s))``: any distribution, without a density. The state's part of the first layer is computed once.

    The arguments are those of :class:`GaussianPolicy`.
    """

    def __init__(self, action_dim: int, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module]):
        super().__init__()
        _, *later = create_mlp(action_dim + features_dim, action_dim, net_arch, activation_fn)
        self.first_layer = nn.Linear(action_dim + features_dim, [*net_arch, action_dim][0])
        self.later_layers = nn.Sequential(*later)
        self.split_sizes = [action_dim, features_dim]
        start_orthogonal(self)

    def condition(self, features: th.Tensor) -> th.Tensor:
        """
        The state's part.

        :param features: Shape (B, S).
        :return: Shape (B, 1, H).
        """
        _, state_weight = th.split(self.first_layer.weight, self.split_sizes, dim=1)
        return F.linear(features, state_weight, self.first_layer.bias).unsqueeze(1)

    def forward(self, x_t: th.Tensor, t: Any, cond: th.Tensor) -> th.Tensor:
        """
        Actions from noise.

        :param x_t: Standard normal noise of shape (B, K, A).
        :param t: Not used.
        :param cond: Result of :meth:`condition`.
        :return: Actions of shape (B, K, A).
        """
        noise_weight, _ = th.split(self.first_layer.weight, self.split_sizes, dim=1)
        actions: th.Tensor = self.later_layers(F.linear(x_t, noise_weight) + cond).tanh()
        return actions


ONE_STEP_POLICIES: dict[str, type[GaussianPolicy] | type[ImplicitPolicy]]
ONE_STEP_POLICIES = {"gaussian": GaussianPolicy, "implicit": ImplicitPolicy}
"""The policies that can be asked for by name."""


def start_orthogonal(module: nn.Module) -> None:
    """Orthogonal weights and biases of 0 for all linear layers in a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)


class OneStepActor(DiffusionActor):
    """
    The policy that acts. One pass of its network makes an action from noise.

    :param args: Positional arguments of :class:`DiffusionActor`.
    :param one_step_policy: ``"gaussian"`` or ``"implicit"``.
    :param kwargs: Keyword arguments of :class:`DiffusionActor`.
    """

    def __init__(self, *args: Any, one_step_policy: str = "gaussian", **kwargs: Any):
        self._one_step_policy = one_step_policy
        super().__init__(*args, **kwargs)
        self._constructor_arguments["one_step_policy"] = one_step_policy

    def make_diffusion(self, n_steps: int, noise_schedule: Any, **options: Any) -> DiffusionProcess:
        """
        Create the process.

        :param n_steps: Not used.
        :param noise_schedule: Not used.
        :param options: Not used.
        :return: :class:`OneStep`.
        """
        return OneStep()

    def make_noise_predictor(
        self,
        features_dim: int,
        n_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        time_embedding_dim: int,
    ) -> Any:
        """
        Create the network.

        :param features_dim: S.
        :param n_steps: Not used.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :param time_embedding_dim: Not used.
        :return: A :class:`GaussianPolicy` or an :class:`ImplicitPolicy`.
        """
        return ONE_STEP_POLICIES[self._one_step_policy](self.action_dim, features_dim, net_arch, activation_fn)


class ClonedActor(DiffusionActor):
    """
    The diffusion model of the data's actions. It judges the policy's actions; nobody acts by it.

    The arguments are those of :class:`DiffusionActor`; ``diffusion_options`` are those of
    :class:`~sb3_qvpo.common.edm.ElucidatedDiffusion`.
    """

    def make_diffusion(self, n_steps: int, noise_schedule: Any, **options: Any) -> DiffusionProcess:
        """
        Create the process.

        :param n_steps: Not used.
        :param noise_schedule: Not used.
        :param options: Arguments of :class:`~sb3_qvpo.common.edm.ElucidatedDiffusion`.
        :return: The process.
        """
        return ElucidatedDiffusion(**options)

    def make_noise_predictor(
        self,
        features_dim: int,
        n_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        time_embedding_dim: int,
    ) -> ContinuousTimePredictor:
        """
        Create the denoiser's network.

        :param features_dim: S.
        :param n_steps: Not used.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :param time_embedding_dim: Size of the time embedding.
        :return: The network.
        """
        options = dict(activation_fn=activation_fn, time_embedding_dim=time_embedding_dim, **self._network_options)
        return ContinuousTimePredictor(self.action_dim, features_dim, net_arch, **options)


class ImplicitCritic(CandidateCritic):
    """
    Critics of implicit Q-learning: twins with layer normalisation, and a value function V(s) that no policy enters.

    The arguments are those of :class:`CandidateCritic`, all as keywords.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.value_network = nn.Sequential(*create_mlp(self.features_dim, 1, kwargs["net_arch"], kwargs["activation_fn"]))

    def make_q_network(self, n_inputs: int, net_arch: list[int], activation_fn: type[nn.Module]) -> nn.Module:
        """
        Create the network of one critic: a layer norm after each hidden linear layer.

        :param n_inputs: Number of inputs, S + A.
        :param net_arch: Widths of the hidden layers.
        :param activation_fn: Activation function.
        :return: A network from rows (R, S + A) to (R, 1).
        """
        return nn.Sequential(*create_mlp(n_inputs, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm]))

    def state_values(self, features: th.Tensor) -> th.Tensor:
        """
        V(s).

        :param features: Shape (B, S).
        :return: Shape (B,).
        """
        values: th.Tensor = self.value_network(features).squeeze(-1)
        return values
