"""Rules that matter: who imports whom, what docstrings say, how large files and functions are."""

import ast
import importlib
import inspect
import re
import sys

import pytest
from helpers import ROOT

AUTOLOAD = ROOT / "sb3_qvpo" / "_autoload" / "sb3_qvpo_autoload.py"  # not part of the package once installed
FILES = sorted(set((ROOT / "sb3_qvpo").rglob("*.py")) - {AUTOLOAD})
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]

LAYERS = [
    "common.arguments",
    "common.noise_schedules common.diffusion common.networks common.candidates",
    "common.edm",
    "common.speed.settings common.runs.files common.runs.pace",
    "common.actor_critic",
    "common.critics",
    "common.speed.optimizers common.speed.cpu",
    "common.speed.networks common.speed.graphs common.speed.keys",
    "common.speed.programs common.speed.updates offline.npz",
    "common.runs.finite_checks common.runs.checkpoints offline.reading offline.spaces_env",
    "common.runs.guarded_algorithm offline.buffers",
    "common.runs.offline_learning",
    "common.runs.callbacks common.export common.episode_counts",
    "common.policies",
    "common.off_policy_algorithm",
    "common.td_algorithm common.policy_aliases common.softmax_policies common.figures",
    "qvpo.weights qvpo.policies sdac.targets sdac.temperature diffusion_ql.losses dtql.losses",
    "dtql.networks",
    "diffusion_ql.policies dtql.policies",
    "qvpo.qvpo sdac.sdac diffusion_ql.diffusion_ql dtql.dtql",
    "qvpo sdac diffusion_ql dtql",
    "presets offline",
    "search_spaces",
    "zoo sb3_qvpo",
]
"""The house from bottom to top. A module imports from the lines above its own, and from no other of this package."""

LAYER = {name.removeprefix("sb3_qvpo"): depth for depth, line in enumerate(LAYERS) for name in line.split()}
FOLDERS = {"common", "common.runs", "common.speed"}
"""Their ``__init__`` hold a docstring only."""
MATHEMATICS = {
    *("common.noise_schedules", "common.diffusion", "common.networks", "common.candidates", "common.edm"),
    *("qvpo.weights", "sdac.targets", "diffusion_ql.losses", "dtql.losses"),
}
COMPOSERS = {"common.policies", "common.off_policy_algorithm"}
"""Where the fast classes are chosen. No other module outside ``speed/`` knows them, but for the optimisers."""


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # ``from package import module`` imports the module
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in whole)


def inside(name):
    """A module's name in the list of layers."""
    return name.removeprefix("sb3_qvpo").removeprefix(".")


def may_import(module, imported):
    """Whether the rules of the house allow an import."""
    if imported.startswith(("rl_zoo3", "optuna")):
        return module in ("zoo", "search_spaces")
    if module in MATHEMATICS and not imported.startswith("sb3_qvpo"):
        return imported.split(".")[0] in {*sys.stdlib_module_names, "torch"}
    if not imported.startswith("sb3_qvpo"):
        return not imported.startswith("tests")
    imported = inside(imported)
    if imported.startswith("common.speed") and not module.startswith("common.speed"):
        is_optimizers = module.startswith("common.runs") and imported == "common.speed.optimizers"
        if not (module in COMPOSERS or is_optimizers):
            return False
    return LAYER[imported] < LAYER[module]


@pytest.mark.parametrize("file", FILES, ids=MODULES)
def test_imports_go_strictly_downwards(file):
    module = inside(MODULES[FILES.index(file)])
    if module in FOLDERS:
        assert not list(imports(file))
        return
    wrong = [imported for imported in imports(file) if not may_import(module, imported)]
    assert not wrong


def test_every_module_has_its_layer():
    assert LAYER.keys() == {inside(name) for name in MODULES} - FOLDERS


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("common.export", "sb3_qvpo.common.policies"),
        ("common.actor_critic", "sb3_qvpo.common.speed.cpu"),
        ("common.diffusion", "stable_baselines3"),
        ("common.diffusion", "sb3_qvpo.common.networks"),
        ("qvpo.qvpo", "sb3_qvpo.common.speed.settings"),
        ("common.runs.checkpoints", "sb3_qvpo.common.speed.graphs"),
        ("common.policies", "optuna"),
    ],
)
def test_wrong_imports_are_noticed(module, imported):
    assert not may_import(module, imported)


