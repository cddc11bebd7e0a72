"""
A policy as a file that runs without this package: the whole decision from raw observation to action.

Normalisation, encoding, all steps of the chain, choice by the critics, scaling to the action space. Inputs are observations as
in the policy's observation space (images with their channels first), with a batch axis of any size. The output is actions.
The noise is an optional input. Without it the decision is that of ``predict(deterministic=True)``. The file of a one-step
policy with a single candidate holds no critics.

Shapes: B batch, K candidates for each state, A action dimensions, T diffusion steps.
"""

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_qvpo.common.candidates import ScoredCandidates, best_candidate
from sb3_qvpo.common.networks import evaluation_mode, n_observations
from sb3_qvpo.common.runs.files import atomic_file

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Formats and the suffixes of their files."""


class ExportablePolicy(Protocol):
    """What a file needs of a policy, which is also a module."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    normalized_observations: bool

    @property
    def n_eval_candidates(self) -> int:
        """K, candidates of a decision."""

    def noise_bank(self, n_candidates: int) -> th.Tensor:
        """Noise of deterministic decisions, shape (N, 1, K, A)."""

    def score_candidates(self, observation: PyTorchObs, noise: th.Tensor | int) -> ScoredCandidates:
        """Candidates of B observations and their scores."""


class Normalization(nn.Module):
    """
    What ``VecNormalize.normalize_obs`` does to observations, or to the part under ``key`` of dictionaries. In float64, as
    there.
    """

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, vec_normalize: VecNormalize, key: str | None):
        super().__init__()
        statistics = cast(Any, vec_normalize.obs_rms if key is None else cast(Any, vec_normalize.obs_rms)[key])
        self.clip = vec_normalize.clip_obs
        self.register_buffer("mean", th.as_tensor(statistics.mean, dtype=th.float64))
        self.register_buffer("std", th.as_tensor(np.sqrt(statistics.var + vec_normalize.epsilon), dtype=th.float64))

    def forward(self, observation: th.Tensor) -> th.Tensor:
        """Normalise observations of shape (B, ...). The result is in float32."""
        return ((observation.double() - self.mean) / self.std).clamp(-self.clip, self.clip).float()


class Decision(nn.Module):
    """The deterministic decision of a policy as one module, on the CPU. The policy is copied."""

    noise_bank: th.Tensor
    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: ExportablePolicy, vec_normalize: VecNormalize | None = None):
        super().__init__()
        self.policy = cast(Any, copy.deepcopy(policy)).to("cpu").requires_grad_(False)
        # Policies of users may not say so
        self.acts_alone = bool(getattr(policy, "acts_alone", False))
        if self.acts_alone:
            for name, module in list(self.policy.named_children()):
                if module is not self.policy.actor:
                    delattr(self.policy, name)
        action_space = cast(spaces.Box, policy.action_space)
        self.action_shape = action_space.shape
        self.register_buffer("noise_bank", self.policy.noise_bank(policy.n_eval_candidates).contiguous())
        self.register_buffer("low", th.as_tensor(action_space.low.reshape(-1)))
        self.register_buffer("high", th.as_tensor(action_space.high.reshape(-1)))
        self.normalizations = nn.ModuleDict()
        if vec_normalize is not None and vec_normalize.norm_obs:
            # A module's name cannot hold every character that a key can
            self.keys = cast(list[str | None], vec_normalize.norm_obs_keys or [None])
            self.normalizations = nn.ModuleDict({str(i): Normalization(vec_normalize, k) for i, k in enumerate(self.keys)})

    def forward(self, observation: PyTorchObs, noise: th.Tensor | None = None) -> th.Tensor:
        """
        Actions of shape (B, ...) in the action space, for B observations that are not normalised.

        Standard normal noise has shape (N, B, K, A), or (N, 1, K, A) for the same noise in each row, with any K. It is the
        noise bank of deterministic predictions if None.
        """
        observation = self._normalize(observation)
        noise = self.noise_bank if noise is None else noise
        # Row i, or row 0 if it is the only one. Any other number of rows fails. In this form it can be exported for any B
        rows = th.arange(n_observations(observation)).clamp(max=(noise.shape[1] - 1) * 2**32)
        noise = noise.index_select(1, rows)
        scaled_actions: th.Tensor
        if self.acts_alone:
            actor = self.policy.actor
            with evaluation_mode(actor):
                scaled_actions = actor.sample_candidates(actor.features(observation), noise).squeeze(1)
        else:
            _, candidates, scores = self.policy.score_candidates(observation, noise)
            scaled_actions = best_candidate(candidates, scores)
        # SB3's unscale_action(), kept within the bounds
        actions = self.low + 0.5 * (scaled_actions + 1) * (self.high - self.low)
        return actions.clamp(self.low, self.high).reshape(-1, *self.action_shape)

    def _normalize(self, observation: PyTorchObs) -> PyTorchObs:
        for i, normalization in self.normalizations.items():
            key = self.keys[int(i)]
            if isinstance(observation, dict):
                observation = {**observation, cast(str, key): normalization(observation[cast(str, key)])}
            else:
                observation = normalization(observation)
        return observation


