"""Runs llm-compressor's GPTQ or AWQ on a Qwen2-VL model, in the environment that install.py makes for it.

As its own example for this model: weights in the checkpoint's dtype, one decoder layer after the other, vision tower
and lm_head left alone. Everything else is its default (static act-order, damping 0.01, block 128, min-max grid).
"""

from runner import Clock, arguments, loaded, report

args = arguments(method="gptq")

from llmcompressor import oneshot  # noqa: E402, after the clock of runner.py has started
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # noqa: E402, F401, so that imports are counted

IntermediatesCache.pin_memory = lambda *_, **__: None  # AWQ pins without asking, which without a GPU's driver fails


def recipe() -> list:
    weights = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": args.symmetric,
        "strategy": "group",
        "group_size": args.group_size,
    }
    groups = {"decoder": {"targets": ["Linear"], "weights": weights}}
    common = {"config_groups": groups, "ignore": ["re:.*lm_head", "re:.*visual.*"]}
    return {
        "gptq": lambda: [GPTQModifier(**common)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**common)],
    }[args.method]()


def main() -> None:
    clock = Clock()
    model, processor, samples = loaded(args, clock)
    modifiers = recipe()
    with clock("quantise"):
        oneshot(
            model=model,
            processor=processor,
            dataset=DataLoader(samples, batch_size=None),
            recipe=modifiers,
            num_calibration_samples=len(samples),
            sequential_targets=["Qwen2VLDecoderLayer"],
        )
    with clock("save"):
        model.save_pretrained(args.out, save_compressed=True)
        processor.save_pretrained(args.out)
    settings = {
        "tokens": sum(sample["input_ids"].shape[1] for sample in samples),
        "dtype": str(model.dtype),
        "method": args.method,
        "damp": getattr(modifiers[0], "dampening_frac", None),
        "act_order": str(getattr(modifiers[0], "actorder", None)),
        "sequential_targets": "Qwen2VLDecoderLayer",
    }
    report("llm-compressor", args, clock, ("llmcompressor", "compressed-tensors"), settings)


main()
