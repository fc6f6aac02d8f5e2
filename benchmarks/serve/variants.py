"""Lists the variants of the serve benchmark and measures one: a server, the load of `vllm bench serve`, figures.

Requests are those of vLLM's own `random-mm`: pictures of random pixels beside random words, the same ones for all
variants, through the OpenAI API. Answers are as long as asked for. `--num-warmups` sends the first request some times
before the clock starts.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serve.server_process import NAME, QUIET, Clock, first_error, read_log, serve

PERCENTILES = (50, 90, 99)
DENSE = "bf16"


@dataclass(frozen=True)
class Variant:
    """bits: None for the 16-bit model. options: of `vllm serve`. stock: served without vlmq, from its own header.

    kernel: what vLLM must have chosen for it, None where it may choose; it goes on with another one if it cannot take
    what it is told to. gpu: whether there is nothing like it on a CPU.
    """

    bits: int | None
    options: tuple[str, ...] = ()
    stock: bool = False
    kernel: str | None = None
    gpu: bool = False


def stock(bits: int, backend: str, kernel: str) -> Variant:
    return Variant(bits, ("--linear-backend", backend), stock=True, kernel=kernel, gpu=True)


OURS = ("--quantization", "vlmq")
VARIANTS = {
    DENSE: Variant(None),
    "w4": Variant(4, OURS),
    "w3": Variant(3, OURS),
    "w2": Variant(2, OURS),
    "vllm-w4": Variant(4, stock=True),
    "marlin-w4": stock(4, "marlin", "MarlinLinearKernel"),
    "machete-w4": stock(4, "machete", "MacheteLinearKernel"),
    "humming-w4": stock(4, "humming", "HummingLinearKernel"),
    "humming-w3": stock(3, "humming", "HummingLinearKernel"),
    "humming-w2": stock(2, "humming", "HummingLinearKernel"),
}


@dataclass(frozen=True)
class Load:
    """What is asked of every server. image: width and height in pixels. rate: requests per second, or inf."""

    requests: int
    concurrency: int | None
    rate: float
    image: tuple[int, int]
    input_tokens: int
    output_tokens: int
    seed: int

    def arguments(self) -> list[str]:
        """Of `vllm bench serve`."""
        width, height = self.image
        found = ["--dataset-name", "random-mm", "--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}"]
        found += ["--random-input-len", self.input_tokens, "--random-output-len", self.output_tokens, "--ignore-eos"]
        found += ["--num-prompts", self.requests, "--request-rate", self.rate, "--seed", self.seed]
        if self.concurrency:
            found += ["--max-concurrency", self.concurrency]
        return [*map(str, found), "--num-warmups", str(min(self.concurrency or 8, self.requests))]


@dataclass(frozen=True)
class Bench:
    """load: of every run. options: of every server. work: for logs. Limits in seconds: of a start, of a load."""

    load: Load
    options: tuple[str, ...]
    work: Path
    patience: float
    limit: float

    def run(self, name: str, model: Path) -> dict:
        """Figures of one variant. Raises RuntimeError that says in a line why there are none."""
        variant, log = VARIANTS[name], self.work / f"{name}.log"
        with serve(model, [*variant.options, *self.options], log, self.patience) as server:
            resident, before = server.resident(), Clock.now(server)
            try:
                found = self._load(model, server.port)
            except RuntimeError as error:
                if server.process.poll() is None:
                    raise
                raise RuntimeError(f"vllm serve ended under the load: {first_error(log.read_text())}") from error
            found["others_cores"] = round(Clock.now(server).others_since(before), 2)
        facts = read_log(log.read_text())
        if variant.kernel and facts["kernels"] != [variant.kernel]:
            chosen = ", ".join(facts["kernels"]) or "none that it names"
            raise RuntimeError(f"vLLM served it with another kernel than {variant.kernel}: {chosen}")
        return found | facts | {"resident_bytes": resident, "start_seconds": round(server.seconds, 1)}

    def _load(self, model: Path, port: int) -> dict:
        """What `vllm bench serve` found."""
        result = self.work / "result.json"
        result.unlink(missing_ok=True)
        command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--backend", "openai-chat"]
        command += ["--base-url", f"http://127.0.0.1:{port}", "--endpoint", "/v1/chat/completions", "--model", model]
        command += ["--served-model-name", NAME, *self.load.arguments(), "--temperature", 0, "--disable-tqdm"]
        command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", ",".join(map(str, PERCENTILES))]
        command += ["--save-result", "--save-detailed", "--result-dir", self.work, "--result-filename", result.name]
        try:
            done = subprocess.run(
                list(map(str, command)),
                env=os.environ | QUIET,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.limit,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the load was not done after {self.limit:.0f} s") from None
        if done.returncode or not result.is_file():
            raise RuntimeError(f"vllm bench serve failed: {first_error(done.stderr or done.stdout)}")
        return figures(json.loads(result.read_text()), self.load)


def figures(result: dict, load: Load) -> dict:
    """The figures in what `vllm bench serve` saved. Raises RuntimeError unless every request got its full answer."""
    if result["completed"] != load.requests or result["failed"]:
        errors = [error for error in result["errors"] if error] or ["no reason given"]
        raise RuntimeError(
            f"{load.requests - result['completed']} of {load.requests} requests failed: {first_error(errors[0])}"
        )
    short = sum(length != load.output_tokens for length in result["output_lens"])
    if short:
        raise RuntimeError(f"{short} answers have another length than the {load.output_tokens} tokens asked for")
    found = {
        "seconds": result["duration"],
        "input_tokens": result["total_input_tokens"],
        "requests_per_second": result["request_throughput"],
        "output_tokens_per_second": result["output_throughput"],
    }
    for metric in ("ttft", "tpot"):
        found |= {f"{metric}_p{p}_ms": result[f"p{p}_{metric}_ms"] for p in PERCENTILES}
    return found
