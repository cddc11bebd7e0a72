"""The report of the learning curves: its statistics, its tables, and that the documentation shows what the CSV files say."""

import csv
import re
import shutil
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from scipy import stats

# The report needs it; it comes with RL Zoo, which make test-oldest leaves out
pytest.importorskip("rliable")

import figures
import report
import selection
import tables

LEARNING = ROOT / "benchmarks" / "learning"


def stored_scores(file, last_step, task, settings):
    """Last returns of some settings, shape (seeds, settings)."""
    rows = list(csv.DictReader((LEARNING / file).open()))
    if file == "precision.csv":
        rows = [{**row, "single_return": "", "train_minutes": ""} for row in rows]
    algos = selection.finished_runs(rows, last_step)[task]
    return np.transpose([selection.column(algos[name], "mean_return")[:, -1] for name in settings])


@pytest.mark.parametrize(
    "stored",
    [
        ("results.csv", 40_000, "HalfCheetah-v5", ("qvpo_ddim5", "qvpo_ddim5_delay2")),
        ("results.csv", 40_000, "Hopper-v5", ("qvpo_ddpm5_delay2", "sac")),
        ("precision.csv", 6_000, "Pendulum-v1", ("float32", "bfloat16")),
    ],
    ids=lambda stored: f"{stored[2]} {len(stored[3])} settings",
)
def test_interquartile_mean_and_interval_are_scipys(stored):
    """Of another implementation, on stored data: two, three and five seeds."""
    scores = stored_scores(*stored)
    assert selection.interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))

    def statistic(*columns, axis=-1):
        return stats.trim_mean(np.concatenate(columns, axis=axis), 0.25, axis=axis)

    theirs = stats.bootstrap(
        list(scores.T),
        statistic,
        n_resamples=10_000,
        method="percentile",
        vectorized=True,
        random_state=np.random.RandomState(1),
    ).confidence_interval
    ours = selection.interval(scores, 10_000)
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    assert ours[0] < selection.interquartile_mean(scores) < ours[1]


def test_an_interval_is_the_same_every_time():
    """The chance that three of three draws are the smallest, 1 / 27, is near 2.5 %: some resamples say so and some do not."""
    scores = np.array([[6362.0], [4877.0], [5473.0]])
    first = selection.interval(scores)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    for _ in range(3):
        assert selection.interval(scores) == first
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def row(seed, step, mean_return, algo="sac", last_step=20, minutes="1", cpu="A", single_return=""):
    numbers = dict(task="T", algo=algo, seed=seed, step=step, mean_return=mean_return, last_step=last_step, cpu=cpu)
    # By the clock it takes twice as long
    numbers |= {"train_minutes": minutes, "minutes": minutes and 2 * int(minutes), "single_return": single_return}
    return {name: str(value) for name, value in numbers.items()}


def test_only_finished_runs_of_one_length_count():
    rows = [row(0, 20, 5), row(0, 10, 3), row(1, 10, 4), row(2, 10, 4, last_step=10), row(3, 20, 6)]
    runs = selection.finished_runs(rows, 20)
    assert list(runs["T"]["sac"]) == [0, 3]
    assert [int(row["step"]) for row in runs["T"]["sac"][0]] == [10, 20]
    np.testing.assert_array_equal(selection.column({0: runs["T"]["sac"][0]}, "mean_return"), [[3, 5]])


