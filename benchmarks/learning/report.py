"""
Figures and tables of the learning curves, from the CSV files beside this script: ``make report``.

Draws ``docs/figures/`` and fills the tables in ``docs/results.md`` and ``docs/notes.md`` between ``<!-- table: NAME -->`` and
``<!-- end -->``. Runs that did not come to their end count in tables named ``screen_TASK`` and in the README's figure only.
Every other length of finished runs has tables ``returns_LENGTH`` and ``thresholds_LENGTH`` and a figure of its own. Needs
rliable, which comes with
``pip install ".[zoo]"``. For runs of one's own: ``--results FOLDER --docs FOLDER``.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from figures import (
    draw_bandit,
    draw_blocked,
    draw_chain,
    draw_curves,
    draw_front,
    draw_multi_goal,
    draw_offline,
    draw_quickstart,
    draw_steps,
)
from selection import ABLATED, PREFIX, SCREEN, SCREENS, Row, Runs, front_curves, timed_runs
from tables import (
    bandit_table,
    blocked_table,
    each_seed_table,
    fill,
    follow_table,
    front_table,
    multi_goal_table,
    offline_table,
    online_table,
    quickstart_table,
    returns_table,
    screen_table,
    step_table,
    thresholds_table,
)

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
STEPS = HERE.parent / "results" / "step_one_thread.csv"


def learning_curves(results: Sequence[Row]) -> tuple[dict[str, str], dict[str, Runs]]:
    """
    Everything about the runs of ``results.csv``.

    :param results: Its rows.
    :return: Tables by name, and what figures show by the figure's name.
    """
    rows = [row for row in results if not row["algo"].startswith(PREFIX)]
    ablations = [row for row in results if row["algo"] == ABLATED or row["algo"].startswith(PREFIX)]
    ablated = dict.fromkeys(row["task"] for row in results if row["algo"].startswith(PREFIX))
    screened = {task: SCREENS.get(task, SCREEN) for task in dict.fromkeys(row["task"] for row in rows)}
    lengths = {(row["task"], int(row["last_step"])) for row in rows}
    tables = {f"screen_{task}": screen_table(rows, task, n) for task, n in screened.items() if (task, n) in lengths}
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
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of results.md, notes.md and figures/")
    arguments = parser.parse_args()

    def read(name: str) -> list[Row]:
        return list(csv.DictReader((arguments.results / f"{name}.csv").open()))

    tables, curves = learning_curves(read("results"))
    tables |= {"bandit": bandit_table(read("bandit")), "multi_goal": multi_goal_table(read("multi_goal"))}
    tables["follow"] = follow_table(read("follow"))
    compared, steps = [*read("preset"), *read("results")], list(csv.DictReader(STEPS.open()))
    front = front_curves(compared)
    milliseconds = {row["setting"]: float(row["median_ms"]) for row in steps if row["env"] == "HalfCheetah-v5"}
    answers = {"front": front_table(front, front_curves(compared, column="single_return"), milliseconds)}
    answers["each_seed"] = each_seed_table(front, ("preset_fast", "crossq_256"), (40_000, 50_000))
    answers |= {"step": step_table(steps), "blocked_goal": blocked_table(read("blocked_goal"))}
    offline, quickstart = read("offline"), read("quickstart")
    answers["quickstart"] = quickstart_table(quickstart)
    answers |= {"offline": offline_table(offline), "online": online_table(offline)}
    for name, shown in (("notes", tables), ("results", answers)):
        page = arguments.docs / f"{name}.md"
        page.write_text(fill(page.read_text(), shown))
    figures = arguments.docs / "figures"
    for name, runs in curves.items():
        draw_curves(runs, figures / f"{name}.png")
    draw_front(front, milliseconds, figures / "front.png")
    draw_blocked(read("blocked_goal"), figures / "blocked_goal.png")
    draw_steps(steps, figures / "step.png")
    draw_quickstart(quickstart, figures / "quickstart.png")
    draw_offline(offline, figures / "offline.png")
    draw_multi_goal(read("multi_goal"), figures / "multi_goal.png")
    draw_bandit(read("bandit_samples"), figures / "bandit.png")
    draw_chain(read("bandit_chain"), figures / "chain.gif")


if __name__ == "__main__":
    main()
