"""Memory of the streams in front of a stack: hidden states, and what comes with them (rotary tables, masks, DeepStack).

`run/begin.py` catches U behind what has been quantised before, and where a method needs it F behind originals. Where
nothing tells the two apart, F is caught together with U: hidden states are shared until a layer has run, what comes
with them for good. Behind a quantised tower or connector, and where U's inputs are rounded, F is caught apart and
everything is held twice.
"""

from dataclasses import dataclass

from vlmq_vllm.offline.plan.memory.load import FLOAT, Load
from vlmq_vllm.offline.settings.quantize import KEPT, Settings


@dataclass(frozen=True)
class Streams:
    """The streams of a component, of `states` bytes of hidden states and `others` bytes besides for one of them.

    paired: F beside U. apart: both have been caught apart.
    """

    states: int
    others: int
    paired: bool
    apart: bool

    @property
    def captured(self) -> int:
        """Bytes in front of the first layer."""
        return (self.states + self.others) * (2 if self.apart else 1)

    @property
    def walking(self) -> int:
        """Bytes behind it."""
        return self.states * (2 if self.paired else 1) + self.beside

    @property
    def beside(self) -> int:
        """Bytes of what comes with the hidden states."""
        return self.others * (2 if self.apart else 1)


def find_streams(settings: Settings, component: str, width: int, load: Load, moved: bool) -> Streams:
    """As in `Walks._streams`. width: features of a hidden state. moved: some of the tower or connector is quantised."""
    if component == "language":
        count, others, paired = load.total, load.kept + load.terms * width * FLOAT, settings.paired
    else:
        count, others, paired = load.total * load.patches, load.rotary, settings.residual
    if component == "connector":
        others = 0  # it is called with nothing else
    moved = moved and component != "vision" or settings.activation_bits != KEPT
    return Streams(count * width * FLOAT, count * others, paired, paired and moved)
