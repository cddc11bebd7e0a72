"""
Actions of a long run, compiled: candidates of one state and their values as one program for the CPU, one graph on a GPU.

No mathematics is defined here: :meth:`GaussianDiffusion.sample` runs the chain, as always, with a network that returns what
:class:`NoisePredictor` returns, and ``torch.compile`` turns it into one C++ function. In eager mode an action is a few hundred
calls of torch, which cost more than the numbers. Updates are not compiled: there it saves a tenth (see ``docs/speed.md``).

Compiling takes 10 to 20 s for each number of candidates, once on a machine (torch keeps the result on disk). A graph takes
none, and runs the very kernels that the written functions launch one by one: on a GPU, single predictions are captured without
being asked for, from the :data:`EAGER_PREDICTIONS`-th on. Nothing of it is saved with a model, and where it fails there is one
warning and all goes on as before.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch as th
from torch import nn
from torch.nn import functional as F

import sb3_qvpo.common.fast as fast
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.candidates import minimum_q
from sb3_qvpo.common.captured import Capture, Places, Results, cuda_graph, on_side_stream
from sb3_qvpo.common.diffusion import GaussianDiffusion
from sb3_qvpo.common.networks import NoisePredictor

Layers = Sequence[tuple[th.Tensor, th.Tensor]]
"""Weights and biases of linear layers."""

NARROW, FEW_ROWS = 32, 8
"""Inputs or outputs, and rows, up to which a linear layer is part of the program and no call of a library."""

SMALLEST_ONEDNN = 32
"""Candidates from which oneDNN is faster than MKL, at a width of 256."""

TOLERANCE = 1e-3
"""Largest difference of actions, and of values relative to the largest, between a program and the readable functions."""

MOST_PROGRAMS = 4
"""Numbers of candidates of one policy that ``learn()`` compiles on its own: schedules of them shall not take hours."""

EAGER_PREDICTIONS = 10
"""Predictions for one state by each number of candidates after which a GPU captures them."""


@dataclass
class Programs:
    """
    What has been compiled for a policy.

    :param by_count: Programs by number of candidates, None where it failed.
    :param for_predictions: Numbers of candidates whose programs serve all predictions, because the user asked for them. Others
        only choose the actions that ``learn()`` collects: predictions are those of a loaded model, bit for bit.
    :param collecting: Whether ``learn()`` is choosing an action.
    :param eager_predictions: Rankings of one state on a GPU that were not captured, by number of candidates.
    """

    by_count: "dict[int, CompiledRanking | CapturedRanking | None]" = field(default_factory=dict)
    for_predictions: set[int] = field(default_factory=set)
    collecting: bool = False
    eager_predictions: Counter[int] = field(default_factory=Counter)


_programs: WeakKeyDictionary[nn.Module, Programs] = WeakKeyDictionary()


def mish(x: th.Tensor) -> th.Tensor:
    """
    Mish with one exponential, to 2e-6; see :func:`sb3_qvpo.common.fast.mish_of_negated`.

    :param x: Pre-activations.
    :return: A tensor of the same shape.
    """
    sigmoid = th.sigmoid(-x)
    return 2 * x / (1 + sigmoid * sigmoid) - x


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    A linear layer, written out where libraries for products of large matrices are slow.

    :param x: Inputs of shape (K, inputs).
    :param weight: Weights of shape (outputs, inputs).
    :param bias: Biases of shape (outputs,).
    :return: Outputs of shape (K, outputs).
    """
    if x.shape[1] <= NARROW:
        return (x.unsqueeze(-1) * weight.t()).sum(-2) + bias
    if len(weight) <= NARROW or len(x) <= FEW_ROWS:
        return (x.unsqueeze(-2) * weight).sum(-1) + bias
    return F.linear(x, weight, bias)


def linear_layers(modules: nn.Module | Sequence[nn.Module]) -> Layers:
    """
    Weights and biases of the linear layers among modules.

    :param modules: The modules.
    :return: Their parameters, in their order.
    """
    return [(layer.weight, layer.bias) for layer in cast(Sequence[nn.Module], modules) if isinstance(layer, nn.Linear)]


