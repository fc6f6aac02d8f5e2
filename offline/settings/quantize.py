"""Everything that decides the numbers of a quantisation run, checked before any work."""

from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.settings.overrides import KEPT, exception

METHODS = ("rtn", "awq", "gptq", "vlmq", "qvlm")
# Which token weights a method takes, the first unless another is given.
SALIENCY = {
    "rtn": ("none",),
    "awq": ("none", "modality", "qig"),
    "gptq": ("none", "modality", "qig", "vlmq"),
    "vlmq": ("vlmq",),
    "qvlm": ("none",),
}
BITS = (2, 3, 4, 8)
COMPONENTS = ("language", "vision", "connector")
# What measured best on the demo model at each width (NOTES.md has the table); a setting that is given wins.
BEST = {
    2: {"act_order": "none", "grid": "mse", "base": "aligned", "damp": 0.01, "saliency_scope": "all"},
    3: {"act_order": "static", "grid": "mse", "base": "aligned", "damp": 0.01, "saliency_scope": "attention"},
    4: {"act_order": "static", "grid": "mse", "base": "aligned", "damp": 0.01, "saliency_scope": "attention"},
    8: {"act_order": "static", "grid": "mse", "base": "aligned", "damp": 0.01, "saliency_scope": "attention"},
}
ALPHA = {"gptaq": 0.25, "aligned": 1.0}  # the first is its authors', the second measured best
CHOICES = {
    "bits": BITS,
    "vision_bits": (*BITS, KEPT),
    "connector_bits": (*BITS, KEPT),
    "activation_bits": (8, KEPT),
    "method": METHODS,
    "scale_loss": ("mae", "mse"),
    "base": ("gptq", "gptaq", "aligned"),
    "act_order": ("static", "none"),
    "grid": ("mse", "mse-h", "minmax"),
    "saliency_power": (1, 2),
    "saliency_scope": ("attention", "all"),
    "saliency_fallback": ("ones", "rtn"),
}


