"""
Learning curves through RL Zoo: every task with every algorithm and seed, two runs at a time, results as they come.

``python benchmarks/learning/run.py --tasks HalfCheetah-v5 --algos qvpo_ddim5 sac --seeds 0 1 --steps 40000``

Runs that are in the CSV file to their end are skipped, so that the same command goes on after an interruption; a run that was
broken off starts again. Each run has one thread. Needs ``pip install "sb3-qvpo[mujoco,zoo]"``.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COLUMNS = ["task", "algo", "seed", "step", "mean_return", "std_return", "episodes", "minutes", "last_step"]
SETUP = ["commit", "sb3_qvpo", "stable_baselines3", "torch", "cpu", "threads"]


def qvpo(**changes: Any) -> list[str]:
    """Arguments of RL Zoo for QVPO with changed settings."""
    params = [f"{name}:{value!r}" for name, value in changes.items()]
    return ["--algo", "qvpo", *(["-params", *params] if params else [])]


ALGOS: dict[str, list[str]] = {
    "qvpo": qvpo(),
    # Fewer candidates, fewer steps: N_d 16 of 64, and S of the 20 trained steps with the paper's noise or without any
    "qvpo_ddpm10": qvpo(n_train_candidates=16, policy_kwargs=dict(n_sampling_steps=10)),
    "qvpo_ddpm5": qvpo(n_train_candidates=16, policy_kwargs=dict(n_sampling_steps=5)),
    "qvpo_ddim10": qvpo(n_train_candidates=16, policy_kwargs=dict(n_sampling_steps=10, sampling_eta=0.0)),
    "qvpo_ddim5": qvpo(n_train_candidates=16, policy_kwargs=dict(n_sampling_steps=5, sampling_eta=0.0)),
    "qvpo_ddim5_delay2": qvpo(n_train_candidates=16, policy_kwargs=dict(n_sampling_steps=5, sampling_eta=0.0), policy_delay=2),
    # Fewer candidates alone, and candidates that share the first half of the chain
    "qvpo_nd16": qvpo(n_train_candidates=16),
    "qvpo_shared10": qvpo(n_train_candidates=16, n_shared_steps=10),
    **{name: ["--algo", name] for name in ("sac", "td3", "tqc", "crossq")},
}


@dataclass
class Run:
    """One run in a process of its own."""

    task: str
    algo: str
    seed: int
    steps: int
    eval_freq: int
    episodes: int
    folder: Path
    written: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        evaluation = ["--eval-freq", str(self.eval_freq), "--eval-episodes", str(self.episodes), "--n-eval-envs", "1"]
        command = [sys.executable, "-m", "rl_zoo3.train", *ALGOS[self.algo][:2], "--env", self.task, "-n", str(self.steps)]
        command += ["--seed", str(self.seed), "-f", str(self.folder), "--num-threads", "1", "--verbose", "0", *evaluation]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.log = (self.folder / "log.txt").open("w")
        self.process = subprocess.Popen([*command, *ALGOS[self.algo][2:]], env=environment, stdout=self.log, stderr=self.log)

    def new_rows(self) -> list[dict[str, Any]]:
        """Evaluations since the last call."""
        files = list(self.folder.glob("*/*/evaluations.npz"))
        if not files:
            return []
        try:
            data = np.load(files[0])
            steps, results = data["timesteps"], data["results"]
        except (OSError, ValueError, EOFError, KeyError):  # being written
            return []
        rows = [
            {
                **{"task": self.task, "algo": self.algo, "seed": self.seed, "step": int(steps[i]), "last_step": self.steps},
                **{"mean_return": round(float(results[i].mean()), 2), "std_return": round(float(results[i].std()), 2)},
                **{"episodes": len(results[i]), "minutes": round((time.time() - self.started) / 60, 2)},
            }
            for i in range(self.written, len(steps))
        ]
        self.written = len(steps)
        return rows


def setup() -> dict[str, Any]:
    """What the runs are made with."""
    import stable_baselines3
    import torch

    import sb3_qvpo

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    versions = [sb3_qvpo.__version__, stable_baselines3.__version__, torch.__version__]
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    return dict(zip(SETUP, [commit.stdout.strip(), *versions, cpu, 1], strict=True))


def read(file: Path) -> list[dict[str, str]]:
    """Rows that are there already."""
    return list(csv.DictReader(file.open())) if file.exists() else []


def unfinished_removed(file: Path) -> set[tuple[str, str, str, str]]:
    """Drop runs that were broken off from the file, and tell which are finished."""
    rows = read(file)
    key = ("task", "algo", "seed", "last_step")
    finished = {tuple(row[name] for name in key) for row in rows if int(row["step"]) >= int(row["last_step"])}
    kept = [row for row in rows if tuple(row[name] for name in key) in finished]
    if len(kept) < len(rows):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, [*COLUMNS, *SETUP], lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
    return finished  # type: ignore[return-value]  # four columns each


def append(file: Path, rows: list[dict[str, Any]], with_setup: dict[str, Any]) -> None:
    """Add rows to the file, with its header if it is new."""
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, [*COLUMNS, *SETUP], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **with_setup} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--algos", nargs="+", required=True, choices=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--eval-freq", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, default=HERE / "results.csv")
    arguments = parser.parse_args()

    finished = unfinished_removed(arguments.csv)
    waiting = [
        (task, algo, seed)
        for seed in arguments.seeds
        for task in arguments.tasks
        for algo in arguments.algos
        if (task, algo, str(seed), str(arguments.steps)) not in finished
    ]
    with_setup, running = setup(), []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < arguments.processes:
                task, algo, seed = waiting.pop(0)
                run_folder = Path(folder) / f"{task}_{algo}_{seed}"
                run_folder.mkdir()
                print(f"{task} {algo} seed {seed}: started", flush=True)
                running.append(Run(task, algo, seed, arguments.steps, arguments.eval_freq, arguments.episodes, run_folder))
            time.sleep(1)
            for run in list(running):
                ended = run.process.poll() is not None
                rows = run.new_rows()
                if rows:
                    append(arguments.csv, rows, with_setup)
                    last = rows[-1]
                    print(
                        f"{run.task} {run.algo} seed {run.seed}: {last['mean_return']} after {last['step']} steps", flush=True
                    )
                if ended:
                    running.remove(run)
                    run.log.close()
                    if run.process.returncode != 0:
                        raise SystemExit(f"{run.task} {run.algo} failed:\n{(run.folder / 'log.txt').read_text()[-3000:]}")


if __name__ == "__main__":
    main()
