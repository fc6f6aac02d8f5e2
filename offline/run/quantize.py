"""Runs a quantisation from beginning to end: reads samples, quantises one unit after the other, writes each, finishes.

A run that was stopped goes on where it was (`resume`): finished units are read back from their files, and the streams
move past them by running the layers again, which costs a forward pass instead of a solve and gives the same numbers.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

import vlmq_vllm
from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.errors import QuantizeError, StoppedError
from vlmq_vllm.offline.checkpoint.writer import Parts, Writer, check_destination
from vlmq_vllm.offline.data.calibration import Samples, read_samples
from vlmq_vllm.offline.data.read import check_exists
from vlmq_vllm.offline.machine.device import device_of
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.solution import Row
from vlmq_vllm.offline.model.capture import check_replay
from vlmq_vllm.offline.model.source import Source, find
from vlmq_vllm.offline.model.targets import ORDER, Unit, expected_bytes, find_kept, find_rest, find_targets, find_units
from vlmq_vllm.offline.run.begin import Quantizers
from vlmq_vllm.offline.run.resume import identity, reader
from vlmq_vllm.offline.settings.methods import ENOUGH_TOKENS
from vlmq_vllm.offline.settings.quantize import Settings

log = logging.getLogger(__name__)


def quantize(
    model: str,
    out: Path,
    data: str | Path | None,
    settings: Settings,
    device: str = "cpu",
    progress: Progress | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Quantise `model` (a folder or hub name) into the new folder `out`.

    `data` is anything that `data/read.py` reads; methods that round to nearest go without. When `stop`, which is asked
    between units, says yes, the run ends with StoppedError and can be resumed. Raises QuantizeError or CheckpointError.
    """
    check_destination(out)
    if settings.row.calibrated and data is None:
        raise QuantizeError(f"method {settings.method!r} needs calibration data; give --data FILE.jsonl")
    if data is not None:
        check_exists(data)
    place = device_of(device)
    return _Run(Source(find(model)), settings, place, progress or Progress(), stop).run(out, data, resume)


