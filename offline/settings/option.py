"""Declares an option once: the field of a settings class holds its type, default, help and what it may be.

All that names options reads these fields: the signatures of commands (`commands/options.py`), recipes (`recipe.py`),
the checks of values below, and the reference in `docs/`. A class of settings is taken by one kind of run, so the class
that a field stands in says which commands take the option.
"""

from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin

from vlmq_vllm.errors import QuantizeError


@dataclass(frozen=True)
class Option:
    """name: in settings and recipes. type: annotation of the field. default: a value, or None where the run decides.

    help: what it decides. choices: all values that there are, or () where there are more; of a tuple its members.
    least: smallest number, or None. panel: heading under which the command line shows it. recipe_only: commands do not
    offer it.
    """

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple = ()
    least: float | None = None
    panel: str = "Options"
    recipe_only: bool = False

    @property
    def several(self) -> bool:
        """Whether it is a list of values, which the command line writes with commas."""
        return any(get_origin(part) is tuple for part in (self.type, *get_args(self.type)))


def option(default: Any, help: str, choices: tuple = (), **about: Any) -> Any:
    """A field of a settings class, for `options_of`; the parameters are those of Option."""
    metadata = {"help": help, "choices": choices, **about}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(settings: type) -> dict[str, Option]:
    """The options of a settings class by name, in the order in which they are declared."""
    return {
        one.name: Option(one.name, one.type, {} if one.type is dict else one.default, **one.metadata)
        for one in fields(settings)
    }


def check_options(settings: Any) -> None:
    """Raises QuantizeError for the first value that is none of its option's choices, or below its least.

    None passes wherever it is the default.
    """
    for name, declared in options_of(type(settings)).items():
        value = getattr(settings, name)
        if value is None and declared.default is None:
            continue
        allowed = ", ".join(map(str, declared.choices))
        if isinstance(value, tuple):
            if not value or set(value) - set(declared.choices):
                wrong = next((str(one) for one in value if one not in declared.choices), "empty")
                raise QuantizeError(f"{name} is {wrong}; choose among {allowed}")
        elif declared.choices and value not in declared.choices:
            raise QuantizeError(f"{name} is {value}; choose one of {allowed}")
        if declared.least is not None and not value >= declared.least:
            rule = f"be at least {declared.least}" if declared.least else "not be negative"
            raise QuantizeError(f"{name} is {value}; it must {rule}")
