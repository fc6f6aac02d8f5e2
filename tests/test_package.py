"""What `pip install .` takes along: setuptools is told every package by name."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_folder_of_the_package_is_installed():
    folders = {
        path.parent.relative_to(ROOT)
        for part in ("vlmq_vllm", "offline", "kernels")
        for path in ROOT.glob(f"{part}/**/*.py")
    }
    names = {".".join(folder.parts) for folder in folders}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name if name.startswith("vlmq_vllm") else f"vlmq_vllm.{name}" for name in names} == set(
        setuptools["packages"]
    )
