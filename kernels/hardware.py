"""The properties of a GPU that launches depend on."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Hardware:
    """`arch` is Triton's name without letters after the number (sm_90, gfx942)."""

    arch: str
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may have

    @property
    def ptx(self) -> bool:
        """Whether inline PTX is understood: NVIDIA, and not the interpreter."""
        return self.arch.startswith("sm_")

    @property
    def least_tokens(self) -> int:
        """The fewest tokens of a tensor core instruction: 8 of mma.m16n8k16, 16 of AMD's."""
        return 16 if self.arch.startswith("gfx") else 8


# Options of every launch: a product and a sum are one instruction, which Triton 3.10 does not do unless asked.
LAUNCH = {"enable_fp_fusion": True}
# Launches in the interpreter are planned for this: so few multiprocessors that small problems are split, too.
INTERPRETER = Hardware("interpreter", multiprocessors=4, shared=227 << 10)


@cache
def of(device: torch.device) -> Hardware:
    """The hardware of a device; a CPU stands for Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Hardware(properties.gcnArchName.split(":")[0], properties.multi_processor_count, 64 << 10)
    arch = f"sm_{properties.major}{properties.minor}"
    return Hardware(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
