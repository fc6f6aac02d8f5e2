"""What is installed, where modules can be imported from, and what an import must not load or shadow."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["kernels", "offline", "tests"])
def test_no_package_file_that_would_shadow_hugging_faces_kernels(folder):
    """With an __init__.py, a top-level `kernels` would win over the package that transformers imports."""
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_modules_import_from_the_root_and_from_elsewhere(where, tmp_path):
    """transformers' models, too: they look for Hugging Face's package `kernels`."""
    ours = "vlmq_vllm.kernels.reference, vlmq_vllm.offline.methods.gptq.solve, vlmq_vllm.format"
    python(f"import {ours}; from transformers import LlamaForCausalLM", cwd=ROOT if where == "root" else tmp_path)


def test_hugging_faces_kernels_wins_over_our_folder(tmp_path, monkeypatch):
    """A stand-in for that package, later on the path than the checkout."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert python("import kernels; print(kernels.theirs)", cwd=ROOT).strip() == "True"


def test_import_is_light():
    """vLLM and every tool that lists plugins imports the package: no torch, no vLLM, no Triton."""
    loaded = python(
        "import sys, vlmq_vllm, vlmq_vllm.errors, vlmq_vllm.offline.commands.app;"
        "print([m for m in ('torch', 'vllm', 'triton', 'transformers') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_offline_loads_neither_vllm_nor_triton():
    loaded = python(
        "import sys, vlmq_vllm.offline.run.quantize, vlmq_vllm.offline.checkpoint.verify;"
        "print([m for m in ('vllm', 'triton', 'vlmq_vllm.kernels') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


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


ROOMS = ["machine", "settings", "model", "checkpoint", "data", "methods", "compare", "run", "plan", "sweep", "commands"]


def test_imports_run_one_way():
    """A room of offline/ imports those before it in ROOMS alone; neither kernels/ nor offline/ imports the other, vLLM
    or the plugin."""
    assert sorted(
        path.name for path in (ROOT / "offline").iterdir() if path.is_dir() and path.name[0] != "_"
    ) == sorted(ROOMS)
    for package in ("kernels", "offline"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            for name in imported(path):
                other = "kernels" if package == "offline" else "offline"
                assert not name.startswith((f"vlmq_vllm.{other}", "vlmq_vllm.serving")), f"{path} imports {name}"
                assert name.split(".")[0] != "vllm" or parts[:2] == ("offline", "compare"), f"{path} imports {name}"
                rooms = [room for room in (parts[1], *name.split(".")[2:3]) if room in ROOMS]
                if name.startswith("vlmq_vllm.offline.") and len(rooms) == 2:
                    assert ROOMS.index(rooms[1]) <= ROOMS.index(rooms[0]), f"{path} imports {name}"


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by their whole names."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_wheel_holds_the_three_packages_and_no_top_level_kernels(tmp_path):
    build = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('%s'); b.build_sdist('%s')"]
    build[-1] %= (tmp_path, tmp_path)
    subprocess.run(["cp", "-r", "pyproject.toml", "README.md", "LICENSE", tmp_path], cwd=ROOT, check=True)
    for folder in ("vlmq_vllm", "kernels", "offline"):
        subprocess.run(["cp", "-r", folder, tmp_path], cwd=ROOT, check=True)
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("kernels", "offline"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"vlmq_vllm/{path.relative_to(ROOT)}" in names
    assert "vlmq_vllm/py.typed" in names
    for table in (ROOT / "kernels/tuned").iterdir():
        assert f"vlmq_vllm/kernels/tuned/{table.name}" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"vlmq_vllm"}
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/kernels/reference.py") for name in archive.getnames())

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    first = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})"
    code = f"{first}; import vlmq_vllm.offline.methods.gptq.solve as m; print(m)"
    assert str(tmp_path / "site") in python(code, cwd=tmp_path / "site")


def test_ruff_is_the_same_in_hook_and_environment():
    hook = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()).group(1)
    assert f"ruff=={hook}" in (ROOT / "packaging/cpu-constraints.txt").read_text().split()


def python(code: str, cwd: Path | None = None) -> str:
    """Output of `python -c code`, which must succeed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
