"""The checkpoints of this folder: by peer, their names and what the peer is told, in the words of its own interface.

What a peer refused is in README.md.
"""

DOWN_8 = {"+:.*down_proj": {"bits": 8, "group_size": -1}}
EXCLUDED = {r"-:.*layers\.0\.self_attn\.v_proj": {}}
GPTQ_MODEL = {
    "gptq-4bit-g64": {"bits": 4, "group_size": 64},
    "gptq-4bit-asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-3bit-g32": {"bits": 3, "group_size": 32},
    "gptq-3bit-asym": {"bits": 3, "group_size": 32, "sym": False},
    "gptq-3bit-asym-v2": {"bits": 3, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-2bit-g32": {"bits": 2, "group_size": 32},
    "gptq-2bit-asym": {"bits": 2, "group_size": 32, "sym": False},
    "gptq-2bit-asym-v2": {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-8bit-rows": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "gptq-mixed": {"bits": 3, "group_size": 32, "act_group_aware": False, "dynamic": DOWN_8 | EXCLUDED},
    "gptq-desc-act": {"bits": 2, "group_size": 32, "desc_act": True},
}

G32 = {"group_size": 32, "sym": True, "format": "auto_round:auto_gptq"}
MIXED = {
    "model.language_model.layers.1.mlp.down_proj": {"bits": 8},
    "model.language_model.layers.0.self_attn.v_proj": {"bits": 4, "group_size": 64},
    "model.language_model.layers.1.self_attn.o_proj": {"bits": 16},
}
AUTO_ROUND = {
    "round-4bit-g64": G32 | {"bits": 4, "group_size": 64},
    "round-3bit-g32": G32 | {"bits": 3},
    "round-2bit-g32": G32 | {"bits": 2},
    "round-4bit-asym": G32 | {"bits": 4, "sym": False},
    "round-2bit-asym-own": G32 | {"bits": 2, "sym": False, "format": "auto_round"},
    "round-2bit-asym-gptqmodel": G32 | {"bits": 2, "sym": False, "format": "auto_round:gptqmodel"},
    "round-2bit-auto-gptq": G32 | {"bits": 2, "format": "auto_gptq"},
    "round-mixed": G32 | {"bits": 3, "layer_config": MIXED},
}


def rounded(bits: int, group_size: int | None = None, targets: str = "Linear", **others) -> dict:
    """A group of an llm-compressor recipe; without a group size it is one scale per row."""
    grouping = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True} | grouping | others
    return {"targets": [targets], "weights": weights}


LLM_COMPRESSOR = {
    "packed-4bit-g64": {"decoder": rounded(4, 64)},
    "packed-4bit-asym": {"decoder": rounded(4, 32, symmetric=False)},
    "packed-3bit-stream": {"decoder": rounded(3, 32)},
    "packed-3bit-stream-asym": {"decoder": rounded(3, 32, symmetric=False)},
    "packed-2bit-asym": {"decoder": rounded(2, 32, symmetric=False)},
    "packed-8bit-rows": {"decoder": rounded(8)},
    "packed-mixed": {
        "attention": rounded(4, 64, "re:.*self_attn.*_proj$"),
        "wide": rounded(3, 32, "re:.*(gate|up)_proj$"),
        "down": rounded(8, None, "re:.*down_proj$"),
    },
}
LLM_COMPRESSOR_0_12 = {  # the last one with compressed-tensors < 0.18: ten 3-bit codes in a word, weight_g_idx
    "packed-3bit-tens": {"decoder": rounded(3, 32)},
    "packed-3bit-tens-asym": {"decoder": rounded(3, 32, symmetric=False)},
    "packed-actorder": {"decoder": rounded(2, 32, actorder="group")},
}

CASES = {  # the peer in benchmarks/peers/install.py: its writer and its checkpoints
    "gptq_model": ("write_gptq_model.py", GPTQ_MODEL),
    "auto_round": ("write_auto_round.py", AUTO_ROUND),
    "llm_compressor": ("write_llm_compressor.py", LLM_COMPRESSOR),
    "llm_compressor_0_12": ("write_llm_compressor.py", LLM_COMPRESSOR_0_12),
}
