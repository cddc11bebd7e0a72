"""The tables of ``docs/results.md`` and ``docs/notes.md``, from rows of the CSV files."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from selection import (
    FRONT,
    GOALS,
    OFFLINE,
    PROCESSORS,
    THRESHOLDS,
    Curves,
    Row,
    Runs,
    by_moment,
    column,
    interquartile_mean,
    interval,
    last_rows,
    mean_over_timed,
    name_of,
    offline_ends,
    ordered,
    policy_name,
    returns_for_the_same_minutes,
)


def estimate(values: np.ndarray) -> str:
    """Interquartile mean and interval over seeds, for a table."""
    if np.isnan(values).any():
        return "-"
    mean = f"{interquartile_mean(values[:, None]):.0f}"
    if len(values) == 1:
        return mean
    low, high = interval(values[:, None])
    return f"{mean} ({low:.0f} to {high:.0f})"


def returns_table(runs: Runs) -> str:
    """Last evaluation, single samples, best evaluation; processor time, the mean over the seeds on the usual processor."""
    lines = ["| task | algorithm | seeds | last return | best in training | last, single sample | training, minutes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for task, algos in runs.items():
        for algo in ordered(list(algos)):
            returns = column(algos[algo], "mean_return")
            single, minutes = column(algos[algo], "single_return")[:, -1], column(algos[algo], "train_minutes")[:, -1]
            spent = "-" if np.isnan(minutes).all() else f"{np.nanmean(minutes):.0f}"
            cells = [estimate(returns[:, -1]), estimate(np.nanmax(returns, axis=1)), estimate(single), spent]
            lines.append(f"| {task} | {name_of(algo)} | {len(returns)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_reached(curve: np.ndarray, axis: np.ndarray, threshold: float) -> float:
    """Where a run's evaluations first reach a return. Infinity if never, which is later than all others."""
    reached = np.flatnonzero(curve >= threshold)
    return float(axis[reached[0]]) if len(reached) else float("inf")


