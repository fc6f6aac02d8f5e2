"""Lists the kernels that are compared, and packs a weight for each and multiplies with it.

Both steps are defined in `interface.py`; weights are packed by the peer's own functions where it has them.
What a peer needs is imported only inside its function. Peers with activations of 8 bits are in `int8_activations.py`.

Read for this: vLLM 0.26 and 0.32, humming-kernels 0.1.10 and 0.1.19, gemlite 0.6.0.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module

import torch

from benchmarks.kernel.gpu_timing import Product
from benchmarks.kernel.int8_activations import cutlass, int_mm
from benchmarks.kernel.interface import Kernel, Packed, Tensors
from vlmq_vllm.format import QuantizedWeight, pack

UTILS = "vllm.model_executor.layers.quantization.utils"
TRITON_W4A16 = "vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16"


def ours(weight: QuantizedWeight, dtype: torch.dtype, rounded: bool = False) -> Packed:
    """`rounded`: for activations of 8 bits."""
    from vlmq_vllm.kernels.dispatch import multiply
    from vlmq_vllm.kernels.repack import prepare

    runtime = prepare(weight)
    parts = {name: getattr(runtime, name) for name in ("packed", "scales", "zeros")}

    def bind(copy: Tensors) -> Product:
        weights = [replace(runtime, **copy)]
        if rounded:
            return lambda x: multiply(x.q, weights, token_scales=x.scales)
        return lambda x: multiply(x, weights)

    return Packed({name: part for name, part in parts.items() if part is not None}, bind)


def cublas(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    return Packed({"weight": weight.dequantize(dtype)}, lambda copy: lambda x: torch.mm(x, copy["weight"].T))


def humming(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """Through its own layer, with vLLM's padding; copies stand in for the layer's parameters during a call."""
    from humming import ops
    from humming.layer import HummingLayer

    bits = weight.format.bits
    rows, columns = weight.codes.shape
    config = {"dtype": f"uint{bits}", "group_size": max(weight.format.group_size, 0)}
    with torch.device(weight.codes.device):
        layer = HummingLayer(rows, columns, config, pad_n_to_multiple=256, pad_k_to_multiple=128, torch_dtype=dtype)
    layer.load_from_tensors({"weight": ops.pack_weight(weight.codes.int(), bits), "weight_scale": weight.scale})
    layer.transform()
    options = {"compute_config": '{"use_batch_invariant": false, "use_f16_accum": false, "gemm_type": "dense"}'}

    def bind(copy: Tensors) -> Product:
        return lambda x: torch.func.functional_call(layer, copy, (x,), options)

    return Packed({"weight": layer.weight.data, "weight_scale": layer.weight_scale.data}, bind)


def marlin(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """What vLLM's MarlinLinearKernel does for uint4b8, with a workspace that is made once."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    utils = import_module(f"{UTILS}.marlin_utils")
    device, (rows, columns) = weight.codes.device, weight.codes.shape
    empty = torch.empty(0, dtype=torch.int32, device=device)
    sizes = {"size_k": columns, "size_n": rows}
    repack = accepted(ops.gptq_marlin_repack, perm=empty)
    tensors = {
        "weight": repack(pack(weight.codes, 4).T.contiguous(), num_bits=4, **sizes),
        "weight_scale": utils.marlin_permute_scales(
            weight.scale.T.contiguous(), group_size=weight.format.group_size, **sizes
        ),
    }
    product = accepted(utils.apply_gptq_marlin_linear, g_idx=empty, g_idx_sort_indices=empty, is_k_full=True)
    fixed = {
        "weight_zp": empty,
        "workspace": utils.marlin_make_workspace_new(device, getattr(utils, "MARLIN_MAX_BLOCKS_PER_SM", 1)),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": rows,
        "input_size_per_partition": columns,
    }
    return Packed(tensors, lambda copy: lambda x: product(input=x, **copy, **fixed))


