"""The settings of `vlmq sweep`, checked before anything is read."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.methods import METHODS
from vlmq_vllm.offline.settings.option import check_options, option
from vlmq_vllm.offline.settings.quantize import BITS, COMPONENTS, GRID_POINTS, GROUPS, KEPT, Settings

STUDIED = tuple(name for name, row in METHODS.items() if row.studied)
UNCALIBRATED = tuple(name for name in STUDIED if not METHODS[name].calibrated)
BY = ("component", "third", "kind", "layer", "module")
DTYPES = ("float32", "bfloat16", "float16")
# One solver for every width and method, so that nothing but the grids of AWQ's trials differs between configurations.
SOLVER: dict[str, Any] = {"base": "gptq", "act_order": "static", "damp": 0.01}
# Headings of --help.
studying, formatting, reading = (partial(option, panel=name) for name in ("Study", "Format", "Data"))


class Apart(Settings):
    """Settings of a run in which every linear is rounded on what the full-precision ones before it give."""

    @property
    def sequential(self) -> bool:
        return False


@dataclass(frozen=True)
class StudySettings:
    """Settings of `vlmq sweep`. Raises QuantizeError for a value that cannot be."""

    bits: tuple[int, ...] = formatting((2, 3, 4), f"Widths that parts are given, besides {KEPT}.", BITS)
    methods: tuple[str, ...] = studying(
        ("rtn", "gptq"), "How weights are rounded; each method is a study of its own.", STUDIED
    )
    by: str = studying("component", "What a part is.", BY)
    components: tuple[str, ...] | None = studying(
        None,
        "Components that are studied. Default: all that can be served by component, else language; with --resume those "
        "that the study has.",
        COMPONENTS,
    )
    group_size: int = formatting(128, GROUPS)
    symmetric: bool = formatting(False, GRID_POINTS)
    budget: float | None = studying(
        None,
        f"Also find widths of modules for so many bits per weight (below {KEPT}), on average over all linears of the "
        "components, scales and zero points included, and write a recipe (needs SciPy: the extra sweep).",
    )
    samples: int | None = reading(None, "Held-out chats to use, drawn by --seed. Default: all.", least=1)
    calibration_samples: int = reading(128, "Calibration chats to use.", least=1)
    max_tokens: int = reading(2048, "Leave out longer chats, held-out ones too.", least=1)
    max_pixels: int = reading(0, "Shrink larger calibration pictures to this; 0: leave them.", least=0)
    dtype: str = studying("float32", "Type in which the model is judged.", DTYPES)
    seed: int = reading(42, "Decides which chats are drawn.")

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
        """The settings with which every part is rounded to `bits`."""
        return Apart(bits=bits, group_size=self.group_size, symmetric=self.symmetric, method=method, **SOLVER)
