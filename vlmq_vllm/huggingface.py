"""Lets transformers load a vlmq checkpoint: `from_pretrained` gives a model with the dequantised weights.

Packed weights are unpacked one after the other while transformers loads, on the device that each belongs to, with the
numbers of `vlmq dequantize`. The model then is an ordinary one of its dtype, in memory and when it is saved. Names in
the files become those in memory by transformers' own rules; experts, which are packed one by one, are laid into
transformers' fused parameters. Everything about packed weights is checked before anything is loaded.

Where the checkpoint rounds inputs to 8 bits (`activations.py`) so do hooks on the modules that were packed. Such a
model is not saved: without its hooks it would answer differently. Importing this file registers it.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vlmq_vllm.activations import round_tokens
from vlmq_vllm.checkpoint import ModuleInfo, QuantizationSpec, read_spec
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import PARTS, QuantizedWeight
from vlmq_vllm.headers import TensorInfo, read_headers
from vlmq_vllm.names import EXPERT_PARTS

logger = logging.getLogger(__name__)
Model = Any  # a PreTrainedModel; transformers imports this file before it has defined the class


class VLMQTransformersConfig(QuantizationConfigMixin):
    """The quantization_config of config.json, as far as transformers asks; the files are what is believed."""

    def __init__(self, **fields: Any) -> None:
        spec = QuantizationSpec.from_dict(fields)
        self.__dict__ |= fields
        self.dequantize = spec.activation_bits == 16  # then transformers takes a loaded model for unquantised


class VLMQQuantizer(HfQuantizer):
    """What from_pretrained calls, in this order. Raises CheckpointError."""

    def _process_model_before_weight_loading(
        self, model: Model, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a vlmq model is loaded from its folder, not from a state_dict; leave it out")
        folder = Path(checkpoint_files[0]).parent
        spec, self.headers, self.model = read_spec(folder), read_headers(folder), model
        self.modules, self.rounds = spec.read(folder, self.headers)[1], spec.activation_bits == 8

    def update_weight_conversions(self, weight_conversions: list, *_: Any) -> list:
        """Our rules for packed weights, then transformers' own, from names in files to names in memory.

        From 5.23 on transformers hands over the model once more.
        """
        unpack, self.given = Unpack(self), weight_conversions
        self.own = [WeightConverter([f"{part}$" for part in PARTS], "weight", [unpack])]
        for fused, projections in EXPERT_PARTS.items():
            sources = [rf"experts\.\d+\.{name}\.{part}$" for name in projections for part in PARTS]
            self.own.insert(0, WeightConverter(sources, f"experts.{fused}", [unpack]))
        rules = [*self.own, *weight_conversions]
        unpack.parameters = find_packed_parameters(self.model, rules, self.headers, self.modules)
        self.rounded = [target.removesuffix(".weight") for target in unpack.parameters] if self.rounds else []
        linears = {name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)}
        for name in self.rounded:
            if name not in linears:
                raise CheckpointError(
                    f"{name} is no linear layer of transformers' model, and activation_bits is 8; inputs of others are "
                    "not rounded, quantise again with --activation-bits 16"
                )
        return rules

    def _process_model_after_weight_loading(self, model: Model, **_: Any) -> None:
        """Weights that had another name in the file came in the file's dtype; our rules are not for saving."""
        plan = {re.compile(name.replace("*", ".*")): dtype for name, dtype in model._get_dtype_plan(self.dtype).items()}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                special = (dtype for pattern, dtype in plan.items() if pattern.search(name))
                parameter.data = parameter.data.to(next(special, self.dtype))
        # From 5.24 on transformers has deleted the list by now, without which names of towers are lost in saving.
        used = getattr(model, "_weight_conversions", None) or [rule for rule in self.given if rule.was_used()]
        model._weight_conversions = [rule for rule in used if rule not in self.own]
        for name in self.rounded:
            model.get_submodule(name).register_forward_pre_hook(_round_input)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def is_serializable(self) -> bool:
        """Asked by save_pretrained, whose error refers to the log."""
        if self.rounds:
            logger.warning(
                "the inputs of this model's linears are rounded to 8 bits, which saved weights would not say; keep the "
                "vlmq folder"
            )
        return not self.rounds

    @property
    def is_trainable(self) -> bool:
        return True


