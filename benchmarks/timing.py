"""What the benchmarks share: models on an environment that costs nothing, interleaved timing, tables and CSV files."""

import argparse
import csv
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
import torch as th
from eager_reference import EagerReference
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_qvpo import QVPO, __version__
from sb3_qvpo.common.speed.cpu import OneDnnProducts
from sb3_qvpo.common.speed.graphs import EAGER_DECISIONS
from sb3_qvpo.common.speed.settings import candidate_dtype
from sb3_qvpo.common.speed.updates import EAGER_UPDATES

HERE = Path(__file__).parent
ROOT = HERE.parent
Rows = list[dict[str, Any]]
CPUINFO = Path("/proc/cpuinfo")
WARM_UP = 3 * max(EAGER_UPDATES, EAGER_DECISIONS)
"""Untimed calls on a GPU, which captures updates and decisions after some eager ones."""


class NoiseEnv(gym.Env):
    """Random float32 observations and rewards; episodes of 100 steps."""

    def __init__(self, obs_dim: int, action_dim: int):
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=self.observation_space.shape).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        observation = self.np_random.normal(size=self.observation_space.shape).astype(np.float32)
        return observation, float(self.np_random.normal()), False, self.steps == 100, {}


def trained(algorithm: type, obs_dim: int, action_dim: int, n_steps: int = 1_000, **kwargs: Any):
    """A model with a filled replay buffer and an optimiser step behind it."""
    kwargs = dict(buffer_size=10_000, learning_starts=n_steps, batch_size=256, seed=0, device="cpu") | kwargs
    model = algorithm("MlpPolicy", NoiseEnv(obs_dim, action_dim), **kwargs)
    return model.learn(n_steps)


def reference_arguments(model: QVPO, hidden: list[int]) -> dict[str, Any]:
    """Arguments of the eager reference for the settings of a model."""
    return dict(
        obs_dim=model.observation_space.shape[0],
        action_dim=model.actor.action_dim,
        betas=model.actor.diffusion.betas.clone(),
        hidden=hidden,
        n_d=model.n_train_candidates,
        n_e=model.n_uniform_actions,
        k_t=model.n_target_candidates,
    )


def reference_of(model: QVPO, hidden: list[int]) -> EagerReference:
    """The eager reference with the settings of a model."""
    return EagerReference(**reference_arguments(model, hidden))


def synchronize() -> None:
    """Wait for the GPU, where there is work on one."""
    if th.cuda.is_initialized():
        th.cuda.synchronize()


@contextmanager
def reference_here(model: QVPO, hidden: list[int], batch_size: int) -> Iterator[Callable[[], None]]:
    """An update of the eager reference, batch sampling included, on the device of the model."""
    eager, buffer = reference_of(model, hidden), model.replay_buffer
    yield lambda: eager.update(buffer.sample(batch_size))


def _reference_updates(connection: Any, threads: int, batch_size: int, arguments: dict[str, Any]) -> None:
    """What the process of :func:`reference_process` runs."""
    th.set_num_threads(threads)
    sac = trained(SAC, arguments["obs_dim"], arguments["action_dim"], policy_kwargs=dict(net_arch=[16]))
    buffer, eager = sac.replay_buffer, EagerReference(**arguments)
    connection.send("ready")
    while connection.recv() == "update":
        eager.update(buffer.sample(batch_size))
        connection.send("done")


