"""Rounds the inputs of quantised linear layers to 8 bits, token by token, while the model runs.

A token's features x_t [I] become integers with one scale:

    s_t = max_i |x_ti| / 127           float32
    q_ti = round(x_ti / s_t)           half to even, in [-127, 127]; all zeros where s_t is 0

and the layer is y_t = s_t * (q_t W^T) + bias with the dequantised weight W. Integers up to 127 are exact in float16 and
bfloat16. The one statement of what a checkpoint with `"activation_bits": 8` means, for calibration, vLLM and
transformers alike. Under tensor parallelism a rank of a row-parallel layer rounds by the greatest of the features that
it holds. Fast products are in `kernels/int8.py`.
"""

import torch

ACTIVATION_BITS = (8, 16)  # 16: inputs are left as they are
LARGEST = 127


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers q [..., I] in x's dtype, NaN where a token is not finite, and scale [..., 1] float32 of x [..., I]."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / LARGEST
    q = (wide / scale).round().clamp(-LARGEST, LARGEST)
    return torch.where(scale == 0, 0.0, q).to(x.dtype), scale


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """s * q, rounded once to x's dtype: what of x [..., I] is left after `quantize_tokens`."""
    q, scale = quantize_tokens(x)
    return (q.float() * scale).to(x.dtype)
