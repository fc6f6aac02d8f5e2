"""Reads a vlmq checkpoint's quantization_config and safetensors headers, and checks that the two agree.

The tensors are the truth: a module is quantised if and only if it owns `<module>.weight_packed`. The config names the
format of each; a disagreement is a CheckpointError that names the tensor. Nothing here loads weights or needs vLLM.

    "quantization_config": {
        "quant_method": "vlmq", "format_version": 1, "bits": 3, "group_size": 128, "symmetric": false,
        "overrides": {"<exact module name>": {"bits": 4, "group_size": 64, "symmetric": true}},
        "tool": {...},            # what made it; never read back
    }

With `"activation_bits": 8` the inputs of every quantised module are rounded token by token (`activations.py`). Readers
of version 1 do not know the key and would leave it out in silence, so such a checkpoint, and no other, is of version 2.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmq_vllm.activations import ACTIVATION_BITS
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import FORMAT_VERSION, PARTS, WeightFormat
from vlmq_vllm.headers import TensorInfo, Tensors, read_config, read_headers
from vlmq_vllm.packing import OWN, Packing

SCALE_DTYPES = ("F16", "BF16", "F32")
DTYPES = {part: ("I32",) for part in PARTS} | {"weight_scale": SCALE_DTYPES, "weight_shape": ("I64",)}
VERSIONS = {16: FORMAT_VERSION, 8: FORMAT_VERSION + 1}  # by activation_bits
BESIDE_ROUNDED = (4, 8)  # bits of weights whose inputs may be rounded to 8 bits


@dataclass(frozen=True)
class ModuleInfo:
    """One quantised module: its format and the weight's shape [rows, columns] = [O, I]."""

    format: WeightFormat
    rows: int
    columns: int


@dataclass(frozen=True)
class QuantizationSpec:
    """The parsed quantization_config: a default format and overrides by exact module name.

    Raises CheckpointError for widths of inputs that do not exist, and of weights that are not served beside 8.
    """

    default: WeightFormat
    overrides: dict[str, WeightFormat]
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if type(self.activation_bits) is not int or self.activation_bits not in ACTIVATION_BITS:
            raise CheckpointError(
                f"activation_bits is {self.activation_bits!r}; vlmq has {' and '.join(map(str, ACTIVATION_BITS))}"
            )
        for where, format in {"the default": self.default, **self.overrides}.items():
            if self.activation_bits == 8 and format.bits not in BESIDE_ROUNDED:
                raise CheckpointError(
                    f"activation_bits is 8 and {where} has weights of {format.bits} bits; with inputs of 8 bits "
                    f"weights have {' or '.join(map(str, BESIDE_ROUNDED))}, quantise anew"
                )

    def read(self, folder: Path, headers: dict[str, TensorInfo]) -> tuple[Packing, dict[str, ModuleInfo]]:
        """Packing and table of quantised modules of a folder. Raises CheckpointError for a missing, surplus, misshaped
        or wrongly typed tensor and for an override without module."""
        owners = dict.fromkeys(owner for owner, _, part in (name.rpartition(".") for name in headers) if part in PARTS)
        check_surplus(owners, headers, PARTS)
        unused = sorted(self.overrides.keys() - owners)
        if unused:
            raise CheckpointError(f"config.json says how {unused[0]} is quantised, but it owns no weight_packed")
        tensors = Tensors(folder, headers)
        return OWN, {module: _check(module, self.overrides.get(module, self.default), tensors) for module in owners}

    def to_dict(self, tool: dict) -> dict:
        rounded = {"activation_bits": self.activation_bits} if self.activation_bits != 16 else {}
        return {
            "quant_method": "vlmq",
            "format_version": VERSIONS[self.activation_bits],
            **asdict(self.default),
            **rounded,
            "overrides": {name: asdict(format) for name, format in sorted(self.overrides.items())},
            "requires": "pip install vlmq-vllm",
            "tool": tool,
        }

    @classmethod
    def from_dict(cls, config: dict) -> "QuantizationSpec":
        """Parse and check; raises CheckpointError. Keys of no meaning to this version are ignored."""
        method = config.get("quant_method") if isinstance(config, dict) else config
        if method != "vlmq":
            raise CheckpointError(f"quant_method is {method!r}; only 'vlmq' can be read here")
        version = config.get("format_version")
        if version not in VERSIONS.values():
            known = " and ".join(map(str, VERSIONS.values()))
            raise CheckpointError(f"format_version is {version!r}, this vlmq-vllm reads {known}; install one that fits")
        overrides = config.get("overrides", {})
        if not isinstance(overrides, dict):
            raise CheckpointError("quantization_config.overrides must map module names to formats")
        formats = {name: _parse(entry, name) for name, entry in overrides.items()}
        spec = cls(_parse(config, "default"), formats, config.get("activation_bits", 16))
        if version != VERSIONS[spec.activation_bits]:
            raise CheckpointError(
                f"activation_bits is {spec.activation_bits}, which is format_version {VERSIONS[spec.activation_bits]}, "
                f"and config.json says {version}; copy the checkpoint again or quantise anew"
            )
        return spec


