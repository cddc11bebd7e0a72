"""
Learning curves through RL Zoo: every task with every algorithm and seed, two runs at a time, results as they come.

``python benchmarks/learning/run.py --tasks HalfCheetah-v5 --algos qvpo_ddim5 sac --seeds 0 1 --steps 40000``

The same command goes on after an interruption: runs that are in the CSV file to their end are skipped, a run of QVPO that was
broken off is resumed from its checkpoint, taken at each evaluation and kept in ``--folder``, others start again. Each run has
one thread. Columns of the CSV file: ``mean_return``, ``std_return`` over ``episodes`` episodes, the same ones each time, with
deterministic actions (QVPO: the best of 32), ``single_return`` with one sample of QVPO's policy; ``minutes`` since the start,
evaluations and all else on the machine included; ``train_minutes`` of processor time without evaluations. Needs
``pip install "sb3-qvpo[mujoco,zoo]"``.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent
CHECKPOINT = "run.zip"
RUN = ["task", "algo", "seed", "last_step"]
COLUMNS = ["task", "algo", "seed", "step", "mean_return", "std_return", "episodes", "minutes", "last_step"]
COLUMNS += ["single_return", "train_minutes"]
SETUP = ["commit", "sb3_qvpo", "stable_baselines3", "torch", "cpu", "threads"]


FEWER: dict[str, Any] = dict(n_train_candidates=16)
"""N_d 16 instead of 64."""


def steps(n_sampling_steps: int, eta: float = 1.0, **policy_kwargs: Any) -> dict[str, Any]:
    """Samples in some of the trained steps, with the paper's noise (DDPM, 1) or without noise after the start (DDIM, 0)."""
    return dict(policy_kwargs=dict(n_sampling_steps=n_sampling_steps, sampling_eta=eta, **policy_kwargs))


FAST: dict[str, Any] = {**FEWER, **steps(5, 0.0), "policy_delay": 2}
"""``hyperparams/qvpo_fast.yml``."""

