"""Scratch memory for split-K launches: float32 sums and counters, one set for every stream.

Launches of one stream may share a set, since the last program of each leaves the counters at zero; two streams must
not. A launch cannot make a set while its stream is being captured into a CUDA graph: the zeros would be written at
replay only. So sets are made ahead (`reserve`), and a new stream takes one. As with cuBLAS's workspaces, graphs that
were captured on one stream must not be replayed on two at the same time.

Sets outlive whatever memory pool is in use when they are made (that of a graph that is warmed up, or of weights that
vLLM's sleep mode discards): pools belong to a thread, and sets are made by another.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

PARTIALS = 2 << 20  # float32 sums, 8 MB
COUNTERS = 8 << 10
STREAMS = 4  # the usual one, the one that captures, and two for overlapped batches

_lock = threading.Lock()
_spare: dict[torch.device, list["Workspace"]] = {}
_taken: dict[tuple[torch.device, int], "Workspace"] = {}


@dataclass(frozen=True)
class Workspace:
    """`partials` float32 [PARTIALS], `counters` int32 [COUNTERS], which are zero between launches."""

    partials: torch.Tensor
    counters: torch.Tensor


def reserve(device: torch.device, streams: int = STREAMS) -> None:
    """Have sets for `streams` streams of a device, those in use counted."""
    device = _numbered(device)
    with _lock:
        spare = _spare.setdefault(device, [])
        for _ in range(streams - len(spare) - sum(owner == device for owner, _ in _taken)):
            spare.append(_make(device))


def of_current_stream(device: torch.device) -> Workspace:
    """The set of the stream that the next launch goes to. Raises RuntimeError when there is none during a capture."""
    device = _numbered(device)
    is_cuda = device.type == "cuda"
    key = (device, torch.cuda.current_stream(device).cuda_stream if is_cuda else 0)
    workspace = _taken.get(key)
    if workspace is None:
        with _lock:
            spare = _spare.setdefault(device, [])
            if not spare and is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"no workspace is left for a CUDA graph of one more stream on {device}; before the capture call "
                    "vlmq_vllm.kernels.workspace.reserve(device, streams=...) with the number of streams"
                )
            workspace = _taken[key] = spare.pop() if spare else _make(device)
    return workspace


def _numbered(device: torch.device) -> torch.device:
    """cuda:0 for cuda when that is the current one: tensors' devices have a number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _make(device: torch.device) -> Workspace:
    with ThreadPoolExecutor(1) as another_thread:
        return another_thread.submit(_allocate, device).result()


def _allocate(device: torch.device) -> Workspace:
    made = Workspace(
        torch.empty(PARTIALS, dtype=torch.float32, device=device),
        torch.zeros(COUNTERS, dtype=torch.int32, device=device),
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the zeros must be there before any other stream's launch
    return made
