"""A checkpoint exported to compressed-tensors, in stock vLLM and without this project's plugin, answers as its twin."""

import pytest

from answers import answers, difference
from vlmq_vllm.offline.checkpoint.dequantize import dequantize
from vlmq_vllm.offline.checkpoint.export.export import export
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

pytest.importorskip("vllm", reason="vLLM is not installed")

TOLERANCE = 0.02  # as in test_equality.py: another order of sums


@pytest.mark.slow
def test_compressed_tensors_answer_as_the_twin(demo_model, tmp_path, monkeypatch):
    settings = Settings(method="rtn", bits=4, group_size=64, symmetric=True)
    quantize(str(demo_model), tmp_path / "packed", None, settings)
    export(tmp_path / "packed", tmp_path / "out", "compressed-tensors")
    dequantize(tmp_path / "packed", tmp_path / "twin")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    found, expected = answers(tmp_path / "out"), answers(tmp_path / "twin")
    assert difference(found, expected) < TOLERANCE
