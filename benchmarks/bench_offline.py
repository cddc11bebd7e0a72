"""
Diffusion-QL and DTQL at their papers' settings, in turn: an update, with fast paths and without, and an action.

``python benchmarks/bench_offline.py [--threads 1] [--repeats 7]``; needs ``pip install ".[export]"`` and onnxruntime. Sizes
are those of HalfCheetah-v5. ``ratio`` is over the time of Diffusion-QL in the same repeat: of its update with fast paths, of
its action by the softmax. The action of an ONNX file is a deterministic one.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from timing import Rows, interleaved, parse_arguments, ratio, report, summary, trained

from sb3_qvpo import DTQL, DiffusionQL
from sb3_qvpo.common.speed.settings import settings


def update(model: Any, batch_size: int, fast: bool) -> None:
    """An update, batch sampling included."""
    settings.enabled, before = fast, settings.enabled
    try:
        model.train(1, batch_size)
    finally:
        settings.enabled = before


def onnx_session(model: Any, folder: str, n_threads: int) -> tuple[onnxruntime.InferenceSession, float]:
    """A model's file, and its size in megabytes."""
    path = Path(folder) / f"{type(model).__name__}_{model.n_eval_candidates}.onnx"
    model.export(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = n_threads, 3
    return onnxruntime.InferenceSession(str(path), options), path.stat().st_size / 1e6


def main() -> None:
    arguments = parse_arguments(str(__doc__), "offline")
    small = dict(policy_kwargs=dict(net_arch=[16, 16]), batch_size=16) if arguments.quick else {}
    common = dict(device=arguments.device, **small)
    models = {
        "Diffusion-QL": trained(DiffusionQL, 17, 6, 300, **common),
        "behaviour cloning": trained(DiffusionQL, 17, 6, 300, eta=0.0, **common),
        "DTQL": trained(DTQL, 17, 6, 300, n_pretraining_updates=0, **common),
    }
    alone = trained(DTQL, 17, 6, 300, n_behavior_candidates=1, n_eval_candidates=1, **common)
    updates: dict[str, Callable[[], Any]] = {
        f"{name}{'' if fast else ', eager'}": lambda m=model, f=fast: update(m, m.batch_size, f)
        for name, model in models.items()
        for fast in (True, False)
    }
    rows: Rows = []
    times = interleaved(updates, arguments.repeats, arguments.seconds)
    rows += [{"what": "update", "setting": n, **summary(t), **ratio(t, times["Diffusion-QL"])} for n, t in times.items()]

    observation = np.random.default_rng(0).normal(size=17).astype(np.float32)
    actors = {"Diffusion-QL, 50 chains": models["Diffusion-QL"], "DTQL, 1024 draws": models["DTQL"], "DTQL, one draw": alone}
    actions: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in actors.items():
            session, sizes[name] = onnx_session(model, folder, arguments.threads)
            actions[name] = lambda m=model: m.predict(observation)
            actions[f"{name}, ONNX"] = lambda s=session: s.run(None, {"observation": observation[None]})
        times = interleaved(actions, arguments.repeats, arguments.seconds / 5)
    for name, each in times.items():
        row = {"what": "action", "setting": name, **summary(each), **ratio(each, times["Diffusion-QL, 50 chains"])}
        rows.append(row | {"megabytes": sizes.get(name.removesuffix(", ONNX"), 0.0)})
    report(rows, arguments)


if __name__ == "__main__":
    main()
