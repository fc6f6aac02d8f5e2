"""The tiny models of `tests/helpers/family_models.py`: complete, named as on the hub, special where their family is,
and running."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from family_models import FAMILIES, VIDEO, build

LLAVA_TOWER = "vision_tower.vision_model.encoder.layers.2.self_attn.out_proj.bias"
QWEN_BLOCK = "visual.blocks.2.attn.qkv.weight"
MERGER = "model.visual.deepstack_merger_list.1.linear_fc2.weight"
# Names and shapes [out, in] of published files, written from the hub's indexes and not from what transformers saves.
GOLDEN = {
    "qwen2_vl": {
        "model.layers.2.mlp.down_proj.weight": [128, 208],
        "model.layers.0.self_attn.q_proj.bias": [128],
        "model.embed_tokens.weight": [384, 128],
        QWEN_BLOCK: [192, 64],
        "visual.merger.mlp.2.weight": [128, 256],
    },
    "qwen2_5_vl": {
        "model.layers.2.mlp.gate_proj.weight": [208, 128],
        "visual.blocks.0.mlp.gate_proj.weight": [176, 64],
        QWEN_BLOCK: [192, 64],
        "visual.merger.ln_q.weight": [64],
        "lm_head.weight": [384, 128],
    },
    "qwen3_vl": {
        "model.language_model.layers.0.self_attn.q_norm.weight": [32],
        f"model.{QWEN_BLOCK}": [192, 64],
        "model.visual.pos_embed.weight": [64, 64],
        "model.visual.merger.linear_fc2.weight": [128, 256],
        MERGER: [128, 256],
    },
    "qwen3_vl_moe": {
        "model.language_model.layers.0.mlp.down_proj.weight": [128, 208],
        "model.language_model.layers.1.mlp.gate.weight": [6, 128],
        "model.language_model.layers.1.mlp.experts.gate_up_proj": [6, 128, 192],  # [experts, in, gate and up]
        "model.language_model.layers.2.mlp.experts.down_proj": [6, 96, 128],
        MERGER: [128, 256],
        "lm_head.weight": [384, 128],
    },
    "llava": {
        "language_model.model.layers.2.mlp.down_proj.weight": [128, 208],
        "language_model.lm_head.weight": [384, 128],
        LLAVA_TOWER: [64],
        "vision_tower.vision_model.pre_layrnorm.weight": [64],
        "multi_modal_projector.linear_2.weight": [128, 128],
    },
    "llava_onevision": {
        "language_model.model.layers.2.self_attn.k_proj.bias": [64],
        "language_model.lm_head.weight": [384, 128],
        LLAVA_TOWER: [64],
        "multi_modal_projector.linear_1.weight": [128, 64],
        "image_newline": [128],
    },
    "internvl": {
        "language_model.model.layers.2.self_attn.v_proj.bias": [64],
        "language_model.lm_head.weight": [384, 128],
        "vision_tower.encoder.layer.2.attention.projection_layer.weight": [64, 64],
        "vision_tower.encoder.layer.0.lambda_1": [64],
        "multi_modal_projector.linear_1.weight": [128, 256],
    },
    "smolvlm": {
        "model.text_model.layers.2.mlp.down_proj.weight": [128, 208],
        "model.vision_model.encoder.layers.2.mlp.fc2.weight": [64, 176],
        "model.connector.modality_projection.proj.weight": [128, 256],
        "lm_head.weight": [384, 128],
    },
    "gemma3": {
        "language_model.model.layers.2.pre_feedforward_layernorm.weight": [128],
        "language_model.model.layers.0.self_attn.q_norm.weight": [32],
        LLAVA_TOWER: [64],
        "multi_modal_projector.mm_input_projection_weight": [64, 128],
    },
}
GOLDEN["idefics3"] = GOLDEN["smolvlm"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name and folder of one family's model."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="module")
def loaded(family):
    """The model in float32 and what loading it reported."""
    return AutoModelForImageTextToText.from_pretrained(family[1], dtype=torch.float32, output_loading_info=True)


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs(folder, *parts: str | Image.Image | list[Image.Image]) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of a question of texts, pictures and videos (lists of pictures)."""
    processor = AutoProcessor.from_pretrained(folder)
    kinds = {str: "text", Image.Image: "image", list: "video"}
    content = [{"type": kinds[type(part)], **({"text": part} if isinstance(part, str) else {})} for part in parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
    text = processor.apply_chat_template(messages, tokenize=False)
    given = {kind: [part for part in parts if isinstance(part, kind)] for kind in (Image.Image, list)}
    videos = given[list]
    if type(processor).__name__ == "SmolVLMProcessor":  # it alone wants the videos of each text apart
        videos = [videos] if videos else []
    media = {"images": given[Image.Image], "videos": videos}
    return processor(text=[text], return_tensors="pt", **{kind: parts for kind, parts in media.items() if parts})


def need_processor(name: str) -> None:
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor spells numbers with the package num2words")


def load(name: str, folder) -> torch.nn.Module:
    build(name, folder)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def test_file_holds_the_hubs_names(family):
    name, folder = family
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 a file, not a dict
        dtypes = {file.get_slice(key).get_dtype() for key in shapes}
    assert {key: shapes.get(key) for key in GOLDEN[name]} == GOLDEN[name]
    assert any("lm_head" in key for key in shapes) != FAMILIES[name].tied
    assert dtypes == {"BF16"}


def test_every_tensor_finds_its_place(loaded):
    model, info = loaded
    assert not any(info.values()), info
    assert all(bool(p.std() > 0) for p in model.parameters() if p.numel() > 1)


def test_building_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        build("qwen3_vl_moe", tmp_path / folder)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert len(first) < 3e6


CASES = {
    "text": ["What is it?"],
    "picture": [picture(0, 112, 84), "What is it?"],
    "two pictures": [picture(0, 112, 84), "and", picture(1, 56, 70), "What are they?"],
    "video": [[picture(i, 64, 64) for i in range(4)], "What happens?"],
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_model_answers(family, loaded, case):
    name, folder = family
    if case == "video" and name not in VIDEO:
        assert not (folder / "video_preprocessor_config.json").exists()
        return
    need_processor(name)
    given = inputs(folder, *CASES[case])
    logits = loaded[0](**given).logits
    assert logits.shape == (*given["input_ids"].shape, 384)
    assert logits.isfinite().all()
    assert 10 <= logits.shape[1] <= 200
    assert logits.std(1).min() > 0.1  # tokens differ: with weights of 0.08 the logits' spread is near 1


@torch.no_grad()
def test_pixels_reach_the_logits(family, loaded):
    name, folder = family
    need_processor(name)
    one, other = (inputs(folder, picture(seed, 112, 84), "What is it?") for seed in (0, 1))
    difference = loaded[0](**one).logits - loaded[0](**other).logits
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert difference.abs().max() > 0.1  # of a spread near 1; equal pictures give exactly 0


@torch.no_grad()
def test_deepstack_adds_after_two_layers(family, loaded):
    name, folder = family
    model = loaded[0]
    if not name.startswith("qwen3_vl"):
        assert not hasattr(getattr(model.model, "visual", None), "deepstack_merger_list")
        return
    layers, states = model.model.language_model.layers, {}
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: states.__setitem__(f"in {i}", args[0].clone()))
        layer.register_forward_hook(lambda m, args, out, i=i: states.__setitem__(f"out {i}", out.clone()))
    given = inputs(folder, picture(0, 112, 84), "What is it?")
    model(**given)
    image = given["input_ids"][0] == model.config.image_token_id
    added = states["in 1"] - states["out 0"], states["in 2"] - states["out 1"]
    assert [bool(term[0, image].abs().max() > 0.1) for term in added] == [True, True]
    assert [float(term[0, ~image].abs().max()) for term in added] == [0, 0]


@torch.no_grad()
def test_smolvlm_runs_without_its_processor(tmp_path):
    """One tile of 16 pixels is four tokens, whichever processor made them."""
    model = load("smolvlm", tmp_path)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 4, 7, 8]])
    pixels = torch.randn(2, 1, 1, 3, 16, 16)
    one, other = (model(input_ids=ids, pixel_values=part).logits for part in pixels)
    assert torch.equal(one[:, 0], other[:, 0])  # before the picture
    assert (one - other)[:, 1:].abs().amax(-1).min() > 0.01  # from its first token on; a spread near 1


