"""Measures speed and memory of `vlmq quantize` beside llm-compressor and GPTQModel, on the CPU.

    python benchmarks/peers/install.py
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/quantize/cost.py             # the demo model, a 7B layer
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/quantize/cost.py --shape 2b  # peak memory on a whole 2B model

Model, samples, format and threads are the same for all. Each tool runs once uncounted, then all of them in turn,
--repeats times. This process stays small and imports nothing heavy: what `benchmarks/peers/` measures is each child's
own. The table is written by `cost_report.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # the repository: this file is run by its path

from benchmarks.peers.install import environments, python_of
from benchmarks.peers.runner import MARK
from benchmarks.quantize.cost_report import markdown, result_file

BENCHMARKS = Path(__file__).absolute().parents[1]
ROOT = BENCHMARKS.parent
DEMO = ROOT / "examples/demo_vlm"


@dataclass(frozen=True)
class Tool:
    """A runner in `benchmarks/peers/` and what it is told beyond the arguments that all of them get."""

    runner: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """tokens: of each sample, or None for the demo's own chats, which are as long as they are."""

    samples: int
    tokens: int | None
    bits: int
    tools: tuple[str, ...]


TOOLS = {
    "vlmq": Tool("vlmq", ("--method", "vlmq")),
    "gptq": Tool("vlmq", ("--method", "gptq")),
    "llm-compressor": Tool("llm_compressor"),
    "gptqmodel": Tool("gptq_model"),
}
PROBLEMS = {
    "demo": Problem(128, None, 4, tuple(TOOLS)),
    "7b-layer": Problem(8, 512, 4, tuple(TOOLS)),
    "2b": Problem(8, 512, 3, ("vlmq",)),
}


@dataclass(frozen=True)
class Bench:
    """Where things are and what all runs share."""

    peers: Path
    work: Path
    threads: int
    limit: float  # seconds that one run may take
    symmetric: bool

    def run(self, name: str, model: Path, data: Path, samples: int, bits: int) -> dict:
        """The runner's JSON line with "process_seconds", or {"error": its last line}."""
        tool = TOOLS[name]
        python = Path(sys.executable) if tool.runner == "vlmq" else python_of(self.peers, tool.runner)
        if not python.is_file():
            return {"error": f"not installed; run python benchmarks/peers/install.py {tool.runner}"}
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        runner = BENCHMARKS / f"peers/{tool.runner}.py"
        command = [python, runner, model, data, out, "--bits", bits, "--samples", samples]
        command += ["--symmetric"] if self.symmetric else []
        began = monotonic()
        try:
            done = self._child([*command, *tool.options])
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {self.limit:.0f} s"}
        seconds = round(monotonic() - began, 2)
        shutil.rmtree(out, ignore_errors=True)
        found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not found:
            return {"error": self._last_line(done)}
        return json.loads(found[-1]) | {"process_seconds": seconds}

    def predicted(self, model: Path, problem: Problem, bits: int) -> int | str:
        """Peak memory in bytes that `vlmq plan` foretells, or why it does not."""
        command = [sys.executable, "-m", "vlmq_vllm.offline", "plan", model, "--json", "--bits", bits]
        done = self._child([*command, "--samples", problem.samples, "--max-tokens", problem.tokens])
        return json.loads(done.stdout)["peak_memory_bytes"] if done.returncode == 0 else self._last_line(done)

    def make(self, shape: str, problem: Problem) -> tuple[Path, Path]:
        """Model and chats of a problem, made in a process of their own."""
        folder = self.work / shape
        if shape == "demo":
            command, model = [DEMO / "data.py", folder, "--count", problem.samples], DEMO / "model"
        else:
            options = ["--count", problem.samples, "--tokens", problem.tokens]
            command, model = [BENCHMARKS / "shapes.py", shape, folder, *options], folder / "model"
        done = self._child([sys.executable, *command])
        if done.returncode:
            raise SystemExit(f"cannot make the inputs of {shape}: {self._last_line(done)}")
        return model, Path(done.stdout.split()[-1])

    def _child(self, command: list) -> subprocess.CompletedProcess:
        more = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        more |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            list(map(str, command)),
            env=os.environ | more,
            cwd=self.work,  # GPTQModel writes logs wherever it is started
            capture_output=True,
            text=True,
            errors="replace",
            timeout=self.limit,
        )

    def _last_line(self, done: subprocess.CompletedProcess) -> str:
        """Of what went wrong, without this machine's folders."""
        lines = [line.strip("│ ") for line in (done.stderr or done.stdout).splitlines()]
        lines = [line for line in lines if any(map(str.isalnum, line))]  # not the frame that Typer draws
        last = lines[-1] if lines else f"ended with {done.returncode} and said nothing"
        for folder, name in ((self.work, "WORK"), (ROOT, "."), (Path.home(), "~")):
            last = last.replace(str(folder), name)
        return last[-300:]


def measure(bench: Bench, shape: str, problem: Problem, bits: int, tools: list[str], repeats: int) -> dict:
    """All runs of one problem: {"runs": tool -> lines, "errors": tool -> line, "predicted": of vlmq plan}."""
    model, data = bench.make(shape, problem)
    found: dict = {"runs": {tool: [] for tool in tools}, "errors": {}, "predicted": None}
    for _ in range(repeats):
        for tool in tools:
            if tool in found["errors"]:
                continue
            line = bench.run(tool, model, data, problem.samples, bits)
            print(json.dumps({"shape": shape} | line), flush=True)
            if "error" in line:
                found["errors"][tool] = line["error"]
            else:
                found["runs"][tool].append(line)
    if problem.tokens:
        found["predicted"] = bench.predicted(model, problem, bits)
    shutil.rmtree(bench.work / shape)
    return found


def warm_up(bench: Bench, tools: list[str]) -> None:
    """Read every tool's files once and let GPTQModel build its extension; two chats of the demo, uncounted."""
    model, data = bench.make("demo", Problem(2, None, 4, ()))
    for tool in tools:
        bench.run(tool, model, data, 2, 4)
    shutil.rmtree(bench.work / "demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=PROBLEMS, help="default: demo and 7b-layer")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all, for 2b only vlmq")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), help="default: 4, for 2b 3")
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--peers", type=Path, default=environments(), help="where install.py put them")
    parser.add_argument("--work", type=Path, help="folder for inputs and outputs, 8 GB for 2b; default: temporary")
    parser.add_argument("--out", type=Path, help="markdown file; default: benchmarks/results/DATE-quantize.md")
    args = parser.parse_args()
    shapes = args.shape or ["demo", "7b-layer"]
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="vlmq-bench-", dir=args.work) as work:
        bench = Bench(args.peers.absolute(), Path(work).absolute(), threads, args.limit, args.symmetric)
        chosen = {shape: args.tool or list(PROBLEMS[shape].tools) for shape in shapes}
        warm_up(bench, [tool for tool in TOOLS if any(tool in tools for tools in chosen.values())])
        results = {}
        for shape in shapes:
            problem = PROBLEMS[shape]
            bits = args.bits or problem.bits
            results[shape] = measure(bench, shape, problem, bits, chosen[shape], args.repeats)
    text = markdown(results, PROBLEMS, threads)
    out = args.out or result_file(BENCHMARKS / "results", args.shape)
    out.write_text(text)
    print(f"{text}\n{out}")


if __name__ == "__main__":
    main()
