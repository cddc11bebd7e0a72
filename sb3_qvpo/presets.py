"""
Complete settings, to be handed to an algorithm: ``QVPO("MlpPolicy", env, **presets.small)``. Those called like another
algorithm are for that one: ``sdac`` and ``sdac_several``, ``diffusion_ql``, ``dtql``.

A setting that is not named keeps the default of the class, which is the paper's or that of the authors' code. To change one,
write ``QVPO("MlpPolicy", env, **{**presets.small, "batch_size": 256})``. RL Zoo's files in ``hyperparams/`` hold the same
numbers, but for ``sdac_several``, which has none.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class Preset(Mapping[str, Any]):
    """
    Settings that cannot be changed by accident: looking one up returns a copy of it.

    :param settings: Keyword arguments of an algorithm.
    """

    def __init__(self, **settings: Any):
        self._settings = settings

    def __getitem__(self, name: str) -> Any:
        return copy.deepcopy(self._settings[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    def __repr__(self) -> str:
        return f"Preset({', '.join(f'{name}={value!r}' for name, value in self._settings.items())})"


fast = Preset(
    learning_rate=1e-3,
    learning_starts=5_000,
    n_steps=2,
    critic_type="crossq",
    q_weighting="qadv_normalized",
    policy_delay=3,
    n_behavior_candidates=[4, 4, 4, 16],
    n_target_candidates=4,
    n_train_candidates=2,
    n_uniform_actions=2,
    n_improvement_steps=2,
    improvement_step=0.3,
    training_action_noise="lin_0.2_0.05_0.3",
    eval_noise_scale=0.3,
    policy_kwargs=dict(
        net_arch=dict(pi=[128, 128], qf=[256, 256]),
        activation_fn=nn.ReLU,
        optimizer_kwargs=dict(betas=(0.5, 0.999)),
        n_sampling_steps=5,
        sampler="dpm++",
        prediction="v",
        normalize_features=True,
    ),
)
"""
For MuJoCo and tasks like it, on a CPU: critics with batch normalisation and without targets, two candidates of which the
better one follows the critics' gradient, weights in units of each state's spread, a few steps of a second-order solver. The TD
target takes the best of four candidates, because a single one is worse than what the policy does.

The policy is trained on noisy actions, so it stays wide and tries more of them. The noise falls over the first 30 % of
``learn()``, so the policy becomes narrow later. Deterministic actions stay near its middle. One sample of it,
``predict(deterministic=False)`` with ``n_behavior_candidates=1``, returns less.

The actor is half as wide as the critics, which spares a third of the time. Returns of two steps bring values back sooner.
Observations that are dictionaries need ``n_steps=1``.

Collecting takes the best of sixteen, because what is done in the end is the best of 32. Where episodes last until their time
limit, as on HalfCheetah-v5, three of four take the best of four, because there variety helps.

``batch_size=128`` takes 0.6 to 0.8 of the time, but learns more slowly by steps. On Hopper-v5 it is far behind (one seed).

There is no other preset for long runs, because nothing has been measured beyond 100 000 steps. Three seeds have been run for
50 000 steps of HalfCheetah-v5, Hopper-v5 and Walker2d-v5. Other tasks had noise of 0.2 throughout.

Cost: 25 ms a step on one core of a Xeon, 0.95 times CrossQ's, 1.7 times SAC's (``benchmarks/results/step_one_thread.csv``).
Where the processor has no bfloat16 it is 1.2 to 1.4 times CrossQ's.
Returns of the best of 32 after 50 000 steps, three seeds: 5868 to 6549 on HalfCheetah-v5, 1909 to 3260 on Hopper-v5, 2573 to
4124 on Walker2d-v5 (``benchmarks/learning/preset.csv``). One seed has 7929 on HalfCheetah-v5 after 100 000.
"""

small = Preset(
    learning_rate=1e-3,
    learning_starts=500,
    batch_size=128,
    critic_type="crossq",
    q_weighting="qadv_normalized",
    policy_delay=3,
    n_target_candidates=1,
    n_train_candidates=8,
    n_uniform_actions=2,
    n_improvement_steps=2,
    policy_kwargs=dict(
        net_arch=[64, 64],
        critic_activation_fn=nn.ReLU,
        optimizer_kwargs=dict(betas=(0.5, 0.999)),
        n_sampling_steps=5,
        sampler="dpm++",
        prediction="v",
    ),
)
"""
For tasks with a few action dimensions, such as Pendulum-v1: critics with batch normalisation and without targets, eight
candidates of which the best follows the critics' gradient, weights in units of each state's spread.

