"""The figures of ``docs/results.md``, ``docs/notes.md`` and of the README, from rows of the CSV files."""

import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from selection import (
    FRONT,
    GOALS,
    OFFLINE,
    Curves,
    Row,
    Runs,
    by_moment,
    column,
    interquartile_mean,
    interval,
    label_of,
    last_rows,
    mean_over_timed,
    minutes,
    offline_ends,
    ordered,
    policy_name,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # is no package

from bandit import ThreePeaksEnv


def metadata(shown: Any) -> dict[str, str | None]:
    """
    What a figure's file carries beside the figure.

    :param shown: The rows that are drawn.
    :return: A digest of them, so that a test can tell a figure that is older than its CSV file.
    """
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    return {"Software": None, "Description": digest}


def finish(figure: Figure, file: Path, shown: Any, dpi: int = 100, **options: Any) -> None:
    """Write a figure with the digest of what it shows; ``options`` are those of ``savefig()``."""
    figure.tight_layout()
    figure.savefig(file, dpi=dpi, metadata=metadata(shown), **options)
    plt.close(figure)


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
                x = mean_over_timed(column(algos[algo], name))  # NaN, which is not drawn, where none was timed
                axis.plot(x, means, color=colors[algo])
                axis.fill_between(x, low, high, alpha=0.2, color=colors[algo])
            # NaN where they were not measured
            single = column(algos[algo], "single_return").mean(axis=0)
            above.plot(column(algos[algo], "step").mean(axis=0), single, "--", color=colors[algo], linewidth=1)
        above.set_title(task)
        above.set_xlabel("environment steps")
        below.set_xlabel("training, minutes of one core")
    panels[0, 0].set_ylabel("return")
    panels[1, 0].set_ylabel("return")
    lines = [Line2D([], [], color=colors[algo], label=label_of(algo)) for algo in shown]
    figure.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8, ncol=min(2, len(runs)))
    finish(figure, file, runs, bbox_inches="tight")


def draw_front(curves: Curves, milliseconds: dict[str, float], file: Path) -> None:
    """
    Means as far as all seeds came, and thin lines for each; above by steps, below by processor time.

    :param curves: Steps and returns of each seed by task and algorithm.
    :param milliseconds: Of a step of each algorithm, timed in turn on one core.
    :param file: The figure.
    """
    figure, panels = plt.subplots(2, len(curves), figsize=(3.4 * len(curves), 5), squeeze=False, sharey="col")
    for (task, algos), axes in zip(curves.items(), panels.T, strict=True):
        for algo, seeds in algos.items():
            name, timed, n_random = FRONT[algo]
            color, width = f"C{[*FRONT].index(algo)}", 2.5 if name == "QVPO" else 1.5
            # Where a seed ends, the mean of the others would jump
            steps = np.array([step for step in seeds[0][0] if all(step in x for x, _ in seeds)])
            mean = [np.mean([y[x == step] for x, y in seeds]) for step in steps]
            for axis, time in zip(axes, (lambda x: x / 1_000, partial(minutes, milliseconds[timed], n_random)), strict=True):
                for x, y in seeds:
                    axis.plot(time(x), y, color=color, alpha=0.3, linewidth=0.7)
                axis.plot(time(steps), mean, color=color, linewidth=width, label=name, zorder=3)
        axes[0].set(title=task, xlabel="thousand steps")
        axes[1].set_xlabel("minutes of one core")
    for axis in panels[:, 0]:
        axis.set_ylabel("return")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.05), ncol=len(labels), frameon=False)
    shown = {
        task: {algo: [(x.tolist(), y.tolist()) for x, y in seeds] for algo, seeds in algos.items()}
        for task, algos in curves.items()
    }
    finish(figure, file, [shown, milliseconds], bbox_inches="tight")


def draw_steps(rows: Sequence[Row], file: Path) -> None:
    """A bar for each setting, as many times CrossQ's step as it takes; lines reach from the least to the most of repeats."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    figure, axes = plt.subplots(1, len(envs), figsize=(4.2 * len(envs), 2.6), sharey=True, squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        shown = [row for row in rows if row["env"] == env]
        ratios, least, most = (np.array([float(row[name]) for row in shown]) for name in ("ratio", "ratio_min", "ratio_max"))
        colors = ["C0" if row["setting"].startswith("presets.") else "0.6" for row in shown]
        axis.barh([row["setting"] for row in shown], ratios, xerr=(ratios - least, most - ratios), color=colors)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=env, xlabel="times CrossQ's step")
    axes[0, 0].invert_yaxis()  # the others share it
    finish(figure, file, rows)


def draw_quickstart(rows: Sequence[Row], file: Path) -> None:
    """Returns of each seed, and their median."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["algo"] == "small":
            curves[row["seed"]].append((int(row["step"]), float(row["mean_return"])))
    steps, returns = np.transpose([sorted(curve) for curve in curves.values()])
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot(steps, returns, color="C0", alpha=0.3, linewidth=0.8)
    axis.plot(steps[:, 0], np.median(returns, axis=1), color="C0", linewidth=2.5)
    axis.set(title="Pendulum-v1", xlabel="environment steps", ylabel="return")
    finish(figure, file, rows)


