"""
Which runs of ``results.csv`` a table or figure shows, under which names, and their statistics over seeds.

Interquartile means and 95 % intervals are rliable's: stratified bootstrap over seeds, percentiles of 2 000 resamples.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from rliable import library, metrics

NAMES = {
    "qvpo": "QVPO with `qvpo.yml`",
    "qvpo_ddim10": "N_d 16, 10 DDIM steps",
    "qvpo_ddpm5": "N_d 16, 5 DDPM steps",
    "qvpo_ddim5": "N_d 16, 5 DDIM steps",
    "qvpo_ddim5_delay2": "N_d 16, 5 DDIM steps, policy_delay 2",
    "qvpo_ddpm5_delay2": "N_d 16, 5 DDPM steps, policy_delay 2",
    "qvpo_ddpm5_nd8": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05",
    "qvpo_ddpm5_nd8_delay2": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2: `qvpo_fast.yml` (0.1)",
    "qvpo_ddpm5_nd8_delay2_batch128": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, batch_size 128",
    "qvpo_ddpm5_nd8_delay2_tau0.01": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, tau 0.01",
    "qvpo_ddpm5_nd8_delay2_lr1e-3": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, learning_rate 1e-3",
    "qvpo_ddpm5_nd8_delay2_qf_lr1e-3": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, qf_learning_rate 1e-3",
    **{
        f"qvpo_ddpm5_nd8_delay2_{name}": f"N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, {changed}"
        for name, changed in (
            ("noise0.2", "action noise 0.2"),
            ("noise0.5", "action noise 0.5"),
            ("ou0.2", "Ornstein-Uhlenbeck noise 0.2"),
            ("noise0.2_lr3e-4", "action noise 0.2, learning_rate 3e-4"),
            ("kt1_noise0.2", "K_t 1, action noise 0.2"),
            ("kt1_noise0.5", "K_t 1, action noise 0.5"),
            ("noise0.2_3steps", "action noise 0.2, 3-step returns"),
            ("kb1", "K_b 1"),
        )
    },
    "qvpo_ddpm5_nd8_delay2_ent0.25": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.25, policy_delay 2",
    "qvpo_ddpm5_nd8_noise0.2": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, action noise 0.2",
    **{name: name.upper() for name in ("sac", "td3", "tqc")},
    "crossq": "CrossQ",
    **{f"fast_T{T}_ent{c}": f"T {T}, ent_coef {c}" for T in (5, 10, 20) for c in ("0.0", "0.05") if (T, c) != (20, "0.05")},
    **{f"fast_Kb{b}_Kt{t}": f"K_b {b}, K_t {t}" for b, t in ((1, 1), (4, 1), (4, 2), (4, 4), (20, 2))},
    "fast_qcut": "qcut",
    "fast_official": "the authors' settings, otherwise as `qvpo_fast.yml` (0.1)",
}
"""What a setting is called in tables, in their order; in legends with QVPO before it, from the colon on."""
THRESHOLDS = {
    "HalfCheetah-v5": [1000, 3000, 5000],
    "Hopper-v5": [300, 500, 1000],
    "Walker2d-v5": [300, 500, 1000],
    "Ant-v5": [1000, 2000, 4000],
    "Humanoid-v5": [500, 1000, 4000],
    "Pendulum-v1": [-200, -150],
    "BipedalWalker-v3": [0, 200, 300],
    "LunarLanderContinuous-v3": [0, 200],
}
"""Returns to be reached, of every task in the tables; the last of BipedalWalker and LunarLander is Gymnasium's "solved"."""
PROCESSORS = {
    "AMD EPYC": "Zen 5",
    "AMD EPYC (family 25 model 17)": "Zen 4",
    "Intel(R) Xeon(R) Processor (family 6 model 207)": "Xeon",
}
"""What tables call the column ``cpu``."""
SCREEN = 40_000
"""Environment steps of the runs in tables that show every seed."""
SCREENS = {"LunarLanderContinuous-v3": 60_000}
"""The same for tasks with another number."""