Cost: two minutes for 5 000 steps of Pendulum-v1. Returns there, with gamma 0.98: -141 to -152 with each of 20 seeds
(``benchmarks/learning/quickstart.csv``).
"""

sdac = Preset(
    learning_rate=1e-3,
    learning_starts=5_000,
    n_steps=2,
    critic_type="crossq",
    policy_delay=3,
    temperature=0.05,
    q_scaling="spread",
    proposal_actions="replay",
    n_reverse_samples=16,
    n_improvement_steps=2,
    improvement_step=0.3,
    n_behavior_candidates=[4, 4, 4, 16],
    n_target_candidates=2,
    eval_noise_scale=0.3,
    policy_kwargs=fast["policy_kwargs"],
)
"""
For :class:`~sb3_qvpo.sdac.sdac.SDAC` on MuJoCo and tasks like it, on a CPU: the critics and the sampler of :data:`fast`. The
temperature is in units of the values' spread, and low. For several good actions take :data:`sdac_several`.

Half of the draws surround actions that gradient steps have improved. Single samples follow the critics better so.

Cost: as much as :data:`fast` or a little less (``benchmarks/results/step_one_thread.csv``). Returns of the best of 32, one
seed each: 4493 on HalfCheetah-v5 and 1349 on Walker2d-v5 after 25 000 steps, and 432 on Hopper-v5 after 30 000
(``benchmarks/learning/preset.csv``). With ``training_action_noise=0.2`` Hopper-v5 is at 1604 after 25 000 and 1137 after
30 000.
"""

sdac_several = Preset(
    learning_rate=1e-3,
    learning_starts=500,
    batch_size=64,
    temperature=1.0,
    q_scaling="spread",
    proposal_actions="replay",
    n_reverse_samples=16,
    n_behavior_candidates=1,
    n_target_candidates=1,
    policy_kwargs=dict(net_arch=[64, 64], n_sampling_steps=5, sampler="dpm++", prediction="v"),
)
"""
For :class:`~sb3_qvpo.sdac.sdac.SDAC` where several actions are good and all shall be kept, with a few action dimensions: a
temperature as large as the values' spread, single samples in the TD target and while collecting. Act with
``predict(deterministic=False)``: the best of many samples prefers one action again.

Cost: two minutes for 8 000 steps of four equal goals. There it reaches three or four in each of five seeds, with a return of
-286 instead of -119 (``benchmarks/learning/blocked_goal.csv``). Peaks of a fortieth of the box are too narrow for it.
"""

diffusion_ql = Preset(
    learning_rate=1e-3,
    tau=0.05,
    eta=0.1,
    target_actor_start=0,
    policy_kwargs=dict(net_arch=[256, 256], activation_fn=nn.ReLU, normalize_features=True),
)
"""
For :class:`~sb3_qvpo.diffusion_ql.diffusion_ql.DiffusionQL` with thousands of updates on a CPU, where the paper has a million:
larger steps and faster targets, and a tenth of the guidance by critics that are still inaccurate.

Cost: five minutes for 5 000 updates on one core of Zen 3. Returns then, of 40 000 transitions in which an agent and random
actions take turns, three seeds: 950 to 1199 on Hopper-v5, 3592 to 3923 on HalfCheetah-v5
(``benchmarks/learning/offline.csv``).
"""

dtql = Preset(
    learning_rate=1e-3,
    tau=0.05,
    n_pretraining_updates=1_000,
    n_behavior_candidates=128,
    n_eval_candidates=1,
    policy_kwargs=diffusion_ql["policy_kwargs"],
)
"""
The same for :class:`~sb3_qvpo.dtql.dtql.DTQL`. An action is one of 128 draws instead of 1024, and
``predict(deterministic=True)`` is the policy alone.

Cost: four minutes for 5 000 updates. Returns of the same data: 276 to 1292 on Hopper-v5, 2606 to 3631 on HalfCheetah-v5.
"""
