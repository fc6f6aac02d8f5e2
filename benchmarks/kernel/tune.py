"""Measures plans for layers of true size and writes them into a table of `kernels/tuned`, on one GPU.

    python benchmarks/kernel/tune.py FOLDER --shapes 7b 72b-gate_up --seconds 540

For each bucket of tokens all tiles of a list are tried with the model's number of parts, then the fastest few with
every number. They are compiled beforehand by all processor cores, timed as `speed.py` times (`gpu_timing.py`),
and count only if their result is right. FOLDER/ARCH.json becomes the table in use with the fastest plans in it and,
with --crossover, the number of tokens from which dequantising is faster (`crossover.py`). VLMQ_TUNED=FOLDER uses it;
copied into `kernels/tuned` it ships. --int8-crossover tells the number of tokens from which int8 tensor cores are
faster for activations of 8 bits; it is no entry of the table, but `INT8_FROM` in `kernels/dispatch.py`.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import torch
import triton

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path

from benchmarks.kernel import gpu_timing
from benchmarks.kernel.cases import BITS, INT8_BITS, NAMES, Case, Layer, chosen, group_of
from benchmarks.kernel.crossover import Drawn, dequantize_from, int8_from
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.kernels import gemm, hardware, tiles, tuned_tables
from vlmq_vllm.kernels.layout import Geometry, RuntimeWeight
from vlmq_vllm.kernels.repack import prepare
from vlmq_vllm.kernels.tiles import BUCKETS, Plan, Tile

WARPS, STAGES, SPLITS = (2, 4, 8), (2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 10, 14)
ROWS = {8: (64, 128), 16: (64, 128), 32: (64, 128), 64: (64, 128, 256), 128: (128, 256)}
TOKENS = {8: (8,), 16: (8, 16), 32: (16, 32), 64: (32, 64), 128: (64, 128)}  # of the tiles worth trying in a bucket
SCALED = {8: (False,), 16: (False,), 32: (False, True), 64: (False, True), 128: (True,)}
FINALISTS = 3
SECONDS = 0.01  # of replays for one plan
DTYPE = torch.bfloat16


def candidates(bucket: int, geometry: Geometry, machine: hardware.Hardware) -> Iterator[Plan]:
    """Legal tiles whose sums fit into registers, with the model's number of parts."""
    for tokens in TOKENS[bucket]:
        for rows, warps, stages, scaled in (
            (rows, warps, stages, scaled)
            for rows in ROWS[bucket]
            for warps in WARPS
            for stages in STAGES
            for scaled in SCALED[bucket]
        ):
            tile = Tile(rows, tokens, warps, stages, scaled)
            sums = rows * tokens * (1 if scaled else 2)  # a group has sums of its own
            if sums <= warps * 32 * 128 and tiles.why_not(Plan(tile), bucket, geometry, machine) is None:
                yield Plan(tile, tiles.splits_of(bucket, geometry, tile, machine))


def divided(plan: Plan, bucket: int, geometry: Geometry, machine: hardware.Hardware) -> list[Plan]:
    """The tile with every legal number of parts."""
    options = [replace(plan, splits=splits) for splits in SPLITS]
    return [option for option in options if tiles.why_not(option, bucket, geometry, machine) is None]


