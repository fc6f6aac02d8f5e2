"""The modules of `benchmarks/` for tests: found there for as long as the import takes, and no longer.

Its kernels.py has the name of a Hugging Face package that transformers looks for.
"""

import sys
from importlib import import_module
from pathlib import Path

FOLDER = str(Path(__file__).absolute().parent.parent / "benchmarks")


def load(*names: str) -> list:
    """The modules of these names."""
    others = sys.modules.pop("kernels", None)  # transformers may have found one, or our own folder of that name
    sys.path.insert(0, FOLDER)
    try:
        return [import_module(name) for name in names]
    finally:
        sys.path.remove(FOLDER)
        sys.modules.pop("kernels", None)
        if others is not None:
            sys.modules["kernels"] = others
