"""
Figures and tables of the learning curves, from the CSV files beside this script: ``make report``.

Draws ``docs/figures/*.png`` and fills the tables in ``docs/results.md`` between ``<!-- table: NAME -->`` and ``<!-- end -->``.
Interquartile means and 95 % intervals are rliable's: stratified bootstrap over seeds, percentiles of 2 000 resamples. Runs
that did not come to their end count in the tables of 40 000 steps only. Every other length of finished runs has tables
``returns_LENGTH`` and ``thresholds_LENGTH`` and a figure of its own. Needs rliable, which comes with
``pip install ".[zoo]"``. For runs of one's own: ``--results FOLDER --docs FOLDER``.
"""

import argparse
import csv
import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # is no package

from bandit import ThreePeaksEnv

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
NAMES = {
    "qvpo": "QVPO with `qvpo.yml`",
    "qvpo_nd16": "N_d 16",
    "qvpo_shared10": "N_d 16, 10 shared steps",
    "qvpo_ddpm10": "N_d 16, 10 DDPM steps",
    "qvpo_ddim10": "N_d 16, 10 DDIM steps",
    "qvpo_ddpm5": "N_d 16, 5 DDPM steps",
    "qvpo_ddim5": "N_d 16, 5 DDIM steps",
    "qvpo_ddim5_delay2": "N_d 16, 5 DDIM steps, policy_delay 2",
    "qvpo_ddpm5_delay2": "N_d 16, 5 DDPM steps, policy_delay 2",
    "qvpo_ddpm5_nd8": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05",
    "qvpo_ddpm5_nd8_delay2": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2: `qvpo_fast.yml`",
    "qvpo_ddpm5_nd8_delay2_batch128": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, batch_size 128",
    "qvpo_ddpm5_nd8_delay2_tau0.01": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, tau 0.01",
    "qvpo_ddpm5_nd8_delay2_lr6e-4": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, learning_rate 6e-4",
    "qvpo_ddpm5_nd8_delay2_noise0.2": "N_d 8, 5 DDPM steps, N_e 2 with ent_coef 0.05, policy_delay 2, action noise 0.2",
    **{name: name.upper() for name in ("sac", "td3", "tqc")},
    "crossq": "CrossQ",
    **{f"fast_T{T}_ent{c}": f"T {T}, ent_coef {c}" for T in (5, 10, 20) for c in ("0.0", "0.05")},
    **{f"fast_Kb{b}_Kt{t}": f"K_b {b}, K_t {t}" for b, t in ((1, 1), (4, 1), (4, 2), (4, 4), (20, 2))},
    "fast_qcut": "qcut",
    "fast_official": "the authors' settings",
}
"""What a setting is called in tables, in their order; in legends with QVPO before it, from the colon on."""
THRESHOLDS = {
    "HalfCheetah-v5": [1000, 3000, 5000],
    "Hopper-v5": [300, 500, 1000],
    "Walker2d-v5": [300, 500, 1000],
    "Ant-v5": [1000, 2000, 4000],
    "Humanoid-v5": [500, 1000, 4000],
    "Pendulum-v1": [-300, -200],
    "BipedalWalker-v3": [0, 200, 300],
    "LunarLanderContinuous-v3": [0, 200],
}
"""Returns to be reached, of every task in the tables; the last of BipedalWalker and LunarLander is Gymnasium's "solved"."""
SCREEN = 40_000
"""Steps of the tables that show every seed."""

Row = dict[str, str]
Runs = dict[str, dict[str, dict[int, list[Row]]]]
"""Rows of finished runs by task, algorithm and seed."""


ABLATED, PREFIX = "qvpo_ddpm5_nd8_delay2", "fast_"
"""The settings of which one thing each is varied as in the paper's Figures 4 and 5, and what the names of those begin with."""


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
    steps = sorted({int(row["step"]) for rows in runs.values() for row in rows})
    values = {(seed, int(row["step"])): float(row[name] or "nan") for seed, rows in runs.items() for row in rows}
    return np.array([[values.get((seed, step), np.nan) for step in steps] for seed in sorted(runs)])


