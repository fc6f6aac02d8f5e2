"""What a model folder answers through vLLM, for comparing two folders that should be the same model.

`answers(folder)` runs this file as a program, so that every model has a process of its own; the program prints one
line of JSON: for every question the steps of a greedy answer, each [token id, its log-probability, margin to the next].
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_vlm"
MARK = "answers: "
Answer = list[tuple[int, float, float]]
PROMPT = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # In a process of its own the engine begins while requests still come in: which of them make up a batch, and with it
    # the order of sums, would depend on the time that each takes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def answers(folder: Path, *flags: str, timeout: float = 600) -> list[Answer]:
    """Answers of the model in `folder`; flags: "compiled" (not eager), "reload" (asks again after reload_weights)."""
    done = run([sys.executable, __file__, str(folder), *flags], timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(line.removeprefix(MARK))


def run(command: list[str], timeout: float, environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess:
    """A program with its output, both streams together; `environment` is added to this process's own."""
    return subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def difference(first: list[Answer], second: list[Answer], tie: float = 0.0) -> float:
    """The largest difference of log-probabilities; infinite when answers differ in their tokens.

    A token may differ where the two best are closer than `tie` in either model: no tolerance can keep their order.
    The rest of such an answer has another context and is not compared; half of all steps must be.
    """
    assert len(first) == len(second) > 0
    worst, compared = 0.0, 0
    for one, other in zip(first, second, strict=True):
        for (token, logprob, margin), (other_token, other_logprob, other_margin) in zip(one, other, strict=True):
            if token != other_token:
                if min(margin, other_margin) >= tie:
                    return math.inf
                break
            worst = max(worst, abs(logprob - other_logprob))
            compared += 1
    return worst if 2 * compared >= sum(len(answer) for answer in first) else math.inf


def main(folder: str, *flags: str) -> None:
    from vllm import LLM, SamplingParams

    sys.path.insert(0, str(DEMO))
    from pictures import TASKS, ask

    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager="compiled" not in flags,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    prompts = [PROMPT.format("", "What colour is the circle?"), PROMPT.format("", "How many stars are there?")]
    for image, question in (ask("evaluation", i) for i in range(len(TASKS))):
        prompts.append({"prompt": PROMPT.format(PICTURE, question.text), "multi_modal_data": {"image": image}})
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    if "reload" in flags:
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()  # the worker dropped it with the weights, the scheduler does not know
        outputs += llm.generate(prompts, sampling, use_tqdm=False)
    found = [steps_of(output.outputs[0]) for output in outputs]
    print(f"\n{MARK}{json.dumps(found)}", flush=True)


def steps_of(completion) -> Answer:
    steps = []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        best, following = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
        steps.append((token, candidates[token].logprob, best - following))
    return steps


if __name__ == "__main__":
    main(*sys.argv[1:])
