"""The settings of `vlmq quantize`: all that decides the numbers of a run, checked before any work.

Loads no torch, for `vlmq --help` reads the settings: the weight format, which does, is imported where it is made.
"""

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.settings.methods import ALPHA, BEST, ENOUGH_TOKENS, METHODS, TOKEN_WEIGHTS, Method, defaults_of
from vlmq_vllm.offline.settings.option import check_options, option
from vlmq_vllm.offline.settings.overrides import KEPT, override

if TYPE_CHECKING:
    from vlmq_vllm.format import WeightFormat

BITS = tuple(BEST)
COMPONENTS = ("language", "vision", "connector")
# Headings of --help.
formatting, method_option = partial(option, panel="Format"), partial(option, panel="Method")
calibration, weighting = partial(option, panel="Calibration data"), partial(option, panel="Token weights")
BY_WIDTH = "Default: what measured best for the width."
GROUPS = "Columns that share a scale, usually 32, 64 or 128; -1: all."
GRID_POINTS = "Without zero points, or with one per group."


def _listed(rows: dict) -> str:
    return "; ".join(f"{name}: {row.help}" for name, row in rows.items())


@dataclass(frozen=True)
class Settings:
    """Settings of `vlmq quantize` and `vlmq plan`.

    What is not given takes what measured best for `bits` and `method`; no field is None afterwards. Raises
    QuantizeError for a value that cannot be, and for settings that contradict each other.
    """

    bits: int = formatting(3, "Width of the decoder's weights.", BITS)
    group_size: int = formatting(128, GROUPS)
    symmetric: bool = formatting(False, GRID_POINTS)
    vision_bits: int = formatting(KEPT, f"Width of the vision tower's blocks; {KEPT}: as they are.", (*BITS, KEPT))
    connector_bits: int = formatting(KEPT, f"Width of the connector; {KEPT}: as it is.", (*BITS, KEPT))
    activation_bits: int = formatting(
        KEPT,
        f"8: round inputs of quantised layers per token when served (weights of 4 or 8 bits); {KEPT}: not.",
        (8, KEPT),
    )
    method: str = method_option("vlmq", f"How weights are quantised. {_listed(METHODS)}.", tuple(METHODS))
    saliency: str = weighting(
        None,
        f"Token weights. {_listed(TOKEN_WEIGHTS)}. They stand in the Hessian, those of awq in the search for channel "
        "scales alone; gptq takes all, awq all but vlmq. Default: none, for method vlmq its own.",
        tuple(TOKEN_WEIGHTS),
    )
    scale_loss: str = method_option(
        "mae", "Error in AWQ's search for channel scales: mean absolute or squared.", ("mae", "mse")
    )
    base: str = method_option(
        None,
        "gptq reproduces a layer on the inputs that it gets; gptaq (column by column, as its authors do) and qep "
        "(in closed form beforehand, as QEP does) aim at the full-precision layer's outputs. Default: gptq, for method "
        "vlmq what measured best for the width.",
        tuple(ALPHA),
    )
    alpha: float = method_option(None, "Share of the residual between both streams that gptaq (0.25) and qep (1) use.")
    samples: int = calibration(128, "Calibration samples to use.", least=1)
    max_tokens: int = calibration(2048, "Leave out longer samples, whole.", least=1)
    max_pixels: int = calibration(0, "Shrink larger pictures to this; 0: leave them.", least=0)
    seed: int = calibration(42, "Decides which samples are drawn, and the rotation.")
    rotate: bool = method_option(
        False,
        "Turn the decoder's residual stream and values by random orthogonal matrices, folded into the weights "
        "(QuaRot, SpinQuant: R1 and R2); an lm_head that was tied to the embeddings becomes a matrix of its own.",
    )
    damp: float = method_option(None, f"Part of the Hessian's mean diagonal that is added to its diagonal. {BY_WIDTH}")
    act_order: str = method_option(
        None,
        "Order of columns: static, by falling diagonal of the Hessian with groups as in the file; none, as in the "
        f"file. {BY_WIDTH}",
        ("static", "none"),
    )
    refine: int = method_option(
        None,
        "Rounds of new scales (least squares) and new codes (coordinate descent) after a weight is compensated. "
        f"Default: 2 with method vlmq where a weight has {ENOUGH_TOKENS} calibration tokens or more for each column "
        "(fewer are fitted too closely), else 0. Not with base gptaq.",
        least=0,
    )
    grid: str = method_option(
        None,
        "Scales from a group's range (minmax), by the least |error|^2.4 over shrunk ranges (mse), or by the least "
        f"squared error weighted with the Hessian's diagonal (mse-h). {BY_WIDTH} awq: minmax, and it clips by itself.",
        ("mse", "mse-h", "minmax"),
    )
    saliency_power: int = weighting(
        2, "p in the token weight g^p: 2 is version 2 of the VLMQ paper, 1 version 1.", (1, 2)
    )
    saliency_scope: str = weighting(
        None,
        f"Projections with token weights: attention (the paper), or all for gate, up and down too. {BY_WIDTH}",
        ("attention", "all"),
    )
    saliency_fallback: str = weighting(
        "ones",
        "Without a signal: tokens count alike (ones), or by the error of rounded weights (rtn).",
        ("ones", "rtn"),
    )
    saliency_floor: float = weighting(0.0, "g is raised to this many medians of the positive g; 0: not.", least=0)
    saliency_cap: float = weighting(
        3.0,
        "g is cut at this many medians of the positive g, so that a few tokens (attention sinks) cannot have the whole "
        "weight; 0: not, as in the paper.",
        least=0,
    )
    force: bool = formatting(False, "Take also layers that vLLM would not load.")
    modules: dict = option(
        {},
        "Overrides: from a linear's name in the files, or a pattern of names (*), to its width, or to a mapping of "
        "some of bits, group_size and symmetric; a later one wins. One without bits leaves alone what is at 16.",
        recipe_only=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        best = defaults_of(self.method, self.bits)
        base = self.base or best["base"]
        best["alpha"] = ALPHA[base]
        if base == "gptaq":  # its targets do not stay
            best["refine"] = 0
        for name, value in best.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.saliency not in self.row.token_weights:
            taken = " or ".join(self.row.token_weights)
            raise QuantizeError(
                f"saliency is {self.saliency}; method {self.method} takes {taken} (--method gptq takes all of them)"
            )
        if 0 < self.saliency_cap < self.saliency_floor:
            raise QuantizeError(
                f"saliency_cap is {self.saliency_cap}, below saliency_floor ({self.saliency_floor}): every token would "
                "count the same; make it larger, or 0 for none"
            )
        if self.base == "gptaq" and self.refine:
            raise QuantizeError(
                "refine starts from targets that stay, and base gptaq moves them column by column; choose base qep or "
                "gptq, or refine 0"
            )
        if not 0 <= self.alpha <= 1:
            raise QuantizeError(f"alpha is {self.alpha}; it must lie between 0 and 1")
        if not 0 < self.damp < 1:
            raise QuantizeError(f"damp is {self.damp}; it must lie between 0 and 1 (usual: 0.01 to 0.1)")
        self._check_formats()

    @property
    def row(self) -> Method:
        """What the method needs."""
        return METHODS[self.method]

    @property
    def residual(self) -> bool:
        """Whether the solver needs the full-precision inputs beside the quantised ones."""
        return self.base != "gptq" and self.row.compensates

    @property
    def paired(self) -> bool:
        """Whether the decoder needs a full-precision stream beside the quantised one."""
        weights = TOKEN_WEIGHTS[self.saliency]
        rounded = self.activation_bits != KEPT and weights.paired_if_rounded
        return self.residual or rounded or weights.paired or self.row.joint

    @property
    def needs_labels(self) -> bool:
        """Whether tokens of answers and of pictures must be told apart: some token weights do so, and a joint search
        when it learns the tower's bounds by the loss of answers."""
        learns_tower = self.row.joint and bool(self.vision_bits != KEPT or self.modules)
        return TOKEN_WEIGHTS[self.saliency].labelled or learns_tower

    @property
    def sequential(self) -> bool:
        """Whether a layer is calibrated on what the quantised layers before it give; always where activations are
        rounded."""
        return self.row.sequential or self.activation_bits != KEPT

    @property
    def format(self) -> "WeightFormat":
        """The format of the decoder's linears."""
        from vlmq_vllm.format import WeightFormat

        return WeightFormat(self.bits, self.group_size, self.symmetric)

    def format_of(self, component: str) -> "WeightFormat | None":
        """The format of a component's linears, None where they stay as they are."""
        bits = {"language": self.bits, "vision": self.vision_bits, "connector": self.connector_bits}[component]
        return None if bits == KEPT else replace(self.format, bits=bits)

    def format_for(self, component: str, module: str) -> "WeightFormat | None":
        """The format of the linear of that name in the files, None where it stays as it is."""
        format = self.format_of(component)
        for pattern in self.modules:
            if fnmatchcase(module, pattern):
                format = override(pattern, self.modules[pattern], format, self.format)
        return format

    def _check_formats(self) -> None:
        """Raises QuantizeError for a width and group that do not go together, for an override that cannot be, and for
        what cannot be served with rounded activations."""
        try:
            formats = [self.format_of(component) for component in COMPONENTS]
        except ValueError as error:
            raise QuantizeError(str(error)) from None
        formats += [override(pattern, found, self.format, self.format) for pattern, found in self.modules.items()]
        if self.activation_bits == KEPT:
            return
        if not self.row.rounds_activations:
            raise QuantizeError(f"method {self.method} searches weights alone here; leave activation_bits at {KEPT}")
        if narrow := [format.bits for format in formats if format and format.bits not in (4, 8)]:
            raise QuantizeError(
                f"activation_bits is {self.activation_bits} with weights of {narrow[0]} bits; activations are rounded "
                "with weights of 4 and 8 bits only"
            )

    def to_dict(self) -> dict:
        return asdict(self)
