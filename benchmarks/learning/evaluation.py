"""What RL Zoo's evaluations lack for the learning curves: the same start states each time, single samples, training time."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

SEED = 1_000_000
"""Seed of the episodes of every evaluation; training has the seed of its run."""


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The evaluations in a file of :class:`FixedEvaluation`. A line that is not yet complete is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def keep_lines(file: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the evaluations up to a step, and return them."""
    kept = [line for line in lines_of(file) if line["step"] <= last_step]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


@contextmanager
def best_of(policy: Any, n_candidates: int) -> Iterator[None]:
    """For a while, predictions that are not deterministic take the best of so many candidates."""
    before, policy.n_behavior_candidates = policy.n_behavior_candidates, n_candidates
    try:
        yield
    finally:
        policy.n_behavior_candidates = before


class FixedEvaluation(BaseCallback):
    """
    Three additions to RL Zoo's own evaluation. Its environment is seeded, so that every evaluation of every run has the same
    start states. Single samples of QVPO's policy, with fresh noise, are evaluated beside the best of ``n_eval_candidates``.
    The processor time of training is noted, without evaluations, because other processes change it less than the time on the
    clock.

    This callback must come before one that saves checkpoints. Then an evaluation is noted before the checkpoint after it is
    taken, and a resumed run goes on in the same file.

    :param file: One JSON object for each evaluation: ``step``, ``mean_return``, ``std_return``, ``episodes``, ``minutes`` on
        the clock, ``train_minutes``, and for QVPO ``single_return``.
    """

    def __init__(self, file: str):
        super().__init__()
        self.file = Path(file)
        self.pending: dict[str, Any] | None = None
        self.evaluation_time = 0.0

    def _on_training_start(self) -> None:
        callbacks = self.locals["callback"].callbacks  # of the CallbackList given to learn()
        (self.evaluation,) = (callback for callback in callbacks if isinstance(callback, EvalCallback))
        # So that evaluations come at multiples of their frequency, even if a resumed run starts between two
        self.n_calls = self.evaluation.n_calls = self.model.num_timesteps // self.training_env.num_envs
        before = keep_lines(self.file, self.model.num_timesteps)
        self.minutes_before = {name: before[-1][name] if before else 0.0 for name in ("minutes", "train_minutes")}
        self.start, self.clock_start = time.process_time(), time.time()

    def _on_step(self) -> bool:
        if self.n_calls % self.evaluation.eval_freq == 0:
            self.evaluating_since = time.process_time()
            trained = self.evaluating_since - self.start - self.evaluation_time
            self.pending = {
                "step": self.num_timesteps,
                "train_minutes": self.minutes_before["train_minutes"] + trained / 60,
            }
            if hasattr(self.model.policy, "n_behavior_candidates"):
                self.pending["single_return"] = float(np.mean(self.single_returns()))
            self.evaluation.eval_env.seed(SEED)
        return True

    def _on_rollout_start(self) -> None:
        self._note()

    def _on_training_end(self) -> None:
        self._note()

    def _note(self) -> None:
        if self.pending is None:
            return
        returns = self.evaluation.evaluations_results[-1]
        line = {
            **self.pending,
            **{"mean_return": float(np.mean(returns)), "std_return": float(np.std(returns)), "episodes": len(returns)},
            "minutes": self.minutes_before["minutes"] + (time.time() - self.clock_start) / 60,
        }
        with self.file.open("a") as opened:
            opened.write(json.dumps(line) + "\n")
        self.pending = None
        self.evaluation_time += time.process_time() - self.evaluating_since

    def single_returns(self) -> list[float]:
        """Returns of episodes with one sample of the policy in each step; training's random numbers stay as they are."""
        model, evaluation = self.model, self.evaluation
        if model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, evaluation.eval_env)
        evaluation.eval_env.seed(SEED)
        with best_of(model.policy, 1), th.random.fork_rng():
            th.manual_seed(SEED)
            returns, _ = evaluate_policy(
                model, evaluation.eval_env, evaluation.n_eval_episodes, deterministic=False, return_episode_rewards=True
            )
        return list(returns)