def draw_offline(rows: Sequence[Row], file: Path) -> None:
    """A bar for each algorithm, a point for each seed; lines are the returns of the data and of the agent in them."""
    ends = offline_ends(rows)
    figure, axes = plt.subplots(1, len(ends), figsize=(4.2 * len(ends), 3), squeeze=False)
    for axis, (task, algos) in zip(axes[0], ends.items(), strict=True):
        for i, (algo, ended) in enumerate(algos.items()):
            returns = [float(row["mean_return"]) for row in ended]
            axis.bar(OFFLINE[algo], np.mean(returns), color=f"C{i}", alpha=0.6)
            axis.scatter([i] * len(returns), returns, color="black", s=10, zorder=3)
        for what, label, style in (("data_return", "the data", ":"), ("agent_return", "the agent in the data", "--")):
            axis.axhline(float(ended[0][what]), color="black", linewidth=1, linestyle=style, label=label)
        axis.set(title=task, ylabel="return")
    axes[0, 0].legend(fontsize=8)
    finish(figure, file, rows)


def draw_multi_goal(rows: Sequence[Row], file: Path) -> None:
    """A bar for each seed at the end of training: above the goals of 200 episodes, below the quarters of first actions."""
    groups = last_rows(rows, "setting", "candidates")
    figure, axes = plt.subplots(2, len(groups), figsize=(1.7 * len(groups), 5), sharey=True, squeeze=False)
    n_seeds = max(map(len, groups.values()))
    for i, ((setting, candidates), group) in enumerate(groups.items()):
        for axis, kind in zip(axes[:, i], ("reached", "first"), strict=True):
            counts = np.array([[float(row[f"{kind}_{goal}"]) for goal in GOALS] for row in group])
            shares = counts / (200 if kind == "reached" else 1_000)
            for j, goal in enumerate(GOALS):
                axis.bar([row["seed"] for row in group], shares[:, j], bottom=shares[:, :j].sum(axis=1), label=goal)
            axis.set_xlim(-0.6, n_seeds - 0.4)  # bars as wide where only some of the seeds were run
        axes[0, i].set_title(policy_name(setting, candidates).replace(", ", ",\n"), fontsize=8)
        axes[1, i].set_xlabel("seed")
    axes[0, 0].set_ylabel("share of 200 episodes\nthat reach the goal")
    axes[1, 0].set_ylabel("share of 1 000 first actions\ntowards the goal")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=4, fontsize=9)
    finish(figure, file, rows, dpi=80, bbox_inches="tight")


BLOCKED = {
    "SDAC, temperature 1.0": ("SDAC", "1"),
    "QVPO, presets.fast": ("QVPO", "1"),
    "SAC": ("SAC", "1"),
    "TD3": ("TD3", "1"),
    "CrossQ": ("CrossQ", "1"),
}
"""Which policies the figure of the blocked goal shows, their names in it and numbers of candidates."""


def paths_of(row: Row) -> list[np.ndarray]:
    """Positions of some episodes, each of shape (n, 2)."""
    return [np.array(path.split(), float).reshape(-1, 2) / 10 for path in row["paths"].split("|")]


def draw_blocked(rows: Sequence[Row], file: Path) -> None:
    """
    Above paths of one seed, with a cross over the goal that is blocked then. Below the share of episodes that reach another
    goal: bars are means, points seeds.
    """
    policies = by_moment(rows)
    groups = {name: policies[key, n] for key, (name, n) in BLOCKED.items() if (key, n) in policies}
    figure, axes = plt.subplots(2, len(groups), figsize=(2.3 * len(groups), 4.4), squeeze=False, height_ratios=(1.25, 1))
    for i, (name, moments) in enumerate(groups.items()):
        above, below = axes[:, i]
        first = next(iter(moments.values()))[0]
        for path in paths_of(first):
            above.plot(*path.T, color="C0", alpha=0.5, linewidth=1)
        for goal, place in zip(GOALS, ((5, 0), (-5, 0), (0, 5), (0, -5)), strict=True):
            above.scatter(*place, marker="*", s=130, color="C2", zorder=3)
            if goal == first["blocked"]:
                above.scatter(*place, marker="x", s=130, color="C3", zorder=4, linewidth=3)
        above.set(title=name, xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), xticks=[], yticks=[], aspect="equal")
        later = [*moments][1:]
        shares = [[sum(int(row[f"reached_{goal}"]) for goal in GOALS) / 2 for row in moments[moment]] for moment in later]
        below.bar(range(len(later)), [np.mean(share) for share in shares], color="C0", alpha=0.6)
        for j, share in enumerate(shares):
            below.scatter([j] * len(share), share, color="black", s=8, zorder=3)
        below.set(ylim=(0, 105), xticks=range(len(later)))
        below.set_xticklabels([moment.replace("after ", "+") for moment in later], fontsize=8)
        below.set_yticks([0, 50, 100], [] if i else ["0 %", "50 %", "100 %"])
    axes[0, 0].set_ylabel("20 episodes,\nfour equal goals")
    axes[1, 0].set_ylabel("then one is blocked:\nreaches another goal")
    figure.supxlabel("environment steps after blocking", fontsize=9)
    finish(figure, file, rows)


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
    finish(figure, file, rows, dpi=80)


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
