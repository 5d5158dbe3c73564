"""Runs at the start of every Python of a program under ``hf-gradutils run`` or ``check``: on its PYTHONPATH.

Nothing is imported early: the hooks come once the program has imported what they hook.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))
_HOOKED = ("transformers.trainer", "torch.optim.optimizer")
_SETTINGS = json.loads(os.environ.get("_HF_GRADUTILS_PROGRAM", "null"))  # now: a program may clear its environment


class _AfterImport:
    """Finds modules as the other finders do, and hooks those that are hooked once they have been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _HOOKED:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hook(module: ModuleType) -> None:
                execute(module)
                _hook(name, module)

            vars(spec.loader)["exec_module"] = execute_and_hook
        return spec


def _hook(name: str, module: ModuleType) -> None:
    if importlib.util.find_spec("hf_gradutils") is None:
        if sys.prefix != _SETTINGS["prefix"]:  # another environment, whose packages are not to be mixed with ours
            if name == "torch.optim.optimizer":
                return
            raise ImportError(
                f"this program trains in another Python, {sys.executable}, which has no hf_gradutils; install it "
                "there as here"
            )
        sys.path.append(_SETTINGS["root"])
    from hf_gradutils.programs import inside

    inside.hook(name, module, _SETTINGS)


def _run_the_next() -> None:
    """Run the sitecustomize that this one hides."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != _HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if _SETTINGS is not None:
    sys.meta_path.insert(0, _AfterImport())
_run_the_next()