class CompiledRanking:
    """
    Candidates of one state and their values, see :meth:`DiffusionPolicy.rank_candidates`.

    Weights are passed at each call, so that updates are seen.

    :param actor: The actor.
    :param critic: The critics.
    """

    def __init__(self, actor: DiffusionActor, critic: CandidateCritic):
        self.actor, self.critic = actor, critic
        activation = actor.noise_predictor.time_mlp[1]
        self.activation: Callable[[th.Tensor], th.Tensor] = mish if type(activation) is nn.Mish else activation.forward
        # Code of its own: torch counts programs by it, and compiles a few for each
        function = FunctionType(CompiledRanking._rank.__code__.replace(), globals())
        options: dict[str, Any] = {"cpp_wrapper": True}
        self.program = th.compile(MethodType(function, self), fullgraph=True, dynamic=False, options=options)

    def __call__(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw candidates and value them.

        :param actor_features: The state's features of the actor, shape (1, S).
        :param critic_features: The state's features of the critics, shape (1, S).
        :param noise: Noise of shape (N, 1, K, A), see :meth:`GaussianDiffusion.sample`.
        :return: Actions of shape (1, K, A) and the minimum of their values over critics, shape (1, K).
        """
        # Another layout, or the same tensor twice, would be another program
        actor_features, noise = actor_features.contiguous(), noise.contiguous()
        critic_features = actor_features.clone() if critic_features is actor_features else critic_features.contiguous()
        predictor = self.actor.noise_predictor
        time_layers = linear_layers(predictor.time_mlp)
        actor_layers = linear_layers([predictor.first_layer, *cast(Any, predictor.later_layers)])
        critic_layers = [linear_layers(q_network) for q_network in self.critic.q_networks]
        arguments = (actor_features, critic_features, noise, predictor.time_features, time_layers, actor_layers, critic_layers)
        with fast.OneDnnProducts() if noise.shape[2] >= SMALLEST_ONEDNN else nullcontext():
            ranked: tuple[th.Tensor, th.Tensor] = self.program(*arguments)
        return ranked

    def _rank(
        self,
        actor_features: th.Tensor,
        critic_features: th.Tensor,
        noise: th.Tensor,
        time_features: th.Tensor,
        time_layers: Layers,
        actor_layers: Layers,
        critic_layers: Sequence[Layers],
    ) -> tuple[th.Tensor, th.Tensor]:
        (first_weight, first_bias), *later_layers = actor_layers
        sizes = self.actor.noise_predictor.split_sizes
        action_weight, time_weight, state_weight = th.split(first_weight, sizes, dim=1)
        embedding = self._through(linear(time_features, *time_layers[0]), time_layers[1:])
        biases = linear(embedding, time_weight, linear(actor_features, state_weight, first_bias).squeeze(0))

        def network(x_t: th.Tensor, t: int, cond: None) -> th.Tensor:
            return self._through(linear(x_t, action_weight, biases[t]), later_layers)

        candidates = self.actor.diffusion.sample(network, None, noise.squeeze(1))
        q_values = []
        for (weight, bias), *layers in critic_layers:
            state_weight, action_weight = th.split(weight, [critic_features.shape[1], candidates.shape[1]], dim=1)
            hidden = linear(candidates, action_weight, linear(critic_features, state_weight, bias).squeeze(0))
            q_values.append(self._through(hidden, layers).squeeze(-1))
        return candidates.unsqueeze(0), th.stack(q_values).min(dim=0).values.unsqueeze(0)

    def _through(self, hidden: th.Tensor, layers: Layers) -> th.Tensor:
        for weight, bias in layers:
            hidden = linear(self.activation(hidden), weight, bias)
        return hidden


class CapturedRanking:
    """
    The same on a GPU: the readable functions, captured in a graph.

    :param actor: The actor.
    :param critic: The critics.
    :param capture: How to capture a function, :func:`sb3_qvpo.common.captured.cuda_graph` unless for a test.
    """

    def __init__(self, actor: DiffusionActor, critic: CandidateCritic, capture: Capture = cuda_graph):
        self.actor, self.critic, self.capture = actor, critic, capture
        self.graph: tuple[Callable[[], None], list[th.Tensor], Results, Places] | None = None

    def __call__(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw candidates and value them.

        :param actor_features: The state's features of the actor, shape (1, S).
        :param critic_features: The state's features of the critics, shape (1, S).
        :param noise: Noise of shape (N, 1, K, A), see :meth:`GaussianDiffusion.sample`.
        :return: Actions of shape (1, K, A) and the minimum of their values over critics, shape (1, K).
        """
        arguments = (actor_features, critic_features, noise)
        if self.graph is None or not self.graph[3].are_the_same():
            inputs = [argument.clone() for argument in arguments]
            on_side_stream(lambda: self._rank(*inputs), noise.device)  # libraries set themselves up
            replay, results = self.capture(lambda: self._rank(*inputs), noise.device)
            self.graph = replay, inputs, results, Places([self.actor, self.critic])
        replay, inputs, results, _ = self.graph
        for fixed, argument in zip(inputs, arguments, strict=True):
            fixed.copy_(argument, non_blocking=True)
        replay()
        return results["candidates"].clone(), results["q_values"].clone()

    def _rank(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> Results:
        candidates = self.actor.sample_candidates(actor_features, noise.shape[2], noise)
        return {"candidates": candidates, "q_values": minimum_q(self.critic.value_candidates(critic_features, candidates))}


def compile_ranking(
    policy: nn.Module, actor: DiffusionActor, critic: CandidateCritic, n_candidates: int, for_predictions: bool = True
) -> bool:
    """
    Compile what :func:`ranking_of` finds from then on. Compiles nothing if the fast paths are switched off, nothing again, and
    on behalf of ``learn()`` no more than :data:`MOST_PROGRAMS` and nothing that failed before.

    :param policy: The policy that the networks belong to.
    :param actor: Its actor.
    :param critic: Its critics.
    :param n_candidates: Number of candidates K.
    :param for_predictions: Whether it serves all predictions, or only :func:`collecting`.
    :return: Whether it is compiled. If it fails there is a warning.
    """
    if not fast.settings.enabled:
        return False
    programs = _programs.setdefault(policy, Programs())
    rankings = programs.by_count
    if for_predictions:
        programs.for_predictions.add(n_candidates)
    is_new = n_candidates not in rankings and len(rankings) < MOST_PROGRAMS
    if is_new or (for_predictions and rankings.get(n_candidates) is None):
        rankings[n_candidates] = None
        try:
            if is_supported(actor, critic):
                with th.no_grad():
                    rankings[n_candidates] = checked_ranking(actor, critic, n_candidates)
        except Exception as error:  # whatever a compiler can fail with, training goes on
            warn_of_failure(error)
    return rankings.get(n_candidates) is not None


def is_on_gpu(actor: DiffusionActor) -> bool:
    """
    Whether programs are graphs.

    :param actor: The actor.
    :return: True on a GPU.
    """
    return actor.device.type == "cuda"


def is_supported(actor: DiffusionActor, critic: CandidateCritic) -> bool:
    """
    Whether a program can stand for these networks.

    :param actor: The actor.
    :param critic: The critics.
    :return: False for networks that are not the usual ones, of a subclass for instance; a GPU takes all.
    """
    if is_on_gpu(actor):
        return True
    weight = actor.noise_predictor.first_layer.weight
    networks = [list(actor.noise_predictor.later_layers)]
    networks += [list(cast(nn.Sequential, q_network))[1:] for q_network in critic.q_networks]
    with th.no_grad():
        return (
            type(actor).sample_candidates is DiffusionActor.sample_candidates
            and type(critic).value_candidates is CandidateCritic.value_candidates
            and type(actor.diffusion) is GaussianDiffusion
            and type(actor.noise_predictor) is NoisePredictor
            and weight.dtype == th.float32
            and all(fast.applies(layers, weight.device) for layers in networks)
            and not any(list(layer.parameters()) for layers in networks for layer in layers[::2])
        )


def checked_ranking(actor: DiffusionActor, critic: CandidateCritic, n_candidates: int) -> "CompiledRanking | CapturedRanking":
    """
    A program after a first run.

    :param actor: The actor.
    :param critic: The critics.
    :param n_candidates: Number of candidates K.
    :return: The program.
    :raises RuntimeError: If it does not give what the readable functions give.
    """
    ranking = (CapturedRanking if is_on_gpu(actor) else CompiledRanking)(actor, critic)
    critic_features_dim = cast(nn.Linear, cast(nn.Sequential, critic.q_networks[0])[0]).in_features - actor.action_dim
    sizes = (actor.noise_predictor.split_sizes[-1], critic_features_dim)
    features = [th.linspace(-1, 1, size, device=actor.device).unsqueeze(0) for size in sizes]
    # Numbers of its own: those of the run are not touched
    shape = (actor.diffusion.n_noises, 1, n_candidates, actor.action_dim)
    noise = th.linspace(-1, 1, th.Size(shape).numel(), device=actor.device).view(shape)
    for _ in range(2):
        candidates, q_values = ranking(features[0], features[1], noise)
        readable = actor.sample_candidates(features[0], n_candidates, noise)
        readable_q_values = minimum_q(critic.value_candidates(features[1], candidates))
        difference = (candidates - readable).abs().max()
        q_difference = (q_values - readable_q_values).abs().max() / readable_q_values.abs().max().clamp(min=1)
        if not (difference <= TOLERANCE and q_difference <= TOLERANCE):
            raise RuntimeError(f"they differ by {difference:.2g}, their values by {q_difference:.2g} from those that are not")
        noise = -noise  # a graph that does not read its inputs would pass once
    return ranking


def warn_of_failure(error: Exception) -> None:
    """
    Say that there is no program.

    :param error: Why.
    """
    reason = " ".join(f"{error}".split())[:200] or repr(error)
    warnings.warn(f"Actions are not compiled and take two to four times as long: {reason}", stacklevel=4)


def tried_counts(policy: nn.Module) -> tuple[list[int], list[int]]:
    """
    For how many candidates a policy has been compiled.

    :param policy: The policy.
    :return: All counts, in their order, those included for which it failed; and those whose programs serve all predictions.
    """
    programs = _programs.get(policy, Programs())
    return list(programs.by_count), sorted(programs.for_predictions)


@contextmanager
def collecting(policy: nn.Module) -> Iterator[None]:
    """
    While it lasts, the programs that ``learn()`` has compiled are used.

    :param policy: The policy.
    """
    programs = _programs.get(policy, Programs())
    programs.collecting = True
    try:
        yield
    finally:
        programs.collecting = False


def rank(
    policy: nn.Module,
    ranking: CompiledRanking | CapturedRanking,
    actor_features: th.Tensor,
    critic_features: th.Tensor,
    noise: th.Tensor,
) -> tuple[th.Tensor, th.Tensor] | None:
    """
    Candidates and their values by the program of a policy. If it fails there is a warning, and no program any more.

    :param policy: The policy.
    :param ranking: Its program, from :func:`ranking_of`.
    :param actor_features: One state's features of the actor, shape (1, S).
    :param critic_features: One state's features of the critics, shape (1, S).
    :param noise: Noise of shape (N, 1, K, A).
    :return: Actions of shape (1, K, A) and values of shape (1, K); None if it failed.
    """
    try:
        return ranking(actor_features, critic_features, noise)
    except Exception as error:  # another number of threads is compiled anew, and may fail then
        _programs[policy].by_count[noise.shape[2]] = None
        warn_of_failure(error)
        return None


def ranking_of(policy: nn.Module, n_candidates: int) -> CompiledRanking | CapturedRanking | None:
    """
    The compiled program of a policy.

    :param policy: The policy, which is about to rank the candidates of one state. On a GPU that is counted.
    :param n_candidates: Number of candidates K.
    :return: The program; None if there is none for what is being done, while gradients are on or fast paths off, and while a
        policy is exported.
    """
    if not fast.settings.enabled or th.is_grad_enabled() or th.compiler.is_compiling():
        return None
    on_gpu = is_on_gpu(cast(DiffusionActor, policy.actor))
    programs = _programs.setdefault(policy, Programs()) if on_gpu else _programs.get(policy)
    if programs is None:
        return None
    if on_gpu and fast.settings.compile_actions:
        _capture_after_some(policy, programs, n_candidates)
    elif not (programs.collecting or n_candidates in programs.for_predictions):
        return None
    program = programs.by_count.get(n_candidates)
    # A policy that was moved from one device to another has no program there
    return program if isinstance(program, CapturedRanking) == on_gpu else None


def _capture_after_some(policy: nn.Module, programs: Programs, n_candidates: int) -> None:
    """Capture what a GPU ranks again and again; what failed, or was compiled on the CPU before, is left alone."""
    if n_candidates in programs.by_count or len(programs.by_count) >= MOST_PROGRAMS:
        return
    programs.eager_predictions[n_candidates] += 1
    if programs.eager_predictions[n_candidates] > EAGER_PREDICTIONS:
        actor, critic = cast(DiffusionActor, policy.actor), cast(CandidateCritic, policy.critic)
        compile_ranking(policy, actor, critic, n_candidates, for_predictions=False)