def _example_observation(space: spaces.Space[Any], batch_size: int = 2) -> PyTorchObs:
    """Observations to trace a policy with, in the space's own types, shape (B, ...)."""
    if isinstance(space, spaces.Dict):
        return {key: cast(th.Tensor, _example_observation(part, batch_size)) for key, part in space.spaces.items()}
    return th.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(batch_size)]))


def export_policy(
    policy: ExportablePolicy, path: str | Path, format: str | None, vec_normalize: VecNormalize | Literal[False] | None
) -> None:
    """
    Write a policy to a file, see the module's docstring.

    ``"onnx"`` is run by any ONNX runtime and holds no pickles: the way to share a policy with people who need not trust you.
    Inputs are ``observation`` (or the keys of a ``Dict`` space) and optionally ``noise``, the output is ``action``.
    ``"torch"`` is a ``.pt2`` archive for ``torch.export.load()``. Its program takes the observation. A second one,
    ``with_noise``, takes observation and noise.

    The suffix of the path decides if ``format`` is None. A missing suffix is added. ``vec_normalize`` is None if there was
    none in training, False to leave it out.

    :raises ValueError: If ``format`` is unknown or does not go with the suffix. Also if ``vec_normalize`` belongs to other
        observations, or is None although the policy was trained with one.
    :raises ImportError: If the packages of the ``export`` extra are missing.
    :raises OSError: If writing fails. A previous file is intact then.
    """
    suffix = Path(path).suffix
    if format is None:
        format = next((name for name, own_suffix in FORMATS.items() if suffix == own_suffix), "onnx")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if suffix in FORMATS.values() and suffix != FORMATS[format]:
        raise ValueError(f"path must end in {FORMATS[format]} (or anything unknown) with format={format!r}, got {path}")
    _check_normalization(policy, vec_normalize)
    decision = Decision(policy, vec_normalize or None)
    content = _to_onnx(decision) if format == "onnx" else _to_torch(decision)
    with atomic_file(path, FORMATS[format].removeprefix(".")) as file:
        file.write(content)


def _check_normalization(policy: ExportablePolicy, vec_normalize: VecNormalize | Literal[False] | None) -> None:
    if vec_normalize is None and policy.normalized_observations:
        raise ValueError(
            "vec_normalize must be the VecNormalize that the policy was trained with, got None: without it the decisions "
            "would be wrong (a loaded model has none unless it is loaded with its environment). False leaves it out"
        )
    if vec_normalize is None or vec_normalize is False:
        return
    if not isinstance(vec_normalize, VecNormalize):
        raise ValueError(f"vec_normalize must be a VecNormalize, False or None, got {vec_normalize!r}")
    if vec_normalize.norm_obs and _shapes(vec_normalize.observation_space) != _shapes(policy.observation_space):
        raise ValueError(
            f"vec_normalize must normalise the policy's observations, {policy.observation_space}, "
            f"got one for {vec_normalize.observation_space}"
        )


def _shapes(space: spaces.Space[Any]) -> Any:
    return {key: part.shape for key, part in space.spaces.items()} if isinstance(space, spaces.Dict) else space.shape


