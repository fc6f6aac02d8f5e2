"""The method for mixtures of experts on a stand-in for vLLM's layer, against the dequantised experts in float64.

The real layer needs process groups; it is served end to end in tests/e2e. What the stand-in has is what the method asks
of it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from vllm_layers import FORMATS, TOLERANCE, W2, W3, W4, config_of, finish, random_weight, relative_error
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.serving import launch
from vlmq_vllm.serving.moe import VLMQMoEMethod

COUNT, HIDDEN, INNER, CHOSEN = 5, 64, 192, 2
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def make_experts(gate_up: WeightFormat, down: WeightFormat) -> dict:
    """Weights by checkpoint name."""
    shapes = {
        "gate_proj": (gate_up, INNER, HIDDEN),
        "up_proj": (gate_up, INNER, HIDDEN),
        "down_proj": (down, HIDDEN, INNER),
    }
    return {f"experts.{i}.{name}": random_weight(*shapes[name]) for i in range(COUNT) for name in SHARDS}


def make_layer(weights: dict, rank=0, ranks=1, here=None, dtype=torch.bfloat16, lora=False):
    """A layer of one rank: of `ranks` tensor-parallel ones, or with the experts `here` of an expert-parallel one."""
    here = list(range(COUNT)) if here is None else here
    moe = SimpleNamespace(
        num_logical_experts=COUNT,
        experts_per_token=CHOSEN,
        is_lora_enabled=lora,
        moe_parallel_config=SimpleNamespace(tp_rank=rank, tp_size=ranks),
    )
    config = config_of(weights)
    layer = torch.nn.Module()
    layer.global_num_experts, layer.activation = COUNT, SimpleNamespace(value="silu")
    layer.apply_router_weight_on_input = False
    layer._map_global_expert_id_to_local_expert_id = lambda e: here.index(e) if e in here else -1
    layer._expert_map = None
    if len(here) < COUNT:
        layer._expert_map = torch.tensor([here.index(e) if e in here else -1 for e in range(COUNT)])
    experts = {key: (name, config.modules[name]) for key, name in config._table("quantised").experts("experts").items()}
    config.claims.add("experts", experts.values())
    layer.quant_method = VLMQMoEMethod(moe, "experts", experts, config)
    layer.quant_method.create_weights(layer, len(here), HIDDEN, INNER // ranks, dtype, global_num_experts=COUNT)
    return layer


def load(layer, weights: dict, without: str = "") -> None:
    for name, weight in weights.items():
        _, expert, projection = name.split(".")
        shard = SHARDS[projection]
        for part, tensor in weight.tensors().items():
            if f"{name}.{part}" != without:
                param = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{part}")
                done = param.weight_loader(
                    param=param,
                    loaded_weight=tensor,
                    weight_name="",
                    shard_id=shard,
                    expert_id=int(expert),
                    return_success=True,
                )
                assert done is (layer._expert_map is None or int(layer._expert_map[int(expert)]) >= 0)


def expected(weights: dict, x, ids, router, inner=slice(None), here=range(COUNT)) -> torch.Tensor:
    """The mixture in float64, with the columns `inner` of the experts' inner size and the experts `here`."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot, expert in enumerate(ids[token].tolist()):
            if expert in here:
                gate, up, down = (weights[f"experts.{expert}.{name}"].dequantize().double() for name in SHARDS)
                middle = silu(x[token].double() @ gate[inner].T) * (x[token].double() @ up[inner].T)
                out[token] += router[token, slot].double() * (middle @ down[:, inner].T)
    return out


def run(layer, tokens=9):
    x = torch.randn(tokens, HIDDEN, dtype=layer.vlmq_experts["w2_"].dtype)
    ids = torch.stack([torch.randperm(COUNT)[:CHOSEN] for _ in range(tokens)])
    router = torch.rand(tokens, CHOSEN)
    return layer.quant_method.apply(layer, x, router, ids), (x, ids, router)


