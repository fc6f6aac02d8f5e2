import subprocess
import sys

import pytest

from benchmark_modules import FOLDER


# A benchmark takes hours or a GPU, so that no test runs one; what they import may have moved all the same.
@pytest.mark.parametrize("script", ["kernel_speed", "quality", "quantize", "qvlm", "serve", "tune"])
def test_script_starts(script):
    found = subprocess.run([sys.executable, f"{FOLDER}/{script}.py", "--help"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"usage: {script}.py" in found.stdout