class _Run:
    """One run."""

    def __init__(
        self, source: Source, settings: Settings, device: torch.device, progress: Progress, stop: Callable[[], bool]
    ) -> None:
        self.source, self.settings, self.device, self.progress, self.stop = source, settings, device, progress, stop
        self.ranks = Ranks(device)
        if settings.rotate:
            source.rotate(settings.seed, device)
        self.units = find_units(source, settings)
        self.targets = find_targets(source, settings, self.units)
        self.kept = find_kept(source, self.targets, self.units)
        self.rest = find_rest(source, self.targets, self.kept)
        self.formats = {target.name: target.format for target in self.targets}
        self.columns = {target.module: target.columns for target in self.targets}
        self.samples = Samples()

    def run(self, out: Path, data: str | Path | None, resume: bool) -> list[Row]:
        if data is not None and self.settings.row.calibrated:
            self.samples = read_samples(data, self.source, self.settings, self.ranks, self.progress)
        self.quantizers = Quantizers(self.source, self.settings, self.formats, self.device, self.ranks, self.samples)
        keys = [*(unit.key for unit in self.units), *self.rest]
        if self.ranks.rank > 0:
            self.ranks.wait()  # for the writer
            self._solve(Parts(out, keys), None)
            return []
        same = identity(self.source, self.settings, self.samples.fingerprints, self.device, self.ranks)
        with Writer(out, expected_bytes(self.source, self.targets), keys, same, resume) as writer:
            self.ranks.wait()
            self._solve(writer, writer)
            for key, names in self.rest.items():
                if not writer.done(key):
                    writer.add(key, {name: self.source.read(name) for name in names})
            rows = [Row(**note) for note in writer.notes()]
            config = self.source.config | {"quantization_config": self._header()}
            calibration = {"fingerprints": self.samples.fingerprints}
            report = {"calibration": calibration, "modules": [asdict(row) for row in rows]}
            writer.finish(self.source.folder, config, report, yaml.safe_dump(self.settings.to_dict(), sort_keys=False))
        return rows

    def _solve(self, parts: Parts, writer: Writer | None) -> None:
        """Everything that all processes do; only the one with a writer writes."""
        if all(parts.done(unit.key) for unit in self.units):
            return
        self.source.quantized = reader(parts, self.source, self.targets, self.units)
        if self.samples.probe is not None:
            check_replay(self.source, self.samples.probe, self.device)
        for component in ORDER:
            units = [unit for unit in self.units if unit.component == component]
            alone = [[replace(unit, index=0)] for unit in units]  # connectors: every one gets its inputs from the tower
            for stack in alone if component == "connector" else [units]:
                if not all(parts.done(unit.key) for unit in stack):
                    self._stack(component, stack, parts, writer)

    def _stack(self, component: str, units: list[Unit], parts: Parts, writer: Writer | None) -> None:
        """Quantise units that run one after the other."""
        moved = component != "vision" and any(unit.component != "language" for unit in self.units)
        quantizer = self.quantizers.begin(component, units, moved)
        if component == "language":
            self.samples.batches = []
        for unit in self.progress.track(units, f"quantising {component}"):
            if parts.done(unit.key):
                quantizer.replay(unit.module, unit.index)
                continue
            if self.ranks.any(self.stop()):
                raise StoppedError(f"stopped before {unit.module}; add --resume to the same command to go on")
            tensors, rows = quantizer.layer(unit.module, unit.index, unit is units[-1])
            if writer:
                kept = {name: self.source.read(name) for name in self.kept[unit.key]}
                writer.add(unit.key, kept | tensors, [asdict(row) for row in rows])
            self.ranks.wait()
            self.progress.say(_told(unit.module, rows, self.settings))
            _warn(rows, self.settings, self.columns)

    def _header(self) -> dict:
        """The quantization_config of config.json."""
        default = self.settings.format
        overrides = {target.module: target.format for target in self.targets if target.format != default}
        tool = {"name": "vlmq-vllm", "version": vlmq_vllm.__version__, "settings": self.settings.to_dict()}
        return QuantizationSpec(default, overrides, self.settings.activation_bits).to_dict(tool)


def _told(name: str, rows: list[Row], settings: Settings) -> str:
    """One finished layer."""
    losses = [row.loss for row in rows if row.loss is not None]
    summed = f", loss {sum(losses):.3g}" if losses else ""
    tokens = Counter(row.tokens for row in rows if row.tokens != "equal")
    noted = "".join(f", {count} with {what}" for what, count in tokens.items())
    if effective := [row.effective_tokens for row in rows if row.effective_tokens is not None]:
        noted += f" ({min(effective):.0f} effective tokens or more)"
    left = [row for row in rows if row.base and row.damp is not None and not row.refined]
    if settings.refine is None and left:
        noted += f", {len(left)} not refined: fewer than {ENOUGH_TOKENS} tokens for each column"
    return f"{name}: {len(rows)} linears{summed}{noted}"


def _warn(rows: list[Row], settings: Settings, columns: dict[str, int]) -> None:
    """Name, on every console, linears that needed more than the given damping or were not solved, and the one whose
    token weights leave the fewest effective tokens for its columns (by name in the files), where they are too few."""
    effective = [(row.effective_tokens, row.module) for row in rows if row.effective_tokens and row.base]
    few = [(count, module) for count, module in effective if count < columns[module]]
    if few:  # one line a layer, of the worst
        count, module = min(few)
        advice = "lower --saliency-cap or raise --samples" if settings.saliency == "vlmq" else "raise --samples"
        told = "%s: token weights leave %.0f effective tokens for %d columns; %s"
        log.warning(told, module, count, columns[module], advice)
    for row in rows:
        if row.damp is not None and row.damp > settings.damp:
            log.warning("%s needed a damping of %.2g instead of %.2g", row.module, row.damp, settings.damp)
        if row.loss is not None and row.damp is None:
            log.warning("%s was rounded to nearest: its Hessian stayed singular under damping", row.module)
