"""
Does drawing candidates for training in bfloat16 change what is learnt? Pendulum-v1 with 16 candidates in five DDPM
steps, the same seeds in both types.

``python benchmarks/learning/precision.py [--seeds 0 1 2 3 4]`` takes about 1.5 minutes for each of ten runs. Runs that
are in the CSV file are skipped.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch as th
from quickstart import SETTINGS, returns_of
from run import append, read, setup

from sb3_qvpo import QVPO
from sb3_qvpo.common.speed.settings import settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--eval-freq", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "precision.csv")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    done = {(row["algo"], int(row["seed"])) for row in read(arguments.csv) if row["step"] == row["last_step"]}
    for seed in arguments.seeds:
        for dtype in ("float32", "bfloat16"):
            if (dtype, seed) in done:
                continue
            settings.candidate_dtype = dtype
            start, rows = time.time(), []
            model = QVPO("MlpPolicy", "Pendulum-v1", **SETTINGS["version_0.1"], seed=seed, device="cpu")
            for step in range(arguments.eval_freq, arguments.steps + 1, arguments.eval_freq):
                model.learn(arguments.eval_freq, reset_num_timesteps=False)
                returns = returns_of(model)
                rows.append(
                    {
                        **{"task": "Pendulum-v1", "algo": dtype, "seed": seed, "step": step, "last_step": arguments.steps},
                        **{"mean_return": round(float(np.mean(returns)), 2), "std_return": round(float(np.std(returns)), 2)},
                        **{"episodes": 20, "minutes": round((time.time() - start) / 60, 2)},
                        **setup(),
                    }
                )
            append(arguments.csv, rows)
            print(f"seed {seed}, {dtype}: {rows[-1]['mean_return']}", flush=True)


if __name__ == "__main__":
    main()
