"""Exceptions that end a command: one line that says what was found and what to do. Imports nothing."""


class CheckpointError(ValueError):
    """A model folder that is not what it says it is; the message names the file or tensor."""


class QuantizeError(ValueError):
    """A quantisation that cannot be done as asked; nothing half-written is left."""


class RefusedError(QuantizeError):
    """The request is clear but cannot be carried out: not enough room, a layer that no engine would serve."""


class StoppedError(Exception):
    """A run that was asked to stop and did so between two layers; it can be resumed. Exit code 75."""
