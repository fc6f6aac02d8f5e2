"""A phase of a run and what it holds, and the sizes of a module that the phases are made of."""

from dataclasses import dataclass, field

import torch

from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.plan.memory.load import FLOAT, Load

# tensors of a token that are alive at once, counted in the forward passes of Qwen2's layers and tower
ATTENTION_GRAPH, MLP_GRAPH, MLP = 12, 5, 3


@dataclass
class Phase:
    """Bytes by what they are for, in the host's memory and on the device."""

    name: str
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """The sizes of a component's layer.

    shapes: [rows, columns] of its linears. parameters: all of them. inner, width: the greatest number of features
    inside it and of what it passes on, per token of the decoder, or per patch of the tower.
    """

    shapes: dict[str, tuple[int, int]]
    parameters: int
    inner: int
    width: int

    @property
    def bytes(self) -> int:
        """In float32."""
        return FLOAT * self.parameters

    @property
    def linears(self) -> int:
        """Bytes of all linears' weights in float32."""
        return FLOAT * sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def biggest(self) -> int:
        """Bytes of the largest linear's weight in float32."""
        return FLOAT * max(rows * columns for rows, columns in self.shapes.values())

    @property
    def graph(self) -> int:
        """Bytes of a token's activations in the layer's graph."""
        return FLOAT * (ATTENTION_GRAPH * self.width + MLP_GRAPH * self.inner)

    @property
    def activations(self) -> int:
        """Bytes of a token's activations in a forward pass."""
        return FLOAT * (MLP * self.inner + self.width)


def layer_of(source: Source, component: str, name: str, load: Load) -> Layer:
    """The layer with the in-memory name `name`; a connector, which joins patches, per patch."""
    module = source.model.get_submodule(name)
    shapes = {linear: tuple(module.get_submodule(linear).weight.shape) for linear in linears_of(module)}
    inner, width = widest(module)[0], hidden_size(source)
    if component != "language":
        width = widest(source.model.get_submodule(source.family.blocks)[0])[1]
    if component == "connector":
        inner = -(-inner // load.patches)
    return Layer(shapes, numel(module), inner, width)


def widest(layer: torch.nn.Module) -> tuple[int, int]:
    """The greatest and the least number of columns of a layer's linears."""
    columns = [layer.get_submodule(name).in_features for name in linears_of(layer)]
    return max(columns), min(columns)


def hidden_size(source: Source) -> int:
    return source.model.config.get_text_config().hidden_size


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
