"""Finds the rows and columns of each tensor in the files that a rank holds of a linear layer."""

from collections.abc import Sequence

from vlmq_vllm.checkpoint import ModuleInfo
from vlmq_vllm.packing import OWN, Packing
from vlmq_vllm.serving.segments import Layer, Segment

Rows = tuple[tuple[int, int], ...]


def segments_of(
    layer: Layer,
    shards: Sequence[tuple[str, ModuleInfo | None]],
    columns: int,
    outputs: Sequence[int],
    packing: Packing = OWN,
) -> list[Segment]:
    """Segments of a vLLM layer on its rank, of the checkpoint modules `shards` with what the headers say (None: kept at
    16 bits); `columns` and `outputs`: the layer's input size and output sizes on this rank. Raises ValueError."""
    pieces = _row_pieces(layer, outputs)
    if len(shards) == 1:
        pieces = [_joined(pieces)]
    if len(shards) != len(pieces):
        raise ValueError(
            f"{layer.prefix}: vLLM builds it of {len(pieces)} parts, the checkpoint has {len(shards)} "
            f"({', '.join(name for name, _ in shards)}); vlmq serves one tensor for each part or one for all, "
            "quantise without this layer"
        )
    start = layer.tp_rank * columns if layer.input_size > columns else 0
    segments = []
    for (name, info), (rows, total) in zip(shards, pieces, strict=True):
        padding = sum(outputs) - sum(stop - start for start, stop in rows) if _is_vocabulary(layer) else 0
        place = (total, layer.input_size), rows, (start, start + columns), padding, packing
        segments.append(Segment(layer.prefix, name, info, *place))
    return segments


def _is_vocabulary(layer: Layer) -> bool:
    return hasattr(layer, "org_vocab_size")


def _row_pieces(layer: Layer, outputs: Sequence[int]) -> list[tuple[Rows, int]]:
    """For every part of the layer the rows of this rank and the number of rows that all ranks have together."""
    if _is_vocabulary(layer):
        indices = layer.shard_indices
        return [(((indices.org_vocab_start_index, indices.org_vocab_end_index),), layer.org_vocab_size)]
    ranks = layer.output_size // sum(outputs)
    pieces: list[tuple[Rows, int]] = []
    for i, size in enumerate(outputs):
        # A rank that shares its key and value heads with others holds the same rows as they do.
        sharing = getattr(layer, "num_kv_head_replicas", 1) if i > 0 else 1
        start = layer.tp_rank // sharing * size if ranks > 1 else 0
        pieces.append((((start, start + size),), size * ranks // sharing))
    return pieces


def _joined(pieces: list[tuple[Rows, int]]) -> tuple[Rows, int]:
    """The pieces of a layer whose parts are stacked along the rows of one tensor on disk."""
    rows, total = [], 0
    for ranges, size in pieces:
        rows += [(total + start, total + stop) for start, stop in ranges]
        total += size
    if all(before[1] == after[0] for before, after in zip(rows, rows[1:], strict=False)):
        rows = [(rows[0][0], rows[-1][1])]
    return tuple(rows), total
