"""Calibration samples in one import: reading chats (`sources.py`) and making them inputs of the model (`inputs.py`)."""

from vlmq_vllm.offline.data.inputs import load_processor, model_inputs
from vlmq_vllm.offline.data.pictures import open_image
from vlmq_vllm.offline.data.sources import read_chats

__all__ = ["load_processor", "model_inputs", "open_image", "read_chats"]
