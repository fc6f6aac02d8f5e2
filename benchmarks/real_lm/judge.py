"""Judges models by the one that they were made from: `python benchmarks/real_lm/judge.py MODEL CHATS FOLDER...`.

On text chats that the full-precision model answered itself, and on the demo's held-out pictures, a question each: KL
divergence of the next token over the whole vocabulary at every token of the answer, negative log-likelihood, how often
the likeliest token is the same (top-1), and on pictures how many answers are right to the last token. A mean is over
chats, with its standard error. Any folder that transformers loads will do, so that every tool has the same judge. One
line of JSON for each.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/demo_vlm"))
from texts import hidden_states, padded, read_chats  # noqa: E402

from batches import batch  # noqa: E402, found beside the demo
from evaluate import answer, embed  # noqa: E402
from pictures import Picture, ask  # noqa: E402

TOGETHER = 8  # chats or pictures in a forward pass
TEXTS, PICTURES = 80, 210


def load(folder: str | Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


class Judge:
    """Held-out chats with what the full-precision model says of their answers."""

    @torch.no_grad()
    def __init__(self, folder: str | Path, chats: Path, texts: int = TEXTS, pictures: int = PICTURES) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked = sorted(read_chats(chats / "evaluation.jsonl", tokenizer)[:texts], key=lambda chat: len(chat[0]))
        pad = tokenizer.pad_token_id
        self.texts = [padded(asked[i : i + TOGETHER], pad) for i in range(0, len(asked), TOGETHER)]
        shown = [ask("evaluation", i) for i in range(pictures)]
        self.pictures = [
            batch([Picture(image, [question]) for image, question in shown[i : i + TOGETHER]], tokenizer, 1)
            for i in range(0, len(shown), TOGETHER)
        ]
        self.model = load(folder)
        self.known = [hidden for hidden, _ in self._answers(self.model)]

    def _answers(self, model: Qwen2VLForConditionalGeneration) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per batch of texts, then of pictures: hidden states [N, d] that predict an answer's tokens, and [N, 2] which
        chat each belongs to and the token that is right."""
        for data in self.texts:
            where = data["answered"].nonzero()
            yield hidden_states(model, data), torch.stack([where[:, 0], data["ids"][where[:, 0], where[:, 1] + 1]], 1)
        for data in self.pictures:
            labels = data["labels"][:, 1:]
            where = (labels != -100).nonzero()
            hidden = answer(model, data, embed(model, data)[0])[:, :-1][labels != -100]
            yield hidden, torch.stack([where[:, 0], labels[labels != -100]], 1)

    @torch.no_grad()
    def __call__(self, folder: str | Path) -> dict[str, float]:
        """The figures of the model in `folder`; names begin with "text" or "picture". Those in "kls" are chat by chat,
        always in the same order."""
        model, rows = load(folder), {"text": [], "picture": []}
        for number, (hidden, where) in enumerate(self._answers(model)):
            known = self.model.lm_head(self.known[number]).log_softmax(-1)
            rows["text" if number < len(self.texts) else "picture"] += _rows(
                known, model.lm_head(hidden).log_softmax(-1), where
            )
        found = {}
        for kind, each in rows.items():
            for name in each[0] if each else ():
                values = [row[name] for row in each]
                found[f"{kind}_{name}"] = statistics.fmean(values)
                found[f"{kind}_{name}_error"] = statistics.stdev(values) / len(values) ** 0.5
            found[f"{kind}_kls"] = [round(row["kl"], 5) for row in each]  # for differences between models, in pairs
        return found


def _rows(known: torch.Tensor, found: torch.Tensor, where: torch.Tensor) -> Iterator[dict[str, float]]:
    """Figures of each chat from log-probabilities [N, V]. where: [N, 2] chat and right token."""
    kl = (known.exp() * (known - found)).sum(-1)
    loss = -found.gather(1, where[:, 1:])[:, 0]
    same, right = found.argmax(-1) == known.argmax(-1), found.argmax(-1) == where[:, 1]
    for chat in where[:, 0].unique():
        own = where[:, 0] == chat
        yield {
            "kl": float(kl[own].mean()),
            "nll": float(loss[own].mean()),
            "top1": 100 * float(same[own].float().mean()),
            "exact": 100 * float(right[own].all()),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    args = parser.parse_args()
    judge = Judge(args.model, args.chats, args.texts, args.pictures)
    for folder in args.folders:
        print(json.dumps({"folder": folder.name} | judge(folder)), flush=True)
