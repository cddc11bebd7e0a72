"""
Training runs that can be killed and started again, all from one process, because imports take seconds.

``python resumable_run.py CHECKPOINT STEPS`` reads when to kill itself from each line of its input. For each it trains in a
process of its own, and says how that ended.
"""

import os
import pickle
import signal
import sys
import traceback
from pathlib import Path

import torch as th
from helpers import CountdownEnv, tiny_qvpo
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qvpo import QVPO, ResumableCheckpointCallback

MOST_STEPS = 20
"""A run waits for its end after so many steps, so that it is never over before."""


class WaitForTheEnd(BaseCallback):
    """Die at a moment of :func:`die_at`, or do nothing any more after some steps."""

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def _on_training_start(self):
        self.first = self.num_timesteps
        if self.moment != "outside":
            die_at(self.moment)

    def _on_step(self):
        if self.num_timesteps >= self.first + MOST_STEPS:
            print("waiting", flush=True)
            signal.pause()
        return True


def train(path, n_steps, *callbacks):
    """Train to ``n_steps``, from the checkpoint if there is one, and return the model."""
    env = VecNormalize(make_vec_env(lambda: CountdownEnv(length=4), n_envs=1))
    callback = CallbackList([ResumableCheckpointCallback(8, path, at_episode_end=True, verbose=2), *callbacks])
    if path.exists():
        model = QVPO.resume(path, env)
        print(f"resumed at {model.num_timesteps}", flush=True)
        return model.learn(model.remaining_timesteps, callback, reset_num_timesteps=False)
    model = tiny_qvpo(env, buffer_size=10_000, ent_coef="lin_0.1", policy_delay=3)
    print("started", flush=True)
    return model.learn(n_steps, callback)


def kill():
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyFile:
    """A file of which only so many bytes can be written."""

    def __init__(self, file, n_bytes):
        self.file, self.left = file, n_bytes

    def write(self, data):
        data = memoryview(data).cast("B")
        self.file.write(data[: self.left])
        if len(data) >= self.left:
            kill()
        self.left -= len(data)


def die_at(moment):
    """
    Kill this process while it writes a checkpoint.

    :param moment: A number of bytes of the replay buffer, ``"sync"`` when all is written, ``"replace"`` before the file takes
        its place, ``"replaced"`` after it.
    """
    if moment in ("sync", "replace", "replaced"):
        owner, name = (os, "fsync") if moment == "sync" else (Path, "replace")
        original = getattr(owner, name)

        def deadly(*args):
            if moment == "replaced":
                original(*args)
            kill()

        setattr(owner, name, deadly)
    else:
        dump = pickle.dump

        def deadly_dump(content, file, **kwargs):
            dump(content, DeadlyFile(file, int(moment)) if isinstance(content, ReplayBuffer) else file, **kwargs)

        pickle.dump = deadly_dump


def main(path, n_steps):
    """Train once for each line of the input: ``outside`` is killed by somebody else."""
    tiny_qvpo(CountdownEnv())  # now torch has imported what takes it seconds
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                train(path, n_steps, WaitForTheEnd(line.strip()))
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        print(f"process {process}", flush=True)
        _, status = os.waitpid(process, 0)
        print(f"\nended by {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    th.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
