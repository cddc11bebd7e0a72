"""
Where ``learn()`` spends its time with the paper's settings: update, environment, action, and all the rest.

``python benchmarks/bench_learn.py [--threads 2] [--repeats 3] [--device cuda]``; needs ``pip install ".[mujoco]"``. On a GPU
an action waits for the update before it, so only the whole step is timed.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from timing import Rows, parse_arguments, report, summary, synchronize

sys.path.insert(0, str(Path(__file__).parent / "learning"))  # is no package

from run import FAST

from sb3_qvpo import QVPO


def timed(function: Callable[..., Any], times: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, adding its seconds to ``times[name]``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times[name] += time.perf_counter() - start
        return result

    return run


def shares(algorithm: type, env_name: str, n_steps: int, device: str, **kwargs: Any) -> dict[str, float]:
    """Milliseconds of a step in each part, after a warm-up."""
    env = make_vec_env(env_name, seed=0)
    model = algorithm("MlpPolicy", env, learning_starts=300, buffer_size=10_000, seed=0, device=device, **kwargs)
    on_gpu = device == "cuda"  # it captures updates and actions after some eager ones
    model.learn(400 if on_gpu else 302)
    times = dict.fromkeys(("update", "environment", "action"), 0.0)
    model.train = timed(model.train, times, "update")
    model.predict = timed(model.predict, times, "action")
    env.step_wait = timed(env.step_wait, times, "environment")
    synchronize()
    start = time.perf_counter()
    model.learn(n_steps, reset_num_timesteps=False, log_interval=1)
    synchronize()
    total = time.perf_counter() - start
    times["rest"] = total - sum(times.values())
    parts = {} if on_gpu else times
    return {name: 1e3 * value / n_steps for name, value in (*parts.items(), ("step", total))}


def main() -> None:
    arguments = parse_arguments(str(__doc__), "learn")
    quick = dict(n_train_candidates=4, n_diffusion_steps=3, policy_kwargs=dict(net_arch=[16, 16])) if arguments.quick else {}
    device, repeats = arguments.device, 1 if arguments.quick else min(arguments.repeats, 3)
    n_steps, n_others = (20, 20) if arguments.quick else (1000, 1000) if device == "cuda" else (100, 500)
    runs: dict[str, list[dict[str, float]]] = {"QVPO": [], "QVPO, qvpo_fast.yml": [], "SB3 SAC": [], "SB3 TD3": []}
    for _ in range(repeats):
        runs["QVPO"].append(shares(QVPO, "Hopper-v5", n_steps, device, **quick))
        runs["QVPO, qvpo_fast.yml"].append(
            shares(QVPO, "Hopper-v5", n_steps, device, **(quick or {**FAST, "n_target_candidates": 1}))
        )
        runs["SB3 SAC"].append(shares(SAC, "Hopper-v5", n_others, device))
        runs["SB3 TD3"].append(shares(TD3, "Hopper-v5", n_others, device))
    rows: Rows = []
    for name, results in runs.items():
        for part in results[0]:
            of_the_step = sum(run[part] / run["step"] for run in results) / len(results)
            rows.append({"setting": name, "what": part, **summary([run[part] for run in results]), "share": of_the_step})
    report(rows, arguments)


if __name__ == "__main__":
    main()