def test_time_to_a_return_counts_seeds_that_never_reach_it(monkeypatch):
    monkeypatch.setitem(selection.THRESHOLDS, "T", [5])
    rows = [
        *(row(0, 10, 6, minutes="1"), row(0, 20, 2, minutes="2")),  # at 10
        *(row(1, 10, 1, minutes="1"), row(1, 20, 5, minutes="4")),  # at 20
        *(row(2, 10, 1), row(2, 20, 4)),  # never
    ]
    assert tables.thresholds_table(selection.finished_runs(rows, 20)).splitlines()[2:] == [
        "| T | 5 | SAC | 2 of 3 | 20 | 2 | 5 |"
    ]
    rows += [row(5, 10, 6, minutes=""), row(5, 20, 6, minutes="")]  # at 10, which took the timed seeds 1 on average
    assert tables.thresholds_table(selection.finished_runs(rows, 20)).splitlines()[2:] == [
        "| T | 5 | SAC | 3 of 4 | 15 | 2 | 3 |"
    ]
    rows = rows[:-2]
    rows += [row(3, 10, 1), row(3, 20, 1), row(4, 10, 1), row(4, 20, 1)]
    assert tables.thresholds_table(selection.finished_runs(rows, 20)).splitlines()[2:] == [
        "| T | 5 | SAC | 2 of 5 | - | - | - |"
    ]


def test_times_of_another_processor_are_left_out(monkeypatch):
    """Of all rows of a run, which add up; returns stay."""
    monkeypatch.setitem(selection.THRESHOLDS, "T", [3])
    rows = [row(0, 10, 1), row(0, 20, 5), row(0, 10, 1, "ours"), row(0, 20, 3, "ours", cpu="B"), row(1, 10, 4), row(1, 20, 6)]
    runs = selection.finished_runs(selection.comparable(rows), 20)
    assert tables.returns_table(runs).splitlines()[2:] == [
        "| T | SAC | 2 | 6 (5 to 6) | 6 (5 to 6) | - | 1 |",
        "| T | ours | 1 | 3 | 3 | - | - |",
    ]
    assert tables.thresholds_table(runs).splitlines()[2:] == [
        "| T | 3 | SAC | 2 of 2 | 15 | 1 | 2 |",
        "| T | 3 | ours | 1 of 1 | 20 | - | - |",
    ]
    rows += [row(2, 10, 9, minutes="7", cpu="B"), row(2, 20, 9, minutes="8", cpu="B")]
    runs = selection.finished_runs(selection.comparable(rows), 20)
    assert tables.returns_table(runs).splitlines()[2].endswith("| - | 1 |"), "the mean of the other two"
    assert tables.thresholds_table(runs).splitlines()[2] == "| T | 3 | SAC | 3 of 3 | 10 | 1 | 2 |"


def test_tables_of_single_seeds_and_many(monkeypatch):
    monkeypatch.setitem(selection.NAMES, "ours", "Our name")
    rows = [
        row(0, 10, 7),
        row(0, 20, 5),
        row(0, 10, 1, "ours"),
        row(0, 20, 2, "ours"),
        row(1, 10, 3, "ours"),
        row(1, 20, 4, "ours", single_return="3"),
    ]
    assert tables.returns_table(selection.finished_runs(rows, 20)).splitlines()[2:] == [
        "| T | SAC | 1 | 5 | 7 | - | 1 |",
        "| T | Our name | 2 | 3 (2 to 4) | 3 (2 to 4) | - | 1 |",
    ]
    screen = tables.screen_table([*rows, row(2, 10, 9, "new")], "T", 20).splitlines()[2:]
    assert screen == [
        "| SAC | 0 | 7 | 5 | - | 1 (A) |",
        "| Our name | 0, 1 | 1; 3 | 2; 4 | -; 3 | 1 (A) |",
        "| new | 2 | 9 | - | - | - |",
    ]
    longer = [row(seed, step, 100 * step, last_step=40) for seed in (0, 5) for step in (10, 40)]
    screen = tables.screen_table([*longer, row(0, 10, 7), row(0, 20, 5), *longer], "T", 20).splitlines()[2:]
    assert screen == ["| SAC | 0, 0, 5 | 7; 1000; 1000 | 5; -; - | - | 1 (A) |"], (
        "runs of this length, then the start of longer ones"
    )
    same = [row(0, 10, 1000), *longer, row(5, 10, 1000, last_step=60)]
    screen = tables.screen_table(same, "T", 20).splitlines()[2:]
    assert screen == ["| SAC | 0, 5 | 1000; 1000 | - | 1 (A) |"], "a run that came out the same is shown once"
    timed = [
        row(seed, 20, 1, minutes=minutes, cpu=cpu) for seed, minutes, cpu in ((0, "2", "A"), (1, "4", "A"), (2, "9", "B"))
    ]
    untimed = [row(3, 20, 1, minutes=""), row(0, 20, 1, "ours", cpu="B")]
    screen = tables.screen_table([*timed, *untimed], "T", 20).splitlines()[2:]
    assert screen == ["| SAC | 0, 1, 2, 3 | 1; 1; 1; 1 | - | 3 (A), 9 (B) |", "| Our name | 0 | 1 | - | 1 (B) |"], (
        "times of each processor"
    )
    gap = selection.finished_runs([row(0, 20, 5), row(1, 10, 1), row(1, 20, 2)], 20)["T"]["sac"]
    np.testing.assert_array_equal(selection.column(gap, "mean_return"), [[np.nan, 5], [1, 2]])


