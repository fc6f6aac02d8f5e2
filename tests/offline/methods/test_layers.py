"""What token weights, the loss and rounded activations do to a layer of the demo model: files of runs that are stopped
after it, against the search for scales called directly and moments summed in float64.

Linears are compared stage by stage: what lies in front of a stage is what the run wrote.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from vlmq_vllm.errors import StoppedError
from vlmq_vllm.format import QuantizedWeight
from vlmq_vllm.offline.data.calibration import read_samples
from vlmq_vllm.offline.machine.progress import Progress
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.awq.search import Scaling
from vlmq_vllm.offline.methods.gptq.solve import Solver, round_to_nearest, solve
from vlmq_vllm.offline.methods.grid import CLIP, MINMAX, blocks_of
from vlmq_vllm.offline.methods.saliency.modality import ModalityWeights, modality_ratios
from vlmq_vllm.offline.methods.saliency.qig import QIGWeights
from vlmq_vllm.offline.methods.saliency.vlmq import VLMQWeights
from vlmq_vllm.offline.model.capture import capture
from vlmq_vllm.offline.model.hooks import removing
from vlmq_vllm.offline.model.layers import holding, linears_of, put, weights_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.run.quantize import quantize
from vlmq_vllm.offline.settings.quantize import Settings

CPU = torch.device("cpu")
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
STAGES = [[tuple(QKV)], [("self_attn.o_proj",)], [("mlp.gate_proj", "mlp.up_proj")], [("mlp.down_proj",)]]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
COMMON = {"group_size": 64, "grid": "minmax", "samples": 4}
# Sums in float32 and in float64 differ by 1e-7: a value between two codes, or one of two ranges with equal errors, goes
# the other way now and then, and compensation carries that on along its row. Seen: at most 0.002 of the codes; with
# other weights 0.19 at least.
SAME, OTHER = 0.01, 0.1


def eight(x):
    """Eight bits with a scale for each token."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@dataclass
class Run:
    """A run's settings, the tensors that it has written, and what it read."""

    settings: Settings
    tensors: dict[str, torch.Tensor]
    source: Source
    samples: object

    @property
    def streams(self):
        return capture(self.source, self.source.family.layers, self.samples.batches, CPU)

    def name(self, index):
        return f"{self.source.family.layers}.{index}"

    def written(self, index, linear) -> QuantizedWeight:
        module = self.source.module_in_files(f"{self.name(index)}.{linear}")
        parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        return QuantizedWeight.from_tensors(
            self.settings.format, {part: self.tensors[f"{module}.{part}"] for part in parts}
        )

    def put(self, layer, index, linears):
        for linear in linears:
            put(layer, linear, self.written(index, linear).dequantize(torch.bfloat16).float())

    def norm(self, index, name):
        return self.tensors[self.source.places[f"{self.name(index)}.{name}"].tensor]


@pytest.fixture
def run(demo_model, calibration, tmp_path):
    """Quantise the first `layers` layers of the demo model."""

    def begin(layers=1, **options) -> Run:
        settings = Settings(**COMMON | options)
        stop = functools.partial(next, iter([False] * layers + [True]))
        with pytest.raises(StoppedError):
            quantize(str(demo_model), tmp_path / "out", calibration, settings, stop=stop)
        files = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
        assert len(files) == layers
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        source = Source(demo_model)
        return Run(settings, tensors, source, read_samples(calibration, source, settings, Ranks(CPU), Progress()))

    return begin


def token_weights(run, layer, index, full, quantized):
    """Of the saliency that the run was to use, by linear [N] per batch."""
    saliency, source = run.settings.saliency, run.source

    def rounding():
        return holding(layer, {name: nearest(run, weight) for name, weight in weights_of(layer).items()})

    if saliency == "modality":
        ratios = modality_ratios(source, full, run.samples.labels, run.samples.kinds, CPU)
        source.materialise(run.name(index), CPU)
        weigh = ModalityWeights(source.family, ratios, run.samples.kinds)
    elif saliency == "vlmq":
        weigh = VLMQWeights(source.family, run.settings, Ranks(CPU))
    else:
        weigh = QIGWeights(Ranks(CPU), eight if run.settings.activation_bits == 8 else None)
    return weigh(layer, index, full, quantized, rounding)[0]


def nearest(run, weight):
    return round_to_nearest(weight, run.settings.format, torch.bfloat16, MINMAX).served()


