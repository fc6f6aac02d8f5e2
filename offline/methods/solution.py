"""A solved weight with what is said of it: its way between processes, and its row in the report of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vlmq_vllm.format import QuantizedWeight, WeightFormat


@dataclass(frozen=True)
class Solution:
    """A solved weight. loss [O]: weighted squared output error per token of each row, as the solver saw it (in GPTAQ's
    case against the moved targets), None where nothing is solved. damp: what was needed (None: the Hessian could not be
    factorised and the weight was rounded to nearest). dead: inputs that were always zero. refined: rounds of new scales
    and codes that the solver added."""

    weight: QuantizedWeight
    loss: torch.Tensor | None
    damp: float | None
    dead: int
    refined: int = 0

    @classmethod
    def empty(
        cls, format: WeightFormat, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> "Solution":
        """A place for a solution that another process found, see `exchanged`."""
        groups = format.groups(columns)
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        scale = torch.zeros(rows, groups, dtype=dtype, device=device)
        zero = None if format.symmetric else torch.zeros(rows, groups, dtype=torch.uint8, device=device)
        return cls(QuantizedWeight(format, codes, scale, zero), torch.zeros(rows, device=device), None, 0)

    def exchanged(self, broadcast: Callable[[torch.Tensor], None]) -> "Solution":
        """The solution after every tensor of it went through `broadcast`, which overwrites it with the owner's."""
        numbers = torch.tensor([-1.0 if self.damp is None else self.damp, self.dead, self.refined], dtype=torch.float64)
        numbers = numbers.to(self.weight.codes.device)
        for tensor in (self.weight.codes, self.weight.scale, self.weight.zero, self.loss, numbers):
            if tensor is not None:
                broadcast(tensor)
        damp, dead, refined = numbers.tolist()
        return replace(self, damp=None if damp < 0 else damp, dead=int(dead), refined=int(refined))

    def split(self, rows: list[int]) -> list["Solution"]:
        """The solutions of weights that were solved as one, stacked along O."""
        w = self.weight
        zeros, losses = _split(w.zero, rows), _split(self.loss, rows)
        parts = zip(w.codes.split(rows), w.scale.split(rows), zeros, losses, strict=True)
        return [
            replace(self, weight=QuantizedWeight(w.format, codes, scale, zero), loss=loss)
            for codes, scale, zero, loss in parts
        ]


def _split(tensor: torch.Tensor | None, rows: list[int]) -> Sequence[torch.Tensor | None]:
    return [None] * len(rows) if tensor is None else tensor.split(rows)


@dataclass(frozen=True)
class Row:
    """A linear in the report: `loss` per token and row, `damp`, `dead` and `refined` as in Solution (None and 0 where
    nothing is solved).

    tokens: "saliency" or "modality" where tokens were weighted ("saliency of rounding" by the fallback "rtn"), "no
    signal" where they should have been but all gradients are zero or some not finite, "equal" elsewhere. base: as in
    the settings, but "gptq" for experts; None where nothing is compensated. scaling: the exponent of AWQ's channel
    scales, None where channels cannot be scaled. effective_tokens: how many tokens of equal weight would say as much,
    None where all count alike.
    """

    module: str
    loss: float | None
    damp: float | None
    dead: int
    tokens: str
    base: str | None
    scaling: float | None = None
    effective_tokens: float | None = None
    refined: int = 0
