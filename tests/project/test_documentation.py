"""The documentation is true: its code runs, its commands are accepted, its tests and measurements exist."""

import argparse
import ast
import functools
import importlib
import inspect
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement

from sb3_qvpo import DTQL, QVPO, SDAC, DiffusionPolicy, DiffusionQL, zoo
from sb3_qvpo.common.off_policy_algorithm import DiffusionOffPolicyAlgorithm

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.S | re.M)


def blocks(page, *labels):
    """The code blocks of a page that have one of some labels."""
    return [code for label, code in BLOCK.findall(page.read_text()) if label in labels]


BLOCKS = {f"{page.name}-{i}": code for page in PAGES for i, code in enumerate(blocks(page, "python"))}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("settings")
def test_code_block(name, tmp_path, monkeypatch):
    """With fewer steps, shorter episodes and smaller numbers where the code names none."""
    code = BLOCKS[name]
    monkeypatch.chdir(tmp_path)
    construct, learn = QVPO.__init__, DiffusionOffPolicyAlgorithm.learn
    learn_offline = DiffusionOffPolicyAlgorithm.learn_offline

    @functools.wraps(construct)
    def construct_small(self, *args, **kwargs):
        is_preset = "n_sampling_steps" in kwargs.get("policy_kwargs", {})
        construct(self, *args, **{**dict(n_diffusion_steps=20 if is_preset else 2, n_train_candidates=4), **kwargs})

    def short_learn(self, total_timesteps, *args, **kwargs):
        self.learning_starts, self.batch_size = 2, min(self.batch_size, 16)
        return learn(self, min(total_timesteps, 5), *args, **kwargs)

    def short_offline(self, dataset=None, gradient_steps=5, **kwargs):
        self.batch_size = min(self.batch_size, 16)
        return learn_offline(self, dataset, min(gradient_steps, 5), **kwargs)

    monkeypatch.setattr(DiffusionOffPolicyAlgorithm, "learn_offline", short_offline)
    monkeypatch.setattr(QVPO, "__init__", construct_small)
    monkeypatch.setattr(DiffusionOffPolicyAlgorithm, "learn", short_learn)
    monkeypatch.setattr(DiffusionPolicy, "compile_actions", lambda policy: True)  # common/speed/test_programs.py
    monkeypatch.setattr(gym.registry["Pendulum-v1"], "max_episode_steps", 20)
    namespace = {}
    exec(code, namespace)
    assert isinstance(namespace["model"], DiffusionOffPolicyAlgorithm)
    assert namespace["model"]._n_updates > 0 or ".learn(" not in code


SHELL = ("", "bash", "sh", "shell", "console")


