"""
How long an update takes. Every setting is compared with the eager reference, SB3's SAC and TD3. An update is also timed part
by part.

``python benchmarks/bench_update.py [--threads 2] [--repeats 7] [--settings NAME …] [--device cuda]``. Parts are
timed on the CPU only.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import SAC, TD3
from timing import (
    Rows,
    interleaved,
    parse_arguments,
    products,
    ratio,
    reference_here,
    reference_process,
    report,
    summary,
    trained,
)

from sb3_qvpo import QVPO
from sb3_qvpo.common.speed.cpu import OneDnnProducts
from sb3_qvpo.common.speed.settings import settings

PAPER = dict(obs_dim=11, action_dim=3, batch_size=256, n_train_candidates=64, n_diffusion_steps=20, hidden=[256, 256])
SETTINGS: dict[str, dict[str, Any]] = {
    "paper (Hopper)": {},
    "three layers": dict(hidden=[256, 256, 256]),
    "Humanoid": dict(obs_dim=348, action_dim=17),
    "N_d 16": dict(n_train_candidates=16),
    "N_d 16, 5 steps": dict(n_train_candidates=16, sampler=dict(n_sampling_steps=5)),
    "N_d 8, N_e 2, 5 steps": dict(n_train_candidates=8, n_uniform_actions=2, sampler=dict(n_sampling_steps=5)),
    "N_d 16, 5 steps, policy_delay 2": dict(n_train_candidates=16, policy_delay=2, sampler=dict(n_sampling_steps=5)),
    "N_d 8, N_e 2, 5 steps, policy_delay 2": dict(
        n_train_candidates=8, n_uniform_actions=2, policy_delay=2, sampler=dict(n_sampling_steps=5)
    ),
    "N_d 16, 5 DDIM steps": dict(n_train_candidates=16, sampler=dict(n_sampling_steps=5, sampling_eta=0.0)),
    "T 10": dict(n_diffusion_steps=10),
    "batch 128": dict(batch_size=128),
}
MEMORY: dict[str, dict[str, Any]] = {
    **{name: SETTINGS[name] for name in ("paper (Hopper)", "Humanoid")},
    "Humanoid, batch 1024, N_d 256": dict(SETTINGS["Humanoid"], batch_size=1024, n_train_candidates=256),
}
PRODUCTS = "products of hidden layers alone, of a whole update"
QUICK = dict(batch_size=16, n_train_candidates=4, n_diffusion_steps=3, hidden=[16, 16], sampler={})


def with_settings(enabled: bool, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with the fast paths on or off."""

    def run() -> None:
        settings.enabled = enabled
        try:
            function()
        finally:
            settings.enabled = True

    return run


def built(changes: dict[str, Any]) -> tuple[QVPO, dict[str, Any]]:
    """A model with the paper's settings and changes, and these settings."""
    setting: dict[str, Any] = {"sampler": {}} | PAPER | changes
    arguments = {name: value for name, value in setting.items() if name not in ("hidden", "sampler")}
    return trained(QVPO, **arguments, policy_kwargs=dict(net_arch=setting["hidden"], **setting["sampler"])), setting


def by_setting(name: str, changes: dict[str, Any], repeats: int, seconds: float, device: str) -> Rows:
    """One row for each implementation of one setting; with a delay, the mean of updates with and without the policy's."""
    # The reference always draws in all steps, and updates the policy each time
    model, setting = built({**changes, "device": device})
    hidden, batch_size = setting["hidden"], setting["batch_size"]
    functions: dict[str, Callable[[], Any]] = {
        "QVPO, eager": with_settings(False, lambda: model.train(model.policy_delay, batch_size)),
        "QVPO": with_settings(True, lambda: model.train(model.policy_delay, batch_size)),
    }
    if not changes or "batch_size" in changes:
        for algorithm in (SAC, TD3):
            other = trained(
                algorithm,
                setting["obs_dim"],
                setting["action_dim"],
                batch_size=batch_size,
                policy_kwargs=dict(net_arch=hidden),
                device=device,
            )
            functions[f"SB3 {algorithm.__name__}"] = lambda other=other: other.train(1, batch_size)
    with (reference_process if device == "cpu" else reference_here)(model, hidden, batch_size) as reference:
        times = interleaved({"eager reference": reference, **functions}, repeats, seconds)
    rows = []
    for implementation, values in times.items():
        compared: dict[str, float] = {}
        if implementation.startswith("QVPO"):
            values = [value / model.policy_delay for value in values]
            compared = ratio(times["eager reference"], values)
        rows.append({"setting": name, "what": implementation, **summary(values), **compared})
    return rows