def estimate(values: np.ndarray) -> str:
    """Interquartile mean and interval over seeds, for a table."""
    if np.isnan(values).any():
        return "-"
    mean = f"{interquartile_mean(values[:, None]):.0f}"
    if len(values) == 1:
        return mean
    low, high = interval(values[:, None])
    return f"{mean} ({low:.0f} to {high:.0f})"


def ordered(algos: Sequence[str]) -> list[str]:
    """In the order of :data:`NAMES`, then all others."""
    return [*(name for name in NAMES if name in algos), *sorted(name for name in algos if name not in NAMES)]


def name_of(algo: str) -> str:
    """What a setting is called in tables."""
    return NAMES.get(algo, algo)


def label_of(algo: str) -> str:
    """What a setting is called in the legend of a figure: by its file if it has one."""
    return "QVPO, " * algo.startswith(("qvpo_", PREFIX)) + name_of(algo).split(": ")[-1].replace("`", "")


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
    """Where a run's evaluations first reach a return; infinity if never: later than all others."""
    reached = np.flatnonzero(curve >= threshold)
    return float(axis[reached[0]]) if len(reached) else float("inf")


def thresholds_table(runs: Runs) -> str:
    """Steps, processor time and time by the clock to a given return: medians over (timed) seeds; how many reached it."""
    titles = "steps, median | training, minutes of processor time, median | by the clock, evaluations and all"
    lines = [f"| task | return | algorithm | seeds that reached it | {titles} |", "|---" * 7 + "|"]
    for task, algos in runs.items():
        for threshold in THRESHOLDS[task]:
            for algo in ordered(list(algos)):
                curves = column(algos[algo], "mean_return")
                cells = []
                for name in ("step", "train_minutes", "minutes"):
                    axes = column(algos[algo], name)
                    timed = ~np.isnan(axes).any(axis=1)
                    reached = [first_reached(*pair, threshold) for pair in zip(curves[timed], axes[timed], strict=True)]
                    # Of a return that most seeds do not reach there is no time either, whichever were timed
                    median = np.median(reached) if reached and "-" not in cells else np.nan
                    cells.append(f"{median:.0f}" if np.isfinite(median) else "-")
                n_reached = sum(bool((curve >= threshold).any()) for curve in curves)
                lines.append(
                    f"| {task} | {threshold} | {name_of(algo)} | {n_reached} of {len(curves)} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def usual_processor(rows: Sequence[Row]) -> str:
    """The processor that most rows come from; times on another one cannot be compared with theirs."""
    return Counter(row["cpu"] for row in rows).most_common(1)[0][0]


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


def each_seed(rows: Sequence[Row | None], name: str) -> str:
    """A column of every seed for a table, or one dash where none was measured."""
    cells = [f"{float(row[name]):.0f}" if row and row[name] else "-" for row in rows]
    return "; ".join(cells) if set(cells) != {"-"} else "-"


def screen_table(rows: Sequence[Row], task: str, last_step: int) -> str:
    """
    Every seed's return at every evaluation, of runs that were broken off and of the first part of longer runs, too; the time
    for all steps, the mean over the seeds that ran on the usual processor.
    """
    wanted = [row for row in rows if row["task"] == task and int(row["step"]) <= last_step <= int(row["last_step"])]
    chosen = {
        (row["algo"], int(row["seed"]), int(row["step"])): row
        for row in sorted(wanted, key=lambda row: -int(row["last_step"]))  # runs of this length count
    }
    steps, cpu = sorted({step for _, _, step in chosen}), usual_processor(wanted)
    titles = ["setting", "seeds", *(f"{step} steps" for step in steps), "last, single sample", "training, minutes"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for algo in ordered(list({algo for algo, _, _ in chosen})):
        seeds = sorted({seed for name, seed, _ in chosen if name == algo})
        by_step = [[chosen.get((algo, seed, step)) for seed in seeds] for step in steps]
        cells = [each_seed(at_step, "mean_return") for at_step in by_step] + [each_seed(by_step[-1], "single_return")]
        ends = [row for row in by_step[-1] if row and row["train_minutes"] and row["cpu"] == cpu]
        cells.append(f"{np.mean([float(row['train_minutes']) for row in ends]):.0f}" if ends else "-")
        lines.append(f"| {name_of(algo)} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(runs: Runs, file: Path) -> None:
    """
    Interquartile means with intervals, one panel a task; above by steps, below by processor time. Dashed: means of single
    samples of QVPO's policy, where the curve is the best of 32.
    """
    figure, panels = plt.subplots(2, len(runs), figsize=(4.5 * len(runs), 7), squeeze=False)
    shown = ordered(list({algo for algos in runs.values() for algo in algos}))
    colors = {algo: f"C{i}" for i, algo in enumerate(shown)}
    for (task, algos), (above, below) in zip(runs.items(), panels.T, strict=True):
        for algo in ordered(list(algos)):
            returns = column(algos[algo], "mean_return")
            means = [interquartile_mean(values[:, None]) for values in returns.T]
            low, high = np.transpose([interval(values[:, None]) for values in returns.T])
            for axis, name in ((above, "step"), (below, "train_minutes")):
                x = column(algos[algo], name)
                x = x[~np.isnan(x).any(axis=1)]  # of the seeds that were timed on the usual processor
                if len(x):
                    axis.plot(x.mean(axis=0), means, color=colors[algo])
                    axis.fill_between(x.mean(axis=0), low, high, alpha=0.2, color=colors[algo])
            # NaN, which is not drawn, where they were not measured
            single = column(algos[algo], "single_return").mean(axis=0)
            above.plot(column(algos[algo], "step").mean(axis=0), single, "--", color=colors[algo], linewidth=1)
        above.set_title(task)
        above.set_xlabel("environment steps")
        below.set_xlabel("training, minutes of one core")
    panels[0, 0].set_ylabel("return")
    panels[1, 0].set_ylabel("return")
    lines = [Line2D([], [], color=colors[algo], label=label_of(algo)) for algo in shown]
    figure.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8, ncol=min(2, len(runs)))
    figure.tight_layout()
    figure.savefig(file, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def last_rows(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows at the end of training, all seeds of a setting together."""
    end = max(int(row["step"]) for row in rows)
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if int(row["step"]) == end:
            groups[tuple(row[key] for key in keys)].append(row)
    return groups


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


GOALS = ("right", "left", "top", "bottom")


def policy_name(setting: str, candidates: str) -> str:
    """What a policy of the four goals is called: QVPO's by the number of its candidates, too."""
    return f"{setting}, best of {candidates}" if setting.startswith("QVPO") else setting


def draw_multi_goal(rows: Sequence[Row], file: Path) -> None:
    """A bar for each seed at the end of training: above the goals of 200 episodes, below the quarters of first actions."""
    groups = last_rows(rows, "setting", "candidates")
    figure, axes = plt.subplots(2, len(groups), figsize=(1.7 * len(groups), 5), sharey=True, squeeze=False)
    for i, ((setting, candidates), group) in enumerate(groups.items()):
        for axis, kind in zip(axes[:, i], ("reached", "first"), strict=True):
            counts = np.array([[float(row[f"{kind}_{goal}"]) for goal in GOALS] for row in group])
            shares = counts / (200 if kind == "reached" else 1_000)
            for j, goal in enumerate(GOALS):
                axis.bar([row["seed"] for row in group], shares[:, j], bottom=shares[:, :j].sum(axis=1), label=goal)
        axes[0, i].set_title(policy_name(setting, candidates).replace(", ", ",\n"), fontsize=8)
        axes[1, i].set_xlabel("seed")
    axes[0, 0].set_ylabel("share of 200 episodes\nthat reach the goal")
    axes[1, 0].set_ylabel("share of 1 000 first actions\ntowards the goal")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=4, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=80, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


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


def contours(axis: Axes) -> None:
    """The bandit's reward."""
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, 200)] * 2), -1)
    axis.contour(grid[..., 0], grid[..., 1], ThreePeaksEnv.reward(grid), levels=[1, 5, 10, 20])
    axis.set_xlim(-2, 2)
    axis.set_ylim(-2, 2)


