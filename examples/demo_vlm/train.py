"""Trains the demo model from nothing on drawn pictures: `python train.py OUT`.

The loss is the answers' cross-entropy plus a helper that is thrown away afterwards: a linear layer that names what lies
under each vision token. Without the helper the vision tower learns nothing in an hour. Matrices are optimised with
Muon, the rest with AdamW; the rate is constant and falls to zero over the last third. 86,400 pictures take an hour on
two idle CPU cores (bfloat16 autocast). `--resume` continues a killed run from its last checkpoint.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from architecture import build_model, build_processor, build_tokenizer, save
from batches import TAGS, batch
from evaluate import forward, judge
from pictures import draw


def optimisers(model, helper, rate: float) -> list[torch.optim.Optimizer]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and (".layers." in n or ".blocks." in n)]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen] + list(helper.parameters())
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))]


def rate_at(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, linear to zero over the last third; times the peak rate."""
    return min(1.0, (step + 1) / 100, 3 * (steps - step) / steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--pictures", type=int, default=32, help="pictures per step")
    parser.add_argument("--questions", type=int, default=8, help="questions per picture at most")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints and validations")
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_vlm_checkpoint.pt"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device)
    helper = torch.nn.Linear(model.config.text_config.hidden_size, len(TAGS)).to(device)
    optims = optimisers(model, helper, args.rate)
    parts, first = [model, helper, *optims], 0
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        first = state["step"]
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {first}", flush=True)

    began = time.time()
    for step in range(first, args.steps):
        drawn = [draw("train", step * args.pictures + i) for i in range(args.pictures)]
        data = {k: v.to(device) for k, v in batch(drawn, tokenizer, args.questions).items()}
        with torch.autocast(device, torch.bfloat16):
            logits, features = forward(model, data)
            named = helper(features)
        answer = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), data["labels"][:, 1:].flatten())
        seen = F.binary_cross_entropy_with_logits(named.float(), data["tags"], reduction="none").sum(-1).mean()
        (answer + 0.5 * seen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps)
            optim.step()
            optim.zero_grad()
        if (step + 1) % 20 == 0:
            pace = (step + 1 - first) * args.pictures / (time.time() - began)
            print(f"{step + 1} answer {answer:.3f} helper {seen:.3f} {pace:.1f} pictures/s", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            exact = {task: hit for task, (hit, _) in judge(model, tokenizer, "validation", 350).items()}
            mean = sum(exact.values()) / len(exact)
            print(f"{step + 1} exact {mean:.3f}", {t: round(s, 2) for t, s in exact.items()}, flush=True)
            new = args.checkpoint.with_suffix(".new")
            torch.save({"step": step + 1, "parts": [p.state_dict() for p in parts]}, new)
            new.rename(args.checkpoint)
    save(model, build_processor(tokenizer), args.out)


if __name__ == "__main__":
    main()