ABLATED, PREFIX = "qvpo_ddpm5_nd8_delay2", "fast_"
"""The settings that are varied in one thing each, as in the paper's Figures 4 and 5, and how the names of variants begin."""
GOALS = ("right", "left", "top", "bottom")
"""Names of the goals of ``examples/multi_goal.py``, in its order."""

OFFLINE = {"behaviour_cloning": "behaviour cloning", "diffusion_ql": "Diffusion-QL", "dtql": "DTQL"}
"""Algorithms that learn from data, in the order of table and figure."""

FRONT = {
    "preset_fast": ("QVPO", "presets.fast", 5_000),
    "crossq_256": ("CrossQ", "CrossQ-256", 5_000),
    "sac": ("SAC", "SAC", 10_000),
    "td3": ("TD3", "TD3", 10_000),
}
"""What the README's figure compares: names in it and in ``step_one_thread.csv``, and how many steps are random."""

Row = dict[str, str]
Runs = dict[str, dict[str, dict[int, list[Row]]]]
"""Rows of finished runs by task, algorithm and seed."""
Curves = dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]
"""Steps and returns of each seed by task and algorithm."""


def finished_runs(rows: Sequence[Row], last_step: int) -> Runs:
    """Runs of one length that came to their end, each in the order of its steps."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    ends = {(row["task"], row["algo"], row["seed"]) for row in rows if int(row["step"]) >= int(row["last_step"]) == last_step}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if int(row["last_step"]) == last_step and (row["task"], row["algo"], row["seed"]) in ends:
            runs[row["task"]][row["algo"]].setdefault(int(row["seed"]), []).append(row)
    return runs


def interquartile_mean(scores: np.ndarray) -> float:
    """The mean of the middle half of all runs, shape (seeds, tasks)."""
    return float(metrics.aggregate_iqm(scores))


def interval(scores: np.ndarray, n_resamples: int = 2_000) -> tuple[float, float]:
    """Its 95 % stratified bootstrap interval: seeds are drawn anew within each task."""
    if len(scores) == 1:  # drawing from one seed always gives that one
        return (interquartile_mean(scores),) * 2
    state = np.random.get_state()
    np.random.seed(0)  # rliable draws from NumPy's global state, whatever random_state it is given
    try:
        _, intervals = library.get_interval_estimates(
            {"": scores}, lambda resample: np.array([metrics.aggregate_iqm(resample)]), reps=n_resamples
        )
    finally:
        np.random.set_state(state)
    low, high = intervals[""][:, 0]
    return float(low), float(high)


def column(runs: dict[int, list[Row]], name: str) -> np.ndarray:
    """A column of all seeds of one algorithm, shape (seeds, evaluations); NaN where it was not measured."""
    steps = sorted({int(row["step"]) for rows in runs.values() for row in rows})
    values = {(seed, int(row["step"])): float(row[name] or "nan") for seed, rows in runs.items() for row in rows}
    return np.array([[values.get((seed, step), np.nan) for step in steps] for seed in sorted(runs)])


def mean_over_timed(values: np.ndarray) -> np.ndarray:
    """Means over the seeds without a NaN, all NaN if there are none, shape (evaluations,)."""
    timed = values[~np.isnan(values).any(axis=1)]
    return timed.mean(axis=0) if len(timed) else np.full(values.shape[1], np.nan)


def ordered(algos: Sequence[str]) -> list[str]:
    """In the order of :data:`NAMES`, then all others."""
    return [*(name for name in NAMES if name in algos), *sorted(name for name in algos if name not in NAMES)]


def name_of(algo: str) -> str:
    """What a setting is called in tables."""
    return NAMES.get(algo, algo)


def label_of(algo: str) -> str:
    """What a setting is called in the legend of a figure: by its file if it has one."""
    return "QVPO, " * algo.startswith(("qvpo_", PREFIX)) + name_of(algo).split(": ")[-1].replace("`", "")


def usual_processor(rows: Sequence[Row]) -> str:
    """
    The processor that most rows come from, or the first by name of several with as many. Times on other processors cannot be
    compared with its times.
    """
    counts = Counter(row["cpu"] for row in rows)
    return min(counts, key=lambda cpu: (-counts[cpu], cpu))


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows of each task with the times of runs that were made on its usual processor, from beginning to end, alone."""
    result = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        cpu = usual_processor(of_task)
        elsewhere = {(row["algo"], row["seed"]) for row in of_task if row["cpu"] != cpu}
        result += [
            {**row, "train_minutes": "", "minutes": ""} if (row["algo"], row["seed"]) in elsewhere else row for row in of_task
        ]
    return result


