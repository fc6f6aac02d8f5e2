"""Warns of what is possible but may disappoint: layers that vLLM refuses, cuts, few tokens, large pictures."""

import json

from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.plan.sizes import Load, expert_share, patches_per_token
from vlmq_vllm.offline.plan.tensor_parallel import SIZES, LinearKind
from vlmq_vllm.offline.settings.methods import ENOUGH_TOKENS, TOKEN_WEIGHTS
from vlmq_vllm.offline.settings.quantize import Settings

WHOLE_TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # vLLM can give every rank the whole tower


def find_warnings(source: Source, settings: Settings, load: Load, linears: list[LinearKind]) -> list[str]:
    """One line each."""
    found = [f"vLLM will not load {linear.pattern}: {linear.refused}" for linear in linears if linear.refused]
    found += _cut(linears) + _tower_heads(source)
    if settings.row.compensates:
        found += _tokens(source, settings, load, linears)
    if settings.row.calibrated:
        found += _pictures(source, settings)
    return found


def _cut(linears: list[LinearKind]) -> list[str]:
    """For each tensor-parallel size that some layer refuses: who, why, and the group sizes that would suit all."""
    lines = []
    for size in linears[0].cuts:
        refusing = [linear for linear in linears if linear.cuts[size]]
        stubborn = [linear for linear in refusing if not linear.fitting.get(size)]  # no grouping helps them
        if stubborn:
            lines.append(f"tensor parallelism over {size}: {stubborn[0].pattern}: {stubborn[0].cuts[size]}")
        elif refusing:
            first = refusing[0]
            common = set.intersection(*(set(linear.fitting[size]) for linear in refusing))
            fitting = " or ".join(str(group) for group in first.fitting[size] if group in common)
            advice = f"--group-size {fitting} fits" if fitting else "no one group size fits all layers"
            lines.append(f"tensor parallelism over {size}: {first.pattern}: {first.cuts[size]}; {advice}")
    return lines


def _tower_heads(source: Source) -> list[str]:
    """The tensor-parallel sizes that cannot share out the heads of the tower, quantised or not."""
    vision = source.parsed.vision_config
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    sizes = [str(size) for size in SIZES if heads % size]
    whole = source.config["model_type"] in WHOLE_TOWERS
    advice = (
        "serve with --mm-encoder-tp-mode data, where every rank has the whole tower" if whole else "use fewer ranks"
    )
    line = f"tensor parallelism over {' or '.join(sizes)}: the tower's {heads} heads do not divide; {advice}"
    return [line] if sizes else []


def _tokens(source: Source, settings: Settings, load: Load, linears: list[LinearKind]) -> list[str]:
    """Too few tokens for the widest weight, among experts for the mean expert, and too few that token weights leave."""
    decoder = [linear for linear in linears if linear.component == "language"]
    experts = [linear for linear in decoder if linear.layer == "FusedMoE"]
    others = [linear for linear in decoder if linear.layer != "FusedMoE"]
    share = TOKEN_WEIGHTS[settings.saliency].effective or 0
    inside = f".{source.family.attention}."
    weighted = [x for x in others if share and (settings.saliency_scope == "all" or inside in x.pattern)]
    cases = (
        ("the decoder sees at most {} calibration tokens", others, 1.0),
        ("each expert sees at most {} calibration tokens", experts, expert_share(source)),
        ("token weights leave the decoder about {} effective tokens", weighted, share),
    )
    lines = []
    for what, found, part in cases:
        tokens, columns = int(load.total * part), max((linear.columns for linear in found), default=0)
        if tokens < (enough := ENOUGH_TOKENS * columns):
            lines.append(
                f"{what.format(tokens)} for weights of {columns} columns; {enough} or more are better: raise "
                "--samples or --max-tokens"
            )
    return lines


def _pictures(source: Source, settings: Settings) -> list[str]:
    """Samples longer than max_tokens are left out; a processor that keeps a picture's size can make such."""
    allowed = _processor_pixels(source)
    if not allowed or not getattr(source.parsed.vision_config, "spatial_merge_size", None):
        return []
    cell = patches_per_token(source) * source.parsed.vision_config.patch_size**2
    pixels = min(allowed, settings.max_pixels or allowed)
    if pixels // cell <= settings.max_tokens:
        return []
    return [
        f"a picture of {pixels} pixels, as the processor allows, takes {pixels // cell} tokens, and samples of more "
        f"than {settings.max_tokens} are left out; --max-pixels {settings.max_tokens * cell // 2} makes pictures fit"
    ]


def _processor_pixels(source: Source) -> int | None:
    """The greatest number of pixels that the processor's files allow for a picture; None where they say nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = source.folder / name
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = found.get("image_processor", found)
        size = found.get("size") or {}
        if pixels := found.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"):
            return pixels
    return None
