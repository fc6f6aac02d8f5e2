"""Installs the peers, each into an environment of its own: `python benchmarks/peers/install.py`.

Their pins clash with vLLM's and with one another's. Versions of everything are in NAME.txt beside this file; refresh
one with `uv pip freeze`. About 10 GB of disk. GPTQModel builds a C++ extension when it first packs a layer: have a
compiler.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = {  # name of runner, of environment and of the list of versions: what is asked for
    "llm_compressor": ("llmcompressor", "torchvision"),
    "gptq_model": ("gptqmodel", "torchvision"),
    "auto_round": ("auto-round", "torchvision"),
    "llm_compressor_0_12": ("llmcompressor", "torchvision"),  # packs 3 bits as compressed-tensors did before 0.18
}
MEASURED = (
    "llm_compressor",
    "gptq_model",
)  # in benchmarks/quantize/cost.py; the others only write files for tests/foreign


def environments() -> Path:
    """Where the environments are unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmq-peers"


def python_of(folder: Path, peer: str) -> Path:
    return folder / peer / "bin" / "python"


def install(folder: Path, peer: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        raise SystemExit(f"there is no uv beside {sys.executable}; run `make install`, then use .venv/bin/python")
    python = python_of(folder, peer)
    if not python.is_file():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / peer], check=True)
    pins = HERE / f"{peer}.txt"
    subprocess.run([uv, "pip", "install", "--python", python, "--constraint", pins, *PEERS[peer]], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = f"default: {', '.join(MEASURED)}"
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"some of {', '.join(PEERS)}; {usual}")
    parser.add_argument("--folder", type=Path, default=environments())
    args = parser.parse_args()
    if wrong := set(args.peers) - set(PEERS):
        parser.error(f"unknown peer {', '.join(sorted(wrong))}; choose from {', '.join(PEERS)}")
    for peer in args.peers or MEASURED:
        install(args.folder, peer)
        print(f"{peer}: {python_of(args.folder, peer)}")
