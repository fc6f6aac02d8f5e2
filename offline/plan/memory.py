"""Predicts the peak memory of `vlmq quantize`, phase by phase, each term named after what it holds.

A phase gives what lies in the host's memory whatever the device is (pixel values, files) and what lies on the device
(streams, weights in float32, Hessians, the solver's working set). On a CPU both are one memory. Methods that search
(AWQ, Q-VLM), token weights but VLMQ's and the base gptaq are not forecast: every component has one phase "at most", the
sum of the largest things that such a method may hold at once.
"""

from dataclasses import dataclass, field, replace

from vlmq_vllm.offline.methods.awq.losses import BYTES
from vlmq_vllm.offline.methods.qvlm.blocks import DEPTH
from vlmq_vllm.offline.methods.saliency.answer_loss import LIMIT, ROWS
from vlmq_vllm.offline.methods.saliency.vlmq import weighted_linears
from vlmq_vllm.offline.model.rotation import ROWS as ROTATED_ROWS
from vlmq_vllm.offline.model.source import RESIDENT, Source
from vlmq_vllm.offline.model.targets import ORDER, Unit, stored_bytes
from vlmq_vllm.offline.plan.sizes import (
    ATTENTION_GRAPH,
    FLOAT,
    MLP,
    LayerSize,
    Load,
    layer_of,
    numel,
    streams_of,
    widest,
)
from vlmq_vllm.offline.plan.solver import stages_of
from vlmq_vllm.offline.settings.methods import TOKEN_WEIGHTS
from vlmq_vllm.offline.settings.quantize import KEPT, Settings

# The interpreter with torch, transformers, the skeleton of a model, a processor and what kernels keep, as measured on
# small models with torch 2.13 for CPU and transformers 5.19. CUDA's own libraries come on top of it.
LIBRARIES = 840_000_000
AROUND = 1 << 16  # bytes that the kernel maps around a row of a file that is read
ROUNDING = 4  # float32 tensors of a weight's size at once where it is rounded to nearest
ROUNDED_INPUTS = 2  # tensors of a linear's input at once where it is rounded
# Of bounds: copies of a layer's weights (originals, folded, rounded, and while they are rounded), temporaries of any
# search in slices, and tensors [tokens, vocabulary] of a cross-entropy of capped logits with its gradient
COPIES, SLICES, LOGITS = 6, 1 << 27, 6
SOLVER = 4  # of bounds: moments, residuals and weights of a stage, so many times


@dataclass
class Phase:
    """Bytes by what they are for, in the host's memory and on the device."""

    name: str
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)


def is_forecast(settings: Settings) -> bool:
    """Whether memory is forecast within 20 %; else peaks are upper bounds."""
    row, weights = settings.row, TOKEN_WEIGHTS[settings.saliency]
    searches = row.joint or row.scales_channels or weights.labelled or weights.paired_if_rounded
    return not searches and not (settings.residual and settings.base == "gptaq")


