"""
Actions of a long run, compiled: candidates of one state and their values as one program for the CPU, one graph on a GPU.

No mathematics is defined here: :meth:`GaussianDiffusion.sample` runs the chain, as always, with a network that returns what
:class:`NoisePredictor` returns, and ``torch.compile`` turns it into one C++ function. In eager mode an action is a few hundred
calls of torch, which cost more than the numbers. Updates are not compiled: there it saves a tenth (see ``docs/speed.md``).

Compiling takes 10 to 20 s for each number of candidates, once on a machine (torch keeps the result on disk). Capturing a graph
takes as long as a few actions, and it runs the kernels that the written functions launch one by one. So a GPU captures the
decisions of usual networks without being asked, after :data:`EAGER_PREDICTIONS` of them. Nothing of it is saved with a model,
and where it fails there is one warning and all goes on as before.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
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
"""
Numbers of candidates of one policy that ``learn()`` compiles on its own, and as many that a GPU captures on its own: schedules
of them shall not take hours.
"""

EAGER_PREDICTIONS = 10
"""Decisions for one state by each number of candidates that a GPU takes before it captures one."""


@dataclass
class Programs:
    """
    What has been compiled for a policy.

    :param by_count: Programs by number of candidates, None where it failed.
    :param for_predictions: Numbers of candidates whose programs serve all predictions, because the user asked for them. Others
        only choose the actions that ``learn()`` collects: predictions are those of a loaded model, bit for bit.
    :param collecting: Whether ``learn()`` is choosing an action.
    :param automatic: Graphs that nobody asked for, by number of candidates, None where it failed. They are apart from the
        others because checkpoints list those, to compile them again.
    :param eager_predictions: Decisions on a GPU that were not captured, by number of candidates.
    """

    by_count: "Rankings" = field(default_factory=dict)
    for_predictions: set[int] = field(default_factory=set)
    collecting: bool = False
    automatic: "Rankings" = field(default_factory=dict)
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
    The same on a GPU: the readable functions, captured in a graph. Where something else has taken the place of a weight, the
    next :data:`EAGER_PREDICTIONS` decisions are not captured: weights may be replaced before each of them.

    :param actor: The actor.
    :param critic: The critics.
    :param capture: How to capture a function, :func:`sb3_qvpo.common.captured.cuda_graph` unless for a test.
    :param may_wait: Whether the networks are known not to wait for the device, see :func:`on_side_stream`.
    """

    def __init__(self, actor: DiffusionActor, critic: CandidateCritic, capture: Capture = cuda_graph, may_wait: bool = False):
        self.actor, self.critic, self.capture, self.may_wait = actor, critic, capture, may_wait
        self.graph: tuple[Callable[[], None], list[th.Tensor], Results, Places] | None = None
        self.n_to_wait_for = 0
        self.lock = Lock()

    def __call__(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw candidates and value them.

        :param actor_features: The state's features of the actor, shape (1, S).
        :param critic_features: The state's features of the critics, shape (1, S).
        :param noise: Noise of shape (N, 1, K, A), see :meth:`GaussianDiffusion.sample`.
        :return: Actions of shape (1, K, A) and the minimum of their values over critics, shape (1, K).
        """
        # All threads share the tensors of the graph, which must not be those of an inference mode that ends
        with self.lock, th.inference_mode(False), th.no_grad():
            results = self._run((actor_features, critic_features, noise))
            return results["candidates"].clone(), results["q_values"].clone()

    def _run(self, arguments: tuple[th.Tensor, th.Tensor, th.Tensor]) -> Results:
        if self.graph is not None and not self.graph[3].are_the_same():
            self.graph, self.n_to_wait_for = None, EAGER_PREDICTIONS
        if self.graph is None and self.n_to_wait_for > 0:
            self.n_to_wait_for -= 1
            return self._rank(*arguments)
        if self.graph is None:
            inputs, device = [argument.clone() for argument in arguments], arguments[0].device
            on_side_stream(lambda: self._rank(*inputs), device, self.may_wait)  # libraries set themselves up
            replay, results = self.capture(lambda: self._rank(*inputs), device)
            self.graph = replay, inputs, results, Places([self.actor, self.critic])
        replay, inputs, results, _ = self.graph
        for fixed, argument in zip(inputs, arguments, strict=True):
            fixed.copy_(argument, non_blocking=True)
        replay()
        return results

    def _rank(self, actor_features: th.Tensor, critic_features: th.Tensor, noise: th.Tensor) -> Results:
        candidates = self.actor.sample_candidates(actor_features, noise.shape[2], noise)
        return {"candidates": candidates, "q_values": minimum_q(self.critic.value_candidates(critic_features, candidates))}


Rankings = dict[int, CompiledRanking | CapturedRanking | None]
"""Programs by number of candidates, None where it failed."""


def compile_ranking(
    policy: nn.Module, actor: DiffusionActor, critic: CandidateCritic, n_candidates: int, for_predictions: bool = True
) -> bool:
    """
    Compile what :func:`ranking_of` finds from then on. Compiles nothing if the fast paths are switched off, nothing again
    (unless the policy has been moved to another kind of device), and on behalf of ``learn()`` no more than
    :data:`MOST_PROGRAMS` and nothing that failed before.

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
    if isinstance(rankings.get(n_candidates), CompiledRanking if is_on_gpu(actor) else CapturedRanking):
        del rankings[n_candidates]  # the policy was moved here from another device
    is_new = n_candidates not in rankings and len(rankings) < MOST_PROGRAMS
    if is_new or (for_predictions and rankings.get(n_candidates) is None):
        _make(rankings, n_candidates, actor, critic)
    return rankings.get(n_candidates) is not None


def _make(
    rankings: Rankings, n_candidates: int, actor: DiffusionActor, critic: CandidateCritic, automatic: bool = False
) -> None:
    """Make a program where the networks allow it; None takes its place, with a warning, if that fails."""
    rankings[n_candidates] = None
    try:
        if (are_usual if automatic else is_supported)(actor, critic):
            with th.inference_mode(False), th.no_grad():
                rankings[n_candidates] = checked_ranking(actor, critic, n_candidates, may_wait=automatic)
    except Exception as error:  # whatever a compiler or a graph can fail with, training and decisions go on
        warn_of_failure(error, is_on_gpu(actor))


def is_on_gpu(actor: DiffusionActor) -> bool:
    """
    Whether programs are graphs.

    :param actor: The actor.
    :return: True on a GPU.
    """
    # Asked before each action: the first takes a microsecond, the second eight
    return _has_gpu() and actor.device.type == "cuda"


def _has_gpu() -> bool:
    """Whether this process uses a GPU."""
    return bool(th.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def is_supported(actor: DiffusionActor, critic: CandidateCritic) -> bool:
    """
    Whether a program can stand for these networks.

    :param actor: The actor.
    :param critic: The critics.
    :return: False for networks that are not the usual ones, of a subclass for instance; a GPU takes all.
    """
    return is_on_gpu(actor) or (actor.device.type == "cpu" and are_usual(actor, critic))


def are_usual(actor: DiffusionActor, critic: CandidateCritic) -> bool:
    """
    Whether all is known that these networks do.

    :param actor: The actor.
    :param critic: The critics.
    :return: False for networks of subclasses, with hooks, parameters of activations, or other numbers than float32.
    """
    networks = [list(actor.noise_predictor.later_layers)]
    networks += [list(cast(nn.Sequential, q_network))[1:] for q_network in critic.q_networks]
    return (
        type(actor).sample_candidates is DiffusionActor.sample_candidates
        and type(critic).value_candidates is CandidateCritic.value_candidates
        and type(actor.diffusion) is GaussianDiffusion
        and type(actor.noise_predictor) is NoisePredictor
        and actor.noise_predictor.first_layer.weight.dtype == th.float32
        and all(fast.alternate(layers) for layers in networks)
        and not any(list(layer.parameters()) for layers in networks for layer in layers[::2])
        and not any(
            module._forward_hooks or module._forward_pre_hooks for root in (actor, critic) for module in root.modules()
        )
    )


def checked_ranking(
    actor: DiffusionActor, critic: CandidateCritic, n_candidates: int, may_wait: bool = False
) -> "CompiledRanking | CapturedRanking":
    """
    A program after a first run.

    :param actor: The actor.
    :param critic: The critics.
    :param n_candidates: Number of candidates K.
    :param may_wait: See :class:`CapturedRanking`.
    :return: The program.
    :raises RuntimeError: If it does not give what the readable functions give.
    """
    on_gpu = is_on_gpu(actor)
    ranking = CapturedRanking(actor, critic, may_wait=may_wait) if on_gpu else CompiledRanking(actor, critic)
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


def warn_of_failure(error: Exception, on_gpu: bool) -> None:
    """
    Say that there is no program.

    :param error: Why.
    :param on_gpu: Whether it would have been a graph.
    """
    reason = " ".join(f"{error}".split())[:200] or repr(error)
    what = "captured in a graph and take several times" if on_gpu else "compiled and take two to four times"
    warnings.warn(f"Actions are not {what} as long: {reason}", stacklevel=5)


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
        programs = _programs[policy]
        for store in (programs.by_count, programs.automatic):
            if store.get(noise.shape[2]) is ranking:
                store[noise.shape[2]] = None
        warn_of_failure(error, isinstance(ranking, CapturedRanking))
        return None


def ranking_of(policy: nn.Module, n_candidates: int) -> CompiledRanking | CapturedRanking | None:
    """
    The compiled program of a policy.

    :param policy: The policy, which is about to rank the candidates of one state. On a GPU that is counted, and after some
        captured, with a warning if that fails.
    :param n_candidates: Number of candidates K.
    :return: The program; None if there is none for what is being done, while gradients are on or fast paths off, and while a
        policy is exported.
    """
    if not fast.settings.enabled or th.is_grad_enabled() or th.compiler.is_compiling():
        return None
    on_gpu = is_on_gpu(cast(DiffusionActor, policy.actor))
    programs = _programs.setdefault(policy, Programs()) if on_gpu else _programs.get(policy)
    if programs is None or (on_gpu and _is_being_captured()):
        return None
    program = None
    if programs.collecting or n_candidates in programs.for_predictions:
        program = programs.by_count.get(n_candidates)
    if not on_gpu:
        # A policy that was moved here from a GPU has no program here
        return program if isinstance(program, CompiledRanking) else None
    return program if isinstance(program, CapturedRanking) else _automatic_graph(policy, programs, n_candidates)


def _is_being_captured() -> bool:
    """Whether what is done now goes into a graph, of updates or of the user's: no other can be run or captured there."""
    return _has_gpu() and th.cuda.is_current_stream_capturing()


def _automatic_graph(policy: nn.Module, programs: Programs, n_candidates: int) -> CompiledRanking | CapturedRanking | None:
    """The graph that a GPU makes of its own accord, after some decisions; it fails once for each number of candidates."""
    if not fast.settings.compile_actions or th.is_autocast_enabled("cuda"):
        return None
    graphs, counts = programs.automatic, programs.eager_predictions
    if n_candidates not in graphs:
        counts[n_candidates] += 1
        if counts[n_candidates] <= EAGER_PREDICTIONS or len(graphs) >= MOST_PROGRAMS:
            return None
        actor, critic = cast(DiffusionActor, policy.actor), cast(CandidateCritic, policy.critic)
        _make(graphs, n_candidates, actor, critic, automatic=True)
    return graphs[n_candidates]
