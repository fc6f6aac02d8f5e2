"""Predicts the peak memory of `vlmq quantize`, phase by phase, each term named after what it holds.

A phase gives what lies in the host's memory whatever the device is (pixel values, files) and what lies on the device
(streams, weights in float32, Hessians, the solver's working set). On a CPU both are one memory. Methods and token
weights of which `settings/methods.py` says so are forecast; of the others every component has one phase "at most", the
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
    Streams,
    layer_of,
    numel,
    streams_of,
    widest,
)
from vlmq_vllm.offline.plan.solver import Stage, moments_bytes, stages_of, working_bytes
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


@dataclass
class Phase:
    """Bytes by what they are for, in the host's memory and on the device."""

    name: str
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)


def is_forecast(settings: Settings) -> bool:
    """Whether memory is forecast within 20 %; else peaks are upper bounds."""
    return settings.row.forecast and TOKEN_WEIGHTS[settings.saliency].forecast


class Memory:
    """Memory of a run. exact: the device is a CPU: factors in float64."""

    def __init__(self, source: Source, settings: Settings, load: Load, exact: bool) -> None:
        self.source, self.settings, self.load, self.exact = source, settings, load, exact
        self.pixels = {"pixels of batches": load.total * load.pixels}

    def phases(self, units: list[Unit], rest: dict[str, list[str]]) -> list[Phase]:
        """The phases of a run over `units`. rest: names of the other tensors, by file."""
        settings, load = self.settings, self.load
        phases = []
        if load.samples:  # pixel values of samples and, while they are put together, of batches
            prepared = {"pixels of samples and batches": 2 * load.total * load.pixels}
            phases += [Phase("prepare samples", prepared), self._replaying()]
        moved = any(unit.component != "language" for unit in units)
        for component in ORDER:
            own = [unit for unit in units if unit.component == component]
            if not own:
                continue
            largest = max(own, key=lambda unit: numel(self.source.model.get_submodule(unit.module)))
            layer = layer_of(self.source, component, largest.module, load)
            streams = streams_of(settings, component, layer.width, load, moved)
            if load.samples and (component == "language" or settings.row.solves):
                phases.append(self._capturing(component, streams))
            if not is_forecast(settings):
                phases.append(self._bound(component, layer, len(own), streams))
            elif settings.row.solves:
                phases += self._solving(component, layer, streams)
            else:  # every linear is rounded as it comes; originals stay until the layer is done
                terms = {"streams": 0, "layer in float32": layer.bytes, "originals": layer.linears}
                phases.append(Phase(f"{component}: round", {}, terms | {"codes": ROUNDING * layer.biggest}))
        # a file of unquantised tensors, mapped from the source and from what is read back
        written = max((sum(stored_bytes(self.source, name) for name in names) for names in rest.values()), default=0)
        phases.append(Phase("write what is left", {"tensors and their copy": 2 * written}))
        if settings.rotate:
            size = self.source.parsed.get_text_config().hidden_size
            for phase in phases:  # the matrix, and a part of the embeddings before and after it
                phase.device["rotation"] = FLOAT * size * (size + 2 * ROTATED_ROWS)
        return phases

    def _before_decoder(self, name: str, load: Load) -> Phase:
        """What runs before the decoder, one batch in the tower: embeddings, tower (large ones by block), connectors."""
        family, model = self.source.family, self.source.model
        tower, blocks = model.get_submodule(family.vision), list(self.source.stack(family.blocks))
        resident = FLOAT * numel(tower)
        if self.exact and resident > RESIDENT:
            resident -= FLOAT * (sum(map(numel, blocks)) - max(map(numel, blocks)))
        outside = [name for name in family.connectors if not name.startswith(family.vision + ".")]
        resident += sum(FLOAT * numel(model.get_submodule(name)) for name in outside)
        inner, width = widest(blocks[0])
        activations = load.batch * load.patches * FLOAT * (ATTENTION_GRAPH // 2 * width + MLP * inner)
        # the embeddings are a mapped file, of which only rows that occur get into memory
        table = stored_bytes(self.source, self.source.places[f"{family.embed}.weight"].tensor)
        device = {
            "embeddings": min(table, load.total * AROUND),
            "vision tower and connector": resident,
            "activations of the tower": activations + load.batch * load.pixels,
        }
        return Phase(name, dict(self.pixels), device)

    def _capturing(self, component: str, streams: Streams) -> Phase:
        """What runs before the decoder, and streams that have been captured. Those of other components are gone."""
        phase = self._before_decoder(f"{component}: capture inputs", self.load)
        if component == "vision":  # stubs are in the place of its blocks
            phase.device["activations of the tower"] = self.load.batch * self.load.pixels
        phase.device["streams"] = streams.captured
        return phase

    def _replaying(self) -> Phase:
        """`check_replay` on one sample: what runs before the decoder, a layer of it, and the activations twice."""
        load, layers = self.load, self.source.layers()
        phase = self._before_decoder("check the replay", replace(load, samples=1))
        number = max(range(len(layers)), key=lambda i: numel(layers[i]))
        layer = layer_of(self.source, "language", f"{self.source.family.layers}.{number}", load)
        phase.device |= {
            "layer in float32": layer.bytes,
            "activations of a sample": load.tokens * FLOAT * (2 * (1 + load.terms) * layer.width + MLP * layer.inner),
        }
        return phase

    def _solving(self, component: str, layer: LayerSize, streams: Streams) -> list[Phase]:
        """One layer: tokens are weighed, then every stage collects Hessians and is solved, beside the streams."""
        settings, decoder = self.settings, component == "language"
        batch = self.load.batch * (1 if decoder else self.load.patches)  # of patches where inputs are patches
        host = {} if decoder else self.pixels  # needed for what comes later
        held = {"streams": streams.between, "layer in float32": layer.bytes}
        phases = []
        weighted = decoder and TOKEN_WEIGHTS[settings.saliency].paired
        apart = set()
        if weighted:
            scope = settings.saliency_scope
            apart = set(weighted_linears(self.source.family, list(layer.shapes), scope))
            gradients = batch * layer.graph(layer.inner if scope == "all" else 0)
            phases.append(Phase(f"{component}: weigh tokens", host, held | {"gradients": gradients}))
        replaced = 0  # originals stay until both streams have moved on
        for stage in stages_of(layer.shapes, apart):
            moments, solver = self._solver(stage)
            # beside the layer's own: weighted inputs, and for a residual the other stream's inputs and the difference
            copies = (1 if weighted else 0) + (2 if self._base(stage) != "gptq" else 0)
            copies += ROUNDED_INPUTS if settings.activation_bits != KEPT else 0
            columns = max(problem.columns for problem in stage.problems)
            now = held | {"originals": replaced, "moments": moments}
            passing = {"activations of a batch": batch * (layer.activations + copies * FLOAT * columns)}
            phases.append(Phase(f"{component}: collect moments", host, now | passing))
            phases.append(Phase(f"{component}: solve", host, now | {"solver": solver}))
            replaced += stage.weights if settings.sequential else 0
        return phases

    def _base(self, stage: Stage) -> str:
        """No residual between the streams of several experts."""
        return self.settings.base if self.settings.residual and stage.groups == 1 else "gptq"

    def _solver(self, stage: Stage) -> tuple[int, int]:
        """Bytes of a stage's Hessians and residuals, and of what the solver needs beside them."""
        base, ordered = self._base(stage), self.settings.act_order == "static"
        return moments_bytes(stage.problems, base), working_bytes(stage.problems, base, self.exact, ordered)

    def _bound(self, component: str, layer: LayerSize, units: int, streams: Streams) -> Phase:
        """The sum of the largest things that can be alive at once while a component is quantised, whatever is known of
        when they are: a joint search holds the layers of a block, learning a tower all of its blocks."""
        load, row, decoder = self.load, self.settings.row, component == "language"
        depth = 1 if not row.joint else DEPTH if decoder else units
        graph = load.batch * (1 if decoder else load.patches) * layer.graph(layer.inner)
        phase = Phase("", dict(self.pixels)) if decoder or not row.joint else self._before_decoder("", load)
        phase.name = f"{component}: at most"
        phase.device |= {
            # two streams, targets and choices of every layer, the two best and what is computed
            "streams and copies of them": (2 * depth + 3) * streams.one,
            "layers and copies of them": depth * (layer.bytes + COPIES * layer.linears),
            "graphs": max(2, depth) * graph,
            "temporaries of searches": SLICES,
        }
        if row.solves:
            phase.device["moments and solver"] = max(sum(self._solver(one)) for one in stages_of(layer.shapes, set()))
        if row.scales_channels:
            phase.device["captured calls"] = 2 * min(load.total * layer.graph(layer.inner), BYTES + graph)
        if self.settings.needs_labels:
            phase.device |= self._answer_loss()
        return phase

    def _answer_loss(self) -> dict[str, int]:
        """A loss of answers and its gradients back through the decoder; a joint search looks at all states at once."""
        load, text = self.load, self.source.parsed.get_text_config()
        layer = layer_of(self.source, "language", f"{self.source.family.layers}.0", load)
        kept = FLOAT * layer.width * (len(self.source.layers()) + 1)
        tokens = load.total if self.settings.row.joint else min(load.total, LIMIT // kept + load.batch)
        return {
            "inputs of all decoder layers": (tokens + 4 * load.batch) * kept,
            "decoder layer and its graph": layer.bytes + load.batch * layer.graph(layer.inner),
            "head and logits": FLOAT * text.vocab_size * (2 * text.hidden_size + LOGITS * min(ROWS, load.batch)),
        }
