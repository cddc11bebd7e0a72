"""
Makes ``python -m rl_zoo3.train --algo qvpo`` work after installation, with nothing else to do.

RL Zoo has no plugin hook and reads its table of algorithms before it imports anything of the user's. So the line in
``sb3_qvpo_autoload.pth`` imports this module at interpreter start, and it waits. Once a module of rl_zoo3 that holds a table
has been executed, it asks ``sb3_qvpo.zoo`` to add QVPO there. Until then it only uses modules that the interpreter has loaded
anyway, and costs nothing that can be measured. Set the environment variable ``SB3_QVPO_ZOO=0`` to switch it off.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself would be an import at start
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLES = ("rl_zoo3", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """Finds nothing itself. The other finders find RL Zoo's modules, and this one adds a step after their execution."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Called by the interpreter for every module that is not yet imported."""
        if name not in TABLES or self.searching:
            return None
        import importlib.util

        self.searching = True  # the search below comes back here
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: "ModuleType") -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def register() -> None:
    """Add QVPO to the tables that exist by now. Whatever goes wrong, RL Zoo itself must go on working."""
    try:
        from sb3_qvpo.zoo import register_loaded

        register_loaded()
    except Exception as error:  # rl_zoo3 must be usable without QVPO
        import warnings

        warnings.warn(f"sb3_qvpo could not add QVPO to rl_zoo3: {type(error).__name__}: {error}", stacklevel=2)


def install() -> None:
    """Put the finder first in line, once."""
    switched_off = os.environ.get("SB3_QVPO_ZOO", "1").lower() in ("0", "false", "no", "off")
    if not switched_off and not any(type(finder).__name__ == ZooFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())


install()
