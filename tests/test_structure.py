"""Rules that matter: who imports whom, what docstrings say, how large files and functions are."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AUTOLOAD = ROOT / "sb3_qvpo" / "_autoload" / "sb3_qvpo_autoload.py"  # not part of the package once installed
FILES = sorted(set((ROOT / "sb3_qvpo").rglob("*.py")) - {AUTOLOAD})
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]


ON_SB3 = {
    f"sb3_qvpo.common.{name}"
    for name in (
        *("actor_critic", "arguments", "batches", "callbacks", "checkpoints", "compiled", "export", "guarded_algorithm"),
        *("interruptions", "policies", "off_policy_algorithm"),
    )
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


def may_import(module, imported):
    """zoo -> algorithm -> what stands on SB3 in common -> the mathematics in common, which knows only torch."""
    if imported.startswith(("rl_zoo3", "optuna")):
        return module == "sb3_qvpo.zoo"
    if imported.startswith("stable_baselines3"):
        return module in ON_SB3 or not module.startswith("sb3_qvpo.common")
    if imported.startswith("sb3_qvpo"):
        if module in ("sb3_qvpo", "sb3_qvpo.zoo"):
            return True
        if module in ON_SB3:
            return imported.startswith("sb3_qvpo.common.")
        if module.startswith("sb3_qvpo.common"):
            return imported.startswith("sb3_qvpo.common.") and imported not in ON_SB3
        own_folder = ".".join(module.split(".")[:2])
        return imported.startswith(("sb3_qvpo.common.", own_folder + "."))
    return not imported.startswith("tests")


@pytest.mark.parametrize("file", FILES, ids=MODULES)
def test_imports_go_one_way(file):
    module = MODULES[FILES.index(file)]
    wrong = [imported for imported in imports(file) if not may_import(module, imported)]
    assert not wrong


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


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_name_every_parameter_and_no_other(name):
    value = CALLABLES[name]
    docstring = inspect.getdoc(value)
    assert docstring, "no docstring"
    if inspect.isclass(value) and "__init__" not in vars(value) and not issubclass(value, tuple):
        return
    if getattr(value, "_is_protocol", False):
        return
    parameters = [parameter for parameter in inspect.signature(value).parameters if parameter not in ("self", "cls")]
    assert re.findall(r"^:param (\w+):", docstring, flags=re.M) == parameters
    if inspect.isfunction(value):
        returns = inspect.signature(value).return_annotation
        documented = ":return:" in docstring
        assert documented == (returns not in (None, inspect.Signature.empty, "None") and "Iterator" not in str(returns))


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