# Two products and a product of two factors, each rounded as in vllm_layers.
BOUND = {dtype: 3 * tolerance for dtype, tolerance in TOLERANCE.items()}


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [(W4, W4), (W3, W2), (W2, WeightFormat(3, 32, False)), (WeightFormat(8, 32, True), W4)],
    ids=str,
)
@pytest.mark.parametrize("back_end", ["cpu", "dense", "triton's twin"])
def test_experts(gate_up, down, back_end, monkeypatch):
    if back_end == "dense":
        monkeypatch.setenv("VLMQ_CPU_DENSE", "1")
    if back_end == "triton's twin":  # plain torch runs on the CPU: same layout, same operator
        monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    weights = make_experts(gate_up, down)
    layer = make_layer(weights)
    load(layer, weights)
    out, inputs = run(finish(layer))
    assert relative_error(out, expected(weights, *inputs)) < BOUND[torch.bfloat16]
    kinds = {"cpu": {"int4", "dense"} if gate_up.bits == 8 else {"int4"}, "dense": {"dense"}}
    assert {step.kind for step in layer.vlmq_launches.values()} == kinds.get(back_end, {"triton"})


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("format", [FORMATS[5], WeightFormat(4, 128, True)], ids=str)
def test_inner_size_is_cut(rank, ranks, format):
    """192 columns of down_proj: groups of 128 lie on two ranks."""
    weights = make_experts(format, format)
    layer = make_layer(weights, rank, ranks)
    load(layer, weights)
    out, inputs = run(finish(layer))
    size = INNER // ranks
    inner = slice(rank * size, (rank + 1) * size)
    assert relative_error(out, expected(weights, *inputs, inner)) < BOUND[torch.bfloat16]


def test_parts_of_gates_need_not_fill_words():
    """A rank's 24 rows of gate and up: their zero points of 3 bits begin inside a word."""
    weights = make_experts(FORMATS[5], WeightFormat(4, -1, True))
    for rank in range(8):
        layer = make_layer(weights, rank, 8)
        load(layer, weights)
        out, inputs = run(finish(layer))
        inner = slice(24 * rank, 24 * (rank + 1))
        assert relative_error(out, expected(weights, *inputs, inner)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)], ids=["whole", "and cut"])
@pytest.mark.parametrize("format", [W3, FORMATS[5]], ids=["symmetric", "asymmetric"])
def test_experts_of_other_ranks_are_left_out(format, rank, ranks):
    weights = make_experts(format, format)
    layer = make_layer(weights, rank, ranks, here=[1, 4])
    load(layer, weights)
    out, inputs = run(finish(layer))
    size = INNER // ranks
    inner = slice(rank * size, (rank + 1) * size)
    assert relative_error(out, expected(weights, *inputs, inner, here=(1, 4))) < BOUND[torch.bfloat16]


def test_router_weights_may_belong_to_the_input():
    weights = make_experts(W4, W4)
    layer = make_layer(weights)
    load(layer, weights)
    layer.apply_router_weight_on_input = True
    x, ids, router = (
        torch.randn(3, HIDDEN).bfloat16(),
        torch.tensor([[0], [3], [4]]),
        torch.tensor([[0.5], [2.0], [1.0]]),
    )
    out = finish(layer).quant_method.apply(layer, x, router, ids)
    scaled = expected(weights, x * router.bfloat16(), ids, torch.ones(3, 1))
    assert relative_error(out, scaled) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("part", ["experts.3.up_proj.weight_scale", "experts.0.down_proj.weight_packed"])
def test_tensor_that_never_arrives_is_named(part):
    weights = make_experts(W4, W4)
    layer = make_layer(weights)
    load(layer, weights, without=part)
    with pytest.raises(ValueError, match=f"{part} never arrived"):
        finish(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("experts.2.up_proj"), "experts: up_proj of expert 2 is not quantised, others"),
        (
            lambda w: w.update({"experts.2.up_proj": random_weight(W3, INNER, HIDDEN)}),
            "experts.2.up_proj is .*bits=3.* experts.0.gate_proj is .*bits=4.*quantise them alike",
        ),
        (
            lambda w: w.update({"experts.2.down_proj": random_weight(W4, HIDDEN, 2 * INNER)}),
            "experts.2.down_proj is 64 x 384 in the checkpoint, but vLLM builds it 64 x 192",
        ),
    ],
    ids=["missing", "format", "size"],
)
def test_experts_that_cannot_be_served_are_refused(change, message):
    weights = make_experts(W4, W4)
    change(weights)
    with pytest.raises(ValueError, match=message):
        make_layer(weights)


def test_format_that_the_kernels_cannot_read_is_refused_off_the_cpu(monkeypatch):
    """Dequantised experts would run one by one, and wait for the GPU each time."""
    weights = make_experts(W4, WeightFormat(2, 16, True))
    layer = make_layer(weights)
    load(layer, weights)
    monkeypatch.setattr(launch.Piece, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="experts.0.down_proj cannot be served on this device: group_size is 16"):
        finish(layer)


def test_lora_is_refused():
    with pytest.raises(ValueError, match="experts: vLLM's LoRA .*serve without --enable-lora"):
        make_layer(make_experts(W4, W4), lora=True)


def test_cut_that_cannot_be_served_is_refused():
    with pytest.raises(
        ValueError, match="experts: 192 inputs in groups of 64 .* --tensor-parallel-size 1 or 2 or 3 or 6"
    ):
        make_layer(make_experts(W4, W4), 0, 4)
