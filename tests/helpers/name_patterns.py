"""Lists of module names written short: `layers.{0..27}.mlp.{0..1}` stands for the product of its ranges.

Fixtures are groups of names that belong together, such as a layer and what it is made of: tuples of patterns whose
n-th range is the same one, filled in with the same numbers.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
Group = tuple[str, ...]


def expand(patterns: Group) -> Iterator[Group]:
    """Every group of names that the patterns stand for; the first pattern must have all ranges."""
    ranges = [range(int(first), int(last) + 1) for first, last in RANGE.findall(patterns[0])]
    for numbers in itertools.product(*ranges):
        yield tuple(_fill(pattern, RANGE, numbers) for pattern in patterns)


def compact(groups: Iterable[Group]) -> list[Group]:
    """Patterns for groups of names: those that differ in numbers only, where the numbers make whole ranges."""
    alike: dict[Group, list[tuple[str, ...]]] = {}
    for group in groups:
        numbers = tuple(NUMBER.findall(group[0]))
        if any(tuple(NUMBER.findall(name)) != numbers for name in group):
            alike[group] = [()]
        else:
            alike.setdefault(tuple(NUMBER.sub("#", name) for name in group), []).append(numbers)
    return [pattern for shape, numbers in alike.items() for pattern in _ranges(shape, numbers)]


def _ranges(shape: Group, numbers: list[tuple[str, ...]]) -> list[Group]:
    """One pattern if `numbers` are the product of ranges, else a group for each of them."""
    columns = [sorted({int(number) for number in column}) for column in zip(*numbers, strict=True)]
    whole = all(len(column) == column[-1] - column[0] + 1 for column in columns)
    if whole and len(numbers) == len(set(itertools.product(*columns))):
        numbers = [tuple(_range(column) for column in columns)]
    return [tuple(_fill(name, re.compile("#"), each) for name in shape) for each in numbers]


def _range(column: list[int]) -> str:
    return str(column[0]) if len(column) == 1 else f"{{{column[0]}..{column[-1]}}}"


def _fill(pattern: str, place: re.Pattern, values: Iterable) -> str:
    values = iter(values)
    return place.sub(lambda _: str(next(values)), pattern)
