"""What RL Zoo's evaluations lack for the learning curves: the same start states each time, single samples, training time."""

import json
import time
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

SEED = 1_000_000
"""Seed of the episodes of every evaluation; training has the seed of its run."""


class FixedEvaluation(BaseCallback):
    """
    Beside RL Zoo's own evaluation, just before it: seed its environment, so that every evaluation of every run has the same
    start states; evaluate single samples of QVPO's policy, with fresh noise, instead of the best of ``n_eval_candidates``;
    note how much processor time training has taken so far without evaluations, which changes less with other processes than
    the time on the clock.

    :param file: One JSON object for each evaluation is appended here: ``step``, ``train_minutes``, and for QVPO ``single``,
        the returns with single samples.
    """

    def __init__(self, file: str):
        super().__init__()
        self.file = Path(file)
        self.evaluating_since: float | None = None
        self.evaluation_time = 0.0

    def _on_training_start(self) -> None:
        callbacks = self.locals["callback"].callbacks  # of the CallbackList given to learn()
        (self.evaluation,) = (callback for callback in callbacks if isinstance(callback, EvalCallback))
        self.start = time.process_time()

    def _on_step(self) -> bool:
        now = time.process_time()
        if self.evaluating_since is not None:
            self.evaluation_time += now - self.evaluating_since
            self.evaluating_since = None
        if self.n_calls % self.evaluation.eval_freq == 0:
            self.evaluating_since = now
            trained = (now - self.start - self.evaluation_time) / 60
            row: dict[str, Any] = {"step": self.num_timesteps, "train_minutes": trained}
            if hasattr(self.model.policy, "n_behavior_candidates"):
                row["single"] = self.single_returns()
            with self.file.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
            self.evaluation.eval_env.seed(SEED)
        return True

    def single_returns(self) -> list[float]:
        """Returns of episodes with one sample of the policy in each step; training's random numbers stay as they are."""
        model, evaluation = self.model, self.evaluation
        if model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, evaluation.eval_env)
        policy: Any = model.policy
        n_behavior_candidates, policy.n_behavior_candidates = policy.n_behavior_candidates, 1
        evaluation.eval_env.seed(SEED)
        try:
            with th.random.fork_rng():
                th.manual_seed(SEED)
                returns, _ = evaluate_policy(
                    model, evaluation.eval_env, evaluation.n_eval_episodes, deterministic=False, return_episode_rewards=True
                )
        finally:
            policy.n_behavior_candidates = n_behavior_candidates
        return list(map(float, returns))