def test_tables_of_the_toy_tasks():
    bandit = [
        dict(setting="a", seed=seed, step=step, reward=reward, std="0.5", peak_0=peak, peak_1="0.05", peak_2="0.049")
        for seed, step, reward, peak in (("0", "1", "9", "1"), ("0", "2", "4", "0.9"), ("1", "2", "2", "0"))
    ]
    assert tables.bandit_table(bandit).splitlines()[2:] == ["| a | 2 | 3.0 ± 1.4 | 0.50 ± 0.00 | 2, 1 |"]
    counts = [dict(reached=(190, 10, 0, 0), first=(700, 100, 100, 100)), dict(reached=(0, 200, 0, 0), first=(0, 900, 100, 0))]
    goals = [
        {
            **{"setting": "QVPO", "seed": str(seed), "step": "2", "candidates": "4", "return": str(10 * seed)},
            **{f"{kind}_{goal}": str(n) for kind, ns in count.items() for goal, n in zip(selection.GOALS, ns, strict=True)},
        }
        for seed, count in enumerate(counts)
    ]
    assert tables.multi_goal_table(goals).splitlines()[2:] == ["| QVPO, best of 4 | 2 | 2, 1 | 98% | 80% | 5 ± 7 |"]
    follow = [
        {"setting": "a", "seed": seed, "moment": moment, "distance": distance, "std": "0.2", "critics_distance": critics}
        for seed, distances in (("0", ("0.1", "0.5", "0.4", "0.2")), ("1", ("0.3", "0.6", "0.5", "0.2")))
        for moment, distance, critics in zip(
            ("before", "at once", "after 5", "after 9"), distances, ("0.1", "0.9", "0.6", "0.3"), strict=True
        )
    ]
    lines = tables.follow_table(follow).splitlines()
    assert lines[0].endswith("| distance before | at once | after 5 | after 9 | critics' best after 5 | after 9 |")
    assert lines[1:] == ["|---|---|---|---|---|---|---|---|---|", "| a | 2 | 0.20 | 0.20 | 0.55 | 0.45 | 0.20 | 0.60 | 0.30 |"]


def blocked_rows():
    """Two seeds of a policy that keeps two goals and one of a policy that keeps one; of each the preferred one is blocked."""
    rows = []
    for setting, seed, moment, counts in (
        ("SDAC, temperature 1.0", "1", "before", (90, 10, 0, 100)),
        ("SDAC, temperature 1.0", "1", "at once", (90, 10, 0, 0)),
        ("SDAC, temperature 1.0", "0", "before", (0, 200, 0, 0)),
        ("SDAC, temperature 1.0", "0", "at once", (0, 0, 0, 20)),
        ("SAC", "0", "before", (0, 200, 0, 0)),
        ("SAC", "0", "at once", (0, 0, 0, 0)),
    ):
        row = {"setting": setting, "seed": seed, "moment": moment, "candidates": "1", "return": str(-10 * int(seed))}
        reached = dict(zip(selection.GOALS, map(str, counts), strict=True))
        paths = "0 0 9 1|0 0 -9 1 -18 2" if moment == "before" else ""
        rows.append({**row, **{f"reached_{goal}": n for goal, n in reached.items()}, "blocked": "left", "paths": paths})
    return rows