def _export_program(decision: Decision, with_noise: bool) -> th.export.ExportedProgram:
    """The decision as a program for any batch size. With ``with_noise`` it takes noise too, of any number of candidates."""
    observation = _example_observation(decision.policy.observation_space)
    any_size = th.export.Dim.DYNAMIC
    if isinstance(observation, dict):
        shapes: Any = {key: {0: any_size} for key in observation}
    else:
        shapes = {0: any_size}
    arguments: tuple[Any, ...] = (observation,)
    dynamic_shapes: tuple[Any, ...] = (shapes,)
    if with_noise:
        n_steps, _, _, action_dim = decision.noise_bank.shape
        # Two rows and three candidates: sizes of 1 would be taken for constants
        arguments += (th.zeros(n_steps, 2, 1 if decision.acts_alone else 3, action_dim),)
        dynamic_shapes += ({1: any_size} if decision.acts_alone else {1: any_size, 2: any_size},)
    try:
        with th.no_grad():
            program = th.export.export(decision, arguments, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # raised again below, with a hint
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note("A features extractor of your own must take the batch size from x.shape[0], not from len(x).")
        raise
    for node in program.graph.nodes:
        # It holds paths of the machine that exports
        node.meta.pop("stack_trace", None)
    return program


def _to_torch(decision: Decision) -> bytes:
    """The decision as the content of a ``.pt2`` archive."""
    # torch.export.save() writes one program only, under the name "model". This function of torch packs two
    from torch.export.pt2_archive._package import package_pt2

    programs = {"model": _export_program(decision, with_noise=False), "with_noise": _export_program(decision, with_noise=True)}
    file = io.BytesIO()
    package_pt2(file, exported_programs=programs)
    return file.getvalue()


def _to_onnx(decision: Decision) -> bytes:
    """
    The decision as the content of an ONNX file, whose input ``noise`` has the noise bank as its default.

    :raises ImportError: If the packages of the ``export`` extra are missing.
    :raises ValueError: If observations have the key of another input or output.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} needed for format="onnx": pip install {" ".join(missing)}')
    import onnx

    observation_space = decision.policy.observation_space
    names = list(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else ["observation"]
    if {"noise", "action"} & set(names):
        raise ValueError(f'observations must have other keys than "noise" and "action" for format="onnx", got {names}')
    with _quiet("torch.onnx", "onnx_ir", "onnxscript"):
        program = th.onnx.export(
            _export_program(decision, with_noise=True),
            dynamo=True,
            verbose=False,
            input_names=[*names, "noise"],
            output_names=["action"],
        )
    model = cast(th.onnx.ONNXProgram, program).model_proto
    # An input with an initializer of its name is optional
    model.graph.initializer.append(onnx.numpy_helper.from_array(decision.noise_bank.numpy(), "noise"))
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        # Both hold paths of the machine that exports
        del node.metadata_props[:]
        node.doc_string = ""
    _name_axes(model.graph)
    n_noises, _, n_candidates, _ = decision.noise_bank.shape
    properties = dict(
        n_diffusion_steps=decision.policy.n_diffusion_steps,
        n_noises=n_noises,
        n_eval_candidates=n_candidates,
        vec_normalize=len(decision.normalizations) > 0,
    )
    onnx.helper.set_model_props(model, {key: str(value) for key, value in properties.items()})
    model.producer_name, model.producer_version = "sb3_qvpo", ""
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _name_axes(graph: Any) -> None:
    """Name the free axes by what they are, instead of ``s77``."""
    *observations, noise = graph.input
    names = {value.type.tensor_type.shape.dim[0].dim_param: "batch" for value in observations}
    noise_axes = noise.type.tensor_type.shape.dim
    # One row of noise, or as many as the batch has
    names |= {noise_axes[1].dim_param: "noise_rows", noise_axes[2].dim_param: "candidates"}
    names.pop("", None)  # a size that is fixed
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names:
                axis.dim_param = names[axis.dim_param]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Switch off warnings, and the messages of some libraries, which are meant for the developers of these."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
