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
    "serve/throughput",
]


# A benchmark takes hours or a GPU, so that no test runs one; what they import may have moved all the same.
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts(script):
    found = subprocess.run([sys.executable, f"{FOLDER}/{script}.py", "--help"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"usage: {Path(script).name}.py" in found.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "shapes", "peers/install"])
def test_a_script_has_no_neighbour_with_the_name_of_a_package(script):
    """Python looks in the script's folder first: a file called kernels.py would win over the one transformers wants."""
    names = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not [path for path in Path(FOLDER, script).parent.iterdir() if path.stem in names]