def draw_bandit(rows: Sequence[Row], file: Path) -> None:
    """Samples during training, without and with the entropy term: the paper's Figure 2."""
    coefs, steps = (sorted({row[name] for row in rows}, key=float) for name in ("ent_coef", "step"))
    figure, axes = plt.subplots(len(coefs), len(steps), figsize=(3 * len(steps), 3 * len(coefs)), squeeze=False)
    for (i, coef), (j, step) in itertools.product(enumerate(coefs), enumerate(steps)):
        points = [(float(row["x"]), float(row["y"])) for row in rows if (row["ent_coef"], row["step"]) == (coef, step)]
        contours(axes[i, j])
        axes[i, j].scatter(*np.transpose(points), s=3, alpha=0.4, color="black")
        axes[i, j].set_title(f"ent_coef {coef}, {step} steps", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)


def draw_chain(rows: Sequence[Row], file: Path) -> None:
    """An animation of the reverse chain of 100 candidates."""
    states: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        states[int(row["step"])].append((float(row["x"]), float(row["y"])))
    figure, axis = plt.subplots(figsize=(4, 4))
    contours(axis)
    points = axis.scatter([], [], s=8, color="black")
    end = max(states)

    def draw(frame: int) -> list[Artist]:
        step = min(frame, end)  # the result stays for a while
        points.set_offsets(states[step])
        title = axis.set_title(f"{step} of {end} steps")
        return [points, title]

    FuncAnimation(figure, draw, frames=end + 11).save(file, PillowWriter(fps=5), dpi=70)
    plt.close(figure)


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