def test_the_table_and_the_figure_of_the_blocked_goal(tmp_path, monkeypatch):
    lines = tables.blocked_table(blocked_rows()).splitlines()
    assert lines[0].endswith("| return | another goal, at once |")
    assert lines[2:] == [
        "| SDAC, temperature 1.0, best of 1 | 2 | 1, 3 | 75% | -5 ± 7 | 30% |",
        "| SAC | 1 | 1 | 100% | 0 | 0% |",
    ]
    shown = []
    monkeypatch.setattr(figures.plt, "close", shown.append)
    figures.draw_blocked(blocked_rows(), tmp_path / "figure.png")
    above, below = shown[0].axes[:2], shown[0].axes[2:4]
    assert [axis.get_title() for axis in above] == ["SDAC", "SAC"]
    np.testing.assert_allclose(above[0].lines[1].get_xydata(), [(0, 0), (-0.9, 0.1), (-1.8, 0.2)])
    assert [[bar.get_height() for bar in axis.patches] for axis in below] == [[30.0], [0.0]]
    assert [offset.tolist() for offset in below[0].collections[0].get_offsets()] == [[0.0, 10.0], [0.0, 50.0]]


def test_the_front_figure_shows_runs_as_far_as_they_got(tmp_path, monkeypatch):
    """Also unfinished ones; thin lines are seeds, thick ones their means; minutes are steps times what a step costs."""
    rows = [
        {**row(seed, step, value, algo, last_step), "task": "Hopper-v5"}
        for seed, step, value, algo, last_step in (
            *((0, 20_000, 30, "sac", 100_000), (0, 10_000, 10, "sac", 100_000), (1, 10_000, 20, "sac", 100_000)),
            *((2, 10_000, 30, "sac", 100_000), (2, 20_000, 50, "sac", 100_000)),
            *((0, 10_000, 50, "preset_fast", 100_000), (0, 10_000, 1, "qvpo", 100_000)),
            # Runs of other lengths are others
            *((0, 10_000, 5, "sac", 200_000), (1, 10_000, 5, "sac", 40_000), (2, 20_000, 5, "preset_fast", 30_000)),
        )
    ]
    curves = selection.front_curves(rows)
    assert list(curves) == ["Hopper-v5"] and list(curves["Hopper-v5"]) == ["preset_fast", "sac"]
    single = {"Hopper-v5": {"preset_fast": [(np.array([10_000]), np.array([7.0]))]}}
    milliseconds = {"presets.fast": 60.0, "SAC": 30.0}
    lines = tables.front_table(curves, single, milliseconds, (10_000, 20_000), (10_000, 20_000), 5.5).splitlines()
    assert lines[2:] == [
        "| Hopper-v5 | QVPO | 1 | 50 | 50 | - | - | - |",
        "| Hopper-v5 | SAC | 3 | 40 (30 to 50) | 20 (10 to 30) | 40 (30 to 50) | 30 (20 to 40) | - |",
    ], "two seeds of SAC got to the end, and took 5 minutes"
    single["Hopper-v5"]["preset_fast"] = [(np.array([10_000, 20_000]), np.array([7.0, 9.0]))]
    lines = tables.front_table(curves, single, milliseconds, (), (10_000, 20_000), 9.0).splitlines()
    assert lines[2] == "| Hopper-v5 | QVPO | 1 | - | - | 8 |"
    lines = tables.each_seed_table(curves, ("preset_fast", "sac"), (10_000, 20_000)).splitlines()
    assert lines[2:] == ["| Hopper-v5 | - | - | 20, 40 | 30 | - |"], "a seed that did not get so far is left out"
    lines = tables.each_seed_table(curves, ("preset_fast", "sac"), (10_000, 10_000)).splitlines()
    assert lines[2:] == ["| Hopper-v5 | 50 | 50 | 10, 20, 30 | 20 | 2.50 |"]
    shown = []
    monkeypatch.setattr(figures.plt, "close", shown.append)
    figures.draw_front(curves, {"presets.fast": 60.0, "SAC": 30.0}, tmp_path / "figure.png")
    above, below = shown[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in above.lines if not line.get_label().startswith("_")}
    assert drawn == {"QVPO": [[10, 50]], "SAC": [[10, 20]]}, "a mean is of all seeds, and ends where one of them ends"
    timed = {line.get_label(): line.get_xydata().tolist() for line in below.lines if not line.get_label().startswith("_")}
    assert timed == {"QVPO": [[5, 50]], "SAC": [[0, 20]]}, "5 000 and 10 000 random steps cost nothing"
    seeds = [line.get_xydata().tolist() for line in above.lines if line.get_label().startswith("_")]
    assert seeds == [[[10, 50]], [[10, 10], [20, 30]], [[10, 20]], [[10, 30], [20, 50]]]
    assert [line.get_xydata()[-1].tolist() for line in below.lines if line.get_label().startswith("_")][1] == [5, 30]


