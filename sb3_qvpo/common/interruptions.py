"""Leaving replay buffer and normalisation in order when an episode is broken off."""

import warnings

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

Statistics = list[tuple[RunningMeanStd, dict[str, np.ndarray | float]]]
"""Running means and what they held at some time."""


def cut_last_episode(replay_buffer: ReplayBuffer) -> None:
    """
    Mark the last stored transition of each environment as cut off, unless its episode is over: the next one to be stored
    starts from a reset.

    Plain buffers keep both ends of each transition and would not mind. n-step returns would run on into the next episode,
    hindsight would take its goals from there, and the memory-saving buffer, which looks for the next observation in the
    following row, would find the wrong one.

    :param replay_buffer: The buffer, changed in place.
    """
    if isinstance(replay_buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The last trajectory in the replay buffer will be truncated")
            replay_buffer.truncate_last_trajectory()
    elif replay_buffer.size() > 0:
        last = (replay_buffer.pos - 1) % replay_buffer.buffer_size
        if replay_buffer.optimize_memory_usage:
            # As SB3 does: this buffer cannot tell a cut from an end
            replay_buffer.dones[last] = True
        else:
            # A time limit, from which the value is bootstrapped
            replay_buffer.timeouts[last] = np.where(replay_buffer.dones[last], replay_buffer.timeouts[last], True)


def normalization_statistics(vec_normalize: VecNormalize | None) -> Statistics:
    """
    The running statistics of a ``VecNormalize``, to be put back by :func:`restore_statistics`. Copies nothing: SB3 replaces
    the arrays when it updates them.

    :param vec_normalize: The wrapper, or None.
    :return: Its running means with their present values; nothing for None.
    """
    if vec_normalize is None:
        return []
    # Without normalised observations there is no obs_rms
    obs_rms = vars(vec_normalize).get("obs_rms", {})
    parts = [*(obs_rms.values() if isinstance(obs_rms, dict) else [obs_rms]), vec_normalize.ret_rms]
    return [(part, dict(vars(part))) for part in parts]


def restore_statistics(statistics: Statistics) -> None:
    """
    Put running statistics back.

    :param statistics: What :func:`normalization_statistics` returned.
    """
    for part, values in statistics:
        vars(part).update(values)
