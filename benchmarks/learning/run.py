"""
Learning curves through RL Zoo: every task with every algorithm and seed, two runs at a time, results as they come.

``python benchmarks/learning/run.py --tasks HalfCheetah-v5 --algos qvpo_ddim5 sac --seeds 0 1 --steps 40000``

The same command goes on after an interruption. Runs that are in the CSV file to their end are skipped. A run of QVPO or SDAC
that was broken off is resumed from its checkpoint, taken at each evaluation and kept in ``--folder``. Others start again. Each
run has one thread. Needs ``pip install ".[mujoco,zoo]"``.

Columns of the CSV file:

- ``mean_return``, ``std_return``: over ``episodes`` episodes, the same ones each time, with deterministic actions (QVPO: the
  best of 32).
- ``single_return``: with one sample of a diffusion policy.
- ``minutes``: since the start, evaluations and all else on the machine included.
- ``train_minutes``: processor time without evaluations.
"""

import argparse
import csv
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from evaluation import keep_lines, lines_of

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no package

from timing import commit, processor
from torch import nn

from sb3_qvpo import presets, zoo
from sb3_qvpo.common.runs.checkpoints import open_checkpoint, saved_model

HERE = Path(__file__).parent
CHECKPOINT, EVALUATIONS = "run.zip", "evaluations.jsonl"
RUN = ["task", "algo", "seed", "last_step"]
COLUMNS = ["task", "algo", "seed", "step", "mean_return", "std_return", "episodes", "minutes", "last_step"]
COLUMNS += ["single_return", "train_minutes"]
OTHERS = ["sb3_contrib", "rl_zoo3", "gymnasium", "mujoco"]
SETUP = ["commit", "sb3_qvpo", "stable_baselines3", "torch", "cpu", "threads", *OTHERS, "gpu"]


FEWER: dict[str, Any] = dict(n_train_candidates=16)
"""N_d 16 instead of 64."""


def steps(n_sampling_steps: int, eta: float = 1.0, **policy_kwargs: Any) -> dict[str, Any]:
    """Samples in some of the trained steps, with the paper's noise (DDPM, 1) or without noise after the start (DDIM, 0)."""
    return dict(policy_kwargs=dict(n_sampling_steps=n_sampling_steps, sampling_eta=eta, **policy_kwargs))


def noise(std: float, kind: str = "normal") -> dict[str, Any]:
    """RL Zoo's noise on the actions that are collected."""
    return dict(noise_type=kind, noise_std=std)


DELAYED: dict[str, Any] = {**FEWER, **steps(5), "policy_delay": 2}
"""16 candidates in 5 steps, and a policy update after every other update of the critics."""

EIGHT: dict[str, Any] = {"n_train_candidates": 8, "n_uniform_actions": 2, "ent_coef": 0.05, **steps(5)}
"""Half as many candidates again. A fifth of the uniform actions, each with five times the weight: the same in total."""

FAST: dict[str, Any] = {**EIGHT, "policy_delay": 2}
"""``hyperparams/qvpo_fast.yml`` of version 0.1."""

CROSSQ_256: dict[str, Any] = dict(policy_kwargs="dict(net_arch=dict(pi=[256, 256], qf=[256, 256]))")
"""sb3-contrib's CrossQ with networks as wide as all others here; its critics have 1024 units by default."""

MISH: dict[str, Any] = dict(activation_fn=nn.Mish, critic_activation_fn=nn.ReLU)
"""The paper's activation in the actor."""


