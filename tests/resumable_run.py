"""A training run that can be killed at any moment and started again: ``python resumable_run.py CHECKPOINT STEPS``."""

import sys
from pathlib import Path

import torch as th
from helpers import CountdownEnv, tiny_qvpo
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO, ResumableCheckpointCallback


def run(path, n_steps):
    """Train to ``n_steps``, from the checkpoint if there is one, and return the model."""
    env = VecNormalize(make_vec_env(lambda: CountdownEnv(length=4), n_envs=1))
    callback = ResumableCheckpointCallback(8, path, at_episode_end=True, verbose=2)
    if path.exists():
        model = QVPO.resume(path, env)
        print(f"resumed at {model.num_timesteps}")
        return model.learn(model.remaining_timesteps, callback, reset_num_timesteps=False)
    # A buffer that takes as long to write as eight steps to train
    model = tiny_qvpo(env, buffer_size=100_000, ent_coef="lin_0.1", policy_delay=3)
    print("started")
    return model.learn(n_steps, callback)


if __name__ == "__main__":
    th.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
