"""Finds the device that a run computes on."""

import os

import torch

from vlmq_vllm.errors import QuantizeError


def default_device(name: str) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def device_of(name: str) -> torch.device:
    """The device of that name; of several processes on one machine each gets a GPU of its own."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # collectives of Python objects use the current one
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QuantizeError(
            f"device {name!r} cannot be used ({reason}); choose cpu, or cuda where there is a GPU"
        ) from None