def test_tables_of_costs_and_of_the_quick_start():
    steps = [
        {"env": env, "setting": setting, "median_ms": ms, "ratio": ratio}
        for env, setting, ms, ratio in (("E", "CrossQ", "40.4", "1.0"), ("E", "ours", "60.2", "1.494"))
    ]
    assert tables.step_table(steps).splitlines() == [
        *("| setting | E, ms | times CrossQ |", "|---|---|---|", "| CrossQ | 40 | 1.00 |", "| ours | 60 | 1.49 |")
    ]
    runs = [
        {"algo": algo, "step": step, "mean_return": value}
        for algo, step, value in (("small", "5000", "-150"), ("small", "5000", "-141"), ("other", "5000", "0"))
    ]
    assert tables.quickstart_table(runs).splitlines()[2:] == ["| 5 000 | 2 | -150 | -146 | -141 |"]


def test_the_table_of_learning_from_data():
    """The last update of each run, without what came later in the environment, and without runs that broke off."""

    def run(algo, seed, updates, value, steps="0"):
        known = dict(task="T", data_return="50", agent_return="90", greedy_return="7", minutes="4")
        return dict(algo=algo, seed=seed, updates=updates, steps=steps, mean_return=value, **known)

    rows = [
        *(run("dtql", "0", "10", "1"), run("dtql", "0", "20", "60"), run("dtql", "0", "25", "99", steps="5")),
        *(run("dtql", "1", "20", "70"), run("dtql", "2", "10", "0"), run("behaviour_cloning", "0", "20", "40")),
    ]
    assert tables.offline_table(rows).splitlines()[2:] == [
        "| T | the data | | | 50 | | |",
        "| T | the agent in the data | | | 90 | | |",
        "| T | behaviour cloning | 1 | 20 | 40 | 7 | 4 |",
        "| T | DTQL | 2 | 20 | 65 (60 to 70) | 7 (7 to 7) | 4 |",
    ]
    assert tables.online_table(rows).splitlines() == [
        "| task | algorithm | seeds | before | after 5 steps |",
        "|---|---|---|---|---|",
        "| T | DTQL | 1 | 60 | 99 |",
    ]


