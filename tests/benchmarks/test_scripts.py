"""The benchmarks as scripts: each starts when it is run by its path, and hides no package beside it."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from benchmark_modules import FOLDER

SCRIPTS = [
    "kernel/speed",
    "kernel/tune",
    "quality/compare_methods",
    "quality/qvlm",
    "quantize/cost",
    "real_lm/judge",
    "real_lm/methods",
    "real_lm/peers",
    "real_lm/tried",
    "serve/throughput",
]


# One process for all scripts, which loads what is heavy once; each script then runs in a process that forks from it, as
# if it had been started by its path.
START_ALL = """
import os, runpy, sys
import torch, transformers, safetensors.torch
for path in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        sys.argv = [path, "--help"]
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
    assert os.waitpid(child, 0)[1] == 0, path
"""


def test_scripts_start():
    """A benchmark takes hours or a GPU, so that no test runs one; what they import may have moved all the same."""
    paths = [f"{FOLDER}/{script}.py" for script in SCRIPTS]
    found = subprocess.run([sys.executable, "-c", START_ALL, *paths], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    usages = [line.split()[1] for line in found.stdout.splitlines() if line.startswith("usage: ")]
    assert usages == [Path(path).name for path in paths]


@pytest.mark.parametrize("script", [*SCRIPTS, "shapes", "peers/install"])
def test_a_script_has_no_neighbour_with_the_name_of_a_package(script):
    """Python looks in the script's folder first: a file called kernels.py would win over the one transformers wants."""
    names = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not [path for path in Path(FOLDER, script).parent.iterdir() if path.stem in names]