def _parse(entry: dict, where: str) -> WeightFormat:
    if not isinstance(entry, dict):
        raise CheckpointError(f"quantization_config ({where}) is {entry!r}; it must name bits, group_size, symmetric")
    try:
        return WeightFormat(**{key: entry[key] for key in ("bits", "group_size", "symmetric")})
    except KeyError as error:
        raise CheckpointError(f"quantization_config ({where}) lacks {error}") from None
    except ValueError as error:
        raise CheckpointError(f"quantization_config ({where}): {error}") from None


def read_spec(folder: Path) -> QuantizationSpec:
    config = read_config(folder).get("quantization_config")
    if config is None:
        raise CheckpointError(f"{folder} is not quantised (config.json has no quantization_config)")
    return QuantizationSpec.from_dict(config)


def read_modules(folder: Path) -> dict[str, ModuleInfo]:
    """Every quantised module of a vlmq folder, after checking its tensors' names, dtypes and shapes."""
    _, modules = read_spec(folder).read(folder, read_headers(folder))
    return modules


def find_parts(
    module: str, headers: dict[str, TensorInfo], dtypes: Mapping[str, tuple[str, ...]]
) -> dict[str, TensorInfo]:
    """The tensors of `module` that `dtypes` names, with the types they may have. Raises CheckpointError for another
    type and for what is missing; symmetric weights have no zero points."""
    found = {part: headers[f"{module}.{part}"] for part in dtypes if f"{module}.{part}" in headers}
    for part, allowed in dtypes.items():
        if part not in found and part != "weight_zero_point":
            raise CheckpointError(f"{module}.{part} is missing; copy the checkpoint again or quantise anew")
        if part in found and found[part].dtype not in allowed:
            raise CheckpointError(f"{module}.{part} is {found[part].dtype}, it must be {' or '.join(allowed)}")
    return found


def read_size(module: str, tensors: Tensors) -> tuple[int, int]:
    """Rows and columns by a module's weight_shape. Raises CheckpointError for what is no size of a weight."""
    size = tensors.get(f"{module}.weight_shape").flatten().tolist()
    if len(size) != 2 or not all(0 < count < 1 << 31 for count in size):
        raise CheckpointError(f"{module}.weight_shape says {' x '.join(map(str, size))}, which is no weight")
    return size[0], size[1]


def check_shapes(
    module: str, found: dict[str, TensorInfo], format: WeightFormat, size: tuple[int, int], shapes: dict[str, tuple]
) -> None:
    """Raises CheckpointError unless the tensors of a weight of this format and size have these shapes."""
    for part, shape in shapes.items():
        if found[part].shape != shape:
            raise CheckpointError(
                f"{module}.{part} has shape {list(found[part].shape)}, but {format.bits} bits with groups of "
                f"{format.group_size} and weight {size[0]} x {size[1]} need {list(shape)}"
            )


def check_surplus(modules: Collection[str], headers: dict[str, TensorInfo], parts: Collection[str]) -> None:
    """Raises CheckpointError for a tensor of a quantised module that is neither one of `parts` nor a bias."""
    for name in headers:
        module, _, part = name.rpartition(".")
        if part not in parts and part != "bias" and module in modules:
            raise CheckpointError(
                f"{name} is one too many: {module} is quantised, its tensors are {', '.join(parts)} and bias; copy the "
                "checkpoint again or quantise anew"
            )


def _check(module: str, format: WeightFormat, tensors: Tensors) -> ModuleInfo:
    found = find_parts(module, tensors.headers, DTYPES)
    size = read_size(module, tensors)
    expected = format.shapes(*size)
    if set(found) != set(expected):
        kind = "symmetric" if format.symmetric else "asymmetric"
        raise CheckpointError(f"{module} has {sorted(found)}; config.json says {kind}, which has {sorted(expected)}")
    check_shapes(module, found, format, size, expected)
    return ModuleInfo(format, *size)
