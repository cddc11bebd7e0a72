"""
Where the time of a step goes with ``presets.fast`` and ``presets.sdac``: the environment, an action, an update and its parts,
beside an update of CrossQ with networks of 256 units and of SAC. HalfCheetah-v5; functions take turns.

``python benchmarks/bench_parts.py [--threads 1] [--repeats 7]``; needs ``pip install ".[mujoco,zoo]"``. Updates are means over
the policy's delay. Actions are eager, where long runs compile them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench_step import MODELS
from timing import Rows, interleaved, parse_arguments, report, summary

from sb3_qvpo import QVPO, SDAC
from sb3_qvpo.common.speed.cpu import OneDnnProducts

ENV = "HalfCheetah-v5"
COMPARED: dict[str, tuple[Any, dict[str, Any]]] = {
    name: MODELS[name] for name in ("presets.fast", "presets.sdac", "CrossQ-256", "SAC")
}


def parts_of(model: QVPO | SDAC) -> dict[str, Callable[[], Any]]:
    """What a step consists of, each part a function."""
    batch = model.replay_buffer.sample(model.batch_size)
    coefficients = model._policy_coefficients()

    def critics() -> None:
        with OneDnnProducts():
            model._update_critics(batch)

    def policy() -> None:
        with OneDnnProducts():
            model._update_policy(batch, *coefficients)

    observation = model.env.reset()
    action = [model.action_space.sample()]
    return {
        "environment": lambda: model.env.step(action),
        "action": partial(model.predict, observation),
        "buffer": lambda: model.replay_buffer.sample(model.batch_size),
        "critics": critics,
        "policy": policy,
    }


def main() -> None:
    arguments = parse_arguments(str(__doc__), "parts")
    small = dict(batch_size=16) if arguments.quick else {}
    functions: dict[str, Callable[[], Any]] = {}
    per_call: dict[str, int] = {}
    for name, (algorithm, settings) in COMPARED.items():
        same = dict(learning_starts=100, buffer_size=10_000, seed=0, device="cpu", **small)
        model = algorithm("MlpPolicy", ENV, **{**settings, **same}).learn(130)
        per_call[f"{name}: update"] = delay = getattr(model, "policy_delay", 1)
        functions[f"{name}: update"] = partial(model.train, delay, model.batch_size)
        if name in ("presets.fast", "presets.sdac"):
            functions |= {f"{name}: {part}": function for part, function in parts_of(model).items()}
    times = interleaved(functions, arguments.repeats, arguments.seconds)
    rows: Rows = []
    for name, values in times.items():
        setting, what = name.split(": ")
        rows.append({"setting": setting, "what": what, **summary([value / per_call.get(name, 1) for value in values])})
    report(rows, arguments)


if __name__ == "__main__":
    main()
