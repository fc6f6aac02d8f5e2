"""Scores one model with vLLM, in a process of its own; `engine.py` starts it with the folder of its job.

vLLM's prompt_logprobs would give the student's own likeliest tokens, not the teacher's. So every answer token is one
request: the prompt and the answer up to that token, one greedily generated token, and the log-probabilities of named
ids. Requests of a question share its prompt in vLLM's prefix cache. vLLM gives log-probabilities in float32; the
remaining mass is one minus their sum and known to about REST_FLOOR, which both models are given at least.
"""

import json
import sys
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path

import numpy as np
from PIL import Image

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.compare.engine import JOB, RESULT, TEACHER
from vlmq_vllm.offline.compare.scores import Score, load, save
from vlmq_vllm.offline.settings.compare import NAMED_IDS, CompareSettings

REST_FLOOR = 2.0**-20  # float32 log-probabilities of size 10 are off by up to 5e-7 each
TOGETHER = 32  # questions whose requests are handed over at a time


class Engine:
    """vLLM with one model, asked for single tokens and for greedy answers."""

    def __init__(self, place: Path, job: dict) -> None:
        from vllm import LLM

        longest = max(len(task["prompt"]) + len(task["answer"]) for task in job["tasks"])
        pictures = max(len(task["pictures"]) for task in job["tasks"])
        self.place, self.ends, self.settings = place, job["ends"], CompareSettings(**job["settings"])
        self.llm = LLM(
            job["model"],
            quantization=job["quantization"],
            dtype=self.settings.dtype,
            max_model_len=longest + self.settings.max_new_tokens + 1,
            max_num_seqs=TOGETHER,
            max_logprobs=NAMED_IDS,
            enforce_eager=True,  # compiling takes longer than most comparisons
            limit_mm_per_prompt={"image": pictures, "video": 0},
            seed=0,
        )

    def ask(self, tasks: list[dict], lengths: list[int], options: list[dict]) -> list:
        """vLLM's answers to prompts of tasks with so many answer tokens after each; `options` sample each of them."""
        from vllm import SamplingParams

        prompts = [self._prompt(task, length) for task, length in zip(tasks, lengths, strict=True)]
        sampling = [SamplingParams(temperature=0, detokenize=False, ignore_eos=True, **each) for each in options]
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        for task, length, output in zip(tasks, lengths, outputs, strict=True):
            if list(output.prompt_token_ids) != task["prompt"] + task["answer"][:length]:
                raise QuantizeError(
                    f"{task['line']}: vLLM makes other tokens of it than transformers; use --backend hf"
                )
        return [output.outputs[0] for output in outputs]

    def _prompt(self, task: dict, length: int) -> dict:
        prompt = {"prompt_token_ids": task["words"] + task["answer"][:length]}
        if task["pictures"]:
            images = []
            for name in task["pictures"]:
                with Image.open(self.place / name) as image:
                    images.append(image.convert("RGB"))
            prompt["multi_modal_data"] = {"image": images}
        return prompt


def score(engine: Engine, tasks: list[dict], teacher: list[Score] | None) -> list[Score]:
    """Scores of some tasks; without `teacher` the model is the teacher."""
    new_tokens, top = engine.settings.max_new_tokens, engine.settings.top
    answering = {"max_tokens": max(1, new_tokens), "stop_token_ids": engine.ends}
    # first, so that every prompt is in the prefix cache before its answer's tokens are asked for
    greedy = engine.ask(tasks, [0] * len(tasks), [answering] * len(tasks))
    places = [(i, j) for i, task in enumerate(tasks) for j in range(len(task["answer"]))]
    asked, lengths = [tasks[i] for i, _ in places], [j for _, j in places]
    right = [tasks[i]["answer"][j] for i, j in places]
    if teacher is None:
        found = engine.ask(asked, lengths, [{"max_tokens": 1, "logprobs": top}] * len(places))
    else:
        named = [sorted({*teacher[i].ids[j].tolist(), token}) for (i, j), token in zip(places, right, strict=True)]
        found = engine.ask(asked, lengths, [{"max_tokens": 1, "logprob_token_ids": ids} for ids in named])
    logs = [{token: entry.logprob for token, entry in answer.logprobs[0].items()} for answer in found]
    _add_missing(engine, asked, lengths, right, logs)
    scores = []
    for i, task in enumerate(tasks):
        steps = [step for step, (owner, _) in enumerate(places) if owner == i]
        chosen = None if teacher is None else teacher[i].ids
        ids = np.array([nlargest(top, logs[s], logs[s].__getitem__) for s in steps]) if chosen is None else chosen
        best = [found[s].token_ids[0] for s in steps]
        scores.append(_score(task, ids, [logs[s] for s in steps], best, greedy[i].token_ids if new_tokens else []))
    return scores


def _add_missing(engine: Engine, asked: list, lengths: list, right: list, logs: list[dict]) -> None:
    """Ask once more where the answer's token is not among the likeliest."""
    missing = [step for step, token in enumerate(right) if token not in logs[step]]
    if missing:
        options = [{"max_tokens": 1, "logprob_token_ids": [right[step]]} for step in missing]
        found = engine.ask([asked[s] for s in missing], [lengths[s] for s in missing], options)
        for step, answer in zip(missing, found, strict=True):
            logs[step][right[step]] = answer.logprobs[0][right[step]].logprob


def _score(task: dict, ids: np.ndarray, logs: list[dict], best: list[int], greedy: Sequence[int]) -> Score:
    kept = np.array([[step[int(i)] for i in row] for step, row in zip(logs, ids, strict=True)], dtype=np.float32)
    own = np.array([step[token] for step, token in zip(logs, task["answer"], strict=True)])
    rest = np.log(np.maximum(1 - np.exp(kept.astype(np.float64)).sum(1), REST_FLOOR))
    answer, likeliest, generated = map(np.array, (task["answer"], best, list(greedy)))
    return Score(answer, ids, kept, rest, own, likeliest, generated).check("the model", task["line"])


def main(place: Path) -> None:
    job = json.loads((place / JOB).read_text(encoding="utf-8"))
    teacher = [one for one in load(place / TEACHER) if one] if (place / TEACHER).is_file() else None
    engine = Engine(place, job)
    scores: list[Score] = []
    for start in range(0, len(job["tasks"]), TOGETHER):
        several = slice(start, start + TOGETHER)
        scores += score(engine, job["tasks"][several], None if teacher is None else teacher[several])
    save(place / RESULT, scores, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