def thresholds_table(runs: Runs) -> str:
    """
    Steps, processor time and time by the clock to a given return, medians over all seeds, and how many reached it. The time of
    a number of steps is the mean over the seeds that were timed.
    """
    titles = "steps, median | training, minutes of processor time, median | by the clock, evaluations and all"
    lines = [f"| task | return | algorithm | seeds that reached it | {titles} |", "|---" * 7 + "|"]
    for task, algos in runs.items():
        for threshold in THRESHOLDS[task]:
            for algo in ordered(list(algos)):
                curves = column(algos[algo], "mean_return")
                cells = []
                for name in ("step", "train_minutes", "minutes"):
                    axis = mean_over_timed(column(algos[algo], name))
                    median = np.median([first_reached(curve, axis, threshold) for curve in curves])
                    cells.append(f"{median:.0f}" if np.isfinite(median) else "-")
                n_reached = sum(bool((curve >= threshold).any()) for curve in curves)
                lines.append(
                    f"| {task} | {threshold} | {name_of(algo)} | {n_reached} of {len(curves)} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def each_seed(rows: Sequence[Row | None], name: str) -> str:
    """A column of every seed for a table, or one dash where none was measured."""
    cells = [f"{float(row[name]):.0f}" if row and row[name] else "-" for row in rows]
    return "; ".join(cells) if set(cells) != {"-"} else "-"


def distinct(curves: dict[tuple[int, int], dict[int, str]]) -> list[tuple[int, int]]:
    """
    Which runs of a setting to show. A run is left out if all its returns are those of another run of its seed.

    :param curves: Returns by step, by length and seed of the run.
    :return: Lengths and seeds, short runs first.
    """
    shown: list[tuple[int, int]] = []
    for run in sorted(curves, key=lambda run: (-len(curves[run]), run)):
        repeated = (curves[run].items() <= curves[other].items() for other in shown if other[1] == run[1])
        shown += [run] * (not any(repeated))
    return sorted(shown)


def screen_table(rows: Sequence[Row], task: str, last_step: int) -> str:
    """
    The return of every run at every evaluation. Runs that were broken off count, and so does the first part of longer runs. A
    seed that was run twice comes twice. The time for all steps is the mean over the runs on each processor.
    """
    wanted = [row for row in rows if row["task"] == task and int(row["step"]) <= last_step <= int(row["last_step"])]
    runs: dict[str, dict[tuple[int, int], dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in wanted:
        runs[row["algo"]][int(row["last_step"]), int(row["seed"])][int(row["step"])] = row
    steps = sorted({int(row["step"]) for row in wanted})
    titles = ["setting", "seeds", *(f"{step} steps" for step in steps), "last, single sample", "training, minutes"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for algo in ordered(list(runs)):
        curves = {run: {step: row["mean_return"] for step, row in curve.items()} for run, curve in runs[algo].items()}
        shown = distinct(curves)
        by_step = [[runs[algo][run].get(step) for run in shown] for step in steps]
        cells = [each_seed(at_step, "mean_return") for at_step in by_step] + [each_seed(by_step[-1], "single_return")]
        spent: dict[str, list[float]] = defaultdict(list)
        for row in by_step[-1]:
            if row and row["train_minutes"]:
                spent[PROCESSORS.get(row["cpu"], row["cpu"])].append(float(row["train_minutes"]))
        cells.append(", ".join(f"{np.mean(spent[cpu]):.0f} ({cpu})" for cpu in sorted(spent)) or "-")
        lines.append(f"| {name_of(algo)} | {', '.join(str(seed) for _, seed in shown)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation over seeds; the number alone of a single one."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def bandit_table(rows: Sequence[Row]) -> str:
    """The policy itself at the end of training."""
    lines = [
        "| setting | seeds | reward | deviation of samples | peaks with 5 % of samples or more, by seed |",
        "|---" * 5 + "|",
    ]
    for (setting,), group in last_rows(rows, "setting").items():
        n_peaks = [sum(float(row[f"peak_{i}"]) >= 0.05 for i in range(3)) for row in group]
        numbers = [spread([float(row["reward"]) for row in group]), spread([float(row["std"]) for row in group], 2)]
        lines.append(f"| {setting} | {len(group)} | {' | '.join(numbers)} | {', '.join(map(str, n_peaks))} |")
    return "\n".join(lines)


def multi_goal_table(rows: Sequence[Row]) -> str:
    """Goals reached and first actions at the end of training."""
    lines = ["| policy | seeds | goals with 5 % of 200 episodes or more, by seed | most frequent goal | first action: most "]
    lines[0] += "frequent quarter | return |"
    lines.append("|---" * 6 + "|")
    for (setting, candidates), group in last_rows(rows, "setting", "candidates").items():
        reached = np.array([[int(row[f"reached_{goal}"]) for goal in GOALS] for row in group])
        first = np.array([[int(row[f"first_{goal}"]) for goal in GOALS] for row in group])
        cells = [
            ", ".join(map(str, (reached >= 10).sum(axis=1))),
            f"{(reached.max(axis=1) / 200).mean():.0%}",
            f"{(first.max(axis=1) / first.sum(axis=1)).mean():.0%}",
            spread([float(row["return"]) for row in group], 0),
        ]
        lines.append(f"| {policy_name(setting, candidates)} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def blocked_table(rows: Sequence[Row]) -> str:
    """Goals that each policy reaches, and how often it reaches another one when the one that it prefers is blocked."""
    moments = list(dict.fromkeys(row["moment"] for row in rows))
    lines = ["| policy | seeds | goals with 5 % of 200 episodes or more, by seed | most frequent goal | return | "]
    lines[0] += f"another goal, {' | '.join(moments[1:])} |"
    lines.append("|---" * (4 + len(moments)) + "|")
    for (setting, candidates), group in by_moment(rows).items():
        reached = {
            moment: np.array([[int(row[f"reached_{goal}"]) for goal in GOALS] for row in group[moment]]) for moment in moments
        }
        before = reached[moments[0]]
        cells = [
            ", ".join(map(str, (before >= 10).sum(axis=1))),
            f"{(before.max(axis=1) / 200).mean():.0%}",
            spread([float(row["return"]) for row in group[moments[0]]], 0),
            *(f"{(reached[moment].sum(axis=1) / 200).mean():.0%}" for moment in moments[1:]),
        ]
        lines.append(f"| {policy_name(setting, candidates)} | {len(before)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def front_table(
    curves: Curves,
    single: Curves,
    milliseconds: dict[str, float],
    moments: Sequence[int] = (10_000, 20_000, 50_000),
    end: tuple[int, int] = (80_000, 100_000),
    limit: float = 20.0,
) -> str:
    """
    Mean returns of the README's figure, with their range over seeds.

    :param curves: Steps and returns of each seed by task and algorithm.
    :param single: The same with single samples.
    :param milliseconds: Of a step of each algorithm.
    :param moments: Steps of the evaluations that are shown.
    :param end: First and last step of the evaluations of which the mean is shown, for seeds that got so far.
    :param limit: Minutes of one core for which all are compared.
    :return: A row for each task and algorithm.
    """
    last = f"{end[0] // 1000} 000 to {end[1] // 1000} 000"
    shown = [f"{limit:.0f} minutes", *(f"{step // 1000} 000 steps" for step in moments), last, f"one sample, {last}"]
    lines = [f"| task | algorithm | seeds | {' | '.join(shown)} |", "|---" * (6 + len(moments)) + "|"]
    for task, algos in curves.items():
        for algo, seeds in algos.items():
            cells = [ranged(returns_for_the_same_minutes(algo, seeds, milliseconds, limit))]
            cells += [ranged([float(y[x == step][0]) for x, y in seeds if step in x]) for step in moments]
            for each in (seeds, single.get(task, {}).get(algo, [])):
                cells.append(ranged(means_over(each, end)))
            lines.append(f"| {task} | {FRONT[algo][0]} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means_over(seeds: Sequence[tuple[np.ndarray, np.ndarray]], span: tuple[int, int]) -> list[float]:
    """
    The mean return of each seed over a range of steps.

    :param seeds: Steps and returns of each.
    :param span: First and last step of the evaluations. Seeds that did not get so far are left out.
    :return: One for each of the others.
    """
    return [float(y[(x >= span[0]) & (x <= span[1])].mean()) for x, y in seeds if span[1] in x]


def each_seed_table(curves: Curves, algos: tuple[str, str], span: tuple[int, int]) -> str:
    """
    Two algorithms side by side, each seed's mean over the same steps.

    :param curves: Steps and returns of each seed by task and algorithm.
    :param algos: The two, names in :data:`FRONT`.
    :param span: First and last step of the evaluations. Seeds that did not get so far are left out.
    :return: A row for each task. The last column is the ratio of the means.
    """
    names = [FRONT[algo][0] for algo in algos]
    heads = [head for name in names for head in (f"{name}, each seed", "mean")]
    lines = [f"| task | {' | '.join(heads)} | {names[0]} / {names[1]} |", "|---" * 6 + "|"]
    for task, known in curves.items():
        cells, means = [], []
        for algo in algos:
            seeds = means_over(known.get(algo, []), span)
            means.append(np.mean(seeds) if seeds else np.nan)
            cells += [", ".join(f"{value:.0f}" for value in seeds) or "-", f"{means[-1]:.0f}" if seeds else "-"]
        ratio = means[0] / means[1]
        lines.append(f"| {task} | {' | '.join(cells)} | {'-' if np.isnan(ratio) else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def step_table(rows: Sequence[Row]) -> str:
    """Processor time of a step, and how many times CrossQ's that is."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    lines = [f"| setting | {' | '.join(f'{env}, ms | times CrossQ' for env in envs)} |", "|---" * (1 + 2 * len(envs)) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for env in envs:
            (row,) = [row for row in rows if (row["env"], row["setting"]) == (env, setting)]
            cells.append(f"{float(row['median_ms']):.0f} | {float(row['ratio']):.2f}")
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quickstart_table(rows: Sequence[Row]) -> str:
    """Returns of all seeds of the quick start."""
    shown = [row for row in rows if row["algo"] == "small"]
    lines = ["| steps | seeds | worst | median | best |", "|---" * 5 + "|"]
    for step in sorted({int(row["step"]) for row in shown}):
        returns = [float(row["mean_return"]) for row in shown if int(row["step"]) == step]
        numbers = f"{min(returns):.0f} | {np.median(returns):.0f} | {max(returns):.0f}"
        lines.append(f"| {step:,} | {len(returns)} | {numbers} |".replace(",", " "))
    return "\n".join(lines)


def offline_table(rows: Sequence[Row]) -> str:
    """Returns after the last update of each run, means over seeds with the range."""
    lines = ["| task | algorithm | seeds | updates | return | of `deterministic=True` | minutes |", "|---" * 7 + "|"]
    for task, algos in offline_ends(rows).items():
        (first, *_), *_ = algos.values()
        for what, label in (("data_return", "the data"), ("agent_return", "the agent in the data")):
            lines.append(f"| {task} | {label} | | | {float(first[what]):.0f} | | |")
        for algo, ended in algos.items():
            cells = [ranged([float(row[name]) for row in ended]) for name in ("mean_return", "greedy_return")]
            minutes = np.mean([float(row["minutes"]) for row in ended])
            known = f"{task} | {OFFLINE[algo]} | {len(ended)} | {ended[0]['updates']}"
            lines.append(f"| {known} | {' | '.join(cells)} | {minutes:.0f} |")
    return "\n".join(lines)


def online_table(rows: Sequence[Row]) -> str:
    """Returns of the runs that went on in the environment, before it and after some steps there."""
    moments = sorted({int(row["steps"]) for row in rows if row["steps"] != "0"})
    heads = ["before", *(f"after {steps:,} steps".replace(",", " ") for steps in moments)]
    lines = [f"| task | algorithm | seeds | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for task, algos in offline_ends(rows).items():
        for algo, ended in algos.items():
            own = [row for row in rows if (row["task"], row["algo"]) == (task, algo)]
            seeds = {row["seed"] for row in own if row["steps"] != "0"}
            if not seeds:
                continue
            shown = [[row for row in ended if row["seed"] in seeds]]
            shown += [[row for row in own if row["steps"] == str(steps)] for steps in moments]
            cells = [ranged([float(row["mean_return"]) for row in moment]) for moment in shown]
            lines.append(f"| {task} | {OFFLINE[algo]} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ranged(values: Sequence[float]) -> str:
    """A mean, with the range if there are several; a dash if there is none."""
    if not values:
        return "-"
    spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
    return f"{np.mean(values):.0f}{spread}"


def follow_table(rows: Sequence[Row]) -> str:
    """How far the policy is from the best actions before and after they change, means over seeds."""
    moments = list(dict.fromkeys(row["moment"] for row in rows))
    first, last = moments[2], moments[-1]  # after the change: first is at once
    lines = [f"| setting | seeds | deviation of samples | distance {' | '.join(moments)} | critics' best {first} | {last} |"]
    lines.append("|---" * (5 + len(moments)) + "|")
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["setting"], row["moment"]].append(row)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        shown = [(moments[0], "std"), *((moment, "distance") for moment in moments)]
        shown += [(first, "critics_distance"), (last, "critics_distance")]
        means = [np.mean([float(row[name]) for row in groups[setting, moment]]) for moment, name in shown]
        n_seeds = len(groups[setting, moments[0]])
        lines.append(f"| {setting} | {n_seeds} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def fill(page: str, tables: dict[str, str]) -> str:
    """
    Put tables into a page.

    :param page: Text with places ``<!-- table: NAME -->`` ... ``<!-- end -->``.
    :param tables: Tables by name.
    :return: The page with the tables in their places.
    :raises ValueError: If a place has no table, or a table no place.
    """
    places = re.findall(r"<!-- table: ([\w-]+) -->", page)
    if sorted(places) != sorted(tables):
        raise ValueError(f"the page has places for {places}, and there are tables {sorted(tables)}")
    for name, table in tables.items():
        page = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", rf"\g<1>\n{table}\n\n\g<2>", page, flags=re.S)
    return page
