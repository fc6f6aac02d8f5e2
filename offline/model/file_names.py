"""Finds where in the files a parameter lies.

transformers renames modules in memory (`model.layers` in a file may be `model.language_model.layers`), and fused
tensors of experts hold many of our linears. Its own rules give the way from one to the other; what is written keeps
the files' names.
"""

from dataclasses import dataclass

import torch
from safetensors import safe_open

from vlmq_vllm.headers import TensorInfo
from vlmq_vllm.names import EXPERT_PARTS
from vlmq_vllm.offline.model.experts import unfuse


@dataclass(frozen=True)
class StoredParameter:
    """Where a parameter lies: all of `tensor`, or of expert `expert` the outputs `start` .. `stop`.

    module: the name under which a linear is written, in the files' spelling. transposed: experts are stored [H, I].
    """

    tensor: str
    module: str
    expert: int | None = None
    start: int = 0
    stop: int = 0
    transposed: bool = False

    def read(self, file: safe_open) -> torch.Tensor:
        """The parameter from an open safetensors file; of a fused tensor only its part."""
        if self.expert is None:
            return file.get_tensor(self.tensor)
        value = file.get_slice(self.tensor)[self._part].squeeze(0)
        return value.T.contiguous() if self.transposed else value

    def put(self, fused: torch.Tensor, value: torch.Tensor) -> None:
        """Write the parameter to its part of a fused tensor."""
        fused[self._part] = value.T if self.transposed else value

    @property
    def _part(self) -> tuple:
        """The index of the parameter in the fused tensor."""
        rows = slice(self.start, self.stop)
        return (self.expert, slice(None), rows) if self.transposed else (self.expert, rows)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape by that of the stored tensor."""
        if self.expert is None:
            return stored
        inner = stored[1 if self.transposed else 2]
        outer = stored[2 if self.transposed else 1]
        return (min(self.stop, outer) - self.start, inner)


def find_stored_parameters(model: torch.nn.Module, headers: dict[str, TensorInfo]) -> dict[str, StoredParameter]:
    """In-memory parameter name -> where it lies, by transformers' rules for this model, whose experts are unfused."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    empty = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    stored, whole = {}, set()  # the file's name by the one in memory; which are not made of others by a rule
    for name in headers:
        renamed, converted = rename_source_key(name, renamings, others, model.base_model_prefix, empty)
        stored[renamed] = name
        if converted is None:
            whole.add(renamed)
    places = {}
    for name, count in unfuse(model).items():
        for fused, parts in EXPERT_PARTS.items():
            if (tensor := stored.pop(f"{name}.{fused}", None)) is None:
                continue
            shape = shapes[f"{name}.{fused}"]
            size, transposed = shape[1] // len(parts), headers[tensor].shape != shape
            prefix = tensor.removesuffix(f".{fused}")
            for expert in range(count):
                for i, part in enumerate(parts):
                    module = f"{prefix}.{expert}.{part}"
                    own = StoredParameter(tensor, module, expert, i * size, (i + 1) * size, transposed)
                    places[f"{name}.{expert}.{part}.weight"] = own
    plain = {name: tensor for name, tensor in stored.items() if name in whole}
    return {name: StoredParameter(tensor, tensor.removesuffix(".weight")) for name, tensor in plain.items()} | places
