"""What a study takes models apart into: parts of several families, the whole model in memory, and options."""

import pytest
import torch

from family_models import build
from vlmq_vllm.errors import QuantizeError, RefusedError
from vlmq_vllm.offline.compare.weights import load_model
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.settings.quantize import Settings
from vlmq_vllm.offline.settings.sweep import StudySettings
from vlmq_vllm.offline.sweep.judge import materialise
from vlmq_vllm.offline.sweep.parts import find_parts, find_subject
from vlmq_vllm.offline.sweep.sizes import Sizes


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A function: the folder of a tiny model."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            build(name, folders[name])
        return folders[name]

    return folder


PARTS_OF = {
    # 3 decoder layers; towers of 3 blocks, of which LLaVA uses as many as its -1 says
    "qwen2_vl": (["vision", "connector", "language"], ["0.self_attn.qkv", "0.self_attn.o_proj", "0.mlp.gate_up"]),
    "internvl": (["language"], ["0.self_attn.qkv", "0.self_attn.o_proj", "0.mlp.gate_up"]),
    "qwen3_vl_moe": (
        ["vision", "connector", "language"],
        ["1.self_attn.qkv", "1.self_attn.o_proj", "1.mlp.experts.gate_up", "1.mlp.experts.down_proj"],
    ),
}


@pytest.mark.parametrize("name", PARTS_OF)
def test_parts_cover_every_linear_once_and_keep_what_is_fused_whole(family, name):
    components, modules = PARTS_OF[name]
    source = Source(family(name))
    settings = Settings(bits=2, group_size=-1, method="rtn")
    everything = find_subject(source, settings, None)
    assert everything.components == components
    subject = find_subject(source, settings, ("language",))
    every = {target.name for target in subject.targets}
    for by in ("component", "third", "kind", "layer", "module"):
        linears = [linear for part in find_parts(by, subject) for linear in part.linears]
        assert set(linears) == every and len(linears) == len(every), by
    found = {part.name: part.linears for part in find_parts("module", subject)}
    assert found.keys() >= set(modules)
    fused = [part for part in found.values() if any(linear.endswith("q_proj") for linear in part)]
    assert len(fused) == 3 and all(len(part) == 3 for part in fused)
    if name == "qwen3_vl_moe":
        assert len(found["1.mlp.experts.gate_up"]) == 2 * 6 and len(found["1.mlp.experts.down_proj"]) == 6
    assert [part.name for part in find_parts("third", subject)] == ["front", "middle", "end"]


def test_a_component_that_cannot_be_served_is_refused_by_name(family):
    with pytest.raises(RefusedError, match="this model's vision has no linear that vLLM takes in packed form"):
        find_subject(Source(family("internvl")), Settings(bits=2, group_size=-1, method="rtn"), ("vision",))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma3"])
@torch.inference_mode()
def test_the_materialised_model_is_transformers_own(family, name):
    """Logits of a text. Bound: experts are summed in another order in float32."""
    source = Source(family(name))
    materialise(source, torch.device("cpu"), torch.float32)
    reference = load_model(family(name), torch.float32, "cpu")
    ids = torch.tensor([[5, 9, 3, 7, 11, 2]])
    ours, theirs = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in (source.model, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_whole_configuration_at_16_bits_has_the_files_size(family):
    source = Source(family("qwen3_vl_moe"))
    sizes = Sizes(source, find_subject(source, Settings(bits=2, group_size=-1, method="rtn"), None).targets)
    assert sizes.bits_per_weight({}) == sizes.bits_per_parameter({}) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (5,)}, "bits is 5; choose among 2, 3, 4, 8"),
        ({"bits": ()}, "bits is empty"),
        ({"methods": ("vlmq",)}, "methods is vlmq; choose among rtn, awq, gptq"),
        ({"by": "row"}, "by is row; choose one of component, third, kind, layer, module"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"budget": 17.0}, "budget is 17.0; give average bits per weight"),
        ({"group_size": 48}, "group_size is 48; with 3 bits"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(QuantizeError, match=message):
        StudySettings(**options)
