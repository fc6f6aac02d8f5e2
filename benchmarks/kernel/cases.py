"""Lists the products that the kernel benchmark measures, in their order, and computes what each one moves.

A layer is a weight [rows, columns] = [N, K] of a decoder block of Qwen2-VL or Qwen2.5-VL; a case is its product with
`tokens` rows of x at one width, with activations of 16 bits or, where int8 tensor cores take over, of 8. Numbers and
arithmetic only: no torch here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    model: str
    name: str
    columns: int
    rows: int

    @property
    def label(self) -> str:
        return f"{self.model}-{self.name}"


LAYERS = (
    Layer("7b", "qkv", 3584, 4608),
    Layer("7b", "o", 3584, 3584),
    Layer("7b", "gate_up", 3584, 37888),
    Layer("7b", "down", 18944, 3584),
    Layer("32b", "qkv", 5120, 7168),
    Layer("32b", "o", 5120, 5120),
    Layer("32b", "gate_up", 5120, 55296),
    Layer("32b", "down", 27648, 5120),
    Layer("72b", "qkv", 8192, 10240),
    Layer("72b", "o", 8192, 8192),
    Layer("72b", "gate_up", 8192, 59136),
    Layer("72b", "down", 29568, 8192),
)
NAMES = sorted({name for layer in LAYERS for name in (layer.label, layer.model, layer.name)})
BITS = (4, 2, 3)
INT8_BITS = (8, 4)  # of weights for activations of 8 bits
INT8_FROM = 128  # tokens, as in `vlmq_vllm.kernels.dispatch`: fewer are no int8 product
BYTES_PER_MICROSECOND, OPERATIONS_PER_MICROSECOND = 4.3e6, 7.9e8  # of an H200, whose int8 is twice as fast
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
MLP, ATTENTION = ("gate_up", "down"), ("qkv", "o")
TELLING = (1, 8, 16, 64)
PARTS = {  # of the cases: which numbers of tokens, with activations of how many bits
    "telling": (lambda tokens: tokens in TELLING, 16),
    "others": (lambda tokens: tokens not in TELLING, 16),
    "int8": (lambda tokens: tokens >= INT8_FROM, 8),
}
# What time may run out for comes last: (model, layers, part).
ORDER = (
    ("7b", MLP, "telling"),
    ("7b", ATTENTION, "telling"),
    ("7b", MLP + ATTENTION, "others"),
    ("7b", MLP + ATTENTION, "int8"),
    ("72b", MLP, "telling"),
    ("32b", MLP, "telling"),
    ("72b", MLP, "others"),
    ("32b", MLP, "others"),
    *((model, ATTENTION, part) for part in ("telling", "others") for model in ("72b", "32b")),
    *((model, MLP + ATTENTION, "int8") for model in ("72b", "32b")),
)


@dataclass(frozen=True)
class Case:
    """One product; 16 bits stand for the dense weight."""

    layer: Layer
    bits: int
    tokens: int
    activations: int = 16  # bits

    @property
    def label(self) -> str:
        return f"{self.layer.label} {width(self.bits, self.activations)} M={self.tokens}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.layer.rows * self.layer.columns

    @property
    def floor(self) -> float:
        """About the microseconds that no kernel can beat on the fastest card meant here; sizes the CUDA graphs."""
        operations = self.operations * self.activations / 16
        return max(self.moved_bytes() / BYTES_PER_MICROSECOND, operations / OPERATIONS_PER_MICROSECOND)

    def moved_bytes(self, group_size: int = 128, symmetric: bool = True) -> int:
        """Bytes that any kernel must read or write: weight, x and the result, of 16 bits each but the codes.

        Activations of 8 bits are a byte each and a scale of four for each token. Counted from the format, so that a
        packing with padding does not look faster for reading it.
        """
        given = self.layer.columns + 4 if self.activations == 8 else 2 * self.layer.columns
        activations = self.tokens * (given + 2 * self.layer.rows)
        return activations + weight_bytes(self.layer, self.bits, group_of(self.bits, group_size), symmetric)


def weight_bytes(layer: Layer, bits: int, group_size: int = 128, symmetric: bool = True) -> int:
    """Codes, 16-bit scales and, if asymmetric, zero points of `bits`; no scales for a dense weight of 16 bits."""
    dense = layer.rows * layer.columns * bits // 8
    if bits == 16:
        return dense
    groups = 1 if group_size == -1 else -(-layer.columns // group_size)
    return dense + layer.rows * groups * 2 + (0 if symmetric else layer.rows * groups * bits // 8)


def width(bits: int, activations: int) -> str:
    """W4 or W4A8."""
    return f"W{bits}" if activations == 16 else f"W{bits}A{activations}"


def group_of(bits: int, group_size: int) -> int:
    """Group size of a weight: at 8 bits one scale per row, which is all that other int8 products take."""
    return -1 if bits == 8 else group_size


def gigabytes_per_second(count: int, microseconds: float) -> float:
    return count / microseconds / 1e3


@dataclass(frozen=True)
class Block:
    """Cases of one weight."""

    layer: Layer
    bits: int
    tokens: tuple[int, ...]
    activations: int = 16

    @property
    def label(self) -> str:
        return f"{self.layer.label} {width(self.bits, self.activations)}"

    @property
    def cases(self) -> list[Case]:
        return [Case(self.layer, self.bits, tokens, self.activations) for tokens in self.tokens]


def chosen(names: list[str]) -> list[Layer]:
    """Layers by label ("7b-down"), model ("7b") or name ("down"); all for no names."""
    return [layer for layer in LAYERS if not names or {layer.label, layer.model, layer.name} & set(names)]


def ordered(layers: list[Layer], bits: list[int], tokens: list[int], int8_bits: list[int]) -> list[Block]:
    """All cases, the important ones first; of `int8_bits` with activations of 8 bits, of `bits` with 16."""
    blocks = []
    for model, names, part in ORDER:
        belongs, activations = PARTS[part]
        some = tuple(filter(belongs, tokens))
        wanted = [layer for name in names for layer in layers if (layer.model, layer.name) == (model, name)]
        widths = int8_bits if activations == 8 else bits
        blocks += [Block(layer, count, some, activations) for layer in wanted for count in widths if some]
    return blocks
