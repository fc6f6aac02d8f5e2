"""Weighs tokens by modality: how far the answers' loss depends on vision beside answer tokens (MBQ, 2412.19509).

With L the answers' cross-entropy (`answer_loss.py`) and Z the output of a layer's attention (o_proj) or MLP
(down_proj),

    r_l = mean over vision tokens of |dL/dZ|  /  mean over answer tokens of |dL/dZ|,      at least median_l r_l

over all channels and all tokens of samples that have both a picture and an answer; other samples have no part in it.
At the last layer vision tokens have no gradient at all: that is what the floor is for. An answer token weighs 1, a
vision token r_l, every other token 0.
"""

from math import isfinite
from statistics import median

import torch

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data.token_kinds import ANSWER, IGNORED, VISION, count_labels
from vlmq_vllm.offline.machine.ranks import Ranks
from vlmq_vllm.offline.methods.saliency.answer_loss import backward
from vlmq_vllm.offline.methods.saliency.weigher import Rounded, Weights
from vlmq_vllm.offline.model.experts import is_expert
from vlmq_vllm.offline.model.families import Family
from vlmq_vllm.offline.model.layers import linears_of
from vlmq_vllm.offline.model.source import Source
from vlmq_vllm.offline.model.streams import Stream

PARTS = ("attention", "mlp")
Ratios = list[dict[str, float]]  # by layer, of each of PARTS


def modality_ratios(
    source: Source,
    streams: list[Stream],
    labels: list[torch.Tensor],
    kinds: list[torch.Tensor],
    device: torch.device,
    ranks: Ranks | None = None,
) -> Ratios:
    """r of each layer's attention and MLP, from streams before the first layer with full-precision weights.

    labels: per stream int64 [B, T] as in `answer_loss.backward`; kinds: int8 [B, T] as in `data/token_kinds.py`. Raises
    QuantizeError where no sample has both vision and answer tokens, or where answer tokens have no gradient.
    """
    ranks = ranks or Ranks(device)
    both = [  # [B] each, whether a sample has vision tokens and labels
        (kind == VISION).any(1) & (label[:, 1:] != IGNORED).any(1) for label, kind in zip(labels, kinds, strict=True)
    ]
    labels = [label.where(rows[:, None], IGNORED) for label, rows in zip(labels, both, strict=True)]
    masks = [
        torch.stack([(kind == wanted) & rows[:, None] for wanted in (VISION, ANSWER)]).flatten(1).to(device)
        for kind, rows in zip(kinds, both, strict=True)
    ]  # [2, B T] each
    total = int(ranks.add(torch.tensor([count_labels(labels)], device=device)))
    if not total:
        raise QuantizeError(
            "no calibration sample has both a picture and an answer, which weights by modality are made of; "
            "add such samples, or choose another saliency"
        )
    modules = _modules(source)
    sums = torch.zeros(len(source.layers()), len(PARTS), 2, dtype=torch.float64, device=device)
    counts = ranks.add(torch.stack([mask.sum(1) for mask in masks]).sum(0).double() if masks else sums.new_zeros(2))

    def visit(index: int, name: str, i: int, gradient: torch.Tensor) -> None:
        sums[index, modules.index(name)] += masks[i].double() @ gradient.abs().mean(-1).double()

    backward(source, streams, labels, device, modules, visit, total)
    vision, answer = (ranks.add(sums) / counts).unbind(-1)
    floored = [_floored(part.tolist()) for part in (vision / answer).unbind(1)]
    return [dict(zip(PARTS, ratios, strict=True)) for ratios in zip(*floored, strict=True)]


def _modules(source: Source) -> list[str]:
    """The modules of a decoder layer whose outputs are those of o_proj and of down_proj, or of all experts together."""
    names = [name for name in linears_of(source.layers()[0]) if not source.family.in_attention(name)]
    return [source.family.attention, names[0].partition(".")[0]]


def _floored(ratios: list[float]) -> list[float]:
    """At least their median."""
    if not all(isfinite(ratio) for ratio in ratios):
        raise QuantizeError(
            "the answers' loss has no finite gradient at answer tokens, as when every answer is one token and has no "
            "mark at its end; add longer answers, or choose another saliency"
        )
    return [max(median(ratios), ratio) for ratio in ratios]


class ModalityWeights:
    """Weighs tokens by what they are; a TokenWeigher.

    kinds: int8 [B, T] of every batch, in the order of the streams.
    """

    def __init__(self, family: Family, ratios: Ratios, kinds: list[torch.Tensor]) -> None:
        self.family, self.ratios, self.kinds = family, ratios, kinds

    def __call__(
        self,
        layer: torch.nn.Module,
        index: int,
        full: list[Stream],
        quantized: list[Stream],
        rounding: Rounded,
    ) -> tuple[Weights, dict[str, str]]:
        """As `weigher.py` says: a list for the attention's linears, another for the others but experts'."""
        kinds = [kind.flatten().to(stream.hidden.device) for kind, stream in zip(self.kinds, quantized, strict=True)]
        lists = {
            part: [(kind == ANSWER).float() + ratio * (kind == VISION).float() for kind in kinds]
            for part, ratio in self.ratios[index].items()
        }
        part_of = {n: "attention" if self.family.in_attention(n) else "mlp" for n in linears_of(layer)}
        weights = {linear: lists[part] for linear, part in part_of.items() if not is_expert(linear)}
        return weights, {linear: "modality" if linear in weights else "equal" for linear in part_of}
