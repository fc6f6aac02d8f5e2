"""Runs a function once another module has been imported, without importing that module.

`import vlmq_vllm` must stay cheap, and yet transformers has to know vlmq by the time it reads a config.json.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` once when the module `name` has been imported, now if it is there. What it raises is logged."""
    if name in sys.modules:
        _call(action)
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds the one module as Python's own finder does, and adds the action to its loader."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                _call(self.action)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _call(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:
        logging.getLogger(__name__).exception("vlmq could not register with transformers")
