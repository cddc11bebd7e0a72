"""
Time of an environment step, environment, action and update together: a preset beside SB3's and sb3-contrib's algorithms, in
turn, with their settings of RL Zoo for MuJoCo. On one thread of a CPU it is processor time, in which other work on the machine
does not count. Otherwise it is time by the clock; the column ``clock`` says which.

``python benchmarks/bench_step.py [--threads 1] [--repeats 7]``; needs ``pip install ".[mujoco,zoo]"``. CrossQ has critics of
256 units, as all others here; sb3-contrib's default is 1024. ``ratio`` is over CrossQ's time in the same repeat. Actions are
eager: long runs compile them, which these steps are too few for.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from timing import WARM_UP, Rows, parse_arguments, ratio, report, summary, synchronize

sys.path.insert(0, str(Path(__file__).parent / "learning"))  # is no package

from run import FAST

from sb3_qvpo import QVPO, SDAC, presets

SMALL_CRITICS = dict(policy_delay=3, learning_rate=1e-3, policy_kwargs=dict(net_arch=dict(pi=[256, 256], qf=[256, 256])))
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CrossQ-256": (CrossQ, SMALL_CRITICS),
    "presets.fast": (QVPO, dict(presets.fast)),
    "presets.sdac": (SDAC, dict(presets.sdac)),
    "QVPO, 8 candidates in 5 steps, delay 2": (QVPO, FAST),
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
    "TQC": (TQC, {}),
}


def clock_for(threads: int, device: str) -> tuple[str, Callable[[], float]]:
    """Which time counts, and how to read it. Processor time of several threads adds up, and a GPU's is not in it."""
    if threads == 1 and device == "cpu":
        return "processor", time.process_time
    return "wall", time.perf_counter


def main() -> None:
    arguments = parse_arguments(str(__doc__), "step")
    n_steps, repeats = (20, 1) if arguments.quick else (100, arguments.repeats)
    small = dict(batch_size=16) if arguments.quick else {}
    kind, clock = clock_for(arguments.threads, arguments.device)
    # A GPU captures updates after some eager ones, and those of the policy are not in every step
    n_warm_up = 100 + (3 * WARM_UP if arguments.device == "cuda" else 30)
    rows: Rows = []
    for env_name in ("HalfCheetah-v5", "Humanoid-v5"):
        same = dict(learning_starts=100, buffer_size=10_000, seed=0, device=arguments.device, **small)
        models = {
            name: algorithm("MlpPolicy", env_name, **{**settings, **same}) for name, (algorithm, settings) in MODELS.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            model.learn(n_warm_up)
        for _ in range(repeats):
            for name, model in models.items():
                synchronize()
                start = clock()
                model.learn(n_steps, reset_num_timesteps=False)
                synchronize()
                times[name].append(1e3 * (clock() - start) / n_steps)
        rows += [
            {"env": env_name, "setting": name, "clock": kind, **summary(each), **ratio(each, times["CrossQ-256"])}
            for name, each in times.items()
        ]
    report(rows, arguments)


if __name__ == "__main__":
    main()
