"""Teaches the real language model to see the demo's pictures: `python benchmarks/real_lm/train.py BASE CHATS OUT`.

BASE is what `base.py` wrote, CHATS the folder of `chats.py`. Trained are the merger and a low-rank update (LoRA, PEFT)
of every linear of the language model, on the answers' cross-entropy with each question in a branch of its own
(`examples/demo_vlm/batches.py`). So that the model stays what it was on text, every fourth step adds the KL divergence
to the untrained model on text chats. OUT becomes a PEFT adapter, below 30 MB; `merge.py` adds it to BASE. A run that is
killed goes on from OUT's training state; where OUT has an adapter alone, training begins with it.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/demo_vlm"))
from texts import Chat, hidden_states, padded, read_chats  # noqa: E402

from batches import batch  # noqa: E402, found beside the demo
from evaluate import answer, embed, judge  # noqa: E402
from pictures import draw  # noqa: E402

RANK = 32
MERGER_RATE = 2.0  # times that of the update: it begins with random weights
TEXT_EVERY = 4  # steps
STATE = "training_state.pt"


def add_update(model: Qwen2VLForConditionalGeneration) -> torch.nn.Module:
    """The model with a trainable merger and a trainable low-rank update, all else frozen."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=r"model\.language_model\.layers\..*_proj",
        modules_to_save=["merger"],
    )
    return get_peft_model(model, config)


def picture_loss(model, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy at the answers' tokens; the head is applied to those alone."""
    embedded, _ = embed(model, data)
    hidden = answer(model, data, embedded)[:, :-1]
    labels = data["labels"][:, 1:]
    return F.cross_entropy(model.lm_head(hidden[labels != -100]).float(), labels[labels != -100])


def text_loss(wrapped, chats: list[Chat], pad: int) -> torch.Tensor:
    """KL divergence of the untrained model's next token to the trained one's, at the answers' tokens, in nats."""
    model, data = wrapped.base_model.model, padded(chats, pad)

    def logits() -> torch.Tensor:
        return model.lm_head(hidden_states(model, data)).float().log_softmax(-1)

    with torch.no_grad(), wrapped.disable_adapter():
        known = logits()
    return F.kl_div(logits(), known, reduction="batchmean", log_target=True)


def rate_at(step: int, steps: int) -> float:
    """Warm-up over 50 steps, constant, linear to zero over the last third; times the peak rate."""
    return min(1.0, (step + 1) / 50, 3 * (steps - step) / steps)


class Trainer:
    """The model with its optimiser, and the state that a run goes on from."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.base, dtype=torch.bfloat16)
        torch.manual_seed(args.seed)
        self.wrapped = add_update(model)
        self.model = self.wrapped.base_model.model
        named = [(name, p) for name, p in self.wrapped.named_parameters() if p.requires_grad]
        for _, parameter in named:
            parameter.data = parameter.data.float()
        merger = [p for name, p in named if "merger" in name]
        update = [p for name, p in named if "merger" not in name]
        groups = [{"params": merger, "times": MERGER_RATE}, {"params": update, "times": 1.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.0, betas=(0.9, 0.98))
        self.trained = dict(named)
        self.chats = read_chats(args.chats / "train.jsonl", self.tokenizer)
        self.held_out = read_chats(args.chats / "evaluation.jsonl", self.tokenizer)[:32]
        self.first = self._resume()

    def _resume(self) -> int:
        path, adapter = self.args.out / STATE, self.args.out / "adapter_model.safetensors"
        if not path.exists():
            if adapter.exists():
                set_peft_model_state_dict(self.wrapped, load_file(adapter))
            return 0
        state = torch.load(path, weights_only=True)
        for name, parameter in self.trained.items():
            parameter.data.copy_(state["trained"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        return state["step"]

    def save(self, step: int) -> None:
        """The adapter in bfloat16, and beside it what training goes on from."""
        self.wrapped.peft_config["default"].base_model_name_or_path = "what base.py writes"  # no folder of this machine
        state = {name: tensor.bfloat16() for name, tensor in self.wrapped.state_dict().items()}
        self.wrapped.save_pretrained(self.args.out, state_dict=state)
        (self.args.out / "README.md").unlink()
        new = self.args.out / f"{STATE}.new"
        trained = {name: p.data for name, p in self.trained.items()}
        torch.save({"step": step, "trained": trained, "optimiser": self.optimiser.state_dict()}, new)
        os.replace(new, self.args.out / STATE)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; its losses."""
        args, losses = self.args, {}
        drawn = [draw("train", step * args.pictures + i) for i in range(args.pictures)]
        # with a mask of branches the CPU's fused attention takes a third of the whole step for its way back
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = picture_loss(self.model, batch(drawn, self.tokenizer, args.questions))
            loss.backward()
        losses["answer"] = loss.item()
        if step % TEXT_EVERY == 0:
            count = len(self.chats)
            some = [self.chats[(step // TEXT_EVERY * args.texts + i) % count] for i in range(args.texts)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = text_loss(self.wrapped, some, self.tokenizer.pad_token_id)
            (args.text_weight * loss).backward()
            losses["text"] = loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = args.rate * rate_at(step, args.steps) * group["times"]
        self.optimiser.step()
        self.optimiser.zero_grad()
        return losses

    @torch.no_grad()
    def validate(self) -> str:
        """Exact match by task on 350 held-out pictures, and the KL to the untrained model on held-out text."""
        exact = {task: hit for task, (hit, _) in judge(self.model, self.tokenizer, "validation", 350).items()}
        with torch.autocast("cpu", torch.bfloat16):
            text = float(text_loss(self.wrapped, self.held_out, self.tokenizer.pad_token_id))
        tasks = " ".join(f"{task} {100 * hit:.0f}" for task, hit in exact.items())
        return f"exact {sum(exact.values()) / len(exact):.3f} ({tasks}), text KL {text:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=16, help="pictures per step")
    parser.add_argument("--questions", type=int, default=8, help="questions per picture at most")
    parser.add_argument("--texts", type=int, default=4, help="text chats of every fourth step")
    parser.add_argument("--text-weight", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between saved states and validations")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    began, texts = time.time(), 0.0
    for step in range(trainer.first, args.steps):
        losses = trainer.step(step)
        texts = losses.get("text", texts)
        if (step + 1) % 10 == 0:
            pace = (step + 1 - trainer.first) * args.pictures / (time.time() - began)
            print(f"{step + 1} answer {losses['answer']:.3f} text {texts:.4f} {pace:.1f} pictures/s", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            trainer.save(step + 1)
            print(f"{step + 1} {trainer.validate()}", flush=True)


if __name__ == "__main__":
    main()
