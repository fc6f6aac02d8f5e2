"""Many small vLLM engines one after the other in one process, for comparing what models answer.

`run(jobs)` starts this file as a program. Each job is an engine: a model folder, options of `vllm.LLM`, and what it is
asked; starting them in one process saves vLLM's imports, which take longer than a tiny model.
"""

import contextlib
import gc
import json
import math
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import answers

MARK = "engines: "
TIE = 0.04  # two log-probabilities, each within 0.02, may change places
ENVIRONMENT = answers.ENVIRONMENT | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers may share the cores that there are
    "OMP_NUM_THREADS": "1",  # threads of a tiny model wait for each other, above all where a machine does other work
}
TEXTS = ("What is the colour of the picture?", "How many signs are there in the first picture and the second?")


@dataclass
class Job:
    """One engine. pictures: how many pictures each question shows; video: a question about a film as well. times: how
    often all is asked; reload: weights are loaded again before the last time; sleep: the engine sleeps before it, at
    this level. lora: folder of an adapter that is used.
    choices: what an answer may be. prompt_logs: whether to ask for them; vLLM then reads nothing from its prefix cache.
    """

    folder: str
    options: dict = field(default_factory=dict)
    pictures: tuple[int, ...] = (0, 1)
    asked: tuple[tuple[str, str], ...] = ()
    video: bool = False
    times: int = 1
    reload: bool = False
    sleep: int = 0
    lora: str = ""
    choices: tuple[str, ...] = ()
    prompt_logs: bool = True


def run(jobs: list[Job], timeout: float, **environment: str) -> list[list]:
    """For every job what it answers to every question; in place of a job that fails, the last line of its error.
    environment: variables of the process beside those that all have.

    prompt: log-probabilities of the prompt's tokens. steps of a greedy answer: [token id, log-probability, margin to
    the next]. cached: how many of the prompt's tokens were in the prefix cache.
    """
    command = [sys.executable, __file__, json.dumps([asdict(job) for job in jobs])]
    done = answers.run(command, timeout, ENVIRONMENT | environment)
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert done.returncode == 0 and len(lines) == len(jobs), done.stdout[-6000:]
    return [json.loads(line) for line in lines]


def asked_for(request, argument: str) -> list[str]:
    """What the tests that are run in the requesting fixture's module have for an argument, so that it can start the
    engines of those alone."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[argument] for item in items))


def difference(first: list, second: list, tie: float = TIE) -> float:
    """The largest difference of log-probabilities between two jobs' results; infinite when answers differ in a token.

    A token may differ where the two best are closer than `tie` in either model: no tolerance can keep their order. The
    rest of such an answer has another context and is not compared. Fails for a job that failed.
    """
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        pairs = list(zip(one["prompt"], other["prompt"], strict=True))
        steps = zip(one["steps"], other["steps"], strict=True)
        for (token, logprob, margin), (other_token, other_logprob, other_margin) in steps:
            if token != other_token:
                if min(margin, other_margin) >= tie:
                    return math.inf
                break
            pairs.append((logprob, other_logprob))
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    return worst


def main(jobs: str) -> None:
    from vllm import LLM  # noqa: F401, so that all that it brings is frozen
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(jobs):
        gc.freeze()  # an engine collects garbage seven times, each time 0.3 s for the modules of vLLM and torch alone
        try:
            found = answers_to(Job(**job))
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        print(f"\n{MARK}{json.dumps(found)}", flush=True)
        gc.collect()
        with contextlib.suppress(AssertionError):
            cleanup_dist_env_and_memory()


def answers_to(job: Job) -> list:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    defaults = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True, "seed": 0}
    defaults["num_gpu_blocks_override"] = 64  # instead of a gigabyte that is filled with zeros
    defaults["limit_mm_per_prompt"] = {"image": max(1, *job.pictures), "video": int(job.video)}
    defaults |= {"enable_lora": True, "max_lora_rank": 8} if job.lora else {}
    llm = LLM(job.folder, **defaults | job.options)
    shown = [([_picture(i + j) for j in range(n)], TEXTS[i % len(TEXTS)]) for i, n in enumerate(job.pictures)]
    if job.asked:
        shown = [([Image.open(file)], text) for file, text in job.asked]
    prompts = [_prompt(llm, text, "image", pictures) for pictures, text in shown]
    if job.video:
        prompts.append(_prompt(llm, TEXTS[0], "video", [_film()]))
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
    sampling.prompt_logprobs = 0 if job.prompt_logs else None
    if job.choices:
        sampling.ignore_eos, sampling.structured_outputs = False, StructuredOutputsParams(choice=list(job.choices))
    lora = LoRARequest("adapter", 1, job.lora) if job.lora else None
    outputs = []
    for time in range(job.times):
        last = time == job.times - 1
        if job.sleep and last:
            llm.sleep(job.sleep)
            llm.wake_up()
        if (job.reload or job.sleep == 2) and last:
            llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
            llm.llm_engine.reset_encoder_cache()  # the worker dropped it with the weights, the scheduler does not know
        outputs += llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return [
        {"prompt": _logs(output), "steps": answers.steps_of(output.outputs[0]), "cached": output.num_cached_tokens}
        for output in outputs
    ]


def _prompt(llm, question: str, kind: str, shown: list) -> dict:
    """A question about pictures or films, as the model's chat template writes it."""
    content = [{"type": kind} for _ in shown] + [{"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = llm.get_tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return {"prompt": text} | ({"multi_modal_data": {kind: shown}} if shown else {})


def _picture(number: int):
    """112 x 56 pixels with a gradient and a rectangle; numbers differ."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:56, 0:112]
    pixels = np.stack([rows * 4, columns * 2, (rows * columns + 40 * number) % 256], axis=-1).astype(np.uint8)
    pixels[8 * number : 8 * number + 16, 20:60] = (250, 30 * number, 10)
    return Image.fromarray(pixels)


def _film():
    """Four frames."""
    import numpy as np

    return np.stack([np.asarray(_picture(i)) for i in range(4)])


def _logs(output) -> list[float]:
    """Log-probabilities of the prompt's own tokens, the first of which has none."""
    return [next(iter(each.values())).logprob for each in (output.prompt_logprobs or [])[1:]]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
