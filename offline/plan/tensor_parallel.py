"""Says for each kind of linear which layer of vLLM takes it, and which tensor-parallel sizes can cut it.

A column-parallel layer is cut along O, which any format allows; query heads must divide, and key and value heads must
divide or be shared. A row-parallel layer is cut along I, and `WeightFormat.part` says which cuts the plugin can
serve. `linear` stands for linears of one name, shape and format.
"""

import re
from dataclasses import dataclass, field

from vlmq_vllm.format import WeightFormat
from vlmq_vllm.names import FUSED
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.targets import Target
from vlmq_vllm.unserved import why_unserved

SIZES = (1, 2, 4, 8)  # tensor-parallel sizes that are looked at
GROUPS = (128, 64, 32, -1)  # group sizes that are proposed instead
ROW_PARALLEL = {"o_proj", "down_proj", "out_proj", "proj", "fc2", "linear_fc2", "linear_2", "mlp.2"}
LAYERS = dict.fromkeys((*FUSED["qkv_proj"], "qkv"), "QKVParallelLinear")
LAYERS |= dict.fromkeys(FUSED["gate_up_proj"], "MergedColumnParallelLinear")


Heads = tuple[int, int]  # of the decoder's attention: query, key


@dataclass
class LinearKind:
    """Linears of one name pattern, weight [rows, columns] and format. cuts: tensor-parallel size -> why not, or None;
    fitting: for refused sizes the group sizes that would do. refused: why vLLM takes no packed weight here."""

    pattern: str
    component: str
    rows: int
    columns: int
    format: WeightFormat
    count: int = 0
    layer: str = ""
    refused: str | None = None
    cuts: dict[int, str | None] = field(default_factory=dict)
    fitting: dict[int, list[int]] = field(default_factory=dict)


def find_linear_kinds(source: Source, targets: list[Target]) -> list[LinearKind]:
    """The distinct linears of a plan."""
    text = source.parsed.get_text_config()
    heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    found: dict[tuple, LinearKind] = {}
    for target in targets:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", target.module)
        key = (pattern, target.component, target.rows, target.columns, target.format)
        linear = found.setdefault(key, LinearKind(*key))
        linear.count += 1
        if linear.count == 1:
            _judge(linear, target, heads if target.component == "language" else None, source)
    return list(found.values())


def _judge(linear: LinearKind, target: Target, heads: Heads | None, source: Source) -> None:
    shape = (target.rows, target.columns)
    linear.refused = why_unserved(target.name, shape, source.config)
    leaf = leaf_of(target.name)
    row = leaf in ROW_PARALLEL
    experts = re.search(r"\.experts\.", target.name) is not None
    linear.layer = "FusedMoE" if experts else "RowParallelLinear" if row else LAYERS.get(leaf, "ColumnParallelLinear")
    for size in SIZES:
        linear.cuts[size] = why_not_cut(leaf, linear.rows, linear.columns, linear.format, size, heads)
        if linear.cuts[size] and row:
            linear.fitting[size] = fitting_groups(linear.columns, linear.format, size)


def leaf_of(name: str) -> str:
    """The last part of a linear's name, with the one before it where that is needed ("mlp.2")."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def why_not_cut(leaf: str, rows: int, columns: int, format: WeightFormat, size: int, heads: Heads | None) -> str | None:
    """Why a weight [rows, columns] cannot be served by `size` ranks, or None when it can. `heads` of the decoder;
    None elsewhere."""
    if leaf in ROW_PARALLEL:
        if columns % size:
            return f"{columns} columns do not divide by {size}"
        if format.part(columns, columns // size) is None:
            return f"groups of {format.group_size} cannot be cut into {columns // size} columns for each rank"
        return None
    query, key = heads or (size, size)
    if leaf == "q_proj" and query % size:
        return f"{query} attention heads do not divide by {size}"
    if leaf in ("k_proj", "v_proj") and heads:
        if max(key, size) % min(key, size):
            return f"{key} key and value heads can be neither divided among nor shared by {size} ranks"
        return None
    return f"{rows} rows do not divide by {size}" if rows % size else None


def fitting_groups(columns: int, format: WeightFormat, size: int) -> list[int]:
    """The usual group sizes with which `columns` can be cut into `size` parts; -1 is one group per row."""
    if columns % size:
        return []
    formats = [WeightFormat(format.bits, group, format.symmetric) for group in GROUPS]
    return [f.group_size for f in formats if f.part(columns, columns // size)]
