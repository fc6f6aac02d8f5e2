"""Measures other quantisers on the real language model: `python benchmarks/real_lm/peers.py MODEL CHATS`.

`python benchmarks/peers/install.py auto_round gptq_model llm_compressor` puts each into an environment of its own. All
get the chats that `methods.py` draws, pictures and answers included, groups of 64, asymmetric, one thread, and else
their defaults; llm-compressor traces a model with one chat's inputs and cannot take chats with pictures among others
without: it gets text chats alone, and its rows say so. Checkpoints are dequantised by `vlmq dequantize` and go to the
same judge. Lines are added to the JSONL file that `methods.py` writes too, and its table is printed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path
from judge import Judge
from methods import CHATS, GROUP_SIZE, add_arguments, write_drawn
from rows import Rows, differences, table

from benchmarks.peers.install import environments, python_of
from benchmarks.peers.runner import MARK
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

PEERS = {  # name: environment, script in benchmarks/peers and what it is told
    "AutoRound": ("auto_round", "autoround.py", ()),
    "AutoRound, 50 iterations": ("auto_round", "autoround.py", ("--iters", "50", "--lr", "5e-3")),
    "GPTQModel, GPTQ": ("gptq_model", "gptq_model.py", ()),
    "GPTQModel, GPTAQ": ("gptq_model", "gptq_model.py", ("--method", "gptaq")),
    "llm-compressor, GPTQ": ("llm_compressor", "llm_compressor.py", ()),
    "llm-compressor, AWQ": ("llm_compressor", "llm_compressor.py", ("--method", "awq")),
}
NO_MIXTURE = "llm_compressor"


def quantized(name: str, folder: Path, model: Path, data: Path, bits: int, out: Path) -> dict:
    """Run the peer; what its runner reports of itself, with processor time and memory as `methods.py` names them."""
    environment, script, options = PEERS[name]
    runner = Path(__file__).absolute().parents[1] / "peers" / script
    command = [python_of(folder, environment), runner, model, data, out, "--bits", bits, "--group-size", GROUP_SIZE]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [*map(str, command), "--samples", str(CHATS), *options],
        env=os.environ | threads | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        cwd=out.parent,  # GPTQModel writes logs wherever it is started
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        sys.exit(f"{name} ended with {done.returncode}:\n{(done.stderr or done.stdout)[-3000:]}")
    told = json.loads(lines[-1])
    cost = {"cpu_seconds": sum(told["cpu_seconds"].values()), "peak_gb": told["peak_rss_bytes"] / 1e9}
    return cost | {"versions": told["versions"], "told": told["settings"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--environments", type=Path, default=environments(), help="where install.py put them")
    args = parser.parse_args()
    rows = Rows(args.rows)
    judge = Judge(args.model, args.chats, args.texts, args.pictures)
    for bits, seed, name in itertools.product(args.bits, args.seeds, args.peers):
        mixture = args.calibration != "pictures"
        kind = "text alone" if mixture and PEERS[name][0] == NO_MIXTURE else args.calibration
        about = {"bits": bits, "name": name, "seed": seed, "calibration": kind}
        if rows.has(about):
            continue
        with tempfile.TemporaryDirectory() as work:
            data = write_drawn(Path(work), args.chats, kind, seed)
            out, twin = Path(work) / "out", Path(work) / "twin"
            cost = quantized(name, args.environments, args.model.absolute(), data, bits, out)
            dequantize(out, twin)
            rows.add(about | cost | judge(twin))
    print(table(rows.all))
    print(differences(rows.all, args.against))


if __name__ == "__main__":
    main()
