"""Tells whether a run may go on with a study: compares what decides its numbers.

Which widths, methods, parts and configurations there are decides nothing: each is a row of its own. Calibration decides
nothing as long as there is none: a study of methods that need none may get it later.
"""

import hashlib
from pathlib import Path

import torch

from vlmq_vllm.errors import RefusedError
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.run.resume import identity
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.settings.sweep import StudySettings

LATER = ("calibration", "max_pixels")  # what calibration adds; None without
# Digests, and what they come from.
CONTENT = {
    "model": "MODEL",
    "calibration": "--calibration, --calibration-samples and --seed",
    "held-out": "--data, --samples and --seed",
}


def identify(
    source: Source,
    settings: StudySettings,
    components: list[str],
    device: torch.device,
    taught: list[str],
    asked: list[str],
) -> dict:
    """The identity of a study. taught, asked: fingerprints of the calibration and the held-out chats."""
    found = identity(source, Settings(), taught, device, Ranks(device))
    shared, own = ("model", "version", "torch", "transformers", "device"), ("group_size", "symmetric", "max_tokens")
    return {name: found[name] for name in shared} | {
        **{name: getattr(settings, name) for name in (*own, "dtype")},
        "calibration": found["data"] if taught else None,
        "max_pixels": settings.max_pixels if taught else None,
        "held-out": hashlib.sha256("".join(asked).encode()).hexdigest(),
        "components": components,
    }


def continued(folder: Path, before: dict, now: dict) -> dict:
    """The identity of the study in `folder` when a run of identity `now` goes on with it. Raises RefusedError where it
    is another study, and names what differs."""
    later = "calibration" in before and before["calibration"] is None
    fixed = before | ({name: now[name] for name in LATER} if later else {})
    for name in sorted(now.keys() | fixed.keys()):
        had, has = fixed.get(name), now.get(name)
        if had != has and name in CONTENT:
            raise RefusedError(
                f"the study in {folder} has another {name}: give the same {CONTENT[name]}, with their files as they "
                "were, or choose another folder"
            )
        if had != has:
            raise RefusedError(
                f"the study in {folder} had {name} {had}, this run has {has}; give the same, or choose another folder"
            )
    return now if later and now["calibration"] is not None else before