def test_every_length_of_runs_is_shown(monkeypatch):
    """Those of small tasks and long ones; ablations only beside what they vary, and drawn when one has come to its end."""
    monkeypatch.setitem(selection.THRESHOLDS, "T", [3])
    monkeypatch.setitem(selection.THRESHOLDS, "small", [3])
    rows = [row(0, 20, 3), row(0, selection.SCREEN, 5, last_step=selection.SCREEN), row(0, 100, 4, last_step=100)]
    rows += [{**row(0, 100, 4, last_step=100), "task": "small"}, row(0, 10, 4, last_step=1000)]
    tables, figures = report.learning_curves(rows)
    assert list(tables) == ["screen_T", "returns_20", "thresholds_20", "returns_100", "thresholds_100"]
    assert {name: list(runs) for name, runs in figures.items()} == {
        "learning_curves_20": ["T"],
        "learning_curves_100": ["T", "small"],
    }
    rows.append(row(0, 10, 4, algo="fast_qcut", last_step=selection.SCREEN))
    tables, figures = report.learning_curves(rows)
    assert "ablations_T" in tables and "ablations" not in figures, "there is no curve yet"
    rows.append(row(0, selection.SCREEN, 4, algo="fast_qcut", last_step=selection.SCREEN))
    tables, figures = report.learning_curves(rows)
    assert list(figures["ablations"]["T"]) == ["fast_qcut"]
    assert "qcut" in tables["ablations_T"] and "qcut" not in tables["screen_T"] + tables["returns_20"]
    monkeypatch.delitem(selection.THRESHOLDS, "small")
    with pytest.raises(KeyError, match="small"):
        report.learning_curves(rows)


def test_tables_need_their_places():
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb"
    assert tables.fill(page, {"one": "| new |"}) == "a\n<!-- table: one -->\n\n| new |\n\n<!-- end -->\nb"
    for wrong in ({}, {"one": "", "two": ""}):
        with pytest.raises(ValueError, match="places for"):
            tables.fill(page, wrong)


def test_the_pages_of_results_show_what_the_csv_files_say(tmp_path, monkeypatch):
    """The report leaves the committed page as it is, draws every figure that it shows, and has drawn them from these rows."""
    # Few resamples for the intervals of the curves: the drawings themselves are not compared
    monkeypatch.setattr(figures, "interval", lambda scores: selection.interval(scores, 5))
    pages = ("results.md", "notes.md")
    for page in pages:
        shutil.copy(ROOT / "docs" / page, tmp_path)
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", "--docs", str(tmp_path)])
    report.main()
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()
    drawn = {file.name for file in (tmp_path / "figures").iterdir() if file.stat().st_size > 10_000}
    shown = {name for page in pages for name in re.findall(r"\]\(figures/(.*?)\)", (tmp_path / page).read_text())}
    assert drawn == shown
    committed = ROOT / "docs" / "figures"
    for name in shown:
        old, new = Image.open(committed / name), Image.open(tmp_path / "figures" / name)
        if name.endswith(".png"):  # carries a digest of the rows
            assert old.text["Description"] == new.text["Description"], f"{name} is older than its rows: make report"
        else:
            assert old.n_frames == new.n_frames, name