def machete(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """What vLLM's MacheteLinearKernel does for uint4b8."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    words = pack(weight.codes, 4).T  # [K / 8, N], and must lie column by column
    tensors = {
        "b_q": ops.machete_prepack_B(words, a_type=dtype, b_type=kind, group_scales_type=dtype),
        "b_group_scales": weight.scale.T.contiguous(),
    }
    product = partial(ops.machete_mm, b_type=kind, b_group_size=weight.format.group_size)
    return Packed(tensors, lambda copy: lambda x: product(a=x, **copy))


def triton_w4a16(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    """What vLLM's TritonW4A16LinearKernel does for uint4b8; its words lie along N."""
    product = import_module(TRITON_W4A16).triton_w4a16_gemm
    group = weight.format.group_size if weight.format.group_size > 0 else weight.codes.shape[1]
    tensors = {"b_q": pack(weight.codes.T, 4), "scales": weight.scale.T.contiguous()}
    return Packed(tensors, lambda copy: lambda x: product(a=x, **copy, qzeros=None, group_size=group, zp_bias=8))


def gemlite(weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
    import gemlite
    from gemlite.dtypes import TORCH_TO_DTYPE

    # Its default on Hopper adds up to hundreds of partial sums in bfloat16; every other kernel here adds in float32.
    gemlite.set_native_atomic_bfp16(False)
    format, (rows, columns) = weight.format, weight.codes.shape
    kind = TORCH_TO_DTYPE[dtype]
    group = format.group_size if format.group_size > 0 else columns
    layer = gemlite.GemLiteLinear(format.bits, group, columns, rows, input_dtype=kind, output_dtype=kind)
    layer.pack(weight.codes, weight.scale, format.middle)
    _, _, *rest = (tensor.data for tensor in layer.get_tensor_args())
    meta = layer.get_meta_args()

    def bind(copy: Tensors) -> Product:
        return lambda x: gemlite.forward_functional(x, None, [copy["W_q"], copy["scales"], *rest], meta)

    return Packed({"W_q": layer.W_q.data, "scales": layer.scales.data}, bind)


def accepted(function: Callable, **arguments) -> Callable:
    """`function` with those of the arguments that its version still has."""
    known = inspect.signature(function).parameters
    return partial(function, **{name: value for name, value in arguments.items() if name in known})


OURS, OURS_INT8, DENSE = "vlmq", "vlmq-int8", "cublas"
OWN = {16: OURS, 8: OURS_INT8}  # by the bits of activations
MODULES = ("vlmq_vllm.kernels.dispatch", "vlmq_vllm.kernels.repack")
OPS, SCALARS = "vllm._custom_ops", "vllm.scalar_type"
BOTH = {"asymmetric": True, "activations": (16, 8)}
KERNELS = {
    OURS: Kernel("vlmq", (2, 3, 4, 8), ours, MODULES, **BOTH),
    OURS_INT8: Kernel("vlmq int8", (4, 8), partial(ours, rounded=True), MODULES, asymmetric=True, activations=(8,)),
    DENSE: Kernel("cuBLAS", (2, 3, 4, 8), cublas, **BOTH),
    "humming": Kernel("Humming", (2, 3, 4), humming, ("humming.layer",)),
    "marlin": Kernel("Marlin", (4,), marlin, (OPS, f"{UTILS}.marlin_utils"), ("marlin_gemm", "gptq_marlin_repack")),
    "machete": Kernel("Machete", (4,), machete, (OPS, SCALARS), ("machete_mm", "machete_prepack_B")),
    "triton": Kernel("vLLM Triton", (4,), triton_w4a16, (TRITON_W4A16,)),
    "gemlite": Kernel("GemLite", (2, 4), gemlite, ("gemlite",)),
    "cutlass": Kernel("vLLM CUTLASS int8", (8,), cutlass, (OPS,), ("cutlass_scaled_mm",), activations=(8,)),
    "int_mm": Kernel("torch._int_mm", (8,), int_mm, activations=(8,)),
}
PEERS = [name for name in KERNELS if name not in OWN.values()]