def timed_runs(rows: Sequence[Row], last_step: int) -> Runs:
    """Finished runs of one length, with the times that can be compared among them."""
    of_task = finished_runs(rows, last_step).values()
    finished = [row for algos in of_task for seeds in algos.values() for run in seeds.values() for row in run]
    return finished_runs(comparable(finished), last_step)


def last_rows(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows at the end of training, all seeds of a setting together."""
    end = max(int(row["step"]) for row in rows)
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if int(row["step"]) == end:
            groups[tuple(row[key] for key in keys)].append(row)
    return groups


def policy_name(setting: str, candidates: str) -> str:
    """What a policy of the four goals is called: QVPO's and SDAC's by the number of candidates, too."""
    return f"{setting}, best of {candidates}" if setting.startswith(("QVPO", "SDAC")) else setting


def front_curves(rows: Sequence[Row], length: int = 100_000, column: str = "mean_return") -> Curves:
    """
    Runs of this length as far as they got.

    :param rows: Of ``preset.csv`` and ``results.csv``.
    :param length: Steps that a run was to have.
    :param column: Which returns. Rows without them are left out.
    :return: Their steps and returns.
    """
    seeds: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["algo"] in FRONT and int(row["last_step"]) == length and row[column]:
            seeds[row["task"], row["algo"], row["seed"]][int(row["step"])] = float(row[column])
    curves: Curves = {}
    for task in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"):
        for algo in FRONT:
            for key in sorted(key for key in seeds if key[:2] == (task, algo)):
                steps, returns = np.array(sorted(seeds[key].items())).T
                curves.setdefault(task, {}).setdefault(algo, []).append((steps, returns))
    return curves


def minutes(milliseconds: float, n_random: int, steps: np.ndarray) -> np.ndarray:
    """Processor time of so many steps, of which the first cost nothing."""
    return (steps - n_random).clip(0) * milliseconds / 60_000


def returns_for_the_same_minutes(
    algo: str,
    seeds: Sequence[tuple[np.ndarray, np.ndarray]],
    milliseconds: dict[str, float],
    limit: float,
    window: float = 5.0,
) -> list[float]:
    """
    The mean of the evaluations in the last of so many minutes of one core, because one evaluation is a matter of chance. As
    many evaluations would reach further back where they are rarer.

    :param algo: One of :data:`FRONT`.
    :param seeds: Steps and returns of each seed.
    :param milliseconds: Of a step of each algorithm.
    :param limit: Minutes.
    :param window: How many of them are the last.
    :return: One for each seed that took 0.9 of these minutes or more.
    """
    _, timed, n_random = FRONT[algo]
    results = []
    for x, y in seeds:
        times = minutes(milliseconds[timed], n_random, x)
        if times.max() >= 0.9 * limit:
            results.append(float(y[(times > limit - window) & (times <= limit)].mean()))
    return results


def by_moment(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """
    The rows of policies of which a goal is blocked.

    :param rows: Of ``blocked_goal.csv``.
    :return: By setting and number of candidates, in the order of the settings in ``goals.py``; then by moment, seeds in order.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        moments = groups.setdefault((row["setting"], row["candidates"]), {})
        moments.setdefault(row["moment"], []).append(row)
    return groups


def offline_ends(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """
    How runs on data ended, before steps in the environment. Where seeds have come to different lengths, the longest count.

    :param rows: Of ``offline.csv``.
    :return: A row for each seed, by task and algorithm.
    """
    ends: dict[str, dict[str, list[Row]]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        ends[task] = {}
        for algo in OFFLINE:
            last = {row["seed"]: row for row in rows if (row["task"], row["algo"], row["steps"]) == (task, algo, "0")}
            updates = max((int(row["updates"]) for row in last.values()), default=0)
            if ended := [row for row in last.values() if int(row["updates"]) == updates]:
                ends[task][algo] = ended
    return ends