ALGOS: dict[str, tuple[str, dict[str, Any]]] = {
    "qvpo": ("qvpo", {}),
    "qvpo_nd16": ("qvpo", FEWER),
    "qvpo_shared10": ("qvpo", {**FEWER, "n_shared_steps": 10}),
    **{f"qvpo_ddpm{n}": ("qvpo", {**FEWER, **steps(n)}) for n in (5, 10)},
    **{f"qvpo_ddim{n}": ("qvpo", {**FEWER, **steps(n, 0.0)}) for n in (5, 10)},
    "qvpo_ddim5_delay2": ("qvpo", FAST),
    # The paper's Figures 4 and 5 with the fast settings: entropy term and T, K_b and K_t, weighting, the authors' settings
    **{
        f"fast_T{T}_ent{c}": ("qvpo", {**FAST, "n_diffusion_steps": T, "ent_coef": c})
        for T in (5, 10, 20)
        for c in (0.0, 0.01)
    },
    **{
        f"fast_Kb{b}_Kt{t}": ("qvpo", {**FAST, "n_behavior_candidates": b, "n_target_candidates": t})
        for b, t in ((1, 1), (4, 1), (4, 2), (4, 4), (20, 2))
    },
    "fast_qcut": ("qvpo", {**FAST, "q_weighting": "qcut"}),
    "fast_official": (
        "qvpo",
        {
            **{**FAST, **steps(5, 0.0, net_arch=[256, 256, 256], optimizer_kwargs=dict(eps=1e-5))},
            **dict(learning_rate=1e-4, qf_learning_rate=3e-4, max_grad_norm=2.0, n_target_candidates=4),
            **dict(ent_coef="lin_0.02_0.002_0.9", replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        },
    ),
    **{name: (name, {}) for name in ("sac", "td3", "tqc", "crossq")},
}
"""Name in the tables: RL Zoo's name of the algorithm, and what is changed of its settings."""


def settings_of_v4(algo: str, task: str, folder: Path) -> Path | None:
    """
    RL Zoo's own algorithms have tuned settings for MuJoCo's v4 only, and train v5 with SB3's defaults, 100 random steps among
    them. The settings of v4 are written to a file for v5.

    :param algo: RL Zoo's name of the algorithm.
    :param task: Name of the task.
    :param folder: Where to write the file.
    :return: The file, or None if RL Zoo has settings for the task itself, or none for v4 either.
    """
    import rl_zoo3

    file = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml"
    known = yaml.safe_load(file.read_text()) if file.exists() else {}
    entry = known.get(task.replace("-v5", "-v4"))
    if task in known or entry is None:
        return None
    (folder / "settings.yml").write_text(yaml.safe_dump({task: entry}))
    return folder / "settings.yml"


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
    steps_before: int
    """Where the checkpoint goes on."""
    minutes_before: float
    train_minutes_before: float
    written: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        # A folder of its own for each part, so that its evaluations are found
        self.logs = Path(tempfile.mkdtemp(prefix=f"from_{self.steps_before}_", dir=self.folder))
        algo, settings = ALGOS[self.algo]
        self.evaluations = self.logs / "evaluations.jsonl"
        callbacks: list[Any] = [{"evaluation.FixedEvaluation": dict(file=str(self.evaluations))}]
        command = [sys.executable, "-m", "rl_zoo3.train", "--algo", algo, "--env", self.task, "--seed", str(self.seed)]
        settings_file = settings_of_v4(algo, self.task, self.folder)
        if settings_file is not None:
            command += ["-conf", str(settings_file)]
        command += ["-n", str(self.steps - self.steps_before), "-f", str(self.logs), "--num-threads", "1", "--verbose", "0"]
        command += ["--eval-freq", str(self.eval_freq), "--eval-episodes", str(self.episodes), "--n-eval-envs", "1"]
        if algo == "qvpo":
            checkpoint = str(self.folder / CHECKPOINT)
            if self.steps_before:
                command += ["-i", checkpoint]
            save = dict(save_freq=self.eval_freq, save_path=checkpoint)
            callbacks += [{"sb3_qvpo.ResumableCheckpointCallback": save}]
        command += ["-params", *(f"{name}:{value!r}" for name, value in {**settings, "callback": callbacks}.items())]
        self.log = (self.logs / "log.txt").open("w")
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def new_rows(self) -> list[dict[str, Any]]:
        """Evaluations since the last call."""
        files = list(self.logs.glob("*/*/evaluations.npz"))
        if not files:
            return []
        try:
            data = np.load(files[0])
            steps, results = data["timesteps"], data["results"]
        except (OSError, ValueError, EOFError, KeyError):  # being written
            return []
        minutes = self.minutes_before + (time.time() - self.started) / 60
        ours = {row["step"]: row for row in map(json.loads, self.evaluations.read_text().splitlines())}
        run = {"task": self.task, "algo": self.algo, "seed": self.seed, "last_step": self.steps}
        rows = []
        for step, returns in list(zip(steps, results, strict=True))[self.written :]:
            numbers = {
                **{"mean_return": returns.mean(), "std_return": returns.std(), "minutes": minutes},
                "train_minutes": self.train_minutes_before + ours[step]["train_minutes"],
            }
            if "single" in ours[step]:
                numbers["single_return"] = np.mean(ours[step]["single"])
            rounded = {name: round(float(number), 2) for name, number in numbers.items()}
            rows.append({**run, "step": int(step), "episodes": len(returns), **rounded})
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


def rows_of(rows: list[dict[str, str]], *run: str | int) -> list[dict[str, str]]:
    """The rows of one run: task, algorithm, seed, last step."""
    return [row for row in rows if [row[name] for name in RUN] == [str(key) for key in run]]


def steps_in(checkpoint: Path) -> int:
    """How many steps a run had done when its checkpoint was taken; 0 without one."""
    if not checkpoint.exists():
        return 0
    from sb3_qvpo import QVPO

    return QVPO.load(checkpoint, device="cpu").num_timesteps


def remove(file: Path, rows: list[dict[str, str]]) -> None:
    """Take rows out of the file: those that a run did after its last checkpoint."""
    if not rows:
        return
    kept = [row for row in read(file) if row not in rows]
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, [*COLUMNS, *SETUP], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


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
    parser.add_argument("--folder", type=Path, default=HERE / "runs", help="checkpoints and logs of unfinished runs")
    arguments = parser.parse_args()

    waiting = [(task, algo, seed) for seed in arguments.seeds for task in arguments.tasks for algo in arguments.algos]
    with_setup, running = setup(), []
    while waiting or running:
        while waiting and len(running) < arguments.processes:
            task, algo, seed = waiting.pop(0)
            before = rows_of(read(arguments.csv), task, algo, seed, arguments.steps)
            if before and int(before[-1]["step"]) >= arguments.steps:
                continue
            folder = arguments.folder.absolute() / f"{task}_{algo}_{seed}_{arguments.steps}"
            folder.mkdir(parents=True, exist_ok=True)
            done = steps_in(folder / CHECKPOINT)
            done = done if done < arguments.steps else 0
            remove(arguments.csv, [row for row in before if int(row["step"]) > done])
            kept = [row for row in before if int(row["step"]) <= done]
            minutes = [max((float(row[name] or 0) for row in kept), default=0.0) for name in ("minutes", "train_minutes")]
            print(f"{task} {algo} seed {seed}: started" + f" from step {done}" * bool(done), flush=True)
            evaluation = (arguments.eval_freq, arguments.episodes)
            running.append(Run(task, algo, seed, arguments.steps, *evaluation, folder, done, *minutes))
        time.sleep(1)
        for run in list(running):
            ended = run.process.poll() is not None
            rows = run.new_rows()
            if rows:
                append(arguments.csv, rows, with_setup)
                last = rows[-1]
                print(f"{run.task} {run.algo} seed {run.seed}: {last['mean_return']} after {last['step']} steps", flush=True)
            if ended:
                running.remove(run)
                run.log.close()
                if run.process.returncode != 0:
                    raise SystemExit(f"{run.task} {run.algo} failed:\n{(run.logs / 'log.txt').read_text()[-3000:]}")
                shutil.rmtree(run.folder)


if __name__ == "__main__":
    main()