def spans(page):
    """What stands in backticks outside blocks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))]


def shell_commands(page):
    """Lines of shell blocks, what looks like a command in the text, and settings that are given to RL Zoo."""
    commands = [line for block in blocks(page, *SHELL) for line in block.splitlines() if line.strip()]
    commands += [
        span for span in spans(page) if re.match(r"([A-Z_0-9]+=\S+ )*(python|make|pip install|optuna|rl_zoo3) ", span)
    ]
    settings = [span for span in spans(page) if re.match(r"(-params|-conf) ", span)]
    return commands + [f"python -m rl_zoo3.train --algo qvpo {span}" for span in settings]


class ParsedError(Exception):
    """A script has read its arguments: no need to go on."""

    def __init__(self, parser, arguments):
        super().__init__()
        self.parser, self.arguments = parser, arguments


def until_parsed(target, words, monkeypatch, capsys):
    """
    What a script's parser makes of its arguments. The script runs until then, as ``__main__``.

    :param target: A file, or the name of a module.
    :param words: Its arguments.
    :return: The parser and the arguments.
    """
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise ParsedError(self, parse_args(self, *args, **kwargs))

    with monkeypatch.context() as patches, warnings.catch_warnings():
        patches.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patches.setattr(sys, "argv", [str(target), *words])
        patches.setenv("SB3_QVPO_ZOO", "1")
        patches.syspath_prepend(str(getattr(target, "parent", ROOT)))
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module has been imported before
        try:
            if isinstance(target, Path):
                runpy.run_path(str(target), run_name="__main__")
            elif target in ("sb3_qvpo.zoo", "optuna.cli"):
                importlib.import_module(target).main()  # run anew, the first would register another class
            else:
                runpy.run_module(target, run_name="__main__")
        except ParsedError as parsed:
            return parsed.parser, parsed.arguments
        except (SystemExit, ValueError, ImportError) as error:
            if getattr(error, "name", None) in ("rl_zoo3", "optuna", "rliable"):
                # make test-oldest leaves RL Zoo out: the sb3-contrib that it needs asks for a newer Stable-Baselines3
                pytest.skip(f"{target} needs {error.name}")
            raise AssertionError(f"{target} does not take {words}: {error} {capsys.readouterr().err[-300:]}") from error
    raise AssertionError(f"{target} reads no arguments")


def check_arguments(arguments):
    """What scripts find out after they have read their arguments: tasks, settings, files."""
    values = vars(arguments)
    if not values.get("gym_packages"):
        tasks = [*values.get("tasks", []), *filter(None, [values.get("task")])]
        tasks += [values["env"]] if isinstance(values.get("env"), str) else []  # plots take parts of names, in a list
        assert set(map(str, tasks)) <= set(gym.registry), tasks
    if "eval_freq" in values and "steps" in values:  # run.py
        assert values["steps"] % values["eval_freq"] == 0
    if isinstance(values.get("algo"), str) and values["algo"] in zoo.ALGORITHMS and values.get("hyperparams"):
        of_rl_zoo = {
            "callback",
            "env_wrapper",
            "frame_stack",
            "n_envs",
            "n_timesteps",
            "normalize",
            "policy",
            "vec_env_wrapper",
        }
        algorithm = zoo.ALGORITHMS[values["algo"]].algorithm
        own = {*inspect.signature(algorithm.__mro__[2]).parameters, *inspect.signature(zoo.InZoo).parameters}
        assert values["hyperparams"].keys() <= own | of_rl_zoo, values["hyperparams"]
    assert Path(values.get("conf_file") or ROOT).exists(), values["conf_file"]


def check_installation(words):
    """Extras exist, and other packages have names; this one is on no index."""
    extras = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = extras.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in [word for i, word in enumerate(words) if not word.startswith("-") and words[i - 1] != "--index-url"]:
        own = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if own:
            assert set((own[1] or "mujoco").split(",")) <= project["optional-dependencies"].keys(), word
        else:
            assert Requirement(word).name != project["name"], "sb3-qvpo is on no package index"


def check_command(command, monkeypatch, capsys):
    """
    That a command of the documentation is accepted, without doing what it does.

    :param command: One line.
    :raises AssertionError: If it is not.
    """
    folder = str(ROOT / "hyperparams")  # what the command in the brackets prints here
    words = shlex.split(command.replace("$(python -m sb3_qvpo.zoo hyperparams)", folder), comments=True)
    words = [word for word in words if word != "..."]
    while re.match(r"[A-Z_0-9]+=", words[0]):
        words.pop(0)
    program, *words = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in words if "=" not in word} <= {*targets}, command
    elif program == "pip":
        assert words.pop(0) == "install", command
        check_installation(words)
    elif program in ("optuna", "rl_zoo3"):
        until_parsed(f"{program}.cli", words, monkeypatch, capsys)
    elif program == "python" and words[0] == "-c":
        ast.parse(words[1])
    elif program == "python" and words == ["-m", "sb3_qvpo.zoo", "hyperparams"]:
        pass  # zoo/test_registration.py
    elif program == "python" and words[:2] in (["-m", "build"], ["-m", "pytest"]):
        assert all((ROOT / path).exists() for path in words[2:]), command
    elif program == "python" and words[0] == "-m":
        check_arguments(until_parsed(words[1], words[2:], monkeypatch, capsys)[1])
    else:
        assert program == "python" and (ROOT / words[0]).is_file(), command
        check_arguments(until_parsed(ROOT / words[0], words[1:], monkeypatch, capsys)[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands(page, monkeypatch, capsys):
    for command in shell_commands(page):
        check_command(command, monkeypatch, capsys)


@pytest.mark.parametrize(
    "command",
    [
        *("make nothing", "pip download .", 'pip install ".[nothing]"', 'pip install "sb3-qvpo[zoo]"', "nothing"),
        *("python examples/nothing.py", "python -m rl_zoo3.nothing", "optuna trails --storage study.log"),
        "python examples/train_pendulum.py --steps 10",
        "python -m rl_zoo3.train --algo qvpo --env Pendulum-v1 --trials 4",
        "python -m rl_zoo3.train --algo qvqo --env Pendulum-v1",
        "python -m rl_zoo3.train --algo qvpo --env Pendulum-v11",
        "python -m rl_zoo3.train --algo qvpo -params n_candidates:8",
        "python -m rl_zoo3.train --algo qvpo -params q_weighting:qcut",  # quoted once
        'python -m rl_zoo3.train --algo qvpo -conf "$(python -m sb3_qvpo.zoo hyperparams)/nothing.yml"',
        "python -m sb3_qvpo.zoo nothing",
        "python benchmarks/learning/run.py --tasks Hopper-v5 --algos nothing",
        "python benchmarks/learning/run.py --tasks Hopper-v5 --algos sac --steps 12345",
        "python benchmarks/bench_update.py --thread two",
    ],
)
def test_wrong_commands_are_noticed(command, monkeypatch, capsys):
    with pytest.raises((AssertionError, NameError)):
        check_command(command, monkeypatch, capsys)


def test_commands_are_found_on_the_pages():
    counts = {page.name: len(shell_commands(page)) for page in PAGES}
    assert counts["README.md"] >= 3 and counts["zoo.md"] >= 10 and counts["notes.md"] >= 8, counts
    labels = {label for page in PAGES for label, _ in BLOCK.findall(page.read_text())}
    assert labels <= {*SHELL, "python", "yaml", "text", "{eval-rst}", "{toctree}"}  # others would not be looked at


def test_options_in_the_text_exist(monkeypatch, capsys):
    """Those of the pages that explain commands; each is one of some script."""
    modules = ("rl_zoo3.train", "rl_zoo3.enjoy")
    files = ("bench_update.py", "learning/report.py")
    scripts = [*modules, *(ROOT / "benchmarks" / file for file in files)]
    known = {
        option for script in scripts for option in until_parsed(script, [], monkeypatch, capsys)[0]._option_string_actions
    }
    known.add("--storage-class")  # of optuna
    named = {
        word
        for page in PAGES
        if page.name in ("README.md", "zoo.md", "speed.md", "troubleshooting.md")
        for span in spans(page)
        if span.startswith("-")
        for word in re.findall(r"(?<!\S)--?[a-z][\w-]*", re.sub(r"\$\(.*?\)", "", span))
    }
    assert len(named) > 10 and named <= known, named - known


def test_yaml_blocks():
    """Entries for a settings file, at whose end they can stand."""
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for block in found:
        (task,) = re.findall(r"^([\w-]+):", block, flags=re.M)
        (file,) = re.findall(r"in (\w+\.yml);", block)
        settings = yaml.safe_load(f"{(ROOT / 'hyperparams' / file).read_text()}\n{block}")[task]
        assert task in gym.registry
        assert settings.keys() - {"n_timesteps", "normalize"} <= inspect.signature(QVPO).parameters.keys()
        assert isinstance(settings["n_timesteps"], float) and "n_train_candidates" in settings


def test_links_of_the_readme_lead_somewhere():
    """Sphinx checks those of the other pages."""

    def anchors(text):
        titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.M)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        file = ROOT / path if path else ROOT / "README.md"
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


TEST = re.compile(r"([\w/]+\.py)::(test_\w+)")
"""How pages name a test: its file in the folder of tests, and its function."""


def assert_defined(page, file, function):
    """A test that a page names exists."""
    path = ROOT / "tests" / file
    assert path.is_file() and f"def {function}(" in path.read_text(), f"{page}: {file}::{function}"


def test_every_row_of_the_parity_table_has_its_test():
    """No gap but gSDE, and each test that is named exists."""
    page = (ROOT / "docs" / "sb3_parity.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    features = [row for row in rows if row[-1] != "test"]
    assert len(features) > 80
    assert all(len(row) == 4 and TEST.fullmatch(row[-1].strip("`")) for row in features)
    assert [row[0].split()[0] for row in features if re.match(r"\W*no\b", row[2])] == ["gSDE"]
    for row in features:
        assert_defined("sb3_parity.md", *TEST.search(row[-1]).groups())


def test_tests_that_pages_name_exist():
    for page in PAGES:
        for file, function in TEST.findall(page.read_text()):
            assert_defined(page.name, file, function)


def test_measurements_that_pages_name_exist():
    named = {path for page in PAGES for path in re.findall(r"`(benchmarks/[\w/]+\.csv)`", page.read_text())}
    assert len(named) > 8
    for path in named:
        assert len((ROOT / path).read_text().splitlines()) > 1, path


@pytest.mark.parametrize(("name", "n_rows"), [("algorithm", 29), ("sdac", 13), ("diffusion_ql", 12), ("dtql", 12)])
def test_every_deviation_has_its_test(name, n_rows):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    rows = re.findall(r"^\| (\d+)\. .*\|$", page, flags=re.M)
    assert rows == [str(i + 1) for i in range(n_rows)]
    with_test = re.findall(rf"^\| (\d+)\. .*`{TEST.pattern}` \|$", page, flags=re.M)
    assert [number for number, *_ in with_test] == rows


ARGUMENT = re.compile(r"^\| `(\w+)`(?:, `(\w+)`)? \| [^|]* \| ([^|]*) \|", flags=re.M)


def arguments_in_tables(text, algorithm):
    """The arguments that tables name; the defaults beside them are the algorithm's."""
    parameters = inspect.signature(algorithm).parameters
    named = set()
    for *names, defaults in ARGUMENT.findall(text):
        for name, default in zip(filter(None, names), defaults.split(", "), strict=False):
            if name != "policy_kwargs" and name in parameters:
                assert default.strip("` ").strip('"') == str(parameters[name].default).strip('"'), name
            named.add(name)
    return named


