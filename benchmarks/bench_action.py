"""
How long one action for one observation takes: best of K_b = 4 while collecting, best of 32 in deterministic predictions.

``python benchmarks/bench_action.py [--threads 1] [--repeats 50] [--device cuda]``
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC, TD3
from timing import Rows, interleaved, parse_arguments, ratio, reference_of, report, summary, trained

from sb3_qvpo import QVPO, DiffusionPolicy


def main() -> None:
    arguments = parse_arguments(str(__doc__), "action")
    hidden = [16, 16] if arguments.quick else [256, 256]
    policy_kwargs, device = dict(net_arch=hidden), arguments.device
    model = trained(QVPO, 11, 3, policy_kwargs=policy_kwargs, device=device)
    reference, others = reference_of(model, hidden), [trained(each, 11, 3, device=device) for each in (SAC, TD3)]
    observation = np.random.default_rng(0).normal(size=11).astype(np.float32)
    state = th.as_tensor(observation, device=device).unsqueeze(0)
    rows: Rows = []
    compiled_model = trained(QVPO, 11, 3, policy_kwargs=policy_kwargs, device=device)
    if not compiled_model.policy.compile_actions():
        print("Nothing is compiled here.")

    @th.no_grad()
    def decide(policy: DiffusionPolicy, n_candidates: int) -> th.Tensor:
        """By the policy's program if it has one, as in ``predict()``."""
        return policy._best_action(state, n_candidates)

    for name, n_candidates, deterministic in (("best of 4", 4, False), ("best of 32", 32, True)):
        functions: dict[str, Callable[[], Any]] = {
            "eager reference": lambda n=n_candidates: reference.act(state, n).cpu(),
            "QVPO, the decision alone": lambda n=n_candidates: decide(model.policy, n).cpu(),
            "QVPO, the decision alone, compiled": lambda n=n_candidates: decide(compiled_model.policy, n).cpu(),
            "QVPO.predict": lambda d=deterministic: model.predict(observation, deterministic=d),
            "QVPO.predict, compiled": lambda d=deterministic: compiled_model.predict(observation, deterministic=d),
        }
        for other in others:
            name_of_other = f"SB3 {type(other).__name__}.predict"
            functions[name_of_other] = lambda o=other, d=deterministic: o.predict(observation, deterministic=d)
        times = interleaved(functions, arguments.repeats, arguments.seconds / 20)
        for what, values in times.items():
            row = {"setting": name, "what": what, **summary(values)}
            rows.append(row | (ratio(times["eager reference"], values) if what.startswith("QVPO") else {}))
    report(rows, arguments)


if __name__ == "__main__":
    main()
