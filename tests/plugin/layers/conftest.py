"""For tests of vLLM's layers: a configuration, and ranks to play.

More ranks than one are played one after the other, by patching the functions that tell a layer its rank.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary


@pytest.fixture(autouse=True)
def vllm_config():
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    """ranks(rank, size): layers built from here on believe to be this tensor-parallel rank."""

    def play(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_vocabulary, vllm_parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    play(0, 1)
    return play
