"""A quantised model over two worker processes, by tensor and by pipeline parallelism, answers as its dequantised twin
does in one process."""

import pytest

import engines
import served_models
from vlmq_vllm.offline.checkpoint.dequantize import dequantize

pytest.importorskip("vllm", reason="vLLM is not installed")

# As in test_serving_families.py; parts of a sum that lie on two ranks are rounded to float16 before they are added.
TOLERANCE = 0.02
# Qwen2-VL has a tower whose fused tensor is cut in three places, Qwen3-VL-MoE experts and two vision-language mergers.
FAMILIES = ("qwen2_vl", "qwen3_vl_moe")
WAYS = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor, tower by data": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
    "experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    # vLLM 0.32's CPU worker makes the buffers between stages in a warm-up that it leaves out when it runs eagerly
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}
CASES = [("qwen2_vl", "tensor"), ("qwen2_vl", "tensor, tower by data"), ("qwen2_vl", "pipeline")]
CASES += [("qwen3_vl_moe", "tensor"), ("qwen3_vl_moe", "experts")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """(family, way) -> what the quantised model says, (family, None) -> what the twin says in one process."""
    root, jobs = tmp_path_factory.mktemp("parallel"), {}
    for name in FAMILIES:
        _, quantized = served_models.build(name, root / name, ranks=2)
        dequantize(quantized, root / name / "twin")
        jobs[name, None] = engines.Job(str(root / name / "twin"), {"dtype": "float16"})
    for name, way in CASES:
        jobs[name, way] = engines.Job(str(root / name / "quantised"), WAYS[way] | {"dtype": "float16"})
    return dict(zip(jobs, engines.run(list(jobs.values()), timeout=1200), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "way"), CASES)
def test_answers_equal_the_twins(answers, family, way):
    assert engines.difference(answers[family, way], answers[family, None]) < TOLERANCE
