"""A small evaluator of PTX: the few instructions of `kernels/unpack.py`, on many 32-bit registers at once.

Values are int64 tensors of 32-bit patterns. An fma on pairs of 16-bit floats is done in float64, where product and sum
of such floats are exact, and rounded once to the result's type, as the instruction rounds.
"""

import re

import torch

DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run(text: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What the text leaves in $0 when $1, $2, ... hold `inputs`, int64 [n] each."""
    values = {f"${i}": value for i, value in enumerate(inputs, start=1)}
    body = re.fullmatch(r"\{\.reg \.b32 [a-z, ]+;(.*)\}", text).group(1)
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, arguments = line.split(maxsplit=1)
        target, *sources = (word.strip() for word in arguments.split(","))
        operands = [values[word] if word in values else torch.tensor(int(word, 0)) for word in sources]
        values[target] = _execute(name, operands)
    return values["$0"]


def _execute(name: str, operands: list[torch.Tensor]) -> torch.Tensor:
    if name == "mov.b32":
        return operands[0]
    if name == "shr.u32":
        return operands[0] >> operands[1]
    if name == "prmt.b32":
        return _prmt(operands[0], operands[1], int(operands[2]))
    if name == "lop3.b32":
        return _lop3(*operands[:3], int(operands[3]))
    kind = re.fullmatch(r"fma\.rn\.(bf16x2|f16x2)", name).group(1)
    a, b, c = (_halves(operand, DTYPES[kind]) for operand in operands)
    low, high = (_bits((a[i] * b[i] + c[i]).to(DTYPES[kind])) for i in range(2))
    return low | high << 16


def _lop3(a, b, c, table: int) -> torch.Tensor:
    """The Boolean function of three bits whose truth table this is: entry 4a + 2b + c."""
    result = torch.zeros((), dtype=torch.int64)
    for entry in range(8):
        if table >> entry & 1:
            term = (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
            result = result | term & 0xFFFFFFFF
    return result


def _prmt(a, b, selector: int) -> torch.Tensor:
    """Four bytes, chosen by the selector's hexadecimal digits from those of a (0 to 3) and b (4 to 7)."""
    source = a | b << 32
    chosen = [source >> 8 * (selector >> 4 * i & 7) & 0xFF for i in range(4)]
    return chosen[0] | chosen[1] << 8 | chosen[2] << 16 | chosen[3] << 24


def _halves(pattern: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        (half & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double() for half in (pattern, pattern >> 16)
    )


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int16).long() & 0xFFFF
