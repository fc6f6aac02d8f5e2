"""Per-module overrides of the weight format, by name or pattern, from a recipe."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmq_vllm.errors import QuantizeError

if TYPE_CHECKING:
    from vlmq_vllm.format import WeightFormat

KEPT = 16  # bits of what is left alone


def override(
    pattern: str, found: int | dict, format: "WeightFormat | None", default: "WeightFormat"
) -> "WeightFormat | None":
    """The format of a module of that pattern, which without it would have `format` (None: left alone).

    found: a width, or a mapping of some of bits, group_size and symmetric; what it does not say is as in `format`, or
    in `default` where that is None. Without bits it leaves alone what is. Raises QuantizeError for one that cannot be.
    """
    fields = found if isinstance(found, dict) else {"bits": found}
    if not (isinstance(pattern, str) and fields and fields.keys() <= {"bits", "group_size", "symmetric"}):
        raise QuantizeError(
            f"modules: {pattern!r} has {found!r}; give a width, or a mapping of bits, group_size and symmetric"
        )
    if fields.get("bits") == KEPT or (format is None and "bits" not in fields):
        return None
    try:
        return replace(format or default, **fields)
    except ValueError as error:
        raise QuantizeError(f"modules: {pattern!r}: {error}") from None
