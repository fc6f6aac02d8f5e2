"""The table of methods: what each one needs of a run, as data. Nothing else compares names of methods.

A row says how codes are chosen, which token weights go with the method and what it does to a layer before; the rest of
the program asks the row. The algorithms are in `methods/`, and `run/begin.py` starts what a row names.
"""

from dataclasses import dataclass, field
from typing import Literal

Rounding = Literal["nearest", "clipped", "compensated", "joint"]
NEAREST: Rounding = "nearest"
CLIPPED: Rounding = "clipped"
COMPENSATED: Rounding = "compensated"
JOINT: Rounding = "joint"
COMPENSATION = ("base", "alpha", "damp", "act_order", "refine")


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    help: what it does, in a few words. rounding: how codes are chosen: "nearest" rounds without calibration data,
    "clipped" searches clipped ranges by the Hessian and rounds, "compensated" lets later columns make good the errors
    of earlier ones (GPTQ), "joint" searches the ranges of several layers together (Q-VLM). token_weights: those of
    TOKEN_WEIGHTS that it takes, its default first. scales_channels: channel scales are searched and folded into a layer
    before it is rounded (AWQ). sequential: a layer is calibrated on what the quantised layers before it give.
    rounds_activations: goes with activations of 8 bits. studied: `vlmq sweep` takes it. defaults: settings that differ
    from BEST. options: those that methods without them do not read.
    """

    help: str
    rounding: Rounding
    token_weights: tuple[str, ...] = ("none",)
    scales_channels: bool = False
    sequential: bool = True
    rounds_activations: bool = True
    studied: bool = False
    defaults: dict = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration data."""
        return self.rounding != NEAREST

    @property
    def compensates(self) -> bool:
        """Whether later columns make good the errors of earlier ones."""
        return self.rounding == COMPENSATED

    @property
    def solves(self) -> bool:
        """Whether each linear is solved from the Hessian of its inputs, not rounded as it comes."""
        return self.rounding in (CLIPPED, COMPENSATED)

    @property
    def joint(self) -> bool:
        """Whether layers are searched together, by quantisers of the method's own, on a full-precision stream as
        well."""
        return self.rounding == JOINT


@dataclass(frozen=True)
class TokenWeights:
    """A row of TOKEN_WEIGHTS.

    help: what weighs tokens. paired: needs the full-precision stream beside the quantised one; paired_if_rounded: only
    where activations are rounded. labelled: tokens of answers and of pictures must be told apart. effective: the least
    share of tokens that they leave effective in a layer, as measured on a real language model (NOTES.md); None: not
    measured. options: settings that nothing else reads.
    """

    help: str
    paired: bool = False
    paired_if_rounded: bool = False
    labelled: bool = False
    effective: float | None = None
    options: tuple[str, ...] = ()


METHODS = {
    "rtn": Method("rounds to nearest", NEAREST, studied=True, defaults={"base": "gptq"}),
    "awq": Method(
        "scales the decoder's channels, searches clipped ranges and rounds",
        CLIPPED,
        ("none", "modality", "qig"),
        scales_channels=True,
        sequential=False,  # as in the authors' code
        studied=True,
        defaults={"base": "gptq", "grid": "minmax"},  # scales are tried on plain ranges, as its authors do
        options=("scale_loss",),
    ),
    "gptq": Method(
        "compensates rounding errors",
        COMPENSATED,
        ("none", "modality", "qig", "vlmq"),
        studied=True,
        defaults={"base": "gptq", "damp": 0.01, "refine": 0},  # as published
        options=COMPENSATION,
    ),
    "vlmq": Method("compensates, with token weights of its own", COMPENSATED, ("vlmq",), options=COMPENSATION),
    "qvlm": Method(
        "searches ranges for several layers jointly",
        JOINT,
        rounds_activations=False,
        defaults={"base": "gptq"},
    ),
}

TOKEN_WEIGHTS = {
    "none": TokenWeights("every token counts alike"),
    "vlmq": TokenWeights(
        "gradient of a local loss",
        paired=True,
        effective=0.4,
        options=("saliency_power", "saliency_scope", "saliency_fallback", "saliency_floor", "saliency_cap"),
    ),
    "modality": TokenWeights("MBQ: vision against answer tokens", labelled=True),
    "qig": TokenWeights("integrated gradients of the rounding error", paired_if_rounded=True),
}

ENOUGH_TOKENS = 6  # for each column: fewer leave the Hessian poorly known, and what fits it closely fits its noise

# What measured best by width, on the demo model and on a real language model (NOTES.md). A setting that is given wins,
# then a row's.
BEST = {
    2: {"act_order": "none", "grid": "mse", "base": "qep", "damp": 0.1, "saliency_scope": "attention"},
    3: {"act_order": "static", "grid": "mse", "base": "qep", "damp": 0.1, "saliency_scope": "attention"},
    4: {"act_order": "static", "grid": "mse", "base": "qep", "damp": 0.1, "saliency_scope": "attention"},
    8: {"act_order": "static", "grid": "mse", "base": "qep", "damp": 0.1, "saliency_scope": "attention"},
}
ALPHA = {"gptq": 0.0, "gptaq": 0.25, "qep": 1.0}  # by base: GPTAQ's is its authors', qep measured best


def defaults_of(method: str, bits: int) -> dict:
    """The settings that a run with this method and width has unless they are given."""
    return BEST[bits] | {"saliency": METHODS[method].token_weights[0]} | METHODS[method].defaults


def unread(method: str, saliency: str, names: list[str]) -> list[str]:
    """Which of these settings a run with this method and these token weights does not read."""
    rows: list[Method | TokenWeights] = [*METHODS.values(), *TOKEN_WEIGHTS.values()]
    special = {name for row in rows for name in row.options}
    read = {*METHODS[method].options, *TOKEN_WEIGHTS[saliency].options}
    return [name for name in names if name in special - read]
