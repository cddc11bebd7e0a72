"""
Figures and tables of the learning curves, from the CSV files beside this script: ``make report``.

Draws ``docs/figures/*.png`` and fills the tables in ``docs/results.md`` between ``<!-- table: NAME -->`` and ``<!-- end -->``.
Interquartile means and 95 % intervals are rliable's: stratified bootstrap over seeds, percentiles of 2 000 resamples. Only
runs that came to their end count. Needs ``pip install "sb3-qvpo[zoo]"``.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from rliable import library, metrics

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
NAMES = {
    "qvpo": "QVPO, the paper's settings",
    "qvpo_nd16": "N_d 16",
    "qvpo_shared10": "N_d 16, 10 shared steps",
    "qvpo_ddpm10": "N_d 16, 10 DDPM steps",
    "qvpo_ddim10": "N_d 16, 10 DDIM steps",
    "qvpo_ddpm5": "N_d 16, 5 DDPM steps",
    "qvpo_ddim5": "N_d 16, 5 DDIM steps",
    "qvpo_ddim5_delay2": "N_d 16, 5 DDIM steps, policy_delay 2: `qvpo_fast.yml`",
    **{name: name.upper() for name in ("sac", "td3", "tqc")},
    "crossq": "CrossQ",
}
"""What a setting is called in tables, in their order; in legends up to the colon."""
THRESHOLDS = {"HalfCheetah-v5": [1000, 3000, 5000], "Hopper-v5": [1000, 2000], "Walker2d-v5": [1000, 2000], "Ant-v5": [1000]}

Row = dict[str, str]
Runs = dict[str, dict[str, dict[int, list[Row]]]]
"""Rows of finished runs by task, algorithm and seed."""


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
    _, intervals = library.get_interval_estimates(
        {"": scores},
        lambda resample: np.array([metrics.aggregate_iqm(resample)]),
        reps=n_resamples,
        random_state=np.random.RandomState(0),
    )
    low, high = intervals[""][:, 0]
    return float(low), float(high)


def column(runs: dict[int, list[Row]], name: str) -> np.ndarray:
    """A column of all seeds of one algorithm, shape (seeds, evaluations); NaN where it was not measured."""
    return np.array([[float(row[name] or "nan") for row in rows] for _, rows in sorted(runs.items())])


def estimate(values: np.ndarray) -> str:
    """Interquartile mean and interval over seeds, for a table."""
    if np.isnan(values).any():
        return "-"
    low, high = interval(values[:, None])
    return f"{interquartile_mean(values[:, None]):.0f} ({low:.0f} to {high:.0f})"


def ordered(algos: Sequence[str]) -> list[str]:
    """In the order of :data:`NAMES`."""
    return [name for name in NAMES if name in algos]


def returns_table(runs: Runs) -> str:
    """Last evaluation, single samples, best evaluation, processor time."""
    lines = ["| task | algorithm | seeds | last return | best in training | last, single sample | training, minutes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for task, algos in runs.items():
        for algo in ordered(list(algos)):
            returns = column(algos[algo], "mean_return")
            single, minutes = column(algos[algo], "single_return")[:, -1], column(algos[algo], "train_minutes")[:, -1]
            spent = "-" if np.isnan(minutes).any() else f"{minutes.mean():.0f}"
            cells = [estimate(returns[:, -1]), estimate(returns.max(axis=1)), estimate(single), spent]
            lines.append(f"| {task} | {NAMES[algo]} | {len(returns)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_reached(curve: np.ndarray, axis: np.ndarray, threshold: float) -> float:
    """Where a run's evaluations first reach a return; NaN if never."""
    reached = np.flatnonzero(curve >= threshold)
    return float(axis[reached[0]]) if len(reached) else float("nan")