def drawn(draw, rows, tmp_path, monkeypatch):
    """A figure, as it was before it was closed."""
    shown = []
    monkeypatch.setattr(figures.plt, "close", shown.append)
    draw(rows, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").text["Description"] == figures.metadata(rows)["Description"]
    return shown[0]


def test_the_figure_of_costs(tmp_path, monkeypatch):
    rows = [
        dict(env=env, setting=setting, ratio=str(ratio), ratio_min=str(ratio - 0.1), ratio_max=str(ratio + 0.2))
        for env, setting, ratio in (("E", "CrossQ-256", 1.0), ("E", "presets.fast", 1.1), ("F", "CrossQ-256", 1.0))
    ]
    first, second = drawn(figures.draw_steps, rows, tmp_path, monkeypatch).axes
    assert [bar.get_width() for bar in first.patches] == [1.0, 1.1] and len(second.patches) == 1
    assert first.yaxis_inverted() and second.yaxis_inverted(), "as in the table"
    lines = first.collections[0].get_segments()[1]
    np.testing.assert_allclose(lines[:, 0], [1.0, 1.3])


def test_the_figure_of_the_quick_start(tmp_path, monkeypatch):
    returns = {0: (-9, -1), 1: (-7, -2), 2: (-8, -3)}
    rows = [
        dict(algo=algo, seed=str(seed), step=str(step), mean_return=str(value))
        for seed, values in returns.items()
        for algo, extra in (("small", 0), ("version_0.1", 5))
        for step, value in zip((1000, 2000), np.array(values) + extra, strict=True)
    ]
    (axis,) = drawn(figures.draw_quickstart, rows, tmp_path, monkeypatch).axes
    *seeds, median = [line.get_xydata().tolist() for line in axis.lines]
    assert seeds == [[[1000, first], [2000, last]] for first, last in returns.values()]
    assert median == [[1000, -8], [2000, -2]]


def test_the_figure_of_data_shows_the_runs_that_came_furthest(tmp_path, monkeypatch):
    known = {"task": "T", "data_return": "3", "agent_return": "9"}
    rows = [
        {**known, "algo": algo, "seed": seed, "updates": updates, "steps": steps, "mean_return": value}
        for algo, seed, updates, steps, value in (
            *(("dtql", "0", "10", "0", "2"), ("dtql", "0", "20", "0", "4"), ("dtql", "1", "20", "0", "6")),
            *(("dtql", "1", "30", "10", "8"), ("dtql", "2", "10", "0", "7"), ("behaviour_cloning", "0", "10", "0", "1")),
        )
    ]
    (axis,) = drawn(figures.draw_offline, rows, tmp_path, monkeypatch).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["behaviour cloning", "DTQL"]
    assert [bar.get_height() for bar in axis.patches] == [1.0, 5.0]
    assert sorted({line.get_ydata()[0] for line in axis.lines}) == [3.0, 9.0]
    assert [points.get_offsets().tolist() for points in axis.collections] == [[[0, 1]], [[1, 4], [1, 6]]]


def quickstart(settings, step):
    """Returns of all seeds after a step."""
    rows = csv.DictReader((LEARNING / "quickstart.csv").open())
    return [float(row["mean_return"]) for row in rows if (row["algo"], row["step"]) == (settings, str(step))]


def quickstart_cells(settings, step):
    """The cells of a row of the table on the page about results."""
    values = quickstart(settings, step)
    if not values:
        return "- | -"
    spread = f"{max(values):.0f}, {np.median(values):.0f}, {min(values):.0f}"
    return f"{spread} | {sum(value < -200 for value in values)} of {len(values)}"


def test_the_front_page_shows_what_the_results_say():
    """Its table is the column "20 minutes" of the results, means of seeds."""
    page = (ROOT / "docs" / "results.md").read_text()
    table = page.split("<!-- table: front -->")[1].split("<!-- end -->")[0]
    shown = re.findall(r"^\| ([\w-]+) \| (\w+) \| \d+ \| (-?\d+)", table, re.M)
    readme = (ROOT / "README.md").read_text()
    (header,) = re.findall(r"^\| \| (.*) \|$", readme, re.M)
    found = [
        (task, algorithm, number)
        for task, numbers in re.findall(r"^\| ([\w-]+-v5) \| ([-\d |]+) \|$", readme, re.M)
        for algorithm, number in zip(header.split(" | "), numbers.split(" | "), strict=True)
    ]
    assert found == shown and len(found) >= 12


def test_what_is_said_of_the_quick_start():
    """20 of 20 seeds succeed; the range is that of the file, wherever it is said."""
    returns = quickstart("small", 5_000)
    said = f"{max(returns):.0f} to {min(returns):.0f}"
    assert len(returns) == 20 and min(returns) > -160
    for file in ("README.md", "docs/quickstart.md", "examples/train_pendulum.py", "CHANGELOG.md"):
        assert said in (ROOT / file).read_text(), file
    page = (ROOT / "docs" / "notes.md").read_text()
    for step in (2_000, 3_000, 4_000, 5_000, 6_000):
        cells = " | ".join(quickstart_cells(settings, step) for settings in ("small", "version_0.1"))
        assert f"| {step // 1000} 000 | {cells} |" in page
