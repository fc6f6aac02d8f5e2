"""Scores a model through vLLM, as it would be served. Every model gets a process of its own (`worker.py`).

Only so is a first engine's memory free for the second. The worker is given a folder with the job, the pictures and,
for the student, the teacher's scores; it leaves its scores there.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.compare.questions import Exam
from vlmq_vllm.offline.compare.scores import Score, load, save
from vlmq_vllm.offline.compare.weights import is_vlmq
from vlmq_vllm.offline.data.pictures import open_image

JOB, TEACHER, RESULT = "job.json", "teacher.safetensors", "result.safetensors"
# what a user sets in the environment wins; the space is in GB and only read on a CPU
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


def score(folder: Path, exam: Exam, teacher: list[Score | None] | None, track: Callable) -> list[Score | None]:
    """As `hf.score`, through vLLM. Raises QuantizeError when vLLM is missing or fails, with its reason."""
    if find_spec("vllm") is None:
        raise QuantizeError("backend 'vllm' needs vLLM, which is not installed; install it or use --backend hf")
    with tempfile.TemporaryDirectory(prefix="vlmq-compare-") as name:
        place = Path(name)
        tasks = _tasks(exam, teacher, place, track)
        if teacher is not None:
            save(place / TEACHER, [score for score in teacher if score is not None], {})
        scores = iter(_run(place, folder, exam, tasks) if any(tasks) else [])
        return [None if task is None else next(scores) for task in tasks]


def _tasks(exam: Exam, teacher: list[Score | None] | None, place: Path, track: Callable) -> list[dict | None]:
    """What the worker needs to know of every question; None for those left out."""
    for question in exam.questions:
        if question.chat["videos"]:
            raise QuantizeError(f"{question.chat['line']} has a video; compare videos with --backend hf")
    tasks: list[dict | None] = []
    for i, found in enumerate(exam.inputs(teacher, track, "reading pictures")):
        question, chat = exam.questions[i], exam.questions[i].chat
        images = chat["images"] if found else []
        pictures = [f"{i}-{j}.png" for j in range(len(images))]
        for name, image in zip(pictures, images, strict=True):
            open_image(image).save(place / name)
        prompt = found and found[0]["input_ids"][0, : found[1]].tolist()
        task = {"line": chat["line"], "words": question.words, "prompt": prompt, "answer": question.answer}
        tasks.append(found and task | {"pictures": pictures})
    return tasks


def _run(place: Path, folder: Path, exam: Exam, tasks: list[dict | None]) -> list[Score]:
    job = {
        "model": str(folder.absolute()),
        "quantization": "vlmq" if is_vlmq(folder) else None,
        "settings": asdict(exam.settings),
        "ends": sorted(exam.ends),
        "tasks": [task for task in tasks if task is not None],
    }
    (place / JOB).write_text(json.dumps(job), encoding="utf-8")
    with tempfile.NamedTemporaryFile(prefix="vlmq-compare-", suffix=".log", delete=False) as output:
        log = Path(output.name)
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmq_vllm.offline.compare.worker", str(place)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | os.environ,
            start_new_session=True,  # a process group, so that the engine's own processes can be ended with it
        )
        try:
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        raise QuantizeError(
            f"vLLM failed with {folder}: {reason(log.read_text(errors='replace'))} (its whole output is in {log})"
        )
    log.unlink()
    return [score for score in load(place / RESULT) if score is not None]


def reason(log: str) -> str:
    """The line of vLLM's output that tells why it ended: the last error that is not about another process's error."""
    errors = re.findall(r"\b(?:\w+\.)*(\w+(?:Error|Exit|Exception): .+)", log)
    named = [error.strip() for error in errors if "Engine core initialization failed" not in error]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (named or lines or ["it said nothing"])[-1][:400]
