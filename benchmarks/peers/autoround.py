"""Runs AutoRound on a Qwen2-VL model, in the environment that install.py makes for it.

As for any vision-language model it rounds the decoder's linears and leaves vision tower and lm_head alone. Chats are
as long as they are, so that batches are of one chat and gradients are gathered over eight; all else is its default, but
for the number of iterations and the learning rate, which the caller may give. This file is not called auto_round.py:
that would hide the package.
"""

from runner import Clock, arguments, loaded, report

args = arguments(iters="200", lr="")

from auto_round import AutoRound  # noqa: E402, after the clock of runner.py has started
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration  # noqa: E402, F401, so that imports are counted


def main() -> None:
    clock = Clock()
    model, processor, samples = loaded(args, clock)
    with clock("quantise"):
        quantiser = AutoRound(
            model,
            AutoTokenizer.from_pretrained(args.model),
            processor=processor,
            bits=args.bits,
            group_size=args.group_size,
            sym=args.symmetric,
            dataset=DataLoader(samples, batch_size=None),
            nsamples=len(samples),
            iters=int(args.iters),
            lr=float(args.lr) if args.lr else None,
            batch_size=1,
            gradient_accumulate_steps=8,
            device_map="cpu",
        )
        quantiser.quantize()
    with clock("save"):
        quantiser.save_quantized(str(args.out), format="auto_round:gptqmodel")
        processor.save_pretrained(args.out)
    settings = {
        "tokens": sum(sample["input_ids"].shape[1] for sample in samples),
        "iterations": int(args.iters),
        "lr": args.lr or f"1 / {args.iters}",
    }
    report("AutoRound", args, clock, ("auto-round",), settings)


main()