@dataclass(frozen=True)
class Settings:
    """Options of `vlmq quantize`. Those that are None take the value that measured best for `bits` (`BEST`).

    bits, group_size, symmetric: the format of every decoder linear. vision_bits, connector_bits: width of the vision
    tower's blocks and of the connector, 16 for leaving them alone.
    modules: exceptions, from a linear's name in the files, or a pattern of names (`*`), to its width, or to a mapping
    that gives some of bits, group_size and symmetric; a later one wins. One without bits leaves alone what is at 16.
    activation_bits: 8 for rounding what every quantised linear gets, per token, when it is served; 16 for not.
    method: "rtn" rounds to nearest; "awq" scales the decoder's channels, searches clipped ranges and rounds; "gptq"
    compensates (with base "gptq" unless another is given); "vlmq" does so with its own token weights; "qvlm" searches
    ranges for several layers jointly.
    saliency: token weights: "none", "vlmq" (gradient of a local loss), "modality" (MBQ: vision against answer tokens),
    "qig" (integrated gradients of the rounding error); which of them a method takes says `SALIENCY`. They stand in the
    second moments, those of "awq" in the search for scales alone.
    scale_loss: of AWQ's search: mean absolute ("mae") or squared ("mse") error.
    base, alpha, damp, act_order: of methods that compensate (gptq, vlmq); others do without.
    base: "gptq" reproduces the layer on the inputs it gets; "gptaq" and "aligned" aim at the full-precision layer's
    outputs with the share `alpha` of the residual, column by column as its authors do, or in closed form beforehand.
    samples, max_tokens: how many calibration samples, and the longest that is used; longer ones are left out whole.
    max_pixels: larger pictures are shrunk to this many pixels; 0 leaves them.
    damp: part of mean(diag H) that is added to the diagonal of H before it is factorised.
    act_order: treat columns by falling diag H ("static": groups stay as in the file) or in file order ("none").
    grid: scales from a group's range ("minmax"), by the least |error|^2.4 over shrunk ranges ("mse"), or by the least
    squared error weighted with diag H ("mse-h", without H plain squares). Method awq tries its scales on it and clips
    the final ranges by a search of its own; its default is "minmax", as its authors have it. Q-VLM moves on from it.
    saliency_power: p in lambda = g^p; 2 is version 2 of the VLMQ paper, 1 is version 1.
    saliency_scope: "attention" weights q, k, v and o (the paper), "all" gate, up and down too.
    saliency_fallback: where there is no signal: tokens count alike ("ones") or by the error of rounded weights ("rtn").
    saliency_floor, saliency_cap: bounds of g / mean g; 0 is none.
    force: quantise also what vLLM would not load.
    """

    bits: int = 3
    group_size: int = 128
    symmetric: bool = False
    vision_bits: int = KEPT
    connector_bits: int = KEPT
    activation_bits: int = KEPT
    method: str = "vlmq"
    saliency: str | None = None
    scale_loss: str = "mae"
    base: str | None = None
    alpha: float | None = None
    samples: int = 128
    max_tokens: int = 2048
    max_pixels: int = 0
    seed: int = 42
    damp: float | None = None
    act_order: str | None = None
    grid: str | None = None
    saliency_power: int = 2
    saliency_scope: str | None = None
    saliency_fallback: str = "ones"
    saliency_floor: float = 0.0
    saliency_cap: float = 0.0
    force: bool = False
    modules: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        best = BEST.get(self.bits, {}) | ({} if self.method == "vlmq" else {"base": "gptq"})
        best["saliency"] = SALIENCY.get(self.method, ("none",))[0]
        if self.method == "awq":
            best["grid"] = "minmax"
        for name, value in best.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.alpha is None:
            object.__setattr__(self, "alpha", ALPHA.get(self.base, 0.0))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise QuantizeError(f"{name} is {getattr(self, name)}; choose one of {', '.join(map(str, allowed))}")
        if self.saliency not in SALIENCY[self.method]:
            taken = " or ".join(SALIENCY[self.method])
            raise QuantizeError(
                f"saliency is {self.saliency}; method {self.method} takes {taken} (--method gptq takes all of them)"
            )
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise QuantizeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("saliency_floor", "saliency_cap", "max_pixels"):
            if not getattr(self, name) >= 0:
                raise QuantizeError(f"{name} is {getattr(self, name)}; it must not be negative (0 is none)")
        if 0 < self.saliency_cap < self.saliency_floor:
            raise QuantizeError(
                f"saliency_cap is {self.saliency_cap}, below saliency_floor ({self.saliency_floor}): every token would "
                "count the same; make it larger, or 0 for none"
            )
        if not 0 <= self.alpha <= 1:
            raise QuantizeError(f"alpha is {self.alpha}; it must lie between 0 and 1")
        if not 0 < self.damp < 1:
            raise QuantizeError(f"damp is {self.damp}; it must lie between 0 and 1 (usual: 0.01)")
        try:
            for component in COMPONENTS:
                self.format_of(component)
        except ValueError as error:
            raise QuantizeError(str(error)) from None
        for pattern in self.modules:
            exception(pattern, self.modules[pattern], self.format, self.format)
        if self.activation_bits != KEPT:
            self._check_activations()

    @property
    def rounds(self) -> bool:
        """Whether a linear that nothing is searched for is rounded to nearest as it comes."""
        return self.method in ("rtn", "qvlm")

    @property
    def residual(self) -> bool:
        """Whether the second moments need the full-precision inputs beside the quantised ones."""
        return self.base != "gptq" and self.method in ("gptq", "vlmq")

    @property
    def paired(self) -> bool:
        """Whether the decoder needs a full-precision stream beside the quantised one."""
        rounded = self.activation_bits != KEPT and self.saliency == "qig"
        return self.residual or rounded or self.saliency == "vlmq" or self.method == "qvlm"

    @property
    def needs_kinds(self) -> bool:
        """Whether tokens of answers and of pictures must be told apart."""
        return self.saliency == "modality" or (self.method == "qvlm" and bool(self.vision_bits != KEPT or self.modules))

    @property
    def sequential(self) -> bool:
        """Whether a layer is calibrated on what the quantised layers before it give. AWQ's own code does not, unless
        activations are rounded."""
        return self.method != "awq" or self.activation_bits != KEPT

    @property
    def format(self) -> WeightFormat:
        """The format of the decoder's linears."""
        return WeightFormat(self.bits, self.group_size, self.symmetric)

    def format_of(self, component: str) -> WeightFormat | None:
        """The format of a component's linears, None where they stay as they are."""
        bits = {"language": self.bits, "vision": self.vision_bits, "connector": self.connector_bits}[component]
        return None if bits == KEPT else replace(self.format, bits=bits)

    def format_for(self, component: str, module: str) -> WeightFormat | None:
        """The format of the linear of that name in the files, None where it stays as it is."""
        format = self.format_of(component)
        for pattern in self.modules:
            if fnmatchcase(module, pattern):
                format = exception(pattern, self.modules[pattern], format, self.format)
        return format

    def _check_activations(self) -> None:
        """Raises QuantizeError for what cannot be served with rounded activations."""
        if self.method == "qvlm":
            raise QuantizeError("method qvlm searches weights alone here; leave activation_bits at 16")
        widths = [self.bits, self.vision_bits, self.connector_bits]
        exceptions = (exception(pattern, found, self.format, self.format) for pattern, found in self.modules.items())
        widths += [format.bits for format in exceptions if format]
        if narrow := [bits for bits in widths if bits not in (4, 8, KEPT)]:
            raise QuantizeError(
                f"activation_bits is {self.activation_bits} with weights of {narrow[0]} bits; activations are rounded "
                "with weights of 4 and 8 bits only"
            )

    def to_dict(self) -> dict:
        return asdict(self)