def timed_runs(rows: Sequence[Row], last_step: int) -> Runs:
    """Finished runs of one length, with the times that can be compared among them."""
    of_task = finished_runs(rows, last_step).values()
    finished = [row for algos in of_task for seeds in algos.values() for run in seeds.values() for row in run]
    return finished_runs(comparable(finished), last_step)


def learning_curves(results: Sequence[Row]) -> tuple[dict[str, str], dict[str, Runs]]:
    """
    Everything about the runs of ``results.csv``.

    :param results: Its rows.
    :return: Tables by name, and what figures show by the figure's name.
    """
    rows = [row for row in results if not row["algo"].startswith(PREFIX)]
    ablations = [row for row in results if row["algo"] == ABLATED or row["algo"].startswith(PREFIX)]
    ablated = dict.fromkeys(row["task"] for row in results if row["algo"].startswith(PREFIX))
    screened = dict.fromkeys(row["task"] for row in rows if int(row["last_step"]) == SCREEN)
    tables = {f"screen_{task}": screen_table(rows, task, SCREEN) for task in screened}
    tables |= {f"ablations_{task}": screen_table(ablations, task, SCREEN) for task in ablated}
    figures = {}
    for length in sorted({int(row["last_step"]) for row in rows} - {SCREEN}):
        if runs := timed_runs(rows, length):
            tables |= {f"returns_{length}": returns_table(runs), f"thresholds_{length}": thresholds_table(runs)}
            figures[f"learning_curves_{length}"] = runs
    if drawn := {task: runs for task, runs in timed_runs(ablations, SCREEN).items() if task in ablated}:
        figures["ablations"] = drawn
    return tables, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the CSV files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of results.md and figures/")
    arguments = parser.parse_args()

    def read(name: str) -> list[Row]:
        return list(csv.DictReader((arguments.results / f"{name}.csv").open()))

    tables, curves = learning_curves(read("results"))
    tables |= {"bandit": bandit_table(read("bandit")), "multi_goal": multi_goal_table(read("multi_goal"))}
    tables["follow"] = follow_table(read("follow"))
    page = arguments.docs / "results.md"
    page.write_text(fill(page.read_text(), tables))
    figures = arguments.docs / "figures"
    for name, runs in curves.items():
        draw_curves(runs, figures / f"{name}.png")
    draw_multi_goal(read("multi_goal"), figures / "multi_goal.png")
    draw_bandit(read("bandit_samples"), figures / "bandit.png")
    draw_chain(read("bandit_chain"), figures / "chain.gif")


if __name__ == "__main__":
    main()