def thresholds_table(runs: Runs) -> str:
    """Steps and processor time to a given return: the median over seeds, and how many reached it."""
    lines = ["| task | return | algorithm | seeds that reached it | steps, median | training, minutes, median |"]
    lines += ["|---|---|---|---|---|---|"]
    for task, algos in runs.items():
        for threshold in THRESHOLDS.get(task, []):
            for algo in ordered(list(algos)):
                curves = column(algos[algo], "mean_return")
                cells = []
                for name in ("step", "train_minutes"):
                    axes = column(algos[algo], name)
                    reached = np.array([first_reached(*pair, threshold) for pair in zip(curves, axes, strict=True)])
                    # A seed that never reached it counts as later than all others
                    median = np.median(np.where(np.isnan(reached), np.inf, reached))
                    cells.append("-" if np.isinf(median) else f"{median:.0f}")
                n_reached = sum(bool((curve >= threshold).any()) for curve in curves)
                lines.append(f"| {task} | {threshold} | {NAMES[algo]} | {n_reached} of {len(curves)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def screen_table(runs: Runs) -> str:
    """Every seed's returns at every evaluation."""
    lines = []
    for task, algos in runs.items():
        steps = [int(row["step"]) for row in next(iter(next(iter(algos.values())).values()))]
        lines += [f"| {task} | " + " | ".join(f"{step} steps" for step in steps) + " |", "|---" * (1 + len(steps)) + "|"]
        for algo in ordered(list(algos)):
            returns = column(algos[algo], "mean_return")
            cells = ["; ".join(f"{value:.0f}" for value in returns[:, i]) for i in range(returns.shape[1])]
            lines.append(f"| {NAMES[algo]} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def draw_curves(runs: Runs, file: Path) -> None:
    """Interquartile means with intervals, one panel a task; above by steps, below by processor time."""
    figure, panels = plt.subplots(2, len(runs), figsize=(4.5 * len(runs), 7), squeeze=False)
    for (task, algos), (above, below) in zip(runs.items(), panels.T, strict=True):
        for algo in ordered(list(algos)):
            returns = column(algos[algo], "mean_return")
            means = [interquartile_mean(values[:, None]) for values in returns.T]
            low, high = np.transpose([interval(values[:, None]) for values in returns.T])
            for axis, name in ((above, "step"), (below, "train_minutes")):
                x = column(algos[algo], name).mean(axis=0)
                axis.plot(x, means, label=NAMES[algo].split(":")[0])
                axis.fill_between(x, low, high, alpha=0.2)
        above.set_title(task)
        above.set_xlabel("environment steps")
        below.set_xlabel("training, minutes of one core")
    panels[0, 0].set_ylabel("return")
    panels[1, 0].set_ylabel("return")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)


def fill(page: str, tables: dict[str, str]) -> str:
    """
    Put tables into a page.

    :param page: Text with places ``<!-- table: NAME -->`` ... ``<!-- end -->``.
    :param tables: Tables by name.
    :return: The page with the tables in their places.
    :raises ValueError: If a place has no table, or a table no place.
    """
    places = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(places) != sorted(tables):
        raise ValueError(f"the page has places for {places}, and there are tables {sorted(tables)}")
    for name, table in tables.items():
        page = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", rf"\g<1>\n{table}\n\n\g<2>", page, flags=re.S)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the CSV files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of results.md and figures/")
    arguments = parser.parse_args()
    rows = list(csv.DictReader((arguments.results / "results.csv").open()))
    screen, curves = finished_runs(rows, 40_000), finished_runs(rows, 100_000)
    tables: dict[str, Callable[[], str]] = {
        "screen": lambda: screen_table(screen),
        "returns": lambda: returns_table(curves),
        "thresholds": lambda: thresholds_table(curves),
    }
    page = arguments.docs / "results.md"
    page.write_text(fill(page.read_text(), {name: table() for name, table in tables.items()}))
    draw_curves(curves, arguments.docs / "figures" / "learning_curves.png")


if __name__ == "__main__":
    main()
