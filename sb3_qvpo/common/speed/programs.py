"""
Decisions for one state as one program: compiled to C++ on the CPU, a graph on a GPU.

No mathematics is defined here. :meth:`DiffusionProcess.sample` runs the chain as always, with a network that returns what
:class:`NoisePredictor` returns. ``torch.compile`` turns both into one C++ function. An eager decision is a few hundred calls
of torch, which cost more than the numbers. Updates are not compiled: it would save a tenth (see ``docs/speed.md``).

Compiling takes 10 to 20 s for each number of candidates, once on a machine (torch keeps the result on disk). Capturing a graph
takes as long as a few decisions. The graph runs the same kernels that the eager functions launch one by one. So a GPU captures
the decisions of known networks without being asked, after :data:`EAGER_DECISIONS` of them. No saved file holds programs. If
one fails, there is one warning, and all goes on eagerly.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any, Protocol, cast

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.critics import BatchNormCritic, QuantileCritic
from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.networks import NoisePredictor, evaluation_mode, n_observations
from sb3_qvpo.common.speed import cpu
from sb3_qvpo.common.speed.graphs import EAGER_DECISIONS, ScoringGraph, squeezed
from sb3_qvpo.common.speed.networks import FastActor, FastCritic, is_switched_on, plain_or_none
from sb3_qvpo.common.speed.settings import settings

LinearParameters = Sequence[tuple[th.Tensor, th.Tensor]]
"""Weights and biases of linear layers."""

Activation = Callable[[th.Tensor], th.Tensor]
"""An activation function."""

NARROW, FEW_ROWS = 32, 8
"""Inputs or outputs, and rows, up to which a linear layer is part of the program and no call of a library."""

SMALLEST_ONEDNN = 32
"""Candidates from which oneDNN is faster than MKL, at a width of 256."""

TOLERANCE = 1e-3
"""Largest difference of actions, and of scores relative to the largest, between a program and the eager functions."""

MOST_PROGRAMS = 4
"""
At most this many candidate counts of a policy are compiled (and, on a GPU, captured) automatically. Otherwise a schedule of
counts could spend hours compiling.
"""

COMPILE_AFTER, LONG_RUN = 10_000, 100_000
"""Environment steps after which actions are compiled, and those that ``learn()`` must have for it: see ``docs/speed.md``."""


def mish(x: th.Tensor) -> th.Tensor:
    """Mish with one exponential, to 2e-6; see :func:`sb3_qvpo.common.speed.cpu.mish_of_negated`."""
    sigmoid = th.sigmoid(-x)
    return 2 * x / (1 + sigmoid * sigmoid) - x


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """A linear layer (K, inputs) -> (K, outputs). Spelled out for sizes at which libraries for large matrices are slow."""
    if x.shape[1] <= NARROW:
        return (x.unsqueeze(-1) * weight.t()).sum(-2) + bias
    if len(weight) <= NARROW or len(x) <= FEW_ROWS:
        return (x.unsqueeze(-2) * weight).sum(-1) + bias
    return F.linear(x, weight, bias)


def linear_layers(layers: nn.Module | cpu.Layers) -> LinearParameters:
    """Weights and biases of the linear layers among some layers, in their order."""
    return [(layer.weight, layer.bias) for layer in cast(cpu.Layers, layers) if isinstance(layer, cpu.LINEAR)]


def through(hidden: th.Tensor, layers: LinearParameters, activation: Activation) -> th.Tensor:
    """Rows through activation, linear layer, activation, ..., linear layer."""
    for weight, bias in layers:
        hidden = linear(activation(hidden), weight, bias)
    return hidden


def activation_of(layers: nn.Sequential | cpu.Layers) -> Activation:
    """The activation behind the first layer, if there is one."""
    activation = cast(nn.Module, layers[1]) if len(layers) > 1 else nn.Identity()
    return mish if type(activation) is nn.Mish else activation.forward


def plain_networks(critic: CandidateCritic) -> list[cpu.Layers] | None:
    """The critics' networks as linear layers and activations, None if they are something else."""
    return critic.plain_networks() if isinstance(critic, FastCritic) else plain_or_none(critic.q_networks)