def inputs_of(layer, index, streams, linear, rounded=False):
    """What a linear reads of each batch, [N, I] float64. rounded: every linear gets eight bits."""
    seen = []
    handles = [layer.get_submodule(linear).register_forward_pre_hook(lambda m, args: seen.append(args[0]))]
    for name in linears_of(layer) if rounded else ():
        hook = layer.get_submodule(name).register_forward_pre_hook(lambda m, args: (eight(args[0]),), prepend=True)
        handles.append(hook)
    with removing(handles), torch.no_grad():
        for stream in streams:
            args, kwargs = stream.calls[index]
            layer(stream.hidden, *args, **kwargs)
    return [x.flatten(0, -2).double() for x in seen]


def moments(inputs, weights=None):
    """sum_n lambda_n x_n x_n^T / N [I, I] float32, summed in float64."""
    weights = weights or [torch.ones(len(x)) for x in inputs]
    pairs = zip(inputs, weights, strict=True)
    return (sum(x.T @ (lam.double()[:, None] * x) for x, lam in pairs) / sum(map(len, inputs))).float()


def apart(one, other):
    """The share of codes that differ."""
    return float((one.codes != other.codes).float().mean())


@pytest.mark.parametrize(("saliency", "index"), [("modality", 0), ("qig", 0), ("vlmq", 1)])
def test_compensated_codes_are_those_of_weighted_moments(saliency, index, run):
    """VLMQ at layer 1, where what the run made of layer 0 gives it a signal."""
    made = run(index + 1, bits=3, method="gptq", saliency=saliency)
    quantized, full = made.streams, made.streams
    if index:
        before = made.source.materialise(made.name(0), CPU)
        for stream in full:
            stream.hidden = stream.run(before, 0)
        made.put(before, 0, linears_of(before))
        for stream in quantized:
            stream.hidden = stream.run(before, 0)
    layer = made.source.materialise(made.name(index), CPU)
    weights = token_weights(made, layer, index, full, quantized)
    assert weights.keys() == set(linears_of(layer) if saliency != "vlmq" else [*QKV, "self_attn.o_proj"])
    solver = Solver(MINMAX, act_order=True, damp=0.01)
    for (group,) in STAGES:
        inputs = inputs_of(layer, index, quantized, group[0])
        for linear in group:
            weight, own = layer.get_submodule(linear).weight, weights.get(linear)
            expected, other = (
                solve(weight[None], moments(inputs, lam)[None], made.settings.format, torch.bfloat16, solver)[0].weight
                for lam in (own, None)
            )
            assert apart(made.written(index, linear), expected) < SAME, linear
            assert own is None or apart(made.written(index, linear), other) > OTHER, linear
        made.put(layer, index, group)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "scale_loss": "mse"},
        {"bits": 3, "group_size": -1, "saliency": "modality"},
        {"bits": 3, "group_size": -1, "saliency": "qig"},
        {"bits": 8, "activation_bits": 8},
    ],
    ids=lambda options: "-".join(list(options)[1:]),
)
def test_scales_are_those_of_a_search_with_these_options(options, run):
    """Scales folded into norms, weights scaled and clipped; formats are such that every option moves a scale."""
    made = run(method="awq", **options)
    settings, streams, rounded = made.settings, made.streams, made.settings.activation_bits == 8
    layer = made.source.materialise(made.name(0), CPU)
    weights = {} if settings.saliency == "none" else token_weights(made, layer, 0, streams, streams)
    asked = {"loss": settings.scale_loss, "inputs": eight if rounded else None}
    plain, found = (
        Scaling(MINMAX, Ranks(CPU), **given)(
            made.source.materialise(made.name(0), CPU),
            0,
            made.source.family,
            STAGES,
            streams,
            own,
            lambda linear: settings.format,
            lambda name: torch.bfloat16,
        )
        for given, own in (({}, {}), (asked, weights))
    )
    assert found.ratios != plain.ratios
    assert set(NORMS) <= found.changed.keys() and all(
        torch.equal(made.norm(0, name), found.changed[name]) for name in NORMS
    )
    for (group,) in STAGES:
        for linear in group:
            h = moments(inputs_of(layer, 0, streams, linear, rounded))
            blocks, rows = blocks_of(h, settings.format), layer.get_submodule(linear).weight
            clipped = torch.full((len(rows),), linear not in ("self_attn.q_proj", "self_attn.k_proj"))
            expected = round_to_nearest(rows, settings.format, torch.bfloat16, CLIP, blocks, clipped)
            assert apart(made.written(0, linear), expected) < SAME, linear
        if rounded:
            made.put(layer, 0, group)
