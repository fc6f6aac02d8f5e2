"""vlmq-vllm: low-bit vision-language models, quantised offline (`offline/`) and served by vLLM (this package).

Importing this package loads neither torch nor vLLM, Triton or transformers.
"""

from pathlib import Path

from vlmq_vllm.import_hook import after_import

__version__ = "0.1.0"
OLDEST, NEWEST = (0, 26), (0, 33)  # releases of vLLM that the tests run with

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").exists():  # a checkout: offline/ and kernels/ lie beside this folder
    __path__.append(str(_root))


def _register_with_transformers() -> None:
    import vlmq_vllm.huggingface  # noqa: F401, registers itself


after_import("transformers.quantizers.auto", _register_with_transformers)


def register() -> None:
    """Entry point of the group vllm.general_plugins: make `--quantization vlmq` known. Harmless when repeated.

    vLLM calls it for every model in the world, and an exception here would stop them all; so a failure is logged and
    nothing else.
    """
    import logging

    logger = logging.getLogger(__name__)
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
        from vllm.version import __version_tuple__

        release = __version_tuple__[:2]
        if not OLDEST <= release <= NEWEST and release != (0, 0):  # which is a build from source
            found, first, last = (".".join(map(str, version)) for version in (release, OLDEST, NEWEST))
            logger.warning(
                f"this is vLLM {found}; vlmq-vllm {__version__} is tested with {first} to {last}, install one of these "
                "if vlmq checkpoints do not load"
            )
        if "vlmq" not in QUANTIZATION_METHODS:
            from vlmq_vllm.serving.config import VLMQConfig

            register_quantization_config("vlmq")(VLMQConfig)
    except Exception:
        logger.exception("vlmq could not register with vLLM; vlmq checkpoints will not load")