def test_the_start_up_module_needs_the_standard_library_only():
    assert {name.split(".")[0] for name in imports(AUTOLOAD)} <= sys.stdlib_module_names | {"sb3_qvpo"}
    at_start = {
        alias.name for node in ast.parse(AUTOLOAD.read_text()).body if isinstance(node, ast.Import) for alias in node.names
    }
    assert at_start == {"os", "sys"}


def test_the_reference_is_independent():
    assert set(imports(ROOT / "tests" / "reference.py")) == {"math", "numpy"}
    for file in FILES:
        assert "reference" not in set(imports(file))


def public_callables():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isfunction(value):
                yield f"{name}.{attribute}", value
            elif inspect.isclass(value):
                yield f"{name}.{attribute}", value
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{attribute}.{method}", function


CALLABLES = dict(public_callables())


def on_the_api_page():
    """Names under which the page finds what it describes: whole modules, and classes with all that they inherit from here."""
    page = (ROOT / "docs" / "api.md").read_text()
    prefixes = re.findall(r"^\.\. automodule:: (\S+)$", page, flags=re.M)
    for path in re.findall(r"^\.\. auto(?:class|function):: (\S+)$", page, flags=re.M):
        module, name = path.rsplit(".", 1)
        value = getattr(importlib.import_module(module), name)
        bases = inspect.getmro(value) if inspect.isclass(value) else [value]
        prefixes += [f"{base.__module__}.{base.__qualname__}" for base in bases if base.__module__.startswith("sb3_qvpo")]
    return prefixes


DESCRIBED = tuple(on_the_api_page())


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_name_every_parameter_and_no_other(name):
    """What the API page lists has its parameters described. Internals have a sentence, and no stale parameter."""
    value = CALLABLES[name]
    docstring = inspect.getdoc(value)
    assert docstring, "no docstring"
    described = re.findall(r"^:param (\w+):", docstring, flags=re.M)
    if inspect.isclass(value) and "__init__" not in vars(value) and not issubclass(value, tuple):
        return
    if getattr(value, "_is_protocol", False):
        return
    parameters = [parameter for parameter in inspect.signature(value).parameters if parameter not in ("self", "cls")]
    is_listed = any(f"{name}.".startswith(f"{prefix}.") for prefix in DESCRIBED)
    assert described == (parameters if is_listed or described else [])
    if inspect.isfunction(value) and is_listed:
        returns = inspect.signature(value).return_annotation
        documented = ":return:" in docstring
        assert documented == (returns not in (None, inspect.Signature.empty, "None") and "Iterator" not in str(returns))


def test_the_api_page_lists_what_users_touch_and_no_internals():
    listed = [name for name in CALLABLES if any(f"{name}.".startswith(f"{prefix}.") for prefix in DESCRIBED)]
    assert {"sb3_qvpo.qvpo.qvpo.QVPO", "sb3_qvpo.common.policies.DiffusionPolicy"} <= {*listed}
    internal = ("sb3_qvpo.common.speed.", "sb3_qvpo.common.runs.checkpoints", "sb3_qvpo.common.runs.files")
    assert [name for name in listed if name.startswith(internal)] == ["sb3_qvpo.common.speed.settings.SpeedSettings"]


def test_every_raised_value_error_is_announced():
    """A function that raises ValueError itself says so."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            is_setter = isinstance(node, ast.FunctionDef) and any("setter" in ast.dump(d) for d in node.decorator_list)
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or is_setter:
                continue
            raises = any(isinstance(inner, ast.Raise) and "ValueError" in ast.dump(inner) for inner in ast.walk(node))
            assert not raises or ":raises ValueError:" in (ast.get_docstring(node) or ""), f"{file}: {node.name}"


def test_files_and_functions_stay_small():
    """Fewer than 350 lines of code in a file (docstrings apart), 60 in a function (constructors apart)."""
    for file in FILES:
        source = file.read_text()
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
        docstring_lines = sum(
            node.value.end_lineno - node.value.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        assert len(source.splitlines()) - docstring_lines < 350, file


def test_train_reads_as_algorithm_1():
    """The lines of the algorithm box appear in order in the methods of an update."""
    qvpo = importlib.import_module("sb3_qvpo.qvpo.qvpo").QVPO
    lines = re.findall(r"# Lines? (\d+)", inspect.getsource(qvpo.train))
    assert lines == ["4", "10", "5"]  # lines 10-11 before 5-9: critic first
    assert re.findall(r"# Line (\d+)", inspect.getsource(qvpo._actor_loss)) == ["5", "6", "7", "8", "9"]


def test_version_is_the_same_everywhere():
    version = importlib.import_module("sb3_qvpo").__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
