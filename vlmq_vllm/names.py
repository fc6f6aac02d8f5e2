"""Finds, by name, the modules of a checkpoint that a vLLM layer is made of.

Three name spaces meet here. A checkpoint says `model.layers.0.self_attn.q_proj`; vLLM builds that weight as part of a
fused layer with the prefix `language_model.model.layers.0.self_attn.qkv_proj`; between them lie the mappers with which
vLLM renames tensors, plain functions here. The mappers of an outer and an inner model arrive one after the other and
the inner one may be written for names without the outer prefix, so every stage of the chain is indexed and the earliest
stage wins.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

# Ends in a part name: vLLM's rules such as `lm_head.` and `.mlp.fc1.` end in a dot and never match a bare module name.
SUFFIX = ".weight_packed"

# vLLM fills its own table (packed_modules_mapping) only when the language model is built, after many vision towers.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv": ("q", "k", "v"),
    "kv_proj": ("k_proj", "v_proj"),
}

# transformers' parameter of all experts, which models publish, too -> the projections whose outputs it holds for each
# expert, one after the other. vlmq packs every projection of every expert alone.
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

Mapper = Callable[[str], str | None]


class ModuleTable:
    """Index of the quantised modules of a checkpoint by every name under which vLLM may ask for them."""

    def __init__(self, modules: Iterable[str], mappers: Sequence[Mapper] = ()) -> None:
        """Raises ValueError when one stage of the mapper chain gives two modules the same name."""
        names = {module: module for module in modules}
        self._index = dict(names)
        for mapper in mappers:
            names = {module: _rename(name, mapper) for module, name in names.items()}
            inverse: dict[str, str] = {}
            for module, name in names.items():
                if inverse.setdefault(name, module) != module:
                    raise ValueError(
                        f"vLLM renames {inverse[name]} and {module} both to {name}; one checkpoint cannot hold both, "
                        "remove one of them"
                    )
            self._index = inverse | self._index

    def shards(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> tuple[str | None, ...]:
        """Checkpoint modules of the layer `prefix`, in vLLM's order; None stands for a shard that is not quantised.

        One entry for a layer that is one tensor on disk, fused or not; no entries when nothing of it is quantised.
        `packed` is vLLM's packed_modules_mapping.
        """
        if prefix in self._index:
            return (self._index[prefix],)
        parent, dot, leaf = prefix.rpartition(".")
        for table in (packed, FUSED):
            found = tuple(self._index.get(f"{parent}{dot}{member}") for member in table.get(leaf, ()))
            if any(found):
                return found
        if leaf != "lm_head":
            return ()
        # Some models ask for `lm_head`, others for `language_model.lm_head`: take the only one there is.
        heads = {module for name, module in self._index.items() if name.rpartition(".")[2] == "lm_head"}
        return tuple(heads) if len(heads) == 1 else ()

    def experts(self, prefix: str) -> dict[tuple[int, str], str]:
        """(expert, projection) -> checkpoint module of the mixture of experts `prefix`; empty when it has none."""
        found = {}
        for name, module in self._index.items():
            if name.startswith(prefix + "."):
                expert, _, projection = name.removeprefix(prefix + ".").partition(".")
                if expert.isdecimal():
                    found[int(expert), projection] = module
        return found


def _rename(name: str, mapper: Mapper) -> str:
    """The module's next name. A rule that drops a tensor says nothing about the module's name: it stays."""
    mapped = mapper(name + SUFFIX)
    return mapped.removesuffix(SUFFIX) if mapped and mapped.endswith(SUFFIX) else name
