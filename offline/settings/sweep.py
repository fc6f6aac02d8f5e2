"""The settings of `vlmq sweep`, checked before anything is read."""

from dataclasses import dataclass
from typing import Any

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.methods import METHODS
from vlmq_vllm.offline.settings.option import check_options, option
from vlmq_vllm.offline.settings.quantize import BITS, COMPONENTS, GRID_POINTS, GROUPS, KEPT, Settings

STUDIED = tuple(name for name, row in METHODS.items() if row.studied)
BY = ("component", "third", "kind", "layer", "module")
DESIGNS = ("one", "grid", "random")
DTYPES = ("float32", "bfloat16", "float16")
# One solver for every width and method, so that nothing but the grids of AWQ's trials differs between configurations.
SOLVER: dict[str, Any] = {"base": "gptq", "act_order": "static", "damp": 0.01}
DESIGN, FORMAT, DATA = "Study", "Format", "Data"  # panels of --help


@dataclass(frozen=True)
class StudySettings:
    """Settings of `vlmq sweep`. Raises QuantizeError for a value that cannot be."""

    bits: tuple[int, ...] = option((2, 3, 4), f"Widths that parts are given, besides {KEPT}.", BITS, panel=FORMAT)
    methods: tuple[str, ...] = option(
        ("rtn", "gptq"), "How weights are rounded; each method is a study of its own.", STUDIED, panel=DESIGN
    )
    by: str = option("component", "What a part is.", BY, panel=DESIGN)
    design: str = option(
        "one", "one part at a time; grid: all combinations; random: some of them.", DESIGNS, panel=DESIGN
    )
    runs: int = option(128, "Configurations of a random design; the most that a grid may have.", least=1, panel=DESIGN)
    components: tuple[str, ...] | None = option(
        None,
        "Components that are studied. Default: all that can be served by component, else language; with --resume those "
        "that the study has.",
        COMPONENTS,
        panel=DESIGN,
    )
    group_size: int = option(128, GROUPS, panel=FORMAT)
    symmetric: bool = option(False, GRID_POINTS, panel=FORMAT)
    budget: float | None = option(
        None,
        f"Also find widths of modules for so many bits per weight (below {KEPT}), on average over all linears of the "
        "components, scales and zero points included, and write a recipe.",
        panel=DESIGN,
    )
    samples: int | None = option(None, "Held-out chats to use, drawn by --seed. Default: all.", least=1, panel=DATA)
    calibration_samples: int = option(128, "Calibration chats to use.", least=1, panel=DATA)
    max_tokens: int = option(2048, "Leave out longer chats, held-out ones too.", least=1, panel=DATA)
    max_pixels: int = option(0, "Shrink larger calibration pictures to this; 0: leave them.", least=0, panel=DATA)
    dtype: str = option("float32", "Type in which the model is judged.", DTYPES, panel=DESIGN)
    seed: int = option(42, "Decides drawn chats, random designs and the forest.", panel=DATA)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(sorted(set(self.bits))))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        check_options(self)
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
