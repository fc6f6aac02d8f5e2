"""Lets vLLM's CPU platform use Ray, in processes that have this folder on PYTHONPATH:
`tests/e2e/test_serving_ray.py`.

vLLM asks a platform for the name of its devices in Ray, and the CPU's has none. Nodes are started with a GPU that is
not there, so that every worker gets a place.
"""

from vlmq_vllm.import_hook import after_import


def _name_devices() -> None:
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


after_import("vllm.platforms.cpu", _name_devices)
