"""Everything that decides the numbers of a quantisation run, checked before any work."""

from dataclasses import asdict, dataclass

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat

METHODS = ("rtn", "gptq", "vlmq")
BITS = (2, 3, 4)


@dataclass(frozen=True)
class Settings:
    """Options of `vlmq quantize`.

    bits, group_size, symmetric: the format of every decoder linear.
    method: "rtn" rounds to nearest; "gptq" compensates with plain second moments; "vlmq" weights tokens by saliency.
    samples, max_tokens: how many calibration samples, and the longest that is used; longer ones are left out whole.
    damp: part of mean(diag H) that is added to the diagonal of H before it is inverted.
    act_order: treat columns by falling diag H ("static": groups stay as in the file) or in file order ("none").
    grid: scales from a group's range ("minmax") or by the least |error|^2.4 over shrunk ranges ("mse").
    saliency_power: p in lambda = g^p; 2 is version 2 of the VLMQ paper, 1 is version 1.
    """

    bits: int = 3
    group_size: int = 128
    symmetric: bool = False
    method: str = "vlmq"
    samples: int = 128
    max_tokens: int = 2048
    seed: int = 42
    damp: float = 0.01
    act_order: str = "static"
    grid: str = "mse"
    saliency_power: int = 2

    def __post_init__(self) -> None:
        choices = {
            "bits": BITS,
            "method": METHODS,
            "act_order": ("static", "none"),
            "grid": ("mse", "minmax"),
            "saliency_power": (1, 2),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise QuantizeError(f"{name} is {getattr(self, name)}; choose one of {', '.join(map(str, allowed))}")
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise QuantizeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.damp < 1:
            raise QuantizeError(f"damp is {self.damp}; it must lie between 0 and 1 (usual: 0.01)")
        try:
            self.format  # noqa: B018, the constructor checks
        except ValueError as error:
            raise QuantizeError(str(error)) from None

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(self.bits, self.group_size, self.symmetric)

    def to_dict(self) -> dict:
        return asdict(self)