def _round_input(_: torch.nn.Module, inputs: tuple) -> tuple:
    return round_tokens(inputs[0]), *inputs[1:]


@dataclass(frozen=True)
class PackedParameter:
    """The packed modules that make up a parameter of `shape`, by rows; `sources`: each one's rule without the part."""

    modules: tuple[ModuleInfo, ...]
    sources: tuple[str, ...]
    shape: torch.Size


class Unpack(ConversionOps):
    """Packed tensors in, one parameter out, in the dtype of its scales.

    From transformers 5.23 on, an operation with a `hf_quantizer` is given tensors as stored, not in the model's dtype.
    """

    def __init__(self, hf_quantizer: VLMQQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.parameters: dict[str, PackedParameter] = {}

    def __deepcopy__(self, memo: dict) -> "Unpack":
        """transformers copies a rule for every tensor that it applies to."""
        return self

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str, **_: Any
    ) -> dict[str, torch.Tensor]:
        """`input_dict`: by rule, the tensors of all modules in their natural order."""
        packed = self.parameters[full_layer_name]
        queues = {rule: iter(tensors) for rule, tensors in input_dict.items()}
        weight: torch.Tensor | None = None
        row = 0
        for module, source in zip(packed.modules, packed.sources, strict=True):
            parts = {
                part: next(queues[f"{source}{part}$"]) for part in module.format.shapes(module.rows, module.columns)
            }
            scale = parts["weight_scale"]
            if weight is None:
                weight = torch.empty(packed.shape, dtype=scale.dtype, device=scale.device)
            place = weight.view(-1, module.columns)[row : row + module.rows]
            place.copy_(QuantizedWeight.from_tensors(module.format, parts).dequantize(scale.dtype))
            row += module.rows
        assert weight is not None, "a packed parameter has modules"
        return {full_layer_name: weight}


def find_packed_parameters(
    model: Model, rules: list, headers: dict[str, TensorInfo], modules: dict[str, ModuleInfo]
) -> dict[str, PackedParameter]:
    """In-memory name of every parameter that is packed -> the modules that it is made of.

    Raises CheckpointError where the modules do not make up their parameter, and, unless the model's class is another
    than the one that was saved (one without lm_head, say), for modules without parameter and parameters without tensor.
    """
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    empty = model.state_dict()
    same = type(model).__name__ in (model.config.architectures or ())
    packed: dict[str, list[tuple[str, str]]] = {}
    missing = {name for name, _ in model.named_parameters()} - set(model.all_tied_weights_keys)
    for name in sorted(headers, key=dot_natural_key):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, empty)
        missing -= {target, name}
        module, _, part = name.rpartition(".")
        if part == "weight_packed" and target in empty:
            packed.setdefault(target, []).append((module, source.removesuffix(f"{part}$")))
        elif part == "weight_packed" and same:
            raise CheckpointError(f"{module} is packed, but transformers' {type(model).__name__} has no {target}")
    if missing and same:
        raise CheckpointError(f"{min(missing)} is in no file; copy the checkpoint again or quantise anew")
    return {target: _packed_parameter(target, empty[target].shape, found, modules) for target, found in packed.items()}


def _packed_parameter(
    target: str, shape: torch.Size, found: list[tuple[str, str]], modules: dict[str, ModuleInfo]
) -> PackedParameter:
    """Raises CheckpointError unless the modules `found`, (name, rule) in natural order, make up the parameter."""
    names, sources = zip(*found, strict=True)
    infos = tuple(modules[name] for name in names)
    projections = EXPERT_PARTS.get(target.rpartition(".")[2], ()) if len(shape) == 3 else ()
    if projections:
        expected = [f"{expert}.{projection}" for expert in range(shape[0]) for projection in projections]
        whole = [".".join(name.split(".")[-2:]) for name in names] == expected
    else:
        whole = len(names) == 1
    rows = sum(info.rows for info in infos)
    fits = rows == shape[:-1].numel() and all(info.columns == shape[-1] for info in infos)
    if not (whole and fits):
        raise CheckpointError(
            f"{names[0]} and what belongs to it ({len(names)} packed weights, together {rows} x {infos[0].columns}) do "
            f"not make up transformers' {target} {list(shape)}"
        )
    return PackedParameter(infos, sources, shape)


auto.register_quantization_config("vlmq")(VLMQTransformersConfig)
auto.register_quantizer("vlmq")(VLMQQuantizer)