class ScoringProgram:
    """
    The candidates of one state and their scores, compiled.

    Weights are passed at each call, so that updates are seen.
    """

    def __init__(self, actor: DiffusionActor, critic: CandidateCritic):
        self.actor, self.critic = actor, critic
        self.activation = activation_of(actor.noise_predictor.time_mlp)
        networks = plain_networks(critic)
        self.critic_activation = activation_of(networks[0]) if networks else self.activation
        # A code object of its own, because torch compiles only a few programs for each
        function = FunctionType(ScoringProgram._score.__code__.replace(), globals())
        options: dict[str, Any] = {"cpp_wrapper": True}
        self.program = th.compile(MethodType(function, self), fullgraph=True, dynamic=False, options=options)

    def __call__(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw candidates from noise (N, 1, K, A) and score them. Features of the state are (1, S), the candidates (1, K, A),
        their scores (1, K).
        """
        # torch would compile another program for another layout, or for the same tensor twice
        actor_features, noise = actor_features.contiguous(), noise.contiguous()
        critic_features = actor_features.clone() if critic_features is actor_features else critic_features.contiguous()
        predictor = self.actor.noise_predictor
        time_layers = linear_layers(predictor.time_mlp)
        actor_layers = linear_layers([predictor.first_layer, *cast(Any, predictor.later_layers)])
        with evaluation_mode(self.critic):
            critic_layers = [linear_layers(q_network) for q_network in plain_networks(self.critic) or []]
        arguments = (actor_features, critic_features, noise, predictor.time_features, time_layers, actor_layers, critic_layers)
        with cpu.OneDnnProducts() if noise.shape[2] >= SMALLEST_ONEDNN else nullcontext():
            scored: tuple[th.Tensor, th.Tensor] = self.program(*arguments)
        return scored

    def _score(
        self,
        actor_features: th.Tensor,
        critic_features: th.Tensor,
        noise: th.Tensor,
        time_features: th.Tensor,
        time_layers: LinearParameters,
        actor_layers: LinearParameters,
        critic_layers: Sequence[LinearParameters],
    ) -> tuple[th.Tensor, th.Tensor]:
        (first_weight, first_bias), *later_layers = actor_layers
        sizes = self.actor.noise_predictor.split_sizes
        action_weight, time_weight, state_weight = th.split(first_weight, sizes, dim=1)
        embedding = through(linear(time_features, *time_layers[0]), time_layers[1:], self.activation)
        biases = linear(embedding, time_weight, linear(actor_features, state_weight, first_bias).squeeze(0))

        def network(x_t: th.Tensor, t: int, cond: None) -> th.Tensor:
            return through(linear(x_t, action_weight, biases[t]), later_layers, self.activation)

        candidates = self.actor.diffusion.sample(network, None, noise.squeeze(1))
        q_values = []
        for (weight, bias), *layers in critic_layers:
            state_weight, action_weight = th.split(weight, [critic_features.shape[1], candidates.shape[1]], dim=1)
            hidden = linear(candidates, action_weight, linear(critic_features, state_weight, bias).squeeze(0))
            q_values.append(through(hidden, layers, self.critic_activation))
        return candidates.unsqueeze(0), self.critic.aggregate(th.stack(q_values)).unsqueeze(0)


Program = ScoringProgram | ScoringGraph


class DecidingPolicy(Protocol):
    """What programs need of a policy."""

    @property
    def actor(self) -> DiffusionActor:
        """The actor."""

    @property
    def critic(self) -> CandidateCritic:
        """The critics."""

    def _scores_as_known(self) -> bool:
        """Whether it scores candidates as a program does."""

    def encode(self, observation: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Features of the actor and of the critics."""


class Programs:
    """
    The programs of a policy's decisions: which exist, when one is made, and which decision uses one.

    A program that the user asked for (:meth:`compile`) serves all decisions. A program that ``learn()`` compiles on its own
    only chooses the actions that it collects. So predictions are those of a loaded model, bit for bit. A graph that a GPU
    captures on its own serves all decisions, because it does not change a bit of them.

    No saved file holds programs, and a copy of a policy starts without.
    """

    def __init__(self) -> None:
        self.by_count: dict[int, Program | None] = {}
        """Programs by number of candidates, None for one that failed."""
        self.for_predictions: set[int] = set()
        """Numbers of candidates whose programs the user asked for."""
        self.automatic: dict[int, Program | None] = {}
        """Graphs made automatically. Kept apart, because a checkpoint lists the others."""
        self.eager_decisions: Counter[int] = Counter()
        """Decisions on a GPU that were not captured, by number of candidates."""
        self._collects = False

    def __reduce__(self) -> tuple[type["Programs"], tuple[()]]:
        return type(self), ()

    def compile(self, policy: DecidingPolicy, n_candidates: int, for_predictions: bool = True) -> bool:
        """
        Make a program for a number of candidates, and say whether there is one. If it fails there is a warning.

        A program is made again only after the policy was moved to another kind of device. If the user did not ask for it
        (``for_predictions``), at most :data:`MOST_PROGRAMS` are made, and none that has failed before.
        """
        if not settings.enabled:
            return False
        if for_predictions:
            self.for_predictions.add(n_candidates)
        if isinstance(self.by_count.get(n_candidates), ScoringProgram if is_on_gpu(policy.actor) else ScoringGraph):
            del self.by_count[n_candidates]  # the policy was moved here from another device
        is_new = n_candidates not in self.by_count and len(self.by_count) < MOST_PROGRAMS
        if is_new or (for_predictions and self.by_count.get(n_candidates) is None):
            self.by_count[n_candidates] = self._make(policy, n_candidates)
        return self.by_count.get(n_candidates) is not None

    @contextmanager
    def collecting(self, policy: DecidingPolicy, n_candidates: int, n_steps: int, total: int, n_envs: int) -> Iterator[None]:
        """
        A context in which decisions are those of ``learn()``. Long runs compile them after some steps, if there is one
        environment, because programs serve one state.

        The count of this ``learn()``'s environment steps so far, ``n_steps`` of ``total``, decides. So the same seed gives the
        same run, even one that is interrupted and resumed.
        """
        is_known = policy._scores_as_known()
        if is_known and n_envs == 1 and n_steps >= COMPILE_AFTER and total >= LONG_RUN and settings.compile_actions:
            self.compile(policy, n_candidates, for_predictions=False)
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    def score(
        self, policy: DecidingPolicy, observation: PyTorchObs, noise: th.Tensor | int
    ) -> tuple[th.Tensor, th.Tensor] | None:
        """
        The candidates of one state, (1, K, A), and their scores, (1, K), by a program. None if no program serves this
        decision.

        The policy is in evaluation mode. Noise is (N, 1, K, A), or K if it is drawn here.
        """
        n_candidates = noise if isinstance(noise, int) else noise.shape[2]
        program = self.find(policy, n_candidates) if n_observations(observation) == 1 else None
        if program is None:
            return None
        noise = policy.actor.draw_noise(1, n_candidates) if isinstance(noise, int) else noise
        try:
            return program(*policy.encode(observation), noise)
        except Exception as error:  # torch compiles anew for another number of threads, which may fail
            for store in (self.by_count, self.automatic):
                if store.get(n_candidates) is program:
                    store[n_candidates] = None
            warn_of_eager_decisions(error, isinstance(program, ScoringGraph))
            return None

    def find(self, policy: DecidingPolicy, n_candidates: int) -> Program | None:
        """
        The program for a decision that is about to be taken. None if there is none, with gradients, without fast paths, and
        while a policy is exported. On a GPU decisions are counted, and after some captured.
        """
        if not is_switched_on() or th.is_grad_enabled():
            return None
        on_gpu = is_on_gpu(policy.actor)
        if on_gpu and _is_being_captured():
            return None
        serves = self._collects or n_candidates in self.for_predictions
        program = self.by_count.get(n_candidates) if serves else None
        # A policy that was moved from one kind of device to another has no program there
        if on_gpu:
            return program if isinstance(program, ScoringGraph) else self._automatic_graph(policy, n_candidates)
        return program if isinstance(program, ScoringProgram) else None

    def tried_counts(self) -> tuple[list[int], list[int]]:
        """All counts that were compiled, in their order, failed ones included. And those that the user asked for."""
        return list(self.by_count), sorted(self.for_predictions)

    def _automatic_graph(self, policy: DecidingPolicy, n_candidates: int) -> Program | None:
        """Capture automatically after N eager decisions. After one failure never again for that count."""
        if not settings.compile_actions or th.is_autocast_enabled("cuda"):
            return None
        if n_candidates not in self.automatic:
            self.eager_decisions[n_candidates] += 1
            if self.eager_decisions[n_candidates] <= EAGER_DECISIONS or len(self.automatic) >= MOST_PROGRAMS:
                return None
            self.automatic[n_candidates] = self._make(policy, n_candidates, automatic=True)
        return self.automatic[n_candidates]

    def _make(self, policy: DecidingPolicy, n_candidates: int, automatic: bool = False) -> Program | None:
        """A program if the networks allow one. None, with a warning, if it fails."""
        actor, critic = policy.actor, policy.critic
        try:
            with evaluation_mode(actor, critic), th.inference_mode(False), th.no_grad():
                if not (are_known_networks(actor, critic) or (is_on_gpu(actor) and not automatic)):
                    return None
                if not (is_on_gpu(actor) or actor.device.type == "cpu"):
                    return None
                return checked_program(actor, critic, n_candidates, trusted=automatic)
        except Exception as error:  # whatever a compiler or a graph can fail with, training and decisions go on
            warn_of_eager_decisions(error, is_on_gpu(actor))
            return None


def is_on_gpu(actor: DiffusionActor) -> bool:
    """Whether programs are graphs."""
    # Asked before each action. The first check takes a microsecond, the second eight
    return _has_gpu() and actor.device.type == "cuda"


def _has_gpu() -> bool:
    """Whether this process uses a GPU."""
    return bool(th.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _is_being_captured() -> bool:
    """Whether a graph, of updates or of the user, is being captured now. Meanwhile no other can be run or captured."""
    return _has_gpu() and th.cuda.is_current_stream_capturing()


def are_known_networks(actor: DiffusionActor, critic: CandidateCritic) -> bool:
    """
    Whether this module knows all that these networks do. A class of their own, hooks, parameters of activations, more outputs
    or another type than float32 could change it.
    """
    later_layers = list(actor.noise_predictor.later_layers)
    networks = plain_networks(critic)
    if networks is None:
        return False
    in_critics = [list(q_network) for q_network in networks]
    layers = [later_layers, *(each[1:] for each in in_critics)]
    known = {
        type(actor).sample_candidates: (DiffusionActor.sample_candidates, FastActor.sample_candidates),
        type(critic).value_candidates: (CandidateCritic.value_candidates, FastCritic.value_candidates),
        type(critic).aggregate: (CandidateCritic.aggregate, BatchNormCritic.aggregate, QuantileCritic.aggregate),
        type(critic).score: (CandidateCritic.score,),
    }
    return (
        all(method in methods for method, methods in known.items())
        and type(actor.diffusion) is GaussianDiffusion
        and type(actor.noise_predictor) is NoisePredictor
        and actor.noise_predictor.first_layer.weight.dtype == th.float32
        and all(cpu.is_plain_mlp(each) for each in layers)
        and all(len(each) < 2 or type(each[1]) is type(in_critics[0][1]) for each in in_critics)
        and not any(list(layer.parameters()) for each in layers for layer in each[::2])
        and not any(
            module._forward_hooks or module._forward_pre_hooks for root in (actor, critic) for module in root.modules()
        )
    )


def checked_program(actor: DiffusionActor, critic: CandidateCritic, n_candidates: int, trusted: bool = False) -> Program:
    """
    A new program, after two trial runs.

    :raises RuntimeError: If it does not give what the eager functions give.
    """
    program = ScoringGraph(actor, critic, trusted) if is_on_gpu(actor) else ScoringProgram(actor, critic)
    sizes = (actor.features_dim, critic.features_dim)
    features = [th.linspace(-1, 1, size, device=actor.device).unsqueeze(0) for size in sizes]
    # Fixed noise, because drawing some would change the random numbers of the run
    shape = (actor.diffusion.n_noises, 1, n_candidates, actor.action_dim)
    noise = th.linspace(-1, 1, th.Size(shape).numel(), device=actor.device).view(shape)
    for _ in range(2):
        candidates, scores = program(features[0], features[1], noise)
        eager = actor.sample_candidates(features[0], noise)
        eager_scores = critic.score(features[1], candidates)
        difference = (candidates - eager).abs().max()
        score_difference = (scores - eager_scores).abs().max() / eager_scores.abs().max().clamp(min=1)
        if not (difference <= TOLERANCE and score_difference <= TOLERANCE):
            raise RuntimeError(f"they differ by {difference:.2g} from eager ones, and their scores by {score_difference:.2g}")
        noise = -noise  # a graph that does not read its inputs would pass once
    return program


def warn_of_eager_decisions(error: Exception, on_gpu: bool) -> None:
    """Say that there is no program, and why."""
    what = "captured in a graph and take several times" if on_gpu else "compiled and take two to four times"
    warnings.warn(f"Actions are not {what} as long: {squeezed(error)}", stacklevel=6)