@torch.no_grad()
def test_gemma3_slides_in_two_layers_and_sees_all_in_the_third(tmp_path):
    """Text alone: the first token reaches one window through layer 0, two through layer 1, all through layer 2."""
    model = load("gemma3", tmp_path)
    one = torch.arange(4, 44)[None]
    other = one.clone()
    other[0, 0] = 100
    states = [model(ids, output_hidden_states=True).hidden_states for ids in (one, other)]
    reached = [int((a != b).any(-1).sum()) for a, b in zip(*states, strict=True)]
    assert reached == [1, 8, 15, 40]  # neighbouring windows of 8 share a token


@torch.no_grad()
def test_moe_routes_tokens_to_different_experts(tmp_path):
    model = load("qwen3_vl_moe", tmp_path)
    layers, chosen = model.model.language_model.layers, []
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True, True]
    layers[1].mlp.experts.register_forward_pre_hook(lambda m, args: chosen.append(args[1]))
    model(torch.arange(4, 44)[None])
    assert chosen[0].shape == (40, 2)
    assert len(chosen[0].unique()) >= 4


@torch.no_grad()
def test_qwen2_5_tower_has_windows(tmp_path):
    """A patch reaches its own window through block 0 and all patches through block 1."""
    tower, states = load("qwen2_5_vl", tmp_path).model.visual, []
    for block in tower.blocks[:2]:
        block.register_forward_hook(lambda m, args, out: states.append(out))
    one = torch.randn(64, 1176)  # 8 x 8 patches, windows of 4 x 4
    other = one.clone()
    other[0] += 1
    for pixels in (one, other):
        tower(pixels, grid_thw=torch.tensor([[1, 8, 8]]))
    assert [int((states[i] != states[i + 2]).any(-1).sum()) for i in (0, 1)] == [16, 64]