class Memory:
    """Memory of a run. exact: the device is a CPU: factors in float64."""

    def __init__(self, source: Source, settings: Settings, load: Load, exact: bool) -> None:
        self.source, self.settings, self.load, self.exact = source, settings, load, exact
        self.pixels = {"pixels of batches": load.total * load.pixels}

    def phases(self, units: list[Unit], rest: dict[str, list[str]]) -> list[Phase]:
        """The phases of a run over `units`. rest: names of the other tensors, by file."""
        settings, load = self.settings, self.load
        # pixel values of samples and, while they are put together, of batches
        phases = [Phase("prepare samples", {"pixels of samples and batches": 2 * load.total * load.pixels})]
        moved = any(unit.component != "language" for unit in units)
        for component in ORDER:
            own = [unit for unit in units if unit.component == component]
            if not own:
                continue
            largest = max(own, key=lambda unit: numel(self.source.model.get_submodule(unit.module)))
            layer = layer_of(self.source, component, largest.module, load)
            captured, between = streams_of(settings, component, layer.width, load, moved)
            if load.samples and (component == "language" or settings.row.solves):
                phases.append(self._capturing(component, captured))
            if not is_forecast(settings):
                phases.append(self._bound(component, layer, len(own), captured))
            elif settings.row.solves:
                phases += self._solving(component, layer, between)
            else:  # every linear is rounded as it comes; originals stay until the layer is done
                codes = ROUNDING * FLOAT * max(rows * columns for rows, columns in layer.shapes.values())
                terms = {"streams": 0, "layer in float32": layer.bytes, "originals": layer.linears, "codes": codes}
                phases.append(Phase(f"{component}: round", {}, terms))
        # a file of unquantised tensors, mapped from the source and from what is read back
        written = max((sum(stored_bytes(self.source, name) for name in names) for names in rest.values()), default=0)
        phases.append(Phase("write what is left", {"tensors and their copy": 2 * written}))
        if settings.rotate:
            size = self.source.parsed.get_text_config().hidden_size
            for phase in phases:  # the matrix, and a part of the embeddings before and after it
                phase.device["rotation"] = FLOAT * size * (size + 2 * ROTATED_ROWS)
        return phases

    def _capturing(self, component: str, streams: int) -> Phase:
        """What runs before the decoder, one batch in the tower (a large one by block), and streams that have been
        captured. Those of other components are gone."""
        family, model, load = self.source.family, self.source.model, self.load
        tower, blocks = model.get_submodule(family.vision), list(self.source.stack(family.blocks))
        resident = FLOAT * numel(tower)
        if self.exact and resident > RESIDENT:
            resident -= FLOAT * (sum(map(numel, blocks)) - max(map(numel, blocks)))
        outside = [name for name in family.connectors if not name.startswith(family.vision + ".")]
        resident += sum(FLOAT * numel(model.get_submodule(name)) for name in outside)
        inner, width = widest(blocks[0])
        stubs = component == "vision"  # are in the place of its blocks
        activations = 0 if stubs else load.batch * load.patches * FLOAT * (ATTENTION_GRAPH // 2 * width + MLP * inner)
        # the embeddings are a mapped file, of which only rows that occur get into memory
        table = stored_bytes(self.source, self.source.places[f"{family.embed}.weight"].tensor)
        device = {
            "embeddings": min(table, load.total * AROUND),
            "vision tower and connector": resident,
            "activations of the tower": activations + load.batch * load.pixels,
            "streams": streams,
        }
        return Phase(f"{component}: capture inputs", dict(self.pixels), device)

    def _solving(self, component: str, layer: LayerSize, streams: int) -> list[Phase]:
        """One layer: every stage collects Hessians and is solved, beside the streams. Weighing tokens takes less."""
        settings, decoder = self.settings, component == "language"
        batch = self.load.batch * (1 if decoder else self.load.patches)  # of patches where inputs are patches
        host = {} if decoder else self.pixels  # needed for what comes later
        held = {"streams": streams, "layer in float32": layer.bytes}
        phases = []
        weighted = decoder and TOKEN_WEIGHTS[settings.saliency].paired
        apart = set()
        if weighted:
            apart = set(weighted_linears(self.source.family, list(layer.shapes), settings.saliency_scope))
        replaced = 0  # originals stay until both streams have moved on
        for stage in stages_of(layer.shapes, apart):
            residual = settings.residual and stage.groups == 1  # none between the streams of several experts
            # beside the layer's own: weighted inputs, and for a residual the other stream's inputs and the difference
            copies = (1 if weighted else 0) + (2 if residual else 0)
            copies += ROUNDED_INPUTS if settings.activation_bits != KEPT else 0
            columns = max(problem.columns for problem in stage.problems)
            now = held | {"originals": replaced, "moments": stage.moments(residual)}
            passing = {"activations of a batch": batch * (layer.activations + copies * FLOAT * columns)}
            phases.append(Phase(f"{component}: collect moments", host, now | passing))
            phases.append(Phase(f"{component}: solve", host, now | {"solver": stage.working(residual, self.exact)}))
            replaced += stage.weights if settings.sequential else 0
        return phases

    def _bound(self, component: str, layer: LayerSize, units: int, streams: int) -> Phase:
        """The sum of the largest things that can be alive at once while a component is quantised, whatever is known of
        when they are: a joint search holds the layers of a block, learning a tower all of its blocks."""
        load, row, decoder = self.load, self.settings.row, component == "language"
        depth = 1 if not row.joint else DEPTH if decoder else units
        graph = load.batch * (1 if decoder else load.patches) * layer.graph
        phase = replace(self._capturing(component, 0), name=f"{component}: at most")
        phase.device |= {
            # two streams, targets and choices of every layer, the two best and what is computed
            "streams and copies of them": (2 * depth + 3) * streams,
            "layers and copies of them": depth * (layer.bytes + COPIES * layer.linears),
            "graphs": max(2, depth) * graph,
            "temporaries of searches": SLICES,
        }
        if row.solves:
            problems = max(stage.moments(True) + stage.weights for stage in stages_of(layer.shapes, set()))
            phase.device["moments and solver"] = SOLVER * problems
        if row.scales_channels:
            phase.device["captured calls"] = 2 * min(load.total * layer.graph, BYTES + graph)
        if self.settings.needs_labels:
            # back through the decoder; a joint search looks at the inputs of all layers at once
            text, first = self.source.parsed.get_text_config(), f"{self.source.family.layers}.0"
            states = FLOAT * text.hidden_size * (len(self.source.layers()) + 1)
            tokens = load.total if row.joint else min(load.total, LIMIT // states + load.batch)
            through = layer_of(self.source, "language", first, load)
            phase.device["loss of answers and its gradients"] = (
                (tokens + 4 * load.batch) * states
                + (through.bytes + load.batch * through.graph)
                + FLOAT * text.vocab_size * (2 * text.hidden_size + LOGITS * min(ROWS, load.batch))
            )
        return phase
