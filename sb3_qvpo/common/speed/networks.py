"""
The fast actor and critics: subclasses that override the costly methods. What they do not know, they hand on to the eager ones.

Shapes: B batch, K candidates for each state, A action dimensions, S state features, M numbers that a critic predicts.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.critics import BatchNormCritic, QuantileCritic
from sb3_qvpo.common.diffusion import NoiseNetwork
from sb3_qvpo.common.networks import BatchRenorm1d, Condition, NoisePredictor, is_traced
from sb3_qvpo.common.speed import cpu
from sb3_qvpo.common.speed.settings import candidate_dtype, settings


def is_switched_on() -> bool:
    """Whether fast paths are taken: not if the user has switched them off, nor while a policy is exported or traced."""
    return settings.enabled and not (th.compiler.is_compiling() or is_traced())


class FastActor(DiffusionActor):
    """
    The same actor, faster. Candidates go through the network in blocks, those of one state in fewer calls. Candidates for
    training take bfloat16 if the hardware has it. See :mod:`sb3_qvpo.common.speed.cpu`.
    """

    def sample_candidates(self, features: th.Tensor, noise: th.Tensor, for_training: bool = False) -> th.Tensor:
        """As in :class:`DiffusionActor`; with ``for_training`` hidden layers may be multiplied in bfloat16."""
        predictor, device = self.noise_predictor, features.device
        is_known = type(predictor) is NoisePredictor and predictor.first_layer.weight.dtype == th.float32
        if is_switched_on() and is_known and th.is_grad_enabled():
            network = trainable(predictor, len(features) * noise.shape[2])
            return self.diffusion.sample(network or predictor, predictor.condition(features), noise)
        if not (is_switched_on() and is_known):
            return super().sample_candidates(features, noise, for_training)
        n_states, later_layers = len(features), list(predictor.later_layers)
        has_noise_for_each = noise.shape[1] == n_states
        if has_noise_for_each and n_states == 1 and cpu.cpu_path_exists(later_layers, device):
            return cpu.sample_for_one_state(self.diffusion, predictor, predictor.condition(features), noise)
        if has_noise_for_each and cpu.worth_blocking(later_layers, n_states * noise.shape[2], device):
            dtype = candidate_dtype(device) if for_training else th.float32
            return cpu.sample_in_blocks(self.diffusion, predictor, predictor.condition(features), noise, dtype)
        if for_training and gpu_bfloat16(device) and cpu.is_plain_mlp(later_layers):
            return self.diffusion.sample(in_bfloat16(predictor), predictor.condition(features), noise)
        return super().sample_candidates(features, noise, for_training)

    def denoising_loss(
        self,
        observation: PyTorchObs,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """As in :class:`DiffusionActor`."""
        network = trainable(self.noise_predictor, actions.shape[0] * actions.shape[1]) if is_switched_on() else None
        if network is None:
            return super().denoising_loss(observation, actions, timesteps, noise)
        condition = self.noise_predictor.condition(self.features(observation))
        return self.diffusion.loss(network, actions, condition, timesteps, noise)


class FastCritic(CandidateCritic):
    """
    The same critics, faster. The first layer is split: the state's part is computed once for all candidates of a state. Many
    rows go through in blocks.
    """

    few_rows: ClassVar[int] = 0
    """So many candidates are scored as the eager critics do, because preparing the networks costs more than it saves."""

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """As in SB3: predictions for one action of each observation, for the critics' loss."""
        layers = [list(net) if type(net) is nn.Sequential else [] for net in self.q_networks] if is_switched_on() else []
        fast_layers = [cpu.trainable_layers(each, len(actions)) for each in layers]
        if not any(fast_layers):
            return super().forward(cast(th.Tensor, obs), actions)
        with th.set_grad_enabled(not self.share_features_extractor):  # the actor's loss trains a shared extractor
            features = self.features(obs)
        results = []
        for q_network, each in zip(self.q_networks, fast_layers, strict=True):
            hidden = th.cat([features, actions], dim=1)
            for layer in each or [q_network]:
                hidden = layer(hidden)
            results.append(hidden)
        return tuple(results)

    def plain_networks(self) -> list[cpu.Layers] | None:
        """
        The networks as linear layers with activations between them, for rows without gradients to the parameters.

        :return: The layers of each critic; None if a network is something else.
        """
        return plain_or_none(self.q_networks)

    def value_candidates(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """As in :class:`CandidateCritic`."""
        return self._value(features, candidates, th.float32)

    def rank(self, features: th.Tensor, candidates: th.Tensor) -> th.Tensor:
        """As in :class:`CandidateCritic`; on the CPU hidden layers may be multiplied in bfloat16."""
        if is_switched_on() and self._scores_are_known():
            return self.aggregate(self._value(features, candidates, candidate_dtype(candidates.device)))
        return super().rank(features, candidates)

    def _scores_are_known(self) -> bool:
        own = type(self)
        return own.score is CandidateCritic.score and own.value_candidates is FastCritic.value_candidates

    def _value(self, features: th.Tensor, candidates: th.Tensor, dtype: th.dtype) -> th.Tensor:
        n_rows = candidates.shape[0] * candidates.shape[1]
        networks = self.plain_networks() if is_switched_on() and n_rows > self.few_rows else None
        if networks is None:
            return super().value_candidates(features, candidates)
        predictions = []
        for first_layer, *later_layers in networks:
            state_weight, action_weight = th.split(first_layer.weight, [features.shape[-1], candidates.shape[-1]], dim=1)
            state_part = F.linear(features, state_weight, first_layer.bias).unsqueeze(1)
            if first_layer.weight.dtype == th.float32 and cpu.worth_blocking(later_layers, n_rows, features.device):
                predictions.append(cpu.value_in_blocks([first_layer, *later_layers], state_part, candidates, dtype))
                continue
            # Rows, as the eager critics have them: a layer may treat other axes in a way of its own
            hidden = (F.linear(candidates, action_weight) + state_part).flatten(0, 1)
            for layer in (hidden.requires_grad and cpu.trainable_layers(later_layers, n_rows)) or later_layers:
                hidden = layer(hidden)
            predictions.append(hidden.view(*candidates.shape[:2], hidden.shape[-1]))
        return th.stack(predictions)

    def action_gradient(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """As in :class:`CandidateCritic`. Nothing is kept for gradients of the parameters."""
        with th.no_grad():
            networks = self.plain_networks() if is_switched_on() and self._scores_are_known() else None
        if networks is None:
            return super().action_gradient(features, actions)
        features = features.detach()
        if all(type(activation) is nn.ReLU for layers in networks for activation in layers[1::2]):
            with th.no_grad():
                parts = [relu_network(layers, features, actions.detach()) for layers in networks]
            with th.enable_grad():
                predictions = th.stack([part for part, _ in parts]).requires_grad_()
                scores = self.aggregate(predictions)
                (gradients,) = th.autograd.grad(scores.sum(), predictions)
            with th.no_grad():
                of_actions = [pull_back(gradient) for (_, pull_back), gradient in zip(parts, gradients, strict=True)]
                return scores.detach(), th.stack(of_actions).sum(dim=0)
        with th.enable_grad():
            actions = actions.detach().requires_grad_()
            predictions = th.stack([through_constants(layers, features, actions) for layers in networks])
            scores = self.aggregate(predictions)
            (gradient,) = th.autograd.grad(scores.sum(), actions)
        return scores.detach(), gradient


Pullback = Callable[[th.Tensor], th.Tensor]
"""From a gradient with respect to outputs to that with respect to inputs."""


def relu_network(layers: cpu.Layers, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, Pullback]:
    """
    What a critic with ReLU predicts, shape (B, M), and how gradients go back to the actions (B, A). Autograd takes half as
    long again for the same products.
    """
    first_layer, *later_layers = layers
    state_weight, action_weight = th.split(first_layer.weight, [features.shape[-1], actions.shape[-1]], dim=1)
    hidden = F.linear(features, state_weight, first_layer.bias).addmm_(actions, action_weight.t())
    linears, inputs = later_layers[1::2], []
    for linear in linears:
        inputs.append(hidden.clamp_(min=0))
        hidden = F.linear(inputs[-1], linear.weight, linear.bias)

    def pull_back(gradient: th.Tensor) -> th.Tensor:
        for linear, x in zip(reversed(linears), reversed(inputs), strict=True):
            gradient = th.ops.aten.threshold_backward(gradient @ linear.weight, x, 0)
        return gradient @ action_weight

    return hidden, pull_back


def through_constants(layers: cpu.Layers, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """What a critic predicts, shape (B, M), with gradients to the actions (B, A) and none to the parameters."""
    first_layer, *later_layers = layers
    weight, bias = first_layer.weight.detach(), first_layer.bias.detach()
    state_weight, action_weight = th.split(weight, [features.shape[-1], actions.shape[-1]], dim=1)
    hidden = F.linear(actions, action_weight) + F.linear(features, state_weight, bias)
    for layer in cpu.trainable_layers(later_layers, len(actions)) or later_layers:
        if isinstance(layer, cpu.LINEAR):
            hidden = F.linear(hidden, layer.weight.detach(), layer.bias.detach())
        else:
            hidden = layer(hidden)
    return hidden


class FastBatchNormCritic(FastCritic, BatchNormCritic):
    """
    Critics with batch normalisation, faster: where candidates are scored, each norm is folded into the linear layer behind it.
    """

    few_rows: ClassVar[int] = 512  # folding both critics takes as long as scoring a hundred candidates

    def plain_networks(self) -> list[cpu.Layers] | None:
        """As in :class:`FastCritic`: new layers, without norms. None in training mode."""
        if self.training or th.is_grad_enabled() or not all(can_be_folded(q_network) for q_network in self.q_networks):
            return None
        # Made each time: several threads may decide at once, and what inference mode makes is of no use outside it
        return [folded(cast(nn.Sequential, q_network)) for q_network in self.q_networks]


def can_be_folded(q_network: nn.Module) -> bool:
    """Whether a network is norm, linear layer, activation, norm, ..., linear layer, all in float32."""
    if type(q_network) is not nn.Sequential or len(q_network) % 3 != 2:
        return False
    norms, linears = list(q_network)[::3], list(q_network)[1::3]
    return (
        all(type(norm) in (nn.BatchNorm1d, BatchRenorm1d) and norm.affine and norm.track_running_stats for norm in norms)
        and all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
        and all(layer.weight.dtype == th.float32 for layer in (*norms, *linears))
    )


def folded(q_network: nn.Sequential) -> cpu.Layers:
    """
    The layers of a network without its norms. Its linear layers do what norm and linear layer do together in evaluation mode:
    ``W (scale (x - mean) + shift) + b = (W scale) x + (b + W (shift - scale mean))``.
    """
    layers: list[Any] = []
    for norm, linear, *activation in triples_of_layers(q_network):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = th.addcmul(norm.bias, scale, norm.running_mean, value=-1)
        layers += [cpu.ConstantLinear(linear.weight * scale, th.addmv(linear.bias, linear.weight, shift)), *activation]
    return layers


def triples_of_layers(q_network: nn.Sequential) -> list[list[Any]]:
    """Norm, linear layer and activation, again and again; the last has no activation."""
    layers = list(q_network)
    return [layers[i : i + 3] for i in range(0, len(layers), 3)]


class FastQuantileCritic(FastCritic, QuantileCritic):
    """Critics that predict quantiles, faster, as :class:`FastCritic`."""


def plain_or_none(q_networks: Sequence[nn.Module]) -> list[cpu.Layers] | None:
    """The layers of the networks if each of them splits into linear layers and activations, else None."""
    known = all(splits_into_linear_and_rest(q_network) for q_network in q_networks)
    return [list(cast(nn.Sequential, q_network)) for q_network in q_networks] if known else None


def splits_into_linear_and_rest(q_network: nn.Module) -> bool:
    """Whether a network is a linear layer, then activations and linear layers in turn. These treat each row alone."""
    if type(q_network) is not nn.Sequential or type(q_network[0]) is not nn.Linear:
        return False
    return len(q_network) == 1 or cpu.is_plain_mlp(list(q_network)[1:])


def trainable(predictor: NoisePredictor, n_rows: int) -> NoiseNetwork | None:
    """The noise predictor for a loss, with Mish and its gradient in vectorised passes. None if that does not pay."""
    layers = cpu.trainable_layers(list(predictor.later_layers), n_rows) if type(predictor) is NoisePredictor else None
    if layers is None:
        return None

    def network(x_t: th.Tensor, t: int | th.Tensor, cond: Condition) -> th.Tensor:
        hidden = predictor.first_output(x_t, t, cond)
        for layer in layers:
            hidden = layer(hidden)
        return hidden

    return network


def gpu_bfloat16(device: th.device) -> bool:
    """Whether candidates for training have their hidden layers in bfloat16 on a device that is not the CPU."""
    return device.type != "cpu" and candidate_dtype(device) == th.bfloat16


def in_bfloat16(predictor: NoisePredictor) -> NoiseNetwork:
    """
    The noise predictor with its hidden layers in bfloat16, for GPUs, which have fast kernels of their own.

    A snapshot: weights that change later are not seen. The first and the last layer are multiplied in float32.
    """
    *hidden_modules, last_activation, last_layer = predictor.later_layers
    hidden_layers = [
        (activation, cast(nn.Linear, linear).weight.bfloat16(), cast(nn.Linear, linear).bias.bfloat16())
        for activation, linear in zip(hidden_modules[::2], hidden_modules[1::2], strict=True)
    ]

    def network(x_t: th.Tensor, t: int, cond: Condition) -> th.Tensor:
        hidden = predictor.first_output(x_t, t, cond)
        for activation, weight, bias in hidden_layers:
            # Kernels compute activations in float32 and round what they return
            hidden = F.linear(activation(hidden).bfloat16(), weight, bias)
        return cast(th.Tensor, last_layer(last_activation(hidden.float())))

    return network
