"""What a study may be asked for, checked before anything is read."""

from dataclasses import dataclass

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.quantize import BITS, COMPONENTS, KEPT, Settings

METHODS = ("rtn", "awq", "gptq")
BY = ("component", "third", "kind", "layer", "module")
DESIGNS = ("one", "grid", "random")
DTYPES = ("float32", "bfloat16", "float16")
# One solver for every width and method, so that nothing but the grids of AWQ's trials differs between configurations.
SOLVER = {"base": "gptq", "act_order": "static", "damp": 0.01}


@dataclass(frozen=True)
class StudySettings:
    """Options of `vlmq sweep`.

    bits: widths that parts are given, besides 16. methods: how weights are rounded, each in a study of its own.
    by: what a part is (`sweep/parts.py`). design: which configurations of the parts are run (`sweep/designs.py`); runs:
    how many of a random design, and the greatest number for a grid. components: to which the study is confined; None is
    all that can be served for "component", the decoder for the others, and in a study that is resumed those that it
    has. group_size, symmetric: of every quantised linear. budget: average bits per weight, scales and zero points
    included, over all linears of the study's components, for which a mixed recipe is sought; None for none. samples:
    held-out chats that are used; None for all. calibration_samples, max_tokens, max_pixels: as samples, max_tokens and
    max_pixels of `vlmq quantize`; longer held-out chats are left out too. dtype: of the evaluation.
    """

    bits: tuple[int, ...] = (2, 3, 4)
    methods: tuple[str, ...] = ("rtn", "gptq")
    by: str = "component"
    design: str = "one"
    runs: int = 128
    components: tuple[str, ...] | None = None
    group_size: int = 128
    symmetric: bool = False
    budget: float | None = None
    samples: int | None = None
    calibration_samples: int = 128
    max_tokens: int = 2048
    max_pixels: int = 0
    dtype: str = "float32"
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(sorted(set(self.bits))))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        several = {"bits": BITS, "methods": METHODS, "components": COMPONENTS}
        for name, allowed in several.items():
            found = getattr(self, name)
            if found is not None and (not found or set(found) - set(allowed)):
                wrong = next((str(value) for value in found if value not in allowed), "empty")
                raise QuantizeError(f"{name} is {wrong}; choose among {', '.join(map(str, allowed))}")
        for name, allowed in (("by", BY), ("design", DESIGNS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise QuantizeError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for name in ("runs", "samples", "calibration_samples", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QuantizeError(f"{name} is {value}; it must be at least 1")
        if self.max_pixels < 0:
            raise QuantizeError(f"max_pixels is {self.max_pixels}; it must not be negative (0 is none)")
        if self.budget is not None and not 0 < self.budget < KEPT:
            raise QuantizeError(
                f"budget is {self.budget}; give average bits per weight below {KEPT}, at which nothing would be "
                "quantised, such as 3.5"
            )
        for method in self.methods:
            for bits in self.bits:
                self.of(method, bits)

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths and 16."""
        return (*self.bits, KEPT)

    def of(self, method: str, bits: int) -> Settings:
        """The settings with which `vlmq quantize` would round every part to `bits`."""
        return Settings(bits=bits, group_size=self.group_size, symmetric=self.symmetric, method=method, **SOLVER)