@contextmanager
def reference_process(model: QVPO, hidden: list[int], batch_size: int) -> Iterator[Callable[[], None]]:
    """
    An update of the eager reference, batch sampling included, in a process of its own, which sleeps between calls. In the
    model's process it would profit from what the package does for the whole process (``keep_freed_memory()``).
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, th.get_num_threads(), batch_size, reference_arguments(model, hidden))
    process = context.Process(target=_reference_updates, args=arguments, daemon=True)
    process.start()
    there.close()
    here.recv()

    def update() -> None:
        here.send("update")
        here.recv()

    try:
        yield update
    finally:
        here.send("stop")
        process.join()


def products(model: QVPO, batch_size: int) -> Callable[[], None]:
    """
    Nothing but the products of an update's square hidden layers: what the processor needs at least. Types and, roughly, blocks
    are those of the package. The numbers are the same in each product. There must be two hidden layers or more.
    """
    width, *others = model.policy.actor_kwargs["net_arch"]
    n_drawn = batch_size * (model.n_train_candidates + model.n_target_candidates)
    # Critics and actor are trained as well, and each forward product has two backward ones
    n_valued = model.policy.critic.n_critics * (n_drawn + 3 * batch_size) + 3 * batch_size * (1 + model.n_uniform_actions)
    rows = {candidate_dtype(model.device): len(model.actor.diffusion.sampling_steps) * n_drawn}
    rows[th.float32] = rows.get(th.float32, 0) + n_valued
    # One product of all rows keeps a GPU busiest
    block = 2048 * th.get_num_threads() if model.device.type == "cpu" else n_drawn
    layers = []
    for dtype, n_rows in rows.items():
        x, weight = (th.randn(n, width, device=model.device).to(dtype) for n in (block, width))
        layers.append((x, weight, th.empty_like(x), round(len(others) * n_rows / block)))

    def multiply() -> None:
        with OneDnnProducts():
            for x, weight, out, n_blocks in layers:
                for _ in range(n_blocks):
                    th.mm(x, weight, out=out)

    return multiply


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, seconds: float = 1.0) -> dict[str, list[float]]:
    """
    Milliseconds of a call of each function. Functions take turns in each repeat, so that all see the same state of the
    machine. Each is called again and again for about as many seconds, because in training one update follows the other, too. A
    GPU is waited for at the end, not after each call.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    for repeat in range(repeats + 1):
        for name, function in functions.items():

            def seconds_of(n_calls: int, function: Callable[[], Any] = function) -> float:
                start = time.perf_counter()
                for _ in range(n_calls):
                    function()
                synchronize()
                return time.perf_counter() - start

            if repeat == 0:  # warms up
                seconds_of(WARM_UP if th.cuda.is_initialized() else 1)
                calls[name] = max(1, round(seconds / seconds_of(1)))
            else:
                times[name].append(1e3 * seconds_of(calls[name]) / calls[name])
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster: median and spread of the ratios within the repeats."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def parse_arguments(description: str, csv_name: str, settings: Collection[str] = ()) -> argparse.Namespace:
    """Arguments that all benchmarks take; sets the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls of each function in a repeat")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument(
        "--csv",
        type=Path,
        help=f"results/{csv_name}.csv by default, with one thread {csv_name}_one_thread.csv, on a GPU {csv_name}_gpu.csv",
    )
    if settings:
        parser.add_argument("--settings", nargs="+", choices=list(settings), default=list(settings), metavar="NAME")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.csv is None:
        where = "_gpu" if arguments.device == "cuda" else "_one_thread" * (arguments.threads == 1)
        arguments.csv = HERE / "results" / f"{csv_name}{where}.csv"
    arguments.seconds = 0.0 if arguments.quick else arguments.seconds
    th.set_num_threads(arguments.threads)
    return arguments


def processor() -> str:
    """Name of the processor, with family and model: virtual machines call several generations by one name."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    generation = [f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return fields["model name"] + f" ({' '.join(generation)})" * bool(generation)


def commit() -> str:
    """The commit that is measured, with a ``+`` if code has been changed since; empty outside of a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    # Result files do not count as code
    changed = git("status", "--porcelain", "--", "sb3_qvpo", "hyperparams", "benchmarks", "examples", ":!*.csv")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def report(rows: Rows, arguments: argparse.Namespace) -> None:
    """Print a table with what it was measured on, and write it to a CSV file."""
    setup = {
        "commit": commit(),
        "threads": arguments.threads,
        "cpu": processor(),
        "torch": th.__version__,
        "stable_baselines3": sb3.__version__,
        "sb3_qvpo": __version__,
    }
    if arguments.device == "cuda":
        setup["gpu"] = th.cuda.get_device_name()
    print("; ".join(f"{name} {value}" for name, value in setup.items()), "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *setup], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(rounded | setup)
    print(f"\nWritten to {arguments.csv}")
