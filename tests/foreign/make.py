"""Write all checkpoints of this folder with the real peers: `python tests/foreign/make.py [--peers PEER ...]`.

Run it with the project's Python. Peers that are missing are installed first, each into an environment of its own
(benchmarks/peers/install.py). A few minutes on two cores; needs no GPU. With all peers base is replaced, too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path += [str(HERE.parent / "helpers"), str(ROOT)]

from base import build_base  # noqa: E402
from cases import CASES  # noqa: E402

from benchmarks.peers.install import environments, install, python_of  # noqa: E402
from foreign_checkpoints import CHECKPOINTS, share, shrink  # noqa: E402


def make(peer: str, environment: Path, work: Path) -> None:
    """Let one peer write its checkpoints into `work`, and keep what base does not hold."""
    if not python_of(environment, peer).is_file():
        install(environment, peer)
    writer, cases = CASES[peer]
    command = [python_of(environment, peer), HERE / writer, work / "base", work, json.dumps(cases)]
    for name in cases:
        shutil.rmtree(work / name, ignore_errors=True)
    done = subprocess.run(command, cwd=work, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for name in cases:
        if (work / name / "expected.safetensors").is_file():
            shrink(work / name, name)
    done.check_returncode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=CASES, default=list(CASES), metavar="PEER")
    parser.add_argument("--environments", type=Path, default=environments(), help="where install.py puts them")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "foreign", help="for the complete checkpoints")
    args = parser.parse_args()
    work = args.work.absolute()
    shutil.rmtree(work / "base", ignore_errors=True)
    build_base(work / "base")
    if set(args.peers) == set(CASES) or not (CHECKPOINTS / "base").is_dir():
        share(work / "base")
    for peer in args.peers:
        make(peer, args.environments.absolute(), work)
