"""vlmq-vllm: low-bit vision-language models, quantised offline (`offline/`) and served by vLLM (this package).

Importing this package loads neither torch nor vLLM nor Triton; vLLM calls `register` in each of its processes.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").exists():  # a checkout: offline/ and kernels/ lie beside this folder
    __path__.append(str(_root))


def register() -> None:
    """Entry point of the group vllm.general_plugins: make `--quantization vlmq` known. Harmless when repeated.

    vLLM calls it in every process and for every model, also for those that have nothing to do with vlmq, and an
    exception here would stop them all; so a failure is logged and nothing else.
    """
    import logging

    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if "vlmq" not in QUANTIZATION_METHODS:
            from vlmq_vllm.config import VLMQConfig

            register_quantization_config("vlmq")(VLMQConfig)
    except Exception:
        logging.getLogger(__name__).exception("vlmq could not register with vLLM; vlmq checkpoints will not load")
