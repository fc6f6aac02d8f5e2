"""Measures what a GPU can do at all, by CUDA graph replay (`gpu_timing.py`): bandwidth of a copy, cost of a launch."""

import torch
import triton

from benchmarks.kernel.gpu_timing import capture, replay

COPIED = 1 << 30  # bytes of the copy that gives the bandwidth


@triton.jit
def empty_kernel(x):
    pass


def empty_microseconds(device: str, launches: int = 256) -> float:
    """What a launch costs in a graph when its kernel does nothing, with as many programs as there are processors."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.zeros(1, device=device)

    def launch(x: torch.Tensor) -> torch.Tensor:
        empty_kernel[(programs,)](x)
        return x

    launch(x)
    graph, _ = capture([launch], x, launches)
    return replay(graph, launches).microseconds


def copy_bandwidth(device: str, launches: int = 4) -> float:
    """GB/s of a copy of COPIED bytes from device memory to device memory, bytes read and written."""
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    graph, _ = capture([target.copy_], source, launches)
    return 2 * COPIED / replay(graph, launches).microseconds / 1e3