def compile_tile(format: WeightFormat, tile: Tile) -> None:
    """Fill Triton's cache on disk, whole and divided; runs in a process of its own on the same GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight = prepare(gpu_timing.draw(format, 256, 4096, DTYPE, device))
    for splits in (1, 2):
        gemm.gemm(torch.zeros(tile.tokens, 4096, dtype=DTYPE, device=device), weight, plan=Plan(tile, splits))


class Tuner:
    """Fills `table`, which is to be written, until the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.deadline = args, monotonic() + args.seconds
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.machine = hardware.of(self.device)
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.table = json.loads(json.dumps(tuned_tables.table_of(self.machine)))
        self.measured: dict[str, None] = {}  # kinds of figures that were found, each once

    def format(self, bits: int) -> WeightFormat:
        return WeightFormat(bits, group_of(bits, self.args.group_size), True)

    def precompile(self, layers: list[Layer]) -> None:
        """All tiles that will be tried."""
        wanted = {}
        for layer in layers:
            for format in map(self.format, self.args.bits):
                geometry = Geometry.of(format, layer.rows, layer.columns)
                for bucket in self.args.tokens:
                    wanted |= {(format, plan.tile): None for plan in candidates(bucket, geometry, self.machine)}
        with ProcessPoolExecutor(self.args.jobs, mp_context=get_context("spawn")) as pool:
            failed = [job.exception() for job in [pool.submit(compile_tile, *key) for key in wanted]]
        print(f"{len(wanted)} tiles compiled, {sum(map(bool, failed))} failed", file=sys.stderr)

    def draw(self, layer: Layer, bits: int) -> tuple[list[RuntimeWeight], gpu_timing.Oracle]:
        """A weight in as many copies as it takes to find none of them in the second-level cache."""
        drawn = gpu_timing.draw(self.format(bits), layer.rows, layer.columns, DTYPE, self.device)
        weight = prepare(drawn)
        copies = gpu_timing.copies_needed(weight.nbytes, Case(layer, bits, 1).moved_bytes(), self.l2)
        more = [replace(weight, packed=weight.packed.clone()) for _ in range(copies - 1)]
        return [weight, *more], gpu_timing.Oracle(drawn)

    def tune(self, layer: Layer, bits: int) -> None:
        weights, oracle = self.draw(layer, bits)
        geometry = weights[0].geometry
        for bucket in self.args.tokens:
            case, x = Case(layer, bits, bucket), gpu_timing.inputs(bucket, layer.columns, DTYPE, self.device)
            times: dict[Plan, float] = {}
            usual = tiles.plan_for(bucket, geometry, self.machine)
            self.time([usual, *candidates(bucket, geometry, self.machine)], times, weights, x, oracle, case)
            for plan in sorted(times, key=times.get)[:FINALISTS]:
                self.time(divided(plan, bucket, geometry, self.machine), times, weights, x, oracle, case)
            if not times or monotonic() > self.deadline:  # not all were tried
                return
            self.keep(geometry, bucket, times, usual)

    def time(self, plans: list[Plan], times: dict[Plan, float], weights, x, oracle, case: Case) -> None:
        """Microseconds of those not yet timed; a plan that cannot be launched or is wrong is named and has none."""
        for plan in plans:
            if plan in times or monotonic() > self.deadline:
                continue
            products = [lambda x, weight=weight, plan=plan: gemm.gemm(x, weight, plan=plan) for weight in weights]
            try:
                products[0](x)
                timing, _ = gpu_timing.measure(products, x, oracle, 2, case.floor, SECONDS)
                times[plan] = timing.microseconds
            except Exception as error:  # of the compiler, of the driver, or a wrong result
                print(f"{case.label}, {plan}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
                gpu_timing.settle()

    def keep(self, geometry: Geometry, bucket: int, times: dict[Plan, float], usual: Plan) -> None:
        best, key = min(times, key=times.get), tuned_tables.key_of(geometry, bucket)
        tile = {name: value for name, value in asdict(best.tile).items() if value is not False}
        self.measured["plans"] = None
        self.table["measured"][key] = {"tile": tile, "splits": best.splits, "microseconds": round(times[best], 2)}
        print(f"{key}: {times[best]:.2f} us with {best}, {times.get(usual, 0):.2f} us with {usual}", flush=True)

    def cross(self, layers: list[Layer]) -> None:
        self.table["dequantise_from"] = dequantize_from(self.drawn(layers, self.args.bits))
        self.measured["crossover"] = None

    def drawn(self, layers: list[Layer], widths: Sequence[int]) -> Iterator[Drawn]:
        for layer in layers:
            for bits in widths:
                yield Drawn(f"{layer.label} W{bits}", *self.draw(layer, bits))

    def write(self, folder: Path) -> Path:
        who = f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}, Triton {triton.__version__}"
        found = f"{' and '.join(self.measured)} measured {datetime.date.today()} by benchmarks/kernel/tune.py on {who}"
        table = self.table | ({"origin": f"{found}; tiles: {self.table['origin']}"} if self.measured else {})
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.machine.arch}.json"
        path.write_text(json.dumps(table, indent=2) + "\n")
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the table is written")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=["7b"], metavar="NAME", help="7b-down, 7b, ...")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--tokens", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing more is tried")
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile")
    parser.add_argument("--crossover", action="store_true", help="also measure from when on dequantising is faster")
    parser.add_argument(
        "--int8-crossover", action="store_true", help="and from when on int8 is, with activations of 8 bits"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch finds no CUDA device, and plans must be measured")
    layers = chosen(args.shapes)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        tuner = Tuner(args)
        tuner.precompile(layers)
        if args.crossover:
            tuner.cross(layers)
        if args.int8_crossover:
            int8_from(tuner.drawn(layers, INT8_BITS))
        for layer in layers:
            for bits in args.bits:
                tuner.tune(layer, bits)
                tuner.write(args.folder)  # whatever ends this process, what was found is kept
        print(tuner.write(args.folder))


if __name__ == "__main__":
    main()
