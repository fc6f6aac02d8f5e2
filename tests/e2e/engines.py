"""Many small vLLM engines one after the other in one process, for comparing what models answer.

`run(jobs)` starts this file as a program. Each job is an engine: a model folder, options of `vllm.LLM`, and what it is
asked; starting them in one process saves vLLM's imports, which take longer than a tiny model.
"""

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

MARK = "engines: "
TIE = 0.04  # two log-probabilities, each within 0.02, may change places
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TEXTS = ("What is the colour of the picture?", "How many signs are there in the first picture and the second?")


@dataclass
class Job:
    """One engine. pictures: how many pictures each question shows; video: a question about a film as well."""

    folder: str
    options: dict = field(default_factory=dict)
    pictures: tuple[int, ...] = (0, 1)
    video: bool = False


def run(jobs: list[Job], timeout: float) -> list[list]:
    """For every job, for every question, [log-probabilities of the prompt's tokens, steps of a greedy answer], a step
    being [token id, log-probability, margin to the next]; in place of a job that fails, the last line of its error.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([asdict(job) for job in jobs])],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert done.returncode == 0 and len(lines) == len(jobs), done.stdout[-6000:]
    return [json.loads(line) for line in lines]


def difference(first: list, second: list, tie: float = TIE) -> float:
    """The largest difference of log-probabilities between two jobs' results; infinite when answers differ in a token.

    A token may differ where the two best are closer than `tie` in either model: no tolerance can keep their order. The
    rest of such an answer has another context and is not compared. Fails for a job that failed.
    """
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    worst = 0.0
    for (prompt, steps), (other_prompt, other_steps) in zip(first, second, strict=True):
        pairs = list(zip(prompt, other_prompt, strict=True))
        for (token, logprob, margin), (other_token, other_logprob, other_margin) in zip(
            steps, other_steps, strict=True
        ):
            if token != other_token:
                if min(margin, other_margin) >= tie:
                    return math.inf
                break
            pairs.append((logprob, other_logprob))
        worst = max(worst, *(abs(one - other) for one, other in pairs))
    return worst


def main(jobs: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(jobs):
        try:
            found = answers(Job(**job))
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        print(f"\n{MARK}{json.dumps(found)}", flush=True)
        gc.collect()
        with contextlib.suppress(AssertionError):
            cleanup_dist_env_and_memory()


def answers(job: Job) -> list:
    from vllm import LLM, SamplingParams

    defaults = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True, "seed": 0}
    limits = {"image": max(1, *job.pictures), "video": int(job.video)}
    llm = LLM(job.folder, **defaults | {"limit_mm_per_prompt": limits} | job.options)
    chats = [_chat(count, i) for i, count in enumerate(job.pictures)]
    if job.video:
        chats.append([{"role": "user", "content": [{"type": "video", "video": None}]}])
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.chat(chats, sampling, use_tqdm=False)
    return [[_prompt(output), _steps(output.outputs[0])] for output in outputs]


def _chat(pictures: int, number: int) -> list[dict]:
    parts = [{"type": "image_pil", "image_pil": _picture(number + i)} for i in range(pictures)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": TEXTS[number % len(TEXTS)]}]}]


def _picture(number: int):
    """112 x 56 pixels with a gradient and a rectangle; numbers differ."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:56, 0:112]
    pixels = np.stack([rows * 4, columns * 2, (rows * columns + 40 * number) % 256], axis=-1).astype(np.uint8)
    pixels[8 * number : 8 * number + 16, 20:60] = (250, 30 * number, 10)
    return Image.fromarray(pixels)


def _prompt(output) -> list[float]:
    """Log-probabilities of the prompt's own tokens, the first of which has none."""
    return [next(iter(each.values())).logprob for each in output.prompt_logprobs[1:]]


def _steps(completion) -> list:
    steps = []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        best, following = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
        steps.append((token, candidates[token].logprob, best - following))
    return steps


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
