"""
Data that are there already: :func:`fill_replay_buffer` puts them into a replay buffer, and ``model.learn_offline()`` of every
algorithm here learns from it. A dataset may be

- a Minari dataset, its name or its folder; any iterable of episodes with Minari's names, T + 1 observations for T actions;
- a mapping of flat arrays in D4RL's layout: ``observations``, ``actions``, ``rewards``, ``terminals``, and ``timeouts`` or
  ``next_observations`` or both. A path to an ``.hdf5`` or ``.npz`` file of them will do, which is read in parts;
- a replay buffer of SB3, or the path of a saved one, ``.pkl``.

Rows are written in parts, so that memory is needed for the buffer and one part only.
"""

from sb3_qvpo.offline.buffers import fill_replay_buffer
from sb3_qvpo.offline.spaces_env import SpacesEnv, normalized_score

__all__ = ["SpacesEnv", "fill_replay_buffer", "normalized_score"]