def in_zoo(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a preset as RL Zoo reads them: ``policy_kwargs`` as text, classes by their names."""
    policy_kwargs = ", ".join(
        f"{name}={f'nn.{value.__name__}' if isinstance(value, type) else repr(value)}"
        for name, value in settings["policy_kwargs"].items()
    )
    return {**settings, "policy_kwargs": f"dict({policy_kwargs})"}


def preset(policy_kwargs: dict[str, Any] | None = None, name: str = "fast", **changes: Any) -> tuple[str, dict[str, Any]]:
    """The preset of :mod:`sb3_qvpo.presets` that is called so, with some settings changed."""
    settings = getattr(presets, name)
    kwargs = {**settings["policy_kwargs"], **(policy_kwargs or {})}
    return ("qvpo" if name == "fast" else name), in_zoo({**settings, **changes, "policy_kwargs": kwargs})


FORMER: dict[str, dict[str, Any]] = {
    "fast": dict(n_steps=3, n_behavior_candidates=[2, 8, 16], training_action_noise=0.0, eval_noise_scale=1.0),
    "sdac": dict(batch_size=128, n_steps=3, n_behavior_candidates=4, eval_noise_scale=1.0, n_improvement_steps=0),
}
"""What each preset had before, in the place of its own."""


def former(policy_kwargs: dict[str, Any] | None = None, name: str = "fast", **changes: Any) -> tuple[str, dict[str, Any]]:
    """The preset that is called so as it was before: :data:`FORMER` and raw inputs."""
    kwargs = {"normalize_features": False, **(policy_kwargs or {})}
    return preset(kwargs, name, **{**FORMER[name], **changes})


def steady(policy_kwargs: dict[str, Any] | None = None, **changes: Any) -> tuple[str, dict[str, Any]]:
    """The preset ``fast`` with noise on trained actions that does not fall."""
    return preset(policy_kwargs, training_action_noise=0.2, **changes)


QUIET: dict[str, Any] = dict(eval_noise_scale=0.3)
"""Less noise in evaluation."""

WIDE: dict[str, Any] = dict(net_arch=[256, 256])
"""An actor as wide as the critics."""

FIRST: dict[str, Any] = dict(n_steps=1, n_behavior_candidates=4)
"""Returns and candidates for acting of ``presets.fast`` at first."""

FIRST_SDAC: dict[str, Any] = dict(batch_size=256, n_steps=1, temperature=0.2, n_target_candidates=4, policy_kwargs=WIDE)
"""``presets.sdac`` at first."""

SMALL_OFFICIAL_SDAC: dict[str, Any] = dict(
    learning_starts=5_000,
    n_reverse_samples=16,
    n_behavior_candidates=4,
    n_target_candidates=4,
    policy_kwargs=dict(n_sampling_steps=5, activation_fn=nn.ReLU),
)
"""The class's defaults, which are those of SDAC's authors, for a CPU: a quarter of the draws, an eighth of the candidates."""

OWN_ADAM: dict[str, Any] = dict(learning_rate=3e-4, policy_delay=2)
"""For critics without batch normalisation, which the preset's steps and delay are made for."""

LEAN: dict[str, Any] = dict(n_train_candidates=1, n_uniform_actions=1)
"""The fewest candidates that gradient steps and the entropy term need."""

ALGOS: dict[str, tuple[str, dict[str, Any]]] = {
    "preset_fast": preset(),
    # What each part of it earns
    "preset_fast_qadv": preset(q_weighting="qadv"),
    "preset_fast_no_improvement": preset(n_improvement_steps=0, n_train_candidates=8),
    **{
        f"preset_fast_{kind}": preset(critic_type=kind, **OWN_ADAM, policy_kwargs=dict(optimizer_kwargs={}))
        for kind in ("twin", "quantile")
    },
    **{f"preset_fast_returns_{n}": preset(n_steps=n) for n in (1, 3)},
    **{f"preset_fast_train_noise{std}": preset(training_action_noise=std) for std in (0.0, 0.05, 0.1)},
    # Lower in the end, or earlier so low
    "preset_fast_train_noise_to0.02": preset(training_action_noise="lin_0.2_0.02_0.3"),
    "preset_fast_train_noise_sooner": preset(training_action_noise="lin_0.2_0.05_0.15"),
    "preset_fast_raw": preset(policy_kwargs=dict(normalize_features=False)),
    "preset_fast_mix": preset(n_behavior_candidates=FORMER["fast"]["n_behavior_candidates"]),
    "preset_fast_wide": preset(policy_kwargs=WIDE),
    "preset_fast_renorm": preset(policy_kwargs=dict(renorm_start=20_000)),
    "preset_fast_noise": preset(policy_kwargs=dict(prediction="noise")),
    "preset_fast_ddpm": preset(policy_kwargs=dict(sampler="ddpm")),
    "preset_fast_karras": preset(n_diffusion_steps=5, policy_kwargs=dict(noise_schedule="karras")),
    "preset_fast_nd8": preset(n_train_candidates=8),
    "preset_fast_kt1": preset(n_target_candidates=1),
    **{f"preset_fast_kb{k}": preset(n_behavior_candidates=k) for k in (4, 16)},
    "preset_fast_batch128": preset(batch_size=128),
    **{f"preset_fast_pessimism{beta}": preset(policy_kwargs=dict(pessimism=beta)) for beta in (0.0, 0.5)},
    # presets.fast while its noise on trained actions did not fall
    "steady": steady(),
    "steady_wide": steady(policy_kwargs=WIDE),
    "steady_batch128": steady(batch_size=128),
    **{f"steady_pessimism{beta}": steady(policy_kwargs=dict(pessimism=beta)) for beta in (0.0, 0.5)},
    "steady_batch128_pessimism0.0": steady(batch_size=128, policy_kwargs=dict(pessimism=0.0)),
    "sdac": preset(name="sdac"),
    **{f"sdac_temperature{t}": preset(name="sdac", temperature=t) for t in (0.1, 0.2, 0.5)},
    # Noise on the actions learnt
    "sdac_train_noise0.2": preset(name="sdac", training_action_noise=0.2),
    "sdac_train_noise_falls": preset(name="sdac", training_action_noise="lin_0.2_0.05_0.3"),
    "sdac_kt4": preset(name="sdac", n_target_candidates=4),
    # What the draws around better actions earn
    "sdac_no_improvement": preset(name="sdac", n_improvement_steps=0),
    "sdac_no_improvement_kt4": preset(name="sdac", n_improvement_steps=0, n_target_candidates=4),
    # The authors' settings, with fewer candidates, draws and steps of a chain
    "sdac_official_small": ("sdac", in_zoo(SMALL_OFFICIAL_SDAC)),
    "former_sdac": former(name="sdac"),
    **{f"former_sdac_temperature{t}": former(name="sdac", temperature=t) for t in (0.03, 0.1, 0.2, 0.5)},
    **{f"former_sdac_m{m}": former(name="sdac", n_reverse_samples=m) for m in (8, 32)},
    "former_sdac_kb16_batch256": former(name="sdac", n_behavior_candidates=16, batch_size=256),
    "former_sdac_1step": former(name="sdac", **FIRST_SDAC),
    # presets.fast as it was before
    "former": former(),
    **{f"former_kb{k}": former(n_behavior_candidates=k) for k in (4, 8, 16)},
    **{f"former_kb{k}_batch128": former(n_behavior_candidates=k, batch_size=128) for k in (4, 32)},
    # Evaluated with less noise, as the preset is, and with shorter returns
    "former_quiet": former(**QUIET),
    **{f"former_quiet_returns_{n}": former(**QUIET, n_steps=n) for n in (1, 2)},
    "former_quiet_returns_2_kb4": former(**QUIET, n_steps=2, n_behavior_candidates=4),
    # Collecting with fewer candidates, and with returns of one step, as the preset was at first
    "former_1step": former(**FIRST),
    "former_1step_batch128": former(**FIRST, batch_size=128),
    "former_1step_batch128_2updates": former(**FIRST, batch_size=128, gradient_steps=2, policy_delay=6),
    "former_1step_norm": former(**FIRST, policy_kwargs=dict(normalize_features=True)),
    "former_1step_lean": former(**FIRST, **LEAN),
    "former_1step_lean_lr2e-3": former(**FIRST, **LEAN, learning_rate=2e-3, qf_learning_rate=1e-3),
    # With a wide actor, too, which the preset had even before
    "former_pi256": former(**FIRST, policy_kwargs=WIDE),
    "former_pi256_nd8": former(**FIRST, policy_kwargs=WIDE, n_train_candidates=8),
    **{f"former_pi256_kt{k}": former(**FIRST, policy_kwargs=WIDE, n_target_candidates=k) for k in (1, 2)},
    "former_pi256_eta0.1": former(**FIRST, policy_kwargs=WIDE, improvement_step=0.1),
    "former_pi256_mish": former(**FIRST, policy_kwargs={**WIDE, **MISH}),
    "former_pi256_kt1_eta0.1_mish": former(
        **FIRST, n_target_candidates=1, improvement_step=0.1, policy_kwargs={**WIDE, **MISH}
    ),
    "former_pi256_3steps": former(**FIRST, policy_kwargs={**WIDE, "n_sampling_steps": 3}),
    "former_pi256_ddpm": former(**FIRST, policy_kwargs={**WIDE, "sampler": "ddpm"}),
    "former_pi256_karras": former(**FIRST, n_diffusion_steps=5, policy_kwargs={**WIDE, "noise_schedule": "karras"}),
    "crossq_256": ("crossq", CROSSQ_256),
    # Without the bonus for a policy that stays random: what it does to CrossQ
    "crossq_256_no_entropy": ("crossq", {**CROSSQ_256, "ent_coef": 1e-4}),
    "qvpo": ("qvpo", {}),
    "qvpo_ddpm5": ("qvpo", {**FEWER, **steps(5)}),
    **{f"qvpo_ddim{n}": ("qvpo", {**FEWER, **steps(n, 0.0)}) for n in (5, 10)},
    "qvpo_ddpm5_delay2": ("qvpo", DELAYED),
    "qvpo_ddim5_delay2": ("qvpo", {**DELAYED, **steps(5, 0.0)}),
    "qvpo_ddpm5_nd8": ("qvpo", EIGHT),
    "qvpo_ddpm5_nd8_delay2": ("qvpo", FAST),
    "qvpo_ddpm5_nd8_delay2_batch128": ("qvpo", {**FAST, "batch_size": 128}),
    "qvpo_ddpm5_nd8_delay2_tau0.01": ("qvpo", {**FAST, "tau": 0.01}),
    # RL Zoo's learning rate for TD3 on MuJoCo; SAC and QVPO have 3e-4
    "qvpo_ddpm5_nd8_delay2_lr1e-3": ("qvpo", {**FAST, "learning_rate": 1e-3}),
    "qvpo_ddpm5_nd8_delay2_qf_lr1e-3": ("qvpo", {**FAST, "qf_learning_rate": 1e-3}),
    # A narrow policy's replay buffer tells the critics little about other actions
    **{f"qvpo_ddpm5_nd8_delay2_noise{std}": ("qvpo", {**FAST, **noise(std)}) for std in (0.2, 0.5)},
    "qvpo_ddpm5_nd8_noise0.2": ("qvpo", {**EIGHT, **noise(0.2)}),
    **{
        f"qvpo_ddpm5_nd8_delay2_kt1_noise{std}": ("qvpo", {**FAST, **noise(std), "n_target_candidates": 1})
        for std in (0.2, 0.5)
    },
    "qvpo_ddpm5_nd8_delay2_noise0.2_3steps": ("qvpo", {**FAST, **noise(0.2), "n_steps": 3}),
    "qvpo_ddpm5_nd8_delay2_ou0.2": ("qvpo", {**FAST, **noise(0.2, "ornstein-uhlenbeck")}),
    "qvpo_ddpm5_nd8_delay2_noise0.2_lr3e-4": ("qvpo", {**FAST, **noise(0.2), "learning_rate": 3e-4}),
    "qvpo_ddpm5_nd8_delay2_ent0.25": ("qvpo", {**FAST, "ent_coef": 0.25}),
    "qvpo_ddpm5_nd8_delay2_kb1": ("qvpo", {**FAST, "n_behavior_candidates": 1}),
    # The paper's Figures 4 and 5 with the fast settings: entropy term and T, K_b and K_t, weighting, the authors' settings
    **{
        f"fast_T{T}_ent{c}": ("qvpo", {**FAST, "n_diffusion_steps": T, "ent_coef": c})
        for T in (5, 10, 20)
        for c in (0.0, 0.05)
        if (T, c) != (20, 0.05)  # qvpo_ddpm5_nd8_delay2
    },
    **{
        f"fast_Kb{b}_Kt{t}": ("qvpo", {**FAST, "n_behavior_candidates": b, "n_target_candidates": t})
        for b, t in ((1, 1), (4, 1), (4, 2), (4, 4), (20, 2))  # one of them is the task's own: (4, 4) on HalfCheetah
    },
    "fast_qcut": ("qvpo", {**FAST, "q_weighting": "qcut"}),
    "fast_official": (
        "qvpo",
        {
            **{**FAST, **steps(5, net_arch=[256, 256, 256], optimizer_kwargs=dict(eps=1e-5))},
            **dict(learning_rate=1e-4, qf_learning_rate=3e-4, max_grad_norm=2.0, n_target_candidates=4),
            **dict(
                n_uniform_actions=10,
                ent_coef="lin_0.02_0.002_0.9",
                replay_buffer_kwargs=dict(handle_timeout_termination=False),
            ),
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


def training_command(task: str, algo: str, seed: int, folder: Path, n_steps: int, evaluation: list[str]) -> list[str]:
    """
    RL Zoo's command for a run.

    :param task: Name of the task.
    :param algo: A name in :data:`ALGOS`.
    :param seed: Seed of the run.
    :param folder: Where the run keeps its files; a checkpoint in it is resumed.
    :param n_steps: Environment steps, from the checkpoint if there is one.
    :param evaluation: RL Zoo's options for evaluations.
    :return: The command.
    """
    algorithm, settings = ALGOS[algo]
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", algorithm, "--env", task, "--seed", str(seed)]
    command += ["-n", str(n_steps), "-f", str(folder), "--num-threads", "1", "--verbose", "0", *evaluation]
    settings_file = settings_of_v4(algorithm, task, folder)
    if settings_file is not None:
        command += ["-conf", str(settings_file)]
    callbacks: list[Any] = [{"evaluation.FixedEvaluation": dict(file=str(folder / EVALUATIONS))}]
    if algorithm in zoo.ALGORITHMS:
        checkpoint = folder / CHECKPOINT
        if checkpoint.exists():
            command += ["-i", str(checkpoint)]
        eval_freq = int(evaluation[evaluation.index("--eval-freq") + 1])
        callbacks += [{"sb3_qvpo.ResumableCheckpointCallback": dict(save_freq=eval_freq, save_path=str(checkpoint))}]
    return [*command, "-params", *(f"{name}:{value!r}" for name, value in {**settings, "callback": callbacks}.items())]


@dataclass
class Run:
    """One run, trained in a process of its own."""

    task: str
    algo: str
    seed: int
    steps: int
    folder: Path
    csv: Path
    process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return f"{self.task} {self.algo} seed {self.seed}"

    def rows(self) -> list[dict[str, str]]:
        """Its rows in the CSV file."""
        key = [self.task, self.algo, str(self.seed), str(self.steps)]
        return [row for row in read(self.csv) if [row[name] for name in RUN] == key]

    def is_finished(self) -> bool:
        """Whether the CSV file has its last evaluation."""
        return any(int(row["step"]) >= self.steps for row in self.rows())

    def start(self, evaluation: list[str]) -> None:
        """Train from the checkpoint, or from the start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = steps_in(self.folder / CHECKPOINT)
        # Evaluations are noted before the checkpoint is taken. Add those up to it that the CSV file lacks
        self.collect(done)
        if self.is_finished():
            return
        # Evaluations after the checkpoint will come again
        remove(self.csv, [row for row in self.rows() if int(row["step"]) > done])
        keep_lines(self.folder / EVALUATIONS, done)
        command = training_command(self.task, self.algo, self.seed, self.folder, self.steps - done, evaluation)
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with (self.folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        print(f"{self}: started" + f" from step {done}" * bool(done), flush=True)

    def collect(self, last: int | None = None) -> None:
        """Add new evaluations, up to a step, to the CSV file."""
        known = {int(row["step"]) for row in self.rows()}
        new = [
            {
                **{"task": self.task, "algo": self.algo, "seed": self.seed, "last_step": self.steps},
                **{name: round(value, 2) if isinstance(value, float) else value for name, value in line.items()},
            }
            for line in lines_of(self.folder / EVALUATIONS)
            if line["step"] not in known and (last is None or line["step"] <= last)
        ]
        for row in new:
            print(f"{self}: {row['mean_return']} after {row['step']} steps", flush=True)
        if new:
            append(self.csv, [{**row, **setup()} for row in new], [*COLUMNS, *SETUP])

    def has_ended(self) -> bool:
        """
        Whether the process has ended; then its files are removed.

        :return: False while it runs.
        :raises SystemExit: If training failed, or stopped before its end.
        """
        if self.process is not None and self.process.poll() is None:
            return False
        self.collect()
        if not self.is_finished():
            log = (self.folder / "log.txt").read_text()[-3000:]
            raise SystemExit(f"{self} stopped before its end; what it has done is in {self.folder}:\n{log}")
        shutil.rmtree(self.folder)
        return True


@functools.cache
def setup() -> dict[str, Any]:
    """What the runs are made with."""
    import stable_baselines3
    import torch

    import sb3_qvpo

    versions = [sb3_qvpo.__version__, stable_baselines3.__version__, torch.__version__]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""  # RL Zoo's and SB3's choice where there is one
    return dict(zip(SETUP, [commit(), *versions, processor(), 1, *map(installed, OTHERS), gpu], strict=True))


def installed(package: str) -> str:
    """The version of a package; empty if it is not installed, because not all studies need all."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no file."""
    return list(csv.DictReader(file.open())) if file.exists() else []


def steps_in(checkpoint: Path) -> int:
    """How many steps a run had done when its checkpoint was taken; 0 without one."""
    return int(data_in(checkpoint)["num_timesteps"]) if checkpoint.exists() else 0


def data_in(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's model has besides weights: settings and counters, by name."""
    from stable_baselines3.common.save_util import load_from_zip_file

    with open_checkpoint(checkpoint) as archive:
        data, _, _ = load_from_zip_file(saved_model(archive), device="cpu")
    return cast(dict[str, Any], data)


def remove(file: Path, rows: list[dict[str, str]]) -> None:
    """Take rows out of the file: those that a run did after its last checkpoint."""
    if not rows:
        return
    kept = [row for row in read(file) if row not in rows]
    write(file, kept, next(csv.reader(file.open())))


def write(file: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write a file anew, in one step. A column that a row lacks is left empty."""
    beside = file.with_suffix(".new")
    with beside.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(file)


def append(file: Path, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """
    Add rows to a file.

    :param file: It keeps its columns; those that it lacks come after them, empty in the rows that are there.
    :param rows: Rows.
    :param columns: Columns of a new file, by default those of the rows.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    known = next(csv.reader(file.open()), []) if file.exists() else (columns or [])
    wanted = [*known, *(name for name in rows[0] if name not in known)]
    if not file.exists() or wanted != known:
        write(file, read(file), wanted)
    with file.open("a", newline="") as opened:
        csv.DictWriter(opened, wanted, lineterminator="\n").writerows(rows)


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
    if arguments.steps % arguments.eval_freq:
        parser.error(f"--steps must be a multiple of --eval-freq {arguments.eval_freq}, got {arguments.steps}")

    evaluation = ["--eval-freq", str(arguments.eval_freq), "--eval-episodes", str(arguments.episodes), "--n-eval-envs", "1"]
    waiting = [
        Run(
            task,
            algo,
            seed,
            arguments.steps,
            arguments.folder.absolute() / f"{task}_{algo}_{seed}_{arguments.steps}",
            arguments.csv,
        )
        for seed in arguments.seeds
        for task in arguments.tasks
        for algo in arguments.algos
    ]
    waiting, running = [run for run in waiting if not run.is_finished()], []
    try:
        while waiting or running:
            while waiting and len(running) < arguments.processes:
                running.append(waiting.pop(0))
                running[-1].start(evaluation)
            time.sleep(1)
            for run in list(running):
                run.collect()
                if run.has_ended():
                    running.remove(run)
    finally:
        # Nobody would collect their evaluations
        for run in running:
            if run.process is not None:
                run.process.terminate()


if __name__ == "__main__":
    main()
