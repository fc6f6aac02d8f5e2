"""Runs GPTQModel's GPTQ or GPTAQ on a Qwen2-VL model, in the environment that install.py makes for it.

Everything not named here is its default (act-group-aware order, damping 0.05, min-max grid, rounding where a linear saw
too few tokens). Its own way from chats to tokens adds the header of one more answer; the samples are handed over as
tokens instead, so that all tools see the same ones. This file is not called gptqmodel.py: that would hide the package.
"""

import os

from runner import Clock, arguments, inputs, report

args = arguments(method="gptq")

# Half of the cores by default, but its loader wants two of them: on a machine with two cores it would not start.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, min(12, ((os.cpu_count() or 1) + 1) // 2))))

from gptqmodel import GPTQConfig, GPTQModel  # noqa: E402, after the clock of runner.py has started
from gptqmodel.quantization.config import GPTAQConfig  # noqa: E402
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # noqa: E402, F401, so that imports are counted


def main() -> None:
    clock = Clock()
    gptaq = GPTAQConfig() if args.method == "gptaq" else None
    config = GPTQConfig(bits=args.bits, group_size=args.group_size, sym=args.symmetric, gptaq=gptaq)
    with clock("load"):
        model = GPTQModel.load(str(args.model), config, device="cpu")
        processor = AutoProcessor.from_pretrained(args.model)
    with clock("prepare"):
        samples = inputs(args.data, processor, args.samples)
    model.prepare_dataset = lambda *args, **kwargs: samples
    with clock("quantise"):
        model.quantize(samples, batch_size=1)
    with clock("save"):
        model.save(str(args.out))
    settings = {
        "tokens": sum(sample["input_ids"].shape[1] for sample in samples),
        "method": args.method,
        "damp": config.damp_percent,
        "act_group_aware": config.act_group_aware,
        "mse": config.mse,
        "workers": int(os.environ["GPTQMODEL_CPU_WORKERS"]),
        "offload_to_disk": config.offload_to_disk,
    }
    report("GPTQModel", args, clock, ("gptqmodel",), settings)


main()
