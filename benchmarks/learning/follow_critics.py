"""
How fast does an actor follow critics that stand still? Settings of ``run.py`` side by side, on the critics and the transitions
of a checkpoint.

``python benchmarks/learning/follow_critics.py CHECKPOINT TASK preset_fast sdac``

The checkpoint is ``run.zip``, which ``run.py`` keeps in ``--folder`` while a run goes on; its critics must be of the settings'
type. Actors start from random weights. A share is 0 for uniform actions and 1 for the best that gradient ascent finds, in the
critics' values, over 512 states of the buffer:

- ``single``: one sample of the policy.
- ``best_of_4``, ``best_of_32``: the best of as many.
- ``std``: how wide the samples are, in actions scaled to [-1, 1].
"""

import argparse
import csv
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from run import ALGOS, append, data_in
from stable_baselines3.common.logger import configure
from torch import nn
from torch.nn import functional as F

from sb3_qvpo import QVPO, SDAC
from sb3_qvpo.common.runs.checkpoints import unpickle

ALGORITHMS: dict[str, type[QVPO | SDAC]] = {"qvpo": QVPO, "sdac": SDAC}

AFTER = (300, 1000)
"""Policy updates after which the actor is looked at."""


def model_of(name: str, task: str, source: QVPO | SDAC, buffer: Any) -> QVPO | SDAC:
    """A new model with settings of ``run.py``, and the critics and transitions of another."""
    algorithm, settings = ALGOS[name]
    settings = {**settings, "policy_kwargs": eval(settings["policy_kwargs"], {"nn": nn})}
    model = ALGORITHMS[algorithm]("MlpPolicy", task, **{**settings, "buffer_size": 1, "device": "cpu", "seed": 1})
    model.set_logger(configure(None, []))
    model.critic.features_extractor = source.critic.features_extractor  # whether the other normalises features or not
    model.critic.load_state_dict(source.critic.state_dict())
    model.critic.set_training_mode(False)
    model.replay_buffer = buffer
    return model


def value_range(model: QVPO | SDAC, observations: th.Tensor) -> tuple[float, float]:
    """Mean value of uniform actions, and of the best that gradient ascent finds from the best of 64 of them."""
    critic, shape = model.critic, (len(observations), 64, model.actor.action_dim)
    with th.no_grad():
        uniform = 2 * th.rand(shape, generator=th.Generator().manual_seed(0)) - 1
        values = critic.score(observations, uniform)
    actions = uniform[th.arange(len(uniform)), values.argmax(dim=1)]
    best = values.max(dim=1).values
    for length in np.repeat([0.1, 0.05, 0.02, 0.01], 15):
        value, gradient = critic.action_gradient(observations, actions)
        best = th.maximum(best, value)
        actions = (actions + length * shape[-1] ** 0.5 * F.normalize(gradient, dim=1)).clamp(-1, 1)
    return float(values.mean()), float(best.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("task")
    ours = [name for name, (algorithm, _) in ALGOS.items() if algorithm in ALGORITHMS]
    parser.add_argument("settings", nargs="+", choices=ours)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    with zipfile.ZipFile(arguments.checkpoint) as archive:
        buffer = unpickle(archive, "replay_buffer")
    source = (SDAC if "temperature" in data_in(arguments.checkpoint) else QVPO).load(arguments.checkpoint, device="cpu")
    rows = np.random.RandomState(0).randint(0, buffer.size(), 512)
    observations = th.as_tensor(buffer.observations[rows, 0], dtype=th.float32)
    writer = csv.writer(sys.stdout)
    for name in arguments.settings:
        model = model_of(name, arguments.task, source, buffer)
        low, high = value_range(model, observations)
        coefficients = model._policy_coefficients()
        start = time.process_time()
        for update in range(1, AFTER[-1] + 1):
            model._run_update(model._update_policy, model._sample_batch(256), *coefficients)
            if update not in AFTER:
                continue
            minutes = (time.process_time() - start) / 60
            with th.no_grad():
                scored = model.policy.score_candidates(observations, model.policy.draw_noise(len(rows), 32))
            shares = {
                share: (float(scored.scores.unflatten(1, (-1, k)).max(dim=2).values.mean()) - low) / (high - low)
                for share, k in (("single", 1), ("best_of_4", 4), ("best_of_32", 32))
            }
            row = dict(task=arguments.task, steps=source.num_timesteps, algo=name, updates=update, **shares)
            row |= dict(std=float(scored.candidates.std(dim=1).mean()), minutes=minutes)
            row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(row.values())
            sys.stdout.flush()
            if arguments.csv:
                append(arguments.csv, [row])


if __name__ == "__main__":
    main()
