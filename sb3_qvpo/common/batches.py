"""Mini-batches: taken apart, put together again, and brought to a GPU."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

PINNED_FOR = ("cuda",)
"""Devices for which batches are copied from pinned memory."""


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, th.Tensor]]:
    """
    The tensors of a batch.

    :param tree: Tensors, dictionaries of them, or None, by name.
    :param prefix: Put before each name.
    :return: Names and tensors.
    """
    items: list[tuple[str, th.Tensor]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            items += flat_items(value, f"{prefix}{name}.")
        elif value is not None:
            items.append((f"{prefix}{name}", value))
    return items


def rebuild(tree: Mapping[str, Any], tensors: Iterator[th.Tensor]) -> dict[str, Any]:
    """
    A batch with other tensors.

    :param tree: What :func:`flat_items` took.
    :param tensors: As many tensors as it gave, in their order.
    :return: The same with these tensors.
    """
    return {
        name: rebuild(value, tensors) if isinstance(value, Mapping) else None if value is None else next(tensors)
        for name, value in tree.items()
    }


def sample_batch(
    buffer: ReplayBuffer, batch_size: int, vec_normalize: VecNormalize | None, device: th.device
) -> ReplayBufferSamples:
    """
    A mini-batch on a device. On a GPU the host does not wait for it: SB3 copies from pageable memory, which lets the host go
    on only when all updates before are done.

    :param buffer: The replay buffer.
    :param batch_size: B.
    :param vec_normalize: What normalises observations and rewards, if anything does.
    :param device: The device of the model.
    :return: B transitions.
    """
    if device.type not in PINNED_FOR:
        return buffer.sample(batch_size, env=vec_normalize)
    own_device, buffer.device = buffer.device, th.device("cpu")
    try:
        batch = buffer.sample(batch_size, env=vec_normalize)
    finally:
        buffer.device = own_device
    tensors = [tensor for _, tensor in flat_items(batch._asdict())]
    # A buffer of the user's may keep its transitions on the GPU
    pinned = (tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in tensors)
    return type(batch)(**rebuild(batch._asdict(), (tensor.to(device, non_blocking=True) for tensor in pinned)))
