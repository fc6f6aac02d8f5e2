"""Tells whether a run may go on with a study: compares what decides its numbers, and names the options that differ.

identity.json holds what decides, much of it as digests, and under "asked" the options that it comes from, which only
make messages. Which widths, methods, parts and configurations there are decides nothing: each is a row of its own.
Calibration decides nothing as long as there is none: a study of methods that need none may get it later.
"""

import hashlib
from pathlib import Path

import torch

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.run.resume import identity
from vlmq_vllm.offline.settings.methods import METHODS
from vlmq_vllm.offline.settings.quantize import BITS
from vlmq_vllm.offline.settings.sweep import STUDIED, StudySettings

LATER = ("calibration", "max_pixels")  # what calibration adds; None without
# Which options decide an entry; others are decided by the option of their name, or by none.
CAUSES = {
    "calibration": ("calibration", "calibration_samples", "seed"),
    "held-out": ("data", "samples", "seed"),
}
CONTENT = {"model": "the files of the model", "calibration": "the calibration chats", "held-out": "the held-out chats"}
# Of the identity of a checkpoint's run; the last ones decide nothing here.
LEFT = ("bits", "method", "threads", "processes", "data", "samples", "seed", "rotate", "saliency_floor", "saliency_cap")


def identify(
    source: Source,
    settings: StudySettings,
    components: list[str],
    device: torch.device,
    taught: list[str],
    asked: list[str],
    places: dict[str, str | None],
) -> dict:
    """The identity of a study. taught, asked: fingerprints of the calibration and the held-out chats. places: "model",
    "data" and "calibration" as they were given."""
    method = next(name for name in STUDIED if METHODS[name].compensates)
    base = settings.of(method, max(BITS))  # one for all studies, of a width that takes every group size
    found = identity(source, base, taught, device, Ranks(device))
    options = ("seed", "samples", "calibration_samples", "group_size", "symmetric", "max_tokens", "max_pixels", "dtype")
    calibrated = places["calibration"] is not None
    return {name: value for name, value in found.items() if name not in LEFT} | {
        "calibration": found["data"] if calibrated else None,
        "max_pixels": settings.max_pixels if calibrated else None,
        "held-out": hashlib.sha256("".join(asked).encode()).hexdigest(),
        "max_tokens": settings.max_tokens,
        "dtype": settings.dtype,
        "components": components,
        "asked": places
        | {name: getattr(settings, name) for name in options}
        | {"components": components, "device": device.type},
    }


def continued(folder: Path, before: dict, now: dict) -> dict:
    """The identity of the study in `folder` when a run of identity `now` goes on with it. Raises RefusedError, which
    names the options, where it is another study."""
    later = "calibration" in before and before["calibration"] is None
    fixed = before | ({name: now[name] for name in LATER} if later else {})
    differing = [name for name in now.keys() | fixed.keys() if name != "asked" and now.get(name) != fixed.get(name)]
    if differing:
        raise RefusedError(f"the study in {folder} {_why(before, now, sorted(differing))}, or choose another folder")
    return now if later and now["calibration"] is not None else before


def _why(before: dict, now: dict, differing: list[str]) -> str:
    """What was found, what there is now, and what to do."""
    then, asked = before.get("asked", {}), now["asked"]
    options = [option for name in differing for option in CAUSES.get(name, (name,)) if option in asked]
    options = [option for option in dict.fromkeys(options) if then.get(option) != asked[option]]
    if options:
        had, has = (", ".join(_option(name, given.get(name)) for name in options) for given in (then, asked))
        return f"was begun with {had}; this run has {has}: give what it was begun with"
    name = next((name for name in differing if name in CONTENT), differing[0])
    if name in CONTENT:
        place = asked["data" if name == "held-out" else name]
        return f"was begun with other contents of {place}: {CONTENT[name]} have changed; put them back"
    named = "vlmq-vllm" if name == "version" else name
    return f"was begun with {named} {before.get(name)}; here is {now.get(name)}: go on with what it was begun with"


def _option(name: str, value: object) -> str:
    """As it stands in a command."""
    option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {option}"
    if value is True:
        return option
    return f"{option} {','.join(value) if isinstance(value, list) else value}"