def by_part(changes: dict[str, Any], repeats: int, seconds: float) -> Rows:
    """One row for each part of an update with the paper's settings."""
    model, setting = built(changes)
    batch_size = setting["batch_size"]
    policy, batch = model.policy, model.replay_buffer.sample(batch_size)
    noise = model._draw_actor_noise(batch_size)
    actions = 2 * th.rand(batch_size, 1 + model.n_uniform_actions, model.actor.action_dim) - 1
    with th.no_grad():
        features = policy.actor.features(batch.observations)
        candidates = policy.actor.sample_candidates(features, noise.chain)

    def target() -> None:
        policy.score_candidates(batch.next_observations, model.n_target_candidates, of="target", for_training=True)

    def critic() -> None:
        loss = model.critic.loss(model.critic(batch.observations, batch.actions), batch.rewards)
        model._optimize(model.critic.optimizer, "critic_loss", loss)

    def actor() -> None:
        loss = model.actor.denoising_loss(batch.observations, actions, noise.timesteps, noise.denoising).mean()
        model._optimize(model.actor.optimizer, "actor_loss", loss)

    parts: dict[str, Callable[[], Any]] = {
        "buffer": lambda: model.replay_buffer.sample(batch_size),
        "random numbers": lambda: model._draw_actor_noise(batch_size),
        "target": th.no_grad()(target),
        "critic": critic,
        "candidates": th.no_grad()(lambda: policy.actor.sample_candidates(features, noise.chain, for_training=True)),
        "candidates in float32": th.no_grad()(lambda: policy.actor.sample_candidates(features, noise.chain)),
        "scoring": th.no_grad()(lambda: policy.critic.score(features, candidates)),
        "actor": actor,
        "targets": lambda: policy.update_targets(0.005),
        PRODUCTS: products(model, batch_size),
    }
    with OneDnnProducts():  # as in train()
        times = interleaved(parts, repeats, seconds)
    return [{"setting": "part", "what": name, **summary(values)} for name, values in times.items()]


def candidates_peak_mb(changes: dict[str, Any], device: str = "cpu") -> float | None:
    """
    Memory that drawing and scoring the candidates adds at its peak, in MB; None if the kernel does not say. To be called in
    a new process, because memory that was freed and kept before would not be counted.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device == "cpu" and not clear.exists():
        return None
    model, setting = built({**changes, "n_steps": 0, "device": device})
    n_candidates = model.n_train_candidates
    observations = th.randn(setting["batch_size"], setting["obs_dim"], device=device)

    def resident(field: str) -> int:
        if device == "cuda":
            return (th.cuda.max_memory_allocated if field == "VmHWM" else th.cuda.memory_allocated)() // 1000
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    with th.no_grad():
        # Libraries set themselves up
        model.policy.score_candidates(observations[:2], n_candidates, for_training=True)
        if device == "cuda":  # the peak starts at what is there now
            th.cuda.reset_peak_memory_stats()
        else:
            clear.write_text("5")
        before = resident("VmRSS")
        noise = model.policy.draw_noise(setting["batch_size"], n_candidates)
        model.policy.score_candidates(observations, noise, for_training=True)
    return (resident("VmHWM") - before) / 1e3


def main() -> None:
    arguments = parse_arguments(str(__doc__), "update", SETTINGS)
    quick = QUICK if arguments.quick else {}
    rows: Rows = []
    with multiprocessing.get_context("spawn").Pool(1, th.set_num_threads, (arguments.threads,), maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(candidates_peak_mb, (changes | quick, arguments.device)) for name, changes in MEMORY.items()}
    for name in arguments.settings:
        rows += by_setting(name, SETTINGS[name] | quick, arguments.repeats, arguments.seconds, arguments.device)
    if arguments.device == "cpu":
        rows += by_part(quick, arguments.repeats, arguments.seconds)
    else:  # timed alone, parts would show the cost of launching them, which one graph avoids
        model, setting = built({"device": arguments.device} | quick)
        times = interleaved({PRODUCTS: products(model, setting["batch_size"])}, arguments.repeats, arguments.seconds)
        rows += [{"setting": "part", "what": PRODUCTS, **summary(times[PRODUCTS])}]
    rows += [{"setting": name, "what": "peak memory of the candidates", "MB": peak} for name, peak in peaks.items()]
    report(rows, arguments)


if __name__ == "__main__":
    main()