def own_arguments(algorithm, first, last):
    """The arguments from one to another, which is not one of them."""
    names = list(inspect.signature(algorithm).parameters)
    return set(names[names.index(first) : names.index(last)])


def test_argument_tables():
    """All of an algorithm's own arguments on the page about them, the most important ones in the README."""
    page = (ROOT / "docs" / "hyperparameters.md").read_text()
    qvpo, sdac = page.split("## All arguments of SDAC")
    in_qvpo, in_readme = arguments_in_tables(qvpo, QVPO), arguments_in_tables(README, QVPO)
    own = own_arguments(QVPO, "ent_coef", "use_sde")
    assert own | {"policy_kwargs"} <= in_qvpo and len(in_readme) == 8 and in_readme < own
    assert own_arguments(SDAC, "temperature", "qf_learning_rate") <= arguments_in_tables(sdac, SDAC)


@pytest.mark.parametrize(("name", "algorithm", "first"), [("diffusion_ql", DiffusionQL, "eta"), ("dtql", DTQL, "alpha")])
def test_argument_tables_of_algorithms_for_data(name, algorithm, first):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]* \|$", page, flags=re.M)
    defaults = {row: inspect.signature(algorithm).parameters[row].default for row, _ in rows}
    assert {row: default.strip("` ").strip('"') for row, default in rows} == {k: str(v) for k, v in defaults.items()}
    assert defaults.keys() == own_arguments(algorithm, first, "qf_learning_rate")


def test_cells_of_the_hyperparameter_page_are_short():
    """A cell holds a word or a number: at most eight words."""
    lines = (ROOT / "docs" / "hyperparameters.md").read_text().splitlines()
    cells = [cell for line in lines if line.startswith("| ") for cell in line.strip("|").split(" | ")]
    assert len(cells) > 200
    assert not [cell for cell in cells if len(cell.split()) > 8]


def test_the_front_page_is_short():
    """House rules: 90 lines, and outside code 600 words and 25 numbers."""
    text = re.sub(r"\]\([^)]*\)", "]", BLOCK.sub("", README))
    numbers = re.findall(r"(?<![\w.])-?\d[\d.]*", text)
    assert len(README.splitlines()) <= 90 and len(text.split()) <= 600 and len(numbers) <= 25
